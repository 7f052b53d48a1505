//! One guest in the guard's hands.
//!
//! ```text
//! Running -> Freezing{Stop -> Migration -> (Cancel -> Migration)* -> Disks -> Status} -> Frozen
//!    ^            |                                                     |                  |
//!    |            +----------------- resumed or still running ----------+                  |
//!    +---------------------------- Thawing granted, RESUME seen --------------------------+
//! ```
//! Always holds: `Frozen` needs, in this order and from QEMU itself: `stop` returned, no outgoing migration
//! that could resume the guest, the disks given up, `query-status` not running.

use super::qmp::{Qmp, Said};
use super::sys;
use rustix::fd::{BorrowedFd, OwnedFd};
use serde_json::Value;
use std::path::PathBuf;

const MS: u64 = 1_000_000;
/// Between two questions about a migration that is ending.
const LOOK_AGAIN_NS: u64 = 5 * MS;
/// Between two attempts to connect.
const CONNECT_AGAIN_NS: u64 = 100 * MS;
/// A kill is repeated after this.
const KILL_AGAIN_NS: u64 = 100 * MS;

/// Where the freeze stands: the answer that is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// No connection or no greeting yet.
    Connect,
    Stop,
    Migration,
    Cancel,
    /// Until the next question.
    Pause {
        until_ns: u64,
    },
    Disks,
    Status,
    /// It cannot be frozen for good: it keeps its disks.
    Impossible,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Running,
    Freezing { step: Step, cancelled: bool },
    Frozen,
}

/// What a guest's news mean for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    None,
    /// It is paused, and the agent may resume it with a lease.
    Froze,
}

#[derive(Debug)]
pub(super) struct Guest {
    pub(super) run: u64,
    pub(super) pid: i32,
    pidfd: OwnedFd,
    qmp_path: PathBuf,
    pub(super) freezable: bool,
    /// The agent was allowed to resume it and has not said yet that it is done.
    pub(super) thawing: bool,
    pub(super) state: State,
    /// It was killed by this guard.
    pub(super) killed_at_ns: Option<u64>,
    qmp: Option<Qmp>,
    connect_at_ns: u64,
}

