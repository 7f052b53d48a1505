//! Doors: all that a director needs of an address and the first service there, in one cache line.
//!
//! Always holds: a door says what `vips4`, `vips6` and `services` say; it is rewritten right after the entries that it is
//! made of, and gone before them; a director that finds none asks those. Nothing depends on a door's being there: one
//! that finds no place among [`abi::DOOR_PROBES`] is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;

use aya::maps::{Array, MapData};

use super::host::Host;
use super::object::kernel;
use super::sys;
use crate::BalancerError;
use crate::abi::{self, Address, Door};
use crate::flow;

/// Scope and address.
pub(super) type Key = (u32, Address);

/// Entries of the table for so many addresses of each family: half of them empty when all are in use.
pub(super) fn room(addresses: u32) -> u32 {
    addresses.saturating_mul(4).saturating_add(PAST)
}

/// A hash does not name the last places, so that a search need not begin again at the first.
const PAST: u32 = abi::DOOR_PROBES - 1;

/// Places that a hash may name, of a table of so many entries.
pub(super) fn places(entries: u32) -> u32 {
    entries.saturating_sub(PAST)
}

/// The place that a key's hash names; as `find_door` in `bpf/ring.h`.
fn first_place(key: Key, places: u32) -> u32 {
    let (scope, address) = key;
    let hash = flow::mix(address.low, u64::from(scope)) ^ address.high;
    let hash = hash.wrapping_mul(flow::LAST) >> 32;
    flow::slot(u32::try_from(hash).unwrap_or(0), places)
}

/// Which places are taken.
pub(super) struct Doors {
    table: Array<MapData, Door>,
    place_of: BTreeMap<Key, u32>,
    taken: BTreeMap<u32, Door>,
    /// The first service at an address, and the other way round.
    service_of: BTreeMap<Key, u16>,
    keys_of: BTreeMap<u16, BTreeSet<Key>>,
}

impl Doors {
    /// With what an earlier process left in the table.
    pub(super) fn read_back(
        table: Array<MapData, Door>,
        again: &MapData,
    ) -> Result<Self, BalancerError> {
        let all: Vec<(u32, Door)> =
            sys::entries(again.fd().as_fd()).map_err(kernel("reading", "doors"))?;
        let taken: BTreeMap<u32, Door> =
            all.into_iter().filter(|(_, door)| door.slots > 0).collect();
        let place_of = taken.iter();
        let place_of = place_of.map(|(at, door)| ((door.scope, door.address), *at));
        Ok(Self {
            table,
            place_of: place_of.collect(),
            taken,
            service_of: BTreeMap::new(),
            keys_of: BTreeMap::new(),
        })
    }

    /// Places that a hash may name.
    pub(super) fn places(&self) -> u32 {
        places(self.table.len())
    }

    fn note(&mut self, key: Key, service: Option<u16>) {
        let before = match service {
            Some(service) => self.service_of.insert(key, service),
            None => self.service_of.remove(&key),
        };
        if before == service {
            return;
        }
        if let Some(keys) = before.and_then(|before| self.keys_of.get_mut(&before)) {
            keys.remove(&key);
        }
        if let Some(service) = service {
            self.keys_of.entry(service).or_default().insert(key);
        }
    }

    fn put(&mut self, key: Key, door: Option<Door>) -> Result<(), BalancerError> {
        let known = self.place_of.get(&key).copied();
        let Some(at) = known.or_else(|| self.free_place(key)) else {
            return Ok(());
        };
        if self.taken.get(&at) == door.as_ref() {
            return Ok(());
        }
        self.table
            .set(at, door.unwrap_or_default(), 0)
            .map_err(kernel("writing", "doors"))?;
        match door {
            Some(door) => {
                self.place_of.insert(key, at);
                self.taken.insert(at, door);
            }
            None => {
                self.place_of.remove(&key);
                self.taken.remove(&at);
            }
        }
        Ok(())
    }

    fn free_place(&self, key: Key) -> Option<u32> {
        let first = first_place(key, self.places());
        (first..first + abi::DOOR_PROBES).find(|at| !self.taken.contains_key(at))
    }
}

impl Host {
    /// What the door of an address should be.
    fn door_of(&self, key: Key) -> Option<Door> {
        let vip = self.vips.get(&key)?;
        let ranges = vip.ranges.get(..vip.count as usize)?;
        let service = ranges.first()?.service;
        let entry = &self.services.get(&service)?.entry;
        if entry.slots == 0 || entry.flags & abi::SERVICE_PINS > 0 {
            return None;
        }
        let mut door = Door {
            address: key.1,
            scope: key.0,
            slots: entry.slots,
            ring: entry.ring,
            service,
            affinity: entry.affinity,
            ..Door::default()
        };
        let own = ranges.iter().filter(|range| range.service == service);
        for (opening, range) in door.openings.iter_mut().zip(own) {
            *opening = abi::Opening {
                first: range.first,
                last: range.last,
                protocol: range.protocol,
                zero: 0,
            };
        }
        Some(door)
    }

    /// After an address was written, and before it is taken away (when `vips` no longer has it).
    pub(super) fn write_door(&mut self, key: Key) -> Result<(), BalancerError> {
        let vip = self.vips.get(&key).filter(|vip| vip.count > 0);
        self.doors.note(key, vip.map(|vip| vip.ranges[0].service));
        self.doors.put(key, self.door_of(key))
    }

    /// After a service's entry was written, and before it is taken away (when `services` no longer has it).
    pub(super) fn write_doors_of(&mut self, service: u16) -> Result<(), BalancerError> {
        let keys = self.doors.keys_of.get(&service).cloned();
        for key in keys.into_iter().flatten() {
            self.doors.put(key, self.door_of(key))?;
        }
        Ok(())
    }

    /// All doors, after the tables that they are made of were read.
    pub(super) fn write_doors(&mut self) -> Result<(), BalancerError> {
        let keys = self.vips.keys().chain(self.doors.place_of.keys());
        let keys: BTreeSet<Key> = keys.copied().collect();
        for key in keys {
            self.write_door(key)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr};

    #[test]
    fn addresses_in_a_row_spread_over_the_table() {
        let places = places(room(1024));
        let mut homes = BTreeMap::new();
        for number in 0..1024_u32 {
            let address = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
            let home = first_place((3, address.into()), places);
            assert!(home < places);
            *homes.entry(home).or_insert(0) += 1;
        }
        // A fair dice would leave 906 places with one or more, and hardly one with five.
        assert!(homes.len() > 850, "{} places", homes.len());
        assert!(homes.values().all(|count| *count < 6));
    }
}
