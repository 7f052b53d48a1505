//! The owner's side of a disk's copy on another host: one task for each disk of a live guest.
//!
//! Always holds: what is done follows [`mirror_step`] alone, from the replica and from what QEMU says; so an agent that
//! was restarted goes on where the earlier one stopped. How a copy stands is reported; the leader changes its record.

use super::grow;
use super::write_maps::WriteMaps;
use super::{Live, Shared, text};
use crate::host::Message;
use quorate_agent_logic::{
    ExportRequest, Mirror, MirrorStep, grow_step, lacks, mirror_step, silent_step,
};
use quorate_hypervisor::{MirrorStatus, MirrorTarget, TlsMaterial};
use quorate_state::{DiskCopy, Ownership};
use quorate_types::report::{MirrorPhase, MirrorReport};
use quorate_types::spec::DiskSpec;
use quorate_types::{ByteSize, Epoch, HostName, PoolSpec, Revision, VmName};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How often a mirror is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// After a mirror could not be begun, or was dropped.
const BEGIN_AGAIN: Duration = Duration::from_secs(2);
/// Bound of the question for an export.
const ASK_WITHIN: Duration = Duration::from_secs(8);

/// Starts the tasks of a guest's disks; they end with it.
pub(super) fn spawn(shared: &Arc<Shared>, vm: &VmName, live: &Live) {
    for index in 0..live.guest.config().disks.len() {
        let (shared, vm, live) = (shared.clone(), vm.clone(), live.clone());
        let spawner = shared.clone();
        spawner.spawn(async move {
            let exited = live.guest.clone();
            tokio::select! {
                _ = exited.exited() => {}
                () = keep(&shared, &vm, &live, index) => {}
            }
            tell(&shared, &vm, index, None).await;
        });
    }
}

pub(super) async fn tell(shared: &Shared, vm: &VmName, disk: usize, report: Option<MirrorReport>) {
    let vm = vm.clone();
    // The host task ends only with the agent.
    let _ = shared
        .inbox
        .send(Message::Mirror { vm, disk, report })
        .await;
}

/// A copy that this host keeps, by the replica.
pub(super) struct Kept {
    pub(super) disk: DiskSpec,
    pub(super) epoch: Epoch,
    pub(super) host: HostName,
    copy: DiskCopy,
    /// The guest is on its way to another host, which takes its copy over.
    moving: bool,
    /// The copy is there to stay: when it returns it gets what it lacks.
    lasting: bool,
    speed: Option<u64>,
}

/// The copy of a disk, if this host owns the VM and the disk has one.
fn kept(shared: &Shared, vm: &VmName, index: usize) -> Option<Kept> {
    let (state, me) = (shared.state(), &shared.config.host);
    let record = state.vms.get(vm)?;
    let (host, epoch, moving) = match &record.ownership {
        Ownership::Owned { host, epoch, .. } => (host, epoch, false),
        Ownership::Migrating { from, epoch, .. } => (from, epoch, true),
        Ownership::Free => return None,
    };
    let disk = record.effective().disks.get(index)?;
    let pool = &state.pools.get(&disk.pool)?.spec;
    let mib_per_s = match pool {
        PoolSpec::Mirrored(pool) => pool.resync_mib_per_s,
        // Its disk is on the move.
        PoolSpec::Local(_) => state.settings().migration_mib_per_s,
        _ => return None,
    };
    let copies = state.copies(&disk.pool, &disk.image)?;
    let (other, copy) = copies.hosts.iter().find(|(other, _)| *other != me)?;
    (host == me).then(|| Kept {
        disk: disk.clone(),
        epoch: *epoch,
        host: other.clone(),
        copy: copy.clone(),
        moving,
        lasting: pool.is_mirrored(),
        speed: (mib_per_s > 0).then_some(mib_per_s << 20),
    })
}

/// Whether this host owns the VM and the disk has no copy (any more): then none is written.
fn alone(shared: &Shared, vm: &VmName, index: usize) -> bool {
    let (state, me) = (shared.state(), &shared.config.host);
    let Some(record) = state.vms.get(vm) else {
        return false;
    };
    let owner = matches!(&record.ownership, Ownership::Owned { host, .. } if host == me);
    let disk = record.effective().disks.get(index);
    let copies = disk.and_then(|disk| state.copies(&disk.pool, &disk.image));
    owner && copies.is_some_and(|copies| copies.hosts.keys().all(|host| host == me))
}

async fn drop_forgotten(shared: &Shared, vm: &VmName, live: &Live, index: usize) -> bool {
    if !alone(shared, vm, index) {
        return true;
    }
    // Where there is no answer it may be the copy that is waited for.
    if let Ok(mirrors) = live.guest.mirrors().await
        && !mirrors.iter().any(|mirror| mirror.disk == index)
    {
        return true;
    }
    tracing::info!(%vm, disk = index, "a copy that is not wanted any more is let go of");
    match live.guest.drop_mirror(index).await {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%vm, error = text(&error), "a mirror stays");
            false
        }
    }
}

