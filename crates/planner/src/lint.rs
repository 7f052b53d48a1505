//! A second opinion on a plan: checks it against the promises, sharing nothing with the planner.
//!
//! Owns: the test oracle of this crate and of the simulator. Always holds: it reads the input and
//! the plan only, by name, and re-derives every fact; slow and simple on purpose.

use crate::{Input, OVERHEAD_BYTES};
use quorate_membership::{Evidence, FenceProof, HostHealth};
use quorate_state::{
    Action, Command, Envelope, FORMAT, HostMode, MigrationEnd, OrderKind, Ownership, Plan, State,
    VmRecord,
};
use quorate_types::report::MigrationOutcome;
use quorate_types::spec::Condition;
use quorate_types::{
    HostName, MigrationId, Preemption, RuleKind, Timestamp, VmName, VmPhase, VmReport,
};
use std::collections::{BTreeMap, BTreeSet};

/// A promise that a plan would break.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// `apply` would not take it.
    #[error("the plan is refused: {0}")]
    Refused(String),
    /// **proof-before-start**: a proof that nobody gave.
    #[error("{vm}: a proof about {host} is used that is not there")]
    InventedProof {
        /// Which VM.
        vm: VmName,
        /// About whom.
        host: HostName,
    },
    /// A host that is not up, or takes no VMs, or is proven dead.
    #[error("{vm} is given to {host}, which cannot take it: {why}")]
    BadTarget {
        /// Which VM.
        vm: VmName,
        /// The host.
        host: HostName,
        /// What is wrong with it.
        why: String,
    },
    /// Started too early.
    #[error("{vm} is started though {other} is not there yet")]
    Dependency {
        /// Which VM.
        vm: VmName,
        /// What it needs.
        other: VmName,
    },
    /// **dependents-stay-up**: an order to stop without a cause of its own.
    #[error("{vm} is stopped without a cause of its own")]
    Stop {
        /// Which VM.
        vm: VmName,
    },
    /// The end of a migration that no report of it says.
    #[error("migration {id} of {vm} is ended as nobody reported it")]
    InventedEnd {
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
    },
    /// **nothing-lost**: memory older than the disk would be resumed.
    #[error("{vm} would be resumed with memory that may be older than its disk")]
    OldMemory {
        /// Which VM.
        vm: VmName,
    },
    /// A rule is broken by this plan.
    #[error("{vm} on {host} breaks a rule about {other}")]
    Rule {
        /// Which VM.
        vm: VmName,
        /// Where it goes.
        host: HostName,
        /// The other VM of the rule.
        other: VmName,
    },
    /// Memory is given twice.
    #[error("{host} would need {need} bytes and has {have}")]
    Capacity {
        /// The host.
        host: HostName,
        /// Needed.
        need: u64,
        /// There.
        have: u64,
    },
    /// Too many at once.
    #[error("{host} would take part in {count} migrations at once")]
    Parallel {
        /// The host.
        host: HostName,
        /// How many.
        count: usize,
    },
}

/// Checks a plan. Empty: nothing found.
#[must_use]
pub fn lint(input: &Input<'_>, plan: &Plan) -> Vec<Violation> {
    let mut after = input.state.clone();
    let envelope = Envelope {
        format: FORMAT,
        at: Timestamp(0),
        by: "lint".into(),
        command: Command::CommitPlan(plan.clone()),
    };
    if plan.actions.is_empty() {
        return Vec::new();
    }
    if let Err(refusal) = after.apply(&envelope) {
        return vec![Violation::Refused(refusal.to_string())];
    }
    let lint = Lint {
        input,
        plan,
        after: &after,
    };
    let mut found = Vec::new();
    for planned in &plan.actions {
        lint.action(&planned.action, &mut found);
    }
    lint.capacity(&mut found);
    lint.parallel(&mut found);
    found
}

struct Lint<'a> {
    input: &'a Input<'a>,
    plan: &'a Plan,
    after: &'a State,
}

