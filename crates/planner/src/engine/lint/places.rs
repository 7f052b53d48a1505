//! Where things are afterwards: bans, rules that keep together or apart, capacity.

use super::super::score::{INFINITY, Score, add};
use super::super::site::{Body, HostId, Item, Quorum, Strategy, Together, UnitId};
use super::{Flaw, Lint};
use std::collections::{BTreeMap, BTreeSet};

impl Lint<'_> {
    pub(super) fn places(&self, found: &mut BTreeSet<Flaw>) {
        let wishes = self.wishes();
        let answers = self.answers();
        for unit in 0..self.site.units.len() {
            if let Body::Group(group) = &self.site.units[unit].body
                && group.colocated
            {
                for pair in group.members.windows(2) {
                    self.with((pair[1], pair[0]), None, &answers, found);
                }
            }
            let Some(item) = self.site.item(unit).filter(|_| answers[unit]) else {
                continue;
            };
            for host in &self.at[unit] {
                if self.banned(unit, item, *host, &wishes) {
                    found.insert(Flaw::Banned {
                        unit: self.unit(unit),
                        host: self.host(*host),
                    });
                }
            }
        }
        for rule in &self.site.together {
            self.rule(rule, &answers, found);
        }
        self.capacity(found);
    }

    /// Items that the plan put where they are, or could have taken away.
    fn answers(&self) -> Vec<bool> {
        let count = self.site.units.len();
        let stays: Vec<bool> = (0..count).map(|unit| self.stays(unit)).collect();
        // What must be stopped before something else holds that where it is.
        let ran = |unit: &UnitId| {
            self.site
                .item(*unit)
                .is_some_and(|item| !item.active.is_empty())
        };
        let runs = |unit: &UnitId| !self.at[*unit].is_empty() || ran(unit);
        let mut open: Vec<UnitId> = (0..count)
            .filter(|unit| runs(unit) && !stays[*unit])
            .collect();
        let mut held = vec![false; count];
        while let Some(unit) = open.pop() {
            for other in self.needs[unit].iter().filter(|other| runs(other)) {
                if !std::mem::replace(&mut held[*other], true) {
                    open.push(*other);
                }
            }
        }
        let given =
            |unit: usize| self.starts.contains_key(&unit) || self.migrations.contains_key(&unit);
        (0..count)
            .map(|unit| given(unit) || (stays[unit] && !held[unit]))
            .collect()
    }

    /// It runs, was not put there by the plan, and nothing keeps it from being stopped.
    fn stays(&self, unit: UnitId) -> bool {
        let Some(item) = self.site.item(unit) else {
            return false;
        };
        let hosts = &self.site.hosts;
        let well = |host: &HostId| hosts[*host].up && !hosts[*host].lost && !hosts[*host].joining;
        self.site.rules.quorum == Quorum::Held
            && self.untouchable(item).is_none()
            && !item.blocked
            && !item.maintenance
            && !self.at[unit].is_empty()
            && self.at[unit].iter().all(well)
    }

    /// The sum of all wishes of each unit for each host.
    fn wishes(&self) -> BTreeMap<(UnitId, HostId), Score> {
        let mut wishes = BTreeMap::new();
        for wish in &self.site.prefer {
            let sum = wishes.entry((wish.unit, wish.host)).or_insert(0);
            *sum = add(*sum, wish.score);
        }
        wishes
    }

    /// Whether an item must not run on a host, by itself and as a member of its group.
    fn banned(
        &self,
        unit: UnitId,
        item: &Item,
        host: HostId,
        wishes: &BTreeMap<(UnitId, HostId), Score>,
    ) -> bool {
        let own = wishes.get(&(unit, host)).copied();
        let parent = self.site.units[unit].parent;
        let group = parent.and_then(|parent| wishes.get(&(parent, host)).copied());
        let given = item.scores.get(host).copied().flatten();
        let nobody_asked = given.is_none() && own.is_none() && group.is_none();
        let scores = [given, own, group].into_iter().flatten();
        nobody_asked || scores.fold(0, add) <= -INFINITY
    }

    fn rule(&self, rule: &Together, answers: &[bool], found: &mut BTreeSet<Flaw>) {
        // Rules about what is stopped are no rules about places of what runs.
        let conditional = rule.dependent_role.is_some() || rule.primary_role.is_some();
        if rule.score.abs() < INFINITY || conditional {
            return;
        }
        let (Some(dependents), Some(primaries)) =
            (self.one_place(rule.dependent), self.one_place(rule.primary))
        else {
            return;
        };
        if rule.score > 0 {
            // A group is followed by following its last member, and follows with its first.
            if let (Some(dependent), Some(primary)) = (dependents.first(), primaries.last()) {
                self.with((*dependent, *primary), rule.by, answers, found);
            }
            return;
        }
        for dependent in &dependents {
            for primary in &primaries {
                self.apart((*dependent, *primary), rule.by, answers, found);
            }
        }
    }

    /// The items of a unit, if they are all in one place.
    fn one_place(&self, unit: UnitId) -> Option<Vec<UnitId>> {
        let loose = self.site.group(unit).is_some_and(|group| !group.colocated);
        (!loose).then(|| self.items(unit))
    }

    /// The same place by a label, or the same host; unknown without the label.
    fn same_place(&self, by: Option<usize>, one: HostId, other: HostId) -> Option<bool> {
        let Some(kind) = by else {
            return Some(one == other);
        };
        let label = |host: HostId| self.site.hosts[host].labels.get(kind)?.as_ref();
        Some(label(one)? == label(other)?)
    }

    fn with(
        &self,
        (dependent, primary): (UnitId, UnitId),
        by: Option<usize>,
        answers: &[bool],
        found: &mut BTreeSet<Flaw>,
    ) {
        if !answers[dependent] {
            return;
        }
        for host in &self.at[dependent] {
            let mut near = self.at[primary].iter();
            if !near.any(|at| self.same_place(by, *host, *at) != Some(false)) {
                found.insert(Flaw::Apart {
                    unit: self.unit(dependent),
                    host: self.host(*host),
                    other: self.unit(primary),
                    at: self.hosts(self.at[primary].iter().copied()),
                });
            }
        }
    }

    fn apart(
        &self,
        (dependent, primary): (UnitId, UnitId),
        by: Option<usize>,
        answers: &[bool],
        found: &mut BTreeSet<Flaw>,
    ) {
        if !answers[dependent] {
            return;
        }
        for host in &self.at[dependent] {
            let mut near = self.at[primary].iter();
            if near.any(|at| self.same_place(by, *host, *at) == Some(true)) {
                found.insert(Flaw::Together {
                    unit: self.unit(dependent),
                    other: self.unit(primary),
                    host: self.host(*host),
                });
            }
        }
    }

    /// No host to which the plan brings something that needs it has too little.
    fn capacity(&self, found: &mut BTreeSet<Flaw>) {
        if self.site.rules.strategy == Strategy::Spread {
            return;
        }
        let mut used: BTreeMap<(HostId, usize), (i64, bool)> = BTreeMap::new();
        for unit in 0..self.site.units.len() {
            let Some(item) = self.site.item(unit) else {
                continue;
            };
            let given = self.starts.contains_key(&unit) || self.migrations.contains_key(&unit);
            for host in &self.at[unit] {
                let arrives = given && !item.active.contains(host);
                for (dimension, need) in item.needs.iter().enumerate().filter(|(_, n)| **n > 0) {
                    let (sum, new) = used.entry((*host, dimension)).or_default();
                    *sum = sum.saturating_add(*need);
                    *new |= arrives;
                }
            }
        }
        for ((host, dimension), (need, new)) in used {
            let capacity = &self.site.hosts[host].capacity;
            let have = capacity.get(dimension).copied().unwrap_or(0);
            if new && need > have {
                found.insert(Flaw::Capacity {
                    host: self.host(host),
                    dimension,
                    need,
                    have,
                });
            }
        }
    }
}
