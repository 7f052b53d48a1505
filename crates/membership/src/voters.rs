//! Which nodes vote in the consensus group.
//!
//! Always holds: an odd number of voters (an even number survives no more failures and is easier
//! to cut in halves), at most one voter exchanged at a time, and never one for a node that has
//! just fallen silent: a short outage changes no membership.
//!
//! A witness votes where it makes an even number of hosts odd, and only there:
//!
//! | hosts | without a witness           | with one                                |
//! |-------|-----------------------------|-----------------------------------------|
//! | 1     | 1 vote, survives nothing    | the same: two votes would be weaker     |
//! | 2     | 1 vote: one *named* host    | 3 votes, any one of the three may fail  |
//! | 3     | 3 votes, any one may fail   | the same: a fourth vote survives no more |
//! | 4     | 3 votes, any one may fail   | 5 votes, any two may fail               |
//! | 5...  | 5 votes, any two may fail   | the same                                |
//!
//! It also stands in for a host that is silent for long, until that one is back.
//!
//! Votes follow hosts that leave in order (their daemon is stopped): before the last majority would go with
//! them ([`voters_without`]), and for good when they stay away. Hosts that vanish keep their votes: whether they died
//! or are cut off, with others, nobody here can know.

use quorate_types::{Millis, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// A host that left in order and is away for this long does not count any more. A daemon that is restarted or
/// upgraded is back before.
const LEFT_AFTER: Millis = Millis::secs(20);

/// What is known of one member of the consensus group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// For how long nothing was heard of it; absent: it is up.
    pub silent: Option<Millis>,
    /// Its log is as new as the leader's, or nearly.
    pub caught_up: bool,
    /// Its daemon was stopped in order.
    pub left: bool,
}

impl Member {
    fn fit(&self) -> bool {
        self.silent.is_none() && self.caught_up
    }

    fn away(&self) -> bool {
        self.left && self.silent.is_some_and(|silent| silent > LEFT_AFTER)
    }
}

/// Everybody who could vote.
#[derive(Debug, Clone, Copy)]
pub struct Electorate<'a> {
    /// Who votes now.
    pub current: &'a BTreeSet<NodeId>,
    /// All hosts of the cluster that are in the group.
    pub hosts: &'a BTreeMap<NodeId, Member>,
    /// The witness, if it is in the group.
    pub witness: Option<(NodeId, Member)>,
    /// The leader: this node.
    pub leader: NodeId,
    /// Most voters.
    pub max_voters: u32,
    /// A voter that is silent for longer is replaced if somebody else can vote.
    pub replace_after: Millis,
}

impl Electorate<'_> {
    fn member(&self, node: NodeId) -> Option<Member> {
        let witness = self.witness.filter(|(id, _)| *id == node);
        let host = self.hosts.get(&node).copied();
        host.or(witness.map(|(_, member)| member))
    }

    fn gone(&self, node: NodeId) -> bool {
        match self.member(node) {
            None => true,
            Some(member) => {
                member.away()
                    || member
                        .silent
                        .is_some_and(|silent| silent > self.replace_after)
            }
        }
    }

    /// Fit hosts without a vote, lowest number first.
    fn spare_hosts(&self) -> impl Iterator<Item = NodeId> {
        let spare = |(node, member): (&NodeId, &Member)| {
            (!self.current.contains(node) && member.fit()).then_some(*node)
        };
        self.hosts.iter().filter_map(spare)
    }

    fn spare_witness(&self) -> Option<NodeId> {
        let spare = self.witness.filter(|(_, member)| member.fit());
        let node = spare.map(|(node, _)| node);
        node.filter(|node| !self.current.contains(node))
    }

    /// The leader keeps its vote, unless it is a host no more.
    fn keeps(&self, node: NodeId) -> bool {
        node == self.leader && self.hosts.contains_key(&node)
    }

    fn lost(&self) -> impl Iterator<Item = NodeId> {
        let voters = self.current.iter().copied();
        voters.filter(|node| !self.keeps(*node) && self.gone(*node))
    }
}

