//! What the API needs of the daemon.

use crate::build::Observed;
use crate::error::{ApiError, ErrorCode};
use crate::quorum::QuorumView;
use crate::storage::{DrillView, PoolLook, StrangersSeen};
use crate::view::{ClusterView, JoinToken, PlacementView};
use async_trait::async_trait;
use axum::body::Bytes;
use futures_util::Stream;
use prometheus_client::registry::Registry;
use quorate_balancer::{TraceAnswer, TraceQuery};
use quorate_planner::Snapshot;
use quorate_state::{Command, Outcome, State};
use quorate_types::{
    HostName, ImageJob, ImageRef, ImageSnapshot, ImageTask, Millis, PoolName, Revision, VmName,
};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// Both directions of a guest's serial console.
pub trait ConsoleIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ConsoleIo for T {}

/// A connected serial console.
pub type Console = Box<dyn ConsoleIo>;

/// Output of a guest's serial console.
pub type LogStream = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

/// What part of the log is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LogOptions {
    /// Last lines to begin with.
    pub lines: u32,
    /// Go on with what comes.
    pub follow: bool,
}

fn no_images() -> ApiError {
    ApiError::new(ErrorCode::Internal, "this host does no work on images")
}

/// The daemon behind the API. Every method may be called at any time, also without a leader.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// This host.
    fn host(&self) -> HostName;

    /// The state as applied here, and every newer one.
    fn states(&self) -> watch::Receiver<Arc<State>>;

    /// The leader's picture ([`crate::build`] makes it); when no leader answers, what this host
    /// remembers, with `quorate: false`.
    async fn view(&self) -> Result<ClusterView, ApiError>;

    /// Proposes a command in the name of `by` and waits until it is applied by the leader.
    async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ApiError>;

    /// Makes a token that lets one host join, or one remote witness.
    async fn create_token(
        &self,
        by: &str,
        ttl: Millis,
        witness: bool,
    ) -> Result<JoinToken, ApiError>;

    /// Looks whether a disk witness can be on this unit. What it returns is of note.
    ///
    /// # Errors
    /// [`ApiError`]: it is too small, is not there, or has data on it and is not to be forced.
    async fn check_witness_disk(
        &self,
        _pool: &PoolName,
        _disk: &str,
        _force: bool,
    ) -> Result<Vec<String>, ApiError> {
        Ok(Vec::new())
    }

    /// Votes and the witness; when no leader answers, what this host remembers.
    async fn quorum(&self) -> Result<QuorumView, ApiError> {
        Ok(crate::build_quorum(&self.state(), None))
    }

    /// What this host's director answers for a client of a service: it knows of pinned connections. `None`: it does not
    /// steer for the service.
    async fn trace_here(&self, _query: &TraceQuery) -> Option<TraceAnswer> {
        None
    }

    /// Cuts a host's power with its fence devices; the answer is a sentence.
    async fn fence(&self, by: &str, host: &HostName) -> Result<String, ApiError>;

    /// Takes the operator's word that a host is dead; the answer is a sentence.
    async fn confirm_dead(&self, by: &str, host: &HostName) -> Result<String, ApiError>;

    /// Connects to a VM's serial console, wherever it runs.
    async fn console(&self, vm: &VmName) -> Result<Console, ApiError>;

    /// The log of a VM's serial console, wherever it runs.
    async fn logs(&self, vm: &VmName, options: LogOptions) -> Result<LogStream, ApiError>;

    /// Where the leader's planner would put a VM now; `None` when it cannot be asked.
    async fn placement(&self, _vm: &VmName) -> Option<PlacementView> {
        None
    }

    /// What the leader sees of hosts; `None` when it cannot be asked.
    async fn observed(&self) -> Option<Observed> {
        None
    }

    /// The images of a pool, as a host that reaches it sees them. Bounded in time.
    async fn look_into(&self, pool: &PoolName) -> Result<PoolLook, ApiError> {
        Err(ApiError::new(
            ErrorCode::Unreachable,
            format!("no host can look into pool {pool}"),
        ))
    }

    /// Tries whether a pool's SAN shuts an initiator out when told; `image`: on whose target.
    async fn drill(
        &self,
        _by: &str,
        pool: &PoolName,
        _image: Option<String>,
    ) -> Result<DrillView, ApiError> {
        Err(ApiError::new(
            ErrorCode::Unreachable,
            format!("no host can try pool {pool}"),
        ))
    }

    /// Who but this cluster's hosts is registered on a unit with reservations, as a host that reaches it sees it.
    async fn strangers(&self, pool: &PoolName, _image: &str) -> Result<StrangersSeen, ApiError> {
        Err(ApiError::new(
            ErrorCode::Unreachable,
            format!("no host can look at a unit of pool {pool}"),
        ))
    }

    /// Takes a task on images to the host that can do it.
    async fn image_job(&self, _by: &str, _task: ImageTask) -> Result<ImageJob, ApiError> {
        Err(no_images())
    }

    /// The jobs of all hosts that answer.
    async fn image_jobs(&self) -> Result<Vec<ImageJob>, ApiError> {
        Err(no_images())
    }

    /// One job.
    async fn find_image_job(&self, _id: &str) -> Result<ImageJob, ApiError> {
        Err(no_images())
    }

    /// Takes a job back.
    async fn cancel_image_job(&self, _id: &str) -> Result<ImageJob, ApiError> {
        Err(no_images())
    }

    /// The snapshots of an image.
    async fn image_snapshots(&self, _image: &ImageRef) -> Result<Vec<ImageSnapshot>, ApiError> {
        Err(no_images())
    }

    /// State and the leader's picture of one moment, for questions.
    async fn snapshot(&self) -> Result<Snapshot, ApiError> {
        Err(ApiError::no_quorum())
    }

    /// Adds the daemon's own metrics; called once.
    fn register_metrics(&self, _registry: &mut Registry) {}

    /// The newest state applied here.
    fn state(&self) -> Arc<State> {
        Arc::clone(&self.states().borrow())
    }

    /// Waits until the state here is at least that of `revision`.
    async fn applied_at_least(
        &self,
        revision: Revision,
        within: Duration,
    ) -> Result<Arc<State>, ApiError> {
        let mut states = self.states();
        let reached = states.wait_for(|state| state.revision >= revision);
        match tokio::time::timeout(within, reached).await {
            Ok(Ok(state)) => Ok(Arc::clone(&state)),
            _ => Err(ApiError::new(
                ErrorCode::Timeout,
                format!("this host has not caught up with revision {revision}"),
            )
            .hint("`quorate status` shows whether it hears the leader; or ask another host")),
        }
    }
}
