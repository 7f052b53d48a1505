//! The owner's write maps of a disk: follows [`map_step`] while the copy is in step.

use super::mirror::Kept;
use super::{Live, Shared, text};
use quorate_agent_logic::{FlushRequest, Map, MapMemory, MapStep, map_step};
use quorate_hypervisor::{HypervisorError, MirrorStatus, WriteMap};
use quorate_types::VmName;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A new map is begun so often: what was written before it need not be copied again.
const TURN_EVERY: Duration = Duration::from_secs(60);
/// After a copy could not be flushed.
const FLUSH_AGAIN: Duration = Duration::from_secs(10);

pub(super) fn known(map: &WriteMap) -> Map {
    Map {
        tag: map.tag.clone(),
        number: map.number,
        bytes: map.bytes,
    }
}

/// What this agent remembers of a disk's maps.
#[derive(Default)]
pub(super) struct WriteMaps {
    memory: MapMemory,
    /// A map was relied on last.
    turned_at: Option<Instant>,
    /// Nothing is to be done before.
    look_at: Option<Instant>,
    flush: Option<(u32, oneshot::Receiver<Result<(), String>>)>,
}

impl WriteMaps {
    /// One step, if one is due. Never waits for the copy's host.
    pub(super) async fn look(
        &mut self,
        shared: &Arc<Shared>,
        vm: &VmName,
        live: &Live,
        kept: &Kept,
        found: &MirrorStatus,
    ) {
        let now = Instant::now();
        if !self.flushed(vm, now) || self.look_at.is_some_and(|at| now < at) {
            return;
        }
        self.look_at = None;
        let (guest, disk) = (&live.guest, found.disk);
        let Ok(maps) = guest.write_maps(disk).await else {
            return;
        };
        let seen: Vec<Map> = maps.iter().map(known).collect();
        let quiet = found.done >= found.total;
        let due = self.turned_at.is_none_or(|at| now - at >= TURN_EVERY);
        let step = map_step(&found.tag, &seen, self.memory, quiet, due);
        self.memory.begun = None;
        let done: Result<(), HypervisorError> = match step {
            MapStep::Nothing => {
                if self.memory.flushed == seen.last().map(|map| map.number) {
                    let rest = self.turned_at.map_or(now, |at| at + TURN_EVERY);
                    self.look_at = Some(rest.max(now + Duration::from_secs(1)));
                }
                Ok(())
            }
            MapStep::Begin(number) => {
                self.memory.begun = Some(number);
                guest.begin_write_map(disk, &found.tag, number).await
            }
            MapStep::Flush(number) => {
                self.ask(shared, vm, kept, found, number);
                Ok(())
            }
            MapStep::Forget => forget(live, disk, &maps).await,
        };
        if let Err(error) = done {
            tracing::warn!(%vm, error = text(&error), "a write map cannot be kept");
            self.look_at = Some(now + FLUSH_AGAIN);
        }
    }

    /// Whether no flush is under way.
    fn flushed(&mut self, vm: &VmName, now: Instant) -> bool {
        let Some((number, answer)) = &mut self.flush else {
            return true;
        };
        let flushed = match answer.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => return false,
            Err(oneshot::error::TryRecvError::Closed) => Err("no answer".to_owned()),
            Ok(flushed) => flushed,
        };
        match flushed {
            Ok(()) => {
                self.memory.flushed = Some(*number);
                self.turned_at = Some(now);
            }
            Err(error) => {
                tracing::debug!(%vm, error, "a copy is not flushed");
                self.look_at = Some(now + FLUSH_AGAIN);
            }
        }
        self.flush = None;
        true
    }

    fn ask(
        &mut self,
        shared: &Arc<Shared>,
        vm: &VmName,
        kept: &Kept,
        found: &MirrorStatus,
        number: u32,
    ) {
        let (pool, image) = (kept.disk.pool.clone(), kept.disk.image.clone());
        let request = FlushRequest::new(pool, image, vm, kept.epoch, &found.tag);
        let (reply, answer) = oneshot::channel();
        let (asker, to) = (shared.clone(), kept.host.clone());
        shared.spawn(async move {
            // Nobody waits for it any more when the guest has ended.
            let _ = reply.send(asker.drivers.peers.ask_flush(to, request).await);
        });
        self.flush = Some((number, answer));
    }
}

async fn forget(live: &Live, disk: usize, maps: &[WriteMap]) -> Result<(), HypervisorError> {
    let older = maps.split_last().map_or(&[][..], |(_, older)| older);
    for map in older {
        live.guest
            .forget_write_map(disk, &map.tag, map.number)
            .await?;
    }
    Ok(())
}
