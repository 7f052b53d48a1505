//! Services and their addresses in the kernel's tables.
//!
//! Always holds: a service whose table is the same is not touched.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::host::{Host, narrow};
use super::object::kernel;
use super::rings::{RingKey, mark};
use super::sys;
use crate::abi::{self, Address};
use crate::model::{Applied, ServiceTable, Wanted};
use crate::ring;
use crate::{BalancerError, mac};
use quorate_types::service::{AffinityKind, Attractor, Limits, ServiceId};

/// How long after a change of the ring unknown UDP flows get a second chance.
const UDP_CHANCE_NS: u64 = 120_000_000_000;

/// A service in the tables.
pub(super) struct Known {
    pub(super) entry: abi::Service,
    /// What its ring was made from; `None`: by an earlier process, so it is made anew.
    pub(super) made_from: Option<RingKey>,
    /// MACs that its ring names.
    pub(super) macs: BTreeSet<[u8; 6]>,
}

impl Known {
    pub(super) fn found(entry: abi::Service) -> Self {
        Self {
            entry,
            made_from: None,
            macs: BTreeSet::new(),
        }
    }
}

fn refused(table: &ServiceTable, reason: impl Into<String>) -> BalancerError {
    BalancerError::Service {
        service: table.id.to_string(),
        reason: reason.into(),
    }
}

/// Masks of what of a client counts.
fn masks(table: &ServiceTable) -> (u8, u32, Address) {
    let (prefix, prefix6) = match table.affinity.kind {
        AffinityKind::None => return (0, 0, Address::default()),
        AffinityKind::Source => (32, 128),
        AffinityKind::Subnet => (
            u32::from(table.affinity.prefix.min(32)),
            u32::from(table.affinity.prefix6.min(128)),
        ),
    };
    let mask4 = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    let mask6 = u128::MAX.checked_shl(128 - prefix6).unwrap_or(0);
    let octets = mask6.to_be_bytes();
    let word = |from: usize| {
        let mut eight = [0; 8];
        eight.copy_from_slice(&octets[from..from + 8]);
        u64::from_ne_bytes(eight)
    };
    let mask6 = Address {
        high: word(0),
        low: word(8),
    };
    let affinity = match table.affinity.kind {
        AffinityKind::Subnet => abi::AFFINITY_SUBNET,
        AffinityKind::Source | AffinityKind::None => abi::AFFINITY_CLIENT,
    };
    (affinity, mask4.to_be(), mask6)
}

fn address4(addresses: &[IpAddr]) -> u32 {
    let mut all = addresses.iter();
    all.find_map(|address| match address {
        IpAddr::V4(v4) => Some(abi::word(*v4)),
        IpAddr::V6(_) => None,
    })
    .unwrap_or(0)
}

fn address6(addresses: &[IpAddr]) -> Address {
    let found = addresses.iter().find(|address| address.is_ipv6());
    found.map_or(Address::default(), |address| Address::from(*address))
}

impl Host {
    /// The index of a service, or a new one.
    fn service_index(&self, table: &ServiceTable) -> Result<u16, BalancerError> {
        if let Some(index) = self.indexes.get(&table.id.0) {
            return Ok(*index);
        }
        // 0 is not given out, so that an entry of zeros means nothing. What this step has freed comes last: an address
        // may still name it for a moment. The highest index in use is where free ones most likely begin.
        let highest = self
            .services
            .keys()
            .next_back()
            .map_or(0, |index| u32::from(*index));
        let unused = |index: &u32| !self.services.contains_key(&narrow(*index));
        let mut all = (highest + 1..self.capacity.services)
            .chain(1..highest)
            .filter(unused);
        let free = all
            .clone()
            .find(|index| !self.freed.contains(&narrow(*index)))
            .or_else(|| all.next());
        free.map(narrow).ok_or(BalancerError::Full {
            table: "services",
            limit: u64::from(self.capacity.services),
            advice: "delete services, or raise the datapath's capacity and restart the host",
        })
    }

