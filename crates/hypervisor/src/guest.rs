//! What a running guest looks like from outside: its state, its events, its end.
//!
//! Owns: the words shared by the QEMU driver and the fake. Values that come from QEMU keep an open
//! variant, so that a newer QEMU never breaks an older daemon.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::migration::MigrationStatus;

/// The run state that the hypervisor reports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestState {
    /// The CPUs run.
    Running,
    /// Paused by an order.
    Paused,
    /// Paused because a disk failed; `cont` retries the request.
    IoError,
    /// Waits for a guest to arrive, or receives it.
    InMigrate,
    /// Paused by an outgoing migration that is switching over.
    FinishMigrate,
    /// An outgoing migration or a save has completed: this copy is history unless told to go on.
    PostMigrate,
    /// The guest has shut down; the process still exists.
    Shutdown,
    /// Created, and not yet told to run.
    Prelaunch,
    /// The guest panicked.
    Panicked,
    /// Sleeping by the guest's own wish.
    Suspended,
    /// The hypervisor cannot continue this guest.
    InternalError,
    /// A state this build does not know.
    Other(String),
}

impl GuestState {
    /// Reads QEMU's name of the state; unknown names survive.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        match name {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "io-error" => Self::IoError,
            "inmigrate" => Self::InMigrate,
            "finish-migrate" => Self::FinishMigrate,
            "postmigrate" => Self::PostMigrate,
            "shutdown" => Self::Shutdown,
            "prelaunch" => Self::Prelaunch,
            "guest-panicked" => Self::Panicked,
            "suspended" => Self::Suspended,
            "internal-error" => Self::InternalError,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether guest code may be executing. A state that is not known counts as executing.
    #[must_use]
    pub fn may_execute(&self) -> bool {
        matches!(self, Self::Running | Self::Suspended | Self::Other(_))
    }
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::IoError => "io-error",
            Self::InMigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::Prelaunch => "prelaunch",
            Self::Panicked => "guest-panicked",
            Self::Suspended => "suspended",
            Self::InternalError => "internal-error",
            Self::Other(name) => name,
        })
    }
}

/// Something that happened to a guest.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GuestEvent {
    /// The CPUs were paused.
    Stop {
        /// When, microseconds since 1970; 0 when that is not known.
        at_us: u64,
    },
    /// The CPUs run again.
    Resume,
    /// The guest is ending; the exit follows.
    Shutdown {
        /// The guest itself asked for it.
        by_guest: bool,
        /// Why, in QEMU's words: `guest-shutdown`, `host-qmp-quit`, `host-signal`, `guest-panic`, ...
        reason: String,
    },
    /// The guest restarted in place.
    Reset {
        /// The guest itself asked for it.
        by_guest: bool,
        /// Why, in QEMU's words.
        reason: String,
    },
    /// A graceful stop was asked for.
    Powerdown,
    /// A disk request failed.
    BlockIoError {
        /// The disk's id in the configuration, or QEMU's node name.
        disk: String,
        /// `read` or `write`.
        operation: String,
        /// The guest was paused because of it.
        stopped: bool,
        /// The storage is full.
        no_space: bool,
        /// The system's message.
        reason: String,
    },
    /// A migration, outgoing or incoming, changed its status.
    Migration(MigrationStatus),
    /// An outgoing migration began another pass over the memory.
    MigrationPass(u64),
    /// The guest's kernel panicked.
    Panicked {
        /// What QEMU does about it: `pause`, `poweroff`, `run`.
        action: String,
    },
    /// The control connection was lost and found again; events in between are missing. Ask for the state.
    Reconnected,
    /// An event this build does not know.
    Other {
        /// Its name.
        name: String,
        /// Its payload.
        data: Value,
    },
}

/// How a guest's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitInfo {
    /// Exit status; unknown for adopted guests, which are not our children.
    pub code: Option<i32>,
    /// The signal that ended it; unknown for adopted guests.
    pub signal: Option<i32>,
    /// The last shutdown announced before the end: whether the guest asked, and the reason. `None`
    /// means that it ended without a word: a crash, or killed.
    pub shutdown: Option<(bool, String)>,
}

impl ExitInfo {
    /// Whether the guest shut itself down in good order.
    #[must_use]
    pub fn by_guest(&self) -> bool {
        matches!(&self.shutdown, Some((true, reason)) if reason != "guest-panic")
    }

    /// Whether it ended without having been asked to: a crash, a kill, a guest panic.
    #[must_use]
    pub fn is_crash(&self) -> bool {
        match &self.shutdown {
            None => true,
            Some((_, reason)) => reason == "guest-panic" || reason == "host-error",
        }
    }
}

impl fmt::Display for ExitInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.shutdown, self.code, self.signal) {
            (Some((_, reason)), _, _) => write!(f, "shutdown: {reason}"),
            (None, Some(code), _) => write!(f, "exit status {code}"),
            (None, None, Some(signal)) => write!(f, "killed by signal {signal}"),
            (None, None, None) => write!(f, "ended without a word"),
        }
    }
}

/// What a confirmed freeze achieved. The guest is paused in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen {
    /// The images were given up as well: QEMU can no longer write them, and their locks are free. When
    /// false (QEMU before 10.0) the locks are still held and only the pause keeps the disks quiet.
    pub released_disks: bool,
}

/// A guest's memory and devices in a file, written by [`crate::Vm::save`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// The file.
    pub path: PathBuf,
    /// The file has QEMU's `mapped-ram` layout; the reader must be told.
    pub mapped_ram: bool,
}

/// Names one process for good: a pid alone is reused, also over a reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time, in clock ticks since the host booted.
    pub start_ticks: u64,
    /// Which boot of the host that was.
    pub boot_id: String,
}
