//! What a resource is on a host, from the operations that were recorded there.
//!
//! Events are read from the oldest to the newest. Each may set the role, and a failure may leave an
//! obligation ([`OnFail`]) that later successes clear. Codes and states are those of the OCF standard and
//! of Pacemaker's executor.

use super::super::model::{Cib, Event};
use super::super::rules::resolve;
use super::Judged;
use super::things::{OnMultiple, Thing};
use quorate_planner::engine::{INFINITY, Requires, Role};
use std::cmp::Ordering;

/// What a failure obliges to, the weaker first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum OnFail {
    #[default]
    Ignore,
    Restart,
    Ban,
    Block,
    Stop,
    Standby,
    Fence,
}

/// Codes that agents return.
mod code {
    pub(super) const OK: i32 = 0;
    pub(super) const INVALID_PARAMETER: i32 = 2;
    pub(super) const UNIMPLEMENTED: i32 = 3;
    pub(super) const NO_PRIVILEGE: i32 = 4;
    pub(super) const NOT_INSTALLED: i32 = 5;
    pub(super) const NOT_CONFIGURED: i32 = 6;
    pub(super) const NOT_RUNNING: i32 = 7;
    pub(super) const PROMOTED: i32 = 8;
    pub(super) const FAILED_PROMOTED: i32 = 9;
    pub(super) const DEGRADED: i32 = 190;
    pub(super) const DEGRADED_PROMOTED: i32 = 191;
}

/// How an operation ended, as the executor saw it.
mod state {
    pub(super) const PENDING: i32 = -1;
    pub(super) const DONE: i32 = 0;
    pub(super) const CANCELLED: i32 = 1;
    pub(super) const ERROR: i32 = 4;
    pub(super) const ERROR_HARD: i32 = 5;
    pub(super) const ERROR_FATAL: i32 = 6;
    pub(super) const NOT_INSTALLED: i32 = 7;
    pub(super) const NO_DEVICE: i32 = 10;
    pub(super) const NO_SECRETS: i32 = 11;
    pub(super) const LAST: i32 = 11;
    pub(super) const NOT_SUPPORTED: i32 = 3;
}

/// One event, as it is understood.
struct Reading<'a> {
    event: &'a Event,
    state: i32,
    code: i32,
    expected: i32,
    probe: bool,
    masked: bool,
}

/// Reads one resource's history on one host.
pub(super) struct Telling<'a> {
    pub(super) judged: &'a mut Judged,
    pub(super) cib: &'a Cib,
    pub(super) at: usize,
    pub(super) host: usize,
    on_fail: OnFail,
    last_failure: Option<Event>,
}

impl<'a> Telling<'a> {
    pub(super) fn new(judged: &'a mut Judged, cib: &'a Cib, at: usize, host: usize) -> Self {
        Self {
            judged,
            cib,
            at,
            host,
            on_fail: OnFail::Ignore,
            last_failure: None,
        }
    }

    pub(super) fn thing(&mut self) -> &mut Thing {
        &mut self.judged.things[self.at]
    }

    pub(super) fn run(mut self, events: &[Event]) {
        let saved = self.thing().role.take();
        for event in sorted(events) {
            self.event(event);
        }
        self.conclude();
        let target = self.thing().target();
        if let Some(target) = target {
            let thing = self.thing();
            if thing.next.is_none_or(|next| target < next) {
                thing.next = Some(target);
            }
        }
        if saved > self.thing().role {
            self.thing().role = saved;
        }
    }

