//! What a VM waits for before it starts.
//!
//! Always holds: a dependency only ever delays a *start*. Nothing running is stopped for one, and
//! one that is migrating or frozen stays satisfied (**dependents-stay-up**).

use crate::work::{Moving, Own, Work};
use quorate_membership::HostHealth;
use quorate_state::OrderKind;
use quorate_types::VmPhase;
use quorate_types::spec::{Condition, Dependency, OnTimeout, Tolerates};

/// A dependency that does not hold yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unmet {
    /// Why, as a sentence part: "waits for db: ...".
    pub(crate) why: String,
    /// It is wanted, so it may hold soon.
    pub(crate) coming: bool,
}

impl Work<'_> {
    /// What `vm` still has to wait for.
    pub(crate) fn unmet(&self, vm: usize) -> Vec<Unmet> {
        let needs = self.vms[vm].record.spec.depends_on.iter();
        let unmet = needs.filter_map(|(name, dependency)| {
            let other = self.vm_index.get(name)?;
            let why = self.missing(other, dependency.condition)?;
            if dependency.advisory && self.hopeless(other) {
                return None;
            }
            let over = self.over_limit(vm, dependency);
            if over && dependency.on_timeout == OnTimeout::Start {
                return None;
            }
            let late = match dependency.timeout.filter(|_| over) {
                Some(limit) => format!(" (for longer than its limit of {limit})"),
                None => String::new(),
            };
            Some(Unmet {
                why: format!("waits for {name}: {why}{late}"),
                coming: self.vms[other].wanted,
            })
        });
        unmet.collect()
    }

    /// A VM that will not run soon: it shall not, finds no host, or keeps failing.
    fn hopeless(&self, other: usize) -> bool {
        let seen = &self.vms[other];
        let now = self.input.now;
        let later = self.input.memory.start_after(seen.name);
        match seen.own {
            Own::Free => {
                !seen.wanted || self.stuck.contains(&other) || later.is_some_and(|at| at > now)
            }
            Own::Owned { host, .. } => {
                let report = self.report(other, host);
                report.is_some_and(|report| report.phase == VmPhase::BackOff)
            }
            Own::Migrating(_) => false,
        }
    }

    /// The VM has waited for longer than this dependency allows.
    fn over_limit(&self, vm: usize, dependency: &Dependency) -> bool {
        let since = self.input.memory.waiting_since(self.vms[vm].name);
        let limit = since.zip(dependency.timeout);
        limit.is_some_and(|(since, limit)| self.input.now >= since.plus(limit))
    }

    /// Quick migration instead of a stop: some that need it bear a pause, and none less.
    pub(crate) fn pause_is_borne(&self, vm: usize) -> bool {
        let running = self
            .needed_by
            .of(vm)
            .iter()
            .filter(|other| self.runs_now(**other));
        let least = running.map(|other| self.bears(*other, vm)).min();
        least == Some(Tolerates::Pause)
    }

    fn runs_now(&self, vm: usize) -> bool {
        self.vms[vm].wanted && self.vms[vm].own != Own::Free
    }

    /// What a dependent bears of what it needs.
    fn bears(&self, dependent: usize, other: usize) -> Tolerates {
        let needs = &self.vms[dependent].record.spec.depends_on;
        match needs.get(self.vms[other].name) {
            Some(dependency) if dependency.advisory => Tolerates::Stop,
            Some(dependency) => dependency.tolerates,
            None => Tolerates::Stop,
        }
    }

    /// What is missing for the condition to hold; `None`: it holds.
    fn missing(&self, other: usize, condition: Condition) -> Option<String> {
        let seen = &self.vms[other];
        let name = seen.name;
        if self.assumed.contains(&other) {
            return None;
        }
        let (started, ready) = match seen.own {
            Own::Free if seen.wanted => return Some("it is not running yet".into()),
            Own::Free => {
                return Some(format!(
                    "it shall not run; `quorate vm start {name}` starts it"
                ));
            }
            Own::Owned { order, .. } if order != OrderKind::Run => {
                return Some("it is being stopped".into());
            }
            Own::Owned { epoch: None, .. } => return Some("it is being started".into()),
            Own::Owned {
                host,
                epoch: Some(epoch),
                ..
            } => {
                let report = self
                    .report(other, host)
                    .filter(|report| report.epoch == epoch);
                let lost = matches!(
                    self.hosts[host].health,
                    None | Some(HostHealth::Expired | HostHealth::Dead)
                );
                if lost {
                    return Some(format!("its host {} is lost", self.hosts[host].name));
                }
                let started = report.is_some_and(|report| runs(report.phase));
                let ready = report.is_some_and(|report| report.ready);
                (started, ready || self.input.memory.ready(name, epoch))
            }
            Own::Migrating(moving) => {
                let up = self.hosts[moving.from].up || self.hosts[moving.to].up;
                (up, self.ready_in_move(other, moving))
            }
        };
        if !started {
            return Some("it is being started".into());
        }
        // Without a check a guest is ready as soon as it runs.
        if condition == Condition::Started || ready || seen.spec.ready.is_none() {
            return None;
        }
        Some("it runs but is not ready yet".into())
    }

    fn ready_in_move(&self, vm: usize, moving: Moving) -> bool {
        let sides = [
            (moving.from, moving.epoch),
            (moving.to, moving.target_epoch),
        ];
        let said = sides.into_iter().any(|(host, epoch)| {
            let report = self.report(vm, host);
            report.is_some_and(|report| report.epoch == epoch && report.ready)
        });
        said || self.input.memory.ready(self.vms[vm].name, moving.epoch)
    }
}

/// Phases in which a guest counts as started.
fn runs(phase: VmPhase) -> bool {
    matches!(
        phase,
        VmPhase::Running | VmPhase::Frozen | VmPhase::MigratingOut | VmPhase::HandedOver
    )
}
