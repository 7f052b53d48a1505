//! Colocation constraints: what runs together or apart.

use super::super::model::{Colocation, ResourceSet};
use super::Builder;
use quorate_planner::engine::{Role, Score, Together, UnitId};

/// How a role in a constraint bears on resources that have no roles but started and stopped.
enum InRole {
    Always,
    When(Role),
    Never,
}

fn in_role(role: Option<&str>) -> InRole {
    match role.map(str::to_ascii_lowercase).as_deref() {
        None | Some("started") => InRole::Always,
        Some("stopped") => InRole::When(Role::Stopped),
        Some(_) => InRole::Never,
    }
}

/// A rule to be laid between pairs of resources.
struct Pairing<'a> {
    colocation: &'a Colocation,
    score: Score,
    by: Option<usize>,
    roles: (Option<&'a str>, Option<&'a str>),
}

impl Builder<'_> {
    pub(super) fn colocation(&mut self, colocation: &Colocation) {
        if colocation.sets.is_empty() {
            return self.simple_colocation(colocation);
        }
        let mut last: Option<(&ResourceSet, Vec<UnitId>)> = None;
        for set in &colocation.sets {
            let Some(members) = self.members(set, &colocation.id) else {
                return;
            };
            self.within_set(colocation, set, &members);
            if let Some((before, others)) = &last {
                self.between_sets(colocation, (before, others), (set, &members));
            }
            last = Some((set, members));
        }
    }

    fn simple_colocation(&mut self, colocation: &Colocation) {
        let (Some(one), Some(other)) = (&colocation.resource, &colocation.with) else {
            return;
        };
        let Some(dependents) = self.named(one, colocation.place, &colocation.id) else {
            return;
        };
        let Some(primaries) = self.named(other, colocation.place, &colocation.id) else {
            return;
        };
        if !dependents.single && !primaries.single {
            let message = format!(
                "constraint \"{}\": two templates or tags cannot be colocated: ignored",
                colocation.id
            );
            return self.warn(colocation.place, message);
        }
        let by = colocation
            .attribute
            .as_ref()
            .filter(|name| *name != "#uname");
        let by = by.cloned().map(|name| self.label(name));
        let pairing = Pairing {
            colocation,
            score: colocation.score,
            by: by.filter(|_| dependents.single && primaries.single),
            roles: (
                colocation.resource_role.as_deref(),
                colocation.with_role.as_deref(),
            ),
        };
        if !self.room_for(
            dependents.units.len() * primaries.units.len(),
            colocation.place,
        ) {
            return;
        }
        for dependent in &dependents.units {
            for primary in &primaries.units {
                self.pair(&pairing, *dependent, *primary);
            }
        }
    }

    fn label(&mut self, name: String) -> usize {
        match self.labels.iter().position(|known| *known == name) {
            Some(at) => at,
            None => {
                self.labels.push(name);
                self.labels.len() - 1
            }
        }
    }

    fn pair(&mut self, pairing: &Pairing<'_>, dependent: UnitId, primary: UnitId) {
        let roles = (in_role(pairing.roles.0), in_role(pairing.roles.1));
        let role = |role: InRole| match role {
            InRole::Always => Ok(None),
            InRole::When(role) => Ok(Some(role)),
            InRole::Never => Err(()),
        };
        let (Ok(dependent_role), Ok(primary_role)) = (role(roles.0), role(roles.1)) else {
            return;
        };
        if pairing.score == 0 || dependent == primary {
            return;
        }
        let critical = self.things[dependent].is_none_or(|at| self.judged.things[at].critical);
        self.site.together.push(Together {
            dependent,
            primary,
            score: pairing.score,
            by: pairing.by,
            influence: pairing.colocation.influence.unwrap_or(critical),
            explicit: true,
            dependent_role,
            primary_role,
        });
    }

    fn within_set(&mut self, colocation: &Colocation, set: &ResourceSet, members: &[UnitId]) {
        let score = set.score.unwrap_or(colocation.score);
        if score == 0 || set.sequential == Some(false) {
            return;
        }
        let pairing = Pairing {
            colocation,
            score,
            by: None,
            roles: (set.role.as_deref(), set.role.as_deref()),
        };
        if score < 0 {
            if !self.room_for(members.len() * members.len() / 2, colocation.place) {
                return;
            }
            for (at, member) in members.iter().enumerate() {
                for earlier in &members[..at] {
                    self.pair(&pairing, *member, *earlier);
                }
            }
            return;
        }
        // An old attribute turns the direction round.
        let as_group = set.ordering.as_deref().is_none_or(|word| word == "group");
        for pair in members.windows(2) {
            match as_group {
                true => self.pair(&pairing, pair[1], pair[0]),
                false => self.pair(&pairing, pair[0], pair[1]),
            }
        }
    }

    fn between_sets(
        &mut self,
        colocation: &Colocation,
        (one, dependents): (&ResourceSet, &[UnitId]),
        (other, primaries): (&ResourceSet, &[UnitId]),
    ) {
        let pairing = Pairing {
            colocation,
            score: colocation.score,
            by: None,
            roles: (one.role.as_deref(), other.role.as_deref()),
        };
        let dependents = match one.sequential {
            Some(false) => dependents,
            _ => &dependents[..dependents.len().min(1)],
        };
        let primaries = match other.sequential {
            Some(false) => primaries,
            _ => &primaries[primaries.len().saturating_sub(1)..],
        };
        if !self.room_for(dependents.len() * primaries.len(), colocation.place) {
            return;
        }
        for dependent in dependents {
            for primary in primaries {
                self.pair(&pairing, *dependent, *primary);
            }
        }
    }
}
