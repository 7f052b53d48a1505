//! What all parts of a running daemon share, and how a request finds the leader.

use super::console::Consoles;
use super::group::RaftGroup;
use super::images;
use super::look;
use super::peer::{self, Answer, Ask, NOT_LEADER};
use super::take;
use super::witness::Route;
use quorate_agent::AgentHandle;
use quorate_api::{ApiError, ErrorCode};
use quorate_controller::{Controller, ControllerError, Group as _, Picture, ProposeFailure};
use quorate_state::{Command, Outcome, State};
use quorate_transport::{CallError, Peers, RpcStatus};
use quorate_types::{HostName, NodeId, Revision};
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
    pub(crate) route: Route,
    pub(crate) consoles: Consoles,
    pub(crate) images: quorate_image::Jobs,
}

impl Core {
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.states.borrow())
    }

    /// Proposes at the leader, wherever it is, and waits until this host has applied it.
    pub(crate) async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ApiError> {
        let ask = Ask::Propose {
            by: by.to_owned(),
            command: Box::new(command),
        };
        let Answer::Proposed(result) = self.at_leader(ask, Duration::from_secs(8)).await? else {
            return Err(wrong_answer());
        };
        let outcome = result.map_err(ApiError::from)?;
        // It is committed all the same when this host lags.
        let _ = catch_up(self.states.clone(), outcome.revision).await;
        Ok(outcome)
    }

    /// The leader's picture, when this host's state is as new: a host that was just started knows who leads before it knows
    /// what was decided while it was away.
    pub(crate) async fn picture(&self) -> Result<Picture, ApiError> {
        let answer = self.at_leader(Ask::Picture, Duration::from_secs(2)).await?;
        let Answer::Picture(mut picture) = answer else {
            return Err(wrong_answer());
        };
        if !catch_up(self.states.clone(), picture.revision).await {
            picture.problems.push(format!(
                "{} is behind the leader and shows what is over (revision {} of {}): ask another host, and look at the disk and the links of this one",
                self.me,
                self.state().revision,
                picture.revision
            ));
        }
        Ok(*picture)
    }

    /// Asks the leader, this host if it leads; tries again while there is none, for a bounded time.
    pub(crate) async fn at_leader(&self, ask: Ask, timeout: Duration) -> Result<Answer, ApiError> {
        let deadline = Instant::now() + FIND_LEADER.min(timeout);
        loop {
            let mut broken = None;
            let leading = *self.group.leadership().borrow();
            if leading.is_self {
                match self.answer(ask.clone()).await {
                    Err(status) if status.code == NOT_LEADER => {}
                    result => return result.map_err(refused_here),
                }
            } else if let Some(leader) =
                leading.leader.filter(|leader| *leader != self.group.node())
            {
                match peer::ask(&self.peers, leader, &ask, timeout).await {
                    Ok(answer) => return Ok(answer),
                    Err(CallError::Refused {
                        code: NOT_LEADER, ..
                    }) => {}
                    Err(error @ CallError::Unreachable { .. }) => broken = Some((leader, error)),
                    Err(error) => return Err(call_failed(leader, &error)),
                }
            }
            if Instant::now() >= deadline {
                return Err(match broken {
                    Some((leader, error)) => {
                        no_way(&self.state(), &self.me, leader, &error.to_string())
                    }
                    None => ApiError::no_quorum(),
                });
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    pub(crate) fn not_leader(&self) -> RpcStatus {
        RpcStatus::new(NOT_LEADER, format!("{} does not lead the cluster", self.me))
    }

    /// Answers a daemon's question, or this host's own.
    pub(crate) async fn answer(&self, ask: Ask) -> Result<Answer, RpcStatus> {
        match ask {
            Ask::Propose { by, command } => match self.group.propose(&by, *command).await {
                Ok(outcome) => Ok(Answer::Proposed(Ok(outcome))),
                Err(ProposeFailure::Refused(refusal)) => Ok(Answer::Proposed(Err(refusal))),
                Err(ProposeFailure::NotDone(why)) => Err(RpcStatus::new(NOT_LEADER, why)),
                Err(ProposeFailure::TooLarge(why)) => Err(RpcStatus::new(413, why)),
                Err(ProposeFailure::Unknown(why)) => Err(RpcStatus::new(504, why)),
            },
            Ask::Picture => {
                let picture = self.controller.picture().ok_or_else(|| self.not_leader())?;
                Ok(Answer::Picture(Box::new(picture)))
            }
            Ask::Fence { host, who } => self
                .controller
                .fence(host, who)
                .await
                .map(Answer::Done)
                .map_err(refused),
            Ask::ConfirmDead { host, who } => {
                let text = format!("{host} is taken for dead on the word of {who}");
                self.controller
                    .confirm_dead(host, who)
                    .await
                    .map(|()| Answer::Done(text))
                    .map_err(refused)
            }
            Ask::Leave { host } => {
                let left = self.controller.let_go(host).await;
                left.map(Answer::Done).map_err(refused)
            }
            Ask::WhatMove { vm, to } => {
                let found = self
                    .controller
                    .with_input(|input| quorate_planner::what_move(input, &vm, to.as_ref()));
                found.map(Answer::Move).ok_or_else(|| self.not_leader())
            }
            Ask::Explain { vm } => {
                let found = self
                    .controller
                    .with_input(|input| quorate_planner::explain(input, &vm));
                let found = found.ok_or_else(|| self.not_leader())?;
                Ok(Answer::Explanation(found.map(Box::new)))
            }
            Ask::Seen => {
                let revision = self.group.state().revision;
                let seen = self.controller.seen().ok_or_else(|| self.not_leader())?;
                let seen = Box::new(seen);
                Ok(Answer::Seen { revision, seen })
            }
            Ask::Incoming { vm, id, ready } => {
                let address = self.agent.incoming_address(vm, id, ready).await;
                address
                    .map(Answer::Address)
                    .map_err(|error| RpcStatus::new(409, error))
            }
            Ask::Export(request) => {
                let offer = self.agent.export(request).await;
                offer
                    .map(Answer::Export)
                    .map_err(|error| RpcStatus::new(409, error))
            }
            Ask::FlushCopy(request) => {
                let flushed = self.agent.flush_copy(request).await;
                flushed
                    .map(|()| Answer::Done(String::new()))
                    .map_err(|error| RpcStatus::new(409, error))
            }
            Ask::HandOver { vm, id } => {
                let handed = self.agent.hand_over(vm, id).await;
                handed
                    .map(|()| Answer::Done("handed over".to_owned()))
                    .map_err(|error| RpcStatus::new(409, error))
            }
            Ask::CutUnits { pool, host, epochs } => Ok(Answer::UnitsCut(
                self.agent.cut_units(&pool, &host, epochs).await,
            )),
            Ask::Flows(flows) => {
                let put = self.agent.put_flows(&flows).await;
                put.map(|()| Answer::Done(String::new()))
                    .map_err(|error| RpcStatus::new(409, error))
            }
            Ask::Pins(pins) => {
                let pinned = self.agent.pin(&pins).await;
                pinned
                    .map(|()| Answer::Done(String::new()))
                    .map_err(|error| RpcStatus::new(409, error))
            }
            Ask::Outcome { vm, id } => Ok(Answer::Outcome(self.agent.outcome(vm, id).await)),
            Ask::ConsoleRead { vm, offset, limit } => self.consoles.read(&vm, offset, limit).await,
            Ask::ConsoleWrite { vm, input } => self.consoles.write(&vm, &input).await,
            ask @ (Ask::ImageJob { .. }
            | Ask::ImageJobs { .. }
            | Ask::CancelImageJob { .. }
            | Ask::Snapshots { .. }) => images::answer(self, ask).await,
            Ask::Images { pool } => look::here(self, &pool).await.map(Answer::Images),
            Ask::Strangers { pool, image } => {
                let seen = take::here(self, &pool, &image).await;
                seen.map(Answer::Strangers)
            }
        }
    }
}

fn refused_here(status: RpcStatus) -> ApiError {
    match status.code {
        504 => unknown_outcome(status.message),
        404 => ApiError::new(ErrorCode::NotFound, status.message),
        413 => ApiError::new(ErrorCode::TooLarge, status.message),
        500 => ApiError::new(ErrorCode::Internal, status.message),
        _ => ApiError::new(ErrorCode::Conflict, status.message),
    }
}

/// There is a leader, for it is heard here; what fails is the way to it.
fn no_way(state: &State, me: &HostName, leader: NodeId, problem: &str) -> ApiError {
    let hosts = state.hosts.iter();
    let mut hosts = hosts.filter(|(_, record)| record.node == leader);
    let name = hosts.next().map(|(name, _)| name.to_string());
    let name = name.unwrap_or_else(|| format!("node {leader}"));
    ApiError::new(
        ErrorCode::Unreachable,
        format!("{name} leads the cluster and is heard by {me}, which cannot reach it: {problem}"),
    )
    .hint(format!(
        "mend the way from {me} to {name}, or run the command on {name} or another host"
    ))
}

fn call_failed(node: NodeId, error: &CallError) -> ApiError {
    match error {
        CallError::Refused { code, message, .. } => {
            refused_here(RpcStatus::new(*code, message.clone()))
        }
        CallError::Timeout { .. } => unknown_outcome(error.to_string()),
        _ => ApiError::new(
            ErrorCode::Unreachable,
            format!("the leader (node {node}) cannot be asked: {error}"),
        ),
    }
}

fn unknown_outcome(why: String) -> ApiError {
    ApiError::new(ErrorCode::Unknown, why)
        .hint("look at `quorate status` and `quorate events` before you repeat it")
}

pub(crate) fn wrong_answer() -> ApiError {
    ApiError::new(
        ErrorCode::Internal,
        "the leader gave another kind of answer than was asked for: the hosts run different versions",
    )
}

fn refused(error: ControllerError) -> RpcStatus {
    let code = match &error {
        ControllerError::NotLeader => NOT_LEADER,
        ControllerError::UnknownHost(_) => 404,
        _ => 409,
    };
    RpcStatus::new(code, error.to_string())
}

/// Waits until this host has applied a revision that the leader has, for a bounded time; whether it has.
async fn catch_up(mut states: watch::Receiver<Arc<State>>, revision: Revision) -> bool {
    let reached = states.wait_for(|state| state.revision >= revision);
    let reached = tokio::time::timeout(CATCH_UP, reached).await;
    reached.is_ok_and(|state| state.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_way_to_the_leader_is_not_told_as_a_lost_quorum() {
        let me: HostName = "h2".parse().unwrap();
        let error = no_way(&State::default(), &me, 7, "connection refused");
        assert_eq!(error.code, ErrorCode::Unreachable);
        assert!(error.message.contains("node 7 leads"), "{error:?}");
        assert!(!error.message.contains("no quorum"), "{error:?}");
        assert!(error.hint.unwrap().contains("from h2 to node 7"));
    }
}
