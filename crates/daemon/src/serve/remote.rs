//! `quorate witness serve`: a remote witness, one voter and nothing else.
//!
//! Always holds: it runs no agent, no controller and no API, grants no lease and proposes nothing; if it is elected it
//! hands its log to a host and lets go (`quorate_consensus::Role::Witness`). It keeps the whole replicated
//! state, keys among it: its machine is to be as safe as a host.

use super::link::{Link, method_of};
use super::machine::Machine;
use super::node::NodeFile;
use super::peer::NOT_LEADER;
use super::witness::Route;
use super::{STOP_WITHIN, address_book, certs, first_failure, lock, sd_notify, setup};
use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use bytes::Bytes;
use quorate_consensus::{Config, Consensus, Role};
use quorate_state::{State, Witness};
use quorate_transport::{
    Credentials, Handler, Identity, Options, Peers, Request, RpcStatus, Server, ServerOptions,
};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use tracing::{info, warn};

/// Runs until a signal or a failure of the replicated log.
pub(crate) async fn serve_witness(dir: &Path) -> Result<()> {
    let node = NodeFile::load(dir)?;
    if !node.witness {
        bail!(
            "{} is the directory of host {}, not of a witness: run `quorate serve`",
            dir.display(),
            node.host
        );
    }
    let _lock = lock(dir)?;
    let identity = Identity::load(dir)?;
    if let Err(error) = identity.check(&node.cluster_id, SystemTime::now()) {
        warn!(%error, "this witness's certificate");
    }
    let credentials = Credentials::new(identity)?;
    let peers = Peers::new(Arc::clone(&credentials), Options::default());
    let (machine, states) = Machine::new();
    let config = Config {
        role: Role::Witness,
        ..setup::raft_config(node.node, dir)
    };
    let route = Route::new(peers.clone(), states.clone());
    let link = Arc::new(Link {
        peers: peers.clone(),
        route,
    });
    let consensus = Consensus::open(config, machine, link).await?;
    let mut failed = consensus.failed();
    info!(witness = %node.host, node = node.node, cluster = %node.cluster_name, revision = %states.borrow().revision, "starting");
    let address: SocketAddr = node
        .address
        .parse()
        .context("the address in node.json is damaged")?;
    let options = ServerOptions {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..ServerOptions::default()
    };
    let handler = Arc::new(Voter(consensus.clone()));
    let bound = Server::bind(
        address,
        Arc::clone(&credentials),
        peers.clone(),
        handler,
        options,
    );
    let server = bound.await?;
    tokio::spawn(certs::renew(dir.to_owned(), consensus.clone(), credentials));
    tokio::spawn(tell_when_replaced(node.node, states.clone()));
    let book = address_book(node.node, states, peers, server);
    sd_notify();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result.map_err(Into::into),
        () = book => bail!("the state's channel closed"),
        why = first_failure(&mut failed) => Err(anyhow::anyhow!("the replicated log has failed: {why}")),
    };
    info!("stopping");
    if tokio::time::timeout(STOP_WITHIN, consensus.shutdown())
        .await
        .is_err()
    {
        warn!("the replicated log did not close in time: the disk may be stuck");
    }
    outcome
}

async fn tell_when_replaced(me: u64, mut states: watch::Receiver<Arc<State>>) {
    let gone = |state: &Arc<State>| {
        let witness = state.quorum.witness.as_ref().map(Witness::node);
        state.last_node >= me && witness != Some(me)
    };
    if states.wait_for(gone).await.is_ok() {
        warn!(
            "the cluster has another witness, or none: this one can be stopped and its directory deleted"
        );
    }
}

/// Answers raft's requests.
struct Voter(Consensus<Machine>);

#[async_trait]
impl Handler for Voter {
    async fn handle(&self, request: Request) -> Result<Bytes, RpcStatus> {
        let Some(method) = method_of(&request.method) else {
            return Err(RpcStatus::new(
                NOT_LEADER,
                "this is a witness: it answers no questions; ask a host",
            ));
        };
        let answer = self.0.handle(method, &request.body).await;
        answer
            .map(Into::into)
            .map_err(|error| RpcStatus::new(503, error.to_string()))
    }
}
