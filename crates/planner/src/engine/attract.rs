//! Running together and apart: how a rule between two units changes their scores.
//!
//! A dependent that is placed takes its primary's host into account ([`Placing::follow`]). Before that,
//! a primary weighs where its dependents could run, each with the share that the rule's score is
//! of infinity ([`Placing::weigh_dependent`]), and so on along chains of rules.

use super::placing::{MAX_CHAIN, MAX_MERGES, Placing, Table};
use super::score::{self, Factor, INFINITY, Score};
use super::site::{Body, Group, HostId, Role, Together, UnitId};

/// Which rules are followed from one unit to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// To what follows this unit.
    Dependents,
    /// To what this unit follows.
    Primaries,
}

impl Placing<'_> {
    /// Rules in which this unit, or what it stands for in its group, is the dependent.
    pub(super) fn rules_of(&self, unit: UnitId) -> Vec<usize> {
        let mut list = self.this_with[unit].clone();
        if let Body::Group(group) = &self.site.units[unit].body {
            self.add_member_rules(group, unit, &mut list, false);
        } else if let Some(parent) = self.site.units[unit].parent
            && let Some(group) = self.site.group(parent)
        {
            if group.members.first() == Some(&unit) {
                self.merge_rules(&mut list, &self.this_with[parent], false);
                self.add_member_rules(group, unit, &mut list, false);
            } else if self.follows_unmanaged(group, unit) {
                // The chain from the first member is broken: what the group must obey counts here.
                let must: Vec<usize> = self.this_with[parent]
                    .iter()
                    .copied()
                    .filter(|rule| self.together[*rule].score >= INFINITY)
                    .collect();
                self.merge_rules(&mut list, &must, false);
            }
        }
        list
    }

    /// Rules in which this unit, or what it stands for in its group, is the primary.
    pub(super) fn rules_with(&self, unit: UnitId) -> Vec<usize> {
        let mut list = self.with_this[unit].clone();
        if let Body::Group(group) = &self.site.units[unit].body {
            self.add_member_rules(group, unit, &mut list, true);
        } else if let Some(parent) = self.site.units[unit].parent
            && let Some(group) = self.site.group(parent)
            && group.members.last() == Some(&unit)
        {
            self.merge_rules(&mut list, &self.with_this[parent], true);
            self.add_member_rules(group, unit, &mut list, true);
        }
        list
    }

    fn add_member_rules(&self, group: &Group, unit: UnitId, list: &mut Vec<usize>, with: bool) {
        if !group.colocated {
            return;
        }
        for member in group.members.iter().filter(|member| **member != unit) {
            let own = match with {
                true => &self.with_this[*member],
                false => &self.this_with[*member],
            };
            let written: Vec<usize> = own
                .iter()
                .copied()
                .filter(|rule| self.together[*rule].explicit)
                .collect();
            self.merge_rules(list, &written, with);
        }
    }

    fn follows_unmanaged(&self, group: &Group, unit: UnitId) -> bool {
        group
            .members
            .iter()
            .take_while(|member| **member != unit)
            .any(|member| !self.managed[*member])
    }

    /// Whether the dependent's wishes count for the primary.
    pub(super) fn has_influence(&self, rule: &Together) -> bool {
        rule.influence || !self.is_active(rule.primary)
    }

    /// Changes the dependent's scores by where its primary went.
    pub(super) fn follow(&mut self, dependent: UnitId, primary: UnitId, rule: usize) {
        let score = self.together[rule].score;
        let Some(group) = self.site.group(primary) else {
            return self.follow_item(dependent, primary, rule);
        };
        if !self.decided[primary] {
            return;
        }
        if group.colocated {
            // Needing a group is needing all of it: its last member. Liking it is liking where it begins.
            let member = match score >= INFINITY {
                true => group.members.last(),
                false => group.members.first(),
            };
            if let Some(member) = member.copied() {
                self.follow_item(dependent, member, rule);
            }
        } else if score < INFINITY {
            for member in group.members.clone() {
                self.follow_item(dependent, member, rule);
            }
        }
    }

    fn follow_item(&mut self, dependent: UnitId, primary: UnitId, rule: usize) {
        let rule = self.together[rule].clone();
        if !self.rule_applies(dependent, primary, &rule) {
            return;
        }
        let at = self.assigned[primary];
        if at.is_none() && rule.score < 0 {
            return;
        }
        let mut work = self.allowed[dependent].clone();
        for (host, entry) in work.iter_mut().enumerate() {
            let Some(score) = entry else { continue };
            match at {
                None => *score = score::add(-rule.score, *score),
                Some(at) if self.same_place(&rule, host, at) => {
                    // A "must" is no wish: hosts without the primary are ruled out below.
                    if rule.score < INFINITY {
                        *score = score::add(rule.score, *score);
                    }
                }
                Some(_) if rule.score >= INFINITY => *score = -INFINITY,
                Some(_) => {}
            }
        }
        let must = rule.score.abs() >= INFINITY;
        if must || self.any_usable(&work) {
            self.allowed[dependent] = work;
        }
    }

    fn rule_applies(&self, dependent: UnitId, primary: UnitId, rule: &Together) -> bool {
        let role = |wanted: Option<Role>, unit: UnitId| {
            wanted.is_none_or(|wanted| self.next[unit] == Some(wanted))
        };
        self.decided[primary]
            && !self.decided[dependent]
            && role(rule.dependent_role, dependent)
            && role(rule.primary_role, primary)
    }

    /// Adds what a dependent would like to the scores of its primary.
    pub(super) fn weigh_dependent(&mut self, primary: UnitId, rule: usize) {
        let one = self.together[rule].clone();
        if !self.has_influence(&one) {
            return;
        }
        self.merges_left = MAX_MERGES;
        let mut nodes = Some(self.allowed[primary].clone());
        self.add_wishes(
            one.dependent,
            &mut nodes,
            Some(rule),
            Factor::of(one.score),
            Direction::Dependents,
            true,
        );
        if let Some(nodes) = nodes {
            self.allowed[primary] = nodes;
        }
    }

    /// Adds the wishes of `source`, and of what is tied to it, to a table. Without a table it starts
    /// with the source's own.
    pub(super) fn add_wishes(
        &mut self,
        source: UnitId,
        table: &mut Option<Table>,
        rule: Option<usize>,
        factor: Factor,
        direction: Direction,
        active: bool,
    ) {
        let scores = self.site.hosts.len() as u64 + 16;
        let spent = self.merges_left == 0 || self.scores_left < scores;
        if self.merging[source] || self.depth >= MAX_CHAIN || spent {
            return;
        }
        self.merges_left -= 1;
        self.scores_left -= scores;
        self.merging[source] = true;
        self.depth += 1;
        if let Some(group) = self.site.group(source) {
            let member = match table {
                None => group.members.last(),
                Some(_) => group.members.first(),
            };
            if let Some(member) = member.copied() {
                self.add_wishes(member, table, rule, factor, direction, active);
            }
        } else {
            self.add_item_wishes(source, table, rule, factor, direction, active);
        }
        self.depth -= 1;
        self.merging[source] = false;
    }

    fn add_item_wishes(
        &mut self,
        source: UnitId,
        table: &mut Option<Table>,
        rule: Option<usize>,
        factor: Factor,
        direction: Direction,
        active: bool,
    ) {
        let mut work = match (&table, rule) {
            (Some(now), Some(rule)) => {
                let mut work = now.clone();
                self.add_matching(&mut work, source, rule, factor);
                work
            }
            _ => self.allowed[source].clone(),
        };
        if !self.any_usable(&work) {
            if !active {
                *table = Some(work);
            }
            return;
        }
        let rules = match direction {
            Direction::Primaries => self.rules_of(source),
            Direction::Dependents => self.rules_with(source),
        };
        for rule in rules {
            let one = self.together[rule].clone();
            let other = match direction {
                Direction::Primaries => one.primary,
                Direction::Dependents if self.has_influence(&one) => one.dependent,
                Direction::Dependents => continue,
            };
            let share = factor.times(one.score);
            let mut next = Some(work);
            self.add_wishes(other, &mut next, Some(rule), share, direction, true);
            work = next.unwrap_or_default();
        }
        *table = Some(work);
    }

    fn add_matching(&self, work: &mut Table, source: UnitId, rule: usize, factor: Factor) {
        let rule = &self.together[rule];
        let wishes = self.wishes(source, rule);
        for (host, entry) in work.iter_mut().enumerate() {
            let Some(now) = entry else { continue };
            let score = self.best_matching(&wishes, rule, host);
            if factor.is_negative() && score < 0 && !self.may_push_away(rule, score) {
                continue;
            }
            *now = score::add(factor.part(score), *now);
        }
    }

    /// A dependent that must stay away makes its primary move only when it has no other place, and
    /// when that weighs more than the primary's wish to stay.
    fn may_push_away(&self, rule: &Together, score: Score) -> bool {
        let stickiness = self.item(rule.primary).map_or(0, |item| item.stickiness);
        let places = self.allowed[rule.dependent]
            .iter()
            .filter(|score| score.is_some_and(|score| score >= 0))
            .count();
        stickiness < -score && self.has_influence(rule) && places == 1
    }

    /// The scores of the source of wishes. A later member of a group is asked about itself: then the
    /// wishes for the group count as well.
    fn wishes(&self, source: UnitId, rule: &Together) -> Table {
        let mut table = self.allowed[source].clone();
        if source == rule.dependent
            && rule.explicit
            && let Some(parent) = self.site.units[source].parent
            && let Some(group) = self.site.group(parent)
            && group.members.first() != Some(&source)
        {
            for (host, wish) in self.group_wishes[parent].iter().enumerate() {
                if let Some(wish) = wish {
                    table[host] = Some(table[host].map_or(*wish, |now| score::add(now, *wish)));
                }
            }
        }
        table
    }

    fn best_matching(&self, wishes: &Table, rule: &Together, host: HostId) -> Score {
        if rule.by.is_none() {
            return match wishes[host] {
                Some(score) if self.site.hosts[host].open() => score.max(-INFINITY),
                _ => -INFINITY,
            };
        }
        let candidates = wishes.iter().enumerate().filter_map(|(other, score)| {
            let fits = self.site.hosts[other].open() && self.same_place(rule, host, other);
            score.filter(|_| fits)
        });
        candidates.max().unwrap_or(-INFINITY)
    }
}
