//! From what holds now to the question that the engine answers.

mod contradictions;
mod orders;
mod together;
mod wishes;

use super::judge::{Judged, NoQuorum, Thing};
use super::model::{Cib, Constraint, Resource};
use super::values;
use crate::{Place, Problem};
use quorate_planner::engine::{Body, Group, Host, Item, Quorum, Rules, Score, Site, Unit, UnitId};
use std::collections::BTreeMap;

/// The question, and which unit is which resource.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) site: Site,
    /// Per unit: the index of its thing; `None` for groups.
    pub(super) things: Vec<Option<usize>>,
    pub(super) warnings: Vec<Problem>,
    /// Constraints that name what does not exist.
    pub(super) unknown: Vec<Problem>,
    /// Attributes of hosts that colocations go by.
    pub(super) labels: Vec<String>,
    /// Constraints that cannot hold together.
    pub(super) contradictions: Vec<Problem>,
    /// Per wish, rule and order of the site: the index of the constraint that it comes from.
    pub(super) prefer_ids: Vec<usize>,
    pub(super) together_ids: Vec<usize>,
    pub(super) order_ids: Vec<usize>,
    pub(super) any_ids: Vec<usize>,
}

/// Makes the question. The scores move into it: at large sites there is no room for them twice.
pub(super) fn question(cib: &Cib, judged: &mut Judged) -> Question {
    let taken = judged
        .things
        .iter_mut()
        .map(|thing| std::mem::take(&mut thing.scores));
    let scores = taken.collect();
    let judged = &*judged;
    let mut builder = Builder {
        scores,
        judgements: 0,
        too_many: None,
        cib,
        judged,
        site: Site::default(),
        things: Vec::new(),
        names: BTreeMap::new(),
        of_template: BTreeMap::new(),
        dimensions: Vec::new(),
        labels: Vec::new(),
        warnings: Vec::new(),
        unknown: Vec::new(),
        prefer_ids: Vec::new(),
        together_ids: Vec::new(),
        order_ids: Vec::new(),
        any_ids: Vec::new(),
    };
    builder.rules();
    builder.dimensions();
    builder.hosts();
    builder.units();
    builder.templates();
    builder.wish_for_health();
    builder.constraints();
    builder.fill_labels();
    let too_many = builder.too_many;
    let mut question = Question {
        site: builder.site,
        things: builder.things,
        warnings: builder.warnings,
        unknown: builder.unknown,
        labels: builder.labels,
        prefer_ids: builder.prefer_ids,
        together_ids: builder.together_ids,
        order_ids: builder.order_ids,
        any_ids: builder.any_ids,
        contradictions: Vec::new(),
    };
    question.contradictions = contradictions::find(&question, &sources(cib));
    if let Some(place) = too_many {
        let message = "from here on the constraints come to too many rules";
        let hint = "split its sets, or name a group instead";
        question
            .contradictions
            .push(Problem::new(place, message).hint(hint));
    }
    question
}

/// Ids and places of the constraints.
pub(super) fn sources(cib: &Cib) -> Vec<(String, Place)> {
    let constraints = cib.constraints.iter();
    constraints
        .map(|constraint| match constraint {
            Constraint::Location(one) => (one.id.clone(), one.place),
            Constraint::Colocation(one) => (one.id.clone(), one.place),
            Constraint::Order(one) => (one.id.clone(), one.place),
        })
        .collect()
}

/// Most warnings that are kept.
const MAX_WARNINGS: usize = 500;

/// Most unknown names for which a known one is looked for, and most known ones that are looked at.
const MAX_SUGGESTIONS: usize = 50;
const MAX_CANDIDATES: usize = 20_000;

/// Most rules that constraints may come to: sets of sets multiply.
const MAX_RULES: usize = 500_000;

/// Most pairs of resource and host that location constraints may be judged for.
const MAX_JUDGEMENTS: usize = 50_000_000;

struct Builder<'a> {
    /// Per thing.
    scores: Vec<Vec<Option<Score>>>,
    judgements: usize,
    too_many: Option<Place>,
    cib: &'a Cib,
    judged: &'a Judged,
    site: Site,
    things: Vec<Option<usize>>,
    names: BTreeMap<String, UnitId>,
    of_template: BTreeMap<String, Vec<UnitId>>,
    /// Names of kinds of capacity.
    dimensions: Vec<String>,
    /// Host attributes by which things are together.
    labels: Vec<String>,
    warnings: Vec<Problem>,
    unknown: Vec<Problem>,
    prefer_ids: Vec<usize>,
    together_ids: Vec<usize>,
    order_ids: Vec<usize>,
    any_ids: Vec<usize>,
}

