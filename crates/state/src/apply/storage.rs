//! Commands about access to storage: cuts at the SAN, and the passwords for it.
//!
//! Always holds: a cut is recorded before it is made and forgotten only by a command that names the very
//! same cut, so no leader gives back what a later one took away.

use super::{Change, unknown};
use crate::command::Refusal;
use crate::event::{EventKind, Subject};
use crate::model::{PoolDrill, UnitTake};
use quorate_types::{HostName, PoolName, Revision, Secret, SecretName};
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn cut(
    change: &mut Change<'_>,
    host: &HostName,
    pools: &BTreeSet<PoolName>,
) -> Result<(), Refusal> {
    if !change.state.hosts.contains_key(host) {
        return Err(unknown("host", host));
    }
    if let Some(missing) = pools
        .iter()
        .find(|pool| !change.state.pools.contains_key(*pool))
    {
        return Err(unknown("pool", missing));
    }
    let revision = change.revision;
    let cuts = change.state.storage_cuts.entry(host.clone()).or_default();
    let new: Vec<_> = pools
        .iter()
        .filter(|pool| cuts.insert((*pool).clone(), revision).is_none())
        .map(ToString::to_string)
        .collect();
    if !new.is_empty() {
        // Where VMs can run has changed; a plan that releases VMs of the host knows that already, since it is
        // made after this.
        change.topology_changed();
        let text = format!("{host} is being cut off from {}", new.join(", "));
        change.event(EventKind::Changed, Subject::Host(host.clone()), text);
    }
    Ok(())
}

pub(super) fn restore(
    change: &mut Change<'_>,
    host: &HostName,
    pools: &BTreeMap<PoolName, Revision>,
) -> Result<(), Refusal> {
    let Some(cuts) = change.state.storage_cuts.get_mut(host) else {
        return Ok(());
    };
    let before = cuts.len();
    cuts.retain(|pool, since| pools.get(pool) != Some(since));
    let (now, empty) = (cuts.len(), cuts.is_empty());
    if empty {
        change.state.storage_cuts.remove(host);
    }
    if now < before {
        change.topology_changed();
        let names: Vec<_> = pools.keys().map(ToString::to_string).collect();
        let text = format!("{host} reaches {} again", names.join(", "));
        change.event(EventKind::Changed, Subject::Host(host.clone()), text);
    }
    Ok(())
}

/// Steps of a drill that are kept, and how long each may be.
const STEPS_MOST: usize = 8;
const STEP_CHARS: usize = 300;

pub(super) fn record_drill(
    change: &mut Change<'_>,
    pool: &PoolName,
    image: &str,
    passed: bool,
    steps: &[String],
) -> Result<(), Refusal> {
    if !change.state.pools.contains_key(pool) {
        return Err(unknown("pool", pool));
    }
    let short = |step: &String| step.chars().take(STEP_CHARS).collect();
    let drill = PoolDrill {
        image: image.to_owned(),
        at: change.envelope.at,
        passed,
        steps: steps.iter().take(STEPS_MOST).map(short).collect(),
    };
    change.state.pool_drills.insert(pool.clone(), drill);
    let verdict = match passed {
        true => "its SAN shuts hosts out when told".to_owned(),
        false => format!(
            "its drill failed: {}",
            steps.last().map_or("no step was made", String::as_str)
        ),
    };
    pool_event(change, pool, format!("pool {pool}: {verdict}"));
    Ok(())
}

pub(super) fn take(
    change: &mut Change<'_>,
    pool: &PoolName,
    image: &str,
    keys: &BTreeSet<u64>,
    hold: bool,
) -> Result<(), Refusal> {
    if !change.state.pools.contains_key(pool) {
        return Err(unknown("pool", pool));
    }
    let image = change.state.image_name(pool, image);
    let take = UnitTake {
        keys: keys.clone(),
        hold,
        by: change.envelope.by.clone(),
        at: change.envelope.at,
        given: change.revision,
    };
    let keys: Vec<String> = keys.iter().map(|key| format!("{key:#018x}")).collect();
    let from = match keys.is_empty() {
        true => "a reservation of another type".to_owned(),
        false => format!("keys {}", keys.join(", ")),
    };
    let text = format!("{pool}/{image} may be taken from strangers at the next start: {from}");
    let takes = change.state.unit_takes.entry(pool.clone()).or_default();
    takes.insert(image, take);
    pool_event(change, pool, text);
    Ok(())
}

pub(super) fn end_take(
    change: &mut Change<'_>,
    pool: &PoolName,
    image: &str,
    given: Option<Revision>,
) -> Result<(), Refusal> {
    let image = change.state.image_name(pool, image);
    let takes = change.state.unit_takes.get_mut(pool);
    let Some(takes) = takes.filter(|takes| {
        let take = takes.get(&image);
        take.is_some_and(|take| given.is_none_or(|given| given == take.given))
    }) else {
        return Ok(());
    };
    takes.remove(&image);
    change.state.unit_takes.retain(|_, takes| !takes.is_empty());
    let text = match given {
        Some(_) => format!("{pool}/{image} was taken, or has no VM any more"),
        None => format!("{pool}/{image} may not be taken from strangers after all"),
    };
    pool_event(change, pool, text);
    Ok(())
}

fn pool_event(change: &mut Change<'_>, pool: &PoolName, text: String) {
    let subject = Subject::Object(format!("pool/{pool}"));
    change.event(EventKind::Changed, subject, text);
}

pub(super) fn set_secret(
    change: &mut Change<'_>,
    name: &SecretName,
    secret: &Secret,
) -> Result<(), Refusal> {
    let old = change.state.secrets.insert(name.clone(), secret.clone());
    if old.as_ref() != Some(secret) {
        let verb = if old.is_some() { "changed" } else { "created" };
        secret_event(change, name, verb);
    }
    Ok(())
}

pub(super) fn delete_secret(change: &mut Change<'_>, name: &SecretName) -> Result<(), Refusal> {
    let pools = change.state.pools.iter();
    if let Some((pool, _)) = pools
        .into_iter()
        .find(|(_, pool)| pool.spec.secrets().contains(name))
    {
        return Err(Refusal::InUse(format!(
            "pool {pool} uses the secret {name}"
        )));
    }
    if change.state.secrets.remove(name).is_none() {
        return Err(unknown("secret", name));
    }
    secret_event(change, name, "deleted");
    Ok(())
}

fn secret_event(change: &mut Change<'_>, name: &SecretName, verb: &str) {
    let subject = Subject::Object(format!("secret/{name}"));
    change.event(EventKind::Changed, subject, format!("secret {name} {verb}"));
}

/// What of a removed host or pool is left here.
pub(super) fn forget_cuts(change: &mut Change<'_>, gone: impl Fn(&HostName, &PoolName) -> bool) {
    for (host, cuts) in &mut change.state.storage_cuts {
        cuts.retain(|pool, _| !gone(host, pool));
    }
    change.state.storage_cuts.retain(|_, cuts| !cuts.is_empty());
}
