//! Commands: the only way to change the state.
//!
//! Append-only: a released variant is never changed or removed; `FORMAT` grows when one is added.

use crate::event::Event;
use crate::model::{HostMode, StopMode};
use crate::plan::Plan;
use crate::quorum::WitnessChoice;
use quorate_types::service::RingMember;
use quorate_types::spec::Power;
use quorate_types::{
    ClusterSettings, HostName, LabelName, Manifest, Millis, NetworkName, NodeId, PoolName,
    Revision, RuleName, Secret, SecretName, ServiceName, Timestamp, VmName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Version of the command format that this program writes.
///
/// 2: `LabelHost`; manifests with hosts, resources, preferences, weights and domains of rules.
///
/// 3: `CutStorage`, `RestoreStorage`, `SetSecret`, `DeleteSecret`; pools of other kinds than `directory`; witnesses; hosts that left in
/// order.
///
/// 4: services, labels of VMs, IPv6 addresses of NICs, subnets of networks; disk witnesses on units.
pub const FORMAT: u32 = 4;

/// A command with its circumstances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Format version of the writer.
    pub format: u32,
    /// When it was proposed, by the proposer's clock. For people only.
    pub at: Timestamp,
    /// Who proposed it.
    pub by: String,
    /// What.
    pub command: Command,
}

