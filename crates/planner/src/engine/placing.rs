//! The state of a placement in the making.
//!
//! Owns: scores, free capacity and what has been decided so far. Always holds: capacity is given
//! only once; a unit that is decided is not decided again. Everything is bounded: chains of rules are
//! followed to a depth of [`MAX_CHAIN`] and for [`MAX_MERGES`] steps, so that no input takes for ever.

use super::score::{self, INFINITY, Score};
use super::site::{Body, HostId, Item, Requires, Role, Site, Together, UnitId};
use std::cmp::Ordering;

/// How deep chains of rules are followed.
pub(super) const MAX_CHAIN: u32 = 400;

/// How many steps one weighing of others' wishes may take.
pub(super) const MAX_MERGES: u32 = 5_000;

/// How many scores all weighings together may touch. Ordinary sites need a thousandth of it.
const MAX_SCORES: u64 = 400_000_000;

/// Scores of one unit by host; `None` where it may not run at all.
pub(super) type Table = Vec<Option<Score>>;

/// A placement in the making.
pub(super) struct Placing<'a> {
    pub(super) site: &'a Site,
    /// Given rules and those that groups imply.
    pub(super) together: Vec<Together>,
    /// Per unit: rules in which it is the dependent, weightiest primary first.
    pub(super) this_with: Vec<Vec<usize>>,
    /// Per unit: rules in which it is the primary, weightiest dependent first.
    pub(super) with_this: Vec<Vec<usize>>,
    pub(super) allowed: Vec<Table>,
    /// Per group: the wishes for the group as such.
    pub(super) group_wishes: Vec<Table>,
    pub(super) free: Vec<Vec<i64>>,
    pub(super) placed: Vec<usize>,
    pub(super) assigned: Vec<Option<HostId>>,
    pub(super) decided: Vec<bool>,
    pub(super) deciding: Vec<bool>,
    pub(super) merging: Vec<bool>,
    pub(super) managed: Vec<bool>,
    /// What a unit is going to be; `None` until it is clear.
    pub(super) next: Vec<Option<Role>>,
    pub(super) depth: u32,
    pub(super) merges_left: u32,
    pub(super) scores_left: u64,
}

impl<'a> Placing<'a> {
    pub(super) fn new(site: &'a Site) -> Self {
        let units = site.units.len();
        let hosts = site.hosts.len();
        let none: Table = vec![None; hosts];
        let mut placing = Self {
            site,
            together: site.together.clone(),
            this_with: vec![Vec::new(); units],
            with_this: vec![Vec::new(); units],
            allowed: vec![Vec::new(); units],
            group_wishes: site
                .units
                .iter()
                .map(|unit| match unit.body {
                    Body::Group(_) => none.clone(),
                    Body::Item(_) => Vec::new(),
                })
                .collect(),
            free: site
                .hosts
                .iter()
                .map(|host| host.capacity.clone())
                .collect(),
            placed: vec![0; hosts],
            assigned: vec![None; units],
            decided: vec![false; units],
            deciding: vec![false; units],
            merging: vec![false; units],
            managed: vec![true; units],
            next: vec![None; units],
            depth: 0,
            merges_left: MAX_MERGES,
            scores_left: MAX_SCORES,
        };
        placing.fill();
        placing.apply_wishes();
        placing.apply_stickiness();
        placing.add_group_rules();
        placing.index_rules();
        placing
    }

    fn fill(&mut self) {
        for (unit, one) in self.site.units.iter().enumerate() {
            if let Body::Item(item) = &one.body {
                self.allowed[unit].clone_from(&item.scores);
                self.allowed[unit].resize(self.site.hosts.len(), None);
                let maintained = |host: &HostId| self.site.hosts[*host].maintenance;
                let kept = self.site.rules.hands_off || item.active.iter().any(maintained);
                self.managed[unit] = item.managed && !kept;
                self.next[unit] = item.wanted;
                if let (false, Some(host)) = (self.managed[unit], self.site.current(item)) {
                    self.take(unit, host, -1);
                }
            }
        }
    }

    fn apply_wishes(&mut self) {
        for wish in &self.site.prefer {
            match &self.site.units[wish.unit].body {
                Body::Item(_) => self.raise(wish.unit, wish.host, wish.score),
                Body::Group(group) => {
                    let sum = &mut self.group_wishes[wish.unit][wish.host];
                    *sum = Some(score::add(sum.unwrap_or(0), wish.score));
                    for (place, member) in group.members.iter().enumerate() {
                        // Members share the first one's host: the wish must not count once for each. A ban
                        // holds for each, also if the first one stays where it should not be.
                        let ban = wish.score <= -INFINITY;
                        let counts = place == 0 || !group.colocated || ban;
                        self.raise(*member, wish.host, if counts { wish.score } else { 0 });
                    }
                }
            }
        }
    }

    fn apply_stickiness(&mut self) {
        for (unit, one) in self.site.units.iter().enumerate() {
            let Body::Item(item) = &one.body else {
                continue;
            };
            if let [host] = item.active[..]
                && item.managed
                && item.stickiness >= 1
                && (!self.site.rules.opt_in || self.allowed[unit][host].is_some())
            {
                self.raise(unit, host, item.stickiness);
            }
        }
    }

    /// Each member of a group that stays together follows the one before it.
    fn add_group_rules(&mut self) {
        for one in &self.site.units {
            let Body::Group(group) = &one.body else {
                continue;
            };
            if !group.colocated {
                continue;
            }
            for pair in group.members.windows(2) {
                let critical = self.site.item(pair[1]).is_some_and(|item| item.critical);
                self.together.push(Together {
                    dependent: pair[1],
                    primary: pair[0],
                    score: INFINITY,
                    by: None,
                    influence: critical,
                    explicit: false,
                    dependent_role: None,
                    primary_role: None,
                });
            }
        }
    }

