//! Watching a guest: its events, the arrival of its memory, its end.
//!
//! Always holds: of a guest that is awaited it is known whether its CPUs ran: QEMU says `RESUME` before they do,
//! and what it said is read before its end is told. Where events may be missing, it counts as having run.

use super::{Done, Live, Shared, text};
use crate::guard::sys::boottime_ns;
use quorate_agent_logic::{Exit, GuestEvent};
use quorate_hypervisor::{
    self as hypervisor, ExitInfo, GuestState, IncomingMigration, IncomingOutcome, MigrationStatus,
    Vm,
};
use quorate_network::{Announcement, tap_name};
use quorate_types::VmName;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::broadcast::{self, error::RecvError, error::TryRecvError};
use tokio::sync::mpsc;

/// How much of QEMU's messages an exit quotes.
const TAIL_BYTES: u64 = 1024;

/// A guest that is awaited.
pub(super) struct Arrival {
    /// Absent for one that was adopted.
    pub(super) incoming: Option<IncomingMigration>,
    /// Taps that are opened when it is here.
    pub(super) taps: Vec<String>,
}

/// What is listened to.
pub(crate) struct Watching {
    events: broadcast::Receiver<hypervisor::GuestEvent>,
    pub(super) arrival: Option<Arrival>,
    ran: bool,
}

impl Watching {
    pub(super) fn new(guest: &dyn Vm) -> Self {
        Self {
            events: guest.events(),
            arrival: None,
            ran: false,
        }
    }

    /// A guest that was found. Its state is asked for once more, now that its events are listened to.
    pub(super) async fn adopted(guest: &dyn Vm) -> Self {
        let mut watching = Self::new(guest);
        match guest.status().await {
            Ok(GuestState::InMigrate) => {
                watching.arrival = Some(Arrival {
                    incoming: None,
                    taps: Vec::new(),
                });
            }
            _ => watching.ran = true,
        }
        watching
    }

    pub(super) fn awaits(&self) -> bool {
        self.arrival.is_some()
    }
}

