//! Both sides of a live migration.
//!
//! Always holds: the switchover is ordered only under `may_run`, with an order of this very migration that is
//! not cancelled, and after the durable record of it; a target's epoch is closed unless its guest ran.
//!
//! Why a guest that was handed over is sometimes restarted instead of resumed: once the target may have run
//! it, the disks may be newer than this memory. Only the target's own durable word excludes that.

use super::*;
use crate::input::TargetSays;
use crate::ledger::SendStage;
use quorate_state::GuestAbi;
use quorate_types::VmSpec;

impl VmMachine {
    pub(super) fn drive_send(
        &mut self,
        cx: &mut Ctx<'_>,
        entry: &LedgerEntry,
        id: MigrationId,
        to: &HostName,
        cancel: bool,
        spec: &VmSpec,
    ) {
        let begun = entry.send_stage(id) == Some(&SendStage::Begun);
        match &mut self.stage {
            // The source's copy is gone, and the target may have the guest: it waits for the cluster.
            Stage::Absent if begun => {}
            Stage::Absent => self.end_send(cx, id, "the guest does not run on the source"),
            Stage::Running if begun => self.suspect(cx, entry),
            Stage::Running if cancel => self.end_send(cx, id, "it was cancelled"),
            Stage::Running => {
                self.watch_ready(cx, spec);
                if cx.may_run {
                    self.note_migration(id, MigrationOutcome::InProgress, None);
                    let step = SendStep::Ask {
                        op: None,
                        next_at: cx.now,
                        give_up_at: cx.now.plus(ASK_GIVE_UP),
                        last: "it was not asked yet".into(),
                    };
                    let to = to.clone();
                    self.noticed = false;
                    self.set(cx, Stage::Sending { id, to, step });
                }
            }
            Stage::Paused { .. } if begun => self.suspect(cx, entry),
            Stage::Paused { .. } => self.drive_run(cx, spec),
            Stage::Sending { id: mine, .. } if *mine != id => {
                self.give_up_send(cx, "another migration has taken its place");
            }
            Stage::Sending { .. } => self.drive_sending(cx, cancel),
            Stage::HandedOver(over) if over.id == id => {
                over.to = Some(to.clone());
                self.drive_handed_over(cx);
            }
            Stage::HandedOver(_) => self.drive_return(cx),
            _ => {}
        }
    }

    /// The ledger says that the switchover was begun, and yet this copy looks as if it were ours: it
    /// is treated as handed over.
    fn suspect(&mut self, cx: &mut Ctx<'_>, entry: &LedgerEntry) {
        if let Some(send) = entry.begun() {
            let (id, to) = (send.id, send.to.clone());
            self.hand_over(cx, id, to, false);
            self.freeze_handed_over(cx);
        }
    }

    fn drive_sending(&mut self, cx: &mut Ctx<'_>, cancel: bool) {
        if cancel {
            return self.cancel_send(cx, "it was cancelled");
        }
        if !cx.lease_held {
            return self.cancel_send(cx, "the lease of the source ran out");
        }
        if let Stage::Sending {
            step:
                SendStep::Stream {
                    op,
                    catching_up: Some(_),
                    ..
                },
            ..
        } = self.stage
        {
            return self.pre_switchover(cx, op);
        }
        let (now, ready) = (cx.now, self.ready);
        let Stage::Sending {
            id,
            to,
            step:
                SendStep::Ask {
                    op,
                    next_at,
                    give_up_at,
                    last,
                },
        } = &mut self.stage
        else {
            return;
        };
        if now >= *give_up_at {
            let why = format!("the target {to} did not get ready within {ASK_GIVE_UP}: {last}");
            let id = *id;
            self.end_send(cx, id, &why);
        } else if op.is_none() && now >= *next_at {
            let token = cx.token();
            *op = Some(token);
            cx.out.push(Effect::AskTarget {
                vm: self.vm.clone(),
                token,
                to: to.clone(),
                id: *id,
                ready,
            });
        }
    }

