//! When did a majority last confirm this leader?
//!
//! Owns the table "voter -> send time of the newest request it acknowledged", for the vote this node
//! leads with. What always holds:
//! - the recorded time is taken *before* the request leaves this node, so it is never later than the
//!   moment the follower handled it (openraft's own `millis_since_quorum_ack` is rounded down and as old
//!   as its last metrics flush, hence not conservative when read);
//! - an acknowledgement counts only if the follower answered under exactly this leader's vote. From then
//!   on, that follower may vote for another leader, but it did so after the recorded time. Any later
//!   leader needs one of these followers, so it is elected after [`AckTable::quorum_time`];
//! - during a membership change every configuration that may be in force must have a majority, including
//!   one that was appended but not reported by openraft yet ([`AckTable::note_membership`]).
//!
//! It also knows which voters answered anything lately ([`AckTable::reaches_majority`]): a leader that is
//! heard but hears nobody must fall silent for the others' sake, see [`crate::driver`]. It must not decide
//! who leads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use openraft::{EmptyNode, Membership};
use tokio::sync::Notify;

use crate::NodeId;
use crate::clock::BootTime;
use crate::types::{LogId, StoredMembership, Vote};

/// Acknowledgement times of this node's followers.
#[derive(Debug, Default)]
pub(crate) struct AckTable {
    inner: Mutex<Inner>,
    /// A voter acknowledged this leader for the first time.
    pub(crate) news: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    vote: Option<Vote>,
    times: BTreeMap<NodeId, BootTime>,
    appended: Option<(LogId, Vec<BTreeSet<NodeId>>)>,
    /// Send time of the newest request each peer answered in any way.
    reached: BTreeMap<NodeId, BootTime>,
    /// Configurations in force, as openraft reported them last.
    configs: Vec<BTreeSet<NodeId>>,
}

impl AckTable {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `target` acknowledged under `vote` a request that was sent at `sent`.
    pub(crate) fn record(&self, vote: Vote, target: NodeId, sent: BootTime) {
        let mut inner = self.lock();
        if inner.vote.is_some_and(|current| current > vote) {
            return;
        }
        if inner.vote != Some(vote) {
            inner.vote = Some(vote);
            inner.times.clear();
        }
        let old = inner.times.get(&target).copied();
        if old < Some(sent) {
            inner.times.insert(target, sent);
        }
        drop(inner);
        if old.is_none() {
            self.news.notify_one();
        }
    }

    /// `target` answered something that was sent at `sent`.
    pub(crate) fn record_answer(&self, target: NodeId, sent: BootTime) {
        let mut inner = self.lock();
        let newest = inner.reached.entry(target).or_insert(sent);
        *newest = sent.max(*newest);
    }

    /// Age of the newest answer of each peer.
    pub(crate) fn heard(&self) -> BTreeMap<NodeId, Duration> {
        let inner = self.lock();
        let ages = inner.reached.iter().map(|(id, at)| (*id, at.age()));
        ages.collect()
    }

    /// Did `target` answer something that was sent at `since` or later?
    pub(crate) fn answered_since(&self, target: NodeId, since: BootTime) -> bool {
        let inner = self.lock();
        inner.reached.get(&target).is_some_and(|at| *at >= since)
    }

    /// The membership openraft reports now.
    pub(crate) fn set_membership(&self, membership: &StoredMembership) {
        let configs = membership.membership().get_joint_config();
        let mut inner = self.lock();
        if inner.configs != *configs {
            inner.configs = configs.clone();
        }
    }

    /// Did a majority answer something within `age`?
    pub(crate) fn reaches_majority(&self, me: NodeId, age: Duration) -> bool {
        let inner = self.lock();
        let now = BootTime::now();
        inner.configs.is_empty()
            || majority_time(inner.configs.iter(), me, now, &inner.reached)
                .is_some_and(|at| now.since(at) <= age)
    }

    /// A membership is about to be written to the local log and takes effect with it.
    pub(crate) fn note_membership(&self, log_id: LogId, membership: &Membership<u64, EmptyNode>) {
        self.lock().appended = Some((log_id, membership.get_joint_config().clone()));
    }

    /// The local log lost its entries from `since` on; a membership among them is no longer in force.
    pub(crate) fn forget_membership(&self, since: u64) {
        let mut inner = self.lock();
        if inner
            .appended
            .as_ref()
            .is_some_and(|(id, _)| id.index >= since)
        {
            inner.appended = None;
        }
    }

    /// The newest send time acknowledged by a majority, for the leader `me` with `vote`.
    pub(crate) fn quorum_time(
        &self,
        me: NodeId,
        vote: Vote,
        membership: &StoredMembership,
        now: BootTime,
    ) -> Option<BootTime> {
        let inner = self.lock();
        let none = BTreeMap::new();
        let times = if inner.vote == Some(vote) {
            &inner.times
        } else {
            &none
        };
        let reported = membership.membership().get_joint_config();
        let appended = match &inner.appended {
            Some((log_id, configs)) if Some(*log_id) > *membership.log_id() => configs.as_slice(),
            _ => &[],
        };
        majority_time(reported.iter().chain(appended), me, now, times)
    }
}

