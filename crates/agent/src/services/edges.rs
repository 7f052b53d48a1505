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
//! does not run yet, and what comes for it waits in the tap until it does. What came to the source from the stop until
//! then is sent after the guest ([`crate::vm::held`]); the source's edge has done with it what it does, so edges let
//! frames of that source pass as they are. Guests that belong to no service have no edge, and the same is done for them.
//!
//! Always holds: nothing here fails a VM's start or move: what goes wrong is kept as a problem of the service.

use super::{lock, wanted};
use crate::vm::held::{Holding, nics as nics_of};
use crate::vm::{Shared, text};
use quorate_balancer::{EdgeSpec, Flow};
use quorate_network::tap_name;
use quorate_state::{Ownership, State};
use quorate_types::{HostName, MigrationId, VmName};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

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

impl ShippedFlows {
    fn has_services(&self) -> bool {
        let mut flows = self.nics.iter().flat_map(|(_, flows)| flows);
        flows.any(|flow| flow.service.is_some())
    }
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

/// The guest's CPUs stand still before the switchover: its flows go ahead, what came for it meanwhile follows, and the
/// director lets go of it.
pub(crate) async fn leave(
    shared: &Arc<Shared>,
    vm: &VmName,
    mut holding: Holding,
    called_off: oneshot::Receiver<()>,
) {
    holding.listen(shared).await;
    let ahead = ship(shared, vm).await;
    let called_off = async {
        if called_off.await.is_err() {
            std::future::pending().await
        }
    };
    // A target that has not answered gets what came all the same: the guest will run there, or nowhere.
    tokio::select! {
        _ = ahead => {}
        () = called_off => return,
    }
    // From here on what comes goes to the wire, and the wire leads to the target.
    for edge in of_vm(shared, vm) {
        let closed = shared.services.datapath.close_edge(&edge.ifname, true);
        if let Err(error) = closed.await {
            tracing::warn!(%vm, tap = edge.ifname, error = text(&error), "an edge stays open");
        }
    }
    holding.pass_on(shared).await;
}

/// The flows of a VM's edges go ahead; answered when the target has opened the guest's taps, or does not.
async fn ship(shared: &Arc<Shared>, vm: &VmName) -> oneshot::Receiver<()> {
    let edges = of_vm(shared, vm);
    let mut nics = Vec::new();
    for number in 0..nics_of(shared, vm) {
        let tap = tap_name(vm.as_str(), number);
        let flows = match edges.iter().any(|edge| edge.ifname == tap) {
            true => shared.services.datapath.flows(&tap).await,
            false => Ok(Vec::new()),
        };
        let flows = flows.unwrap_or_else(|error| {
            tracing::warn!(%vm, error = text(&error), "flows stay behind");
            Vec::new()
        });
        nics.push((number, flows));
    }
    let (answer, answered) = oneshot::channel();
    let Some((to, id)) = target(&shared.state(), vm).filter(|_| !nics.is_empty()) else {
        return answered;
    };
    let flows = ShippedFlows {
        vm: vm.clone(),
        id,
        nics,
    };
    let (shared, vm) = (shared.clone(), vm.clone());
    shared.clone().spawn(async move {
        let sent = shared.drivers.peers.ship_flows(to, flows);
        let sent = tokio::time::timeout(SHIP_WITHIN, sent).await;
        let _ = answer.send(());
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%vm, error, "flows are not shipped"),
            Err(_) => tracing::warn!(%vm, "flows are not shipped in time"),
        }
    });
    answered
}

/// The guest stays: its migration has failed. Frames may go to the target already.
pub(crate) async fn back(shared: &Shared, vm: &VmName) {
    for number in 0..nics_of(shared, vm) {
        // It is open; the bridge is told again that the guest is here.
        let tap = tap_name(vm.as_str(), number);
        let _ = shared.drivers.network.unmute(&tap).await;
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
    let (datapath, network) = (&shared.services.datapath, &shared.drivers.network);
    let mut problem = None;
    for (number, flows_of_nic) in &flows.nics {
        let tap = tap_name(flows.vm.as_str(), *number);
        if !flows_of_nic.is_empty() {
            let put = datapath.put_flows(&tap, flows_of_nic);
            problem = put.await.err().map(|error| text(&error)).or(problem);
        }
        if let Err(error) = network.unmute(&tap).await {
            problem = Some(text(&error));
        }
    }
    if flows.has_services() {
        shared.services.pins.flows_came();
    }
    open(shared, &flows.vm).await;
    // Switches know before the source does: what it sends after the guest comes here. Once, since the guest may stay there
    // yet; the rounds follow when it runs.
    for announcement in crate::vm::announcements(shared, &flows.vm) {
        if let Err(error) = network.announce_once(&announcement).await {
            problem = Some(text(&error));
        }
    }
    problem.map_or(Ok(()), Err)
}

/// The flows of a guest that lives elsewhere now are remembered for rings that are not prepared here yet.
async fn keep_flows(shared: &Shared, ifname: &str) {
    let Some(edge) = lock(&shared.services.edges).get(ifname).cloned() else {
        return;
    };
    let state = shared.state();
    let elsewhere = match state.vms.get(&edge.vm).map(|vm| &vm.ownership) {
        Some(Ownership::Owned { host, .. }) => *host != shared.config.host,
        Some(Ownership::Migrating { .. }) => true,
        Some(Ownership::Free) | None => false,
    };
    if !elsewhere || state.services.is_empty() {
        return;
    }
    // An edge that does not answer has nothing to remember.
    let mut flows = shared.services.datapath.flows(ifname).await;
    if let Ok(flows) = &mut flows {
        flows.retain(|flow| flow.service.is_some());
    }
    if let Some(flows) = flows.ok().filter(|flows| !flows.is_empty()) {
        shared
            .services
            .pins
            .guest_left(edge.mac, flows, state.revision);
    }
}

/// A tap is about to be removed.
pub(crate) async fn detach(shared: &Shared, ifname: &str) {
    keep_flows(shared, ifname).await;
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
