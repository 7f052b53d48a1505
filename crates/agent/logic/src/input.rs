//! What the logic is told.
//!
//! Always holds: an answer or an event of a guest carries the [`Token`] of the effect that caused it
//! or of the process that it is about; one with another token is stale and changes nothing.

use crate::effect::Token;
use quorate_membership::Instant;
use quorate_state::Order;
use quorate_types::{LeaseTimings, MigrationId, Millis, Revision, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// A question of another host, to be answered with [`crate::Effect::Answer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AskToken(pub u64);

/// What a target says about a migration when its source asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetSays {
    /// The guest never ran there and never will: durable.
    NeverRan,
    /// The guest has arrived there.
    Arrived,
    /// Neither is certain yet.
    Unknown,
}

/// State of a guest as its driver sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// Its CPUs run, or may run.
    Running,
    /// Paused, for whatever reason but the next.
    Paused,
    /// Paused because a disk failed.
    IoError,
    /// Waits for its memory: a migration's target, or a restore that has not ended.
    InMigrate,
    /// Shut down or broken: it will not run again.
    Ended,
    /// The driver gets no answer.
    Unknown,
}

/// The last migration that the process knows of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObservedMigration {
    /// None, or one that failed or was cancelled.
    None,
    /// Under way, the switchover not yet ordered.
    UnderWay,
    /// Switching over.
    SwitchingOver,
    /// Everything was sent, or received.
    Completed,
}

/// A guest that was found alive when the agent started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// Which VM.
    pub vm: VmName,
    /// Names its process from now on; unique among the adopted.
    pub run: Token,
    /// Its state.
    pub observed: Observed,
    /// Its migration.
    pub migration: ObservedMigration,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The guest shut itself down.
    pub by_guest: bool,
    /// The guard ended it, since its lease ran out.
    pub by_guard: bool,
    /// Of a process that waited for a migration: its CPUs ran, or its memory was complete, before
    /// the end. Unknown counts as `true`.
    pub ran: bool,
    /// What was seen, as a sentence, with the end of the hypervisor's messages.
    pub detail: String,
}

/// An answer or an event of one guest. The token beside it is the one of the effect, or, where it says
/// *process*, the one that made the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// `Start`: it runs.
    Started,
    /// `Start` or `Prepare`: no process is left. `refused`: none was made either (no lease at the
    /// guard, or no guard).
    StartFailed {
        /// What went wrong.
        detail: String,
        /// Nothing was tried.
        refused: bool,
    },
    /// `Thaw`: it runs.
    Thawed,
    /// `Thaw`: the guard does not allow it now.
    ThawRefused {
        /// Why.
        detail: String,
    },
    /// `Thaw`: another process holds its disks.
    DiskLost {
        /// What was seen.
        detail: String,
    },
    /// `Thaw`: its disks may not be written now, and that may change.
    DiskRefused {
        /// What was seen.
        detail: String,
    },
    /// `Thaw`: it does not run, for another reason.
    ThawFailed {
        /// What was seen.
        detail: String,
    },
    /// `Freeze`: it is paused.
    Paused,
    /// `Freeze`: it cannot be confirmed.
    PauseFailed {
        /// What was seen.
        detail: String,
    },
    /// `Powerdown`: the guest cannot be asked.
    PowerdownFailed {
        /// Why.
        detail: String,
    },
    /// `Save`: its memory is durable in the file that was given; the guest is paused.
    Saved,
    /// `Save`: it failed and the guest goes on.
    SaveFailed {
        /// Why.
        detail: String,
    },
    /// `Kill`: the process has not ended yet.
    KillFailed {
        /// What was seen.
        detail: String,
    },
    /// `Query`.
    State(Observed),
    /// Process: something happened that changes its state; it has to be asked for.
    Noticed,
    /// Process: paused by a failing disk.
    IoError {
        /// Which disk, and how.
        detail: String,
    },
    /// Process: the ready check succeeded.
    Ready,
    /// Process: it has ended. Comes last, after everything else about it.
    Exited(Exit),
    /// `Prepare`: the target waits here.
    Listening {
        /// `host:port` for the source.
        address: String,
    },
    /// `Prepare`: the guest is here, its CPUs run (or it arrived paused).
    Arrived {
        /// Its CPUs run.
        running: bool,
    },
    /// `Prepare`: the guest will not arrive; the process may still exist.
    ArrivalFailed {
        /// Why.
        detail: String,
    },
    /// `AskTarget`: the target waits at this address.
    TargetReady {
        /// `host:port`.
        address: String,
    },
    /// `AskTarget`: not yet, or not reachable.
    TargetNotReady {
        /// Why.
        detail: String,
    },
    /// `AskOutcome`.
    TargetSaid(TargetSays),
    /// `Send`, `Attach`: bytes so far.
    Progress {
        /// Sent.
        transferred: u64,
        /// Still to send.
        remaining: u64,
    },
    /// `Send`: the guest is paused and waits for `Continue`.
    PreSwitchover,
    /// `Send`, `Attach`: everything was sent.
    SendCompleted {
        /// Downtime as the hypervisor measured it.
        downtime_ms: u64,
    },
    /// `Send`, `Attach`: it is over without success.
    SendFailed {
        /// Why.
        detail: String,
        /// The switchover had been ordered, or may have been.
        begun: bool,
        /// The source's state now.
        observed: Observed,
    },
}

/// What the logic is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The local replica has advanced.
    Orders {
        /// Its revision.
        revision: Revision,
        /// Orders for this host.
        orders: BTreeMap<VmName, Order>,
        /// Every VM of the cluster.
        known: BTreeSet<VmName>,
    },
    /// The lease's settings.
    Timings(LeaseTimings),
    /// A heartbeat was acknowledged.
    LeaseAck {
        /// When it was sent.
        sent: Instant,
        /// The lease from then on; 0: none.
        granted: Millis,
        /// What the leader had applied.
        revision: Revision,
    },
    /// Time has passed.
    Tick,
    /// About one guest.
    Guest {
        /// Which VM.
        vm: VmName,
        /// See [`GuestEvent`].
        token: Token,
        /// What.
        event: GuestEvent,
    },
    /// The guard has confirmed that a guest is paused.
    GuardFroze {
        /// Which VM.
        vm: VmName,
        /// Which process.
        run: Token,
    },
    /// A source asks where its guest shall go.
    PeerIncoming {
        /// To be answered with.
        ask: AskToken,
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
        /// The guest is ready.
        ready: bool,
    },
    /// A source asks what became of its guest.
    PeerOutcome {
        /// To be answered with.
        ask: AskToken,
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
    },
}
