//! Commands about votes.

use super::{Change, cluster, unknown};
use crate::command::Refusal;
use crate::event::{EventKind, Subject};
use crate::quorum::{Witness, WitnessChoice, WitnessUnit};
use quorate_types::{HostName, NodeId, PoolName, PoolSpec, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

fn next_node(change: &mut Change<'_>) -> NodeId {
    change.state.last_node += 1;
    change.node = Some(change.state.last_node);
    change.state.last_node
}

/// Puts a witness in the place of what was there before.
fn replace(change: &mut Change<'_>, witness: Option<Witness>) {
    let text = match (&change.state.quorum.witness, &witness) {
        (None, None) => return,
        (Some(old), None) => format!("{} removed", old.describe()),
        (None, Some(new)) => format!("{} set up", new.describe()),
        (Some(old), Some(new)) => format!("{} replaces {}", new.describe(), old.describe()),
    };
    change.state.quorum.witness = witness;
    change.event(EventKind::Changed, Subject::Cluster, text);
}

pub(super) fn set_witness(change: &mut Change<'_>, choice: &WitnessChoice) -> Result<(), Refusal> {
    let WitnessChoice::Disk { pool, image } = choice else {
        replace(change, None);
        return Ok(());
    };
    let Some(object) = change.state.pools.get(pool) else {
        return Err(unknown("pool", pool));
    };
    let image = image.as_deref();
    check_place(pool, &object.spec, image).map_err(|text| Refusal::Invalid(vec![text]))?;
    let identity = |image: &str| object.spec.identity(pool, image);
    if let Some(Witness::Disk {
        node,
        pool: now,
        unit,
    }) = &change.state.quorum.witness
        && now == pool
        && unit.as_ref().map(|unit| identity(&unit.image)) == image.map(identity)
    {
        change.node = Some(*node);
        return Ok(());
    }
    let unit = image.map(|image| WitnessUnit {
        image: image.to_owned(),
        slots: BTreeMap::new(),
    });
    let unit = match unit {
        Some(mut unit) => {
            if let Some(user) = change.state.disk_user(pool, &unit.image) {
                return Err(Refusal::InUse(format!(
                    "VM {user} has the disk {} of pool {pool}: the witness needs a unit that nobody else uses",
                    unit.image
                )));
            }
            let nodes = change.state.hosts.values().map(|host| host.node);
            let nodes: BTreeSet<NodeId> = nodes.collect();
            for node in &nodes {
                unit.admit(*node, |_| false);
            }
            Some(unit)
        }
        None => None,
    };
    let node = next_node(change);
    let pool = pool.clone();
    replace(change, Some(Witness::Disk { node, pool, unit }));
    Ok(())
}

/// Whether a witness can be at such a place.
fn check_place(pool: &PoolName, spec: &PoolSpec, image: Option<&str>) -> Result<(), String> {
    match (spec, image) {
        (PoolSpec::Directory { .. }, None) => Ok(()),
        (PoolSpec::Directory { .. }, Some(image)) => Err(format!(
            "pool {pool} is a directory, where the witness makes files of its own: leave `--disk {image}` out"
        )),
        (PoolSpec::Iscsi(_) | PoolSpec::Block(_), None) => Err(format!(
            "pool {pool} holds whole units: name one of at least 512 MiB for the witness alone, with `--disk NAME`"
        )),
        (PoolSpec::Iscsi(spec), Some(image)) => spec.lun_of(image).map(drop),
        (PoolSpec::Block(_), Some(image)) => {
            let name = !image.is_empty() && !image.contains('/') && !image.starts_with('.');
            let wrong = || format!("`{image}` is no name of a device in pool {pool}");
            name.then_some(()).ok_or_else(wrong)
        }
        _ => Err(format!(
            "pool {pool} is of the kind `{}`: a disk witness needs one of the kind `directory`, `iscsi` or `block` that all hosts share",
            spec.kind()
        )),
    }
}

/// A new host may run the witness too.
pub(super) fn host_joined(change: &mut Change<'_>, node: NodeId) {
    let members = change.state.hosts.values().map(|host| host.node);
    let members: BTreeSet<NodeId> = members.collect();
    if let Some(Witness::Disk {
        unit: Some(unit), ..
    }) = &mut change.state.quorum.witness
    {
        unit.admit(node, |host| !members.contains(&host));
    }
}

pub(super) fn create_token(
    change: &mut Change<'_>,
    hash: &str,
    expires: Timestamp,
) -> Result<(), Refusal> {
    cluster::create_token(change, hash, expires)?;
    if let Some(token) = change.state.tokens.get_mut(hash) {
        token.witness = true;
    }
    Ok(())
}

pub(super) fn admit(
    change: &mut Change<'_>,
    token: &str,
    name: &HostName,
    address: &str,
) -> Result<(), Refusal> {
    cluster::check_token(change, token, true)?;
    let taken =
        |(host, record): (&HostName, &crate::HostRecord)| host == name || record.address == address;
    if let Some((host, _)) = change.state.hosts.iter().find(|entry| taken(*entry)) {
        return Err(Refusal::InUse(format!(
            "host {host} has this name or address: a witness is a machine of its own"
        )));
    }
    change.state.tokens.remove(token);
    let node = next_node(change);
    let witness = Witness::Remote {
        node,
        name: name.clone(),
        address: address.to_owned(),
        joined: change.envelope.at,
    };
    replace(change, Some(witness));
    Ok(())
}

/// The log of a disk witness is lost or damaged: it goes on under a new number, as a newcomer.
pub(super) fn renew_disk(change: &mut Change<'_>, old: NodeId, why: &str) -> Result<(), Refusal> {
    let (pool, unit) = match &change.state.quorum.witness {
        Some(Witness::Disk { node, pool, unit }) if *node == old => (pool.clone(), unit.clone()),
        // It was replaced already.
        _ => return Ok(()),
    };
    let node = next_node(change);
    let witness = Witness::Disk { node, pool, unit };
    change.event(
        EventKind::Changed,
        Subject::Cluster,
        format!("{} begins anew as node {node}: {why}", witness.describe()),
    );
    change.state.quorum.witness = Some(witness);
    Ok(())
}

pub(super) fn left(change: &mut Change<'_>, host: &HostName, left: bool) -> Result<(), Refusal> {
    if !change.state.hosts.contains_key(host) {
        return Err(unknown("host", host));
    }
    let changed = match left {
        true => change.state.quorum.left.insert(host.clone()),
        false => change.state.quorum.left.remove(host),
    };
    if changed {
        let text = match left {
            true => format!("the daemon of host {host} is being stopped in order"),
            false => format!("the daemon of host {host} is back"),
        };
        change.event(EventKind::Host, Subject::Host(host.clone()), text);
    }
    Ok(())
}
