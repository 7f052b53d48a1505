//! What the operator wants: the manifest's content.
//!
//! Always holds: these types say what is wanted, never what is. Rules that need more than one
//! object (an unknown pool, a cycle of dependencies) are checked where the whole is known: by the
//! `manifest` crate for positions and hints, by `state` before a change is accepted.

pub use crate::bgp::{BgpDaemon, BgpNeighbor, BgpSpec};
pub use crate::placement::{
    Condition, Dependency, HostSpec, LabelSelector, OnTimeout, Preference, RuleKind, RuleSpec,
    Tolerates,
};
pub use crate::pool::PoolSpec;
pub use crate::service::ServiceSpec;
use crate::settings::ClusterSettings;
pub use crate::subnet::{Guard, Subnet};
use crate::{
    ByteSize, HostName, LabelName, Millis, NetworkName, PoolName, ResourceName, RuleName,
    ServiceName, VmName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

/// A whole manifest. Objects that it names are created or changed; others are left alone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Manifest {
    /// Settings of the cluster; absent: unchanged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterSettings>,
    /// What is said of hosts, by name. The hosts themselves join by `quorate join`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: BTreeMap<HostName, HostSpec>,
    /// Networks by name.
    pub networks: BTreeMap<NetworkName, NetworkSpec>,
    /// Storage pools by name.
    pub pools: BTreeMap<PoolName, PoolSpec>,
    /// Virtual machines by name.
    pub vms: BTreeMap<VmName, VmSpec>,
    /// Placement rules by name.
    pub rules: BTreeMap<RuleName, RuleSpec>,
    /// Services by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<ServiceName, ServiceSpec>,
}

/// A network: one Linux bridge of the same name on every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// The bridge's interface name.
    pub bridge: String,
    /// Interface to enslave when the bridge has to be created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<String>,
    /// MTU of guests' interfaces.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Most VMs plugged into it that migrate at the same time; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel_migrations: Option<u32>,
    /// Its IPv4 addresses; absent: not known, and not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Subnet>,
    /// Its IPv6 addresses; absent: not known, and not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet6: Option<Subnet>,
    /// What its guests may not do.
    #[serde(default, skip_serializing_if = "Guard::is_off")]
    pub guard: Guard,
    /// How its hosts announce addresses to routers; absent: they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bgp: Option<BgpSpec>,
}

impl NetworkSpec {
    /// The subnet of an address's family, where it is known.
    #[must_use]
    pub fn subnet_for(&self, address: IpAddr) -> Option<&Subnet> {
        let subnets = [self.subnet.as_ref(), self.subnet6.as_ref()];
        let mut known = subnets.into_iter().flatten();
        known.find(|subnet| subnet.address().is_ipv4() == address.is_ipv4())
    }
}

fn default_mtu() -> u32 {
    1500
}

/// What a VM's power should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// Kept running.
    #[default]
    Running,
    /// Kept stopped.
    Stopped,
}

/// A virtual machine as the operator wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Virtual CPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// Machine type.
    #[serde(default)]
    pub machine: Machine,
    /// Where the guest boots from.
    #[serde(default)]
    pub boot: Boot,
    /// Disks, in order; the first is the boot disk.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces, in order.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// What it is, for services that take their members by label: `tier: web`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<LabelName, LabelName>,
    /// When the guest counts as ready; absent: as soon as its CPUs run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<ReadyCheck>,
    /// What must be up before this VM starts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub depends_on: BTreeMap<VmName, Dependency>,
    /// Hosts it may run on; empty: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
    /// Labels that a host must have for it: label -> accepted values; empty: any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host_labels: LabelSelector,
    /// Hosts that are better, or worse, than others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefer: Vec<Preference>,
    /// Countable things of the host that it uses up, beside CPU and memory.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub resources: BTreeMap<ResourceName, u64>,
    /// Order of restarts and of the use of scarce capacity; higher first.
    #[serde(default)]
    pub priority: i32,
    /// Wanted power state.
    #[serde(default)]
    pub power: Power,
    /// How the VM may be moved.
    #[serde(default)]
    pub migration: MigrationPolicy,
    /// How long a graceful shutdown may take before the guest is powered off.
    #[serde(default = "default_shutdown")]
    pub shutdown_timeout: Millis,
}

