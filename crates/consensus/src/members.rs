//! Who votes and who listens.
//!
//! What always holds: a node votes only after it has nearly the whole log (else the change would stop the
//! cluster until it has), at least one voter stays, and one change runs at a time. Every change is bounded
//! by [`DEADLINE`]. It must not choose the voters; the controller does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, EmptyNode};
use tokio::time::timeout;

use crate::error::MembershipError;
use crate::node::Consensus;
use crate::{Membership, NodeId, StateMachine};

const DEADLINE: Duration = Duration::from_secs(10);
/// A new voter may miss this many entries; they follow within one message.
const VOTER_LAG: u64 = 64;

type Change = ChangeMembers<u64, EmptyNode>;

impl<M: StateMachine> Consensus<M> {
    /// The members as this node knows them.
    pub fn membership(&self) -> Membership {
        let view = self.inner.shared.view();
        let m = view.membership.membership();
        Membership {
            voters: m.voter_ids().collect(),
            learners: m.learner_ids().collect(),
            changing: m.get_joint_config().len() > 1,
        }
    }

    /// On the leader: the last log index each member is known to have. Empty on others.
    pub fn replication(&self) -> BTreeMap<NodeId, Option<u64>> {
        let metrics = self.inner.shared.raft.data_metrics();
        let metrics = metrics.borrow();
        metrics
            .replication
            .as_ref()
            .map_or_else(BTreeMap::new, |r| {
                r.iter()
                    .map(|(id, at)| (*id, at.map(|l| l.index)))
                    .collect()
            })
    }

    /// Adds a node that receives the log. Returns when the change is committed; see
    /// [`Consensus::replication`] for how far the node got. Adding a member again changes nothing.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_learner(&self, id: NodeId) -> Result<(), MembershipError> {
        let now = self.membership();
        if now.voters.contains(&id) || now.learners.contains(&id) {
            return Ok(());
        }
        let nodes = BTreeMap::from([(id, EmptyNode::default())]);
        self.change(ChangeMembers::AddNodes(nodes), true).await
    }

    /// Makes exactly `voters` vote; those who no longer do become learners. Waits for new voters to catch up.
    ///
    /// # Errors
    /// See [`MembershipError`]. After an unknown outcome call it again: it is idempotent.
    pub async fn change_voters(&self, voters: BTreeSet<NodeId>) -> Result<(), MembershipError> {
        if voters.is_empty() {
            return Err(MembershipError::NoVoterLeft);
        }
        let now = self.membership();
        if now.voters == voters && !now.changing {
            return Ok(());
        }
        for id in voters.difference(&now.voters) {
            if !now.learners.contains(id) {
                return Err(MembershipError::UnknownNode { node: *id });
            }
            self.caught_up(*id).await?;
        }
        self.change(ChangeMembers::ReplaceAllVoters(voters), true)
            .await
    }

    /// Removes a node from the cluster, be it voter or learner. A removed leader steps down afterwards.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove_node(&self, id: NodeId) -> Result<(), MembershipError> {
        let now = self.membership();
        let change = if now.voters.contains(&id) {
            if now.voters.len() == 1 {
                return Err(MembershipError::NoVoterLeft);
            }
            ChangeMembers::RemoveVoters(BTreeSet::from([id]))
        } else if now.learners.contains(&id) {
            ChangeMembers::RemoveNodes(BTreeSet::from([id]))
        } else {
            return Ok(());
        };
        self.change(change, false).await
    }

    async fn change(&self, change: Change, retain: bool) -> Result<(), MembershipError> {
        let shared = &self.inner.shared;
        if let Some(reason) = shared.fault.reason() {
            return Err(MembershipError::Stopped(reason));
        }
        let changed = timeout(DEADLINE, shared.raft.change_membership(change, retain)).await;
        let error = match changed {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(e)) => e,
            Err(_) => return Err(MembershipError::OutcomeUnknown { waited: DEADLINE }),
        };
        Err(match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(f)) => {
                MembershipError::NotLeader {
                    leader: f.leader_id.filter(|id| *id != shared.me),
                }
            }
            RaftError::APIError(ClientWriteError::ChangeMembershipError(e)) => match e {
                ChangeMembershipError::InProgress(_) => MembershipError::InProgress,
                ChangeMembershipError::EmptyMembership(_) => MembershipError::NoVoterLeft,
                ChangeMembershipError::LearnerNotFound(e) => {
                    MembershipError::UnknownNode { node: e.node_id }
                }
            },
            RaftError::Fatal(e) => MembershipError::Stopped(self.reason(&e)),
        })
    }

    /// Waits until `id` has nearly the whole log.
    async fn caught_up(&self, id: NodeId) -> Result<(), MembershipError> {
        let mut metrics = self.inner.shared.raft.data_metrics();
        let mut matched = None;
        let mut last = 0;
        let mut leads = true;
        let near = timeout(
            DEADLINE,
            metrics.wait_for(|m| {
                last = m.last_log.map_or(0, |l| l.index);
                let Some(replication) = &m.replication else {
                    leads = false;
                    return true;
                };
                matched = replication.get(&id).copied().flatten().map(|l| l.index);
                matched.is_some_and(|at| at.saturating_add(VOTER_LAG) >= last)
            }),
        )
        .await
        .is_ok_and(|r| r.is_ok());
        if !leads {
            return Err(MembershipError::NotLeader {
                leader: self.inner.shared.current_leadership().leader,
            });
        }
        if near {
            return Ok(());
        }
        Err(MembershipError::Behind {
            node: id,
            matched,
            last,
            waited: DEADLINE,
        })
    }
}
