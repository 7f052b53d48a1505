//! MAC addresses of the datapath: who answers, who steered, who bounced.
//!
//! Always holds: all are locally administered unicast addresses below `02:51`; a frame that a director or an edge sends
//! on has the sender's own address as its source, so that no switch learns a client's or a service's MAC there, and
//! every station can tell how often a frame has been sent on.

use quorate_types::{NodeId, service::ServiceId};

/// Leading octets of a service's virtual address, the one that clients are told.
pub const VIRTUAL: [u8; 3] = [0x02, 0x51, 0x56];
/// Leading octets of a director: the source of what it forwards to another host.
pub const DIRECTOR: [u8; 3] = [0x02, 0x51, 0x44];
/// Leading octets of a frame that an edge sent on to the member it takes for the flow's owner.
pub const BOUNCED: [u8; 3] = [0x02, 0x51, 0x42];
/// Leading octets of a frame that was sent back: whoever gets it serves it.
pub const FINAL: [u8; 3] = [0x02, 0x51, 0x46];

/// Leading octets of a frame that came for a guest while it changed hosts: what an edge had to do with it is done.
pub const HELD: [u8; 3] = [0x02, 0x51, 0x48];

fn with_number(prefix: [u8; 3], number: u64) -> [u8; 6] {
    let [.., x, y, z] = number.to_be_bytes();
    let [a, b, c] = prefix;
    [a, b, c, x, y, z]
}

/// The virtual address of a service.
#[must_use]
pub fn virtual_mac(service: ServiceId) -> [u8; 6] {
    service.virtual_mac()
}

/// The address of a host's director.
#[must_use]
pub fn director_mac(node: NodeId) -> [u8; 6] {
    with_number(DIRECTOR, node)
}

/// The source of frames that a host's edges send on.
#[must_use]
pub fn bounced_mac(node: NodeId) -> [u8; 6] {
    with_number(BOUNCED, node)
}

/// The source of frames that a host's edges send back.
#[must_use]
pub fn final_mac(node: NodeId) -> [u8; 6] {
    with_number(FINAL, node)
}

/// The source of frames that waited on this host for a guest which runs elsewhere now.
#[must_use]
pub fn held_mac(node: NodeId) -> [u8; 6] {
    with_number(HELD, node)
}

/// The cluster's multicast address for a service (attractor `igmp`), and the group that stands for it: `239.81.x.y` of
/// the service's number, mapped to a MAC as RFC 1112 says.
#[must_use]
pub fn multicast(service: ServiceId) -> (std::net::Ipv4Addr, [u8; 6]) {
    let [.., x, y] = service.0.to_be_bytes();
    (
        std::net::Ipv4Addr::new(239, 81, x, y),
        [0x01, 0x00, 0x5e, 81, x, y],
    )
}

/// As people write it.
#[must_use]
pub fn text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_local_unicast_and_differ() {
        let all = [
            virtual_mac(ServiceId(1)),
            director_mac(1),
            bounced_mac(1),
            final_mac(1),
            held_mac(1),
        ];
        for (index, mac) in all.iter().enumerate() {
            assert_eq!(mac[0] & 3, 2);
            assert!(!all[..index].contains(mac));
        }
        assert_eq!(text(director_mac(0x0102_0304)), "02:51:44:02:03:04");
        assert_eq!(multicast(ServiceId(0x1234)).1, [1, 0, 0x5e, 81, 0x12, 0x34]);
    }
}
