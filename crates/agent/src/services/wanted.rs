//! What this host announces and which edges its taps need, from what its datapath should hold. Pure.
//!
//! Always holds: an address is announced with one MAC, also when several services share it: the datapath answers with
//! that of the lowest number.

use quorate_balancer::{EdgeSpec, ServiceTable, Wanted};
use quorate_network::attract::arp::Held;
use quorate_network::{MacAddr, nic_mac, tap_name};
use quorate_state::State;
use quorate_types::service::Attractor;
use quorate_types::{VmName, VmSpec};
use std::net::{IpAddr, Ipv4Addr};

/// The addresses that a host announces on the wire: those it holds.
pub(super) fn held(wanted: &Wanted) -> Vec<Held> {
    let mut tables: Vec<&ServiceTable> = wanted.services.values().collect();
    tables.retain(|table| table.holder);
    tables.sort_by_key(|table| table.id);
    let mut held: Vec<Held> = Vec::new();
    for table in tables {
        let uplink = wanted.networks.get(&table.network);
        let Some(uplink) = uplink.and_then(|network| network.uplink.clone()) else {
            continue;
        };
        let source = MacAddr::new(table.id.virtual_mac());
        let told = match table.attractor {
            Attractor::Arp => source,
            Attractor::Igmp => MacAddr::new(quorate_balancer::mac::multicast(table.id).1),
            Attractor::Bgp => continue,
        };
        for address in &table.addresses {
            let known = |one: &Held| one.uplink == uplink && one.address == *address;
            if !held.iter().any(known) {
                held.push(Held {
                    uplink: uplink.clone(),
                    address: *address,
                    source,
                    told,
                });
            }
        }
    }
    held
}

/// The groups that a host joins, and on which interface.
pub(super) fn groups(wanted: &Wanted) -> Vec<(String, Ipv4Addr)> {
    let tables = wanted.services.values();
    let igmp = tables.filter(|table| table.attractor == Attractor::Igmp);
    let group = |table: &ServiceTable| {
        let bridge = wanted.networks.get(&table.network)?.bridge.clone();
        Some((bridge, quorate_balancer::mac::multicast(table.id).0))
    };
    igmp.filter_map(group).collect()
}

/// The addresses that every host announces to routers: of services that have a ring.
pub(super) fn routed(wanted: &Wanted) -> impl Iterator<Item = IpAddr> {
    let tables = wanted.services.values();
    tables
        .filter(|table| table.attractor == Attractor::Bgp && table.active().is_some())
        .flat_map(|table| table.addresses.iter().copied())
}

/// The edges of a VM's taps.
pub(super) fn edges(state: &State, cluster_id: &str, vm: &VmName, spec: &VmSpec) -> Vec<EdgeSpec> {
    let edge = |(index, nic): (usize, &quorate_types::spec::NicSpec)| {
        let number = u32::try_from(index).ok()?;
        let network = state.networks.get(&nic.network)?;
        let mac = match &nic.mac {
            Some(text) => text.parse::<MacAddr>().ok()?,
            None => nic_mac(cluster_id, vm.as_str(), number),
        };
        let guard = match nic.trusted {
            true => quorate_balancer::Guard::default(),
            false => quorate_balancer::Guard {
                mac: network.spec.guard.source,
                // Only where its addresses are known.
                address: network.spec.guard.source && nic.addresses().next().is_some(),
                dhcp_server: network.spec.guard.dhcp,
                router_advertisement: network.spec.guard.router,
            },
        };
        Some(EdgeSpec {
            ifname: tap_name(vm.as_str(), number),
            network: nic.network.clone(),
            vm: vm.clone(),
            mac: mac.octets(),
            addresses: nic.addresses().collect(),
            guard,
        })
    };
    spec.nics.iter().enumerate().filter_map(edge).collect()
}

/// Whether a network's taps need edges: it has services, or guards its guests.
pub(super) fn needs_edges(state: &State, edge: &EdgeSpec) -> bool {
    let has_service = || {
        let mut services = state.services.values();
        services.any(|service| service.spec.network == edge.network)
    };
    edge.guard != quorate_balancer::Guard::default() || has_service()
}