impl Guest {
    pub(super) fn new(run: u64, pid: i32, pidfd: OwnedFd, qmp: PathBuf, freezable: bool) -> Self {
        Self {
            run,
            pid,
            pidfd,
            qmp_path: qmp,
            freezable,
            thawing: false,
            state: State::Running,
            killed_at_ns: None,
            qmp: None,
            connect_at_ns: 0,
        }
    }

    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        use rustix::fd::AsFd;
        self.pidfd.as_fd()
    }

    /// Whether its process is gone.
    pub(super) fn has_ended(&self) -> bool {
        sys::has_ended(&self.pidfd)
    }

    pub(super) fn qmp_fd(&self) -> Option<BorrowedFd<'_>> {
        self.qmp.as_ref().map(Qmp::fd)
    }

    /// Paused and harmless, as far as this process saw itself.
    pub(super) fn is_safe(&self) -> bool {
        self.state == State::Frozen && !self.thawing
    }

    /// Connects if that is due. A guest that cannot be frozen needs no connection.
    pub(super) fn keep_connected(&mut self, now: u64) {
        if self.qmp.is_some() || !self.freezable || now < self.connect_at_ns {
            return;
        }
        self.connect_at_ns = now + CONNECT_AGAIN_NS;
        self.qmp = Qmp::connect(&self.qmp_path).ok();
    }

    fn disconnected(&mut self) {
        self.qmp = None;
        if let State::Freezing { cancelled, .. } = self.state {
            let step = Step::Connect;
            self.state = State::Freezing { step, cancelled };
        }
    }

    /// The lease is about to end: begins, or goes on, to freeze.
    pub(super) fn freeze(&mut self, now: u64) {
        if !self.freezable || self.killed_at_ns.is_some() {
            return;
        }
        match self.state {
            State::Running => {
                self.state = State::Freezing {
                    step: Step::Connect,
                    cancelled: false,
                };
                self.ask(Step::Stop);
            }
            State::Freezing {
                step: Step::Connect,
                ..
            } => self.ask(Step::Stop),
            State::Freezing {
                step: Step::Pause { until_ns },
                ..
            } if now >= until_ns => self.ask(Step::Migration),
            _ => {}
        }
    }

    /// The lease is held again: a freeze that has not reached QEMU is given up; one that has is
    /// completed, so that what is known of the guest stays true.
    pub(super) fn lease_renewed(&mut self) {
        if let State::Freezing {
            step: Step::Connect,
            ..
        } = self.state
        {
            self.state = State::Running;
        }
    }

    /// Whether the agent may resume it, as far as this guest is concerned.
    pub(super) fn thaw_allowed(&self) -> Result<(), &'static str> {
        match self.state {
            State::Running | State::Frozen => Ok(()),
            State::Freezing {
                step: Step::Impossible | Step::Connect,
                ..
            } => Ok(()),
            State::Freezing { .. } => Err("it is just being frozen"),
        }
    }

    pub(super) fn begin_thaw(&mut self) {
        self.state = State::Running;
        self.thawing = true;
    }

    /// Sends the command of a step, when the connection is there.
    fn ask(&mut self, step: Step) {
        let State::Freezing { cancelled, .. } = self.state else {
            return;
        };
        let Some(qmp) = self.qmp.as_mut().filter(|qmp| qmp.is_ready()) else {
            return;
        };
        let sent = match step {
            Step::Stop => qmp.send("stop", "{}"),
            Step::Migration => qmp.send("query-migrate", "{}"),
            Step::Cancel => qmp.send("migrate_cancel", "{}"),
            Step::Disks => qmp.send("blockdev-set-active", "{\"active\":false}"),
            Step::Status => qmp.send("query-status", "{}"),
            Step::Connect | Step::Pause { .. } | Step::Impossible => Ok(()),
        };
        if sent.is_err() {
            return self.disconnected();
        }
        let cancelled = cancelled || step == Step::Cancel;
        self.state = State::Freezing { step, cancelled };
    }

    /// Reads what QEMU said.
    pub(super) fn on_readable(&mut self, now: u64) -> News {
        let mut said = Vec::new();
        let Some(qmp) = &mut self.qmp else {
            return News::None;
        };
        let alive = qmp.read(&mut said).is_ok();
        let mut news = News::None;
        for word in said {
            if self.hear(word, now) == News::Froze {
                news = News::Froze;
            }
        }
        if !alive {
            self.disconnected();
        }
        // Of all the words only the last state counts.
        match self.state {
            State::Frozen
            | State::Freezing {
                step: Step::Impossible,
                ..
            } => news,
            _ => News::None,
        }
    }

    fn hear(&mut self, said: Said, now: u64) -> News {
        if said == Said::Resumed {
            // Whoever resumed it: it runs.
            match &mut self.state {
                State::Frozen => self.state = State::Running,
                State::Freezing { step, .. }
                    if !matches!(step, Step::Connect | Step::Stop | Step::Impossible) =>
                {
                    let until_ns = now;
                    *step = Step::Pause { until_ns };
                    self.state = State::Running;
                    self.freeze(now);
                }
                _ => {}
            }
            return News::None;
        }
        let State::Freezing { step, cancelled } = self.state else {
            return News::None;
        };
        match (step, said) {
            (Step::Connect, Said::Ready) => self.ask(Step::Stop),
            (Step::Stop, Said::Return(_)) => self.ask(Step::Migration),
            (Step::Migration, Said::Return(value)) => self.on_migration(&value, cancelled, now),
            (Step::Cancel, _) => self.pause(now),
            (Step::Disks, Said::Return(_)) => self.ask(Step::Status),
            (Step::Disks, Said::Error(_)) => {
                // Paused, but it keeps its disks: not safe in the hands of another owner.
                let step = Step::Impossible;
                self.state = State::Freezing { step, cancelled };
                return News::Froze;
            }
            (Step::Status, Said::Return(value)) => {
                if value["running"] == Value::Bool(false) {
                    self.state = State::Frozen;
                    return News::Froze;
                }
                self.ask(Step::Stop);
            }
            (_, Said::Error(_)) => self.pause(now),
            _ => {}
        }
        News::None
    }

    fn pause(&mut self, now: u64) {
        if let State::Freezing { step, .. } = &mut self.state {
            *step = Step::Pause {
                until_ns: now + LOOK_AGAIN_NS,
            };
        }
    }

    fn on_migration(&mut self, value: &Value, cancelled: bool, now: u64) {
        match value["status"].as_str() {
            // QEMU resumes a source whose migration was cancelled: stop it once more.
            None | Some("none" | "completed" | "failed" | "cancelled") => {
                if cancelled {
                    if let State::Freezing { cancelled, .. } = &mut self.state {
                        *cancelled = false;
                    }
                    self.ask(Step::Stop);
                } else {
                    self.ask(Step::Disks);
                }
            }
            Some("setup" | "active" | "pre-switchover") if !cancelled => self.ask(Step::Cancel),
            // Switching over, or being cancelled: it ends by itself.
            Some(_) => self.pause(now),
        }
    }

    /// Ends it. Returns whether a signal was sent.
    pub(super) fn kill(&mut self, now: u64) -> bool {
        if self.killed_at_ns.is_some_and(|at| now < at + KILL_AGAIN_NS) {
            return false;
        }
        self.killed_at_ns = Some(now);
        sys::kill(&self.pidfd).is_ok()
    }

    /// When this guest needs attention without news.
    pub(super) fn wakeup_ns(&self) -> Option<u64> {
        let connect = (self.qmp.is_none() && self.freezable).then_some(self.connect_at_ns);
        let step = match self.state {
            State::Freezing {
                step: Step::Pause { until_ns },
                ..
            } => Some(until_ns),
            _ => None,
        };
        let kill = self.killed_at_ns.map(|at| at + KILL_AGAIN_NS);
        [connect, step, kill].into_iter().flatten().min()
    }
}
