//! The promises, checked against what really happened rather than against what anybody believes.
//!
//! Always holds: nothing here changes the world. What counts as broken:
//! * **one-writer**: two processes of a VM whose CPUs run; what that means for disks on a SAN says `check_san`. (A source that QEMU itself resumes after a
//!   failed switchover does not count while it has no disks: it is stopped, or aborts at its next write.)
//! * **proof-before-start**: a guest that begins to run though a newer epoch has run, or a release or a
//!   start while another copy runs or holds the disks.
//! * **epochs**: an epoch that runs on two hosts.
//! * **nothing-lost**: a write over an unexpected counter, a source that goes on after its target ran,
//!   an acknowledged command that a later leader does not have.
//! * **dependents-stay-up**, **guests-outlive-agents**, **freeze-before-kill**, **explainable**.

use crate::check_san::SanChecks;
use crate::event::HostId;
use crate::guest::{ProcId, Vcpu};
use crate::raft::Entry;
use crate::time::SEC;
use crate::world::{Broken, World};
use quorate_agent_logic::Token;
use quorate_membership::ProofKind;
use quorate_state::{
    Action, Command, Envelope, HostMode, MigrationEnd, OrderKind, Outcome, Ownership, Plan,
    Refusal, State,
};
use quorate_types::spec::MigrationPolicy;
use quorate_types::{Epoch, Preemption, VmName};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A guest that has run for this long is known to run.
const SETTLED: u64 = 3 * SEC;

/// That a guest lacks a disk, or has it again, is known to the leader within this.
const TOLD_WITHIN: u64 = 10 * SEC;

/// What is remembered for the checks.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    pub(crate) broken: Option<Broken>,
    /// Where each epoch ran.
    ran: BTreeMap<(VmName, Epoch), HostId>,
    /// Highest epoch that ever ran, and since when.
    top: BTreeMap<VmName, (Epoch, u64)>,
    pub(crate) acked: Vec<(usize, Arc<Entry>)>,
    pub(crate) guard_kills: u64,
    pub(crate) san: SanChecks,
    /// No outage is long: nothing may be killed or moved.
    pub(crate) calm: bool,
}

impl Checker {
    pub(crate) fn new(calm: bool) -> Self {
        Self {
            calm,
            ..Self::default()
        }
    }
}

impl World {
    /// After every event.
    pub(crate) fn check_all(&mut self) {
        let runs = |guest: &crate::guest::Guest| {
            guest.vcpu == Vcpu::Running && (guest.disks || !guest.self_resumed)
        };
        let mut seen: [Option<&crate::guest::Guest>; 32] = [None; 32];
        let mut double = None;
        let running = self.guests.values().filter(|guest| runs(guest));
        for (at, guest) in running.take(32).enumerate() {
            let before = seen[..at].iter().flatten();
            let mut before = before.filter(|other| other.vm == guest.vm);
            if let Some(other) = before.find(|other| !self.older_is_shut_out(other, guest)) {
                let (vm, epoch) = (guest.vm.clone(), guest.epoch);
                double = Some((vm, other.host, other.epoch, guest.host, epoch));
                break;
            }
            seen[at] = Some(guest);
        }
        if let Some((vm, a, a_epoch, b, b_epoch)) = double {
            let (a, b) = (self.hosts[a].name.clone(), self.hosts[b].name.clone());
            let text = format!("{vm} runs on {a} (epoch {a_epoch}) and on {b} (epoch {b_epoch})");
            self.fail("one-writer", text);
        }
        if self.check.calm && self.check.guard_kills > 0 {
            self.fail(
                "freeze-before-kill",
                "the guard ended a guest in a short outage",
            );
        }
    }

    /// A guest's CPUs begin to run.
    pub(crate) fn run_begins(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (vm, epoch, host) = (guest.vm.clone(), guest.epoch, guest.host);
        let top = self.check.top.entry(vm.clone()).or_default();
        let (newest, since) = *top;
        let outdated = newest > epoch && since > guest.started_at;
        if epoch > newest {
            *top = (epoch, self.now);
        }
        let before = self.check.ran.insert((vm.clone(), epoch), host);
        let name = self.hosts[host].name.clone();
        if outdated {
            let text =
                format!("{vm} runs on {name} under epoch {epoch}, though epoch {newest} has run");
            self.fail("proof-before-start", text);
        }
        if let Some(other) = before.filter(|other| *other != host) {
            let other = self.hosts[other].name.clone();
            self.fail(
                "epochs",
                format!("epoch {epoch} of {vm} ran on {other} and on {name}"),
            );
        }
    }