    /// Gives the sending up, unless its switchover was ordered.
    pub(super) fn cancel_send(&mut self, cx: &mut Ctx<'_>, why: &str) {
        let Stage::Sending { id, step, .. } = &mut self.stage else {
            return;
        };
        let id = *id;
        match step {
            SendStep::Ask { .. } => self.end_send(cx, id, why),
            SendStep::Stream { cancelling, .. } if !*cancelling => {
                *cancelling = true;
                self.note_migration(id, MigrationOutcome::InProgress, Some(why));
                self.act(cx, Act::Cancel);
            }
            SendStep::Stream { .. } | SendStep::Switching { .. } => {}
        }
    }

    /// The cluster has given this migration up: the VM is this host's again. After the switchover was
    /// ordered it is treated as handed over, even while QEMU still waits for a target that is dead.
    pub(super) fn give_up_send(&mut self, cx: &mut Ctx<'_>, why: &str) {
        let Stage::Sending {
            id,
            to,
            step: SendStep::Switching { op },
        } = &self.stage
        else {
            return self.cancel_send(cx, why);
        };
        let (id, to, watch) = (*id, Some(to.clone()), *op);
        self.hand_over(cx, id, to, false);
        self.note_migration(id, MigrationOutcome::InProgress, Some(why));
        self.freeze_handed_over(cx);
        // QEMU resumes a source whose migration fails, however late: the driver's word is still wanted.
        if let Stage::HandedOver(over) = &mut self.stage {
            over.watch = Some(watch);
        }
    }

    /// The migration is over on this side and the guest stays: durable, then reported.
    pub(super) fn end_send(&mut self, cx: &mut Ctx<'_>, id: MigrationId, why: &str) {
        cx.record(LedgerRecord::SendFailed {
            vm: self.vm.clone(),
            id,
            why: why.to_owned(),
        });
        self.note_migration(id, MigrationOutcome::Failed, Some(why));
        self.moves += 1;
        if let Stage::Sending { .. } = self.stage {
            let noticed = std::mem::take(&mut self.noticed);
            let state = if noticed {
                Observed::Unknown
            } else {
                Observed::Running
            };
            self.observed(cx, state);
        }
    }

    /// The target's address is known.
    pub(super) fn target_ready(&mut self, cx: &mut Ctx<'_>, token: Token, address: String) {
        let Stage::Sending {
            id,
            to,
            step: SendStep::Ask { op: Some(op), .. },
        } = &self.stage
        else {
            return;
        };
        if *op != token || !cx.lease_held {
            return;
        }
        let (id, to) = (*id, to.clone());
        cx.record(LedgerRecord::Sending {
            vm: self.vm.clone(),
            id,
            to: to.clone(),
        });
        let op = self.act(cx, Act::Send { id, address });
        let step = SendStep::Stream {
            op,
            cancelling: false,
            catching_up: None,
        };
        self.set(cx, Stage::Sending { id, to, step });
    }

    pub(super) fn target_not_ready(&mut self, cx: &Ctx<'_>, token: Token, detail: String) {
        if let Stage::Sending {
            step: SendStep::Ask {
                op, next_at, last, ..
            },
            ..
        } = &mut self.stage
            && *op == Some(token)
        {
            *op = None;
            *next_at = cx.now.plus(ASK_AGAIN);
            *last = detail;
        }
    }

    /// The guest is paused and everything but its last state was sent. A replica that is older than the lease may lack
    /// the end of the order: the guest waits for it, not for long.
    pub(super) fn pre_switchover(&mut self, cx: &mut Ctx<'_>, token: Token) {
        let Stage::Sending {
            id,
            step:
                SendStep::Stream {
                    op,
                    cancelling: false,
                    catching_up,
                },
            ..
        } = &mut self.stage
        else {
            return;
        };
        if *op != token {
            return;
        }
        let id = *id;
        let wanted = matches!(
            cx.order,
            Some(Order::MigrateOut { id: mine, epoch, cancel: false, .. })
                if *mine == id && *epoch == self.epoch
        );
        if !wanted || !cx.lease_held {
            return self.cancel_send(cx, "the lease or the order of the source has ended");
        }
        if !cx.may_run {
            let give_up_at = *catching_up.get_or_insert(cx.now.plus(CATCH_UP_WITHIN));
            if cx.now >= give_up_at {
                let why = format!(
                    "this host did not hear for {CATCH_UP_WITHIN} what the cluster had decided meanwhile, while the guest stood still for \
                     its switchover; it goes on here and can be moved again when the host keeps up"
                );
                self.cancel_send(cx, &why);
            }
            return;
        }
        self.switch_over(cx, id, token);
    }

