//! `quorate serve`: one process per host that wires the parts together.
//!
//! ```text
//!   node.json, identity -> consensus (replays) -> agent (adopts guests) -> controller -> peers' server -> heartbeats, API
//! ```
//! Always holds: the daemon ends, with an error, when the replicated log fails (nothing is acknowledged
//! after a storage error); when it ends, guests and their guard go on.

mod backend;
mod certs;
mod console;
mod core;
mod cut;
mod datapath;
mod doors;
mod drill;
mod group;
mod grow;
mod handler;
mod heartbeat;
mod images;
mod leave;
mod link;
mod look;
mod machine;
mod node;
mod peer;
mod pools;
mod power;
mod records;
mod remote;
mod setup;
mod take;
mod tls;
mod wiring;
mod witness;

pub(crate) use datapath::watch_speaker;
pub(crate) use remote::serve_witness;
pub(crate) use setup::{init, join, join_witness};

use self::core::Core;
use anyhow::{Context as _, Result, bail};
use group::RaftGroup;
use machine::Machine;
use node::NodeFile;
use quorate_consensus::Consensus;
use quorate_controller::Controller;
use quorate_transport::{Credentials, Identity, Options, PeerAddr, Peers, Server, ServerOptions};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tracing::{info, warn};

/// Bound for closing the replicated log; what is acknowledged is on the disk already.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// Runs until a signal or a failure of the replicated log.
pub(crate) async fn serve(dir: &Path) -> Result<()> {
    let node = NodeFile::load(dir)?;
    if node.witness {
        bail!(
            "{} is the directory of the witness {}, not of a host: run `quorate witness serve`",
            dir.display(),
            node.host
        );
    }
    let _lock = lock(dir)?;
    let identity = Identity::load(dir)?;
    if let Err(error) = identity.check(&node.cluster_id, SystemTime::now()) {
        warn!(%error, "this host's certificate");
    }
    let credentials = Credentials::new(identity)?;
    tls::write(dir)?;
    let peers = Peers::new(Arc::clone(&credentials), Options::default());

    let (machine, states) = Machine::new();
    let raft = setup::raft_config(node.node, dir);
    let route = witness::Route::new(peers.clone(), states.clone());
    let link = Arc::new(link::Link {
        peers: peers.clone(),
        route: route.clone(),
    });
    let consensus = Consensus::open(raft, machine, link).await?;
    let mut failed = consensus.failed();
    let group = RaftGroup::new(consensus.clone());
    info!(host = %node.host, node = node.node, cluster = %node.cluster_name, revision = %states.borrow().revision, "starting");

    let (stop, stopped) = watch::channel(false);
    let agent = wiring::start_agent(dir, &node, &peers, states.clone()).await?;
    let switch = Arc::new(power::Agents::new());
    let controller = Controller::start(
        node.host.clone(),
        Arc::new(group.clone()),
        switch,
        Arc::new(doors::Doors::new(
            &node.host,
            agent.clone(),
            peers.clone(),
            states.clone(),
        )),
        stopped.clone(),
    );
    let core = Arc::new(Core {
        me: node.host.clone(),
        group,
        states: states.clone(),
        controller,
        consoles: wiring::consoles(&agent),
        images: images::start(dir, &node.host, &agent, states.clone())?,
        agent,
        peers: peers.clone(),
        route,
    });

    let address: SocketAddr = node
        .address
        .parse()
        .context("the address in node.json is damaged")?;
    let handler = Arc::new(handler::PeerHandler(Arc::clone(&core)));
    let options = ServerOptions {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..ServerOptions::default()
    };
    let server = Server::bind(
        address,
        Arc::clone(&credentials),
        peers.clone(),
        handler,
        options,
    )
    .await?;

    tokio::spawn(certs::renew(dir.to_owned(), consensus.clone(), credentials));
    tokio::spawn(heartbeat::run(Arc::clone(&core)));
    tokio::spawn(pools::prepare(Arc::clone(&core)));
    tokio::spawn(records::keep(Arc::clone(&core)));
    tokio::spawn(grow::keep(Arc::clone(&core)));
    let (end_witness, witness_ends) = watch::channel(false);
    let witness = tokio::spawn(witness::run(Arc::clone(&core), witness_ends));
    let presence = tokio::spawn(leave::be_back(Arc::clone(&core)));
    // Tasks of their own: a host that says that it leaves must still hear the others, or nobody renews its lease meanwhile.
    let mut book = tokio::spawn(address_book(node.node, states, peers, server));
    let socket = dir.join(quorate_api::SOCKET);
    let mut api = tokio::spawn(wiring::serve_api(socket, Arc::clone(&core), stopped));
    sd_notify();

    let mut agent_failed = core.agent.failed();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result.map_err(Into::into),
        result = &mut api => result?.and_then(|()| bail!("the API ended")),
        _ = &mut book => bail!("the state's channel closed"),
        why = first_failure(&mut agent_failed) => Err(anyhow::anyhow!("the agent has stopped: {why}")),
        why = first_failure(&mut failed) => Err(anyhow::anyhow!("the replicated log has failed: {why}")),
    };
    info!("stopping; guests go on");
    presence.abort();
    if outcome.is_ok() {
        leave::leave(&core).await;
    }
    let _ = end_witness.send(true);
    if tokio::time::timeout(STOP_WITHIN, witness).await.is_err() {
        warn!("the disk witness did not end in time");
    }
    // Nobody listens any more if the tasks have ended already.
    let _ = stop.send(true);
    if outcome.is_ok() {
        retire_guard(&core).await;
    }
    core.agent.shutdown().await;
    if tokio::time::timeout(STOP_WITHIN, consensus.shutdown())
        .await
        .is_err()
    {
        warn!("the replicated log did not close in time: the disk may be stuck");
    }
    outcome
}

