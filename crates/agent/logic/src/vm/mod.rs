//! One VM on this host.
//!
//! ```text
//!                 Run                     Started
//!   Absent ------------------> Starting ----------> Running <----------+
//!    ^  ^   (crash: back-off)     |                  |  ^  ^           | Thawed
//!    |  +------ StartFailed ------+   guard froze,   |  |  |           |
//!    |                                disk failed    v  |  |        Thawing
//!    |                                            Paused-----------(may_run)
//!    | Exited                                        |  |  |
//!    +---- Killing <-- no order, old epoch, ---------+  |  | SendFailed before the switchover
//!    |                 disks lost, hard stop            |  |
//!    +---- Saving <--- Stop(save)                MigrateOut|
//!    |                                                  v  |
//!    |                                Sending{Ask -> Stream -> Switching}
//!    |                                                          | Completed, or failed after
//!    |     ownership moved: kill + close                        v the switchover was ordered
//!    +------------------------------------------------------ HandedOver --(ownership came back)--> Thawing
//!    |
//!    |  MigrateIn                 Listening
//!   Absent ----> Incoming{Preparing ---------> Listening} --Arrived (durable)--> Running
//!                     | failed, cancelled, lease lost, no order: kill + close (durable)
//! ```
//!
//! | stage | order | does |
//! | --- | --- | --- |
//! | any with a process | none, newer epoch | kill, close |
//! | Absent | Run, or MigrateOut whose sending is over | start, when the lease allows and the back-off has passed |
//! | Absent | Stop | close |
//! | Absent | MigrateIn | prepare once; afterwards closed |
//! | Running | Stop | power down, save or kill; hard after the timeout |
//! | Running | MigrateOut | ask the target, send, order the switchover, hand over |
//! | Paused | Run, MigrateOut before the switchover, graceful stop, arrived MigrateIn | thaw, when the lease allows |
//! | Sending | anything else | cancel; hand over, if the switchover was ordered |
//! | HandedOver | the same MigrateOut | stay paused |
//! | HandedOver | same epoch, otherwise | target never ran it: thaw. Not known: restart from the disks |
//! | Incoming | cancel, lease lost | kill, close |
//!
//! Always holds: a process is made or resumed only under `may_run`, an epoch that is not closed, and an
//! order of this host; an epoch is closed only when the process is gone; `SendFailed` and
//! `SwitchoverBegun` of one migration exclude each other unless the driver knows that the switchover was
//! not ordered. Must not: decide anything about another host.

mod adopt;
mod drive;
mod events;
mod migrate;
mod report;

pub(crate) use migrate::outcome_here;

use crate::effect::{Act, Effect, Token};
use crate::input::{AskToken, Observed};
use crate::ledger::{Ledger, LedgerEntry, LedgerRecord};
use quorate_membership::Instant;
use quorate_state::Order;
use quorate_types::report::{MigrationOutcome, SavedState};
use quorate_types::{Epoch, HostName, MigrationId, MigrationReport, Millis, VmName};

/// A kill that is not confirmed is repeated after this.
const KILL_AGAIN: Millis = Millis(6_000);
/// A guest that does not answer is asked again after this.
const QUERY_AGAIN: Millis = Millis(1_000);
/// A guest that does not answer for this long is broken.
const QUERY_GIVE_UP: Millis = Millis(30_000);
/// A thaw or start that the guard refused is tried again after this.
const REFUSED_AGAIN: Millis = Millis(100);
/// A guest that a failing disk has paused is resumed after this.
const IO_AGAIN: Millis = Millis(5_000);
/// The power button is pressed again after this: a guest that boots misses the first press.
const PRESS_AGAIN: Millis = Millis(5_000);
/// A failed save is tried again after this; the wait doubles.
const SAVE_AGAIN: Millis = Millis(10_000);
/// The target of a migration is asked again after this.
const ASK_AGAIN: Millis = Millis(100);
/// The target of a migration must be ready within this.
const ASK_GIVE_UP: Millis = Millis(15_000);
/// A guest that stands still before its switchover waits for so long for the replica to become as new as the lease.
const CATCH_UP_WITHIN: Millis = Millis(1_000);
/// After ownership came back, the target is asked for this long whether the guest ever ran there.
const RETURN_GRACE: Millis = Millis(2_000);
/// After so much time of running the back-off begins anew.
const STABLE: Millis = Millis(600_000);
/// Thaws that fail for no known reason, before the guest is restarted.
const THAW_TRIES: u32 = 3;

/// How far the sending is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SendStep {
    /// Asking the target for its address.
    Ask {
        op: Option<Token>,
        next_at: Instant,
        give_up_at: Instant,
        last: String,
    },
    /// The memory is being copied.
    Stream {
        op: Token,
        cancelling: bool,
        /// The guest stands still and this host's replica is older than its lease: the order to go on may have been taken
        /// back. Until when it is waited for; it has caught up in moments.
        catching_up: Option<Instant>,
    },
    /// The switchover was ordered (durable).
    Switching { op: Token },
}

