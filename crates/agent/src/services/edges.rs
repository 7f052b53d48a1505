//! Edges on the taps of VMs: attached with the tap, opened when its guest runs here, closed when it leaves.
//!
//! ```text
//!            attach           open (guest runs)          leave (pause before the switchover: flows go ahead)
//!  tap made -------> closed -----------------> open ------------------------------------------> closed, stragglers out
//!                      |                        ^                                                     |
//!                      | flows come ahead       '------------- back (the migration failed) -----------'
//!                      '--> open, tap unmuted: at the target, while the guest's CPUs stand still on both hosts
//! ```
//! What clients send during the switchover would be lost at the source, and each of them would wait for a
//! retransmission (0.2 s and more). So the target opens its tap when the flows arrive: the guest cannot send, since it
//! does not run yet, and what comes for it waits in the tap until it does.
//!
//! Always holds: nothing here fails a VM's start or move: what goes wrong is kept as a problem of the service.

use super::{lock, wanted};
use crate::vm::{Shared, text};
use quorate_balancer::{EdgeSpec, Flow};
use quorate_network::tap_name;
use quorate_state::{Ownership, State};
use quorate_types::{HostName, MigrationId, VmName};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// For the flows to reach the target; the edge there learns what is missing by itself.
const SHIP_WITHIN: Duration = Duration::from_secs(2);

/// Flows of a VM's NICs, sent ahead of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShippedFlows {
    /// Which VM.
    pub vm: VmName,
    /// By which migration.
    pub id: MigrationId,
    /// Number of the NIC and its flows.
    pub nics: Vec<(u32, Vec<Flow>)>,
}

/// The edges that a VM's taps need, as it is defined now.
fn needed(shared: &Shared, state: &State, vm: &VmName) -> Vec<EdgeSpec> {
    let Some(record) = state.vms.get(vm) else {
        return Vec::new();
    };
    let mut edges = wanted::edges(state, &shared.config.cluster_id, vm, record.effective());
    edges.retain(|edge| wanted::needs_edges(state, edge));
    edges
}

/// Before a VM's guest is made: its taps exist. `open`: it does not come from elsewhere.
pub(crate) async fn attach(shared: &Shared, vm: &VmName, open: bool) {
    for edge in needed(shared, &shared.state(), vm) {
        attach_one(shared, &edge, open).await;
    }
}

async fn attach_one(shared: &Shared, edge: &EdgeSpec, open: bool) {
    let services = &shared.services;
    let attached = async {
        services.datapath.attach_edge(edge).await?;
        lock(&services.edges).insert(edge.ifname.clone(), edge.clone());
        match open {
            true => services.datapath.open_edge(&edge.ifname).await,
            false => Ok(()),
        }
    };
    note(shared, edge, attached.await);
}

fn note(shared: &Shared, edge: &EdgeSpec, result: Result<(), quorate_balancer::BalancerError>) {
    let mut problems = lock(&shared.services.edge_problems);
    match result {
        Ok(()) => drop(problems.remove(&edge.ifname)),
        Err(error) => {
            let problem = text(&error);
            if problems.get(&edge.ifname) != Some(&problem) {
                tracing::warn!(vm = %edge.vm, tap = edge.ifname, problem, "no edge");
                problems.insert(edge.ifname.clone(), problem);
            }
        }
    }
}

fn of_vm(shared: &Shared, vm: &VmName) -> Vec<EdgeSpec> {
    let edges = lock(&shared.services.edges);
    let mine = edges.values().filter(|edge| edge.vm == *vm);
    mine.cloned().collect()
}

/// The guest runs here from now on.
pub(crate) async fn open(shared: &Shared, vm: &VmName) {
    for edge in of_vm(shared, vm) {
        let opened = shared.services.datapath.open_edge(&edge.ifname).await;
        note(shared, &edge, opened);
    }
    shared.services.news.notify_one();
}

