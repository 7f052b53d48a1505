//! Which hosts vote in the consensus group.
//!
//! Always holds: an odd number of voters (an even number survives no more failures and is easier
//! to cut in halves), at most one voter exchanged at a time, and never one for a host that has
//! just fallen silent: a short outage changes no membership.

use quorate_types::{Millis, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// What is known of one member of the consensus group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// For how long nothing was heard of it; absent: it is up.
    pub silent: Option<Millis>,
    /// Its log is as new as the leader's, or nearly.
    pub caught_up: bool,
}

/// The voters to have next; `None`: they are right as they are.
///
/// `members` are all hosts that are in the group, `leader` is this node.
pub fn next_voters(
    current: &BTreeSet<NodeId>,
    members: &BTreeMap<NodeId, Member>,
    leader: NodeId,
    max_voters: u32,
    replace_after: Millis,
) -> Option<BTreeSet<NodeId>> {
    let gone = |node: &NodeId| match members.get(node) {
        None => true,
        Some(member) => member.silent.is_some_and(|silent| silent > replace_after),
    };
    let fit = |node: &NodeId| {
        members
            .get(node)
            .is_some_and(|member| member.silent.is_none() && member.caught_up)
    };
    let spare = members
        .keys()
        .find(|node| !current.contains(node) && fit(node))
        .copied();
    let lost = current
        .iter()
        .find(|node| **node != leader && gone(node))
        .copied();
    let mut next = current.clone();
    if let (Some(lost), Some(spare)) = (lost, spare) {
        next.remove(&lost);
        next.insert(spare);
        return Some(next);
    }
    let wanted = odd(members.len().min(max_voters as usize));
    if next.len() < wanted {
        // From 1 to 3 and from 3 to 5 in one step: an even number in between would be weaker.
        let spares = members
            .keys()
            .filter(|node| !current.contains(node) && fit(node));
        next.extend(spares.take(wanted - current.len()));
        let grown = odd(next.len());
        trim(&mut next, grown.max(current.len()), leader, current);
        return (next != *current).then_some(next);
    }
    if next.len() > wanted {
        let dead: Vec<_> = current
            .iter()
            .filter(|node| **node != leader && gone(node))
            .copied()
            .collect();
        for node in dead {
            if next.len() > wanted {
                next.remove(&node);
            }
        }
        trim(&mut next, wanted, leader, &BTreeSet::new());
        return Some(next);
    }
    None
}

fn odd(n: usize) -> usize {
    if n.is_multiple_of(2) {
        n.saturating_sub(1).max(1)
    } else {
        n
    }
}

/// Shrinks to `size`, highest numbers first, never the leader nor one of `keep` while others are there.
fn trim(voters: &mut BTreeSet<NodeId>, size: usize, leader: NodeId, keep: &BTreeSet<NodeId>) {
    while voters.len() > size {
        let drop = voters
            .iter()
            .rev()
            .find(|node| **node != leader && !keep.contains(node));
        let drop = drop
            .or_else(|| voters.iter().rev().find(|node| **node != leader))
            .copied();
        let Some(drop) = drop else { return };
        voters.remove(&drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Member = Member {
        silent: None,
        caught_up: true,
    };

    fn down(ms: u64) -> Member {
        Member {
            silent: Some(Millis(ms)),
            caught_up: false,
        }
    }

    fn next(current: &[NodeId], members: &[(NodeId, Member)]) -> Option<Vec<NodeId>> {
        let current = current.iter().copied().collect();
        let members = members.iter().copied().collect();
        next_voters(&current, &members, 1, 5, Millis::secs(60)).map(|set| set.into_iter().collect())
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
}
