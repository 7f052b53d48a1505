//! What agent and guard say to each other: one JSON object per packet of a SOCK_SEQPACKET socket.
//!
//! Always holds: each request has one answer, in order; events come between them. A `Froze` that precedes the
//! grant of a `Thawing` is sent before it. Unknown fields are ignored, so that an agent that was upgraded
//! talks to the guard that is still there.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of this protocol; grows with a change that an older side cannot ignore.
pub const PROTOCOL: u32 = 1;

/// A request with its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in the answer.
    pub seq: u64,
    /// What.
    pub body: ToGuard,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToGuard {
    /// First of each connection. Answered with [`FromGuard::Hello`] before the answer.
    Hello {
        /// [`PROTOCOL`] of the agent.
        protocol: u32,
    },
    /// The lease. An earlier deadline than the one known changes nothing.
    Lease {
        /// End, in nanoseconds of CLOCK_BOOTTIME.
        deadline_ns: u64,
        /// Freezing begins so much before it, in milliseconds.
        freeze_before_ms: u64,
    },
    /// A guest is about to be made. Refused when the lease is about to end, or none is known, or the
    /// lease has ended under which that was decided.
    Starting {
        /// Which VM.
        vm: String,
        /// The agent's token of the process.
        run: u64,
        /// An argument of the command line that only this guest has.
        needle: String,
        /// A process that appears later than this is killed, whatever lease is held then.
        until_ns: u64,
    },
    /// A guest exists; its pidfd comes with the packet. Replaces `Starting` and earlier registrations of the
    /// VM.
    Register {
        /// Which VM.
        vm: String,
        /// The agent's token of the process.
        run: u64,
        /// Process id.
        pid: i32,
        /// QMP socket for the guard alone.
        qmp: PathBuf,
        /// It can be frozen; otherwise it is only ever killed.
        freezable: bool,
    },
    /// Whether a guest can be frozen has changed.
    Freezable {
        /// Which VM.
        vm: String,
        /// Of which process.
        run: u64,
        /// The new value.
        freezable: bool,
    },
    /// The guest is about to be resumed. Refused when the lease is about to end, or the one has under
    /// which that was decided; counts as running once granted.
    Thawing {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
        /// The end of that lease.
        until_ns: u64,
    },
    /// The attempt to resume is over, with or without success.
    Thawed {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
    },
    /// No such guest any more, or it was not made after all.
    Unregister {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
    },
    /// Disarm the watchdog and end. Refused while there are guests.
    Exit,
}

/// What the guard says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromGuard {
    /// What it is and has.
    Hello {
        /// [`PROTOCOL`] of the guard.
        protocol: u32,
        /// Its process.
        pid: u32,
        /// VMs that are registered.
        guests: Vec<String>,
        /// Memory is locked as it is touched.
        locked: bool,
        /// It has a real-time priority.
        realtime: bool,
    },
    /// The answer to a request; `error` says why it was refused.
    Answer {
        /// Of which request.
        seq: u64,
        /// Why not.
        error: Option<String>,
    },
    /// The watchdog's state has changed.
    Watchdog {
        /// Its bound, when it is armed.
        bound_ms: Option<u64>,
        /// Why it is not.
        problem: Option<String>,
    },
    /// A guest is confirmed to be paused with its disks given up.
    Froze {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
    },
    /// The guard has ended a guest.
    Killed {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
    },
}