/// A host without guests needs no guard: with its end the watchdog is disarmed, so that a machine that is being
/// switched off is not reset by it half-way. With guests the guard goes on.
async fn retire_guard(core: &Core) {
    match core.agent.retire_guard().await {
        Ok(()) => info!("no guest is here: the guard has ended and the watchdog is disarmed"),
        Err(error) => info!(%error, "the guard goes on"),
    }
}

/// Waits for a part to fail, and says why.
async fn first_failure(failed: &mut watch::Receiver<Option<String>>) -> String {
    match failed.wait_for(Option::is_some).await {
        Ok(why) => why.clone().unwrap_or_default(),
        Err(_) => "it has ended".to_owned(),
    }
}

/// One daemon per directory.
fn lock(dir: &Path) -> Result<std::fs::File> {
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!(
                "another `quorate serve` runs with {}: stop it first",
                dir.display()
            )
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).context("cannot lock the state directory")
        }
    }
}

/// Tells systemd that the service is up (sd_notify(3)), where it asks for it.
fn sd_notify() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = tell_systemd(&path, b"READY=1") {
        warn!(%error, "systemd cannot be told that the service is up");
    }
}

/// `@name` is a socket without a file, as in containers.
fn tell_systemd(address: &std::ffi::OsStr, text: &[u8]) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let to = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(text, &to).map(drop)
}

/// Keeps the peers' addresses, and the list of removed hosts, in step with the state.
async fn address_book(
    me: u64,
    mut states: watch::Receiver<Arc<quorate_state::State>>,
    peers: Peers,
    server: Server,
) {
    let mut last = None;
    loop {
        let state = Arc::clone(&states.borrow_and_update());
        let entry = |(name, record): (&quorate_types::HostName, &quorate_state::HostRecord)| {
            let addr: SocketAddr = record.address.parse().ok()?;
            Some((
                record.node,
                PeerAddr {
                    host: name.to_string(),
                    addr,
                },
            ))
        };
        let mut book: BTreeMap<u64, PeerAddr> = state.hosts.iter().filter_map(entry).collect();
        book.extend(remote_witness(&state));
        if last.as_ref() != Some(&book) {
            let members: Vec<u64> = book.keys().copied().chain([me]).collect();
            server.set_removed(
                (1..=state.last_node)
                    .filter(|node| !members.contains(node))
                    .collect(),
            );
            last = Some(book.clone());
            peers.set_peers(book.into_iter().filter(|(node, _)| *node != me).collect());
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

fn remote_witness(state: &quorate_state::State) -> Option<(u64, PeerAddr)> {
    match state.quorum.witness.as_ref()? {
        quorate_state::Witness::Remote {
            node,
            name,
            address,
            ..
        } => {
            let host = name.to_string();
            let addr = address.parse().ok()?;
            Some((*node, PeerAddr { host, addr }))
        }
        quorate_state::Witness::Disk { .. } => None,
    }
}

/// Log lines on standard error, for the journal. `QUORATE_LOG` filters as `RUST_LOG` does elsewhere.
pub(crate) fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let wanted = std::env::var("QUORATE_LOG").unwrap_or_else(|_| "info".to_owned());
    // openraft logs each heartbeat; what matters of it is logged by the facade.
    let filter = EnvFilter::new(format!("{wanted},{}", quorate_consensus::LOG_DIRECTIVE));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn systemd_is_told_at_a_path_and_at_a_name() {
        let mut buffer = [0; 16];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let at_path = UnixDatagram::bind(&path).unwrap();
        tell_systemd(path.as_os_str(), b"READY=1").unwrap();
        assert_eq!(at_path.recv(&mut buffer).unwrap(), 7);
        let name = format!("quorate-test-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let at_name = UnixDatagram::bind_addr(&address).unwrap();
        tell_systemd(format!("@{name}").as_ref(), b"READY=1").unwrap();
        assert_eq!(at_name.recv(&mut buffer).unwrap(), 7);
    }
}
