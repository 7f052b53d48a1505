//! How long things will probably take.
//!
//! A VM's own last start and last migration count first, as its kept decisions and its host's
//! report tell them; then what migrations in this cluster took per MiB; then the defaults below.
//! They are for people and for the order of events in a forecast: nothing is decided by them.

use quorate_membership::FenceProof;
use quorate_state::{ActionKind, Decision, State, StopMode, VmRecord};
use quorate_types::{ClusterSettings, HostName, HostReport, Millis, VmName, VmPhase};
use std::collections::BTreeMap;

/// From the commit to running CPUs.
const START: Millis = Millis::secs(2);
/// From running CPUs to a ready check that succeeds.
const READY: Millis = Millis::secs(15);
/// A guest that is asked to shut down.
const SHUTDOWN: Millis = Millis::secs(10);
/// A guest whose power is cut.
const POWER_CUT: Millis = Millis(500);
/// Preparing and ending a migration: it takes no bandwidth.
pub(super) const MIGRATION_BASE: Millis = Millis::secs(1);
/// Memory sent in a second: a link of 1 Gbit/s.
const MIGRATION_MIB_PER_S: u64 = 110;
/// Memory saved or restored in a second.
const SAVE_MIB_PER_S: u64 = 200;
/// A fence device that switches a host off and confirms it.
pub(super) const POWER_FENCING: Millis = Millis::secs(8);
/// Shutting a host out at a SAN and looking whether it is out.
const STORAGE_CUT: Millis = Millis(300);
/// A leader that failed: the next one is elected before it counts the lease.
pub(super) const ELECTION: Millis = Millis(1500);
/// A measured span outside of this is not believed: clocks of hosts differ.
const BELIEVED: std::ops::RangeInclusive<u64> = 100..=3_600_000;
/// A start that took longer was something else.
const LONGEST_START: u64 = 300_000;

/// Estimates of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Estimates {
    /// Milliseconds for one GiB, of migrations that were seen.
    per_gib: Option<u64>,
    limit_mib_per_s: u64,
    own: BTreeMap<VmName, Own>,
}

/// What was measured of one VM.
#[derive(Debug, Clone, Copy, Default)]
struct Own {
    start: Option<Millis>,
    migration: Option<Millis>,
}

impl Estimates {
    pub(super) fn new(state: &State, reports: &BTreeMap<HostName, HostReport>) -> Self {
        let mut rates = Vec::new();
        let mut own = BTreeMap::new();
        for (name, record) in &state.vms {
            let migration = last_migration(&record.decisions);
            if let Some(span) = migration {
                let mib = record.effective().memory.as_mib().max(1);
                rates.push(span.0.saturating_mul(1024) / mib);
            }
            let start = last_start(name, record, reports);
            if start.is_some() || migration.is_some() {
                own.insert(name.clone(), Own { start, migration });
            }
        }
        rates.sort_unstable();
        Self {
            per_gib: rates.get(rates.len() / 2).copied(),
            limit_mib_per_s: state.settings().migration_mib_per_s,
            own,
        }
    }

    fn own(&self, vm: &VmName) -> Own {
        self.own.get(vm).copied().unwrap_or_default()
    }

    /// From the commit until its CPUs run.
    pub(super) fn start(&self, vm: &VmName, record: &VmRecord) -> Millis {
        if record.saved.is_some() {
            return Millis(START.0 + memory_at(record, SAVE_MIB_PER_S).0);
        }
        self.own(vm).start.unwrap_or(START)
    }

    /// From running CPUs until it is ready; none without a check.
    pub(super) fn ready(record: &VmRecord) -> Option<Millis> {
        let check = record.effective().ready.as_ref()?;
        Some(READY.min(check.timeout))
    }

    pub(super) fn migration(&self, vm: &VmName, record: &VmRecord) -> Millis {
        if let Some(span) = self.own(vm).migration {
            return span;
        }
        let limit = match self.limit_mib_per_s {
            0 => MIGRATION_MIB_PER_S,
            limit => limit.min(MIGRATION_MIB_PER_S),
        };
        match self.per_gib {
            Some(per_gib) => {
                let mib = record.effective().memory.as_mib();
                Millis((per_gib.saturating_mul(mib) / 1024).max(500))
            }
            None => Millis(MIGRATION_BASE.0 + memory_at(record, limit).0),
        }
    }

