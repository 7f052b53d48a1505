//! Status, ends, announcements.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::{Guest, QUICK};
use crate::error::HypervisorError;
use crate::guest::{ExitInfo, GuestState};
use crate::migration::MigrationStatus;
use crate::qemu::agent_channel;

impl Guest {
    /// The present state.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn status(&self) -> Result<GuestState, HypervisorError> {
        self.state_by(Instant::now() + QUICK).await
    }

    /// The last migration that QEMU knows of, outgoing or incoming, and why it failed.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn migration_status(&self) -> Result<MigrationStatus, HypervisorError> {
        let deadline = Instant::now() + QUICK;
        let reply = self.command(
            "ask for its migration",
            "query-migrate",
            Value::Null,
            deadline,
        );
        Ok(MigrationStatus::parse(
            reply.await?["status"].as_str().unwrap_or("none"),
        ))
    }

    /// Asks the guest to shut down: by the ACPI power button, or, where the machine has none (microvm),
    /// by the guest agent.
    ///
    /// # Errors
    /// [`HypervisorError::NoPowerdown`] when neither way exists or answers.
    pub async fn powerdown(&self) -> Result<(), HypervisorError> {
        let deadline = Instant::now() + QUICK;
        if !self.config().is_microvm() {
            let pressed = self.command(
                "press the power button",
                "system_powerdown",
                Value::Null,
                deadline,
            );
            return pressed.await.map(|_| ());
        }
        let refuse = |detail: String| HypervisorError::NoPowerdown {
            vm: self.config().name.clone(),
            detail,
        };
        if !self.config().guest_agent {
            return Err(refuse(
                "a microvm has no power button, and no guest agent is configured".into(),
            ));
        }
        // The agent gives no answer when it succeeds: the guest goes down.
        agent_channel::shutdown(&self.config().paths().agent(), QUICK)
            .await
            .map_err(|error| refuse(format!("the guest agent does not answer: {error}")))
    }

    /// Ends QEMU in good order.
    ///
    /// # Errors
    /// When QEMU does not take the order; then `kill`.
    pub async fn quit(&self) -> Result<(), HypervisorError> {
        if self.exit().is_some() {
            return Ok(());
        }
        let quit = self
            .command("quit", "quit", Value::Null, Instant::now() + QUICK)
            .await;
        match quit {
            // It may end before its answer is read.
            Err(_) if self.exit().is_some() => Ok(()),
            Err(HypervisorError::Gone { .. }) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Sends SIGKILL and waits for the end.
    ///
    /// # Errors
    /// [`HypervisorError::KillUnconfirmed`] when the process has not ended by then.
    pub async fn kill(&self, within: Duration) -> Result<ExitInfo, HypervisorError> {
        let pid = self.identity().pid;
        self.shared
            .process
            .kill()
            .map_err(|source| HypervisorError::Io {
                vm: self.config().name.clone(),
                action: "kill",
                path: format!("/proc/{pid}").into(),
                source,
            })?;
        timeout(within, self.exited())
            .await
            .map_err(|_| HypervisorError::KillUnconfirmed {
                vm: self.config().name.clone(),
                pid,
                after_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
            })
    }

    /// Makes every network card announce itself: five times within about half a second, first at once.
    ///
    /// # Errors
    /// When QEMU does not take the order.
    pub async fn announce(&self) -> Result<(), HypervisorError> {
        let arguments = json!({ "initial": 20, "max": 200, "rounds": 5, "step": 50 });
        let deadline = Instant::now() + QUICK;
        self.command("announce it", "announce-self", arguments, deadline)
            .await
            .map(|_| ())
    }

    /// Whether the guest agent answers.
    ///
    /// # Errors
    /// [`HypervisorError::Agent`].
    pub async fn ping_agent(&self, within: Duration) -> Result<(), HypervisorError> {
        let fail = |detail: String| HypervisorError::Agent {
            vm: self.config().name.clone(),
            detail,
        };
        if !self.config().guest_agent {
            return Err(fail(
                "it is not configured; set `guest_agent` and restart the VM".into(),
            ));
        }
        let path = self.config().paths().agent();
        agent_channel::ping(&path, within)
            .await
            .map_err(|error| fail(error.to_string()))
    }
}
