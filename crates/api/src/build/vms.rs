//! VMs of the view.

use super::Observed;
use crate::view::{CopyView, MigrationView, VmState, VmView};
use quorate_membership::HostHealth;
use quorate_state::{OrderKind, Ownership, State, VmRecord};
use quorate_types::report::MirrorPhase;
use quorate_types::spec::{Condition, DiskSpec};
use quorate_types::{Dependency, HostName, VmName, VmPhase, VmReport};

/// Begins the planner's sentence about a VM for which something is about to be done.
const NEXT: &str = "next: ";

pub(super) fn vms(state: &State, seen: &Observed, known: bool) -> Vec<VmView> {
    let mut views: Vec<VmView> = state
        .vms
        .iter()
        .map(|(name, record)| vm(state, seen, known, name, record))
        .collect();
    let all = views.clone();
    for view in &mut views {
        let Some(record) = state.vms.get(&view.name).filter(|record| record.wanted()) else {
            continue;
        };
        if matches!(view.state, VmState::Waiting | VmState::Starting) && view.host.is_none() {
            let open = |(name, dependency): &(&VmName, &Dependency)| {
                !met(&all, name, dependency.condition)
            };
            let open = record.spec.depends_on.iter().filter(open);
            view.waiting_for = open.map(|(name, _)| name.clone()).collect();
        }
    }
    views
}

/// Whether what a dependent waits for holds. A migration keeps it so.
pub(crate) fn met(vms: &[VmView], other: &VmName, condition: Condition) -> bool {
    vms.iter().any(|vm| {
        let runs = matches!(vm.state, VmState::Running | VmState::Migrating);
        vm.name == *other && runs && (vm.ready || condition == Condition::Started)
    })
}

/// What the owner says about the VM under its present epoch. `None`: nothing (yet).
fn report_of<'a>(seen: &'a Observed, name: &VmName, record: &VmRecord) -> Option<&'a VmReport> {
    let (host, epoch) = *record.ownership.hosts().first()?;
    let report = seen.hosts.get(host)?.report.as_ref()?.vms.get(name)?;
    (report.epoch == epoch).then_some(report)
}

/// What the guard of its network keeps it from sending.
fn offences(seen: &Observed, name: &VmName, record: &VmRecord) -> Option<String> {
    let (host, _) = *record.ownership.hosts().first()?;
    let report = seen.hosts.get(host)?.report.as_ref()?;
    let found = report.offences.get(name)?;
    Some(format!(
        "the guard of its network drops what it sends: {found}; look at what runs in the guest, or say `trusted: true` for its NIC"
    ))
}

fn vm(state_of: &State, seen: &Observed, known: bool, name: &VmName, record: &VmRecord) -> VmView {
    let report = report_of(seen, name, record);
    let state = vm_state(seen, known, name, record, report);
    let problem = report.and_then(|report| report.error.clone());
    let problem = problem.or_else(|| offences(seen, name, record));
    let spec = record.effective();
    let (host, epoch) = match record.ownership.hosts().first() {
        Some((host, epoch)) => (Some((*host).clone()), *epoch),
        None => (None, record.last_epoch),
    };
    VmView {
        name: name.clone(),
        power: record.spec.power,
        state,
        host,
        epoch,
        ready: known && report.is_some_and(|report| report.ready),
        migration: migration(record, report),
        waiting_for: Vec::new(),
        move_requested: record.move_request.is_some(),
        why: why(seen, name, record, state, problem.as_deref()),
        problem,
        restarts: report.map_or(0, |report| report.restarts),
        since: report.map(|report| report.since),
        cpus: spec.cpus,
        memory: spec.memory,
        addresses: spec
            .nics
            .iter()
            .filter_map(|nic| nic.address.map(|address| address.to_string()))
            .collect(),
        restart_pending: restart_pending(record),
        copies: copies(state_of, record, report),
    }
}

/// Where the disks are that are on particular hosts.
fn copies(state: &State, record: &VmRecord, report: Option<&VmReport>) -> Vec<CopyView> {
    let mut views = Vec::new();
    for disk in state.own_disks(record.effective()) {
        let known = state.copies(&disk.pool, &disk.image);
        for (host, copy) in known.iter().flat_map(|known| &known.hosts) {
            let mut said = report.into_iter().flat_map(|report| &report.mirrors);
            let said = said.find(|said| {
                said.since == copy.since
                    && said.pool == disk.pool
                    && said.image == disk.image
                    && said.to == *host
            });
            let syncing = said.filter(|said| said.phase == MirrorPhase::Syncing);
            let percent = syncing.and_then(|said| (said.done.0 * 100).checked_div(said.total.0));
            views.push(CopyView {
                pool: disk.pool.clone(),
                image: disk.image.clone(),
                host: host.clone(),
                in_step: copy.in_step,
                since: copy.at,
                percent: percent.map(|percent| u8::try_from(percent).unwrap_or(100)),
                problem: said.and_then(|said| said.problem.clone()),
            });
        }
    }
    views
}

