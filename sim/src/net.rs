//! The network between hosts: directed links that can be down, slow or lossy.
//!
//! A call whose direct way fails goes through one third host, as the transport does it. A lost packet
//! is sent again by TCP and arrives late; answers of concurrent calls overtake each other.

use crate::event::HostId;
use crate::rng::Rng;
use crate::time::MS;
use std::collections::BTreeMap;

/// Time until a call gives the direct way up, the first time.
const RELAY_AFTER: u64 = 300 * MS;
/// The relay is known for this long.
const KNOWN_FOR: u64 = 5_000 * MS;

/// Links.
#[derive(Debug)]
pub(crate) struct Net {
    hosts: usize,
    /// Count of the faults that hold a link down.
    down: Vec<u32>,
    /// Added delay of a link.
    pub(crate) slow: Vec<u64>,
    pub(crate) loss_permille: u64,
    pub(crate) duplicate_permille: u64,
    /// Since when a way is known to need a relay, and when it was used last.
    relayed: BTreeMap<(HostId, HostId), u64>,
}

impl Net {
    pub(crate) fn new(hosts: usize) -> Self {
        Self {
            hosts,
            down: vec![0; hosts * hosts],
            slow: vec![0; hosts * hosts],
            loss_permille: 0,
            duplicate_permille: 0,
            relayed: BTreeMap::new(),
        }
    }

    fn at(&self, from: HostId, to: HostId) -> usize {
        from * self.hosts + to
    }

    /// Takes a directed link down, or lets it up again.
    pub(crate) fn hold(&mut self, from: HostId, to: HostId, down: bool) {
        let at = self.at(from, to);
        let count = &mut self.down[at];
        *count = if down {
            *count + 1
        } else {
            count.saturating_sub(1)
        };
    }

    /// All links are up and fast.
    pub(crate) fn heal(&mut self) {
        self.down.fill(0);
        self.slow.fill(0);
        self.loss_permille = 0;
    }

    pub(crate) fn up(&self, from: HostId, to: HostId) -> bool {
        from == to || self.down[self.at(from, to)] == 0
    }

    /// A connection needs both directions.
    pub(crate) fn connected(&self, a: HostId, b: HostId) -> bool {
        self.up(a, b) && self.up(b, a)
    }

    fn delay(&self, from: HostId, to: HostId, rng: &mut Rng) -> u64 {
        let base = rng.range(MS / 5, MS) + self.slow[self.at(from, to)];
        if rng.chance(self.loss_permille) {
            base + 200 * MS
        } else {
            base
        }
    }

    /// Delays of the copies that arrive; none: it is lost.
    pub(crate) fn route(
        &mut self,
        from: HostId,
        to: HostId,
        alive: &[HostId],
        now: u64,
        rng: &mut Rng,
    ) -> Vec<u64> {
        if from == to {
            return vec![MS / 20];
        }
        let mut copies = Vec::new();
        if self.up(from, to) {
            self.relayed.remove(&(from, to));
            copies.push(self.delay(from, to, rng));
        } else {
            let relay = alive.iter().find(|relay| {
                **relay != from && **relay != to && self.up(from, **relay) && self.up(**relay, to)
            });
            let Some(relay) = relay.copied() else {
                return copies;
            };
            let known = self.relayed.insert((from, to), now);
            let search = match known {
                Some(at) if now < at + KNOWN_FOR => 0,
                _ => RELAY_AFTER,
            };
            copies.push(search + self.delay(from, relay, rng) + self.delay(relay, to, rng));
        }
        if rng.chance(self.duplicate_permille) {
            copies.push(copies[0] + rng.range(0, 400) * MS);
        }
        copies
    }
}
