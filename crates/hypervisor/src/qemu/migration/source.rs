//! The source: one task drives an outgoing migration from setup to its end.
//!
//! Always holds:
//! - phases only advance ([`rank`]);
//! - an order to continue is remembered *before* it is sent, so that a lost answer counts as a
//!   switchover that has begun;
//! - the end is announced only when QEMU confirms that the migration is over;
//! - before a switchover is ordered the source's disks are held: whatever QEMU does afterwards, the source
//!   writes nothing;
//! - after a failure of a switchover that was ordered the source is frozen at once, since the target
//!   may run the guest; QEMU itself would let it go on.
//!
//! Must not: resume the guest. QEMU does that by itself when a migration fails earlier; whether the guest
//! *may* run then is known to the caller only (it may have frozen it, since its lease ran out).

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior};

use super::downtime::{Step, Stepper};
use super::{inflight, setup};
use crate::error::HypervisorError;
use crate::guest::{GuestEvent, GuestState};
use crate::migration::{
    MigrationPhase, MigrationRequest, MigrationStatus, Order, OutgoingMigration, PhaseSender,
    Progress,
};
use crate::qemu::guest::{Guest, QUICK};

/// How often the progress is asked for.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

impl Guest {
    /// Starts to send the guest to another host.
    ///
    /// # Errors
    /// When it does not run, its disks do not answer, or QEMU refuses the request. A connection that fails is a phase instead.
    pub async fn migrate(
        &self,
        request: MigrationRequest,
    ) -> Result<OutgoingMigration, HypervisorError> {
        let deadline = Instant::now() + QUICK;
        let vm = self.config().name.clone();
        match self.state_by(deadline).await? {
            GuestState::Running => {}
            state => {
                let detail = format!("its state is {state}; only a running guest can be sent");
                return Err(HypervisorError::Migration { vm, detail });
            }
        }
        inflight::disks_answer(self).await?;
        let deadline = Instant::now() + QUICK;
        self.prepare_hold(deadline).await?;
        let stepper = Stepper::new(request.downtime);
        setup::prepare_source(self, &request, stepper.limit_ms(), deadline).await?;
        let events = self.events();
        let uri = json!({ "uri": format!("tcp:{}", request.to) });
        self.command("send it", "migrate", uri, deadline).await?;
        let (outgoing, phases, orders) = OutgoingMigration::pair(&vm);
        let source = Source::new(self.clone(), request, stepper, phases);
        tokio::spawn(source.run(events, orders));
        Ok(outgoing)
    }

    /// Takes up an outgoing migration that an earlier process started. Its limits are the default ones.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn attach_migration(&self) -> Result<Option<OutgoingMigration>, HypervisorError> {
        let events = self.events();
        let deadline = Instant::now() + QUICK;
        if self.state_by(deadline).await? == GuestState::InMigrate {
            return Ok(None);
        }
        let status = self.migration_status().await?;
        if status.is_over() {
            return Ok(None);
        }
        let (outgoing, phases, orders) = OutgoingMigration::pair(&self.config().name);
        let request = MigrationRequest::new(([0, 0, 0, 0], 0).into());
        let mut source = Source::new(
            self.clone(),
            request,
            Stepper::new(Default::default()),
            phases,
        );
        // Whoever ordered the switchover cannot be asked any more.
        source.switchover_begun = rank(&status) >= rank(&MigrationStatus::Device);
        source.held = rank(&status) >= rank(&MigrationStatus::PreSwitchover);
        tokio::spawn(source.run(events, orders));
        Ok(Some(outgoing))
    }
}

/// The order of the phases; a status that is not known changes nothing.
fn rank(status: &MigrationStatus) -> u8 {
    match status {
        MigrationStatus::Setup => 1,
        MigrationStatus::Active => 2,
        MigrationStatus::PreSwitchover => 3,
        MigrationStatus::Device => 4,
        MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled => 5,
        MigrationStatus::None | MigrationStatus::Cancelling | MigrationStatus::Other(_) => 0,
    }
}

