//! What comes before what: orders, ordered groups, and what must not be stopped for nothing.

use super::super::site::{Act, Body, Order, Side, Strength, UnitId};
use super::{Flaw, Lint};
use std::collections::{BTreeMap, BTreeSet};

/// A step of an item: its number, and whether fencing does it.
type Deed = (usize, bool);

fn word(act: Act) -> &'static str {
    match act {
        Act::Start => "starts",
        Act::Stop => "stops",
    }
}

/// "This needs that": both start, and the second cannot without the first.
fn is_need(order: &Order) -> bool {
    order.strength == Strength::Mandatory
        && order.first_act == Act::Start
        && order.then_act == Act::Start
        && order.side != Side::Backward
}

impl Lint<'_> {
    /// Who needs whom, and what could restart whom, item by item.
    pub(super) fn learn_needs(&mut self) {
        let mut needs: BTreeMap<(UnitId, UnitId), bool> = BTreeMap::new();
        let mut moves: BTreeSet<(UnitId, UnitId)> = BTreeSet::new();
        let mut pairs = |thens: &[UnitId], firsts: &[UnitId], stops_before: Option<bool>| {
            for then in thens {
                for first in firsts.iter().filter(|first| *first != then) {
                    moves.insert((*then, *first));
                    if let Some(before) = stops_before {
                        *needs.entry((*then, *first)).or_default() |= before;
                    }
                }
            }
        };
        let orders = self.site.orders.iter();
        for order in orders.filter(|order| order.strength == Strength::Mandatory) {
            let need = is_need(order).then_some(order.side == Side::Forward);
            pairs(&self.items(order.then), &self.items(order.first), need);
        }
        for any in &self.site.any_of {
            let all = |units: &[UnitId]| -> Vec<UnitId> {
                units.iter().flat_map(|unit| self.items(*unit)).collect()
            };
            pairs(&all(&any.then), &all(&any.first), None);
        }
        for unit in &self.site.units {
            if let Body::Group(group) = &unit.body {
                for pair in group.members.windows(2) {
                    pairs(&pair[1..], &pair[..1], group.ordered.then_some(true));
                    // What restarts a later member may go through the earlier one, and back.
                    pairs(&pair[..1], &pair[1..], None);
                }
            }
        }
        self.circular = self.circular();
        needs.retain(|(then, first), _| !self.go_round(*first, *then));
        for ((then, first), before) in needs {
            self.needs[then].push(first);
            self.needed_by[first].push((then, before));
        }
        for (then, first) in moves {
            self.moved_by[then].push(first);
        }
        self.learn_held();
    }

    /// What nobody may stop, and so what must not be stopped before it.
    fn learn_held(&mut self) {
        let untouchable = |unit: &UnitId| {
            let item = self.site.item(*unit);
            let item = item.filter(|item| !item.active.is_empty());
            item.is_some_and(|item| item.blocked || self.untouchable(item).is_some())
        };
        let mut open: Vec<UnitId> = (0..self.site.units.len()).filter(untouchable).collect();
        self.held = open.iter().copied().collect();
        while let Some(unit) = open.pop() {
            for first in &self.needs[unit] {
                if self.held.insert(*first) {
                    open.push(*first);
                }
            }
        }
    }

    /// What an item needs runs when it starts.
    pub(super) fn start_in_order(&self, number: usize, unit: UnitId, found: &mut BTreeSet<Flaw>) {
        for first in &self.needs[unit] {
            let later = self.starts.get(first).is_some_and(|at| *at > number);
            if self.at[*first].is_empty() || (later && !self.moves_only(*first)) {
                found.insert(Flaw::Dependency {
                    unit: self.unit(unit),
                    needs: self.unit(*first),
                });
            }
        }
        let parent = self.site.units[unit].parent;
        let mine = |other: &UnitId| *other == unit || Some(*other) == parent;
        for any in &self.site.any_of {
            let starts = any.first_act == Act::Start && any.then_act == Act::Start;
            let must = starts && any.strength == Strength::Mandatory;
            if must && any.then.iter().any(mine) && !any.first.iter().any(|one| self.runs(*one)) {
                let names: Vec<String> = any.first.iter().map(|one| self.unit(*one)).collect();
                found.insert(Flaw::Dependency {
                    unit: self.unit(unit),
                    needs: format!("any of {}", names.join(", ")),
                });
            }
        }
    }

    fn moves_only(&self, unit: UnitId) -> bool {
        !self.stops.contains_key(&unit) && !self.starts.contains_key(&unit)
    }

    /// Nothing that needs an item runs when it is stopped: that was stopped before.
    pub(super) fn left_behind(&self, unit: UnitId, found: &mut BTreeSet<Flaw>) {
        for (other, before) in &self.needed_by[unit] {
            let can = !self.held.contains(other);
            let well = |host: &usize| self.site.hosts[*host].up && !self.site.hosts[*host].lost;
            if *before && can && self.at[*other].iter().any(well) {
                found.insert(Flaw::LeftBehind {
                    first: self.unit(unit),
                    unit: self.unit(*other),
                });
            }
        }
    }

    pub(super) fn orders(&self, found: &mut BTreeSet<Flaw>) {
        for order in &self.site.orders {
            if order.strength == Strength::Serialized {
                continue;
            }
            for first in self.items(order.first) {
                for then in self.items(order.then) {
                    if first != then && !self.go_round(first, then) {
                        self.order((first, order.first_act), (then, order.then_act), found);
                    }
                }
            }
        }
        for unit in 0..self.site.units.len() {
            if self.restarts_for_nothing(unit) {
                let unit = self.unit(unit);
                found.insert(Flaw::NeedlessRestart { unit });
            }
        }
    }

    fn deeds(&self, unit: UnitId, act: Act) -> Vec<Deed> {
        match act {
            Act::Start => self
                .starts
                .get(&unit)
                .map(|at| (*at, false))
                .into_iter()
                .collect(),
            Act::Stop => {
                let stops = self.stops.get(&unit).into_iter().flatten();
                stops
                    .map(|(at, host)| (*at, self.fences.contains_key(host)))
                    .collect()
            }
        }
    }

    /// If both happen, the first happens first. What fencing does happens when it happens.
    fn order(&self, first: (UnitId, Act), then: (UnitId, Act), found: &mut BTreeSet<Flaw>) {
        for (after, by_fencing) in self.deeds(then.0, then.1) {
            let deeds = self.deeds(first.0, first.1).into_iter();
            let mut late = deeds.filter(|(at, fenced)| *at > after && !fenced);
            if !by_fencing && late.next().is_some() {
                found.insert(Flaw::Order {
                    first: self.unit(first.0),
                    first_act: word(first.1),
                    then: self.unit(then.0),
                    then_act: word(then.1),
                });
            }
        }
    }

    /// No order between the two can be kept.
    fn go_round(&self, first: UnitId, then: UnitId) -> bool {
        self.circular.contains(&first) && self.circular.contains(&then)
    }

    /// Items on orders that go round in a circle: what is left when, again and again, acts are taken away
    /// before or after which nothing comes.
    fn circular(&self) -> BTreeSet<UnitId> {
        let count = self.site.units.len() * 2;
        let node = |unit: UnitId, act: Act| unit * 2 + usize::from(act == Act::Stop);
        let mut edges: BTreeSet<(usize, usize)> = BTreeSet::new();
        let orders = self.site.orders.iter();
        for order in orders.filter(|order| order.strength != Strength::Serialized) {
            for first in self.items(order.first) {
                for then in self
                    .items(order.then)
                    .into_iter()
                    .filter(|then| *then != first)
                {
                    edges.insert((node(first, order.first_act), node(then, order.then_act)));
                }
            }
        }
        for unit in &self.site.units {
            if let Body::Group(group) = &unit.body
                && group.ordered
            {
                for pair in group.members.windows(2) {
                    edges.insert((node(pair[0], Act::Start), node(pair[1], Act::Start)));
                    edges.insert((node(pair[1], Act::Stop), node(pair[0], Act::Stop)));
                }
            }
        }
        let left = peel(count, &edges.iter().copied().collect::<Vec<_>>());
        let back = edges.iter().map(|(first, then)| (*then, *first));
        let inner = back.filter(|(then, first)| left[*then] && left[*first]);
        let left = peel(count, &inner.collect::<Vec<_>>());
        (0..count).filter(|at| left[*at]).map(|at| at / 2).collect()
    }

    /// Stopped and started on the same host, with no cause in itself or in what it needs.
    fn restarts_for_nothing(&self, unit: UnitId) -> bool {
        let Some(item) = self.site.item(unit) else {
            return false;
        };
        let (true, [host]) = (self.starts.contains_key(&unit), &item.active[..]) else {
            return false;
        };
        let stops = self.stops.get(&unit).into_iter().flatten();
        let stays = self.at[unit].len() == 1 && self.at[unit].contains(host);
        if stops.count() == 0 || !stays {
            return false;
        }
        let own = item.failed
            || item.blocked
            || item.starting
            || item.half_moved.is_some()
            || !item.must_stop.is_empty()
            || !item.strays.is_empty()
            || self.fences.contains_key(host);
        !own && !self.moved_under(unit)
    }

    /// Something that an item needs, directly or not, is stopped or started.
    fn moved_under(&self, unit: UnitId) -> bool {
        let mut open = vec![unit];
        let mut seen = BTreeSet::from([unit]);
        while let Some(one) = open.pop() {
            for first in &self.moved_by[one] {
                if !seen.insert(*first) {
                    continue;
                }
                if !self.moves_only(*first) {
                    return true;
                }
                open.push(*first);
            }
        }
        false
    }
}

/// What is left when, again and again, nodes without an edge to them are taken away. A node without
/// any edges is taken, too.
fn peel(count: usize, edges: &[(usize, usize)]) -> Vec<bool> {
    let mut after = vec![Vec::new(); count];
    let mut open = vec![0_usize; count];
    for (first, then) in edges {
        after[*first].push(*then);
        open[*then] += 1;
    }
    let mut left = vec![true; count];
    let mut free: Vec<usize> = (0..count).filter(|at| open[*at] == 0).collect();
    while let Some(at) = free.pop() {
        left[at] = false;
        for then in &after[at] {
            open[*then] -= 1;
            if open[*then] == 0 {
                free.push(*then);
            }
        }
    }
    left
}
