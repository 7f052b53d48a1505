//! What the kernel's tables look like: `bpf/abi.h` in Rust.
//!
//! Always holds: every structure has the size and the offsets of its C twin (asserted here for the compiler, and by a
//! test that loads the object), and no padding: all octets of a key are compared. Addresses are in network order.

use crate::flow;
use crate::ring::{self, Slot};
use std::net::{IpAddr, Ipv4Addr};

/// Grows with every change of a map's key or value: maps of another version are not taken over.
pub const ABI_VERSION: u32 = 2;
/// No member.
pub const NO_MEMBER: u16 = u16::MAX;
/// Port ranges of one address, and of all services of one member that its edge can tell without a flow.
pub const MAX_RANGES: usize = 32;
/// Addresses that a guest may use.
pub const MAX_ALLOWED: usize = 8;

/// An address: 16 octets in network order, IPv4 mapped into IPv6; as words, which are only compared.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Address {
    /// The first eight octets.
    pub high: u64,
    /// The last eight.
    pub low: u64,
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let octets = u128::from_be_bytes(flow::octets(address)).to_be_bytes();
        let word = |from: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&octets[from..from + 8]);
            u64::from_ne_bytes(eight)
        };
        Self {
            high: word(0),
            low: word(8),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let mut octets = [0; 16];
        octets[..8].copy_from_slice(&address.high.to_ne_bytes());
        octets[8..].copy_from_slice(&address.low.to_ne_bytes());
        flow::address(octets)
    }
}

/// An IPv4 address as a word in network order.
#[must_use]
pub fn word(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// Key of `vips4`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Vip4Key {
    /// Interface index of the uplink; of the bridge where there is none.
    pub scope: u32,
    /// The address, in network order.
    pub address: u32,
}

/// Key of `vips6`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Vip6Key {
    /// Interface index of the uplink; of the bridge where there is none.
    pub scope: u32,
    /// Zero.
    pub zero: u32,
    /// The address.
    pub address: Address,
}

/// Ports of a service.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Range {
    /// 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
    /// Index into `services`.
    pub service: u16,
}

/// This host answers for the address on the wire.
pub const VIP_HOLDER: u32 = 1;
/// Routers send to the host's own MAC.
pub const VIP_ROUTED: u32 = 2;
/// Every host gets every frame and serves its own members.
pub const VIP_MULTICAST: u32 = 4;

/// A service address.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vip {
    /// Ranges in use.
    pub count: u32,
    /// `VIP_*`.
    pub flags: u32,
    /// What its frames come from.
    pub virtual_mac: [u8; 6],
    /// What ARP and neighbour discovery answer.
    pub told_mac: [u8; 6],
    /// Where routers send to.
    pub host_mac: [u8; 6],
    /// Zero.
    pub zero: [u8; 6],
    /// Its ports.
    pub ranges: [Range; MAX_RANGES],
}

/// The client's address decides alone.
pub const AFFINITY_CLIENT: u8 = 1;
/// A part of it does.
pub const AFFINITY_SUBNET: u8 = 2;
/// There are pins.
pub const SERVICE_PINS: u8 = 1;
/// There is an entry in `limits`.
pub const SERVICE_LIMITS: u8 = 4;

/// A service.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Service {
    /// Its number; 0: the entry is free.
    pub id: u32,
    /// Slots of its ring; 0: none.
    pub slots: u32,
    /// Index into `few_rings` if [`ring::FEW_SLOTS`] are enough, else into `rings`.
    pub ring: u32,
    /// 0 or `AFFINITY_*`.
    pub affinity: u8,
    /// `SERVICE_*`.
    pub flags: u8,
    /// Its virtual MAC.
    pub virtual_mac: [u8; 6],
    /// Its IPv4 address.
    pub address4: u32,
    /// What of an IPv4 client counts.
    pub mask4: u32,
    /// How long clients are remembered, in units of 2^30 ns; 0: not.
    pub remember_s: u32,
    /// Zero.
    pub zero: u32,
    /// Its IPv6 address.
    pub address6: Address,
    /// What of an IPv6 client counts.
    pub mask6: Address,
    /// Until then unknown UDP flows get a second chance.
    pub udp_until_ns: u64,
}

/// Places that an address's door may be in, from the one that its hash names.
pub const DOOR_PROBES: u32 = 4;
/// Ports and ranges that a door has room for.
pub const DOOR_OPENINGS: usize = 5;

/// Ports of a door.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Opening {
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
    /// 6 or 17; 0: none.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

/// What a director needs of an address and the first service there.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Door {
    /// The address.
    pub address: Address,
    /// Where it is a service's.
    pub scope: u32,
    /// Slots of the service's ring; 0: no door.
    pub slots: u32,
    /// As [`Service::ring`].
    pub ring: u32,
    /// Index into `services`.
    pub service: u16,
    /// As [`Service::affinity`].
    pub affinity: u8,
    /// Zero.
    pub zero: u8,
    /// Ports.
    pub openings: [Opening; DOOR_OPENINGS],
    /// Zero.
    pub zero2: u16,
}

