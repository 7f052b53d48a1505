//! Before a ring change: flows that the coming ring would strand are pinned at every director.
//!
//! ```text
//! the datapath holds `next` --> strays of local edges --> this host's director, then every other host's --> prepared
//! ```
//! Always holds: a coming ring counts as prepared here only when every other host has the pins, or was silent for
//! longer than a lease can last: then it steers no more.

use super::lock;
use crate::vm::{Shared, text};
use quorate_balancer::{Applied, Pin, ServiceTable, Wanted};
use quorate_state::State;
use quorate_types::{HostName, ServiceName};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);
/// Most pins in one call.
const AT_A_TIME: usize = 4096;

/// Exchanges that are under way, by service and epoch.
#[derive(Default)]
pub(super) struct Exchanges {
    running: BTreeMap<ServiceName, (u64, AbortHandle)>,
}

impl Exchanges {
    /// Begins what has become due, and ends what is no longer.
    pub(super) fn keep(
        &mut self,
        shared: &Arc<Shared>,
        state: &State,
        wanted: &Wanted,
        applied: &Applied,
    ) {
        let due = |name: &ServiceName| {
            let table = wanted.services.get(name)?;
            let next = table.next.as_ref()?.epoch;
            let held = applied.services.get(name)?.prepared == Some(next);
            held.then_some((next, table))
        };
        self.running.retain(|name, (epoch, task)| {
            let still = due(name).is_some_and(|(next, _)| next == *epoch);
            if !still {
                task.abort();
            }
            still
        });
        let pinned = lock(&shared.services.pinned).clone();
        for name in wanted.services.keys() {
            let Some((epoch, table)) = due(name) else {
                continue;
            };
            let done = pinned.get(name).is_some_and(|done| *done >= epoch);
            if !done && !self.running.contains_key(name) {
                let others = others(state, &shared.config.host);
                let give_up = state.settings().lease.duration.as_duration() * 2;
                let exchange = exchange(
                    shared.clone(),
                    name.clone(),
                    epoch,
                    table.clone(),
                    others,
                    give_up,
                );
                self.running
                    .insert(name.clone(), (epoch, shared.spawn(exchange)));
            }
        }
    }
}

fn others(state: &State, me: &HostName) -> Vec<HostName> {
    state
        .hosts
        .keys()
        .filter(|host| *host != me)
        .cloned()
        .collect()
}

async fn exchange(
    shared: Arc<Shared>,
    name: ServiceName,
    epoch: u64,
    table: ServiceTable,
    others: Vec<HostName>,
    give_up: Duration,
) {
    let pins = loop {
        match pin_here(&shared, &table).await {
            Ok(pins) => break pins,
            Err(error) => tracing::warn!(service = %name, error, "strays cannot be pinned"),
        }
        tokio::time::sleep(AGAIN * 5).await;
    };
    if !pins.is_empty() {
        tracing::info!(service = %name, epoch, pins = pins.len(), "flows are pinned");
        let tell = |host: HostName| tell(&shared, host, &pins, give_up);
        futures_util::future::join_all(others.into_iter().map(tell)).await;
    }
    lock(&shared.services.pinned).insert(name, epoch);
    shared.services.news.notify_one();
}

async fn pin_here(shared: &Shared, table: &ServiceTable) -> Result<Vec<Pin>, String> {
    let datapath = &shared.services.datapath;
    let pins = datapath.strays(table).await.map_err(|error| text(&error))?;
    if !pins.is_empty() {
        datapath.pin(&pins).await.map_err(|error| text(&error))?;
    }
    Ok(pins)
}

async fn tell(shared: &Shared, host: HostName, pins: &[Pin], give_up: Duration) {
    let begun = Instant::now();
    for part in pins.chunks(AT_A_TIME) {
        loop {
            let told = shared.drivers.peers.send_pins(host.clone(), part.to_vec());
            match told.await {
                Ok(()) => break,
                Err(error) if begun.elapsed() >= give_up => {
                    return tracing::warn!(%host, error, "it has not got pins; it has no lease");
                }
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }
}
