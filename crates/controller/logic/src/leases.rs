//! The leader's volatile picture of one term: lease table, newest reports, seals.
//!
//! In the daemon the heartbeat handler and the controller's loop share it under a lock that is held for microseconds,
//! never across an await.

use crate::wire::{HeartbeatReply, HeartbeatRequest};
use quorate_membership::{Heartbeat, Instant, LeaseTable};
use quorate_planner::Memory;
use quorate_state::State;
use quorate_types::{HostName, HostReport, Millis};
use std::collections::BTreeMap;

/// What one leader knows in one term.
pub struct Leases {
    /// The term.
    pub term: u64,
    /// When this host was elected.
    pub elected: Instant,
    /// Leases as the leader counts them.
    pub table: LeaseTable,
    /// Newest report of each host.
    pub reports: BTreeMap<HostName, HostReport>,
    /// What the planner remembers between two rounds.
    pub memory: Memory,
    /// Since when a host is sealed; sealed for good only as long as a commit is under way.
    pub sealed_at: BTreeMap<HostName, Instant>,
    /// A commit's outcome is not known: seals stay until a later one has been applied.
    pub uncertain: bool,
}

impl Leases {
    /// An empty picture: no host has a lease from this leader, and each may have got one from an earlier leader, `silent`
    /// ago at the latest: for so long none has had a majority. `silent` was measured by several clocks.
    #[must_use]
    pub fn new(term: u64, state: &State, silent: Millis, now: Instant) -> Self {
        let settings = state.settings();
        // Who is alive gets half a lease to say so to a new leader, however long there was none. One clock may be fast
        // and another one slow.
        let silent = silent.min(Millis(settings.lease.duration.0 / 2));
        let unsure = Millis(2 * settings.lease.drift(silent).0 + 1);
        let granted = now.minus(Millis(silent.0.saturating_sub(unsure.0)));
        let mut table = LeaseTable::new(&settings, granted);
        table.configure(&settings, state.hosts.keys(), granted);
        Self {
            term,
            elected: now,
            table,
            reports: BTreeMap::new(),
            memory: Memory::default(),
            sealed_at: BTreeMap::new(),
            uncertain: false,
        }
    }

    /// A heartbeat was received. Returns the answer and whether the picture changed.
    pub fn heartbeat(
        &mut self,
        request: HeartbeatRequest,
        state: &State,
        quorum_ack: Option<Instant>,
        now: Instant,
    ) -> (HeartbeatReply, bool) {
        if let Some(ack) = quorum_ack {
            self.table.quorum_confirmed(ack);
        }
        let have = self.reports.get(&request.host);
        let known = |report: &HostReport| {
            report.boot == request.boot && report.sequence >= request.sequence
        };
        let mut changed = false;
        let mut want_report = !have.is_some_and(known);
        if let Some(report) = request.report {
            // A report that was overtaken on its way is older than what is known.
            let newer =
                have.is_none_or(|old| old.boot != report.boot || report.sequence > old.sequence);
            if newer && report.host == request.host {
                self.reports.insert(request.host.clone(), *report);
                changed = true;
            }
            want_report = false;
        }
        let refuse = |why: String| HeartbeatReply {
            granted_ms: 0,
            revision: state.revision,
            want_report,
            why: Some(why),
        };
        let Some(record) = state.hosts.get(&request.host) else {
            return (
                refuse(format!(
                    "{} is not a host of this cluster any more",
                    request.host
                )),
                changed,
            );
        };
        let armed = request
            .guard_armed
            .then_some(request.watchdog_ms)
            .flatten()
            .map(Millis);
        // A later leader must not take the host for armed when it is not, or is armed more slowly.
        let weaker = record
            .armed
            .is_some_and(|recorded| armed.is_none_or(|now| now > recorded));
        if weaker {
            return (
                refuse("its guard or watchdog changed; that is being recorded".into()),
                true,
            );
        }
        if armed != record.armed {
            changed = true;
        }
        let was_silent = self
            .table
            .heard(&request.host)
            .is_none_or(|at| now.since(at).0 > 1000);
        let beat = Heartbeat {
            host: request.host,
            boot: request.boot,
            guard_armed: request.guard_armed,
            watchdog: request.watchdog_ms.map(Millis),
        };
        let reply = match self.table.heartbeat(&beat, state.revision, now) {
            Ok(grant) => HeartbeatReply {
                granted_ms: grant.granted.0,
                revision: grant.revision,
                want_report,
                why: None,
            },
            Err(none) => refuse(none.to_string()),
        };
        (reply, changed || was_silent)
    }

    /// Hosts whose armed state differs from what is recorded, from their newest reports.
    #[must_use]
    pub fn armed_changes(&self, state: &State) -> Vec<(HostName, Option<Millis>)> {
        let differs = |(name, report): (&HostName, &HostReport)| {
            let armed = report
                .guard_armed
                .then_some(report.watchdog_ms)
                .flatten()
                .map(Millis);
            let record = state.hosts.get(name)?;
            (record.armed != armed).then(|| (name.clone(), armed))
        };
        self.reports.iter().filter_map(differs).collect()
    }

    /// Lets sealed hosts have leases again once nothing can hang on their proofs any more. Returns them:
    /// whatever was proven about them is of no use from now on.
    #[must_use]
    pub fn unseal_settled(
        &mut self,
        state: &State,
        now: Instant,
        fencing: impl Fn(&HostName) -> bool,
    ) -> Vec<HostName> {
        if self.uncertain {
            return Vec::new();
        }
        let settled: Vec<_> = self
            .sealed_at
            .iter()
            .filter(|(host, since)| {
                let owns = owns_something(state, host);
                // A proof that no plan can use (a migration whose other side must speak first) is
                // dropped, so that a host which came back is not kept out for ever.
                let heard = self
                    .table
                    .heard(host)
                    .is_some_and(|at| now.since(at).0 < 1000);
                !fencing(host) && (!owns || (heard && now.since(**since).0 > 5000))
            })
            .map(|(host, _)| host.clone())
            .collect();
        for host in &settled {
            self.sealed_at.remove(host);
            self.table.unseal(host);
        }
        settled
    }

    /// Every live host has had the time to be heard: it was, or every lease that it may have had has ended meanwhile.
    #[must_use]
    pub fn settled(&self, state: &State, now: Instant) -> bool {
        state.hosts.keys().all(|host| {
            let lapsed = self.table.lapse(host).is_some_and(|at| now >= at);
            self.reports.contains_key(host) || lapsed
        })
    }
}

/// Whether a host owns, or may have, any VM.
#[must_use]
pub fn owns_something(state: &State, host: &HostName) -> bool {
    state
        .vms
        .values()
        .any(|vm| vm.ownership.hosts().iter().any(|(owner, _)| *owner == host))
}
