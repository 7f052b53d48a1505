//! Placement rules as an index: who must be kept from whom, and who with whom.
//!
//! Always holds: a VM is in at most one group; `keep_with` rules that share a VM make one group.

use quorate_state::State;
use quorate_types::{RuleSpec, VmName};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(crate) struct Groups {
    /// VMs that each VM must not share a host with.
    pub(crate) apart: Vec<Vec<usize>>,
    /// The group of each VM.
    pub(crate) of: Vec<Option<usize>>,
    /// Members of each group.
    pub(crate) members: Vec<Vec<usize>>,
}

impl Groups {
    pub(crate) fn new(state: &State, index: &BTreeMap<&VmName, usize>) -> Self {
        let count = index.len();
        let mut apart = vec![BTreeSet::new(); count];
        let mut leader: Vec<usize> = (0..count).collect();
        for rule in state.rules.values() {
            let vms: Vec<usize> = rule
                .spec
                .vms()
                .iter()
                .filter_map(|vm| index.get(vm).copied())
                .collect();
            match &rule.spec {
                RuleSpec::KeepApart(_) => {
                    for a in &vms {
                        apart[*a].extend(vms.iter().copied().filter(|b| b != a));
                    }
                }
                RuleSpec::KeepWith(_) => {
                    for pair in vms.windows(2) {
                        let (a, b) = (root(&leader, pair[0]), root(&leader, pair[1]));
                        leader[a.max(b)] = a.min(b);
                    }
                }
            }
        }
        let mut by_root: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for vm in 0..count {
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
        Self {
            apart: apart
                .into_iter()
                .map(|set| set.into_iter().collect())
                .collect(),
            of,
            members,
        }
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
