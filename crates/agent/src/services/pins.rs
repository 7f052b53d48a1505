//! Before a ring change: flows that the coming ring would strand are pinned at every director.
//!
//! ```text
//! the datapath holds `next` --> strays of local edges --> this host's director, then every other host's --> prepared
//! ```
//! A guest that changes hosts has its flows at two edges for a time, and its hosts may look for strays one before and
//! one after that. So it is looked for them at closed edges too (the guest stands still there), what an edge knew that was
//! removed is remembered until this host has nothing to prepare, and flows that come with a guest after the look mean
//! another one: a ring that was prepared is not, until that is done.
//!
//! Always holds: a coming ring counts as prepared here only when every other host has the pins, or was silent for
//! longer than a lease can last: then it steers no more; and a flow that was there when the ring was made is looked at by
//! the source of its guest or by the target.

use super::lock;
use crate::vm::{Shared, text};
use quorate_balancer::{Applied, Flow, Pin, ServiceTable, Wanted, strays_of};
use quorate_state::State;
use quorate_types::{HostName, Revision, ServiceName};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);
/// Most pins in one call.
const AT_A_TIME: usize = 4096;

/// What is pinned everywhere, and what may have to be.
#[derive(Default)]
pub(super) struct Pins {
    /// Epochs of coming rings, with the arrivals that were looked at.
    done: Mutex<BTreeMap<ServiceName, (u64, u64)>>,
    /// How often flows have come with a guest.
    arrivals: AtomicU64,
    /// Guests that have left, by MAC address.
    left: Mutex<BTreeMap<[u8; 6], Left>>,
}

/// Flows of a guest that has left, and the state under which it had.
struct Left {
    flows: Vec<Flow>,
    revision: Revision,
}

impl Pins {
    /// The strays of this ring, and of no earlier arrivals only, are pinned everywhere.
    pub(super) fn are_done(&self, service: &ServiceName, epoch: u64) -> bool {
        let arrivals = self.arrivals.load(Ordering::SeqCst);
        let done = lock(&self.done).get(service).copied();
        done.is_some_and(|(done, seen)| done >= epoch && seen == arrivals)
    }

    /// An edge was told of flows that it did not know.
    pub(super) fn flows_came(&self) {
        self.arrivals.fetch_add(1, Ordering::SeqCst);
    }

    /// An edge with these flows is about to be removed.
    pub(super) fn guest_left(&self, mac: [u8; 6], flows: Vec<Flow>, revision: Revision) {
        let left = Left { flows, revision };
        lock(&self.left).insert(mac, left);
    }

    fn strays_of_left(&self, table: &ServiceTable) -> Vec<Pin> {
        let left = lock(&self.left);
        let pins = left
            .iter()
            .flat_map(|(mac, left)| strays_of(table, *mac, &left.flows));
        pins.collect()
    }

    /// Nothing is to be prepared as of this revision: a ring that comes later finds the flows at the target.
    fn settled(&self, revision: Revision) {
        lock(&self.left).retain(|_, left| left.revision > revision);
    }
}

/// Exchanges that are under way.
#[derive(Default)]
pub(super) struct Exchanges {
    running: BTreeMap<ServiceName, Exchange>,
}

struct Exchange {
    epoch: u64,
    arrivals: u64,
    task: AbortHandle,
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
        let pins = &shared.services.pins;
        let due = |name: &ServiceName| {
            let table = wanted.services.get(name)?;
            let next = table.next.as_ref()?.epoch;
            let held = applied.services.get(name)?.prepared == Some(next);
            held.then_some((next, table))
        };
        let arrivals = pins.arrivals.load(Ordering::SeqCst);
        self.running.retain(|name, exchange| {
            let still = due(name).is_some_and(|(next, _)| next == exchange.epoch)
                && exchange.arrivals == arrivals;
            if !still {
                exchange.task.abort();
            }
            still
        });
        let mut settled = true;
        for (name, table) in &wanted.services {
            let next = table.next.as_ref();
            if next.is_none_or(|next| pins.are_done(name, next.epoch)) {
                continue;
            }
            settled = false;
            if let Some((epoch, table)) = due(name)
                && !self.running.contains_key(name)
            {
                let task = begin(shared, state, name, table, (epoch, arrivals));
                let exchange = Exchange {
                    epoch,
                    arrivals,
                    task,
                };
                self.running.insert(name.clone(), exchange);
            }
        }
        if settled {
            pins.settled(state.revision);
        }
    }
}

fn begin(
    shared: &Arc<Shared>,
    state: &State,
    name: &ServiceName,
    table: &ServiceTable,
    what: (u64, u64),
) -> AbortHandle {
    let others = others(state, &shared.config.host);
    let give_up = state.settings().lease.duration.as_duration() * 2;
    let exchange = exchange(
        shared.clone(),
        name.clone(),
        what,
        table.clone(),
        others,
        give_up,
    );
    shared.spawn(exchange)
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
    (epoch, arrivals): (u64, u64),
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
    lock(&shared.services.pins.done).insert(name, (epoch, arrivals));
    shared.services.news.notify_one();
}

async fn pin_here(shared: &Shared, table: &ServiceTable) -> Result<Vec<Pin>, String> {
    let datapath = &shared.services.datapath;
    let mut pins = datapath.strays(table).await.map_err(|error| text(&error))?;
    // After that: what leaves the one is in the other before.
    pins.extend(shared.services.pins.strays_of_left(table));
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