/// What a name in a constraint stands for.
struct Named {
    units: Vec<UnitId>,
    /// It names one resource, not all with a tag or of a template.
    single: bool,
}

impl Builder<'_> {
    fn warn(&mut self, place: Place, message: String) {
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(Problem::new(place, message));
        }
    }

    /// A constraint names what does not exist. Of the first ones it is said what may have been meant.
    fn unknown(&mut self, place: Place, constraint: &str, what: &str, name: &str) {
        if self.cib.set_aside.contains(name) || self.cib.tags.contains_key(name) {
            let message =
                format!("constraint \"{constraint}\": {what} \"{name}\" is not supported: ignored");
            return self.warn(place, message);
        }
        if self.unknown.len() >= MAX_WARNINGS {
            return;
        }
        let message = format!("constraint \"{constraint}\": there is no {what} \"{name}\"");
        let known: Vec<&str> = match what {
            "node" => self
                .judged
                .hosts
                .iter()
                .map(|host| host.name.as_str())
                .collect(),
            _ => {
                let names = self.names.keys().chain(self.of_template.keys());
                names
                    .chain(self.cib.tags.keys())
                    .map(String::as_str)
                    .collect()
            }
        };
        let few = self.unknown.len() < MAX_SUGGESTIONS && known.len() < MAX_CANDIDATES;
        let near = few
            .then(|| quorate_manifest::nearest(name, known))
            .flatten();
        let problem = Problem::new(place, message);
        let problem = match near {
            Some(near) => problem.hint(format!("did you mean \"{near}\"?")),
            None => problem,
        };
        self.unknown.push(problem);
    }

    /// Whether so many more rules can be taken. If not, no more constraints are read.
    fn room_for(&mut self, rules: usize, place: Place) -> bool {
        let now = self.site.orders.len() + self.site.together.len();
        let room = rules <= MAX_RULES.saturating_sub(now);
        if !room {
            self.too_many.get_or_insert(place);
        }
        room
    }

    fn rules(&mut self) {
        let options = &self.judged.options;
        self.site.rules = Rules {
            strategy: options.strategy,
            quorum: match (self.judged.quorate, options.no_quorum) {
                (true, _) | (_, NoQuorum::Ignore | NoQuorum::Fence) => Quorum::Held,
                (false, NoQuorum::Freeze) => Quorum::Freeze,
                (false, NoQuorum::Stop) => Quorum::Stop,
            },
            hands_off: options.fencing && !self.judged.has_fence_device,
            stop_all: options.stop_all,
            opt_in: !options.symmetric,
        };
    }

    fn dimensions(&mut self) {
        let of_hosts = self.judged.hosts.iter().map(|host| &host.utilization);
        let of_things = self.judged.things.iter().map(|thing| &thing.utilization);
        let mut names: Vec<String> = of_hosts
            .chain(of_things)
            .flat_map(|table| table.keys().cloned())
            .collect();
        names.sort();
        names.dedup();
        self.dimensions = names;
    }

    fn amounts(&self, table: &BTreeMap<String, String>) -> Vec<i64> {
        let amount = |name: &String| {
            let value = table.get(name)?;
            values::amount(value)
        };
        let all = self.dimensions.iter();
        all.map(|name| amount(name).unwrap_or(0)).collect()
    }

    fn hosts(&mut self) {
        for (at, host) in self.judged.hosts.iter().enumerate() {
            let capacity = self.amounts(&host.utilization);
            self.site.hosts.push(Host {
                name: host.name.clone(),
                up: host.up,
                lost: host.lost,
                can_fence: self.judged.can_fence(at),
                standby: host.standby,
                leaving: host.leaving,
                maintenance: host.maintenance,
                joining: host.joining,
                capacity,
                labels: Vec::new(),
            });
        }
    }

    fn units(&mut self) {
        let (mut thing, mut group) = (0, 0);
        for resource in &self.cib.resources {
            match resource {
                Resource::Primitive(_) => {
                    self.unit_of(thing, None);
                    thing += 1;
                }
                Resource::Group(_) => {
                    let now = &self.judged.groups[group];
                    let parent = self.site.units.len();
                    self.names.entry(now.id.clone()).or_insert(parent);
                    self.things.push(None);
                    let first = parent + 1;
                    self.site.units.push(Unit {
                        name: now.id.clone(),
                        priority: now.priority,
                        parent: None,
                        body: Body::Group(Group {
                            members: (first..first + now.members.len()).collect(),
                            ordered: now.ordered,
                            colocated: now.colocated,
                        }),
                    });
                    for member in &now.members {
                        self.unit_of(*member, Some(parent));
                    }
                    thing += now.members.len();
                    group += 1;
                }
            }
        }
        for removed in thing..self.judged.things.len() {
            self.unit_of(removed, None);
        }
    }

    fn templates(&mut self) {
        let all = self
            .cib
            .resources
            .iter()
            .flat_map(|resource| match resource {
                Resource::Primitive(one) => std::slice::from_ref(one),
                Resource::Group(group) => &group.members,
            });
        for one in all {
            if let (Some(template), Some(unit)) = (&one.template, self.names.get(&one.id)) {
                let units = self.of_template.entry(template.clone()).or_default();
                units.push(*unit);
            }
        }
    }

    fn unit_of(&mut self, at: usize, parent: Option<UnitId>) {
        let thing = &self.judged.things[at];
        self.names
            .entry(thing.id.clone())
            .or_insert(self.site.units.len());
        self.things.push(Some(at));
        let mut item = self.item(thing);
        item.scores = std::mem::take(&mut self.scores[at]);
        self.site.units.push(Unit {
            name: thing.id.clone(),
            priority: thing.priority,
            parent,
            body: Body::Item(Box::new(item)),
        });
    }

    fn item(&self, thing: &Thing) -> Item {
        Item {
            needs: self.amounts(&thing.utilization),
            scores: Vec::new(),
            active: thing.active.clone(),
            role: thing.role,
            wanted: thing.next,
            managed: thing.managed,
            blocked: thing.blocked,
            maintenance: thing.maintenance,
            failed: thing.failed,
            restart_cures: thing.restart_cures,
            live: thing.live,
            starting: thing.starting,
            stickiness: thing.stickiness,
            requires: thing.requires,
            multiple: thing.multiple(),
            critical: thing.critical,
            half_moved: thing.half_moved,
            strays: thing.strays.clone(),
            must_stop: thing.must_stop.clone(),
            known_on: thing.known_on.clone(),
            may_run_elsewhere: self.may_run_elsewhere(thing),
        }
    }

    /// Whether there is a host that would have to be asked, but does not answer yet.
    fn may_run_elsewhere(&self, thing: &Thing) -> bool {
        let hosts = self.judged.hosts.iter().enumerate();
        self.judged.options.probes
            && !thing.removed
            && hosts.into_iter().any(|(at, host)| {
                host.up && host.joining && !host.lost && !thing.known_on.contains(&at)
            })
    }

    fn constraints(&mut self) {
        // Wishes for healthy hosts come from no constraint.
        self.prefer_ids.resize(self.site.prefer.len(), usize::MAX);
        for (at, constraint) in self.cib.constraints.iter().enumerate() {
            if self.too_many.is_some() {
                break;
            }
            match constraint {
                Constraint::Location(location) => self.location(location),
                Constraint::Colocation(colocation) => self.colocation(colocation),
                Constraint::Order(order) => self.order(order),
            }
            self.prefer_ids.resize(self.site.prefer.len(), at);
            self.together_ids.resize(self.site.together.len(), at);
            self.order_ids.resize(self.site.orders.len(), at);
            self.any_ids.resize(self.site.any_of.len(), at);
        }
    }

    fn fill_labels(&mut self) {
        for (host, now) in self.site.hosts.iter_mut().zip(&self.judged.hosts) {
            let value = |name: &String| now.attributes.get(name).map(|v| v.to_lowercase());
            host.labels = self.labels.iter().map(value).collect();
        }
    }

    /// What a name in a constraint stands for: a resource, or all of a template, or all with a tag.
    fn named(&mut self, name: &str, place: Place, constraint: &str) -> Option<Named> {
        if let Some(unit) = self.names.get(name) {
            return Some(Named {
                units: vec![*unit],
                single: true,
            });
        }
        let mut units = self.of_template.get(name).cloned().unwrap_or_default();
        for member in self.cib.tags.get(name).into_iter().flatten() {
            units.extend(self.names.get(member));
        }
        if units.is_empty() {
            self.unknown(place, constraint, "resource", name);
            return None;
        }
        Some(Named {
            units,
            single: false,
        })
    }

    /// The members of a set, tags expanded. `None` when one of them does not exist.
    fn members(
        &mut self,
        set: &super::model::ResourceSet,
        constraint: &str,
    ) -> Option<Vec<UnitId>> {
        let mut units = Vec::new();
        for member in &set.members {
            units.extend(self.named(member, set.place, constraint)?.units);
        }
        Some(units)
    }
}
