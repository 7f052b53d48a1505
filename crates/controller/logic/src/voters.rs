//! Keeps the consensus group in step with the hosts: adds learners, promotes and replaces voters.

use crate::leases::Leases;
use quorate_membership::{Instant, Member, next_voters};
use quorate_state::{HostRecord, State};
use quorate_types::{HostName, Millis, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// A log this many entries behind still counts as caught up.
const LAG_ALLOWED: u64 = 200;

/// A host that was heard within this time is up.
const UP_WITHIN: Millis = Millis(1000);

/// Members of the consensus group, as the leader sees them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupMembers {
    /// Nodes that vote.
    pub voters: BTreeSet<NodeId>,
    /// Nodes that only follow.
    pub learners: BTreeSet<NodeId>,
    /// A change of voters was left half done.
    pub changing: bool,
    /// On the leader: how far each node's log matches.
    pub matched: BTreeMap<NodeId, Option<u64>>,
    /// Newest entry of this node's log.
    pub last: u64,
}

/// One change of membership to make now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A host that is not in the group yet.
    AddLearner(NodeId),
    /// These vote from now on.
    Voters(BTreeSet<NodeId>),
    /// A host that left the cluster.
    Remove(NodeId),
}

/// What to change, if anything; `me` is the leader's node.
#[must_use]
pub fn next_change(
    members: &GroupMembers,
    me: NodeId,
    state: &State,
    leases: &Leases,
    now: Instant,
) -> Option<Change> {
    if members.changing {
        return Some(Change::Voters(members.voters.clone()));
    }
    let in_group = |node: &NodeId| members.voters.contains(node) || members.learners.contains(node);
    let missing = state
        .hosts
        .values()
        .map(|host| host.node)
        .find(|node| !in_group(node));
    if let Some(node) = missing {
        return Some(Change::AddLearner(node));
    }
    let member = |(name, record): (&HostName, &HostRecord)| {
        (
            record.node,
            member(members, me, leases, (name, record), now),
        )
    };
    let known: BTreeMap<NodeId, Member> = state.hosts.iter().map(member).collect();
    let settings = state.settings();
    let voters = next_voters(
        &members.voters,
        &known,
        me,
        settings.max_voters,
        settings.replace_voter_after,
    );
    if let Some(voters) = voters {
        return Some(Change::Voters(voters));
    }
    let gone = members
        .learners
        .iter()
        .find(|node| !known.contains_key(node))
        .copied();
    gone.map(Change::Remove)
}

fn member(
    members: &GroupMembers,
    me: NodeId,
    leases: &Leases,
    (name, record): (&HostName, &HostRecord),
    now: Instant,
) -> Member {
    let is_me = record.node == me;
    let heard = if is_me {
        Some(now)
    } else {
        leases.table.heard(name)
    };
    let silence = now.since(heard.unwrap_or(leases.elected));
    let up = heard.is_some() && silence < UP_WITHIN;
    let matched = members.matched.get(&record.node).copied().flatten();
    Member {
        silent: (!up).then_some(silence),
        caught_up: is_me || matched.is_some_and(|index| index + LAG_ALLOWED >= members.last),
    }
}
