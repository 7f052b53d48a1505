//! Groups and constraints: dependencies, rules, allowed hosts.

use super::super::judge::Judged;
use super::super::model::Cib;
use super::super::site;
use super::draft::{Draft, Rule, RuleKind};
use crate::Place;
use quorate_planner::engine::{Act, Body, INFINITY, Order, Side, Site, Strength, Together, UnitId};
use std::collections::{BTreeMap, BTreeSet};

/// Carries over what the constraints come to, whichever way they are written (sets, templates, tags).
pub(super) fn collect(draft: &mut Draft, cib: &Cib, judged: &Judged) {
    let question = site::question(cib, judged);
    draft.notes.extend(question.warnings.clone());
    let mut relations = Relations {
        draft,
        judged,
        site: &question.site,
        things: &question.things,
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
                    self.depends(&pair[1], &pair[0], &one.name, place);
                }
            }
            if group.colocated {
                let rule = Rule {
                    place,
                    kind: RuleKind::With,
                    vms: vms.into_iter().collect(),
                };
                self.draft.rule(&one.name, rule);
            }
        }
    }

    fn depends(&mut self, vm: &str, on: &str, id: &str, place: Place) {
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
            vm.depends_on.insert(on.to_owned());
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
        if !starts || order.strength != Strength::Mandatory {
            let why = match order.strength {
                _ if !starts => "only orders of starts are dependencies",
                Strength::Optional => "it is optional",
                _ => "it only keeps things from starting at the same time",
            };
            return self
                .draft
                .note(place, format!("order \"{id}\" is left out: {why}"), "");
        }
        for then in &thens {
            self.depends(then, last, &id, place);
        }
    }

    fn together(&mut self, rule: &Together, constraint: usize) {
        let (id, place) = self.source(constraint);
        let (ones, others) = (self.vms(rule.dependent), self.vms(rule.primary));
        let (Some(one), Some(other)) = (ones.first(), others.last()) else {
            return;
        };
        if rule.score.abs() < INFINITY || rule.by.is_some() {
            let why = match rule.by {
                Some(_) => "it goes by an attribute of hosts".to_owned(),
                None => format!("it is a wish ({}), not a rule", rule.score),
            };
            return self
                .draft
                .note(place, format!("colocation \"{id}\" is left out: {why}"), "");
        }
        let kind = if rule.score > 0 {
            RuleKind::With
        } else {
            RuleKind::Apart
        };
        let made = |vms: [&String; 2]| Rule {
            place,
            kind,
            vms: vms.into_iter().cloned().collect(),
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

    /// Hosts that are ruled out become a list of the others; mere wishes are reported.
    fn locations(&mut self, cib: &Cib, ids: &[usize]) {
        let mut bans: BTreeMap<UnitId, BTreeSet<usize>> = BTreeMap::new();
        let mut allowed: BTreeMap<UnitId, BTreeSet<usize>> = BTreeMap::new();
        let mut wishes: BTreeSet<usize> = BTreeSet::new();
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
            if wish.score > -INFINITY && wish.score != 0 {
                wishes.extend(ids.get(at));
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
        let dated = cib.constraints.iter().enumerate();
        for (at, constraint) in dated {
            if let super::super::model::Constraint::Location(one) = constraint
                && one.rules.iter().any(super::super::rules::is_dated)
            {
                let message = format!(
                    "location \"{}\" depends on the time: it is judged once",
                    one.id
                );
                self.draft.note(one.place, message, "");
                wishes.remove(&at);
            }
        }
        for at in wishes {
            let (id, place) = self.source(at);
            let message = format!("location \"{id}\" is left out: it is a wish, not a rule");
            self.draft.note(
                place,
                message,
                "`hosts:` lists the hosts that a VM may run on",
            );
        }
    }
}
