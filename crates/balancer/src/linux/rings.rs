//! Rings in the kernel's tables.
//!
//! Always holds: rings of equal history are one ring; a ring is whole before anything points at it, and its index is
//! another one's only when nothing does any more.

use std::collections::BTreeSet;

use aya::maps::MapData;

use super::host::Host;
use super::object::kernel;
use super::sys;
use crate::BalancerError;
use crate::abi;
use crate::ring::{self, Ring};
use quorate_types::service::RingVersion;

/// All that a ring is made from: equal ones share a table.
pub(super) type RingKey = (u32, Vec<RingVersion>, Option<RingVersion>);

/// Slots and MACs of the active members: most rings with equal ones are equal.
pub(super) type RingMark = (u32, Vec<[u8; 6]>);

pub(super) fn mark(key: &RingKey) -> RingMark {
    let members = key.1.last().map(|list| &list.members);
    let macs = members.into_iter().flatten().map(|member| member.mac);
    (key.0, macs.collect())
}

impl Host {
    /// The ring of this history: one that is there already, or a new one. Returns its index, slots and members.
    pub(super) fn ring_for(
        &mut self,
        key: &RingKey,
    ) -> Result<(u32, u32, BTreeSet<[u8; 6]>), BalancerError> {
        let alike = self.rings.get(&mark(key)).into_iter().flatten();
        let mut known = alike.filter_map(|index| self.services.get(index));
        if let Some(equal) = known.find(|known| known.made_from.as_ref() == Some(key)) {
            return Ok((equal.entry.ring, equal.entry.slots, equal.macs.clone()));
        }
        let (slots, history, next) = key;
        let Some(ring) = Ring::build(history, next.as_ref(), *slots) else {
            return Ok((0, 0, BTreeSet::new()));
        };
        let mut indexes = Vec::with_capacity(ring.members.len());
        for member in &ring.members {
            indexes.push(self.member_index(member.mac)?);
        }
        let index_of = |member: u16| {
            let index = indexes.get(usize::from(member));
            index.copied().unwrap_or(abi::NO_MEMBER)
        };
        let slots: Vec<ring::Slot> = ring
            .slots
            .iter()
            .map(|slot| ring::Slot {
                primary: index_of(slot.primary),
                previous: index_of(slot.previous),
                next: index_of(slot.next),
            })
            .collect();
        let size = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let inner = sys::ring(&abi::ring_image(&slots)).map_err(kernel("making", "a ring"))?;
        let inner = MapData::from_fd(inner).map_err(kernel("opening", "a ring"))?;
        let used: BTreeSet<u32> = self
            .services
            .values()
            .filter(|known| known.entry.slots > 0)
            .map(|known| known.entry.ring)
            .collect();
        let free = (0..self.capacity.services).find(|index| !used.contains(index));
        let index = free.ok_or(BalancerError::Full {
            table: "rings",
            limit: u64::from(self.capacity.services),
            advice: "delete services, or raise the datapath's capacity and restart the host",
        })?;
        let rings = if abi::is_few(size) {
            &mut self.tables.few_rings
        } else {
            &mut self.tables.rings
        };
        rings
            .set(index, &inner, 0)
            .map_err(kernel("writing", "rings"))?;
        let macs = ring.members.iter().map(|member| member.mac).collect();
        Ok((index, size, macs))
    }

    /// The service's ring is no longer the one that it was.
    pub(super) fn unmark(&mut self, index: u16) {
        let known = self.services.get(&index);
        let Some(mark) = known.and_then(|known| known.made_from.as_ref()).map(mark) else {
            return;
        };
        if let Some(alike) = self.rings.get_mut(&mark) {
            alike.retain(|one| *one != index);
            if alike.is_empty() {
                self.rings.remove(&mark);
            }
        }
    }
}
