//! Definitions that nothing can satisfy, each with a minimal set of what conflicts.
//!
//! Owns: the search over hard rules, allowed hosts and counted resources. Always holds: what is
//! reported has no solution (a search that is given up counts as one that might find some); from
//! what is named nothing can be taken away without a solution appearing, as far as the search got;
//! the work is bounded. Must not: know what hosts report (memory, CPU), which changes by itself.
//!
//! ```text
//! VMs --rules, resources--> independent clusters --search--> no placement?
//!   -> drop VMs, then rules, then wishes, one by one, while there is still none -> what is left
//! ```

use crate::{HostName, HostSpec, PoolName, PoolSpec, ResourceName, RuleName, RuleSpec, VmName};
use crate::{LabelName, RuleKind, VmSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Most steps of one search.
const MAX_STEPS: u32 = 20_000;
/// Most steps of all searches for one report.
const MAX_TOTAL: u32 = 400_000;
/// Most conflicts that are reported.
const MAX_FOUND: usize = 10;

/// Everything that is wanted of VMs and said of hosts.
#[derive(Debug, Clone, Default)]
pub struct Site<'a> {
    /// Hosts; empty: not known, and nothing is found.
    pub hosts: BTreeMap<&'a HostName, &'a HostSpec>,
    /// Pools.
    pub pools: BTreeMap<&'a PoolName, &'a PoolSpec>,
    /// VMs.
    pub vms: BTreeMap<&'a VmName, &'a VmSpec>,
    /// Rules.
    pub rules: BTreeMap<&'a RuleName, &'a RuleSpec>,
}

/// Things that cannot hold together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Conflict {
    /// Rules that take part.
    pub rules: Vec<RuleName>,
    /// VMs that take part.
    pub vms: Vec<VmName>,
    /// Of these the ones whose own wishes (`hosts`, `host_labels`, pools) take part, with what is left.
    pub limited: Vec<(VmName, Vec<HostName>)>,
    /// Resources that take part.
    pub resources: Vec<ResourceName>,
    /// Each rule in words.
    words: Vec<String>,
    hosts: usize,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = self.words.clone();
        for (vm, hosts) in &self.limited {
            let hosts: Vec<&str> = hosts.iter().take(5).map(HostName::as_str).collect();
            parts.push(match hosts[..] {
                [] => format!("`{vm}` may run on no host"),
                _ => format!("`{vm}` may run on {} only", hosts.join(", ")),
            });
        }
        for resource in &self.resources {
            let vms: Vec<&str> = self.vms.iter().map(VmName::as_str).collect();
            parts.push(format!(
                "the hosts' `{resource}` must suffice for {}",
                vms.join(", ")
            ));
        }
        let all = if parts.len() > 1 { " together" } else { "" };
        let (n, s) = (self.hosts, if self.hosts == 1 { "" } else { "s" });
        write!(
            f,
            "no placement on the {n} host{s} satisfies this{all}: {}",
            parts.join("; ")
        )
    }
}

/// Finds contradictions.
#[must_use]
pub fn find(site: &Site<'_>) -> Vec<Conflict> {
    if site.hosts.is_empty() {
        return Vec::new();
    }
    let model = Model::new(site);
    let mut found = Vec::new();
    for cluster in model.clusters() {
        if found.len() >= MAX_FOUND {
            break;
        }
        let mut steps = MAX_TOTAL;
        let all = Active::of(&model, cluster);
        if model.impossible(&all, &mut steps) {
            let least = model.reduce(all, &mut steps);
            found.push(model.report(&least));
        }
    }
    found
}

/// A hard rule by index.
#[derive(Debug)]
struct Rule<'a> {
    name: &'a RuleName,
    spec: &'a RuleSpec,
    vms: Vec<usize>,
    /// Domain of each host; absent: it has none.
    domains: Vec<Option<usize>>,
    max: usize,
}