    /// Orders the switchover, after the durable record of it.
    fn switch_over(&mut self, cx: &mut Ctx<'_>, id: MigrationId, token: Token) {
        let Stage::Sending { to, .. } = &self.stage else {
            return;
        };
        let (vm, to) = (self.vm.clone(), to.clone());
        cx.record(LedgerRecord::SwitchoverBegun { vm, id });
        self.act(cx, Act::Continue { send: token });
        let step = SendStep::Switching { op: token };
        self.set(cx, Stage::Sending { id, to, step });
    }

    pub(super) fn send_completed(&mut self, cx: &mut Ctx<'_>, token: Token, downtime_ms: u64) {
        let (id, to) = match &self.stage {
            Stage::Sending {
                id,
                to,
                step: SendStep::Stream { op, .. } | SendStep::Switching { op },
            } if *op == token => (*id, Some(to.clone())),
            Stage::HandedOver(over) if over.watch == Some(token) => (over.id, over.to.clone()),
            _ => return,
        };
        if self.entry(cx).send_stage(id) != Some(&SendStage::Begun) {
            let vm = self.vm.clone();
            cx.record(LedgerRecord::SwitchoverBegun { vm, id });
        }
        self.hand_over(cx, id, to, true);
        if let Some(report) = &mut self.migration {
            report.downtime_ms = Some(downtime_ms);
        }
    }

    pub(super) fn send_failed(
        &mut self,
        cx: &mut Ctx<'_>,
        token: Token,
        detail: &str,
        begun: bool,
        observed: Observed,
    ) {
        let (id, to) = match &self.stage {
            Stage::Sending {
                id,
                to,
                step: SendStep::Stream { op, .. } | SendStep::Switching { op },
            } if *op == token => (*id, Some(to.clone())),
            Stage::HandedOver(over) if over.watch == Some(token) => (over.id, over.to.clone()),
            _ => return,
        };
        let watched = matches!(self.stage, Stage::HandedOver(_));
        if begun || watched {
            if self.entry(cx).send_stage(id) != Some(&SendStage::Begun) {
                let vm = self.vm.clone();
                cx.record(LedgerRecord::SwitchoverBegun { vm, id });
            }
            self.hand_over(cx, id, to, false);
            self.note_migration(id, MigrationOutcome::InProgress, Some(detail));
            self.set_error(format!(
                "migration {id} broke during its switchover ({detail}); it stays paused until it is certain that the target does not run it"
            ));
            // QEMU resumes a source whose migration fails.
            return self.freeze_handed_over(cx);
        }
        let why = match &self.migration {
            Some(report) if report.id == id && report.reason.is_some() => {
                report.reason.clone().unwrap_or_default()
            }
            _ => detail.to_owned(),
        };
        self.end_send(cx, id, &why);
        self.observed(cx, observed);
    }

    pub(super) fn hand_over(
        &mut self,
        cx: &Ctx<'_>,
        id: MigrationId,
        to: Option<HostName>,
        sent: bool,
    ) {
        let outcome = if sent {
            MigrationOutcome::Sent
        } else {
            MigrationOutcome::InProgress
        };
        self.note_migration(id, outcome, None);
        let over = HandedOver {
            id,
            to,
            sent,
            watch: None,
            freeze: None,
            ask: None,
            ask_at: cx.now,
            never_ran: false,
            returned_at: None,
        };
        self.set(cx, Stage::HandedOver(over));
    }

    pub(super) fn freeze_handed_over(&mut self, cx: &mut Ctx<'_>) {
        let op = self.act(cx, Act::Freeze);
        if let Stage::HandedOver(over) = &mut self.stage {
            over.freeze = Some(op);
        }
    }

