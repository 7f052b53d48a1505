//! What the agent must not forget: one durable entry per VM.
//!
//! Always holds: `closed` and `told` only grow; a [`LedgerRecord`] is on disk before any effect that
//! follows it is carried out, so that a restarted agent never starts a closed epoch again, never
//! restores a memory twice and never resumes a guest that it may have handed over.
//!
//! Must not: do the writing (that is the shell's), nor hold anything that can be found out again.

use quorate_types::report::SavedState;
use quorate_types::{Epoch, HostName, MigrationId, VmName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A fact to be made durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LedgerRecord {
    /// A process is about to be made under this epoch.
    Told {
        /// Which VM.
        vm: VmName,
        /// Its token.
        epoch: Epoch,
        /// The migration that it waits for; absent: it starts here.
        migration: Option<MigrationId>,
    },
    /// No process runs under this epoch here, and none ever will again.
    Closed {
        /// Which VM.
        vm: VmName,
        /// The highest such epoch.
        epoch: Epoch,
        /// Memory that was saved before.
        saved: Option<SavedState>,
        /// Why, as a sentence.
        why: String,
    },
    /// The saved memory is being used under this epoch: never again.
    Restored {
        /// Which VM.
        vm: VmName,
        /// The epoch.
        epoch: Epoch,
    },
    /// The ready check succeeded under this epoch.
    Ready {
        /// Which VM.
        vm: VmName,
        /// The epoch.
        epoch: Epoch,
    },
    /// The guest is about to be sent.
    Sending {
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
        /// The target, to be asked for the outcome.
        to: HostName,
    },
    /// The switchover is about to be ordered: from here on only the target, or the cluster, can
    /// give the guest back.
    SwitchoverBegun {
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
    },
    /// The migration is over on the source and the guest stays there. Never begun again.
    SendFailed {
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
        /// Why.
        why: String,
    },
    /// The process that waited for the guest ended unseen: the guest may have run in it.
    ArrivalUnknown {
        /// Which VM.
        vm: VmName,
        /// With which migration.
        id: MigrationId,
    },
    /// The guest has arrived.
    Arrived {
        /// Which VM.
        vm: VmName,
        /// With which migration.
        id: MigrationId,
        /// The epoch that it runs under now.
        epoch: Epoch,
    },
    /// The VM is gone from the cluster.
    Forgotten {
        /// Which VM.
        vm: VmName,
    },
}

impl LedgerRecord {
    /// The VM that it is about.
    pub fn vm(&self) -> &VmName {
        match self {
            Self::Told { vm, .. }
            | Self::Closed { vm, .. }
            | Self::Restored { vm, .. }
            | Self::Ready { vm, .. }
            | Self::Sending { vm, .. }
            | Self::SwitchoverBegun { vm, .. }
            | Self::SendFailed { vm, .. }
            | Self::ArrivalUnknown { vm, .. }
            | Self::Arrived { vm, .. }
            | Self::Forgotten { vm } => vm,
        }
    }
}

/// How far this host is with sending a guest away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SendStage {
    /// Begun; the guest still belongs here.
    Sending,
    /// The switchover was, or may have been, ordered.
    Begun,
    /// Over: the guest belongs here. Why.
    Over(String),
}

/// The last migration away from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendEntry {
    /// Which.
    pub id: MigrationId,
    /// The target, where it is known.
    pub to: Option<HostName>,
    /// How far.
    pub stage: SendStage,
}

/// What is known of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// Epoch of the process that exists, or was the last to exist.
    pub told: Epoch,
    /// The migration that this process waits or waited for.
    pub incoming: Option<MigrationId>,
    /// Whether that migration arrived.
    pub arrived: Option<MigrationId>,
    /// Whether nobody saw how that migration ended here.
    #[serde(default)]
    pub unseen: Option<MigrationId>,
    /// Highest epoch that will never run here again.
    pub closed: Epoch,
    /// Why it was closed.
    pub closed_why: Option<String>,
    /// Memory that was saved when it was closed.
    pub saved: Option<SavedState>,
    /// Highest epoch under which a saved memory was used.
    pub restored: Epoch,
    /// Highest epoch under which the guest was ready.
    pub ready: Epoch,
    /// The last migration away from here under `told`.
    pub send: Option<SendEntry>,
}

