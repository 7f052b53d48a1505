//! All VMs of one host, its lease, its orders.

use crate::effect::{Effect, Token};
use crate::input::{Adopted, Input};
use crate::ledger::{Ledger, LedgerRecord};
use crate::vm::{Ctx, VmMachine, outcome_here};
use quorate_membership::{HostLease, Instant, LeasePhase};
use quorate_state::Order;
use quorate_types::{LeaseTimings, Revision, Timestamp, VmName, VmReport};
use std::collections::{BTreeMap, BTreeSet};

/// The host's decisions. Made only from a loaded ledger and the guests that were found alive, so nothing
/// can be decided before both are known.
#[derive(Debug, Clone)]
pub struct HostLogic {
    lease: HostLease,
    applied: Revision,
    orders: BTreeMap<VmName, Order>,
    /// Absent until the first look at the replica.
    known: Option<BTreeSet<VmName>>,
    /// A lease was held while the replica was as fresh as its acknowledgement.
    synced: bool,
    ledger: Ledger,
    vms: BTreeMap<VmName, VmMachine>,
    tokens: u64,
}

impl HostLogic {
    /// Takes charge. The effects are to be carried out like those of a step.
    pub fn new(
        timings: LeaseTimings,
        ledger: Ledger,
        adopted: &[Adopted],
        now: Instant,
    ) -> (Self, Vec<Effect>) {
        let tokens = adopted.iter().map(|found| found.run.0).max().unwrap_or(0);
        let mut logic = Self {
            lease: HostLease::new(timings),
            applied: Revision(0),
            orders: BTreeMap::new(),
            known: None,
            synced: false,
            ledger,
            vms: BTreeMap::new(),
            tokens,
        };
        let mut out = Vec::new();
        for found in adopted {
            logic.with(&found.vm, now, &mut out, |vm, cx| vm.adopt(cx, found));
        }
        let names: Vec<VmName> = logic.ledger.entries().keys().cloned().collect();
        for name in names {
            if !logic.vms.contains_key(&name) {
                logic.with(&name, now, &mut out, VmMachine::recall_absent);
            }
        }
        out.push(Effect::Report);
        (logic, out)
    }

    /// Decides.
    pub fn step(&mut self, now: Instant, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        match input {
            Input::Orders {
                revision,
                orders,
                known,
            } => {
                if revision < self.applied {
                    return out; // an older look
                }
                self.applied = revision;
                self.orders = orders;
                self.known = Some(known);
                self.drive_all(now, &mut out);
                self.compact(&mut out);
            }
            Input::Timings(timings) => {
                self.lease.set_timings(timings);
                self.drive_all(now, &mut out);
            }
            Input::LeaseAck {
                sent,
                granted,
                revision,
            } => {
                self.lease.acknowledged(sent, granted, revision);
                self.drive_all(now, &mut out);
            }
            Input::Tick => self.drive_all(now, &mut out),
            Input::Guest { vm, token, event } if self.vms.contains_key(&vm) => {
                self.with(&vm, now, &mut out, |vm, cx| {
                    vm.on_event(cx, token, event);
                    vm.drive(cx);
                });
            }
            Input::GuardFroze { vm, run } if self.vms.contains_key(&vm) => {
                self.with(&vm, now, &mut out, |vm, cx| {
                    vm.on_froze(cx, run);
                    vm.drive(cx);
                });
            }
            Input::Guest { .. } | Input::GuardFroze { .. } => {}
            Input::PeerIncoming { ask, vm, id, ready } if self.vms.contains_key(&vm) => {
                self.with(&vm, now, &mut out, |vm, cx| {
                    vm.peer_incoming(cx, ask, id, ready);
                });
            }
            // Names from outside make nothing.
            Input::PeerIncoming { ask, .. } => out.push(Effect::Answer {
                ask,
                result: Err("the target has not been told of this migration yet".into()),
            }),
            Input::PeerOutcome { ask, vm, id } => {
                let says = outcome_here(self.ledger.get(&vm), id);
                out.push(Effect::AnswerOutcome { ask, says });
            }
        }
        self.drive_due(now, &mut out);
        self.report_changes(&mut out);
        out
    }

