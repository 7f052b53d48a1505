//! Soft wishes: which of the hosts that fit is best. Higher is better.
//!
//! Always holds: integers only, so that every host of the cluster computes the same.

use crate::CPU_OVERCOMMIT;
use crate::fit::{Ask, Query};
use crate::room::{CPUS, MEMORY};
use crate::work::{Own, Work};

const LAST_HOST: i64 = 60;
const PER_GUEST: i64 = -15;
const NO_FAILOVER_ROOM: i64 = -200;
const CROWDED: i64 = -1000;
const NOT_ARMED: i64 = -250;
const FAILED_TARGET: i64 = -2000;
const CRASHED: i64 = -40_000;

const REMARKS: [&str; 6] = [
    "more than 8 virtual CPUs per thread",
    "little room left for a failover",
    "guard or watchdog not armed",
    "it ran here last",
    "moves to it failed lately",
    "it could not stay up here lately",
];

/// A score with what made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Score {
    pub(crate) total: i64,
    free_permille: u64,
    guests: u32,
    /// Which of the remarks hold.
    remarks: u8,
    /// By preferences and soft rules.
    wishes: i64,
}

impl Score {
    /// Thousandths of the memory that are free then.
    pub(crate) fn free(&self) -> i64 {
        i64::try_from(self.free_permille).unwrap_or(0)
    }

    pub(crate) fn describe(&self) -> String {
        let percent = self.free_permille / 10;
        let mut text = format!("{percent} % memory free then, {} VMs", self.guests);
        for (n, remark) in REMARKS.iter().enumerate() {
            if self.remarks & (1 << n) != 0 {
                text.push_str(", ");
                text.push_str(remark);
            }
        }
        if self.wishes != 0 {
            text.push_str(&format!(", {:+} by wishes and soft rules", self.wishes));
        }
        text
    }
}

impl Work<'_> {
    /// Scores a host that fits.
    pub(crate) fn score(&self, query: &Query<'_>, ask: &Ask, at: usize) -> Score {
        let host = &self.hosts[at];
        let vm = &self.vms[query.vm];
        let (mut need, mut cpus, mut coming) = (0u64, 0u64, 0u32);
        for vm in query.unit().filter(|vm| !self.vms[*vm].own.on(at)) {
            need = need.saturating_add(self.room.need(vm)[MEMORY]);
            cpus = cpus.saturating_add(self.room.need(vm)[CPUS]);
            coming += 1;
        }
        let guests = host.guests + coming;
        let used = self.room.used(at);
        let memory = self.room.have(at)[MEMORY].max(1);
        let free = memory.saturating_sub(used[MEMORY].saturating_add(need));
        let free_permille = permille(free, memory);
        let mut total = i64::try_from(free_permille).unwrap_or(0) + PER_GUEST * i64::from(guests);
        let mut remarks = 0u8;
        let mut weigh = |holds: bool, weight: i64, remark: usize| {
            if holds {
                total += weight;
                remarks |= 1 << remark;
            }
        };
        let threads = u64::from(host.threads).saturating_mul(u64::from(CPU_OVERCOMMIT));
        let load = used[CPUS].saturating_add(cpus).saturating_mul(1000) / threads.max(1);
        let load = i64::try_from(load).unwrap_or(i64::MAX);
        weigh(load > 1000, CROWDED, 0);
        let share = 1000 / u64::try_from(self.good_hosts.max(1)).unwrap_or(1);
        let tight = self.good_hosts > 1 && free_permille < share;
        weigh(tight, NO_FAILOVER_ROOM, 1);
        weigh(!host.armed, NOT_ARMED, 2);
        weigh(ask.last == Some(at), LAST_HOST, 3);
        if ask.remembered {
            let memory = self.input.memory;
            let failed = memory.failed_targets(vm.name, host.name);
            weigh(failed > 0, FAILED_TARGET * i64::from(failed.min(8)), 4);
            let crashed = memory.crashed_on(vm.name, host.name, self.input.now);
            weigh(crashed, CRASHED, 5);
        }
        let wishes = self.wishes(query, at);
        Score {
            total: total.saturating_sub(load / 4).saturating_add(wishes),
            free_permille,
            guests,
            remarks,
            wishes,
        }
    }

    /// Preferences of the VMs, and soft rules.
    fn wishes(&self, query: &Query<'_>, at: usize) -> i64 {
        let host = &self.hosts[at];
        let mut total = 0i64;
        for vm in query.unit() {
            let seen = &self.vms[vm];
            for preference in &seen.record.spec.prefer {
                let about = host
                    .record
                    .is_some_and(|record| preference.is_about(host.name, &record.spec));
                if about {
                    total += i64::from(preference.weight);
                }
            }
            total += self.domains.score(vm, seen.own, at);
        }
        total
    }

    /// The host that a free VM ran on last.
    pub(crate) fn last_host(&self, vm: usize) -> Option<usize> {
        let seen = &self.vms[vm];
        let last = seen.record.last_host.as_ref();
        let last = last.filter(|_| seen.own == Own::Free);
        last.and_then(|last| self.host_index.get(last))
    }
}

fn permille(part: u64, whole: u64) -> u64 {
    match part.checked_mul(1000) {
        Some(part) => part / whole,
        None => u64::try_from(u128::from(part) * 1000 / u128::from(whole)).unwrap_or(1000),
    }
}
