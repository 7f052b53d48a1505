//! What clients see of the cluster. Stable JSON: fields are added, never changed.

use crate::answers::ThenView;
use crate::services::ServiceView;
use quorate_state::{Candidate, HostMode};
use quorate_types::report::Capacity;
use quorate_types::spec::Power;
use quorate_types::{
    ByteSize, Epoch, HostName, LabelName, Millis, NetworkName, NetworkSpec, PoolName, PoolSpec,
    Revision, RuleName, RuleSpec, SecretName, ServiceName, Timestamp, VmName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use utoipa::ToSchema;

/// Everything that `quorate status` shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterView {
    /// The cluster itself.
    pub cluster: ClusterSummary,
    /// Hosts by name.
    pub hosts: Vec<HostView>,
    /// VMs by name.
    pub vms: Vec<VmView>,
    /// Pools by name.
    pub pools: Vec<PoolView>,
    /// Networks by name.
    pub networks: Vec<NetworkView>,
    /// Rules by name.
    pub rules: Vec<RuleView>,
    /// Services by name.
    #[serde(default)]
    pub services: Vec<ServiceView>,
}

/// Facts of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterSummary {
    /// Unique identity.
    pub id: String,
    /// Name for people.
    pub name: String,
    /// The host that answered.
    #[schema(value_type = String)]
    pub answered_by: HostName,
    /// The leader, if one is known.
    #[schema(value_type = Option<String>)]
    pub leader: Option<HostName>,
    /// A majority of the voters hears the leader. If not, all of this is what one host remembers.
    pub quorate: bool,
    /// Revision of the state.
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// Program version of the host that answered.
    pub version: String,
    /// What is wrong, the lowest layer first.
    pub problems: Vec<ProblemView>,
    /// What would even out load, one sentence. Nothing is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something that should run does not.
    Error,
    /// Everything runs, with less safety than there should be.
    Warning,
}

/// Something wrong, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProblemView {
    /// How bad.
    pub level: Level,
    /// About what: `cluster`, `host/h1`, `pool/shared`, `vm/db`.
    pub about: String,
    /// What is wrong and what to do, for people.
    pub text: String,
}

/// Whether a host is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// It answers and holds a lease.
    Up,
    /// Silent for some heartbeats; its lease may still run.
    Suspect,
    /// Its lease ran out.
    Down,
    /// Not heard yet.
    Joining,
    /// Nobody who could know was asked (no leader).
    Unknown,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// Name.
    #[schema(value_type = String)]
    pub name: HostName,
    /// `address:port` for peers.
    pub address: String,
    /// Whether it is alive.
    pub state: HostState,
    /// Whether it takes VMs: `active`, `draining`, `maintenance`.
    #[schema(value_type = String)]
    pub mode: HostMode,
    /// It leads.
    pub leader: bool,
    /// It votes.
    pub voter: bool,
    /// Lease left as the leader counts it.
    pub lease_ms_left: Option<u64>,
    /// A guard process holds its guests.
    pub guard: bool,
    /// The watchdog's bound, when armed.
    pub watchdog_ms: Option<u64>,
    /// Fence agents that can cut its power.
    pub fencing: Vec<String>,
    /// Why fencing does not get on.
    pub fencing_problem: Option<String>,
    /// Program version, when known.
    pub version: Option<String>,
    /// `kvm` or `tcg`, when known.
    pub accel: Option<String>,
    /// QEMU's version, when known.
    pub qemu: Option<String>,
    /// CPU threads and memory for guests, when known.
    pub capacity: Option<ResourceView>,
    /// What its guests are defined with.
    pub used: ResourceView,
    /// Direct links that are down.
    pub links_down: Vec<LinkView>,
    /// VMs that it owns.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
}

/// CPU and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ResourceView {
    /// CPU threads.
    pub cpus: u32,
    /// Memory, with a unit.
    #[schema(value_type = String)]
    pub memory: ByteSize,
}

impl From<Capacity> for ResourceView {
    fn from(capacity: Capacity) -> Self {
        Self {
            cpus: capacity.cpus,
            memory: capacity.memory,
        }
    }
}

