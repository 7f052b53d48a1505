//! What the two ends of a live migration say, whoever implements them.
//!
//! ```text
//! source:  Setup -> Active* -> PreSwitchover -> Device -> Completed
//!            |        |            |              |
//!            +--------+------------+--> Failed    +--> Failed { switchover_begun: true }
//!            +--------+------------+--> Cancelled
//! target:  (listening) -> Running | Failed
//! ```
//!
//! Always holds: `PreSwitchover` waits (bounded) for [`MigrationControl::continue_switchover`]; every
//! stream ends with exactly one of `Completed`, `Failed`, `Cancelled`; dropping the
//! [`OutgoingMigration`] before the switchover cancels it, so that no guest stays paused unattended.
//!
//! Must not: decide who owns the guest afterwards. After `Failed { switchover_begun: true }` only the
//! target (or a proof that it is dead) can tell; see [`MigrationPhase::Failed`].

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::error::HypervisorError;
use crate::guest::GuestState;

/// Status of a migration as the hypervisor reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MigrationStatus {
    /// None was ever started.
    None,
    /// Connecting, or listening.
    Setup,
    /// Memory is being copied while the guest runs.
    Active,
    /// The guest is paused, the switchover waits for an order.
    PreSwitchover,
    /// The guest is paused, its last state is being sent.
    Device,
    /// The guest is at the target.
    Completed,
    /// It failed.
    Failed,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled.
    Cancelled,
    /// A status this build does not know.
    Other(String),
}

impl MigrationStatus {
    /// Reads QEMU's name of the status; unknown names survive.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "setup" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Failed | Self::Cancelled
        )
    }
}

/// Bounds for the pause at the switchover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Downtime {
    /// The first limit, in milliseconds. Low, since an idle guest then pauses for a few milliseconds.
    pub start_ms: u64,
    /// The limit is doubled after each pass that did not converge, up to this.
    pub max_ms: u64,
}

impl Default for Downtime {
    fn default() -> Self {
        Self {
            start_ms: 30,
            max_ms: 500,
        }
    }
}

/// Certificates for an encrypted migration: a directory with `ca-cert.pem`, and `client-cert.pem`,
/// `client-key.pem` (source) or `server-cert.pem`, `server-key.pem` (target). They are read when the
/// migration begins, so that renewed certificates also serve guests that have run for long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsMaterial {
    /// The directory.
    pub dir: PathBuf,
    /// Source only: the name that the target's certificate must carry, when it is not the address.
    pub hostname: Option<String>,
}

/// Sends a guest away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationRequest {
    /// Where the target listens.
    pub to: SocketAddr,
    /// Limits of the pause.
    pub downtime: Downtime,
    /// Slow the guest down when it dirties memory faster than it can be copied at the highest limit.
    pub auto_converge: bool,
    /// Cap in bytes per second.
    pub max_bandwidth: Option<u64>,
    /// Parallel connections; the target must be told the same.
    pub multifd_channels: Option<u8>,
    /// Encrypt.
    pub tls: Option<TlsMaterial>,
    /// Give up (and cancel) when the switchover is not reached by then.
    pub give_up_after: Duration,
    /// Give up (and cancel) when nobody orders the switchover by then.
    pub switchover_wait: Duration,
}

impl MigrationRequest {
    /// A request with the default limits.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        Self {
            to,
            downtime: Downtime::default(),
            auto_converge: true,
            max_bandwidth: None,
            multifd_channels: None,
            tls: None,
            give_up_after: Duration::from_secs(600),
            switchover_wait: Duration::from_secs(5),
        }
    }
}

/// Opens a target's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenRequest {
    /// Local address.
    pub address: IpAddr,
    /// Local port; 0 takes a free one.
    pub port: u16,
    /// Parallel connections, as told to the source.
    pub multifd_channels: Option<u8>,
    /// Encrypt.
    pub tls: Option<TlsMaterial>,
}

/// How far the copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of memory sent.
    pub transferred_bytes: u64,
    /// Bytes of memory still to be sent.
    pub remaining_bytes: u64,
    /// Bytes of memory of the guest.
    pub total_bytes: u64,
    /// How fast the guest dirties memory, in bytes per second.
    pub dirty_bytes_per_s: u64,
    /// Passes over the memory so far.
    pub iteration: u64,
    /// The present limit of the pause.
    pub downtime_limit_ms: u64,
    /// By how much the guest is slowed down, in percent.
    pub throttle_percent: u64,
}

/// A step of an outgoing migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationPhase {
    /// Connecting to the target.
    Setup,
    /// Copying; repeated as it advances.
    Active(Progress),
    /// The guest is paused; nothing has been handed over; waits for [`MigrationControl::continue_switchover`].
    PreSwitchover,
    /// The last state is being sent. From here on the target may run the guest.
    Device,
    /// The target has everything. The source is paused for good; `quit` it.
    Completed {
        /// How long the guest was paused, by the source's own clock.
        downtime_ms: u64,
        /// How long it all took.
        total_ms: u64,
    },
    /// It failed.
    Failed {
        /// Why.
        reason: String,
        /// The switchover had been ordered, so the target may run the guest: the source was frozen at
        /// once. Ask the target; thaw the source when it does not and never will run the guest. When
        /// false, the source simply goes on.
        switchover_begun: bool,
        /// What the source does now; `None` when it does not answer or is gone.
        source: Option<GuestState>,
    },
    /// It was cancelled before the switchover. QEMU resumes the source by itself.
    Cancelled {
        /// What the source does now: it runs, unless it was frozen meanwhile.
        source: Option<GuestState>,
    },
}

impl MigrationPhase {
    /// Whether this is the last one.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Completed { .. } | Self::Failed { .. } | Self::Cancelled { .. }
        )
    }
}

