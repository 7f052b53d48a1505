//! Units that strangers are registered on: who they are, and when an operator's word to push them out is used up.
//!
//! Always holds: a look changes nothing and is bounded; a word is used up by the guest that runs from the unit then, and the
//! one that is ended is the one that was looked at.

use super::core::{Core, wrong_answer};
use super::look;
use super::peer::{self, Answer, Ask};
use quorate_api::storage::{Stranger, StrangersSeen, key_text, uses};
use quorate_api::{ApiError, ErrorCode};
use quorate_controller::Picture;
use quorate_state::{Command, Ownership, State, UnitTake};
use quorate_storage::reservation::Inspection;
use quorate_transport::RpcStatus;
use quorate_types::{Epoch, HostName, PoolName, VmName, VmPhase};
use std::collections::BTreeMap;
use std::time::Duration;
use tracing::warn;

/// Longest for one host's look.
const LOOK_WITHIN: Duration = Duration::from_secs(5);

/// What this host sees.
pub(crate) async fn here(
    core: &Core,
    pool: &PoolName,
    image: &str,
) -> Result<StrangersSeen, RpcStatus> {
    let failed = |text: String| RpcStatus::new(409, text);
    let driver = core.agent.pool(pool).map_err(failed)?;
    let look = async {
        let unit = driver.reservation(image).await;
        let unit = unit.map_err(|error| error.to_string())?;
        let unit = unit.ok_or_else(|| format!("pool {pool} has no reservations"))?;
        unit.inspect().await.map_err(|error| error.to_string())
    };
    let seen = tokio::time::timeout(LOOK_WITHIN, look).await;
    let seen = seen.map_err(|_| failed(format!("{pool}/{image} does not answer")))?;
    Ok(strangers(core.me.clone(), &seen.map_err(failed)?))
}

/// What a host that reaches the pool sees.
pub(crate) async fn anywhere(
    core: &Core,
    pool: &PoolName,
    image: &str,
) -> Result<StrangersSeen, ApiError> {
    let mut problem = match look::usable_here(core, pool) {
        true => match here(core, pool, image).await {
            Ok(seen) => return Ok(seen),
            Err(status) => status.message,
        },
        false => format!("no host reaches pool {pool} now"),
    };
    for (host, node) in look::others(core, pool).await {
        let (pool, image) = (pool.clone(), image.to_owned());
        let ask = Ask::Strangers { pool, image };
        let within = LOOK_WITHIN + Duration::from_secs(1);
        match peer::ask(&core.peers, node, &ask, within).await {
            Ok(Answer::Strangers(seen)) => return Ok(seen),
            Ok(_) => return Err(wrong_answer()),
            Err(error) => problem = format!("{host} cannot look at it: {error}"),
        }
    }
    Err(ApiError::new(ErrorCode::Unreachable, problem))
}

/// Registrations that are not this cluster's.
fn strangers(host: HostName, seen: &Inspection) -> StrangersSeen {
    let nexuses = seen.nexuses.as_deref().unwrap_or_default();
    let one = |key: &u64| {
        let mut initiators: Vec<String> = nexuses
            .iter()
            .filter(|nexus| nexus.key == *key)
            .map(|nexus| nexus.initiator.clone())
            .collect();
        initiators.sort();
        initiators.dedup();
        Stranger {
            key: key_text(*key),
            holds: seen.facts.held.is_some_and(|held| held.key == *key),
            initiators,
        }
    };
    StrangersSeen {
        host,
        strangers: seen.foreign.iter().map(one).collect(),
        hold: seen.held_by_stranger,
    }
}

/// Forgets words that have been used: a guest runs from the unit, and none of those that were named is registered any more.
/// And those that are for no VM any more. By the leader.
pub(crate) async fn end_used(core: &Core, state: &State) {
    let Some(picture) = core.controller.picture() else {
        return;
    };
    for (pool, image, take, why) in due(state, &running(&picture)) {
        if why == Due::Runs {
            match anywhere(core, pool, image).await {
                Ok(seen) if gone(take, &seen) => {}
                _ => continue,
            }
        }
        let command = Command::EndTake {
            pool: pool.clone(),
            image: image.to_owned(),
            given: Some(take.given),
        };
        if let Err(error) = core.propose("pools", command).await {
            warn!(%pool, image, %error, "an operator's word on a unit is not forgotten");
        }
    }
}

/// None of those that were named is there any more.
fn gone(take: &UnitTake, seen: &StrangersSeen) -> bool {
    !seen.hold && seen.keys().is_ok_and(|keys| keys.is_disjoint(&take.keys))
}

/// VMs that run now, as their hosts say, with host and epoch.
type Running = BTreeMap<VmName, (HostName, Epoch)>;

fn running(picture: &Picture) -> Running {
    let hosts = picture.hosts.iter();
    let reports = hosts.filter_map(|(host, of)| Some((host, of.report.as_ref()?)));
    let vms = reports.flat_map(|(host, report)| report.vms.iter().map(move |vm| (host, vm)));
    vms.filter(|(_, (_, vm))| vm.phase == VmPhase::Running)
        .map(|(host, (name, vm))| (name.clone(), (host.clone(), vm.epoch)))
        .collect()
}

/// Why a word may be used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// A guest runs from the unit.
    Runs,
    /// No VM names it any more.
    Unused,
}

fn due<'s>(state: &'s State, running: &Running) -> Vec<(&'s PoolName, &'s str, &'s UnitTake, Due)> {
    let mut due = Vec::new();
    for (pool, takes) in &state.unit_takes {
        let uses = uses(state, pool);
        for (image, take) in takes {
            let runs = |vm: &VmName| {
                let record = state.vms.get(vm).map(|record| &record.ownership);
                let Some(Ownership::Owned { host, epoch, .. }) = record else {
                    return false;
                };
                running
                    .get(vm)
                    .is_some_and(|of| (&of.0, &of.1) == (host, epoch))
            };
            let why = match uses.get(image) {
                None => Due::Unused,
                Some(of) if of.vms.iter().any(runs) => Due::Runs,
                Some(_) => continue,
            };
            due.push((pool, image.as_str(), take, why));
        }
    }
    due
}
