//! Location constraints: which resource may, should or must not run where.

use super::super::model::{Location, Rule};
use super::super::rules::{Facts, holds, resolve, score};
use super::super::values;
use super::{Builder, MAX_JUDGEMENTS};
use quorate_planner::engine::{Body, INFINITY, Prefer, Role, Score, UnitId};
use regex_lite::RegexBuilder;

/// Whose wish it is: the unit, the role and score of a set that replace the constraint's, what a pattern matched.
struct Whose<'a> {
    unit: UnitId,
    role: Option<&'a str>,
    score: Option<Score>,
    matches: Vec<String>,
}

impl Builder<'_> {
    pub(super) fn location(&mut self, location: &Location) {
        if !location.sets.is_empty() {
            for set in &location.sets {
                let Some(members) = self.members(set, &location.id) else {
                    return;
                };
                for unit in members {
                    let whose = Whose {
                        unit,
                        role: set.role.as_deref(),
                        score: set.score,
                        matches: Vec::new(),
                    };
                    self.wish(location, &whose);
                }
            }
            return;
        }
        if let Some(name) = &location.resource
            && let Some(named) = self.named(name, location.place, &location.id)
        {
            for unit in named.units {
                self.wish(location, &own(unit, Vec::new()));
            }
        }
        if let Some(pattern) = &location.pattern {
            self.pattern(location, pattern);
        }
    }

    /// Applies to all resources whose names match (or, with `!`, do not).
    fn pattern(&mut self, location: &Location, pattern: &str) {
        let (invert, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, pattern),
        };
        // The size is bounded: a pattern cannot take memory for ever.
        let regex = match RegexBuilder::new(pattern).size_limit(1 << 20).build() {
            Ok(regex) => regex,
            Err(_) => {
                let message = format!(
                    "constraint \"{}\": bad pattern \"{pattern}\": ignored",
                    location.id
                );
                self.warn(location.place, message);
                return;
            }
        };
        self.judgements += self.site.units.len();
        for unit in 0..self.site.units.len() {
            if self.site.units[unit].parent.is_some() || self.too_many.is_some() {
                continue;
            }
            let name = self.site.units[unit].name.clone();
            match (invert, regex.captures(&name)) {
                (false, Some(found)) => {
                    let parts = found
                        .iter()
                        .map(|part| part.map_or_else(String::new, |part| part.as_str().to_owned()));
                    self.wish(location, &own(unit, parts.collect()));
                }
                (true, None) => self.wish(location, &own(unit, Vec::new())),
                _ => {}
            }
        }
    }

    fn wish(&mut self, location: &Location, whose: &Whose<'_>) {
        self.judgements += match location.rules.len() {
            0 => 1,
            rules => rules * self.judged.hosts.len(),
        };
        if self.judgements > MAX_JUDGEMENTS {
            self.too_many.get_or_insert(location.place);
            return;
        }
        let mut hosts = Vec::new();
        let given = whose.score.or(location.score);
        if let (Some(node), Some(given)) = (&location.node, given) {
            let role = whose.role.or(location.role.as_deref());
            if !self.role_fits(role, whose.unit) {
                return;
            }
            match self.judged.host_named(node) {
                Some(host) => hosts.push((host, given)),
                None => self.unknown(location.place, &location.id, "node", node),
            }
        } else {
            for rule in &location.rules {
                if self.role_fits(rule.role.as_deref(), whose.unit) {
                    hosts.extend(self.hosts_of_rule(rule, whose));
                }
            }
        }
        for (host, score) in &hosts {
            self.site.prefer.push(Prefer {
                unit: whose.unit,
                host: *host,
                score: *score,
            });
        }
        if location.discovery.as_deref() == Some("exclusive") {
            self.only_on(whose.unit, &hosts);
        }
    }

    fn hosts_of_rule(&mut self, rule: &Rule, whose: &Whose<'_>) -> Vec<(usize, Score)> {
        let judged = self.judged;
        let thing = self.things[whose.unit].map(|at| &judged.things[at]);
        let mut hosts = Vec::new();
        for (at, host) in judged.hosts.iter().enumerate() {
            let mut facts = Facts {
                now: judged.now,
                host: Some(&host.attributes),
                meta: thing.map(|thing| &thing.meta),
                matches: &whose.matches,
                ..Facts::default()
            };
            let parameters = thing.map(|thing| resolve(&thing.parameters, &facts, None));
            facts.parameters = parameters.as_ref();
            if holds(rule, &facts)
                && let Some(score) = score(rule, &facts)
            {
                hosts.push((at, score));
            }
        }
        hosts
    }

    /// Whether a wish for a role counts: one for "started" always does, one for "promoted" never.
    fn role_fits(&self, role: Option<&str>, unit: UnitId) -> bool {
        let Some(role) = role else { return true };
        match role.to_ascii_lowercase().as_str() {
            "started" | "unpromoted" | "slave" => true,
            "stopped" => match &self.site.units[unit].body {
                Body::Item(item) => item.wanted == Some(Role::Stopped),
                Body::Group(_) => false,
            },
            _ => false,
        }
    }

    /// Discovery on some hosts only: it may run nowhere else.
    fn only_on(&mut self, unit: UnitId, hosts: &[(usize, Score)]) {
        let units = match &self.site.units[unit].body {
            Body::Item(_) => vec![unit],
            Body::Group(group) => group.members.clone(),
        };
        for unit in units {
            for host in 0..self.judged.hosts.len() {
                if !hosts.iter().any(|(at, _)| *at == host) {
                    self.site.prefer.push(Prefer {
                        unit,
                        host,
                        score: -INFINITY,
                    });
                }
            }
        }
    }

    /// Unwell hosts are wanted less.
    pub(super) fn wish_for_health(&mut self) {
        for (host, now) in self.judged.hosts.iter().enumerate() {
            if now.health == 0 {
                continue;
            }
            for unit in 0..self.site.units.len() {
                if self.site.units[unit].parent.is_some() {
                    continue;
                }
                let thing = self.things[unit].map(|at| &self.judged.things[at]);
                let immune = thing
                    .is_some_and(|thing| values::is_true(thing.meta.get("allow-unhealthy-nodes")));
                if now.health > 0 || !immune {
                    self.site.prefer.push(Prefer {
                        unit,
                        host,
                        score: now.health,
                    });
                }
            }
        }
    }
}

fn own<'a>(unit: UnitId, matches: Vec<String>) -> Whose<'a> {
    Whose {
        unit,
        role: None,
        score: None,
        matches,
    }
}