/// A larger size is no reason for a start: the disk grows while the guest runs.
fn same_disks(active: &[DiskSpec], wanted: &[DiskSpec]) -> bool {
    let same = |(active, wanted): (&DiskSpec, &DiskSpec)| {
        let grows = active.size.is_some() && wanted.size >= active.size;
        let mut active = active.clone();
        if grows {
            active.size = wanted.size;
        }
        active == *wanted
    };
    active.len() == wanted.len() && active.iter().zip(wanted).all(same)
}

fn restart_pending(record: &VmRecord) -> bool {
    let wanted = &record.spec;
    record.active.as_ref().is_some_and(|active| {
        active.cpus != wanted.cpus
            || active.memory != wanted.memory
            || active.machine != wanted.machine
            || active.boot != wanted.boot
            || !same_disks(&active.disks, &wanted.disks)
            || active.nics != wanted.nics
    })
}

fn in_the_way(seen: &Observed, name: &VmName) -> bool {
    seen.waiting
        .get(name)
        .is_some_and(|sentence| !sentence.starts_with(NEXT))
}

fn lost(seen: &Observed, host: &HostName) -> bool {
    seen.hosts
        .get(host)
        .is_some_and(|host| matches!(host.health, HostHealth::Expired | HostHealth::Dead))
}

fn vm_state(
    seen: &Observed,
    known: bool,
    name: &VmName,
    record: &VmRecord,
    report: Option<&VmReport>,
) -> VmState {
    if record.deleting {
        return VmState::Deleting;
    }
    match &record.ownership {
        Ownership::Free if !record.wanted() => VmState::Stopped,
        _ if !known => VmState::Unknown,
        Ownership::Free if in_the_way(seen, name) => VmState::Waiting,
        Ownership::Free
            if record
                .last_host
                .as_ref()
                .is_some_and(|host| lost(seen, host)) =>
        {
            VmState::Recovering
        }
        Ownership::Free => VmState::Starting,
        Ownership::Owned { host, .. } | Ownership::Migrating { from: host, .. }
            if lost(seen, host) =>
        {
            VmState::Recovering
        }
        Ownership::Migrating { .. } => VmState::Migrating,
        Ownership::Owned {
            order: OrderKind::Stop(_),
            ..
        } => VmState::Stopping,
        Ownership::Owned { .. } => match report.map(|report| report.phase) {
            None | Some(VmPhase::Absent | VmPhase::Starting | VmPhase::Incoming) => {
                VmState::Starting
            }
            Some(VmPhase::Running) => VmState::Running,
            Some(VmPhase::Frozen) => VmState::Frozen,
            Some(VmPhase::IoError | VmPhase::BackOff) => VmState::Failing,
            Some(VmPhase::Stopping) => VmState::Stopping,
            Some(VmPhase::MigratingOut | VmPhase::HandedOver) => VmState::Migrating,
        },
    }
}

fn migration(record: &VmRecord, report: Option<&VmReport>) -> Option<MigrationView> {
    let Ownership::Migrating {
        id,
        from,
        to,
        cancel,
        ..
    } = &record.ownership
    else {
        return None;
    };
    let progress = report
        .and_then(|report| report.migration.as_ref())
        .filter(|migration| migration.id == *id);
    let transferred = progress.map_or(0, |p| p.transferred.0);
    let remaining = progress.map_or(0, |p| p.remaining.0);
    let all = u128::from(transferred) + u128::from(remaining);
    let percent = (u128::from(transferred) * 100)
        .checked_div(all)
        .unwrap_or(0);
    Some(MigrationView {
        id: id.0,
        from: from.clone(),
        to: to.clone(),
        transferred,
        remaining,
        percent: u8::try_from(percent).unwrap_or(100),
        cancelling: *cancel,
    })
}

fn why(
    seen: &Observed,
    name: &VmName,
    record: &VmRecord,
    state: VmState,
    problem: Option<&str>,
) -> String {
    if let Some(sentence) = seen.waiting.get(name) {
        return sentence.clone();
    }
    if let (VmState::Failing, Some(problem)) = (state, problem) {
        return problem.to_owned();
    }
    if let (VmState::Recovering, Some(host)) = (state, record.ownership.host()) {
        return format!("{host} is silent; waiting for proof that it no longer runs {name}");
    }
    match record.decisions.last() {
        Some(decision) if !decision.reason.summary.is_empty() => decision.reason.summary.clone(),
        _ => String::new(),
    }
}
