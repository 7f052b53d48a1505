//! Commands about services: rings, holders, health, drains.
//!
//! Always holds: one ring change of a service at a time, each under an epoch of its own; a ring names members only,
//! with the addresses that they have; a holder changes only where the proposer saw the one before.

use super::{Change, unknown};
use crate::command::{Refusal, ServiceChange};
use crate::event::{EventKind, Subject};
use crate::model::State;
use crate::service::{Drain, Health, Holder, RINGS_KEPT, ServiceRecord, slots_for};
use quorate_types::service::{RingMember, RingVersion};
use quorate_types::service_check::{ServiceProblem, Site, find};
use quorate_types::{HostName, ServiceId, ServiceName, ServiceSpec, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// Longest sentence about a member's health, in characters.
const PROBLEM_CHARS: usize = 200;

fn service_mut<'c>(
    change: &'c mut Change<'_>,
    service: &ServiceName,
) -> Result<&'c mut ServiceRecord, Refusal> {
    let found = change.state.services.get_mut(service);
    found.ok_or_else(|| unknown("service", service))
}

fn tell(change: &mut Change<'_>, kind: EventKind, service: &ServiceName, text: impl Into<String>) {
    let subject = Subject::Object(format!("service/{service}"));
    change.event(kind, subject, text);
}

fn stale(what: &ServiceName, why: String) -> Refusal {
    Refusal::Action {
        action: format!("change service {what}"),
        why,
    }
}

/// What is wrong with services as they are defined.
pub(super) fn problems(state: &State) -> BTreeSet<ServiceProblem> {
    let vms = state.vms.iter().filter(|(_, vm)| !vm.deleting);
    let services = state.services.iter();
    let site = Site {
        networks: (state.networks.iter().map(|(name, of)| (name, &of.spec))).collect(),
        vms: vms.map(|(name, vm)| (name, &vm.spec)).collect(),
        services: services.map(|(name, of)| (name, &of.spec)).collect(),
    };
    find(&site).into_iter().collect()
}

/// Refuses what was not wrong before: a label that the last member lost elsewhere must not stop other changes.
pub(super) fn still_right(state: &State, before: &BTreeSet<ServiceProblem>) -> Result<(), Refusal> {
    let after = problems(state);
    let new = after.difference(before);
    let new: Vec<String> = new
        .map(|problem| format!("service {}: {}", problem.service, problem.message))
        .collect();
    match new.is_empty() {
        true => Ok(()),
        false => Err(Refusal::Invalid(new)),
    }
}

/// Creates or changes the services of a manifest.
pub(super) fn put(change: &mut Change<'_>, services: &BTreeMap<ServiceName, ServiceSpec>) {
    for (name, spec) in services {
        let revision = change.revision;
        if let Some(old) = change.state.services.get_mut(name) {
            if old.spec == *spec {
                continue;
            }
            old.spec = spec.clone();
            old.changed = revision;
            // Another check may come to another result.
            old.health.clear();
            tell(
                change,
                EventKind::Changed,
                name,
                format!("service {name} changed"),
            );
            continue;
        }
        let id = ServiceId(change.state.last_service.0 + 1);
        change.state.last_service = id;
        let record = ServiceRecord {
            spec: spec.clone(),
            id,
            slots: slots_for(change.state.services.len()),
            history: Vec::new(),
            next: None,
            last_epoch: 0,
            holder: None,
            draining: BTreeMap::new(),
            health: BTreeMap::new(),
            changed: revision,
        };
        change.state.services.insert(name.clone(), record);
        tell(
            change,
            EventKind::Changed,
            name,
            format!("service {name} created"),
        );
    }
}

pub(super) fn delete(change: &mut Change<'_>, service: &ServiceName) -> Result<(), Refusal> {
    if change.state.services.remove(service).is_none() {
        return Err(unknown("service", service));
    }
    tell(
        change,
        EventKind::Changed,
        service,
        format!("service {service} deleted"),
    );
    Ok(())
}

/// Each by itself: one that was overtaken does not hold up the others. Refused when none of them fits.
pub(super) fn change_all(
    change: &mut Change<'_>,
    changes: &[ServiceChange],
) -> Result<(), Refusal> {
    let mut first = None;
    let mut done = false;
    for one in changes {
        match change_one(change, one) {
            Ok(()) => done = true,
            Err(refusal) => first = first.or(Some(refusal)),
        }
    }
    match first {
        Some(refusal) if !done => Err(refusal),
        _ => Ok(()),
    }
}

