//! QEMU processes and the disks that all hosts share.
//!
//! A guest writes a counter to its disk again and again. Its memory remembers the last value that the
//! disk acknowledged; a write over any other value shows a second writer, a lost write, or a memory
//! that is older than the disk.

use crate::event::HostId;
use quorate_agent_logic::Token;
use quorate_types::{Epoch, MigrationId, VmName};

/// Number of a QEMU process, unique in a run.
pub(crate) type ProcId = u64;

/// What a guest's CPUs do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vcpu {
    Starting,
    Running,
    Paused,
    IoError,
    InMigrate,
}

/// Steps of a migration's stream on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum StreamPhase {
    Active,
    PreSwitchover,
    Device,
    Completed,
    Failed { begun: bool },
}

/// An outgoing migration.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub(crate) id: MigrationId,
    pub(crate) target: ProcId,
    pub(crate) phase: StreamPhase,
    /// Who watches it: an agent's life and its token.
    pub(crate) watcher: (u32, Token),
    pub(crate) left_ns: u64,
    pub(crate) all_ns: u64,
    /// Since when nothing gets through.
    pub(crate) stalled: Option<u64>,
    pub(crate) paused_at: u64,
    /// Its CPUs ran when it was paused for the switchover: QEMU resumes it after a failure only then.
    pub(crate) ran: bool,
}

/// A QEMU process.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) host: HostId,
    pub(crate) vm: VmName,
    pub(crate) epoch: Epoch,
    pub(crate) vcpu: Vcpu,
    /// It waits, or waited, for this migration.
    pub(crate) incoming: Option<MigrationId>,
    pub(crate) ever_ran: bool,
    /// Told not to run when it arrives.
    pub(crate) dismissed: bool,
    /// Its disks are active: it holds the locks of the images.
    pub(crate) disks: bool,
    /// Last value of the disk's counter that its memory knows.
    pub(crate) memory: u64,
    pub(crate) restore: Option<u64>,
    pub(crate) out: Option<Outgoing>,
    /// QEMU resumed it by itself after a failed switchover.
    pub(crate) self_resumed: bool,
    /// A thaw that the guard allowed has not been answered yet.
    pub(crate) thawing: bool,
    pub(crate) obeys_powerdown: bool,
    pub(crate) ready_at: u64,
    /// Targets of its disks on the SAN.
    pub(crate) targets: Vec<String>,
    /// It has disks that all hosts share, with locks.
    pub(crate) shared: bool,
    /// Its disk is its host's own.
    pub(crate) own: bool,
    /// Since when a write hangs.
    pub(crate) hangs: Option<u64>,
    /// When a disk was last seen not to be there.
    pub(crate) unreached: Option<u64>,
    pub(crate) started_at: u64,
}

/// The disk of a VM.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    /// Who holds the image's lock.
    pub(crate) holder: Option<ProcId>,
    /// The counter on it.
    pub(crate) counter: u64,
}
