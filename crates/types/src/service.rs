//! Services: an address and ports that are spread over member VMs.
//!
//! Owns: what the operator says of a service ([`ServiceSpec`]), the member lists that directors steer by
//! ([`RingVersion`]), and what hosts report of them ([`ServiceReport`]). Always holds: a [`PortRange`] is not empty and
//! never contains port 0; the number of a service is given out once. Must not: know where a VM is: members are steered
//! to by MAC address, so a migration changes nothing here.

pub use crate::limits::{Limits, MAX_LIMIT, Offences};

use crate::placement::LabelSelector;
use crate::{LabelName, Millis, NetworkName, VmName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// Most ports and port ranges of one service.
pub const MAX_PORTS: usize = 32;
/// Most members of one service.
pub const MAX_MEMBERS: usize = 256;
/// Largest weight of a member.
pub const MAX_MEMBER_WEIGHT: u32 = 100;

/// Number of a service; part of its virtual MAC address. Given out once, never reused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ServiceId(pub u32);

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl ServiceId {
    /// The address that clients find the service at: `02:51:56` and 24 bits of the number.
    #[must_use]
    pub fn virtual_mac(self) -> [u8; 6] {
        let [_, a, b, c] = self.0.to_be_bytes();
        [0x02, 0x51, 0x56, a, b, c]
    }
}

/// A service as the operator wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// The network that its address is in and that its members are plugged into.
    pub network: NetworkName,
    /// Its address, IPv4 or IPv6.
    pub address: IpAddr,
    /// Its IPv6 address, beside an IPv4 one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// Its ports.
    pub ports: Vec<PortRange>,
    /// Its members by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub members: BTreeMap<VmName, Member>,
    /// Every VM with these labels is a member: label -> accepted values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub select: LabelSelector,
    /// Which connections of a client go to one member.
    #[serde(default)]
    pub affinity: Affinity,
    /// How a member is found to serve; absent: it does as long as its VM runs and is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// How long the connections of a member that is being drained are kept at most.
    #[serde(default = "default_drain")]
    pub drain_timeout: Millis,
    /// How clients' packets find the cluster.
    #[serde(default)]
    pub attractor: Attractor,
    /// How many connections may begin.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

fn default_drain() -> Millis {
    Millis::secs(300)
}

impl ServiceSpec {
    /// A service of one address and one TCP port, with defaults for everything else.
    #[must_use]
    pub fn new(network: NetworkName, address: IpAddr, port: u16) -> Self {
        Self {
            network,
            address,
            address6: None,
            ports: PortRange::single(port, Protocol::Tcp).into_iter().collect(),
            members: BTreeMap::new(),
            select: LabelSelector::new(),
            affinity: Affinity::default(),
            health: None,
            drain_timeout: default_drain(),
            attractor: Attractor::default(),
            limits: Limits::default(),
        }
    }

    /// Its addresses.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let second = self.address6.map(IpAddr::V6);
        [self.address].into_iter().chain(second).collect()
    }

    /// The weight of a VM as a member; `None`: it is none.
    #[must_use]
    pub fn weight(&self, vm: &VmName, labels: &BTreeMap<LabelName, LabelName>) -> Option<u32> {
        let by_label = !self.select.is_empty()
            && self.select.iter().all(|(label, values)| {
                labels
                    .get(label)
                    .is_some_and(|value| values.contains(value))
            });
        let by_name = self.members.get(vm).map(|member| member.weight);
        by_name.or_else(|| by_label.then_some(1))
    }

    /// The port that a health check of a member goes to.
    #[must_use]
    pub fn health_port(&self) -> Option<u16> {
        let health = self.health.as_ref()?;
        let first = || {
            let mut tcp = self
                .ports
                .iter()
                .filter(|range| range.protocol == Protocol::Tcp);
            tcp.next().map(|range| range.first)
        };
        health.port.or_else(first)
    }

    /// Whether a packet to this port is the service's.
    #[must_use]
    pub fn has_port(&self, protocol: Protocol, port: u16) -> bool {
        self.ports
            .iter()
            .any(|range| range.protocol == protocol && range.contains(port))
    }
}

/// A member of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its share of new connections, against the other members.
    #[serde(default = "default_weight")]
    pub weight: u32,
}

fn default_weight() -> u32 {
    1
}

impl Default for Member {
    fn default() -> Self {
        Self {
            weight: default_weight(),
        }
    }
}

