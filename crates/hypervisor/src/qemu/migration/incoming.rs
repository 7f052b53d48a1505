//! The target: opens the port, waits for the guest, or loads it from a file.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{broadcast, oneshot};
use tokio::time::{Instant, timeout};

use super::setup;
use crate::error::HypervisorError;
use crate::guest::{GuestEvent, GuestState, SavedState};
use crate::migration::{IncomingMigration, IncomingOutcome, ListenRequest, MigrationStatus};
use crate::qemu::guest::{Guest, QUICK};
use crate::qemu::process::stderr_tail;

/// In case an event is lost.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Between the end of the stream and the first instruction.
const SETTLE: Duration = Duration::from_millis(2);
const SETTLE_TRIES: u32 = 100;

impl Guest {
    /// Opens the port on which the guest arrives.
    ///
    /// # Errors
    /// When it was not started to wait for a guest, or the port cannot be opened.
    pub async fn listen(
        &self,
        request: ListenRequest,
    ) -> Result<IncomingMigration, HypervisorError> {
        let deadline = Instant::now() + QUICK;
        let fail = |detail: String| HypervisorError::Migration {
            vm: self.config().name.clone(),
            detail,
        };
        match self.state_by(deadline).await? {
            GuestState::InMigrate => {}
            state => {
                return Err(fail(format!(
                    "it cannot receive a guest, its state is {state}"
                )));
            }
        }
        setup::prepare_target(self, &request, deadline).await?;
        let events = self.events();
        let address = SocketAddr::new(request.address, request.port);
        let uri = json!({ "uri": format!("tcp:{address}") });
        self.command("listen for the guest", "migrate-incoming", uri, deadline)
            .await
            .map_err(|error| {
                fail(format!(
                    "cannot listen on {address}: {}",
                    setup::cause(&error)
                ))
            })?;
        let action = "ask for its port";
        let reply = self
            .command(action, "query-migrate", Value::Null, deadline)
            .await?;
        let port = listening_port(&reply)
            .or_else(|| Some(request.port).filter(|port| *port != 0))
            .ok_or_else(|| fail("QEMU does not say on which port it listens".into()))?;
        let (sender, outcome) = oneshot::channel();
        tokio::spawn(watch(self.clone(), events, sender));
        Ok(IncomingMigration {
            address: SocketAddr::new(request.address, port),
            outcome,
        })
    }

    /// Loads a saved guest and runs it.
    pub(in crate::qemu) async fn load(
        &self,
        saved: &SavedState,
        deadline: Instant,
    ) -> Result<(), HypervisorError> {
        let fail = |detail: String| HypervisorError::Migration {
            vm: self.config().name.clone(),
            detail: format!("cannot load {}: {detail}", saved.path.display()),
        };
        let path = saved
            .path
            .to_str()
            .ok_or_else(|| fail("the path is not UTF-8".into()))?;
        setup::prepare_load(self, saved.mapped_ram, deadline).await?;
        let mut events = self.events();
        let uri = json!({ "uri": format!("file:{path}") });
        self.command("load it", "migrate-incoming", uri, deadline)
            .await?;
        match arrival(self, &mut events).await {
            IncomingOutcome::Arrived(GuestState::Running) => Ok(()),
            // It was paused when it was saved.
            IncomingOutcome::Arrived(_) => {
                self.thaw(deadline.saturating_duration_since(Instant::now()))
                    .await
            }
            IncomingOutcome::Failed { reason } => Err(fail(reason)),
        }
    }
}

fn listening_port(reply: &Value) -> Option<u16> {
    reply["socket-address"]
        .as_array()?
        .iter()
        .find_map(|socket| socket["port"].as_str()?.parse().ok())
}

async fn watch(
    guest: Guest,
    mut events: broadcast::Receiver<GuestEvent>,
    mut outcome: oneshot::Sender<IncomingOutcome>,
) {
    let mut ended = tokio::select! {
        ended = arrival(&guest, &mut events) => ended,
        () = outcome.closed() => return,
    };
    if let IncomingOutcome::Failed { reason } = &mut ended {
        // QEMU tells the reason only to its log: the process ends with the failure.
        *reason = format!(
            "{reason}; it said: {}",
            stderr_tail(&guest.config().paths().log(), 0)
        );
    }
    let _ = outcome.send(ended);
}

/// Waits until the guest has arrived or QEMU has given up.
async fn arrival(guest: &Guest, events: &mut broadcast::Receiver<GuestEvent>) -> IncomingOutcome {
    let failed = |reason: String| IncomingOutcome::Failed { reason };
    loop {
        tokio::select! {
            biased;
            exit = guest.exited() => return failed(format!("QEMU has ended ({exit})")),
            event = timeout(LOOK_AGAIN, events.recv()) => match event {
                // Anything that may mean arrival, an event that was missed, or the regular look.
                Ok(Ok(GuestEvent::Resume | GuestEvent::Reconnected | GuestEvent::Migration(_)) | Err(_))
                | Err(_) => {}
                Ok(Ok(_)) => continue,
            },
        }
        let Ok(status) = guest.migration_status().await else {
            continue;
        };
        match status {
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                return failed("the stream was broken".into());
            }
            MigrationStatus::Completed => {}
            _ => continue,
        }
        // QEMU announces the completion after it has set the state; the loop is for others that do not.
        for _ in 0..SETTLE_TRIES {
            match guest.status().await {
                Ok(GuestState::InMigrate) => tokio::time::sleep(SETTLE).await,
                Ok(state) => return IncomingOutcome::Arrived(state),
                Err(_) => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read_from_any_of_the_sockets() {
        let reply = json!({ "status": "setup", "socket-address": [
            { "type": "unix", "path": "/x" },
            { "type": "inet", "host": "127.0.0.1", "port": "40267", "ipv4": true }
        ]});
        assert_eq!(listening_port(&reply), Some(40267));
        assert_eq!(listening_port(&json!({ "status": "setup" })), None);
    }
}