/// A change of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Make the cluster with its first host (node 1). Refused when there is one.
    CreateCluster {
        /// Unique identity.
        id: String,
        /// Name for people.
        name: String,
        /// Authority's certificate, PEM.
        ca_certificate: String,
        /// Authority's key, PEM.
        ca_key: String,
        /// First host.
        host: HostName,
        /// Its `address:port`.
        address: String,
        /// Settings.
        settings: ClusterSettings,
    },
    /// A join token, by the hash of its secret.
    CreateToken {
        /// SHA-256 in hex.
        hash: String,
        /// Not valid after this.
        expires: Timestamp,
    },
    /// Admit a host with a token, which is used up.
    AdmitHost {
        /// The token's hash.
        token: String,
        /// The host.
        host: HostName,
        /// Its `address:port`.
        address: String,
    },
    /// Forget a host. It must own nothing.
    RemoveHost {
        /// Which.
        host: HostName,
    },
    /// Change whether a host takes VMs.
    SetHostMode {
        /// Which.
        host: HostName,
        /// New mode.
        mode: HostMode,
    },
    /// What is known of a host's guard and watchdog.
    RecordArmed {
        /// Which.
        host: HostName,
        /// The watchdog's bound; absent: not armed.
        armed: Option<Millis>,
    },
    /// A pool's content was prepared and has this identity.
    RecordPoolMarker {
        /// Which.
        pool: PoolName,
        /// Its identity.
        marker: String,
    },
    /// Create or change the objects of a manifest.
    ApplyManifest {
        /// Refused if the state changed after this revision; absent: applied to whatever holds.
        base: Option<Revision>,
        /// The objects.
        manifest: Manifest,
    },
    /// Stop a VM, then forget it. Its disks stay.
    DeleteVm {
        /// Which.
        vm: VmName,
    },
    /// Forget a pool that no VM uses.
    DeletePool {
        /// Which.
        pool: PoolName,
    },
    /// Forget a network that no VM uses.
    DeleteNetwork {
        /// Which.
        network: NetworkName,
    },
    /// Forget a placement rule.
    DeleteRule {
        /// Which.
        rule: RuleName,
    },
    /// Change a VM's wanted power state.
    SetPower {
        /// Which.
        vm: VmName,
        /// Wanted.
        power: Power,
        /// How a running guest is ended.
        mode: StopMode,
    },
    /// Ask for a VM to be moved.
    RequestMove {
        /// Which.
        vm: VmName,
        /// Where to; absent: wherever it fits best.
        to: Option<HostName>,
    },
    /// Take a move request back, and cancel the migration it led to.
    CancelMove {
        /// Which.
        vm: VmName,
    },
    /// Carry out a plan.
    CommitPlan(Plan),
    /// Add, change or remove labels of a host. Since format 2.
    LabelHost {
        /// Which.
        host: HostName,
        /// New or changed labels.
        set: BTreeMap<LabelName, LabelName>,
        /// Labels to remove.
        remove: BTreeSet<LabelName>,
    },
    /// A host's access to these pools is about to be taken away at their SANs. Since format 3.
    CutStorage {
        /// Which.
        host: HostName,
        /// Where.
        pools: BTreeSet<PoolName>,
    },
    /// A host's access to these pools was given back at their SANs. Since format 3.
    RestoreStorage {
        /// Which.
        host: HostName,
        /// Where, with the revision of the cut that was undone: a newer one stays.
        pools: BTreeMap<PoolName, Revision>,
    },
    /// What came of a drill of a pool's SAN. Since format 3.
    RecordDrill {
        /// Which.
        pool: PoolName,
        /// On which image.
        image: String,
        /// Every step had its effect.
        passed: bool,
        /// What was done and seen.
        steps: Vec<String>,
    },
    /// Strangers that are registered on a unit are gone, on an operator's word: the next start pushes these out, and no
    /// others. Since format 4.
    TakeUnit {
        /// Which pool.
        pool: PoolName,
        /// Its unit.
        image: String,
        /// Their keys.
        keys: BTreeSet<u64>,
        /// The reservation is theirs, or of another type than this cluster's.
        hold: bool,
    },
    /// That word was used, or is taken back. Since format 4.
    EndTake {
        /// Which pool.
        pool: PoolName,
        /// Its unit.
        image: String,
        /// The revision that recorded it: a newer one stays. Absent: whichever it is.
        given: Option<Revision>,
    },
    /// Keep a password, or replace it. Since format 3.
    SetSecret {
        /// Its name.
        name: SecretName,
        /// The password.
        secret: Secret,
    },
    /// Forget a password that no pool names. Since format 3.
    DeleteSecret {
        /// Its name.
        name: SecretName,
    },
    /// Which witness the cluster has. Since format 3.
    SetWitness {
        /// The choice; a remote one joins by itself ([`Command::AdmitWitness`]).
        witness: WitnessChoice,
    },
    /// A token that lets one remote witness join. Since format 3.
    CreateWitnessToken {
        /// SHA-256 in hex.
        hash: String,
        /// Not valid after this.
        expires: Timestamp,
    },
    /// Admit a remote witness with a token, which is used up; it takes the place of any other. Since format 3.
    AdmitWitness {
        /// The token's hash.
        token: String,
        /// The witness.
        name: HostName,
        /// Its `address:port`.
        address: String,
    },
    /// A disk witness lost its log: it goes on as a newcomer, under a new number. Since format 3.
    RenewDiskWitness {
        /// The number that it had.
        old: NodeId,
        /// What happened, for people.
        why: String,
    },
    /// A host's daemon is being stopped in order, or is back. Since format 3.
    HostLeft {
        /// Which.
        host: HostName,
        /// It goes.
        left: bool,
    },
    /// An image was made on a host, in a pool of the hosts' own disks. Since format 4.
    RecordDisk {
        /// Which pool.
        pool: PoolName,
        /// The image.
        image: String,
        /// Where it is.
        host: HostName,
    },
    /// What the leader found about services. Each change is checked by itself; what does not fit any more is left out.
    /// Since format 4.
    ChangeServices {
        /// In this order.
        changes: Vec<ServiceChange>,
    },
    /// Give a member no new connections and let the old ones end. Since format 4.
    DrainMember {
        /// Which service.
        service: ServiceName,
        /// Its member.
        vm: VmName,
    },
    /// Give a drained member connections again. Since format 4.
    ResumeMember {
        /// Which service.
        service: ServiceName,
        /// Its member.
        vm: VmName,
    },
    /// Forget a service. Since format 4.
    DeleteService {
        /// Which.
        service: ServiceName,
    },
    /// A job of a host is about to write to an image. Since format 4.
    BeginImageWrite {
        /// Which pool.
        pool: PoolName,
        /// The image.
        image: String,
        /// The host.
        host: HostName,
        /// What it does, for people.
        what: String,
    },
    /// The host writes to an image no more. Since format 4.
    EndImageWrite {
        /// Which pool.
        pool: PoolName,
        /// The image.
        image: String,
        /// The host.
        host: HostName,
    },
    /// An operator's word: a disk's copy on this host is the one that counts, whatever it lacks. Since format 4.
    AcceptCopy {
        /// The VM that has the disk.
        vm: VmName,
        /// The disk's pool.
        pool: PoolName,
        /// Its image.
        image: String,
        /// The host of the copy.
        host: HostName,
        /// The life of the copy that was looked at.
        since: Revision,
    },
}

