//! Cutting another host off from units that decide by themselves who writes them, on the leader's word.
//!
//! Always holds: a host is cut off only when the local replica has the cut as well, so that an order that comes late cannot
//! cut off a host that was let in again; what is told as done was read back from the unit.

use crate::vm::{Shared, text};
use quorate_storage::reservation::{ClusterTag, ReservationKey};
use quorate_types::{Epoch, HostName, PoolName};
use std::collections::BTreeMap;
use std::time::Duration;

/// For the replica, which follows the leader within a heartbeat.
const CATCH_UP: Duration = Duration::from_secs(1);

/// What became of each unit, by image: what was done and seen, or why not.
pub type UnitsCut = BTreeMap<String, Result<String, String>>;

pub(crate) async fn cut(
    shared: &Shared,
    pool: &PoolName,
    host: &HostName,
    epochs: BTreeMap<String, Epoch>,
) -> UnitsCut {
    let mut states = shared.state.clone();
    let known = states.wait_for(|state| state.is_cut(host, pool));
    let refused = match tokio::time::timeout(CATCH_UP, known).await {
        Ok(Ok(_)) => None,
        _ => Some(format!("no cut of {host} is known here")),
    };
    let each = epochs.into_iter().map(|(image, epoch)| {
        let refused = refused.clone();
        async move {
            let done = match refused {
                Some(refused) => Err(refused),
                None => cut_one(shared, pool, host, &image, epoch).await,
            };
            (image, done)
        }
    });
    futures_util::future::join_all(each)
        .await
        .into_iter()
        .collect()
}

async fn cut_one(
    shared: &Shared,
    pool: &PoolName,
    host: &HostName,
    image: &str,
    epoch: Epoch,
) -> Result<String, String> {
    let me = &shared.config.host;
    let state = shared.state();
    let record = state.hosts.get(host);
    let node = record.ok_or_else(|| format!("{host} is not a host of this cluster"))?;
    let node = u16::try_from(node.node).map_err(|error| error.to_string())?;
    let cluster = ClusterTag::of(&shared.config.cluster_id);
    let fence = ReservationKey::fence(cluster, epoch.0).map_err(|error| error.to_string())?;
    let driver = shared.pool(pool)?;
    let unit = driver
        .reservation(image)
        .await
        .map_err(|error| text(&error))?;
    let unit = unit.ok_or_else(|| format!("pool {pool} has no reservations"))?;
    let done = unit
        .cut(fence, node)
        .await
        .map_err(|error| error.to_string())?;
    let facts = &done.after;
    let mut left = facts.ours(cluster).map(|key| key.to_string());
    Ok(match done.cut().is_empty() {
        true => format!(
            "read by {me}: no key of {host} is registered, {} holds the reservation",
            facts
                .holder(cluster)
                .map_or_else(|| left.next().unwrap_or_default(), |key| key.to_string())
        ),
        false => format!(
            "{me} preempted its key; read back: only {} registered",
            left.collect::<Vec<_>>().join(", ")
        ),
    })
}