pub(super) async fn watch(
    shared: Arc<Shared>,
    vm: VmName,
    live: Live,
    mut watching: Watching,
    done: mpsc::Sender<Done>,
) {
    let guest = live.guest.clone();
    let exited = guest.exited();
    tokio::pin!(exited);
    let exit = loop {
        let outcome = async {
            match watching
                .arrival
                .as_mut()
                .and_then(|one| one.incoming.as_mut())
            {
                Some(incoming) => incoming.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            event = watching.events.recv() => match event {
                Ok(event) => on_event(&shared, &vm, &live, &mut watching, event).await,
                Err(RecvError::Lagged(_)) => {
                    watching.ran = true;
                    shared.tell(&vm, live.run, GuestEvent::Noticed).await;
                }
                // The driver has let go of it; its end comes.
                Err(RecvError::Closed) => break exited.await,
            },
            exit = &mut exited => break exit,
            outcome = outcome => on_outcome(&shared, &vm, &live, &mut watching, outcome).await,
        }
    };
    drain(&mut watching);
    let exit = describe(&shared, &vm, &exit, watching.ran).await;
    let _ = done
        .send(Done::Exited {
            run: live.run,
            exit,
        })
        .await;
}

/// What was said before the end.
fn drain(watching: &mut Watching) {
    loop {
        match watching.events.try_recv() {
            Ok(event) => watching.ran |= tells_of_life(&event),
            Err(TryRecvError::Lagged(_)) => watching.ran = true,
            Err(_) => return,
        }
    }
}

fn tells_of_life(event: &hypervisor::GuestEvent) -> bool {
    matches!(
        event,
        hypervisor::GuestEvent::Resume
            | hypervisor::GuestEvent::Reconnected
            | hypervisor::GuestEvent::Migration(MigrationStatus::Completed)
    )
}

async fn on_event(
    shared: &Shared,
    vm: &VmName,
    live: &Live,
    watching: &mut Watching,
    event: hypervisor::GuestEvent,
) {
    if watching.awaits() {
        watching.ran |= tells_of_life(&event);
        if event == hypervisor::GuestEvent::Resume {
            shared.services.note_running(vm, true);
            open_taps(shared, vm, live, watching).await;
        }
        return;
    }
    match event {
        hypervisor::GuestEvent::Stop { .. } => shared.services.note_running(vm, false),
        hypervisor::GuestEvent::Resume => shared.services.note_running(vm, true),
        _ => {}
    }
    let event = match event {
        hypervisor::GuestEvent::Stop { .. }
        | hypervisor::GuestEvent::Resume
        | hypervisor::GuestEvent::Reconnected => GuestEvent::Noticed,
        hypervisor::GuestEvent::BlockIoError {
            disk,
            operation,
            stopped: true,
            no_space,
            reason,
        } => GuestEvent::IoError {
            detail: if no_space {
                format!("{disk}: its pool is full: free space, and the guest goes on by itself")
            } else {
                format!("{disk}: a {operation} failed: {reason}")
            },
        },
        _ => return,
    };
    shared.tell(vm, live.run, event).await;
}

async fn on_outcome(
    shared: &Shared,
    vm: &VmName,
    live: &Live,
    watching: &mut Watching,
    outcome: IncomingOutcome,
) {
    let event = match outcome {
        IncomingOutcome::Arrived(state) => {
            watching.ran = true;
            open_taps(shared, vm, live, watching).await;
            let running = state == GuestState::Running;
            shared.services.note_running(vm, running);
            GuestEvent::Arrived { running }
        }
        IncomingOutcome::Failed { reason } => {
            if let Some(arrival) = &mut watching.arrival {
                arrival.incoming = None;
                // They may have been opened for what waits for the guest.
                for tap in &arrival.taps {
                    let _ = shared.drivers.network.mute(tap).await;
                }
            }
            let detail = reason;
            return shared
                .tell(vm, live.run, GuestEvent::ArrivalFailed { detail })
                .await;
        }
    };
    watching.arrival = None;
    shared.tell(vm, live.run, event).await;
    if let Err(error) = shared.guard.set_freezable(vm, live.run.0, true).await {
        tracing::warn!(%vm, %error, "the guard takes a guest for one that cannot be frozen");
    }
}

/// Lets frames through, once, and tells the network where the guest is.
async fn open_taps(shared: &Shared, vm: &VmName, live: &Live, watching: &mut Watching) {
    let Some(arrival) = &mut watching.arrival else {
        return;
    };
    let taps = std::mem::take(&mut arrival.taps);
    if !taps.is_empty() {
        open(shared, vm, live, &taps).await;
    }
}

/// The same for a guest that arrived while no agent watched. Its taps have the names they were made with.
pub(super) async fn open_adopted(shared: &Shared, vm: &VmName, live: &Live) {
    let nics = super::held::nics(shared, vm);
    let taps: Vec<String> = (0..nics).map(|nic| tap_name(vm.as_str(), nic)).collect();
    open(shared, vm, live, &taps).await;
}

async fn open(shared: &Shared, vm: &VmName, live: &Live, taps: &[String]) {
    for tap in taps {
        if let Err(error) = shared.drivers.network.unmute(tap).await {
            tracing::error!(%vm, tap, error = text(&error), "a tap stays mute");
        }
    }
    crate::services::edges::open(shared, vm).await;
    announce(shared, vm, live);
}

/// Tells the switches where the guest is; several rounds, in the background.
pub(super) fn announce(shared: &Shared, vm: &VmName, live: &Live) {
    for announcement in &live.announcements {
        announce_one(shared, vm, announcement);
    }
    let (guest, vm) = (live.guest.clone(), vm.clone());
    shared.spawn(async move {
        if let Err(error) = guest.announce().await {
            tracing::debug!(%vm, error = text(&error), "QEMU does not announce it");
        }
    });
}

pub(super) fn announce_one(shared: &Shared, vm: &VmName, announcement: &Announcement) {
    let (network, vm) = (shared.drivers.network.clone(), vm.clone());
    let announcement = announcement.clone();
    shared.spawn(async move {
        if let Err(error) = network.announce(&announcement).await {
            tracing::warn!(%vm, error = text(&error), "a guest is not announced");
        }
    });
}

async fn describe(shared: &Shared, vm: &VmName, exit: &ExitInfo, ran: bool) -> Exit {
    let deadline = shared.deadline_ns.load(Ordering::Relaxed);
    // The guard kills nobody before the lease ends, and nobody else has a reason to.
    let by_guard = exit.shutdown.is_none() && deadline != 0 && boottime_ns() >= deadline;
    let mut detail = format!("QEMU ended ({exit})");
    if exit.is_crash() {
        let log = shared.layout.paths(vm).log();
        let tail = tokio::task::spawn_blocking(move || tail(&log)).await;
        if let Ok(Some(tail)) = tail {
            detail = format!("{detail}; it said: {tail}");
        }
    }
    Exit {
        by_guest: exit.by_guest(),
        by_guard,
        ran,
        detail,
    }
}

fn tail(log: &Path) -> Option<String> {
    let mut file = std::fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))
        .ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    (!text.is_empty()).then_some(text)
}