    fn event(&mut self, event: &Event) {
        let relevant = [
            "monitor",
            "start",
            "stop",
            "promote",
            "demote",
            "migrate_to",
            "migrate_from",
            "asyncmon",
        ];
        let (Some(status), Some(code)) = (event.status, event.code) else {
            return;
        };
        let valid = (state::PENDING..=state::LAST).contains(&status) && status != state::CANCELLED;
        if !relevant.contains(&event.task.as_str()) || !valid || code < 0 {
            return;
        }
        let probe = event.task == "monitor" && event.interval_ms == 0;
        let mut reading = Reading {
            event,
            state: status,
            code,
            expected: event.expected.unwrap_or(-1),
            probe,
            masked: probe
                && (code == code::NOT_INSTALLED
                    || code == code::INVALID_PARAMETER
                    || status == state::NOT_INSTALLED),
        };
        let expired = self.expired(&reading);
        self.remap(&mut reading, expired);
        if expired && self.is_forgotten(&reading, code) {
            return;
        }
        if reading.masked {
            self.apply(&reading, reading.expected);
            let host = self.host;
            self.thing().ban(host);
            return;
        }
        match reading.state {
            state::PENDING => self.pending(event),
            state::DONE => self.apply(&reading, reading.code),
            _ => self.failure(&reading),
        }
    }

    /// Whether a failure is old enough to be forgotten.
    fn expired(&mut self, reading: &Reading<'_>) -> bool {
        let (at, host) = (self.at, self.host);
        if reading.state == state::NOT_INSTALLED {
            return false;
        }
        let limit_s = i64::try_from(self.thing().failure_timeout_ms / 1000).unwrap_or(i64::MAX);
        let Some(changed) = reading.event.changed.filter(|_| limit_s > 0) else {
            return false;
        };
        let old = self.judged.now >= changed.saturating_add(limit_s);
        self.judged
            .drop_useless_timeout(self.cib, at, host, Some(reading.event));
        let thing = &self.judged.things[at];
        let all = self.judged.failures(thing, host).0;
        let unexpired = self.judged.effective_failures(thing, host);
        if old && all > 0 {
            if unexpired > 0 {
                return false;
            }
            self.thing().cleared.push(host);
        }
        old
    }

    fn is_forgotten(&mut self, reading: &Reading<'_>, original: i32) -> bool {
        if reading.masked && original != reading.expected {
            let thing = self.thing();
            if thing.role <= Some(Role::Stopped) {
                thing.role = None;
            }
            return true;
        }
        if reading.code == reading.expected {
            return false;
        }
        let host = &self.judged.hosts[self.host];
        reading.event.interval_ms == 0 || (host.up && !host.lost)
    }

    /// Brings a result to what it means: whether it is a failure, and how hard a one.
    fn remap(&mut self, reading: &mut Reading<'_>, expired: bool) {
        reading.code = match reading.code {
            code::DEGRADED => code::OK,
            code::DEGRADED_PROMOTED => code::PROMOTED,
            code => code,
        };
        if reading.masked && (reading.state != state::DONE || reading.code != code::NOT_RUNNING) {
            reading.state = state::DONE;
            reading.code = code::NOT_RUNNING;
        }
        match reading.state {
            state::DONE | state::ERROR => {}
            state::NO_DEVICE | state::NO_SECRETS => {
                reading.state = state::ERROR_HARD;
                return;
            }
            _ => return,
        }
        reading.state = match reading.expected >= 0 && reading.code == reading.expected {
            true => state::DONE,
            false => state::ERROR,
        };
        match reading.code {
            code::OK if reading.probe && reading.expected == code::NOT_RUNNING => {
                reading.state = state::DONE;
            }
            code::NOT_RUNNING => {
                let managed = self.thing().managed;
                if reading.probe || reading.expected == reading.code || !managed {
                    reading.state = state::DONE;
                    self.on_fail = OnFail::Ignore;
                    let thing = self.thing();
                    thing.role = Some(Role::Stopped);
                    thing.next = None;
                }
            }
            code::PROMOTED => {
                if reading.probe && reading.code != reading.expected {
                    reading.state = state::DONE;
                }
                if !expired || reading.code == reading.expected {
                    self.thing().role = Some(Role::Started);
                }
            }
            code::FAILED_PROMOTED => {
                if !expired {
                    self.thing().role = Some(Role::Started);
                }
                reading.state = state::ERROR;
            }
            code::NOT_CONFIGURED => reading.state = state::ERROR_FATAL,
            code::UNIMPLEMENTED if reading.event.interval_ms > 0 => {
                reading.state = state::NOT_SUPPORTED;
            }
            code::UNIMPLEMENTED
            | code::NOT_INSTALLED
            | code::INVALID_PARAMETER
            | code::NO_PRIVILEGE => {
                if !expired {
                    self.block_if_hopeless(&reading.event.task);
                }
                reading.state = state::ERROR_HARD;
            }
            _ => {
                if reading.state == state::DONE && reading.code != reading.expected {
                    reading.state = state::ERROR;
                }
            }
        }
    }