/// Whether a ring of so many slots is in `few_rings`.
#[must_use]
pub fn is_few(slots: u32) -> bool {
    slots <= ring::FEW_SLOTS
}

/// A ring as the kernel has it: the members of all slots of its size, then those that had the slots before.
#[must_use]
pub fn ring_image(slots: &[Slot]) -> Vec<u16> {
    let few = is_few(u32::try_from(slots.len()).unwrap_or(u32::MAX));
    let size = if few { ring::FEW_SLOTS } else { ring::SLOTS } as usize;
    let mut image = vec![NO_MEMBER; 2 * size];
    let (primary, previous) = image.split_at_mut(size);
    for ((slot, primary), previous) in slots.iter().zip(primary).zip(previous) {
        *primary = slot.primary;
        *previous = slot.previous;
    }
    image
}

/// A member.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Member {
    /// Its MAC.
    pub mac: [u8; 6],
    /// 1: the entry is used.
    pub used: u16,
    /// Its tap, if it runs here.
    pub ifindex: u32,
}

/// The director delivers here.
pub const EDGE_OPEN: u16 = 1;
/// What comes is sent after the guest.
pub const EDGE_FORWARD: u16 = 2;
/// [`crate::Guard::mac`].
pub const GUARD_MAC: u16 = 16;
/// [`crate::Guard::address`].
pub const GUARD_ADDRESS: u16 = 32;
/// [`crate::Guard::dhcp_server`].
pub const GUARD_DHCP: u16 = 64;
/// [`crate::Guard::router_advertisement`].
pub const GUARD_ROUTER: u16 = 128;

/// An edge.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// The network's scope.
    pub scope: u32,
    /// Interface index of its uplink, or 0.
    pub uplink: u32,
    /// Interface index of its bridge.
    pub bridge: u32,
    /// Index into `members`.
    pub member: u16,
    /// `EDGE_*` and `GUARD_*`.
    pub flags: u16,
    /// The guest's MAC.
    pub mac: [u8; 6],
    /// Ranges in use.
    pub count: u16,
    /// The guest's IPv4 address, or 0.
    pub address4: u32,
    /// Allowed addresses in use.
    pub allowed_count: u32,
    /// The guest's IPv6 address, or zero.
    pub address6: Address,
    /// What it may use as a source.
    pub allowed: [Address; MAX_ALLOWED],
    /// Ports of the services that it is a member of.
    pub ranges: [Range; MAX_RANGES],
}

/// Key of `flows`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowKey {
    /// The tap.
    pub ifindex: u32,
    /// The client's port.
    pub client_port: u16,
    /// The service's port.
    pub port: u16,
    /// The client.
    pub client: Address,
    /// 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 7],
}

/// The flow is a service's.
pub const FLOW_OWNED: u8 = 1;
/// The client speaks to the guest's own address.
pub const FLOW_DIRECT: u8 = 2;
/// The guest's reset, or the client's.
pub const FLOW_RESET: u8 = 4;
/// Goodbyes of both sides.
pub const FLOW_FINS: u8 = 3;

/// A flow at an edge.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    /// When it was seen last: CLOCK_BOOTTIME in units of 2^30 ns.
    pub seen: u32,
    /// Index into `services`.
    pub service: u16,
    /// `FLOW_OWNED`, `FLOW_DIRECT` or 3 for a guest that calls itself.
    pub kind: u8,
    /// Goodbyes and resets.
    pub bits: u8,
}

/// Key of `pins`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PinKey {
    /// Index into `services`.
    pub service: u32,
    /// The client's port.
    pub client_port: u16,
    /// The service's port.
    pub port: u16,
    /// The client.
    pub client: Address,
    /// 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 7],
}

/// A pin.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pin {
    /// When it was used last: CLOCK_BOOTTIME in units of 2^30 ns.
    pub seen: u32,
    /// Index into `members`.
    pub member: u16,
    /// Zero.
    pub zero: u16,
}

/// Key of `duplicates`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DuplicateKey {
    /// Where the address is a service's.
    pub scope: u32,
    /// Zero.
    pub zero: u32,
    /// The address.
    pub address: Address,
}

/// A station that claims a service's address.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Duplicate {
    /// Who.
    pub mac: [u8; 6],
    /// Zero.
    pub zero: u16,
    /// Where it was heard.
    pub ifindex: u32,
    /// Zero.
    pub zero2: u32,
    /// When, on CLOCK_BOOTTIME.
    pub seen_ns: u64,
    /// How often.
    pub count: u64,
}

/// What a director counts of a service.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServiceCount {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Services in a row whose counts are one element of `counts`.
pub const COUNTED: u32 = 64;

/// Counts of services in a row.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceCounts {
    /// By the service's index, its rest by [`COUNTED`].
    pub of: [ServiceCount; COUNTED as usize],
}

/// Key of `pairs`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct PairKey {
    /// The tap.
    pub ifindex: u32,
    /// Index into `services`.
    pub service: u32,
}

/// What an edge counts of a service.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PairCount {
    /// Packets to the guest.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets of the guest.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Flows begun.
    pub flows: u64,
}

