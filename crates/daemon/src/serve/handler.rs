//! The server side of peer calls: what other daemons may ask of this one.

use super::core::Core;
use super::link::method_of;
use super::peer::{ASK, HEARTBEAT, read, write};
use super::setup::{JoinReply, JoinRequest};
use super::witness::Route;
use async_trait::async_trait;
use bytes::Bytes;
use quorate_controller::HeartbeatRequest;
use quorate_state::Command;
use quorate_transport::{
    Ca, CaOptions, Caller, Handler, HostPublicKey, Request, RpcStatus, Subject, TokenSecret,
};
use std::sync::Arc;
use std::time::SystemTime;

/// Answers peers.
pub(crate) struct PeerHandler(pub(crate) Arc<Core>);

#[async_trait]
impl Handler for PeerHandler {
    async fn handle(&self, request: Request) -> Result<Bytes, RpcStatus> {
        if let Some(method) = Route::method(&request.method) {
            return self.0.route.serve(method, &request.body).await;
        }
        if let Some(method) = method_of(&request.method) {
            let answer = self.0.group.consensus().handle(method, &request.body).await;
            return answer
                .map(Into::into)
                .map_err(|error| RpcStatus::new(503, error.to_string()));
        }
        match (request.method.as_str(), &request.from) {
            (HEARTBEAT, Caller::Peer { .. }) => self.heartbeat(&request.body),
            (ASK, Caller::Peer { .. }) => write(&self.0.answer(read(ASK, &request.body)?).await?),
            ("join", _) => write(&self.join(read("join", &request.body)?).await?),
            (method, _) => Err(RpcStatus::new(
                404,
                format!("`{method}` is not known here: this host's program is older"),
            )),
        }
    }
}

impl PeerHandler {
    fn heartbeat(&self, body: &[u8]) -> Result<Bytes, RpcStatus> {
        let request: HeartbeatRequest = read(HEARTBEAT, body)?;
        let reply = self.0.controller.heartbeat(request);
        write(&reply.ok_or_else(|| self.0.not_leader())?)
    }

    async fn join(&self, request: JoinRequest) -> Result<JoinReply, RpcStatus> {
        let core = &self.0;
        let secret = TokenSecret::from_revealed(&request.secret)
            .map_err(|error| RpcStatus::new(403, error.to_string()))?;
        // The key is checked before the token is used up.
        let key = HostPublicKey::from_csr_pem(&request.request)
            .map_err(|error| RpcStatus::new(400, error.to_string()))?;
        let (token, name) = (secret.hash(), request.host.clone());
        let (who, command) = match request.witness {
            false => (
                format!("host {name}"),
                Command::AdmitHost {
                    token,
                    host: name,
                    address: request.address,
                },
            ),
            true => (
                format!("witness {name}"),
                Command::AdmitWitness {
                    token,
                    name,
                    address: request.address,
                },
            ),
        };
        let outcome = core.propose(&who, command).await;
        let outcome = outcome.map_err(|error| RpcStatus::new(409, error.to_string()))?;
        let node = outcome
            .node
            .ok_or_else(|| RpcStatus::new(500, "the cluster gave no node number"))?;
        let state = core.state();
        let cluster = state
            .cluster
            .as_ref()
            .ok_or_else(|| RpcStatus::new(503, "this host has not caught up yet"))?;
        let issue = || -> Result<String, quorate_transport::CaError> {
            let ca = Ca::from_pem(&cluster.id, &cluster.ca_certificate, &cluster.ca_key)?;
            let subject = Subject {
                cluster: cluster.id.clone(),
                node,
                host: request.host.to_string(),
            };
            ca.issue(&subject, &key, &CaOptions::default(), SystemTime::now())
        };
        let certificate = issue().map_err(|error| RpcStatus::new(500, error.to_string()))?;
        Ok(JoinReply {
            node,
            certificate,
            ca_certificate: cluster.ca_certificate.clone(),
            cluster_id: cluster.id.clone(),
            cluster_name: cluster.name.clone(),
            lease: cluster.settings.lease,
        })
    }
}
