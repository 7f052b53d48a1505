//! What is wrong with the cluster, the lowest broken layer first: quorum, hosts, links, storage,
//! network, VMs. A VM that only suffers from a lower layer's fault is not listed again.

use super::{Observed, problem};
use crate::services::{MemberState, MemberView};
use crate::view::{ClusterView, HostState, HostView, Level, ProblemView, VmState};
use quorate_state::HostMode;
use std::collections::BTreeSet;

pub(super) fn problems(view: &ClusterView, seen: &Observed) -> Vec<ProblemView> {
    let mut found = Vec::new();
    quorum(view, &mut found);
    for text in &seen.problems {
        found.push(problem(Level::Error, "cluster", text.clone()));
    }
    for host in &view.hosts {
        down(view, host, &mut found);
    }
    links(view, &mut found);
    for host in &view.hosts {
        unarmed(view, host, &mut found);
    }
    storage_and_network(view, &mut found);
    vms(view, &mut found);
    services(view, &mut found);
    let mut seen_texts = BTreeSet::new();
    found.retain(|problem| seen_texts.insert(problem.text.clone()));
    found
}

fn quorum(view: &ClusterView, found: &mut Vec<ProblemView>) {
    if view.cluster.quorate {
        return;
    }
    let me = &view.cluster.answered_by;
    let text = match &view.cluster.leader {
        Some(leader) if leader != me => format!(
            "no quorum: {leader} leads but has not confirmed a majority; start the hosts that are down or mend the network"
        ),
        _ => format!(
            "no quorum: {me} hears no leader with a majority, so nothing can be changed and guests are frozen; start the other hosts or mend the network"
        ),
    };
    found.push(problem(Level::Error, "cluster", text));
}

fn down(view: &ClusterView, host: &HostView, found: &mut Vec<ProblemView>) {
    let name = &host.name;
    let about = format!("host/{name}");
    match host.state {
        HostState::Down if host.vms.is_empty() => {
            let text = format!(
                "host {name} is down; start it, or `quorate host remove {name}` if it is gone for good"
            );
            found.push(problem(Level::Error, about, text));
        }
        HostState::Down => {
            let vms: Vec<&str> = host.vms.iter().map(|vm| vm.as_str()).collect();
            let vms = vms.join(", ");
            let text = match &host.fencing_problem {
                Some(why) => format!(
                    "host {name} is down and still owns {vms}: {why}; make sure that it is off, then `quorate host confirm-dead {name}`"
                ),
                None => format!(
                    "host {name} is down and still owns {vms}: waiting for proof that it runs nothing; if you know that it is off, `quorate host confirm-dead {name}`"
                ),
            };
            found.push(problem(Level::Error, about, text));
        }
        HostState::Suspect => {
            let text = format!("host {name} has not been heard for a moment");
            found.push(problem(Level::Warning, about, text));
        }
        HostState::Joining if view.cluster.quorate => {
            let text =
                format!("host {name} has not reported yet; is `quorate serve` running there?");
            found.push(problem(Level::Warning, about, text));
        }
        _ => {}
    }
}

/// Each broken link once, not from both ends, and not those to hosts that are down.
fn links(view: &ClusterView, found: &mut Vec<ProblemView>) {
    let mut told = BTreeSet::new();
    for host in &view.hosts {
        for link in &host.links_down {
            let other = view.hosts.iter().find(|other| other.name == link.to);
            if other.is_none_or(|other| other.state == HostState::Down)
                || host.state == HostState::Down
            {
                continue;
            }
            let (a, b) = if host.name < link.to {
                (&host.name, &link.to)
            } else {
                (&link.to, &host.name)
            };
            if !told.insert((a.clone(), b.clone())) {
                continue;
            }
            let relay = match &link.relayed_by {
                Some(relay) => format!(" ({relay} relays)"),
                None => String::new(),
            };
            let text = format!(
                "{a} and {b} cannot reach each other directly{relay}; mend the network between them"
            );
            found.push(problem(Level::Warning, format!("host/{a}"), text));
        }
    }
}

