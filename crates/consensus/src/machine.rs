//! The user's state machine as openraft sees it.
//!
//! Owns the machine behind a lock that is never held across an await, and the last applied log id beside
//! it, so that a snapshot and its log id always belong together. What always holds: entries are applied in
//! log order, once per process; `applied` moves after the machine did. The machine lives in memory: at
//! start it is restored from the snapshot file and openraft applies the committed rest of the log again.
//! It must not write anything but snapshots.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError, RwLock};

use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, EntryPayload, ErrorSubject, ErrorVerb, OptionalSend, RaftSnapshotBuilder, Snapshot,
};
use tokio::sync::watch;

use crate::StateMachine;
use crate::error::OpenError;
use crate::fault::FaultCell;
use crate::snapshot::{SnapshotStore, StoredSnapshot};
use crate::types::{
    Entry, LogId, SnapshotMeta, StorageError, StorageIOError, StoredMembership, TypeConfig,
};

/// The machine with what openraft must know about it.
#[derive(Debug)]
pub(crate) struct Applied<M> {
    pub(crate) machine: M,
    last: Option<LogId>,
    membership: StoredMembership,
}

/// openraft's view of the machine; clones share it.
#[derive(Debug)]
pub(crate) struct MachineStore<M> {
    applied: Arc<RwLock<Applied<M>>>,
    snapshots: Arc<SnapshotStore>,
    index: watch::Sender<u64>,
    fault: FaultCell,
}

impl<M> Clone for MachineStore<M> {
    fn clone(&self) -> Self {
        Self {
            applied: Arc::clone(&self.applied),
            snapshots: Arc::clone(&self.snapshots),
            index: self.index.clone(),
            fault: self.fault.clone(),
        }
    }
}

impl<M: StateMachine> MachineStore<M> {
    /// Restores `machine` from `snapshot`, if there is one.
    pub(crate) fn new(
        mut machine: M,
        snapshots: SnapshotStore,
        snapshot: Option<StoredSnapshot>,
        fault: FaultCell,
    ) -> Result<Self, OpenError> {
        let mut last = None;
        let mut membership = StoredMembership::default();
        if let Some(snapshot) = snapshot {
            machine
                .restore(&snapshot.state)
                .map_err(|reason| OpenError::Restore {
                    path: snapshots.path(),
                    reason,
                })?;
            last = snapshot.meta.last_log_id;
            membership = snapshot.meta.last_membership;
        }
        let index = watch::Sender::new(last.map_or(0, |l| l.index));
        Ok(Self {
            applied: Arc::new(RwLock::new(Applied {
                machine,
                last,
                membership,
            })),
            snapshots: Arc::new(snapshots),
            index,
            fault,
        })
    }

    pub(crate) fn last_applied(&self) -> Option<LogId> {
        self.applied
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .last
    }

    /// Where snapshots are stored.
    pub(crate) fn snapshots(&self) -> &Arc<SnapshotStore> {
        &self.snapshots
    }

    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.index.subscribe()
    }

    pub(crate) fn read<R>(&self, f: impl FnOnce(&M) -> R) -> R {
        let applied = self.applied.read().unwrap_or_else(PoisonError::into_inner);
        f(&applied.machine)
    }

    fn apply_batch(&self, entries: impl Iterator<Item = Entry>) -> Vec<Vec<u8>> {
        let mut replies = Vec::new();
        let mut applied = self.applied.write().unwrap_or_else(PoisonError::into_inner);
        for entry in entries {
            let reply = match entry.payload {
                EntryPayload::Blank => Vec::new(),
                EntryPayload::Normal(command) => {
                    applied.machine.apply(entry.log_id.index, &command)
                }
                EntryPayload::Membership(m) => {
                    applied.membership = StoredMembership::new(Some(entry.log_id), m);
                    Vec::new()
                }
            };
            applied.last = Some(entry.log_id);
            replies.push(reply);
        }
        let index = applied.last.map_or(0, |l| l.index);
        drop(applied);
        self.index.send_replace(index);
        replies
    }

    /// Takes and stores a snapshot of what is applied now.
    fn take_snapshot(&self) -> std::io::Result<(SnapshotMeta, Vec<u8>)> {
        let applied = self.applied.read().unwrap_or_else(PoisonError::into_inner);
        let state = applied.machine.snapshot();
        let meta = SnapshotMeta {
            last_log_id: applied.last,
            last_membership: applied.membership.clone(),
            snapshot_id: applied.last.map_or_else(
                || "empty".to_owned(),
                |l| format!("{}-{}-{}", l.leader_id.term, l.leader_id.node_id, l.index),
            ),
        };
        drop(applied);
        self.snapshots.save(&meta, &state)?;
        Ok((meta, state))
    }

    /// Replaces the machine by a snapshot of the leader and stores it.
    fn install(&self, meta: &SnapshotMeta, state: &[u8]) -> std::io::Result<()> {
        let mut applied = self.applied.write().unwrap_or_else(PoisonError::into_inner);
        applied
            .machine
            .restore(state)
            .map_err(std::io::Error::other)?;
        applied.last = meta.last_log_id;
        applied.membership = meta.last_membership.clone();
        drop(applied);
        self.snapshots.save(meta, state)?;
        self.index
            .send_replace(meta.last_log_id.map_or(0, |l| l.index));
        Ok(())
    }

    /// Runs snapshot work on a blocking thread; a failure or a panic is fatal for the node.
    async fn blocking<R: Send + 'static>(
        &self,
        verb: ErrorVerb,
        work: impl FnOnce(&Self) -> std::io::Result<R> + Send + 'static,
    ) -> Result<R, StorageError> {
        let this = self.clone();
        let reason = match tokio::task::spawn_blocking(move || work(&this)).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        };
        let reason = if self.snapshots.is_closed() {
            reason
        } else {
            let path = self.snapshots.path();
            self.fault
                .report(format!("snapshot {}: {reason}", path.display()))
        };
        Err(StorageIOError::new(ErrorSubject::Snapshot(None), verb, AnyError::error(reason)).into())
    }
}

/// Builds a snapshot beside the running machine.
#[derive(Debug)]
pub(crate) struct Builder<M>(MachineStore<M>);

impl<M: StateMachine> RaftSnapshotBuilder<TypeConfig> for Builder<M> {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError> {
        let (meta, state) = self
            .0
            .blocking(ErrorVerb::Write, MachineStore::take_snapshot)
            .await?;
        Ok(Snapshot {
            meta,
            snapshot: Box::new(Cursor::new(state)),
        })
    }
}

impl<M: StateMachine> RaftStateMachine<TypeConfig> for MachineStore<M> {
    type SnapshotBuilder = Builder<M>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        let applied = self.applied.read().unwrap_or_else(PoisonError::into_inner);
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Vec<u8>>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter();
        // A panicking machine is half changed: better no node than a node with another state.
        match catch_unwind(AssertUnwindSafe(|| self.apply_batch(entries))) {
            Ok(replies) => Ok(replies),
            Err(_) => {
                let reason = self
                    .fault
                    .report("the state machine panicked while it applied a command");
                Err(StorageIOError::write_state_machine(AnyError::error(reason)).into())
            }
        }
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        Builder(self.clone())
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let meta = meta.clone();
        self.blocking(ErrorVerb::Write, move |this| {
            this.install(&meta, snapshot.get_ref())
        })
        .await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        let stored = self
            .blocking(ErrorVerb::Read, |this| this.snapshots.load())
            .await?;
        Ok(stored.map(|s| Snapshot {
            meta: s.meta,
            snapshot: Box::new(Cursor::new(s.state)),
        }))
    }
}