#[derive(Debug)]
struct Model<'a> {
    hosts: Vec<(&'a HostName, &'a HostSpec)>,
    vms: Vec<(&'a VmName, &'a VmSpec)>,
    /// Hosts that each VM's own wishes leave; absent: all.
    allowed: Vec<Option<Vec<bool>>>,
    rules: Vec<Rule<'a>>,
    rules_of: Vec<Vec<usize>>,
    resources: Vec<&'a ResourceName>,
}

/// What is looked at.
#[derive(Debug, Clone)]
struct Active {
    vms: BTreeSet<usize>,
    rules: BTreeSet<usize>,
    /// VMs whose own wishes count.
    wishes: BTreeSet<usize>,
    resources: BTreeSet<usize>,
}

impl Active {
    fn of(model: &Model<'_>, vms: BTreeSet<usize>) -> Self {
        let rules = vms.iter().flat_map(|vm| model.rules_of[*vm].clone());
        let wishes = vms.iter().copied();
        let limited = |vm: &usize| model.allowed[*vm].is_some();
        Self {
            rules: rules.collect(),
            wishes: wishes.filter(limited).collect(),
            resources: (0..model.resources.len())
                .filter(|resource| vms.iter().any(|vm| model.uses(*vm, *resource) > 0))
                .collect(),
            vms,
        }
    }
}

impl<'a> Model<'a> {
    fn new(site: &Site<'a>) -> Self {
        let hosts: Vec<_> = site
            .hosts
            .iter()
            .map(|(name, spec)| (*name, *spec))
            .collect();
        let vms: Vec<_> = site.vms.iter().map(|(name, spec)| (*name, *spec)).collect();
        let index: BTreeMap<&VmName, usize> = vms
            .iter()
            .enumerate()
            .map(|(at, (name, _))| (*name, at))
            .collect();
        let allowed = vms.iter().map(|(_, vm)| allowed(site, vm, &hosts));
        let allowed = allowed.collect();
        let hard = site.rules.iter().filter(|(_, rule)| rule.hard());
        let rules: Vec<Rule<'a>> = hard
            .map(|(name, spec)| rule(name, spec, &index, &hosts))
            .collect();
        let mut rules_of = vec![Vec::new(); vms.len()];
        for (at, rule) in rules.iter().enumerate() {
            for vm in &rule.vms {
                rules_of[*vm].push(at);
            }
        }
        let resources: BTreeSet<&ResourceName> =
            vms.iter().flat_map(|(_, vm)| vm.resources.keys()).collect();
        Self {
            hosts,
            vms,
            allowed,
            rules,
            rules_of,
            resources: resources.into_iter().collect(),
        }
    }

    fn allows(&self, vm: usize, host: usize) -> bool {
        self.allowed[vm].as_ref().is_none_or(|hosts| hosts[host])
    }

    /// What a VM that shall run needs of a resource.
    fn uses(&self, vm: usize, resource: usize) -> u64 {
        let spec = self.vms[vm].1;
        if spec.power != crate::spec::Power::Running {
            return 0;
        }
        let need = spec.resources.get(self.resources[resource]);
        need.copied().unwrap_or(0)
    }

    fn has(&self, host: usize, resource: usize) -> u64 {
        let found = self.hosts[host].1.resources.get(self.resources[resource]);
        found.copied().unwrap_or(0)
    }

    /// VMs that rules or a scarce resource connect.
    fn clusters(&self) -> Vec<BTreeSet<usize>> {
        let mut leader: Vec<usize> = (0..self.vms.len()).collect();
        for rule in &self.rules {
            for pair in rule.vms.windows(2) {
                union(&mut leader, pair[0], pair[1]);
            }
        }
        for resource in 0..self.resources.len() {
            let users = (0..self.vms.len()).filter(|vm| self.uses(*vm, resource) > 0);
            let users: Vec<usize> = users.collect();
            for pair in users.windows(2) {
                union(&mut leader, pair[0], pair[1]);
            }
        }
        let mut by_root: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for vm in 0..self.vms.len() {
            by_root.entry(root(&leader, vm)).or_default().insert(vm);
        }
        let bound = |vms: &BTreeSet<usize>| {
            vms.len() > 1
                || vms.iter().any(|vm| {
                    !self.rules_of[*vm].is_empty()
                        || !self.vms[*vm].1.resources.is_empty()
                        || self.allowed[*vm].is_some()
                })
        };
        by_root.into_values().filter(bound).collect()
    }