    /// The index of a member, or a new one.
    pub(super) fn member_index(&mut self, mac: [u8; 6]) -> Result<u16, BalancerError> {
        if let Some(index) = self.members.get(&mac) {
            return Ok(*index);
        }
        let used: BTreeSet<u16> = self.members.values().copied().collect();
        let free = (0..self.capacity.members).find(|index| !used.contains(&narrow(*index)));
        let Some(index) = free else {
            return Err(BalancerError::Full {
                table: "members",
                limit: u64::from(self.capacity.members),
                advice: "make fewer VMs members, or raise the datapath's capacity and restart the host",
            });
        };
        let mut open = self.edges.values();
        let open = open.find(|edge| edge.spec.mac == mac && edge.open);
        let member = abi::Member {
            mac,
            used: 1,
            ifindex: open.map_or(0, |edge| edge.ifindex),
        };
        self.tables
            .members
            .set(index, member, 0)
            .map_err(kernel("writing", "members"))?;
        self.members.insert(mac, narrow(index));
        Ok(narrow(index))
    }

    /// Puts a service into the tables: its members, ring and entry, not yet its addresses.
    pub(super) fn load_service(&mut self, table: &ServiceTable) -> Result<(), BalancerError> {
        if !self.scopes.contains_key(&table.network) {
            return Err(refused(
                table,
                format!(
                    "its network `{}` cannot be served on this host",
                    table.network
                ),
            ));
        }
        if table.ports.len() > abi::MAX_RANGES {
            return Err(refused(
                table,
                format!(
                    "{} port ranges, at most {}",
                    table.ports.len(),
                    abi::MAX_RANGES
                ),
            ));
        }
        if table.slots > ring::SLOTS {
            return Err(refused(
                table,
                format!("{} slots, at most {}", table.slots, ring::SLOTS),
            ));
        }
        for v4 in [true, false] {
            let family = table.addresses.iter().filter(|one| one.is_ipv4() == v4);
            if family.count() > 1 {
                return Err(refused(table, "more than one address of a family"));
            }
        }
        let index = self.service_index(table)?;
        let key: RingKey = (table.slots, table.history.clone(), table.next.clone());
        let known = self.services.get(&index);
        let same = known.is_some_and(|known| known.made_from.as_ref() == Some(&key));
        let (ring, slots, macs) = match known.filter(|_| same) {
            Some(known) => (known.entry.ring, known.entry.slots, known.macs.clone()),
            None => self.ring_for(&key)?,
        };
        let (affinity, mask4, mask6) = masks(table);
        let before = self.services.get(&index);
        let udp_until_ns = match before {
            Some(before) if same || before.made_from.is_none() => before.entry.udp_until_ns,
            _ => sys::boottime_ns() + UDP_CHANCE_NS,
        };
        let remember = table.affinity.timeout.filter(|_| affinity > 0);
        let entry = abi::Service {
            id: table.id.0,
            slots,
            ring,
            affinity,
            flags: self.service_flags(index, table),
            virtual_mac: mac::virtual_mac(table.id),
            address4: address4(&table.addresses),
            mask4,
            // In the tables' unit, rounded up.
            remember_s: remember.map_or(0, |time| {
                u32::try_from((time.0 * 1_000_000) >> 30).unwrap_or(u32::MAX - 1) + 1
            }),
            zero: 0,
            address6: address6(&table.addresses),
            mask6,
            udp_until_ns,
        };
        self.write_limit(index, table)?;
        let before = self.services.get(&index);
        if before.is_none_or(|before| before.entry != entry) {
            self.tables
                .services
                .set(u32::from(index), entry, 0)
                .map_err(kernel("writing", "services"))?;
        }
        if !same {
            self.unmark(index);
            self.rings.entry(mark(&key)).or_default().push(index);
        }
        let known = Known {
            entry,
            made_from: Some(key),
            macs,
        };
        self.indexes.insert(table.id.0, index);
        self.services.insert(index, known);
        self.write_doors_of(index)
    }