impl VmSpec {
    /// A VM of one CPU with this memory and defaults for everything else.
    #[must_use]
    pub fn new(memory: ByteSize) -> Self {
        Self {
            cpus: default_cpus(),
            memory,
            machine: Machine::default(),
            boot: Boot::default(),
            disks: Vec::new(),
            nics: Vec::new(),
            labels: BTreeMap::new(),
            ready: None,
            depends_on: BTreeMap::new(),
            hosts: BTreeSet::new(),
            host_labels: LabelSelector::new(),
            prefer: Vec::new(),
            resources: BTreeMap::new(),
            priority: 0,
            power: Power::default(),
            migration: MigrationPolicy::default(),
            shutdown_timeout: default_shutdown(),
        }
    }

    /// Whether its own wishes let it run on this host.
    #[must_use]
    pub fn allows(&self, name: &HostName, host: &HostSpec) -> bool {
        (self.hosts.is_empty() || self.hosts.contains(name)) && host.matches(&self.host_labels)
    }
}

fn default_cpus() -> u32 {
    1
}

fn default_shutdown() -> Millis {
    Millis::secs(60)
}

/// QEMU machine family; the exact version is chosen so that all hosts have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// A PC with PCI Express.
    #[default]
    Q35,
    /// Minimal machine without PCI; direct kernel boot only.
    Microvm,
}

impl Machine {
    /// QEMU's alias for the newest version of the family.
    pub fn alias(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }
}

/// Where a guest boots from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// The first disk, by the firmware.
    #[default]
    Disk,
    /// A kernel given to QEMU directly. Paths are on the hosts.
    Kernel(KernelBoot),
}

/// Direct kernel boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelBoot {
    /// Absolute path of the kernel image.
    pub kernel: String,
    /// Absolute path of the initial RAM file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line.
    #[serde(default)]
    pub append: String,
}

/// Image format of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Plain bytes.
    #[default]
    Raw,
    /// QEMU copy-on-write.
    Qcow2,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Pool that holds the image.
    pub pool: PoolName,
    /// Image file, relative to the pool.
    pub image: String,
    /// Image format.
    #[serde(default)]
    pub format: DiskFormat,
    /// Size for an image that does not exist yet; absent: it must exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
}

/// A network interface of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// Network it is plugged into.
    pub network: NetworkName,
    /// MAC address; absent: derived from the cluster and the VM, stable for its life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The guest's own address, where it is known: used for announcements after a move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Its IPv6 address, beside an IPv4 one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// The network's guard does not hold for it: it is a router, or a DHCP server.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trusted: bool,
}

impl NicSpec {
    /// A NIC in this network with defaults for everything else.
    #[must_use]
    pub fn new(network: NetworkName) -> Self {
        Self {
            network,
            mac: None,
            address: None,
            address6: None,
            trusted: false,
        }
    }

    /// The guest's own addresses, as far as they are known.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let second = self.address6.map(IpAddr::V6);
        self.address.into_iter().chain(second)
    }
}

/// When a guest counts as ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadyCheck {
    /// The probe.
    pub probe: Probe,
    /// After this long without success the VM is reported as not becoming ready (it is left running).
    #[serde(default = "default_ready_timeout")]
    pub timeout: Millis,
}

fn default_ready_timeout() -> Millis {
    Millis::secs(300)
}

/// How readiness is found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// A TCP connection from the VM's host succeeds.
    Tcp(TcpProbe),
    /// An HTTP GET from the VM's host answers 200 to 399.
    Http(HttpProbe),
    /// The guest agent answers `guest-ping`.
    Agent,
    /// This text appears on the serial console.
    Serial(String),
}

/// Target of a TCP probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpProbe {
    /// Address of the guest.
    pub address: IpAddr,
    /// TCP port.
    pub port: u16,
}

/// Target of an HTTP probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpProbe {
    /// Address of the guest.
    pub address: IpAddr,
    /// TCP port.
    #[serde(default = "default_http_port")]
    pub port: u16,
    /// Path of the request.
    #[serde(default = "default_http_path")]
    pub path: String,
}

fn default_http_port() -> u16 {
    80
}

fn default_http_path() -> String {
    "/".to_owned()
}

/// How a VM may be moved, most gentle first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPolicy {
    /// Live, else not at all.
    #[default]
    Live,
    /// Save, move, resume: the guest pauses but keeps its memory.
    Quick,
    /// Shut down and start elsewhere.
    Cold,
    /// Never moved while it runs; restarts elsewhere only when its host fails.
    Never,
}
