//! Raft's requests over the peer transport.

use super::machine::Machine;
use super::witness::Route;
use async_trait::async_trait;
use quorate_consensus::{Consensus, LinkError, NodeId, PeerLink, RaftMethod};
use quorate_transport::{CallError, Peers};
use std::time::Duration;

/// Method names on the wire.
pub(crate) fn method_name(method: RaftMethod) -> &'static str {
    match method {
        RaftMethod::Append => "raft-append",
        RaftMethod::Vote => "raft-vote",
        RaftMethod::Snapshot => "raft-snapshot",
    }
}

/// The kind of request that a method's name stands for.
pub(crate) fn method_of(name: &str) -> Option<RaftMethod> {
    match name {
        "raft-append" => Some(RaftMethod::Append),
        "raft-vote" => Some(RaftMethod::Vote),
        "raft-snapshot" => Some(RaftMethod::Snapshot),
        _ => None,
    }
}

/// Sends raft's requests to peers, and to the disk witness wherever it is.
pub(crate) struct Link {
    pub(crate) peers: Peers,
    pub(crate) route: Route,
}

#[async_trait]
impl PeerLink for Link {
    async fn call(
        &self,
        target: NodeId,
        method: RaftMethod,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        if self.route.leads_to(target) {
            return self.route.call(target, method, body, timeout).await;
        }
        send(&self.peers, target, method, body, timeout).await
    }
}

/// The disk witness's way to the hosts: to its own without the network.
pub(crate) struct WitnessLink {
    pub(crate) peers: Peers,
    pub(crate) host: Consensus<Machine>,
}

#[async_trait]
impl PeerLink for WitnessLink {
    async fn call(
        &self,
        target: NodeId,
        method: RaftMethod,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        if target != self.host.node_id() {
            return send(&self.peers, target, method, body, timeout).await;
        }
        match tokio::time::timeout(timeout, self.host.handle(method, &body)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(LinkError::Remote(error.to_string())),
            Err(_) => Err(LinkError::Timeout),
        }
    }
}

async fn send(
    peers: &Peers,
    target: NodeId,
    method: RaftMethod,
    body: Vec<u8>,
    timeout: Duration,
) -> Result<Vec<u8>, LinkError> {
    match peers.call(target, method_name(method), body, timeout).await {
        Ok(answer) => Ok(answer.to_vec()),
        Err(CallError::Timeout { .. }) => Err(LinkError::Timeout),
        Err(error @ CallError::Refused { .. }) => Err(LinkError::Remote(error.to_string())),
        Err(_) => Err(LinkError::Unreachable),
    }
}

/// No peers: for making a cluster with its first host, off-line.
pub(crate) struct Alone;

#[async_trait]
impl PeerLink for Alone {
    async fn call(
        &self,
        _: NodeId,
        _: RaftMethod,
        _: Vec<u8>,
        _: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        Err(LinkError::Unreachable)
    }
}
