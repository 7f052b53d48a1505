//! Flows, the number that places them on a ring, and those that a coming ring would strand.
//!
//! Always holds: [`hash`] is what `bpf/hash.h` computes of the same flow, bit for bit (a test runs both); it is part of
//! the format that hosts share and never changes.

use crate::model::ServiceTable;
use crate::ring::{NONE, Ring};
use quorate_types::service::{Affinity, AffinityKind, Protocol, ServiceId};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One conversation of a client with a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FlowKey {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The client.
    pub client: IpAddr,
    /// Its port.
    pub client_port: u16,
    /// The service's port.
    pub port: u16,
}

/// A flow that an edge knows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// The service; `None`: the client speaks to the guest's own address.
    pub service: Option<ServiceId>,
    /// Who with whom.
    pub key: FlowKey,
    /// How long ago its last packet was seen, in milliseconds, at a resolution of a second.
    pub idle_ms: u64,
    /// Both sides have said goodbye, or one has reset it.
    pub closing: bool,
}

/// A flow that goes to a member whatever the ring says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pin {
    /// The service.
    pub service: ServiceId,
    /// The flow.
    pub flow: FlowKey,
    /// The member.
    pub mac: [u8; 6],
}

/// An address as tables hold it: 16 octets in network order, IPv4 mapped into IPv6.
#[must_use]
pub fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address that 16 octets of a table stand for.
#[must_use]
pub fn address(octets: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(octets);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

/// The leading `prefix` bits of an address; `prefix` counts from the address's own beginning.
#[must_use]
pub fn subnet(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let host = 32_u32.saturating_sub(u32::from(prefix));
            let mask = u32::MAX.checked_shl(host).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask))
        }
        IpAddr::V6(v6) => {
            let host = 128_u32.saturating_sub(u32::from(prefix));
            let mask = u128::MAX.checked_shl(host).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask))
        }
    }
}

/// What of a client counts under this affinity: its address, whole or cut.
#[must_use]
pub fn affine(affinity: &Affinity, client: IpAddr) -> IpAddr {
    match affinity.kind {
        AffinityKind::Subnet => {
            let prefix = match client {
                IpAddr::V4(_) => affinity.prefix,
                IpAddr::V6(_) => affinity.prefix6,
            };
            subnet(client, prefix)
        }
        AffinityKind::None | AffinityKind::Source => client,
    }
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
pub(crate) const LAST: u64 = 0xd6e8_feb8_6659_fd93;

pub(crate) fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(STEP);
    hash ^ (hash >> 32)
}

/// The number that places a flow on its service's ring.
#[must_use]
pub fn hash(affinity: &Affinity, flow: &FlowKey) -> u32 {
    let octets = octets(affine(affinity, flow.client));
    let word = |from: usize| {
        let mut eight = [0; 8];
        eight.copy_from_slice(&octets[from..from + 8]);
        u64::from_le_bytes(eight)
    };
    let ports = match affinity.kind {
        AffinityKind::None => {
            u64::from(flow.client_port)
                | u64::from(flow.port) << 16
                | u64::from(flow.protocol.number()) << 32
        }
        AffinityKind::Source | AffinityKind::Subnet => 0,
    };
    let hash = mix(mix(mix(STEP, word(0)), word(8)), ports).wrapping_mul(LAST);
    // The upper half is the better mixed one.
    u32::try_from(hash >> 32).unwrap_or(0)
}

/// The slot of a ring with so many slots.
#[must_use]
pub fn slot(hash: u32, slots: u32) -> u32 {
    u32::try_from((u64::from(hash) * u64::from(slots)) >> 32).unwrap_or(0)
}