    /// A stop that failed hard cannot be cured but by fencing.
    fn block_if_hopeless(&mut self, task: &str) {
        if task == "stop" && !self.judged.can_fence(self.host) {
            let thing = self.thing();
            thing.managed = false;
            thing.blocked = true;
        }
    }

    /// A result that is no failure (or counts as none).
    fn apply(&mut self, reading: &Reading<'_>, code: i32) {
        let started = Some(Role::Started);
        let mut clears = false;
        if code == code::NOT_INSTALLED || reading.masked {
            self.thing().role = Some(Role::Stopped);
        } else if code == code::NOT_RUNNING {
            clears = true;
        } else {
            match reading.event.task.as_str() {
                "monitor" => {
                    let last = self.last_failure.as_ref();
                    clears = last.is_some_and(|last| last.key == reading.event.key);
                    if self.thing().role < started {
                        self.thing().role = started;
                    }
                }
                "start" | "migrate_from" | "promote" => {
                    self.thing().role = started;
                    clears = true;
                }
                "stop" => {
                    self.thing().role = Some(Role::Stopped);
                    clears = true;
                }
                "demote" => self.thing().role = started,
                "migrate_to" => self.migrated(reading.event),
                _ => {
                    if self.thing().role < started {
                        self.thing().role = started;
                    }
                }
            }
        }
        if clears && self.on_fail <= OnFail::Block && self.on_fail != OnFail::Ban {
            self.on_fail = OnFail::Ignore;
            self.thing().next = None;
        }
    }

    /// An operation that has no result yet.
    fn pending(&mut self, event: &Event) {
        if self.failed_since(event) {
            return;
        }
        match event.task.as_str() {
            "start" => {
                let thing = self.thing();
                thing.starting = true;
                thing.role = Some(Role::Started);
            }
            "migrate_to" if self.judged.hosts[self.host].lost => {
                if let Some(target) = event.target.as_ref().and_then(|name| self.named(name)) {
                    self.must_stop(target);
                }
            }
            _ => {}
        }
    }

    fn failed_since(&self, event: &Event) -> bool {
        self.last_failure.as_ref().is_some_and(|failure| {
            let (failed, now) = (failure.changed, event.changed);
            failure.task == event.task
                && failure.interval_ms == event.interval_ms
                && matches!((failed, now), (Some(failed), Some(now)) if failed >= now)
        })
    }

    fn must_stop(&mut self, host: usize) {
        let thing = self.thing();
        if !thing.must_stop.contains(&host) {
            thing.must_stop.push(host);
        }
    }

    fn failure(&mut self, reading: &Reading<'_>) {
        let obliges = self.configured(reading.event);
        if reading.state == state::NOT_INSTALLED {
            if obliges == OnFail::Ignore {
                self.on_fail = OnFail::Ban;
            }
            let host = self.host;
            self.thing().ban(host);
            self.failed(reading, obliges);
            return;
        }
        if obliges == OnFail::Ignore {
            self.apply(reading, reading.expected);
            self.thing().ignores_failure = true;
            return;
        }
        self.failed(reading, obliges);
        let host = self.host;
        match reading.state {
            state::ERROR_HARD => self.thing().ban(host),
            state::ERROR_FATAL => {
                for host in 0..self.judged.hosts.len() {
                    self.thing().ban(host);
                }
            }
            _ => {}
        }
    }

