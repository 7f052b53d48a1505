//! Errors of the facade. Every message ends with what to do next.

use std::path::PathBuf;
use std::time::Duration;

use crate::NodeId;

/// Why a node could not be opened. Nothing was changed on the disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory or a file in it cannot be used.
    #[error("cannot use {}: {source}; check that it exists, belongs to this user and has free space", path.display())]
    Io {
        /// What was accessed.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another process has the log open.
    #[error("{} is in use by another process; stop the other daemon with this data directory first", path.display())]
    InUse {
        /// The log file.
        path: PathBuf,
    },
    /// The log is damaged.
    #[error("the replicated log {} is damaged: {reason}; do not repair it by hand: move the directory away, remove this host from the cluster and join it again", path.display())]
    Corrupt {
        /// The log file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The log was written by another release.
    #[error("the replicated log {} has format {found}, this release reads format {supported}; start a release that knows format {found}", path.display())]
    Format {
        /// The log file.
        path: PathBuf,
        /// Format in the file.
        found: u32,
        /// Format of this release.
        supported: u32,
    },
    /// The log belongs to another node.
    #[error("the replicated log {} belongs to node {found}, this is node {expected}; a copied data directory must never be used: give this host its own, empty one", path.display())]
    WrongNode {
        /// The log file.
        path: PathBuf,
        /// Node that wrote it.
        found: NodeId,
        /// Node that tried to open it.
        expected: NodeId,
    },
    /// The snapshot is damaged.
    #[error("the snapshot {} is damaged: {reason}; do not repair it by hand: move the directory away, remove this host from the cluster and join it again", path.display())]
    SnapshotCorrupt {
        /// The snapshot file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The snapshot was written by another release.
    #[error("the snapshot {} has the unknown format '{found}'; start the release that wrote it", path.display())]
    SnapshotFormat {
        /// The snapshot file.
        path: PathBuf,
        /// Format in the file.
        found: String,
    },
    /// The log was purged further than the snapshot reaches.
    #[error("the snapshot {} ends at log index {snapshot:?}, but the log was purged up to {purged}; entries are missing: move the directory away, remove this host from the cluster and join it again", path.display())]
    SnapshotBehindLog {
        /// The snapshot file.
        path: PathBuf,
        /// Last index in the snapshot.
        snapshot: Option<u64>,
        /// Last index purged from the log.
        purged: u64,
    },
    /// The state machine refused its own snapshot.
    #[error("the state in {} cannot be read: {reason}; start the release that wrote it, or join this host again with an empty directory", path.display())]
    Restore {
        /// The snapshot file.
        path: PathBuf,
        /// The state machine's reason.
        reason: String,
    },
    /// Timings that cannot work together.
    #[error(
        "the timings of the replicated log cannot work: {reason}; correct them in the cluster settings"
    )]
    Timings {
        /// What does not fit.
        reason: String,
    },
    /// The consensus core did not start.
    #[error(
        "the replicated log does not start: {reason}; see the journal, then restart the daemon"
    )]
    Start {
        /// Reason.
        reason: String,
    },
}

/// Why a proposal was not confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This node does not lead, or leads without a majority. The command was *not* and will not be applied.
    #[error("this node is not the leader ({}); send the request to the leader", leader_name(*leader))]
    NotLeader {
        /// Whom to ask instead, if known.
        leader: Option<NodeId>,
    },
    /// The deadline passed. The command may or may not be applied later.
    #[error(
        "no majority confirmed the change within {waited:?}; it may still happen: look at the current state before you repeat it"
    )]
    OutcomeUnknown {
        /// How long was waited.
        waited: Duration,
    },
    /// Too many proposals wait already. The command was not proposed.
    #[error("too many changes wait for the replicated log; try again shortly")]
    Overloaded,
    /// The command exceeds the limit. It was not proposed.
    #[error("the change has {bytes} bytes, at most {limit} are allowed; split it")]
    TooLarge {
        /// Size of the command.
        bytes: usize,
        /// Largest size allowed.
        limit: usize,
    },
    /// This node has stopped. Whether the command is applied is unknown.
    #[error(
        "the replicated log of this node has stopped: {0}; mend the cause and restart the daemon"
    )]
    Stopped(String),
}

/// Why a linearizable read point could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// This node does not lead.
    #[error("this node is not the leader ({}); send the request to the leader", leader_name(*leader))]
    NotLeader {
        /// Whom to ask instead, if known.
        leader: Option<NodeId>,
    },
    /// No majority answered in time.
    #[error(
        "no majority answered within {waited:?}; check the links between the hosts with `quorate status`"
    )]
    NoQuorum {
        /// How long was waited.
        waited: Duration,
    },
    /// This node has stopped.
    #[error(
        "the replicated log of this node has stopped: {0}; mend the cause and restart the daemon"
    )]
    Stopped(String),
}

/// Why a cluster could not be started here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    /// The node has a log already.
    #[error(
        "node {node} already belongs to a cluster; use an empty data directory to start another one"
    )]
    AlreadyInitialised {
        /// This node.
        node: NodeId,
    },
    /// The node did not become leader of itself.
    #[error(
        "node {node} did not start leading within {waited:?}; see the journal, then restart the daemon"
    )]
    NoLeader {
        /// This node.
        node: NodeId,
        /// How long was waited.
        waited: Duration,
    },
    /// This node has stopped.
    #[error(
        "the replicated log of this node has stopped: {0}; mend the cause and restart the daemon"
    )]
    Stopped(String),
}

/// Why the membership was not changed (or not confirmed).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// This node does not lead.
    #[error("this node is not the leader ({}); send the request to the leader", leader_name(*leader))]
    NotLeader {
        /// Whom to ask instead, if known.
        leader: Option<NodeId>,
    },
    /// Another change is not finished.
    #[error("another change of the members is not finished; try again shortly")]
    InProgress,
    /// A node that is no member.
    #[error("node {node} is no member; add it as a learner first")]
    UnknownNode {
        /// The node.
        node: NodeId,
    },
    /// A new voter that does not have the log yet.
    #[error(
        "node {node} has the log up to {matched:?} of {last}, too far behind to vote after {waited:?}; wait until it has caught up"
    )]
    Behind {
        /// The node.
        node: NodeId,
        /// What it has.
        matched: Option<u64>,
        /// What the leader has.
        last: u64,
        /// How long was waited.
        waited: Duration,
    },
    /// No voter would be left.
    #[error("the change leaves no voter; make another host a voter first")]
    NoVoterLeft,
    /// The deadline passed. The change may or may not happen later.
    #[error(
        "no majority confirmed the change of the members within {waited:?}; look at the members before you repeat it"
    )]
    OutcomeUnknown {
        /// How long was waited.
        waited: Duration,
    },
    /// This node has stopped.
    #[error(
        "the replicated log of this node has stopped: {0}; mend the cause and restart the daemon"
    )]
    Stopped(String),
}

/// Why a peer's request was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// The body is not what this release sends.
    #[error("request of a peer refused: {0}; check that all hosts run compatible releases")]
    Malformed(String),
    /// Too many requests at once.
    #[error("too many requests of peers at once; the peer repeats it")]
    Busy,
    /// This node has stopped.
    #[error(
        "the replicated log of this node has stopped: {0}; mend the cause and restart the daemon"
    )]
    Stopped(String),
}

fn leader_name(leader: Option<NodeId>) -> String {
    match leader {
        Some(id) => format!("node {id} leads"),
        None => "no leader is known".to_owned(),
    }
}
