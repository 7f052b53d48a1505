//! Where the disk witness is: requests to its node reach whichever host runs it.
//!
//! Always holds: a host that does not run it says so and nothing else. Whether it *may* answer is checked by the node
//! itself, against its tenure, after each answer.

use super::super::machine::Machine;
use quorate_consensus::{Consensus, LinkError, NodeId, RaftMethod};
use quorate_state::{State, Witness};
use quorate_transport::{CallError, Peers, RpcStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::watch;

/// Code of "the witness is not here".
const NOT_HERE: u16 = 410;
/// Prefix of the methods on the wire; the node's number is the first eight bytes of the body.
const PREFIX: &str = "witness-";

/// The way to the disk witness. Clones share it.
#[derive(Clone)]
pub(crate) struct Route {
    peers: Peers,
    states: watch::Receiver<Arc<State>>,
    local: Arc<RwLock<Option<Consensus<Machine>>>>,
    /// The host that ran it last.
    last: Arc<AtomicU64>,
}

impl Route {
    pub(crate) fn new(peers: Peers, states: watch::Receiver<Arc<State>>) -> Self {
        Self {
            peers,
            states,
            local: Arc::default(),
            last: Arc::default(),
        }
    }

    /// Runs here from now on, or no more.
    pub(crate) fn set_local(&self, node: Option<Consensus<Machine>>) {
        *self.local.write().unwrap_or_else(PoisonError::into_inner) = node;
    }

    fn local(&self, node: NodeId) -> Option<Consensus<Machine>> {
        let local = self.local.read().unwrap_or_else(PoisonError::into_inner);
        local.clone().filter(|local| local.node_id() == node)
    }

    /// Is this the node of the disk witness?
    pub(crate) fn leads_to(&self, node: NodeId) -> bool {
        let state = self.states.borrow();
        matches!(&state.quorum.witness, Some(Witness::Disk { node: disk, .. }) if *disk == node)
    }

    /// Carries a request to the witness, here or on another host.
    pub(crate) async fn call(
        &self,
        node: NodeId,
        method: RaftMethod,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        if let Some(local) = self.local(node) {
            let answer = tokio::time::timeout(timeout, local.handle(method, &body)).await;
            return match answer {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(error)) => Err(LinkError::Remote(error.to_string())),
                Err(_) => Err(LinkError::Timeout),
            };
        }
        let mut framed = node.to_be_bytes().to_vec();
        framed.extend(body);
        let framed = bytes::Bytes::from(framed);
        let method = format!("{PREFIX}{}", super::super::link::method_name(method));
        let last = self.last.load(Ordering::Relaxed);
        if last != 0
            && let Some(answer) = self.ask(last, &method, framed.clone(), timeout).await
        {
            return answer;
        }
        let me = self.peers.links();
        let others = me.into_keys().filter(|host| *host != last);
        let asked = others.map(|host| {
            let (method, framed) = (method.clone(), framed.clone());
            async move { (host, self.ask(host, &method, framed, timeout).await) }
        });
        let mut answers: futures_util::stream::FuturesUnordered<_> = asked.collect();
        while let Some((host, answer)) = futures_util::StreamExt::next(&mut answers).await {
            if let Some(answer) = answer {
                self.last.store(host, Ordering::Relaxed);
                return answer;
            }
        }
        self.last.store(0, Ordering::Relaxed);
        Err(LinkError::Unreachable)
    }

    /// `None`: it is not there.
    async fn ask(
        &self,
        host: NodeId,
        method: &str,
        body: bytes::Bytes,
        timeout: Duration,
    ) -> Option<Result<Vec<u8>, LinkError>> {
        match self.peers.call(host, method, body, timeout).await {
            Ok(answer) => Some(Ok(answer.to_vec())),
            Err(CallError::Refused { code: NOT_HERE, .. }) => None,
            Err(CallError::Refused { message, .. }) => Some(Err(LinkError::Remote(message))),
            // It may be there; whoever else is asked says.
            Err(_) => None,
        }
    }

    /// Is this one of the witness's methods?
    pub(crate) fn method(name: &str) -> Option<RaftMethod> {
        super::super::link::method_of(name.strip_prefix(PREFIX)?)
    }

    /// Answers another host's request to the witness.
    pub(crate) async fn serve(
        &self,
        method: RaftMethod,
        body: &[u8],
    ) -> Result<bytes::Bytes, RpcStatus> {
        let Some((node, body)) = body.split_first_chunk::<8>() else {
            return Err(RpcStatus::new(
                400,
                "a request to the witness without its number",
            ));
        };
        let node = NodeId::from_be_bytes(*node);
        let Some(local) = self.local(node) else {
            return Err(RpcStatus::new(
                NOT_HERE,
                format!("node {node} does not run here"),
            ));
        };
        let answer = local.handle(method, body).await;
        answer
            .map(Into::into)
            .map_err(|error| RpcStatus::new(503, error.to_string()))
    }
}
