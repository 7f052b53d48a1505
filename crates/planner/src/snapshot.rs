//! Everything a decision rests on, in one value that can be kept in a file.
//!
//! Always holds: [`crate::plan`] on a snapshot that was read back gives what the leader would have
//! planned at that moment; a snapshot that went through [`Snapshot::redact`] holds no secret. Must
//! not: be used to change the cluster. It is for questions.

use crate::{Input, Memory};
use quorate_membership::{FenceProof, HostHealth, Instant};
use quorate_state::State;
use quorate_types::{HostName, HostReport, NodeId, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Version of the form that this program writes.
pub const SNAPSHOT_FORMAT: u32 = 1;

/// What is written in the place of a secret.
const REDACTED: &str = "(left out)";

/// State and picture of one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Version of the form.
    pub format: u32,
    /// Program version of the writer.
    pub version: String,
    /// When it was made, by the clock on the wall.
    pub saved: Timestamp,
    /// What is agreed.
    pub state: State,
    /// What the leader sees.
    pub seen: Seen,
}

/// The leader's volatile picture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// The leader's clock.
    pub now: Instant,
    /// The leader has had the time to hear every host.
    pub settled: bool,
    /// Who leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<HostName>,
    /// Nodes that vote; empty: not known.
    #[serde(default)]
    pub voters: BTreeSet<NodeId>,
    /// Newest report of each host.
    pub reports: BTreeMap<HostName, HostReport>,
    /// How each host looks.
    pub health: BTreeMap<HostName, HostHealth>,
    /// Proofs about hosts that hold.
    #[serde(default)]
    pub proofs: Vec<FenceProof>,
    /// What the leader remembers.
    #[serde(default)]
    pub memory: Memory,
}

/// Why a file is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not JSON, or not of this form.
    #[error("it is not a saved state: {0}")]
    Form(#[from] serde_json::Error),
    /// Written by a newer program.
    #[error("it is of format {0}, which this program does not know: use a newer one")]
    TooNew(u32),
    /// There is no cluster in it.
    #[error("it holds no cluster")]
    Empty,
}

impl Snapshot {
    /// A snapshot of the planner's input.
    #[must_use]
    pub fn of(input: &Input<'_>, version: &str, saved: Timestamp) -> Self {
        Self {
            format: SNAPSHOT_FORMAT,
            version: version.to_owned(),
            saved,
            state: input.state.clone(),
            seen: Seen::of(input),
        }
    }

    /// Reads what [`serde_json`] wrote.
    ///
    /// # Errors
    /// When it is something else, or newer than this program.
    pub fn read(bytes: &[u8]) -> Result<Self, SnapshotError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head = serde_json::from_slice(bytes)?;
        if head.format > SNAPSHOT_FORMAT {
            return Err(SnapshotError::TooNew(head.format));
        }
        let snapshot: Self = serde_json::from_slice(bytes)?;
        if snapshot.state.cluster.is_none() {
            return Err(SnapshotError::Empty);
        }
        Ok(snapshot)
    }

    /// The planner's input.
    #[must_use]
    pub fn input(&self) -> Input<'_> {
        Input {
            state: &self.state,
            reports: &self.seen.reports,
            health: &self.seen.health,
            proofs: &self.seen.proofs,
            now: self.seen.now,
            memory: &self.seen.memory,
            settled: self.seen.settled,
        }
    }

    /// Takes out the authority's key, the join tokens, the secrets and the parameters of fence devices.
    #[must_use]
    pub fn redact(mut self) -> Self {
        self.state.tokens.clear();
        self.state.secrets.clear();
        if let Some(cluster) = &mut self.state.cluster {
            cluster.ca_key = REDACTED.to_owned();
            for device in cluster.settings.fencing.values_mut().flatten() {
                for value in device.options.values_mut() {
                    *value = REDACTED.to_owned();
                }
            }
        }
        self
    }
}

impl Seen {
    /// The volatile part of the planner's input.
    #[must_use]
    pub fn of(input: &Input<'_>) -> Self {
        Self {
            now: input.now,
            settled: input.settled,
            leader: None,
            voters: BTreeSet::new(),
            reports: input.reports.clone(),
            health: input.health.clone(),
            proofs: input.proofs.to_vec(),
            memory: input.memory.clone(),
        }
    }
}