impl LedgerEntry {
    /// How far the sending with this id is, if it was ever begun.
    pub fn send_stage(&self, id: MigrationId) -> Option<&SendStage> {
        let mine = self.send.as_ref().filter(|send| send.id == id);
        mine.map(|send| &send.stage)
    }

    /// The sending whose switchover was begun and which nobody has ended yet.
    pub fn begun(&self) -> Option<&SendEntry> {
        let begun = |send: &&SendEntry| send.stage == SendStage::Begun;
        self.send.as_ref().filter(begun)
    }

    /// The migration whose guest has not arrived and was not given up.
    pub fn pending_incoming(&self) -> Option<MigrationId> {
        self.incoming
            .filter(|id| self.arrived != Some(*id) && self.closed < self.told)
    }

    fn set_send(&mut self, id: MigrationId, stage: SendStage) {
        let before = self.send.take().filter(|send| send.id == id);
        let to = before.and_then(|send| send.to);
        self.send = Some(SendEntry { id, to, stage });
    }

    fn apply(&mut self, record: &LedgerRecord) {
        match record {
            LedgerRecord::Told {
                epoch, migration, ..
            } => {
                if *epoch > self.told {
                    self.send = None;
                    self.incoming = None;
                    self.arrived = None;
                    self.unseen = None;
                }
                self.told = self.told.max(*epoch);
                // A restart under the epoch of an arrival waits for nothing, but keeps its history.
                self.incoming = migration.or(self.incoming);
                self.ready = Epoch(0);
            }
            LedgerRecord::Closed {
                epoch, saved, why, ..
            } => {
                self.closed = self.closed.max(*epoch);
                self.saved = saved.clone();
                self.closed_why = Some(why.clone());
            }
            LedgerRecord::Restored { epoch, .. } => self.restored = self.restored.max(*epoch),
            LedgerRecord::Ready { epoch, .. } => self.ready = self.ready.max(*epoch),
            LedgerRecord::Sending { id, to, .. } => {
                self.send = Some(SendEntry {
                    id: *id,
                    to: Some(to.clone()),
                    stage: SendStage::Sending,
                });
            }
            LedgerRecord::SwitchoverBegun { id, .. } => self.set_send(*id, SendStage::Begun),
            LedgerRecord::SendFailed { id, why, .. } => {
                self.set_send(*id, SendStage::Over(why.clone()));
            }
            LedgerRecord::ArrivalUnknown { id, .. } => self.unseen = Some(*id),
            LedgerRecord::Arrived { id, .. } => self.arrived = Some(*id),
            LedgerRecord::Forgotten { .. } => *self = Self::default(),
        }
    }
}

/// All entries.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    vms: BTreeMap<VmName, LedgerEntry>,
}

impl Ledger {
    /// From entries read back.
    pub fn from_entries(entries: impl IntoIterator<Item = (VmName, LedgerEntry)>) -> Self {
        Self {
            vms: entries.into_iter().collect(),
        }
    }

    /// Takes a record in. Returns the entry to be stored, `None` when the VM is to be removed.
    pub fn apply(&mut self, record: &LedgerRecord) -> Option<&LedgerEntry> {
        let vm = record.vm();
        if matches!(record, LedgerRecord::Forgotten { .. }) {
            self.vms.remove(vm);
            return None;
        }
        let entry = self.vms.entry(vm.clone()).or_default();
        entry.apply(record);
        Some(entry)
    }

    /// The entry of a VM.
    pub fn get(&self, vm: &VmName) -> Option<&LedgerEntry> {
        self.vms.get(vm)
    }

    /// All entries.
    pub fn entries(&self) -> &BTreeMap<VmName, LedgerEntry> {
        &self.vms
    }
}
