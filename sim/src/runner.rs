//! Runs seeds, and judges whether a cluster that was healed comes to rest as it should.

use crate::faults::Op;
use crate::guest::Vcpu;
use crate::leader::Leader;
use crate::mutate::Mutation;
use crate::time::{SEC, show};
use crate::world::{Broken, Detail, World};
use quorate_state::{Command, HostMode, Ownership};
use quorate_types::VmName;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// After everything is mended, the cluster must have come to rest within this: the longest of the
/// planner's waits is five minutes.
const REST_WITHIN: u64 = 420 * SEC;
/// It must stay at rest for this long.
const REST_FOR: u64 = 4 * SEC;

/// What a seed came to.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The seed.
    pub seed: u64,
    /// The promise that was broken, if any.
    pub broken: Option<Broken>,
    /// Virtual time.
    pub virtual_ns: u64,
    /// Events.
    pub events: u64,
    /// How many VMs were taken from their host because its storage was cut.
    pub storage_cuts: u64,
    /// Connections to services that lived through a step of a ring change.
    pub connections: u64,
}

/// Runs a seed to its end.
#[must_use]
pub fn run_seed(seed: u64, mutation: Option<Mutation>, detail: Detail) -> (Verdict, World) {
    let mut world = World::random(seed, mutation, detail);
    if detail > Detail::Nothing {
        world.print_lines();
    }
    world.run_until(world.chaos.until + SEC);
    world.settle();
    let verdict = Verdict {
        seed,
        broken: world.broken().cloned(),
        virtual_ns: world.now(),
        events: world.events(),
        storage_cuts: world.check.san.used,
        connections: world.clients.survived,
    };
    (verdict, world)
}

/// Runs `count` seeds from `start` on on `threads` threads, and stops after `stop_after` failures.
pub fn run_seeds(
    start: u64,
    count: u64,
    threads: u64,
    mutation: Option<Mutation>,
    stop_after: usize,
    done: &(dyn Fn(&Verdict) + Sync),
) -> Vec<Verdict> {
    let next = AtomicU64::new(start);
    let failed = Mutex::new(Vec::new());
    let full = || {
        failed
            .lock()
            .map_or(true, |list: std::sync::MutexGuard<'_, Vec<Verdict>>| {
                list.len() >= stop_after
            })
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= start + count || full() {
                        return;
                    }
                    let (verdict, _) = run_seed(seed, mutation, Detail::Nothing);
                    done(&verdict);
                    if verdict.broken.is_some()
                        && let Ok(mut list) = failed.lock()
                    {
                        list.push(verdict);
                    }
                }
            });
        }
    });
    let mut list = failed.into_inner().unwrap_or_default();
    list.sort_by_key(|verdict| verdict.seed);
    list
}

impl World {
    /// Mends everything and waits until the cluster is as it should be.
    pub fn settle(&mut self) {
        if self.broken().is_some() {
            return;
        }
        self.heal();
        self.setup.want_waiting = true;
        let end = self.now + REST_WITHIN;
        let mut since = None;
        let mut why = String::new();
        while self.broken().is_none() && self.now < end {
            self.run_until(self.now + SEC);
            self.switch_on();
            match self.unrest() {
                None => {
                    let at = *since.get_or_insert(self.now);
                    if self.now >= at + REST_FOR {
                        return;
                    }
                }
                Some(text) => {
                    since = None;
                    why = text;
                }
            }
        }
        if self.broken().is_none() {
            let text = format!(
                "{} after everything was mended: {why}",
                show(REST_WITHIN).trim()
            );
            self.fail("liveness", text);
        }
    }

    /// Operators switch hosts on again and end drains.
    fn switch_on(&mut self) {
        for host in 0..self.hosts.len() {
            if !self.hosts[host].on {
                self.hosts[host].held_off = false;
                self.power_on(host);
            }
            self.start_daemon(host);
        }
        let state = self.newest();
        let idle = state
            .hosts
            .iter()
            .find(|(_, host)| host.mode != HostMode::Active);
        if let Some((host, _)) = idle {
            let (host, mode) = (host.clone(), HostMode::Active);
            self.operate(Op::command(Command::SetHostMode { host, mode }));
        }
    }