struct Source {
    guest: Guest,
    request: MigrationRequest,
    stepper: Stepper,
    phases: PhaseSender,
    rank: u8,
    switchover_begun: bool,
    /// The disks may be held. To give back what is not held would change QEMU's block graph, for which it waits
    /// without end while a write waits for a mirror.
    held: bool,
    /// Cancelled by us, and why it is then called a failure.
    cancelled: Option<Option<String>>,
    /// Bounds the copy, then the wait at the switchover.
    give_up_at: Instant,
}

impl Source {
    fn new(guest: Guest, request: MigrationRequest, stepper: Stepper, phases: PhaseSender) -> Self {
        let give_up_at = Instant::now() + request.give_up_after;
        Self {
            guest,
            request,
            stepper,
            phases,
            rank: 0,
            switchover_begun: false,
            held: false,
            cancelled: None,
            give_up_at,
        }
    }

    async fn run(
        mut self,
        mut events: broadcast::Receiver<GuestEvent>,
        mut orders: mpsc::Receiver<Order>,
    ) {
        let mut look = tokio::time::interval(PROGRESS_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let guest = self.guest.clone();
        let mut abandoned = false;
        let last = loop {
            let may_give_up = !self.switchover_begun && self.cancelled.is_none();
            let phase = tokio::select! {
                biased;
                exit = guest.exited() => Some(MigrationPhase::Failed {
                    reason: format!("the source's QEMU has ended ({exit})"),
                    switchover_begun: self.switchover_begun,
                    source: None,
                }),
                event = events.recv() => match event {
                    Ok(GuestEvent::Migration(status)) => self.observe(status).await,
                    Ok(GuestEvent::MigrationPass(pass)) => {
                        self.step(pass).await;
                        None
                    }
                    Ok(_) => None,
                    Err(_) => self.look().await, // some were missed
                },
                Some(order) = orders.recv() => {
                    self.obey(order).await;
                    None
                }
                () = self.phases.abandoned(), if !abandoned => {
                    abandoned = true;
                    self.give_up("its handle was dropped".into()).await;
                    None
                }
                () = tokio::time::sleep_until(self.give_up_at), if may_give_up => {
                    let reason = if self.rank >= rank(&MigrationStatus::PreSwitchover) {
                        format!("nobody ordered the switchover within {:?}", self.request.switchover_wait)
                    } else {
                        format!("it did not converge within {:?}", self.request.give_up_after)
                    };
                    self.give_up(reason).await;
                    None
                }
                _ = look.tick() => self.look().await,
            };
            if let Some(phase) = phase {
                break phase;
            }
        };
        tracing::debug!(
            vm = self.guest.config().name,
            ?last,
            "outgoing migration is over"
        );
        self.phases.send(last);
    }

    /// Takes note of a status; returns the last phase when it is over.
    async fn observe(&mut self, status: MigrationStatus) -> Option<MigrationPhase> {
        if status == MigrationStatus::Failed && self.switchover_begun {
            self.hold().await; // before anything else is asked
        }
        if rank(&status) <= self.rank {
            return None;
        }
        if status.is_over() {
            return self.conclude().await;
        }
        self.rank = rank(&status);
        match status {
            MigrationStatus::Setup => self.phases.send(MigrationPhase::Setup),
            MigrationStatus::PreSwitchover => {
                self.give_up_at = Instant::now() + self.request.switchover_wait;
                self.phases.send(MigrationPhase::PreSwitchover);
            }
            MigrationStatus::Device => {
                self.switchover_begun = true; // whoever ordered it
                self.phases.send(MigrationPhase::Device);
            }
            _ => {} // Active: reported with the next progress
        }
        None
    }

    /// Asks for the progress, and whether an event was missed.
    async fn look(&mut self) -> Option<MigrationPhase> {
        // An answer that does not come is no news; the end of the process is.
        let reply = self.query().await.ok()?;
        let status = MigrationStatus::parse(reply["status"].as_str().unwrap_or("none"));
        if status == MigrationStatus::Active {
            let progress = self.progress(&reply);
            self.step(progress.iteration).await;
            if self.rank <= rank(&MigrationStatus::Active) {
                self.phases.send(MigrationPhase::Active(progress));
            }
        }
        self.observe(status).await
    }

    async fn query(&self) -> Result<Value, HypervisorError> {
        let action = "ask for its migration";
        self.guest
            .command(action, "query-migrate", Value::Null, Instant::now() + QUICK)
            .await
    }

    fn progress(&self, reply: &Value) -> Progress {
        let ram = |field: &str| reply["ram"][field].as_u64().unwrap_or_default();
        Progress {
            transferred_bytes: ram("transferred"),
            remaining_bytes: ram("remaining"),
            total_bytes: ram("total"),
            dirty_bytes_per_s: ram("dirty-pages-rate").saturating_mul(ram("page-size")),
            iteration: ram("dirty-sync-count"),
            downtime_limit_ms: self.stepper.limit_ms(),
            throttle_percent: reply["cpu-throttle-percentage"]
                .as_u64()
                .unwrap_or_default(),
        }
    }

    async fn step(&mut self, pass: u64) {
        let deadline = Instant::now() + QUICK;
        let done = match self.stepper.pass_began(pass) {
            Some(Step::Limit(limit_ms)) => setup::set_limit(&self.guest, limit_ms, deadline).await,
            Some(Step::Throttle) if self.request.auto_converge => {
                setup::throttle(&self.guest, deadline).await
            }
            _ => Ok(()),
        };
        if let Err(error) = done {
            tracing::warn!(%error, "a migration may converge later than it could");
        }
    }

    async fn obey(&mut self, order: Order) {
        // A caller that has gone does not need the answer.
        let _ = match order {
            Order::Continue(reply) => reply.send(self.continue_switchover().await),
            Order::Cancel(reply) => reply.send(self.cancel(None).await),
            Order::Wait(reply) => reply.send(self.wait_on().await),
            Order::Forsake(reply) => reply.send(self.forsake().await),
        };
    }

    async fn continue_switchover(&mut self) -> Result<(), HypervisorError> {
        if self.switchover_begun {
            return Ok(());
        }
        if self.rank != rank(&MigrationStatus::PreSwitchover) || self.cancelled.is_some() {
            return Err(self.refuse("it does not wait for the switchover"));
        }
        self.held = true;
        let deadline = Instant::now() + QUICK;
        if let Err(error) = self.guest.hold_disks(deadline).await {
            self.give_up(error.to_string()).await;
            return Err(error);
        }
        self.switchover_begun = true;
        let arguments = json!({ "state": "pre-switchover" });
        let sent = self
            .guest
            .command("switch it over", "migrate-continue", arguments, deadline)
            .await;
        if let Err(HypervisorError::Qmp { source, .. }) = &sent
            && source.refusal().is_some()
        {
            self.switchover_begun = false; // QEMU answered that it did not
        }
        sent.map(|_| ())
    }

    async fn wait_on(&mut self) -> Result<(), HypervisorError> {
        let waits = self.rank == rank(&MigrationStatus::PreSwitchover);
        if !waits || self.switchover_begun || self.cancelled.is_some() {
            return Err(self.refuse("it does not wait for the switchover"));
        }
        self.give_up_at = Instant::now() + self.request.switchover_wait;
        self.held = true;
        // Before anything is handed over, if QEMU can do it now; again before the switchover.
        if let Err(error) = self.guest.hold_disks(Instant::now() + QUICK).await {
            tracing::debug!(%error, "its disks are not held yet");
        }
        Ok(())
    }

    /// The guest must not go on here, whatever QEMU makes of it.
    async fn forsake(&mut self) -> Result<(), HypervisorError> {
        self.switchover_begun = true;
        let deadline = Instant::now() + QUICK;
        let action = "end its migration";
        self.guest
            .command(action, "migrate_cancel", Value::Null, deadline)
            .await
            .map(|_| ())
    }

    async fn cancel(&mut self, reason: Option<String>) -> Result<(), HypervisorError> {
        if self.switchover_begun {
            return Err(self.refuse("the switchover has begun; ask the target for the outcome"));
        }
        let deadline = Instant::now() + QUICK;
        self.give_back().await;
        let cancel = self.guest.command(
            "cancel its migration",
            "migrate_cancel",
            Value::Null,
            deadline,
        );
        cancel.await?;
        self.cancelled.get_or_insert(reason);
        Ok(())
    }

    /// Before QEMU lets the guest go on. What does not succeed pauses the guest at its next request; its
    /// thaw tries again.
    async fn give_back(&self) {
        if !self.held {
            return;
        }
        if let Err(error) = self.guest.give_disks_back(Instant::now() + QUICK).await {
            tracing::warn!(%error, "a guest that goes on has no disks yet");
        }
    }

    async fn give_up(&mut self, reason: String) {
        // Tried again at the next opportunity, until QEMU takes it.
        self.give_up_at = Instant::now() + PROGRESS_EVERY;
        if self.switchover_begun {
            return;
        }
        if let Err(error) = self.cancel(Some(reason)).await {
            tracing::warn!(%error, "cannot cancel a migration yet");
        }
    }

    fn refuse(&self, detail: &str) -> HypervisorError {
        HypervisorError::Migration {
            vm: self.guest.config().name.clone(),
            detail: detail.to_owned(),
        }
    }

    /// Freezes a source whose target may run the guest. QEMU resumes it shortly after it announced the
    /// failure, so `stop` is repeated without a pause until it has had its effect: each round trip
    /// counts.
    async fn hold(&self) {
        let deadline = Instant::now() + QUICK;
        let held = async {
            while self.guest.stop_now(deadline).await? == GuestState::FinishMigrate {}
            self.guest.freeze(QUICK).await
        };
        if let Err(error) = held.await {
            tracing::error!(%error, "a source that may run twice is not frozen");
        }
    }

    /// It is said to be over: asks how, and what the guest does now.
    async fn conclude(&mut self) -> Option<MigrationPhase> {
        let reply = self.query().await.ok()?;
        let status = MigrationStatus::parse(reply["status"].as_str().unwrap_or("none"));
        let number = |field: &str| reply[field].as_u64().unwrap_or_default();
        let source = match status {
            MigrationStatus::Completed => {
                return Some(MigrationPhase::Completed {
                    downtime_ms: number("downtime"),
                    total_ms: number("total-time"),
                });
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled if self.switchover_begun => {
                self.hold().await;
                self.guest.status().await.ok()
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                self.give_back().await;
                self.guest.settled_state(Instant::now() + QUICK).await.ok()
            }
            _ => return None, // the event was about an earlier migration
        };
        let switchover_begun = self.switchover_begun;
        let failed = |reason| {
            Some(MigrationPhase::Failed {
                reason,
                switchover_begun,
                source: source.clone(),
            })
        };
        match (status, self.cancelled.take()) {
            (MigrationStatus::Cancelled, Some(Some(reason))) => failed(reason),
            (MigrationStatus::Cancelled, _) if !switchover_begun => {
                Some(MigrationPhase::Cancelled {
                    source: source.clone(),
                })
            }
            (MigrationStatus::Cancelled, _) => {
                failed("it was cancelled during the switchover".into())
            }
            _ => {
                let reason = reply["error-desc"]
                    .as_str()
                    .unwrap_or("QEMU gave no reason");
                failed(reason.to_owned())
            }
        }
    }
}
