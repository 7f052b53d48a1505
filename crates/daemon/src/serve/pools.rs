//! Prepares each new pool once: its identity is written into the pool by one host and recorded in the
//! replicated state. From then on a host that finds no identity at the pool's path has not mounted it.

use super::core::Core;
use super::drill;
use super::take;
use quorate_agent::PoolDefinition;
use quorate_controller::Group as _;
use quorate_state::{Command, State};
use quorate_types::{HostName, PoolName};
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// A pool that could not be prepared is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// Runs for the life of the daemon.
pub(crate) async fn prepare(core: Arc<Core>) {
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
            failed |= !prepare_one(&core, &state, &pool).await;
        }
        let leading = leader.and_then(|node| state.host_of_node(node));
        if let Some(pool) = drill_due(&state, leading, &core.me) {
            failed |= !drill_one(&core, &pool).await;
        }
        // Whether a guest runs is not part of the state.
        if leading == Some(&core.me) && !state.unit_takes.is_empty() {
            take::end_used(&core, &state).await;
            failed = true;
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
        // What is a host's own is marked by that host.
        .filter(|(name, pool)| {
            !pool.spec.is_hosts_own() && !state.pool_markers.contains_key(*name)
        });
    open.filter(|(_, pool)| mine(pool.spec.hosts()))
        .map(|(name, _)| name.clone())
        .collect()
}

/// A pool that the leader has to try: its SAN can be told, it has a disk, and it was not tried yet.
fn drill_due(state: &State, leader: Option<&HostName>, me: &HostName) -> Option<PoolName> {
    if leader != Some(me) {
        return None;
    }
    let mut open = state.pools.iter().filter(|(name, pool)| {
        pool.spec.access().is_some()
            && state.pool_markers.contains_key(*name)
            && !state.pool_drills.contains_key(*name)
            && pool.spec.is_for(me)
    });
    let due = open.find(|(name, _)| drill::default_image(state, name).is_some());
    due.map(|(name, _)| name.clone())
}

async fn drill_one(core: &Core, pool: &PoolName) -> bool {
    match drill::run(core, "pools", pool, None).await {
        Ok(drill) if drill.passed => info!(%pool, "its SAN shuts hosts out when told"),
        Ok(drill) => {
            warn!(%pool, steps = ?drill.steps, "its SAN does not shut hosts out as it should")
        }
        Err(error) => {
            warn!(%pool, error, "its SAN cannot be tried");
            return false;
        }
    }
    true
}

async fn prepare_one(core: &Core, state: &State, name: &PoolName) -> bool {
    let Some(pool) = PoolDefinition::of(state, name) else {
        return true;
    };
    match core.agent.define_pool(name, &pool).await {
        Ok(marker) => {
            info!(pool = %name, marker, "pool prepared");
            let command = Command::RecordPoolMarker {
                pool: name.clone(),
                marker,
            };
            let recorded = core.propose("pools", command).await;
            if let Err(error) = &recorded {
                warn!(pool = %name, %error, "the pool's identity cannot be recorded");
            }
            recorded.is_ok()
        }
        Err(error) => {
            warn!(pool = %name, error, "the pool cannot be prepared");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_state::Object;
    use quorate_types::Revision;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    #[test]
    fn exactly_one_host_prepares_a_pool_and_only_once() {
        let mut state = State::default();
        for (name, hosts) in [("all", &[][..]), ("some", &["h2", "h3"])] {
            let spec = serde_json::json!({ "kind": "directory", "path": "/p", "hosts": hosts });
            let pool = Object {
                spec: serde_json::from_value(spec).unwrap(),
                changed: Revision(1),
            };
            state.pools.insert(PoolName::new(name).unwrap(), pool);
        }
        let names = |leader: &str, me: &str| -> Vec<String> {
            let duties = duties(&state, Some(&host(leader)), &host(me));
            duties.iter().map(ToString::to_string).collect()
        };
        assert_eq!(names("h1", "h1"), ["all"]);
        assert_eq!(names("h1", "h2"), ["some"], "the leader does not reach it");
        assert!(names("h1", "h3").is_empty());
        assert_eq!(names("h3", "h3"), ["all", "some"]);
        assert!(names("h3", "h2").is_empty());
        assert!(duties(&state, None, &host("h1")).is_empty(), "no leader");
        let marked = state.pools.keys().map(|name| (name.clone(), "m".into()));
        state.pool_markers = marked.collect();
        assert!(duties(&state, Some(&host("h3")), &host("h3")).is_empty());
    }
}
