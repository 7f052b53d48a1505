//! Cycles of `depends_on`.

use super::Checker;
use quorate_types::VmName;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Most cycles that are reported.
const MAX_CYCLES: usize = 10;
/// Most searches for one. What is not found here is still refused by the state machine.
const MAX_SEARCHES: usize = 1000;

impl Checker<'_> {
    /// Reports each cycle once, at an entry of it that the manifest holds.
    pub(super) fn dependencies(&mut self) {
        let mut reported: BTreeSet<BTreeSet<VmName>> = BTreeSet::new();
        let manifest = self.manifest;
        let suspects = self.never_free();
        let mut searches = 0;
        for (name, vm) in manifest
            .vms
            .iter()
            .filter(|(name, _)| suspects.contains(*name))
        {
            let circular = |next: &&VmName| *next != name && suspects.contains(*next);
            for next in vm.depends_on.keys().filter(circular) {
                searches += 1;
                if reported.len() >= MAX_CYCLES || searches > MAX_SEARCHES {
                    return;
                }
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

    /// VMs that never become free of dependencies when those without any are taken away again and
    /// again: the ones on a cycle, and the ones that need them. Empty: there is no cycle.
    fn never_free(&self) -> BTreeSet<VmName> {
        let mut open: BTreeMap<&VmName, usize> = BTreeMap::new();
        let mut needed_by: BTreeMap<&VmName, Vec<&VmName>> = BTreeMap::new();
        for (name, vm) in &self.all.vms {
            let known = |next: &&VmName| *next != name && self.all.vms.contains_key(*next);
            let next: Vec<&VmName> = vm.depends_on.keys().filter(known).collect();
            open.insert(name, next.len());
            for next in next {
                needed_by.entry(next).or_default().push(name);
            }
        }
        let mut free: Vec<&VmName> = open
            .iter()
            .filter(|(_, n)| **n == 0)
            .map(|(vm, _)| *vm)
            .collect();
        while let Some(vm) = free.pop() {
            open.remove(vm);
            for dependent in needed_by.get(vm).into_iter().flatten() {
                if let Some(left) = open.get_mut(dependent) {
                    *left -= 1;
                    if *left == 0 {
                        free.push(dependent);
                    }
                }
            }
        }
        open.into_keys().cloned().collect()
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