/// What neither primary nor previous of the table's coming ring would reach, among the flows of one member. Of a member
/// that none of the table's rings names any more nothing can be pinned.
#[must_use]
pub fn strays_of(table: &ServiceTable, mac: [u8; 6], flows: &[Flow]) -> Vec<Pin> {
    let Some(next) = &table.next else {
        return Vec::new();
    };
    let mut rings = table.history.iter().chain([next]);
    if !rings.any(|ring| ring.members.iter().any(|member| member.mac == mac)) {
        return Vec::new();
    }
    let mut history = table.history.clone();
    history.push(next.clone());
    let Some(ring) = Ring::build(&history, None, table.slots) else {
        return Vec::new();
    };
    let has =
        |index: u16| index != NONE && ring.member(index).is_some_and(|member| member.mac == mac);
    let stray = |flow: &&Flow| {
        let slot = slot(hash(&table.affinity, &flow.key), table.slots);
        let slot = ring.slots[slot as usize];
        !has(slot.primary) && !has(slot.previous)
    };
    flows
        .iter()
        .filter(|flow| flow.service == Some(table.id) && !flow.closing)
        .filter(stray)
        .map(|flow| Pin {
            service: table.id,
            flow: flow.key,
            mac,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(client: &str, client_port: u16) -> FlowKey {
        FlowKey {
            protocol: Protocol::Tcp,
            client: client.parse().unwrap(),
            client_port,
            port: 80,
        }
    }

    #[test]
    fn addresses_round_trip_and_subnets_are_cut() {
        for text in ["10.1.2.3", "fd00::1", "0.0.0.0", "::1"] {
            let parsed: IpAddr = text.parse().unwrap();
            assert_eq!(address(octets(parsed)), parsed);
        }
        let cut = |text: &str, prefix| subnet(text.parse().unwrap(), prefix).to_string();
        assert_eq!(cut("10.1.2.3", 24), "10.1.2.0");
        assert_eq!(cut("10.1.2.3", 0), "0.0.0.0");
        assert_eq!(cut("10.1.2.3", 40), "10.1.2.3");
        assert_eq!(cut("fd00:1:2:3:4::5", 64), "fd00:1:2:3::");
    }

    #[test]
    fn affinity_decides_what_counts() {
        let mut affinity = Affinity::default();
        let both =
            |affinity: &Affinity, a: FlowKey, b: FlowKey| (hash(affinity, &a), hash(affinity, &b));
        let (a, b) = both(&affinity, flow("10.0.0.1", 1000), flow("10.0.0.1", 1001));
        assert_ne!(a, b);
        affinity.kind = AffinityKind::Source;
        let (a, b) = both(&affinity, flow("10.0.0.1", 1000), flow("10.0.0.1", 1001));
        assert_eq!(a, b);
        let (a, b) = both(&affinity, flow("10.0.0.1", 1000), flow("10.0.0.2", 1000));
        assert_ne!(a, b);
        affinity.kind = AffinityKind::Subnet;
        let (a, b) = both(&affinity, flow("10.0.0.1", 1000), flow("10.0.0.200", 9));
        assert_eq!(a, b);
    }

    #[test]
    fn hashes_are_part_of_the_format() {
        let none = Affinity::default();
        assert_eq!(hash(&none, &flow("192.0.2.1", 40000)), FIXED.0);
        assert_eq!(hash(&none, &flow("2001:db8::1", 40000)), FIXED.1);
    }

    const FIXED: (u32, u32) = (1664737330, 3147783770);

    #[test]
    fn sequential_clients_spread_evenly() {
        let mut counts = [0_u32; 16];
        for last in 0..=255_u8 {
            for port in 0..256_u16 {
                let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, last));
                let key = FlowKey {
                    client,
                    ..flow("10.0.0.1", 32768 + port)
                };
                counts[slot(hash(&Affinity::default(), &key), 16) as usize] += 1;
            }
        }
        // 4096 each; five standard deviations are 310.
        assert!(
            counts.iter().all(|count| count.abs_diff(4096) < 310),
            "{counts:?}"
        );
    }

    #[test]
    fn slots_stay_in_range() {
        assert_eq!(slot(0, 65537), 0);
        assert_eq!(slot(u32::MAX, 65537), 65536);
        assert_eq!(slot(u32::MAX, 1), 0);
    }
}
