//! Primitives: VMs, fence devices, and those that are neither.

use super::super::judge::{Judged, NoQuorum, Thing};
use super::super::model::Cib;
use super::super::rules::{Facts, resolve};
use super::super::values;
use super::draft::{Device, Draft, Host, Rule, RuleKind, Vm, valid_name};
use crate::Place;
use quorate_planner::engine::{INFINITY, Strategy};
use std::collections::{BTreeMap, BTreeSet};

/// Agents that run virtual machines.
const VM_AGENTS: &[&str] = &[
    "VirtualDomain",
    "Xen",
    "KVM",
    "kvm",
    "qemu",
    "QEMU",
    "VBoxMachine",
];

/// Names of utilization that mean memory in MiB, and CPUs.
const MEMORY: &[&str] = &["hv_memory", "memory", "ram", "mem"];
const CPUS: &[&str] = &["cpu", "cpus", "vcpu", "vcpus"];

/// Most copies of one clone.
const MAX_COPIES: usize = 64;

/// Memory of a VM of which the CIB does not say how much it has.
const GUESSED_MIB: u64 = 1024;

pub(super) fn collect(draft: &mut Draft, cib: &Cib, judged: &Judged, every: bool) {
    properties(draft, judged);
    for (node, host) in cib.nodes.iter().zip(&judged.hosts) {
        for (on, word) in [
            (host.standby && !host.joining, "standby"),
            (host.maintenance, "maintenance"),
        ] {
            if on {
                let message = format!(
                    "node \"{}\" is in {word}: that is no part of a manifest",
                    node.name
                );
                draft.note(node.place, message, "`quorate host drain HOST` empties it");
            }
        }
    }
    for (node, host) in cib.nodes.iter().zip(&judged.hosts) {
        let resources = others(&host.utilization);
        if let Some(name) = draft
            .of_node
            .get(&node.name)
            .filter(|_| !resources.is_empty())
        {
            let host = Host {
                resources,
                ..Host::default()
            };
            draft.hosts.insert(name.clone(), host);
        }
    }
    for thing in judged.things.iter().filter(|thing| !thing.removed) {
        let is_vm = thing
            .kind
            .as_deref()
            .is_some_and(|kind| VM_AGENTS.contains(&kind));
        if thing.fence_device {
            fence_device(draft, judged, thing);
        } else if is_vm || every {
            let name = draft.vm_name(&thing.id);
            draft.of_resource.insert(thing.id.clone(), name.clone());
            vm(draft, judged, thing, name);
        } else {
            let agent = [&thing.class, &thing.provider, &thing.kind];
            let agent: Vec<&str> = agent.into_iter().flatten().map(String::as_str).collect();
            let message = format!("\"{}\" is no VM ({})", thing.id, agent.join(":"));
            draft.note(
                thing.place,
                message,
                "run it inside a VM, or let Quorate take its part",
            );
        }
    }
    clones(draft, cib, judged, every);
    drop_impossible_resources(draft);
}

/// A resource that no host has is none: Pacemaker ignores utilization unless a strategy asks for it.
fn drop_impossible_resources(draft: &mut Draft) {
    let most = |name: &str| {
        let hosts = draft.hosts.values();
        hosts
            .filter_map(|host| host.resources.get(name).copied())
            .max()
            .unwrap_or(0)
    };
    let mut dropped = Vec::new();
    for (vm, spec) in &draft.vms {
        for (name, amount) in &spec.resources {
            if *amount > most(name) {
                dropped.push((vm.clone(), name.clone(), spec.place));
            }
        }
    }
    for (vm, name, place) in dropped {
        draft.note(
            place,
            format!("{vm}: no host has that much of \"{name}\": left out"),
            "",
        );
        if let Some(vm) = draft.vms.get_mut(&vm) {
            vm.resources.remove(&name);
        }
    }
}

