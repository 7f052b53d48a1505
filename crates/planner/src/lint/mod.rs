//! A second opinion on a plan: checks it against the promises, sharing nothing with the planner.
//!
//! [`rules`] knows placement rules and dependencies of companions, [`limits`] capacity and parallelism.
//!
//! Owns: the test oracle of this crate and of the simulator, and the last look of a leader before
//! it commits ([`checked`]). Always holds: it reads the input and the plan only, by name, and
//! re-derives every fact with code of its own.

mod limits;
mod preemption;
mod rules;

use crate::Input;
use quorate_membership::{Evidence, FenceProof, HostHealth};
use quorate_state::{
    Action, Command, Envelope, FORMAT, HostMode, MigrationEnd, OrderKind, Ownership, Plan, State,
};
use quorate_types::report::MigrationOutcome;
use quorate_types::spec::{Condition, Dependency, OnTimeout};
use quorate_types::{HostName, MigrationId, RuleName, Timestamp, VmName, VmPhase, VmReport};
use std::collections::BTreeSet;

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
    /// A rule over domains is broken by this plan.
    #[error("{vm} on {host} breaks rule {rule}")]
    Domain {
        /// Which VM.
        vm: VmName,
        /// Where it goes.
        host: HostName,
        /// The rule.
        rule: RuleName,
    },
    /// Something is given twice.
    #[error("{host} would need {need} of {what} and has {have}")]
    Capacity {
        /// The host.
        host: HostName,
        /// `bytes of memory`, `virtual CPUs`, or a resource.
        what: String,
        /// Needed.
        need: u64,
        /// There.
        have: u64,
    },
    /// Too many at once.
    #[error("{what} would have {count} migrations at once")]
    Parallel {
        /// `host h1`, `network lan`, `the cluster`.
        what: String,
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
        book: rules::Book::new(input, &after),
    };
    let mut found = Vec::new();
    for planned in &plan.actions {
        lint.action(&planned.action, &mut found);
    }
    lint.capacity(&mut found);
    lint.parallel(&mut found);
    found
}

/// The plan without the actions that would break a promise, and what they would break. One bad
/// action does not keep other VMs from being recovered.
#[must_use]
pub fn checked(input: &Input<'_>, plan: Plan) -> (Plan, Vec<Violation>) {
    let found = lint(input, &plan);
    if found.is_empty() {
        return (plan, found);
    }
    let vms: BTreeSet<&VmName> = found.iter().filter_map(Violation::vm).collect();
    let hosts: BTreeSet<&HostName> = found.iter().filter_map(Violation::full_host).collect();
    let all_moves = found
        .iter()
        .any(|one| matches!(one, Violation::Parallel { .. }));
    let good = |action: &Action| {
        let gives = match action {
            Action::Start { host, .. } => Some(host),
            Action::Migrate { to, .. } => Some(to),
            _ => None,
        };
        let moves = matches!(action, Action::Migrate { .. });
        let wrong = action.vm().is_some_and(|vm| vms.contains(vm));
        let full = gives.is_some_and(|host| hosts.contains(host));
        let many = moves && all_moves;
        !wrong && !full && !many
    };
    let mut rest = plan;
    rest.actions.retain(|planned| good(&planned.action));
    if !lint(input, &rest).is_empty() {
        rest.actions.clear();
    }
    (rest, found)
}

impl Violation {
    /// The VM whose action is wrong.
    fn vm(&self) -> Option<&VmName> {
        match self {
            Self::InventedProof { vm, .. }
            | Self::BadTarget { vm, .. }
            | Self::Dependency { vm, .. }
            | Self::Stop { vm }
            | Self::InventedEnd { vm, .. }
            | Self::OldMemory { vm }
            | Self::Rule { vm, .. }
            | Self::Domain { vm, .. } => Some(vm),
            Self::Refused(_) | Self::Capacity { .. } | Self::Parallel { .. } => None,
        }
    }

    fn full_host(&self) -> Option<&HostName> {
        match self {
            Self::Capacity { host, .. } => Some(host),
            _ => None,
        }
    }
}

