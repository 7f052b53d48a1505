//! What the controller needs of the consensus group; the daemon puts openraft behind it.

use async_trait::async_trait;
use quorate_controller_logic::GroupMembers;
use quorate_state::{Command, Outcome, Refusal, State};
use quorate_types::NodeId;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leading {
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// Its term.
    pub term: u64,
    /// It is this node.
    pub is_self: bool,
}

/// Why a command was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ProposeFailure {
    /// The state machine refused it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It was not and will not be applied.
    #[error("{0}")]
    NotDone(String),
    /// It exceeds what the log takes, and never will be applied.
    #[error("{0}")]
    TooLarge(String),
    /// It may or may not be applied later.
    #[error("{0}")]
    Unknown(String),
}

/// The consensus group as this node sees it.
#[async_trait]
pub trait Group: Send + Sync + 'static {
    /// This node's number.
    fn node(&self) -> NodeId;
    /// The state as applied here.
    fn state(&self) -> Arc<State>;
    /// Changes after every applied entry.
    fn applied(&self) -> watch::Receiver<u64>;
    /// Changes with the leadership.
    fn leadership(&self) -> watch::Receiver<Leading>;
    /// Age of the newest message that a majority has answered (counted from its sending).
    fn quorum_ack_age(&self) -> Option<Duration>;
    /// On the leader: for how long no earlier leader has had a majority, so that much of every lease of an earlier
    /// leader has passed; 0 when that is not known.
    fn predecessors_silent_for(&self) -> Duration;
    /// Waits until everything committed before now is applied here. Fails when this node does not lead.
    async fn barrier(&self) -> Result<(), String>;
    /// Proposes a command and waits until it is applied here.
    async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ProposeFailure>;
    /// Members.
    fn members(&self) -> GroupMembers;
    /// Lets a node follow.
    async fn add_learner(&self, node: NodeId) -> Result<(), String>;
    /// Changes the voters.
    async fn change_voters(&self, voters: BTreeSet<NodeId>) -> Result<(), String>;
    /// Takes a node out.
    async fn remove_node(&self, node: NodeId) -> Result<(), String>;
}
