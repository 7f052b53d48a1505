//! What all parts of a running daemon share, and how a request finds the leader.

use super::console::Consoles;
use super::group::RaftGroup;
use super::peer::{self, Answer, Ask, NOT_LEADER};
use quorate_agent::AgentHandle;
use quorate_api::{ApiError, ErrorCode};
use quorate_controller::{Controller, Group as _, Picture, ProposeFailure};
use quorate_state::{Command, Outcome, State};
use quorate_transport::{CallError, Peers};
use quorate_types::{HostName, NodeId};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a request may look for a leader: an election takes about a second.
const FIND_LEADER: Duration = Duration::from_secs(4);
/// Pause between two tries.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a follower waits until what the leader applied is applied here, so that people read what they wrote.
const CATCH_UP: Duration = Duration::from_secs(2);

/// The daemon's shared parts.
pub(crate) struct Core {
    pub(crate) me: HostName,
    pub(crate) group: RaftGroup,
    pub(crate) states: watch::Receiver<Arc<State>>,
    pub(crate) controller: Controller,
    pub(crate) agent: AgentHandle,
    pub(crate) peers: Peers,
    pub(crate) consoles: Consoles,
}

impl Core {
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.states.borrow())
    }

    /// Proposes here; fails when this host does not lead.
    pub(crate) async fn group_propose(&self, by: &str, command: Command) -> Result<Outcome, ProposeFailure> {
        self.group.propose(by, command).await
    }

    /// Proposes at the leader, wherever it is, and waits until this host has applied it.
    pub(crate) async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ApiError> {
        let ask = || Ask::Propose { by: by.to_owned(), command: Box::new(command.clone()) };
        let local = async || match self.group.propose(by, command.clone()).await {
            Ok(outcome) => Some(Ok(Answer::Proposed(Ok(outcome)))),
            Err(ProposeFailure::Refused(refusal)) => Some(Ok(Answer::Proposed(Err(refusal)))),
            Err(ProposeFailure::NotDone(_)) => None,
            Err(ProposeFailure::Unknown(why)) => Some(Err(unknown_outcome(why))),
        };
        let Answer::Proposed(result) = self.at_leader(ask, local, Duration::from_secs(8)).await? else {
            return Err(wrong_answer());
        };
        let outcome = result.map_err(ApiError::from)?;
        let mut states = self.states.clone();
        let reached = states.wait_for(|state| state.revision >= outcome.revision);
        // It is committed all the same when this host lags.
        let _ = tokio::time::timeout(CATCH_UP, reached).await;
        Ok(outcome)
    }

    /// The leader's picture.
    pub(crate) async fn picture(&self) -> Result<Picture, ApiError> {
        let local = async || self.controller.picture().map(|picture| Ok(Answer::Picture(Box::new(picture))));
        match self.at_leader(|| Ask::Picture, local, Duration::from_secs(2)).await? {
            Answer::Picture(picture) => Ok(*picture),
            _ => Err(wrong_answer()),
        }
    }

    /// Asks the leader, this host if it leads; tries again while there is none, for a bounded time.
    ///
    /// `local` answers `None` when this host turns out not to lead.
    pub(crate) async fn at_leader(
        &self,
        ask: impl Fn() -> Ask,
        local: impl AsyncFn() -> Option<Result<Answer, ApiError>>,
        timeout: Duration,
    ) -> Result<Answer, ApiError> {
        let deadline = Instant::now() + FIND_LEADER.min(timeout.max(Duration::from_secs(1)));
        loop {
            let leading = *self.group.leadership().borrow();
            if leading.is_self {
                if let Some(answer) = local().await {
                    return answer;
                }
            } else if let Some(leader) = leading.leader.filter(|leader| *leader != self.group.node()) {
                match peer::ask(&self.peers, leader, &ask(), timeout).await {
                    Ok(answer) => return Ok(answer),
                    Err(CallError::Refused { code: NOT_LEADER, .. } | CallError::Unreachable { .. }) => {}
                    Err(error) => return Err(call_failed(leader, &error)),
                }
            }
            if Instant::now() >= deadline {
                return Err(ApiError::no_quorum());
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

fn call_failed(node: NodeId, error: &CallError) -> ApiError {
    match error {
        CallError::Refused { code: 504, message, .. } => unknown_outcome(message.clone()),
        CallError::Refused { code: 404, message, .. } => ApiError::new(ErrorCode::NotFound, message.clone()),
        CallError::Refused { message, .. } => ApiError::new(ErrorCode::Conflict, message.clone()),
        CallError::Timeout { .. } => unknown_outcome(error.to_string()),
        _ => ApiError::new(ErrorCode::Unreachable, format!("the leader (node {node}) cannot be asked: {error}")),
    }
}

fn unknown_outcome(why: String) -> ApiError {
    ApiError::new(ErrorCode::Unknown, why).hint("look at `quorate status` and `quorate events` before you repeat it")
}

pub(crate) fn wrong_answer() -> ApiError {
    ApiError::new(ErrorCode::Internal, "the leader gave another kind of answer than was asked for: the hosts run different versions")
}
