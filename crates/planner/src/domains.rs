//! Rules over domains: how many VMs of a rule each domain has.
//!
//! ```text
//! keep_apart [across LABEL] [max N]  at most N (1) in a domain     hard: a host is rejected
//! spread     [across LABEL] [max N]  at most an even share, or N   soft: it scores less
//! keep_with  with a weight           the more companions, the better (hard ones: `groups`)
//! ```
//! Always holds: a VM counts once in each domain that it may be in; an even share counts the
//! domains that have a host that takes guests now, so a lost rack never keeps a VM from starting.

use crate::names::Names;
use crate::work::Own;
use quorate_state::{Ownership, State};
use quorate_types::{HostSpec, LabelName, RuleKind, RuleName, RuleSpec, VmName};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Marks a host that has no domain: it lacks the label.
const NOWHERE: u32 = u32::MAX;
/// Among hosts that a hard `spread` allows, emptier domains are this much better for each VM.
const EVEN: i64 = 40;

/// A rule with its counts.
#[derive(Debug)]
pub(crate) struct Rule<'a> {
    pub(crate) name: &'a RuleName,
    pub(crate) spec: &'a RuleSpec,
    pub(crate) vms: Vec<usize>,
    /// Domain of each host; shared by all rules over the same label.
    of_host: Rc<[u32]>,
    /// How many VMs each domain has, where any were counted: by domain. A rule has few VMs, a
    /// site may have a thousand hosts.
    counts: Vec<(u32, u32)>,
    pub(crate) max: u32,
}

/// All rules but hard `keep_with`.
#[derive(Debug, Default)]
pub(crate) struct Domains<'a> {
    pub(crate) rules: Vec<Rule<'a>>,
    /// Rules of each VM.
    pub(crate) of: Vec<Vec<usize>>,
}

/// What is known of hosts when the rules are set up.
pub(crate) struct HostFacts<'a> {
    pub(crate) spec: Option<&'a HostSpec>,
    /// It takes guests now.
    pub(crate) good: bool,
}

