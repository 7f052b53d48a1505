//! Order constraints: what starts and stops after what.

use super::super::model::{Ordering, ResourceSet};
use super::Builder;
use quorate_planner::engine::{Act, AnyOf, Order, Score, Side, Strength, UnitId};

fn act(word: Option<&str>) -> Option<Act> {
    match word {
        None | Some("start") => Some(Act::Start),
        Some("stop") => Some(Act::Stop),
        Some(_) => None,
    }
}

fn strength(kind: Option<&str>, score: Option<Score>) -> Strength {
    match (kind, score) {
        (Some("Optional"), _) | (None, Some(0)) => Strength::Optional,
        (Some("Serialize"), _) => Strength::Serialized,
        _ => Strength::Mandatory,
    }
}

/// Whether the reverse holds for stops as well.
fn symmetric(given: Option<bool>, strength: Strength) -> bool {
    strength != Strength::Serialized && given.unwrap_or(true)
}

impl Builder<'_> {
    pub(super) fn order(&mut self, order: &Ordering) {
        let strength = strength(order.kind.as_deref(), order.score);
        let symmetric = symmetric(order.symmetrical, strength);
        if !order.sets.is_empty() {
            return self.order_sets(order, strength, symmetric);
        }
        let (Some(first), Some(then)) = (&order.first, &order.then) else {
            return;
        };
        let first_act = act(order.first_action.as_deref());
        let then_act = match &order.then_action {
            None => first_act,
            Some(word) => act(Some(word)),
        };
        let (Some(first_act), Some(then_act)) = (first_act, then_act) else {
            return self.no_such_act(order);
        };
        let Some(firsts) = self.named(first, order.place, &order.id) else {
            return;
        };
        let Some(thens) = self.named(then, order.place, &order.id) else {
            return;
        };
        if !self.room_for(firsts.units.len() * thens.units.len() * 2, order.place) {
            return;
        }
        for first in &firsts.units {
            for then in &thens.units {
                let pair = (*first, first_act, *then, then_act);
                self.push_order(pair, strength, symmetric);
            }
        }
    }

    fn no_such_act(&mut self, order: &Ordering) {
        let message = format!(
            "constraint \"{}\": only starts and stops can be ordered: ignored",
            order.id
        );
        self.warn(order.place, message);
    }

    fn push_order(
        &mut self,
        (first, first_act, then, then_act): (UnitId, Act, UnitId, Act),
        strength: Strength,
        symmetric: bool,
    ) {
        if first == then {
            return;
        }
        let forward = Order {
            first,
            first_act,
            then,
            then_act,
            strength,
            side: if symmetric {
                Side::Forward
            } else {
                Side::Alone
            },
        };
        self.site.orders.push(forward);
        if symmetric {
            self.site.orders.push(Order {
                first: then,
                first_act: then_act.inverse(),
                then: first,
                then_act: first_act.inverse(),
                strength,
                side: Side::Backward,
            });
        }
    }

    fn order_sets(&mut self, order: &Ordering, strength: Strength, both: bool) {
        let mut last: Option<(&ResourceSet, Vec<UnitId>)> = None;
        for set in &order.sets {
            if act(set.action.as_deref()).is_none() {
                return self.no_such_act(order);
            }
            let Some(members) = self.members(set, &order.id) else {
                return;
            };
            self.order_within(order, strength, set, &members);
            if let Some((before, others)) = &last {
                let (one, other) = ((*before, others.as_slice()), (set, members.as_slice()));
                let side = if both { Side::Forward } else { Side::Alone };
                self.order_between(one, other, strength, side);
                if both {
                    self.order_between(other, one, strength, Side::Backward);
                }
            }
            last = Some((set, members));
        }
    }

    fn order_within(
        &mut self,
        order: &Ordering,
        parent: Strength,
        set: &ResourceSet,
        members: &[UnitId],
    ) {
        let own = match &set.kind {
            Some(kind) => strength(Some(kind), None),
            None => parent,
        };
        let both = symmetric(set_symmetry(order), own);
        let Some(act) = act(set.action.as_deref()) else {
            return;
        };
        if own == Strength::Serialized {
            if !self.room_for(members.len() * members.len() / 2, order.place) {
                return;
            }
            for (at, first) in members.iter().enumerate() {
                for then in &members[at + 1..] {
                    self.push_order((*first, act, *then, act), own, false);
                }
            }
            return;
        }
        if set.sequential != Some(false) {
            for pair in members.windows(2) {
                self.push_order((pair[0], act, pair[1], act), own, both);
            }
        }
    }

    fn order_between(
        &mut self,
        (one, firsts): (&ResourceSet, &[UnitId]),
        (other, thens): (&ResourceSet, &[UnitId]),
        strength: Strength,
        side: Side,
    ) {
        let acts = (act(one.action.as_deref()), act(other.action.as_deref()));
        let (Some(mut first_act), Some(mut then_act)) = acts else {
            return;
        };
        let backward = side == Side::Backward;
        if backward {
            (first_act, then_act) = (first_act.inverse(), then_act.inverse());
        }
        if one.require_all == Some(false) && first_act == Act::Start {
            self.site.any_of.push(AnyOf {
                first: firsts.to_vec(),
                first_act,
                then: thens.to_vec(),
                then_act,
                strength,
                side,
            });
            return;
        }
        // Only a set that says so has an end to which others are tied.
        let firsts = match (one.sequential, backward) {
            (Some(true), false) => &firsts[firsts.len().saturating_sub(1)..],
            (Some(true), true) => &firsts[..firsts.len().min(1)],
            _ => firsts,
        };
        let thens = match (other.sequential, backward) {
            (Some(true), false) => &thens[..thens.len().min(1)],
            (Some(true), true) => &thens[thens.len().saturating_sub(1)..],
            _ => thens,
        };
        if !self.room_for(firsts.len() * thens.len(), one.place) {
            return;
        }
        for first in firsts {
            for then in thens.iter().filter(|then| *then != first) {
                self.site.orders.push(Order {
                    first: *first,
                    first_act,
                    then: *then,
                    then_act,
                    strength,
                    side,
                });
            }
        }
    }
}

fn set_symmetry(order: &Ordering) -> Option<bool> {
    order.symmetrical
}
