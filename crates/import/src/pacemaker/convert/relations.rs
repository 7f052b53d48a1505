//! Groups and constraints: dependencies, rules, allowed hosts.

use super::super::judge::Judged;
use super::super::model::Cib;
use super::super::site;
use super::draft::{Draft, Rule, RuleKind, valid_name};
use crate::Place;
use quorate_planner::engine::{
    Act, Body, INFINITY, Order, Score, Side, Site, Strength, Together, UnitId, add,
};
use std::collections::{BTreeMap, BTreeSet};

/// Largest weight of a wish.
const MAX_WEIGHT: i64 = 100_000;

/// Carries over what the constraints come to, whichever way they are written (sets, templates, tags).
pub(super) fn collect(draft: &mut Draft, cib: &Cib, judged: &mut Judged) {
    let question = site::question(cib, judged);
    draft.notes.extend(question.warnings.clone());
    draft.unknown.clone_from(&question.unknown);
    let mut relations = Relations {
        draft,
        judged,
        site: &question.site,
        things: &question.things,
        labels: &question.labels,
        places: site::sources(cib),
    };
    relations.groups();
    for (at, order) in question.site.orders.iter().enumerate() {
        relations.order(order, question.order_ids[at]);
    }
    for (at, rule) in question.site.together.iter().enumerate() {
        relations.together(rule, question.together_ids[at]);
    }
    for any in &question.any_ids {
        let (id, place) = relations.source(*any);
        let hint = "name the one that is needed under `depends_on:`";
        relations.draft.note(
            place,
            format!("order \"{id}\": one of several is enough"),
            hint,
        );
    }
    relations.locations(cib, &question.prefer_ids);
}

struct Relations<'a> {
    draft: &'a mut Draft,
    judged: &'a Judged,
    site: &'a Site,
    things: &'a [Option<usize>],
    /// Attributes of hosts that colocations go by.
    labels: &'a [String],
    places: Vec<(String, Place)>,
}