    /// There is surely no placement of what is looked at.
    fn impossible(&self, active: &Active, steps: &mut u32) -> bool {
        let mut search = Search::new(self, active);
        search.steps = MAX_STEPS.min(*steps);
        let before = search.steps;
        let outcome = search.place(0);
        *steps -= before - search.steps;
        outcome == Some(false)
    }

    /// Takes away whatever is not needed for the contradiction.
    fn reduce(&self, mut active: Active, steps: &mut u32) -> Active {
        type Part = fn(&mut Active) -> &mut BTreeSet<usize>;
        let parts: [Part; 4] = [
            |active| &mut active.vms,
            |active| &mut active.rules,
            |active| &mut active.resources,
            |active| &mut active.wishes,
        ];
        for part in parts {
            let all: Vec<usize> = part(&mut active).iter().copied().collect();
            self.without(&mut active, part, &all, steps);
        }
        active.wishes = &active.wishes & &active.vms;
        active
    }

    /// Tries to do without `some`: all of them at once, else each half by itself.
    fn without(
        &self,
        active: &mut Active,
        part: fn(&mut Active) -> &mut BTreeSet<usize>,
        some: &[usize],
        steps: &mut u32,
    ) {
        if some.is_empty() || *steps == 0 {
            return;
        }
        let mut fewer = active.clone();
        part(&mut fewer).retain(|at| !some.contains(at));
        if self.impossible(&fewer, steps) {
            *active = fewer;
        } else if some.len() > 1 {
            let (left, right) = some.split_at(some.len() / 2);
            self.without(active, part, left, steps);
            self.without(active, part, right, steps);
        }
    }

    fn report(&self, active: &Active) -> Conflict {
        let name = |vm: &usize| self.vms[*vm].0.clone();
        let rules = active.rules.iter().map(|at| &self.rules[*at]);
        let words = rules.clone().map(|rule| {
            let here = rule.vms.iter().filter(|vm| active.vms.contains(vm));
            let vms: Vec<&str> = here.map(|vm| self.vms[*vm].0.as_str()).collect();
            let (name, how) = (rule.name, rule.spec.describe());
            format!("rule `{name}` wants {} {how}", vms.join(", "))
        });
        let limited = active.wishes.iter().map(|vm| {
            let hosts = self.hosts.iter().enumerate();
            let hosts = hosts.filter(|(at, _)| self.allows(*vm, *at));
            (
                name(vm),
                hosts.map(|(_, (host, _))| (*host).clone()).collect(),
            )
        });
        let resources = active.resources.iter();
        Conflict {
            words: words.collect(),
            rules: rules.map(|rule| rule.name.clone()).collect(),
            vms: active.vms.iter().map(name).collect(),
            limited: limited.collect(),
            resources: resources.map(|at| self.resources[*at].clone()).collect(),
            hosts: self.hosts.len(),
        }
    }
}

/// Hosts that a VM's own wishes and its pools leave; `None`: all.
fn allowed(site: &Site<'_>, vm: &VmSpec, hosts: &[(&HostName, &HostSpec)]) -> Option<Vec<bool>> {
    let pools = vm
        .disks
        .iter()
        .filter_map(|disk| site.pools.get(&disk.pool));
    let pools: Vec<_> = pools
        .map(|pool| pool.hosts())
        .filter(|hosts| !hosts.is_empty())
        .collect();
    if vm.hosts.is_empty() && vm.host_labels.is_empty() && pools.is_empty() {
        return None;
    }
    let may = |(name, host): &(&HostName, &HostSpec)| {
        pools.iter().all(|pool| pool.contains(*name)) && vm.allows(name, host)
    };
    let hosts: Vec<bool> = hosts.iter().map(may).collect();
    hosts.contains(&false).then_some(hosts)
}