/// A change of a service that the leader makes by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceChange {
    /// Directors are to hold this ring beside the one in force.
    PrepareRing {
        /// Which service.
        service: ServiceName,
        /// The epoch after the last one handed out.
        epoch: u64,
        /// Its members, sorted by VM.
        members: Vec<RingMember>,
    },
    /// Every live director holds the coming ring: it is in force.
    ActivateRing {
        /// Which service.
        service: ServiceName,
        /// The epoch of the coming ring.
        epoch: u64,
    },
    /// Members of earlier rings whose guest has ended, after every director gave them up: nobody asks them for old
    /// connections any more.
    MembersGone {
        /// Which service.
        service: ServiceName,
        /// Which members.
        vms: BTreeSet<VmName>,
    },
    /// The coming ring is not wanted any more.
    AbandonRing {
        /// Which service.
        service: ServiceName,
        /// Its epoch.
        epoch: u64,
    },
    /// Another host answers for a service's address.
    SetHolder {
        /// Which service.
        service: ServiceName,
        /// The host.
        host: HostName,
        /// The generation of the holder that the proposer saw; 0: none.
        expect: u64,
        /// The old holder is alive and goes on until the new one answers.
        planned: bool,
    },
    /// The new holder answers: the old one need not any more.
    HolderSettled {
        /// Which service.
        service: ServiceName,
        /// The new holder's generation.
        generation: u64,
    },
    /// A member serves, or does not.
    RecordHealth {
        /// Which service.
        service: ServiceName,
        /// Its member.
        vm: VmName,
        /// It serves.
        healthy: bool,
        /// Why it does not.
        problem: Option<String>,
    },
    /// A member that was being drained has no connection left, or its time is over.
    DrainEnded {
        /// Which service.
        service: ServiceName,
        /// Its member.
        vm: VmName,
        /// Connections that were left and end now.
        cut: u64,
    },
}

impl ServiceChange {
    /// The service that it is about.
    #[must_use]
    pub fn service(&self) -> &ServiceName {
        match self {
            Self::PrepareRing { service, .. }
            | Self::ActivateRing { service, .. }
            | Self::MembersGone { service, .. }
            | Self::AbandonRing { service, .. }
            | Self::SetHolder { service, .. }
            | Self::HolderSettled { service, .. }
            | Self::RecordHealth { service, .. }
            | Self::DrainEnded { service, .. } => service,
        }
    }
}

/// What an applied command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The revision that it made.
    pub revision: Revision,
    /// What happened.
    pub events: Vec<Event>,
    /// The node number of an admitted host.
    pub node: Option<NodeId>,
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Written by a newer program.
    #[error("this host's program is too old for command format {format}: upgrade it")]
    TooNew {
        /// The writer's format.
        format: u32,
    },
    /// Needs an existing cluster, or needs none.
    #[error("{0}")]
    Cluster(String),
    /// An object does not exist.
    #[error("there is no {kind} `{name}`")]
    Unknown {
        /// `host`, `vm`, ...
        kind: String,
        /// Its name.
        name: String,
    },
    /// Something with that name or address exists.
    #[error("{kind} `{name}` exists already")]
    Exists {
        /// `host`, ...
        kind: String,
        /// Its name.
        name: String,
    },
    /// Changed since the proposer looked.
    #[error("{what} changed after revision {base}: look again and retry")]
    Stale {
        /// What.
        what: String,
        /// The proposer's revision.
        base: Revision,
    },
    /// A join token is wrong, used up or expired.
    #[error(
        "the join token is not valid: it was used, has expired, or is of another cluster; make one with `quorate token create`"
    )]
    Token,
    /// The object is in use.
    #[error("{0}")]
    InUse(String),
    /// Definitions contradict each other.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// A plan's action does not fit the state.
    #[error("cannot {action}: {why}")]
    Action {
        /// In words.
        action: String,
        /// Why not.
        why: String,
    },
}
