//! The world: hosts, network, disks, virtual time; one event at a time.
//!
//! Always holds: an event of a process that is stopped waits until it goes on, in order; one of a
//! process that has ended is dropped; after each event every promise is checked.

use crate::check::Checker;
use crate::copies::Own;
use crate::event::{D, Event, H, HostId, W, Wire};
use crate::faults::Chaos;
use crate::guest::{Disk, Guest, ProcId};
use crate::host::Host;
use crate::mutate::Mutation;
use crate::net::Net;
use crate::power::Bmc;
use crate::queue::Queue;
use crate::raft::{Data, Entry};
use crate::rng::Rng;
use crate::san::San;
use crate::services::Clients;
use crate::setup::Setup;
use crate::time::show;
use quorate_state::{Outcome, Refusal, State};
use quorate_types::report::SavedState;
use quorate_types::{HostName, VmName};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How much is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Nothing.
    Nothing,
    /// What an operator would call an event.
    Events,
    /// Every step.
    All,
}

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// When, in virtual nanoseconds.
    pub at: u64,
    /// Which promise.
    pub promise: &'static str,
    /// What was seen.
    pub text: String,
}

/// What the entry with the same index did, on whichever host it was applied first.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) entry: Arc<Entry>,
    pub(crate) state: Arc<State>,
    pub(crate) result: Option<Result<Outcome, Refusal>>,
}

/// Everything.
pub struct World {
    pub(crate) now: u64,
    pub(crate) queue: Queue<Event>,
    pub(crate) rng: Rng,
    pub(crate) setup: Setup,
    pub(crate) mutation: Option<Mutation>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) net: Net,
    pub(crate) bmcs: Vec<Bmc>,
    pub(crate) san: San,
    pub(crate) own: Own,
    pub(crate) guests: BTreeMap<ProcId, Guest>,
    pub(crate) next_proc: ProcId,
    pub(crate) disks: BTreeMap<VmName, Disk>,
    /// Saved memories: what the guest's memory knows.
    pub(crate) files: BTreeMap<String, u64>,
    pub(crate) history: Vec<Applied>,
    pub(crate) clients: Clients,
    pub(crate) check: Checker,
    pub(crate) chaos: Chaos,
    pub(crate) detail: Detail,
    pub(crate) lines: Vec<String>,
    pub(crate) echo: bool,
    pub(crate) coarse: bool,
    pub(crate) events: u64,
}

impl World {
    /// Runs until `at`, or until a promise is broken.
    pub fn run_until(&mut self, at: u64) {
        while self.check.broken.is_none() && self.queue.next_at().is_some_and(|next| next <= at) {
            self.step();
        }
        if self.check.broken.is_none() {
            self.now = self.now.max(at);
        }
    }

    /// The first promise that was broken.
    #[must_use]
    pub fn broken(&self) -> Option<&Broken> {
        self.check.broken.as_ref()
    }

    /// What was written down.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Times are written in tenths of a second.
    pub(crate) fn coarse(&mut self) {
        self.coarse = true;
    }