/// For every configuration the newest time a majority of it reached; the oldest of these.
fn majority_time<'a>(
    configs: impl Iterator<Item = &'a BTreeSet<NodeId>>,
    me: NodeId,
    now: BootTime,
    times: &BTreeMap<NodeId, BootTime>,
) -> Option<BootTime> {
    let mut oldest = None;
    for config in configs {
        let mut reached: Vec<BootTime> = config
            .iter()
            .filter_map(|id| {
                if *id == me {
                    Some(now)
                } else {
                    times.get(id).copied()
                }
            })
            .collect();
        reached.sort_unstable_by(|a, b| b.cmp(a));
        let time = *reached.get(config.len() / 2)?;
        oldest = Some(oldest.map_or(time, |o: BootTime| o.min(time)));
    }
    oldest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(nanos: u64) -> BootTime {
        BootTime::from_nanos(nanos)
    }

    fn time(configs: &[&[NodeId]], times: &[(NodeId, u64)]) -> Option<BootTime> {
        let configs: Vec<BTreeSet<NodeId>> = configs
            .iter()
            .map(|c| c.iter().copied().collect())
            .collect();
        let times = times.iter().map(|(id, at)| (*id, t(*at))).collect();
        majority_time(configs.iter(), 1, t(100), &times)
    }

    #[test]
    fn the_slowest_member_of_the_best_majority_counts() {
        assert_eq!(time(&[&[1]], &[]), Some(t(100)));
        assert_eq!(time(&[&[1, 2]], &[(2, 40)]), Some(t(40)));
        assert_eq!(time(&[&[1, 2]], &[]), None);
        assert_eq!(time(&[&[1, 2, 3]], &[(2, 40), (3, 60)]), Some(t(60)));
        assert_eq!(time(&[&[1, 2, 3]], &[(3, 60)]), Some(t(60)));
        assert_eq!(time(&[&[1, 2, 3, 4, 5]], &[(2, 40), (3, 60)]), Some(t(40)));
        assert_eq!(time(&[&[1, 2, 3, 4, 5]], &[(3, 60)]), None);
    }

    #[test]
    fn a_leader_outside_the_configuration_does_not_count_itself() {
        assert_eq!(time(&[&[2, 3]], &[(2, 40)]), None);
        assert_eq!(time(&[&[2, 3]], &[(2, 40), (3, 60)]), Some(t(40)));
    }

    #[test]
    fn every_configuration_of_a_change_needs_a_majority() {
        let acks = [(2, 40), (4, 60), (5, 70)];
        assert_eq!(time(&[&[1, 2, 3], &[1, 4, 5]], &acks), Some(t(40)));
        assert_eq!(time(&[&[1, 2, 3], &[1, 4, 5]], &acks[1..]), None);
        assert_eq!(time(&[], &acks), None);
    }

    #[test]
    fn acknowledgements_of_another_vote_do_not_count() {
        let table = AckTable::default();
        let membership =
            StoredMembership::new(None, Membership::new(vec![BTreeSet::from([1, 2, 3])], ()));
        let old = Vote::new_committed(1, 1);
        let new = Vote::new_committed(3, 1);
        table.record(old, 2, t(40));
        assert_eq!(table.quorum_time(1, old, &membership, t(100)), Some(t(40)));
        assert_eq!(table.quorum_time(1, new, &membership, t(100)), None);
        table.record(new, 3, t(50));
        table.record(old, 2, t(60));
        table.record(new, 3, t(45));
        assert_eq!(table.quorum_time(1, new, &membership, t(100)), Some(t(50)));
    }

    #[test]
    fn an_appended_membership_counts_before_it_is_reported() {
        let table = AckTable::default();
        let alone = StoredMembership::new(None, Membership::new(vec![BTreeSet::from([1])], ()));
        let vote = Vote::new_committed(1, 1);
        assert_eq!(table.quorum_time(1, vote, &alone, t(100)), Some(t(100)));
        let log_id = LogId::new(openraft::CommittedLeaderId::new(1, 1), 5);
        let three = Membership::new(vec![BTreeSet::from([1, 2, 3])], ());
        table.note_membership(log_id, &three);
        assert_eq!(table.quorum_time(1, vote, &alone, t(100)), None);
        table.record(vote, 3, t(70));
        assert_eq!(table.quorum_time(1, vote, &alone, t(100)), Some(t(70)));
        table.forget_membership(6);
        assert_eq!(table.quorum_time(1, vote, &alone, t(100)), Some(t(70)));
        table.forget_membership(5);
        assert_eq!(table.quorum_time(1, vote, &alone, t(100)), Some(t(100)));
        table.note_membership(log_id, &three);
        let reported = StoredMembership::new(Some(log_id), three);
        assert_eq!(table.quorum_time(1, vote, &reported, t(100)), Some(t(70)));
    }
}
