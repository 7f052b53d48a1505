//! The thread that owns the log file.
//!
//! What always holds: requests run one at a time in the order they were sent, each is durable before it
//! is answered, and after the first failure none succeeds any more ([`FaultCell`]). The queue is bounded;
//! senders wait. It must not run on the async workers: an fsync may take long.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc as std_mpsc;

use tokio::sync::{mpsc, oneshot};

use super::file::{FileError, LogFile};
use crate::error::OpenError;
use crate::fault::FaultCell;
use crate::types::{Entry, LogId, Vote};

/// Requests that may wait for the disk at once. openraft itself has at most one write in flight.
const QUEUE: usize = 64;

type Answer<T> = oneshot::Sender<Result<T, String>>;

/// What the log file was asked for.
#[derive(Debug)]
pub(super) enum Request {
    State(Answer<FileState>),
    SaveVote(Vote, Answer<()>),
    SetCommitted(Option<LogId>, Answer<()>),
    Flush(Answer<()>),
    Append(Vec<(LogId, Vec<u8>)>, Answer<()>),
    Truncate(u64, Answer<()>),
    Purge(LogId, Answer<()>),
    Read {
        start: u64,
        end: u64,
        max_bytes: usize,
        answer: Answer<Vec<Entry>>,
    },
    Close(oneshot::Sender<()>),
}

/// Pointers kept in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileState {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    pub(super) last: Option<LogId>,
}

/// Starts the thread; it opens the file itself, so the database never changes hands.
pub(super) fn spawn(
    open: impl FnOnce() -> Result<LogFile, OpenError> + Send + 'static,
    fault: FaultCell,
) -> Result<mpsc::Sender<Request>, OpenError> {
    let (requests, inbox) = mpsc::channel(QUEUE);
    let (opened_tx, opened_rx) = std_mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("raft-log".into())
        .spawn(move || {
            let file = match open() {
                Ok(file) => file,
                Err(e) => {
                    let _ = opened_tx.send(Err(e));
                    return;
                }
            };
            let _ = opened_tx.send(Ok(()));
            run(file, inbox, &fault);
        })
        .map_err(|e| OpenError::Start {
            reason: format!("no thread for the log: {e}"),
        })?;
    match opened_rx.recv() {
        Ok(result) => result.map(|()| requests),
        Err(_) => Err(OpenError::Start {
            reason: "the log thread ended while it opened the log".into(),
        }),
    }
}

fn run(mut file: LogFile, mut inbox: mpsc::Receiver<Request>, fault: &FaultCell) {
    while let Some(request) = inbox.blocking_recv() {
        if let Request::Close(done) = request {
            if fault.check().is_ok() {
                let _ = attempt(fault, || file.flush());
            }
            drop(file);
            let _ = done.send(());
            return;
        }
        serve(&mut file, request, fault);
    }
    if fault.check().is_ok() {
        let _ = attempt(fault, || file.flush());
    }
}

fn serve(file: &mut LogFile, request: Request, fault: &FaultCell) {
    match request {
        Request::State(answer) => {
            let (purged, last) = file.bounds();
            let state = FileState {
                vote: file.vote(),
                committed: file.committed(),
                purged,
                last,
            };
            let _ = answer.send(Ok(state));
        }
        Request::SaveVote(vote, answer) => {
            let _ = answer.send(attempt(fault, || file.save_vote(vote)));
        }
        Request::SetCommitted(committed, answer) => {
            file.set_committed(committed);
            let _ = answer.send(attempt(fault, || Ok(())));
        }
        Request::Flush(answer) => {
            let _ = answer.send(attempt(fault, || file.flush()));
        }
        Request::Append(entries, answer) => {
            let _ = answer.send(attempt(fault, || file.append(&entries)));
        }
        Request::Truncate(since, answer) => {
            let _ = answer.send(attempt(fault, || file.truncate(since)));
        }
        Request::Purge(upto, answer) => {
            let _ = answer.send(attempt(fault, || file.purge(upto)));
        }
        Request::Read {
            start,
            end,
            max_bytes,
            answer,
        } => {
            let _ = answer.send(attempt(fault, || file.read(start, end, max_bytes)));
        }
        // Handled by the loop, which owns the file.
        Request::Close(done) => {
            let _ = done.send(());
        }
    }
}

/// Runs one operation; a failure or a panic is fatal for good.
fn attempt<T>(
    fault: &FaultCell,
    operation: impl FnOnce() -> Result<T, FileError>,
) -> Result<T, String> {
    fault.check()?;
    match catch_unwind(AssertUnwindSafe(operation)) {
        // What was stored after the end of a tenure may be in a file that nobody will read again.
        Ok(Ok(value)) => fault.check().map(|()| value),
        Ok(Err(e)) => Err(fault.report(format!("the log could not be stored: {e}"))),
        Err(_) => Err(fault.report("the log could not be stored: its page structure is broken")),
    }
}
