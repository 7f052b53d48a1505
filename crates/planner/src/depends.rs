//! What a VM waits for before it starts.
//!
//! Always holds: a dependency only ever delays a *start*. Nothing running is stopped for one, and
//! one that is migrating or frozen stays satisfied (**dependents-stay-up**).

use crate::work::{Moving, Own, Work};
use quorate_membership::HostHealth;
use quorate_state::OrderKind;
use quorate_types::VmPhase;
use quorate_types::spec::Condition;

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
            let other = *self.vm_index.get(name)?;
            let why = self.missing(other, dependency.condition)?;
            Some(Unmet {
                why: format!("waits for {name}: {why}"),
                coming: self.vms[other].wanted,
            })
        });
        unmet.collect()
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
