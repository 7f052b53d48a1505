//! Units that decide by themselves who writes them: this host's key on the units of its guests.
//!
//! ```text
//!   start, thaw: own      | migration: target registers beside ... pause: target hands over to itself, asked by the source
//!   while it runs: look   |   it did not: the source takes the units back, then cancels
//!   closed: release       |
//! ```
//! Always holds: a key is registered for a committed order only, and not beyond the lease that is held then; a switchover
//! goes on only after the target has every unit; before a source goes on its units are its own again.
//!
//! Must not: take a missing answer of a device for anything.

use super::{Live, Shared, text};
use crate::guard::sys::boottime_ns;
use quorate_agent_logic::{GuestEvent, Token};
use quorate_hypervisor::Vm;
use quorate_state::{Ownership, State};
use quorate_storage::reservation::{Claim, ClusterTag, ReservationKey, Strangers, Trouble, Units};
use quorate_types::spec::DiskSpec;
use quorate_types::{Epoch, HostName, MigrationId, VmName};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Between two looks at the units of a guest that runs.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Bound of a hand-over at the target: the guest stands still meanwhile.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(1);
/// Bound of what is done without haste.
const RELEASE_WITHIN: Duration = Duration::from_secs(3);

/// What is left of the lease.
fn lease_left(shared: &Shared) -> Duration {
    let deadline = shared.deadline_ns.load(Ordering::Relaxed);
    Duration::from_nanos(deadline.saturating_sub(boottime_ns()))
}

fn key(
    shared: &Shared,
    state: &State,
    host: &HostName,
    epoch: Epoch,
) -> Result<ReservationKey, String> {
    let record = state.hosts.get(host);
    let record = record.ok_or_else(|| format!("{host} is not a host of this cluster"))?;
    let cluster = ClusterTag::of(&shared.config.cluster_id);
    ReservationKey::new(cluster, record.node, epoch.0).map_err(|error| error.to_string())
}

/// What messages call the unit of a disk.
fn unit_name(disk: &DiskSpec) -> String {
    format!("{}/{}", disk.pool, disk.image)
}

/// Strangers on disks that an operator said are gone.
fn taken(state: &State, disks: &[DiskSpec]) -> BTreeMap<String, Strangers> {
    let said = disks.iter().filter_map(|disk| {
        let take = state.take_of(&disk.pool, &disk.image)?;
        let strangers = Strangers::These {
            keys: take.keys.clone(),
            hold: take.hold,
        };
        Some((unit_name(disk), strangers))
    });
    said.collect()
}

/// The disks that have reservations.
async fn find(shared: &Shared, disks: &[DiskSpec]) -> Result<Units, String> {
    let mut units = Units::new();
    for disk in disks {
        let pool = shared.pool(&disk.pool)?;
        let found = pool.reservation(&disk.image).await;
        if let Some(unit) = found.map_err(|error| text(&error))? {
            units.push(unit_name(disk), unit);
        }
    }
    Ok(units)
}

/// The units of a VM: as its guest was made, or as the state has them where an earlier agent made it.
async fn units_of(shared: &Shared, vm: &VmName) -> Result<Units, String> {
    let known = || {
        let units = shared.units.lock().unwrap_or_else(PoisonError::into_inner);
        units.get(vm).cloned()
    };
    if let Some(units) = known() {
        return Ok(units);
    }
    let state = shared.state();
    let Some(record) = state.vms.get(vm) else {
        return Ok(Units::new());
    };
    let units = find(shared, &record.effective().disks).await?;
    remember(shared, vm, units.clone());
    Ok(units)
}

fn remember(shared: &Shared, vm: &VmName, units: Units) {
    let mut known = shared.units.lock().unwrap_or_else(PoisonError::into_inner);
    known.insert(vm.clone(), units);
}

/// Newer epochs than the owner's that came to nothing: all that were handed out before it became the owner again.
fn spent(epoch: Epoch) -> u32 {
    u32::try_from(epoch.0).unwrap_or(u32::MAX)
}

