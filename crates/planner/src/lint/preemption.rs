//! Whether a VM may be stopped for the sake of another one.

use super::Lint;
use quorate_state::Ownership;
use quorate_types::{Preemption, VmName};
use std::collections::BTreeSet;

impl Lint<'_> {
    /// Preemption is on, and a VM of higher priority shall run and does not.
    pub(super) fn preempted(&self, vm: &VmName) -> bool {
        let on = self.input.state.settings().preemption == Preemption::LowerPriority;
        let own = self.weight(vm);
        let mut waiting = self
            .after
            .vms
            .iter()
            .filter(|(_, other)| other.wanted() && other.ownership == Ownership::Free);
        on && waiting.any(|(name, _)| self.weight(name) > own)
    }

    /// The highest priority of a VM and of all that needs it, directly or by others, and shall run.
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
                    let mut needs = other.spec.depends_on.keys();
                    other.wanted() && needs.any(|name| all.contains(name))
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
}
