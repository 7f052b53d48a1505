//! What changes hands at the pause of a live migration, between the last memory and the switchover: units with
//! reservations ([`super::reserve`]), copies of disks.
//!
//! ```text
//! source    paused ---- ask target ---------------------------- let go of the mirrors ---- continue
//! target         takes the units; its copies are its own (no export is left, all is on stable storage)
//!                    |                                              |
//!   fails here: the source takes its units back and cancels;   fails here: handed over; the guest is frozen
//!   writes wait for the copies until the state drops them      until the target has said that it does not run it
//! ```
//! Always holds: a switchover goes on only after the target has all of it; a guest whose disks have copies never runs on
//! the source without them before the state says so; a guest that has nothing to hand over costs no call.

use super::{Shared, reserve, text};
use quorate_hypervisor::{MigrationControl, Vm};
use quorate_state::{Ownership, State};
use quorate_types::spec::DiskSpec;
use quorate_types::{HostName, MigrationId, VmName};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Bound of the call to the target; QEMU waits longer. Longer than the target takes, so that one that hangs gives no
/// command after the source has gone on.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// Bound of letting go of all mirrors; QEMU waits longer.
const LET_GO_WITHIN: Duration = Duration::from_secs(2);

/// A migration of a VM.
struct Moving<'s> {
    id: MigrationId,
    from: &'s HostName,
    to: &'s HostName,
    /// Disks that are on particular hosts.
    disks: Vec<&'s DiskSpec>,
}

fn moving<'s>(state: &'s State, vm: &VmName) -> Option<Moving<'s>> {
    let record = state.vms.get(vm)?;
    let Ownership::Migrating { id, from, to, .. } = &record.ownership else {
        return None;
    };
    Some(Moving {
        id: *id,
        from,
        to,
        disks: state.own_disks(record.effective()).collect(),
    })
}

/// On the source, whose switchover is recorded as begun: hands over what there is, and lets QEMU continue.
pub(super) async fn hand_over(
    shared: &Shared,
    vm: &VmName,
    guest: Option<Arc<dyn Vm>>,
    control: &MigrationControl,
) {
    let state = shared.state();
    let moving = moving(&state, vm).filter(|moving| moving.from == &shared.config.host);
    let copies = moving.as_ref().map_or(0, |moving| moving.disks.len());
    if let Err(why) = ask(shared, vm, guest.as_deref(), moving).await {
        tracing::warn!(%vm, why, "the target did not get the disks: the guest stays here");
        // The target was never told to run it, and the guest stands still: QEMU has ended all of its requests.
        if let Err(trouble) = reserve::own(shared, vm, false).await {
            tracing::warn!(%vm, %trouble, "the source does not have its disks yet");
        }
        if let Err(error) = control.cancel().await {
            tracing::warn!(%vm, error = text(&error), "a migration was not cancelled");
        }
        return;
    }
    match guest.filter(|_| copies > 0) {
        Some(guest) => {
            if let Err(error) = let_go(&*guest, control).await {
                tracing::warn!(%vm, error, "it was not handed over");
                if let Err(error) = control.forsake().await {
                    tracing::warn!(%vm, error = text(&error), "a migration was not ended");
                }
            }
        }
        // The last phase tells the outcome.
        None => {
            if let Err(error) = control.continue_switchover().await {
                tracing::warn!(%vm, error = text(&error), "the switchover was not ordered");
            }
        }
    }
}

