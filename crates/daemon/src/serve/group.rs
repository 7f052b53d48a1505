//! The consensus group as the controller and the API use it, over openraft.

use super::machine::{Machine, Reply};
use async_trait::async_trait;
use quorate_consensus::{Consensus, ProposeError};
use quorate_controller::{Group, GroupMembers, Leading, ProposeFailure};
use quorate_state::{Command, Envelope, FORMAT, Outcome, State};
use quorate_types::{Millis, NodeId, Timestamp};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// A proposal that is not confirmed for this long has an unknown outcome.
const PROPOSE_DEADLINE: Duration = Duration::from_secs(5);

/// Wall-clock time for people.
pub(crate) fn wall_clock() -> Timestamp {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn millis(age: Duration) -> Millis {
    Millis(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

/// [`Group`] over the raft node of this host.
#[derive(Clone)]
pub(crate) struct RaftGroup {
    consensus: Consensus<Machine>,
    leading: watch::Receiver<Leading>,
}

impl RaftGroup {
    pub(crate) fn new(consensus: Consensus<Machine>) -> Self {
        let mut source = consensus.leadership();
        let translate = |now: quorate_consensus::Leadership| Leading {
            leader: now.leader,
            term: now.term,
            is_self: now.is_self,
        };
        let (sender, leading) = watch::channel(translate(*source.borrow()));
        tokio::spawn(async move {
            while source.changed().await.is_ok() {
                let now = translate(*source.borrow_and_update());
                sender.send_replace(now);
            }
        });
        Self { consensus, leading }
    }

    pub(crate) fn consensus(&self) -> &Consensus<Machine> {
        &self.consensus
    }
}

#[async_trait]
impl Group for RaftGroup {
    fn node(&self) -> NodeId {
        self.consensus.node_id()
    }

    fn state(&self) -> Arc<State> {
        self.consensus.read(Machine::state)
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.consensus.applied()
    }

    fn leadership(&self) -> watch::Receiver<Leading> {
        self.leading.clone()
    }

    fn quorum_ack_age(&self) -> Option<Duration> {
        self.consensus.quorum_ack_age()
    }

    fn predecessors_silent_for(&self) -> Duration {
        self.consensus.predecessors_silent_for()
    }

    async fn barrier(&self) -> Result<(), String> {
        self.consensus
            .barrier()
            .await
            .map(drop)
            .map_err(|error| error.to_string())
    }

    async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ProposeFailure> {
        let envelope = Envelope {
            format: FORMAT,
            at: wall_clock(),
            by: by.to_owned(),
            command,
        };
        let bytes = serde_json::to_vec(&envelope)
            .map_err(|error| ProposeFailure::NotDone(error.to_string()))?;
        match self.consensus.propose(bytes, PROPOSE_DEADLINE).await {
            Ok(applied) => {
                let reply: Reply = serde_json::from_slice(&applied.reply).map_err(|error| {
                    ProposeFailure::Unknown(format!("unreadable reply: {error}"))
                })?;
                reply.map_err(ProposeFailure::Refused)
            }
            Err(error @ (ProposeError::OutcomeUnknown { .. } | ProposeError::Stopped(_))) => {
                Err(ProposeFailure::Unknown(error.to_string()))
            }
            Err(error @ ProposeError::TooLarge { .. }) => {
                Err(ProposeFailure::TooLarge(error.to_string()))
            }
            Err(error) => Err(ProposeFailure::NotDone(error.to_string())),
        }
    }

    fn members(&self) -> GroupMembers {
        let membership = self.consensus.membership();
        GroupMembers {
            voters: membership.voters,
            learners: membership.learners,
            changing: membership.changing,
            matched: self.consensus.replication(),
            last: self.consensus.log_status().last.unwrap_or(0),
            heard: self
                .consensus
                .heard()
                .into_iter()
                .map(|(node, age)| (node, millis(age)))
                .collect(),
        }
    }

    async fn add_learner(&self, node: NodeId) -> Result<(), String> {
        self.consensus
            .add_learner(node)
            .await
            .map_err(|error| error.to_string())
    }

    async fn change_voters(&self, voters: BTreeSet<NodeId>) -> Result<(), String> {
        self.consensus
            .change_voters(voters)
            .await
            .map_err(|error| error.to_string())
    }

    async fn remove_node(&self, node: NodeId) -> Result<(), String> {
        self.consensus
            .remove_node(node)
            .await
            .map_err(|error| error.to_string())
    }
}
