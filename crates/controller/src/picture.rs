//! The leader's picture of the cluster, for `status` and everything like it.

use quorate_membership::HostHealth;
use quorate_types::{HostName, HostReport, Millis, NodeId, Revision, ServiceName, VmName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What the leader knows and the replicated state does not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Picture {
    /// The leader.
    pub leader: HostName,
    /// The state that it goes with.
    #[serde(default)]
    pub revision: Revision,
    /// It has confirmed a majority within its lease.
    pub quorate: bool,
    /// Term of the consensus group.
    pub term: u64,
    /// Voters.
    pub voters: BTreeSet<NodeId>,
    /// How each host and the witness stand in the consensus group.
    #[serde(default)]
    pub votes: BTreeMap<NodeId, VotePicture>,
    /// Hosts.
    pub hosts: BTreeMap<HostName, HostPicture>,
    /// Why a VM is not as wanted, one sentence each.
    pub waiting: BTreeMap<VmName, String>,
    /// Whole-cluster problems, each a sentence that says what to do.
    pub problems: Vec<String>,
    /// What would even out load, one sentence.
    #[serde(default)]
    pub advice: Option<String>,
    /// What is wrong with services, one sentence each.
    #[serde(default)]
    pub services: BTreeMap<ServiceName, Vec<String>>,
}

/// A member of the consensus group in the leader's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VotePicture {
    /// For how long nothing was heard of it; absent: it is up.
    pub silent: Option<Millis>,
    /// Its log is as new as the leader's, or nearly.
    pub caught_up: bool,
}

/// A host in the leader's picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostPicture {
    /// Whether it is alive.
    pub health: HostHealth,
    /// Lease left, as the leader counts it.
    pub lease_left: Millis,
    /// Its newest report.
    pub report: Option<HostReport>,
    /// Why its fencing does not get on.
    pub fencing: Option<String>,
}
