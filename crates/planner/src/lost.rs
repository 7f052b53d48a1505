//! A host that is up has lost the path to a pool: VMs with disks there leave it.
//!
//! ```text
//!   lost --5 s--> live migration, where allowed and the guest runs (one whose requests hang is not sent: that fails)
//!        --45 s, the migration failed, or paused by an I/O error--> ended there, started where the pool works
//! ```
//! Always holds: nothing happens unless another host can take the VM, so when all hosts have lost the pool they wait
//! for it; the host is not fenced, since it says itself what it has ended.

use crate::fit::Query;
use crate::memory::{LOST_FOR, LOST_FOR_GOOD};
use crate::work::Work;
use quorate_membership::Instant;
use quorate_state::{Reason, StopMode};
use quorate_types::spec::MigrationPolicy;
use quorate_types::{Epoch, PoolName, VmPhase};

/// A pool that a VM needs and its host has lost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lost<'a> {
    pool: &'a PoolName,
    since: Instant,
}

impl<'a> Work<'a> {
    /// The pool of a VM's disks that its host, which is up, has lost for longer than a hiccup.
    pub(crate) fn lost_storage(&self, vm: usize, host: usize) -> Option<Lost<'a>> {
        let seen = &self.hosts[host];
        if !seen.up || !self.input.memory.loses(seen.name) {
            return None;
        }
        let disks = self.vms[vm].record.effective().disks.iter();
        let lost = disks.filter_map(|disk| {
            let since = self.input.memory.lost_since(seen.name, &disk.pool)?;
            Some(Lost {
                pool: &disk.pool,
                since,
            })
        });
        let long = lost.filter(|lost| self.input.now >= lost.since.plus(LOST_FOR));
        long.min_by_key(|lost| lost.since)
    }

    /// What the host says of a pool that it cannot use.
    pub(crate) fn pool_problem(&self, host: usize, pool: &PoolName) -> Option<&'a str> {
        let seen = self.hosts[host].report?.pools.get(pool)?;
        seen.problem.as_deref().filter(|_| !seen.usable)
    }
}

/// Moves a VM to a host that reaches its disks, if there is one.
pub(crate) fn leave(work: &mut Work<'_>, vm: usize, host: usize, epoch: Epoch) {
    let Some(lost) = work.lost_storage(vm, host) else {
        return;
    };
    let (name, pool) = (work.hosts[host].name, lost.pool);
    let problem = work
        .pool_problem(host, pool)
        .unwrap_or("it cannot be used there");
    let why = format!("{name} has lost pool {pool}: {problem}");
    let record = work.vms[vm].record;
    if record.spec.migration == MigrationPolicy::Never {
        return work.note(vm, |_| {
            format!("{why}; it may not be moved (`migration: never`)")
        });
    }
    let phase = work
        .report(vm, host)
        .filter(|report| report.epoch == epoch)
        .map(|report| report.phase);
    let good = work.input.now >= lost.since.plus(LOST_FOR_GOOD)
        || work
            .input
            .memory
            .failed_since(work.vms[vm].name, lost.since);
    let live =
        record.spec.migration == MigrationPolicy::Live && phase == Some(VmPhase::Running) && !good;
    let stops = good || matches!(phase, Some(VmPhase::BackOff | VmPhase::IoError));
    if !live && !stops {
        return work.note(vm, |_| why);
    }
    let choice = work.choose(&Query {
        vm,
        from: live.then_some(host),
        live,
        not: Some(host),
        moves: live,
        ..Query::default()
    });
    let Some(best) = choice.best else {
        return work.note(vm, |work| {
            format!("{why}; no host can take it: {}", choice.rejections(work))
        });
    };
    let target = work.hosts[best].name;
    if live {
        let slots = work.unit(vm).and_then(|unit| work.no_slots(&unit, best));
        if let Some(slots) = slots {
            return work.note(vm, |_| format!("{why}; {slots}"));
        }
        let reason = choice.reason(work, format!("{why}; {target} reaches it"));
        return work.migrate(vm, best, reason);
    }
    let reason = Reason {
        evidence: vec![why.clone()],
        ..choice.reason(
            work,
            format!("{why}; it is ended there and starts on {target}"),
        )
    };
    work.stop(vm, StopMode::Hard, reason);
}