    /// Stays paused; meanwhile a broken switchover is asked about.
    fn drive_handed_over(&mut self, cx: &mut Ctx<'_>) {
        let now = cx.now;
        let Stage::HandedOver(over) = &mut self.stage else {
            return;
        };
        let useful = (!over.sent || over.returned_at.is_some()) && !over.never_ran;
        // As long as the driver watches it, its word comes first; but not for ever.
        let watched = over.watch.is_some() && over.returned_at.is_none();
        if !useful || watched || over.ask.is_some() || now < over.ask_at {
            return;
        }
        if let Some(to) = &over.to {
            let token = cx.token();
            over.ask = Some(token);
            cx.out.push(Effect::AskOutcome {
                vm: self.vm.clone(),
                token,
                to: to.clone(),
                id: over.id,
            });
        }
    }

    pub(super) fn target_said(&mut self, cx: &Ctx<'_>, token: Token, says: TargetSays) {
        if let Stage::HandedOver(over) = &mut self.stage
            && over.ask == Some(token)
        {
            over.ask = None;
            over.ask_at = cx.now.plus(Millis(ASK_AGAIN.0 * 2));
            over.never_ran |= says == TargetSays::NeverRan;
        }
    }

    /// Ownership came back to this host by commit.
    pub(super) fn drive_return(&mut self, cx: &mut Ctx<'_>) {
        let now = cx.now;
        let Stage::HandedOver(over) = &mut self.stage else {
            return;
        };
        let returned_at = *over.returned_at.get_or_insert(now);
        if over.freeze.is_some() {
            return; // it must be paused, confirmed, before anything else is decided
        }
        if over.never_ran {
            if cx.may_run {
                let (vm, id) = (self.vm.clone(), over.id);
                let why = "the target did not take the guest; it goes on at the source";
                cx.record(LedgerRecord::SendFailed {
                    vm,
                    id,
                    why: why.into(),
                });
                self.note_migration(id, MigrationOutcome::Failed, Some(why));
                self.thaw(cx);
            }
        } else if now >= returned_at.plus(RETURN_GRACE) {
            self.set_error(
                "the target of its migration may have run it for a moment, so its memory here may be older than its disks: it was restarted",
            );
            self.kill(cx, None);
        } else {
            self.drive_handed_over(cx);
        }
    }

    #[allow(clippy::too_many_arguments)] // the fields of one order
    pub(super) fn drive_receive(
        &mut self,
        cx: &mut Ctx<'_>,
        entry: &LedgerEntry,
        epoch: Epoch,
        id: MigrationId,
        cancel: bool,
        spec: &VmSpec,
        abi: &GuestAbi,
    ) {
        let told = entry.told == epoch;
        match &self.stage {
            // Its epoch is closed, but nobody can say that it never ran under it.
            Stage::Absent if told && entry.unseen == Some(id) => {
                self.close(cx, epoch, adopt::UNSEEN.to_owned());
            }
            Stage::Absent if told => {
                let why = "the process that waited for the guest is gone";
                self.refuse(cx, epoch, id, why.into());
            }
            Stage::Absent if cancel || cx.may_run => {
                cx.record(LedgerRecord::Told {
                    vm: self.vm.clone(),
                    epoch,
                    migration: Some(id),
                });
                self.begin_process(cx, epoch);
                if cancel {
                    return self.refuse(cx, epoch, id, "it was cancelled".into());
                }
                self.crashes = 0;
                self.restarts = 0;
                self.retry_at = None;
                self.carried_ready = false;
                self.note_migration(id, MigrationOutcome::InProgress, None);
                let act = Act::Prepare {
                    id,
                    epoch,
                    spec: Box::new(spec.clone()),
                    abi: abi.clone(),
                };
                self.run = self.act(cx, act);
                let step = ReceiveStep::Preparing;
                self.set(cx, Stage::Incoming { id, step });
            }
            Stage::Incoming { id, step } if cancel => match step {
                // Nothing can have arrived.
                ReceiveStep::Preparing => self.kill(cx, Some("it was cancelled".into())),
                ReceiveStep::Dismissing { .. } | ReceiveStep::Adopted { .. } => {}
                ReceiveStep::Listening { .. } => self.dismiss(cx, *id, "it was cancelled"),
            },
            // It arrived while it was being dismissed.
            Stage::Paused { .. } if entry.arrived == Some(id) => self.drive_run(cx, spec),
            _ => {}
        }
    }