    /// What is not as it should be yet.
    fn unrest(&self) -> Option<String> {
        let Some(leader) = self.leading() else {
            return Some("nobody leads".into());
        };
        let state = self.newest();
        let now = self.hosts[leader].local(self.now);
        let leader = &self.hosts[leader].daemon.as_ref()?.leader;
        let Some(leases) = leader.leases.as_ref() else {
            return Some("the leader has no leases yet".into());
        };
        for (name, host) in &state.hosts {
            if host.mode != HostMode::Active {
                return Some(format!("{name} is {:?}", host.mode));
            }
            if leases.table.is_sealed(name) {
                return Some(format!("{name} is sealed"));
            }
            if leases.table.lease_left(name, now).0 == 0 {
                return Some(format!("{name} has no lease"));
            }
        }
        if let Some(text) = self.san_unrest(&state) {
            return Some(text);
        }
        if let Some(text) = self.service_unrest(&state) {
            return Some(text);
        }
        for (vm, record) in &state.vms {
            let runs =
                |guest: &&crate::guest::Guest| guest.vm == *vm && guest.vcpu == Vcpu::Running;
            let running: Vec<_> = self.guests.values().filter(runs).collect();
            let waits = leader.waiting.get(vm).cloned().unwrap_or_default();
            match &record.ownership {
                Ownership::Migrating { id, .. } => {
                    return Some(format!("migration {id} of {vm} has not ended: {waits}"));
                }
                _ if record.deleting => return Some(format!("{vm} is being deleted: {waits}")),
                Ownership::Free if !record.wanted() => {}
                Ownership::Owned { host, .. } if record.wanted() => {
                    let there = running
                        .first()
                        .map(|guest| self.hosts[guest.host].name.clone());
                    if running.len() != 1 || there.as_ref() != Some(host) {
                        return Some(format!("{vm} does not run on {host}: {waits}"));
                    }
                }
                Ownership::Free
                    if self.waits_for_ever(vm, leader) || self.waits_for_room(&waits) => {}
                _ => return Some(format!("{vm} is not as wanted: {waits}")),
            }
        }
        self.stray()
    }

    /// A process that nobody owns.
    fn stray(&self) -> Option<String> {
        let state = self.newest();
        let stray = self.guests.values().find(|guest| {
            let record = state.vms.get(&guest.vm);
            !record.is_some_and(|record| {
                let owners = record.ownership.hosts();
                owners
                    .iter()
                    .any(|(host, _)| **host == self.hosts[guest.host].name)
            })
        });
        stray.map(|guest| {
            format!(
                "a copy of {} is left on {}",
                guest.vm, self.hosts[guest.host].name
            )
        })
    }

    /// The hosts were made just large enough for the VMs there were, and the operator has made more since.
    fn waits_for_room(&self, why: &str) -> bool {
        let setup = &self.setup;
        let more = self.newest().vms.len() > setup.manifest.vms.len();
        let none = why.starts_with("no host can take it");
        // A disk of hosts is on two of them, and after several losses whole on one, or on none.
        none && (setup.own || setup.preemption && more)
    }

    /// A dependency is stopped by the operator's wish, does not exist, or finds no place: the VM waits for ever.
    fn waits_for_ever(&self, vm: &VmName, leader: &Leader) -> bool {
        let state = self.newest();
        let mut todo = vec![vm.clone()];
        let mut seen = std::collections::BTreeSet::new();
        while let Some(vm) = todo.pop() {
            let Some(record) = state.vms.get(&vm) else {
                return true;
            };
            let why = leader.waiting.get(&vm);
            if !record.wanted() || why.is_some_and(|why| self.waits_for_room(why)) {
                return true;
            }
            if seen.insert(vm) {
                todo.extend(record.spec.depends_on.keys().cloned());
            }
        }
        false
    }
}
