//! A guest that moves between two fake hosts, with the real phases and the scripted faults.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::guest::FakeGuest;
use super::{FailAt, Fault};
use crate::error::HypervisorError;
use crate::guest::{ExitInfo, GuestEvent, GuestState};
use crate::migration::{
    IncomingOutcome, ListenRequest, MigrationPhase, MigrationRequest, MigrationStatus, Order,
    OutgoingMigration, PhaseSender, Progress,
};
use crate::vm::Vm;

pub(super) fn open_port(guest: &FakeGuest, request: &ListenRequest) -> SocketAddr {
    let mut world = guest.site().world();
    world.last_port = world.last_port.checked_add(1).unwrap_or(1);
    let port = if request.port == 0 {
        40_000 + world.last_port % 20_000
    } else {
        request.port
    };
    let address = SocketAddr::new(request.address, port);
    world.listening.insert(address, guest.clone());
    address
}

pub(super) fn send(
    guest: &FakeGuest,
    request: MigrationRequest,
) -> Result<OutgoingMigration, HypervisorError> {
    guest.alive()?;
    if guest.state() != GuestState::Running {
        return Err(guest.migration_error("only a running guest can be sent"));
    }
    guest.cancel_order().send_replace(false);
    let target = guest.site().world().listening.get(&request.to).cloned();
    guest.set_peer(target);
    guest.set_migration(MigrationStatus::Setup);
    Ok(spawn(guest, request, false))
}

/// As after a restart of the daemon; the earlier task steps aside.
pub(super) fn attach(guest: &FakeGuest) -> OutgoingMigration {
    spawn(guest, MigrationRequest::new(([0, 0, 0, 0], 0).into()), true)
}

fn spawn(guest: &FakeGuest, request: MigrationRequest, attached: bool) -> OutgoingMigration {
    let (outgoing, phases, orders) = OutgoingMigration::pair(&guest.config().name);
    let fails = guest
        .site()
        .take(&guest.config().name, |fault| match fault {
            Fault::MigrationFails(at) => Some(*at),
            _ => None,
        });
    let stalls = guest.strikes(&Fault::MigrationStalls);
    let turn = guest.next_driver();
    let target = guest.peer();
    let sending = Sending {
        guest: guest.clone(),
        target,
        request,
        phases,
        orders,
        fails,
        stalls,
        attached,
        turn,
    };
    tokio::spawn(sending.run());
    outgoing
}

struct Sending {
    guest: FakeGuest,
    target: Option<FakeGuest>,
    request: MigrationRequest,
    phases: PhaseSender,
    orders: mpsc::Receiver<Order>,
    fails: Option<FailAt>,
    stalls: bool,
    attached: bool,
    turn: u64,
}

/// Why the wait in a phase ended.
enum Woken {
    TimeIsUp,
    Continue,
    Cancelled,
    Forsaken,
    GaveUp,
    TargetGone,
    SourceGone(ExitInfo),
}

impl Sending {
    async fn run(mut self) {
        let guest = self.guest.clone();
        let last = tokio::select! {
            biased;
            () = guest.replaced(self.turn) => return,
            last = self.drive() => last,
        };
        match &last {
            MigrationPhase::Completed { .. } => {
                self.guest.set_migration(MigrationStatus::Completed);
            }
            MigrationPhase::Cancelled { .. } => {
                self.guest.set_migration(MigrationStatus::Cancelled);
            }
            _ => self.guest.set_migration(MigrationStatus::Failed),
        }
        self.phases.send(last);
    }

    async fn drive(&mut self) -> MigrationPhase {
        if self.attached {
            if self.guest.migration_status() == MigrationStatus::Device {
                return self.hand_over().await;
            }
            // Whatever was still being copied has been copied by now.
            if self.guest.state() == GuestState::Running {
                self.guest.set_state(GuestState::FinishMigrate);
                self.guest.emit(GuestEvent::Stop { at_us: 0 });
            }
            return self.at_the_pause().await;
        }
        self.phases.send(MigrationPhase::Setup);
        if self.target.as_ref().is_none_or(|t| t.exit().is_some()) || self.strikes(FailAt::Setup) {
            return self.fail("Connection refused", false);
        }
        self.guest.set_migration(MigrationStatus::Active);
        let total_bytes = self.guest.config().memory_mib << 20;
        self.phases.send(MigrationPhase::Active(Progress {
            remaining_bytes: total_bytes,
            total_bytes,
            iteration: 1,
            downtime_limit_ms: self.request.downtime.start_ms,
            ..Progress::default()
        }));
        let copy_takes = self.guest.site().world().copy_takes;
        let copied = (!self.stalls).then(|| Instant::now() + copy_takes);
        match self.wait(copied, self.request.give_up_after).await {
            Woken::TimeIsUp => {}
            other => return self.broken_off(other, "it did not converge in time"),
        }
        if self.strikes(FailAt::Active) {
            return self.fail("Connection reset by peer", false);
        }
        self.guest.set_state(GuestState::FinishMigrate);
        self.guest.emit(GuestEvent::Stop { at_us: 0 });
        self.at_the_pause().await
    }

