//! The redb file: log entries, vote, committed and purged pointers, format version, node id.
//!
//! Owns the database and is used by one thread only ([`super::writer`]). What always holds: one
//! operation is one durable commit (one fdatasync); entries are contiguous from `purged + 1` to `last`,
//! and both pointers are written in the same commit as the entries they describe, so [`LogFile::open`]
//! can tell a whole log from one that lost its tail. It must not decide anything about raft.

use std::path::{Path, PathBuf};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::NodeId;
use crate::codec::{self, CodecError};
use crate::error::OpenError;
use crate::types::{Entry, LogId, Vote};

/// Format this release writes, and the newest it reads.
pub(crate) const FORMAT_VERSION: u32 = 1;
const CACHE_BYTES: usize = 4 * 1024 * 1024;

const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("log");

const KEY_FORMAT: &str = "format_version";
const KEY_NODE: &str = "node_id";
const KEY_VOTE: &str = "vote";
const KEY_COMMITTED: &str = "committed";
const KEY_PURGED: &str = "purged";
const KEY_LAST: &str = "last";

/// A failed operation on the open file. Any of them is fatal for the node.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("database: {0}")]
    Database(#[from] redb::Error),
    #[error("contents: {0}")]
    Contents(#[from] CodecError),
    #[error("log index {found} does not follow {expected_after:?}")]
    Hole {
        found: u64,
        expected_after: Option<u64>,
    },
}

macro_rules! redb_error {
    ($($t:ty),*) => {$(
        impl From<$t> for FileError {
            fn from(e: $t) -> Self {
                Self::Database(e.into())
            }
        }
    )*};
}
redb_error!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

/// The open log file.
#[derive(Debug)]
pub(crate) struct LogFile {
    db: Database,
    vote: Option<Vote>,
    committed: Option<LogId>,
    committed_is_saved: bool,
    purged: Option<LogId>,
    last: Option<LogId>,
    refuse_holes: bool,
}

impl LogFile {
    /// Opens or creates `path` for `node_id` and reads the whole log once, to be sure of it.
    pub(crate) fn open(path: &Path, node_id: NodeId) -> Result<Self, OpenError> {
        Self::guarded(path, || {
            Builder::new().set_cache_size(CACHE_BYTES).create(path)
        })
        .and_then(|db| Self::check(db, path, node_id))
    }

    /// As [`LogFile::open`], on another backend. `path` names it in messages.
    pub(crate) fn open_with_backend(
        backend: impl redb::StorageBackend,
        path: &Path,
        node_id: NodeId,
    ) -> Result<Self, OpenError> {
        Self::guarded(path, || {
            Builder::new()
                .set_cache_size(CACHE_BYTES)
                .create_with_backend(backend)
        })
        .and_then(|db| Self::check(db, path, node_id))
    }

    /// redb reports most damage as an error; the rest is an assertion in its page parser.
    fn guarded(
        path: &Path,
        open: impl FnOnce() -> Result<Database, redb::DatabaseError>,
    ) -> Result<Database, OpenError> {
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(open));
        match opened {
            Ok(Ok(db)) => Ok(db),
            Ok(Err(redb::DatabaseError::DatabaseAlreadyOpen)) => Err(OpenError::InUse {
                path: path.to_path_buf(),
            }),
            Ok(Err(redb::DatabaseError::Storage(redb::StorageError::Io(source))))
                if source.kind() != std::io::ErrorKind::InvalidData
                    && source.kind() != std::io::ErrorKind::UnexpectedEof =>
            {
                Err(OpenError::Io {
                    path: path.to_path_buf(),
                    source,
                })
            }
            Ok(Err(e)) => Err(corrupt(path, e)),
            Err(_) => Err(corrupt(path, "its page structure is broken")),
        }
    }

    fn check(db: Database, path: &Path, node_id: NodeId) -> Result<Self, OpenError> {
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            Self::check_contents(&db, path, node_id)
        }));
        let loaded = match checked {
            Ok(result) => result?,
            Err(_) => return Err(corrupt(path, "its page structure is broken")),
        };
        Ok(Self {
            db,
            vote: loaded.vote,
            committed: loaded.committed,
            committed_is_saved: true,
            purged: loaded.purged,
            last: loaded.last,
            refuse_holes: true,
        })
    }

    /// openraft's storage suite breaks the rule it documents: it appends with holes and over the end.
    #[cfg(test)]
    pub(crate) fn allow_holes(mut self) -> Self {
        self.refuse_holes = false;
        self
    }

    fn check_contents(db: &Database, path: &Path, node_id: NodeId) -> Result<Loaded, OpenError> {
        let bad = |e: FileError| corrupt(path, e);
        let fresh = {
            let read = db.begin_read().map_err(|e| corrupt(path, e))?;
            match read.open_table(META) {
                Ok(_) => false,
                Err(redb::TableError::TableDoesNotExist(_)) => true,
                Err(e) => return Err(corrupt(path, e)),
            }
        };
        if fresh {
            create_tables(db, node_id).map_err(bad)?;
            return Ok(Loaded::default());
        }
        let read = db.begin_read().map_err(|e| corrupt(path, e))?;
        let meta = read.open_table(META).map_err(|e| corrupt(path, e))?;
        let found: u32 = get_text(&meta, KEY_FORMAT).map_err(bad)?.unwrap_or(0);
        if found != FORMAT_VERSION {
            return Err(OpenError::Format {
                path: path.to_path_buf(),
                found,
                supported: FORMAT_VERSION,
            });
        }
        let found: NodeId = get(&meta, KEY_NODE)
            .map_err(bad)?
            .ok_or_else(|| corrupt(path, "it names no node"))?;
        if found != node_id {
            return Err(OpenError::WrongNode {
                path: path.to_path_buf(),
                found,
                expected: node_id,
            });
        }
        let loaded = Loaded {
            vote: get(&meta, KEY_VOTE).map_err(bad)?,
            committed: get(&meta, KEY_COMMITTED).map_err(bad)?,
            purged: get(&meta, KEY_PURGED).map_err(bad)?,
            last: get(&meta, KEY_LAST).map_err(bad)?,
        };
        let log = read.open_table(LOG).map_err(|e| corrupt(path, e))?;
        let mut previous = loaded.purged;
        for row in log.iter().map_err(|e| corrupt(path, e))? {
            let (key, value) = row.map_err(|e| corrupt(path, e))?;
            let entry =
                codec::decode_entry(key.value(), value.value()).map_err(|e| corrupt(path, e))?;
            follows(previous.map(|p| p.index), key.value()).map_err(bad)?;
            previous = Some(entry.log_id);
        }
        if previous != loaded.last {
            return Err(corrupt(
                path,
                format!(
                    "the log ends at {previous:?} but {:?} was written",
                    loaded.last
                ),
            ));
        }
        Ok(loaded)
    }

    pub(crate) fn vote(&self) -> Option<Vote> {
        self.vote
    }

    pub(crate) fn committed(&self) -> Option<LogId> {
        self.committed
    }

    /// Last purged and last known log id.
    pub(crate) fn bounds(&self) -> (Option<LogId>, Option<LogId>) {
        (self.purged, self.last)
    }

    pub(crate) fn save_vote(&mut self, vote: Vote) -> Result<(), FileError> {
        self.commit(|txn| put(txn, KEY_VOTE, &vote))?;
        self.vote = Some(vote);
        Ok(())
    }

    /// Remembers the commit point; it becomes durable with the next commit or [`LogFile::flush`].
    ///
    /// It may lag behind after a crash: what it omits is learnt again from the leader.
    pub(crate) fn set_committed(&mut self, committed: Option<LogId>) {
        if self.committed != committed {
            self.committed = committed;
            self.committed_is_saved = false;
        }
    }

    pub(crate) fn flush(&mut self) -> Result<(), FileError> {
        if self.committed_is_saved {
            return Ok(());
        }
        self.commit(|_| Ok(()))
    }

    /// Appends encoded entries. They must follow the last one without a hole.
    pub(crate) fn append(&mut self, entries: &[(LogId, Vec<u8>)]) -> Result<(), FileError> {
        let Some((new_last, _)) = entries.last() else {
            return Ok(());
        };
        let mut previous = self.last.map(|l| l.index);
        for (log_id, _) in entries.iter().filter(|_| self.refuse_holes) {
            follows(previous, log_id.index)?;
            previous = Some(log_id.index);
        }
        let new_last = *new_last;
        self.commit(|txn| {
            let mut log = txn.open_table(LOG)?;
            for (log_id, bytes) in entries {
                log.insert(log_id.index, bytes.as_slice())?;
            }
            drop(log);
            put(txn, KEY_LAST, &Some(new_last))
        })?;
        self.last = Some(new_last);
        Ok(())
    }

    /// Removes the entries from `since` on.
    pub(crate) fn truncate(&mut self, since: u64) -> Result<(), FileError> {
        let mut new_last = self.purged;
        if let Some(before) = since.checked_sub(1)
            && let Some(entry) = self.read(before, since, usize::MAX)?.pop()
        {
            new_last = Some(entry.log_id);
        }
        self.commit(|txn| {
            txn.open_table(LOG)?.retain_in(since.., |_, _| false)?;
            put(txn, KEY_LAST, &new_last)
        })?;
        self.last = new_last;
        Ok(())
    }

    /// Removes the entries up to and including `upto`.
    pub(crate) fn purge(&mut self, upto: LogId) -> Result<(), FileError> {
        if self.purged >= Some(upto) {
            return Ok(());
        }
        let new_last = self.last.max(Some(upto));
        self.commit(|txn| {
            txn.open_table(LOG)?
                .retain_in(..=upto.index, |_, _| false)?;
            put(txn, KEY_PURGED, &Some(upto))?;
            put(txn, KEY_LAST, &new_last)
        })?;
        self.purged = Some(upto);
        self.last = new_last;
        Ok(())
    }

    /// Entries of `[start, end)`, at least one if there is one, then up to `max_bytes`.
    pub(crate) fn read(
        &self,
        start: u64,
        end: u64,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, FileError> {
        let mut out = Vec::new();
        let mut bytes = 0_usize;
        if start >= end {
            return Ok(out);
        }
        let read = self.db.begin_read()?;
        let log = read.open_table(LOG)?;
        for row in log.range(start..end)? {
            let (key, value) = row?;
            bytes = bytes.saturating_add(value.value().len());
            if !out.is_empty() && bytes > max_bytes {
                break;
            }
            out.push(codec::decode_entry(key.value(), value.value())?);
        }
        Ok(out)
    }

    /// One durable write transaction; the pending commit point rides along.
    fn commit(
        &mut self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), FileError>,
    ) -> Result<(), FileError> {
        let txn = self.db.begin_write()?;
        change(&txn)?;
        if !self.committed_is_saved {
            put(&txn, KEY_COMMITTED, &self.committed)?;
        }
        txn.commit()?;
        self.committed_is_saved = true;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Loaded {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
}

fn corrupt(path: &Path, reason: impl ToString) -> OpenError {
    OpenError::Corrupt {
        path: PathBuf::from(path),
        reason: reason.to_string(),
    }
}

fn follows(previous: Option<u64>, index: u64) -> Result<(), FileError> {
    match previous {
        Some(p) if index != p.saturating_add(1) => Err(FileError::Hole {
            found: index,
            expected_after: previous,
        }),
        _ => Ok(()),
    }
}

fn create_tables(db: &Database, node_id: NodeId) -> Result<(), FileError> {
    let txn = db.begin_write()?;
    txn.open_table(LOG)?;
    txn.open_table(META)?
        .insert(KEY_FORMAT, FORMAT_VERSION.to_string().as_bytes())?;
    put(&txn, KEY_NODE, &node_id)?;
    txn.commit()?;
    Ok(())
}

fn put<T: Serialize>(txn: &WriteTransaction, key: &str, value: &T) -> Result<(), FileError> {
    let json = codec::to_json("meta value", value)?;
    let mut bytes = codec::checksum(&[key.as_bytes(), &json]).to_vec();
    bytes.extend_from_slice(&json);
    txn.open_table(META)?.insert(key, bytes.as_slice())?;
    Ok(())
}

/// Absent keys are `None`; an `Option` that was stored as `None` too.
fn get<T: DeserializeOwned>(
    meta: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<T>, FileError> {
    let Some(guard) = meta.get(key)? else {
        return Ok(None);
    };
    let Some((sum, json)) = guard.value().split_at_checked(8) else {
        return Err(FileError::Contents(CodecError::Checksum {
            what: key.to_owned(),
        }));
    };
    if codec::checksum(&[key.as_bytes(), json]) != sum {
        return Err(FileError::Contents(CodecError::Checksum {
            what: key.to_owned(),
        }));
    }
    Ok(codec::from_json("meta value", json)?)
}

/// The format version is plain text, so that every release can read every other's.
fn get_text(
    meta: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<u32>, FileError> {
    let guard = meta.get(key)?;
    Ok(guard.and_then(|g| std::str::from_utf8(g.value()).ok()?.parse().ok()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::codec::encode_entry;
    use openraft::{CommittedLeaderId, EntryPayload};

    fn id(index: u64) -> LogId {
        LogId::new(CommittedLeaderId::new(1, 1), index)
    }

    fn rows(indexes: std::ops::Range<u64>) -> Vec<(LogId, Vec<u8>)> {
        indexes
            .map(|i| {
                let entry = Entry {
                    log_id: id(i),
                    payload: EntryPayload::Normal(vec![0; 100]),
                };
                (id(i), encode_entry(&entry).unwrap())
            })
            .collect()
    }

    fn indexes(file: &LogFile) -> Vec<u64> {
        let entries = file.read(0, u64::MAX, usize::MAX).unwrap();
        entries.iter().map(|e| e.log_id.index).collect()
    }

    #[test]
    fn pointers_follow_every_change_and_survive_a_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let mut file = LogFile::open(&path, 1).unwrap();
        assert_eq!(file.bounds(), (None, None));
        file.append(&rows(0..10)).unwrap();
        file.truncate(8).unwrap();
        assert_eq!(file.bounds(), (None, Some(id(7))));
        file.purge(id(2)).unwrap();
        file.purge(id(1)).unwrap();
        assert_eq!(file.bounds(), (Some(id(2)), Some(id(7))));
        file.set_committed(Some(id(6)));
        file.save_vote(Vote::new(4, 2)).unwrap();
        drop(file);

        let mut file = LogFile::open(&path, 1).unwrap();
        assert_eq!(indexes(&file), [3, 4, 5, 6, 7]);
        assert_eq!(file.bounds(), (Some(id(2)), Some(id(7))));
        assert_eq!(file.committed(), Some(id(6)));
        assert_eq!(file.vote(), Some(Vote::new(4, 2)));
        file.truncate(3).unwrap();
        assert_eq!(file.bounds(), (Some(id(2)), Some(id(2))));
        // A snapshot that reaches beyond the log.
        file.purge(id(50)).unwrap();
        assert_eq!(file.bounds(), (Some(id(50)), Some(id(50))));
        drop(file);
        let mut file = LogFile::open(&path, 1).unwrap();
        file.append(&rows(51..53)).unwrap();
        assert_eq!(indexes(&file), [51, 52]);
    }

    #[test]
    fn holes_are_refused_and_reads_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = LogFile::open(&dir.path().join("raft.redb"), 1).unwrap();
        file.append(&rows(0..5)).unwrap();
        for wrong in [6..7, 3..4] {
            let error = file.append(&rows(wrong)).unwrap_err();
            assert!(matches!(error, FileError::Hole { .. }), "{error}");
        }
        assert_eq!(indexes(&file), [0, 1, 2, 3, 4]);
        assert_eq!(file.read(0, 5, 1).unwrap().len(), 1);
        assert_eq!(file.read(0, 5, 300).unwrap().len(), 2);
        assert_eq!(file.read(2, 4, usize::MAX).unwrap().len(), 2);
        assert!(file.read(4, 4, usize::MAX).unwrap().is_empty());
    }

    #[test]
    fn a_newer_format_and_a_lost_tail_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let mut file = LogFile::open(&path, 1).unwrap();
        file.append(&rows(0..5)).unwrap();
        drop(file);

        let db = Database::open(&path).unwrap();
        let txn = db.begin_write().unwrap();
        txn.open_table(LOG).unwrap().remove(4).unwrap();
        txn.commit().unwrap();
        drop(db);
        let error = LogFile::open(&path, 1).unwrap_err();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");

        let db = Database::open(&path).unwrap();
        let txn = db.begin_write().unwrap();
        txn.open_table(META)
            .unwrap()
            .insert(KEY_FORMAT, b"2".as_slice())
            .unwrap();
        txn.commit().unwrap();
        drop(db);
        let error = LogFile::open(&path, 1).unwrap_err();
        assert!(
            matches!(
                error,
                OpenError::Format {
                    found: 2,
                    supported: 1,
                    ..
                }
            ),
            "{error}"
        );
    }
}
