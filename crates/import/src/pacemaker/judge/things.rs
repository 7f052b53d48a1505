//! Resources with what holds for them now: their meta attributes and where they run.

use super::super::model::{AttributeSet, Cib, CloneOf, GroupOf, Operation, Primitive, Resource};
use super::super::rules::{Facts, resolve};
use super::super::values;
use super::hosts::HostNow;
use super::options::{NoQuorum, Options};
use crate::Place;
use quorate_planner::engine::{INFINITY, Multiple, Requires, Role, Score, add};
use std::collections::BTreeMap;

/// What to do with a resource that runs more than once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum OnMultiple {
    #[default]
    Restart,
    StopOnly,
    Block,
    StopOthers,
}

/// A resource as it is now.
#[derive(Debug, Clone, Default)]
pub(crate) struct Thing {
    pub(crate) place: Place,
    pub(crate) id: String,
    pub(crate) class: Option<String>,
    pub(crate) provider: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) meta: BTreeMap<String, String>,
    pub(crate) parameters: Vec<AttributeSet>,
    pub(crate) utilization: BTreeMap<String, String>,
    pub(crate) operations: Vec<Operation>,
    /// Index of its group.
    pub(crate) group: Option<usize>,
    /// It is not in the configuration any more.
    pub(crate) removed: bool,
    pub(crate) fence_device: bool,
    pub(crate) priority: Score,
    pub(crate) stickiness: Score,
    /// After so many failures it may not stay.
    pub(crate) threshold: Score,
    pub(crate) failure_timeout_ms: u64,
    pub(crate) critical: bool,
    pub(crate) live: bool,
    pub(crate) managed: bool,
    pub(crate) maintenance: bool,
    pub(crate) blocked: bool,
    pub(crate) failed: bool,
    pub(crate) restart_cures: bool,
    pub(crate) starting: bool,
    pub(crate) ignores_failure: bool,
    pub(crate) requires: Requires,
    pub(crate) on_multiple: OnMultiple,
    pub(crate) role: Option<Role>,
    pub(crate) next: Option<Role>,
    pub(crate) active: Vec<usize>,
    pub(crate) half_moved: Option<(usize, usize)>,
    pub(crate) strays: Vec<usize>,
    pub(crate) must_stop: Vec<usize>,
    pub(crate) known_on: Vec<usize>,
    /// Hosts whose counted failures are about to be forgotten.
    pub(crate) cleared: Vec<usize>,
    pub(crate) scores: Vec<Option<Score>>,
}

/// A group as it is now.
#[derive(Debug, Clone, Default)]
pub(crate) struct GroupNow {
    pub(crate) id: String,
    pub(crate) meta: BTreeMap<String, String>,
    pub(crate) members: Vec<usize>,
    pub(crate) priority: Score,
    pub(crate) ordered: bool,
    pub(crate) colocated: bool,
    pub(crate) blocks_when_multiple: bool,
}

impl Thing {
    pub(crate) fn multiple(&self) -> Multiple {
        match self.on_multiple {
            OnMultiple::Restart => Multiple::Restart,
            OnMultiple::StopOthers => Multiple::StopOthers,
            OnMultiple::StopOnly | OnMultiple::Block => Multiple::Settled,
        }
    }

    /// Adds to the score of a host; where it could not run at all, it can now.
    pub(super) fn raise(&mut self, host: usize, score: Score) {
        let entry = &mut self.scores[host];
        *entry = Some(entry.map_or(score, |now| add(now, score)));
    }

    pub(super) fn ban(&mut self, host: usize) {
        self.raise(host, -INFINITY);
    }

    pub(super) fn ban_everywhere(&mut self) {
        for score in &mut self.scores {
            *score = Some(-INFINITY);
        }
    }

    /// Whether it was asked to be stopped.
    pub(crate) fn target(&self) -> Option<Role> {
        let wanted = self.meta.get("target-role")?;
        wanted
            .eq_ignore_ascii_case("stopped")
            .then_some(Role::Stopped)
    }

    pub(crate) fn facts(&self, now: i64) -> Facts<'_> {
        Facts {
            now,
            class: self.class.as_deref(),
            provider: self.provider.as_deref(),
            kind: self.kind.as_deref(),
            ..Facts::default()
        }
    }
}

/// Makes the things that are configured.
pub(super) struct Maker<'a> {
    pub(super) cib: &'a Cib,
    pub(super) options: &'a Options,
    pub(super) hosts: &'a [HostNow],
    pub(super) now: i64,
}

