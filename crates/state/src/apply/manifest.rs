//! Commands by which operators say what they want.

use super::{Change, unknown};
use crate::command::Refusal;
use crate::event::{EventKind, Subject};
use crate::model::{MoveRequest, Object, OrderKind, Ownership, State, StopMode, VmRecord};
use crate::quorum::Witness;
use quorate_types::conflict::{self, Conflict};
use quorate_types::spec::{Power, RuleKind};
use quorate_types::{
    HostName, Manifest, NetworkName, PoolName, Revision, RuleName, VmName, VmSpec,
};
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn apply(
    change: &mut Change<'_>,
    base: Option<Revision>,
    manifest: &Manifest,
) -> Result<(), Refusal> {
    if let Some(base) = base {
        let newest = newest_object(change.state);
        if newest > base {
            return Err(Refusal::Stale {
                what: "the cluster's configuration".into(),
                base,
            });
        }
    }
    let before = conflicts(change.state);
    let wrong = super::services::problems(change.state);
    if let Some(settings) = &manifest.cluster {
        settings
            .check()
            .map_err(|problem| Refusal::Invalid(vec![problem]))?;
        set_settings(change, settings);
    }
    for (name, spec) in &manifest.hosts {
        super::cluster::set_spec(change, name, spec)?;
    }
    put_all(change, "network", &manifest.networks, |state| {
        &mut state.networks
    });
    for (name, spec) in &manifest.pools {
        // Another place has another content.
        if change
            .state
            .pools
            .get(name)
            .is_some_and(|old| old.spec != *spec)
        {
            change.state.pool_markers.remove(name);
            change.state.pool_drills.remove(name);
            change.state.unit_takes.remove(name);
        }
        kind_stays(change, name, spec)?;
    }
    put_all(change, "pool", &manifest.pools, |state| &mut state.pools);
    put_all(change, "rule", &manifest.rules, |state| &mut state.rules);
    for (name, spec) in &manifest.vms {
        put_vm(change, name, spec)?;
    }
    super::services::put(change, &manifest.services);
    super::services::still_right(change.state, &wrong)?;
    still_holds(change, &before)
}

/// Refuses a change after which the definitions contradict each other in a way they did not
/// before: what stood already (a host was removed) must not stop other changes.
pub(super) fn still_holds(change: &Change<'_>, before: &[Conflict]) -> Result<(), Refusal> {
    let mut problems = check(change.state);
    // What a program of format 1 accepted stays accepted when its log is read again.
    if change.envelope.format < 2 {
        problems.extend(opposite_rules(change.state));
    } else {
        let after = conflicts(change.state).into_iter();
        let new = after.filter(|conflict| !before.contains(conflict));
        problems.extend(new.map(|conflict| conflict.to_string()));
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Refusal::Invalid(problems))
    }
}

fn newest_object(state: &State) -> Revision {
    let vms = state.vms.values().map(|vm| vm.changed);
    let services = state.services.values().map(|service| service.changed);
    vms.chain(services)
        .chain([state.topology_changed])
        .max()
        .unwrap_or_default()
}

fn set_settings(change: &mut Change<'_>, settings: &quorate_types::ClusterSettings) {
    let Some(cluster) = change.state.cluster.as_mut() else {
        return;
    };
    if cluster.settings == *settings {
        return;
    }
    cluster.settings = settings.clone();
    change.topology_changed();
    change.event(
        EventKind::Changed,
        Subject::Cluster,
        "cluster settings changed",
    );
}

fn put_all<K, V>(
    change: &mut Change<'_>,
    kind: &str,
    wanted: &BTreeMap<K, V>,
    place: impl Fn(&mut State) -> &mut BTreeMap<K, Object<V>>,
) where
    K: Ord + Clone + std::fmt::Display,
    V: PartialEq + Clone,
{
    for (name, spec) in wanted {
        let old = place(change.state).get(name);
        if old.is_some_and(|old| old.spec == *spec) {
            continue;
        }
        let verb = if old.is_some() { "changed" } else { "created" };
        let object = Object {
            spec: spec.clone(),
            changed: change.revision,
        };
        place(change.state).insert(name.clone(), object);
        change.topology_changed();
        change.event(
            EventKind::Changed,
            Subject::Object(format!("{kind}/{name}")),
            format!("{kind} {name} {verb}"),
        );
    }
}

