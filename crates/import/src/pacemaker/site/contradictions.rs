//! Constraints that cannot hold together: orders that go round in a circle, and resources that must run
//! both together and apart.
//!
//! Found before planning, because no plan could keep them: what is in such a circle never starts.

use super::Question;
use crate::{Place, Problem};
use quorate_planner::engine::{Act, INFINITY, Side, Site, Strength, UnitId};
use std::collections::BTreeMap;

/// Where a constraint is: its id and place.
type Source = (String, Place);

/// All contradictions, each with the constraints that make it.
pub(super) fn find(question: &Question, sources: &[Source]) -> Vec<Problem> {
    let mut problems = circles(question, sources);
    problems.extend(conflicts(question, sources));
    problems
}

fn source(sources: &[Source], at: usize) -> Source {
    sources.get(at).cloned().unwrap_or_default()
}

/// "Then" units of each unit, with the constraint that says so.
fn edges(question: &Question) -> Vec<Vec<(UnitId, usize)>> {
    let mut edges = vec![Vec::new(); question.site.units.len()];
    for (order, constraint) in question.site.orders.iter().zip(&question.order_ids) {
        let starts = order.first_act == Act::Start && order.then_act == Act::Start;
        if starts && order.strength == Strength::Mandatory && order.side != Side::Backward {
            edges[order.first].push((order.then, *constraint));
        }
    }
    edges
}

/// Circles of orders: one for each way back that a walk in depth finds.
fn circles(question: &Question, sources: &[Source]) -> Vec<Problem> {
    let edges = edges(question);
    let count = edges.len();
    let (mut open, mut done) = (vec![false; count], vec![false; count]);
    let mut problems = Vec::new();
    for start in 0..count {
        // The path walked so far, and which edge of each step is next.
        let mut path: Vec<(UnitId, usize)> = vec![(start, 0)];
        if done[start] {
            continue;
        }
        open[start] = true;
        while let Some((unit, next)) = path.last_mut() {
            let Some((then, constraint)) = edges[*unit].get(*next).copied() else {
                open[*unit] = false;
                done[*unit] = true;
                path.pop();
                continue;
            };
            *next += 1;
            if open[then] {
                problems.push(circle(
                    &question.site,
                    &path,
                    then,
                    source(sources, constraint),
                ));
            } else if !done[then] {
                open[then] = true;
                path.push((then, 0));
            }
        }
    }
    problems
}

fn circle(site: &Site, path: &[(UnitId, usize)], back: UnitId, (id, place): Source) -> Problem {
    let begin = path.iter().position(|(unit, _)| *unit == back).unwrap_or(0);
    let names = path[begin..]
        .iter()
        .map(|(unit, _)| site.units[*unit].name.as_str());
    let names: Vec<&str> = names.chain([site.units[back].name.as_str()]).collect();
    let message = format!("order \"{id}\" closes a circle: {}", names.join(" then "));
    Problem::new(place, message).hint("remove one of these orders, or make it kind=\"Optional\"")
}

/// Pairs that must run together and must not.
fn conflicts(question: &Question, sources: &[Source]) -> Vec<Problem> {
    let mut must: BTreeMap<(UnitId, UnitId), [Option<usize>; 2]> = BTreeMap::new();
    for (rule, constraint) in question.site.together.iter().zip(&question.together_ids) {
        let plain =
            rule.by.is_none() && rule.dependent_role.is_none() && rule.primary_role.is_none();
        if rule.score.abs() >= INFINITY && plain {
            let pair = (
                rule.dependent.min(rule.primary),
                rule.dependent.max(rule.primary),
            );
            let side = usize::from(rule.score > 0);
            must.entry(pair).or_default()[side].get_or_insert(*constraint);
        }
    }
    let name = |unit: UnitId| question.site.units[unit].name.as_str();
    let both = must
        .into_iter()
        .filter_map(|((one, other), sides)| match sides {
            [Some(apart), Some(with)] => Some((one, other, apart, with)),
            _ => None,
        });
    let problems = both.map(|(one, other, apart, with)| {
        let (apart, place) = source(sources, apart);
        let (with, _) = source(sources, with);
        let message = format!(
            "colocation \"{apart}\" keeps \"{}\" and \"{}\" apart, \"{with}\" keeps them together",
            name(one),
            name(other),
        );
        Problem::new(place, message).hint("remove one of the two")
    });
    problems.collect()
}
