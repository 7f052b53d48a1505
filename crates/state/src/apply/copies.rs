//! Changes of the records of disks' copies. See [`crate::copies`].

use super::plan::{refuse, vm_mut};
use super::{Change, unknown};
use crate::command::Refusal;
use crate::copies::{COPIES, DiskCopies, DiskCopy, Unsettled};
use crate::event::{EventKind, Subject};
use crate::model::{Ownership, State};
use crate::plan::{Action, CopyOf, MigrationEnd};
use quorate_types::{
    BootId, Epoch, HostName, MigrationId, PoolName, Revision, Timestamp, VmName, VmSpec,
};

/// What a start leaves: the new owner's copy is the one that counts. Others may have writes of the old owner that
/// were never acknowledged, and get none of the new one's.
pub(super) fn started(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    host: &HostName,
    epoch: Epoch,
) -> Result<(), Refusal> {
    let spec = vm_mut(change, vm)?.effective().clone();
    let checked = change.state.check_copies(&spec, host, None);
    checked.map_err(|why| refuse(action, format!("{host}: {why}")))?;
    let disks: Vec<_> = change.state.own_disks(&spec).cloned().collect();
    let (since, at) = (change.revision, change.envelope.at);
    for disk in disks {
        let pool = change.state.disk_copies.entry(disk.pool).or_default();
        let record = pool.entry(disk.image).or_insert_with(|| DiskCopies {
            created: epoch,
            ..DiskCopies::default()
        });
        let copy = record.hosts.entry(host.clone()).or_insert(DiskCopy {
            in_step: true,
            since,
            at,
            boot: None,
        });
        // Nobody has flushed it yet: the host may die before it hears of this.
        let boot = copy.boot.clone();
        only(record, host, since, at);
        if let Some(copy) = record.hosts.get_mut(host) {
            copy.boot = boot;
        }
    }
    Ok(())
}

/// From here on a disk's copy on this host is the one that counts, and it is on stable storage.
fn only(record: &mut DiskCopies, host: &HostName, since: Revision, at: Timestamp) {
    record.unsettled = None;
    for (other, copy) in &mut record.hosts {
        if other == host {
            copy.boot = None;
        } else if copy.in_step {
            (copy.in_step, copy.since, copy.at, copy.boot) = (false, since, at, None);
        }
    }
}

/// A guest moves live only to a host that has all of its disks: each write reaches the copy there until the guest is
/// handed over. Until the migration's end is agreed a copy is not taken off the record, so the target's copies are whole all
/// the time: before the switchover by the mirrors, and after it the guest is there, if anywhere.
pub(super) fn may_move(
    change: &Change<'_>,
    action: &Action,
    spec: &VmSpec,
    to: &HostName,
) -> Result<(), Refusal> {
    for disk in change.state.own_disks(spec) {
        let record = change.state.copies(&disk.pool, &disk.image);
        let record = record.ok_or_else(|| refuse(action, "its disk has no record"))?;
        let checked = record.check(&disk.image, to, None);
        checked.map_err(|why| refuse(action, format!("{to}: {why}")))?;
    }
    Ok(())
}

/// Whose copies count after a migration, and whether the other side's will never be wanted; `None`: as before, since
/// every write still reaches both.
pub(super) fn after(
    end: &MigrationEnd,
    from: &HostName,
    to: &HostName,
) -> Option<(HostName, bool)> {
    match end {
        MigrationEnd::Arrived { .. } => Some((to.clone(), true)),
        MigrationEnd::TargetLost(_) => Some((to.clone(), false)),
        // The target may have let go of its copy already; the source resumes after this is known there.
        MigrationEnd::RefusedByTarget | MigrationEnd::TargetDead(_) => Some((from.clone(), true)),
        MigrationEnd::StayedAtSource => None,
    }
}

/// A migration has ended.
pub(super) fn moved(change: &mut Change<'_>, spec: &VmSpec, counts: Option<(HostName, bool)>) {
    let Some((host, certain)) = counts else {
        return;
    };
    each_record(change, spec, |mirrored, record, since, at| {
        let boot = record.hosts.get(&host).and_then(|copy| copy.boot.clone());
        only(record, &host, since, at);
        // A target that was lost may never have flushed it.
        if let Some(copy) = record.hosts.get_mut(&host).filter(|_| !certain) {
            copy.boot = boot;
        }
        if certain && !mirrored {
            record.hosts.retain(|other, _| *other == host);
        }
    });
}