fn put_vm(change: &mut Change<'_>, name: &VmName, spec: &VmSpec) -> Result<(), Refusal> {
    let revision = change.revision;
    let first_epoch = change.state.forgotten_epoch;
    let Some(vm) = change.state.vms.get_mut(name) else {
        let record = VmRecord {
            spec: spec.clone(),
            active: None,
            abi: None,
            ownership: Ownership::Free,
            last_epoch: first_epoch,
            saved: None,
            move_request: None,
            failed_moves: 0,
            deleting: false,
            last_host: None,
            decisions: Vec::new(),
            changed: revision,
        };
        change.state.vms.insert(name.clone(), record);
        change.vm_event(EventKind::Changed, name, format!("VM {name} created"));
        return Ok(());
    };
    if vm.deleting {
        return Err(Refusal::InUse(format!(
            "VM {name} is being deleted: apply again when it is gone"
        )));
    }
    if vm.spec == *spec {
        return Ok(());
    }
    vm.spec = spec.clone();
    vm.changed = revision;
    let pending = vm
        .active
        .as_ref()
        .is_some_and(|active| needs_restart(active, spec));
    let text = if pending {
        format!("VM {name} changed; the running guest gets it at its next start")
    } else {
        format!("VM {name} changed")
    };
    change.vm_event(EventKind::Changed, name, text);
    Ok(())
}

/// Whether the running guest differs from what is wanted in something only a start can change.
fn needs_restart(active: &VmSpec, wanted: &VmSpec) -> bool {
    active.cpus != wanted.cpus
        || active.memory != wanted.memory
        || active.machine != wanted.machine
        || active.boot != wanted.boot
        || active.disks != wanted.disks
        || active.nics != wanted.nics
}

/// Rules over the whole state. The `manifest` crate finds the same with positions and hints; this
/// is the last word, because the state may have changed since.
fn check(state: &State) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, vm) in &state.vms {
        for disk in &vm.spec.disks {
            if !state.pools.contains_key(&disk.pool) {
                problems.push(format!("VM {name}: there is no pool `{}`", disk.pool));
            }
        }
        for nic in &vm.spec.nics {
            if !state.networks.contains_key(&nic.network) {
                problems.push(format!("VM {name}: there is no network `{}`", nic.network));
            }
        }
        for other in vm.spec.depends_on.keys() {
            if !state.vms.contains_key(other) {
                problems.push(format!(
                    "VM {name}: depends on `{other}`, which does not exist"
                ));
            }
        }
        for host in &vm.spec.hosts {
            if !state.hosts.contains_key(host) {
                problems.push(format!("VM {name}: there is no host `{host}`"));
            }
        }
    }
    for (name, pool) in &state.pools {
        let secrets = pool.spec.secrets().into_iter();
        for secret in secrets.filter(|secret| !state.secrets.contains_key(*secret)) {
            problems.push(format!(
                "pool {name}: there is no secret `{secret}`: run `quorate secret set {secret}` first"
            ));
        }
    }
    for (name, rule) in &state.rules {
        for vm in rule.spec.vms() {
            if !state.vms.contains_key(vm) {
                problems.push(format!("rule {name}: there is no VM `{vm}`"));
            }
        }
    }
    problems.extend(shared_images(state));
    problems.extend(cycle(state).map(|path| format!("depends_on goes round in a circle: {path}")));
    problems
}

