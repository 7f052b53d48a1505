//! What the agent needs from others, and what it is told at its start.

use crate::guard::client::{GuardClient, GuardError, GuardStatus, Registration};
use crate::services::edges::ShippedFlows;
use async_trait::async_trait;
use quorate_agent_logic::{ExportOffer, ExportRequest, FlushRequest, TargetSays};
use quorate_balancer::{Datapath, Pin};
use quorate_hypervisor::{Accel, Hypervisor, ProcessIdentity};
use quorate_network::NetworkDriver;
use quorate_state::State;
use quorate_storage::{
    BlockConfig, BlockPoolDriver, DirectoryConfig, DirectoryPool, IscsiConfig, IscsiPoolDriver,
    Login, Pool, RbdConfig, RbdPoolDriver,
};
use quorate_types::pool::Chap;
use quorate_types::report::HypervisorFacts;
use quorate_types::{
    BootId, ByteSize, HostName, MigrationId, PoolName, PoolSpec, Secret, SecretName, VmName,
};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Asks other hosts' agents. The daemon implements it over its peer connections.
#[async_trait]
pub trait PeerAsk: Send + Sync + 'static {
    /// Asks the target of a migration for its address; answered there by
    /// [`crate::AgentHandle::incoming_address`]. Bounded by the caller.
    async fn ask_incoming(
        &self,
        to: HostName,
        vm: VmName,
        id: MigrationId,
        ready: bool,
    ) -> Result<String, String>;

    /// Asks the target what became of the guest; answered there by [`crate::AgentHandle::outcome`].
    /// Not reachable is [`TargetSays::Unknown`].
    async fn ask_outcome(&self, to: HostName, vm: VmName, id: MigrationId) -> TargetSays;

    /// Asks the host of a disk's copy where to write it to; answered there by
    /// [`crate::AgentHandle::export`]. Bounded by the caller.
    async fn ask_export(&self, to: HostName, request: ExportRequest)
    -> Result<ExportOffer, String>;

    /// Asks the host of a copy to bring it to stable storage and to mark it; done there by
    /// [`crate::AgentHandle::flush_copy`]. Bounded by the caller.
    async fn ask_flush(&self, to: HostName, request: FlushRequest) -> Result<(), String> {
        let _ = request;
        Err(format!("{to} flushes no copies"))
    }

    /// Asks the target of a migration, at the pause before the switchover, to take over what only one host may
    /// have; answered there by [`crate::AgentHandle::hand_over`]. Bounded by the caller.
    async fn ask_hand_over(&self, to: HostName, vm: VmName, id: MigrationId) -> Result<(), String>;
    /// Sends the flows of a VM's edges ahead of it; taken there by [`crate::AgentHandle::put_flows`]. Bounded by the
    /// caller.
    async fn ship_flows(&self, to: HostName, flows: ShippedFlows) -> Result<(), String> {
        let _ = flows;
        Err(format!("{to} takes no flows"))
    }

    /// Makes another host's director hold pins; taken there by [`crate::AgentHandle::pin`].
    async fn send_pins(&self, to: HostName, pins: Vec<Pin>) -> Result<(), String> {
        let _ = pins;
        Err(format!("{to} takes no pins"))
    }
}

/// A pool's definition with the passwords that it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolDefinition {
    /// What the operator wants.
    pub spec: PoolSpec,
    /// Of the secrets that it names the ones that the cluster has.
    pub secrets: BTreeMap<SecretName, Secret>,
}

impl PoolDefinition {
    /// The definition as it is in the state, if the cluster has the pool.
    #[must_use]
    pub fn of(state: &State, name: &PoolName) -> Option<Self> {
        let spec = state.pools.get(name)?.spec.clone();
        let known = |name: &SecretName| Some((name.clone(), state.secrets.get(name)?.clone()));
        let secrets = spec.secrets().into_iter().filter_map(known).collect();
        Some(Self { spec, secrets })
    }
}

/// Opens pools.
pub trait PoolFactory: Send + Sync + 'static {
    /// The driver of a pool as it is defined now.
    fn open(&self, name: &PoolName, pool: &PoolDefinition) -> Arc<dyn Pool>;
}

