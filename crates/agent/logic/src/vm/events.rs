//! Answers and events of one guest. Each either changes the stage or is stale.

use super::*;
use crate::input::{Exit, GuestEvent};
use crate::ledger::LedgerRecord;
use quorate_types::report::SAVE_TRIES;

impl VmMachine {
    pub(crate) fn on_event(&mut self, cx: &mut Ctx<'_>, token: Token, event: GuestEvent) {
        match event {
            GuestEvent::Started
            | GuestEvent::StartFailed { .. }
            | GuestEvent::Noticed
            | GuestEvent::IoError { .. }
            | GuestEvent::Ready
            | GuestEvent::Exited(_)
            | GuestEvent::Listening { .. }
            | GuestEvent::Arrived { .. }
            | GuestEvent::ArrivalFailed { .. } => {
                if token == self.run && self.has_process() {
                    self.on_process_event(cx, event);
                }
            }
            GuestEvent::TargetReady { address } => self.target_ready(cx, token, address),
            GuestEvent::TargetNotReady { detail } => self.target_not_ready(cx, token, detail),
            GuestEvent::TargetSaid(says) => self.target_said(cx, token, says),
            GuestEvent::Progress {
                transferred,
                remaining,
            } => self.on_progress(token, transferred, remaining),
            GuestEvent::PreSwitchover => self.pre_switchover(cx, token),
            GuestEvent::SendCompleted { downtime_ms } => {
                self.send_completed(cx, token, downtime_ms);
            }
            GuestEvent::SendFailed {
                detail,
                begun,
                observed,
            } => self.send_failed(cx, token, &detail, begun, observed),
            other => self.on_answer(cx, token, other),
        }
    }

    fn on_process_event(&mut self, cx: &mut Ctx<'_>, event: GuestEvent) {
        match (event, &self.stage) {
            (GuestEvent::Started, Stage::Starting) => self.on_started(cx),
            (GuestEvent::StartFailed { detail, refused }, Stage::Starting) => {
                self.on_start_failed(cx, detail, refused);
            }
            (
                GuestEvent::StartFailed { detail, .. },
                Stage::Incoming { .. } | Stage::Killing { .. },
            ) => {
                // No process is left.
                let exit = Exit {
                    by_guest: false,
                    by_guard: false,
                    ran: false,
                    detail,
                };
                self.on_exited(cx, exit);
            }
            // Not a change that anybody sees: the phase stays. An earlier answer is too old now.
            (GuestEvent::Noticed, Stage::Running | Stage::Unknown { .. }) => {
                let since = match self.stage {
                    Stage::Unknown { since, .. } => since,
                    _ => cx.now,
                };
                let op = Some(self.act(cx, Act::Query));
                let next_at = cx.now.plus(QUERY_AGAIN);
                self.stage = Stage::Unknown { op, next_at, since };
            }
            (
                GuestEvent::Noticed | GuestEvent::IoError { .. },
                Stage::Starting | Stage::Thawing { .. } | Stage::Sending { .. },
            ) => self.noticed = true,
            (GuestEvent::IoError { detail }, Stage::Running | Stage::Unknown { .. }) => {
                self.set_error(detail);
                self.pause_io(cx);
            }
            (GuestEvent::Ready, _) if !self.ready => {
                self.ready = true;
                self.dirty = true;
                let (vm, epoch) = (self.vm.clone(), self.epoch);
                cx.record(LedgerRecord::Ready { vm, epoch });
            }
            (GuestEvent::Exited(exit), _) => self.on_exited(cx, exit),
            (GuestEvent::Listening { address }, Stage::Incoming { id, .. }) => {
                let id = *id;
                self.answer_ask(cx, Ok(address.clone()));
                let step = ReceiveStep::Listening { address };
                self.set(cx, Stage::Incoming { id, step });
            }
            // It is paused by now, or will be; the answer tells.
            (
                GuestEvent::Arrived { .. },
                Stage::Incoming {
                    step: ReceiveStep::Dismissing { .. },
                    ..
                },
            ) => {}
            (GuestEvent::Arrived { running }, Stage::Incoming { id, .. }) => {
                let observed = if running {
                    Observed::Running
                } else {
                    Observed::Paused
                };
                self.arrived(cx, *id, observed);
            }
            (GuestEvent::ArrivalFailed { detail }, Stage::Incoming { .. }) => {
                self.kill(cx, Some(detail));
            }
            _ => {}
        }
    }

    fn on_started(&mut self, cx: &mut Ctx<'_>) {
        self.started_at = cx.now;
        self.retry_at = None;
        self.guest_shutdown = false;
        if self.crashes == 0 {
            self.error = None;
        }
        let noticed = std::mem::take(&mut self.noticed);
        let state = if noticed {
            Observed::Unknown
        } else {
            Observed::Running
        };
        self.observed(cx, state);
    }