/// A VM is taken from both sides of a migration, and nobody says whether the target has run it: the target's copy is
/// whole in any case, the source's only in one.
pub(super) fn abandoned(change: &mut Change<'_>, spec: &VmSpec, lost: &Unsettled) {
    each_record(change, spec, |_, record, since, at| {
        let boot = record
            .hosts
            .get(&lost.to)
            .and_then(|copy| copy.boot.clone());
        only(record, &lost.to, since, at);
        if let Some(copy) = record.hosts.get_mut(&lost.to) {
            copy.boot = boot;
        }
        record.unsettled = Some(lost.clone());
    });
}

/// The source of a lost migration has said that it had begun no hand-over: its copy counts.
pub(super) fn settle(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    id: MigrationId,
) -> Result<EventKind, Refusal> {
    if vm_mut(change, &of.vm)?.ownership != Ownership::Free {
        return Err(refuse(action, "it has an owner"));
    }
    let (since, at) = (change.revision, change.envelope.at);
    let record = record(change, action, of)?;
    let known = record
        .unsettled
        .as_ref()
        .is_some_and(|lost| lost.id == id && lost.from == of.host);
    if !known {
        return Err(refuse(action, "nothing is unsettled about it"));
    }
    let copy = record.hosts.get_mut(&of.host);
    let copy = copy.ok_or_else(|| refuse(action, "it has no copy there"))?;
    (copy.in_step, copy.since, copy.at) = (true, since, at);
    only(record, &of.host, since, at);
    Ok(EventKind::Storage)
}

fn each_record(
    change: &mut Change<'_>,
    spec: &VmSpec,
    mut act: impl FnMut(bool, &mut DiskCopies, Revision, Timestamp),
) {
    let disks: Vec<_> = change.state.own_disks(spec).cloned().collect();
    let (since, at) = (change.revision, change.envelope.at);
    for disk in disks {
        let pool = change.state.pools.get(&disk.pool);
        let mirrored = pool.is_some_and(|pool| pool.spec.is_mirrored());
        let pool = change.state.disk_copies.get_mut(&disk.pool);
        if let Some(record) = pool.and_then(|pool| pool.get_mut(&disk.image)) {
            act(mirrored, record, since, at);
        }
    }
}

/// The owner of the VM, if it owns it under this epoch and is another host than that of the copy.
fn owner(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    epoch: Epoch,
) -> Result<HostName, Refusal> {
    let record = vm_mut(change, &of.vm)?;
    let mut disks = record.effective().disks.iter();
    if !disks.any(|disk| disk.pool == of.pool && disk.image == of.image) {
        return Err(refuse(action, "it has no such disk"));
    }
    match &record.ownership {
        Ownership::Owned {
            host, epoch: now, ..
        } if *now == epoch && *host != of.host => Ok(host.clone()),
        Ownership::Owned { host, .. } if *host == of.host => {
            Err(refuse(action, "that is its owner's own copy"))
        }
        _ => Err(refuse(
            action,
            format!("nobody owns it under epoch {epoch} any more"),
        )),
    }
}

fn record<'c>(
    change: &'c mut Change<'_>,
    action: &Action,
    of: &CopyOf,
) -> Result<&'c mut DiskCopies, Refusal> {
    let pool = change.state.disk_copies.get_mut(&of.pool);
    pool.and_then(|pool| pool.get_mut(&of.image))
        .ok_or_else(|| refuse(action, "the disk has no record"))
}

/// The owner's own copy must be in step.
fn whole(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    owner: &HostName,
) -> Result<(), Refusal> {
    let owners = record(change, action, of)?.hosts.get(owner);
    match owners.is_some_and(|copy| copy.in_step) {
        true => Ok(()),
        false => Err(refuse(action, "the owner's own copy is not whole")),
    }
}

fn copy<'c>(
    change: &'c mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    since: Revision,
) -> Result<&'c mut DiskCopy, Refusal> {
    let copy = record(change, action, of)?.hosts.get_mut(&of.host);
    match copy {
        Some(copy) if copy.since == since => Ok(copy),
        _ => Err(refuse(action, "the copy's record has changed meanwhile")),
    }
}