/// What runs on a port.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its number in IP headers.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One port or a range. Written `80`, `5000-5010`, `53/udp`, `5000-5010/udp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

/// Why a text is not a port or a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Not a number from 1 to 65535.
    #[error("`{0}` is not a port: write a number from 1 to 65535, a range or `53/udp`")]
    Number(String),
    /// It ends before it begins.
    #[error("`{0}` ends before it begins")]
    Order(String),
    /// Something else than `tcp` or `udp`.
    #[error("`{0}`: a service has `tcp` and `udp` ports only")]
    Protocol(String),
}

impl PortRange {
    /// One port; `None` for port 0.
    #[must_use]
    pub fn single(port: u16, protocol: Protocol) -> Option<Self> {
        (port > 0).then_some(Self {
            protocol,
            first: port,
            last: port,
        })
    }

    /// Whether the port is in it.
    #[must_use]
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// Whether a port is in both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.protocol == other.protocol && self.first <= other.last && other.first <= self.last
    }
}

impl std::str::FromStr for PortRange {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let (ports, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(PortError::Protocol(text.to_owned())),
        };
        let port = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.then(|| part.parse::<u16>().ok()).flatten();
            let number = number.filter(|port| *port > 0);
            number.ok_or_else(|| PortError::Number(text.to_owned()))
        };
        let (first, last) = match ports.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(ports)?, port(ports)?),
        };
        if last < first {
            return Err(PortError::Order(text.to_owned()));
        }
        Ok(Self {
            protocol,
            first,
            last,
        })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last > self.first {
            write!(f, "-{}", self.last)?;
        }
        if self.protocol == Protocol::Udp {
            f.write_str("/udp")?;
        }
        Ok(())
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Which connections of a client go to one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Affinity {
    /// What of the client counts.
    pub kind: AffinityKind,
    /// Leading bits of an IPv4 address that make a subnet.
    pub prefix: u8,
    /// Leading bits of an IPv6 address that make a subnet.
    pub prefix6: u8,
    /// A client that comes back within this time finds the member that it had, also when members came or went;
    /// absent: only as long as its member's share is not given away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Millis>,
}

impl Default for Affinity {
    fn default() -> Self {
        Self {
            kind: AffinityKind::None,
            prefix: 24,
            prefix6: 64,
            timeout: None,
        }
    }
}

/// What of a client decides which member it gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AffinityKind {
    /// Address and port: each connection by itself.
    #[default]
    None,
    /// The address: all connections of a client.
    Source,
    /// The leading bits of the address: all clients of a subnet.
    Subnet,
}

/// How a member is found to serve. The check runs on the member's own host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What is tried.
    pub kind: HealthKind,
    /// Port of the member; absent: the service's first TCP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Path of an HTTP request.
    #[serde(default = "default_path")]
    pub path: String,
    /// Time between two tries.
    #[serde(default = "default_interval")]
    pub interval: Millis,
    /// How long one try may take.
    #[serde(default = "default_timeout")]
    pub timeout: Millis,
    /// So many good tries in a row make a member healthy.
    #[serde(default = "default_rise")]
    pub rise: u32,
    /// So many bad tries in a row make it unhealthy.
    #[serde(default = "default_fall")]
    pub fall: u32,
}

fn default_path() -> String {
    "/".to_owned()
}

fn default_interval() -> Millis {
    Millis::secs(2)
}

fn default_timeout() -> Millis {
    Millis::secs(1)
}

fn default_rise() -> u32 {
    2
}

fn default_fall() -> u32 {
    3
}

impl HealthCheck {
    /// A check of this kind with defaults.
    #[must_use]
    pub fn new(kind: HealthKind) -> Self {
        Self {
            kind,
            port: None,
            path: default_path(),
            interval: default_interval(),
            timeout: default_timeout(),
            rise: default_rise(),
            fall: default_fall(),
        }
    }
}

/// What a health check tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthKind {
    /// A TCP connection is accepted.
    Tcp,
    /// An HTTP GET is answered with 200 to 399.
    Http,
    /// The same over TLS; the certificate is not looked at.
    Https,
    /// The guest agent answers `guest-ping`.
    Agent,
}

/// How clients' packets find the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attractor {
    /// One host answers ARP and neighbour discovery with the service's virtual MAC.
    #[default]
    Arp,
    /// Every host announces the address to routers.
    Bgp,
    /// A multicast MAC that switches deliver to all hosts of the cluster.
    Igmp,
}