/// Before a guest is made: registers, and unless it only arrives later, becomes the one that writes.
pub(super) async fn before_start(
    shared: &Shared,
    vm: &VmName,
    disks: &[DiskSpec],
    epoch: Epoch,
    incoming: bool,
) -> Result<(), String> {
    let units = find(shared, disks).await?;
    remember(shared, vm, units.clone());
    if units.is_empty() {
        return Ok(());
    }
    let state = shared.state();
    let mine = key(shared, &state, &shared.config.host, epoch)?;
    let units = units.within(lease_left(shared));
    let done = match incoming {
        true => units.register(mine).await,
        false => {
            let last = state.vms.get(vm).map(|record| record.last_epoch);
            let claim = Claim {
                spent: spent(last.unwrap_or(epoch)),
                past_cut: let_in(shared, &state, disks),
                busy: false,
                taken: taken(&state, disks),
            };
            units.own(mine, &claim).await
        }
    };
    done.map_err(|trouble| trouble.to_string())
}

/// What this host's key is by the state, and up to which epoch newer ones came to nothing.
fn standing(shared: &Shared, vm: &VmName) -> Option<(Epoch, Epoch)> {
    let (state, me) = (shared.state(), &shared.config.host);
    let record = state.vms.get(vm)?;
    match &record.ownership {
        Ownership::Owned { host, epoch, .. } if host == me => Some((*epoch, record.last_epoch)),
        // What goes on here before the end of a migration goes on because the target will not.
        Ownership::Migrating {
            from,
            epoch,
            target_epoch,
            ..
        } if from == me => Some((*epoch, *target_epoch)),
        Ownership::Migrating {
            to, target_epoch, ..
        } if to == me => Some((*target_epoch, *target_epoch)),
        _ => None,
    }
}

/// Before a guest goes on: its units are its own, or it does not.
pub(super) async fn before_thaw(shared: &Shared, vm: &VmName) -> Result<(), GuestEvent> {
    match own(shared, vm, false).await {
        Ok(()) => Ok(()),
        Err(Trouble::Superseded(detail)) => Err(GuestEvent::DiskLost { detail }),
        Err(Trouble::Refused(detail) | Trouble::Failed(detail)) => {
            Err(GuestEvent::DiskRefused { detail })
        }
    }
}

/// Makes the units of a guest its host's again. `busy`: it may be running.
pub(super) async fn own(shared: &Shared, vm: &VmName, busy: bool) -> Result<(), Trouble> {
    let units = units_of(shared, vm).await.map_err(Trouble::Failed)?;
    let Some((epoch, last)) = standing(shared, vm).filter(|_| !units.is_empty()) else {
        return Ok(());
    };
    let state = shared.state();
    let mine = key(shared, &state, &shared.config.host, epoch).map_err(Trouble::Failed)?;
    let record = state.vms.get(vm);
    let disks = record.map_or(&[][..], |record| &record.effective().disks[..]);
    let claim = Claim {
        spent: spent(last),
        past_cut: let_in(shared, &state, disks),
        busy,
        taken: taken(&state, disks),
    };
    let units = units.within(lease_left(shared));
    units.own(mine, &claim).await
}

/// Whether no cut of this host is in force, by its replica: that is as new as the lease where a guest starts or goes on, and
/// [`look`] sees to it.
fn let_in(shared: &Shared, state: &State, disks: &[DiskSpec]) -> bool {
    let me = &shared.config.host;
    disks.iter().all(|disk| !state.is_cut(me, &disk.pool))
}

/// At the target, asked by the source, whose guest stands still: takes the units.
pub(super) async fn hand_over(shared: &Shared, vm: &VmName, id: MigrationId) -> Result<(), String> {
    let state = shared.state();
    let me = &shared.config.host;
    let (epoch, source) = match state.vms.get(vm).map(|record| &record.ownership) {
        Some(Ownership::Migrating {
            id: now,
            from,
            epoch,
            to,
            target_epoch,
            cancel: false,
        }) if *now == id && to == me => (*target_epoch, key(shared, &state, from, *epoch).ok()),
        _ => return Err(format!("migration {id} is not under way here")),
    };
    let awaited = {
        let guests = shared.guests.lock();
        guests
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(vm)
    };
    if !awaited {
        return Err("no guest is awaited here".to_owned());
    }
    let mine = key(shared, &state, me, epoch)?;
    let units = units_of(shared, vm).await?;
    let within = lease_left(shared).min(HAND_OVER_WITHIN);
    let handed = units.within(within).hand_over(mine, source).await;
    handed.map_err(|trouble| trouble.to_string())
}

/// Whether the VM has units that the target must take.
pub(super) async fn has_units(shared: &Shared, vm: &VmName) -> Result<bool, String> {
    Ok(!units_of(shared, vm).await?.is_empty())
}

