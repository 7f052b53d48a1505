//! A running guest.
//!
//! Owns: the handle ([`Guest`], cheap to clone), the one task that keeps its control connection and
//! watches its process (`supervisor`), and the operations on it.
//!
//! # Freezing: what QEMU 10.0.2 does (measured, raw and qcow2, virtio-blk attached)
//! - After `stop` the image locks are still held. `blockdev-set-active {active: false}` without a node
//!   name deactivates every node in the right order and releases the write locks (raw: all of them;
//!   qcow2: a shared read lock on the file stays); read-only and backing nodes take part. A second QEMU
//!   then starts on the same images. Doing it twice is no error.
//! - With a node name, the *format* node is the one to give: its file node follows. The file node alone
//!   is refused ("Node has active parent node").
//! - `blockdev-set-active {active: true}` fails with `Failed to get "write" lock` while another process
//!   has an image open for writing, and works once it has gone. `cont` does the same implicitly: it
//!   activates all nodes first, and leaves the guest paused when one cannot be locked. So even a
//!   resume by mistake cannot write next to another owner that uses locks.
//! - A thaw does *not* notice that somebody wrote and left in between: the guest would go on with stale
//!   caches. Whether a thaw is allowed is decided by the epoch, not by the lock.
//! - `stop` during an outgoing migration is not enough: when the migration is cancelled in
//!   pre-switchover (or fails), QEMU itself resumes the guest. So a freeze cancels first, and stops
//!   again after.

mod disks;
mod freeze;
mod hold;
mod mirror;
mod ops;
mod save;
mod supervisor;
mod write_map;

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use super::process::Watched;
use super::qmp::{QmpClient, QmpError};
use crate::config::GuestConfig;
use crate::error::HypervisorError;
use crate::guest::{ExitInfo, GuestEvent, GuestState, ProcessIdentity};

/// Events kept for a slow reader.
const EVENTS_MAX: usize = 512;
/// Deadline of a command that QEMU answers at once unless it hangs.
pub(super) const QUICK: Duration = Duration::from_secs(2);

/// A running QEMU. Dropping all clones leaves it running and closes the connection.
#[derive(Debug, Clone)]
pub struct Guest {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: GuestConfig,
    process: Arc<Watched>,
    events: broadcast::Sender<GuestEvent>,
    client: watch::Receiver<Option<QmpClient>>,
    exit: watch::Receiver<Option<ExitInfo>>,
    supervisor: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

impl Guest {
    /// Takes charge of a process. `client` is its connection, if there is one already; otherwise the
    /// supervisor tries for as long as the process lives.
    pub(super) fn new(config: GuestConfig, process: Watched, client: Option<QmpClient>) -> Self {
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let (client_tx, client_rx) = watch::channel(client.clone());
        let (exit_tx, exit) = watch::channel(None);
        let process = Arc::new(process);
        let supervisor = supervisor::Supervisor {
            config: config.clone(),
            process: process.clone(),
            events: events.clone(),
            client: client_tx,
            exit: exit_tx,
            shutdown: None,
        };
        let supervisor = tokio::spawn(supervisor.run(client)).abort_handle();
        let shared = Shared {
            config,
            process,
            events,
            client: client_rx,
            exit,
            supervisor,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// What it was started with.
    #[must_use]
    pub fn config(&self) -> &GuestConfig {
        &self.shared.config
    }

    /// Its process.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        self.shared.process.identity()
    }

    /// A pidfd of its process, for another watcher.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn pidfd(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.shared.process.pidfd()
    }

    /// Events from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<GuestEvent> {
        self.shared.events.subscribe()
    }

    /// Resolves when the process has ended.
    pub async fn exited(&self) -> ExitInfo {
        let mut exit = self.shared.exit.clone();
        let ended = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| exit.clone());
        // The supervisor ends only after it has published the exit, or with the last handle.
        ended.unwrap_or(ExitInfo {
            code: None,
            signal: None,
            shutdown: None,
        })
    }

    /// How the process ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<ExitInfo> {
        self.shared.exit.borrow().clone()
    }

    /// The connection, waited for until `deadline` when it is being made again.
    pub(super) async fn client(&self, deadline: Instant) -> Result<QmpClient, HypervisorError> {
        let mut client = self.shared.client.clone();
        let mut exit = self.shared.exit.clone();
        let found = timeout_at(deadline, async {
            tokio::select! {
                Ok(client) = client.wait_for(|c| c.as_ref().is_some_and(|c| !c.is_closed())) => {
                    Ok(client.clone())
                }
                Ok(exit) = exit.wait_for(Option::is_some) => {
                    Err(exit.as_ref().map(ToString::to_string).unwrap_or_default())
                }
                else => Err("its supervisor has ended".to_owned()),
            }
        });
        let vm = self.config().name.clone();
        match found.await {
            Ok(Ok(Some(client))) => Ok(client),
            Ok(Ok(None)) | Err(_) => Err(HypervisorError::Qmp {
                vm,
                action: "reach QEMU",
                source: QmpError::Closed {
                    command: "connect".into(),
                },
            }),
            Ok(Err(exit)) => Err(HypervisorError::Gone { vm, exit }),
        }
    }

    /// Runs one command, by the deadline. `action` completes "cannot ..." in the error.
    pub(super) async fn command(
        &self,
        action: &'static str,
        command: &str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<Value, HypervisorError> {
        let client = self.client(deadline).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        client
            .execute(command, arguments, left)
            .await
            .map_err(|source| self.qmp_error(action, source))
    }

    pub(super) fn qmp_error(&self, action: &'static str, source: QmpError) -> HypervisorError {
        HypervisorError::Qmp {
            vm: self.config().name.clone(),
            action,
            source,
        }
    }

    /// The present state, by the deadline.
    pub(super) async fn state_by(&self, deadline: Instant) -> Result<GuestState, HypervisorError> {
        let reply = self
            .command("ask for its state", "query-status", Value::Null, deadline)
            .await?;
        Ok(GuestState::parse(
            reply["status"].as_str().unwrap_or("missing"),
        ))
    }
}
