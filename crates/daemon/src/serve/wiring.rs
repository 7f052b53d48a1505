//! Where the agent and the API are put together with the rest.

use super::backend::Daemon;
use super::console::Consoles;
use super::core::Core;
use super::node::NodeFile;
use super::shim::AgentHandle;
use anyhow::Result;
use quorate_state::State;
use quorate_transport::Peers;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

pub(crate) async fn start_agent(
    _dir: &Path,
    _node: &NodeFile,
    _peers: &Peers,
    _states: watch::Receiver<Arc<State>>,
) -> Result<AgentHandle> {
    Ok(AgentHandle(_node.host.clone()))
}

pub(crate) fn consoles(agent: &AgentHandle) -> Consoles {
    let (a, b) = (agent.clone(), agent.clone());
    Consoles {
        log: Box::new(move |vm| a.log(vm)),
        socket: Box::new(move |vm| b.log(vm)),
    }
}

/// Serves the API until told to stop.
pub(crate) async fn serve_api(
    dir: &Path,
    core: Arc<Core>,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let backend = Arc::new(Daemon(core));
    let router = quorate_api::router(backend, quorate_api::Limits::default(), stopped.clone());
    quorate_api::serve(router, &dir.join(quorate_api::SOCKET), stopped).await?;
    Ok(())
}