pub(super) fn add(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    epoch: Epoch,
) -> Result<EventKind, Refusal> {
    let owner = owner(change, action, of, epoch)?;
    let pool = change.state.pools.get(&of.pool).map(|pool| &pool.spec);
    if !pool.is_some_and(|pool| pool.is_hosts_own() && pool.is_for(&of.host)) {
        return Err(refuse(action, "its pool has no copies there"));
    }
    if !change.state.hosts.contains_key(&of.host) {
        return Err(refuse(action, "that is no host of this cluster"));
    }
    let (since, at) = (change.revision, change.envelope.at);
    let record = record(change, action, of)?;
    let whole = record.hosts.get(&owner).is_some_and(|copy| copy.in_step);
    if !whole || record.hosts.len() >= COPIES || record.hosts.contains_key(&of.host) {
        return Err(refuse(action, "it has its copies already"));
    }
    let copy = DiskCopy {
        in_step: false,
        since,
        at,
        boot: None,
    };
    record.hosts.insert(of.host.clone(), copy);
    Ok(EventKind::Storage)
}

/// Only of disks that have copies for the time of a move.
pub(super) fn remove(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    epoch: Epoch,
    since: Revision,
) -> Result<EventKind, Refusal> {
    let owner = owner(change, action, of, epoch)?;
    whole(change, action, of, &owner)?;
    let pool = change.state.pools.get(&of.pool);
    if pool.is_some_and(|pool| pool.spec.is_mirrored()) {
        return Err(refuse(action, "its pool keeps a copy of each disk"));
    }
    copy(change, action, of, since)?;
    record(change, action, of)?.hosts.remove(&of.host);
    Ok(EventKind::Storage)
}

/// The owner has started its guest in the life of its kernel that the copy is bound to, and flushes a disk before that:
/// from here on the copy does not depend on that life.
fn flushed(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    since: Revision,
    boot: &BootId,
) -> Result<EventKind, Refusal> {
    let copy = copy(change, action, of, since)?;
    if !copy.in_step || copy.boot.as_ref() != Some(boot) {
        return Err(refuse(
            action,
            "it was in step under another boot, or is flushed",
        ));
    }
    copy.boot = None;
    Ok(EventKind::Storage)
}

pub(super) fn in_step(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    epoch: Epoch,
    since: Revision,
    boot: &BootId,
) -> Result<EventKind, Refusal> {
    let ownership = &vm_mut(change, &of.vm)?.ownership;
    if matches!(ownership, Ownership::Owned { host, epoch: now, .. } if *now == epoch && *host == of.host)
    {
        return flushed(change, action, of, since, boot);
    }
    let owner = owner(change, action, of, epoch)?;
    whole(change, action, of, &owner)?;
    let (now, at) = (change.revision, change.envelope.at);
    let copy = copy(change, action, of, since)?;
    if copy.in_step {
        return Err(refuse(action, "it is in step already"));
    }
    (copy.in_step, copy.since, copy.at) = (true, now, at);
    copy.boot = Some(boot.clone());
    Ok(EventKind::Storage)
}

pub(super) fn out_of_step(
    change: &mut Change<'_>,
    action: &Action,
    of: &CopyOf,
    epoch: Epoch,
    since: Revision,
) -> Result<EventKind, Refusal> {
    let owner = owner(change, action, of, epoch)?;
    // After a move that ended badly the other one may be the only one that counts.
    whole(change, action, of, &owner)?;
    let (now, at) = (change.revision, change.envelope.at);
    let copy = copy(change, action, of, since)?;
    if !copy.in_step {
        return Err(refuse(action, "it is out of step already"));
    }
    (copy.in_step, copy.since, copy.at, copy.boot) = (false, now, at, None);
    Ok(EventKind::Storage)
}

/// An image was made on a host by other means than the start of a VM.
pub(super) fn made(
    change: &mut Change<'_>,
    pool: &PoolName,
    image: &str,
    host: &HostName,
) -> Result<(), Refusal> {
    let spec = change.state.pools.get(pool).map(|pool| &pool.spec);
    let spec = spec.ok_or_else(|| unknown("pool", pool))?;
    if !spec.is_hosts_own() || !spec.is_for(host) {
        let text = format!("pool {pool} does not keep disks of {host} alone");
        return Err(Refusal::Invalid(vec![text]));
    }
    if !change.state.hosts.contains_key(host) {
        return Err(unknown("host", host));
    }
    let known = change.state.copies(pool, image);
    if let Some(copies) = known.filter(|copies| !copies.hosts.contains_key(host)) {
        let hosts: Vec<&str> = copies.hosts.keys().map(HostName::as_str).collect();
        let text = format!("disk {image} of pool {pool} is on {}", hosts.join(" and "));
        return Err(Refusal::InUse(text));
    }
    if known.is_some() {
        return Ok(());
    }
    let copy = DiskCopy {
        in_step: true,
        since: change.revision,
        at: change.envelope.at,
        boot: None,
    };
    let record = DiskCopies {
        created: Epoch(0),
        hosts: [(host.clone(), copy)].into(),
        unsettled: None,
    };
    let disks = change.state.disk_copies.entry(pool.clone()).or_default();
    disks.insert(image.to_owned(), record);
    let text = format!("disk {image} of pool {pool} was made on {host}");
    change.event(
        EventKind::Storage,
        Subject::Object(format!("pool {pool}")),
        text,
    );
    Ok(())
}

