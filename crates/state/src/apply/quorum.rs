//! Commands about votes.

use super::{Change, cluster, unknown};
use crate::command::Refusal;
use crate::event::{EventKind, Subject};
use crate::quorum::{Witness, WitnessChoice};
use quorate_types::{HostName, NodeId, PoolName, PoolSpec, Timestamp};

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
    let WitnessChoice::Disk { pool } = choice else {
        replace(change, None);
        return Ok(());
    };
    let Some(object) = change.state.pools.get(pool) else {
        return Err(unknown("pool", pool));
    };
    #[allow(
        irrefutable_let_patterns,
        reason = "other kinds of pools hold no files"
    )]
    let PoolSpec::Directory { .. } = &object.spec else {
        return Err(Refusal::Invalid(vec![format!(
            "pool {pool} holds no files: a disk witness needs a pool of kind `directory` that all hosts share"
        )]));
    };
    if let Some(Witness::Disk { node, pool: now }) = &change.state.quorum.witness
        && now == pool
    {
        change.node = Some(*node);
        return Ok(());
    }
    let node = next_node(change);
    let pool = pool.clone();
    replace(change, Some(Witness::Disk { node, pool }));
    Ok(())
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
    let pool: PoolName = match &change.state.quorum.witness {
        Some(Witness::Disk { node, pool }) if *node == old => pool.clone(),
        // It was replaced already.
        _ => return Ok(()),
    };
    let node = next_node(change);
    change.event(
        EventKind::Changed,
        Subject::Cluster,
        format!("disk witness in pool {pool} begins anew as node {node}: {why}"),
    );
    change.state.quorum.witness = Some(Witness::Disk { node, pool });
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