/// Whether this host holds a lease and its replica is as new as that: an older one, as after a start of the daemon, may take
/// for true what is long over.
pub(crate) fn up_to_date(shared: &Shared) -> Result<(), String> {
    if lease_left(shared).is_zero() {
        return Err(format!("{} holds no lease", shared.config.host));
    }
    match shared.state().revision.0 < shared.fresh_from.load(Ordering::Relaxed) {
        true => Err(format!(
            "{} has not heard yet what was decided meanwhile",
            shared.config.host
        )),
        false => Ok(()),
    }
}

/// On the source, after the target has taken the units: what it was asked for is good only while the lease is.
pub(super) fn still_leased(shared: &Shared) -> Result<(), String> {
    match lease_left(shared).is_zero() {
        true => Err("the lease of the source ran out".to_owned()),
        false => Ok(()),
    }
}

/// Looks after the units of a guest for as long as it lives.
pub(super) fn spawn(shared: &Arc<Shared>, vm: &VmName, live: &Live) {
    let (shared, vm, live) = (shared.clone(), vm.clone(), live.clone());
    let spawner = shared.clone();
    spawner.spawn(async move {
        let exited = live.guest.clone();
        tokio::select! {
            _ = exited.exited() => {}
            () = keep(&shared, &vm, &*live.guest, live.run) => {}
        }
    });
}

async fn keep(shared: &Shared, vm: &VmName, guest: &dyn Vm, run: Token) {
    loop {
        match units_of(shared, vm).await {
            Ok(units) if units.is_empty() => {
                // A replica that lags does not know the VM yet.
                if shared.state().vms.contains_key(vm) {
                    return;
                }
            }
            Ok(units) => {
                if let Some(trouble) = look(shared, vm, &units).await {
                    stop(shared, vm, guest, run, trouble).await;
                }
            }
            // The device is away: the guest's own requests say so.
            Err(error) => tracing::debug!(%vm, error, "its units cannot be looked at"),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The owner's epoch, while nothing else is under way: both hosts of a migration have keys.
fn owned(shared: &Shared, vm: &VmName) -> Option<Epoch> {
    match &shared.state().vms.get(vm)?.ownership {
        Ownership::Owned { host, epoch, .. } if *host == shared.config.host => Some(*epoch),
        _ => None,
    }
}

/// Registers again what a unit has lost; returns why that must not be, or not while the guest runs: it is paused then, and
/// before it goes on its units are taken back.
async fn look(shared: &Shared, vm: &VmName, units: &Units) -> Option<Trouble> {
    let epoch = owned(shared, vm)?;
    let mine = key(shared, &shared.state(), &shared.config.host, epoch).ok()?;
    let left = lease_left(shared);
    if left.is_zero() || units.within(left).are_held_by(mine).await.ok()? {
        return None;
    }
    // An older replica may not know that this host was cut off.
    up_to_date(shared).ok()?;
    let trouble = match own(shared, vm, true).await {
        Ok(()) => {
            tracing::warn!(%vm, key = %mine, "a unit had lost this host's reservation: it was made again");
            return None;
        }
        Err(Trouble::Failed(_)) => return None,
        Err(trouble) => trouble,
    };
    // Another one is looked at from here on if something was agreed meanwhile.
    (owned(shared, vm) == Some(epoch)).then_some(trouble)
}

/// Pauses a guest that may not write any more, before it finds out by itself.
async fn stop(shared: &Shared, vm: &VmName, guest: &dyn Vm, run: Token, trouble: Trouble) {
    let detail = format!("its disks are not this host's any more: {trouble}");
    tracing::error!(%vm, detail, "the guest is paused");
    if let Err(error) = guest.freeze(super::FREEZE_WITHIN).await {
        tracing::error!(%vm, error = text(&error), "a guest that may not write is not paused");
    }
    shared.tell(vm, run, GuestEvent::IoError { detail }).await;
}

/// No process is left and none will be made under this epoch.
pub(super) async fn release(shared: &Shared, vm: &VmName) {
    let units = units_of(shared, vm).await;
    let forget = || {
        let mut units = shared.units.lock().unwrap_or_else(PoisonError::into_inner);
        units.remove(vm);
    };
    let me = shared
        .state()
        .hosts
        .get(&shared.config.host)
        .map(|record| record.node);
    let me = me.and_then(|node| u16::try_from(node).ok());
    if let (Ok(units), Some(me)) = (units, me)
        && !units.is_empty()
        && let Err(trouble) = units.within(RELEASE_WITHIN).leave(me).await
    {
        // The next owner pushes it out.
        tracing::warn!(%vm, %trouble, "a registration stays");
    }
    forget();
}
