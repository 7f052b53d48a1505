//! `CommitPlan`: every action is checked again against the state as it is now.
//!
//! Always holds: a plan made before a change of something it touches is refused whole, so the
//! planner looks again; **proof-before-start** is checked here, not believed.

use super::{Change, copies, services, unknown};
use crate::command::Refusal;
use crate::copies::Unsettled;
use crate::event::EventKind;
use crate::model::{
    DECISIONS_IN_FULL, DECISIONS_KEPT, Decision, GuestAbi, HostMode, OrderKind, Ownership,
    StopMode, VmRecord,
};
use crate::plan::{Action, MigrationEnd, Plan, PlannedAction};
use quorate_membership::FenceProof;
use quorate_types::report::SavedState;
use quorate_types::{HostName, MigrationId, VmName};

pub(super) fn commit(change: &mut Change<'_>, plan: &Plan) -> Result<(), Refusal> {
    if change.state.topology_changed > plan.base {
        return Err(Refusal::Stale {
            what: "the cluster's configuration".into(),
            base: plan.base,
        });
    }
    for planned in &plan.actions {
        if let Some(vm) = planned.action.vm() {
            let record = change.state.vms.get(vm).ok_or_else(|| unknown("VM", vm))?;
            if record.changed > plan.base && record.changed != change.revision {
                return Err(Refusal::Stale {
                    what: format!("VM {vm}"),
                    base: plan.base,
                });
            }
        }
        step(change, planned)?;
    }
    Ok(())
}

fn step(change: &mut Change<'_>, planned: &PlannedAction) -> Result<(), Refusal> {
    let action = &planned.action;
    let kind = match action {
        Action::Start { vm, host, abi } => start(change, action, vm, host, abi)?,
        Action::Release { vm, proofs, saved } => {
            release(change, action, vm, proofs, saved.as_ref())?
        }
        Action::Stop { vm, mode } => stop(change, action, vm, *mode)?,
        Action::Migrate { vm, to } => migrate(change, action, vm, to)?,
        Action::CancelMigration { vm, id } => cancel(change, action, vm, *id)?,
        Action::FinishMigration { vm, id, end } => finish(change, action, vm, *id, end)?,
        Action::ClearMove { vm, done } => {
            vm_mut(change, vm)?.move_request = None;
            if *done {
                EventKind::Migration
            } else {
                EventKind::Refused
            }
        }
        Action::AbandonSave { vm } => abandon_save(change, action, vm)?,
        Action::AddCopy { of, epoch } => copies::add(change, action, of, *epoch)?,
        Action::CopyInStep {
            of,
            epoch,
            since,
            boot,
        } => copies::in_step(change, action, of, *epoch, *since, boot)?,
        Action::SettleCopies { of, id } => copies::settle(change, action, of, *id)?,
        Action::RemoveCopy { of, epoch, since } => {
            copies::remove(change, action, of, *epoch, *since)?
        }
        Action::CopyOutOfStep { of, epoch, since } => {
            copies::out_of_step(change, action, of, *epoch, *since)?
        }
        Action::SetHostMode { host, mode } => {
            // Within a plan the mode only follows what the plan already saw: no staleness of itself.
            let topology = change.state.topology_changed;
            super::cluster::set_mode(change, host, *mode)?;
            if *mode == HostMode::Maintenance {
                change.state.topology_changed = topology;
            }
            return Ok(());
        }
        Action::Forget { vm } => return forget(change, action, vm),
    };
    if let Some(vm) = action.vm() {
        record_decision(change, vm, planned);
        change.vm_event(
            kind,
            vm,
            format!("{}: {}", action.describe(), planned.reason.summary),
        );
    }
    Ok(())
}

fn record_decision(change: &mut Change<'_>, vm: &VmName, planned: &PlannedAction) {
    let (at, revision) = (change.envelope.at, change.revision);
    let Some(record) = change.state.vms.get_mut(vm) else {
        return;
    };
    record.changed = revision;
    let decision = Decision {
        at,
        revision,
        action: planned.action.describe(),
        kind: Some(planned.action.kind()),
        host: record.ownership.host().cloned(),
        reason: planned.reason.clone(),
    };
    record.decisions.push(decision);
    if let Some(old) = record.decisions.len().checked_sub(DECISIONS_IN_FULL + 1) {
        record.decisions[old].reason.candidates = Vec::new();
    }
    if record.decisions.len() > DECISIONS_KEPT {
        record.decisions.remove(0);
    }
}

pub(super) fn vm_mut<'c>(
    change: &'c mut Change<'_>,
    vm: &VmName,
) -> Result<&'c mut VmRecord, Refusal> {
    change
        .state
        .vms
        .get_mut(vm)
        .ok_or_else(|| unknown("VM", vm))
}

