//! Live migration with QEMU: the source's task, the target's task, and what both set before.
//!
//! Phases change by QEMU's events; `query-migrate` is polled every 100 ms for the progress, and as a
//! second opinion when an event was lost. See [`crate::migration`] for the phases.
//!
//! # What QEMU 10.0.2 does (measured)
//! - Cancelled or failed in `active` or `pre-switchover`: QEMU resumes the source by itself, even if it
//!   was told `stop` in pre-switchover meanwhile.
//! - A target whose source goes away ends with an error on its own.
//! - When a switchover that was ordered fails, QEMU resumes the source by itself too, whatever became of
//!   the target: even when the disks cannot be taken back (the error is ignored; a write would then
//!   abort QEMU). Nothing can be set to prevent it: the state to return to is recorded before the pause.
//!   So the source's disks lead nowhere before the switchover is ordered (`guest::hold`): its first request fails and
//!   pauses it. And its task freezes the guest when it hears of the failure. The `failed` event comes
//!   before the resume; the guest may execute, but not write, for the few milliseconds until the `stop` is obeyed.
//! - `blockdev-set-active false` is accepted while the guest runs, so a freeze confirms the pause last.

pub mod downtime;
mod incoming;
mod inflight;
pub(super) mod setup;
mod source;
