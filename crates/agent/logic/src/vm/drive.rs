//! From order and stage to the next act. Level-triggered: called after every input, it does what is
//! missing, and nothing twice.

use super::*;
use quorate_state::{GuestAbi, StopMode};
use quorate_types::VmSpec;
use quorate_types::report::SAVE_TRIES;

/// Rounds of one drive; each changes the stage, and no path is longer.
const ROUNDS: u32 = 8;

/// What an order means for the process that is here.
pub(super) enum Wanted<'o> {
    /// The order is older than what this host was told already: wait for the replica.
    Wait,
    /// No process of ours may exist.
    Nothing(&'static str),
    /// It runs; `start` when it may also be made.
    Run {
        spec: &'o VmSpec,
        abi: &'o GuestAbi,
        restore: Option<&'o SavedState>,
        start: bool,
    },
    /// It ends.
    Stop { mode: StopMode, spec: &'o VmSpec },
    /// It goes elsewhere.
    Send {
        id: MigrationId,
        to: &'o HostName,
        cancel: bool,
        spec: &'o VmSpec,
    },
    /// It comes.
    Receive {
        id: MigrationId,
        cancel: bool,
        spec: &'o VmSpec,
        abi: &'o GuestAbi,
    },
}

impl VmMachine {
    pub(super) fn wanted<'o>(&self, order: Option<&'o Order>, entry: &LedgerEntry) -> Wanted<'o> {
        let Some(order) = order else {
            return Wanted::Nothing("this host has no order to run it");
        };
        if order.epoch() < entry.told {
            return Wanted::Wait;
        }
        if order.epoch() <= entry.closed {
            return Wanted::Nothing("its epoch is closed here");
        }
        if self.has_process() && self.epoch < order.epoch() {
            return Wanted::Nothing("its epoch has passed");
        }
        match order {
            Order::Run {
                spec, abi, restore, ..
            } => Wanted::Run {
                spec,
                abi,
                restore: restore.as_ref(),
                start: true,
            },
            Order::Stop { mode, spec, .. } => Wanted::Stop { mode: *mode, spec },
            Order::MigrateOut {
                id,
                to,
                cancel,
                spec,
                abi,
                ..
            } => match entry.send_stage(*id) {
                Some(crate::ledger::SendStage::Over(_)) => Wanted::Run {
                    spec,
                    abi,
                    restore: None,
                    start: true,
                },
                _ => Wanted::Send {
                    id: *id,
                    to,
                    cancel: *cancel,
                    spec,
                },
            },
            Order::MigrateIn {
                id,
                cancel,
                spec,
                abi,
                ..
            } if entry.arrived != Some(*id) => Wanted::Receive {
                id: *id,
                cancel: *cancel,
                spec,
                abi,
            },
            // Arrived, not yet committed: it goes on, but is not made anew.
            Order::MigrateIn { spec, abi, .. } => Wanted::Run {
                spec,
                abi,
                restore: None,
                start: false,
            },
        }
    }

    /// Does what is missing.
    pub(crate) fn drive(&mut self, cx: &mut Ctx<'_>) {
        for _ in 0..ROUNDS {
            let before = self.moves;
            self.drive_once(cx);
            if self.moves == before {
                return;
            }
        }
    }

    fn drive_once(&mut self, cx: &mut Ctx<'_>) {
        self.without_orders(cx);
        if !cx.synced {
            return;
        }
        let entry = self.entry(cx);
        let order = cx.order;
        match self.wanted(order, &entry) {
            Wanted::Wait => {}
            Wanted::Nothing(why) => self.drive_nothing(cx, &entry, why),
            Wanted::Run {
                spec,
                abi,
                restore,
                start,
            } => {
                self.stop = None;
                self.forget_save();
                let epoch = order.map_or(Epoch(0), Order::epoch);
                if self.stage == Stage::Absent {
                    if start {
                        self.start(cx, &entry, epoch, spec, abi, restore);
                    }
                } else {
                    self.drive_run(cx, spec);
                }
            }
            Wanted::Stop { mode, spec } => {
                let epoch = order.map_or(Epoch(0), Order::epoch);
                self.drive_stop(cx, epoch, mode, spec);
            }
            Wanted::Send {
                id,
                to,
                cancel,
                spec,
            } => {
                self.stop = None;
                self.forget_save();
                self.drive_send(cx, &entry, id, to, cancel, spec);
            }
            Wanted::Receive {
                id,
                cancel,
                spec,
                abi,
            } => {
                let epoch = order.map_or(Epoch(0), Order::epoch);
                self.drive_receive(cx, &entry, epoch, id, cancel, spec, abi);
            }
        }
    }

    /// What time and the lease ask for, whatever the orders are.
    fn without_orders(&mut self, cx: &mut Ctx<'_>) {
        match &mut self.stage {
            Stage::Killing { retry_at, .. } if cx.now >= *retry_at => {
                self.kill(cx, None);
            }
            Stage::Unknown { since, .. } if cx.now >= since.plus(QUERY_GIVE_UP) => {
                let text = "QEMU has not answered for 30 s: it was ended and is started again";
                self.set_error(text);
                self.kill(cx, None);
            }
            Stage::Unknown { op, next_at, since } if cx.now >= *next_at && op.is_none() => {
                let since = *since;
                let op = Some(self.act(cx, Act::Query));
                let next_at = cx.now.plus(QUERY_AGAIN);
                self.stage = Stage::Unknown { op, next_at, since };
            }
            Stage::Unknown { op, next_at, .. } if cx.now >= *next_at => {
                // The answer is overdue: ask again.
                *op = None;
                self.moves += 1;
            }
            Stage::Incoming { step, .. }
                if cx.synced && !cx.lease_held && !matches!(step, ReceiveStep::Adopted { .. }) =>
            {
                self.kill(
                    cx,
                    Some("the lease of the target ran out before the guest arrived".into()),
                );
            }
            _ => {}
        }
    }

    fn drive_nothing(&mut self, cx: &mut Ctx<'_>, entry: &LedgerEntry, why: &str) {
        match &self.stage {
            Stage::Killing { .. } => {
                self.doomed.get_or_insert_with(|| why.to_owned());
            }
            Stage::Absent => {
                self.retry_at = None;
                if entry.told > entry.closed {
                    self.close(cx, entry.told, why.to_owned());
                }
            }
            _ => self.kill(cx, Some(why.to_owned())),
        }
    }

    fn start(
        &mut self,
        cx: &mut Ctx<'_>,
        entry: &LedgerEntry,
        epoch: Epoch,
        spec: &VmSpec,
        abi: &GuestAbi,
        restore: Option<&SavedState>,
    ) {
        if self.retry_at.is_some_and(|at| cx.now < at) || !cx.may_run {
            return;
        }
        if let Some(send) = entry.begun() {
            let why = "the VM was given back and is started from its disks".to_owned();
            let (vm, id) = (self.vm.clone(), send.id);
            cx.record(LedgerRecord::SendFailed { vm, id, why });
        }
        if epoch > self.epoch {
            self.crashes = 0;
            self.restarts = 0;
            self.migration = None;
        }
        let vm = self.vm.clone();
        cx.record(LedgerRecord::Told {
            vm: vm.clone(),
            epoch,
            migration: None,
        });
        let spent = entry.restored >= epoch && !self.restore_unspent;
        // The first start only: a guest that has run since must not see its old memory again.
        let restore = restore.filter(|_| !spent && (entry.told < epoch || self.restore_unspent));
        self.restore_unspent = false;
        self.restoring = restore.is_some();
        if restore.is_some() {
            cx.record(LedgerRecord::Restored { vm, epoch });
        }
        self.begin_process(cx, epoch);
        let act = Act::Start {
            epoch,
            spec: Box::new(spec.clone()),
            abi: abi.clone(),
            restore: restore.cloned(),
        };
        self.run = self.act(cx, act);
        self.set(cx, Stage::Starting);
    }

    pub(super) fn begin_process(&mut self, cx: &Ctx<'_>, epoch: Epoch) {
        self.epoch = epoch;
        self.ready = false;
        self.probing = None;
        self.frozen = false;
        self.noticed = false;
        self.doomed = None;
        self.saved = None;
        self.forget_save();
        self.stop = None;
        self.thaw_failures = 0;
        self.started_at = cx.now;
    }

    /// The process exists and shall run.
    pub(super) fn drive_run(&mut self, cx: &mut Ctx<'_>, spec: &VmSpec) {
        match &self.stage {
            Stage::Running => self.watch_ready(cx, spec),
            Stage::Paused { retry_at, .. }
                if cx.may_run && retry_at.is_none_or(|at| cx.now >= at) =>
            {
                self.thaw(cx);
            }
            Stage::Sending { .. } => {
                self.give_up_send(cx, "the migration was given up by the cluster");
            }
            Stage::HandedOver(_) => self.drive_return(cx),
            _ => {}
        }
    }

    pub(super) fn thaw(&mut self, cx: &mut Ctx<'_>) {
        self.frozen = false;
        self.noticed = false;
        let op = self.act(cx, Act::Thaw);
        self.set(cx, Stage::Thawing { op });
    }

    pub(super) fn watch_ready(&mut self, cx: &mut Ctx<'_>, spec: &VmSpec) {
        if self.ready || self.probing == Some(self.run) {
            return;
        }
        match &spec.ready {
            None => {
                self.ready = true;
                self.dirty = true;
            }
            Some(check) => {
                self.probing = Some(self.run);
                self.act(cx, Act::Probe(check.clone()));
            }
        }
    }

    fn drive_stop(&mut self, cx: &mut Ctx<'_>, epoch: Epoch, mode: StopMode, spec: &VmSpec) {
        let done = || "it was stopped as ordered".to_owned();
        if self.stage == Stage::Absent {
            return self.close(cx, epoch, done());
        }
        if matches!(self.stage, Stage::Killing { .. }) {
            self.doomed.get_or_insert_with(done);
            return;
        }
        if let Stage::Sending { .. } = self.stage {
            return self.give_up_send(cx, "the VM is being stopped");
        }
        // Its memory may be stale; only its end is wanted.
        let stale = matches!(self.stage, Stage::HandedOver(_) | Stage::Incoming { .. });
        if mode == StopMode::Hard || stale {
            return self.kill(cx, Some(done()));
        }
        match mode {
            StopMode::Save => self.drive_save(cx, epoch, spec),
            _ => {
                self.forget_save();
                self.drive_shutdown(cx, spec, done());
            }
        }
    }

    fn drive_shutdown(&mut self, cx: &mut Ctx<'_>, spec: &VmSpec, done: String) {
        let stop = *self.stop.get_or_insert(StopProgress {
            hard_at: cx.now.plus(spec.shutdown_timeout),
            press_at: cx.now,
        });
        self.dirty |= stop.press_at == cx.now;
        if cx.now >= stop.hard_at {
            let limit = spec.shutdown_timeout;
            self.set_error(format!(
                "the guest did not shut down within {limit} and was powered off"
            ));
            return self.kill(cx, Some(done));
        }
        match &self.stage {
            Stage::Running if cx.now >= stop.press_at => {
                self.act(cx, Act::Powerdown);
                self.stop = Some(StopProgress {
                    press_at: cx.now.plus(PRESS_AGAIN),
                    ..stop
                });
                self.moves += 1;
            }
            // It can only shut down when it runs.
            Stage::Paused { .. } => self.drive_run(cx, spec),
            _ => {}
        }
        if let Some(stop) = &mut self.stop
            && self.stage != Stage::Running
        {
            stop.press_at = stop.press_at.max(cx.now.plus(REFUSED_AGAIN));
        }
    }

    fn drive_save(&mut self, cx: &mut Ctx<'_>, epoch: Epoch, spec: &VmSpec) {
        if self.save_failures >= SAVE_TRIES {
            // The cluster decides what follows. Only the guest's pauses are still seen to.
            if let Stage::Paused { .. } = self.stage {
                self.drive_run(cx, spec);
            }
            return;
        }
        let Some(disk) = spec.disks.first() else {
            self.save_failures = SAVE_TRIES;
            return self.set_error("it has no disk, so there is no pool to save its memory to");
        };
        match &self.stage {
            Stage::Running if self.save_at.is_none_or(|at| cx.now >= at) => {
                let saved = SavedState {
                    pool: disk.pool.clone(),
                    file: format!("{}-{epoch}", self.vm),
                };
                let (pool, file) = (saved.pool.clone(), saved.file.clone());
                let op = self.act(cx, Act::Save { pool, file });
                self.save_at = None;
                self.set(cx, Stage::Saving { op, saved });
            }
            Stage::Paused { .. } => self.drive_run(cx, spec),
            _ => {}
        }
    }
}
