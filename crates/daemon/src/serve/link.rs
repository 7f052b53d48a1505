//! Raft's requests over the peer transport.

use async_trait::async_trait;
use quorate_consensus::{LinkError, NodeId, PeerLink, RaftMethod};
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

/// Sends raft's requests to peers.
pub(crate) struct Link(pub(crate) Peers);

#[async_trait]
impl PeerLink for Link {
    async fn call(
        &self,
        target: NodeId,
        method: RaftMethod,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        match self
            .0
            .call(target, method_name(method), body, timeout)
            .await
        {
            Ok(answer) => Ok(answer.to_vec()),
            Err(CallError::Timeout { .. }) => Err(LinkError::Timeout),
            Err(error @ CallError::Refused { .. }) => Err(LinkError::Remote(error.to_string())),
            Err(_) => Err(LinkError::Unreachable),
        }
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