fn shared_images(state: &State) -> Vec<String> {
    let mut users: BTreeMap<String, Vec<(&PoolName, &str, &VmName)>> = BTreeMap::new();
    for (name, vm) in &state.vms {
        for disk in &vm.spec.disks {
            let (pool, image) = (&disk.pool, disk.image.as_str());
            let identity = match state.pools.get(pool) {
                Some(object) => object.spec.identity(pool, image),
                None => format!("{pool}/{image}"),
            };
            users.entry(identity).or_default().push((pool, image, name));
        }
    }
    let witness = state.witness_disk().and_then(|(identity, pool, image)| {
        let (_, _, vm) = users.get(&identity)?.first()?;
        Some(format!(
            "image {image} of pool {pool} has the disk witness on it: VM {vm} needs another"
        ))
    });
    let shared = users.into_values().filter(|users| users.len() > 1);
    let shared = shared.map(|users| {
        let ((pool, image, first), (_, _, second)) = (users[0], users[1]);
        format!(
            "image {image} of pool {pool} is used by {first} and {second}: a disk has one writer"
        )
    });
    shared.chain(witness).collect()
}

/// One cycle of `depends_on`, written as a path, if there is any. Depth first; a VM that was left
/// without finding one is not entered again, so the work grows with the number of dependencies.
fn cycle(state: &State) -> Option<String> {
    let mut done = BTreeSet::new();
    for (start, record) in &state.vms {
        // The way here, each VM with its dependencies that are still to be looked at.
        let mut path = vec![(start, record.spec.depends_on.keys())];
        while let Some((vm, rest)) = path.last_mut() {
            let Some(next) = rest.next() else {
                done.insert(*vm);
                path.pop();
                continue;
            };
            if let Some(at) = path.iter().position(|(seen, _)| *seen == next) {
                let mut names: Vec<_> = path[at..].iter().map(|(vm, _)| vm.to_string()).collect();
                names.push(next.to_string());
                return Some(names.join(" -> "));
            }
            if let Some(record) = state.vms.get(next).filter(|_| !done.contains(next)) {
                path.push((next, record.spec.depends_on.keys()));
            }
        }
    }
    None
}

/// Definitions that nothing can satisfy, each with a minimal set that conflicts.
pub(super) fn conflicts(state: &State) -> Vec<Conflict> {
    let hosts = state.hosts.iter().map(|(name, host)| (name, &host.spec));
    let pools = state.pools.iter().map(|(name, pool)| (name, &pool.spec));
    let vms = state.vms.iter().filter(|(_, vm)| !vm.deleting);
    let vms = vms.map(|(name, vm)| (name, &vm.spec));
    let rules = state.rules.iter().map(|(name, rule)| (name, &rule.spec));
    conflict::find(&conflict::Site {
        hosts: hosts.collect(),
        pools: pools.collect(),
        vms: vms.collect(),
        rules: rules.collect(),
    })
}

/// Pairs that must be kept both together and apart: all that format 1 looked for.
fn opposite_rules(state: &State) -> Vec<String> {
    let mut problems = Vec::new();
    let together = state.rules.iter().filter(|(_, rule)| rule.spec.ties());
    for (with_name, with) in together {
        for (apart_name, apart) in &state.rules {
            if apart.spec.kind != RuleKind::KeepApart {
                continue;
            }
            let both = apart.spec.vms().intersection(with.spec.vms());
            let both: Vec<_> = both.map(ToString::to_string).collect();
            if both.len() > 1 {
                problems.push(format!(
                    "rules {with_name} (keep_with) and {apart_name} (keep_apart) contradict each other for {}",
                    both.join(" and ")
                ));
            }
        }
    }
    problems
}

pub(super) fn delete_vm(change: &mut Change<'_>, vm: &VmName) -> Result<(), Refusal> {
    let dependents: Vec<_> = change
        .state
        .vms
        .iter()
        .filter(|(_, other)| !other.deleting && other.spec.depends_on.contains_key(vm))
        .map(|(name, _)| name.to_string())
        .collect();
    let rules: Vec<_> = change
        .state
        .rules
        .iter()
        .filter(|(_, rule)| rule.spec.vms().contains(vm))
        .map(|(name, _)| name.to_string())
        .collect();
    let alone = super::services::left_empty(change.state, vm).cloned();
    let revision = change.revision;
    let Some(record) = change.state.vms.get_mut(vm) else {
        return Err(unknown("VM", vm));
    };
    if let Some(service) = alone {
        return Err(Refusal::InUse(format!(
            "VM {vm} is the only member of service {service}: change or delete that first"
        )));
    }
    if !dependents.is_empty() {
        return Err(Refusal::InUse(format!(
            "{} depends on VM {vm}: change or delete it first",
            dependents.join(", ")
        )));
    }
    if !rules.is_empty() {
        return Err(Refusal::InUse(format!(
            "rule {} names VM {vm}: change or delete it first",
            rules.join(", ")
        )));
    }
    record.deleting = true;
    record.changed = revision;
    change.vm_event(EventKind::Changed, vm, format!("VM {vm} is to be deleted"));
    Ok(())
}

