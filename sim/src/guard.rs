//! The guard of a host: ends or freezes guests when the lease ends, whatever the agent does, and feeds
//! the watchdog only as long as nothing runs past the deadline.

use crate::event::{Ask, D, Event, G, H, HostId, Q};
use crate::guest::{ProcId, Vcpu};
use crate::host::Guard;
use crate::mutate::Mutation;
use crate::time::MS;
use crate::world::World;
use quorate_agent_logic::Token;
use quorate_membership::Instant;

/// A freeze that was not confirmed is tried again after this.
const AGAIN: u64 = 20 * MS;

impl World {
    /// A guard begins to watch; it is told the lease that the agent knows of.
    pub(crate) fn start_guard(&mut self, host: HostId) {
        let deadline = self.hosts[host]
            .daemon
            .as_ref()
            .and_then(|daemon| daemon.logic.as_ref()?.lease().deadline());
        let mine = |guest: &crate::guest::Guest| guest.host == host;
        let guests = self.guests.iter().filter(|(_, guest)| mine(guest));
        let guests = guests
            .map(|(proc, guest)| (*proc, guest.vcpu == Vcpu::Paused && !guest.disks))
            .collect();
        let now = self.now;
        let at = &mut self.hosts[host];
        at.guard_inc += 1;
        at.guard_stopped_until = 0;
        at.guard = Some(Guard {
            deadline,
            guests,
            freezing: Default::default(),
        });
        if at.watchdog.is_some() {
            at.fed = Some(now);
            self.watchdog_next(host);
        }
        let name = self.hosts[host].name.clone();
        self.trace(|| format!("{name}: guard starts"));
        self.guard_after(host, 0, G::Feed);
        self.guard_after(host, 0, G::Look);
    }

    fn guard_after(&mut self, host: HostId, delay: u64, what: G) {
        let inc = self.hosts[host].guard_inc;
        self.after(delay, Event::Guard(host, inc, what));
    }

    /// The agent passes on a lease.
    pub(crate) fn guard_lease(&mut self, host: HostId, deadline: Instant) {
        let freeze_before = self.setup.timings.freeze_before;
        let clock = self.hosts[host].clock;
        let Some(guard) = self.hosts[host].guard.as_mut() else {
            return;
        };
        if guard.deadline.is_some_and(|old| deadline <= old) {
            return;
        }
        guard.deadline = Some(deadline);
        for at in [deadline.minus(freeze_before), deadline] {
            let at = clock.true_time(at).max(self.now);
            let inc = self.hosts[host].guard_inc;
            self.queue.push(at, Event::Guard(host, inc, G::Look));
        }
    }

    /// Whether the guard lets guests run now.
    pub(crate) fn guard_leave(&self, host: HostId) -> bool {
        if self.mutated(Mutation::GuardOff) {
            return true;
        }
        let at = &self.hosts[host];
        let freeze_before = self.setup.timings.freeze_before;
        let now = at.local(self.now);
        let held = |guard: &Guard| {
            guard
                .deadline
                .is_some_and(|end| now < end.minus(freeze_before))
        };
        at.guard_runs(self.now) && at.guard.as_ref().is_some_and(held)
    }

    /// A process is under guard from now on, or about to run again.
    pub(crate) fn guard_holds(&mut self, host: HostId, proc: ProcId) {
        if let Some(guard) = self.hosts[host].guard.as_mut() {
            guard.guests.insert(proc, false);
        }
    }

    pub(crate) fn guard_forgets(&mut self, host: HostId, proc: ProcId) {
        if let Some(guard) = self.hosts[host].guard.as_mut() {
            guard.guests.remove(&proc);
            guard.freezing.remove(&proc);
        }
    }

    pub(crate) fn guard_event(&mut self, host: HostId, what: G) {
        match what {
            G::Feed => self.guard_feed(host),
            G::Look => self.guard_look(host),
            G::Frozen { proc, good } => self.guard_frozen(host, proc, good),
        }
    }

    fn guard_feed(&mut self, host: HostId) {
        let now = self.hosts[host].local(self.now);
        let Some(bound) = self.hosts[host].watchdog else {
            return;
        };
        let off = self.mutated(Mutation::GuardOff);
        let Some(guard) = &self.hosts[host].guard else {
            return;
        };
        let held = guard.deadline.is_some_and(|end| now < end);
        if held || off || guard.guests.values().all(|frozen| *frozen) {
            self.hosts[host].fed = Some(self.now);
        }
        self.guard_after(host, bound.0 * MS / 5, G::Feed);
    }

    fn guard_look(&mut self, host: HostId) {
        if self.mutated(Mutation::GuardOff) {
            return;
        }
        let freeze_before = self.setup.timings.freeze_before;
        let now = self.hosts[host].local(self.now);
        let Some(guard) = self.hosts[host].guard.as_mut() else {
            return;
        };
        let open = guard.guests.iter().filter(|(_, frozen)| !**frozen);
        let open: Vec<ProcId> = open.map(|(proc, _)| *proc).collect();
        if guard.deadline.is_none_or(|end| now >= end) {
            for proc in open {
                self.check.guard_kills += 1;
                self.after(MS, Event::Guest(proc, Q::Killed { by_guard: true }));
            }
            return;
        }
        if guard
            .deadline
            .is_some_and(|end| now < end.minus(freeze_before))
            || open.is_empty()
        {
            return;
        }
        let todo: Vec<ProcId> = open
            .into_iter()
            .filter(|proc| guard.freezing.insert(*proc))
            .collect();
        let inc = self.hosts[host].guard_inc;
        for proc in todo {
            let delay = self.rng.range(MS / 2, 12 * MS);
            let ask = Ask::GuardFreeze(inc);
            let token = Token(0);
            self.after(delay, Event::Guest(proc, Q::Ask { inc, token, ask }));
        }
        self.guard_after(host, AGAIN, G::Look);
    }

    fn guard_frozen(&mut self, host: HostId, proc: ProcId, good: bool) {
        let thawing = self.guests.get(&proc).is_some_and(|guest| guest.thawing);
        let Some(guard) = self.hosts[host].guard.as_mut() else {
            return;
        };
        guard.freezing.remove(&proc);
        if !good || thawing {
            return;
        }
        if let Some(frozen) = guard.guests.get_mut(&proc) {
            *frozen = true;
            self.note_guest(proc, "frozen: its lease runs out");
            if self.hosts[host].daemon.is_some() {
                self.daemon_after(host, MS, D::Froze(proc));
            }
        }
    }

    /// Looks at the watchdog when it could fire at the earliest.
    fn watchdog_next(&mut self, host: HostId) {
        let at = &self.hosts[host];
        let (Some(fed), Some(bound), boots) = (at.fed, at.watchdog, at.boots) else {
            return;
        };
        let due = at.clock.true_time(at.clock.local(fed).plus(bound));
        self.queue
            .push(due.max(self.now), Event::Host(host, boots, H::Watchdog));
    }

    pub(crate) fn watchdog_event(&mut self, host: HostId) {
        let at = &self.hosts[host];
        let (Some(fed), Some(bound)) = (at.fed, at.watchdog) else {
            return;
        };
        if at.local(self.now) < at.clock.local(fed).plus(bound) {
            return self.watchdog_next(host);
        }
        let name = at.name.clone();
        self.note(|| format!("{name}: its watchdog fires"));
        self.power_cut(host);
        let delay = self.setup.boot_ns;
        self.after(delay, Event::World(crate::event::W::PowerOn(host)));
    }
}
