//! Copies of mirrored disks: where they are, and which of them are in step.
//!
//! ```text
//! one copy only, a host takes another --> AddCopy (the owner then brings it up to date)
//! owner: every write reaches it --------> CopyInStep
//! it became its owner's, whose guest runs -> CopyInStep of the owner's own: it is flushed, a reboot does it no harm
//! owner: it cannot be kept in step -----> CopyOutOfStep; only then the guest goes on without it
//! its host is silent past its lease ----> CopyOutOfStep, while the owner is up
//! ```
//! A disk of a `local` pool has one copy, and a second one for the time of a move:
//!
//! ```text
//! it shall leave --> AddCopy at its target --> CopyInStep --> Migrate --> the target's is the only one
//!                        | not wanted any more, or the target is lost
//!                        v
//!                    RemoveCopy
//! ```
//! Always holds: a copy is called in step on its owner's word only; it is dropped only while the owner is up, so
//! that what is dropped is never the last good copy; all disks of a VM have their copies on one host.

use crate::fit::mib;
use crate::moves::Unit;
use crate::relocate;
use crate::work::{Own, Work};
use quorate_membership::HostHealth;
use quorate_state::{Action, COPIES, CopyOf, DiskCopy, PlannedAction, Reason};
use quorate_types::report::{MirrorPhase, MirrorReport};
use quorate_types::spec::{DiskFormat, DiskSpec};
use quorate_types::{Epoch, HostName, LabelName, VmPhase};

/// Labels that say what fails together, the smallest first.
const DOMAINS: [&str; 8] = [
    "rack", "row", "room", "floor", "building", "site", "zone", "power",
];

pub(crate) fn run(work: &mut Work<'_>) {
    let mut pools = work.input.state.pools.values();
    if !pools.any(|pool| pool.spec.is_hosts_own()) {
        return;
    }
    for vm in 0..work.vms.len() {
        if work.vms[vm].own == Own::Free && !work.vms[vm].touched {
            settle(work, vm);
        }
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
        let disks: Vec<&DiskSpec> = state.own_disks(work.vms[vm].spec).collect();
        for disk in disks {
            look(work, vm, host, epoch, disk);
        }
    }
}

/// A copy that was in step only as long as its host was not booted again has become its owner's, and the guest runs.
fn own_flushed(
    work: &Work<'_>,
    vm: usize,
    owner: usize,
    epoch: Epoch,
    disk: &DiskSpec,
) -> Option<Action> {
    let record = work.input.state.copies(&disk.pool, &disk.image)?;
    let name = work.hosts[owner].name;
    let copy = record.hosts.get(name)?;
    let boot = copy.boot.clone()?;
    let word = work.word(vm, owner).filter(|word| word.epoch == epoch)?;
    let same = work.hosts[owner]
        .report
        .is_some_and(|report| report.boot == boot);
    (same && word.phase == VmPhase::Running).then(|| Action::CopyInStep {
        of: copy_of(work, vm, disk, name),
        epoch,
        since: copy.since,
        boot,
    })
}

fn look(work: &mut Work<'_>, vm: usize, owner: usize, epoch: Epoch, disk: &DiskSpec) {
    let state = work.input.state;
    let Some(record) = state.copies(&disk.pool, &disk.image) else {
        return;
    };
    let name = work.hosts[owner].name;
    // After a move that ended badly another one may be the only one that counts.
    if !record.hosts.get(name).is_some_and(|copy| copy.in_step) {
        return;
    }
    if let Some(action) = own_flushed(work, vm, owner, epoch, disk) {
        let why = format!("{name} has flushed it before its guest started");
        return work.copy_action(vm, action, why);
    }
    let pool = state.pools.get(&disk.pool);
    let mirrored = pool.is_some_and(|pool| pool.spec.is_mirrored());
    if mirrored && record.hosts.len() < COPIES {
        return add(work, vm, owner, epoch, disk);
    }
    for (host, copy) in record.hosts.iter().filter(|(host, _)| *host != name) {
        if mirrored || still_wanted(work, vm, owner, host) {
            follow(work, vm, owner, epoch, disk, (host, copy));
        } else {
            let of = copy_of(work, vm, disk, host);
            let since = copy.since;
            let action = Action::RemoveCopy { of, epoch, since };
            work.copy_action(vm, action, format!("it does not move to {host}"));
        }
    }
}

