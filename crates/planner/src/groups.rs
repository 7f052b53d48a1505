//! Hard `keep_with` rules as an index: who must be kept with whom.
//!
//! Always holds: a VM is in at most one group; `keep_with` rules that share a VM make one group.

use crate::names::Names;
use quorate_state::State;
use quorate_types::VmName;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub(crate) struct Groups {
    /// The group of each VM.
    pub(crate) of: Vec<Option<usize>>,
    /// Members of each group.
    pub(crate) members: Vec<Vec<usize>>,
}

impl Groups {
    pub(crate) fn new(state: &State, index: &Names<'_, VmName>) -> Self {
        let count = index.len();
        let mut leader: Vec<usize> = (0..count).collect();
        let mut tied: Vec<usize> = Vec::new();
        for rule in state.rules.values().filter(|rule| rule.spec.ties()) {
            let vms = rule.spec.vms().iter();
            let vms: Vec<usize> = vms.filter_map(|vm| index.get(vm)).collect();
            for pair in vms.windows(2) {
                let (a, b) = (root(&leader, pair[0]), root(&leader, pair[1]));
                leader[a.max(b)] = a.min(b);
            }
            tied.extend(vms);
        }
        tied.sort_unstable();
        tied.dedup();
        let mut by_root: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for vm in tied {
            by_root.entry(root(&leader, vm)).or_default().push(vm);
        }
        let members: Vec<Vec<usize>> = by_root
            .into_values()
            .filter(|members| members.len() > 1)
            .collect();
        let mut of = vec![None; count];
        for (group, vms) in members.iter().enumerate() {
            for vm in vms {
                of[*vm] = Some(group);
            }
        }
        Self { of, members }
    }

    /// The other members of a VM's group.
    pub(crate) fn companions(&self, vm: usize) -> impl Iterator<Item = usize> + '_ {
        let members = self.of[vm].map(|group| self.members[group].as_slice());
        members
            .unwrap_or_default()
            .iter()
            .copied()
            .filter(move |other| *other != vm)
    }
}

fn root(leader: &[usize], mut vm: usize) -> usize {
    while leader[vm] != vm {
        vm = leader[vm];
    }
    vm
}
