//! Copies of mirrored disks: where they are, and which of them are in step.
//!
//! ```text
//! one copy only, a host takes another --> AddCopy (the owner then brings it up to date)
//! owner: every write reaches it --------> CopyInStep
//! owner: it cannot be kept in step -----> CopyOutOfStep; only then the guest goes on without it
//! its host is silent past its lease ----> CopyOutOfStep, while the owner is up
//! ```
//! Always holds: a copy is called in step on its owner's word only; it is dropped only while the owner is up, so
//! that what is dropped is never the last good copy; all disks of a VM have their copies on one host.

use crate::work::{Own, Work};
use quorate_membership::HostHealth;
use quorate_state::{Action, COPIES, CopyOf, PlannedAction, Reason};
use quorate_types::report::{MirrorPhase, MirrorReport};
use quorate_types::spec::DiskSpec;
use quorate_types::{Epoch, HostName, LabelName, VmPhase};

/// Labels that say what fails together, the smallest first.
const DOMAINS: [&str; 8] = [
    "rack", "row", "room", "floor", "building", "site", "zone", "power",
];

pub(crate) fn run(work: &mut Work<'_>) {
    let mut pools = work.input.state.pools.values();
    if !pools.any(|pool| pool.spec.is_mirrored()) {
        return;
    }
    for vm in 0..work.vms.len() {
        let Own::Owned {
            host,
            epoch: Some(epoch),
            ..
        } = work.vms[vm].own
        else {
            continue;
        };
        if work.vms[vm].touched || !work.hosts[host].up || work.hosts[host].proof.is_some() {
            continue;
        }
        let state = work.input.state;
        let mirrored = |disk: &&DiskSpec| {
            let pool = state.pools.get(&disk.pool);
            pool.is_some_and(|pool| pool.spec.is_mirrored())
        };
        let disks: Vec<&DiskSpec> = work.vms[vm].spec.disks.iter().filter(mirrored).collect();
        for disk in disks {
            look(work, vm, host, epoch, disk);
        }
    }
}

fn look(work: &mut Work<'_>, vm: usize, owner: usize, epoch: Epoch, disk: &DiskSpec) {
    let Some(record) = work.input.state.copies(&disk.pool, &disk.image) else {
        return;
    };
    let name = work.hosts[owner].name;
    if record.hosts.len() < COPIES && record.hosts.contains_key(name) {
        return add(work, vm, owner, epoch, disk);
    }
    for (host, copy) in record.hosts.iter().filter(|(host, _)| *host != name) {
        let of = copy_of(work, vm, disk, host);
        let said = mirror(work, vm, owner, epoch, &of);
        let said = said.filter(|said| said.since == copy.since);
        let at = work.host_index.get(host);
        let since = copy.since;
        if copy.in_step {
            let health = work.input.health.get(host);
            let lost = matches!(health, Some(HostHealth::Expired | HostHealth::Dead));
            let failed = said.filter(|said| said.phase == MirrorPhase::Failed);
            let why = match failed {
                _ if lost => format!("{host} is silent: the guest must not wait for it"),
                Some(said) => {
                    let why = said.problem.as_deref().unwrap_or("no cause was reported");
                    format!("{name} cannot keep it in step: {why}")
                }
                None => continue,
            };
            let action = Action::CopyOutOfStep { of, epoch, since };
            work.copy_action(vm, action, why);
        } else if said.is_some_and(|said| said.phase == MirrorPhase::Ready)
            && let Some(report) =
                at.and_then(|at| work.hosts[at].report.filter(|_| work.hosts[at].up))
        {
            let boot = report.boot.clone();
            let action = Action::CopyInStep {
                of,
                epoch,
                since,
                boot,
            };
            let why = format!("{name} says that every write reaches it now");
            work.copy_action(vm, action, why);
        }
    }
}

fn copy_of(work: &Work<'_>, vm: usize, disk: &DiskSpec, host: &HostName) -> CopyOf {
    CopyOf {
        vm: work.vms[vm].name.clone(),
        pool: disk.pool.clone(),
        image: disk.image.clone(),
        host: host.clone(),
    }
}