/// How many voters there should be for so many hosts, and whether a witness is one of them.
#[must_use]
pub fn wanted_voters(hosts: usize, witness: bool, max_voters: u32) -> (usize, bool) {
    let max = max_voters as usize;
    let hosts = hosts.min(max);
    if witness && hosts >= 2 && hosts.is_multiple_of(2) && hosts < max.max(3) {
        (hosts + 1, true)
    } else {
        (odd(hosts), false)
    }
}

/// The voters to have next; `None`: they are right as they are.
#[must_use]
pub fn next_voters(of: &Electorate<'_>) -> Option<BTreeSet<NodeId>> {
    let present = of.hosts.values().filter(|member| !member.away()).count();
    let (wanted, with_witness) = wanted_voters(present, of.witness.is_some(), of.max_voters);
    let mut next = of.current.clone();
    let spare = of.spare_hosts().next();
    let stand_in = of.spare_witness().filter(|_| present >= 2);
    if let (Some(lost), Some(spare)) = (of.lost().next(), spare.or(stand_in)) {
        next.remove(&lost);
        next.insert(spare);
        return Some(next);
    }
    let witness = of.witness.map(|(node, _)| node);
    if let (Some(witness), Some(spare)) = (witness, spare)
        && !with_witness
        && next.len() <= wanted
        && next.remove(&witness)
    {
        // It stood in for a host; here is one.
        next.insert(spare);
        return Some(next);
    }
    if next.len() < wanted {
        // From 1 to 3 and from 3 to 5 in one step: an even number in between would be weaker.
        let spares = of
            .spare_hosts()
            .chain(of.spare_witness().filter(|_| with_witness));
        next.extend(spares.take(wanted - of.current.len()));
        let grown = odd(next.len());
        trim(&mut next, grown.max(of.current.len()), of, of.current);
        return (next != *of.current).then_some(next);
    }
    if next.len() > wanted {
        let idle = witness.filter(|_| !with_witness);
        for node in of.lost().chain(idle) {
            if next.len() > wanted {
                next.remove(&node);
            }
        }
        let keep = witness.filter(|_| with_witness).into_iter().collect();
        trim(&mut next, wanted, of, &keep);
        return Some(next);
    }
    None
}

/// The voters to have before `leaver` stops in order; `None`: the others go on as they are, or nobody is left.
#[must_use]
pub fn voters_without(of: &Electorate<'_>, leaver: NodeId) -> Option<BTreeSet<NodeId>> {
    let up = |node: &NodeId| {
        let member = of.member(*node);
        *node != leaver && member.is_some_and(|member| member.silent.is_none())
    };
    if of.current.iter().filter(|node| up(node)).count() * 2 > of.current.len() {
        return None;
    }
    let fit =
        |(node, member): (&NodeId, &Member)| (*node != leaver && member.fit()).then_some(*node);
    let mut hosts: Vec<NodeId> = of.hosts.iter().filter_map(fit).collect();
    hosts.sort_by_key(|node| (*node != of.leader, !of.current.contains(node), *node));
    if hosts.is_empty() {
        return None;
    }
    let witness = of.witness.filter(|(_, member)| member.fit());
    let (wanted, with_witness) = wanted_voters(hosts.len(), witness.is_some(), of.max_voters);
    let witness = witness.map(|(node, _)| node).filter(|_| with_witness);
    let hosts = hosts.into_iter().take(wanted - usize::from(with_witness));
    Some(hosts.chain(witness).collect())
}

fn odd(n: usize) -> usize {
    if n.is_multiple_of(2) {
        n.saturating_sub(1).max(1)
    } else {
        n
    }
}

