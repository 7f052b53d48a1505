//! Where the agent and the API are put together with the rest.

use super::backend::Daemon;
use super::console::Consoles;
use super::core::Core;
use super::datapath;
use super::node::NodeFile;
use super::peer::{self, Answer, Ask};
use super::tls;
use anyhow::{Context as _, Result};
use async_trait::async_trait;
use quorate_agent::{
    Agent, AgentConfig, AgentHandle, Drivers, PeerAsk, Pools, ShippedFlows, hypervisor_facts,
};
use quorate_agent_logic::{ExportOffer, ExportRequest, FlushRequest, TargetSays};
use quorate_hypervisor::qemu::QemuDriver;
use quorate_hypervisor::qemu::probe::{ProbeOptions, probe};
use quorate_network::LinuxNetwork;
use quorate_state::State;
use quorate_transport::Peers;
use quorate_types::{BootId, ByteSize, HostName, MigrationId, NodeId, VmName};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tracing::info;

/// Memory that guests may not use: for the system and the daemon.
const RESERVED_MEMORY: ByteSize = ByteSize::mib(1024);
/// Bound for a question to another host's agent.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// The same where an image has to be made first.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(8);
/// A copy's host writes what it has in memory.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);

/// Finds out what QEMU can do here, adopts running guests, and starts the agent.
pub(crate) async fn start_agent(
    dir: &Path,
    node: &NodeFile,
    peers: &Peers,
    states: watch::Receiver<Arc<State>>,
) -> Result<AgentHandle> {
    let agent_dir = dir.join("agent");
    let scratch = agent_dir.join("probe");
    std::fs::create_dir_all(&scratch)
        .with_context(|| format!("cannot create {}", scratch.display()))?;
    let qemu = std::env::var_os("QUORATE_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
    let found = probe(&ProbeOptions::new(&qemu, &scratch))
        .await
        .context("QEMU does not work on this host: install qemu-system-x86, or set QUORATE_QEMU to the program")?;
    info!(qemu = %found.version, accel = found.accel.as_str(), why = %found.accel_reason, "hypervisor");
    let address: SocketAddr = node
        .address
        .parse()
        .context("the address in node.json is damaged")?;
    let known = states
        .borrow()
        .cluster
        .as_ref()
        .map(|cluster| cluster.settings.lease);
    let lease = known.unwrap_or(node.lease);
    let config = AgentConfig {
        host: node.host.clone(),
        dir: agent_dir,
        cluster_id: node.cluster_id.clone(),
        boot: boot_id()?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        accel: found.accel,
        sandbox: found.sandbox,
        facts: hypervisor_facts(&found),
        reserved_memory: RESERVED_MEMORY,
        migration_address: address.ip(),
        migration_tls: Some(tls::directory(dir)),
        guard_command: vec![own_program()?.into(), OsString::from("guard")],
        speaker_command: vec![own_program()?.into(), OsString::from("bgp-speaker")],
        watchdog: std::env::var("QUORATE_WATCHDOG").ok(),
        watchdog_timeout: lease.watchdog_bound.as_duration(),
    };
    let drivers = Drivers {
        hypervisor: Arc::new(QemuDriver::new(qemu)),
        network: Arc::new(
            LinuxNetwork::open()
                .context("the kernel's network interface cannot be opened: run as root")?,
        ),
        datapath: datapath::open(dir, node.node).await,
        pools: Arc::new(Pools {
            cluster_id: node.cluster_id.clone(),
            host: node.host.clone(),
        }),
        peers: Arc::new(Asker {
            peers: peers.clone(),
            states: states.clone(),
        }),
        guard: None,
    };
    Ok(Agent::start(config, drivers, states).await?)
}

/// This life of the host. Hosts that share a kernel (a lab) name theirs in `QUORATE_BOOT_ID`.
fn boot_id() -> Result<BootId> {
    if let Ok(text) = std::env::var("QUORATE_BOOT_ID") {
        return Ok(BootId(text));
    }
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BootId(text.trim().to_owned()))
}

