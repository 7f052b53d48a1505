//! Cycles of `depends_on`.

use super::Checker;
use quorate_types::VmName;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

impl Checker<'_> {
    /// Reports each cycle once, at an entry of it that the manifest holds.
    pub(super) fn dependencies(&mut self) {
        let mut reported: BTreeSet<BTreeSet<VmName>> = BTreeSet::new();
        let manifest = self.manifest;
        for (name, vm) in &manifest.vms {
            for next in vm.depends_on.keys().filter(|next| *next != name) {
                let Some(mut cycle) = self.path_between(next, name) else {
                    continue;
                };
                if !reported.insert(cycle.iter().cloned().collect()) {
                    continue;
                }
                cycle.insert(0, name.clone());
                let chain: Vec<&str> = cycle.iter().map(VmName::as_str).collect();
                let message = format!(
                    "`depends_on` goes round in a circle: {}",
                    chain.join(" -> ")
                );
                self.report(
                    &["vms", name.as_str(), "depends_on", next.as_str()],
                    message,
                    "remove one of these dependencies: none of these VMs could ever start",
                );
            }
        }
    }

    /// The shortest way from one VM to another along `depends_on`, both ends included.
    fn path_between(&self, from: &VmName, to: &VmName) -> Option<Vec<VmName>> {
        let mut came_from: BTreeMap<&VmName, &VmName> = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        let mut seen = BTreeSet::from([from]);
        while let Some(at) = queue.pop_front() {
            if at == to {
                let mut path = vec![at.clone()];
                let mut step = at;
                while let Some(before) = came_from.get(step) {
                    path.insert(0, (*before).clone());
                    step = before;
                }
                return Some(path);
            }
            let Some(vm) = self.all.vms.get(at) else {
                continue;
            };
            for next in vm.depends_on.keys() {
                if seen.insert(next) {
                    came_from.insert(next, at);
                    queue.push_back(next);
                }
            }
        }
        None
    }
}
