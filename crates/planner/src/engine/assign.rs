//! Choosing a host for each unit: ranks, capacity, and the choice itself.

use super::attract::Direction;
use super::placing::{MAX_CHAIN, MAX_MERGES, Placing, Table};
use super::score::{Factor, INFINITY, Score};
use super::site::{Body, HostId, Role, Strategy, UnitId};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// From so many units on a chain of followers is decided from its end.
const DEEP: usize = 100;

/// Most units whose needs are summed up because they must share a host.
const MAX_TOGETHER: usize = 1_000;

impl Placing<'_> {
    /// Decides every unit.
    pub(super) fn assign_all(&mut self) {
        for unit in self.ranked() {
            // What it follows is decided on the way, unless that way is too deep to go down at once.
            let followed = self.followed_by(unit);
            if followed.len() > DEEP {
                for one in followed {
                    self.assign(one, None);
                }
            }
            self.assign(unit, None);
        }
        self.mend();
    }

    /// Everything undecided that a unit follows, directly or not: what follows nothing first.
    fn followed_by(&self, unit: UnitId) -> Vec<UnitId> {
        let top = |unit: UnitId| self.site.units[unit].parent.unwrap_or(unit);
        let primaries = |unit: UnitId| -> Vec<UnitId> {
            let rules = self.rules_of(unit).into_iter();
            let primaries = rules.map(|rule| top(self.together[rule].primary));
            primaries
                .filter(|primary| !self.decided[*primary])
                .collect()
        };
        let mut seen = BTreeSet::from([unit]);
        let mut order = Vec::new();
        let mut path = vec![(unit, primaries(unit))];
        while let Some((unit, open)) = path.last_mut() {
            match open.pop() {
                Some(next) if seen.insert(next) => path.push((next, primaries(next))),
                Some(_) => {}
                None => {
                    order.push(*unit);
                    path.pop();
                }
            }
        }
        order
    }

    /// The units that are nobody's member, in the order in which they are placed.
    fn ranked(&mut self) -> Vec<UnitId> {
        let units = &self.site.units;
        let mut order: Vec<UnitId> = (0..units.len())
            .filter(|unit| units[*unit].parent.is_none())
            .collect();
        order.sort_by_key(|unit| std::cmp::Reverse(units[*unit].priority));
        if self.site.rules.strategy == Strategy::Spread {
            return order;
        }
        let mut hosts: Vec<HostId> = (0..self.site.hosts.len()).collect();
        hosts.sort_by(|a, b| self.compare_hosts((*a, 0), (*b, 0), None));
        let mut here = vec![-INFINITY; units.len()];
        let mut keys = vec![0; units.len()];
        // Most units have equal scores: each list of scores is kept once.
        let mut lists: BTreeMap<Vec<Score>, Vec<UnitId>> = BTreeMap::new();
        for unit in &order {
            let table = self.own_wishes(*unit);
            let at = |host: HostId| table.get(host).copied().flatten().unwrap_or(-INFINITY);
            here[*unit] = self.current_of(*unit).map_or(-INFINITY, at);
            let list = hosts.iter().map(|host| at(*host)).collect();
            lists.entry(list).or_default().push(*unit);
        }
        for (rank, units) in lists.into_values().enumerate() {
            for unit in units {
                keys[unit] = rank;
            }
        }
        let key = |unit: UnitId| (units[unit].priority, here[unit], keys[unit]);
        order.sort_by_key(|unit| std::cmp::Reverse(key(*unit)));
        order
    }

    /// What a unit would like by itself and through what it follows.
    fn own_wishes(&mut self, unit: UnitId) -> Table {
        self.merges_left = MAX_MERGES;
        let mut table: Option<Table> = None;
        let whole = Factor::ONE;
        self.add_wishes(unit, &mut table, None, whole, Direction::Primaries, false);
        table.unwrap_or_default()
    }

    pub(super) fn current_of(&self, unit: UnitId) -> Option<HostId> {
        match &self.site.units[unit].body {
            Body::Item(item) => self.site.current(item),
            Body::Group(group) => group.members.iter().find_map(|m| self.current_of(*m)),
        }
    }

    pub(super) fn compare_hosts(
        &self,
        (one, score): (HostId, Score),
        (other, other_score): (HostId, Score),
        current: Option<HostId>,
    ) -> Ordering {
        let hosts = &self.site.hosts;
        let effective = |host: HostId, score: Score| match hosts[host].open() {
            true => score,
            false => -INFINITY,
        };
        let mut order = effective(other, other_score).cmp(&effective(one, score));
        let strategy = self.site.rules.strategy;
        if strategy == Strategy::Balanced {
            order = order.then_with(|| self.compare_room(one, other));
        }
        if strategy != Strategy::Dense {
            order = order
                .then_with(|| self.placed[one].cmp(&self.placed[other]))
                .then_with(|| (current == Some(other)).cmp(&(current == Some(one))));
        }
        order.then_with(|| hosts[one].name.cmp(&hosts[other].name))
    }

    /// Which of two hosts has more room: in more dimensions.
    fn compare_room(&self, one: HostId, other: HostId) -> Ordering {
        let mut balance = 0_i64;
        for (a, b) in self.free[one].iter().zip(&self.free[other]) {
            balance += match b.cmp(a) {
                Ordering::Less => -1,
                Ordering::Equal => 0,
                Ordering::Greater => 1,
            };
        }
        balance.cmp(&0)
    }

    /// Decides one unit, and before it what it follows.
    pub(super) fn assign(&mut self, unit: UnitId, prefer: Option<HostId>) -> Option<HostId> {
        if self.depth >= MAX_CHAIN {
            return None;
        }
        self.depth += 1;
        let host = match &self.site.units[unit].body {
            Body::Item(_) => self.assign_item(unit, prefer),
            Body::Group(_) => self.assign_group(unit, prefer),
        };
        self.depth -= 1;
        host
    }

    fn assign_group(&mut self, unit: UnitId, prefer: Option<HostId>) -> Option<HostId> {
        if self.decided[unit] || self.deciding[unit] {
            return self.assigned[unit];
        }
        let group = self.site.group(unit)?;
        self.deciding[unit] = true;
        let mut first = None;
        for member in &group.members {
            let host = self.assign(*member, prefer);
            first = first.or(host);
        }
        self.next[unit] = group.members.first().and_then(|first| self.next[*first]);
        self.deciding[unit] = false;
        self.decided[unit] = true;
        first.filter(|_| group.colocated)
    }

    fn assign_item(&mut self, unit: UnitId, prefer: Option<HostId>) -> Option<HostId> {
        if let Some(parent) = self.site.units[unit].parent
            && !self.deciding[parent]
        {
            self.assign(parent, prefer);
        }
        if self.decided[unit] || self.deciding[unit] {
            return self.assigned[unit];
        }
        let item = self.item(unit)?;
        self.deciding[unit] = true;
        self.apply_rules(unit);
        if self.next[unit] == Some(Role::Stopped) {
            self.ban_everywhere(unit);
        } else if self.next[unit] > Some(self.role(unit)) && self.frozen() {
            self.next[unit] = Some(self.role(unit));
        }
        if !self.managed[unit] {
            self.next[unit] = Some(self.role(unit));
            self.decide(unit, self.site.current(item), true);
        } else if self.site.rules.stop_all {
            self.decide(unit, None, true);
        } else {
            let host = self.best_host(unit, prefer);
            self.decide(unit, host, false);
        }
        self.deciding[unit] = false;
        self.assigned[unit]
    }

    /// What must hold first, so that as much of it as possible holds.
    fn apply_rules(&mut self, unit: UnitId) {
        let own = self.rules_of(unit);
        let others = self.rules_with(unit);
        for must in [true, false] {
            let is = |placing: &Self, rule: usize| {
                (placing.together[rule].score.abs() >= INFINITY) == must
            };
            for rule in &own {
                if is(self, *rule) {
                    self.apply_own_rule(unit, *rule);
                }
            }
            for rule in &others {
                if is(self, *rule) {
                    self.weigh_dependent(unit, *rule);
                }
            }
        }
    }

    fn apply_own_rule(&mut self, unit: UnitId, rule: usize) {
        let (primary, score) = (self.together[rule].primary, self.together[rule].score);
        let before = (score < 0 && score > -INFINITY).then(|| self.allowed[unit].clone());
        if !self.decided[primary] {
            self.assign(primary, None);
        }
        self.follow(unit, primary, rule);
        if let Some(before) = before
            && !self.any_usable(&self.allowed[unit])
        {
            self.allowed[unit] = before;
        }
    }

    fn best_host(&mut self, unit: UnitId, prefer: Option<HostId>) -> Option<HostId> {
        let roomiest = self.rule_out_full_hosts(unit);
        let prefer = prefer.or(roomiest);
        let current = self.item(unit).and_then(|item| self.site.current(item));
        let table = &self.allowed[unit];
        let hosts = table.iter().enumerate();
        let hosts = hosts.filter_map(|(host, score)| score.map(|score| (host, score)));
        let (best, best_score) = hosts.min_by(|a, b| self.compare_hosts(*a, *b, current))?;
        if let Some(prefer) = prefer
            && let Some(score) = table[prefer]
            && score >= best_score
            && self.usable(prefer, score)
        {
            return Some(prefer);
        }
        // As good as the best: stay.
        if best_score > 0
            && self.site.hosts[best].open()
            && let Some(current) = current
            && self.usable(current, 0)
            && table[current] == Some(best_score)
        {
            return Some(current);
        }
        Some(best)
    }

    fn decide(&mut self, unit: UnitId, host: Option<HostId>, force: bool) {
        let host = host.filter(|host| {
            let score = self.allowed[unit][*host];
            force || score.is_some_and(|score| self.usable(*host, score))
        });
        self.decided[unit] = true;
        self.assigned[unit] = host;
        match host {
            Some(host) => self.give(unit, host),
            None => self.next[unit] = Some(Role::Stopped),
        }
    }

    /// Rules out hosts that cannot hold this unit and all that must run with it, or, if there is no
    /// host for all of them, those that cannot hold it alone. Then it is the host with most room
    /// that it would best go to.
    fn rule_out_full_hosts(&mut self, unit: UnitId) -> Option<HostId> {
        if self.site.rules.strategy == Strategy::Spread {
            return None;
        }
        let mut together = BTreeSet::new();
        self.gather_together(unit, unit, &mut together);
        let dimensions = self
            .site
            .hosts
            .first()
            .map_or(0, |host| host.capacity.len());
        let mut needs = vec![0_i64; dimensions];
        let undecided: Vec<UnitId> = together
            .iter()
            .copied()
            .filter(|one| !self.decided[*one])
            .collect();
        for one in undecided {
            for (sum, need) in needs.iter_mut().zip(self.needs_of(one)) {
                *sum = sum.saturating_add(*need);
            }
        }
        let candidates: Vec<HostId> = (0..self.site.hosts.len())
            .filter(|host| self.allowed[unit][*host].is_some_and(|s| self.usable(*host, s)))
            .collect();
        let mut roomiest: Option<HostId> = None;
        for host in &candidates {
            let better = |best: HostId| self.compare_room(*host, best) == Ordering::Less;
            if roomiest.is_none_or(better) {
                roomiest = Some(*host);
            }
        }
        let any = candidates.iter().any(|host| self.holds(*host, &needs));
        let needs = if any {
            needs
        } else {
            self.needs_of(unit).to_vec()
        };
        for host in candidates {
            if !self.holds(host, &needs) {
                self.raise(unit, host, -INFINITY);
            }
        }
        if any { None } else { roomiest }
    }

    pub(super) fn needs_of(&self, unit: UnitId) -> &[i64] {
        self.item(unit).map_or(&[], |item| &item.needs)
    }

    pub(super) fn holds(&self, host: HostId, needs: &[i64]) -> bool {
        needs
            .iter()
            .zip(&self.free[host])
            .all(|(need, free)| *need == 0 || need <= free)
    }

    /// Collects everything that must share a host with a unit.
    fn gather_together(&self, unit: UnitId, origin: UnitId, found: &mut BTreeSet<UnitId>) {
        let mut open = vec![unit];
        while let Some(unit) = open.pop() {
            if found.len() >= MAX_TOGETHER {
                return;
            }
            if let Some(group) = self.site.group(unit)
                && group.colocated
            {
                if found.insert(unit) {
                    open.extend(&group.members);
                }
                continue;
            }
            if !found.insert(unit) {
                continue;
            }
            for rule in self.rules_of(unit) {
                let rule = &self.together[rule];
                if rule.score >= INFINITY && rule.primary != origin {
                    open.push(rule.primary);
                }
            }
            for rule in self.rules_with(unit) {
                let rule = &self.together[rule];
                if rule.score >= INFINITY && rule.dependent != origin {
                    open.push(rule.dependent);
                }
            }
        }
    }
}