/// Changes nothing where it is refused.
fn change_one(change: &mut Change<'_>, one: &ServiceChange) -> Result<(), Refusal> {
    let service = one.service();
    match one {
        ServiceChange::PrepareRing { epoch, members, .. } => {
            prepare(change, service, *epoch, members)
        }
        ServiceChange::ActivateRing { epoch, .. } => activate(change, service, *epoch),
        ServiceChange::MembersGone { vms, .. } => gone(change, service, vms),
        ServiceChange::AbandonRing { epoch, .. } => abandon(change, service, *epoch),
        ServiceChange::SetHolder {
            host,
            expect,
            planned,
            ..
        } => set_holder(change, service, host, *expect, *planned),
        ServiceChange::HolderSettled { generation, .. } => {
            holder_settled(change, service, *generation)
        }
        ServiceChange::RecordHealth {
            vm,
            healthy,
            problem,
            ..
        } => record_health(change, service, vm, *healthy, problem.as_deref()),
        ServiceChange::DrainEnded { vm, cut, .. } => drain_ended(change, service, vm, *cut),
    }
}

fn prepare(
    change: &mut Change<'_>,
    service: &ServiceName,
    epoch: u64,
    members: &[RingMember],
) -> Result<(), Refusal> {
    let found = change.state.services.get(service);
    let record = found.ok_or_else(|| unknown("service", service))?;
    if let Some(next) = &record.next {
        let why = format!("ring {} is being prepared", next.epoch);
        return Err(stale(service, why));
    }
    if epoch != record.last_epoch + 1 {
        let why = format!("ring {epoch} does not follow ring {}", record.last_epoch);
        return Err(stale(service, why));
    }
    check_members(change.state, &record.spec, members).map_err(|why| stale(service, why))?;
    if record.ring().is_some_and(|ring| ring.members == members) {
        return Err(stale(service, "its ring is that already".into()));
    }
    let record = service_mut(change, service)?;
    record.last_epoch = epoch;
    record.next = Some(RingVersion {
        epoch,
        members: members.to_vec(),
        gone: BTreeSet::new(),
    });
    Ok(())
}

/// Why a list is no ring of a service.
fn check_members(state: &State, spec: &ServiceSpec, members: &[RingMember]) -> Result<(), String> {
    if members.is_empty() {
        return Err("a ring needs a member".into());
    }
    if !members.is_sorted_by(|a, b| a.vm < b.vm) {
        return Err("its members are not in order".into());
    }
    for member in members {
        let vm = state.vms.get(&member.vm);
        let weight = vm.and_then(|vm| spec.weight(&member.vm, &vm.spec.labels));
        let Some(weight) = weight else {
            return Err(format!("{} is not a member", member.vm));
        };
        if weight != member.weight {
            return Err(format!("the weight of {} is {weight}", member.vm));
        }
        let wanted = state.ring_member(spec, &member.vm, weight);
        if wanted.as_ref() != Some(member) {
            return Err(format!(
                "{} has another address in network {}",
                member.vm, spec.network
            ));
        }
    }
    Ok(())
}

fn activate(change: &mut Change<'_>, service: &ServiceName, epoch: u64) -> Result<(), Refusal> {
    let record = service_mut(change, service)?;
    let next = record.next.take_if(|next| next.epoch == epoch);
    let Some(next) = next else {
        return Err(stale(
            service,
            format!("ring {epoch} is not being prepared"),
        ));
    };
    let before = record.ring().map(|ring| ring.members.clone());
    let text = describe(service, before.as_deref().unwrap_or_default(), &next);
    record.history.push(next);
    if record.history.len() > RINGS_KEPT {
        record.history.remove(0);
    }
    tell(change, EventKind::Service, service, text);
    Ok(())
}

fn gone(
    change: &mut Change<'_>,
    service: &ServiceName,
    vms: &BTreeSet<VmName>,
) -> Result<(), Refusal> {
    let record = service_mut(change, service)?;
    let in_use = |vm: &&VmName| record.ring().is_some_and(|ring| ring.has(vm));
    if let Some(vm) = vms.iter().find(in_use) {
        return Err(stale(service, format!("{vm} gets connections")));
    }
    for vm in vms {
        forget_in_rings(record, vm);
    }
    Ok(())
}

