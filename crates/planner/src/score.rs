//! Soft wishes: which of the hosts that fit is best. Higher is better.
//!
//! Always holds: integers only, so that every host of the cluster computes the same.

use crate::CPU_OVERCOMMIT;
use crate::fit::Query;
use crate::work::{Own, Work};

const LAST_HOST: i64 = 60;
const PER_GUEST: i64 = -15;
const NO_FAILOVER_ROOM: i64 = -200;
const CROWDED: i64 = -1000;
const NOT_ARMED: i64 = -250;
const FAILED_TARGET: i64 = -2000;
const CRASHED: i64 = -40_000;

/// A score with what made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Score {
    pub(crate) total: i64,
    free_permille: u64,
    guests: u32,
    remarks: Vec<&'static str>,
}

impl Score {
    pub(crate) fn describe(&self) -> String {
        let percent = self.free_permille / 10;
        let mut text = format!("{percent} % memory free then, {} VMs", self.guests);
        for remark in &self.remarks {
            text.push_str(", ");
            text.push_str(remark);
        }
        text
    }
}

impl Work<'_> {
    /// Scores a host that fits.
    pub(crate) fn score(&self, query: &Query<'_>, at: usize) -> Score {
        let host = &self.hosts[at];
        let vm = &self.vms[query.vm];
        let unit = std::iter::once(query.vm).chain(query.with.iter().copied());
        let coming: Vec<usize> = unit.filter(|vm| !self.vms[*vm].own.on(at)).collect();
        let need: u64 = coming.iter().map(|vm| self.vms[*vm].need()).sum();
        let cpus: u32 = coming.iter().map(|vm| self.vms[*vm].spec.cpus).sum();
        let guests = host.guests + u32::try_from(coming.len()).unwrap_or(u32::MAX);
        let memory = host.memory().max(1);
        let free = memory.saturating_sub(host.used.saturating_add(need));
        let free_permille = u64::try_from(u128::from(free) * 1000 / u128::from(memory));
        let free_permille = free_permille.unwrap_or(0);

        let mut total = i64::try_from(free_permille).unwrap_or(0) + PER_GUEST * i64::from(guests);
        let mut remarks = Vec::new();
        let mut weigh = |holds: bool, weight: i64, remark: &'static str| {
            if holds {
                total += weight;
                remarks.push(remark);
            }
        };
        let report = host.report;
        let threads = report.map_or(1, |report| report.capacity.cpus.max(1));
        let load = i64::from(host.cpus_used.saturating_add(cpus)) * 1000
            / i64::from(threads.saturating_mul(CPU_OVERCOMMIT));
        weigh(load > 1000, CROWDED, "more than 8 virtual CPUs per thread");
        let active = self.hosts.iter().filter(|host| host.good()).count().max(1);
        let share = 1000 / u64::try_from(active).unwrap_or(1);
        weigh(
            active > 1 && free_permille < share,
            NO_FAILOVER_ROOM,
            "little room left for a failover",
        );
        let armed = report.is_some_and(|report| report.guard_armed && report.watchdog_ms.is_some());
        weigh(!armed, NOT_ARMED, "guard or watchdog not armed");
        let last = vm.own == Own::Free && vm.record.last_host.as_ref() == Some(host.name);
        weigh(last, LAST_HOST, "it ran here last");
        let failed = self.input.memory.failed_targets(vm.name, host.name);
        weigh(
            failed > 0,
            FAILED_TARGET * i64::from(failed.min(8)),
            "moves to it failed lately",
        );
        let crashed = self
            .input
            .memory
            .crashed_on(vm.name, host.name, self.input.now);
        weigh(crashed, CRASHED, "it could not stay up here lately");
        total -= load / 4;
        Score {
            total,
            free_permille,
            guests,
            remarks,
        }
    }
}
