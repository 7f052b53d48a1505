//! Keeps the consensus group in step with the hosts: adds learners, promotes and replaces voters.

use crate::group::Group;
use quorate_membership::{Instant, LeaseTable, Member, next_voters};
use quorate_state::State;
use quorate_types::{Millis, NodeId};
use std::collections::BTreeMap;

/// A log this many entries behind still counts as caught up.
const LAG_ALLOWED: u64 = 200;

/// One change of membership to make now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    AddLearner(NodeId),
    Voters(std::collections::BTreeSet<NodeId>),
    Remove(NodeId),
}

/// What to change, if anything.
pub(crate) fn next_change(
    group: &dyn Group,
    state: &State,
    table: &LeaseTable,
    elected: Instant,
    now: Instant,
) -> Option<Change> {
    let members = group.members();
    if members.changing {
        return Some(Change::Voters(members.voters));
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
    let known: BTreeMap<NodeId, Member> = state
        .hosts
        .iter()
        .map(|(name, host)| {
            let heard = if host.node == group.node() {
                Some(now)
            } else {
                table.heard(name)
            };
            let silence = now.since(heard.unwrap_or(elected));
            let up = heard.is_some() && silence < Millis(1000);
            let matched = members.matched.get(&host.node).copied().flatten();
            let caught_up = host.node == group.node()
                || matched.is_some_and(|index| index + LAG_ALLOWED >= members.last);
            (
                host.node,
                Member {
                    silent: (!up).then_some(silence),
                    caught_up,
                },
            )
        })
        .collect();
    let settings = state.settings();
    let voters = next_voters(
        &members.voters,
        &known,
        group.node(),
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