pub(super) fn refuse(action: &Action, why: impl Into<String>) -> Refusal {
    Refusal::Action {
        action: action.describe(),
        why: why.into(),
    }
}

fn check_target(change: &Change<'_>, action: &Action, host: &HostName) -> Result<(), Refusal> {
    let record = change
        .state
        .hosts
        .get(host)
        .ok_or_else(|| unknown("host", host))?;
    if record.mode != HostMode::Active {
        return Err(refuse(
            action,
            format!("host {host} takes no VMs (it is being drained or in maintenance)"),
        ));
    }
    Ok(())
}

/// A host that was cut off from a disk's pool is let in again only after everything that it ran there is gone.
fn check_reach(
    change: &Change<'_>,
    action: &Action,
    vm: &VmName,
    host: &HostName,
) -> Result<(), Refusal> {
    let disks = change
        .state
        .vms
        .get(vm)
        .map(|record| &record.effective().disks);
    let cut = disks
        .into_iter()
        .flatten()
        .find(|disk| change.state.is_cut(host, &disk.pool));
    match cut {
        Some(disk) => Err(refuse(
            action,
            format!("{host} is cut off from pool {}", disk.pool),
        )),
        None => Ok(()),
    }
}

fn start(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    host: &HostName,
    abi: &GuestAbi,
) -> Result<EventKind, Refusal> {
    check_target(change, action, host)?;
    check_reach(change, action, vm, host)?;
    let spec = vm_mut(change, vm)?.spec.clone();
    if let Some((disk, write)) = change.state.written(&spec) {
        let text = format!(
            "{} writes to its disk {} ({})",
            write.host, disk.image, write.what
        );
        return Err(refuse(action, text));
    }
    let record = vm_mut(change, vm)?;
    if !record.wanted() {
        return Err(refuse(action, "it shall not run"));
    }
    if record.ownership != Ownership::Free {
        return Err(refuse(
            action,
            "it is not free: its owner has not been released",
        ));
    }
    let epoch = record.last_epoch.next();
    record.last_epoch = epoch;
    // A saved memory belongs to the definition it was saved with.
    let restored = record.saved.is_some() && record.active.is_some();
    if record.saved.is_none() || record.active.is_none() {
        record.active = Some(record.spec.clone());
        record.abi = Some(abi.clone());
        record.saved = None;
    }
    record.ownership = Ownership::Owned {
        host: host.clone(),
        epoch,
        order: OrderKind::Run,
    };
    record.last_host = Some(host.clone());
    record.failed_moves = 0;
    copies::started(change, action, vm, host, epoch)?;
    if !restored {
        services::new_life(change.state, vm);
    }
    Ok(EventKind::Start)
}

fn release(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    proofs: &[FenceProof],
    saved: Option<&SavedState>,
) -> Result<EventKind, Refusal> {
    let record = vm_mut(change, vm)?;
    let holders = record.ownership.hosts();
    if holders.is_empty() {
        return Err(refuse(action, "nobody owns it"));
    }
    for (host, epoch) in holders {
        let disks = || {
            let disks = record.effective().disks.iter();
            disks.map(|disk| (&disk.pool, disk.image.as_str()))
        };
        let holds =
            |proof: &FenceProof| proof.covers(host, vm, epoch) && proof.covers_disks(disks());
        if !proofs.iter().any(holds) {
            return Err(refuse(
                action,
                format!("no proof that {host} does not run it under epoch {epoch}"),
            ));
        }
    }
    let left = match &record.ownership {
        Ownership::Migrating {
            id,
            from,
            epoch,
            to,
            ..
        } => {
            let (id, from, epoch, to) = (*id, from.clone(), *epoch, to.clone());
            let unsettled = Unsettled {
                id,
                from,
                epoch,
                to,
            };
            Some((record.effective().clone(), unsettled))
        }
        _ => None,
    };
    let ordered_save = matches!(
        record.ownership,
        Ownership::Owned {
            order: OrderKind::Stop(StopMode::Save),
            ..
        }
    );
    record.saved = saved.filter(|_| ordered_save).cloned();
    record.ownership = Ownership::Free;
    if record.saved.is_none() {
        record.active = None;
        record.abi = None;
        services::new_life(change.state, vm);
    }
    if let Some((spec, unsettled)) = left {
        copies::abandoned(change, &spec, &unsettled);
    }
    Ok(EventKind::Release)
}

fn stop(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    mode: StopMode,
) -> Result<EventKind, Refusal> {
    let record = vm_mut(change, vm)?;
    match &mut record.ownership {
        Ownership::Owned { order, .. } => *order = OrderKind::Stop(mode),
        Ownership::Free => return Err(refuse(action, "it is not running")),
        Ownership::Migrating { id, .. } => {
            return Err(refuse(action, format!("migration {id} has not ended")));
        }
    }
    Ok(EventKind::Stop)
}