    /// How fast one of `count` migrations goes that share a host's link, in thousandths of how fast it
    /// would go alone. As many as the configured limit leaves room for do not slow each other down.
    pub(super) fn share_permille(&self, count: u64) -> u64 {
        let each = match self.limit_mib_per_s {
            0 => MIGRATION_MIB_PER_S,
            limit => limit.min(MIGRATION_MIB_PER_S),
        };
        let share = MIGRATION_MIB_PER_S * 1000 / count.max(1).saturating_mul(each).max(1);
        share.clamp(1, 1000)
    }

    pub(super) fn stop(record: &VmRecord, mode: StopMode) -> Millis {
        match mode {
            StopMode::Graceful => SHUTDOWN.min(record.effective().shutdown_timeout),
            StopMode::Hard => POWER_CUT,
            StopMode::Save => Millis(POWER_CUT.0 + memory_at(record, SAVE_MIB_PER_S).0),
        }
    }
}

fn memory_at(record: &VmRecord, mib_per_s: u64) -> Millis {
    let mib = record.effective().memory.as_mib();
    Millis(mib.saturating_mul(1000) / mib_per_s.max(1))
}

fn believed(span: u64) -> Option<Millis> {
    BELIEVED.contains(&span).then_some(Millis(span))
}

/// The newest migration that arrived, from the commit that began it to the one that ended it.
fn last_migration(decisions: &[Decision]) -> Option<Millis> {
    let ends = decisions.windows(2).rev();
    let mut arrived = ends.filter(|pair| {
        pair[0].kind == Some(ActionKind::Migrate)
            && pair[1].kind == Some(ActionKind::FinishMigration)
            && pair[0].host != pair[1].host
    });
    let pair = arrived.next()?;
    believed(pair[1].at.0.saturating_sub(pair[0].at.0))
}

/// The start that led to the guest which runs now.
fn last_start(
    name: &VmName,
    record: &VmRecord,
    reports: &BTreeMap<HostName, HostReport>,
) -> Option<Millis> {
    let decision = record.decisions.last()?;
    if decision.kind != Some(ActionKind::Start) {
        return None;
    }
    let report = reports.get(decision.host.as_ref()?)?.vms.get(name)?;
    let first = report.restarts == 0 && report.phase == VmPhase::Running;
    let current = record
        .ownership
        .hosts()
        .iter()
        .any(|(_, epoch)| *epoch == report.epoch);
    if !first || !current {
        return None;
    }
    // A guest that was frozen and thawed runs "since" the thaw.
    let span = report.since.0.saturating_sub(decision.at.0);
    believed(span).filter(|span| span.0 <= LONGEST_START)
}

/// Time after which a host that fell silent may be proven dead by its lease.
pub(super) fn lease_bound(settings: &ClusterSettings, armed: Millis) -> Millis {
    let span = Millis(settings.lease.duration.0 + settings.lease.watchdog_bound.max(armed).0);
    Millis(span.0 + settings.lease.drift(span).0)
}

/// Time after which a host that fell silent may be shut out at its VMs' SANs.
pub(super) fn cut_bound(settings: &ClusterSettings) -> Millis {
    let lease = settings.lease.duration;
    Millis(lease.0 + settings.lease.drift(lease).0 + STORAGE_CUT.0)
}

/// The proof that a lease gives after its bound.
pub(super) fn lease_proof(host: &HostName, bound: Millis) -> Option<FenceProof> {
    let evidence = quorate_membership::Evidence::Lease {
        boot: None,
        silence: Millis(bound.0 + 1),
        bound,
    };
    FenceProof::from_evidence(host.clone(), evidence).ok()
}

/// The proof that a fence device gives.
pub(super) fn power_proof(host: &HostName, agent: &str) -> Option<FenceProof> {
    let evidence = quorate_membership::Evidence::Power(quorate_membership::PowerOffEvidence {
        agent: agent.to_owned(),
        off_accepted: true,
        status_after: "off".to_owned(),
        took: POWER_FENCING,
    });
    FenceProof::from_evidence(host.clone(), evidence).ok()
}
