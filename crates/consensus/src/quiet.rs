//! Since when can no earlier leader have had a majority?
//!
//! A leader counts leases from the newest request that a majority acknowledged ([`crate::quorum`]). Whoever is elected
//! after it was voted for by at least one node of that majority. So the newest acknowledgement that any of *its* voters
//! gave to another leader bounds what all earlier leaders may have granted: a voter answers a candidate after
//! `election_min` of silence, so a new leader knows, when it begins, that this part of every lease has passed.
//!
//! Owns: what this node acknowledged or counted as a leader itself, and what its voters say of themselves. What always
//! holds:
//! - a request is noted *before* raft sees it, so what raft acknowledged is never missing here;
//! - a node that answers a candidate while it leads calls no majority its own from before the answer on
//!   ([`Quiet::cede`]), so nothing is granted after what it tells the candidate;
//! - what is not known counts as just now: a node that was started may have acknowledged anything before.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::BootTime;

/// What bounds the grants of earlier leaders.
#[derive(Debug)]
pub(crate) struct Quiet(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    /// The start of this node, or its newest request from a leader.
    heard: BootTime,
    /// Newest majority that this node called its own, as the leader of that term, and of all terms before.
    led_term: u64,
    led: BootTime,
    led_before: BootTime,
    /// Answers to candidates that are being made.
    ceding: usize,
    /// The highest term that it gave a vote for.
    ceded: u64,
    /// Of those who voted for this node in this term, the newest word of another leader.
    elected: Option<(u64, BootTime)>,
}

impl Quiet {
    pub(crate) fn new(started: BootTime) -> Self {
        Self(Mutex::new(Inner {
            heard: started,
            led_term: 0,
            led: BootTime::LONG_AGO,
            led_before: BootTime::LONG_AGO,
            ceding: 0,
            ceded: 0,
            elected: None,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request of a leader is about to be acknowledged.
    pub(crate) fn heard(&self, at: BootTime) {
        let mut inner = self.lock();
        inner.heard = inner.heard.max(at);
    }

    /// This node is about to count on a majority, as the leader of `term`. Returns whether it may.
    pub(crate) fn leads(&self, term: u64, majority: BootTime) -> bool {
        let mut inner = self.lock();
        if inner.ceding > 0 || term < inner.ceded || term < inner.led_term {
            return false;
        }
        if term > inner.led_term {
            inner.led_before = inner.led_before.max(inner.led);
            inner.led_term = term;
            inner.led = majority;
        }
        inner.led = inner.led.max(majority);
        true
    }

    /// A candidate is about to be answered; the guard's end ends that.
    pub(crate) fn cede(&self) -> Ceding<'_> {
        self.lock().ceding += 1;
        Ceding(self)
    }

    /// Somebody voted for this node in `term`, whose newest word of another leader was no later than `heard`.
    pub(crate) fn elected_by(&self, term: u64, heard: BootTime) {
        let mut inner = self.lock();
        inner.elected = match inner.elected {
            Some((known, _)) if known > term => return,
            Some((known, at)) if known == term => Some((term, at.max(heard))),
            _ => Some((term, heard)),
        };
    }

    /// On the leader of `term`: no earlier leader had a majority that answered anything sent after this.
    /// `alone`: nobody else had to vote. `None`: not known.
    pub(crate) fn since(&self, term: u64, alone: bool) -> Option<BootTime> {
        let inner = self.lock();
        let led = if inner.led_term == term {
            inner.led_before
        } else {
            inner.led_before.max(inner.led)
        };
        let mine = inner.heard.max(led);
        match inner.elected {
            Some((known, others)) if known == term => Some(mine.max(others)),
            _ => alone.then_some(mine),
        }
    }
}

/// A candidate is being answered.
pub(crate) struct Ceding<'a>(&'a Quiet);

impl Ceding<'_> {
    /// The vote was given for `term`. Returns how long this node had heard no leader and led nobody.
    pub(crate) fn granted(self, term: u64) -> Duration {
        let mut inner = self.0.lock();
        inner.ceded = inner.ceded.max(term);
        let newest = inner.heard.max(inner.led).max(inner.led_before);
        drop(inner);
        newest.age()
    }
}

impl Drop for Ceding<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.ceding = inner.ceding.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn a_leader_begins_where_its_voters_last_heard_another() {
        let quiet = Quiet::new(at(100));
        assert_eq!(
            quiet.since(3, false),
            None,
            "nothing is known of the others"
        );
        quiet.elected_by(3, at(50));
        assert_eq!(
            quiet.since(3, false),
            Some(at(100)),
            "its own start counts, too"
        );
        quiet.elected_by(3, at(400));
        quiet.elected_by(3, at(300));
        quiet.elected_by(2, at(900));
        assert_eq!(quiet.since(3, false), Some(at(400)));
        quiet.heard(at(700));
        assert_eq!(quiet.since(3, false), Some(at(700)));
        assert_eq!(quiet.since(4, false), None, "votes count for their term");
    }

    #[test]
    fn what_it_counted_on_in_an_earlier_term_counts() {
        let quiet = Quiet::new(at(100));
        assert!(quiet.leads(3, at(800)));
        assert!(quiet.leads(3, at(700)));
        quiet.elected_by(5, at(200));
        assert_eq!(quiet.since(5, false), Some(at(800)));
        assert!(quiet.leads(5, at(1500)));
        assert_eq!(quiet.since(5, false), Some(at(800)), "not its own term");
        assert!(!quiet.leads(3, at(1600)), "a term that is over");
        assert_eq!(quiet.since(5, false), Some(at(800)));
    }

    #[test]
    fn who_answers_a_candidate_counts_on_no_majority_any_more() {
        let quiet = Quiet::new(at(100));
        assert!(quiet.leads(3, at(800)));
        let refused = quiet.cede();
        assert!(!quiet.leads(3, at(900)), "while it answers");
        drop(refused);
        assert!(quiet.leads(3, at(900)), "the answer was no");
        let age = quiet.cede().granted(4);
        assert!(age <= at(900).age());
        assert!(!quiet.leads(3, at(1000)));
        assert!(quiet.leads(6, at(2000)));
    }

    #[test]
    fn alone_it_only_asks_itself() {
        let quiet = Quiet::new(at(100));
        assert_eq!(quiet.since(1, true), Some(at(100)));
        quiet.elected_by(1, at(500));
        assert_eq!(quiet.since(1, true), Some(at(500)));
    }
}
