//! Which hosts have a disk whose pool is the hosts' own (`local`, `mirrored`), and which of them have all of it.
//!
//! ```text
//!            first Start on h1          AddCopy h2               CopyInStep
//!  (nothing) -----------------> {h1: in} ---------> {h1: in, h2: out} ------> {h1: in, h2: in}
//!                                                        ^                       |   |
//!                                                        +---- CopyOutOfStep ----+   | Start on h2
//!                                                        +---- Start on h1 ------+   v
//!                                                                      {h1: out, h2: in}
//! ```
//! Always holds: a VM starts only where every such disk has a copy that is in step; a start leaves its own copy
//! as the only one in step, until the owner says that another one follows it write for write; a copy is out of
//! step *before* its owner lets the guest write without it. Records stay when a VM is deleted, as its disks do.
//!
//! Why a copy remembers the boot of its host: what the owner's guest has flushed is on the owner's disk, but in the
//! memory of the copy's kernel. That survives everything but the end of that kernel. A copy that becomes its owner's by a
//! start stays bound until the guest is reported to run in that life, since its host flushes it before
//! (`CopyInStep` of the owner's own copy).

use crate::model::State;
use quorate_types::spec::DiskSpec;
use quorate_types::{BootId, Epoch, HostName, MigrationId, PoolName, Revision, Timestamp, VmSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most copies of a disk, the owner's among them.
pub const COPIES: usize = 2;

/// Records of all disks, by pool and image.
pub type DiskRecords = BTreeMap<PoolName, BTreeMap<String, DiskCopies>>;

/// Where a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskCopies {
    /// Under this epoch its image may be made; later a missing image is one that was lost.
    pub created: Epoch,
    /// Its copies, by host.
    pub hosts: BTreeMap<HostName, DiskCopy>,
    /// Both sides of a migration were lost, and nobody has said how far it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsettled: Option<Unsettled>,
}

/// A migration whose two sides were lost. The target's copy is whole; the source's is too if it had not handed the guest
/// over, which its ledger tells when it is back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsettled {
    /// Which migration.
    pub id: MigrationId,
    /// The source.
    pub from: HostName,
    /// Its token.
    pub epoch: Epoch,
    /// The target.
    pub to: HostName,
}

/// One copy of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCopy {
    /// It has every write that was acknowledged to the guest.
    pub in_step: bool,
    /// Last change of this record; names one life of the copy.
    pub since: Revision,
    /// When that was, for people.
    pub at: Timestamp,
    /// It is in step only as long as its host was not booted again; absent: in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootId>,
}

impl DiskCopies {
    /// Why a VM with this disk cannot be started on a host, as a sentence about the host; `boot` is that
    /// host's present one, where it is known.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self, image: &str, host: &HostName, boot: Option<&BootId>) -> Result<(), String> {
        let Some(copy) = self.hosts.get(host) else {
            let hosts: Vec<&str> = self.hosts.keys().map(HostName::as_str).collect();
            return Err(format!("disk {image} is on {} only", hosts.join(" and ")));
        };
        if !copy.in_step {
            return Err(format!(
                "its copy of disk {image} is out of step since {}: it lacks writes that were acknowledged",
                copy.at
            ));
        }
        if copy.boot.is_some() && boot.is_some() && copy.boot.as_ref() != boot {
            return Err(format!(
                "it was booted again after its copy of disk {image} was in step: writes that were only in its memory are lost"
            ));
        }
        Ok(())
    }

    /// Copies on other hosts that are in step.
    pub fn followers<'a>(&'a self, owner: &'a HostName) -> impl Iterator<Item = &'a HostName> {
        let others = self.hosts.iter().filter(move |(host, _)| *host != owner);
        others
            .filter(|(_, copy)| copy.in_step)
            .map(|(host, _)| host)
    }
}

impl State {
    /// The record of a disk, if it has been started once.
    pub fn copies(&self, pool: &PoolName, image: &str) -> Option<&DiskCopies> {
        self.disk_copies.get(pool)?.get(image)
    }

    /// Disks of a VM that are on particular hosts.
    pub fn own_disks<'a>(&'a self, spec: &'a VmSpec) -> impl Iterator<Item = &'a DiskSpec> {
        let own = |disk: &&DiskSpec| {
            let pool = self.pools.get(&disk.pool);
            pool.is_some_and(|pool| pool.spec.is_hosts_own())
        };
        spec.disks.iter().filter(own)
    }

    /// Why a VM of this definition cannot be started on a host, for the sake of its disks.
    ///
    /// # Errors
    /// A sentence about the host.
    pub fn check_copies(
        &self,
        spec: &VmSpec,
        host: &HostName,
        boot: Option<&BootId>,
    ) -> Result<(), String> {
        for disk in self.own_disks(spec) {
            if let Some(copies) = self.copies(&disk.pool, &disk.image) {
                copies.check(&disk.image, host, boot)?;
            }
        }
        Ok(())
    }
}
