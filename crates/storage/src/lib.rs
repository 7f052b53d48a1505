//! Storage pools: where disks are, whether this host reaches them, and what a pool can
//! prove about a host that lost them.
//!
//! Owns: the trait [`Pool`], its kinds [`DirectoryPool`] (a path that all listed hosts
//! share), [`IscsiPoolDriver`] (units of a SAN, opened by QEMU itself), [`BlockPoolDriver`] (block devices
//! of the hosts), [`RbdPoolDriver`] (images of Ceph), and a fake one.
//!
//! Always holds:
//! - a pool carries a **marker** with a random id. Two hosts see the same pool exactly when
//!   they read the same id; a path that merely has the same name, such as the mount point
//!   of a file system that is not mounted, has none, and nothing is created there;
//! - no image is ever overwritten, and none appears half made;
//! - no path given by a user leads out of the pool;
//! - no call outlives its deadline, whatever the storage does. A thread that hangs in the
//!   kernel is left behind and counted, so there are never more than a few.
//!
//! Must not: take part in deciding who owns a disk. The locks of QEMU are looked at before
//! an image is deleted, as a second net; they prove nothing about a host that hangs.

pub mod block;
pub mod directory;
mod error;
pub mod fake;
pub mod iscsi;
mod lanes;
mod model;
mod raw;
pub mod rbd;
pub mod reservation;

use std::path::PathBuf;

pub use block::{BlockConfig, BlockPoolDriver};
pub use directory::{DirectoryConfig, DirectoryPool};
pub use error::PoolError;
pub use fake::{FakePool, FakeStore};
pub use iscsi::{IscsiConfig, IscsiPoolDriver};
pub use model::{
    DiskFormat, DiskInfo, DiskSource, DiskSpec, ImageEntry, IscsiSource, Login, Marker, NewImage,
    PoolFacts, RbdSource, SavedState, StorageFence, round_to_sector,
};
pub use raw::{RAW_BLOCK, RawDisk, RawFile, RawUnit};
pub use rbd::{RbdConfig, RbdPoolDriver};
pub use reservation::Reservation;

/// What an agent needs from a pool of its host. All operations are idempotent.
#[async_trait::async_trait]
pub trait Pool: Send + Sync + 'static {
    /// The pool's name.
    fn name(&self) -> &str;

    /// The kind, as manifests call it.
    fn kind(&self) -> &'static str;

    /// How the pool can prove that a host no longer writes; `None` when it cannot, and
    /// recovery needs another proof.
    fn fence_proof(&self) -> Option<StorageFence>;

    /// Marks the pool as this cluster's, once, when it is defined; repeating it returns
    /// the marker that is there.
    ///
    /// # Errors
    /// When it belongs to another cluster or pool, or cannot be written.
    async fn define(&self) -> Result<Marker, PoolError>;

    /// What this host sees of the pool now. Whatever goes wrong is in the facts.
    async fn check(&self) -> PoolFacts;

    /// Makes sure that the disk is there in the wanted format and is large enough.
    ///
    /// # Errors
    /// When the image is missing and must not be created, has another format, is too
    /// small, or the pool is not in order.
    async fn ensure_disk(&self, spec: &DiskSpec) -> Result<DiskInfo, PoolError>;

    /// What is known of an image, also while a guest uses it.
    ///
    /// # Errors
    /// When it is missing, has another format, or the pool is not in order.
    async fn disk_info(&self, image: &str, format: DiskFormat) -> Result<DiskInfo, PoolError>;

    /// Who may write a disk, decided by the device itself: its persistent reservations. `None` where the pool has none.
    ///
    /// # Errors
    /// When there is no such device on this host.
    async fn reservation(&self, _image: &str) -> Result<Option<Reservation>, PoolError> {
        Ok(None)
    }

    /// Enlarges an image that no guest uses. One that is large enough already is left alone.
    ///
    /// # Errors
    /// When the image is in use or would shrink, or the pool is full.
    async fn resize_disk(
        &self,
        image: &str,
        format: DiskFormat,
        size_bytes: u64,
    ) -> Result<DiskInfo, PoolError>;

    /// Deletes an image that no guest uses. Returns whether there was one.
    ///
    /// # Errors
    /// When it is in use.
    async fn delete_disk(&self, image: &str) -> Result<bool, PoolError>;

    /// The images that are in the pool, by name.
    ///
    /// # Errors
    /// When the pool is not in order.
    async fn list_images(&self) -> Result<Vec<ImageEntry>, PoolError>;

    /// Where a new image is to be written; nobody sees it before [`Pool::publish_image`]. Repeating it with the same
    /// id finds what was written so far. A pool of whole units gives the unit itself.
    ///
    /// # Errors
    /// When there is such an image already, or no such unit.
    async fn begin_image(&self, image: &str, _id: &str) -> Result<NewImage, PoolError> {
        let info = self.disk_info(image, DiskFormat::Raw).await?;
        Ok(NewImage::Unit {
            source: info.source,
            bytes: info.virtual_bytes,
        })
    }

    /// Gives a new image its name, durably, in one step.
    ///
    /// # Errors
    /// When somebody made an image of that name meanwhile.
    async fn publish_image(&self, _image: &str, _id: &str) -> Result<(), PoolError> {
        Ok(())
    }

    /// Removes a new image that is not finished.
    ///
    /// # Errors
    /// When the pool is not in order.
    async fn abandon_image(&self, _image: &str, _id: &str) -> Result<(), PoolError> {
        Ok(())
    }

    /// Prepares the place where a VM's state is saved for a quick migration. Write to
    /// `part`, then call [`Pool::commit_saved_state`].
    ///
    /// # Errors
    /// When the pool is not in order, or has no room for files.
    async fn prepare_saved_state(&self, _vm: &str, _epoch: u64) -> Result<SavedState, PoolError> {
        Err(self.no_files("saving a guest's memory"))
    }

    /// Makes a saved state durable and visible in one step; returns its path. Repeating it
    /// is fine.
    ///
    /// # Errors
    /// When nothing was saved.
    async fn commit_saved_state(&self, _vm: &str, _epoch: u64) -> Result<PathBuf, PoolError> {
        Err(self.no_files("saving a guest's memory"))
    }

    /// The committed saved state of that epoch, if there is one.
    ///
    /// # Errors
    /// When the pool is not in order.
    async fn find_saved_state(&self, _vm: &str, _epoch: u64) -> Result<Option<PathBuf>, PoolError> {
        Ok(None)
    }

    /// Deletes saved states of the VM up to and including the epoch, finished or not;
    /// returns how many.
    ///
    /// # Errors
    /// When the pool is not in order.
    async fn delete_saved_states(&self, _vm: &str, _up_to_epoch: u64) -> Result<u32, PoolError> {
        Ok(0)
    }

    /// What to say when the pool has no room for files.
    fn no_files(&self, what: &'static str) -> PoolError {
        PoolError::NoFiles {
            pool: self.name().to_owned(),
            what,
        }
    }
}
