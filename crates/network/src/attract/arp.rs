//! Announcements of virtual MACs of services: what to send, and when. Pure but for [`Sender`].
//!
//! Always holds: an address that was taken over is announced at once and several times, since frames are lost while
//! links settle; after that each virtual MAC is a source of frames at least every [`REFRESH`], more often than switches
//! forget (300 s by default, 10 s and more in practice), or less often only to stay below [`PER_SECOND`] frames.
//!
//! Each round also *probes*: an ARP question for the address from nobody. No host of the cluster answers it (the holder
//! does not hear itself), so whoever does claims an address that is not its own; the datapath notes it.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use crate::announce::{arp_frame, neighbour_advertisement};
use crate::linux::packet::PacketSocket;
use crate::{MacAddr, Schedule};

/// Between two announcements of one address.
pub const REFRESH: Duration = Duration::from_secs(4);
/// Most announcements per second: with more addresses than that allows, each is refreshed less often.
pub const PER_SECOND: u32 = 500;
/// Most announcements at a time, so that a burst does not overrun a queue.
const AT_A_TIME: usize = 200;

/// An address that this host holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// The interface that it is announced on.
    pub uplink: String,
    /// The address.
    pub address: IpAddr,
    /// Source of the frames: the service's virtual MAC.
    pub source: MacAddr,
    /// What neighbours are told: the same, or the multicast MAC of an `igmp` service.
    pub told: MacAddr,
}

impl Held {
    /// The frames of one announcement.
    #[must_use]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        match self.address {
            IpAddr::V4(address) => vec![
                arp_frame(self.source, self.told, address, address),
                arp_frame(self.source, self.source, Ipv4Addr::UNSPECIFIED, address),
            ],
            IpAddr::V6(address) => vec![neighbour_advertisement(self.source, self.told, address)],
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Turn {
    since: Duration,
    round: usize,
    next: Duration,
}

/// Which addresses are held, and when each is announced next.
#[derive(Debug, Default)]
pub struct Announcer {
    held: BTreeMap<Held, Turn>,
}

impl Announcer {
    /// Takes note of what is held from `now` on. What is new is due at once.
    pub fn hold(&mut self, wanted: impl IntoIterator<Item = Held>, now: Duration) {
        let mut before = std::mem::take(&mut self.held);
        for held in wanted {
            let turn = before.remove(&held).unwrap_or(Turn {
                since: now,
                round: 0,
                next: now,
            });
            self.held.insert(held, turn);
        }
    }

    /// Announces everything from the beginning, as after a take-over: a lease has come back.
    pub fn again(&mut self, now: Duration) {
        for turn in self.held.values_mut() {
            *turn = Turn {
                since: now,
                round: 0,
                next: now,
            };
        }
    }

    /// What is to be announced now: the most overdue first.
    pub fn due(&mut self, now: Duration) -> Vec<Held> {
        let refresh = self.refresh();
        let mut due: Vec<(Duration, Held)> = self
            .held
            .iter()
            .filter(|(_, turn)| turn.next <= now)
            .map(|(held, turn)| (turn.next, held.clone()))
            .collect();
        due.sort();
        due.truncate(AT_A_TIME);
        for (_, held) in &due {
            if let Some(turn) = self.held.get_mut(held) {
                turn.round += 1;
                turn.next = match offset(turn.round) {
                    Some(offset) => turn.since + offset,
                    None => now + refresh,
                };
            }
        }
        due.into_iter().map(|(_, held)| held).collect()
    }

    /// When something is due next.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.held.values().map(|turn| turn.next).min()
    }

    fn refresh(&self) -> Duration {
        let count = u32::try_from(self.held.len()).unwrap_or(u32::MAX);
        REFRESH.max(Duration::from_secs(1).saturating_mul(count / PER_SECOND))
    }
}

/// When a round of the first ones is sent, from the take-over on.
fn offset(round: usize) -> Option<Duration> {
    let mut at = Duration::ZERO;
    for (index, wait) in Schedule::default().waits().enumerate() {
        at += wait;
        if index == round {
            return Some(at);
        }
    }
    None
}

/// Sends frames out of interfaces; a socket for each, opened when first used.
#[derive(Debug, Default)]
pub struct Sender {
    sockets: BTreeMap<String, PacketSocket>,
}