/// The guest's CPUs stand still before the switchover: its flows go ahead, and the director lets go of it.
pub(crate) async fn leave(shared: &Arc<Shared>, vm: &VmName) {
    let edges = of_vm(shared, vm);
    if edges.is_empty() {
        return;
    }
    let datapath = &shared.services.datapath;
    let mut nics = Vec::new();
    for edge in &edges {
        let number = (0..64).find(|number| tap_name(vm.as_str(), *number) == edge.ifname);
        match (number, datapath.flows(&edge.ifname).await) {
            (Some(number), Ok(flows)) => nics.push((number, flows)),
            (_, Err(error)) => tracing::warn!(%vm, error = text(&error), "flows stay behind"),
            (None, _) => {}
        }
        if let Err(error) = datapath.close_edge(&edge.ifname, true).await {
            tracing::warn!(%vm, tap = edge.ifname, error = text(&error), "an edge stays open");
        }
    }
    if let Some((to, id)) = target(&shared.state(), vm) {
        let flows = ShippedFlows {
            vm: vm.clone(),
            id,
            nics,
        };
        let (shared, vm) = (shared.clone(), vm.clone());
        shared.clone().spawn(async move {
            let sent = shared.drivers.peers.ship_flows(to, flows);
            match tokio::time::timeout(SHIP_WITHIN, sent).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%vm, error, "flows are not shipped"),
                Err(_) => tracing::warn!(%vm, "flows are not shipped in time"),
            }
        });
    }
}

/// The guest stays: its migration has failed. Frames may go to the target already.
pub(crate) async fn back(shared: &Shared, vm: &VmName) {
    let edges = of_vm(shared, vm);
    if edges.is_empty() {
        return;
    }
    for edge in &edges {
        // It is open; the bridge is told again that the guest is here.
        let _ = shared.drivers.network.unmute(&edge.ifname).await;
    }
    open(shared, vm).await;
    crate::vm::announce_place(shared, vm);
}

fn target(state: &State, vm: &VmName) -> Option<(HostName, MigrationId)> {
    match &state.vms.get(vm)?.ownership {
        Ownership::Migrating { id, to, .. } => Some((to.clone(), *id)),
        _ => None,
    }
}

/// A guest's flows come ahead of it: it stands still at the source, and what clients send waits here from now on.
pub(crate) async fn put(shared: &Shared, flows: &ShippedFlows) -> Result<(), String> {
    let coming = target(&shared.state(), &flows.vm);
    if coming != Some((shared.config.host.clone(), flows.id)) {
        return Err(format!("{} does not come here by that migration", flows.vm));
    }
    let mut problem = None;
    for (number, flows_of_nic) in &flows.nics {
        let tap = tap_name(flows.vm.as_str(), *number);
        let put = shared.services.datapath.put_flows(&tap, flows_of_nic);
        problem = put.await.err().map(|error| text(&error)).or(problem);
        if let Err(error) = shared.drivers.network.unmute(&tap).await {
            problem = Some(text(&error));
        }
    }
    open(shared, &flows.vm).await;
    crate::vm::announce_place(shared, &flows.vm);
    problem.map_or(Ok(()), Err)
}

/// A tap is about to be removed.
pub(crate) async fn detach(shared: &Shared, ifname: &str) {
    let known = lock(&shared.services.edges).remove(ifname);
    lock(&shared.services.edge_problems).remove(ifname);
    if known.is_some()
        && let Err(error) = shared.services.datapath.detach_edge(ifname).await
    {
        tracing::warn!(ifname, error = text(&error), "an edge stays");
    }
}

/// Taps of guests that an earlier agent made: their edges are there and are known again.
pub(super) async fn adopt(shared: &Shared) {
    let taps = match shared.drivers.network.list_taps().await {
        Ok(taps) => taps,
        Err(error) => return tracing::warn!(error = text(&error), "no edges are adopted"),
    };
    let state = shared.state();
    for vm in state.vms.keys() {
        for edge in needed(shared, &state, vm) {
            if let Some(tap) = taps.iter().find(|tap| tap.ifname == edge.ifname) {
                attach_one(shared, &edge, !tap.muted).await;
            }
        }
    }
}

/// After a change of the state: edges of running guests that have become needed or different.
pub(super) async fn keep(shared: &Shared, state: &State) {
    for vm in shared.living() {
        for edge in needed(shared, state, &vm) {
            let known = lock(&shared.services.edges).get(&edge.ifname).cloned();
            if known.as_ref() == Some(&edge) {
                continue;
            }
            // One that was there keeps what it is: only a tap that carries its guest is opened.
            let taps = shared.drivers.network.list_taps().await.unwrap_or_default();
            let tap = taps.iter().find(|tap| tap.ifname == edge.ifname);
            if let Some(tap) = tap {
                attach_one(shared, &edge, known.is_none() && !tap.muted).await;
            }
        }
    }
}
