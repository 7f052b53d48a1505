//! A look into a pool: by this host where it reaches the pool, else by another one that does.
//!
//! Always holds: bounded, whatever the storage does.

use super::core::{Core, wrong_answer};
use super::peer::{self, Answer, Ask};
use quorate_api::storage::{ImageSeen, PoolLook};
use quorate_api::{ApiError, ErrorCode};
use quorate_transport::RpcStatus;
use quorate_types::{HostName, NodeId, PoolName};
use std::time::Duration;

/// Longest for one host's look.
const LOOK_WITHIN: Duration = Duration::from_secs(6);
/// Other hosts that are asked, one after the other.
const MOST_HOSTS: usize = 2;

/// What this host sees.
pub(crate) async fn here(core: &Core, pool: &PoolName) -> Result<PoolLook, RpcStatus> {
    let failed = |text: String| RpcStatus::new(409, text);
    let driver = core.agent.pool(pool).map_err(failed)?;
    let images = tokio::time::timeout(LOOK_WITHIN, driver.list_images()).await;
    let images = images
        .map_err(|_| failed(format!("pool {pool} does not answer")))?
        .map_err(|error| failed(error.to_string()))?;
    let seen = |entry: quorate_storage::ImageEntry| ImageSeen {
        image: entry.image,
        virtual_bytes: entry.virtual_bytes,
        actual_bytes: entry.actual_bytes,
        format: entry.format.to_string(),
        problem: entry.problem,
    };
    Ok(PoolLook {
        host: core.me.clone(),
        images: images.into_iter().map(seen).collect(),
    })
}

/// What a host that reaches the pool sees.
pub(crate) async fn anywhere(core: &Core, pool: &PoolName) -> Result<PoolLook, ApiError> {
    let mut problem = match usable_here(core, pool) {
        true => match here(core, pool).await {
            Ok(look) => return Ok(look),
            Err(status) => status.message,
        },
        false => format!("no host reaches pool {pool} now"),
    };
    for (host, node) in others(core, pool).await.into_iter().take(MOST_HOSTS) {
        let ask = Ask::Images { pool: pool.clone() };
        match peer::ask(
            &core.peers,
            node,
            &ask,
            LOOK_WITHIN + Duration::from_secs(1),
        )
        .await
        {
            Ok(Answer::Images(look)) => return Ok(look),
            Ok(_) => return Err(wrong_answer()),
            Err(error) => problem = format!("{host} cannot look into it: {error}"),
        }
    }
    Err(ApiError::new(ErrorCode::Unreachable, problem))
}

/// Whether this host can use the pool.
pub(crate) fn usable_here(core: &Core, pool: &PoolName) -> bool {
    let report = core.agent.report();
    report.pools.get(pool).is_some_and(|pool| pool.usable)
}

/// Other hosts that can use the pool, as the leader sees them.
pub(crate) async fn others(core: &Core, pool: &PoolName) -> Vec<(HostName, NodeId)> {
    let Ok(picture) = core.picture().await else {
        return Vec::new();
    };
    let state = core.state();
    let usable = picture.hosts.iter().filter(|(name, seen)| {
        let report = seen.report.as_ref();
        let pool = report.and_then(|report| report.pools.get(pool));
        **name != core.me && pool.is_some_and(|pool| pool.usable)
    });
    usable
        .filter_map(|(name, _)| Some((name.clone(), state.hosts.get(name)?.node)))
        .collect()
}