/// Where a disk is changes its meaning with the kind of its pool.
fn kind_stays(
    change: &Change<'_>,
    name: &quorate_types::PoolName,
    spec: &quorate_types::PoolSpec,
) -> Result<(), Refusal> {
    let old = change.state.pools.get(name).map(|old| &old.spec);
    let Some(old) = old.filter(|old| old.kind() != spec.kind()) else {
        return Ok(());
    };
    let user = change.state.vms.iter().find(|(_, vm)| {
        let mut disks = vm.spec.disks.iter().chain(&vm.effective().disks);
        disks.any(|disk| disk.pool == *name)
    });
    let own = old.is_hosts_own() || spec.is_hosts_own();
    match user.filter(|_| own) {
        Some((vm, _)) => Err(Refusal::InUse(format!(
            "pool {name} is of kind `{}` and VM {vm} has a disk in it: define another pool, and move the disks there",
            old.kind()
        ))),
        None => Ok(()),
    }
}

pub(super) fn delete_pool(change: &mut Change<'_>, pool: &PoolName) -> Result<(), Refusal> {
    let used = change.state.vms.iter().find(|(_, vm)| {
        vm.spec
            .disks
            .iter()
            .chain(vm.active.iter().flat_map(|active| &active.disks))
            .any(|disk| disk.pool == *pool)
    });
    if let Some((vm, _)) = used {
        return Err(Refusal::InUse(format!("VM {vm} has a disk in pool {pool}")));
    }
    if let Some(Witness::Disk { pool: of, .. }) = &change.state.quorum.witness
        && of == pool
    {
        return Err(Refusal::InUse(format!(
            "the disk witness lies in pool {pool}: `quorate quorum set --witness none`, or another pool, first"
        )));
    }
    change
        .state
        .pools
        .remove(pool)
        .ok_or_else(|| unknown("pool", pool))?;
    change.state.pool_markers.remove(pool);
    change.state.pool_drills.remove(pool);
    change.state.unit_takes.remove(pool);
    super::copies::forget_pool(change.state, pool);
    super::writes::forget(change.state, |of, _, _| of == pool);
    super::storage::forget_cuts(change, |_, gone| gone == pool);
    change.topology_changed();
    change.event(
        EventKind::Changed,
        Subject::Object(format!("pool/{pool}")),
        format!("pool {pool} deleted"),
    );
    Ok(())
}

pub(super) fn record_marker(
    change: &mut Change<'_>,
    pool: &PoolName,
    marker: &str,
) -> Result<(), Refusal> {
    if !change.state.pools.contains_key(pool) {
        return Err(unknown("pool", pool));
    }
    if let Some(old) = change
        .state
        .pool_markers
        .get(pool)
        .filter(|old| *old != marker)
    {
        return Err(Refusal::InUse(format!(
            "pool {pool} is known as {old}: it cannot become {marker}"
        )));
    }
    let fresh = change
        .state
        .pool_markers
        .insert(pool.clone(), marker.to_owned())
        .is_none();
    if fresh {
        change.topology_changed();
        let text = format!("pool {pool} prepared");
        change.event(
            EventKind::Changed,
            Subject::Object(format!("pool/{pool}")),
            text,
        );
    }
    Ok(())
}

