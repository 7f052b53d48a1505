//! openraft's outgoing requests, over the daemon's [`PeerLink`].
//!
//! Owns the RPC bodies and the noting of acknowledgements ([`AckTable`]). What always holds: the send
//! time of a request is taken before it leaves. It must not retry: openraft does, with the back-off below.

use std::sync::Arc;
use std::time::Duration;

use openraft::error::{
    Fatal, InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable,
};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{EmptyNode, RaftNetwork, RaftNetworkFactory};
use serde::{Deserialize, Serialize};

use crate::clock::BootTime;
use crate::codec::{self, CodecError};
use crate::quiet::Quiet;
use crate::quorum::AckTable;
use crate::tenure::{Gate, OVER};
use crate::types::{LogId, SnapshotMeta, TypeConfig, Vote};
use crate::{LinkError, NodeId, PeerLink, RaftMethod, Timings};

/// Header of an append request; the entries follow.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AppendHeader {
    pub(crate) vote: Vote,
    pub(crate) previous: Option<LogId>,
    pub(crate) commit: Option<LogId>,
    /// False: the leader hears no majority. The receiver only says that it is there.
    pub(crate) majority: bool,
}

/// Answer to an append request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AppendAnswer {
    /// The leader hears no majority: raft was not asked.
    Here,
    Raft(AppendEntriesResponse<u64>),
}

/// Header of a vote request; nothing follows.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum VoteHeader {
    /// "Would you vote for me?" Changes nothing at the receiver.
    Ask { last: Option<LogId> },
    /// openraft's vote request.
    Vote { vote: Vote, last: Option<LogId> },
}

/// Answer to a vote request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum VoteAnswer {
    Ask { granted: bool },
    Vote(Voted),
}

/// Answer of raft to a vote request, and what the candidate may count on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Voted {
    #[serde(flatten)]
    pub(crate) answer: VoteResponse<u64>,
    /// For how long the voter had acknowledged no leader; an earlier release does not say.
    #[serde(default)]
    pub(crate) quiet_ms: u64,
}

/// Header of a snapshot chunk; the chunk follows.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotHeader {
    pub(crate) vote: Vote,
    pub(crate) meta: SnapshotMeta,
    pub(crate) offset: u64,
    pub(crate) done: bool,
}

/// Answer to a snapshot chunk.
pub(crate) type SnapshotAnswer = Result<InstallSnapshotResponse<u64>, InstallSnapshotError>;

/// Makes one [`PeerClient`] per peer.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) link: Arc<dyn PeerLink>,
    pub(crate) me: NodeId,
    pub(crate) acks: Arc<AckTable>,
    pub(crate) quiet: Arc<Quiet>,
    pub(crate) timings: Timings,
    pub(crate) gate: Gate,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: NodeId, _node: &EmptyNode) -> PeerClient {
        PeerClient {
            network: self.clone(),
            target,
        }
    }
}

/// Requests to one peer.
pub(crate) struct PeerClient {
    network: Network,
    target: NodeId,
}

#[derive(Debug, thiserror::Error)]
#[error("node {target}: {reason}")]
struct CallFailed {
    target: NodeId,
    reason: String,
}

#[derive(Debug, thiserror::Error)]
#[error("no majority of the voters answers")]
struct NoMajority;

type CallError<E> = RPCError<u64, EmptyNode, RaftError<u64, E>>;

impl PeerClient {
    fn failed(&self, reason: impl ToString) -> CallFailed {
        CallFailed {
            target: self.target,
            reason: reason.to_string(),
        }
    }

    fn bad<E: std::error::Error>(&self, e: CodecError) -> CallError<E> {
        RPCError::Network(NetworkError::new(&self.failed(e)))
    }

    fn hears_majority(&self) -> bool {
        let network = &self.network;
        network
            .acks
            .reaches_majority(network.me, network.timings.election_max)
    }

