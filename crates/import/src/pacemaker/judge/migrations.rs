//! Live migrations that were recorded: finished, half done, or failed.
//!
//! A migration is `migrate_to` on the source, `migrate_from` on the target, `stop` on the source. Any of
//! them may be missing: it did not happen yet, failed, or was forgotten with a host's history.

use super::super::model::Event;
use super::events_of;
use super::history::{Telling, newer};
use quorate_planner::engine::Role;
use std::cmp::Ordering;

/// The source and the target of a migration, by name.
fn ends(event: &Event) -> Option<(&str, &str)> {
    Some((event.source.as_deref()?, event.target.as_deref()?))
}

impl Telling<'_> {
    fn events(&self, name: &str) -> Vec<&Event> {
        let id = &self.judged.things[self.at].id;
        let host = self.named(name);
        host.map_or_else(Vec::new, |host| events_of(self.cib, self.judged, id, host))
    }

    /// A newer operation than this one on that host, other than a check.
    fn acted_after(&self, name: &str, event: &Event) -> bool {
        let acts = ["start", "stop", "migrate_to", "migrate_from"];
        self.events(name).into_iter().any(|other| {
            !std::ptr::eq(other, event)
                && acts.contains(&other.task.as_str())
                && newer(other, event) == Ordering::Greater
        })
    }

    /// A newer check than this event that found nothing on that host.
    fn gone_after(&self, name: &str, event: &Event) -> bool {
        self.events(name)
            .into_iter()
            .filter(|other| other.task == "monitor")
            .find(|other| other.code == Some(7) && other.status == Some(0))
            .is_some_and(|other| newer(other, event) == Ordering::Greater)
    }

    /// Whether there is newer news of a host than a migration.
    fn overtaken(&self, name: &str, to: Option<&Event>, from: Option<&Event>) -> bool {
        let Some(mut event) = from.or(to) else {
            return false;
        };
        // On one host the order is certain.
        if from.is_some()
            && let Some(to) = to
            && event
                .source
                .as_deref()
                .is_some_and(|source| source.eq_ignore_ascii_case(name))
        {
            event = to;
        }
        self.acted_after(name, event) || self.gone_after(name, event)
    }

    fn unknown_on(&self, name: &str) -> bool {
        self.events(name)
            .into_iter()
            .all(|event| event.code == Some(193))
    }

    fn find_part(&self, host: &str, task: &str, other: &str) -> Option<Event> {
        let end = |event: &Event| match task {
            "migrate_from" => event.source.clone(),
            _ => event.target.clone(),
        };
        self.events(host)
            .into_iter()
            .find(|event| event.task == task && end(event).as_deref() == Some(other))
            .cloned()
    }

    /// A `migrate_to` that succeeded.
    pub(super) fn migrated(&mut self, event: &Event) {
        let Some((source, target)) = ends(event) else {
            return;
        };
        if !self.judged.hosts[self.host]
            .name
            .eq_ignore_ascii_case(source)
        {
            return;
        }
        let acted_on_source = self.acted_after(source, event);
        let arrival = self.find_part(target, "migrate_from", source);
        if arrival.is_some() && acted_on_source {
            return;
        }
        let overtaken = self.overtaken(target, Some(event), arrival.as_ref());
        if acted_on_source && overtaken {
            return;
        }
        let arrived = arrival.as_ref().map(|one| (one.status, one.code));
        let host = self.host;
        if arrived == Some((Some(0), Some(0))) {
            // It runs on the target; the source has to be cleaned up.
            let thing = self.thing();
            thing.role = Some(Role::Stopped);
            thing.strays.push(host);
            return;
        }
        self.thing().role = Some(Role::Started);
        let target_host = self.named(target);
        let up = target_host.is_some_and(|host| self.judged.hosts[host].up);
        let active_there = target_host.filter(|_| up && !overtaken);
        let pending = arrived.is_none_or(|(status, _)| status == Some(-1));
        if !pending {
            match active_there {
                Some(there) => self.runs_on(there),
                None => self.unsure(),
            }
            return;
        }
        if up && self.unknown_on(target) {
            return;
        }
        match active_there {
            Some(there) => {
                self.runs_on(there);
                if self.judged.hosts[host].up {
                    self.thing().half_moved = Some((host, there));
                }
            }
            None if !acted_on_source => self.unsure(),
            None => {}
        }
    }

    /// It may have arrived or not: it must be stopped and started.
    fn unsure(&mut self) {
        let thing = self.thing();
        thing.failed = true;
        thing.restart_cures = true;
        thing.live = false;
    }

    pub(super) fn migrate_to_failed(&mut self, event: &Event) {
        let Some((source, target)) = ends(event) else {
            return;
        };
        if !self.judged.hosts[self.host]
            .name
            .eq_ignore_ascii_case(source)
        {
            return;
        }
        self.thing().role = Some(Role::Started);
        let arrival = self
            .find_part(target, "migrate_from", source)
            .filter(|one| one.code == Some(0) && one.status == Some(0));
        let known = !self.unknown_on(target);
        if known && !self.overtaken(target, Some(event), arrival.as_ref()) {
            let there = self
                .named(target)
                .filter(|host| self.judged.hosts[*host].up);
            if let Some(there) = there {
                self.runs_on(there);
            }
        } else if !self.acted_after(source, event) {
            let host = self.host;
            self.thing().strays.push(host);
        }
    }

    pub(super) fn migrate_from_failed(&mut self, event: &Event) {
        let Some((source, target)) = ends(event) else {
            return;
        };
        if !self.judged.hosts[self.host]
            .name
            .eq_ignore_ascii_case(target)
        {
            return;
        }
        self.thing().role = Some(Role::Started);
        let departure = self
            .find_part(source, "migrate_to", target)
            .filter(|one| one.code == Some(0) && one.status == Some(0));
        let known = !self.unknown_on(source);
        if known && !self.overtaken(source, departure.as_ref(), Some(event)) {
            let there = self
                .named(source)
                .filter(|host| self.judged.hosts[*host].up);
            if let Some(there) = there {
                self.runs_on(there);
            }
        }
    }
}
