//! Images that a job of a host writes to: no VM starts from one of them.
//!
//! ```text
//!   (nothing) --BeginImageWrite: no VM that has it may run--> being written --EndImageWrite--> (nothing)
//! ```
//! Always holds: a record is there before the first byte is written. A job that stopped half-way keeps it: what is in the
//! image is neither the old nor the new, until the job goes on or is cancelled, or its host is removed.

use crate::model::State;
use quorate_types::spec::DiskSpec;
use quorate_types::{HostName, PoolName, Timestamp, VmName, VmSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Images that are written, by pool and name.
pub type ImageWrites = BTreeMap<PoolName, BTreeMap<String, ImageWrite>>;

/// Who writes to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageWrite {
    /// The host that does it.
    pub host: HostName,
    /// What, for people: `import /iso/debian.qcow2 to san/root`.
    pub what: String,
    /// Since when.
    pub at: Timestamp,
}

impl State {
    /// The first disk of a VM that is being written to by a job, and by whom.
    pub fn written<'a>(&'a self, spec: &'a VmSpec) -> Option<(&'a DiskSpec, &'a ImageWrite)> {
        if self.image_writes.is_empty() {
            return None;
        }
        spec.disks.iter().find_map(|disk| {
            let name = self.image_name(&disk.pool, &disk.image);
            let write = self.image_writes.get(&disk.pool)?.get(&name)?;
            Some((disk, write))
        })
    }

    /// The one name of an image: a unit of a SAN can be written in two ways.
    pub(crate) fn image_name(&self, pool: &PoolName, image: &str) -> String {
        match self.pools.get(pool) {
            Some(pool) => pool.spec.canonical(image),
            None => image.to_owned(),
        }
    }

    /// A VM that may run from an image now.
    pub(crate) fn runs_from(&self, pool: &PoolName, image: &str) -> Option<(&VmName, &HostName)> {
        let name = self.image_name(pool, image);
        self.vms.iter().find_map(|(vm, record)| {
            let host = record.ownership.host()?;
            let mut disks = record.effective().disks.iter().chain(&record.spec.disks);
            let this = |disk: &DiskSpec| {
                disk.pool == *pool && self.image_name(&disk.pool, &disk.image) == name
            };
            disks.any(this).then_some((vm, host))
        })
    }
}
