//! Freeze and thaw. See the module above for what QEMU does.
//!
//! ```text
//! running --stop--> paused --(end an outgoing migration, stop again)--> paused --set-active false--> frozen
//! frozen --set-active true, give back what a switchover held--> paused --cont--> running (confirmed)
//!             +--> DiskLockLost: somebody else has the images; this copy must be killed
//! ```

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::Guest;
use crate::error::HypervisorError;
use crate::guest::{Frozen, GuestState};
use crate::migration::MigrationStatus;
use crate::qemu::qmp::QmpError;

/// Pause between two looks at a state that is about to change.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// QEMU resumes a guest whose migration ends; that can happen once per migration.
const FREEZE_TRIES: u32 = 3;

impl Guest {
    /// Pauses the guest and gives up its disks.
    ///
    /// # Errors
    /// [`HypervisorError::FreezeFailed`] when the pause is not confirmed in time.
    pub async fn freeze(&self, within: Duration) -> Result<Frozen, HypervisorError> {
        let deadline = Instant::now() + within;
        for _ in 0..FREEZE_TRIES {
            self.pause_confirmed(deadline).await?;
            self.end_outgoing(deadline).await?;
            if self.settled_state(deadline).await?.may_execute() {
                continue; // QEMU resumed it when the migration ended
            }
            let released = self.set_disks_active(false, deadline).await;
            let released_disks = released.unwrap_or_else(|error| {
                // Paused all the same; the caller is told that the images are still held.
                tracing::warn!(vm = self.config().name, %error, "a frozen guest keeps its disks");
                false
            });
            if !self.state_by(deadline).await?.may_execute() {
                return Ok(Frozen { released_disks });
            }
        }
        Err(HypervisorError::FreezeFailed {
            vm: self.config().name.clone(),
            detail: format!("it was resumed {FREEZE_TRIES} times meanwhile"),
        })
    }

    /// Takes the disks back and runs the guest.
    ///
    /// # Errors
    /// [`HypervisorError::DiskLockLost`], [`HypervisorError::NotRunning`].
    pub async fn thaw(&self, within: Duration) -> Result<(), HypervisorError> {
        let deadline = Instant::now() + within;
        match self.state_by(deadline).await? {
            GuestState::Running => return Ok(()),
            GuestState::InMigrate => {
                // A frozen target: it runs by itself when it has arrived.
                return self
                    .command("resume it", "cont", Value::Null, deadline)
                    .await
                    .map(|_| ());
            }
            _ => {}
        }
        let vm = || self.config().name.clone();
        let lost = |error: HypervisorError| match &error {
            HypervisorError::Qmp { source, .. } if is_lock_error(source) => {
                let detail = source.refusal().unwrap_or_default().to_owned();
                HypervisorError::DiskLockLost { vm: vm(), detail }
            }
            _ => error,
        };
        self.set_disks_active(true, deadline).await.map_err(lost)?;
        self.give_disks_back(deadline).await.map_err(lost)?;
        self.command("resume it", "cont", Value::Null, deadline)
            .await
            .map_err(lost)?;
        match self.state_by(deadline).await? {
            GuestState::Running => Ok(()),
            state => Err(HypervisorError::NotRunning {
                vm: vm(),
                state: state.to_string(),
            }),
        }
    }

    /// `stop`, and the state after it.
    pub(in crate::qemu) async fn stop_now(
        &self,
        deadline: Instant,
    ) -> Result<GuestState, HypervisorError> {
        self.command("pause it", "stop", Value::Null, deadline)
            .await?;
        self.state_by(deadline).await
    }

    /// `stop`, and a second question whether it is so.
    pub(super) async fn pause_confirmed(&self, deadline: Instant) -> Result<(), HypervisorError> {
        let failed = |error: HypervisorError| match error {
            gone @ HypervisorError::Gone { .. } => gone,
            HypervisorError::Qmp { source, .. } => HypervisorError::FreezeFailed {
                vm: self.config().name.clone(),
                detail: source.to_string(),
            },
            other => other,
        };
        let state = self.stop_now(deadline).await.map_err(failed)?;
        if state.may_execute() {
            return Err(HypervisorError::FreezeFailed {
                vm: self.config().name.clone(),
                detail: format!("its state after `stop` is {state}"),
            });
        }
        Ok(())
    }

    /// Waits until no outgoing migration is under way. One that has not switched over is cancelled; one
    /// that is switching over must end by itself: a cancel could resume the guest here while the
    /// target begins to run it.
    async fn end_outgoing(&self, deadline: Instant) -> Result<(), HypervisorError> {
        if self.state_by(deadline).await? == GuestState::InMigrate {
            return Ok(()); // a target: it executes nothing, and the migration is the source's to end
        }
        let mut cancelled = false;
        loop {
            let action = "ask for its migration";
            let reply = self
                .command(action, "query-migrate", Value::Null, deadline)
                .await?;
            match MigrationStatus::parse(reply["status"].as_str().unwrap_or("none")) {
                status if status.is_over() => return Ok(()),
                MigrationStatus::Setup
                | MigrationStatus::Active
                | MigrationStatus::PreSwitchover
                    if !cancelled =>
                {
                    let action = "cancel its migration";
                    self.command(action, "migrate_cancel", Value::Null, deadline)
                        .await?;
                    cancelled = true;
                }
                _ => {}
            }
            // Bounded: the commands fail at the deadline.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The state, once an ended migration has let go of the guest: QEMU announces a failure shortly
    /// before it resumes the guest.
    pub(in crate::qemu) async fn settled_state(
        &self,
        deadline: Instant,
    ) -> Result<GuestState, HypervisorError> {
        loop {
            let state = self.state_by(deadline).await?;
            if state != GuestState::FinishMigrate {
                return Ok(state);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Gives up or takes back all block nodes; whether this QEMU can.
    pub(super) async fn set_disks_active(
        &self,
        active: bool,
        deadline: Instant,
    ) -> Result<bool, HypervisorError> {
        let arguments = json!({ "active": active });
        match self
            .command(
                "hand over its disks",
                "blockdev-set-active",
                arguments,
                deadline,
            )
            .await
        {
            Ok(_) => Ok(true),
            Err(HypervisorError::Qmp {
                source: QmpError::Refused { class, .. },
                ..
            }) if class == "CommandNotFound" => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// QEMU has no class for this; the words have been the same since 2.10. An unknown wording is reported
/// as a plain refusal, after which the guest is paused as well.
fn is_lock_error(error: &QmpError) -> bool {
    error.refusal().is_some_and(|desc| desc.contains("lock"))
}