/// What a mirror needs while it goes on.
async fn tend(
    shared: &Arc<Shared>,
    vm: &VmName,
    live: &Live,
    kept: &Kept,
    found: &MirrorStatus,
    maps: &mut WriteMaps,
) {
    if found.resync.is_some_and(|resync| resync.due)
        && let Err(error) = live.guest.finish_resync(found.disk).await
    {
        tracing::warn!(%vm, error = text(&error), "a resync does not end, and is begun again");
    }
    if kept.lasting && !kept.moving && found.in_step && found.problem.is_none() {
        maps.look(shared, vm, live, kept, found).await;
    }
}

/// When a mirror's writes moved on last.
struct Pulse {
    done: u64,
    at: Instant,
}

async fn keep(shared: &Arc<Shared>, vm: &VmName, live: &Live, index: usize) {
    let mut states = shared.state.clone();
    let mut keeper = Keeper {
        shared,
        vm,
        live,
        index,
        pulse: None,
        begin_at: Instant::now(),
        said: None,
        problem: None,
        maps: WriteMaps::default(),
        counted: false,
        silent: None,
    };
    loop {
        states.borrow_and_update();
        let Some(kept) = kept(shared, vm, index) else {
            if keeper.said.take().is_some() {
                tell(shared, vm, index, None).await;
            }
            let dropped = drop_forgotten(shared, vm, live, index).await;
            if !dropped || shared.growing.wanted(vm, index) {
                if dropped && alone(shared, vm, index) {
                    grow::now(shared, vm, live, index).await;
                }
                let _ = tokio::time::timeout(LOOK_EVERY, states.changed()).await;
            } else {
                tokio::select! {
                    _ = states.changed() => {}
                    () = shared.growing.asked(vm, index) => {}
                }
            }
            continue;
        };
        if keeper.look(&kept).await {
            let _ = tokio::time::timeout(LOOK_EVERY, states.changed()).await;
        } else {
            let _ = states.changed().await;
        }
    }
}

/// What is remembered of a copy between two looks.
struct Keeper<'a> {
    shared: &'a Arc<Shared>,
    vm: &'a VmName,
    live: &'a Live,
    index: usize,
    pulse: Option<Pulse>,
    /// No mirror is begun before.
    begin_at: Instant,
    said: Option<MirrorReport>,
    problem: Option<String>,
    maps: WriteMaps,
    /// The copy counted when it was looked at last.
    counted: bool,
    /// QEMU has not answered since.
    silent: Option<Instant>,
}

impl Keeper<'_> {
    /// One look; whether another one is due soon.
    async fn look(&mut self, kept: &Kept) -> bool {
        let dropped = std::mem::replace(&mut self.counted, kept.copy.in_step);
        if dropped && !kept.copy.in_step {
            // At once, whatever QEMU waits for: it may be this.
            self.let_go(kept).await;
        }
        let asked = Instant::now();
        let Ok(mirrors) = self.live.guest.mirrors().await else {
            self.unheard(kept, asked).await;
            return true;
        };
        self.silent = None;
        let found = mirrors.into_iter().find(|mirror| mirror.disk == self.index);
        if kept.moving && found.is_none() {
            // It was handed over, most likely. What becomes of it is known when the move has ended.
            return false;
        }
        let (shared, vm) = (self.shared, self.vm);
        let seen = found
            .as_ref()
            .map(|found| judge(shared, found, &mut self.pulse));
        if seen.is_none() {
            self.pulse = None;
        }
        if let Some(found) = &found {
            tend(shared, vm, self.live, kept, found, &mut self.maps).await;
        }
        let (step, phase, why) = match shared.growing.wanted(vm, self.index) && !kept.moving {
            true => grow_step(&kept.copy, seen.is_some()),
            false => mirror_step(&kept.copy, seen.as_ref()),
        };
        let why = why.or_else(|| self.problem.clone());
        self.say(report(kept, found.as_ref(), phase, why)).await;
        self.step(kept, step).await;
        true
    }

    async fn step(&mut self, kept: &Kept, step: MirrorStep) {
        let (vm, now) = (self.vm, Instant::now());
        match step {
            MirrorStep::Nothing => self.problem = None,
            MirrorStep::Drop => self.let_go(kept).await,
            MirrorStep::Begin if now >= self.begin_at => {
                let begun = begin(self.shared, vm, self.live, self.index, kept).await;
                self.problem = begun.err();
                match &self.problem {
                    Some(error) => tracing::info!(%vm, to = %kept.host, error, "no copy yet"),
                    None => {
                        tracing::info!(%vm, to = %kept.host, "a copy is brought up to date");
                    }
                }
                self.begin_at = Instant::now() + BEGIN_AGAIN;
            }
            MirrorStep::Begin => {}
            MirrorStep::Grow => grow::now(self.shared, vm, self.live, self.index).await,
        }
    }

    /// Lets go of a copy that does not count.
    async fn let_go(&mut self, kept: &Kept) {
        let vm = self.vm;
        tracing::warn!(%vm, disk = kept.disk.image, to = %kept.host, "its copy is let go of");
        if let Err(error) = self.live.guest.drop_mirror(self.index).await {
            tracing::error!(%vm, error = text(&error), "a mirror stays");
        }
        self.begin_at = Instant::now() + BEGIN_AGAIN;
    }

    /// QEMU does not answer.
    async fn unheard(&mut self, kept: &Kept, asked: Instant) {
        let since = *self.silent.get_or_insert(asked);
        if kept.moving {
            return; // it has other reasons then
        }
        let lease = self.shared.state().settings().lease.duration.as_duration();
        let Some((step, phase, why)) = silent_step(&kept.copy, since.elapsed(), lease) else {
            return;
        };
        if step == MirrorStep::Drop {
            self.let_go(kept).await;
        }
        self.say(report(kept, None, phase, Some(why))).await;
    }

    async fn say(&mut self, report: MirrorReport) {
        if self.said.as_ref() != Some(&report) {
            self.said = Some(report.clone());
            tell(self.shared, self.vm, self.index, Some(report)).await;
        }
    }
}

