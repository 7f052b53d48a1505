//! Taking charge of a process that outlived the agent.
//!
//! Always holds: nothing here resumes a guest. What must not wait for a lease (a copy that was handed
//! over and runs) is done at once; everything else waits for fresh orders.

use super::*;
use crate::input::{Adopted, Observed, ObservedMigration};
use crate::ledger::SendStage;

/// Said of a guest whose process ended while no agent watched it.
pub(super) const UNSEEN: &str =
    "the process that waited for the guest ended unseen: the guest may have run in it";

impl VmMachine {
    pub(crate) fn adopt(&mut self, cx: &mut Ctx<'_>, adopted: &Adopted) {
        let entry = self.entry(cx);
        self.run = adopted.run;
        self.epoch = entry.told;
        self.ready = entry.told.0 > 0 && entry.ready == entry.told;
        self.recall(&entry);
        if let Some(id) = entry.pending_incoming() {
            return self.adopt_incoming(cx, id, adopted.observed);
        }
        if let Some(send) = &entry.send {
            let (id, to) = (send.id, send.to.clone());
            match (&send.stage, adopted.migration) {
                (SendStage::Begun, migration) => {
                    return self.adopt_handed_over(cx, id, to, migration, adopted.observed);
                }
                (
                    SendStage::Sending,
                    migration @ (ObservedMigration::SwitchingOver | ObservedMigration::Completed),
                ) => {
                    let vm = self.vm.clone();
                    cx.record(LedgerRecord::SwitchoverBegun { vm, id });
                    return self.adopt_handed_over(cx, id, to, migration, adopted.observed);
                }
                (SendStage::Sending, ObservedMigration::UnderWay) => {
                    self.act(cx, Act::Cancel);
                    self.end_send(cx, id, "the source's agent was restarted");
                    // QEMU resumes it when it has cancelled: ask, and ask again.
                    return self.observed(cx, Observed::Unknown);
                }
                (SendStage::Sending, ObservedMigration::None) => {
                    self.end_send(cx, id, "the source's agent was restarted");
                }
                (SendStage::Over(_), ObservedMigration::UnderWay) => {
                    self.act(cx, Act::Cancel);
                    return self.observed(cx, Observed::Unknown);
                }
                (SendStage::Over(_), _) => {}
            }
        }
        // A process that never became a guest, or was a guest once, is made anew.
        self.observed(cx, adopted.observed);
    }

    /// What the ledger still knows for the report, also of a VM without a process.
    pub(crate) fn recall(&mut self, entry: &LedgerEntry) {
        self.epoch = entry.told;
        if let Some(id) = entry.incoming {
            if entry.arrived == Some(id) {
                self.note_migration(id, MigrationOutcome::Arrived, None);
            } else if entry.unseen == Some(id) {
                // Not `Failed`: that would promise that the guest never ran here.
                self.note_migration(id, MigrationOutcome::InProgress, Some(UNSEEN));
            } else if entry.closed >= entry.told {
                let why = entry.closed_why.as_deref();
                self.note_migration(id, MigrationOutcome::Failed, why);
            } else {
                self.note_migration(id, MigrationOutcome::InProgress, None);
            }
        }
        if let Some(send) = &entry.send {
            match &send.stage {
                SendStage::Over(why) => {
                    self.note_migration(send.id, MigrationOutcome::Failed, Some(why));
                }
                _ => self.note_migration(send.id, MigrationOutcome::InProgress, None),
            }
        }
    }

    /// A VM of the ledger without a process.
    pub(crate) fn recall_absent(&mut self, cx: &mut Ctx<'_>) {
        let entry = self.entry(cx);
        if let Some(id) = entry.pending_incoming() {
            let vm = self.vm.clone();
            cx.record(LedgerRecord::ArrivalUnknown { vm, id });
        }
        let entry = self.entry(cx);
        self.recall(&entry);
        if let Some(send) = &entry.send
            && send.stage == SendStage::Sending
        {
            self.end_send(cx, send.id, "the guest ended while the agent was away");
        }
    }

    fn adopt_incoming(&mut self, cx: &mut Ctx<'_>, id: MigrationId, observed: Observed) {
        // Known for certain only by a question that is asked from now on; see `on_adopted_incoming`.
        let _ = observed;
        let op = self.act(cx, Act::Query);
        let step = ReceiveStep::Adopted { op };
        self.set(cx, Stage::Incoming { id, step });
    }

    pub(super) fn on_adopted_incoming(
        &mut self,
        cx: &mut Ctx<'_>,
        id: MigrationId,
        state: Observed,
    ) {
        let why = "the target's agent was restarted before the guest arrived";
        match state {
            // The address and the watch are lost with the earlier agent.
            Observed::InMigrate => self.dismiss(cx, id, why),
            Observed::Unknown | Observed::Ended => self.kill(cx, Some(why.into())),
            _ => {
                // The earlier agent may have ended before it could.
                self.act(cx, Act::Open);
                self.arrived(cx, id, state);
            }
        }
    }

    fn adopt_handed_over(
        &mut self,
        cx: &mut Ctx<'_>,
        id: MigrationId,
        to: Option<HostName>,
        migration: ObservedMigration,
        observed: Observed,
    ) {
        let sent = migration == ObservedMigration::Completed;
        self.hand_over(cx, id, to, sent);
        let under_way = matches!(
            migration,
            ObservedMigration::UnderWay | ObservedMigration::SwitchingOver
        );
        if under_way {
            let op = self.act(cx, Act::Attach);
            if let Stage::HandedOver(over) = &mut self.stage {
                over.watch = Some(op);
            }
        } else if !sent || matches!(observed, Observed::Running | Observed::Unknown) {
            self.freeze_handed_over(cx);
        }
    }
}