/// A guest that was handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HandedOver {
    id: MigrationId,
    to: Option<HostName>,
    /// Everything was sent.
    sent: bool,
    /// The watch over a switchover that has not ended, after a restart of the agent.
    watch: Option<Token>,
    /// A freeze under way.
    freeze: Option<Token>,
    ask: Option<Token>,
    ask_at: Instant,
    /// The target said that the guest never ran there and never will.
    never_ran: bool,
    returned_at: Option<Instant>,
}

/// How far the preparation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ReceiveStep {
    Preparing,
    Listening {
        address: String,
    },
    /// Found after a restart of the agent; being asked whether the guest is here.
    Adopted {
        op: Token,
    },
    /// It is not wanted any more, if it is not here yet.
    Dismissing {
        op: Token,
        why: String,
    },
}

/// Where the VM stands here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    Absent,
    Starting,
    Running,
    Paused {
        io_error: bool,
        retry_at: Option<Instant>,
    },
    Thawing {
        op: Token,
    },
    Unknown {
        op: Option<Token>,
        next_at: Instant,
        since: Instant,
    },
    Saving {
        op: Token,
        saved: SavedState,
    },
    Killing {
        op: Token,
        retry_at: Instant,
    },
    Sending {
        id: MigrationId,
        to: HostName,
        step: SendStep,
    },
    HandedOver(HandedOver),
    Incoming {
        id: MigrationId,
        step: ReceiveStep,
    },
}

/// A graceful stop under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StopProgress {
    hard_at: Instant,
    press_at: Instant,
}

/// What surrounds a machine in one step.
pub(crate) struct Ctx<'a> {
    pub(crate) now: Instant,
    /// Until when the lease is held.
    pub(crate) lease_until: Option<Instant>,
    /// A lease was acknowledged and the replica is as fresh as it says: orders count.
    pub(crate) synced: bool,
    pub(crate) lease_held: bool,
    pub(crate) may_run: bool,
    pub(crate) order: Option<&'a Order>,
    pub(crate) ledger: &'a mut Ledger,
    pub(crate) tokens: &'a mut u64,
    pub(crate) out: &'a mut Vec<Effect>,
}

impl Ctx<'_> {
    pub(crate) fn token(&mut self) -> Token {
        *self.tokens += 1;
        Token(*self.tokens)
    }

    fn record(&mut self, record: LedgerRecord) {
        self.ledger.apply(&record);
        self.out.push(Effect::Ledger(record));
    }
}

/// The machine.
#[derive(Debug, Clone)]
pub(crate) struct VmMachine {
    vm: VmName,
    stage: Stage,
    since: Instant,
    /// Of the process here, or of the last one.
    epoch: Epoch,
    run: Token,
    ready: bool,
    /// The process whose readiness is being probed.
    probing: Option<Token>,
    /// The guard froze it, and it was not thawed since.
    frozen: bool,
    /// Something happened to the process during a start, a thaw or a sending: what their end says of its
    /// state may be outdated.
    noticed: bool,
    started_at: Instant,
    crashes: u32,
    restarts: u32,
    retry_at: Option<Instant>,
    /// The memory of the present epoch was given to a start that was not even tried.
    restore_unspent: bool,
    /// The present start was given the saved memory.
    restoring: bool,
    /// The last start or thaw, and until when it may be carried out.
    leave: Option<(Token, Instant)>,
    thaw_failures: u32,
    error: Option<String>,
    guest_shutdown: bool,
    migration: Option<MigrationReport>,
    stop: Option<StopProgress>,
    save_at: Option<Instant>,
    /// Failed saves under the present order.
    save_failures: u32,
    /// The epoch is to be closed when the process is gone; why.
    doomed: Option<String>,
    saved: Option<SavedState>,
    /// A source waits for the address.
    asking: Option<AskToken>,
    /// What the source said of the guest's readiness.
    carried_ready: bool,
    dirty: bool,
    moves: u64,
}

impl VmMachine {
    pub(crate) fn new(vm: VmName, now: Instant) -> Self {
        Self {
            vm,
            stage: Stage::Absent,
            since: now,
            epoch: Epoch(0),
            run: Token(0),
            ready: false,
            probing: None,
            frozen: false,
            noticed: false,
            started_at: now,
            crashes: 0,
            restarts: 0,
            retry_at: None,
            restore_unspent: false,
            restoring: false,
            leave: None,
            thaw_failures: 0,
            error: None,
            guest_shutdown: false,
            migration: None,
            stop: None,
            save_at: None,
            save_failures: 0,
            doomed: None,
            saved: None,
            asking: None,
            carried_ready: false,
            dirty: true,
            moves: 0,
        }
    }