/// What a ring changes, in words.
fn describe(service: &ServiceName, before: &[RingMember], ring: &RingVersion) -> String {
    let had = |vm: &VmName| before.iter().any(|member| member.vm == *vm);
    let new = ring.members.iter().filter(|member| !had(&member.vm));
    let joined: Vec<String> = new.map(|member| format!("+{}", member.vm)).collect();
    let gone = before.iter().filter(|member| !ring.has(&member.vm));
    let left: Vec<String> = gone.map(|member| format!("-{}", member.vm)).collect();
    let mut changes = [joined, left].concat();
    if changes.is_empty() {
        changes.push("weights or addresses".into());
    }
    let count = match ring.members.len() {
        1 => "1 member".to_owned(),
        count => format!("{count} members"),
    };
    format!(
        "service {service}: ring {} with {count} ({})",
        ring.epoch,
        changes.join(" ")
    )
}

fn abandon(change: &mut Change<'_>, service: &ServiceName, epoch: u64) -> Result<(), Refusal> {
    let record = service_mut(change, service)?;
    match record.next.take_if(|next| next.epoch == epoch) {
        Some(_) => Ok(()),
        None => Err(stale(
            service,
            format!("ring {epoch} is not being prepared"),
        )),
    }
}

fn set_holder(
    change: &mut Change<'_>,
    service: &ServiceName,
    host: &HostName,
    expect: u64,
    planned: bool,
) -> Result<(), Refusal> {
    if !change.state.hosts.contains_key(host) {
        return Err(unknown("host", host));
    }
    let at = change.envelope.at;
    let record = service_mut(change, service)?;
    let old = record.holder.as_ref();
    let generation = old.map_or(0, |holder| holder.generation);
    if generation != expect {
        let why = format!("its holder is of generation {generation}, not {expect}");
        return Err(stale(service, why));
    }
    if !record.spec.attractor.has_holder() {
        let attractor = record.spec.attractor;
        return Err(stale(
            service,
            format!("with `{attractor}` no host holds the address"),
        ));
    }
    let before = old.map(|holder| holder.host.clone());
    let old_leaving = old.and_then(|holder| holder.leaving.clone());
    if before.as_ref() == Some(host) {
        return Err(stale(service, format!("{host} holds the address already")));
    }
    let text = match &before {
        None => format!("service {service}: {host} answers for its address"),
        Some(before) if planned => {
            format!("service {service}: {host} answers for its address, {before} until then")
        }
        Some(before) => {
            format!(
                "service {service}: {host} answers for its address; the lease of {before} ran out"
            )
        }
    };
    record.holder = Some(Holder {
        host: host.clone(),
        generation: generation + 1,
        since: at,
        leaving: match planned {
            true => before,
            // Whoever answers still, because an earlier move has not ended, goes on.
            false => old_leaving.filter(|leaving| leaving != host),
        },
    });
    tell(change, EventKind::Service, service, text);
    Ok(())
}

fn holder_settled(
    change: &mut Change<'_>,
    service: &ServiceName,
    generation: u64,
) -> Result<(), Refusal> {
    let record = service_mut(change, service)?;
    match record.holder.as_mut() {
        Some(holder) if holder.generation == generation => {
            holder.leaving = None;
            Ok(())
        }
        _ => Err(stale(service, "its holder changed meanwhile".into())),
    }
}

fn record_health(
    change: &mut Change<'_>,
    service: &ServiceName,
    vm: &VmName,
    healthy: bool,
    problem: Option<&str>,
) -> Result<(), Refusal> {
    let at = change.envelope.at;
    let labels = change.state.vms.get(vm).map(|vm| vm.spec.labels.clone());
    let record = service_mut(change, service)?;
    let is_member = labels.is_some_and(|labels| record.spec.weight(vm, &labels).is_some());
    if !is_member {
        return Err(stale(service, format!("{vm} is not a member")));
    }
    let old = record.health.get(vm);
    let same = old.is_some_and(|old| old.healthy == healthy);
    let since = old.filter(|_| same).map_or(at, |old| old.since);
    let short = |why: &str| why.chars().take(PROBLEM_CHARS).collect::<String>();
    let problem = problem.filter(|_| !healthy).map(short);
    let text = match (healthy, &problem) {
        (true, _) => format!("service {service}: {vm} is healthy"),
        (false, Some(why)) => format!("service {service}: {vm} does not serve: {why}"),
        (false, None) => format!("service {service}: {vm} does not serve"),
    };
    let health = Health {
        healthy,
        since,
        problem,
    };
    record.health.insert(vm.clone(), health);
    if !same {
        tell(change, EventKind::Service, service, text);
    }
    Ok(())
}