/// Amounts that are neither memory nor CPUs: countable resources.
fn others(utilization: &BTreeMap<String, String>) -> BTreeMap<String, u64> {
    let known = |name: &str| MEMORY.contains(&name) || CPUS.contains(&name);
    let others = utilization.iter().filter(|(name, _)| !known(name));
    others
        .filter_map(|(name, value)| {
            let amount = values::amount(value).and_then(|amount| u64::try_from(amount).ok())?;
            Some((valid_name(name), amount)).filter(|(_, amount)| *amount > 0)
        })
        .collect()
}

/// Copies of a VM become VMs of their own that are kept apart.
fn clones(draft: &mut Draft, cib: &Cib, judged: &Judged, every: bool) {
    for clone in &cib.clones {
        let is_vm = clone
            .primitive
            .kind
            .as_deref()
            .is_some_and(|kind| VM_AGENTS.contains(&kind));
        if !is_vm && !every {
            continue;
        }
        let facts = Facts {
            now: judged.now,
            ..Facts::default()
        };
        let meta = resolve(&clone.meta, &facts, None);
        let number = |name: &str| {
            meta.get(name)
                .and_then(|text| text.trim().parse::<usize>().ok())
        };
        let copies = number("clone-max")
            .unwrap_or(judged.hosts.len())
            .min(MAX_COPIES);
        let thing = judged.copy_of(cib, clone);
        let mut vms = BTreeSet::new();
        for copy in 1..=copies {
            let name = draft.vm_name(&format!("{}-{copy}", clone.primitive.id));
            vms.insert(name.clone());
            vm(draft, judged, &thing, name);
        }
        let apart = number("clone-node-max").unwrap_or(1) <= 1;
        let message = format!("clone \"{}\" becomes {copies} VMs", clone.id);
        draft.note(clone.place, message, "give each its own disks");
        if apart {
            let rule = Rule {
                place: clone.place,
                kind: RuleKind::Apart,
                vms,
                weight: None,
                across: None,
            };
            draft.rule(&clone.id, rule);
        }
        draft.carried.push(clone.place);
    }
}

/// What the cluster's properties mean for Quorate.
fn properties(draft: &mut Draft, judged: &Judged) {
    let options = &judged.options;
    let start = Place { line: 1, column: 1 };
    if !options.fencing {
        let message = "fencing is disabled: Quorate starts a VM elsewhere only with a proof that it is stopped";
        draft.note(
            start,
            message,
            "give fence devices under `cluster.fencing`, or arm watchdogs on the hosts",
        );
    }
    if options.no_quorum != NoQuorum::Stop {
        let message =
            "no-quorum-policy: without a majority Quorate freezes guests, then hands them over";
        draft.note(start, message, "");
    }
    if options.strategy != Strategy::Spread {
        draft.note(
            start,
            "placement-strategy: capacity always counts in Quorate",
            "",
        );
    }
}

fn vm(draft: &mut Draft, judged: &Judged, thing: &Thing, name: String) {
    if name != thing.id {
        draft.note(
            thing.place,
            format!("resource \"{}\" is called {name}", thing.id),
            "",
        );
    }
    let amount = |names: &[&str]| {
        let found = names.iter().find_map(|name| thing.utilization.get(*name));
        found
            .and_then(|text| values::amount(text))
            .filter(|amount| *amount > 0)
    };
    let memory = amount(MEMORY)
        .and_then(|mib| u64::try_from(mib).ok())
        .filter(|mib| *mib >= 16);
    if memory.is_none() {
        let message =
            format!("{name}: the CIB does not say its memory: {GUESSED_MIB} MiB are assumed");
        draft.note(thing.place, message, "write its real size under `memory:`");
    }
    let facts = thing.facts(judged.now);
    let parameters = resolve(&thing.parameters, &facts, None);
    let from = parameters.get("config").or(parameters.get("xmfile"));
    let source = from.map_or_else(String::new, |path| format!(" (they are in {path})"));
    let message =
        format!("{name}: disks and networks are not in the CIB{source}: one disk is assumed");
    draft.note(thing.place, message, "write its real disks and NICs");
    notes_on_meta(draft, thing, &name);
    let cpus = amount(CPUS)
        .and_then(|cpus| u32::try_from(cpus).ok())
        .unwrap_or(1);
    let stop = thing
        .operations
        .iter()
        .find(|operation| operation.name == "stop");
    let shutdown_ms = stop
        .and_then(|stop| stop.attributes.get("timeout"))
        .and_then(|text| values::duration_ms(text));
    let vm = Vm {
        place: thing.place,
        cpus: cpus.min(1024),
        memory_mib: memory.unwrap_or(GUESSED_MIB),
        priority: i32::try_from(thing.priority).unwrap_or(0),
        stopped: thing.target().is_some(),
        live: thing.live,
        shutdown_s: shutdown_ms.map(|ms| ms / 1000).filter(|s| *s > 0),
        resources: others(&thing.utilization),
        ..Vm::default()
    };
    draft.vms.insert(name, vm);
}