    fn failed(&mut self, reading: &Reading<'_>, obliges: OnFail) {
        self.last_failure = Some(reading.event.clone());
        self.on_fail = self.on_fail.max(obliges);
        let host = self.host;
        match reading.event.task.as_str() {
            "stop" => self.thing().ban(host),
            "migrate_to" => self.migrate_to_failed(reading.event),
            "migrate_from" => self.migrate_from_failed(reading.event),
            "demote" if reading.code == code::NOT_RUNNING => {
                self.thing().role = Some(Role::Stopped);
            }
            _ => {}
        }
        if reading.probe && reading.code == code::NOT_INSTALLED {
            self.thing().role = Some(Role::Stopped);
        } else if self.thing().role < Some(Role::Started) {
            self.thing().role = Some(Role::Started);
        }
        if obliges == OnFail::Stop {
            let thing = self.thing();
            if thing.next.is_none() {
                thing.next = Some(Role::Stopped);
            }
            thing.ban_everywhere();
        }
    }

    /// What is configured for the failure of an operation.
    fn configured(&mut self, event: &Event) -> OnFail {
        let fencing = self.judged.options.fencing;
        let now = self.judged.now;
        let thing = &self.judged.things[self.at];
        let find = |name: &str, interval: u64| {
            thing
                .operations
                .iter()
                .find(|operation| operation.name == name && operation.interval_ms == interval)
        };
        let operation = find(&event.task, event.interval_ms).or_else(|| {
            let moves = matches!(event.task.as_str(), "migrate_to" | "migrate_from");
            moves.then(|| find("migrate", 0)).flatten()
        });
        let mut facts = thing.facts(now);
        facts.operation = Some((&event.task, event.interval_ms));
        let value = operation
            .and_then(|operation| {
                let written = operation.attributes.get("on-fail").cloned();
                written.or_else(|| resolve(&operation.meta, &facts, None).remove("on-fail"))
            })
            .or_else(|| resolve(&self.cib.operation_defaults, &facts, None).remove("on-fail"));
        let stop = event.task == "stop";
        let default = match (stop, fencing) {
            (true, true) => OnFail::Fence,
            (true, false) => OnFail::Block,
            (false, _) => OnFail::Restart,
        };
        match value.map(|value| value.to_ascii_lowercase()).as_deref() {
            Some("standby" | "stop" | "demote") if stop => default,
            Some("block") => OnFail::Block,
            Some("fence") if fencing => OnFail::Fence,
            Some("fence" | "stop") => OnFail::Stop,
            Some("standby") => OnFail::Standby,
            Some("ignore" | "nothing") => OnFail::Ignore,
            Some("migrate") => OnFail::Ban,
            Some("restart") => OnFail::Restart,
            _ => default,
        }
    }

    /// What follows from all events of this host.
    fn conclude(&mut self) {
        let host = self.host;
        let known_active = self.thing().role > Some(Role::Stopped);
        if self.thing().role.is_some() {
            self.thing().known_on.push(host);
        }
        let one = &self.judged.hosts[host];
        let gone = !one.up && !one.maintenance;
        if known_active && gone && self.thing().managed && self.judged.options.fencing {
            self.judged.hosts[host].lost = true;
        }
        // Whatever a resource did on a host that is fenced is over then.
        let lost = self.judged.hosts[host].lost;
        let obliges = if lost { OnFail::Ignore } else { self.on_fail };
        match obliges {
            OnFail::Ignore => {}
            OnFail::Fence => self.judged.hosts[host].lost = true,
            OnFail::Standby => self.judged.hosts[host].standby = true,
            OnFail::Block => {
                let thing = self.thing();
                thing.managed = false;
                thing.blocked = true;
            }
            OnFail::Ban => self.thing().ban(host),
            OnFail::Stop => self.thing().next = Some(Role::Stopped),
            OnFail::Restart => {
                if known_active {
                    let thing = self.thing();
                    thing.failed = true;
                    thing.restart_cures = true;
                    self.must_stop(host);
                }
            }
        }
        if known_active {
            self.runs_on(host);
            let thing = self.thing();
            match obliges {
                OnFail::Ignore => {}
                OnFail::Block => thing.failed = true,
                _ => {
                    thing.failed = true;
                    thing.restart_cures = true;
                }
            }
        } else {
            self.thing().must_stop.retain(|other| *other != host);
        }
        let thing = self.thing();
        if thing.role == Some(Role::Stopped)
            && !thing.active.is_empty()
            && thing.half_moved.is_some_and(|(from, _)| from == host)
        {
            thing.role = Some(Role::Started);
        }
    }