fn unarmed(view: &ClusterView, host: &HostView, found: &mut Vec<ProblemView>) {
    let name = &host.name;
    if host.state != HostState::Up || view.hosts.len() < 2 {
        return;
    }
    if let Some(why) = &host.fencing_problem {
        let text = format!("fencing of {name}: {why}");
        found.push(problem(Level::Warning, format!("host/{name}"), text));
    }
    if (!host.guard || host.watchdog_ms.is_none()) && host.fencing.is_empty() {
        let what = if host.guard { "watchdog" } else { "guard" };
        let text = format!(
            "if {name} fails, its VMs cannot be taken over without you: its {what} is not armed and it has no fence device; load a watchdog driver (`modprobe softdog` at least) or add it under `cluster: fencing:`"
        );
        found.push(problem(Level::Warning, format!("host/{name}"), text));
    }
    if host.mode == HostMode::Draining && !host.vms.is_empty() {
        let text = format!("host {name} is being drained: {} VMs to go", host.vms.len());
        found.push(problem(Level::Warning, format!("host/{name}"), text));
    }
}

fn storage_and_network(view: &ClusterView, found: &mut Vec<ProblemView>) {
    for pool in &view.pools {
        for broken in &pool.broken_on {
            let text = format!(
                "pool {} cannot be used on {}: {}",
                pool.name, broken.host, broken.problem
            );
            found.push(problem(Level::Error, format!("pool/{}", pool.name), text));
        }
        if let (Some(free), Some(total)) = (pool.free, pool.total)
            && total > 0
            && free < total / 20
        {
            let text = format!(
                "pool {} is almost full ({} % free): make room or guests will stop on write errors",
                pool.name,
                u128::from(free) * 100 / u128::from(total)
            );
            found.push(problem(Level::Warning, format!("pool/{}", pool.name), text));
        }
    }
    for network in &view.networks {
        if !network.down_on.is_empty() {
            let hosts: Vec<&str> = network.down_on.iter().map(|host| host.as_str()).collect();
            let text = format!(
                "network {}: the bridge {} is missing or down on {}; create it there, or name an `uplink`",
                network.name,
                network.spec.bridge,
                hosts.join(", ")
            );
            found.push(problem(
                Level::Error,
                format!("network/{}", network.name),
                text,
            ));
        }
    }
}

/// The highest layer: what is told here is not the fault of one below, or shows whom that one hurts.
fn services(view: &ClusterView, found: &mut Vec<ProblemView>) {
    for service in &view.services {
        let name = &service.name;
        let serves = |member: &MemberView| {
            matches!(member.state, MemberState::Serving | MemberState::Moving)
        };
        let level = match service.members.iter().any(serves) && service.epoch > 0 {
            true => Level::Warning,
            false => Level::Error,
        };
        for text in &service.problems {
            let text = format!("service {name}: {text}");
            found.push(problem(level, format!("service/{name}"), text));
        }
    }
}

fn vms(view: &ClusterView, found: &mut Vec<ProblemView>) {
    for vm in &view.vms {
        let name = &vm.name;
        let because = if vm.why.is_empty() {
            String::new()
        } else {
            format!(": {}", vm.why)
        };
        let (level, text) = match vm.state {
            VmState::Failing => (
                Level::Error,
                format!("VM {name} fails{because}; `quorate vm logs {name}` shows its console"),
            ),
            // Its turn comes by itself.
            VmState::Waiting if !vm.waiting_for.is_empty() => {
                let names: Vec<&str> = vm.waiting_for.iter().map(|vm| vm.as_str()).collect();
                let text = format!("VM {name} waits for {}", names.join(", "));
                (Level::Warning, text)
            }
            VmState::Waiting => (Level::Error, format!("VM {name} waits{because}")),
            VmState::Frozen => (
                Level::Error,
                format!("VM {name} is frozen until its host hears the leader again"),
            ),
            VmState::Running if !vm.ready && vm.problem.is_some() => {
                let problem = vm.problem.as_deref().unwrap_or_default();
                (
                    Level::Warning,
                    format!("VM {name} runs and is not ready: {problem}"),
                )
            }
            _ => continue,
        };
        found.push(problem(level, format!("vm/{name}"), text));
    }
}
