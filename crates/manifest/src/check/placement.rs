//! Rules that no placement can satisfy, each with a minimal set of things that conflict.

use super::{Checker, listed};
use quorate_types::{HostName, HostSpec, RuleKind, RuleName, VmName, conflict};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

impl Checker<'_> {
    pub(super) fn placement(&mut self) {
        self.nowhere();
        self.together_and_apart();
        self.together_without_host();
        self.apart_without_room();
        // The common contradictions have words of their own; this finds all others.
        if self.problems.is_empty() {
            self.contradictions();
        }
    }

    fn contradictions(&mut self) {
        let all = self.all.clone();
        let nothing = HostSpec::default();
        let spec = |host| all.host_specs.get(host).unwrap_or(&nothing);
        let found = conflict::find(&conflict::Site {
            hosts: all.hosts.iter().map(|host| (host, spec(host))).collect(),
            pools: all.pools.iter().collect(),
            vms: all.vms.iter().collect(),
            rules: all.rules.iter().collect(),
        });
        for conflict in found {
            let rules: Vec<&RuleName> = conflict.rules.iter().collect();
            let vms: Vec<&VmName> = conflict.vms.iter().collect();
            let message = conflict.to_string();
            let hint = "change or remove one of these, or give a rule a `weight:` to make it soft";
            if self.touched(&rules, &vms) {
                self.conflict(&rules, &vms, message, hint);
            } else if !self.manifest.hosts.is_empty() {
                self.report(&["hosts"], message, hint);
            }
        }
    }

    fn touched(&self, rules: &[&RuleName], vms: &[&VmName]) -> bool {
        rules.iter().any(|r| self.manifest.rules.contains_key(*r))
            || vms.iter().any(|v| self.manifest.vms.contains_key(*v))
    }

    /// The place to point at: the last of the rules that the manifest holds, else the first VM in it.
    fn culprit(&self, rules: &[&RuleName], vms: &[&VmName]) -> Vec<String> {
        if let Some(rule) = rules
            .iter()
            .rev()
            .find(|r| self.manifest.rules.contains_key(**r))
        {
            return vec!["rules".to_owned(), rule.to_string()];
        }
        let vm = vms.iter().find(|v| self.manifest.vms.contains_key(**v));
        vm.map_or_else(Vec::new, |vm| vec!["vms".to_owned(), vm.to_string()])
    }

    fn conflict(&mut self, rules: &[&RuleName], vms: &[&VmName], message: String, hint: &str) {
        if self.touched(rules, vms) {
            let path = self.culprit(rules, vms);
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            self.report(&path, message, hint);
        }
    }

    /// A VM whose own list and pools leave no host.
    fn nowhere(&mut self) {
        let manifest = self.manifest;
        for (name, vm) in &manifest.vms {
            let unknown = vm.hosts.iter().any(|host| !self.all.hosts.contains(host));
            let empty = self
                .all
                .allowed(vm)
                .is_some_and(|allowed| allowed.is_empty());
            if empty && !vm.host_labels.is_empty() {
                let labels: Vec<String> = vm.host_labels.keys().map(ToString::to_string).collect();
                let message = format!(
                    "`{name}` could run nowhere: no host that it may run on has what it asks for in {}",
                    listed(labels)
                );
                self.report(
                    &["vms", name.as_str(), "host_labels"],
                    message,
                    "change its `host_labels:`, or label a host under `hosts:`",
                );
            } else if empty && (self.all.hosts.is_empty() || !unknown) {
                let pools: BTreeSet<&str> =
                    vm.disks.iter().map(|disk| disk.pool.as_str()).collect();
                let message = format!(
                    "`{name}` could run nowhere: none of its hosts reaches {}",
                    listed(pools)
                );
                self.report(
                    &["vms", name.as_str()],
                    message,
                    "change its `hosts:` or the pool's `hosts:`",
                );
            }
        }
    }

    /// Neighbours of each VM by `keep_with` rules.
    fn together(&self) -> BTreeMap<VmName, Vec<(RuleName, VmName)>> {
        let mut edges: BTreeMap<VmName, Vec<(RuleName, VmName)>> = BTreeMap::new();
        for (name, rule) in &self.all.rules {
            if rule.ties() {
                let vms = rule.vms();
                // A star is enough: the first member is next to each other one.
                let Some(first) = vms.first() else { continue };
                for other in vms.iter().skip(1) {
                    edges
                        .entry(first.clone())
                        .or_default()
                        .push((name.clone(), other.clone()));
                    edges
                        .entry(other.clone())
                        .or_default()
                        .push((name.clone(), first.clone()));
                }
            }
        }
        edges
    }

    fn together_and_apart(&mut self) {
        let edges = self.together();
        let rules = self.all.rules.clone();
        for (apart, rule) in &rules {
            // Rules over other domains than hosts are left to the general search.
            let plain = rule.across.is_none() && rule.max.unwrap_or(1) == 1;
            if rule.kind != RuleKind::KeepApart || !rule.hard() || !plain {
                continue;
            }
            let vms = rule.vms();
            let mut best: Option<(Vec<RuleName>, &VmName, &VmName)> = None;
            for (index, a) in vms.iter().enumerate() {
                let reach = chains(&edges, a);
                for b in vms.iter().skip(index + 1) {
                    if let Some(chain) = reach.get(b)
                        && best
                            .as_ref()
                            .is_none_or(|(best, _, _)| chain.len() < best.len())
                    {
                        best = Some((chain.clone(), a, b));
                    }
                }
            }
            if let Some((chain, a, b)) = best {
                let mut involved: Vec<&RuleName> = chain.iter().collect();
                involved.push(apart);
                let message = format!(
                    "`{apart}` keeps `{a}` and `{b}` apart, but {} {} them together",
                    listed(&chain),
                    if chain.len() == 1 { "keeps" } else { "keep" }
                );
                self.conflict(
                    &involved,
                    &[a, b],
                    message,
                    "remove one of these rules, or one of the two VMs from it",
                );
            }
        }
    }

    /// Groups of VMs that stay together but have no host in common.
    fn together_without_host(&mut self) {
        for group in self.groups() {
            if group.len() < 2 {
                continue;
            }
            let allowed: Vec<(&VmName, BTreeSet<HostName>)> = group
                .iter()
                .filter_map(|name| Some((name, self.all.allowed(self.all.vms.get(name)?)?)))
                .filter(|(_, hosts)| !hosts.is_empty())
                .collect();
            let Some(conflict) = minimal_disjoint(&allowed) else {
                continue;
            };
            let rules = self.all.rules.clone();
            let involved: Vec<&RuleName> = rules
                .iter()
                .filter(|(_, rule)| rule.ties() && rule.vms().iter().any(|vm| group.contains(vm)))
                .map(|(name, _)| name)
                .collect();
            let message = format!(
                "{} must stay together, but no host is allowed for all of them",
                listed(conflict.iter().map(|name| name.as_str()))
            );
            let conflict: Vec<VmName> = conflict.into_iter().cloned().collect();
            let vms: Vec<&VmName> = conflict.iter().collect();
            self.conflict(
                &involved,
                &vms,
                message,
                "change their `hosts:`, or remove one of them from the rule",
            );
        }
    }

    /// All VMs that rules keep together, by group.
    fn groups(&self) -> Vec<BTreeSet<VmName>> {
        let edges = self.together();
        let mut seen = BTreeSet::new();
        let mut groups = Vec::new();
        for name in edges.keys() {
            if seen.contains(name) {
                continue;
            }
            let mut group: BTreeSet<VmName> = chains(&edges, name).into_keys().collect();
            group.insert(name.clone());
            seen.extend(group.iter().cloned());
            groups.push(group);
        }
        groups
    }

    /// More VMs kept apart than there are hosts for them (Hall's condition).
    fn apart_without_room(&mut self) {
        let rules = self.all.rules.clone();
        for (name, rule) in &rules {
            // Rules over other domains than hosts are left to the general search.
            let plain = rule.across.is_none() && rule.max.unwrap_or(1) == 1;
            if rule.kind != RuleKind::KeepApart || !rule.hard() || !plain {
                continue;
            }
            let vms = rule.vms();
            let wishes: Option<Vec<(&VmName, BTreeSet<HostName>)>> = vms
                .iter()
                .map(|vm| Some((vm, self.all.vms.get(vm)?)))
                .map(|found| found.and_then(|(vm, spec)| Some((vm, self.all.allowed(spec)?))))
                .collect();
            let Some(wishes) = wishes else { continue };
            if wishes.iter().any(|(_, hosts)| hosts.is_empty()) {
                continue;
            }
            let Some((crowd, hosts)) = overfull(&wishes) else {
                continue;
            };
            let many = hosts.len() != 1;
            let message = format!(
                "`{name}` keeps {} VMs apart that have only {} host{} to run on: {} on {}",
                crowd.len(),
                hosts.len(),
                if many { "s" } else { "" },
                listed(crowd.iter().map(|vm| vm.as_str())),
                listed(hosts.iter().map(HostName::as_str)),
            );
            self.conflict(
                &[name],
                &crowd,
                message,
                "allow more hosts, add a host, or take a VM out of the rule",
            );
        }
    }
}