/// Nanoseconds between two flows that begin at a member; 0: any number may.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Of all clients.
    pub member_ns: u64,
    /// Of one.
    pub client_ns: u64,
}

/// A member's pace in a service with limits.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pace {
    /// When the next flow would be due if all came evenly.
    pub due_ns: u64,
    /// Flows that were one too many.
    pub refused: u64,
}

/// Frames that a guest was kept from sending.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offence {
    /// With another's address.
    pub spoofed: u64,
    /// Answers of a DHCP server.
    pub dhcp: u64,
    /// Router advertisements and redirects.
    pub router: u64,
}

/// What became of frames, in the order of `enum cause`.
pub const CAUSES: [&str; 24] = [
    "no-lease",
    "malformed",
    "no-service",
    "no-port",
    "no-member",
    "elsewhere",
    "fragment",
    "icmp",
    "spoofed",
    "dhcp-server",
    "router-advertisement",
    "address-claimed",
    "arp-answered",
    "nd-answered",
    "echo-answered",
    "bounced",
    "returned",
    "forwarded",
    "straggler",
    "pinned",
    "self-call",
    "tagged",
    "kernel-error",
    "limited",
];

/// A CPU's clock and counters.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// When the clock was read last.
    pub tick: u64,
    /// CLOCK_BOOTTIME then.
    pub now_ns: u64,
    /// Whether the lease held.
    pub serving: u32,
    /// Zero.
    pub zero: u32,
    /// By [`CAUSES`].
    pub causes: [u64; 32],
}

/// The host.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// Source of what its director forwards.
    pub director_mac: [u8; 6],
    /// Source of what its edges send on.
    pub bounced_mac: [u8; 6],
    /// Source of what its edges send back.
    pub final_mac: [u8; 6],
    /// Some service is routed or multicast.
    pub unusual: u8,
    /// Zero.
    pub zero: u8,
    /// Places that the hash of an address may name.
    pub doors: u32,
}

/// Octets of a frame that measurements restore.
pub const SERIES_FRAME: usize = 96;

/// What measurements run on.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Series {
    /// The last four octets of the first service's address, as a number.
    pub first: u32,
    /// Services in turn; 0: the frame stays as it is.
    pub services: u32,
    /// Frames so far.
    pub number: u32,
    /// What `calibrate` returns.
    pub verdict: u32,
    /// The frame.
    pub frame: [u8; SERIES_FRAME],
}

macro_rules! sizes {
    ($($name:ident = $size:expr),* $(,)?) => {
        $(const _: () = assert!(size_of::<$name>() == $size);)*

        /// Sizes of the structures by their C names, for the test that compares them with the object's.
        pub const SIZES: &[(&str, usize)] = &[$((stringify!($name), $size)),*];
    };
}

sizes!(
    Vip4Key = 8,
    Vip6Key = 24,
    Vip = 288,
    Service = 80,
    Opening = 6,
    Door = 64,
    Member = 12,
    Edge = 432,
    FlowKey = 32,
    Flow = 8,
    PinKey = 32,
    Pin = 8,
    DuplicateKey = 24,
    Duplicate = 32,
    ServiceCount = 16,
    ServiceCounts = 1024,
    PairKey = 8,
    PairCount = 40,
    Limit = 16,
    Pace = 16,
    Offence = 24,
    Cpu = 280,
    Config = 24,
    Series = 112,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in ["10.1.2.3", "fd00::1", "0.0.0.0"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(address)), address);
        }
        let zero = Address::from("::".parse::<IpAddr>().unwrap());
        assert_eq!(zero, Address::default());
    }

    #[test]
    fn every_cause_of_the_programs_has_a_name() {
        let header = include_str!("../bpf/abi.h");
        let in_c = header
            .lines()
            .filter(|line| line.trim().starts_with("CAUSE_"));
        assert_eq!(in_c.count(), CAUSES.len());
        let version = format!("#define ABI_VERSION {ABI_VERSION}");
        assert!(header.contains(&version));
        for (name, value) in [
            ("SLOTS", ring::SLOTS),
            ("FEW_SLOTS", ring::FEW_SLOTS),
            ("DOOR_PROBES", DOOR_PROBES),
            ("COUNTED", COUNTED),
        ] {
            let line = format!("#define {name} {value}\n");
            assert!(header.contains(&line), "{line}");
        }
    }

    #[test]
    fn a_ring_is_laid_out_for_its_size() {
        let slot = |number: u16| Slot {
            primary: number,
            previous: number + 1,
            next: 0,
        };
        for (count, size) in [
            (7_u16, ring::FEW_SLOTS),
            (4_099, ring::FEW_SLOTS),
            (4_100, ring::SLOTS),
        ] {
            let slots: Vec<Slot> = (0..count).map(slot).collect();
            let (image, size, count) = (ring_image(&slots), size as usize, usize::from(count));
            assert_eq!(image.len(), 2 * size);
            assert_eq!(image[count - 1], slots[count - 1].primary);
            assert_eq!(image[size + count - 1], slots[count - 1].previous);
            let rest = image[count..size].iter().chain(&image[size + count..]);
            assert!(rest.clone().all(|member| *member == NO_MEMBER));
        }
    }
}
