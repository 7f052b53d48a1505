//! What a move would stop, said before it is done.
//!
//! Always holds: derived from the state alone, so an answer costs no look at hosts. A VM whose
//! `migration` is `cold` can only move by being stopped; where the running VMs that need it bear a
//! pause (and not all of them a stop) it is saved and resumed instead, and nothing has to be asked.

use crate::model::{Ownership, State, VmRecord};
use quorate_types::spec::{MigrationPolicy, Tolerates};
use quorate_types::{HostName, VmName};

/// A VM that can only move by being stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// Which VM.
    pub vm: VmName,
    /// Running VMs that need it and would be without it meanwhile.
    pub left_without: Vec<VmName>,
}

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let left: Vec<&str> = self.left_without.iter().map(VmName::as_str).collect();
        write!(
            f,
            "{} can only move by being stopped; {} would be without it meanwhile",
            self.vm,
            left.join(", ")
        )
    }
}

impl State {
    /// What a move of this VM would stop under others that run; `None`: nothing.
    #[must_use]
    pub fn stopped_by_move(&self, vm: &VmName) -> Option<Stopped> {
        let record = self.vms.get(vm)?;
        if record.spec.migration != MigrationPolicy::Cold || !runs(record) {
            return None;
        }
        let needing = self.vms.iter().filter_map(|(name, other)| {
            let dependency = other.spec.depends_on.get(vm)?;
            let bears = match dependency.advisory {
                true => Tolerates::Stop,
                false => dependency.tolerates,
            };
            runs(other).then_some((name, bears))
        });
        let needing: Vec<(&VmName, Tolerates)> = needing.collect();
        // The least of them decides: a pause is borne by all, so a pause it is.
        let least = needing.iter().map(|(_, bears)| *bears).min()?;
        let left = needing
            .iter()
            .filter(|(_, bears)| *bears == Tolerates::Nothing);
        let left_without: Vec<VmName> = left.map(|(name, _)| (*name).clone()).collect();
        (least == Tolerates::Nothing).then(|| Stopped {
            vm: vm.clone(),
            left_without,
        })
    }

    /// The same for everything that a drained host has to give away.
    #[must_use]
    pub fn stopped_by_drain(&self, host: &HostName) -> Vec<Stopped> {
        let here = self.vms.iter().filter(
            |(_, vm)| matches!(&vm.ownership, Ownership::Owned { host: at, .. } if at == host),
        );
        here.filter_map(|(name, _)| self.stopped_by_move(name))
            .collect()
    }
}

fn runs(vm: &VmRecord) -> bool {
    vm.wanted() && vm.ownership != Ownership::Free
}
