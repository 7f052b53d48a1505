//! What the logic wants done.
//!
//! Always holds: the effects of one step are carried out in their order; a [`Effect::Ledger`] is
//! durable before the next one begins. Losing the tail of a list to a crash is safe at every point. A start,
//! a preparation or a thaw is carried out before [`crate::HostLogic::leave_until`], or answered as refused.

use crate::input::{AskToken, TargetSays};
use crate::ledger::LedgerRecord;
use quorate_state::GuestAbi;
use quorate_types::report::SavedState;
use quorate_types::spec::ReadyCheck;
use quorate_types::{Epoch, HostName, MigrationId, PoolName, VmName, VmSpec};

/// Names one effect; the answer carries it. The token of a `Start`, a `Prepare` or an adoption also
/// names the process that it made. Unique in one life of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Token(pub u64);

/// Something to be done to one guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Ask the guard's leave, make the taps, start QEMU, put it under guard.
    /// Answers: `Started`, `StartFailed`; later `Exited`.
    Start {
        /// Fencing token, for messages.
        epoch: Epoch,
        /// Definition.
        spec: Box<VmSpec>,
        /// CPU and machine.
        abi: GuestAbi,
        /// Memory to resume from.
        restore: Option<SavedState>,
    },
    /// The same with mute taps and a QEMU that waits for the stream of a migration; on arrival it
    /// opens the taps and announces the guest at once.
    /// Answers: `Listening` or `StartFailed`; then `Arrived` or `ArrivalFailed`; later `Exited`.
    Prepare {
        /// Which migration.
        id: MigrationId,
        /// Fencing token, for messages.
        epoch: Epoch,
        /// Definition.
        spec: Box<VmSpec>,
        /// CPU and machine.
        abi: GuestAbi,
    },
    /// Ask the guest to shut down. Answers: `PowerdownFailed`, or nothing (`Exited` may follow).
    Powerdown,
    /// End the process at once, also one that is being started. Answers: `Exited`, `KillFailed`.
    Kill,
    /// Pause it (not for the lease: that is the guard's). Answers: `Paused`, `PauseFailed`.
    Freeze,
    /// Keep a guest that is awaited from running when it arrives; one that is here already is paused. Answer: `State`:
    /// `InMigrate` promises that it has not run and will not.
    Dismiss,
    /// Ask the guard's leave and let it run. Answers: `Thawed`, `ThawRefused`, `DiskLost`, `DiskRefused`,
    /// `ThawFailed`.
    Thaw,
    /// Write its memory to a file. Answers: `Saved`, `SaveFailed`.
    Save {
        /// Pool.
        pool: PoolName,
        /// File in it.
        file: String,
    },
    /// Answer: `State`.
    Query,
    /// Begin to probe until the ready check succeeds or the process ends. Answer: `Ready`.
    Probe(ReadyCheck),
    /// Send the guest. Answers: `Progress`*, `PreSwitchover`, then `SendCompleted` or `SendFailed`.
    Send {
        /// Which migration.
        id: MigrationId,
        /// `host:port` of the target.
        address: String,
    },
    /// Take up the watch over a migration that is under way. Answers as for `Send`.
    Attach,
    /// Order the switchover of the migration whose `Send` had this token.
    Continue {
        /// That token.
        send: Token,
    },
    /// Cancel the migration that is under way, if any.
    Cancel,
    /// It arrived while no agent watched: open its taps and announce it. Not answered.
    Open,
    /// No process is left: remove taps and runtime files.
    Clean,
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make this durable before anything that follows.
    Ledger(LedgerRecord),
    /// The report has changed.
    Report,
    /// About one guest.
    Guest {
        /// Which VM.
        vm: VmName,
        /// For the answer.
        token: Token,
        /// The process that it is about.
        run: Token,
        /// What.
        act: Act,
    },
    /// Ask the target of a migration for its address. Answers: `TargetReady`, `TargetNotReady`.
    AskTarget {
        /// Which VM.
        vm: VmName,
        /// For the answer.
        token: Token,
        /// The target.
        to: HostName,
        /// Which migration.
        id: MigrationId,
        /// The guest is ready here.
        ready: bool,
    },
    /// Ask the target what became of the guest. Answer: `TargetSaid` (`Unknown` when not reachable).
    AskOutcome {
        /// Which VM.
        vm: VmName,
        /// For the answer.
        token: Token,
        /// The target.
        to: HostName,
        /// Which migration.
        id: MigrationId,
    },
    /// Answer to [`crate::Input::PeerIncoming`].
    Answer {
        /// The question.
        ask: AskToken,
        /// `host:port`, or why not (yet).
        result: Result<String, String>,
    },
    /// Answer to [`crate::Input::PeerOutcome`].
    AnswerOutcome {
        /// The question.
        ask: AskToken,
        /// What is certain here.
        says: TargetSays,
    },
}
