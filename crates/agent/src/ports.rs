//! What the agent needs from others, and what it is told at its start.

use crate::guard::client::{GuardClient, GuardError, GuardStatus, Registration};
use async_trait::async_trait;
use quorate_agent_logic::TargetSays;
use quorate_hypervisor::{Accel, Hypervisor, ProcessIdentity};
use quorate_network::NetworkDriver;
use quorate_storage::{DirectoryConfig, DirectoryPool, Pool};
use quorate_types::report::HypervisorFacts;
use quorate_types::{BootId, ByteSize, HostName, MigrationId, PoolName, PoolSpec, VmName};
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
}

/// Opens pools.
pub trait PoolFactory: Send + Sync + 'static {
    /// The driver of a pool as it is defined now.
    fn open(&self, name: &PoolName, spec: &PoolSpec) -> Arc<dyn Pool>;
}

/// The pool kinds that this program knows.
#[derive(Debug, Clone)]
pub struct Pools {
    /// The cluster's identity.
    pub cluster_id: String,
    /// This host.
    pub host: HostName,
}

impl PoolFactory for Pools {
    fn open(&self, name: &PoolName, spec: &PoolSpec) -> Arc<dyn Pool> {
        match spec {
            PoolSpec::Directory { path, .. } => {
                let (pool, host) = (name.as_str(), self.host.as_str());
                let config = DirectoryConfig::new(pool, path, &self.cluster_id, host);
                Arc::new(DirectoryPool::new(config))
            }
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
    /// Opens pools.
    pub pools: Arc<dyn PoolFactory>,
    /// Asks other hosts.
    pub peers: Arc<dyn PeerAsk>,
    /// A guard for tests; absent: the real one is kept running.
    pub guard: Option<Arc<dyn GuestGuard>>,
}
