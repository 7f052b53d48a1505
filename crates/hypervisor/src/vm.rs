//! The seam between the agent and a hypervisor.
//!
//! Owns: [`Hypervisor`] (starts and adopts) and [`Vm`] (one running guest). Implemented by
//! [`crate::qemu::QemuDriver`] and by [`crate::fake::FakeHypervisor`]. Kept small: whatever can be
//! composed from these calls (ladders, retries, back-off) is the agent's.
//!
//! One task per VM is expected to call the methods that change its state, one after another.
//! `freeze` and `kill` may be called at any moment; they win over whatever else is under way.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;

use crate::config::{GuestConfig, StartMode};
use crate::error::HypervisorError;
use crate::guest::{ExitInfo, Frozen, GuestEvent, GuestState, ProcessIdentity, SavedState};
use crate::migration::{
    IncomingMigration, ListenRequest, MigrationRequest, MigrationStatus, OutgoingMigration,
};
use crate::mirror::{MirrorStatus, MirrorTarget, WriteMap};

/// What was found where a guest had been started.
pub enum Adoption {
    /// It still lives.
    Alive {
        /// The guest.
        vm: Arc<dyn Vm>,
        /// Its state; `None` when QEMU does not answer, so that the caller can decide to kill it.
        state: Option<GuestState>,
        /// The last migration QEMU knows of, outgoing or incoming.
        migration: Option<MigrationStatus>,
    },
    /// It has ended.
    Gone {
        /// The configuration it had, when the record is readable.
        config: Option<Box<GuestConfig>>,
    },
}

/// Starts guests and finds those started earlier.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// Starts a guest and returns when it runs (boot, restore) or is ready to be told where to listen
    /// (incoming). `within` bounds the whole start; when it fails nothing is left behind. Dropping the
    /// future half-way leaves what was spawned, for `adopt` to find.
    async fn start(
        &self,
        config: &GuestConfig,
        mode: StartMode,
        within: Duration,
    ) -> Result<Arc<dyn Vm>, HypervisorError>;

    /// Finds the guest whose runtime directory this is, started by an earlier process.
    ///
    /// # Errors
    /// Only when it cannot be told whether the guest lives.
    async fn adopt(
        &self,
        runtime_dir: &Path,
        within: Duration,
    ) -> Result<Adoption, HypervisorError>;
}

/// Whether a guest held its file systems still for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quiesced {
    /// It did: the snapshot is as after an orderly unmount.
    Yes,
    /// It did not: the snapshot is as after a power cut.
    No(String),
    /// It did, and could not be told to go on.
    Stuck(String),
}

fn no_disk_work(config: &GuestConfig, disk: usize) -> HypervisorError {
    HypervisorError::Disk {
        vm: config.name.clone(),
        disk,
        detail: "this hypervisor cannot do that".to_owned(),
    }
}

/// One running guest. Dropping it leaves the guest running.
#[async_trait]
pub trait Vm: Send + Sync + 'static {
    /// What it was started with.
    fn config(&self) -> &GuestConfig;

    /// Its process.
    fn identity(&self) -> &ProcessIdentity;

    /// Events from now on. A slow reader is told that it lagged, and asks for the state.
    fn events(&self) -> broadcast::Receiver<GuestEvent>;

    /// Resolves when the process has ended (within milliseconds), at once when it has already.
    async fn exited(&self) -> ExitInfo;

    /// The present state.
    async fn status(&self) -> Result<GuestState, HypervisorError>;

    /// Asks the guest to shut down; the exit follows, or not, if the guest ignores it.
    async fn powerdown(&self) -> Result<(), HypervisorError>;

    /// Ends QEMU in good order: images are flushed and closed. The exit follows.
    async fn quit(&self) -> Result<(), HypervisorError>;

    /// Ends the process at once and returns when it has ended.
    async fn kill(&self, within: Duration) -> Result<ExitInfo, HypervisorError>;

    /// Pauses the guest, confirmed, and gives up its disks. An outgoing migration that has not switched
    /// over is cancelled. Idempotent.
    async fn freeze(&self, within: Duration) -> Result<Frozen, HypervisorError>;

    /// Takes the disks back and runs the guest, confirmed. Idempotent.
    ///
    /// # Errors
    /// [`HypervisorError::DiskLockLost`]: another process has the disks; this copy must be killed.
    async fn thaw(&self, within: Duration) -> Result<(), HypervisorError>;

    /// Makes every network card tell the network where it is.
    async fn announce(&self) -> Result<(), HypervisorError>;

    /// Pauses the guest and writes its memory to `path`, durably. The guest stays paused with its disks
    /// given up: `quit` it, or `thaw` it to go on here. When saving fails it runs again.
    async fn save(&self, path: &Path, within: Duration) -> Result<SavedState, HypervisorError>;

    /// Whether the guest agent answers.
    async fn ping_agent(&self, within: Duration) -> Result<(), HypervisorError>;

    /// Gives a disk a larger size, and tells the guest.
    async fn resize_disk(&self, index: usize, _bytes: u64) -> Result<(), HypervisorError> {
        Err(no_disk_work(self.config(), index))
    }

    /// Makes a snapshot inside a disk's image, with the guest quiesced where its agent answers.
    async fn snapshot_disk(&self, index: usize, _name: &str) -> Result<Quiesced, HypervisorError> {
        Err(no_disk_work(self.config(), index))
    }

    /// Deletes a snapshot inside a disk's image.
    async fn delete_disk_snapshot(&self, index: usize, _name: &str) -> Result<(), HypervisorError> {
        Err(no_disk_work(self.config(), index))
    }

    /// Lets the guest's file systems go on after a snapshot that was interrupted.
    async fn unquiesce(&self) -> Result<(), String> {
        Ok(())
    }

    /// Starts to send the guest to another host.
    async fn migrate(
        &self,
        request: MigrationRequest,
    ) -> Result<OutgoingMigration, HypervisorError>;

    /// Takes up an outgoing migration that an earlier process started; `None` when none is under way.
    async fn attach_migration(&self) -> Result<Option<OutgoingMigration>, HypervisorError>;

    /// Opens the port on which a guest started with [`StartMode::Incoming`] arrives.
    async fn listen(&self, request: ListenRequest) -> Result<IncomingMigration, HypervisorError>;

    /// Begins to copy disk number `disk` to another host and then to keep the copy in step; `speed` bounds the
    /// copying, in bytes per second. `tag` names the mirror. With a write map only what it names is copied first.
    async fn start_mirror(
        &self,
        disk: usize,
        tag: &str,
        target: &MirrorTarget,
        speed: Option<u64>,
        lacks: Option<&WriteMap>,
    ) -> Result<(), HypervisorError>;

    /// Ends the copying of what a copy lacked, where [`crate::Resync::due`] says so. A failure lets go of the copy.
    async fn finish_resync(&self, disk: usize) -> Result<(), HypervisorError>;

    /// The write maps of a disk, the oldest first.
    async fn write_maps(&self, disk: usize) -> Result<Vec<WriteMap>, HypervisorError>;

    /// Begins a write map.
    async fn begin_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError>;

    /// Forgets a write map.
    async fn forget_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError>;

    /// Mirrors that exist. One that is missing has ended, and the guest goes on without it.
    async fn mirrors(&self) -> Result<Vec<MirrorStatus>, HypervisorError>;

    /// Lets go of a disk's copy: writes that wait for it are completed without it, also where nothing else is answered
    /// because of them; then called for each copy that does not count.
    async fn drop_mirror(&self, disk: usize) -> Result<(), HypervisorError>;
}