impl Lint<'_> {
    fn action(&self, action: &Action, found: &mut Vec<Violation>) {
        match action {
            Action::Start { vm, host, .. } => {
                self.target(vm, host, found);
                self.rules(vm, host, found);
                self.dependencies(vm, found);
            }
            Action::Migrate { vm, to } => {
                self.target(vm, to, found);
                self.rules(vm, to, found);
            }
            Action::Release { vm, proofs, .. } => {
                for proof in proofs.iter().filter(|proof| !self.given(vm, proof)) {
                    let host = proof.host().clone();
                    found.push(Violation::InventedProof {
                        vm: vm.clone(),
                        host,
                    });
                }
            }
            Action::Stop { vm, .. } if !self.may_stop(vm) => {
                found.push(Violation::Stop { vm: vm.clone() });
            }
            Action::FinishMigration { vm, id, end } => self.end(vm, *id, end, found),
            _ => {}
        }
    }

    fn up(&self, host: &HostName) -> bool {
        self.input.health.get(host) == Some(&HostHealth::Up)
    }

    fn report(&self, vm: &VmName, host: &HostName) -> Option<&VmReport> {
        self.input.reports.get(host)?.vms.get(vm)
    }

    fn given(&self, vm: &VmName, proof: &FenceProof) -> bool {
        match proof.evidence() {
            Evidence::Closed { vm: of, closed } => {
                let said = self.report(vm, proof.host());
                of == vm && said.is_some_and(|said| said.closed >= *closed)
            }
            _ => self.input.proofs.contains(proof) && !self.up(proof.host()),
        }
    }

    fn target(&self, vm: &VmName, host: &HostName, found: &mut Vec<Violation>) {
        let why = match self.input.state.hosts.get(host) {
            None => "not a member",
            Some(record) if record.mode != HostMode::Active => "takes no VMs",
            Some(_) if !self.up(host) => "not up",
            Some(_) if !self.input.reports.contains_key(host) => "has not reported",
            Some(_)
                if self
                    .after
                    .vms
                    .get(vm)
                    .is_none_or(|seen| !allowed(seen, host)) =>
            {
                "not allowed"
            }
            Some(_) => return,
        };
        found.push(Violation::BadTarget {
            vm: vm.clone(),
            host: host.clone(),
            why: why.into(),
        });
    }

    /// Hosts that may have a VM after the plan.
    fn places(&self, vm: &VmName) -> BTreeSet<HostName> {
        let hosts = self.after.vms.get(vm).map(|seen| seen.ownership.hosts());
        let hosts = hosts.unwrap_or_default();
        hosts.into_iter().map(|(host, _)| host.clone()).collect()
    }

    fn rules(&self, vm: &VmName, host: &HostName, found: &mut Vec<Violation>) {
        for rule in self.input.state.rules.values().map(|rule| &rule.spec) {
            if !rule.vms().contains(vm) {
                continue;
            }
            for other in rule.vms().iter().filter(|other| *other != vm) {
                let places = self.places(other);
                let broken = match rule.kind {
                    RuleKind::KeepApart => places.contains(host),
                    _ => self.split(vm, host, other),
                };
                if broken {
                    found.push(Violation::Rule {
                        vm: vm.clone(),
                        host: host.clone(),
                        other: other.clone(),
                    });
                }
            }
        }
    }

    /// `other` stays on a good host, and nobody of the group is where `vm` goes. (A group that is
    /// split already may be joined on either side.)
    fn split(&self, vm: &VmName, host: &HostName, other: &VmName) -> bool {
        let good = |at: &HostName| {
            let mode = self.input.state.hosts.get(at).map(|record| record.mode);
            self.up(at) && mode == Some(HostMode::Active)
        };
        // One that is being stopped is given a place anew.
        let stays = |name: &VmName| {
            let run = OrderKind::Run;
            self.after.vms.get(name).is_some_and(|seen| {
                let stops =
                    matches!(&seen.ownership, Ownership::Owned { order, .. } if *order != run);
                seen.wanted() && !stops
            })
        };
        let joined = self
            .companions(vm)
            .into_iter()
            .any(|name| name != *vm && stays(&name) && self.places(&name).contains(host));
        stays(other) && !joined && self.places(other).iter().any(good)
    }

    fn dependencies(&self, vm: &VmName, found: &mut Vec<Violation>) {
        let needs = self
            .input
            .state
            .vms
            .get(vm)
            .map(|seen| &seen.spec.depends_on);
        for (other, dependency) in needs.into_iter().flatten() {
            let released = self.plan.actions.iter().any(
                |planned| matches!(&planned.action, Action::Release { vm, .. } if vm == other),
            );
            let held = !released && self.holds(self.input.state, other, dependency.condition);
            if !held && !self.holds(self.after, other, dependency.condition) {
                let (vm, other) = (vm.clone(), other.clone());
                found.push(Violation::Dependency { vm, other });
            }
        }
    }

    fn holds(&self, state: &State, other: &VmName, condition: Condition) -> bool {
        let Some(seen) = state.vms.get(other) else {
            return false;
        };
        let sides = match &seen.ownership {
            Ownership::Free => return false,
            Ownership::Owned {
                order: OrderKind::Stop(_),
                ..
            } => return false,
            ownership => ownership.hosts(),
        };
        // Only what runs is migrated, so it counts as started though a side has not reported yet.
        let moves = matches!(seen.ownership, Ownership::Migrating { .. });
        let checked = seen.effective().ready.is_some() && condition == Condition::Ready;
        let known = |epoch| !checked || self.input.memory.ready(other, epoch);
        let up = sides.iter().any(|(host, _)| self.up(host));
        if moves && up && sides.iter().any(|(_, epoch)| known(*epoch)) {
            return true;
        }
        sides.into_iter().any(|(host, epoch)| {
            let Some(report) = self.report(other, host).filter(|seen| seen.epoch == epoch) else {
                return false;
            };
            let runs = !matches!(
                report.phase,
                VmPhase::Absent | VmPhase::Starting | VmPhase::BackOff | VmPhase::Stopping
            );
            let ready = report.ready
                || seen.effective().ready.is_none()
                || self.input.memory.ready(other, epoch);
            runs && (condition == Condition::Started || ready)
        })
    }

    /// A cause for an order to stop that lies in the VM itself, its host, or a wish to move it.
    fn may_stop(&self, vm: &VmName) -> bool {
        let Some(seen) = self.input.state.vms.get(vm) else {
            return false;
        };
        let host = seen.ownership.host();
        let leaves = |at: &HostName| {
            let mode = self.input.state.hosts.get(at).map(|record| record.mode);
            mode != Some(HostMode::Active)
        };
        let looping = |at: &HostName| {
            let report = self.report(vm, at);
            report.is_some_and(|report| report.phase == VmPhase::BackOff)
        };
        let returned = self.plan.actions.iter().any(|planned| {
            matches!(&planned.action, Action::FinishMigration { vm: other, end: MigrationEnd::TargetDead(_), .. } if other == vm)
        });
        let moves = |name: &VmName| {
            let seen = self.input.state.vms.get(name);
            seen.is_some_and(|seen| seen.move_request.is_some())
        };
        let asked = moves(vm) || self.companions(vm).iter().any(moves);
        !seen.wanted()
            || host.is_some_and(|at| leaves(at) || looping(at))
            || returned
            || asked
            || self.preempted(vm)
    }

    /// Preemption is on, and a VM of higher priority shall run and does not.
    fn preempted(&self, vm: &VmName) -> bool {
        let on = self.input.state.settings().preemption == Preemption::LowerPriority;
        let own = self.weight(vm);
        let mut waiting = self
            .after
            .vms
            .iter()
            .filter(|(_, other)| other.wanted() && other.ownership == Ownership::Free);
        on && waiting.any(|(name, _)| self.weight(name) > own)
    }

    /// The highest priority of a VM and of all that needs it and shall run.
    fn weight(&self, vm: &VmName) -> Option<i32> {
        let vms = &self.input.state.vms;
        let mut all: BTreeSet<&VmName> = vms
            .get_key_value(vm)
            .map(|(name, _)| name)
            .into_iter()
            .collect();
        loop {
            let more: BTreeSet<&VmName> = vms
                .iter()
                .filter(|(_, other)| {
                    all.iter()
                        .any(|name| other.spec.depends_on.contains_key(*name))
                })
                .map(|(name, _)| name)
                .collect();
            if more.is_subset(&all) {
                break;
            }
            all.extend(more);
        }
        let wanted = all
            .into_iter()
            .filter_map(|name| vms.get(name))
            .filter(|seen| seen.wanted());
        wanted.map(|seen| seen.spec.priority).max()
    }

    fn companions(&self, vm: &VmName) -> BTreeSet<VmName> {
        let mut group: BTreeSet<VmName> = [vm.clone()].into();
        loop {
            let before = group.len();
            for rule in self.input.state.rules.values() {
                let vms = rule.spec.vms();
                if rule.spec.ties() && !vms.is_disjoint(&group) {
                    group.extend(vms.iter().cloned());
                }
            }
            if group.len() == before {
                return group;
            }
        }
    }

    fn end(&self, vm: &VmName, id: MigrationId, end: &MigrationEnd, found: &mut Vec<Violation>) {
        let Some(Ownership::Migrating { from, to, .. }) =
            self.input.state.vms.get(vm).map(|seen| &seen.ownership)
        else {
            return;
        };
        let said = |host: &HostName| {
            let report = self.report(vm, host)?.migration.as_ref()?;
            (report.id == id).then_some(report.outcome)
        };
        let good = match end {
            MigrationEnd::Arrived { .. } => said(to) == Some(MigrationOutcome::Arrived),
            MigrationEnd::StayedAtSource => said(from) == Some(MigrationOutcome::Failed),
            MigrationEnd::RefusedByTarget => said(to) == Some(MigrationOutcome::Failed),
            MigrationEnd::TargetDead(proof) => self.given(vm, proof),
        };
        if !good {
            found.push(Violation::InventedEnd { vm: vm.clone(), id });
        }
        let handed_over = said(from) == Some(MigrationOutcome::Sent)
            || self
                .report(vm, from)
                .is_some_and(|seen| seen.phase == VmPhase::HandedOver);
        let resumes = self.after.vms.get(vm).is_some_and(|seen| {
            matches!(&seen.ownership, Ownership::Owned { host, order: OrderKind::Run, .. } if host == from)
        });
        if matches!(end, MigrationEnd::TargetDead(_)) && handed_over && resumes {
            found.push(Violation::OldMemory { vm: vm.clone() });
        }
    }

    fn capacity(&self, found: &mut Vec<Violation>) {
        let used = |state: &State| {
            let mut used: BTreeMap<HostName, u64> = BTreeMap::new();
            for vm in state.vms.values() {
                for (host, _) in vm.ownership.hosts() {
                    let need = vm.effective().memory.0 + OVERHEAD_BYTES;
                    *used.entry(host.clone()).or_default() += need;
                }
            }
            used
        };
        let before = used(self.input.state);
        for (host, need) in used(self.after) {
            let report = self.input.reports.get(&host);
            let have = report.map_or(0, |report| report.capacity.memory.0);
            if need > have && need > before.get(&host).copied().unwrap_or(0) {
                found.push(Violation::Capacity { host, need, have });
            }
        }
    }

    fn parallel(&self, found: &mut Vec<Violation>) {
        let limit = self.input.state.settings().parallel_migrations as usize;
        for host in self.input.state.hosts.keys() {
            let takes_part = |state: &State| -> Vec<VmName> {
                let moving = state.vms.iter().filter(|(_, vm)| {
                    matches!(vm.ownership, Ownership::Migrating { .. })
                        && vm.ownership.hosts().iter().any(|(at, _)| *at == host)
                });
                moving.map(|(name, _)| name.clone()).collect()
            };
            let (before, after) = (takes_part(self.input.state), takes_part(self.after));
            let one_group = after.first().is_some_and(|first| {
                let group = self.companions(first);
                after.iter().all(|vm| group.contains(vm))
            });
            if after.len() > limit && after.len() > before.len() && !one_group {
                found.push(Violation::Parallel {
                    host: host.clone(),
                    count: after.len(),
                });
            }
        }
    }
}

fn allowed(vm: &VmRecord, host: &HostName) -> bool {
    vm.spec.hosts.is_empty() || vm.spec.hosts.contains(host)
}