impl Attractor {
    /// Whether one host at a time holds the address.
    #[must_use]
    pub const fn has_holder(self) -> bool {
        !matches!(self, Self::Bgp)
    }
}

impl fmt::Display for Attractor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Arp => "arp",
            Self::Bgp => "bgp",
            Self::Igmp => "igmp",
        })
    }
}

/// A list of members that directors steer by. The tables of a service are a pure function of its last few.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RingVersion {
    /// Grows with each list of a service.
    pub epoch: u64,
    /// Its members, sorted by VM.
    pub members: Vec<RingMember>,
    /// Of these, members that no old connection is looked for at any more: drained, or ended. Where the shares of the
    /// others lie does not change by that.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub gone: BTreeSet<VmName>,
}

/// A member in a ring.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RingMember {
    /// The VM.
    pub vm: VmName,
    /// The address of its NIC in the service's network.
    pub mac: [u8; 6],
    /// Its share.
    pub weight: u32,
}

impl RingVersion {
    /// Whether a VM is in it.
    #[must_use]
    pub fn has(&self, vm: &VmName) -> bool {
        self.members.iter().any(|member| member.vm == *vm)
    }
}

/// One service as seen from one host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Epoch of the ring that its director steers by; 0: it does not steer for this service.
    pub active: u64,
    /// Epoch of the coming ring, once its director holds it and pins are with all other directors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<u64>,
    /// Members whose VM runs here.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub members: BTreeMap<VmName, MemberReport>,
    /// Why it does not serve, or not well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// It answers for the address.
    #[serde(default)]
    pub holding: bool,
}

/// A member as seen from its own host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemberReport {
    /// What the last tries came to, with `rise` and `fall` taken into account; absent: not enough tries yet, or they
    /// are suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy: Option<bool>,
    /// Why it is not healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Connections that it still serves; said while it is being drained only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<u64>,
    /// Connections that were refused here by the service's limits; said where there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<u64>,
}

/// How a director is attached to the uplink of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UplinkMode {
    /// In the network driver.
    Driver,
    /// In the kernel's generic hook: it works, more slowly.
    Generic,
    /// The bridge has no uplink here: only guests of this host are served.
    None,
    /// It is not.
    Problem(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_people_write_them() {
        for text in ["80", "5000-5010", "53/udp", "5000-5010/udp", "65535"] {
            let range: PortRange = text.parse().unwrap();
            assert_eq!(range.to_string(), text);
            let json = serde_json::to_string(&range).unwrap();
            assert_eq!(serde_json::from_str::<PortRange>(&json).unwrap(), range);
        }
        assert_eq!("443/tcp".parse::<PortRange>().unwrap().to_string(), "443");
        for bad in [
            "", "0", "65536", "-1", "+80", "80-", "90-80", "80/sctp", "80/", "a", "1-2-3", "0-9",
        ] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_overlap_within_a_protocol_only() {
        let range = |text: &str| text.parse::<PortRange>().unwrap();
        assert!(range("80-90").overlaps(&range("90-100")));
        assert!(!range("80-89").overlaps(&range("90-100")));
        assert!(!range("53").overlaps(&range("53/udp")));
    }

    #[test]
    fn members_come_by_name_or_by_label() {
        let vm = VmName::new("web1").unwrap();
        let mut spec = ServiceSpec::new(
            NetworkName::new("lan").unwrap(),
            "10.0.0.1".parse().unwrap(),
            80,
        );
        let labels = |value: &str| {
            let tier = LabelName::new("tier").unwrap();
            BTreeMap::from([(tier, LabelName::new(value).unwrap())])
        };
        assert_eq!(spec.weight(&vm, &labels("web")), None);
        let wanted = labels("web").into_iter();
        spec.select = wanted
            .map(|(label, value)| (label, [value].into()))
            .collect();
        assert_eq!(spec.weight(&vm, &labels("web")), Some(1));
        assert_eq!(spec.weight(&vm, &labels("db")), None);
        spec.members.insert(vm.clone(), Member { weight: 3 });
        assert_eq!(spec.weight(&vm, &labels("db")), Some(3));
    }

    #[test]
    fn the_virtual_address_is_local_and_unicast() {
        let mac = ServiceId(0x0102_0304).virtual_mac();
        assert_eq!(mac, [0x02, 0x51, 0x56, 0x02, 0x03, 0x04]);
    }
}