impl Maker<'_> {
    pub(super) fn all(&self) -> (Vec<Thing>, Vec<GroupNow>) {
        let mut things = Vec::new();
        let mut groups: Vec<GroupNow> = Vec::new();
        for resource in &self.cib.resources {
            match resource {
                Resource::Primitive(primitive) => things.push(self.thing(primitive, None)),
                Resource::Group(group) => {
                    let mut made = self.group(group);
                    for member in &group.members {
                        made.members.push(things.len());
                        let mut thing = self.thing(member, Some((group, &made)));
                        thing.group = Some(groups.len());
                        things.push(thing);
                    }
                    groups.push(made);
                }
            }
        }
        (things, groups)
    }

    fn group(&self, group: &GroupOf) -> GroupNow {
        let facts = Facts {
            now: self.now,
            ..Facts::default()
        };
        let mut meta = resolve(&group.meta, &facts, None);
        for (name, value) in resolve(&self.cib.resource_defaults, &facts, None) {
            meta.entry(name).or_insert(value);
        }
        let unless_false = |name: &str| {
            meta.get(name)
                .is_none_or(|value| values::truth(value) != Some(false))
        };
        GroupNow {
            id: group.id.clone(),
            priority: meta
                .get("priority")
                .and_then(|text| values::score(text))
                .unwrap_or(0),
            ordered: unless_false("ordered"),
            colocated: unless_false("collocated"),
            blocks_when_multiple: meta.get("multiple-active").is_some_and(|v| v == "block"),
            members: Vec::new(),
            meta,
        }
    }

    fn thing(&self, primitive: &Primitive, group: Option<(&GroupOf, &GroupNow)>) -> Thing {
        let mut thing = Thing {
            place: primitive.place,
            id: primitive.id.clone(),
            class: primitive.class.clone(),
            provider: primitive.provider.clone(),
            kind: primitive.kind.clone(),
            parameters: primitive.parameters.clone(),
            operations: primitive.operations.clone(),
            ..Thing::default()
        };
        let facts = thing.facts(self.now);
        let mut meta = resolve(&primitive.meta, &facts, None);
        let mut inherit = |more: BTreeMap<String, String>| {
            for (name, value) in more {
                meta.entry(name).or_insert(value);
            }
        };
        if let Some((group, _)) = group {
            inherit(resolve(&group.meta, &facts, None));
        }
        inherit(resolve(&self.cib.resource_defaults, &facts, None));
        if let Some((_, now)) = group {
            inherit(now.meta.clone());
        }
        let plain = Facts {
            now: self.now,
            ..Facts::default()
        };
        let utilization = resolve(&primitive.utilization, &plain, None);
        thing.meta = meta;
        thing.utilization = utilization;
        self.finish(&mut thing);
        thing
    }

    /// One copy of a clone: what is set for the clone holds for its copies.
    pub(super) fn copy(&self, clone: &CloneOf) -> Thing {
        let mut primitive = clone.primitive.clone();
        // Later sets win: the primitive's own come last.
        primitive.meta = clone
            .meta
            .iter()
            .chain(&clone.primitive.meta)
            .cloned()
            .collect();
        self.thing(&primitive, None)
    }

    /// A resource that is only known from what it did.
    pub(super) fn removed(&self, mut thing: Thing) -> Thing {
        thing.removed = true;
        let facts = thing.facts(self.now);
        thing.meta = resolve(&self.cib.resource_defaults, &facts, None);
        self.finish(&mut thing);
        if self.options.stop_removed {
            for host in 0..self.hosts.len() {
                thing.ban(host);
            }
        } else {
            thing.managed = false;
        }
        thing
    }

    fn finish(&self, thing: &mut Thing) {
        let meta = &thing.meta;
        let score = |name: &str, default: Score| {
            let value = meta
                .get(name)
                .filter(|value| !value.eq_ignore_ascii_case("default"));
            value
                .and_then(|text| values::score(text))
                .unwrap_or(default)
        };
        thing.fence_device = thing.class.as_deref() == Some("stonith");
        thing.priority = score("priority", 0);
        thing.stickiness = score("resource-stickiness", 0);
        thing.threshold = match score("migration-threshold", INFINITY) {
            negative if negative < 0 => INFINITY,
            threshold => threshold,
        };
        thing.failure_timeout_ms = meta
            .get("failure-timeout")
            .and_then(|text| values::duration_ms(text))
            .unwrap_or(0);
        thing.critical = meta
            .get("critical")
            .is_none_or(|v| values::truth(v) == Some(true));
        thing.live = values::is_true(meta.get("allow-migrate"));
        thing.managed = !self.options.maintenance;
        if let Some(value) = meta.get("is-managed")
            && !value.eq_ignore_ascii_case("default")
        {
            thing.managed = values::truth(value) == Some(true);
        }
        if values::is_true(meta.get("maintenance")) || self.options.maintenance {
            thing.managed = false;
            thing.maintenance = true;
        }
        thing.requires = self.requires(meta.get("requires"), thing.fence_device);
        thing.on_multiple = match meta.get("multiple-active").map(String::as_str) {
            Some("stop_only") => OnMultiple::StopOnly,
            Some("block") => OnMultiple::Block,
            Some("stop_unexpected") => OnMultiple::StopOthers,
            _ => OnMultiple::Restart,
        };
        thing.role = Some(Role::Stopped);
        thing.next = thing.target();
        thing.scores = match self.options.symmetric {
            true => self.hosts.iter().map(|host| Some(host.score)).collect(),
            false => vec![None; self.hosts.len()],
        };
    }

    fn requires(&self, value: Option<&String>, fence_device: bool) -> Requires {
        match value.map(|text| text.to_ascii_lowercase()).as_deref() {
            Some("nothing") => Requires::Nothing,
            Some("quorum") => Requires::Quorum,
            Some("fencing") => Requires::Fencing,
            Some("unfencing") if !fence_device && self.options.fencing => Requires::Fencing,
            Some("unfencing") => Requires::Quorum,
            _ if fence_device => Requires::Quorum,
            _ if self.options.fencing => Requires::Fencing,
            _ if self.options.no_quorum == NoQuorum::Ignore => Requires::Nothing,
            _ => Requires::Quorum,
        }
    }
}