fn rule<'a>(
    name: &'a RuleName,
    spec: &'a RuleSpec,
    index: &BTreeMap<&VmName, usize>,
    hosts: &[(&'a HostName, &'a HostSpec)],
) -> Rule<'a> {
    let mut values: BTreeMap<&LabelName, usize> = BTreeMap::new();
    let domains: Vec<Option<usize>> = match &spec.across {
        None => (0..hosts.len()).map(Some).collect(),
        Some(label) => hosts
            .iter()
            .map(|(_, host)| {
                let next = values.len();
                let value = host.labels.get(label)?;
                Some(*values.entry(value).or_insert(next))
            })
            .collect(),
    };
    let count = if spec.across.is_some() {
        values.len()
    } else {
        hosts.len()
    };
    let vms: Vec<usize> = spec
        .vms
        .iter()
        .filter_map(|vm| index.get(vm).copied())
        .collect();
    let share = vms.len().div_ceil(count.max(1));
    let given = spec
        .max
        .map(|max| usize::try_from(max).unwrap_or(usize::MAX));
    let max = match spec.kind {
        RuleKind::KeepApart => given.unwrap_or(1),
        RuleKind::Spread => given.unwrap_or(share),
        RuleKind::KeepWith => usize::MAX,
    };
    Rule {
        name,
        spec,
        vms,
        domains,
        max,
    }
}

/// VMs that go together, as one thing to place.
#[derive(Debug, Default)]
struct Unit {
    hosts: Vec<usize>,
    /// Rule -> members in it.
    rules: Vec<(usize, usize)>,
    needs: Vec<(usize, u64)>,
}

/// A search for one placement: most limited units first; of hosts that are alike and unused only
/// the first is tried.
struct Search<'m, 'a> {
    model: &'m Model<'a>,
    units: Vec<Unit>,
    /// Members by rule and domain.
    counts: BTreeMap<(usize, usize), usize>,
    left: Vec<Vec<u64>>,
    used: Vec<bool>,
    /// Hosts with the same number are alike as long as they are unused.
    alike: Vec<usize>,
    steps: u32,
}

impl<'m, 'a> Search<'m, 'a> {
    fn new(model: &'m Model<'a>, active: &Active) -> Self {
        let vms: Vec<usize> = active.vms.iter().copied().collect();
        let mut leader: Vec<usize> = (0..vms.len()).collect();
        for rule in active.rules.iter().map(|at| &model.rules[*at]) {
            if rule.spec.kind == RuleKind::KeepWith {
                let here = rule.vms.iter().filter_map(|vm| vms.binary_search(vm).ok());
                let here: Vec<usize> = here.collect();
                for pair in here.windows(2) {
                    union(&mut leader, pair[0], pair[1]);
                }
            }
        }
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, vm) in vms.iter().enumerate() {
            groups.entry(root(&leader, at)).or_default().push(*vm);
        }
        let mut units: Vec<Unit> = groups
            .values()
            .map(|vms| unit(model, active, vms))
            .collect();
        units.sort_by_key(|unit| (unit.hosts.len(), std::cmp::Reverse(unit.rules.len())));
        let alike = alike(model, active, &units);
        let left = model.hosts.iter().enumerate();
        let left = left.map(|(host, _)| {
            let all = 0..model.resources.len();
            all.map(|at| {
                if active.resources.contains(&at) {
                    model.has(host, at)
                } else {
                    0
                }
            })
            .collect()
        });
        Self {
            units,
            counts: BTreeMap::new(),
            left: left.collect(),
            used: vec![false; model.hosts.len()],
            alike,
            steps: 0,
            model,
        }
    }

    /// `None`: given up.
    fn place(&mut self, at: usize) -> Option<bool> {
        if at == self.units.len() {
            return Some(true);
        }
        let mut tried: BTreeSet<usize> = BTreeSet::new();
        for host in self.units[at].hosts.clone() {
            if !self.used[host] && !tried.insert(self.alike[host]) {
                continue;
            }
            self.steps = self.steps.checked_sub(1)?;
            if !self.fits(at, host) {
                continue;
            }
            let before = self.used[host];
            self.put(at, host, true);
            let found = self.place(at + 1);
            self.put(at, host, false);
            self.used[host] = before;
            if found != Some(false) {
                return found;
            }
        }
        Some(false)
    }

    fn fits(&self, at: usize, host: usize) -> bool {
        let unit = &self.units[at];
        let rules = unit.rules.iter().all(|(rule, members)| {
            let Some(domain) = self.model.rules[*rule].domains[host] else {
                return false;
            };
            let there = self.counts.get(&(*rule, domain)).copied().unwrap_or(0);
            there + members <= self.model.rules[*rule].max
        });
        rules
            && unit
                .needs
                .iter()
                .all(|(at, need)| self.left[host][*at] >= *need)
    }

    fn put(&mut self, at: usize, host: usize, add: bool) {
        let unit = &self.units[at];
        for (rule, members) in &unit.rules {
            if let Some(domain) = self.model.rules[*rule].domains[host] {
                let count = self.counts.entry((*rule, domain)).or_default();
                *count = if add {
                    *count + members
                } else {
                    *count - members
                };
            }
        }
        for (resource, need) in &unit.needs {
            let left = &mut self.left[host][*resource];
            *left = if add { *left - need } else { *left + need };
        }
        self.used[host] = true;
    }
}