    /// When [`Input::Tick`] is due at the latest.
    pub fn next_wakeup(&self, now: Instant) -> Option<Instant> {
        let lease = [self.lease.freeze_at(), self.lease.deadline()];
        let lease = lease.into_iter().flatten().filter(|at| *at > now);
        // What is due already waits for something else than time: every step looks at it.
        let vms = self.vms.values().filter_map(VmMachine::next_wakeup);
        lease.chain(vms.filter(|at| *at > now)).min()
    }

    /// What the host says of its VMs. `booted` is the wall clock's time at 0 of the monotonic clock.
    pub fn report(&self, booted: Timestamp) -> BTreeMap<VmName, VmReport> {
        let report = |(name, vm): (&VmName, &VmMachine)| {
            let entry = self.ledger.get(name);
            (name.clone(), vm.report(entry, booted))
        };
        self.vms.iter().map(report).collect()
    }

    /// Until when a start, a preparation or a thaw may be carried out: the end of the lease that it was decided
    /// under, on this host's clock. `None`: not at all any more.
    ///
    /// Ask when the effect's turn comes, and pass it on to the guard: between the decision and its
    /// turn a ledger record may take long, or the agent may stand still, and a lease that was lost and
    /// given again meanwhile says nothing about the old order.
    pub fn leave_until(&self, vm: &VmName, token: Token) -> Option<Instant> {
        self.vms.get(vm)?.leave_until(token)
    }

    /// The host's lease.
    pub fn lease(&self) -> &HostLease {
        &self.lease
    }

    /// What is durable, once the effects so far are carried out.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The revision of the replica that was looked at last.
    pub fn applied(&self) -> Revision {
        self.applied
    }

    fn with(
        &mut self,
        name: &VmName,
        now: Instant,
        out: &mut Vec<Effect>,
        act: impl FnOnce(&mut VmMachine, &mut Ctx<'_>),
    ) {
        let may_run = self.known.is_some() && self.lease.may_run(now, self.applied);
        self.synced |= may_run;
        let vm = self
            .vms
            .entry(name.clone())
            .or_insert_with(|| VmMachine::new(name.clone(), now));
        let mut cx = Ctx {
            now,
            lease_until: self.lease.freeze_at(),
            synced: self.synced,
            lease_held: self.lease.phase(now) == LeasePhase::Held,
            may_run,
            order: self.orders.get(name),
            ledger: &mut self.ledger,
            tokens: &mut self.tokens,
            out,
        };
        act(vm, &mut cx);
    }

    fn drive_all(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let names: BTreeSet<VmName> = self.orders.keys().chain(self.vms.keys()).cloned().collect();
        for name in names {
            self.with(&name, now, out, VmMachine::drive);
        }
    }

    /// Machines whose time has come while another one was driven.
    fn drive_due(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let due = |vm: &VmMachine| vm.next_wakeup().is_some_and(|at| at <= now);
        let names: Vec<VmName> = self
            .vms
            .iter()
            .filter(|(_, vm)| due(vm))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            self.with(&name, now, out, VmMachine::drive);
        }
    }

    fn report_changes(&mut self, out: &mut Vec<Effect>) {
        let mut changed = false;
        for vm in self.vms.values_mut() {
            changed |= vm.take_dirty();
        }
        if changed {
            out.push(Effect::Report);
        }
    }

    /// Forgets VMs that the cluster has forgotten.
    fn compact(&mut self, out: &mut Vec<Effect>) {
        let Some(known) = self.known.as_ref().filter(|_| self.synced) else {
            return;
        };
        let gone: Vec<VmName> = self
            .vms
            .iter()
            .filter(|(name, vm)| !known.contains(*name) && !vm.has_process())
            .map(|(name, _)| name.clone())
            .collect();
        for vm in gone {
            self.vms.remove(&vm);
            if self.ledger.get(&vm).is_some() {
                let record = LedgerRecord::Forgotten { vm };
                self.ledger.apply(&record);
                out.push(Effect::Ledger(record));
            }
            out.push(Effect::Report);
        }
    }
}
