//! The durable log as openraft sees it.
//!
//! Owns the request channel to the log thread and a small cache of the newest entries, so that applying
//! and replicating fresh entries does not wait behind an fsync. What always holds: an entry enters the
//! cache after it is durable, and leaves it before it is truncated or purged from the file. Vote and log
//! writes go through one queue, hence are serialised. It must not interpret commands.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, PoisonError};

use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{AnyError, EntryPayload, OptionalSend, RaftLogReader};
use tokio::sync::{mpsc, oneshot};

use crate::codec;
use crate::error::OpenError;
use crate::fault::FaultCell;
use crate::quorum::AckTable;
use crate::types::{Entry, LogId, StorageError, StorageIOError, TypeConfig, Vote};
use writer::{FileState, Request};

pub(crate) mod file;
mod writer;

/// Newest entries kept in memory.
const CACHE_ENTRIES: usize = 512;
const CACHE_BYTES: usize = 2 * 1024 * 1024;
/// One replication message carries at least one entry and then at most this many bytes.
const REPLICATION_BYTES: usize = 1024 * 1024;

#[derive(Debug, Default)]
struct Recent {
    entries: BTreeMap<u64, Entry>,
    bytes: usize,
}

impl Recent {
    fn push(&mut self, entry: Entry) {
        self.bytes += weight(&entry);
        self.entries.insert(entry.log_id.index, entry);
        while self.entries.len() > CACHE_ENTRIES || self.bytes > CACHE_BYTES {
            match self.entries.pop_first() {
                Some((_, old)) => self.bytes -= weight(&old),
                None => break,
            }
        }
    }

    fn keep(&mut self, range: impl RangeBounds<u64>) {
        self.entries.retain(|index, _| range.contains(index));
        self.bytes = self.entries.values().map(weight).sum();
    }

    /// The whole of `[start, end)`, or nothing.
    fn get(&self, start: u64, end: u64, max_bytes: usize) -> Option<Vec<Entry>> {
        let (first, _) = self.entries.first_key_value()?;
        let (last, _) = self.entries.last_key_value()?;
        if start < *first || end > last.saturating_add(1) || start >= end {
            return None;
        }
        let mut bytes = 0;
        let mut out = Vec::new();
        for (_, entry) in self.entries.range(start..end) {
            bytes += weight(entry);
            if !out.is_empty() && bytes > max_bytes {
                break;
            }
            out.push(entry.clone());
        }
        Some(out)
    }
}

fn weight(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(command) => command.len() + 64,
        _ => 256,
    }
}

/// Cheap handle to the log; also the reader of the replication tasks.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    requests: mpsc::Sender<Request>,
    recent: Arc<Mutex<Recent>>,
    acks: Arc<AckTable>,
}

impl LogStore {
    /// Starts the log thread, which opens the file. Blocks on the disk.
    pub(crate) fn open(
        open: impl FnOnce() -> Result<file::LogFile, OpenError> + Send + 'static,
        acks: Arc<AckTable>,
        fault: FaultCell,
    ) -> Result<Self, OpenError> {
        Ok(Self {
            requests: writer::spawn(open, fault)?,
            recent: Arc::default(),
            acks,
        })
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Request,
    ) -> Result<T, String> {
        let (answer, reply) = oneshot::channel();
        let closed = || "the log is closed".to_owned();
        self.requests
            .send(request(answer))
            .await
            .map_err(|_| closed())?;
        reply.await.map_err(|_| closed())?
    }

    /// Makes the commit point durable if it is not.
    pub(crate) async fn flush(&self) -> Result<(), String> {
        self.ask(Request::Flush).await
    }

    /// Last purged log id.
    pub(crate) async fn purged(&self) -> Result<Option<LogId>, String> {
        self.ask(Request::State).await.map(|s| s.purged)
    }

    /// Closes the file and waits until its lock is released. Everything asked later fails.
    pub(crate) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.requests.send(Request::Close(done)).await.is_ok() {
            let _ = closed.await;
        }
    }

    /// As [`LogStore::close`], on a blocking thread.
    pub(crate) fn close_blocking(&self) {
        let (done, closed) = oneshot::channel();
        if self.requests.blocking_send(Request::Close(done)).is_ok() {
            let _ = closed.blocking_recv();
        }
    }

    fn cache<R>(&self, f: impl FnOnce(&mut Recent) -> R) -> R {
        f(&mut self.recent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn read(&self, start: u64, end: u64, max: usize) -> Result<Vec<Entry>, StorageError> {
        if let Some(entries) = self.cache(|c| c.get(start, end, max)) {
            return Ok(entries);
        }
        self.ask(|answer| Request::Read {
            start,
            end,
            max_bytes: max,
            answer,
        })
        .await
        .map_err(|e| StorageIOError::read_logs(AnyError::error(e)).into())
    }

    async fn state(&self) -> Result<FileState, StorageError> {
        self.ask(Request::State)
            .await
            .map_err(|e| StorageIOError::read(AnyError::error(e)).into())
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let start = match range.start_bound() {
            Bound::Included(s) => *s,
            Bound::Excluded(s) => s.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(e) => e.saturating_add(1),
            Bound::Excluded(e) => *e,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end, usize::MAX).await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, StorageError> {
        self.read(start, end, REPLICATION_BYTES).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let state = self.state().await?;
        Ok(LogState {
            last_purged_log_id: state.purged,
            last_log_id: state.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        self.ask(|answer| Request::SaveVote(*vote, answer))
            .await
            .map_err(|e| StorageIOError::write_vote(AnyError::error(e)).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        Ok(self.state().await?.vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        self.ask(|answer| Request::SetCommitted(committed, answer))
            .await
            .map_err(|e| StorageIOError::write(AnyError::error(e)).into())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(self.state().await?.committed)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let mut encoded = Vec::with_capacity(entries.len());
        for entry in &entries {
            if let EntryPayload::Membership(m) = &entry.payload {
                self.acks.note_membership(entry.log_id, m);
            }
            let bytes = codec::encode_entry(entry)
                .map_err(|e| StorageIOError::write_log_entry(entry.log_id, AnyError::error(e)))?;
            encoded.push((entry.log_id, bytes));
        }
        let stored = self.ask(|answer| Request::Append(encoded, answer)).await;
        if stored.is_ok() {
            self.cache(|c| entries.into_iter().for_each(|e| c.push(e)));
        }
        callback.log_io_completed(stored.map_err(std::io::Error::other));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.cache(|c| c.keep(..log_id.index));
        self.ask(|answer| Request::Truncate(log_id.index, answer))
            .await
            .map_err(|e| StorageError::from(StorageIOError::write_logs(AnyError::error(e))))?;
        self.acks.forget_membership(log_id.index);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.cache(|c| c.keep(log_id.index.saturating_add(1)..));
        self.ask(|answer| Request::Purge(log_id, answer))
            .await
            .map_err(|e| StorageIOError::write_logs(AnyError::error(e)).into())
    }
}
