//! Deliberately broken variants, to prove that the checks can fail.
//!
//! Always holds: each is a hook in this simulator's shell or models; production code has no switch.

use std::fmt;

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutation {
    /// The leader makes a proof of mere silence.
    StartWithoutProof,
    /// A host that is being declared dead still gets leases.
    NoSeal,
    /// Hosts act on whatever their replica says, however old.
    NoFreshnessCheck,
    /// What the agent wrote to its ledger is gone after a restart.
    LedgerNotDurable,
    /// Reports about any migration are taken for reports about the present one.
    StaleMigrationId,
    /// The guard does nothing but feed the watchdog.
    GuardOff,
    /// A new leader judges from the leases of its predecessor's time on.
    NoWaitAfterElection,
    /// A new leader takes its voters to have heard no other leader for long. Rarely seen: the difference is a few tenths of
    /// a second.
    VotersHeardNobody,
    /// A new leader grants before it has applied what its predecessors committed. Rarely seen: it takes a replica
    /// that lags, a change of leaders and a host that comes back, all within a second.
    NoBarrier,
    /// A leader grants leases without a majority.
    GrantWithoutQuorum,
    /// The lease counts from the answer instead of the question.
    LeaseFromAnswer,
    /// A disk counts as cut as soon as the SAN was asked, whatever it answers.
    ProofWithoutLook,
    /// The keeper sets doors as it saw them the last time instead of reading the state again.
    KeeperOldState,
    /// A host is let in again as soon as it is up, whatever it still runs.
    RestoreDirty,
    /// Doors are opened whether the leader is sure of its lease or not. Rarely seen: the SAN must be slow just when leaders
    /// change.
    OpenWithoutLease,
    /// The disks on the SAN are not taken from a source before its switchover: one that QEMU resumes by itself writes
    /// beside its target.
    SanWithoutHold,
    /// An owner lets go of a copy that does not answer before the state says that it is out of step.
    CopyDroppedEarly,
    /// The datapath of a host serves past its lease.
    DatapathNoLease,
    /// A host that comes back serves with the tables that it had.
    DatapathStaleTables,
    /// A daemon that starts tells the kernel what its old replica says.
    DatapathOldReplica,
    /// The leader puts a ring into force without asking whether directors hold it.
    ActivateUnprepared,
    /// A member's edge takes whatever comes.
    NoSecondChance,
    /// Flows are looked for in open edges only, once for each ring: of a guest that changes hosts meanwhile neither sees them.
    /// Not seen in some hundreds of seeds: the source must be late, and the target must not; the agent's own tests arrange it.
    StraysLookedAtOnce,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::StartWithoutProof,
        Self::NoSeal,
        Self::NoFreshnessCheck,
        Self::LedgerNotDurable,
        Self::StaleMigrationId,
        Self::GuardOff,
        Self::NoWaitAfterElection,
        Self::VotersHeardNobody,
        Self::NoBarrier,
        Self::GrantWithoutQuorum,
        Self::LeaseFromAnswer,
        Self::ProofWithoutLook,
        Self::KeeperOldState,
        Self::RestoreDirty,
        Self::OpenWithoutLease,
        Self::SanWithoutHold,
        Self::CopyDroppedEarly,
        Self::DatapathNoLease,
        Self::DatapathStaleTables,
        Self::DatapathOldReplica,
        Self::ActivateUnprepared,
        Self::NoSecondChance,
        Self::StraysLookedAtOnce,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::StartWithoutProof => "start-without-proof",
            Self::NoSeal => "no-seal",
            Self::NoFreshnessCheck => "no-freshness-check",
            Self::LedgerNotDurable => "ledger-not-durable",
            Self::StaleMigrationId => "stale-migration-id",
            Self::GuardOff => "guard-off",
            Self::NoWaitAfterElection => "no-wait-after-election",
            Self::VotersHeardNobody => "voters-heard-nobody",
            Self::NoBarrier => "no-barrier",
            Self::GrantWithoutQuorum => "grant-without-quorum",
            Self::LeaseFromAnswer => "lease-from-answer",
            Self::ProofWithoutLook => "proof-without-look",
            Self::KeeperOldState => "keeper-old-state",
            Self::RestoreDirty => "restore-dirty",
            Self::OpenWithoutLease => "open-without-lease",
            Self::SanWithoutHold => "san-without-hold",
            Self::CopyDroppedEarly => "copy-dropped-early",
            Self::DatapathNoLease => "datapath-no-lease",
            Self::DatapathStaleTables => "datapath-stale-tables",
            Self::DatapathOldReplica => "datapath-old-replica",
            Self::ActivateUnprepared => "activate-unprepared",
            Self::NoSecondChance => "no-second-chance",
            Self::StraysLookedAtOnce => "strays-looked-at-once",
        }
    }
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Mutation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|one| one.name()).collect();
            format!(
                "there is no variant `{text}`; there are {}",
                names.join(", ")
            )
        })
    }
}
