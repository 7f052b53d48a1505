//! Which host should hold the disk witness. Pure.
//!
//! The leader should: if the hosts are cut from each other, the leader's side has two of three votes at once and goes on
//! without an election. So another holder hands it over once a leader is settled, and nobody else claims
//! what the leader could; but a leader that cannot reach the pool leaves it to a host that can.

use quorate_membership::Instant;
use quorate_types::{Millis, NodeId};

/// A leader is settled after this.
const SETTLED: Millis = Millis(3000);
/// What nobody took for so long the leader cannot take.
const LEFT_OVER: Millis = Millis(5000);
/// Handed over in vain, it is kept for this long, then ten times longer, ...
const KEEP: Millis = Millis(60_000);
const KEEP_MOST: Millis = Millis(3_600_000);

/// What the host knows of the moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) me: NodeId,
    pub(crate) witness: NodeId,
    pub(crate) leader: Option<NodeId>,
    /// The witness has a vote.
    pub(crate) voter: bool,
    pub(crate) holding: bool,
    /// For how long nobody holds it.
    pub(crate) vacant: Option<Millis>,
    pub(crate) now: Instant,
}

/// Memory between two moments.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    /// Who leads, since when.
    leader: Option<(NodeId, Instant)>,
    /// When it was handed over, and for how long it is kept if that was in vain.
    handed: Option<Instant>,
    keep_until: Option<Instant>,
    keep: Millis,
}

impl Policy {
    /// Does this host want to hold it?
    pub(crate) fn wants(&mut self, at: &Moment) -> bool {
        if self.leader.map(|(leader, _)| leader) != at.leader {
            self.leader = at.leader.map(|leader| (leader, at.now));
        }
        match self.leader {
            Some((leader, _)) if leader == at.me => {
                (self.handed, self.keep_until, self.keep) = (None, None, Millis(0));
                true
            }
            // It leads only to hand over: not a moment to move it.
            Some((leader, _)) if leader == at.witness => at.holding || at.voter,
            None => at.voter,
            Some((_, since)) if at.holding => {
                if self.handed.take().is_some() {
                    self.keep = Millis((self.keep.0 * 10).clamp(KEEP.0, KEEP_MOST.0));
                    self.keep_until = Some(at.now.plus(self.keep));
                }
                let kept = self.keep_until.is_some_and(|until| at.now < until);
                let hand_over = !kept && at.now > since.plus(SETTLED);
                if hand_over {
                    self.handed = Some(at.now);
                }
                !hand_over
            }
            Some(_) => at.voter && at.vacant.is_some_and(|vacant| vacant > LEFT_OVER),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment {
            me: 1,
            witness: 9,
            leader: Some(2),
            voter: true,
            holding: false,
            vacant: None,
            now: Instant(1_000_000 * (100_000 + ms)),
        }
    }

    #[test]
    fn the_leader_holds_it() {
        let mut policy = Policy::default();
        let leads = Moment {
            leader: Some(1),
            voter: false,
            ..at(0)
        };
        assert!(policy.wants(&leads));
        assert!(!policy.wants(&at(1)), "another leads");
        let free = |vacant| Moment {
            vacant: Some(Millis(vacant)),
            ..at(10)
        };
        assert!(!policy.wants(&free(5000)));
        assert!(policy.wants(&free(5001)), "the leader does not take it");
        assert!(
            policy.wants(&Moment {
                leader: None,
                ..at(20)
            }),
            "nobody leads"
        );
        let newcomer = Moment {
            leader: None,
            voter: false,
            ..at(30)
        };
        assert!(!policy.wants(&newcomer), "only a leader makes a new one");
        let by_witness = Moment {
            leader: Some(9),
            holding: true,
            ..at(40)
        };
        assert!(policy.wants(&by_witness));
    }

    #[test]
    fn another_holder_hands_it_over_and_learns_from_what_was_in_vain() {
        let mut policy = Policy::default();
        let holds = |ms| Moment {
            holding: true,
            ..at(ms)
        };
        assert!(policy.wants(&holds(0)));
        assert!(policy.wants(&holds(3000)));
        assert!(!policy.wants(&holds(3001)), "the leader is settled");
        assert!(policy.wants(&Moment {
            vacant: Some(Millis(6000)),
            ..at(9000)
        }));
        for ms in [9500, 30_000, 69_000] {
            assert!(policy.wants(&holds(ms)), "the leader could not: {ms}");
        }
        assert!(!policy.wants(&holds(69_501)), "it is tried again");
        assert!(policy.wants(&holds(70_000)));
        assert!(policy.wants(&holds(600_000)), "ten minutes now");
        assert!(!policy.wants(&holds(670_001)));
        // Another leader is another matter.
        assert!(policy.wants(&Moment {
            leader: Some(1),
            ..holds(680_000)
        }));
        assert!(policy.wants(&Moment {
            leader: Some(3),
            ..holds(690_000)
        }));
        assert!(!policy.wants(&Moment {
            leader: Some(3),
            ..holds(693_001)
        }));
    }
}