/// The pool kinds that this program knows.
#[derive(Debug, Clone)]
pub struct Pools {
    /// The cluster's identity.
    pub cluster_id: String,
    /// This host.
    pub host: HostName,
}

/// Longest time for one look at a SAN.
const LOOK_WITHIN: Duration = Duration::from_secs(3);

impl PoolFactory for Pools {
    fn open(&self, name: &PoolName, pool: &PoolDefinition) -> Arc<dyn Pool> {
        match &pool.spec {
            PoolSpec::Directory { path, .. } => {
                let (pool, host) = (name.as_str(), self.host.as_str());
                let config = DirectoryConfig::new(pool, path, &self.cluster_id, host);
                Arc::new(DirectoryPool::new(config))
            }
            // Each host has its own: the marker only says that something is mounted there.
            PoolSpec::Local(quorate_types::pool::LocalPool { path, .. })
            | PoolSpec::Mirrored(quorate_types::pool::MirroredPool { path, .. }) => {
                let (pool, host) = (name.as_str(), self.host.as_str());
                let path = path.replace("{host}", host);
                let config = DirectoryConfig::new(pool, path, &self.cluster_id, host);
                Arc::new(DirectoryPool::new(config))
            }
            PoolSpec::Iscsi(spec) => {
                let secret = |chap: &Chap| pool.secrets.get(&chap.secret).cloned();
                let login = spec.chap.as_ref().and_then(|chap| {
                    let secret = secret(chap)?;
                    Some(Login {
                        user: chap.user.clone(),
                        password: secret.expose().to_owned(),
                    })
                });
                let missing = spec.chap.as_ref().filter(|chap| secret(chap).is_none());
                Arc::new(IscsiPoolDriver::new(IscsiConfig {
                    pool: name.to_string(),
                    initiator: spec.initiator(&self.cluster_id, &self.host),
                    cluster: self.cluster_id.clone(),
                    login,
                    missing_secret: missing.map(|chap| chap.secret.to_string()),
                    spec: spec.clone(),
                    deadline: LOOK_WITHIN,
                }))
            }
            PoolSpec::Rbd(spec) => {
                let secret = spec.secret.as_ref();
                let known = secret.and_then(|name| pool.secrets.get(name));
                Arc::new(RbdPoolDriver::new(RbdConfig {
                    pool: name.to_string(),
                    cluster: self.cluster_id.clone(),
                    login: known.map(|secret| Login {
                        user: spec.user.clone(),
                        password: secret.expose().to_owned(),
                    }),
                    missing_secret: secret.filter(|_| known.is_none()).map(ToString::to_string),
                    spec: spec.clone(),
                    deadline: LOOK_WITHIN,
                    program: "rbd".to_owned(),
                }))
            }
            PoolSpec::Block(spec) => Arc::new(BlockPoolDriver::new(BlockConfig {
                pool: name.to_string(),
                path: PathBuf::from(&spec.path),
                reservations: spec.reservations,
                cluster: self.cluster_id.clone(),
                deadline: LOOK_WITHIN,
            })),
        }
    }
}

/// The guard, as the tasks of the VMs see it.
#[async_trait]
pub trait GuestGuard: Send + Sync + 'static {
    /// Tells the lease.
    fn lease(&self, deadline_ns: u64, freeze_before_ms: u64);
    /// How it is.
    fn status(&self) -> watch::Receiver<GuardStatus>;
    /// Leave to make a guest, until then.
    async fn starting(
        &self,
        vm: &VmName,
        run: u64,
        needle: &str,
        until_ns: u64,
    ) -> Result<(), GuardError>;
    /// A guest exists.
    async fn register(
        &self,
        vm: &VmName,
        run: u64,
        process: &ProcessIdentity,
        qmp: PathBuf,
        freezable: bool,
    ) -> Result<(), GuardError>;
    /// Whether it can be frozen.
    async fn set_freezable(&self, vm: &VmName, run: u64, freezable: bool)
    -> Result<(), GuardError>;
    /// Leave to resume a guest, until then.
    async fn thawing(&self, vm: &VmName, run: u64, until_ns: u64) -> Result<(), GuardError>;
    /// The attempt to resume it is over.
    async fn thawed(&self, vm: &VmName, run: u64) -> Result<(), GuardError>;
    /// It has ended or was not made.
    async fn unregister(&self, vm: &VmName, run: u64) -> Result<(), GuardError>;
    /// Ends the guard, when no guest is left.
    async fn exit(&self) -> Result<(), GuardError>;
    /// Lets go of the guard, which goes on.
    fn detach(&self);
}