/// Asks the target to take over what there is; copies only if all of them have all writes.
async fn ask(
    shared: &Shared,
    vm: &VmName,
    guest: Option<&dyn Vm>,
    moving: Option<Moving<'_>>,
) -> Result<(), String> {
    let units = reserve::has_units(shared, vm).await?;
    let moving = moving.ok_or("the migration is over")?;
    if moving.disks.is_empty() && !units {
        return Ok(());
    }
    if !moving.disks.is_empty() {
        let guest = guest.ok_or("its process has ended")?;
        let mirrors = guest.mirrors().await.map_err(|error| text(&error))?;
        if mirrors.len() < moving.disks.len() {
            return Err("the mirror of a disk has ended".into());
        }
        if let Some(mirror) = mirrors.iter().find(|mirror| !mirror.in_step) {
            return Err(format!("disk {} is not in step", mirror.disk));
        }
    }
    let peers = &shared.drivers.peers;
    let asked = peers.ask_hand_over(moving.to.clone(), vm.clone(), moving.id);
    let answer = timeout(ASK_WITHIN, asked).await;
    answer.map_err(|_| format!("{} does not answer", moving.to))??;
    reserve::still_leased(shared)
}

/// From the first mirror that is let go of the guest must not run here, unless it is known that it does not run there.
async fn let_go(guest: &dyn Vm, control: &MigrationControl) -> Result<(), String> {
    let waits = control.waits().await;
    waits.map_err(|error| text(&error))?;
    let all = async {
        for mirror in guest.mirrors().await? {
            guest.drop_mirror(mirror.disk).await?;
        }
        Ok(())
    };
    let dropped = timeout(LET_GO_WITHIN, all).await;
    let dropped = dropped.map_err(|_| "its mirrors do not end".to_owned())?;
    dropped.map_err(|error: quorate_hypervisor::HypervisorError| text(&error))?;
    let ordered = control.continue_switchover().await;
    ordered.map_err(|error| text(&error))
}

/// On the target: takes the VM's units; its copies of the VM's disks are written from outside no more, and are on stable
/// storage.
pub(crate) async fn take_over(shared: &Shared, vm: &VmName, id: MigrationId) -> Result<(), String> {
    let (state, me) = (shared.state(), &shared.config.host);
    let moving = moving(&state, vm).filter(|moving| moving.id == id && moving.to == me);
    let moving = moving.ok_or_else(|| format!("{me} does not await {vm} by migration {id}"))?;
    reserve::hand_over(shared, vm, id).await?;
    for disk in moving.disks {
        let record = state.copies(&disk.pool, &disk.image);
        let record = record.ok_or_else(|| format!("disk {} has no record", disk.image))?;
        record.check(&disk.image, me, Some(&shared.config.boot))?;
        crate::exports::close(&shared.exports, &disk.pool, &disk.image).await?;
    }
    Ok(())
}

/// On the target, when the guest is awaited: most of what a copy has in memory is written now, so that little is left
/// at the pause.
pub(super) async fn await_disks(shared: &Shared, vm: &VmName) -> Result<(), String> {
    let (state, me) = (shared.state(), &shared.config.host);
    let moving = moving(&state, vm).filter(|moving| moving.to == me);
    for disk in moving.map(|moving| moving.disks).unwrap_or_default() {
        let record = state.copies(&disk.pool, &disk.image);
        let record = record.ok_or_else(|| format!("disk {} has no record", disk.image))?;
        record.check(&disk.image, me, Some(&shared.config.boot))?;
        flush(shared, disk).await?;
    }
    Ok(())
}

/// Writes what the kernel has of a disk in its memory. Before a guest is said to run: its copy does not depend on the
/// life of this kernel any more then.
pub(super) async fn flush(shared: &Shared, disk: &DiskSpec) -> Result<(), String> {
    let pool = shared.pool(&disk.pool)?;
    let format = quorate_storage::DiskFormat::Raw;
    let info = pool.disk_info(&disk.image, format).await;
    let info = info.map_err(|error| text(&error))?;
    let Some(path) = info.source.path().map(Path::to_owned) else {
        return Ok(());
    };
    let flushed = tokio::task::spawn_blocking(move || {
        std::fs::File::open(&path).and_then(|file| file.sync_all())
    });
    let flushed = flushed.await.map_err(|error| error.to_string())?;
    flushed.map_err(|error| format!("disk {} cannot be flushed: {error}", disk.image))
}