/// The guest was never ended: it goes on under the same epoch, and that its move failed is remembered.
fn abandon_save(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
) -> Result<EventKind, Refusal> {
    let record = vm_mut(change, vm)?;
    if !record.wanted() {
        return Err(refuse(action, "it shall not run"));
    }
    match &mut record.ownership {
        Ownership::Owned { order, .. } if *order == OrderKind::Stop(StopMode::Save) => {
            *order = OrderKind::Run;
        }
        _ => return Err(refuse(action, "it is not being saved")),
    }
    record.failed_moves = record.failed_moves.saturating_add(1);
    // As with a failed live migration: the operator's wish is answered with the reason.
    record.move_request = None;
    Ok(EventKind::Migration)
}

fn migrate(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    to: &HostName,
) -> Result<EventKind, Refusal> {
    check_target(change, action, to)?;
    check_reach(change, action, vm, to)?;
    let spec = vm_mut(change, vm)?.effective().clone();
    copies::may_move(change, action, &spec, to)?;
    let id = MigrationId(change.revision.0);
    let record = vm_mut(change, vm)?;
    let Ownership::Owned {
        host,
        epoch,
        order: OrderKind::Run,
    } = &record.ownership
    else {
        return Err(refuse(action, "it is not running, or already moving"));
    };
    if host == to {
        return Err(refuse(action, "it is there already"));
    }
    let target_epoch = record.last_epoch.next();
    record.ownership = Ownership::Migrating {
        id,
        from: host.clone(),
        epoch: *epoch,
        to: to.clone(),
        target_epoch,
        cancel: false,
    };
    record.last_epoch = target_epoch;
    // A migration supersedes what was saved for the start under the old epoch.
    record.saved = None;
    Ok(EventKind::Migration)
}

fn cancel(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    id: MigrationId,
) -> Result<EventKind, Refusal> {
    let record = vm_mut(change, vm)?;
    match &mut record.ownership {
        Ownership::Migrating {
            id: current,
            cancel,
            ..
        } if *current == id => *cancel = true,
        _ => return Err(refuse(action, "it is not that migration which runs")),
    }
    Ok(EventKind::Migration)
}

fn finish(
    change: &mut Change<'_>,
    action: &Action,
    vm: &VmName,
    id: MigrationId,
    end: &MigrationEnd,
) -> Result<EventKind, Refusal> {
    let record = vm_mut(change, vm)?;
    let Ownership::Migrating {
        id: current,
        from,
        epoch,
        to,
        target_epoch,
        ..
    } = record.ownership.clone()
    else {
        return Err(refuse(action, "it is not migrating"));
    };
    if current != id {
        return Err(refuse(
            action,
            format!("migration {current} runs: a report about {id} is stale"),
        ));
    }
    let (spec, counts) = (record.effective().clone(), copies::after(end, &from, &to));
    let back = Ownership::Owned {
        host: from,
        epoch,
        order: OrderKind::Run,
    };
    record.ownership = match end {
        MigrationEnd::Arrived { .. } => {
            record.last_host = Some(to.clone());
            record.move_request = None;
            Ownership::Owned {
                host: to,
                epoch: target_epoch,
                order: OrderKind::Run,
            }
        }
        MigrationEnd::StayedAtSource | MigrationEnd::RefusedByTarget => back,
        MigrationEnd::TargetDead(proof) | MigrationEnd::TargetLost(proof) => {
            let disks = record.effective().disks.iter();
            let disks = disks.map(|disk| (&disk.pool, disk.image.as_str()));
            if !proof.covers(&to, vm, target_epoch) || !proof.covers_disks(disks) {
                return Err(refuse(
                    action,
                    format!("no proof that {to} does not run it under epoch {target_epoch}"),
                ));
            }
            back
        }
    };
    record.failed_moves = match end {
        MigrationEnd::Arrived { .. } => 0,
        _ => record.failed_moves.saturating_add(1),
    };
    // A failed move is not tried again by itself: the operator's wish is answered with the reason.
    record.move_request = None;
    copies::moved(change, &spec, counts);
    Ok(EventKind::Migration)
}

fn forget(change: &mut Change<'_>, action: &Action, vm: &VmName) -> Result<(), Refusal> {
    let record = vm_mut(change, vm)?;
    if !record.deleting || record.ownership != Ownership::Free {
        return Err(refuse(action, "it is not deleted and stopped"));
    }
    let last = record.last_epoch;
    change.state.forgotten_epoch = change.state.forgotten_epoch.max(last);
    change.state.vms.remove(vm);
    services::forget_vm(change.state, vm);
    change.vm_event(EventKind::Changed, vm, format!("VM {vm} deleted"));
    Ok(())
}
