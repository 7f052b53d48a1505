//! Calls between daemons: typed requests over the transport's bytes.
//!
//! Always holds: each method is idempotent, since a relayed call can arrive twice; a caller that
//! needs the leader is told who it is when it asked the wrong host.

use quorate_agent::UnitsCut;
use quorate_agent_logic::{ExportOffer, ExportRequest, FlushRequest, TargetSays};
use quorate_api::storage::{PoolLook, StrangersSeen};
use quorate_controller::{HeartbeatReply, HeartbeatRequest, Picture};
use quorate_planner::{Explanation, Seen};
use quorate_state::{Command, Outcome, Reason, Refusal};
use quorate_transport::{CallError, Peers, RpcStatus};
use quorate_types::{
    Epoch, HostName, ImageJob, ImageRef, ImageSnapshot, ImageTask, MigrationId, NodeId, PoolName,
    Revision, VmName,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// A request between daemons.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ask {
    /// To the leader: propose a command.
    Propose { by: String, command: Box<Command> },
    /// To the leader: its picture.
    Picture,
    /// To the leader: cut a host's power.
    Fence {
        host: HostName,
        #[serde(default)]
        who: String,
    },
    /// To the leader: an operator's word.
    ConfirmDead { host: HostName, who: String },
    /// To the leader: a host's daemon is being stopped in order.
    Leave { host: HostName },
    /// To the leader: can the VM be moved, and where to?
    WhatMove { vm: VmName, to: Option<HostName> },
    /// To the leader: where would the VM go?
    Explain { vm: VmName },
    /// To the leader: all that it sees, for questions that are answered by who asks.
    Seen,
    /// To a migration's target: where to send the guest.
    Incoming {
        vm: VmName,
        id: MigrationId,
        ready: bool,
    },
    /// To the host of a disk's copy: where to write it to.
    Export(ExportRequest),
    /// To the host of a disk's copy: bring it to stable storage.
    FlushCopy(FlushRequest),
    /// To a migration's target, at the pause: take over what only one host may have.
    HandOver { vm: VmName, id: MigrationId },
    /// To a host that reaches the pool: cut a host off from its units.
    CutUnits {
        pool: PoolName,
        host: HostName,
        epochs: BTreeMap<String, Epoch>,
    },
    /// To a migration's target: what became of the guest?
    Outcome { vm: VmName, id: MigrationId },
    /// To a migration's target: flows of the VM's edges, ahead of it.
    Flows(quorate_agent::ShippedFlows),
    /// To a director: flows that the coming ring of a service would strand.
    Pins(Vec<quorate_balancer::Pin>),
    /// To the VM's host: a piece of its serial log.
    ConsoleRead { vm: VmName, offset: u64, limit: u64 },
    /// To the VM's host: input for its serial console.
    ConsoleWrite { vm: VmName, input: Vec<u8> },
    /// To a host that reaches the pool: what is in it.
    Images { pool: PoolName },
    /// To a host that reaches the pool: who else is registered on a unit.
    Strangers { pool: PoolName, image: String },
    /// To the host that shall do it: a task on images.
    ImageJob { by: String, task: Box<ImageTask> },
    /// To a host: its jobs, or one of them.
    ImageJobs { id: Option<String> },
    /// To a job's host: take it back.
    CancelImageJob { id: String },
    /// To a host that reaches the pool: an image's snapshots.
    Snapshots { image: ImageRef },
}

/// An answer between daemons.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// The state machine's answer.
    Proposed(Result<Outcome, Refusal>),
    /// The picture.
    Picture(Box<Picture>),
    /// Done, with a sentence.
    Done(String),
    /// The host that it would move to, or why none.
    Move(Result<HostName, Reason>),
    /// Where it would go, if the VM exists.
    Explanation(Option<Box<Explanation>>),
    /// What the leader sees, and the revision that it goes with.
    Seen { revision: Revision, seen: Box<Seen> },
    /// `address:port` of the waiting guest.
    Address(String),
    /// Where a copy is written to.
    Export(ExportOffer),
    /// What became of each unit.
    UnitsCut(UnitsCut),
    /// What became of it.
    Outcome(TargetSays),
    /// A piece of a log.
    Log {
        offset: u64,
        size: u64,
        bytes: Vec<u8>,
    },
    /// What is in a pool.
    Images(PoolLook),
    /// Who else uses a unit.
    Strangers(StrangersSeen),
    /// Jobs.
    ImageJobs(Vec<ImageJob>),
    /// An image's snapshots.
    Snapshots(Vec<ImageSnapshot>),
}

/// Name of the method on the wire that carries an [`Ask`].
pub(crate) const ASK: &str = "ask";
/// Name of the heartbeat's method.
pub(crate) const HEARTBEAT: &str = "heartbeat";

/// Code of a refusal that names another leader.
pub(crate) const NOT_LEADER: u16 = 421;

/// Sends an [`Ask`].
pub(crate) async fn ask(
    peers: &Peers,
    node: NodeId,
    ask: &Ask,
    timeout: Duration,
) -> Result<Answer, CallError> {
    call(peers, node, ASK, ask, timeout).await
}

/// Sends a heartbeat.
pub(crate) async fn heartbeat(
    peers: &Peers,
    node: NodeId,
    request: &HeartbeatRequest,
    timeout: Duration,
) -> Result<HeartbeatReply, CallError> {
    call(peers, node, HEARTBEAT, request, timeout).await
}

async fn call<T: DeserializeOwned>(
    peers: &Peers,
    node: NodeId,
    method: &str,
    request: &(impl Serialize + Sync),
    timeout: Duration,
) -> Result<T, CallError> {
    let broken = |error: serde_json::Error| CallError::Refused {
        node,
        code: 500,
        message: format!("`{method}` between node {node} and this one cannot be read: {error}"),
    };
    let body = serde_json::to_vec(request).map_err(broken)?;
    let answer = peers.call(node, method, body, timeout).await?;
    serde_json::from_slice(&answer).map_err(broken)
}

/// Reads a request's body.
pub(crate) fn read<T: DeserializeOwned>(method: &str, body: &[u8]) -> Result<T, RpcStatus> {
    serde_json::from_slice(body)
        .map_err(|error| RpcStatus::new(400, format!("`{method}` cannot be read: {error}")))
}

/// Writes an answer's body.
pub(crate) fn write(answer: &impl Serialize) -> Result<bytes::Bytes, RpcStatus> {
    serde_json::to_vec(answer)
        .map(Into::into)
        .map_err(|error| RpcStatus::new(500, error.to_string()))
}
