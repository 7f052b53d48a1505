//! Plans: what the planner proposes and `apply` checks again.

use crate::model::{GuestAbi, HostMode, StopMode};
use quorate_membership::FenceProof;
use quorate_types::report::SavedState;
use quorate_types::{BootId, Epoch, HostName, MigrationId, PoolName, Revision, VmName};
use serde::{Deserialize, Serialize};

/// Actions made from one look at state and reports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// The revision it was made from.
    pub base: Revision,
    /// What to do, in order.
    pub actions: Vec<PlannedAction>,
}

/// An action with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedAction {
    /// What.
    pub action: Action,
    /// Why.
    pub reason: Reason,
}

/// Why an action was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reason {
    /// One sentence.
    pub summary: String,
    /// Facts it rests on, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
    /// Hosts that were looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
}

impl Reason {
    /// A reason of one sentence.
    pub fn new(summary: impl Into<String>) -> Self {
        Self {
            summary: summary.into(),
            ..Self::default()
        }
    }
}

/// A host that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The host.
    pub host: HostName,
    /// Its score, higher is better; absent: rejected.
    pub score: Option<i64>,
    /// Why it was rejected, or what made its score.
    pub why: String,
}

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationEnd {
    /// The guest runs on the target: it is the owner now.
    Arrived {
        /// Downtime by QEMU, in milliseconds.
        downtime_ms: Option<u64>,
    },
    /// The source said that the guest goes on there.
    StayedAtSource,
    /// The target said, durably, that it will not run the guest: the source goes on.
    RefusedByTarget,
    /// The target is dead and cannot have the guest any more: the source goes on.
    TargetDead(FenceProof),
    /// The target is dead, and may have run the guest before. The VM is the source's again, to be ended there:
    /// its memory may be older than its disks. Of disks that are hosts' own the target's copy is the one that counts.
    TargetLost(FenceProof),
}

/// A copy of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOf {
    /// The VM that has the disk.
    pub vm: VmName,
    /// The disk's pool.
    pub pool: PoolName,
    /// Its image.
    pub image: String,
    /// The host of the copy.
    pub host: HostName,
}

impl CopyOf {
    /// In words.
    fn describe(&self) -> String {
        format!("disk {} of {} on {}", self.image, self.vm, self.host)
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Give a free VM to a host, under a new epoch.
    Start {
        /// Which VM.
        vm: VmName,
        /// Its new owner.
        host: HostName,
        /// Its CPU and machine.
        abi: GuestAbi,
    },
    /// Take a VM from all hosts that may have it.
    Release {
        /// Which VM.
        vm: VmName,
        /// Proofs that cover each of them.
        proofs: Vec<FenceProof>,
        /// Memory that its owner saved.
        saved: Option<SavedState>,
    },
    /// Order the owner to end it.
    Stop {
        /// Which VM.
        vm: VmName,
        /// How.
        mode: StopMode,
    },
    /// Begin a live migration; its id is the revision of the commit.
    Migrate {
        /// Which VM.
        vm: VmName,
        /// Target.
        to: HostName,
    },
    /// Give a migration up.
    CancelMigration {
        /// Which VM.
        vm: VmName,
        /// Which migration.
        id: MigrationId,
    },
    /// A migration ended.
    FinishMigration {
        /// Which VM.
        vm: VmName,
        /// Which migration: a report about another one is stale.
        id: MigrationId,
        /// How.
        end: MigrationEnd,
    },
    /// A move request is done or cannot be met.
    ClearMove {
        /// Which VM.
        vm: VmName,
        /// It was met.
        done: bool,
    },
    /// A host is empty, or its drain was given up.
    SetHostMode {
        /// Which host.
        host: HostName,
        /// New mode.
        mode: HostMode,
    },
    /// A deleted VM is stopped: forget it.
    Forget {
        /// Which VM.
        vm: VmName,
    },
    /// The owner could not save its memory for a quick migration: the guest goes on there.
    AbandonSave {
        /// Which VM.
        vm: VmName,
    },
    /// Give a mirrored disk a copy on another host; it is not in step yet.
    AddCopy {
        /// Which.
        of: CopyOf,
        /// The epoch of the owner.
        epoch: Epoch,
    },
    /// The owner says that a copy has all the writes from now on.
    CopyInStep {
        /// Which.
        of: CopyOf,
        /// The epoch of the owner.
        epoch: Epoch,
        /// The life of the copy that this is about.
        since: Revision,
        /// The boot of the copy's host.
        boot: BootId,
    },
    /// After both sides of a migration were lost: its source's copy counts, since by its own word no hand-over was begun.
    SettleCopies {
        /// Which.
        of: CopyOf,
        /// The migration.
        id: MigrationId,
    },
    /// Forget a copy that was made for a move: its host removes the image.
    RemoveCopy {
        /// Which.
        of: CopyOf,
        /// The epoch of the owner.
        epoch: Epoch,
        /// The life of the copy that this is about.
        since: Revision,
    },
    /// A copy will not get the owner's writes any more. Committed before the guest writes without it.
    CopyOutOfStep {
        /// Which.
        of: CopyOf,
        /// The epoch of the owner.
        epoch: Epoch,
        /// The life of the copy that this is about.
        since: Revision,
    },
}

/// What kind of action it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionKind {
    /// A free VM is given to a host.
    Start,
    /// A VM is taken from its hosts.
    Release,
    /// An owner is told to end it.
    Stop,
    /// A live migration begins.
    Migrate,
    /// A live migration is given up.
    CancelMigration,
    /// A live migration has ended.
    FinishMigration,
    /// A wish to move a VM is answered.
    ClearMove,
    /// A host's mode changes.
    SetHostMode,
    /// A deleted VM is forgotten.
    Forget,
    /// A save that fails is given up: the guest goes on.
    AbandonSave,
    /// A disk gets a copy.
    AddCopy,
    /// A copy is in step.
    CopyInStep,
    /// A copy is out of step.
    CopyOutOfStep,
    /// A copy is not needed any more.
    RemoveCopy,
    /// Which copy counts after a migration is known.
    SettleCopies,
}

