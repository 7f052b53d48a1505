//! What one host's datapath is told, and what it says.

use quorate_types::service::{
    Affinity, Attractor, Limits, Offences, PortRange, RingVersion, ServiceId, UplinkMode,
};
use quorate_types::{NetworkName, ServiceName, VmName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// All that one host should have loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Wanted {
    /// Networks of this host.
    pub networks: BTreeMap<NetworkName, UplinkWanted>,
    /// Services; one whose network is not here is left out and said to be.
    pub services: BTreeMap<ServiceName, ServiceTable>,
}

/// A network as this host has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkWanted {
    /// Its bridge.
    pub bridge: String,
    /// The bridge's port to the outside; without one only local guests are clients.
    pub uplink: Option<String>,
}

/// A service as directors and edges know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceTable {
    /// Its number.
    pub id: ServiceId,
    /// The network of its address.
    pub network: NetworkName,
    /// Its addresses: at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<PortRange>,
    /// Which flows of a client go together.
    pub affinity: Affinity,
    /// Slots of its ring.
    pub slots: u32,
    /// Its member lists, oldest first; the last one is active.
    pub history: Vec<RingVersion>,
    /// The coming member list.
    pub next: Option<RingVersion>,
    /// Whether this host answers for the address.
    pub holder: bool,
    /// How clients find the cluster.
    pub attractor: Attractor,
    /// How many flows may begin.
    pub limits: Limits,
}

impl ServiceTable {
    /// The active member list.
    #[must_use]
    pub fn active(&self) -> Option<&RingVersion> {
        self.history.last()
    }
}

/// The edge of one tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeSpec {
    /// The tap.
    pub ifname: String,
    /// Its network.
    pub network: NetworkName,
    /// Its VM.
    pub vm: VmName,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's own addresses: one of each family at most is served through; all may be used as a source.
    pub addresses: Vec<IpAddr>,
    /// What the guest may not send.
    pub guard: Guard,
}

/// What a guest may not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Guard {
    /// Frames from another MAC address than its own.
    pub mac: bool,
    /// Packets and ARP from other addresses than its own. Link-local ones and "none yet" are always allowed.
    pub address: bool,
    /// Answers of a DHCP server.
    pub dhcp_server: bool,
    /// Router advertisements and redirects.
    pub router_advertisement: bool,
}

/// What is loaded after [`crate::Datapath::apply`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Applied {
    /// Services, also those with a problem.
    pub services: BTreeMap<ServiceName, Loaded>,
    /// Uplinks.
    pub uplinks: BTreeMap<NetworkName, UplinkMode>,
}

/// One service in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Loaded {
    /// Epoch of the ring that is steered by; 0: none.
    pub active: u64,
    /// Epoch of the coming ring that edges know already.
    pub prepared: Option<u64>,
    /// Why it is not loaded.
    pub problem: Option<String>,
}

/// What was counted since the tables were made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// By service.
    pub services: BTreeMap<ServiceName, ServiceCounters>,
    /// Frames by what became of them, named as in `abi::Cause`: drops, bounces, answers.
    pub causes: BTreeMap<String, u64>,
    /// Stations that claim a service's address.
    pub duplicates: Vec<Duplicate>,
    /// What guests of this host were kept from sending.
    pub offences: BTreeMap<VmName, Offences>,
}

/// Traffic of one service at this host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServiceCounters {
    /// Packets that the director steered.
    pub steered: u64,
    /// Their bytes, with Ethernet headers.
    pub bytes: u64,
    /// By member with an edge here.
    pub members: BTreeMap<VmName, MemberCounters>,
}

/// Traffic of one member in one service at its edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemberCounters {
    /// Packets towards the guest.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets from the guest.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Flows begun.
    pub flows: u64,
    /// Flows refused, by the service's limits.
    pub refused: u64,
}

/// A station that claims a service's address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Duplicate {
    /// The address.
    pub address: IpAddr,
    /// Who claims it.
    pub mac: [u8; 6],
    /// The port of this host that it was heard on.
    pub ifname: String,
    /// How long ago, in milliseconds.
    pub age_ms: u64,
    /// How often.
    pub count: u64,
}