/// Shrinks to `size`, highest numbers first, never the leader nor one of `keep` while others are there.
fn trim(voters: &mut BTreeSet<NodeId>, size: usize, of: &Electorate<'_>, keep: &BTreeSet<NodeId>) {
    while voters.len() > size {
        let free = |node: &&NodeId| !of.keeps(**node);
        let drop = voters
            .iter()
            .rev()
            .find(|node| free(node) && !keep.contains(node));
        let drop = drop.or_else(|| voters.iter().rev().find(free)).copied();
        let Some(drop) = drop else { return };
        voters.remove(&drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: NodeId = 9;

    const UP: Member = Member {
        silent: None,
        caught_up: true,
        left: false,
    };

    fn down(ms: u64) -> Member {
        Member {
            silent: Some(Millis(ms)),
            caught_up: false,
            left: false,
        }
    }

    fn next(current: &[NodeId], members: &[(NodeId, Member)]) -> Option<Vec<NodeId>> {
        with(current, members, None)
    }

    fn with(
        current: &[NodeId],
        members: &[(NodeId, Member)],
        witness: Option<Member>,
    ) -> Option<Vec<NodeId>> {
        ask(current, members, witness, next_voters)
    }

    fn leave(
        leaver: NodeId,
        current: &[NodeId],
        members: &[(NodeId, Member)],
        witness: Option<Member>,
    ) -> Option<Vec<NodeId>> {
        ask(current, members, witness, |of| voters_without(of, leaver))
    }

    fn ask(
        current: &[NodeId],
        members: &[(NodeId, Member)],
        witness: Option<Member>,
        ask: impl Fn(&Electorate<'_>) -> Option<BTreeSet<NodeId>>,
    ) -> Option<Vec<NodeId>> {
        let found = ask(&Electorate {
            current: &current.iter().copied().collect(),
            hosts: &members.iter().copied().collect(),
            witness: witness.map(|member| (W, member)),
            leader: 1,
            max_voters: 5,
            replace_after: Millis::secs(60),
        });
        found.map(|set| set.into_iter().collect())
    }

    /// Left in order, so long ago.
    fn left(ms: u64) -> Member {
        Member {
            left: true,
            ..down(ms)
        }
    }

    fn up(nodes: std::ops::RangeInclusive<NodeId>) -> Vec<(NodeId, Member)> {
        nodes.map(|node| (node, UP)).collect()
    }

    #[test]
    fn grows_to_odd_numbers_only() {
        assert_eq!(next(&[1], &[(1, UP)]), None);
        assert_eq!(
            next(&[1], &[(1, UP), (2, UP)]),
            None,
            "two hosts: one voter survives more than two"
        );
        assert_eq!(
            next(&[1], &[(1, UP), (2, UP), (3, UP)]),
            Some(vec![1, 2, 3])
        );
        assert_eq!(
            next(&[1, 2, 3], &[(1, UP), (2, UP), (3, UP), (4, UP)]),
            None
        );
        let five: Vec<_> = (1..=7).map(|n| (n, UP)).collect();
        assert_eq!(next(&[1, 2, 3], &five), Some(vec![1, 2, 3, 4, 5]));
    }

    #[test]
    fn a_host_that_lags_or_is_down_is_not_taken() {
        let lagging = Member {
            silent: None,
            caught_up: false,
            left: false,
        };
        assert_eq!(next(&[1], &[(1, UP), (2, UP), (3, lagging)]), None);
        assert_eq!(next(&[1], &[(1, UP), (2, UP), (3, down(1))]), None);
    }

    #[test]
    fn a_voter_is_replaced_after_its_time_if_there_is_a_spare() {
        let members = |ms| [(1, UP), (2, down(ms)), (3, UP), (4, UP)];
        assert_eq!(next(&[1, 2, 3], &members(60_000)), None);
        assert_eq!(next(&[1, 2, 3], &members(60_001)), Some(vec![1, 3, 4]));
        assert_eq!(next(&[1, 2, 3], &members(60_001)[..3]), None, "no spare");
    }

    #[test]
    fn a_removed_host_is_no_voter() {
        assert_eq!(next(&[1, 2, 3], &[(1, UP), (3, UP)]), Some(vec![1]));
        assert_eq!(
            next(&[1, 2, 3], &[(1, UP), (3, UP), (4, UP)]),
            Some(vec![1, 3, 4])
        );
    }

    #[test]
    fn a_witness_votes_where_it_makes_the_number_odd() {
        assert_eq!(with(&[1], &up(1..=1), Some(UP)), None);
        assert_eq!(with(&[1], &up(1..=2), Some(UP)), Some(vec![1, 2, W]));
        assert_eq!(
            with(&[1], &[(1, UP), (2, down(1))], Some(UP)),
            None,
            "1 and the witness"
        );
        assert_eq!(with(&[1, 2, W], &up(1..=2), Some(UP)), None);
        assert_eq!(with(&[1], &up(1..=3), Some(UP)), Some(vec![1, 2, 3]));
        assert_eq!(
            with(&[1, 2, W], &up(1..=3), Some(UP)),
            Some(vec![1, 2, 3]),
            "a third host takes its place"
        );
        assert_eq!(
            with(&[1, 2, 3], &up(1..=4), Some(UP)),
            Some(vec![1, 2, 3, 4, W])
        );
        assert_eq!(
            with(&[1, 2, 3], &up(1..=4), Some(down(1))),
            None,
            "four votes are no better than three"
        );
        assert_eq!(
            with(&[1, 2, 3, 4, W], &up(1..=5), Some(UP)),
            Some(vec![1, 2, 3, 4, 5])
        );
        assert_eq!(with(&[1, 2, 3, 4, 5], &up(1..=6), Some(UP)), None);
        // Hosts leave again.
        assert_eq!(
            with(&[1, 2, 3, 4, 5], &up(1..=4), Some(UP)),
            Some(vec![1, 2, 3, 4, W])
        );
        assert_eq!(with(&[1, 2, W], &up(1..=1), Some(UP)), Some(vec![1]));
        assert_eq!(with(&[1, W], &up(1..=1), Some(UP)), Some(vec![1]));
    }

    #[test]
    fn a_lost_witness_keeps_its_vote_and_a_new_one_takes_it() {
        assert_eq!(with(&[1, 2, W], &up(1..=2), Some(down(90_000))), None);
        assert_eq!(
            with(&[1, 2, 7], &up(1..=2), Some(UP)),
            Some(vec![1, 2, W]),
            "its number was replaced"
        );
        assert_eq!(
            with(&[1, 2, W], &up(1..=2), None),
            Some(vec![1]),
            "two votes would be weaker than one"
        );
    }

    #[test]
    fn a_witness_stands_in_for_a_host_that_is_silent_for_long() {
        let members = |ms| [(1, UP), (2, UP), (3, down(ms))];
        assert_eq!(with(&[1, 2, 3], &members(60_000), Some(UP)), None);
        assert_eq!(
            with(&[1, 2, 3], &members(60_001), Some(UP)),
            Some(vec![1, 2, W])
        );
        assert_eq!(with(&[1, 2, W], &members(99_000), Some(UP)), None);
        assert_eq!(
            with(&[1, 2, W], &up(1..=3), Some(UP)),
            Some(vec![1, 2, 3]),
            "back again"
        );
    }

    #[test]
    fn votes_follow_hosts_that_left_in_order_never_those_that_vanished() {
        let five = |rest: &[Member]| {
            let mut members = up(1..=5 - rest.len() as u64);
            members.extend((6 - rest.len() as u64..).zip(rest.iter().copied()));
            members
        };
        let all = [1, 2, 3, 4, 5];
        let gone = down(900_000);
        assert_eq!(next(&all, &five(&[gone, gone])), None, "vanished");
        assert_eq!(next(&all, &five(&[left(20_000), left(20_000)])), None);
        assert_eq!(
            next(&all, &five(&[left(20_001), left(20_001)])),
            Some(vec![1, 2, 3])
        );
        assert_eq!(
            next(&[1, 2, 3], &five(&[left(30_000); 4])),
            Some(vec![1]),
            "the last one of five"
        );
        assert_eq!(
            next(&[1], &five(&[left(30_000), left(30_000)])),
            Some(vec![1, 2, 3]),
            "they come back"
        );
    }

    #[test]
    fn a_leaver_gives_its_vote_away_when_the_others_could_not_go_on() {
        let two = up(1..=2);
        assert_eq!(leave(1, &[1], &two, None), Some(vec![2]));
        assert_eq!(leave(2, &[1], &two, None), None);
        assert_eq!(leave(1, &[1], &[(1, UP), (2, down(1))], None), None);
        assert_eq!(leave(1, &[1], &up(1..=1), None), None, "the last of all");
        assert_eq!(leave(3, &[1, 2, 3], &up(1..=3), None), None, "2 of 3 go on");
        let second = [(1, UP), (2, UP), (3, left(1))];
        assert_eq!(leave(2, &[1, 2, 3], &second, None), Some(vec![1]));
        assert_eq!(leave(1, &[1, 2, 3], &second, None), Some(vec![2]));
        // Five go one after the other: the last one runs.
        let gone = |n: u64| {
            let all = 1..=5;
            all.map(|node| (node, if node > n { left(1) } else { UP }))
                .collect::<Vec<_>>()
        };
        let all = [1, 2, 3, 4, 5];
        assert_eq!(leave(5, &all, &gone(5), None), None);
        assert_eq!(leave(4, &all, &gone(4), None), None);
        assert_eq!(leave(3, &all, &gone(3), None), Some(vec![1]));
        // With a witness.
        assert_eq!(leave(2, &[1, 2, W], &two, Some(UP)), None);
        assert_eq!(leave(2, &[1, 2, W], &two, Some(down(1))), Some(vec![1]));
        assert_eq!(
            leave(3, &all, &gone(3), Some(UP)),
            Some(vec![1, 2, W]),
            "two hosts and the witness"
        );
    }

    #[test]
    fn a_leader_that_is_no_host_any_more_hands_over() {
        assert_eq!(next(&[1], &[(2, UP)]), Some(vec![2]));
        assert_eq!(next(&[1], &[(2, down(1))]), None, "nobody could");
        assert_eq!(next(&[1, 2, 3], &up(2..=3)), Some(vec![2]));
    }

    #[test]
    fn any_change_keeps_an_odd_number_and_the_leader() {
        let states = [UP, down(1), down(90_000), left(30_000)];
        // Four hosts and a witness in every condition, under every set of voters that the rules can make.
        for code in 0..4_usize.pow(4) {
            let at = |n: u32| states[code / 4_usize.pow(n) % 4];
            let members = [(1, UP), (2, at(0)), (3, at(1)), (4, at(2))];
            let votes: [&[NodeId]; 6] = [
                &[1],
                &[1, 2, W],
                &[1, 2, 3],
                &[1, 3, W],
                &[1, 3, 4],
                &[1, 2, 3, 4, W],
            ];
            for current in votes {
                for witness in [None, Some(at(3))] {
                    let Some(next) = with(current, &members, witness) else {
                        continue;
                    };
                    let what = format!("{current:?} -> {next:?} of {members:?}, {witness:?}");
                    assert!(next.contains(&1), "{what}");
                    assert!(next.len() % 2 == 1, "{what}");
                    let fresh = next.iter().filter(|node| !current.contains(node));
                    for node in fresh {
                        let member = if *node == W {
                            witness.unwrap()
                        } else {
                            members[*node as usize - 1].1
                        };
                        assert!(member.fit(), "{what}");
                    }
                }
            }
        }
    }
}
