//! Settings of one raft node, and how they map to openraft's.

use std::path::PathBuf;
use std::time::Duration;

use openraft::SnapshotPolicy;

use crate::NodeId;
use crate::error::OpenError;
use crate::tenure::Tenure;

/// Bytes of a snapshot in one message.
const CHUNK_BYTES: u64 = 1024 * 1024;
const CHUNK_TIMEOUT_MS: u64 = 10_000;

/// How fast a lost leader is noticed.
///
/// A leader that falls silent is replaced between `election_min` and about `election_max` plus one round
/// trip later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// Interval of the leader's heartbeats.
    pub heartbeat: Duration,
    /// Nobody stands for election, and nobody votes, earlier than this after it heard the leader.
    pub election_min: Duration,
    /// A voter that heard no leader for this long has stood for election.
    pub election_max: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(600),
            election_max: Duration::from_millis(1000),
        }
    }
}

impl Timings {
    /// How long one request to a peer may take (openraft sends the next only afterwards).
    pub(crate) fn request_timeout(&self) -> Duration {
        self.election_min / 2
    }
}

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// A host: it leads whenever it is elected.
    #[default]
    Host,
    /// A third vote without a host behind it: it leads only to give what it alone knows to a host.
    Witness,
}

/// Settings of one raft node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Identity of this node.
    pub node_id: NodeId,
    /// Directory of `raft.redb` and `snapshot`; created if missing. Used by this node only.
    pub dir: PathBuf,
    /// Election timing; the same on all nodes.
    pub timings: Timings,
    /// A snapshot is taken after this many entries, and half as many stay in the log after it.
    pub snapshot_every: u64,
    /// Largest command that may be proposed, in bytes.
    pub max_command_bytes: usize,
    /// Largest snapshot that is accepted from a leader, in bytes. It is held in memory while it arrives.
    pub max_snapshot_bytes: u64,
    /// What the node is for.
    pub role: Role,
    /// Its right to act, where its files may be opened on another machine after it; absent: they cannot.
    pub tenure: Option<Tenure>,
}

impl Config {
    /// The defaults for `node_id` in `dir`.
    pub fn new(node_id: NodeId, dir: impl Into<PathBuf>) -> Self {
        Self {
            node_id,
            dir: dir.into(),
            timings: Timings::default(),
            snapshot_every: 2000,
            max_command_bytes: 1024 * 1024,
            max_snapshot_bytes: 256 * 1024 * 1024,
            role: Role::Host,
            tenure: None,
        }
    }

    /// openraft's settings.
    ///
    /// Its own heartbeats and elections are off: [`crate::driver`] triggers both. What remains of its
    /// timers: `election_timeout_max` is the lease during which it refuses votes against a live leader,
    /// `heartbeat_interval` and `election_timeout_min` are request timeouts.
    pub(crate) fn openraft(&self) -> Result<openraft::Config, OpenError> {
        let wrong = |reason: String| OpenError::Timings { reason };
        let t = &self.timings;
        if t.heartbeat < Duration::from_millis(10) {
            return Err(wrong("the heartbeat is shorter than 10 ms".into()));
        }
        if t.election_min < t.heartbeat * 3 {
            return Err(wrong(format!(
                "election_min ({:?}) is less than three heartbeats of {:?}",
                t.election_min, t.heartbeat
            )));
        }
        if t.election_max < t.election_min + t.heartbeat {
            return Err(wrong(format!(
                "election_max ({:?}) is not at least one heartbeat above election_min ({:?})",
                t.election_max, t.election_min
            )));
        }
        if self.snapshot_every == 0 {
            return Err(wrong("snapshot_every is 0".into()));
        }
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        openraft::Config {
            cluster_name: "quorate".into(),
            heartbeat_interval: millis(t.request_timeout()),
            election_timeout_min: millis(t.election_min * 2 / 3),
            election_timeout_max: millis(t.election_min),
            enable_heartbeat: false,
            enable_elect: false,
            install_snapshot_timeout: CHUNK_TIMEOUT_MS,
            snapshot_max_chunk_size: CHUNK_BYTES,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.snapshot_every / 2,
            replication_lag_threshold: self.snapshot_every.saturating_mul(2),
            purge_batch_size: (self.snapshot_every / 8).max(1),
            max_payload_entries: 300,
            ..openraft::Config::default()
        }
        .validate()
        .map_err(|e| wrong(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn defaults_hold_and_impossible_timings_are_named() {
        let mut config = Config::new(1, "unused");
        assert!(config.openraft().is_ok());
        config.timings.election_max = config.timings.election_min;
        let message = config.openraft().unwrap_err().to_string();
        assert!(message.contains("election_max"), "{message}");
        config.timings = Timings {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(250),
            election_max: Duration::from_millis(500),
        };
        let message = config.openraft().unwrap_err().to_string();
        assert!(message.contains("three heartbeats"), "{message}");
        config.timings.heartbeat = Duration::from_millis(50);
        assert!(config.openraft().is_ok());
    }
}