/// This program, also after its file was replaced by an upgrade.
fn own_program() -> Result<PathBuf> {
    let path = std::env::current_exe()?;
    let text = path.to_string_lossy();
    Ok(PathBuf::from(
        text.strip_suffix(" (deleted)").unwrap_or(&text),
    ))
}

struct Asker {
    peers: Peers,
    states: watch::Receiver<Arc<State>>,
}

impl Asker {
    fn node(&self, host: &HostName) -> Result<NodeId, String> {
        let state = self.states.borrow();
        state
            .hosts
            .get(host)
            .map(|record| record.node)
            .ok_or_else(|| format!("{host} is not a host of this cluster"))
    }
}

impl Asker {
    /// Something that needs no answer but that it was taken.
    async fn tell(&self, to: &HostName, what: &Ask) -> Result<(), String> {
        let node = self.node(to)?;
        let told = peer::ask(&self.peers, node, what, ASK_TIMEOUT).await;
        told.map(drop).map_err(|error| error.to_string())
    }
}

#[async_trait]
impl PeerAsk for Asker {
    async fn ask_incoming(
        &self,
        to: HostName,
        vm: VmName,
        id: MigrationId,
        ready: bool,
    ) -> Result<String, String> {
        let node = self.node(&to)?;
        match peer::ask(
            &self.peers,
            node,
            &Ask::Incoming { vm, id, ready },
            ASK_TIMEOUT,
        )
        .await
        {
            Ok(Answer::Address(address)) => Ok(address),
            Ok(_) => Err(format!(
                "{to} gave another kind of answer than was asked for"
            )),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn ask_export(
        &self,
        to: HostName,
        request: ExportRequest,
    ) -> Result<ExportOffer, String> {
        let node = self.node(&to)?;
        match peer::ask(&self.peers, node, &Ask::Export(request), EXPORT_TIMEOUT).await {
            Ok(Answer::Export(offer)) => Ok(offer),
            Ok(_) => Err(format!(
                "{to} gave another kind of answer than was asked for"
            )),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn ask_flush(&self, to: HostName, request: FlushRequest) -> Result<(), String> {
        let node = self.node(&to)?;
        let asked = peer::ask(&self.peers, node, &Ask::FlushCopy(request), FLUSH_TIMEOUT).await;
        asked.map(drop).map_err(|error| error.to_string())
    }

    async fn ask_hand_over(&self, to: HostName, vm: VmName, id: MigrationId) -> Result<(), String> {
        let node = self.node(&to)?;
        match peer::ask(&self.peers, node, &Ask::HandOver { vm, id }, ASK_TIMEOUT).await {
            Ok(Answer::Done(_)) => Ok(()),
            Ok(_) => Err(format!(
                "{to} gave another kind of answer than was asked for"
            )),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn ship_flows(&self, to: HostName, flows: ShippedFlows) -> Result<(), String> {
        self.tell(&to, &Ask::Flows(flows)).await
    }

    async fn send_pins(
        &self,
        to: HostName,
        pins: Vec<quorate_balancer::Pin>,
    ) -> Result<(), String> {
        self.tell(&to, &Ask::Pins(pins)).await
    }

    async fn ask_outcome(&self, to: HostName, vm: VmName, id: MigrationId) -> TargetSays {
        let Ok(node) = self.node(&to) else {
            return TargetSays::Unknown;
        };
        match peer::ask(&self.peers, node, &Ask::Outcome { vm, id }, ASK_TIMEOUT).await {
            Ok(Answer::Outcome(says)) => says,
            _ => TargetSays::Unknown,
        }
    }
}

/// Where the consoles of this host's guests are.
pub(crate) fn consoles(agent: &AgentHandle) -> Consoles {
    let (logs, sockets) = (agent.clone(), agent.clone());
    Consoles {
        log: Box::new(move |vm| logs.serial_log(vm)),
        socket: Box::new(move |vm| sockets.console(vm)),
    }
}

/// Serves the API until told to stop.
pub(crate) async fn serve_api(
    socket: PathBuf,
    core: Arc<Core>,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let backend = Arc::new(Daemon(core));
    let router = quorate_api::router(backend, quorate_api::Limits::default(), stopped.clone());
    quorate_api::serve(router, &socket, stopped).await?;
    Ok(())
}