#[async_trait]
impl GuestGuard for GuardClient {
    fn lease(&self, deadline_ns: u64, freeze_before_ms: u64) {
        self.lease(deadline_ns, freeze_before_ms);
    }
    fn status(&self) -> watch::Receiver<GuardStatus> {
        self.status()
    }
    async fn starting(
        &self,
        vm: &VmName,
        run: u64,
        needle: &str,
        until_ns: u64,
    ) -> Result<(), GuardError> {
        self.starting(vm.as_str(), run, needle, until_ns).await
    }
    async fn register(
        &self,
        vm: &VmName,
        run: u64,
        process: &ProcessIdentity,
        qmp: PathBuf,
        freezable: bool,
    ) -> Result<(), GuardError> {
        // A pid that is used again by another process would be killed for this one.
        let pidfd = crate::guard::sys::open_pidfd(process.pid)
            .ok()
            .filter(|_| crate::guard::sys::start_ticks(process.pid) == Some(process.start_ticks))
            .ok_or_else(|| GuardError::Refused(format!("process {} has ended", process.pid)))?;
        let registration = Registration {
            run,
            pid: process.pid,
            pidfd: Arc::new(pidfd),
            qmp,
            freezable,
        };
        self.register(vm.as_str(), registration).await
    }
    async fn set_freezable(
        &self,
        vm: &VmName,
        run: u64,
        freezable: bool,
    ) -> Result<(), GuardError> {
        self.set_freezable(vm.as_str(), run, freezable).await
    }
    async fn thawing(&self, vm: &VmName, run: u64, until_ns: u64) -> Result<(), GuardError> {
        self.thawing(vm.as_str(), run, until_ns).await
    }
    async fn thawed(&self, vm: &VmName, run: u64) -> Result<(), GuardError> {
        self.thawed(vm.as_str(), run).await
    }
    async fn unregister(&self, vm: &VmName, run: u64) -> Result<(), GuardError> {
        self.unregister(vm.as_str(), run).await
    }
    async fn exit(&self) -> Result<(), GuardError> {
        self.exit().await
    }
    fn detach(&self) {
        self.detach();
    }
}

/// What the agent is told at its start.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// This host.
    pub host: HostName,
    /// Directory for the ledger, the guests' runtime files and the guard's socket. Short: sockets live in it.
    pub dir: PathBuf,
    /// The cluster's identity.
    pub cluster_id: String,
    /// This life of the host.
    pub boot: BootId,
    /// Program version, for the report.
    pub version: String,
    /// How guests' CPUs are executed.
    pub accel: Accel,
    /// QEMU can be confined.
    pub sandbox: bool,
    /// What the hypervisor can do, for the report.
    pub facts: HypervisorFacts,
    /// Memory that guests may not use.
    pub reserved_memory: ByteSize,
    /// Address on which this host receives guests.
    pub migration_address: IpAddr,
    /// Directory with this host's certificates for migrations; absent: not encrypted.
    pub migration_tls: Option<PathBuf>,
    /// Program and first arguments of the guard, for example `quorate guard`.
    pub guard_command: Vec<OsString>,
    /// Program and first arguments of the watcher of BGP speakers, for example `quorate bgp-speaker`.
    pub speaker_command: Vec<OsString>,
    /// The watchdog that the guard feeds: a device or `unix:/path`.
    pub watchdog: Option<String>,
    /// The time that is asked of it.
    pub watchdog_timeout: Duration,
}

/// The drivers.
#[derive(Clone)]
pub struct Drivers {
    /// Runs guests.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The host's network.
    pub network: Arc<dyn NetworkDriver>,
    /// Steers services' packets.
    pub datapath: Arc<dyn Datapath>,
    /// Opens pools.
    pub pools: Arc<dyn PoolFactory>,
    /// Asks other hosts.
    pub peers: Arc<dyn PeerAsk>,
    /// A guard for tests; absent: the real one is kept running.
    pub guard: Option<Arc<dyn GuestGuard>>,
}