pub(super) fn drain(
    change: &mut Change<'_>,
    service: &ServiceName,
    vm: &VmName,
) -> Result<(), Refusal> {
    let (at, by) = (change.envelope.at, change.envelope.by.clone());
    let found = change.state.services.get(service);
    let record = found.ok_or_else(|| unknown("service", service))?;
    let is_member = change
        .state
        .members(&record.spec)
        .any(|(name, ..)| name == vm);
    if !is_member {
        return Err(Refusal::InUse(format!(
            "VM {vm} is not a member of service {service}: `quorate service show {service}` lists them"
        )));
    }
    let record = service_mut(change, service)?;
    if record.draining.contains_key(vm) {
        return Ok(());
    }
    let drain = Drain {
        since: at,
        by,
        ended: None,
    };
    record.draining.insert(vm.clone(), drain);
    let text = format!("service {service}: {vm} gets no new connections");
    tell(change, EventKind::Service, service, text);
    Ok(())
}

fn drain_ended(
    change: &mut Change<'_>,
    service: &ServiceName,
    vm: &VmName,
    cut: u64,
) -> Result<(), Refusal> {
    let at = change.envelope.at;
    let record = service_mut(change, service)?;
    let in_use = record.ring().is_some_and(|ring| ring.has(vm))
        || record.next.as_ref().is_some_and(|next| next.has(vm));
    if in_use {
        return Err(stale(service, format!("{vm} gets connections still")));
    }
    match record.draining.get_mut(vm) {
        Some(drain) if drain.ended.is_none() => drain.ended = Some((at, cut)),
        _ => return Err(stale(service, format!("{vm} is not being drained"))),
    }
    forget_in_rings(record, vm);
    let text = match cut {
        0 => format!("service {service}: {vm} is drained, no connection was cut"),
        1 => format!("service {service}: {vm} is drained; 1 connection was cut at the time-out"),
        cut => format!(
            "service {service}: {vm} is drained; {cut} connections were cut at the time-out"
        ),
    };
    tell(change, EventKind::Service, service, text);
    Ok(())
}

pub(super) fn resume(
    change: &mut Change<'_>,
    service: &ServiceName,
    vm: &VmName,
) -> Result<(), Refusal> {
    let record = service_mut(change, service)?;
    if record.draining.remove(vm).is_none() {
        return Err(Refusal::InUse(format!(
            "VM {vm} is not being drained from service {service}"
        )));
    }
    let text = format!("service {service}: {vm} gets connections again");
    tell(change, EventKind::Service, service, text);
    Ok(())
}

/// No flow is looked for at a member any more. The ring in force never loses one this way.
fn forget_in_rings(record: &mut ServiceRecord, vm: &VmName) {
    let active = record.active();
    for ring in &mut record.history {
        if ring.epoch != active && ring.has(vm) {
            ring.gone.insert(vm.clone());
        }
    }
}

/// A guest was started or ended: what was known of its health was another life's. Its place in older rings is given up by
/// the leader alone ([`ServiceChange::MembersGone`]): a director that lags may send new connections to the new life.
pub(super) fn new_life(state: &mut State, vm: &VmName) {
    for record in state.services.values_mut() {
        record.health.remove(vm);
    }
}

/// A VM is gone: so is everything that was said of it.
pub(super) fn forget_vm(state: &mut State, vm: &VmName) {
    for record in state.services.values_mut() {
        record.spec.members.remove(vm);
        record.draining.remove(vm);
        record.health.remove(vm);
    }
}

/// A host has left: it answers for nothing.
pub(super) fn forget_host(state: &mut State, host: &HostName) {
    for record in state.services.values_mut() {
        let Some(holder) = &mut record.holder else {
            continue;
        };
        if holder.leaving.as_ref() == Some(host) {
            holder.leaving = None;
        }
    }
}

/// Services of which this VM is the only member by name, where members come by no label.
pub(super) fn left_empty<'a>(state: &'a State, vm: &'a VmName) -> Option<&'a ServiceName> {
    let only = |service: &ServiceRecord| {
        let mut members = service.spec.members.keys();
        let one = members.next() == Some(vm) && members.next().is_none();
        one && service.spec.select.is_empty()
    };
    let mut services = state.services.iter();
    services
        .find(|(_, service)| only(service))
        .map(|(name, _)| name)
}