    /// Virtual time.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Events so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    fn step(&mut self) {
        let Some((at, seq, event)) = self.queue.pop() else {
            return;
        };
        self.now = at;
        if let Some(until) = self.waits(&event) {
            return self.queue.put_off(until, seq, event);
        }
        self.events += 1;
        self.dispatch(event);
        self.check_all();
    }

    /// Until when the process that an event is for is stopped.
    fn waits(&self, event: &Event) -> Option<u64> {
        let until = match event {
            Event::Deliver { to, .. } => {
                let host = self.hosts.get(*to)?;
                host.stopped_until.max(host.daemon_stopped_until)
            }
            Event::Daemon(host, ..) => {
                let host = self.hosts.get(*host)?;
                host.stopped_until.max(host.daemon_stopped_until)
            }
            Event::Guard(host, ..) => {
                let host = self.hosts.get(*host)?;
                host.stopped_until.max(host.guard_stopped_until)
            }
            Event::Guest(proc, _) => {
                let guest = self.guests.get(proc)?;
                self.hosts.get(guest.host)?.stopped_until
            }
            Event::Host(..) | Event::World(_) => 0,
        };
        (until > self.now).then_some(until)
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, wire } => {
                if self.hosts[to].on && self.hosts[to].daemon.is_some() {
                    self.deliver(from, to, wire);
                }
            }
            Event::Daemon(host, inc, what) => {
                let alive = &self.hosts[host];
                if alive.on && alive.daemon.is_some() && alive.daemon_inc == inc {
                    self.daemon_event(host, what);
                }
            }
            Event::Guard(host, inc, what) => {
                let alive = &self.hosts[host];
                if alive.on && alive.guard.is_some() && alive.guard_inc == inc {
                    self.guard_event(host, what);
                }
            }
            Event::Guest(proc, what) => {
                if self.guests.contains_key(&proc) {
                    self.guest_event(proc, what);
                }
            }
            Event::Host(host, boots, H::Watchdog) => {
                if self.hosts[host].on && self.hosts[host].boots == boots {
                    self.watchdog_event(host);
                }
            }
            Event::World(what) => self.world_event(what),
        }
    }

    fn world_event(&mut self, what: W) {
        match what {
            W::Fault(fault) => self.begin_fault(fault),
            W::Mend(fault) => self.mend(fault),
            W::PowerOn(host) => self.power_on(host),
            W::Revive(host) => {
                self.hosts[host].held_off = false;
                self.power_on(host);
            }
            W::StartDaemon(host, boots) => {
                if self.hosts[host].on && self.hosts[host].boots == boots {
                    self.start_daemon(host);
                }
            }
            W::BmcOff(host) => {
                let name = self.hosts[host].name.clone();
                self.note(|| format!("{name}: switched off by its fence device"));
                self.hosts[host].held_off = true;
                self.power_cut(host);
                self.revive_later(host);
            }
            W::San {
                host,
                target,
                open,
                knew,
            } => self.san_changes(host, target, open, knew),
            W::NextFault => self.next_fault(),
            W::NextOp => self.next_op(),
            W::Clients => self.clients_tick(),
            W::ServiceOp => self.service_op(),
        }
    }

    /// Schedules an event after a delay.
    pub(crate) fn after(&mut self, delay: u64, event: Event) {
        self.queue.push(self.now + delay, event);
    }

    /// Schedules an event of the present life of a daemon.
    pub(crate) fn daemon_after(&mut self, host: HostId, delay: u64, what: D) {
        let inc = self.hosts[host].daemon_inc;
        self.after(delay, Event::Daemon(host, inc, what));
    }

    /// Writes down what an operator would call an event.
    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.detail >= Detail::Events {
            self.write(&text());
        }
    }

    /// Writes down a step.
    pub(crate) fn trace(&mut self, text: impl FnOnce() -> String) {
        if self.detail >= Detail::All {
            self.write(&format!("    {}", text()));
        }
    }

    fn write(&mut self, text: &str) {
        let line = if self.coarse {
            format!("{:>6.1}s {text}", self.now as f64 / 1e9)
        } else {
            format!("{} {text}", show(self.now))
        };
        if self.echo {
            println!("{line}");
        } else {
            self.lines.push(line);
        }
    }

    /// A promise is broken. The first one counts.
    pub(crate) fn fail(&mut self, promise: &'static str, text: impl Into<String>) {
        if self.check.broken.is_none() {
            let (at, text) = (self.now, text.into());
            self.note(|| format!("BROKEN {promise}: {text}"));
            self.check.broken = Some(Broken { at, promise, text });
        }
    }

    pub(crate) fn host_id(&self, name: &HostName) -> Option<HostId> {
        self.hosts.iter().position(|host| host.name == *name)
    }

    pub(crate) fn mutated(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// The newest state that any host has applied.
    pub(crate) fn newest(&self) -> Arc<State> {
        let newest = self
            .history
            .last()
            .map(|applied| Arc::clone(&applied.state));
        newest.unwrap_or_default()
    }

    /// The state after the entry with this index, applied for the first time if need be.
    pub(crate) fn state_at(&mut self, host: HostId, index: usize) -> Arc<State> {
        while self.history.len() < index {
            let Some(entry) = self.hosts[host].raft.log.get(self.history.len()).cloned() else {
                break;
            };
            self.apply_first(entry);
        }
        let found = index.checked_sub(1).and_then(|at| self.history.get(at));
        found
            .map(|applied| Arc::clone(&applied.state))
            .unwrap_or_default()
    }

    fn apply_first(&mut self, entry: Arc<Entry>) {
        let before = self.newest();
        let Data::Command(envelope) = &entry.data else {
            let state = before;
            let result = None;
            return self.history.push(Applied {
                entry,
                state,
                result,
            });
        };
        let mut state = (*before).clone();
        let result = state.apply(envelope);
        // The log of events is not looked at here; without it a copy is cheap.
        state.log = Default::default();
        self.check_applied(&before, &state, envelope, &result);
        self.check_services_applied(&before, envelope, &result);
        self.note_applied(envelope, &result);
        let state = Arc::new(state);
        let result = Some(result);
        self.history.push(Applied {
            entry,
            state,
            result,
        });
    }

    /// A saved memory's name on the shared storage.
    pub(crate) fn file_name(saved: &SavedState) -> String {
        format!("{}/{}", saved.pool, saved.file)
    }

    /// Sends a message to a daemon, by the direct way or through a third host.
    pub(crate) fn send(&mut self, from: HostId, to: HostId, wire: Wire) {
        let alive = |host: &Host| host.on && host.daemon.is_some();
        let relays: Vec<HostId> = (0..self.hosts.len())
            .filter(|host| alive(&self.hosts[*host]))
            .collect();
        let copies = self.net.route(from, to, &relays, self.now, &mut self.rng);
        for delay in copies {
            let wire = wire.clone();
            self.after(delay, Event::Deliver { from, to, wire });
        }
    }
}