/// A link that is down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LinkView {
    /// The other end.
    #[schema(value_type = String)]
    pub to: HostName,
    /// The host that relays meanwhile.
    #[schema(value_type = Option<String>)]
    pub relayed_by: Option<HostName>,
    /// The last error.
    pub error: Option<String>,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its CPUs run.
    Running,
    /// Being started.
    Starting,
    /// Being shut down.
    Stopping,
    /// Not running, as wanted.
    Stopped,
    /// Moving to another host; it runs.
    Migrating,
    /// Paused because its host lost its lease; its memory is kept.
    Frozen,
    /// Its host failed; being taken over.
    Recovering,
    /// Wanted, and something is in the way: see `why`.
    Waiting,
    /// Crashed or would not start; being tried again.
    Failing,
    /// To be forgotten once it is stopped.
    Deleting,
    /// Nobody who could know was asked (no leader).
    Unknown,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// Wanted: `running` or `stopped`.
    #[schema(value_type = String)]
    pub power: Power,
    /// What it is doing.
    pub state: VmState,
    /// Its owner; the source while it migrates.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
    /// Fencing token; the target's while it migrates is one more.
    #[schema(value_type = u64)]
    pub epoch: Epoch,
    /// Its ready check has succeeded.
    pub ready: bool,
    /// The migration under way.
    pub migration: Option<MigrationView>,
    /// What it depends on and is not up yet.
    #[schema(value_type = Vec<String>)]
    pub waiting_for: Vec<VmName>,
    /// Somebody asked for a move that is neither done nor given up.
    pub move_requested: bool,
    /// One sentence: why it is where it is, or what is in the way.
    pub why: String,
    /// What is wrong with it.
    pub problem: Option<String>,
    /// Restarts after crashes, under this epoch.
    pub restarts: u32,
    /// Since when in this state, as its host says. Milliseconds since 1970.
    #[schema(value_type = Option<u64>)]
    pub since: Option<Timestamp>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    #[schema(value_type = String)]
    pub memory: ByteSize,
    /// The guest's addresses, as far as the manifest names them.
    pub addresses: Vec<String>,
    /// The running guest differs from the definition in something only a start can change.
    pub restart_pending: bool,
    /// Where its disks are, of pools that are the hosts' own: it can be started only on a host with a copy of
    /// each that is in step.
    #[serde(default)]
    pub copies: Vec<CopyView>,
}

/// A copy of a disk on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CopyView {
    /// Its pool.
    #[schema(value_type = String)]
    pub pool: PoolName,
    /// The disk's image.
    pub image: String,
    /// The host.
    #[schema(value_type = String)]
    pub host: HostName,
    /// It has every write that was acknowledged to the guest.
    pub in_step: bool,
    /// Since when it is so. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub since: Timestamp,
    /// Share of it that is up to date, 0 to 100, while it is brought up to date.
    pub percent: Option<u8>,
    /// What is in the way.
    pub problem: Option<String>,
}

/// A migration under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationView {
    /// Its identity.
    pub id: u64,
    /// Source.
    #[schema(value_type = String)]
    pub from: HostName,
    /// Target.
    #[schema(value_type = String)]
    pub to: HostName,
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes to send.
    pub remaining: u64,
    /// Share that is sent, 0 to 100.
    pub percent: u8,
    /// It is being given up.
    pub cancelling: bool,
}

/// A storage pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    /// Name.
    #[schema(value_type = String)]
    pub name: PoolName,
    /// Definition.
    #[schema(value_type = Object)]
    pub spec: PoolSpec,
    /// Hosts that can use it now.
    #[schema(value_type = Vec<String>)]
    pub usable_on: Vec<HostName>,
    /// Hosts that should and cannot, with the reason.
    pub broken_on: Vec<HostProblem>,
    /// Free bytes, as the host that sees least says.
    pub free: Option<u64>,
    /// Total bytes.
    pub total: Option<u64>,
}

/// What is wrong on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostProblem {
    /// Which.
    #[schema(value_type = String)]
    pub host: HostName,
    /// What.
    pub problem: String,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// Name.
    #[schema(value_type = String)]
    pub name: NetworkName,
    /// Definition.
    #[schema(value_type = Object)]
    pub spec: NetworkSpec,
    /// Hosts whose bridge is up.
    #[schema(value_type = Vec<String>)]
    pub up_on: Vec<HostName>,
    /// Hosts whose bridge is missing or down.
    #[schema(value_type = Vec<String>)]
    pub down_on: Vec<HostName>,
}

/// A placement rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RuleView {
    /// Name.
    #[schema(value_type = String)]
    pub name: RuleName,
    /// Definition.
    #[schema(value_type = Object)]
    pub spec: RuleSpec,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventView {
    /// Position in the log; also the id of the server-sent event.
    pub sequence: u64,
    /// When. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// The revision that carried it.
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// Who caused it.
    pub by: String,
    /// `changed`, `host`, `start`, `stop`, `release`, `migration`, `refused`.
    pub kind: String,
    /// `cluster`, `host/h1`, `vm/db`, `pool/shared`, ...
    pub subject: String,
    /// One sentence.
    pub text: String,
}

impl From<&quorate_state::Event> for EventView {
    fn from(event: &quorate_state::Event) -> Self {
        use quorate_state::{EventKind, Subject};
        let kind = match event.kind {
            EventKind::Changed => "changed",
            EventKind::Host => "host",
            EventKind::Start => "start",
            EventKind::Stop => "stop",
            EventKind::Release => "release",
            EventKind::Migration => "migration",
            EventKind::Refused => "refused",
            EventKind::Storage => "storage",
            EventKind::Service => "service",
        };
        let subject = match &event.subject {
            Subject::Cluster => "cluster".to_owned(),
            Subject::Host(host) => format!("host/{host}"),
            Subject::Vm(vm) => format!("vm/{vm}"),
            Subject::Object(object) => object.clone(),
        };
        Self {
            sequence: event.sequence,
            at: event.at,
            revision: event.revision,
            by: event.by.clone(),
            kind: kind.to_owned(),
            subject,
            text: event.text.clone(),
        }
    }
}