pub(super) fn delete_network(
    change: &mut Change<'_>,
    network: &NetworkName,
) -> Result<(), Refusal> {
    let used = change
        .state
        .vms
        .iter()
        .find(|(_, vm)| vm.spec.nics.iter().any(|nic| nic.network == *network));
    if let Some((vm, _)) = used {
        return Err(Refusal::InUse(format!(
            "VM {vm} is plugged into network {network}"
        )));
    }
    let mut services = change.state.services.iter();
    if let Some((service, _)) = services.find(|(_, service)| service.spec.network == *network) {
        return Err(Refusal::InUse(format!(
            "service {service} is in network {network}"
        )));
    }
    change
        .state
        .networks
        .remove(network)
        .ok_or_else(|| unknown("network", network))?;
    change.topology_changed();
    change.event(
        EventKind::Changed,
        Subject::Object(format!("network/{network}")),
        format!("network {network} deleted"),
    );
    Ok(())
}

pub(super) fn delete_rule(change: &mut Change<'_>, rule: &RuleName) -> Result<(), Refusal> {
    change
        .state
        .rules
        .remove(rule)
        .ok_or_else(|| unknown("rule", rule))?;
    change.topology_changed();
    change.event(
        EventKind::Changed,
        Subject::Object(format!("rule/{rule}")),
        format!("rule {rule} deleted"),
    );
    Ok(())
}

pub(super) fn set_power(
    change: &mut Change<'_>,
    vm: &VmName,
    power: Power,
    mode: StopMode,
) -> Result<(), Refusal> {
    let revision = change.revision;
    let record = change
        .state
        .vms
        .get_mut(vm)
        .ok_or_else(|| unknown("VM", vm))?;
    if record.deleting && power == Power::Running {
        return Err(Refusal::InUse(format!("VM {vm} is being deleted")));
    }
    record.spec.power = power;
    record.changed = revision;
    record.move_request = None;
    let mut text = format!(
        "VM {vm} shall be {}",
        if power == Power::Running {
            "running"
        } else {
            "stopped"
        }
    );
    if power == Power::Stopped && mode == StopMode::Hard {
        if let Ownership::Owned { order, .. } = &mut record.ownership {
            *order = OrderKind::Stop(StopMode::Hard);
        }
        text.push_str(" at once");
    }
    change.vm_event(EventKind::Changed, vm, text);
    Ok(())
}

pub(super) fn request_move(
    change: &mut Change<'_>,
    vm: &VmName,
    to: Option<&HostName>,
) -> Result<(), Refusal> {
    let revision = change.revision;
    if let Some(to) = to.filter(|to| !change.state.hosts.contains_key(*to)) {
        return Err(unknown("host", to));
    }
    let by = change.envelope.by.clone();
    let record = change
        .state
        .vms
        .get_mut(vm)
        .ok_or_else(|| unknown("VM", vm))?;
    match &record.ownership {
        Ownership::Free => {
            return Err(Refusal::InUse(format!(
                "VM {vm} is not running: `quorate vm start {vm}` places it"
            )));
        }
        Ownership::Migrating { to, id, .. } => {
            return Err(Refusal::InUse(format!(
                "VM {vm} is already migrating to {to} (migration {id}); `quorate vm cancel {vm}` stops that"
            )));
        }
        Ownership::Owned { host, .. } if Some(host) == to => {
            return Err(Refusal::InUse(format!("VM {vm} is on {host} already")));
        }
        Ownership::Owned { .. } => {}
    }
    record.move_request = Some(MoveRequest {
        to: to.cloned(),
        by,
    });
    record.changed = revision;
    let place = to.map_or_else(|| "another host".to_owned(), ToString::to_string);
    change.vm_event(
        EventKind::Changed,
        vm,
        format!("move of {vm} to {place} requested"),
    );
    Ok(())
}

pub(super) fn cancel_move(change: &mut Change<'_>, vm: &VmName) -> Result<(), Refusal> {
    let revision = change.revision;
    let record = change
        .state
        .vms
        .get_mut(vm)
        .ok_or_else(|| unknown("VM", vm))?;
    let requested = record.move_request.take().is_some();
    let mut migrating = false;
    if let Ownership::Migrating { cancel, .. } = &mut record.ownership {
        *cancel = true;
        migrating = true;
    }
    if !requested && !migrating {
        return Err(Refusal::InUse(format!(
            "VM {vm} is not moving: there is nothing to cancel"
        )));
    }
    record.changed = revision;
    change.vm_event(EventKind::Migration, vm, format!("move of {vm} cancelled"));
    Ok(())
}
