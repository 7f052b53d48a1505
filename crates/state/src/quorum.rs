//! What the cluster has agreed on about its votes: the witness, and who left in order.
//!
//! Always holds: a witness has a node number of its own, handed out once; a new log means a new number, so that no
//! vote is ever cast twice under one. On a unit each host has a slot of its own, and a slot goes to another host only
//! when its host is gone and no unused one is left.

use crate::model::State;
use quorate_types::spec::DiskSpec;
use quorate_types::{HostName, NodeId, PoolName, Timestamp, VmName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

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
        /// On which of its units, in a pool that has no files.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unit: Option<WitnessUnit>,
    },
}

/// Slots of a unit: so many hosts can run the witness on it.
pub const WITNESS_SLOTS: u8 = 8;

/// A whole unit (a LUN, a block device) with a disk witness on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessUnit {
    /// Its name in the pool, as of a disk's image.
    pub image: String,
    /// Which of its slots each host writes, by the host's number: nobody else does.
    pub slots: BTreeMap<NodeId, u8>,
}

impl WitnessUnit {
    /// Gives a host a slot, if there is one. `gone`: whether a host of this number is no member any more.
    pub(crate) fn admit(&mut self, host: NodeId, gone: impl Fn(NodeId) -> bool) {
        if self.slots.contains_key(&host) {
            return;
        }
        let taken: BTreeSet<u8> = self.slots.values().copied().collect();
        let unused = (0..WITNESS_SLOTS).find(|slot| !taken.contains(slot));
        let left = self.slots.iter().find(|(host, _)| gone(**host));
        let left = left.map(|(host, slot)| (*host, *slot));
        if let Some(slot) = unused {
            self.slots.insert(host, slot);
        } else if let Some((old, slot)) = left {
            self.slots.remove(&old);
            self.slots.insert(host, slot);
        }
    }
}

impl Witness {
    /// The unit that it has for itself: pool and name.
    pub fn unit(&self) -> Option<(&PoolName, &WitnessUnit)> {
        match self {
            Self::Disk {
                pool,
                unit: Some(unit),
                ..
            } => Some((pool, unit)),
            _ => None,
        }
    }

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
            Self::Disk {
                pool,
                unit: Some(unit),
                ..
            } => format!("disk witness on {} of pool {pool}", unit.image),
            Self::Disk { pool, .. } => format!("disk witness in pool {pool}"),
        }
    }
}

impl State {
    /// The unit that the witness has for itself: what it is, however it is written, its pool and its name. No VM may use it.
    pub fn witness_disk(&self) -> Option<(String, &PoolName, &str)> {
        let (pool, unit) = self.quorum.witness.as_ref()?.unit()?;
        let spec = &self.pools.get(pool)?.spec;
        Some((spec.identity(pool, &unit.image), pool, &unit.image))
    }

    /// A VM with this disk, as defined or as it runs, whatever pool it names it by.
    pub fn disk_user(&self, pool: &PoolName, image: &str) -> Option<&VmName> {
        let wanted = self.pools.get(pool)?.spec.identity(pool, image);
        let is_it = |disk: &DiskSpec| {
            let pool = self.pools.get(&disk.pool);
            pool.is_some_and(|pool| pool.spec.identity(&disk.pool, &disk.image) == wanted)
        };
        let mut users = self.vms.iter().filter(|(_, vm)| {
            let mut disks = vm.spec.disks.iter().chain(&vm.effective().disks);
            disks.any(is_it)
        });
        users.next().map(|(name, _)| name)
    }

    /// Whether this disk is it.
    pub fn is_witness_disk(&self, pool: &PoolName, image: &str) -> bool {
        let spec = self.pools.get(pool).map(|pool| &pool.spec);
        let asked = spec.map(|spec| spec.identity(pool, image));
        asked.is_some() && asked == self.witness_disk().map(|(identity, ..)| identity)
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
        /// The unit, in a pool of whole units (`iscsi`, `block`).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image: Option<String>,
    },
}
