//! Announcements: the frames that make switches and neighbours look for a guest in
//! its new place, and when to send them. Pure; a driver only sends.
//!
//! A reverse ARP request teaches switches which port leads to the MAC and needs no
//! address. Where the guest's address is known, neighbours are refreshed in addition: a
//! gratuitous ARP request for IPv4, an unsolicited neighbour advertisement to all nodes
//! for IPv6. All come *from the guest's MAC*. Frames are lost while links and spanning trees settle, hence several rounds, soon dense and
//! later sparse, and never endless.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::MacAddr;

/// The shortest Ethernet frame, without its checksum.
const FRAME_LEN: usize = 60;

/// One guest NIC to announce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The bridge to announce on: the frames reach all its ports.
    pub bridge: String,
    /// The guest's address.
    pub mac: MacAddr,
    /// The guest's address, where known.
    pub address: Option<IpAddr>,
}

/// When the rounds of an announcement are sent, counted from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    offsets_ms: &'static [u64],
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            offsets_ms: &[0, 20, 60, 150, 350, 750, 1500],
        }
    }
}

impl Schedule {
    /// The wait before each round, in order; the first is zero.
    pub fn waits(self) -> impl Iterator<Item = Duration> {
        let mut before = 0;
        self.offsets_ms.iter().map(move |&offset| {
            let wait = offset - before;
            before = offset;
            Duration::from_millis(wait)
        })
    }

    /// Time from the first round to the last.
    pub fn length(self) -> Duration {
        Duration::from_millis(self.offsets_ms.last().copied().unwrap_or(0))
    }
}

impl Announcement {
    /// The frames of one round.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        const ETHERTYPE_RARP: u16 = 0x8035;
        const ETHERTYPE_ARP: u16 = 0x0806;
        const RARP_REQUEST: u16 = 3;
        const ARP_REQUEST: u16 = 1;
        let nobody = Ipv4Addr::UNSPECIFIED;
        let mut frames = vec![frame(
            self.mac,
            ETHERTYPE_RARP,
            RARP_REQUEST,
            nobody,
            self.mac.octets(),
        )];
        frames.extend(self.address.map(|address| match address {
            IpAddr::V4(address) => frame(self.mac, ETHERTYPE_ARP, ARP_REQUEST, address, [0; 6]),
            IpAddr::V6(address) => neighbour_advertisement(self.mac, self.mac, address),
        }));
        frames
    }
}

/// An ARP-shaped broadcast frame: sender and target have the same protocol address.
fn frame(
    source: MacAddr,
    ethertype: u16,
    operation: u16,
    address: Ipv4Addr,
    target: [u8; 6],
) -> Vec<u8> {
    let mut frame = ethernet(MacAddr::BROADCAST.octets(), source, ethertype);
    // Ethernet and IPv4, with addresses of 6 and 4 bytes.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(source.octets());
    frame.extend(address.octets());
    frame.extend(target);
    frame.extend(address.octets());
    frame.resize(FRAME_LEN, 0);
    frame
}

/// An ARP question to all for `asked`, from a sender that says it is `sender` at `told`.
pub(crate) fn arp_frame(
    source: MacAddr,
    told: MacAddr,
    sender: Ipv4Addr,
    asked: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = frame(source, 0x0806, 1, sender, [0; 6]);
    frame[22..28].copy_from_slice(&told.octets());
    frame[38..42].copy_from_slice(&asked.octets());
    frame
}