impl Action {
    /// Its kind.
    pub fn kind(&self) -> ActionKind {
        match self {
            Self::Start { .. } => ActionKind::Start,
            Self::Release { .. } => ActionKind::Release,
            Self::Stop { .. } => ActionKind::Stop,
            Self::Migrate { .. } => ActionKind::Migrate,
            Self::CancelMigration { .. } => ActionKind::CancelMigration,
            Self::FinishMigration { .. } => ActionKind::FinishMigration,
            Self::ClearMove { .. } => ActionKind::ClearMove,
            Self::SetHostMode { .. } => ActionKind::SetHostMode,
            Self::Forget { .. } => ActionKind::Forget,
            Self::AbandonSave { .. } => ActionKind::AbandonSave,
            Self::AddCopy { .. } => ActionKind::AddCopy,
            Self::CopyInStep { .. } => ActionKind::CopyInStep,
            Self::CopyOutOfStep { .. } => ActionKind::CopyOutOfStep,
            Self::RemoveCopy { .. } => ActionKind::RemoveCopy,
            Self::SettleCopies { .. } => ActionKind::SettleCopies,
        }
    }

    /// The VM that it is about, if any.
    pub fn vm(&self) -> Option<&VmName> {
        match self {
            Self::Start { vm, .. }
            | Self::Release { vm, .. }
            | Self::Stop { vm, .. }
            | Self::Migrate { vm, .. }
            | Self::CancelMigration { vm, .. }
            | Self::FinishMigration { vm, .. }
            | Self::ClearMove { vm, .. }
            | Self::Forget { vm }
            | Self::AbandonSave { vm } => Some(vm),
            Self::AddCopy { of, .. }
            | Self::RemoveCopy { of, .. }
            | Self::SettleCopies { of, .. }
            | Self::CopyInStep { of, .. }
            | Self::CopyOutOfStep { of, .. } => Some(&of.vm),
            Self::SetHostMode { .. } => None,
        }
    }

    /// In words, for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Start { vm, host, .. } => format!("start {vm} on {host}"),
            Self::Release { vm, proofs, .. } => {
                let kinds: Vec<_> = proofs
                    .iter()
                    .map(|proof| format!("{} by {}", proof.host(), proof.kind()))
                    .collect();
                format!("release {vm} ({})", kinds.join(", "))
            }
            Self::Stop { vm, mode } => match mode {
                StopMode::Graceful => format!("shut {vm} down"),
                StopMode::Hard => format!("power {vm} off"),
                StopMode::Save => format!("save {vm} for a quick migration"),
            },
            Self::Migrate { vm, to } => format!("migrate {vm} to {to}"),
            Self::CancelMigration { vm, id } => format!("cancel migration {id} of {vm}"),
            Self::FinishMigration { vm, id, end } => match end {
                MigrationEnd::Arrived {
                    downtime_ms: Some(ms),
                } => {
                    format!("migration {id} of {vm} arrived, {ms} ms downtime")
                }
                MigrationEnd::Arrived { .. } => format!("migration {id} of {vm} arrived"),
                MigrationEnd::StayedAtSource => {
                    format!("migration {id} of {vm} failed, it goes on at its source")
                }
                MigrationEnd::RefusedByTarget => {
                    format!("migration {id} of {vm} failed at its target, it goes on at its source")
                }
                MigrationEnd::TargetDead(_) => {
                    format!("migration {id} of {vm} lost its target, it goes on at its source")
                }
                MigrationEnd::TargetLost(_) => {
                    format!("migration {id} of {vm} lost its target after the switchover")
                }
            },
            Self::ClearMove { vm, done: true } => format!("move of {vm} done"),
            Self::ClearMove { vm, done: false } => format!("give up moving {vm}"),
            Self::SetHostMode { host, mode } => {
                format!("host {host} is now {mode:?}").to_lowercase()
            }
            Self::Forget { vm } => format!("forget {vm}"),
            Self::AbandonSave { vm } => {
                format!("quick migration of {vm} failed, it goes on where it is")
            }
            Self::AddCopy { of, .. } => format!("copy {}", of.describe()),
            Self::SettleCopies { of, .. } => format!("settled: {} counts", of.describe()),
            Self::RemoveCopy { of, .. } => format!("remove the copy of {}", of.describe()),
            Self::CopyInStep { of, .. } => format!("in step: {}", of.describe()),
            Self::CopyOutOfStep { of, .. } => format!("out of step: {}", of.describe()),
        }
    }
}
