//! Announcements: the frames that make switches and neighbours look for a guest in
//! its new place, and when to send them. Pure; a driver only sends.
//!
//! A reverse ARP request teaches switches which port leads to the MAC and needs no
//! address; a gratuitous ARP request in addition refreshes neighbours where the
//! guest's IPv4 address is known. Both are broadcasts *from the guest's MAC*. Frames
//! are lost while links and spanning trees settle, hence several rounds, soon dense and
//! later sparse, and never endless.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::MacAddr;

/// The shortest Ethernet frame, without its checksum.
pub const FRAME_LEN: usize = 60;

/// One guest NIC to announce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The bridge to announce on: the frames reach all its ports.
    pub bridge: String,
    /// The guest's address.
    pub mac: MacAddr,
    /// The guest's IPv4 address, where known.
    pub ipv4: Option<Ipv4Addr>,
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
    pub fn frames(&self) -> Vec<[u8; FRAME_LEN]> {
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
        if let Some(address) = self.ipv4 {
            frames.push(frame(self.mac, ETHERTYPE_ARP, ARP_REQUEST, address, [0; 6]));
        }
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
) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[0..6].copy_from_slice(&MacAddr::BROADCAST.octets());
    frame[6..12].copy_from_slice(&source.octets());
    frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
    // Ethernet and IPv4, with addresses of 6 and 4 bytes.
    frame[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame[20..22].copy_from_slice(&operation.to_be_bytes());
    frame[22..28].copy_from_slice(&source.octets());
    frame[28..32].copy_from_slice(&address.octets());
    frame[32..38].copy_from_slice(&target);
    frame[38..42].copy_from_slice(&address.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr::new([2, 0x5e, 0x10, 0, 0, 1]);

    fn announcement(ipv4: Option<Ipv4Addr>) -> Announcement {
        Announcement {
            bridge: "br0".into(),
            mac: MAC,
            ipv4,
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
        let frames = announcement(Some(Ipv4Addr::new(10, 1, 2, 3))).frames();
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
    fn the_schedule_begins_at_once_and_ends() {
        let waits: Vec<_> = Schedule::default().waits().collect();
        assert_eq!(waits[0], Duration::ZERO);
        assert!(waits.len() >= 5);
        assert!(waits.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(waits.iter().sum::<Duration>(), Schedule::default().length());
        assert!(Schedule::default().length() <= Duration::from_secs(2));
    }
}
