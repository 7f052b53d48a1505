//! The host's side of the lease.
//!
//! ```text
//!   None --ack--> Held --deadline - freeze_before--> Freezing --deadline--> Lost
//!    ^              ^____________ack_______________________|______ack________|
//! ```
//! Always holds: the deadline only comes from an acknowledged heartbeat, counted from when that
//! heartbeat was *sent*; a late or reordered ack never shortens or invents a lease.

use crate::Instant;
use quorate_types::{LeaseTimings, Millis, Revision};

/// Where a host stands with its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeasePhase {
    /// No lease since the start of this agent.
    None,
    /// Guests may run.
    Held,
    /// About to run out: guests are being frozen.
    Freezing,
    /// Ran out: no guest runs here.
    Lost,
}

/// A host's own lease.
#[derive(Debug, Clone)]
pub struct HostLease {
    timings: LeaseTimings,
    deadline: Option<Instant>,
    /// Newest leader revision that came with an ack: nothing starts or thaws before the local
    /// replica has reached it.
    fresh_from: Revision,
}

impl HostLease {
    /// A host without a lease.
    pub fn new(timings: LeaseTimings) -> Self {
        Self {
            timings,
            deadline: None,
            fresh_from: Revision(0),
        }
    }

    /// Takes over changed settings; the deadline stands.
    pub fn set_timings(&mut self, timings: LeaseTimings) {
        self.timings = timings;
    }

    /// An acknowledgement arrived for the heartbeat that was sent at `sent`. Returns whether the
    /// deadline moved.
    pub fn acknowledged(&mut self, sent: Instant, granted: Millis, revision: Revision) -> bool {
        self.fresh_from = self.fresh_from.max(revision);
        if granted.0 == 0 {
            return false;
        }
        let deadline = sent.plus(granted);
        let moved = self.deadline.is_none_or(|old| deadline > old);
        if moved {
            self.deadline = Some(deadline);
        }
        moved
    }

    /// When the lease ends, if there ever was one.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// When freezing begins.
    pub fn freeze_at(&self) -> Option<Instant> {
        self.deadline
            .map(|end| end.minus(self.timings.freeze_before))
    }

    /// Where the host stands at `now`.
    pub fn phase(&self, now: Instant) -> LeasePhase {
        match (self.deadline, self.freeze_at()) {
            (Some(end), _) if now >= end => LeasePhase::Lost,
            (Some(_), Some(freeze)) if now >= freeze => LeasePhase::Freezing,
            (Some(_), _) => LeasePhase::Held,
            (None, _) => LeasePhase::None,
        }
    }

    /// Guests may be started or thawed: the lease is held and the local replica has seen
    /// everything the leader had applied when it granted it.
    pub fn may_run(&self, now: Instant, applied: Revision) -> bool {
        self.phase(now) == LeasePhase::Held && applied >= self.fresh_from
    }

    /// The revision that the local replica must have reached.
    pub fn fresh_from(&self) -> Revision {
        self.fresh_from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn counts_from_the_send_time_and_never_back() {
        let mut lease = HostLease::new(LeaseTimings::default());
        assert_eq!(lease.phase(Instant(0)), LeasePhase::None);
        assert!(lease.acknowledged(Instant(100 * MS), Millis(2000), Revision(5)));
        assert_eq!(lease.deadline(), Some(Instant(2100 * MS)));
        assert!(
            !lease.acknowledged(Instant(50 * MS), Millis(2000), Revision(4)),
            "older ack"
        );
        assert_eq!(lease.deadline(), Some(Instant(2100 * MS)));
        assert!(
            !lease.may_run(Instant(200 * MS), Revision(4)),
            "replica is behind"
        );
        assert!(lease.may_run(Instant(200 * MS), Revision(5)));
        assert_eq!(lease.phase(Instant(1850 * MS)), LeasePhase::Freezing);
        assert!(!lease.may_run(Instant(1850 * MS), Revision(5)));
        assert_eq!(lease.phase(Instant(2100 * MS)), LeasePhase::Lost);
    }

    #[test]
    fn an_ack_without_a_grant_moves_no_deadline_but_the_revision() {
        let mut lease = HostLease::new(LeaseTimings::default());
        assert!(!lease.acknowledged(Instant(MS), Millis(0), Revision(9)));
        assert_eq!(lease.phase(Instant(2 * MS)), LeasePhase::None);
        assert_eq!(lease.fresh_from(), Revision(9));
    }
}
