//! Which host answers for which address.
//!
//! ```text
//!   nobody --> held --its lease is over--> held by another             (SetHolder)
//!                '----drained, no uplink, uneven----> both --the new one answers--> held by the new one (planned)
//! ```
//! Always holds: services that share an address have one holder; an address leaves a host whose lease may run only with
//! that host answering on until the new one does; one whose lease is over needs no proof, because its datapath is silent
//! by itself. Spread by the number of addresses, the same choice on every leader.

use crate::services::{ServiceInput, ServiceMemory};
use quorate_membership::HostHealth;
use quorate_state::{HostMode, ServiceChange, ServiceRecord};
use quorate_types::{HostName, Millis, NetworkName, ServiceId, ServiceName, UplinkMode};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Addresses are evened out one at a time, no sooner than this after the last one.
const BALANCE_EVERY: Millis = Millis::secs(30);
/// A host must have so many addresses more than another before one is moved.
const UNEVEN: usize = 2;

/// Services that have to be held by one host.
struct Group<'a> {
    network: &'a NetworkName,
    services: Vec<(&'a ServiceName, &'a ServiceRecord)>,
}

impl Group<'_> {
    /// The host that has the address, if all of them agree.
    fn holder(&self) -> Option<&HostName> {
        let mut holders = self.services.iter().map(|(_, record)| {
            let holder = record.holder.as_ref();
            holder.map(|holder| &holder.host)
        });
        let first = holders.next()??;
        holders.all(|host| host == Some(first)).then_some(first)
    }
}

/// Services with a holder, those with a common address together, in the order of their numbers.
fn groups<'a>(input: &ServiceInput<'a>) -> Vec<Group<'a>> {
    let held = input.state.services.iter();
    let mut held: Vec<_> = held
        .filter(|(_, record)| record.spec.attractor.has_holder())
        .collect();
    held.sort_by_key(|(_, record)| record.id);
    let mut of: BTreeMap<(&NetworkName, IpAddr), usize> = BTreeMap::new();
    let mut groups: Vec<Group<'a>> = Vec::new();
    for (name, record) in held {
        let network = &record.spec.network;
        let keys = record.spec.addresses().into_iter();
        let keys: Vec<_> = keys.map(|address| (network, address)).collect();
        // A service with two addresses can join two groups: then they become one.
        let found: BTreeSet<usize> = keys.iter().filter_map(|key| of.get(key).copied()).collect();
        let mut found = found.into_iter();
        let index = found.next().unwrap_or_else(|| {
            let services = Vec::new();
            groups.push(Group { network, services });
            groups.len() - 1
        });
        for other in found {
            let moved = std::mem::take(&mut groups[other].services);
            groups[index].services.extend(moved);
            for place in of.values_mut().filter(|place| **place == other) {
                *place = index;
            }
        }
        groups[index].services.push((name, record));
        of.extend(keys.into_iter().map(|key| (key, index)));
    }
    groups.retain(|group| !group.services.is_empty());
    groups
}

/// How well a host can answer for addresses in a network, the best first; `None`: not at all.
fn fitness(input: &ServiceInput<'_>, host: &HostName, network: &NetworkName) -> Option<u8> {
    let record = input.state.hosts.get(host)?;
    let report = input.reports.get(host)?;
    let up = input.health(host) == Some(HostHealth::Up);
    let uplink = match report.uplinks.get(network) {
        Some(UplinkMode::Driver | UplinkMode::Generic) => true,
        Some(UplinkMode::None) => false,
        Some(UplinkMode::Problem(_)) | None => return None,
    };
    if !up || input.state.quorum.left.contains(host) {
        return None;
    }
    let stays = record.mode == HostMode::Active;
    Some(u8::from(!uplink) * 2 + u8::from(!stays))
}

/// Every step about who answers for an address.
#[must_use]
pub fn holder_steps(input: &ServiceInput<'_>, memory: &mut ServiceMemory) -> Vec<ServiceChange> {
    let groups = groups(input);
    let mut held: BTreeMap<HostName, usize> = BTreeMap::new();
    for group in &groups {
        if let Some(host) = group.holder() {
            *held.entry(host.clone()).or_default() += 1;
        }
    }
    let mut steps = settled(input);
    for group in &groups {
        let Some(to) = better(input, group, &held) else {
            continue;
        };
        if let Some(from) = group.holder() {
            *held.entry(from.clone()).or_default() -= 1;
        }
        *held.entry(to.clone()).or_default() += 1;
        steps.extend(give(input, group, &to));
    }
    if steps.is_empty() {
        steps.extend(even_out(input, memory, &groups, &held));
    }
    steps
}