/// Both sides of a migration were lost, and the target's copy cannot be started from: the source's counts if its ledger
/// says that no hand-over was begun. It is asked after it has closed its epoch, so what it says is final. One that was begun
/// may not have come to the target, which flushes its copy then: an operator decides ([`advice`]).
fn settle(work: &mut Work<'_>, vm: usize) {
    let state = work.input.state;
    for disk in state.own_disks(work.vms[vm].spec) {
        let record = state.copies(&disk.pool, &disk.image);
        let Some((record, lost)) =
            record.and_then(|record| Some((record, record.unsettled.as_ref()?)))
        else {
            continue;
        };
        let index = |host| work.host_index.get(host).filter(|at| work.hosts[*at].up);
        let usable = index(&lost.to).is_some_and(|at| {
            let boot = work.hosts[at].report.map(|report| &report.boot);
            boot.is_some() && record.check(&disk.image, &lost.to, boot).is_ok()
        });
        let said = index(&lost.from).and_then(|at| work.report(vm, at));
        let Some(said) = said.filter(|said| !usable && said.closed >= lost.epoch) else {
            continue;
        };
        if said.handed_over == Some(lost.id) {
            continue;
        }
        let of = copy_of(work, vm, disk, &lost.from);
        let action = Action::SettleCopies { of, id: lost.id };
        let why = format!("{} says that it had not handed the guest over", lost.from);
        work.copy_action(vm, action, why);
    }
}

/// What an operator can decide about a VM none of whose hosts that are up has a disk of it whole.
pub(crate) fn advice(work: &Work<'_>, vm: usize) -> Option<String> {
    let state = work.input.state;
    let up = |host: &HostName| {
        let at = work.host_index.get(host)?;
        let report = work.hosts[at].report.filter(|_| work.hosts[at].up)?;
        Some(&report.boot)
    };
    for disk in state.own_disks(work.vms[vm].spec) {
        let Some(record) = state.copies(&disk.pool, &disk.image) else {
            continue;
        };
        let usable = |host| {
            let boot = up(host);
            boot.is_some() && record.check(&disk.image, host, boot).is_ok()
        };
        if record.hosts.keys().any(usable) {
            continue;
        }
        let here = record.hosts.iter().filter(|(host, _)| up(host).is_some());
        // The one that lacks least: in step until its host was booted, or dropped last.
        let best = here.max_by_key(|(_, copy)| (copy.in_step, copy.since));
        let (host, copy) = best?;
        let lacks = match copy.in_step {
            true => format!("what was only in {host}'s memory when it was booted again"),
            false => format!("what was written since {}", copy.at),
        };
        let whole = record.hosts.iter().filter(|(_, copy)| copy.in_step);
        let away: Vec<&str> = whole
            .filter(|(host, _)| up(host).is_none())
            .map(|(host, _)| host.as_str())
            .collect();
        let first = match away.as_slice() {
            [] => "no host has it whole any more".to_owned(),
            away => format!(
                "{} has it whole and is not up: bring it back, and if it is lost for good",
                away.join(" and ")
            ),
        };
        let vm = work.vms[vm].name;
        let image = &disk.image;
        let other = record.unsettled.as_ref().filter(|lost| lost.to == *host);
        let other = other.map_or_else(String::new, |lost| {
            format!(
                "; the copy on {} lacks only what was written after {vm} was handed over to {host}, if it was",
                lost.from
            )
        });
        return Some(format!(
            "disk {image}: {first}, `quorate storage copies accept {vm} {image} --host {host}` starts {vm} from the copy there, which lacks {lacks}{other}"
        ));
    }
    None
}

/// Whether a VM shall go where its disk is copied to.
fn still_wanted(work: &Work<'_>, vm: usize, owner: usize, host: &HostName) -> bool {
    let Some(at) = work.host_index.get(host) else {
        return false;
    };
    let asked = work.vms[vm].record.move_request.as_ref();
    let elsewhere = asked.and_then(|asked| asked.to.as_ref());
    let elsewhere = elsewhere.is_some_and(|to| to != host);
    let takes = work.hosts[at].good() && work.hosts[at].proof.is_none();
    takes && !elsewhere && relocate::leaves(work, vm, owner)
}

/// A copy that there shall be.
fn follow(
    work: &mut Work<'_>,
    vm: usize,
    owner: usize,
    epoch: Epoch,
    disk: &DiskSpec,
    (host, copy): (&HostName, &DiskCopy),
) {
    let name = work.hosts[owner].name;
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
            None => return,
        };
        let action = Action::CopyOutOfStep { of, epoch, since };
        work.copy_action(vm, action, why);
    } else if said.is_some_and(|said| said.phase == MirrorPhase::Ready)
        && let Some(report) = at.and_then(|at| work.hosts[at].report.filter(|_| work.hosts[at].up))
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

impl<'a> Work<'a> {
    fn copy_action(&mut self, vm: usize, action: Action, why: String) {
        let reason = Reason::new(why);
        self.actions.push(PlannedAction { action, reason });
        // The next look decides what else there is to do about it.
        self.vms[vm].touched = true;
    }

