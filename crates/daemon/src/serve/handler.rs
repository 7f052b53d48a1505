//! The server side of peer calls: what other daemons may ask of this one.

use super::core::Core;
use super::peer::{ASK, Answer, Ask, HEARTBEAT, NOT_LEADER, read, write};
use super::setup::{JoinReply, JoinRequest};
use async_trait::async_trait;
use bytes::Bytes;
use quorate_consensus::RaftMethod;
use quorate_controller::{ControllerError, HeartbeatRequest, ProposeFailure};
use quorate_state::Command;
use quorate_transport::{Ca, CaOptions, Caller, Handler, HostPublicKey, Request, RpcStatus, Subject, TokenSecret};
use std::sync::Arc;
use std::time::SystemTime;

/// Answers peers.
pub(crate) struct PeerHandler(pub(crate) Arc<Core>);

#[async_trait]
impl Handler for PeerHandler {
    async fn handle(&self, request: Request) -> Result<Bytes, RpcStatus> {
        let raft = match request.method.as_str() {
            "raft-append" => Some(RaftMethod::Append),
            "raft-vote" => Some(RaftMethod::Vote),
            "raft-snapshot" => Some(RaftMethod::Snapshot),
            _ => None,
        };
        if let Some(method) = raft {
            let answer = self.0.group.consensus().handle(method, &request.body).await;
            return answer.map(Into::into).map_err(|error| RpcStatus::new(503, error.to_string()));
        }
        match (request.method.as_str(), &request.from) {
            (HEARTBEAT, Caller::Peer { .. }) => self.heartbeat(&request.body),
            (ASK, Caller::Peer { .. }) => write(&self.answer(read(ASK, &request.body)?).await?),
            ("join", _) => write(&self.join(read("join", &request.body)?).await?),
            (method, _) => Err(RpcStatus::new(404, format!("`{method}` is not known here: this host's program is older"))),
        }
    }
}

impl PeerHandler {
    fn heartbeat(&self, body: &[u8]) -> Result<Bytes, RpcStatus> {
        let request: HeartbeatRequest = read(HEARTBEAT, body)?;
        let reply = self.0.controller.heartbeat(request);
        write(&reply.ok_or_else(|| self.not_leader())?)
    }

    fn not_leader(&self) -> RpcStatus {
        RpcStatus::new(NOT_LEADER, format!("{} does not lead the cluster", self.0.me))
    }

    async fn answer(&self, ask: Ask) -> Result<Answer, RpcStatus> {
        let core = &self.0;
        match ask {
            Ask::Propose { by, command } => match core.group_propose(&by, *command).await {
                Ok(outcome) => Ok(Answer::Proposed(Ok(outcome))),
                Err(ProposeFailure::Refused(refusal)) => Ok(Answer::Proposed(Err(refusal))),
                Err(ProposeFailure::NotDone(why)) => Err(RpcStatus::new(NOT_LEADER, why)),
                Err(ProposeFailure::Unknown(why)) => Err(RpcStatus::new(504, why)),
            },
            Ask::Picture => {
                let picture = core.controller.picture().ok_or_else(|| self.not_leader())?;
                Ok(Answer::Picture(Box::new(picture)))
            }
            Ask::Fence { host } => core.controller.fence(host).await.map(Answer::Done).map_err(refused),
            Ask::ConfirmDead { host, who } => {
                let text = format!("{host} is taken for dead on the word of {who}");
                core.controller.confirm_dead(host, who).await.map(|()| Answer::Done(text)).map_err(refused)
            }
            Ask::WhatMove { vm, to } => {
                let found = core.controller.with_input(|input| quorate_planner::what_move(input, &vm, to.as_ref()));
                found.map(Answer::Move).ok_or_else(|| self.not_leader())
            }
            Ask::Incoming { vm, id, ready } => {
                let address = core.agent.incoming_address(vm, id, ready).await;
                address.map(Answer::Address).map_err(|error| RpcStatus::new(409, error))
            }
            Ask::ConsoleRead { vm, offset, limit } => core.consoles.read(&vm, offset, limit).await,
            Ask::ConsoleWrite { vm, input } => core.consoles.write(&vm, &input).await,
        }
    }

    async fn join(&self, request: JoinRequest) -> Result<JoinReply, RpcStatus> {
        let core = &self.0;
        let secret = TokenSecret::from_revealed(&request.secret)
            .map_err(|error| RpcStatus::new(403, error.to_string()))?;
        // The key is checked before the token is used up.
        let key = HostPublicKey::from_csr_pem(&request.request)
            .map_err(|error| RpcStatus::new(400, error.to_string()))?;
        let command = Command::AdmitHost {
            token: secret.hash(),
            host: request.host.clone(),
            address: request.address,
        };
        let outcome = core.propose(&format!("host {}", request.host), command).await;
        let outcome = outcome.map_err(|error| RpcStatus::new(409, error.to_string()))?;
        let node = outcome.node.ok_or_else(|| RpcStatus::new(500, "the cluster gave no node number"))?;
        let state = core.state();
        let cluster = state.cluster.as_ref().ok_or_else(|| RpcStatus::new(503, "this host has not caught up yet"))?;
        let issue = || -> Result<String, quorate_transport::CaError> {
            let ca = Ca::from_pem(&cluster.id, &cluster.ca_certificate, &cluster.ca_key)?;
            let subject = Subject { cluster: cluster.id.clone(), node, host: request.host.to_string() };
            ca.issue(&subject, &key, &CaOptions::default(), SystemTime::now())
        };
        let certificate = issue().map_err(|error| RpcStatus::new(500, error.to_string()))?;
        Ok(JoinReply {
            node,
            certificate,
            ca_certificate: cluster.ca_certificate.clone(),
            cluster_id: cluster.id.clone(),
            cluster_name: cluster.name.clone(),
        })
    }
}

fn refused(error: ControllerError) -> RpcStatus {
    let code = match &error {
        ControllerError::NotLeader => NOT_LEADER,
        ControllerError::UnknownHost(_) => 404,
        _ => 409,
    };
    RpcStatus::new(code, error.to_string())
}