/// For every VM that `keep_with` rules tie to `from`: the fewest rules that do it.
fn chains(
    edges: &BTreeMap<VmName, Vec<(RuleName, VmName)>>,
    from: &VmName,
) -> BTreeMap<VmName, Vec<RuleName>> {
    let mut found: BTreeMap<VmName, Vec<RuleName>> = BTreeMap::from([(from.clone(), Vec::new())]);
    let mut queue = VecDeque::from([from.clone()]);
    while let Some(at) = queue.pop_front() {
        let so_far = found.get(&at).cloned().unwrap_or_default();
        for (rule, next) in edges.get(&at).into_iter().flatten() {
            let mut chain = so_far.clone();
            if !chain.contains(rule) {
                chain.push(rule.clone());
            }
            let better = found.get(next).is_none_or(|old| chain.len() < old.len());
            if better {
                found.insert(next.clone(), chain);
                queue.push_back(next.clone());
            }
        }
    }
    found.remove(from);
    found
}

/// A minimal set of VMs whose allowed hosts have nothing in common.
fn minimal_disjoint<'a>(allowed: &[(&'a VmName, BTreeSet<HostName>)]) -> Option<Vec<&'a VmName>> {
    let empty = |set: &[&(&VmName, BTreeSet<HostName>)]| {
        let mut sets = set.iter().map(|(_, hosts)| hosts);
        let Some(first) = sets.next() else {
            return false;
        };
        let mut common = first.clone();
        for hosts in sets {
            common = common.intersection(hosts).cloned().collect();
        }
        common.is_empty()
    };
    let mut kept: Vec<&(&'a VmName, BTreeSet<HostName>)> = allowed.iter().collect();
    if !empty(&kept) {
        return None;
    }
    let mut index = 0;
    while index < kept.len() {
        let mut without = kept.clone();
        without.remove(index);
        if empty(&without) {
            kept = without;
        } else {
            index += 1;
        }
    }
    Some(kept.into_iter().map(|(name, _)| *name).collect())
}

