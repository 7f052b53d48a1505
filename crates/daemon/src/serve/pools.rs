//! Prepares each new pool once: its identity is written into the pool by one host and recorded in the
//! replicated state. From then on a host that finds no identity at the pool's path has not mounted it.

use super::core::Core;
use quorate_agent::{PoolFactory as _, Pools};
use quorate_controller::Group as _;
use quorate_state::{Command, State};
use quorate_types::{HostName, PoolName};
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// A pool that could not be prepared is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);
/// Longest time that preparing one pool may take.
const WITHIN: Duration = Duration::from_secs(20);

/// Runs for the life of the daemon.
pub(crate) async fn prepare(core: Arc<Core>, factory: Pools) {
    let mut states = core.states.clone();
    let mut leadership = core.group.leadership();
    loop {
        let state = Arc::clone(&states.borrow_and_update());
        let leader = leadership.borrow_and_update().leader;
        let mut failed = false;
        for pool in duties(
            &state,
            leader.and_then(|node| state.host_of_node(node)),
            &core.me,
        ) {
            failed |= !prepare_one(&core, &factory, &state, &pool).await;
        }
        let again = async {
            if failed {
                tokio::time::sleep(AGAIN).await
            } else {
                std::future::pending().await
            }
        };
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            _ = leadership.changed() => {}
            () = again => {}
        }
    }
}

/// Pools that it is up to `me` to prepare: the leader does it where it reaches the pool, else the first host that does.
fn duties(state: &State, leader: Option<&HostName>, me: &HostName) -> Vec<PoolName> {
    let mine = |hosts: &std::collections::BTreeSet<HostName>| match leader {
        None => false,
        Some(leader) if hosts.is_empty() || hosts.contains(leader) => leader == me,
        Some(_) => hosts.first() == Some(me),
    };
    let open = state
        .pools
        .iter()
        .filter(|(name, _)| !state.pool_markers.contains_key(*name));
    open.filter(|(_, pool)| mine(pool.spec.hosts()))
        .map(|(name, _)| name.clone())
        .collect()
}

async fn prepare_one(core: &Core, factory: &Pools, state: &State, name: &PoolName) -> bool {
    let Some(object) = state.pools.get(name) else {
        return true;
    };
    let pool = factory.open(name, &object.spec);
    match tokio::time::timeout(WITHIN, pool.define()).await {
        Ok(Ok(marker)) => {
            info!(pool = %name, marker = %marker.id, "pool prepared");
            let command = Command::RecordPoolMarker {
                pool: name.clone(),
                marker: marker.id,
            };
            let recorded = core.propose("pools", command).await;
            if let Err(error) = &recorded {
                warn!(pool = %name, %error, "the pool's identity cannot be recorded");
            }
            recorded.is_ok()
        }
        Ok(Err(error)) => {
            warn!(pool = %name, %error, "the pool cannot be prepared");
            false
        }
        Err(_) => {
            warn!(pool = %name, "the pool does not answer");
            false
        }
    }
}