    /// The epoch that has run since a process was made, if it is newer than the process's.
    pub(crate) fn outdated(&self, guest: &crate::guest::Guest) -> Option<Epoch> {
        let (top, since) = self.check.top.get(&guest.vm)?;
        (*top > guest.epoch && *since > guest.started_at).then_some(*top)
    }

    /// A process is made to start a guest.
    pub(crate) fn start_attempt(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (vm, epoch, host) = (guest.vm.clone(), guest.epoch, guest.host);
        let name = self.hosts[host].name.clone();
        let outdated = self.check.top.get(&vm).is_some_and(|(top, _)| *top > epoch);
        if outdated && !self.given_back(proc) {
            let text =
                format!("{name} starts {vm} under epoch {epoch}, though a newer one has run");
            self.fail("proof-before-start", text);
        }
        let other = self.guests.iter().find(|(id, other)| {
            **id != proc
                && other.vm == vm
                && other.vcpu == Vcpu::Running
                && other.disks
                && !self.shut_out(other)
        });
        if let Some((_, other)) = other {
            let there = self.hosts[other.host].name.clone();
            let text = format!("{name} starts {vm} (epoch {epoch}) while it runs on {there}");
            self.fail("proof-before-start", text);
        }
    }

    /// A source whose target died is the owner again, by commit, under its older epoch. Its process may be
    /// made anew from the disk, never resumed.
    fn given_back(&self, proc: ProcId) -> bool {
        let Some(guest) = self.guests.get(&proc) else {
            return false;
        };
        let owned = Ownership::Owned {
            host: self.hosts[guest.host].name.clone(),
            epoch: guest.epoch,
            order: OrderKind::Run,
        };
        let state = self.newest();
        let record = state.vms.get(&guest.vm);
        record.is_some_and(|vm| vm.ownership == owned)
    }

    /// A frozen guest is about to go on.
    pub(crate) fn thaw_attempt(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (vm, epoch, host) = (guest.vm.clone(), guest.epoch, guest.host);
        let began = guest.started_at;
        let outdated = |(top, since): &(Epoch, u64)| *top > epoch && *since > began;
        if self.check.top.get(&vm).is_some_and(outdated) {
            let name = self.hosts[host].name.clone();
            let text = format!("{name} thaws {vm} of epoch {epoch}, though a newer one has run");
            self.fail("proof-before-start", text);
        }
    }

    /// The image's lock has held two owners apart: the protocol did not.
    pub(crate) fn lock_refused(&mut self, proc: ProcId, other: ProcId) {
        let (Some(guest), Some(holder)) = (self.guests.get(&proc), self.guests.get(&other)) else {
            return;
        };
        let here = self.hosts[guest.host].name.clone();
        let there = self.hosts[holder.host].name.clone();
        let text = format!(
            "only the image's lock kept {} (epoch {}) on {here} from its copy (epoch {}) on {there}",
            guest.vm, guest.epoch, holder.epoch
        );
        self.fail("proof-before-start", text);
    }

    /// The agent ends a process.
    pub(crate) fn check_kill(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        if guest.vcpu != Vcpu::Running || guest.self_resumed {
            return;
        }
        let (vm, epoch, host) = (guest.vm.clone(), guest.epoch, guest.host);
        let name = self.hosts[host].name.clone();
        let healthy = |state: &State| {
            state.vms.get(&vm).is_some_and(|record| {
                let owned = Ownership::Owned {
                    host: name.clone(),
                    epoch,
                    order: OrderKind::Run,
                };
                record.wanted() && record.ownership == owned
            })
        };
        let local = self.hosts[host]
            .daemon
            .as_ref()
            .map(|daemon| Arc::clone(&daemon.state));
        if healthy(&self.newest()) && local.is_some_and(|state| healthy(&state)) {
            let text = format!("the agent of {name} ends {vm}, which it owns and which runs");
            self.fail("guests-outlive-agents", text);
        }
    }

