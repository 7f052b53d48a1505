//! Edges: what the tables know of taps.
//!
//! Always holds: an edge that an earlier process opened stays open when it is attached again; members that run here
//! point to their tap only while its edge is open.

use super::host::{Host, ifindex};
use super::object::{errno, kernel};
use super::sys;
use crate::BalancerError;
use crate::abi::{self, Address};
use crate::model::EdgeSpec;
use std::net::IpAddr;

/// An edge of this host.
pub(super) struct Edge {
    pub(super) spec: EdgeSpec,
    pub(super) ifindex: u32,
    pub(super) open: bool,
    pub(super) forward: bool,
    /// As written last.
    written: Option<abi::Edge>,
}

fn no_edge(ifname: &str) -> BalancerError {
    BalancerError::NoEdge {
        ifname: ifname.to_owned(),
    }
}

impl Host {
    /// See [`crate::Datapath::attach_edge`].
    pub(super) fn attach_edge(&mut self, spec: &EdgeSpec) -> Result<(), BalancerError> {
        let index = ifindex(&spec.ifname)?;
        let known = self
            .edges
            .get(&spec.ifname)
            .filter(|edge| edge.ifindex == index);
        let (open, forward, written) = match known {
            Some(edge) => (edge.open, edge.forward, edge.written),
            // Perhaps an earlier process made it.
            None => match self.tables.edges.get(&index, 0) {
                Ok(entry) if entry.mac == spec.mac => (
                    entry.flags & abi::EDGE_OPEN > 0,
                    entry.flags & abi::EDGE_FORWARD > 0,
                    Some(entry),
                ),
                _ => (false, false, None),
            },
        };
        let edge = Edge {
            spec: spec.clone(),
            ifindex: index,
            open,
            forward,
            written,
        };
        self.edges.insert(spec.ifname.clone(), edge);
        self.write_edge(&spec.ifname)?;
        self.count_offences(index)?;
        self.links
            .tcx(&mut self.ebpf, "edge_from_guest", "in", &spec.ifname)?;
        self.links
            .tcx(&mut self.ebpf, "edge_to_guest", "out", &spec.ifname)
    }

    /// The director delivers to this edge, or not.
    pub(super) fn set_open(
        &mut self,
        ifname: &str,
        open: bool,
        forward: bool,
    ) -> Result<(), BalancerError> {
        let Some(edge) = self.edges.get_mut(ifname) else {
            return if open { Err(no_edge(ifname)) } else { Ok(()) };
        };
        edge.open = open;
        edge.forward = forward;
        let (mac, index) = (edge.spec.mac, edge.ifindex);
        // Towards the guest first when it opens, away from it first when it closes.
        if open {
            self.write_edge(ifname)?;
        }
        if let Some(member) = self.members.get(&mac) {
            let member = u32::from(*member);
            let mut entry = self
                .tables
                .members
                .get(&member, 0)
                .map_err(kernel("reading", "members"))?;
            let to = match (open, entry.ifindex == index) {
                (true, _) => index,
                (false, true) => 0,
                (false, false) => entry.ifindex,
            };
            if entry.ifindex != to {
                entry.ifindex = to;
                self.tables
                    .members
                    .set(member, entry, 0)
                    .map_err(kernel("writing", "members"))?;
            }
        }
        if open {
            Ok(())
        } else {
            self.write_edge(ifname)
        }
    }

    /// See [`crate::Datapath::detach_edge`].
    pub(super) fn detach_edge(&mut self, ifname: &str) -> Result<(), BalancerError> {
        self.set_open(ifname, false, false)?;
        self.links.detach("in", ifname)?;
        self.links.detach("out", ifname)?;
        let Some(edge) = self.edges.remove(ifname) else {
            return Ok(());
        };
        match self.tables.edges.remove(&edge.ifindex) {
            Err(error) if errno(&error) != Some(libc::ENOENT) => {
                return Err(kernel("removing", format!("the edge of `{ifname}`"))(error));
            }
            _ => {}
        }
        self.forget_flows(edge.ifindex)?;
        for index in self.services.keys() {
            let key = abi::PairKey {
                ifindex: edge.ifindex,
                service: u32::from(*index),
            };
            // Most edges never had one.
            let _ = self.tables.pairs.remove(&key);
        }
        let services: Vec<u16> = self.services.keys().copied().collect();
        for service in services {
            self.forget_pace(edge.ifindex, service);
        }
        self.forget_offences(edge.ifindex);
        Ok(())
    }

    /// All edges again, after services or networks changed.
    pub(super) fn refresh_edges(&mut self) -> Result<(), BalancerError> {
        let names: Vec<String> = self.edges.keys().cloned().collect();
        for name in names {
            self.write_edge(&name)?;
        }
        Ok(())
    }