struct Lint<'a> {
    input: &'a Input<'a>,
    plan: &'a Plan,
    after: &'a State,
    book: rules::Book<'a>,
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
        if let Some(why) = self.bad_target(vm, host) {
            found.push(Violation::BadTarget {
                vm: vm.clone(),
                host: host.clone(),
                why,
            });
        }
    }

    fn bad_target(&self, vm: &VmName, host: &HostName) -> Option<String> {
        let say = |text: &str| Some(text.to_owned());
        let Some(record) = self.input.state.hosts.get(host) else {
            return say("not a member");
        };
        if record.mode != HostMode::Active {
            return say("takes no VMs");
        }
        if !self.up(host) {
            return say("not up");
        }
        let Some(report) = self.input.reports.get(host) else {
            return say("has not reported");
        };
        let Some(seen) = self.after.vms.get(vm) else {
            return say("unknown VM");
        };
        if !seen.spec.allows(host, &record.spec) {
            return say("not allowed");
        }
        for disk in &seen.effective().disks {
            let pool = self.input.state.pools.get(&disk.pool);
            let hosts = pool.map(|pool| pool.spec.hosts());
            let listed = hosts.is_none_or(|hosts| hosts.is_empty() || hosts.contains(host));
            let usable = report.pools.get(&disk.pool).is_some_and(|seen| seen.usable);
            if !listed || !usable {
                return Some(format!("does not reach pool {}", disk.pool));
            }
        }
        let mut nics = seen.effective().nics.iter();
        let missing = nics.find(|nic| !report.networks.contains(&nic.network));
        missing.map(|nic| format!("has no network {}", nic.network))
    }

    /// Hosts that may have a VM after the plan.
    fn places(&self, vm: &VmName) -> BTreeSet<HostName> {
        let hosts = self.after.vms.get(vm).map(|seen| seen.ownership.hosts());
        let hosts = hosts.unwrap_or_default();
        hosts.into_iter().map(|(host, _)| host.clone()).collect()
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
            if self.excused(vm, other, dependency) {
                continue;
            }
            if !held && !self.holds(self.after, other, dependency.condition) {
                let (vm, other) = (vm.clone(), other.clone());
                found.push(Violation::Dependency { vm, other });
            }
        }
    }

    /// The wait may end without what is waited for: it took too long, or it was only an order and
    /// the other one does not come.
    fn excused(&self, vm: &VmName, other: &VmName, dependency: &Dependency) -> bool {
        let since = self.input.memory.waiting_since(vm);
        let over = since.zip(dependency.timeout).is_some_and(|(since, limit)| {
            self.input.now >= since.plus(limit) && dependency.on_timeout == OnTimeout::Start
        });
        let comes = |host: &HostName| {
            let report = self.report(other, host);
            report.is_none_or(|report| report.phase != VmPhase::BackOff)
        };
        let other = self.after.vms.get(other);
        let absent = other.is_none_or(|other| match &other.ownership {
            Ownership::Free => true,
            Ownership::Owned { host, .. } => !comes(host),
            Ownership::Migrating { .. } => false,
        });
        over || (dependency.advisory && absent)
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

    /// The host says that it cannot use a pool of the VM's disks.
    fn lost_disks(&self, vm: &VmName, at: &HostName) -> bool {
        let pools = self.input.reports.get(at).map(|report| &report.pools);
        let seen = self.input.state.vms.get(vm);
        let mut disks = seen.into_iter().flat_map(|seen| &seen.effective().disks);
        disks.any(|disk| {
            let pool = pools.and_then(|pools| pools.get(&disk.pool));
            pool.is_some_and(|pool| !pool.usable)
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
            matches!(&planned.action, Action::FinishMigration { vm: other, end: MigrationEnd::TargetDead(_) | MigrationEnd::TargetLost(_), .. } if other == vm)
        });
        let moves = |name: &VmName| {
            let seen = self.input.state.vms.get(name);
            seen.is_some_and(|seen| seen.move_request.is_some())
        };
        let asked = moves(vm) || self.book.companions(vm).iter().any(moves);
        !seen.wanted()
            || host.is_some_and(|at| leaves(at) || looping(at) || self.lost_disks(vm, at))
            || returned
            || asked
            || self.preempted(vm)
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
            MigrationEnd::TargetDead(proof) | MigrationEnd::TargetLost(proof) => {
                self.given(vm, proof)
            }
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
        let lost = matches!(
            end,
            MigrationEnd::TargetDead(_) | MigrationEnd::TargetLost(_)
        );
        if lost && handed_over && resumes {
            found.push(Violation::OldMemory { vm: vm.clone() });
        }
    }
}
