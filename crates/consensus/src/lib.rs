//! Replicated log of the cluster: openraft 0.9 behind a narrow, byte-typed facade.
//!
//! This crate owns the raft node of one host: its log and vote (redb), its snapshot file, elections and
//! membership. What always holds:
//!
//! - a command that [`Consensus::propose`] confirmed is on the disks of a majority and applied here;
//! - [`StateMachine::apply`] sees the same commands in the same order on every node;
//! - nothing is acknowledged after a storage error: the node stops ([`Consensus::failed`]) and stays stopped;
//! - [`Consensus::last_quorum_ack`] is never later than the truth, so leases may be built on it.
//!
//! It must not know what a command means, how peers are reached ([`PeerLink`]) or who may be a member.
//! Why openraft, redb and these formats: docs/decisions/0002-consensus-storage.md.
//!
//! ```text
//!            propose / read / barrier                         handle (peer requests)
//!                     |                                              |
//!   driver ---> +-----v----------------------------------------------v---+      +-----------+
//!   heartbeats, |                 openraft (one task)                    | ---> | PeerLink  |
//!   elections   +-----+--------------------------+-----------------------+      +-----------+
//!               append, vote (fsync)       apply in order
//!                     v                          v
//!             thread "raft-log"          RwLock<StateMachine> ---> snapshot file
//!               (owns raft.redb)
//! ```

mod clock;
mod codec;
mod config;
#[cfg(test)]
mod disk_faults;
mod driver;
mod error;
mod fault;
mod log;
mod machine;
mod media;
mod members;
mod network;
mod node;
mod quiet;
mod quorum;
mod serve;
mod snapshot;
#[cfg(test)]
mod suite;
mod tenure;
mod types;
mod witness;

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;

pub use config::{Config, Role, Timings};
pub use error::{
    BarrierError, BootstrapError, HandleError, MembershipError, OpenError, ProposeError,
};
pub use media::{LogMedium, Media, SnapshotMedium};
pub use node::Consensus;
pub use tenure::Tenure;

/// Identity of a raft node. Never reused: a host that lost its disk joins with a new one.
pub type NodeId = u64;

/// Directive for the log filter: openraft reports every heartbeat and every failed request of its own.
/// What an operator needs to know (elections, leadership, failures) this crate logs itself.
pub const LOG_DIRECTIVE: &str = "openraft=off";

/// Deterministic state machine fed with committed commands.
pub trait StateMachine: Send + Sync + 'static {
    /// Applies one committed command and returns the reply for its proposer.
    ///
    /// Total and deterministic. `index` is the log index; it grows but is not gapless. Called once per
    /// process and index; after a restart the commands since the last snapshot are applied again.
    /// A panic stops the node.
    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8>;

    /// The whole state as bytes. Called beside readers, at most once at a time.
    fn snapshot(&self) -> Vec<u8>;

    /// Replaces the state by a snapshot.
    ///
    /// # Errors
    /// The reason why the bytes cannot be read; the state is unchanged then, and the node stops.
    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String>;
}

/// Kind of a raft request, for routing and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RaftMethod {
    /// Log entries and heartbeats; small bodies mostly, up to about 1 MiB plus one command.
    Append,
    /// Elections; tiny bodies.
    Vote,
    /// A chunk of a snapshot, up to about 1 MiB.
    Snapshot,
}

/// Why a request did not reach a peer or its answer did not come back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// No way to the peer.
    #[error("unreachable")]
    Unreachable,
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// The peer refused, for example with a [`HandleError`].
    #[error("refused: {0}")]
    Remote(String),
}

/// Carries one raft request to a peer and its answer back. The receiver feeds it to [`Consensus::handle`].
#[async_trait]
pub trait PeerLink: Send + Sync + 'static {
    /// Sends `body` to `target` and returns the answer's body.
    ///
    /// Must give up after `timeout`. May be cancelled at any time. Requests may be duplicated or reordered.
    async fn call(
        &self,
        target: NodeId,
        method: RaftMethod,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, LinkError>;
}

/// A confirmed command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Its log index.
    pub index: u64,
    /// What [`StateMachine::apply`] returned for it on this node.
    pub reply: Vec<u8>,
}

/// Who leads, as far as this node can vouch for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader; `None` if this node heard nothing from one for [`Timings::election_max`], or leads
    /// itself but has not heard from a majority for that long.
    pub leader: Option<NodeId>,
    /// Newest term this node knows.
    pub term: u64,
    /// This node leads and a majority confirmed it lately.
    pub is_self: bool,
}

/// Log indexes of one node, for status and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogStatus {
    /// Newest entry in the log.
    pub last: Option<u64>,
    /// Newest applied entry.
    pub applied: Option<u64>,
    /// Newest entry in the snapshot file.
    pub snapshot: Option<u64>,
    /// Newest entry that was removed from the log.
    pub purged: Option<u64>,
}

/// Members of the cluster, as this node knows them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// Nodes that vote. During a change: the old and the new ones.
    pub voters: BTreeSet<NodeId>,
    /// Nodes that receive the log and do not vote.
    pub learners: BTreeSet<NodeId>,
    /// A change is half done (its leader was lost, perhaps). Call [`Consensus::change_voters`] to finish it.
    pub changing: bool,
}