    /// The agent says that no process is left.
    pub(crate) fn check_clean(&mut self, host: HostId, vm: &VmName, run: Token) {
        let daemon = self.hosts[host].daemon.as_ref();
        let proc = daemon.and_then(|daemon| daemon.runs.get(&run)).copied();
        if proc.is_some_and(|proc| self.guests.contains_key(&proc)) {
            let name = self.hosts[host].name.clone();
            self.fail(
                "one-writer",
                format!("{name} closes {vm} while its process lives"),
            );
        }
    }

    /// A leader takes office: it has everything that was acknowledged.
    pub(crate) fn check_leader(&mut self, host: HostId) {
        let log = &self.hosts[host].raft.log;
        let missing = self.check.acked.iter().find(|(index, entry)| {
            let mine = index.checked_sub(1).and_then(|at| log.get(at));
            !mine.is_some_and(|mine| Arc::ptr_eq(mine, entry))
        });
        if let Some((index, _)) = missing {
            let text = format!("an acknowledged command (entry {index}) is gone");
            self.fail("nothing-lost", text);
        }
    }

    /// A command was applied for the first time.
    pub(crate) fn check_applied(
        &mut self,
        before: &State,
        after: &State,
        envelope: &Envelope,
        result: &Result<Outcome, Refusal>,
    ) {
        if let (Command::CutStorage { host, .. }, Ok(_)) = (&envelope.command, result) {
            self.check_cut(host);
        }
        let (Command::CommitPlan(plan), Ok(_)) = (&envelope.command, result) else {
            return;
        };
        self.check_san_plan(before, plan);
        self.check_epochs(before, after);
        self.check_plan(before, plan);
    }

    fn check_epochs(&mut self, before: &State, after: &State) {
        for (vm, record) in &after.vms {
            let old = before
                .vms
                .get(vm)
                .map_or(Epoch(0), |record| record.last_epoch);
            if record.last_epoch < old {
                self.fail(
                    "epochs",
                    format!("the last epoch of {vm} went back from {old}"),
                );
            }
        }
    }

    fn check_plan(&mut self, before: &State, plan: &Plan) {
        for planned in &plan.actions {
            let action = &planned.action;
            if planned.reason.summary.trim().is_empty() {
                self.fail(
                    "explainable",
                    format!("no reason is given to {}", action.describe()),
                );
            }
            match action {
                Action::Stop { vm, .. } => {
                    let returned = plan.actions.iter().any(|planned| {
                        matches!(&planned.action, Action::FinishMigration {
                            vm: returned,
                            end: MigrationEnd::TargetDead(_) | MigrationEnd::TargetLost(_),
                            ..
                        } if returned == vm)
                    });
                    // Its target may have run it: its memory is of no use any more.
                    if !returned {
                        self.check_stop(before, vm, &planned.reason.summary);
                    }
                }
                Action::Release { vm, proofs, .. } => {
                    let moved = proofs.iter().any(|p| p.kind() != ProofKind::StoppedByOwner);
                    if moved && self.check.calm {
                        let text = format!("{vm} is taken from its host in a short outage");
                        self.fail("freeze-before-kill", text);
                    }
                    self.check_release(vm);
                }
                Action::FinishMigration { vm, end, .. } => self.check_finish(before, vm, end),
                _ => {}
            }
        }
    }

    /// **dependents-stay-up**: a VM that shall run is stopped only as the way to move it, where its own definition
    /// allows that, or to make room for one that counts more, where the operator allows that.
    fn check_stop(&mut self, before: &State, vm: &VmName, why: &str) {
        let Some(record) = before.vms.get(vm) else {
            return;
        };
        // What the leader was told of a guest that has just come up may be a little old.
        let up = self.now.saturating_sub(SETTLED);
        let runs = |guest: &crate::guest::Guest| {
            let lately = guest
                .unreached
                .is_some_and(|at| at + TOLD_WITHIN > self.now);
            guest.vm == *vm && guest.vcpu == Vcpu::Running && guest.started_at < up && !lately
        };
        if !record.wanted() || !self.guests.values().any(runs) {
            return;
        }
        let movable = matches!(
            record.spec.migration,
            MigrationPolicy::Quick | MigrationPolicy::Cold
        );
        let host = record.ownership.host();
        let leaving = host.is_some_and(|host| {
            let mode = before.hosts.get(host).map(|host| host.mode);
            let allowed = record.spec.hosts.is_empty() || record.spec.hosts.contains(host);
            mode != Some(HostMode::Active) || !allowed
        });
        let follows = before
            .rules
            .values()
            .any(|rule| rule.spec.ties() && rule.spec.vms().contains(vm));
        let moves = movable && (leaving || follows || record.move_request.is_some());
        if !moves && !self.makes_room(before, vm) {
            let text = format!("{vm} shall run and is stopped: {why}");
            self.fail("dependents-stay-up", text);
        }
    }