    fn write_edge(&mut self, ifname: &str) -> Result<(), BalancerError> {
        let Some(edge) = self.edges.get(ifname) else {
            return Ok(());
        };
        let mut entry = self.entry_of(edge);
        if let (false, Some(old)) = (self.applied, &edge.written) {
            // Before the first `apply` of this process the tables know better.
            entry.scope = old.scope;
            entry.uplink = old.uplink;
            entry.bridge = old.bridge;
            entry.member = old.member;
            entry.count = old.count;
            entry.ranges = old.ranges;
        }
        let index = edge.ifindex;
        if edge.written != Some(entry) {
            self.tables
                .edges
                .insert(index, entry, 0)
                .map_err(|error| match errno(&error) {
                    Some(libc::E2BIG | libc::ENOSPC) => BalancerError::Full {
                        table: "edges",
                        limit: u64::from(self.capacity.edges),
                        advice: "move VMs to other hosts, or raise the datapath's capacity and restart the host",
                    },
                    _ => kernel("writing", format!("the edge of `{ifname}`"))(error),
                })?;
        }
        if let Some(edge) = self.edges.get_mut(ifname) {
            edge.written = Some(entry);
        }
        self.count_pairs(index, &entry)
    }

    /// Counters for the services of an edge.
    fn count_pairs(&mut self, index: u32, entry: &abi::Edge) -> Result<(), BalancerError> {
        let mut services: Vec<u16> = entry.ranges[..usize::from(entry.count)]
            .iter()
            .map(|range| range.service)
            .collect();
        services.dedup();
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| kernel("counting", "CPUs")(error))?;
        for service in services {
            let key = abi::PairKey {
                ifindex: index,
                service: u32::from(service),
            };
            let zeros = vec![abi::PairCount::default(); cpus].try_into();
            let zeros = zeros.map_err(kernel("making", "counters"))?;
            // BPF_NOEXIST: what is there goes on counting. Without room nothing is counted.
            if let Err(error) = self.tables.pairs.insert(key, zeros, 1)
                && !matches!(
                    errno(&error),
                    Some(libc::EEXIST | libc::E2BIG | libc::ENOSPC)
                )
            {
                return Err(kernel("writing", "pairs")(error));
            }
            self.count_paces(index, service)?;
        }
        Ok(())
    }

    fn entry_of(&self, edge: &Edge) -> abi::Edge {
        let spec = &edge.spec;
        let scope = self.scopes.get(&spec.network);
        let mut ranges = [abi::Range::default(); abi::MAX_RANGES];
        let mut count = 0;
        for (index, known) in &self.services {
            if !known.macs.contains(&spec.mac) {
                continue;
            }
            let name = self.names.get(&known.entry.id);
            let Some(table) = name.and_then(|name| self.wanted.services.get(name)) else {
                continue;
            };
            for range in &table.ports {
                // More than fit are told by their flows alone.
                if let Some(slot) = ranges.get_mut(count) {
                    *slot = abi::Range {
                        protocol: range.protocol.number(),
                        zero: 0,
                        first: range.first,
                        last: range.last,
                        service: *index,
                    };
                    count += 1;
                }
            }
        }
        let mut allowed = [Address::default(); abi::MAX_ALLOWED];
        for (to, from) in allowed.iter_mut().zip(&spec.addresses) {
            *to = Address::from(*from);
        }
        let of_family = |v4: bool| {
            spec.addresses
                .iter()
                .find(|address| address.is_ipv4() == v4)
                .copied()
        };
        abi::Edge {
            scope: scope.map_or(0, |scope| scope.scope),
            uplink: scope.map_or(0, |scope| scope.uplink),
            bridge: scope.map_or(0, |scope| scope.bridge),
            member: self
                .members
                .get(&spec.mac)
                .copied()
                .unwrap_or(abi::NO_MEMBER),
            flags: flags(edge),
            mac: spec.mac,
            count: u16::try_from(count).unwrap_or(0),
            address4: match of_family(true) {
                Some(IpAddr::V4(v4)) => abi::word(v4),
                _ => 0,
            },
            allowed_count: u32::try_from(spec.addresses.len().min(abi::MAX_ALLOWED)).unwrap_or(0),
            address6: of_family(false).map_or(Address::default(), Address::from),
            allowed,
            ranges,
        }
    }

    /// The name of the interface with this index, for people.
    pub(super) fn interface_name(&self, index: u32) -> String {
        let mut edges = self.edges.iter();
        let edge = edges.find(|(_, edge)| edge.ifindex == index);
        edge.map(|(name, _)| name.clone())
            .or_else(|| sys::ifname(index))
            .unwrap_or_else(|| format!("#{index}"))
    }
}

fn flags(edge: &Edge) -> u16 {
    let guard = edge.spec.guard;
    // A guest whose addresses are not known cannot be held to them.
    let address = guard.address && !edge.spec.addresses.is_empty();
    [
        (edge.open, abi::EDGE_OPEN),
        (edge.forward, abi::EDGE_FORWARD),
        (guard.mac, abi::GUARD_MAC),
        (address, abi::GUARD_ADDRESS),
        (guard.dhcp_server, abi::GUARD_DHCP),
        (guard.router_advertisement, abi::GUARD_ROUTER),
    ]
    .into_iter()
    .filter(|(on, _)| *on)
    .fold(0, |flags, (_, flag)| flags | flag)
}
