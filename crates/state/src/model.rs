//! The objects of the state.

use crate::copies::DiskRecords;
use crate::event::EventLog;
use crate::plan::{ActionKind, Reason};
use crate::quorum::Quorum;
use crate::service::ServiceRecord;
use crate::writes::ImageWrites;
use quorate_types::report::SavedState;
use quorate_types::{
    ClusterSettings, Epoch, HostName, HostSpec, MigrationId, Millis, NetworkName, NetworkSpec,
    NodeId, PoolName, PoolSpec, Revision, RuleName, RuleSpec, Secret, SecretName, ServiceId,
    ServiceName, Timestamp, VmName, VmSpec,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Everything the cluster has agreed on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    /// Commands applied so far.
    pub revision: Revision,
    /// The cluster itself; absent before `CreateCluster`.
    pub cluster: Option<ClusterInfo>,
    /// Hosts by name.
    pub hosts: BTreeMap<HostName, HostRecord>,
    /// Networks by name.
    pub networks: BTreeMap<NetworkName, Object<NetworkSpec>>,
    /// Pools by name.
    pub pools: BTreeMap<PoolName, Object<PoolSpec>>,
    /// Identity of each pool's content, recorded once when the pool was first prepared: a host that finds
    /// none at the pool's path has not mounted it.
    #[serde(default)]
    pub pool_markers: BTreeMap<PoolName, String>,
    /// Access of hosts to pools that was taken away, or is being taken away, at the SAN; with the revision that
    /// ordered it. Recorded before it is done, so whoever leads next knows what to give back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub storage_cuts: BTreeMap<HostName, BTreeMap<PoolName, Revision>>,
    /// Which hosts have the disks of pools that are the hosts' own, and which copies are in step.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disk_copies: DiskRecords,
    /// Images that jobs of hosts write to.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub image_writes: ImageWrites,
    /// What came of the last drill of each pool whose SAN can be told.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pool_drills: BTreeMap<PoolName, PoolDrill>,
    /// Units that the next start of a VM may take from strangers, by pool and name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unit_takes: BTreeMap<PoolName, BTreeMap<String, UnitTake>>,
    /// Passwords by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<SecretName, Secret>,
    /// Placement rules by name.
    pub rules: BTreeMap<RuleName, Object<RuleSpec>>,
    /// VMs by name.
    pub vms: BTreeMap<VmName, VmRecord>,
    /// Services by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<ServiceName, ServiceRecord>,
    /// Highest number of a service handed out.
    #[serde(default)]
    pub last_service: ServiceId,
    /// Join tokens by the SHA-256 of their secret, in hex.
    pub tokens: BTreeMap<String, TokenRecord>,
    /// The last revision that changed hosts, pools, networks, rules or settings: a plan made before it is stale.
    pub topology_changed: Revision,
    /// Highest node number handed out.
    pub last_node: NodeId,
    /// Highest epoch of any VM that was forgotten. A new VM's epochs begin after it: a VM that gets the
    /// name of a deleted one must not meet that one's epochs in the ledgers of hosts.
    #[serde(default)]
    pub forgotten_epoch: Epoch,
    /// The witness, and who left in order.
    #[serde(default, skip_serializing_if = "Quorum::is_empty")]
    pub quorum: Quorum,
    /// What happened lately.
    pub log: EventLog,
}

/// Facts of the cluster.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Unique identity.
    pub id: String,
    /// Name for people.
    pub name: String,
    /// Certificate of the cluster's own authority, PEM.
    pub ca_certificate: String,
    /// Its private key, PEM. Every host that can become leader signs with it.
    pub ca_key: String,
    /// When it was made.
    pub created: Timestamp,
    /// Settings in force.
    pub settings: ClusterSettings,
}

impl std::fmt::Debug for ClusterInfo {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterInfo")
            .field("id", &self.id)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// An object with the revision that changed it last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object<T> {
    /// Its content.
    pub spec: T,
    /// Last change.
    pub changed: Revision,
}

/// What came of letting a scratch initiator in to a pool's SAN and shutting it out again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolDrill {
    /// The image whose target it was tried on.
    pub image: String,
    /// When.
    pub at: Timestamp,
    /// Every step had the effect that a proof rests on.
    pub passed: bool,
    /// What was done and seen, one sentence for each step.
    pub steps: Vec<String>,
}

/// An operator's word that strangers on a unit are gone: these, and no others that come later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitTake {
    /// The keys that were seen.
    pub keys: BTreeSet<u64>,
    /// The reservation was theirs, or of another type than this cluster's.
    pub hold: bool,
    /// Who said so.
    pub by: String,
    /// When.
    pub at: Timestamp,
    /// The revision that recorded it.
    pub given: Revision,
}

/// Whether a host takes VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostMode {
    /// Takes VMs.
    #[default]
    Active,
    /// Being emptied.
    Draining,
    /// Empty, takes none.
    Maintenance,
}

/// A host of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Its number in the consensus group.
    pub node: NodeId,
    /// `address:port` for peers.
    pub address: String,
    /// Whether it takes VMs.
    pub mode: HostMode,
    /// What the operator says of it: labels, resources.
    #[serde(default, skip_serializing_if = "HostSpec::is_empty")]
    pub spec: HostSpec,
    /// When it joined.
    pub joined: Timestamp,
    /// The bound of its watchdog when guard and watchdog are armed: lets a leader that never heard
    /// the host judge an expired lease.
    pub armed: Option<Millis>,
    /// Last change.
    pub changed: Revision,
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Not valid after this.
    pub expires: Timestamp,
    /// It lets a witness in, not a host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
}