    fn on_start_failed(&mut self, cx: &mut Ctx<'_>, detail: String, refused: bool) {
        self.set_error(detail);
        if refused {
            // Only what this very start was given: an earlier one may have used it.
            self.restore_unspent = self.restoring;
            self.retry_at = Some(cx.now.plus(REFUSED_AGAIN));
        } else {
            self.retry_at = Some(cx.now.plus(back_off(self.crashes.max(1))));
            self.crashes = self.crashes.saturating_add(1);
        }
        self.gone(cx);
    }

    /// No process is left.
    fn gone(&mut self, cx: &mut Ctx<'_>) {
        self.ready = false;
        self.frozen = false;
        self.set(cx, Stage::Absent);
    }

    fn on_exited(&mut self, cx: &mut Ctx<'_>, exit: Exit) {
        let stage = std::mem::replace(&mut self.stage, Stage::Absent);
        self.answer_ask(cx, Err("its process has ended".into()));
        let entry = self.entry(cx);
        if let Some(id) = entry
            .pending_incoming()
            .filter(|_| entry.told == self.epoch)
        {
            if exit.ran {
                // It ran here: its disks are newer than the source's memory.
                self.ready = false;
                self.note_migration(id, MigrationOutcome::Arrived, None);
                let (vm, epoch) = (self.vm.clone(), self.epoch);
                cx.record(LedgerRecord::Arrived { vm, id, epoch });
            } else {
                let why = self.doomed.take().unwrap_or(exit.detail);
                self.gone(cx);
                return self.refuse(cx, self.epoch, id, why);
            }
        }
        if let Some(why) = self.doomed.take() {
            self.gone(cx);
            let epoch = self.epoch;
            return self.close(cx, epoch, why);
        }
        match stage {
            Stage::Sending { id, step, .. } => match step {
                SendStep::Switching { .. } => {
                    let why = "the source's process ended during the switchover";
                    self.note_migration(id, MigrationOutcome::InProgress, Some(why));
                    self.set_error(format!("{why}: {}", exit.detail));
                    return self.gone(cx);
                }
                _ => {
                    self.end_send(cx, id, &format!("the guest ended: {}", exit.detail));
                    self.crashed(cx, &exit);
                }
            },
            Stage::HandedOver(_) => self.set_error(exit.detail),
            // Ended by us to be started again; why is known already.
            Stage::Killing { .. } => {
                let why = self.error.take();
                self.crashed(cx, &exit);
                self.error = why.or(self.error.take());
            }
            // An ordered stop: it is closed by the next drive.
            _ if self.stop.is_some() => {}
            _ => self.crashed(cx, &exit),
        }
        self.gone(cx);
    }

    fn crashed(&mut self, cx: &Ctx<'_>, exit: &Exit) {
        self.guest_shutdown = exit.by_guest;
        if exit.by_guard {
            self.retry_at = Some(cx.now);
            return self.set_error("its lease ran out and it could not be frozen: it was ended");
        }
        if cx.now.since(self.started_at) >= STABLE {
            self.crashes = 0;
        }
        self.retry_at = Some(cx.now.plus(back_off(self.crashes)));
        self.crashes = self.crashes.saturating_add(1);
        self.restarts = self.restarts.saturating_add(1);
        self.set_error(exit.detail.clone());
    }

    fn pause_io(&mut self, cx: &Ctx<'_>) {
        let stage = Stage::Paused {
            io_error: true,
            retry_at: Some(cx.now.plus(IO_AGAIN)),
        };
        self.set(cx, stage);
    }

    /// The guard has paused it, confirmed.
    pub(crate) fn on_froze(&mut self, cx: &Ctx<'_>, run: Token) {
        if run != self.run || !self.has_process() {
            return;
        }
        self.frozen = true;
        if matches!(
            self.stage,
            Stage::Running | Stage::Thawing { .. } | Stage::Unknown { .. } | Stage::Paused { .. }
        ) {
            let stage = Stage::Paused {
                io_error: false,
                retry_at: None,
            };
            self.set(cx, stage);
        }
    }

    /// The state of a process that should run is known now.
    pub(super) fn observed(&mut self, cx: &mut Ctx<'_>, observed: Observed) {
        match observed {
            Observed::Running if !self.frozen => self.set(cx, Stage::Running),
            Observed::Running | Observed::Paused => {
                let stage = Stage::Paused {
                    io_error: false,
                    retry_at: None,
                };
                self.set(cx, stage);
            }
            Observed::IoError => self.pause_io(cx),
            Observed::Unknown => {
                let stage = Stage::Unknown {
                    op: None,
                    next_at: cx.now,
                    since: cx.now,
                };
                self.set(cx, stage);
            }
            Observed::InMigrate | Observed::Ended => {
                self.set_error("the guest cannot go on; it was ended and is started again");
                self.kill(cx, None);
            }
        }
    }

