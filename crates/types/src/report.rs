//! What hosts report: the volatile picture that the leader plans with.
//!
//! Always holds: a report is a host's own word about itself at one moment. It never proves that
//! anything on *another* host is dead; a VM's `closed` epoch is the one fact in it that is durable
//! on the reporting host before it is sent.

use crate::service::{Offences, ServiceReport, UplinkMode};
use crate::{
    BootId, ByteSize, Epoch, HostName, MigrationId, NetworkName, PoolName, Revision, ServiceName,
    Timestamp, VmName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Everything a host says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// Who reports.
    pub host: HostName,
    /// This life of the host.
    pub boot: BootId,
    /// Grows with every change of the report within one life of the host, restarts of its agent included.
    pub sequence: u64,
    /// Program version.
    pub version: String,
    /// Last revision of the replicated state that this host has applied.
    pub applied: Revision,
    /// A guard process holds every guest of this host.
    pub guard_armed: bool,
    /// The watchdog is armed and ends the host within this many milliseconds of the last feed.
    pub watchdog_ms: Option<u64>,
    /// What the host offers.
    pub capacity: Capacity,
    /// What its hypervisor can do.
    pub hypervisor: HypervisorFacts,
    /// Networks whose bridge is up.
    pub networks: BTreeSet<NetworkName>,
    /// Pools and whether they work from here.
    pub pools: BTreeMap<PoolName, PoolReport>,
    /// Direct links to other hosts.
    pub links: BTreeMap<HostName, LinkReport>,
    /// Guests on this host and what became of the ones it was told of.
    pub vms: BTreeMap<VmName, VmReport>,
    /// Services, as far as its datapath has to do with them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<ServiceName, ServiceReport>,
    /// How its director is attached to each network that has a service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub uplinks: BTreeMap<NetworkName, UplinkMode>,
    /// What guards kept guests of this host from sending, where that was not long ago.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub offences: BTreeMap<VmName, Offences>,
}

impl HostReport {
    /// Its datapath is silent for a service and attached to nothing: members on it are not reached.
    #[must_use]
    pub fn cannot_serve(&self, service: &ServiceName, network: &NetworkName) -> bool {
        let silent = self.services.get(service);
        let silent = silent.is_some_and(|said| said.active == 0 && said.problem.is_some());
        silent && matches!(self.uplinks.get(network), Some(UplinkMode::Problem(_)))
    }
}

/// Resources of a host for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Capacity {
    /// CPU threads.
    pub cpus: u32,
    /// Memory that guests may use.
    pub memory: ByteSize,
}

/// Facts about a host's QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HypervisorFacts {
    /// QEMU's version.
    pub qemu: String,
    /// `kvm` when a trial boot under KVM succeeded, else `tcg`.
    pub accel: String,
    /// CPU models that guests can use here without missing features.
    pub cpu_models: BTreeSet<String>,
    /// Newest machine type of each family, for example `q35` -> `pc-q35-10.0`.
    pub machines: BTreeMap<String, String>,
}

/// A pool as seen from one host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PoolReport {
    /// The pool can be used from here.
    pub usable: bool,
    /// Identity found in the pool: two hosts that report different ones do not share it.
    pub marker: Option<String>,
    /// Free bytes.
    pub free: ByteSize,
    /// Total bytes.
    pub total: ByteSize,
    /// Time of the last probe write, in microseconds.
    pub latency_us: u64,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Since when it can, or cannot, be used, by the host's clock. For people only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
}

/// A direct link to another host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LinkReport {
    /// Direct connections work.
    pub up: bool,
    /// The host that relays meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relayed_by: Option<HostName>,
    /// Round-trip time in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u64>,
    /// The last error of a link that is down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Phase of a guest on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmPhase {
    /// No process here.
    Absent,
    /// Being started.
    Starting,
    /// vCPUs run.
    Running,
    /// Paused because the lease ran out; memory kept.
    Frozen,
    /// Paused by an I/O error of a disk.
    IoError,
    /// Being shut down.
    Stopping,
    /// QEMU ended or would not start; the next try waits.
    BackOff,
    /// Running here and being sent to another host.
    MigratingOut,
    /// Waiting for the stream of a migration.
    Incoming,
    /// Past the switchover on the source: paused, not resumed without word from the target.
    HandedOver,
}

/// One VM as seen from one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// Epoch that the guest runs under.
    pub epoch: Epoch,
    /// Phase here.
    pub phase: VmPhase,
    /// The ready check has succeeded under this epoch.
    pub ready: bool,
    /// Highest epoch that this host will never run again (durable). 0: none.
    pub closed: Epoch,
    /// The guest's memory saved by a quick migration under epoch `closed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<SavedState>,
    /// The guest shut itself down (not a crash).
    #[serde(default)]
    pub guest_shutdown: bool,
    /// Restarts after crashes under this epoch.
    #[serde(default)]
    pub restarts: u32,
    /// Since when in this phase.
    pub since: Timestamp,
    /// The last thing that went wrong, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Attempts to save its memory, as ordered, that failed under the present order.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub save_failures: u32,
    /// The migration whose hand-over it had begun, durably, and that nobody has ended since. Whether the target heard of it
    /// is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over: Option<MigrationId>,
    /// A migration that this host takes part in, or took part in last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationReport>,
    /// Resident memory of the process, in bytes.
    #[serde(default)]
    pub resident: ByteSize,
    /// Copies of its disks that this host, its owner, keeps in step or brings up to date.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<MirrorReport>,
}

/// The copy of a disk on another host, as the owner sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorReport {
    /// Pool of the disk.
    pub pool: PoolName,
    /// Its image.
    pub image: String,
    /// The host that has the copy.
    pub to: HostName,
    /// Which change of the copy's record this is about: a report about an older one is stale.
    pub since: Revision,
    /// How it stands.
    pub phase: MirrorPhase,
    /// Bytes of a resync that are done.
    #[serde(default)]
    pub done: ByteSize,
    /// Bytes of a resync in all.
    #[serde(default)]
    pub total: ByteSize,
    /// What is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// How a copy stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorPhase {
    /// Not connected.
    Waiting,
    /// Being brought up to date.
    Syncing,
    /// Every write of the guest reaches it before the guest is told that it is done.
    Ready,
    /// It was in step and cannot be kept in step: the guest's writes wait until that is agreed.
    Failed,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A host gives an ordered save up after this many failed attempts; the cluster then lets the guest go on there.
pub const SAVE_TRIES: u32 = 3;

/// Where a quick migration keeps a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Pool that holds the file.
    pub pool: PoolName,
    /// File, relative to the pool.
    pub file: String,
}

/// One side's view of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Which migration.
    pub id: MigrationId,
    /// How it stands here.
    pub outcome: MigrationOutcome,
    /// Bytes sent.
    #[serde(default)]
    pub transferred: ByteSize,
    /// Bytes still to send.
    #[serde(default)]
    pub remaining: ByteSize,
    /// Downtime as QEMU measured it, in milliseconds, at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Source only: it has begun to hand the guest over, durably; the target may run it from here on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub switchover: bool,
    /// The reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How a migration stands on one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationOutcome {
    /// Going on.
    InProgress,
    /// Target only: the guest runs here. Final.
    Arrived,
    /// Source: the guest goes on here and the migration is over. Final.
    /// Target: the guest will never run here under this migration. Final, durable.
    Failed,
    /// Source only: everything was sent; the source will not resume by itself.
    Sent,
}