/// What QEMU says, and whether writes have been waiting for as long as a lease lasts.
fn judge(shared: &Shared, found: &MirrorStatus, pulse: &mut Option<Pulse>) -> Mirror {
    let now = Instant::now();
    let moved = pulse.as_ref().is_none_or(|pulse| pulse.done != found.done);
    if moved || found.done >= found.total {
        let done = found.done;
        *pulse = Some(Pulse { done, at: now });
    }
    let lease = shared.state().settings().lease.duration.as_duration();
    let stalled = pulse.as_ref().is_some_and(|pulse| now - pulse.at >= lease);
    Mirror {
        since: Revision(found.tag.parse().unwrap_or_default()),
        in_step: found.in_step,
        stalled,
        problem: found.problem.clone(),
    }
}

fn report(
    kept: &Kept,
    found: Option<&MirrorStatus>,
    phase: MirrorPhase,
    problem: Option<String>,
) -> MirrorReport {
    // While writes are mirrored, how many there were is no news.
    let syncing = found.filter(|_| phase == MirrorPhase::Syncing);
    let (done, total) = syncing.map_or((0, 0), |found| {
        let lacked = found.resync.map(|resync| (resync.done, resync.total));
        let (done, total) = lacked.unwrap_or((found.done, found.total));
        // Told in steps of a hundredth, so that it does not change with every look.
        let grain = (total / 100).max(1);
        (done / grain * grain, total / grain * grain)
    });
    MirrorReport {
        pool: kept.disk.pool.clone(),
        image: kept.disk.image.clone(),
        to: kept.host.clone(),
        since: kept.copy.since,
        phase,
        done: ByteSize(done),
        total: ByteSize(total),
        problem,
    }
}

/// Where the copy is written to, and the mark that it bears. Asked again, the answer is the same.
async fn ask(
    shared: &Shared,
    vm: &VmName,
    kept: &Kept,
) -> Result<(MirrorTarget, Option<String>, u64), String> {
    let disk = &kept.disk;
    let pool = shared.pool(&disk.pool)?;
    let format = quorate_storage::DiskFormat::Raw;
    let info = pool.disk_info(&disk.image, format).await;
    let info = info.map_err(|error| text(&error))?;
    let request = ExportRequest {
        vm: vm.clone(),
        pool: disk.pool.clone(),
        image: disk.image.clone(),
        from: shared.config.host.clone(),
        epoch: kept.epoch,
        since: kept.copy.since,
        size: info.virtual_bytes,
    };
    let ask = shared.drivers.peers.ask_export(kept.host.clone(), request);
    let offer = tokio::time::timeout(ASK_WITHIN, ask)
        .await
        .map_err(|_| format!("{} does not answer", kept.host))??;
    let address = offer.address.parse();
    let address =
        address.map_err(|_| format!("{} gave the address `{}`", kept.host, offer.address))?;
    let target = MirrorTarget {
        address,
        export: offer.name,
        tls: shared.config.migration_tls.clone().map(|dir| TlsMaterial {
            dir,
            hostname: Some(kept.host.to_string()),
        }),
        program: crate::exports::program().into(),
    };
    Ok((target, offer.mark, info.virtual_bytes))
}

async fn begin(
    shared: &Shared,
    vm: &VmName,
    live: &Live,
    index: usize,
    kept: &Kept,
) -> Result<(), String> {
    let disk = &kept.disk;
    let (target, mark, size) = ask(shared, vm, kept).await?;
    let maps = live.guest.write_maps(index).await;
    let maps = maps.map_err(|error| text(&error))?;
    let known: Vec<_> = maps.iter().map(super::write_maps::known).collect();
    let lacks = lacks(mark.as_deref(), vm, kept.epoch, &known);
    let lacks = lacks.and_then(|map| maps.iter().find(|other| other.number == map.number));
    match lacks {
        Some(map) => tracing::info!(
            %vm, disk = disk.image, to = %kept.host, bytes = map.bytes, of = size,
            "the copy gets what it lacks"
        ),
        None => tracing::info!(%vm, disk = disk.image, to = %kept.host, "the copy gets all of it"),
    }
    let tag = kept.copy.since.to_string();
    let begun = live
        .guest
        .start_mirror(index, &tag, &target, kept.speed, lacks);
    begun.await.map_err(|error| text(&error))
}