    /// Preemption is on, and a VM that counts more shall run and does not.
    fn makes_room(&self, state: &State, vm: &VmName) -> bool {
        if state.settings().preemption != Preemption::LowerPriority {
            return false;
        }
        let runs = |other: &VmName| {
            let mut guests = self.guests.values();
            guests.any(|guest| {
                guest.vm == *other && guest.vcpu == Vcpu::Running && !self.shut_out(guest)
            })
        };
        let counts = weight(state, vm);
        let wanted = state.vms.iter().filter(|(_, record)| record.wanted());
        let mut waiting = wanted.filter(|(other, _)| !runs(other));
        waiting.any(|(other, _)| weight(state, other) > counts)
    }

    fn check_release(&mut self, vm: &VmName) {
        let runs = |guest: &&crate::guest::Guest| {
            guest.vm == *vm
                && guest.vcpu == Vcpu::Running
                && (guest.disks || !guest.self_resumed)
                && !self.shut_out(guest)
        };
        let found = self.guests.values().find(runs);
        if let Some((host, epoch)) = found.map(|guest| (guest.host, guest.epoch)) {
            let name = self.hosts[host].name.clone();
            let text = format!("{vm} is released while it runs on {name} (epoch {epoch})");
            self.fail("proof-before-start", text);
        }
    }

    fn check_finish(&mut self, before: &State, vm: &VmName, end: &MigrationEnd) {
        let Some(Ownership::Migrating { target_epoch, .. }) =
            before.vms.get(vm).map(|record| record.ownership.clone())
        else {
            return;
        };
        let ran = self.check.ran.contains_key(&(vm.clone(), target_epoch));
        let text = match end {
            MigrationEnd::Arrived { .. } if !ran => "arrived, but it never ran on the target",
            MigrationEnd::StayedAtSource | MigrationEnd::RefusedByTarget if ran => {
                "goes back to its source, but it has run on the target"
            }
            _ => return,
        };
        self.fail("nothing-lost", format!("{vm} {text}"));
    }

    /// Writes down what a command did.
    pub(crate) fn note_applied(&mut self, envelope: &Envelope, result: &Result<Outcome, Refusal>) {
        match (&envelope.command, result) {
            (Command::CommitPlan(plan), Ok(_)) => {
                for planned in &plan.actions {
                    let why = &planned.reason.summary;
                    self.note(|| format!("plan: {} -- {why}", planned.action.describe()));
                }
            }
            (Command::CommitPlan(_), Err(refusal)) => {
                self.trace(|| format!("plan refused: {refusal}"));
            }
            (_, Ok(outcome)) => {
                for event in &outcome.events {
                    self.note(|| format!("{}: {}", envelope.by, event.text));
                }
            }
            (_, Err(refusal)) => self.note(|| format!("{}: refused: {refusal}", envelope.by)),
        }
    }
}

/// The highest priority among a VM and what needs it, directly or not.
fn weight(state: &State, vm: &VmName) -> i32 {
    let mut all = BTreeSet::from([vm]);
    loop {
        let needs = |record: &quorate_state::VmRecord| {
            record.wanted() && record.spec.depends_on.keys().any(|on| all.contains(on))
        };
        let more: Vec<&VmName> = state
            .vms
            .iter()
            .filter(|(name, record)| !all.contains(name) && needs(record))
            .map(|(name, _)| name)
            .collect();
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    let priorities = all.iter().filter_map(|vm| state.vms.get(*vm));
    let priorities = priorities.map(|record| record.spec.priority);
    priorities.max().unwrap_or(i32::MIN)
}