    /// A guest that is awaited is not wanted any more. It may arrive at this very moment, and then it stays: its memory is
    /// here, and the source's is older than its disks as soon as it has run.
    pub(super) fn dismiss(&mut self, cx: &mut Ctx<'_>, id: MigrationId, why: &str) {
        self.answer_ask(cx, Err("the target has given up".into()));
        let op = self.act(cx, Act::Dismiss);
        let why = why.to_owned();
        let step = ReceiveStep::Dismissing { op, why };
        self.set(cx, Stage::Incoming { id, step });
    }

    pub(super) fn on_dismissed(
        &mut self,
        cx: &mut Ctx<'_>,
        id: MigrationId,
        why: String,
        state: Observed,
    ) {
        match state {
            Observed::InMigrate | Observed::Unknown | Observed::Ended => self.kill(cx, Some(why)),
            _ => {
                self.act(cx, Act::Open);
                self.arrived(cx, id, state);
            }
        }
    }

    /// The guest will never run here under this migration: durable, then reported.
    pub(super) fn refuse(&mut self, cx: &mut Ctx<'_>, epoch: Epoch, id: MigrationId, why: String) {
        self.answer_ask(cx, Err(why.clone()));
        self.note_migration(id, MigrationOutcome::Failed, Some(&why));
        self.close(cx, epoch, why);
    }

    /// The guest is here.
    pub(super) fn arrived(&mut self, cx: &mut Ctx<'_>, id: MigrationId, observed: Observed) {
        let vm = self.vm.clone();
        let epoch = self.epoch;
        cx.record(LedgerRecord::Arrived {
            vm: vm.clone(),
            id,
            epoch,
        });
        self.doomed = None;
        self.started_at = cx.now;
        self.note_migration(id, MigrationOutcome::Arrived, None);
        self.ready = self.carried_ready;
        if self.ready {
            cx.record(LedgerRecord::Ready { vm, epoch });
        }
        self.observed(cx, observed);
    }

    pub(crate) fn peer_incoming(
        &mut self,
        cx: &mut Ctx<'_>,
        ask: AskToken,
        id: MigrationId,
        ready: bool,
    ) {
        self.answer_ask(cx, Err("asked again meanwhile".into()));
        self.asking = Some(ask);
        match &self.stage {
            Stage::Incoming { id: mine, step } if *mine == id => {
                self.carried_ready = ready;
                match step {
                    ReceiveStep::Listening { address } => {
                        let address = address.clone();
                        self.answer_ask(cx, Ok(address));
                    }
                    ReceiveStep::Preparing => {}
                    ReceiveStep::Dismissing { why, .. } => {
                        let why = why.clone();
                        self.answer_ask(cx, Err(why));
                    }
                    ReceiveStep::Adopted { .. } => {
                        self.answer_ask(cx, Err("the target's agent was restarted".into()));
                    }
                }
            }
            _ => {
                let entry = self.entry(cx);
                let why = if entry.incoming == Some(id) && entry.closed >= entry.told {
                    entry.closed_why.unwrap_or_default()
                } else if !cx.may_run {
                    "the target has no lease now".into()
                } else {
                    "the target has not been told of this migration yet".into()
                };
                self.answer_ask(cx, Err(why));
            }
        }
    }
}

/// What this host knows for certain about a guest that was sent to it.
pub(crate) fn outcome_here(entry: Option<&LedgerEntry>, id: MigrationId) -> TargetSays {
    match entry {
        Some(entry) if entry.arrived == Some(id) => TargetSays::Arrived,
        Some(entry) if entry.unseen == Some(id) => TargetSays::Unknown,
        Some(entry) if entry.incoming == Some(id) && entry.closed >= entry.told => {
            TargetSays::NeverRan
        }
        _ => TargetSays::Unknown,
    }
}
