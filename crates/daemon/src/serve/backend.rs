//! The API's view of the daemon.

use super::console;
use super::core::{Core, wrong_answer};
use super::drill;
use super::group::wall_clock;
use super::images;
use super::look;
use super::peer::{Answer, Ask};
use super::take;
use async_trait::async_trait;
use quorate_api::quorum::QuorumView;
use quorate_api::storage::{DrillView, PoolLook, StrangersSeen};
use quorate_api::view::{ClusterView, JoinToken, PlacementView};
use quorate_api::{
    Answering, ApiError, Backend, Console, ErrorCode, LogOptions, LogStream, Observed,
    ObservedHost, ObservedVote,
};
use quorate_controller::{HostPicture, Picture, VotePicture};
use quorate_planner::{SNAPSHOT_FORMAT, Snapshot};
use quorate_state::{Command, Outcome, State};
use quorate_types::{
    HostName, ImageJob, ImageRef, ImageSnapshot, ImageTask, Millis, PoolName, Timestamp, VmName,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long this host may need to have what the leader's picture goes with.
const CATCH_UP: Duration = Duration::from_secs(5);
/// How long an operator's fencing may take.
const FENCE_TIMEOUT: Duration = Duration::from_secs(90);

/// [`Backend`] over the daemon's parts.
pub(crate) struct Daemon(pub(crate) Arc<Core>);

fn observed_vote(vote: VotePicture) -> ObservedVote {
    ObservedVote {
        silent: vote.silent,
        caught_up: vote.caught_up,
    }
}

fn observed(picture: Picture) -> Observed {
    let host = |host: HostPicture| ObservedHost {
        health: host.health,
        lease_left: host.lease_left,
        report: host.report,
        fencing: host.fencing,
    };
    Observed {
        leader: Some(picture.leader),
        quorate: picture.quorate,
        voters: picture.voters,
        votes: picture
            .votes
            .into_iter()
            .map(|(node, vote)| (node, observed_vote(vote)))
            .collect(),
        hosts: picture
            .hosts
            .into_iter()
            .map(|(name, of)| (name, host(of)))
            .collect(),
        waiting: picture.waiting,
        problems: picture.problems,
        advice: picture.advice,
        services: picture.services,
    }
}

#[async_trait]
impl Backend for Daemon {
    fn host(&self) -> HostName {
        self.0.me.clone()
    }

    fn states(&self) -> watch::Receiver<Arc<State>> {
        self.0.states.clone()
    }

    async fn view(&self) -> Result<ClusterView, ApiError> {
        let me = Answering {
            host: self.0.me.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let observed = self.0.picture().await.ok().map(observed);
        Ok(quorate_api::build(&self.0.state(), observed.as_ref(), &me))
    }

    async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ApiError> {
        if let Command::RequestMove { vm, to } = &command {
            self.check_move(vm, to.as_ref()).await?;
        }
        self.0.propose(by, command).await
    }

    async fn quorum(&self) -> Result<QuorumView, ApiError> {
        let observed = self.0.picture().await.ok().map(observed);
        Ok(quorate_api::build_quorum(
            &self.0.state(),
            observed.as_ref(),
        ))
    }

    async fn trace_here(
        &self,
        query: &quorate_balancer::TraceQuery,
    ) -> Option<quorate_balancer::TraceAnswer> {
        self.0.agent.datapath().trace(query).await.ok()
    }

    async fn check_witness_disk(
        &self,
        pool: &PoolName,
        disk: &str,
        force: bool,
    ) -> Result<Vec<String>, ApiError> {
        super::witness::check(&self.0, pool, disk, force).await
    }

    async fn create_token(
        &self,
        by: &str,
        ttl: Millis,
        witness: bool,
    ) -> Result<JoinToken, ApiError> {
        let internal = |text: String| ApiError::new(ErrorCode::Internal, text);
        let secret = quorate_transport::TokenSecret::generate()
            .map_err(|error| internal(error.to_string()))?;
        let expires = Timestamp(wall_clock().0.saturating_add(ttl.0));
        let hash = secret.hash();
        let command = match witness {
            false => Command::CreateToken { hash, expires },
            true => Command::CreateWitnessToken { hash, expires },
        };
        self.0.propose(by, command).await?;
        let state = self.0.state();
        let cluster = state.cluster.as_ref().ok_or_else(ApiError::no_quorum)?;
        let ca =
            quorate_transport::Ca::from_pem(&cluster.id, &cluster.ca_certificate, &cluster.ca_key);
        let fingerprint = ca
            .and_then(|ca| ca.fingerprint())
            .map_err(|error| internal(error.to_string()))?;
        // This host first: it is known to be up.
        let mut hosts: Vec<_> = state.hosts.iter().collect();
        hosts.sort_by_key(|(name, _)| **name != self.0.me);
        let token = quorate_transport::JoinToken {
            addresses: hosts
                .into_iter()
                .map(|(_, record)| record.address.clone())
                .collect(),
            cluster: cluster.id.clone(),
            ca_fingerprint: fingerprint,
            secret,
        };
        Ok(JoinToken {
            token: token.to_string(),
            expires,
        })
    }

    async fn fence(&self, by: &str, host: &HostName) -> Result<String, ApiError> {
        self.done(Ask::Fence {
            host: host.clone(),
            who: by.to_owned(),
        })
        .await
    }

    async fn confirm_dead(&self, by: &str, host: &HostName) -> Result<String, ApiError> {
        self.done(Ask::ConfirmDead {
            host: host.clone(),
            who: by.to_owned(),
        })
        .await
    }

    async fn console(&self, vm: &VmName) -> Result<Console, ApiError> {
        console::console(Arc::clone(&self.0), vm.clone()).await
    }

    async fn logs(&self, vm: &VmName, options: LogOptions) -> Result<LogStream, ApiError> {
        console::logs(Arc::clone(&self.0), vm.clone(), options).await
    }

    async fn observed(&self) -> Option<Observed> {
        self.0.picture().await.ok().map(observed)
    }

    async fn look_into(&self, pool: &PoolName) -> Result<PoolLook, ApiError> {
        look::anywhere(&self.0, pool).await
    }

    async fn drill(
        &self,
        by: &str,
        pool: &PoolName,
        image: Option<String>,
    ) -> Result<DrillView, ApiError> {
        let drill = drill::run(&self.0, by, pool, image).await;
        drill.map_err(|error| ApiError::new(ErrorCode::Conflict, error))
    }

    async fn strangers(&self, pool: &PoolName, image: &str) -> Result<StrangersSeen, ApiError> {
        take::anywhere(&self.0, pool, image).await
    }

    async fn image_job(&self, by: &str, task: ImageTask) -> Result<ImageJob, ApiError> {
        images::submit(&self.0, by, task).await
    }

    async fn image_jobs(&self) -> Result<Vec<ImageJob>, ApiError> {
        Ok(images::list(&self.0).await)
    }

    async fn find_image_job(&self, id: &str) -> Result<ImageJob, ApiError> {
        images::get(&self.0, id, false).await
    }

    async fn cancel_image_job(&self, id: &str) -> Result<ImageJob, ApiError> {
        images::get(&self.0, id, true).await
    }

    async fn image_snapshots(&self, image: &ImageRef) -> Result<Vec<ImageSnapshot>, ApiError> {
        images::snapshots(&self.0, image).await
    }

    async fn snapshot(&self) -> Result<Snapshot, ApiError> {
        let Answer::Seen { revision, seen } =
            self.0.at_leader(Ask::Seen, Duration::from_secs(5)).await?
        else {
            return Err(wrong_answer());
        };
        let state = self.applied_at_least(revision, CATCH_UP).await?;
        Ok(Snapshot {
            format: SNAPSHOT_FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            saved: wall_clock(),
            state: state.as_ref().clone(),
            seen: *seen,
        })
    }

    async fn placement(&self, vm: &VmName) -> Option<PlacementView> {
        match self
            .0
            .at_leader(Ask::Explain { vm: vm.clone() }, Duration::from_secs(2))
            .await
        {
            Ok(Answer::Explanation(Some(found))) => Some(PlacementView {
                best: found.best,
                candidates: found.candidates,
            }),
            _ => None,
        }
    }
}

impl Daemon {
    /// Refuses a move that cannot be made at once, with the reasons, instead of leaving it to fail later.
    async fn check_move(&self, vm: &VmName, to: Option<&HostName>) -> Result<(), ApiError> {
        let ask = Ask::WhatMove {
            vm: vm.clone(),
            to: to.cloned(),
        };
        match self.0.at_leader(ask, Duration::from_secs(5)).await? {
            Answer::Move(Ok(_)) => Ok(()),
            Answer::Move(Err(reason)) => {
                let mut text = reason.summary;
                for candidate in reason
                    .candidates
                    .iter()
                    .filter(|candidate| candidate.score.is_none())
                {
                    text.push_str(&format!("; {}: {}", candidate.host, candidate.why));
                }
                Err(ApiError::new(ErrorCode::Conflict, text))
            }
            _ => Err(wrong_answer()),
        }
    }

    async fn done(&self, ask: Ask) -> Result<String, ApiError> {
        match self.0.at_leader(ask, FENCE_TIMEOUT).await? {
            Answer::Done(text) => Ok(text),
            _ => Err(wrong_answer()),
        }
    }
}
