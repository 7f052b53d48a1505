//! Hard rules that the placement broke: they go round in a circle, so that each was decided before another
//! that it follows.

use super::placing::Placing;
use super::score::INFINITY;
use super::site::{Body, HostId, Strategy, Together, UnitId};
use std::collections::BTreeSet;

impl Placing<'_> {
    /// Places anew what is not with what it must be with, or is with what it must not be with; if it finds
    /// no place, it does not run. That can only be where rules go round in a circle: each one is
    /// decided before another that it follows.
    pub(super) fn mend(&mut self) {
        let mut open: Vec<usize> = (0..self.together.len()).collect();
        let mut tried = BTreeSet::new();
        while let Some(rule) = open.pop() {
            let Some(unit) = self.broken(&self.together[rule]) else {
                continue;
            };
            let next = self.next[unit];
            self.take_away(unit);
            if let Some(host) = self.other_place(unit).filter(|_| tried.insert(unit)) {
                (self.assigned[unit], self.next[unit]) = (Some(host), next);
                self.give(unit, host);
            }
            // What follows it, or the group of which it is a member, is looked at again.
            let parent = self.site.units[unit].parent;
            for moved in std::iter::once(unit).chain(parent) {
                open.extend(&self.with_this[moved]);
                open.extend(&self.this_with[moved]);
            }
        }
    }

    /// The item that runs against a hard rule of its own.
    fn broken(&self, rule: &Together) -> Option<UnitId> {
        let plain = rule.dependent_role.is_none() && rule.primary_role.is_none();
        if rule.score.abs() < INFINITY || !plain {
            return None;
        }
        let (dependents, primaries) = (
            self.in_one_place(rule.dependent),
            self.in_one_place(rule.primary),
        );
        if rule.score > 0 {
            // A group is followed by following its last member, and follows with its first.
            let (dependent, primary) = (*dependents.first()?, *primaries.last()?);
            return (!self.near(rule, dependent, primary)).then_some(dependent);
        }
        dependents.iter().copied().find(|dependent| {
            let mut primaries = primaries.iter();
            primaries.any(|primary| self.near(rule, *dependent, *primary))
        })
    }

    /// Whether an item that could be elsewhere is where another one is; for a rule to be together one
    /// that is nowhere is, too.
    fn near(&self, rule: &Together, dependent: UnitId, primary: UnitId) -> bool {
        let host = self.assigned[dependent].filter(|_| self.managed[dependent]);
        match host {
            None => rule.score > 0,
            Some(host) => self.assigned[primary].is_some_and(|at| self.same_place(rule, host, at)),
        }
    }

    /// Another host for an item that no hard rule stands against.
    fn other_place(&self, unit: UnitId) -> Option<HostId> {
        if self.site.units[unit].parent.is_some() {
            return None;
        }
        let rules = self.this_with[unit].iter().chain(&self.with_this[unit]);
        let hard: Vec<&Together> = rules
            .map(|rule| &self.together[*rule])
            .filter(|rule| rule.score.abs() >= INFINITY)
            .collect();
        let fits = |host: HostId| {
            hard.iter().all(|rule| {
                let other = match rule.dependent == unit {
                    true => rule.primary,
                    false => rule.dependent,
                };
                let others = self.in_one_place(other).into_iter();
                let mut others = others.filter_map(|one| self.assigned[one]);
                match rule.score > 0 {
                    // What does not run yet may follow it.
                    true if rule.primary == unit => true,
                    true => others
                        .next()
                        .is_some_and(|at| self.same_place(rule, host, at)),
                    false => !others.any(|at| self.same_place(rule, host, at)),
                }
            })
        };
        let limited = self.site.rules.strategy != Strategy::Spread;
        let table = self.allowed[unit].iter().enumerate();
        let hosts = table.filter_map(|(host, score)| Some((host, (*score)?)));
        let hosts = hosts.filter(|(host, score)| self.usable(*host, *score) && fits(*host));
        let hosts = hosts.filter(|(host, _)| !limited || self.holds(*host, self.needs_of(unit)));
        let current = self.current_of(unit);
        hosts
            .min_by(|one, other| self.compare_hosts(*one, *other, current))
            .map(|(host, _)| host)
    }

    /// The items of a unit that is in one place.
    fn in_one_place(&self, unit: UnitId) -> Vec<UnitId> {
        match &self.site.units[unit].body {
            Body::Item(_) => vec![unit],
            Body::Group(group) if !group.colocated => Vec::new(),
            Body::Group(group) => group.members.clone(),
        }
    }
}
