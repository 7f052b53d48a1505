//! What clients see of the votes, and ask about them. Stable JSON: fields are added, never changed.

use crate::view::EventView;
use quorate_types::{HostName, NodeId, PoolName, Revision};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What `quorate quorum show` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuorumView {
    /// A leader has confirmed a majority.
    pub quorate: bool,
    /// It.
    #[schema(value_type = Option<String>)]
    pub leader: Option<HostName>,
    /// How many votes there are.
    pub votes: usize,
    /// Of these, so many answer.
    pub votes_up: usize,
    /// So many more voters, whichever, may fail before the cluster stops.
    pub survives: usize,
    /// The witness, if one was set up.
    pub witness: Option<WitnessView>,
    /// All hosts and the witness.
    pub voters: Vec<VoterView>,
    /// What is wrong.
    pub problems: Vec<String>,
    /// What would be best.
    pub recommendation: RecommendationView,
}

/// Who votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VoterKind {
    /// A host.
    Host,
    /// A third vote without a host behind it.
    Witness,
}

/// A host or the witness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VoterView {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: VoterKind,
    /// Its number in the consensus group.
    #[schema(value_type = u64)]
    pub node: NodeId,
    /// It votes.
    pub votes: bool,
    /// It answers.
    pub up: bool,
    /// For how long it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_ms: Option<u64>,
    /// It has the leader's log, or nearly.
    pub caught_up: bool,
    /// Its daemon was stopped in order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
}

/// Kinds of witnesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WitnessKind {
    /// No witness.
    None,
    /// A voter whose log lies in a pool, run by whichever host holds the pool's lease.
    Disk,
    /// A voter on a machine of its own.
    Remote,
}

/// The witness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WitnessView {
    /// Which kind.
    pub kind: WitnessKind,
    /// Of a disk witness: where its log lies.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolName>,
    /// Of a disk witness on a unit: which of the pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Of a remote witness: its name.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<HostName>,
    /// Of a remote witness: `address:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// It votes. It does only where it makes an even number of hosts odd, and once it has caught up.
    pub votes: bool,
    /// It answers.
    pub up: bool,
}

/// One possible set-up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WitnessOption {
    /// With this witness.
    pub witness: WitnessKind,
    /// So many votes.
    pub votes: usize,
    /// So many failures survived, when all voters are up.
    pub survives: usize,
    /// What speaks for it or against it.
    pub why: String,
}

/// What would be best for these hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecommendationView {
    /// Which witness.
    pub witness: WitnessKind,
    /// In this pool.
    #[schema(value_type = Option<String>)]
    pub pool: Option<PoolName>,
    /// It is so already, or as good.
    pub satisfied: bool,
    /// One sentence.
    pub summary: String,
    /// The command that sets it up.
    pub command: String,
    /// Why.
    pub reasons: Vec<String>,
    /// All set-ups, compared.
    pub options: Vec<WitnessOption>,
}

/// Chooses the witness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuorumRequest {
    /// `none` or `disk`; a remote witness joins with a token (`POST /api/v1/tokens` with `witness`).
    pub witness: WitnessKind,
    /// Where a disk witness shall be.
    #[schema(value_type = Option<String>)]
    #[serde(default)]
    pub pool: Option<PoolName>,
    /// On which unit (a LUN, a device) of a pool that has no files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Also if there are data on it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What choosing a witness did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct QuorumChanged {
    /// The revision that it made.
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// What happened.
    pub events: Vec<EventView>,
    /// What follows from it.
    pub consequences: Vec<String>,
}