    /// Whether a process exists, or may.
    pub(crate) fn has_process(&self) -> bool {
        self.stage != Stage::Absent
    }

    /// Whether the report has changed since the last time this was asked.
    pub(crate) fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    fn entry(&self, cx: &Ctx<'_>) -> LedgerEntry {
        cx.ledger.get(&self.vm).cloned().unwrap_or_default()
    }

    fn set(&mut self, cx: &Ctx<'_>, stage: Stage) {
        let before = self.phase();
        self.stage = stage;
        if self.phase() != before {
            self.since = cx.now;
        }
        self.dirty = true;
        self.moves += 1;
    }

    /// Until when the start or thaw with this token may be carried out.
    pub(crate) fn leave_until(&self, token: Token) -> Option<Instant> {
        self.leave
            .filter(|(mine, _)| *mine == token)
            .map(|(_, until)| until)
    }

    fn act(&mut self, cx: &mut Ctx<'_>, act: Act) -> Token {
        let token = cx.token();
        if matches!(act, Act::Start { .. } | Act::Prepare { .. } | Act::Thaw) {
            self.leave = cx.lease_until.map(|until| (token, until));
        }
        cx.out.push(Effect::Guest {
            vm: self.vm.clone(),
            token,
            run: self.run,
            act,
        });
        token
    }

    /// The order is not to save it, or not any more.
    fn forget_save(&mut self) {
        self.save_at = None;
        self.dirty |= self.save_failures > 0;
        self.save_failures = 0;
    }

    fn set_error(&mut self, text: impl Into<String>) {
        self.error = Some(text.into());
        self.dirty = true;
    }

    /// Ends the process; `doom` says why its epoch is closed afterwards.
    fn kill(&mut self, cx: &mut Ctx<'_>, doom: Option<String>) {
        if let Some(why) = doom {
            self.doomed.get_or_insert(why);
        }
        self.answer_ask(cx, Err("the target has given up".into()));
        let op = self.act(cx, Act::Kill);
        let retry_at = cx.now.plus(KILL_AGAIN);
        self.set(cx, Stage::Killing { op, retry_at });
    }

    /// Closes an epoch whose process is gone, or never was.
    fn close(&mut self, cx: &mut Ctx<'_>, epoch: Epoch, why: String) {
        let saved = self.saved.take();
        cx.record(LedgerRecord::Closed {
            vm: self.vm.clone(),
            epoch,
            saved,
            why,
        });
        self.act(cx, Act::Clean);
        self.doomed = None;
        self.retry_at = None;
        self.stop = None;
        self.dirty = true;
        self.moves += 1;
    }

    fn note_migration(&mut self, id: MigrationId, outcome: MigrationOutcome, reason: Option<&str>) {
        let before = self.migration.take().filter(|report| report.id == id);
        let mut report = before.unwrap_or(MigrationReport {
            id,
            outcome,
            transferred: Default::default(),
            remaining: Default::default(),
            downtime_ms: None,
            switchover: false,
            reason: None,
        });
        report.outcome = outcome;
        if let Some(reason) = reason {
            report.reason = Some(reason.to_owned());
        }
        self.migration = Some(report);
        self.dirty = true;
    }

    fn answer_ask(&mut self, cx: &mut Ctx<'_>, result: Result<String, String>) {
        if let Some(ask) = self.asking.take() {
            cx.out.push(Effect::Answer { ask, result });
        }
    }

    /// When time alone changes something.
    pub(crate) fn next_wakeup(&self) -> Option<Instant> {
        let stage = match &self.stage {
            Stage::Absent => self.retry_at,
            Stage::Paused { retry_at, .. } => *retry_at,
            Stage::Unknown { next_at, .. } => Some(*next_at),
            Stage::Killing { retry_at, .. } => Some(*retry_at),
            Stage::Sending {
                step:
                    SendStep::Ask {
                        op,
                        next_at,
                        give_up_at,
                        ..
                    },
                ..
            } => Some(if op.is_some() { *give_up_at } else { *next_at }),
            Stage::Sending {
                step:
                    SendStep::Stream {
                        cancelling: false,
                        catching_up,
                        ..
                    },
                ..
            } => *catching_up,
            Stage::HandedOver(over) => {
                let ask = (!over.sent || over.returned_at.is_some()) && !over.never_ran;
                let end = over.returned_at.map(|at| at.plus(RETURN_GRACE));
                let next = (ask && over.ask.is_none()).then_some(over.ask_at);
                [end, next].into_iter().flatten().min()
            }
            _ => None,
        };
        let stop = self.stop.map(|stop| stop.hard_at.min(stop.press_at));
        [stage, stop, self.save_at].into_iter().flatten().min()
    }
}

/// The wait before the n-th restart in a row.
fn back_off(crashes: u32) -> Millis {
    match crashes {
        0 => Millis(0),
        n => Millis::secs((1 << (n - 1).min(6)).min(60)),
    }
}