/// An order to the task that drives an outgoing migration.
#[derive(Debug)]
pub(crate) enum Order {
    Continue(oneshot::Sender<Result<(), HypervisorError>>),
    Cancel(oneshot::Sender<Result<(), HypervisorError>>),
    Wait(oneshot::Sender<Result<(), HypervisorError>>),
    Forsake(oneshot::Sender<Result<(), HypervisorError>>),
}

/// Steers an outgoing migration; cheap to clone.
#[derive(Debug, Clone)]
pub struct MigrationControl {
    vm: String,
    orders: mpsc::Sender<Order>,
}

impl MigrationControl {
    async fn send(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<(), HypervisorError>>) -> Order,
    ) -> Result<(), HypervisorError> {
        let over = || HypervisorError::Migration {
            vm: self.vm.clone(),
            detail: "it is over already; see its last phase".into(),
        };
        let (reply, answer) = oneshot::channel();
        self.orders.send(make(reply)).await.map_err(|_| over())?;
        answer.await.map_err(|_| over())?
    }

    /// Lets a migration that waits in [`MigrationPhase::PreSwitchover`] hand the guest over.
    ///
    /// # Errors
    /// When it does not wait there, or QEMU refuses.
    pub async fn continue_switchover(&self) -> Result<(), HypervisorError> {
        self.send(Order::Continue).await
    }

    /// Makes sure that it waits in [`MigrationPhase::PreSwitchover`], and goes on waiting for as long as it does by
    /// itself, counted from now.
    ///
    /// # Errors
    /// When it does not wait there.
    pub async fn waits(&self) -> Result<(), HypervisorError> {
        self.send(Order::Wait).await
    }

    /// Gives up a migration that waits in [`MigrationPhase::PreSwitchover`] after what belongs to the guest was handed
    /// over: it ends as if the switchover had begun, with the guest frozen.
    ///
    /// # Errors
    /// When QEMU does not take the order; the source then counts as handed over all the same.
    pub async fn forsake(&self) -> Result<(), HypervisorError> {
        self.send(Order::Forsake).await
    }

    /// Gives the migration up. Returns when QEMU has taken the order; the phases tell the outcome.
    ///
    /// # Errors
    /// When the switchover has begun: then only the target knows where the guest is.
    pub async fn cancel(&self) -> Result<(), HypervisorError> {
        self.send(Order::Cancel).await
    }
}

/// An outgoing migration. Dropping it before the switchover cancels the migration.
#[derive(Debug)]
pub struct OutgoingMigration {
    phases: mpsc::Receiver<MigrationPhase>,
    control: MigrationControl,
}

/// Room for the phases that must arrive (there are five), and some progress.
const PHASE_QUEUE: usize = 16;
/// Progress is dropped unless this much room stays for phases.
const PHASE_RESERVE: usize = 8;

impl OutgoingMigration {
    /// The handle and the driver's ends of its two queues.
    pub(crate) fn pair(vm: &str) -> (Self, PhaseSender, mpsc::Receiver<Order>) {
        let (phase_tx, phases) = mpsc::channel(PHASE_QUEUE);
        let (orders, order_rx) = mpsc::channel(4);
        let control = MigrationControl {
            vm: vm.to_owned(),
            orders,
        };
        (Self { phases, control }, PhaseSender(phase_tx), order_rx)
    }

    /// The next phase; `None` after the last one.
    pub async fn next(&mut self) -> Option<MigrationPhase> {
        self.phases.recv().await
    }

    /// A handle to steer it from elsewhere.
    #[must_use]
    pub fn control(&self) -> MigrationControl {
        self.control.clone()
    }

    /// See [`MigrationControl::continue_switchover`].
    ///
    /// # Errors
    /// As there.
    pub async fn continue_switchover(&self) -> Result<(), HypervisorError> {
        self.control.continue_switchover().await
    }

    /// See [`MigrationControl::cancel`].
    ///
    /// # Errors
    /// As there.
    pub async fn cancel(&self) -> Result<(), HypervisorError> {
        self.control.cancel().await
    }
}

/// The driver's end of the phase stream.
#[derive(Debug)]
pub(crate) struct PhaseSender(mpsc::Sender<MigrationPhase>);

impl PhaseSender {
    /// Progress may be dropped when nobody reads; phases never are, since there are fewer than the
    /// room kept for them.
    pub(crate) fn send(&self, phase: MigrationPhase) {
        let progress = matches!(phase, MigrationPhase::Active(_));
        if progress && self.0.capacity() <= PHASE_RESERVE {
            return;
        }
        if self.0.try_send(phase).is_err() && !self.0.is_closed() {
            tracing::error!("a migration phase was lost: its queue is full");
        }
    }

    /// Resolves when the [`OutgoingMigration`] was dropped.
    pub(crate) async fn abandoned(&self) {
        self.0.closed().await;
    }
}

/// How the arrival of a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IncomingOutcome {
    /// The guest has arrived and is in this state: running, or paused when it was sent paused.
    Arrived(GuestState),
    /// It did not arrive. QEMU has ended, or must be killed.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A target that listens.
#[derive(Debug)]
pub struct IncomingMigration {
    /// Where it listens; send the source there.
    pub address: SocketAddr,
    pub(crate) outcome: oneshot::Receiver<IncomingOutcome>,
}

impl IncomingMigration {
    /// Waits until the guest runs here or cannot any more. Bound it with the caller's own deadline.
    pub async fn wait(&mut self) -> IncomingOutcome {
        (&mut self.outcome)
            .await
            .unwrap_or_else(|_| IncomingOutcome::Failed {
                reason: "the task that watched it has ended".into(),
            })
    }
}