/// Meta attributes that have no counterpart, or that Quorate handles by itself.
fn notes_on_meta(draft: &mut Draft, thing: &Thing, name: &str) {
    let mut note =
        |message: String, hint: &str| draft.note(thing.place, format!("{name}: {message}"), hint);
    if !thing.managed {
        let hint = "apply the manifest when Quorate may touch it";
        note(
            "it is not managed, which is no part of a manifest".to_owned(),
            hint,
        );
    }
    if thing.stickiness != 0 {
        let message = format!(
            "stickiness {}: Quorate moves nothing without a reason",
            thing.stickiness
        );
        note(message, "");
    }
    if thing.threshold < INFINITY {
        let message = format!(
            "migration-threshold {}: restarts back off by themselves",
            thing.threshold
        );
        note(message, "");
    }
    if thing.failure_timeout_ms > 0 {
        note(
            "failure-timeout: failures are forgotten by themselves".to_owned(),
            "",
        );
    }
}

/// A fence device goes to the hosts that it can fence.
fn fence_device(draft: &mut Draft, judged: &Judged, thing: &Thing) {
    let agent = thing.kind.clone().unwrap_or_default();
    let parameters = resolve(&thing.parameters, &thing.facts(judged.now), None);
    let map = parameters
        .get("pcmk_host_map")
        .map(String::as_str)
        .unwrap_or_default();
    let split = |text: &str| -> Vec<String> {
        let words = text
            .split([' ', ',', ';', '\t'])
            .filter(|word| !word.is_empty());
        words.map(str::to_owned).collect()
    };
    let mut targets: BTreeMap<String, Option<String>> = BTreeMap::new();
    for word in split(map) {
        if let Some((host, port)) = word.split_once([':', '=']) {
            targets.insert(host.to_owned(), Some(port.to_owned()));
        }
    }
    for host in split(
        parameters
            .get("pcmk_host_list")
            .map(String::as_str)
            .unwrap_or_default(),
    ) {
        targets.entry(host).or_default();
    }
    if targets.is_empty() || !agent.starts_with("fence_") {
        let message = format!(
            "fence device \"{}\" ({agent}) does not say which hosts it fences",
            thing.id
        );
        draft.note(
            thing.place,
            message,
            "write it under `cluster: {fencing: {HOST: [...]}}`",
        );
        return;
    }
    let own = parameters
        .iter()
        .filter(|(name, _)| !name.starts_with("pcmk_"));
    let own: BTreeMap<String, String> = own.map(|(n, v)| (n.clone(), v.clone())).collect();
    for (host, port) in targets {
        let Some(host) = draft.of_node.get(&host).cloned() else {
            let message = format!("fence device \"{}\": there is no node \"{host}\"", thing.id);
            draft.note(thing.place, message, "");
            continue;
        };
        let mut options = own.clone();
        if !own.contains_key("plug") && !own.contains_key("port") {
            options.extend(port.map(|port| ("plug".to_owned(), port)));
        }
        let device = Device {
            agent: agent.clone(),
            options,
        };
        draft.fencing.entry(host).or_default().push(device);
    }
}
