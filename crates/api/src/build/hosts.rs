//! Hosts of the view.

use super::{Observed, ObservedHost};
use crate::view::{HostState, HostView, LinkView, ResourceView};
use quorate_membership::HostHealth;
use quorate_state::{HostRecord, State};
use quorate_types::{ByteSize, HostName};

pub(super) fn hosts(state: &State, seen: &Observed, known: bool) -> Vec<HostView> {
    state
        .hosts
        .iter()
        .map(|(name, record)| host(state, seen, known, name, record))
        .collect()
}

fn host(
    state: &State,
    seen: &Observed,
    known: bool,
    name: &HostName,
    record: &HostRecord,
) -> HostView {
    let observed = seen.hosts.get(name);
    let report = observed.and_then(|host| host.report.as_ref());
    let settings = state.settings();
    let agents = settings.fencing.get(name);
    let links = report.map(|report| &report.links);
    HostView {
        name: name.clone(),
        address: record.address.clone(),
        state: host_state(observed, known),
        mode: record.mode,
        leader: seen.leader.as_ref() == Some(name),
        voter: seen.voters.contains(&record.node),
        lease_ms_left: observed.map(|host| host.lease_left.0),
        guard: report.is_some_and(|report| report.guard_armed),
        watchdog_ms: report.and_then(|report| report.watchdog_ms),
        fencing: agents
            .into_iter()
            .flatten()
            .map(|device| device.agent.clone())
            .collect(),
        fencing_problem: observed.and_then(|host| host.fencing.clone()),
        version: report.map(|report| report.version.clone()),
        accel: report.map(|report| report.hypervisor.accel.clone()),
        qemu: report.map(|report| report.hypervisor.qemu.clone()),
        capacity: report.map(|report| report.capacity.into()),
        used: used(state, name),
        links_down: links
            .into_iter()
            .flatten()
            .filter(|(_, link)| !link.up)
            .map(|(to, link)| LinkView {
                to: to.clone(),
                relayed_by: link.relayed_by.clone(),
                error: link.error.clone(),
            })
            .collect(),
        vms: state
            .vms
            .iter()
            .filter(|(_, vm)| vm.ownership.host() == Some(name))
            .map(|(vm, _)| vm.clone())
            .collect(),
    }
}

fn host_state(observed: Option<&ObservedHost>, known: bool) -> HostState {
    match observed {
        None if known => HostState::Joining,
        None => HostState::Unknown,
        Some(host) => match host.health {
            // A new host or a new leader: it is counted as alive until it is heard.
            HostHealth::Up if host.report.is_none() => HostState::Joining,
            HostHealth::Up => HostState::Up,
            HostHealth::Suspect => HostState::Suspect,
            HostHealth::Expired | HostHealth::Dead => HostState::Down,
        },
    }
}

/// What a host's guests are defined with, incoming ones included.
fn used(state: &State, name: &HostName) -> ResourceView {
    let mut used = ResourceView::default();
    for vm in state.vms.values() {
        if vm.ownership.hosts().iter().any(|(host, _)| *host == name) {
            let spec = vm.effective();
            used.cpus = used.cpus.saturating_add(spec.cpus);
            used.memory = ByteSize(used.memory.0.saturating_add(spec.memory.0));
        }
    }
    used
}