/// What the owner says of a copy.
fn mirror<'a>(
    work: &Work<'a>,
    vm: usize,
    owner: usize,
    epoch: Epoch,
    of: &CopyOf,
) -> Option<&'a MirrorReport> {
    let report = work.report(vm, owner)?;
    let mut mirrors = report.mirrors.iter().filter(|_| report.epoch == epoch);
    mirrors.find(|said| said.pool == of.pool && said.image == of.image && said.to == of.host)
}

fn add(work: &mut Work<'_>, vm: usize, owner: usize, epoch: Epoch, disk: &DiskSpec) {
    // A guest that does not come up needs no copy yet.
    let report = work.report(vm, owner).filter(|seen| seen.epoch == epoch);
    if report.is_none_or(|report| report.phase != VmPhase::Running) || !work.may_place() {
        return;
    }
    let mut best: Option<(usize, (usize, u64))> = None;
    for at in 0..work.hosts.len() {
        let Some(rank) = rank(work, vm, owner, disk, at) else {
            continue;
        };
        if best.is_none_or(|(_, other)| rank > other) {
            best = Some((at, rank));
        }
    }
    let Some((at, (apart, _))) = best else {
        let text = format!("no host can take the copy of disk {}", disk.image);
        return work.note(vm, |_| text);
    };
    let host = work.hosts[at].name;
    let of = copy_of(work, vm, disk, host);
    let why = match apart {
        0 => format!("{host} has room for it"),
        _ => format!("{host} has room for it and does not fail together with its owner"),
    };
    work.copy_action(vm, Action::AddCopy { of, epoch }, why);
}

/// How good a host is for a copy: in how many domains it is elsewhere, then its free space. `None`: not at all.
fn rank(
    work: &Work<'_>,
    vm: usize,
    owner: usize,
    disk: &DiskSpec,
    at: usize,
) -> Option<(usize, u64)> {
    let (host, state) = (&work.hosts[at], work.input.state);
    let (record, report) = (host.record?, host.report?);
    if at == owner || !host.good() || host.proof.is_some() {
        return None;
    }
    let pool = report.pools.get(&disk.pool).filter(|pool| pool.usable)?;
    // Two hosts that see one directory have one image, not two.
    let same = owner_pool(work, owner, disk) == pool.marker.as_ref();
    if same && pool.marker.is_some() {
        return None;
    }
    let room = disk.size.is_none_or(|size| pool.free >= size);
    let listed = state.pools.get(&disk.pool)?.spec.is_for(host.name);
    if !room || !listed || !work.vms[vm].record.spec.allows(host.name, &record.spec) {
        return None;
    }
    // Where the VM's other disks have their copies.
    let owner = &work.hosts[owner];
    let others = state.own_disks(work.vms[vm].spec);
    let elsewhere = others
        .filter_map(|other| state.copies(&other.pool, &other.image))
        .flat_map(|record| record.hosts.keys())
        .any(|other| other != owner.name && other != host.name);
    if elsewhere {
        return None;
    }
    let apart = |label: &&&str| {
        let Ok(label) = LabelName::new(**label) else {
            return false;
        };
        let mine = record.spec.labels.get(&label);
        let theirs = owner.record.and_then(|owner| owner.spec.labels.get(&label));
        mine.is_some() && theirs.is_some() && mine != theirs
    };
    Some((DOMAINS.iter().filter(apart).count(), pool.free.0))
}

/// The identity of the pool on the owner.
fn owner_pool<'a>(work: &Work<'a>, owner: usize, disk: &DiskSpec) -> Option<&'a String> {
    let report = work.hosts[owner].report?;
    report.pools.get(&disk.pool)?.marker.as_ref()
}

impl Work<'_> {
    fn copy_action(&mut self, vm: usize, action: Action, why: String) {
        let reason = Reason::new(why);
        self.actions.push(PlannedAction { action, reason });
        // The next look decides what else there is to do about it.
        self.vms[vm].touched = true;
    }
}