impl<'a> Domains<'a> {
    pub(crate) fn new(
        state: &'a State,
        index: &Names<'_, VmName>,
        hosts: &[HostFacts<'a>],
    ) -> Self {
        let mut of = vec![Vec::new(); index.len()];
        let mut rules = Vec::new();
        let mut by_label: BTreeMap<Option<&LabelName>, (Rc<[u32]>, usize)> = BTreeMap::new();
        for (name, object) in state.rules.iter().filter(|(_, rule)| !rule.spec.ties()) {
            let spec = &object.spec;
            let label = spec
                .across
                .as_ref()
                .filter(|_| spec.kind != RuleKind::KeepWith);
            let (of_host, usable) = by_label
                .entry(label)
                .or_insert_with(|| domains(label, hosts))
                .clone();
            let vms = spec.vms().iter().filter_map(|vm| index.get(vm));
            let vms: Vec<usize> = vms.collect();
            for vm in &vms {
                of[*vm].push(rules.len());
            }
            let share = || {
                let present = spec.vms().iter().filter_map(|vm| state.vms.get(vm));
                let present = present.filter(|vm| vm.wanted() || vm.ownership != Ownership::Free);
                let share = present.count().div_ceil(usable.max(1));
                u32::try_from(share).unwrap_or(u32::MAX).max(1)
            };
            rules.push(Rule {
                name,
                spec,
                vms,
                of_host,
                counts: Vec::new(),
                max: match spec.kind {
                    RuleKind::KeepApart => spec.max.unwrap_or(1),
                    RuleKind::Spread => spec.max.unwrap_or_else(share),
                    RuleKind::KeepWith => u32::MAX,
                },
            });
        }
        Self { rules, of }
    }

    /// Counts a VM in, or out.
    pub(crate) fn account(&mut self, vm: usize, own: Own, more: bool) {
        for at in &self.of[vm] {
            let rule = &mut self.rules[*at];
            let mut last = NOWHERE;
            for host in own.hosts() {
                let domain = rule.of_host[host];
                if domain == NOWHERE || domain == last {
                    continue;
                }
                last = domain;
                let place = rule.place(domain).unwrap_or_else(|place| {
                    rule.counts.insert(place, (domain, 0));
                    place
                });
                let (_, count) = &mut rule.counts[place];
                *count = if more {
                    *count + 1
                } else {
                    count.saturating_sub(1)
                };
            }
        }
    }

    /// Hard rules of a VM.
    pub(crate) fn hard(&self, vm: usize) -> impl Iterator<Item = (usize, &Rule<'a>)> + '_ {
        let rules = self.of[vm].iter().map(|at| (*at, &self.rules[*at]));
        rules.filter(|(_, rule)| rule.spec.hard())
    }

    /// How much better or worse a host is by soft rules and by what evens out.
    pub(crate) fn score(&self, vm: usize, own: Own, host: usize) -> i64 {
        let mut total = 0i64;
        for at in &self.of[vm] {
            let rule = &self.rules[*at];
            let count = i64::from(rule.count_without(own, host));
            total += match (rule.spec.kind, rule.spec.weight) {
                (RuleKind::KeepApart, None) => 0,
                (RuleKind::Spread, None) => -EVEN * count,
                (RuleKind::KeepWith, weight) => i64::from(weight.unwrap_or(0)) * count,
                (RuleKind::KeepApart, Some(weight)) => {
                    let over = (count + 1 - i64::from(rule.max)).max(0);
                    // Without a domain nothing can be said for it.
                    let over = if rule.domain(host).is_none() { 1 } else { over };
                    -i64::from(weight) * over
                }
                (RuleKind::Spread, Some(weight)) => -i64::from(weight) * count,
            };
        }
        total
    }
}

impl Rule<'_> {
    pub(crate) fn domain(&self, host: usize) -> Option<usize> {
        let domain = self.of_host[host];
        (domain != NOWHERE).then_some(domain as usize)
    }

    /// Where the count of a domain is, or belongs.
    fn place(&self, domain: u32) -> Result<usize, usize> {
        self.counts.binary_search_by_key(&domain, |(at, _)| *at)
    }

    fn count(&self, host: usize) -> u32 {
        let place = self.place(self.of_host[host]);
        place.map_or(0, |place| self.counts[place].1)
    }

    /// VMs of the rule in the host's domain, but the one that is `own`ed so.
    pub(crate) fn count_without(&self, own: Own, host: usize) -> u32 {
        let domain = self.of_host[host];
        let here = own.hosts().any(|at| self.of_host[at] == domain);
        self.count(host).saturating_sub(u32::from(here))
    }

    /// Whether one more VM, which is `own`ed so, keeps the rule on this host.
    pub(crate) fn takes(&self, own: Own, host: usize) -> bool {
        self.of_host[host] != NOWHERE && self.count_without(own, host) < self.max
    }

    /// Whether `members` fit that come together; `here` of them are in the domain already.
    pub(crate) fn takes_many(&self, host: usize, members: u32, here: u32) -> bool {
        let others = self.count(host).saturating_sub(here);
        self.of_host[host] != NOWHERE && others.saturating_add(members) <= self.max
    }

    /// More are in the host's domain than the rule allows.
    pub(crate) fn broken(&self, host: usize) -> bool {
        self.of_host[host] == NOWHERE || self.count(host) > self.max
    }

    pub(crate) fn same_domain(&self, a: usize, b: usize) -> bool {
        self.of_host[a] == self.of_host[b]
    }

    /// No two on one host: what most `keep_apart` rules are.
    pub(crate) fn plain(&self) -> bool {
        self.spec.kind == RuleKind::KeepApart && self.spec.across.is_none() && self.max == 1
    }
}

/// Domain of each host, and how many of them have a good host.
fn domains(label: Option<&LabelName>, hosts: &[HostFacts<'_>]) -> (Rc<[u32]>, usize) {
    let number = |n: usize| u32::try_from(n).unwrap_or(NOWHERE);
    let Some(label) = label else {
        let good = hosts.iter().filter(|host| host.good).count();
        return ((0..hosts.len()).map(number).collect(), good);
    };
    let value = |host: &HostFacts<'_>| host.spec.and_then(|spec| spec.labels.get(label)).cloned();
    let mut values: BTreeMap<LabelName, u32> = BTreeMap::new();
    let mut good = BTreeSet::new();
    let of_host = hosts.iter().map(|host| {
        let Some(value) = value(host) else {
            return NOWHERE;
        };
        let next = number(values.len());
        let domain = *values.entry(value).or_insert(next);
        if host.good {
            good.insert(domain);
        }
        domain
    });
    (of_host.collect(), good.len())
}

impl Domains<'_> {
    /// What a hard rule is called in a sentence about a host.
    pub(crate) fn describe(&self, rule: usize, host: &HostFacts<'_>) -> String {
        let rule = &self.rules[rule];
        let (name, max) = (rule.name, rule.max);
        let label = rule.spec.across.as_ref();
        let value = label.and_then(|label| host.spec.and_then(|spec| spec.labels.get(label)));
        match (label, value) {
            (Some(label), Some(value)) => format!(
                "rule {name} allows at most {max} of its VMs in {label} {value}, and they are there"
            ),
            (Some(label), None) => {
                format!("has no label `{label}`, which rule {name} goes by")
            }
            (None, _) => format!("rule {name} allows at most {max} of its VMs there, and they are"),
        }
    }
}