fn ethernet(to: [u8; 6], source: MacAddr, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(to);
    frame.extend(source.octets());
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// An unsolicited neighbour advertisement to all nodes (RFC 4861, 7.2.6), which replaces the link-layer
/// address that neighbours have. It says that the guest is no router, since that is not known here: hosts
/// that use the guest as a default router take it up again with its next router advertisement. `told` is the
/// link-layer address that neighbours take.
pub(crate) fn neighbour_advertisement(
    source: MacAddr,
    told: MacAddr,
    address: Ipv6Addr,
) -> Vec<u8> {
    const ETHERTYPE_IPV6: u16 = 0x86dd;
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ICMPV6: u8 = 58;
    const ADVERTISEMENT: u8 = 136;
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_LAYER: u8 = 2;
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([TARGET_LINK_LAYER, 1]);
    message.extend(told.octets());
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    // The checksum covers a pseudo header of both addresses, the length and the protocol.
    let mut summed = [address.octets(), ALL_NODES.octets()].concat();
    summed.extend(u32::from(length).to_be_bytes());
    summed.extend([0, 0, 0, ICMPV6]);
    summed.extend(&message);
    message[2..4].copy_from_slice(&internet_checksum(&summed).to_be_bytes());
    // The group's MAC (RFC 2464, 7).
    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], source, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    // The hop limit proves that no router passed it on.
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// The checksum of RFC 1071 over an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr::new([2, 0x5e, 0x10, 0, 0, 1]);

    fn announcement(address: Option<IpAddr>) -> Announcement {
        Announcement {
            bridge: "br0".into(),
            mac: MAC,
            address,
        }
    }

    #[test]
    fn without_an_address_only_the_reverse_arp_is_sent() {
        let frames = announcement(None).frames();
        assert_eq!(frames.len(), 1);
        // RFC 903: request reverse, asking for oneself.
        assert_eq!(
            frames[0][..42],
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0x5e, 0x10, 0, 0, 1, 0x80, 0x35, 0, 1, 8, 0,
                6, 4, 0, 3, 2, 0x5e, 0x10, 0, 0, 1, 0, 0, 0, 0, 2, 0x5e, 0x10, 0, 0, 1, 0, 0, 0, 0
            ]
        );
    }

    #[test]
    fn with_an_address_an_arp_announcement_follows() {
        let frames = announcement(Some([10, 1, 2, 3].into())).frames();
        assert_eq!(frames.len(), 2);
        // RFC 5227: sender and target address are both the announced one.
        assert_eq!(
            frames[1][..42],
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0x5e, 0x10, 0, 0, 1, 0x08, 0x06, 0, 1, 8, 0,
                6, 4, 0, 1, 2, 0x5e, 0x10, 0, 0, 1, 10, 1, 2, 3, 0, 0, 0, 0, 0, 0, 10, 1, 2, 3
            ]
        );
    }

    #[test]
    fn with_an_ipv6_address_a_neighbour_advertisement_follows() {
        let address: Ipv6Addr = "fd00::5".parse().unwrap();
        let frames = announcement(Some(address.into())).frames();
        assert_eq!(frames.len(), 2);
        let frame = &frames[1];
        assert_eq!(frame.len(), 14 + 40 + 32);
        // To all nodes, from the guest; IPv6 with 32 bytes of ICMPv6 and hop limit 255.
        assert_eq!(
            frame[..22],
            [
                0x33, 0x33, 0, 0, 0, 1, 2, 0x5e, 0x10, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 32,
                58, 255
            ]
        );
        assert_eq!(frame[22..38], address.octets());
        assert_eq!(frame[38..40], [0xff, 0x02]);
        // An advertisement that overrides and answers nobody, with the target's link-layer address.
        assert_eq!((frame[54], frame[58]), (136, 0x20));
        assert_eq!(frame[62..78], address.octets());
        assert_eq!(frame[78..], [2, 1, 2, 0x5e, 0x10, 0, 0, 1]);
        // A receiver's sum over the pseudo header and the message, checksum included, is zero.
        let mut summed = frame[22..54].to_vec();
        summed.extend([0, 0, 0, 32, 0, 0, 0, 58]);
        summed.extend(&frame[54..]);
        assert_eq!(internet_checksum(&summed), 0);
    }

    #[test]
    fn the_schedule_begins_at_once_and_ends() {
        let waits: Vec<_> = Schedule::default().waits().collect();
        assert_eq!(waits[0], Duration::ZERO);
        assert!(waits.len() >= 5);
        assert!(waits.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(waits.iter().sum::<Duration>(), Schedule::default().length());
        assert!(Schedule::default().length() <= Duration::from_secs(2));
    }
}
