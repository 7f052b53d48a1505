//! Placement rules, looked up by VM.

use super::{Lint, Violation};
use crate::Input;
use quorate_membership::HostHealth;
use quorate_state::{HostMode, OrderKind, Ownership, State};
use quorate_types::{HostName, LabelName, RuleKind, RuleName, RuleSpec, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// Hard rules and groups by VM.
pub(super) struct Book<'a> {
    state: &'a State,
    after: &'a State,
    by_vm: BTreeMap<&'a VmName, Vec<&'a RuleName>>,
    /// Hosts that take guests.
    good: BTreeSet<&'a HostName>,
}

impl<'a> Book<'a> {
    pub(super) fn new(input: &Input<'a>, after: &'a State) -> Self {
        let state = input.state;
        let mut by_vm: BTreeMap<&VmName, Vec<&RuleName>> = BTreeMap::new();
        for (name, rule) in state.rules.iter().filter(|(_, rule)| rule.spec.hard()) {
            for vm in rule.spec.vms() {
                by_vm.entry(vm).or_default().push(name);
            }
        }
        let good = state.hosts.iter().filter(|(name, host)| {
            let up = input.health.get(*name) == Some(&HostHealth::Up);
            host.mode == HostMode::Active && up && input.reports.contains_key(*name)
        });
        Self {
            state,
            after,
            by_vm,
            good: good.map(|(name, _)| name).collect(),
        }
    }

    fn rules(&self, vm: &VmName) -> impl Iterator<Item = (&'a RuleName, &'a RuleSpec)> + '_ {
        let names = self.by_vm.get(vm).into_iter().flatten();
        names.filter_map(|name| Some((*name, &self.state.rules.get(*name)?.spec)))
    }

    /// All VMs that hard rules keep together with this one, and itself.
    pub(super) fn companions(&self, vm: &VmName) -> BTreeSet<VmName> {
        let mut group: BTreeSet<VmName> = [vm.clone()].into();
        let mut todo = vec![vm.clone()];
        while let Some(next) = todo.pop() {
            for (_, rule) in self.rules(&next).filter(|(_, rule)| rule.ties()) {
                for other in rule.vms() {
                    if group.insert(other.clone()) {
                        todo.push(other.clone());
                    }
                }
            }
        }
        group
    }

    fn domain(&self, rule: &RuleSpec, host: &'a HostName) -> Option<Domain<'a>> {
        match &rule.across {
            None => Some(Domain::Host(host)),
            Some(label) => {
                let spec = &self.state.hosts.get(host)?.spec;
                spec.labels.get(label).map(Domain::Value)
            }
        }
    }

    /// Most VMs of a rule in one domain.
    fn limit(&self, rule: &RuleSpec) -> usize {
        let given = rule
            .max
            .map(|max| usize::try_from(max).unwrap_or(usize::MAX));
        if rule.kind == RuleKind::KeepApart {
            return given.unwrap_or(1);
        }
        let domains = self.good.iter().filter_map(|host| self.domain(rule, host));
        let domains: BTreeSet<Domain<'_>> = domains.collect();
        let there = rule.vms().iter().filter_map(|vm| self.state.vms.get(vm));
        let there = there.filter(|vm| vm.wanted() || vm.ownership != Ownership::Free);
        given.unwrap_or(there.count().div_ceil(domains.len().max(1)).max(1))
    }

    /// VMs of a rule that are, or may be, in a domain after the plan.
    fn count(&self, rule: &RuleSpec, domain: Domain<'_>) -> usize {
        let places = |vm: &&VmName| {
            let seen = self.after.vms.get(*vm)?;
            let mut hosts = seen.ownership.hosts().into_iter();
            hosts.find(|(host, _)| self.domain(rule, host) == Some(domain))
        };
        rule.vms().iter().filter_map(|vm| places(&vm)).count()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Domain<'a> {
    Host(&'a HostName),
    Value(&'a LabelName),
}

impl<'a> Lint<'a> {
    pub(super) fn rules(&self, vm: &VmName, host: &'a HostName, found: &mut Vec<Violation>) {
        for (name, rule) in self.book.rules(vm) {
            let plain = rule.kind == RuleKind::KeepApart && rule.across.is_none();
            if rule.kind == RuleKind::KeepWith || (plain && rule.max.unwrap_or(1) == 1) {
                self.pairs(vm, host, rule, found);
                continue;
            }
            let domain = self.book.domain(rule, host);
            let full =
                domain.is_none_or(|domain| self.book.count(rule, domain) > self.book.limit(rule));
            if full {
                found.push(Violation::Domain {
                    vm: vm.clone(),
                    host: host.clone(),
                    rule: name.clone(),
                });
            }
        }
    }

    /// Rules that hold for each pair.
    fn pairs(&self, vm: &VmName, host: &HostName, rule: &RuleSpec, found: &mut Vec<Violation>) {
        for other in rule.vms().iter().filter(|other| *other != vm) {
            let broken = match rule.kind {
                RuleKind::KeepWith => self.split(vm, host, other),
                _ => self.places(other).contains(host),
            };
            if broken {
                found.push(Violation::Rule {
                    vm: vm.clone(),
                    host: host.clone(),
                    other: other.clone(),
                });
            }
        }
    }

    /// `other` stays on a good host, and nobody of the group is where `vm` goes. (A group that is
    /// split already may be joined on either side.)
    fn split(&self, vm: &VmName, host: &HostName, other: &VmName) -> bool {
        let good = |at: &HostName| {
            let mode = self.input.state.hosts.get(at).map(|record| record.mode);
            self.up(at) && mode == Some(HostMode::Active)
        };
        // One that is being stopped is given a place anew.
        let stays = |name: &VmName| {
            let run = OrderKind::Run;
            self.after.vms.get(name).is_some_and(|seen| {
                let stops =
                    matches!(&seen.ownership, Ownership::Owned { order, .. } if *order != run);
                seen.wanted() && !stops
            })
        };
        let joined = self
            .book
            .companions(vm)
            .into_iter()
            .any(|name| name != *vm && stays(&name) && self.places(&name).contains(host));
        // One that migrates stays where it arrives; only a target that is lost leaves it at its source.
        let seen = self.after.vms.get(other);
        let stays_at = seen.and_then(|seen| match &seen.ownership {
            Ownership::Migrating { to, .. } if self.up(to) => Some(to),
            ownership => ownership.host(),
        });
        stays(other) && !joined && stays_at.is_some_and(good)
    }
}
