//! Who is alive, who may run guests, and what proves that a host no longer does.
//!
//! ```text
//!  host                                leader
//!  HostLease --heartbeat(sent_ns)-->   LeaseTable::heartbeat: grants min(lease, quorum ack + lease - now)
//!            <--granted_ms, revision-- (nothing while sealed, not quorate, or newly elected without a barrier)
//!  deadline = sent + granted           expiry = received + lease + watchdog bound + drift
//!  freeze at deadline - freeze_before  past expiry, guard and watchdog armed -> FenceProof::LeaseExpired
//! ```
//!
//! Owns: the lease protocol of both sides and the type [`FenceProof`]. Always holds: the host's
//! deadline, plus the time its watchdog needs, lies before the leader's expiry, whatever the
//! network did; unknown is not dead, so no proof is made of silence alone. Must not: read a clock;
//! `now` is an argument everywhere, in nanoseconds of CLOCK_BOOTTIME of the machine that asks.
//! Why a lease and not a failure detector: Gray and Cheriton, "Leases" (SOSP 1989).
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod disk;
mod host;
mod leader;
mod proof;
mod voters;

pub use disk::{BLOCK_BYTES, Block, DiskLease, DiskStep, DiskTimings, checksum};
pub use host::{HostLease, LeasePhase};
pub use leader::{Grant, Heartbeat, HostHealth, LeaseProofError, LeaseTable, NoGrant};
pub use proof::{DiskCut, Evidence, FenceProof, PowerOffEvidence, ProofError, ProofKind};
pub use voters::{Electorate, Member, next_voters, voters_without, wanted_voters};

/// A point in time: nanoseconds of CLOCK_BOOTTIME on the machine that reads it.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct Instant(pub u64);

impl Instant {
    /// This point plus a span.
    #[must_use]
    pub fn plus(self, span: quorate_types::Millis) -> Self {
        Self(self.0.saturating_add(span.0.saturating_mul(1_000_000)))
    }

    /// This point minus a span, not before 0.
    #[must_use]
    pub fn minus(self, span: quorate_types::Millis) -> Self {
        Self(self.0.saturating_sub(span.0.saturating_mul(1_000_000)))
    }

    /// Whole milliseconds from `earlier` to here; 0 if it is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> quorate_types::Millis {
        quorate_types::Millis(self.0.saturating_sub(earlier.0) / 1_000_000)
    }
}

#[cfg(test)]
mod tests;