/// What a change did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Changed {
    /// The revision that it made (the one that held, if nothing changed).
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// What happened.
    pub events: Vec<EventView>,
}

/// What an apply did or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Applied {
    /// The revision that it made (the one that held, if nothing changed).
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// Objects that changed, field by field.
    #[schema(value_type = Vec<Object>)]
    pub changes: Vec<quorate_manifest::Change>,
    /// VMs that the manifest names.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
    /// Services that the manifest names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub services: Vec<ServiceName>,
    /// VMs that would find no place when hosts fail, and did before: one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A token that lets one host join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// The token, a secret.
    pub token: String,
    /// Valid until. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub expires: Timestamp,
}

/// What an operation on a host did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// One sentence.
    pub text: String,
}

/// Why a VM is where it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// As it is now.
    pub vm: VmView,
    /// What it needs before it starts.
    pub depends_on: Vec<DependencyView>,
    /// VMs that need it.
    #[schema(value_type = Vec<String>)]
    pub needed_by: Vec<VmName>,
    /// Rules that bind it.
    pub rules: Vec<RuleView>,
    /// Where it would go now, and every host with its score or its rejection.
    pub placement: Option<PlacementView>,
    /// Where it was at the time that was asked about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<ThenView>,
    /// The latest decisions about it, newest first.
    pub decisions: Vec<DecisionView>,
    /// The latest events about it, newest first.
    pub events: Vec<EventView>,
}

/// What the planner would do with a VM that had to be placed now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlacementView {
    /// The host that it would be given to; absent: none can take it.
    #[schema(value_type = Option<String>)]
    pub best: Option<HostName>,
    /// Every host with its score or its rejection, best first.
    #[schema(value_type = Vec<Object>)]
    pub candidates: Vec<Candidate>,
}

/// One `depends_on` entry and how it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DependencyView {
    /// The other VM.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// `started` or `ready`.
    #[schema(value_type = String)]
    pub condition: quorate_types::spec::Condition,
    /// It holds now.
    pub met: bool,
}

/// A decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DecisionView {
    /// When. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// The revision that carried it.
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// The action in words.
    pub action: String,
    /// The host that had the VM after it; absent: none, or not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
    /// Why, one sentence.
    pub summary: String,
    /// Facts it rests on.
    pub evidence: Vec<String>,
    /// Hosts that were looked at.
    #[schema(value_type = Vec<Object>)]
    pub candidates: Vec<Candidate>,
}

impl From<&quorate_state::Decision> for DecisionView {
    fn from(decision: &quorate_state::Decision) -> Self {
        Self {
            at: decision.at,
            revision: decision.revision,
            action: decision.action.clone(),
            host: decision.host.clone(),
            summary: decision.reason.summary.clone(),
            evidence: decision.reason.evidence.clone(),
            candidates: decision.reason.candidates.clone(),
        }
    }
}

/// Time to live that a client asks for, of a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Valid for this long.
    #[schema(value_type = String)]
    #[serde(default = "default_ttl")]
    pub ttl: Millis,
    /// It lets a remote witness in, not a host.
    #[serde(default)]
    pub witness: bool,
}

fn default_ttl() -> Millis {
    Millis::secs(3600)
}

impl Default for TokenRequest {
    fn default() -> Self {
        Self {
            ttl: default_ttl(),
            witness: false,
        }
    }
}

/// A secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecretView {
    /// Name.
    #[schema(value_type = String)]
    pub name: SecretName,
    /// What names it: `pool/san`.
    pub used_by: Vec<String>,
}

/// A secret to be kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretRequest {
    /// The password itself.
    #[schema(format = Password)]
    pub value: String,
}

impl std::fmt::Debug for SecretRequest {
    /// Without the value.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretRequest").finish_non_exhaustive()
    }
}

/// How to stop a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// How.
    #[serde(default)]
    pub mode: StopHow,
}

/// How a guest is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StopHow {
    /// Ask the guest; power off when it does not in time.
    #[default]
    Graceful,
    /// Power off at once.
    Hard,
}

/// Where to move a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// To this host; absent: wherever it fits best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub to: Option<HostName>,
    /// Go ahead although running VMs need it and it can only move by being stopped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_stops: bool,
}

/// An operator's word: a disk's copy is the one that counts, whatever it lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AcceptCopyRequest {
    /// The disk, by its image.
    pub image: String,
    /// The host of the copy.
    #[schema(value_type = String)]
    pub host: HostName,
}

/// How a host is drained.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Go ahead although VMs that others need can only move by being stopped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_stops: bool,
}

/// Labels of a host that are set or removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// New or changed labels.
    #[serde(default)]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub set: BTreeMap<LabelName, LabelName>,
    /// Labels to remove.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub remove: BTreeSet<LabelName>,
}

/// A manifest as the operator wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ManifestRequest {
    /// The text, YAML or JSON.
    pub text: String,
    /// Its name in messages.
    #[serde(default = "default_file")]
    pub file: String,
    /// Variables for `${NAME}`.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub variables: std::collections::BTreeMap<String, String>,
    /// Refuse if the configuration changed after this revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub base: Option<Revision>,
}

fn default_file() -> String {
    "manifest".to_owned()
}