    /// Notes that a resource runs on a host.
    pub(super) fn runs_on(&mut self, host: usize) {
        let maintenance = self.judged.hosts[host].maintenance;
        let thing = self.thing();
        if thing.active.contains(&host) {
            return;
        }
        thing.active.push(host);
        if maintenance {
            thing.managed = false;
            thing.maintenance = true;
        }
        if !thing.managed {
            thing.raise(host, INFINITY);
            return;
        }
        self.check_multiple();
    }

    fn check_multiple(&mut self) {
        let hosts = &self.judged.hosts;
        let thing = &self.judged.things[self.at];
        let copies = thing.active.iter().filter(|host| {
            thing.requires == Requires::Fencing || (hosts[**host].up && !hosts[**host].lost)
        });
        if copies.count() < 2 {
            return;
        }
        match thing.on_multiple {
            OnMultiple::StopOnly => self.thing().ban_everywhere(),
            OnMultiple::Block => {
                let group = thing.group.map(|group| self.judged.groups[group].clone());
                let mut blocked = vec![self.at];
                if let Some(group) = group.filter(|group| group.blocks_when_multiple) {
                    blocked.extend(group.members);
                }
                for at in blocked {
                    self.judged.things[at].managed = false;
                    self.judged.things[at].blocked = true;
                }
            }
            OnMultiple::Restart | OnMultiple::StopOthers => {}
        }
    }

    pub(super) fn named(&self, name: &str) -> Option<usize> {
        self.judged.host_named(name)
    }
}

/// Events from the oldest to the newest. Their order is not always clear, so this sorts by pairs and
/// takes equal ones as they come (newest first in the text).
fn sorted(events: &[Event]) -> Vec<&Event> {
    merge_sort(events.iter().rev().collect())
}

fn merge_sort(events: Vec<&Event>) -> Vec<&Event> {
    if events.len() < 2 {
        return events;
    }
    let mut left = events;
    let right = left.split_off(left.len().div_ceil(2));
    let (left, right) = (merge_sort(left), merge_sort(right));
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some(one), Some(other)) = (left.peek(), right.peek()) {
        let next = match newer(one, other) {
            Ordering::Greater => right.next(),
            _ => left.next(),
        };
        merged.extend(next);
    }
    merged.extend(left);
    merged.extend(right);
    merged
}

/// Which of two events is newer.
pub(super) fn newer(one: &Event, other: &Event) -> Ordering {
    let same_host = one.on_node == other.on_node;
    if (same_host && one.id == other.id) || (one.call == -1 && other.call == -1) {
        return Ordering::Equal;
    }
    if one.call >= 0 && other.call >= 0 {
        if same_host && one.call != other.call {
            return one.call.cmp(&other.call);
        }
        let changed = |event: &Event| event.changed.unwrap_or(-1);
        let (a, b) = (changed(one), changed(other));
        return match a.cmp(&b) {
            Ordering::Less if a >= 0 => Ordering::Less,
            Ordering::Greater if b >= 0 => Ordering::Greater,
            _ => Ordering::Equal,
        };
    }
    if same_host && one.call >= 0 && one.call < other.call {
        return Ordering::Less;
    }
    if same_host && other.call >= 0 && one.call > other.call {
        return Ordering::Greater;
    }
    let (Some((scheduler, a)), Some((other_scheduler, b))) = (&one.transition, &other.transition)
    else {
        return Ordering::Equal;
    };
    if scheduler != other_scheduler || a == b {
        return match other.call == -1 {
            true => Ordering::Less,
            false => Ordering::Greater,
        };
    }
    if (*a >= 0 && a < b) || *b == -1 {
        Ordering::Less
    } else {
        Ordering::Greater
    }
}