    async fn call<E: std::error::Error>(
        &self,
        method: RaftMethod,
        body: Vec<u8>,
        option: &RPCOption,
    ) -> Result<Vec<u8>, CallError<E>> {
        let gate = &self.network.gate;
        let over = || Unreachable::new(&self.failed(OVER));
        if !gate.open() {
            return Err(over().into());
        }
        let sent = BootTime::now();
        let answer = self
            .network
            .link
            .call(self.target, method, body, option.hard_ttl())
            .await;
        if !gate.open() {
            return Err(over().into());
        }
        if answer.is_ok() {
            self.network.acks.record_answer(self.target, sent);
        }
        answer.map_err(|e| match e {
            // openraft repeats other errors at once; this one after the back-off.
            LinkError::Unreachable | LinkError::Timeout | LinkError::Remote(_) => {
                RPCError::Unreachable(Unreachable::new(&self.failed(e)))
            }
        })
    }
}

impl RaftNetwork<TypeConfig> for PeerClient {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, CallError<openraft::error::Infallible>> {
        let header = AppendHeader {
            vote: rpc.vote,
            previous: rpc.prev_log_id,
            commit: rpc.leader_commit,
            majority: self.hears_majority(),
        };
        let entries = if header.majority {
            codec::encode_entries(&rpc.entries).map_err(|e| self.bad(e))?
        } else {
            Vec::new()
        };
        let body = codec::frame(&header, &entries).map_err(|e| self.bad(e))?;
        let sent = BootTime::now();
        let reply = self.call(RaftMethod::Append, body, &option).await?;
        let answer = match codec::unframe(&reply).map_err(|e| self.bad(e))?.0 {
            AppendAnswer::Raft(answer) => answer,
            AppendAnswer::Here => return Err(Unreachable::new(&NoMajority).into()),
        };
        match answer {
            // A conflict too: the follower accepted the leader, not yet the log.
            AppendEntriesResponse::Success
            | AppendEntriesResponse::PartialSuccess(_)
            | AppendEntriesResponse::Conflict => {
                self.network.acks.record(rpc.vote, self.target, sent);
            }
            AppendEntriesResponse::HigherVote(_) => {}
        }
        Ok(answer)
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, CallError<InstallSnapshotError>> {
        if !self.hears_majority() {
            return Err(Unreachable::new(&NoMajority).into());
        }
        let header = SnapshotHeader {
            vote: rpc.vote,
            meta: rpc.meta,
            offset: rpc.offset,
            done: rpc.done,
        };
        let body = codec::frame(&header, &rpc.data).map_err(|e| self.bad(e))?;
        let sent = BootTime::now();
        let reply = self.call(RaftMethod::Snapshot, body, &option).await?;
        let (answer, _): (SnapshotAnswer, _) = codec::unframe(&reply).map_err(|e| self.bad(e))?;
        match answer {
            Ok(answer) => {
                if answer.vote == rpc.vote {
                    self.network.acks.record(rpc.vote, self.target, sent);
                }
                Ok(answer)
            }
            Err(e) => Err(RPCError::RemoteError(RemoteError::new(
                self.target,
                RaftError::APIError(e),
            ))),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, CallError<openraft::error::Infallible>> {
        let header = VoteHeader::Vote {
            vote: rpc.vote,
            last: rpc.last_log_id,
        };
        let term = rpc.vote.leader_id.term;
        let body = codec::frame(&header, &[]).map_err(|e| self.bad(e))?;
        let reply = self.call(RaftMethod::Vote, body, &option).await?;
        match codec::unframe(&reply).map_err(|e| self.bad(e))?.0 {
            VoteAnswer::Vote(Voted { answer, quiet_ms }) => {
                if answer.vote_granted {
                    // Its clock may differ by some part; the caller of the bound allows for that.
                    let heard = BootTime::now().minus(Duration::from_millis(quiet_ms));
                    self.network.quiet.elected_by(term, heard);
                }
                Ok(answer)
            }
            VoteAnswer::Ask { .. } => Err(RPCError::RemoteError(RemoteError::new(
                self.target,
                RaftError::Fatal(Fatal::Stopped),
            ))),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(self.network.timings.heartbeat))
    }
}