    fn index_rules(&mut self) {
        // Of rules that weigh the same the newest comes first.
        for rule in (0..self.together.len()).rev() {
            let one = &self.together[rule];
            self.this_with[one.dependent].push(rule);
            self.with_this[one.primary].push(rule);
        }
        for unit in 0..self.site.units.len() {
            let mut list = std::mem::take(&mut self.this_with[unit]);
            let primary = |rule: usize| self.together[rule].primary;
            list.sort_by(|a, b| self.weight(primary(*a), primary(*b)));
            self.this_with[unit] = list;
            let mut list = std::mem::take(&mut self.with_this[unit]);
            let dependent = |rule: usize| self.together[rule].dependent;
            list.sort_by(|a, b| self.weight(dependent(*a), dependent(*b)));
            self.with_this[unit] = list;
        }
    }

    /// Which of two units is considered first in rules: higher priority, groups, name.
    fn weight(&self, one: UnitId, other: UnitId) -> Ordering {
        let (a, b) = (&self.site.units[one], &self.site.units[other]);
        let is_group = |body: &Body| matches!(body, Body::Group(_));
        b.priority
            .cmp(&a.priority)
            .then(is_group(&b.body).cmp(&is_group(&a.body)))
            .then_with(|| a.name.cmp(&b.name))
    }

    /// Merges rules into an ordered list.
    pub(super) fn merge_rules(&self, list: &mut Vec<usize>, more: &[usize], dependents: bool) {
        for rule in more {
            let end = |rule: usize| match dependents {
                true => self.together[rule].dependent,
                false => self.together[rule].primary,
            };
            let at = position(list, |other| self.weight(end(*rule), end(other)));
            list.insert(at, *rule);
        }
    }

    pub(super) fn raise(&mut self, unit: UnitId, host: HostId, by: Score) {
        let entry = &mut self.allowed[unit][host];
        *entry = Some(entry.map_or(by, |now| score::add(now, by)));
    }

    pub(super) fn ban_everywhere(&mut self, unit: UnitId) {
        for entry in &mut self.allowed[unit] {
            *entry = Some(-INFINITY);
        }
    }

    /// Whether a host may take things, its score in this table considered too.
    pub(super) fn usable(&self, host: HostId, score: Score) -> bool {
        self.site.hosts[host].open() && score >= 0
    }

    pub(super) fn any_usable(&self, table: &Table) -> bool {
        table
            .iter()
            .enumerate()
            .any(|(host, score)| score.is_some_and(|score| self.usable(host, score)))
    }

    pub(super) fn item(&self, unit: UnitId) -> Option<&'a Item> {
        self.site.item(unit)
    }

    pub(super) fn is_active(&self, unit: UnitId) -> bool {
        match &self.site.units[unit].body {
            Body::Item(item) => !item.active.is_empty(),
            Body::Group(group) => group.members.iter().any(|member| self.is_active(*member)),
        }
    }

    /// What an item is now.
    pub(super) fn role(&self, unit: UnitId) -> Role {
        match &self.site.units[unit].body {
            Body::Item(item) => item.role.unwrap_or(Role::Stopped),
            Body::Group(group) => group
                .members
                .iter()
                .map(|member| self.role(*member))
                .max()
                .unwrap_or(Role::Stopped),
        }
    }

    /// Whether two hosts count as the same place for a rule.
    pub(super) fn same_place(&self, rule: &Together, one: HostId, other: HostId) -> bool {
        match rule.by {
            None => one == other,
            Some(kind) => {
                let label = |host: HostId| self.site.hosts[host].labels.get(kind).cloned();
                label(one).flatten() == label(other).flatten()
            }
        }
    }

    pub(super) fn give(&mut self, unit: UnitId, host: HostId) {
        self.placed[host] += 1;
        // The room of what nobody may touch was taken from the beginning.
        if self.managed[unit] {
            self.take(unit, host, -1);
        }
    }

    /// Takes a unit from the host that was decided on: it does not run.
    pub(super) fn take_away(&mut self, unit: UnitId) {
        if let Some(host) = self.assigned[unit].take() {
            self.placed[host] -= 1;
            self.take(unit, host, 1);
        }
        self.next[unit] = Some(Role::Stopped);
    }

    fn take(&mut self, unit: UnitId, host: HostId, sign: i64) {
        if let Some(item) = self.item(unit) {
            for (dimension, need) in item.needs.iter().enumerate() {
                if let Some(free) = self.free[host].get_mut(dimension) {
                    *free = free.saturating_add(sign.saturating_mul(*need));
                }
            }
        }
    }

    /// No majority, and nothing new may start.
    pub(super) fn frozen(&self) -> bool {
        self.site.rules.quorum == super::site::Quorum::Freeze
    }

    /// Whether a start of this item can be allowed as far as the majority is concerned.
    pub(super) fn start_allowed(&self, unit: UnitId) -> bool {
        let Some(item) = self.item(unit) else {
            return true;
        };
        if item.requires == Requires::Nothing {
            return true;
        }
        match self.site.rules.quorum {
            super::site::Quorum::Held => true,
            super::site::Quorum::Stop => false,
            super::site::Quorum::Freeze => {
                !item.active.is_empty() && self.next[unit] <= Some(self.role(unit))
            }
        }
    }
}

/// Where an element belongs in an ordered list: before the first that is not ahead of it.
fn position(list: &[usize], mut order: impl FnMut(usize) -> Ordering) -> usize {
    list.iter()
        .position(|other| order(*other) != Ordering::Greater)
        .unwrap_or(list.len())
}