/// An operator has decided that a copy is the one that counts: from here on it is whole by definition, and whatever the
/// others have that it lacks is lost.
pub(super) fn accept(change: &mut Change<'_>, of: &CopyOf, since: Revision) -> Result<(), Refusal> {
    let CopyOf {
        vm,
        pool,
        image,
        host,
    } = of;
    let known = change.state.vms.get(vm);
    let known = known.ok_or_else(|| unknown("vm", vm))?;
    if let Some(owner) = known.ownership.host() {
        let text = format!(
            "VM {vm} is owned by {owner}: its disks are decided on when nobody can run it: `quorate vm stop {vm}`, or, if {owner} is off for good, `quorate host confirm-dead {owner}`"
        );
        return Err(Refusal::InUse(text));
    }
    if known.saved.is_some() {
        let text =
            format!("VM {vm} has its memory saved: it goes only with the disks as they were");
        return Err(Refusal::InUse(text));
    }
    let mut disks = known.effective().disks.iter();
    if !disks.any(|disk| disk.pool == *pool && disk.image == *image) {
        return Err(unknown("disk", format!("{pool}/{image} of VM {vm}")));
    }
    let (now, at) = (change.revision, change.envelope.at);
    let record = change.state.disk_copies.get_mut(pool);
    let record = record.and_then(|pool| pool.get_mut(image));
    let copy = record.and_then(|record| Some((record.hosts.get(host)?.clone(), record)));
    let (copy, record) =
        copy.ok_or_else(|| unknown("copy", format!("of disk {image} on {host}")))?;
    if copy.in_step && copy.boot.is_none() && record.unsettled.is_none() {
        return Ok(());
    }
    if copy.since != since {
        let what = format!("the copy of disk {image} on {host}");
        return Err(Refusal::Stale { what, base: since });
    }
    let accepted = DiskCopy {
        in_step: true,
        since: now,
        at,
        boot: None,
    };
    record.hosts.insert(host.clone(), accepted);
    only(record, host, now, at);
    let text = match copy.in_step {
        true => format!(
            "the copy of disk {image} on {host} counts from now on by an operator's word: what was only in {host}'s memory before it was booted again is lost"
        ),
        false => format!(
            "the copy of disk {image} on {host} counts from now on by an operator's word: what was written since {} is lost",
            copy.at
        ),
    };
    change.vm_event(EventKind::Storage, vm, text);
    Ok(())
}

/// Disks of VMs of which a host has the only copy that is in step.
pub(super) fn only_here(state: &State, host: &HostName) -> Vec<String> {
    let used = |pool: &PoolName, image: &str| {
        let mut vms = state.vms.values();
        vms.any(|vm| {
            let mut disks = vm.spec.disks.iter().chain(&vm.effective().disks);
            disks.any(|disk| disk.pool == *pool && disk.image == image)
        })
    };
    let pools = state.disk_copies.iter();
    let disks = pools.flat_map(|(pool, disks)| disks.iter().map(move |disk| (pool, disk)));
    let only = |record: &DiskCopies| {
        let whole = |(_, copy): &(&HostName, &DiskCopy)| copy.in_step;
        let mut hosts = record.hosts.iter().filter(whole).map(|(host, _)| host);
        hosts.next() == Some(host) && hosts.next().is_none()
    };
    disks
        .filter(|(pool, (image, record))| only(record) && used(pool, image))
        .map(|(pool, (image, _))| format!("{image} of pool {pool}"))
        .collect()
}

/// A host has left: its copies are gone.
pub(super) fn forget_host(state: &mut State, host: &HostName) {
    for disks in state.disk_copies.values_mut() {
        disks.retain(|_, record| {
            record.hosts.remove(host);
            !record.hosts.is_empty()
        });
    }
}

/// A pool was deleted: nothing is known of its disks.
pub(super) fn forget_pool(state: &mut State, pool: &PoolName) {
    state.disk_copies.remove(pool);
}