impl Relations<'_> {
    fn source(&self, constraint: usize) -> (String, Place) {
        self.places.get(constraint).cloned().unwrap_or_default()
    }

    fn vm(&self, unit: UnitId) -> Option<String> {
        let thing = &self.judged.things[self.things[unit]?];
        self.draft.of_resource.get(&thing.id).cloned()
    }

    /// The VMs behind a unit: of a group all its VMs.
    fn vms(&self, unit: UnitId) -> Vec<String> {
        match &self.site.units[unit].body {
            Body::Item(_) => self.vm(unit).into_iter().collect(),
            Body::Group(group) => group.members.iter().filter_map(|m| self.vm(*m)).collect(),
        }
    }

    fn groups(&mut self) {
        for (unit, one) in self.site.units.iter().enumerate() {
            let Body::Group(group) = &one.body else {
                continue;
            };
            let vms = self.vms(unit);
            let place = vms
                .first()
                .and_then(|vm| self.draft.vms.get(vm))
                .map(|vm| vm.place);
            let place = place.unwrap_or_default();
            if group.ordered {
                for pair in vms.windows(2) {
                    self.depends(&pair[1], &pair[0], false, (&one.name, place));
                }
            }
            if group.colocated {
                let rule = Rule {
                    place,
                    kind: RuleKind::With,
                    vms: vms.into_iter().collect(),
                    weight: None,
                    across: None,
                };
                self.draft.rule(&one.name, rule);
            }
        }
    }

    fn depends(&mut self, vm: &str, on: &str, advisory: bool, (id, place): (&str, Place)) {
        if vm == on {
            return;
        }
        if self.draft.waits_for(on, vm) {
            let message =
                format!("order \"{id}\" goes round in a circle: {vm} after {on} is left out");
            return self
                .draft
                .note(place, message, "decide which of them starts first");
        }
        if let Some(vm) = self.draft.vms.get_mut(vm) {
            let kept = vm.depends_on.entry(on.to_owned()).or_insert(advisory);
            *kept &= advisory;
        }
    }

    fn order(&mut self, order: &Order, constraint: usize) {
        if order.side == Side::Backward {
            return;
        }
        let (id, place) = self.source(constraint);
        let (firsts, thens) = (self.vms(order.first), self.vms(order.then));
        let (Some(last), Some(_)) = (firsts.last(), thens.first()) else {
            return;
        };
        let starts = order.first_act == Act::Start && order.then_act == Act::Start;
        if !starts || order.strength == Strength::Serialized {
            let why = match starts {
                false => "only orders of starts are dependencies",
                true => "it only keeps things from starting at the same time",
            };
            let message = format!("order \"{id}\" is left out: {why}");
            return self.draft.note(place, message, "");
        }
        let advisory = order.strength == Strength::Optional;
        for then in &thens {
            self.depends(then, last, advisory, (&id, place));
        }
    }

    fn together(&mut self, rule: &Together, constraint: usize) {
        let (id, place) = self.source(constraint);
        let (ones, others) = (self.vms(rule.dependent), self.vms(rule.primary));
        let (Some(one), Some(other)) = (ones.first(), others.last()) else {
            return;
        };
        let hard = rule.score.abs() >= INFINITY;
        let kind = if rule.score > 0 {
            RuleKind::With
        } else {
            RuleKind::Apart
        };
        let across = rule.by.map(|by| self.label(by));
        if kind == RuleKind::With && across.is_some() {
            let message = format!("colocation \"{id}\" is left out: together is always one host");
            let hint = "`host_labels:` keeps a VM on hosts with a label";
            return self.draft.note(place, message, hint);
        }
        let made = |vms: [&String; 2]| Rule {
            place,
            kind,
            vms: vms.into_iter().cloned().collect(),
            weight: (!hard).then(|| rule.score.abs().clamp(1, MAX_WEIGHT)),
            across: across.clone(),
        };
        match kind {
            RuleKind::With => self.draft.rule(&id, made([one, other])),
            RuleKind::Apart => {
                for one in &ones {
                    for other in &others {
                        self.draft.rule(&id, made([one, other]));
                    }
                }
            }
        }
    }

    /// The label that an attribute of hosts becomes; the hosts get it.
    fn label(&mut self, by: usize) -> String {
        let attribute = self.labels.get(by).map_or("label", String::as_str);
        let label = valid_name(attribute);
        for host in &self.judged.hosts {
            let value = host.attributes.get(attribute);
            if let (Some(name), Some(value)) = (self.draft.of_node.get(&host.name), value) {
                let host = self.draft.hosts.entry(name.clone()).or_default();
                host.labels.insert(label.clone(), valid_name(value));
            }
        }
        label
    }

    /// Hosts that are ruled out become a list of the others; mere wishes become preferences.
    fn locations(&mut self, cib: &Cib, ids: &[usize]) {
        let mut bans: BTreeMap<UnitId, BTreeSet<usize>> = BTreeMap::new();
        let mut allowed: BTreeMap<UnitId, BTreeSet<usize>> = BTreeMap::new();
        let mut wishes: BTreeMap<UnitId, BTreeMap<usize, Score>> = BTreeMap::new();
        for (at, wish) in self.site.prefer.iter().enumerate() {
            let units = match &self.site.units[wish.unit].body {
                Body::Item(_) => vec![wish.unit],
                Body::Group(group) => group.members.clone(),
            };
            for unit in units {
                if wish.score <= -INFINITY {
                    bans.entry(unit).or_default().insert(wish.host);
                } else if wish.score >= 0 {
                    allowed.entry(unit).or_default().insert(wish.host);
                }
            }
            // Members of a group follow the first one.
            let unit = match &self.site.units[wish.unit].body {
                Body::Item(_) => Some(wish.unit),
                Body::Group(group) => group
                    .members
                    .iter()
                    .copied()
                    .find(|m| self.vm(*m).is_some()),
            };
            let from_constraint = ids.get(at).is_some_and(|id| *id != usize::MAX);
            if let Some(unit) = unit.filter(|_| wish.score > -INFINITY && from_constraint) {
                let sum = wishes
                    .entry(unit)
                    .or_default()
                    .entry(wish.host)
                    .or_default();
                *sum = add(*sum, wish.score);
            }
        }
        let opt_in = self.site.rules.opt_in;
        for unit in 0..self.site.units.len() {
            let Some(vm) = self.vm(unit) else { continue };
            let banned = bans.remove(&unit).unwrap_or_default();
            let chosen = allowed.remove(&unit).unwrap_or_default();
            if banned.is_empty() && !opt_in {
                continue;
            }
            let hosts = self.judged.hosts.iter().enumerate();
            let hosts =
                hosts.filter(|(at, _)| !banned.contains(at) && (!opt_in || chosen.contains(at)));
            let names = hosts.filter_map(|(_, host)| self.draft.of_node.get(&host.name).cloned());
            let names: BTreeSet<String> = names.collect();
            if names.is_empty() {
                let place = self
                    .draft
                    .vms
                    .get(&vm)
                    .map(|vm| vm.place)
                    .unwrap_or_default();
                let message =
                    format!("{vm} may run on no host at all: the rules for hosts are left out");
                self.draft
                    .note(place, message, "list its hosts under `hosts:`");
                continue;
            }
            if let Some(vm) = self.draft.vms.get_mut(&vm) {
                vm.hosts = names;
            }
        }
        self.preferences(&wishes);
        for constraint in &cib.constraints {
            if let super::super::model::Constraint::Location(one) = constraint
                && one.rules.iter().any(super::super::rules::is_dated)
            {
                let message = format!(
                    "location \"{}\" depends on the time: it is judged once",
                    one.id
                );
                self.draft.note(one.place, message, "");
            }
        }
    }

    fn preferences(&mut self, wishes: &BTreeMap<UnitId, BTreeMap<usize, Score>>) {
        for (unit, hosts) in wishes {
            let Some(vm) = self.vm(*unit) else { continue };
            for (host, score) in hosts.iter().filter(|(_, score)| **score != 0) {
                let name = &self.judged.hosts[*host].name;
                let name = self.draft.of_node.get(name).cloned();
                if let (Some(name), Some(vm)) = (name, self.draft.vms.get_mut(&vm)) {
                    vm.prefer
                        .insert(name, (*score).clamp(-MAX_WEIGHT, MAX_WEIGHT));
                }
            }
        }
    }
}