    fn service_flags(&self, index: u16, table: &ServiceTable) -> u8 {
        let pins = self.pins.contains_key(&u32::from(index));
        let limits = table.limits != Limits::default();
        [(pins, abi::SERVICE_PINS), (limits, abi::SERVICE_LIMITS)]
            .into_iter()
            .filter(|(on, _)| *on)
            .fold(0, |flags, (_, flag)| flags | flag)
    }

    /// Nobody is steered to this service here any more.
    pub(super) fn unload_service(&mut self, id: ServiceId) -> Result<(), BalancerError> {
        let Some(index) = self.indexes.remove(&id.0) else {
            return Ok(());
        };
        self.unmark(index);
        self.services.remove(&index);
        self.write_doors_of(index)?;
        self.tables
            .services
            .set(u32::from(index), abi::Service::default(), 0)
            .map_err(kernel("clearing", "services"))?;
        self.freed.insert(index);
        // The index may become another service's.
        self.forget_paces(index);
        self.forget_service(index)
    }

    /// The addresses that services of `wanted` have, with what goes wrong by service.
    fn wanted_vips(
        &self,
        wanted: &Wanted,
        applied: &mut Applied,
    ) -> BTreeMap<(u32, Address), abi::Vip> {
        let mut vips: BTreeMap<(u32, Address), abi::Vip> = BTreeMap::new();
        // The lowest number first: its virtual MAC is told.
        let mut services: Vec<_> = wanted.services.iter().collect();
        services.sort_by_key(|(_, table)| table.id);
        for (name, table) in services {
            let Some(loaded) = applied.services.get_mut(name) else {
                continue;
            };
            let (Some(scope), None) = (self.scopes.get(&table.network), &loaded.problem) else {
                continue;
            };
            let Some(index) = self.indexes.get(&table.id.0) else {
                continue;
            };
            for address in &table.addresses {
                let vip = vips
                    .entry((scope.scope, Address::from(*address)))
                    .or_insert_with(|| empty_vip(table, scope.host_mac));
                if vip.count as usize + table.ports.len() > abi::MAX_RANGES {
                    loaded.problem = Some(format!(
                        "services at {address} have more than {} port ranges together",
                        abi::MAX_RANGES
                    ));
                    loaded.active = 0;
                    loaded.prepared = None;
                    continue;
                }
                vip.flags |= flags(table);
                for range in &table.ports {
                    vip.ranges[vip.count as usize] = abi::Range {
                        protocol: range.protocol.number(),
                        zero: 0,
                        first: range.first,
                        last: range.last,
                        service: *index,
                    };
                    vip.count += 1;
                }
            }
        }
        vips
    }

    /// Takes away addresses that nobody wants any more, before anything that they point to.
    pub(super) fn remove_vips(
        &mut self,
        wanted: &Wanted,
        here: &BTreeSet<u32>,
    ) -> Result<(), BalancerError> {
        let mut keep = BTreeSet::new();
        for table in wanted.services.values() {
            if let Some(scope) = self.scopes.get(&table.network) {
                keep.extend(
                    table
                        .addresses
                        .iter()
                        .map(|address| (scope.scope, Address::from(*address))),
                );
            }
        }
        let gone: Vec<(u32, Address)> = self
            .vips
            .keys()
            .filter(|key| !keep.contains(key) || !here.contains(&key.0))
            .copied()
            .collect();
        for key in gone {
            self.remove_vip(key)?;
        }
        Ok(())
    }

    fn remove_vip(&mut self, key: (u32, Address)) -> Result<(), BalancerError> {
        let (scope, address) = key;
        self.vips.remove(&key);
        self.write_door(key)?;
        let result = match IpAddr::from(address) {
            IpAddr::V4(v4) => self.tables.vips4.remove(&abi::Vip4Key {
                scope,
                address: abi::word(v4),
            }),
            IpAddr::V6(_) => self.tables.vips6.remove(&abi::Vip6Key {
                scope,
                zero: 0,
                address,
            }),
        };
        match result {
            Err(error) if super::object::errno(&error) != Some(libc::ENOENT) => {
                Err(kernel("removing", "an address")(error))
            }
            _ => Ok(()),
        }
    }

