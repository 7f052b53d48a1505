//! Keeps the consensus group in step with the hosts: adds learners, promotes and replaces voters.

use crate::leases::Leases;
use quorate_membership::{Electorate, Instant, Member, next_voters, voters_without};
use quorate_state::{HostRecord, State, Witness};
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
    /// On the leader: age of the newest answer of each node to the group's own messages.
    pub heard: BTreeMap<NodeId, Millis>,
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
    let witness = state.quorum.witness.as_ref().map(Witness::node);
    let hosts = state.hosts.values().map(|host| host.node);
    let missing = hosts.chain(witness).find(|node| !in_group(node));
    if let Some(node) = missing {
        return Some(Change::AddLearner(node));
    }
    if let Some(voters) = ask(members, me, state, leases, now, next_voters) {
        return Some(Change::Voters(voters));
    }
    let known = |node: &NodeId| witness == Some(*node) || state.host_of_node(*node).is_some();
    let gone = members.learners.iter().find(|node| !known(node)).copied();
    gone.map(Change::Remove)
}

/// The voters to have before the host of node `leaver` stops in order; `None`: the others go on without a change, or
/// there is nobody who could.
#[must_use]
pub fn before_leaving(
    members: &GroupMembers,
    (me, leaver): (NodeId, NodeId),
    state: &State,
    leases: &Leases,
    now: Instant,
) -> Option<BTreeSet<NodeId>> {
    ask(members, me, state, leases, now, |of| {
        voters_without(of, leaver)
    })
}

/// How the hosts, and the witness, stand in the group.
#[must_use]
pub fn standing(
    members: &GroupMembers,
    me: NodeId,
    state: &State,
    leases: &Leases,
    now: Instant,
) -> (BTreeMap<NodeId, Member>, Option<(NodeId, Member)>) {
    let host = |(name, record): (&HostName, &HostRecord)| {
        let member = Member {
            left: state.quorum.left.contains(name),
            ..member(members, me, leases, (name, record), now)
        };
        (record.node, member)
    };
    let hosts = state.hosts.iter().map(host).collect();
    let witness = state.quorum.witness.as_ref().map(Witness::node);
    let witness = witness.map(|node| (node, witness_member(members, leases, node, now)));
    (hosts, witness)
}

fn ask(
    members: &GroupMembers,
    me: NodeId,
    state: &State,
    leases: &Leases,
    now: Instant,
    question: impl FnOnce(&Electorate<'_>) -> Option<BTreeSet<NodeId>>,
) -> Option<BTreeSet<NodeId>> {
    let (hosts, witness) = standing(members, me, state, leases, now);
    let settings = state.settings();
    question(&Electorate {
        current: &members.voters,
        hosts: &hosts,
        witness,
        leader: me,
        max_voters: settings.max_voters,
        replace_after: settings.replace_voter_after,
    })
}

/// A witness sends no heartbeats: it is heard by its answers to the group's own messages.
fn witness_member(members: &GroupMembers, leases: &Leases, node: NodeId, now: Instant) -> Member {
    let heard = members.heard.get(&node).copied();
    let silence = heard.unwrap_or_else(|| now.since(leases.elected));
    let up = heard.is_some_and(|age| age < UP_WITHIN);
    Member {
        silent: (!up).then_some(silence),
        caught_up: caught_up(members, node),
        left: false,
    }
}

fn caught_up(members: &GroupMembers, node: NodeId) -> bool {
    let matched = members.matched.get(&node).copied().flatten();
    matched.is_some_and(|index| index + LAG_ALLOWED >= members.last)
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
    Member {
        silent: (!up).then_some(silence),
        caught_up: is_me || caught_up(members, record.node),
        left: false,
    }
}
