//! What the cluster has agreed on about a service.
//!
//! ```text
//!                      PrepareRing(epoch + 1)            ActivateRing: history grows
//!   history, no next ------------------------> next set ----------------------------> history, no next
//!                      <------------AbandonRing---'
//! ```
//! Always holds: an epoch is handed out once and grows; a ring has a member; only a ring that every live director
//! holds becomes the one in force (the proposer looks, because reports are not state); the last [`RINGS_KEPT`] rings
//! are kept, because a flow's earlier member is found in them; a holder is named with a generation, so a decision that
//! was overtaken changes nothing. Must not: know which member really serves; that is the leader's picture.

use crate::model::{Ownership, State, VmRecord};
use quorate_types::service::{RingMember, RingVersion, ServiceId, ServiceSpec};
use quorate_types::{HostName, Revision, ServiceName, Timestamp, VmName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Rings of a service that are kept, the one in force among them.
pub const RINGS_KEPT: usize = 8;

/// Slots of a service's ring (a prime, as Maglev's permutations need).
const SLOTS: u32 = 65_537;
/// Slots where there are many services: their tables would take too much memory else.
const SLOTS_OF_MANY: u32 = 4_099;
/// More services than this are many.
const MANY: usize = 200;

/// Slots of the ring of a service that is made when there are so many others.
#[must_use]
pub fn slots_for(others: usize) -> u32 {
    match others < MANY {
        true => SLOTS,
        false => SLOTS_OF_MANY,
    }
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// What is wanted.
    pub spec: ServiceSpec,
    /// Its number.
    pub id: ServiceId,
    /// Slots of its ring, fixed when it was made.
    pub slots: u32,
    /// Its rings, oldest first; the last one is in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<RingVersion>,
    /// The coming ring, which directors prepare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<RingVersion>,
    /// Highest epoch handed out.
    pub last_epoch: u64,
    /// The host that answers for its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// Members that get no new connections.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub draining: BTreeMap<VmName, Drain>,
    /// What health checks came to.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub health: BTreeMap<VmName, Health>,
    /// Last change of what is wanted.
    pub changed: Revision,
}

/// The host that answers for an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Which.
    pub host: HostName,
    /// Grows with each change; the first is 1.
    pub generation: u64,
    /// Since when.
    pub since: Timestamp,
    /// The host before, which answers too until this one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<HostName>,
}

/// A member that gets no new connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Since when.
    pub since: Timestamp,
    /// Who wanted it.
    pub by: String,
    /// It is over: when, and how many connections were cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<(Timestamp, u64)>,
}

/// What the health check of a member came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// It serves.
    pub healthy: bool,
    /// Since when.
    pub since: Timestamp,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl ServiceRecord {
    /// The ring in force.
    #[must_use]
    pub fn ring(&self) -> Option<&RingVersion> {
        self.history.last()
    }

    /// Epoch of the ring in force; 0: none yet.
    #[must_use]
    pub fn active(&self) -> u64 {
        self.ring().map_or(0, |ring| ring.epoch)
    }

    /// Whether this host answers for the address.
    #[must_use]
    pub fn is_held_by(&self, host: &HostName) -> bool {
        let holder = self.holder.as_ref();
        holder.is_some_and(|holder| holder.host == *host || holder.leaving.as_ref() == Some(host))
    }
}

impl State {
    /// A service's members with their weights, by name and by label, in the order of their names; VMs that are to be
    /// deleted are none. Only a service that goes by labels looks at every VM.
    pub fn members<'a>(
        &'a self,
        spec: &'a ServiceSpec,
    ) -> Box<dyn Iterator<Item = (&'a VmName, &'a VmRecord, u32)> + 'a> {
        if spec.select.is_empty() {
            let named = spec.members.iter();
            let known = named.filter_map(|(name, member)| {
                let vm = self.vms.get(name).filter(|vm| !vm.deleting)?;
                Some((name, vm, member.weight))
            });
            return Box::new(known);
        }
        let all = self.vms.iter().filter(|(_, vm)| !vm.deleting);
        Box::new(all.filter_map(|(name, vm)| {
            let weight = spec.weight(name, &vm.spec.labels)?;
            Some((name, vm, weight))
        }))
    }

    /// A member as it stands in a ring; `None`: it has no NIC in the service's network.
    #[must_use]
    pub fn ring_member(&self, spec: &ServiceSpec, vm: &VmName, weight: u32) -> Option<RingMember> {
        let cluster = self.cluster.as_ref()?;
        let record = self.vms.get(vm)?;
        let mac = record.effective().mac_in(&cluster.id, vm, &spec.network)?;
        Some(RingMember {
            vm: vm.clone(),
            mac,
            weight,
        })
    }

    /// Services that a VM is a member of.
    pub fn services_of<'a>(&'a self, vm: &'a VmName) -> impl Iterator<Item = &'a ServiceName> {
        let labels = self.vms.get(vm).map(|record| &record.spec.labels);
        let has = move |service: &ServiceRecord| {
            labels.is_some_and(|labels| service.spec.weight(vm, labels).is_some())
        };
        let services = self.services.iter();
        services
            .filter(move |(_, service)| has(service))
            .map(|(name, _)| name)
    }

    /// Whether a VM is on its way from one host to another.
    #[must_use]
    pub fn is_migrating(&self, vm: &VmName) -> bool {
        let record = self.vms.get(vm);
        record.is_some_and(|vm| matches!(vm.ownership, Ownership::Migrating { .. }))
    }
}