/// How a guest is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopMode {
    /// Ask the guest, power off after its `shutdown_timeout`.
    Graceful,
    /// Power off at once.
    Hard,
    /// Save its memory to a file, to be resumed elsewhere (quick migration).
    Save,
}

/// What an owner must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderKind {
    /// Keep it running.
    Run,
    /// End it and close the epoch.
    Stop(StopMode),
}

/// Who may run a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ownership {
    /// No host may run it.
    Free,
    /// One host may.
    Owned {
        /// The owner.
        host: HostName,
        /// Its fencing token.
        epoch: Epoch,
        /// What it must do.
        order: OrderKind,
    },
    /// Two hosts share it as QEMU's migration protocol serialises them.
    Migrating {
        /// Which migration.
        id: MigrationId,
        /// The source.
        from: HostName,
        /// The source's token.
        epoch: Epoch,
        /// The target.
        to: HostName,
        /// The token that the target runs it under.
        target_epoch: Epoch,
        /// To be given up if it has not passed the switchover.
        cancel: bool,
    },
}

impl Ownership {
    /// The host that runs it, or the source while it migrates.
    pub fn host(&self) -> Option<&HostName> {
        match self {
            Self::Free => None,
            Self::Owned { host, .. } => Some(host),
            Self::Migrating { from, .. } => Some(from),
        }
    }

    /// All hosts that may have it.
    pub fn hosts(&self) -> Vec<(&HostName, Epoch)> {
        match self {
            Self::Free => Vec::new(),
            Self::Owned { host, epoch, .. } => vec![(host, *epoch)],
            Self::Migrating {
                from,
                epoch,
                to,
                target_epoch,
                ..
            } => {
                vec![(from, *epoch), (to, *target_epoch)]
            }
        }
    }
}

/// What a guest's CPUs and machine look like: equal on every host that it can migrate to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAbi {
    /// QEMU machine type with version, for example `pc-q35-10.0`.
    pub machine: String,
    /// QEMU CPU model.
    pub cpu_model: String,
}

/// An operator's wish to move a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRequest {
    /// To this host; absent: wherever it fits best.
    pub to: Option<HostName>,
    /// Who asked.
    pub by: String,
}

/// Why a VM is where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// When.
    pub at: Timestamp,
    /// The revision that carried it.
    pub revision: Revision,
    /// The action in words.
    pub action: String,
    /// What kind of action.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<ActionKind>,
    /// The host that had the VM after it (the source, while it migrates).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// Why.
    pub reason: Reason,
}

/// Decisions kept for each VM.
pub(crate) const DECISIONS_KEPT: usize = 24;

/// Of these, so many of the newest with all hosts that were looked at; of older ones only the summary and the
/// evidence stay. A decision on twenty hosts takes about 2 KiB with its candidates and 200 bytes without.
pub(crate) const DECISIONS_IN_FULL: usize = 8;

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// What is wanted.
    pub spec: VmSpec,
    /// What the running guest was started with; differs from `spec` when a restart is pending.
    pub active: Option<VmSpec>,
    /// Machine and CPU of the running guest.
    pub abi: Option<GuestAbi>,
    /// Who may run it.
    pub ownership: Ownership,
    /// Highest epoch ever handed out.
    pub last_epoch: Epoch,
    /// Memory saved by a quick migration, to be resumed by the next start.
    pub saved: Option<SavedState>,
    /// A wish to move it.
    pub move_request: Option<MoveRequest>,
    /// Migrations that failed since the last one that arrived (or the last start).
    pub failed_moves: u32,
    /// To be forgotten once it is stopped.
    pub deleting: bool,
    /// The host it ran on last: preferred when nothing else decides.
    pub last_host: Option<HostName>,
    /// The latest decisions, newest last.
    pub decisions: Vec<Decision>,
    /// Last change.
    pub changed: Revision,
}

impl VmRecord {
    /// Whether it should be running.
    pub fn wanted(&self) -> bool {
        !self.deleting && self.spec.power == quorate_types::spec::Power::Running
    }

    /// The definition that holds for the guest as it runs now, or the wanted one.
    pub fn effective(&self) -> &VmSpec {
        self.active.as_ref().unwrap_or(&self.spec)
    }
}

impl State {
    /// Whether the host's access to the pool was taken away, or is being taken away.
    pub fn is_cut(&self, host: &HostName, pool: &PoolName) -> bool {
        let cuts = self.storage_cuts.get(host);
        cuts.is_some_and(|cuts| cuts.contains_key(pool))
    }

    /// The operator's word that strangers may be pushed off a disk.
    pub fn take_of(&self, pool: &PoolName, image: &str) -> Option<&UnitTake> {
        let takes = self.unit_takes.get(pool)?;
        takes.get(&self.image_name(pool, image))
    }

    /// Settings in force (the defaults before the cluster exists).
    pub fn settings(&self) -> ClusterSettings {
        self.cluster
            .as_ref()
            .map(|cluster| cluster.settings.clone())
            .unwrap_or_default()
    }

    /// The host with this node number.
    pub fn host_of_node(&self, node: NodeId) -> Option<&HostName> {
        self.hosts
            .iter()
            .find(|(_, record)| record.node == node)
            .map(|(name, _)| name)
    }
}
