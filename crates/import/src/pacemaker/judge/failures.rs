//! Failures that were counted: they expire, and too many of them ban a resource from a host.

use super::super::model::{Cib, Event, Operation};
use super::super::values;
use super::{Judged, Thing, events_of};
use quorate_planner::engine::{Score, add};

impl Judged {
    /// How often a resource failed on a host, and when last (0 if unknown).
    pub(super) fn failures(&self, thing: &Thing, host: usize) -> (Score, i64) {
        let mut count = 0;
        let mut last = 0;
        for (name, value) in &self.hosts[host].attributes {
            if is_about(name, "fail-count-", &thing.id) {
                count = add(count, values::score(value).unwrap_or(0));
            } else if is_about(name, "last-failure-", &thing.id) {
                last = last.max(value.trim().parse().unwrap_or(0));
            }
        }
        (count, last)
    }

    /// The failures that still count.
    pub(super) fn effective_failures(&self, thing: &Thing, host: usize) -> Score {
        let (count, last) = self.failures(thing, host);
        let limit_s = i64::try_from(thing.failure_timeout_ms / 1000).unwrap_or(i64::MAX);
        let expired = limit_s > 0 && last > 0 && self.now > last.saturating_add(limit_s);
        if count > 0 && expired { 0 } else { count }
    }

    /// Failures do not expire where one of them blocks the resource.
    pub(super) fn drop_useless_timeout(
        &mut self,
        cib: &Cib,
        at: usize,
        host: usize,
        event: Option<&Event>,
    ) {
        let thing = &self.things[at];
        if thing.failure_timeout_ms == 0 || self.failures(thing, host).0 <= 0 {
            return;
        }
        let blocking = thing.operations.iter().filter(|operation| {
            let on_fail = operation.attributes.get("on-fail");
            on_fail.is_some_and(|value| value == "block")
        });
        let blocks = blocking.into_iter().any(|operation| match event {
            Some(event) => is_failure_of(thing, operation, event),
            None => events_of(cib, self, &thing.id, host)
                .into_iter()
                .any(|event| is_failure_of(thing, operation, event)),
        });
        if blocks {
            self.things[at].failure_timeout_ms = 0;
        }
    }

    pub(super) fn ban_after_failures(&mut self) {
        for at in 0..self.things.len() {
            for host in 0..self.hosts.len() {
                let thing = &self.things[at];
                if thing.threshold == 0 || thing.ignores_failure || thing.cleared.contains(&host) {
                    continue;
                }
                let failures = self.effective_failures(thing, host);
                if failures > 0 && failures >= thing.threshold {
                    self.things[at].ban(host);
                }
            }
        }
    }
}

fn is_failure_of(thing: &Thing, operation: &Operation, event: &Event) -> bool {
    if operation.name != event.task || operation.interval_ms != event.interval_ms {
        return false;
    }
    let own = format!("{}_{}_{}", thing.id, operation.name, operation.interval_ms);
    event.id == format!("{}_last_failure_0", thing.id)
        || (event.id == own && event.code != event.expected)
}

/// Whether an attribute such as `fail-count-db#monitor_10000` is about a resource.
fn is_about(name: &str, prefix: &str, resource: &str) -> bool {
    let operation = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix(resource))
        .and_then(|rest| rest.strip_prefix('#'));
    operation.is_some_and(|operation| {
        operation.rsplit_once('_').is_some_and(|(task, interval)| {
            !task.is_empty()
                && !interval.is_empty()
                && interval.bytes().all(|byte| byte.is_ascii_digit())
        })
    })
}