    fn on_progress(&mut self, token: Token, transferred: u64, remaining: u64) {
        if let Stage::Sending {
            step: SendStep::Stream { op, .. } | SendStep::Switching { op },
            ..
        } = &self.stage
            && *op == token
            && let Some(report) = &mut self.migration
        {
            report.transferred.0 = transferred;
            report.remaining.0 = remaining;
            self.dirty = true;
        }
    }

    fn on_answer(&mut self, cx: &mut Ctx<'_>, token: Token, event: GuestEvent) {
        match (event, &self.stage) {
            (
                GuestEvent::State(state),
                Stage::Unknown {
                    op: Some(op),
                    since,
                    ..
                },
            ) if *op == token => {
                let since = *since;
                if state == Observed::Unknown {
                    let next_at = cx.now.plus(QUERY_AGAIN);
                    self.stage = Stage::Unknown {
                        op: None,
                        next_at,
                        since,
                    };
                } else {
                    self.observed(cx, state);
                }
            }
            (
                GuestEvent::State(state),
                Stage::Incoming {
                    id,
                    step: ReceiveStep::Adopted { op },
                },
            ) if *op == token => self.on_adopted_incoming(cx, *id, state),
            (
                GuestEvent::State(state),
                Stage::Incoming {
                    id,
                    step: ReceiveStep::Dismissing { op, why },
                },
            ) if *op == token => {
                let (id, why) = (*id, why.clone());
                self.on_dismissed(cx, id, why, state);
            }
            (GuestEvent::KillFailed { detail }, Stage::Killing { op, .. }) if *op == token => {
                self.set_error(detail);
            }
            (GuestEvent::PowerdownFailed { detail }, _) if self.stop.is_some() => {
                self.set_error(format!("{detail}; it was powered off"));
                if let Some(stop) = &mut self.stop {
                    stop.hard_at = cx.now;
                }
                self.moves += 1;
            }
            (GuestEvent::Saved, Stage::Saving { op, saved }) if *op == token => {
                self.saved = Some(saved.clone());
                self.kill(cx, Some("its memory was saved as ordered".into()));
            }
            (GuestEvent::SaveFailed { detail }, Stage::Saving { op, .. }) if *op == token => {
                self.save_failures += 1;
                let n = self.save_failures;
                self.set_error(format!(
                    "its memory could not be saved (attempt {n} of {SAVE_TRIES}): {detail}"
                ));
                let wait = Millis(SAVE_AGAIN.0 << (n - 1).min(SAVE_TRIES));
                self.save_at = (n < SAVE_TRIES).then(|| cx.now.plus(wait));
                self.observed(cx, Observed::Unknown);
            }
            (event, Stage::Thawing { op }) if *op == token => self.on_thaw(cx, event),
            (event, Stage::HandedOver(over)) if over.freeze == Some(token) => {
                self.on_handed_over_freeze(cx, event);
            }
            _ => {}
        }
    }

    fn on_thaw(&mut self, cx: &mut Ctx<'_>, event: GuestEvent) {
        let again = |retry_at| Stage::Paused {
            io_error: false,
            retry_at: Some(retry_at),
        };
        match event {
            GuestEvent::Thawed => {
                self.thaw_failures = 0;
                let noticed = std::mem::take(&mut self.noticed);
                let state = if noticed {
                    Observed::Unknown
                } else {
                    Observed::Running
                };
                self.observed(cx, state);
            }
            GuestEvent::ThawRefused { .. } => {
                self.set(cx, again(cx.now.plus(REFUSED_AGAIN)));
            }
            GuestEvent::DiskLost { detail } => {
                self.set_error(detail.clone());
                self.kill(cx, Some(format!("another process has its disks: {detail}")));
            }
            GuestEvent::DiskRefused { detail } => {
                self.set_error(detail);
                self.pause_io(cx);
            }
            GuestEvent::ThawFailed { detail } => {
                self.set_error(detail);
                self.thaw_failures += 1;
                if self.thaw_failures >= THAW_TRIES {
                    self.kill(cx, None);
                } else {
                    self.set(cx, again(cx.now.plus(QUERY_AGAIN)));
                }
            }
            _ => {}
        }
    }

    fn on_handed_over_freeze(&mut self, cx: &mut Ctx<'_>, event: GuestEvent) {
        if let Stage::HandedOver(over) = &mut self.stage {
            over.freeze = None;
        }
        if let GuestEvent::PauseFailed { detail } = event {
            // It may run while the target runs it: its end is the only certainty.
            self.set_error(detail);
            self.kill(cx, None);
        } else {
            self.moves += 1;
        }
    }
}