    async fn at_the_pause(&mut self) -> MigrationPhase {
        self.guest.set_migration(MigrationStatus::PreSwitchover);
        self.phases.send(MigrationPhase::PreSwitchover);
        if self.strikes(FailAt::PreSwitchover) {
            return self.fail("Connection reset by peer", false);
        }
        match self.wait(None, self.request.switchover_wait).await {
            Woken::Continue => {}
            Woken::Forsaken => {
                self.end_target();
                return self.fail_frozen().await;
            }
            other => return self.broken_off(other, "nobody ordered the switchover in time"),
        }
        self.guest.set_migration(MigrationStatus::Device);
        self.phases.send(MigrationPhase::Device);
        sleep(Duration::from_millis(1)).await;
        self.hand_over().await
    }

    async fn hand_over(&mut self) -> MigrationPhase {
        let target = self.target.clone().filter(|target| target.exit().is_none());
        let Some(target) = target.filter(|_| !self.strikes(FailAt::Device)) else {
            return self.fail_frozen().await;
        };
        self.guest.site().unlock_disks(self.guest.identity().pid);
        let locked = self
            .guest
            .site()
            .lock_disks(target.config(), target.identity().pid);
        let state = if locked.is_ok() {
            GuestState::Running
        } else {
            GuestState::Paused
        };
        target.set_state(state.clone());
        target.set_migration(MigrationStatus::Completed);
        target.emit(GuestEvent::Resume);
        target.arrived(IncomingOutcome::Arrived(state));
        if self.strikes(FailAt::AfterArrival) {
            return self.fail_frozen().await;
        }
        self.guest.set_state(GuestState::PostMigrate);
        MigrationPhase::Completed {
            downtime_ms: 1,
            total_ms: 12,
        }
    }

    fn strikes(&self, at: FailAt) -> bool {
        self.fails == Some(at)
    }

    /// Waits in a phase: for its end, for an order, for the end of either guest.
    async fn wait(&mut self, until: Option<Instant>, at_most: Duration) -> Woken {
        let give_up = Instant::now() + at_most;
        let mut cancel = self.guest.cancel_order().subscribe();
        let (guest, target) = (self.guest.clone(), self.target.clone());
        let at_pause = guest.state() == GuestState::FinishMigrate;
        loop {
            tokio::select! {
                biased;
                exit = guest.exited() => return Woken::SourceGone(exit),
                () = ended(target.as_ref()) => return Woken::TargetGone,
                _ = cancel.wait_for(|cancel| *cancel) => return Woken::Cancelled,
                Some(order) = self.orders.recv() => match order {
                    Order::Cancel(reply) => {
                        let _ = reply.send(Ok(()));
                        return Woken::Cancelled;
                    }
                    Order::Wait(reply) if at_pause => drop(reply.send(Ok(()))),
                    Order::Forsake(reply) => {
                        let _ = reply.send(Ok(()));
                        return Woken::Forsaken;
                    }
                    Order::Continue(reply) if at_pause => {
                        let _ = reply.send(Ok(()));
                        return Woken::Continue;
                    }
                    Order::Continue(reply) | Order::Wait(reply) => {
                        let refuse = guest.migration_error("it does not wait for the switchover");
                        let _ = reply.send(Err(refuse));
                    }
                },
                () = self.phases.abandoned() => return Woken::Cancelled,
                () = sleep_until(until.unwrap_or(give_up)), if until.is_some() => return Woken::TimeIsUp,
                () = sleep_until(give_up) => return Woken::GaveUp,
            }
        }
    }

    fn broken_off(&self, woken: Woken, give_up: &str) -> MigrationPhase {
        match woken {
            Woken::GaveUp => self.fail(give_up, false),
            Woken::TargetGone => self.fail("Connection reset by peer", false),
            Woken::SourceGone(exit) => MigrationPhase::Failed {
                reason: format!("the source's QEMU has ended ({exit})"),
                switchover_begun: false,
                source: None,
            },
            Woken::Cancelled | Woken::Forsaken | Woken::Continue | Woken::TimeIsUp => {
                self.end_target();
                self.resume();
                MigrationPhase::Cancelled {
                    source: Some(self.guest.state()),
                }
            }
        }
    }

    fn fail(&self, reason: &str, switchover_begun: bool) -> MigrationPhase {
        self.end_target();
        self.resume();
        let source = self.guest.exit().is_none().then(|| self.guest.state());
        MigrationPhase::Failed {
            reason: reason.to_owned(),
            switchover_begun,
            source,
        }
    }

    /// A failure after the order: the source is frozen, as the driver does with QEMU.
    async fn fail_frozen(&self) -> MigrationPhase {
        if self.strikes(FailAt::Device) {
            self.end_target();
        }
        self.guest.set_state(GuestState::Paused);
        self.guest.site().unlock_disks(self.guest.identity().pid);
        let reason = "Unable to read from socket: Connection reset by peer".to_owned();
        let source = self.guest.exit().is_none().then(|| self.guest.state());
        MigrationPhase::Failed {
            reason,
            switchover_begun: true,
            source,
        }
    }

    /// A frozen guest stays paused; otherwise it goes on.
    fn resume(&self) {
        if self.guest.state() == GuestState::FinishMigrate {
            self.guest.set_state(GuestState::Running);
            self.guest.emit(GuestEvent::Resume);
        }
    }

    /// A target whose stream breaks ends by itself.
    fn end_target(&self) {
        if let Some(target) = &self.target
            && target.state() == GuestState::InMigrate
        {
            target.end(ExitInfo {
                code: Some(1),
                signal: None,
                shutdown: None,
            });
        }
    }
}

async fn ended(guest: Option<&FakeGuest>) {
    match guest {
        Some(guest) => {
            guest.exited().await;
        }
        None => std::future::pending().await,
    }
}
