//! What the cluster has agreed on about its votes: the witness, and who left in order.
//!
//! Always holds: a witness has a node number of its own, handed out once; a new log means a new number, so that no
//! vote is ever cast twice under one.

use quorate_types::{HostName, NodeId, PoolName, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// About votes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Quorum {
    /// A third vote without a host behind it.
    pub witness: Option<Witness>,
    /// Hosts whose daemon was stopped in order and has not come back.
    pub left: BTreeSet<HostName>,
}

impl Quorum {
    /// Nothing out of the ordinary.
    pub fn is_empty(&self) -> bool {
        self.witness.is_none() && self.left.is_empty()
    }
}

/// A third vote without a host behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Witness {
    /// A voter on a machine of its own.
    Remote {
        /// Its number in the consensus group.
        node: NodeId,
        /// Its name, for people.
        name: HostName,
        /// `address:port` for peers.
        address: String,
        /// When it joined.
        joined: Timestamp,
    },
    /// A voter whose log lies in a pool, run by whichever host holds the pool's lease.
    Disk {
        /// Its number in the consensus group.
        node: NodeId,
        /// The pool.
        pool: PoolName,
    },
}

impl Witness {
    /// Its number in the consensus group.
    pub fn node(&self) -> NodeId {
        match self {
            Self::Remote { node, .. } | Self::Disk { node, .. } => *node,
        }
    }

    /// In words.
    pub fn describe(&self) -> String {
        match self {
            Self::Remote { name, address, .. } => format!("remote witness {name} at {address}"),
            Self::Disk { pool, .. } => format!("disk witness in pool {pool}"),
        }
    }
}

/// What an operator can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WitnessChoice {
    /// No witness.
    None,
    /// A disk witness in this pool.
    Disk {
        /// Which.
        pool: PoolName,
    },
}
