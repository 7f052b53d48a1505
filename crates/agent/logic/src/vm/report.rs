//! What the host says of this VM.

use super::*;
use crate::ledger::SendStage;
use quorate_types::{ByteSize, Timestamp, VmPhase, VmReport};

impl VmMachine {
    pub(crate) fn phase(&self) -> VmPhase {
        match &self.stage {
            Stage::Absent if self.retry_at.is_some() => VmPhase::BackOff,
            Stage::Absent => VmPhase::Absent,
            Stage::Starting => VmPhase::Starting,
            Stage::Running | Stage::Unknown { .. } if self.stop.is_some() => VmPhase::Stopping,
            Stage::Running | Stage::Unknown { .. } => VmPhase::Running,
            Stage::Paused { io_error: true, .. } => VmPhase::IoError,
            Stage::Paused { .. } | Stage::Thawing { .. } => VmPhase::Frozen,
            Stage::Saving { .. } | Stage::Killing { .. } => VmPhase::Stopping,
            Stage::Sending { .. } => VmPhase::MigratingOut,
            Stage::HandedOver(_) => VmPhase::HandedOver,
            Stage::Incoming { .. } => VmPhase::Incoming,
        }
    }

    /// `booted`: the wall clock's time at 0 of the monotonic clock.
    pub(crate) fn report(&self, entry: Option<&LedgerEntry>, booted: Timestamp) -> VmReport {
        let closed = entry.map_or(Epoch(0), |entry| entry.closed);
        let mut migration = self.migration.clone();
        if let (Some(report), Some(entry)) = (&mut migration, entry) {
            report.switchover = entry.send_stage(report.id) == Some(&SendStage::Begun);
        }
        let since = booted.0.saturating_add(self.since.0 / 1_000_000);
        VmReport {
            epoch: self.epoch,
            phase: self.phase(),
            ready: self.ready && self.has_process(),
            closed,
            saved: entry.and_then(|entry| entry.saved.clone()),
            guest_shutdown: self.guest_shutdown,
            restarts: self.restarts,
            since: Timestamp(since),
            error: self.error.clone(),
            save_failures: self.save_failures,
            migration,
            handed_over: entry.and_then(|entry| entry.begun()).map(|send| send.id),
            resident: ByteSize(0),
            mirrors: Vec::new(),
        }
    }
}