fn unit(model: &Model<'_>, active: &Active, vms: &[usize]) -> Unit {
    let wishes: Vec<&usize> = vms.iter().filter(|vm| active.wishes.contains(vm)).collect();
    let all = 0..model.hosts.len();
    let hosts = all.filter(|host| wishes.iter().all(|vm| model.allows(**vm, *host)));
    let mut rules: BTreeMap<usize, usize> = BTreeMap::new();
    for vm in vms {
        let hard = model.rules_of[*vm]
            .iter()
            .filter(|at| active.rules.contains(at));
        for rule in hard.filter(|at| model.rules[**at].spec.kind != RuleKind::KeepWith) {
            *rules.entry(*rule).or_default() += 1;
        }
    }
    let needs = active.resources.iter().map(|resource| {
        let need = vms.iter().map(|vm| model.uses(*vm, *resource));
        (*resource, need.fold(0u64, u64::saturating_add))
    });
    Unit {
        hosts: hosts.collect(),
        rules: rules.into_iter().collect(),
        needs: needs.filter(|(_, need)| *need > 0).collect(),
    }
}

/// Numbers hosts by what they are to these units. Labels that matter make hosts different.
fn alike(model: &Model<'_>, active: &Active, units: &[Unit]) -> Vec<usize> {
    let mut takes: Vec<Vec<bool>> = vec![vec![false; units.len()]; model.hosts.len()];
    for (at, unit) in units.iter().enumerate() {
        for host in &unit.hosts {
            takes[*host][at] = true;
        }
    }
    let labels: BTreeSet<&LabelName> = active
        .rules
        .iter()
        .filter_map(|at| model.rules[*at].spec.across.as_ref())
        .collect();
    let mut numbers = BTreeMap::new();
    let hosts = model.hosts.iter().enumerate();
    hosts
        .map(|(host, (_, spec))| {
            let values: Vec<_> = labels.iter().map(|label| spec.labels.get(*label)).collect();
            let resources: Vec<u64> = active
                .resources
                .iter()
                .map(|at| model.has(host, *at))
                .collect();
            let next = numbers.len();
            *numbers
                .entry((takes[host].clone(), values, resources))
                .or_insert(next)
        })
        .collect()
}

fn root(leader: &[usize], mut at: usize) -> usize {
    while leader[at] != at {
        at = leader[at];
    }
    at
}

fn union(leader: &mut [usize], a: usize, b: usize) {
    let (a, b) = (root(leader, a), root(leader, b));
    leader[a.max(b)] = a.min(b);
}

#[cfg(test)]
mod tests;