impl Sender {
    /// Sends a frame.
    ///
    /// # Errors
    /// When the interface is missing or down, or its queue is full. The next frame opens it anew.
    pub fn send(&mut self, interface: &str, frame: &[u8]) -> io::Result<()> {
        let socket = match self.sockets.remove(interface) {
            Some(socket) => socket,
            None => PacketSocket::sender(index(interface)?)?,
        };
        socket.send(frame)?;
        self.sockets.insert(interface.to_owned(), socket);
        Ok(())
    }
}

/// Index of an interface of this network namespace.
///
/// # Errors
/// When there is no such interface.
pub fn index(interface: &str) -> io::Result<u32> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(netdevice::name_to_index(&socket, interface)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn held(last: u8) -> Held {
        let mac = MacAddr::new([0x02, 0x51, 0x56, 0, 0, last]);
        Held {
            uplink: "up0".into(),
            address: IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)),
            source: mac,
            told: mac,
        }
    }

    #[test]
    fn what_is_taken_over_is_announced_at_once_densely_and_then_again_and_again() {
        let mut announcer = Announcer::default();
        announcer.hold([held(1)], MS * 100);
        let mut times = Vec::new();
        let mut now = MS * 100;
        while now < Duration::from_secs(30) {
            if !announcer.due(now).is_empty() {
                times.push(now);
            }
            now = announcer.next().unwrap();
        }
        assert_eq!(times[0], MS * 100);
        assert_eq!(times[1], MS * 120);
        let first_seconds = times.iter().filter(|at| **at < Duration::from_secs(2));
        assert_eq!(first_seconds.count(), 7);
        let widest = times.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert_eq!(widest, Some(REFRESH));
    }

    #[test]
    fn what_is_held_already_keeps_its_turn_and_what_is_not_held_is_silent() {
        let mut announcer = Announcer::default();
        announcer.hold([held(1), held(2)], MS);
        assert_eq!(announcer.due(MS).len(), 2);
        announcer.hold([held(1), held(3)], MS * 2);
        assert_eq!(announcer.due(MS * 2), [held(3)]);
        announcer.hold([], MS * 3);
        assert_eq!(announcer.next(), None);
        announcer.hold([held(1)], MS * 4);
        assert_eq!(announcer.due(MS * 4), [held(1)], "it was taken over anew");
        announcer.again(MS * 5);
        assert_eq!(announcer.due(MS * 5), [held(1)]);
    }

    #[test]
    fn many_addresses_do_not_flood_the_network() {
        let mut announcer = Announcer::default();
        let many = (0..5_000_u32).map(|number| Held {
            address: IpAddr::V4(Ipv4Addr::from_bits(number)),
            ..held(1)
        });
        announcer.hold(many, Duration::ZERO);
        let mut now = Duration::from_secs(60);
        let mut frames = 0;
        while now < Duration::from_secs(110) {
            frames += announcer.due(now).len();
            now = announcer.next().unwrap().max(now + MS * 100);
        }
        // Every address in turn, at the rate allowed; the first rounds come on top.
        assert!((20_000..=60_000).contains(&frames), "{frames}");
    }

    #[test]
    fn an_announcement_tells_the_address_and_asks_who_else_has_it() {
        let mut held = held(9);
        held.told = MacAddr::new([1, 0, 0x5e, 81, 0, 9]);
        let frames = held.frames();
        assert_eq!(frames.len(), 2);
        let [told, asked] = [&frames[0], &frames[1]];
        assert_eq!(told[..6], [0xff; 6]);
        assert_eq!(
            told[6..12],
            held.source.octets(),
            "a source is never multicast"
        );
        assert_eq!(told[22..28], held.told.octets());
        assert_eq!(
            (&told[28..32], &told[38..42]),
            (&[10, 0, 0, 9][..], &[10, 0, 0, 9][..])
        );
        assert_eq!(
            (&asked[28..32], &asked[38..42]),
            (&[0; 4][..], &[10, 0, 0, 9][..])
        );
        assert_eq!(asked[20..22], [0, 1], "a question");
        let six = Held {
            address: "fd00::9".parse().unwrap(),
            ..held.clone()
        };
        let frame = &six.frames()[0];
        assert_eq!(frame[6..12], held.source.octets());
        assert_eq!(frame[80..86], held.told.octets());
    }
}