/// VMs that together have fewer hosts than they are, if there are such, with these hosts.
fn overfull<'a>(
    wishes: &[(&'a VmName, BTreeSet<HostName>)],
) -> Option<(Vec<&'a VmName>, BTreeSet<HostName>)> {
    let mut taken: BTreeMap<&HostName, usize> = BTreeMap::new();
    for start in 0..wishes.len() {
        let mut vms = BTreeSet::from([start]);
        let mut hosts: BTreeMap<&HostName, usize> = BTreeMap::new();
        let mut queue = VecDeque::from([start]);
        let mut free = None;
        'search: while let Some(vm) = queue.pop_front() {
            for host in &wishes[vm].1 {
                if hosts.contains_key(host) {
                    continue;
                }
                hosts.insert(host, vm);
                match taken.get(host) {
                    None => {
                        free = Some(host);
                        break 'search;
                    }
                    Some(holder) => {
                        if vms.insert(*holder) {
                            queue.push_back(*holder);
                        }
                    }
                }
            }
        }
        let Some(mut host) = free else {
            let crowd = vms.iter().map(|vm| wishes[*vm].0).collect();
            return Some((crowd, hosts.into_keys().cloned().collect()));
        };
        // Move along the path that was found: each VM on it takes the host it reached.
        loop {
            let vm = hosts[host];
            let before = taken
                .iter()
                .find(|(_, holder)| **holder == vm)
                .map(|(h, _)| *h);
            taken.insert(host, vm);
            match before {
                Some(before) if vm != start => host = before,
                _ => break,
            }
        }
    }
    None
}