/// Where an address has to go; `None`: it is well where it is, or there is no place.
fn better(
    input: &ServiceInput<'_>,
    group: &Group<'_>,
    held: &BTreeMap<HostName, usize>,
) -> Option<HostName> {
    let moving = group.services.iter().any(|(_, record)| {
        let holder = record.holder.as_ref();
        holder.is_some_and(|holder| {
            let leaving = holder.leaving.as_ref();
            leaving.is_some() && input.may_serve(&holder.host)
        })
    });
    let holder = group.holder();
    let fit = |host: &HostName| fitness(input, host, group.network);
    // A host that is silent for a moment, or has not reported yet, keeps what it has.
    let known = |host: &HostName| {
        input.health(host) != Some(HostHealth::Suspect) && input.reports.contains_key(host)
    };
    let here = match holder {
        _ if moving => return None,
        Some(host) if input.may_serve(host) && !known(host) => return None,
        Some(host) if input.may_serve(host) => fit(host),
        _ => None,
    };
    let hosts = input.state.hosts.keys();
    let best = hosts
        .filter_map(|host| {
            let fitness = fit(host)?;
            // Where it is already it need not be carried to.
            let elsewhere = holder != Some(host);
            let load = held.get(host).copied().unwrap_or(0);
            Some((fitness, load, elsewhere, host))
        })
        .min()?;
    let (fitness, _, _, host) = best;
    let worth = here.is_none_or(|here| fitness < here);
    (worth && holder != Some(host)).then(|| host.clone())
}

/// The commands that give a group's address to a host.
fn give(input: &ServiceInput<'_>, group: &Group<'_>, to: &HostName) -> Vec<ServiceChange> {
    let services = group.services.iter().filter_map(|(name, record)| {
        let holder = record.holder.as_ref();
        if holder.is_some_and(|holder| holder.host == *to) {
            return None;
        }
        Some(ServiceChange::SetHolder {
            service: (*name).clone(),
            host: to.clone(),
            expect: holder.map_or(0, |holder| holder.generation),
            planned: holder.is_some_and(|holder| input.may_serve(&holder.host)),
        })
    });
    services.collect()
}

/// Planned moves whose new holder answers, or whose old one is gone.
fn settled(input: &ServiceInput<'_>) -> Vec<ServiceChange> {
    let services = input.state.services.iter();
    let done = services.filter_map(|(service, record)| {
        let holder = record.holder.as_ref()?;
        let leaving = holder.leaving.as_ref()?;
        let report = input.reports.get(&holder.host);
        let report = report.and_then(|report| report.services.get(service));
        let answers = report.is_some_and(|report| report.holding)
            && input.health(&holder.host) == Some(HostHealth::Up);
        (answers || !input.may_serve(leaving)).then(|| ServiceChange::HolderSettled {
            service: service.clone(),
            generation: holder.generation,
        })
    });
    done.collect()
}

/// One address from the host that has most to the one that has least.
fn even_out(
    input: &ServiceInput<'_>,
    memory: &mut ServiceMemory,
    groups: &[Group<'_>],
    held: &BTreeMap<HostName, usize>,
) -> Vec<ServiceChange> {
    let since = *memory.balanced.get_or_insert(input.now);
    if input.now.since(since) < BALANCE_EVERY {
        return Vec::new();
    }
    let load = |host: &HostName| held.get(host).copied().unwrap_or(0);
    let moves = groups.iter().filter_map(|group| {
        let from = group.holder()?;
        let here = fitness(input, from, group.network)?;
        let hosts = input.state.hosts.keys();
        let equal = hosts.filter(|host| fitness(input, host, group.network) == Some(here));
        let to = equal.min_by_key(|host| load(host))?;
        let first = group.services.first().map(|(_, record)| record.id);
        let gain = load(from).checked_sub(load(to) + UNEVEN)?;
        Some((gain, std::cmp::Reverse(first), group, to))
    });
    let best: Option<(
        usize,
        std::cmp::Reverse<Option<ServiceId>>,
        &Group<'_>,
        &HostName,
    )> = moves.max_by_key(|(gain, first, ..)| (*gain, *first));
    let Some((_, _, group, to)) = best else {
        return Vec::new();
    };
    memory.balanced = Some(input.now);
    give(input, group, to)
}

/// Hosts that lose an address because their lease is over: they get no new lease before that is committed.
#[must_use]
pub fn taken_from<'a>(input: &ServiceInput<'a>, steps: &[ServiceChange]) -> BTreeSet<&'a HostName> {
    let taken = steps.iter().filter_map(|step| match step {
        ServiceChange::SetHolder {
            service,
            planned: false,
            ..
        } => {
            let record = input.state.services.get(service)?;
            record.holder.as_ref().map(|holder| &holder.host)
        }
        _ => None,
    });
    taken.collect()
}

/// Why nobody answers for the address.
pub(crate) fn holder_problem(input: &ServiceInput<'_>, record: &ServiceRecord) -> Option<String> {
    if !record.spec.attractor.has_holder() {
        return None;
    }
    let network = &record.spec.network;
    match &record.holder {
        None => Some(format!(
            "no host answers for its address: none is up with network {network}"
        )),
        Some(holder) if !input.may_serve(&holder.host) => Some(format!(
            "{} answered for its address and its lease is over; no other host is up with network {network}",
            holder.host
        )),
        Some(_) => None,
    }
}
