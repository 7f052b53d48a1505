//! What is asked of a pool and what it reports.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How an image is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// QEMU copy-on-write.
    Qcow2,
}

impl DiskFormat {
    /// The name QEMU knows it by.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A disk that should be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The image's name within the pool; may have folders.
    pub image: String,
    /// Its format.
    pub format: DiskFormat,
    /// Smallest acceptable size in bytes, as the guest sees it.
    pub size_bytes: Option<u64>,
    /// Whether an empty image is made when there is none.
    pub create: bool,
}

/// A disk image as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// Where its bytes are.
    pub source: DiskSource,
    /// Its format.
    pub format: DiskFormat,
    /// Size as the guest sees it, in bytes.
    pub virtual_bytes: u64,
    /// Space it takes in the pool, in bytes.
    pub actual_bytes: u64,
    /// The image it is based on, as an absolute path.
    pub backing: Option<PathBuf>,
    /// Whether this call made it.
    pub created: bool,
}

/// Where the bytes of a disk are, as QEMU is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// An image file: its path on this host, without symbolic links.
    File(PathBuf),
    /// A block device of this host.
    Device(PathBuf),
    /// A logical unit of an iSCSI target, for QEMU's own initiator.
    Iscsi(IscsiSource),
    /// An image of Ceph, for QEMU's own client.
    Rbd(RbdSource),
}

impl DiskSource {
    /// The path on this host, where there is one.
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            Self::File(path) | Self::Device(path) => Some(path),
            Self::Iscsi(_) | Self::Rbd(_) => None,
        }
    }
}

/// Where a new image is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewImage {
    /// A file that is not visible yet.
    Part(PathBuf),
    /// A unit that is there.
    Unit {
        /// Where.
        source: DiskSource,
        /// Its size in bytes.
        bytes: u64,
    },
}

/// A logical unit and how this host logs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiSource {
    /// `address:port` of the portal that answered.
    pub portal: String,
    /// Name of the target.
    pub target: String,
    /// Number of the unit.
    pub lun: u32,
    /// Name by which this host logs in.
    pub initiator: String,
    /// Account and password, where the target asks for them.
    pub login: Option<Login>,
}

/// An image of Ceph and how this host logs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RbdSource {
    /// Ceph's pool.
    pub pool: String,
    /// The image in it.
    pub image: String,
    /// Ceph's configuration on this host.
    pub conf: String,
    /// User, without `client.`.
    pub user: String,
    /// The user with its key; absent: the keyring has it.
    pub login: Option<Login>,
}

/// An account at a target.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// Its name.
    pub user: String,
    /// Its password.
    pub password: String,
}

impl fmt::Debug for Login {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// An image that is in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageEntry {
    /// Its name within the pool.
    pub image: String,
    /// Size as a guest sees it, in bytes, where it can be told.
    pub virtual_bytes: Option<u64>,
    /// Space it takes in the pool, in bytes.
    pub actual_bytes: Option<u64>,
    /// Its format, as its first bytes suggest.
    pub format: DiskFormat,
    /// Why more is not known.
    pub problem: Option<String>,
}

/// The file that says which pool this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Version of this file's format.
    pub version: u32,
    /// The cluster that the pool belongs to.
    pub cluster: String,
    /// The pool's name in that cluster.
    pub pool: String,
    /// Random, made when the pool was defined: equal on two hosts only if they see the
    /// same storage.
    pub id: String,
}

/// What one host sees of a pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolFacts {
    /// Whether the pool is there and answers.
    pub reachable: bool,
    /// Whether the storage hung until the deadline.
    pub unresponsive: bool,
    /// Whether a write was made and is on stable storage; where a pool has no place of its own to write to (units of a
    /// SAN, Ceph), whether it answered.
    pub writable: bool,
    /// Free space in bytes.
    pub free_bytes: u64,
    /// Size in bytes.
    pub total_bytes: u64,
    /// The file system, as far as it is known.
    pub fs_type: Option<String>,
    /// How long a write of 4 KiB took until it was on stable storage, in microseconds.
    pub probe_write_us: Option<u64>,
    /// The pool's marker; hosts with another id see another pool.
    pub marker: Option<Marker>,
    /// What is wrong and what to do about it; `None` when guests can use the pool here.
    pub problem: Option<String>,
}

impl PoolFacts {
    /// A pool without a place of its own to write to has answered a look that began then.
    pub(crate) fn answered(marker: Marker, begun: std::time::Instant) -> Self {
        let took = begun.elapsed().as_micros();
        Self {
            reachable: true,
            writable: true,
            probe_write_us: Some(u64::try_from(took).unwrap_or(u64::MAX)),
            marker: Some(marker),
            ..Self::default()
        }
    }

    /// A look that failed.
    pub(crate) fn failed(error: &crate::PoolError) -> Self {
        Self {
            unresponsive: error.is_unresponsive(),
            problem: Some(error.to_string()),
            ..Self::default()
        }
    }

    /// Whether guests can use the pool on this host.
    pub fn usable(&self) -> bool {
        self.reachable && self.writable && self.marker.is_some() && self.problem.is_none()
    }
}

/// How a pool takes write access away from a host, verifiably.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageFence {
    /// SCSI-3 persistent reservation, preempted and read back.
    Reservation,
    /// Taken off the target's access list, its sessions dropped.
    TargetAccess,
    /// The export of that epoch removed.
    ExportRemoved,
}

/// Where the state of a VM is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Write here; nobody reads it.
    pub part: PathBuf,
    /// Where it appears, whole, when it is committed.
    pub done: PathBuf,
}

/// Rounds a size up to the sectors a disk is made of.
pub const fn round_to_sector(bytes: u64) -> u64 {
    const SECTOR: u64 = 512;
    match bytes % SECTOR {
        0 => bytes,
        rest => bytes.saturating_add(SECTOR - rest),
    }
}