    /// Writes the addresses that changed.
    pub(super) fn write_vips(
        &mut self,
        wanted: &Wanted,
        applied: &mut Applied,
    ) -> Result<(), BalancerError> {
        let vips = self.wanted_vips(wanted, applied);
        let gone: Vec<_> = self
            .vips
            .keys()
            .filter(|key| !vips.contains_key(key))
            .copied()
            .collect();
        for key in gone {
            self.remove_vip(key)?;
        }
        for (key, vip) in vips {
            if self.vips.get(&key) == Some(&vip) {
                continue;
            }
            let (scope, address) = key;
            let result = match IpAddr::from(address) {
                IpAddr::V4(v4) => {
                    let key = abi::Vip4Key {
                        scope,
                        address: abi::word(v4),
                    };
                    self.tables.vips4.insert(key, vip, 0)
                }
                IpAddr::V6(_) => {
                    let key = abi::Vip6Key {
                        scope,
                        zero: 0,
                        address,
                    };
                    self.tables.vips6.insert(key, vip, 0)
                }
            };
            result.map_err(|error| match super::object::errno(&error) {
                Some(libc::E2BIG | libc::ENOSPC) => BalancerError::Full {
                    table: "addresses",
                    limit: u64::from(self.capacity.addresses),
                    advice: "delete services, or raise the datapath's capacity and restart the host",
                },
                _ => kernel("writing", "an address")(error),
            })?;
            self.vips.insert(key, vip);
            self.write_door(key)?;
        }
        Ok(())
    }

    /// Frees services that are not wanted, and their rings.
    pub(super) fn retire_services(&mut self, wanted: &Wanted) -> Result<(), BalancerError> {
        let ids: BTreeSet<u32> = wanted.services.values().map(|table| table.id.0).collect();
        let gone: Vec<u32> = self
            .services
            .values()
            .map(|known| known.entry.id)
            .filter(|id| !ids.contains(id))
            .collect();
        for id in gone {
            self.unload_service(ServiceId(id))?;
        }
        Ok(())
    }

    /// Frees members that no ring names any more.
    pub(super) fn retire_members(&mut self) -> Result<(), BalancerError> {
        let named: BTreeSet<[u8; 6]> = self
            .services
            .values()
            .flat_map(|known| known.macs.iter().copied())
            .collect();
        let unused: Vec<([u8; 6], u16)> = self
            .members
            .iter()
            .filter(|(mac, _)| !named.contains(*mac))
            .map(|(mac, index)| (*mac, *index))
            .collect();
        for (mac, index) in unused {
            self.tables
                .members
                .set(u32::from(index), abi::Member::default(), 0)
                .map_err(kernel("clearing", "members"))?;
            self.members.remove(&mac);
        }
        Ok(())
    }
}

fn flags(table: &ServiceTable) -> u32 {
    let holder = if table.holder { abi::VIP_HOLDER } else { 0 };
    holder
        | match table.attractor {
            Attractor::Arp => 0,
            Attractor::Bgp => abi::VIP_ROUTED,
            Attractor::Igmp => abi::VIP_MULTICAST,
        }
}

fn empty_vip(table: &ServiceTable, host_mac: [u8; 6]) -> abi::Vip {
    let virtual_mac = mac::virtual_mac(table.id);
    abi::Vip {
        count: 0,
        flags: 0,
        virtual_mac,
        told_mac: match table.attractor {
            Attractor::Igmp => mac::multicast(table.id).1,
            Attractor::Arp | Attractor::Bgp => virtual_mac,
        },
        host_mac,
        zero: [0; 6],
        ranges: [abi::Range::default(); abi::MAX_RANGES],
    }
}
