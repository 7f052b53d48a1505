//! Requests of peers: the receiving side of [`PeerLink`](crate::PeerLink).
//!
//! What always holds: a request of a live leader advances `contact`, and nothing else does; at most
//! [`INBOUND`] requests are worked on at once; after a failure all are refused. It must not trust sizes in
//! headers.

use openraft::error::RaftError;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, VoteRequest,
};
use tokio::sync::Semaphore;

use crate::RaftMethod;
use crate::clock::BootTime;
use crate::codec::{self, CodecError};
use crate::driver::Shared;
use crate::error::HandleError;
use crate::network::{
    AppendAnswer, AppendHeader, SnapshotAnswer, SnapshotHeader, VoteAnswer, VoteHeader, Voted,
};

const INBOUND: usize = 64;
/// Twice what this release sends in one chunk.
const MAX_CHUNK_BYTES: usize = 2 * 1024 * 1024;

/// Bounds the requests of peers.
#[derive(Debug)]
pub(crate) struct Inbound {
    permits: Semaphore,
    max_snapshot_bytes: u64,
}

impl Inbound {
    pub(crate) fn new(max_snapshot_bytes: u64) -> Self {
        Self {
            permits: Semaphore::new(INBOUND),
            max_snapshot_bytes,
        }
    }

    pub(crate) async fn handle(
        &self,
        shared: &Shared,
        method: RaftMethod,
        body: &[u8],
    ) -> Result<Vec<u8>, HandleError> {
        shared.fault.check().map_err(HandleError::Stopped)?;
        let _permit = self.permits.try_acquire().map_err(|_| HandleError::Busy)?;
        let answer = match method {
            RaftMethod::Append => append(shared, body).await,
            RaftMethod::Vote => vote(shared, body).await,
            RaftMethod::Snapshot => self.snapshot(shared, body).await,
        }?;
        // An answer counts only if the right to give it held until it was complete.
        shared.fault.check().map_err(HandleError::Stopped)?;
        Ok(answer)
    }

    async fn snapshot(&self, shared: &Shared, body: &[u8]) -> Result<Vec<u8>, HandleError> {
        let (header, data): (SnapshotHeader, _) = codec::unframe(body).map_err(malformed)?;
        let end = header.offset.saturating_add(data.len() as u64);
        if data.len() > MAX_CHUNK_BYTES || end > self.max_snapshot_bytes {
            return Err(HandleError::Malformed(format!(
                "a snapshot of at least {end} bytes, at most {} are accepted",
                self.max_snapshot_bytes
            )));
        }
        let vote = header.vote;
        let request = InstallSnapshotRequest {
            vote,
            meta: header.meta,
            offset: header.offset,
            data: data.to_vec(),
            done: header.done,
        };
        shared.note_request(vote);
        let answer: SnapshotAnswer = match shared.raft.install_snapshot(request).await {
            Ok(answer) => Ok(answer),
            Err(RaftError::APIError(e)) => Err(e),
            Err(RaftError::Fatal(e)) => return Err(stopped(shared, &e)),
        };
        if answer.as_ref().is_ok_and(|a| a.vote <= vote) {
            shared.contact.advance(BootTime::now());
        }
        codec::frame(&answer, &[]).map_err(malformed)
    }
}

fn malformed(e: CodecError) -> HandleError {
    HandleError::Malformed(e.to_string())
}

fn stopped(shared: &Shared, e: &impl ToString) -> HandleError {
    HandleError::Stopped(shared.fault.reason().unwrap_or_else(|| e.to_string()))
}

async fn append(shared: &Shared, body: &[u8]) -> Result<Vec<u8>, HandleError> {
    let (header, tail): (AppendHeader, _) = codec::unframe(body).map_err(malformed)?;
    if !header.majority {
        return codec::frame(&AppendAnswer::Here, &[]).map_err(malformed);
    }
    let request = AppendEntriesRequest {
        vote: header.vote,
        prev_log_id: header.previous,
        entries: codec::decode_entries(tail).map_err(malformed)?,
        leader_commit: header.commit,
    };
    shared.note_request(header.vote);
    let answer = shared
        .raft
        .append_entries(request)
        .await
        .map_err(|e| stopped(shared, &e))?;
    if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
        shared.contact.advance(BootTime::now());
    }
    codec::frame(&AppendAnswer::Raft(answer), &[]).map_err(malformed)
}

async fn vote(shared: &Shared, body: &[u8]) -> Result<Vec<u8>, HandleError> {
    let answer = match codec::unframe(body).map_err(malformed)?.0 {
        VoteHeader::Ask { last } => VoteAnswer::Ask {
            granted: shared.would_vote(last),
        },
        VoteHeader::Vote { vote, last } => {
            let request = VoteRequest {
                vote,
                last_log_id: last,
            };
            let ceding = shared.quiet.cede();
            let answer = shared.raft.vote(request).await;
            let answer = answer.map_err(|e| stopped(shared, &e))?;
            let mut quiet_ms = 0;
            if answer.vote_granted {
                shared.voted.advance(BootTime::now());
                let quiet = ceding.granted(vote.leader_id.term);
                quiet_ms = u64::try_from(quiet.as_millis()).unwrap_or(u64::MAX);
            }
            VoteAnswer::Vote(Voted { answer, quiet_ms })
        }
    };
    codec::frame(&answer, &[]).map_err(malformed)
}