    /// Why a host cannot be given copies of a VM's disks, for a move.
    pub(crate) fn takes_copies(&self, vm: usize, at: usize) -> Result<(), String> {
        let (state, name) = (self.input.state, self.hosts[at].name);
        let Own::Owned { host: owner, .. } = self.vms[vm].own else {
            return state.check_copies(self.vms[vm].spec, name, None);
        };
        let report = self.hosts[at].report;
        for disk in state.own_disks(self.vms[vm].spec) {
            let Some(record) = state.copies(&disk.pool, &disk.image) else {
                continue;
            };
            let boot = report.map(|report| &report.boot);
            let Err(missing) = record.check(&disk.image, name, boot) else {
                continue;
            };
            let pool = state.pools.get(&disk.pool);
            if pool.is_none_or(|pool| pool.spec.is_mirrored()) {
                return Err(missing);
            }
            if disk.format != DiskFormat::Raw {
                let text = "is not raw: only raw disks can be copied under a running guest";
                return Err(format!("disk {} {text}", disk.image));
            }
            if record.hosts.contains_key(name) {
                continue; // it is being copied
            }
            if let Some(other) = record
                .hosts
                .keys()
                .find(|host| *host != self.hosts[owner].name)
            {
                return Err(format!("disk {} is being copied to {other}", disk.image));
            }
            let seen = report.and_then(|report| report.pools.get(&disk.pool));
            let mark = seen.and_then(|seen| seen.marker.as_ref());
            if mark.is_some() && mark == owner_pool(self, owner, disk) {
                let text = "is the same directory there and where the disk is";
                return Err(format!("pool {} {text}", disk.pool));
            }
            let free = seen.map_or(0, |seen| seen.free.0);
            if let Some(size) = disk.size.filter(|size| size.0 > free) {
                let text = format!("disk {} needs {}", disk.image, mib(size.0));
                return Err(format!(
                    "{text}, pool {} has {} there",
                    disk.pool,
                    mib(free)
                ));
            }
        }
        Ok(())
    }

    /// Copies of disks that are missing or not in step on the host that a unit goes to.
    fn not_there(&self, unit: &Unit, to: usize) -> Vec<(usize, &'a DiskSpec, bool)> {
        let (state, name) = (self.input.state, self.hosts[to].name);
        let mut missing = Vec::new();
        if !unit.live() {
            return missing;
        }
        for vm in unit.vms() {
            for disk in state.own_disks(self.vms[vm].spec) {
                let record = state.copies(&disk.pool, &disk.image);
                let copy = record.and_then(|record| record.hosts.get(name));
                if !copy.is_some_and(|copy| copy.in_step) {
                    missing.push((vm, disk, copy.is_some()));
                }
            }
        }
        missing
    }

    /// Whether the disks of a unit are all on the host that it goes to; if not, they are copied there.
    pub(crate) fn copied(&mut self, unit: &Unit, to: usize, reason: &Reason) -> bool {
        let missing = self.not_there(unit, to);
        let name = self.hosts[to].name;
        for (vm, disk, begun) in &missing {
            let Own::Owned {
                host,
                epoch: Some(epoch),
                ..
            } = self.vms[*vm].own
            else {
                continue;
            };
            let of = copy_of(self, *vm, disk, name);
            if !begun {
                let action = Action::AddCopy { of, epoch };
                let why = format!("{}; its disk is copied first", reason.summary);
                self.copy_action(*vm, action, why);
                continue;
            }
            let said = mirror(self, *vm, host, epoch, &of);
            let done = said.and_then(|said| (said.done.0 * 100).checked_div(said.total.0));
            let done = done.map_or(String::new(), |done| format!(": {done} %"));
            let text = format!("disk {} is copied to {name} first{done}", disk.image);
            self.note(*vm, |_| text);
        }
        missing.is_empty()
    }

    /// Takes back what was begun to be copied for a unit.
    pub(crate) fn remove_copies(&mut self, unit: &Unit, to: usize, why: &str) {
        let (state, name) = (self.input.state, self.hosts[to].name);
        for (vm, disk, _) in self.not_there(unit, to) {
            let record = state.copies(&disk.pool, &disk.image);
            let copy = record.and_then(|record| record.hosts.get(name));
            if let (
                Some(copy),
                Own::Owned {
                    epoch: Some(epoch), ..
                },
            ) = (copy, self.vms[vm].own)
            {
                let of = copy_of(self, vm, disk, name);
                let since = copy.since;
                let action = Action::RemoveCopy { of, epoch, since };
                self.copy_action(vm, action, why.to_owned());
            }
        }
    }

    /// Why a disk of a unit cannot be copied to a host, after it was tried for a while.
    pub(crate) fn copy_fails(&self, unit: &Unit, to: usize) -> Option<String> {
        let (memory, now) = (self.input.memory, self.input.now);
        self.not_there(unit, to)
            .into_iter()
            .find_map(|(vm, disk, begun)| {
                let name = self.vms[vm].name;
                let Own::Owned {
                    host,
                    epoch: Some(epoch),
                    ..
                } = self.vms[vm].own
                else {
                    return None;
                };
                if !begun || !memory.copy_fails(name, now) {
                    return None;
                }
                let to = self.hosts[to].name;
                let said = mirror(self, vm, host, epoch, &copy_of(self, vm, disk, to))?;
                let why = said.problem.as_deref()?;
                Some(format!(
                    "disk {} cannot be copied to {to}: {why}",
                    disk.image
                ))
            })
    }
}
