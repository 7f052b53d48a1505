//! Live migration with QEMU: the source's task, the target's task, and what both set before.
//!
//! Phases change by QEMU's events; `query-migrate` is polled every 100 ms for the progress, and as a
//! second opinion when an event was lost. See [`crate::migration`] for the phases.
//!
//! # What QEMU 10.0.2 does (measured)
//! - Cancelled or failed in `active` or `pre-switchover`: QEMU resumes the source by itself, even if it
//!   was told `stop` in pre-switchover meanwhile.
//! - A target whose source goes away ends with an error on its own.
//! - A source cannot be told to stay paused when it fails *after* the switchover was ordered: QEMU
//!   takes the disks back and resumes it, unless the target holds their locks. The phase `Failed` says
//!   what the source does; the caller freezes it until the target's fate is known.

pub mod downtime;
mod incoming;
pub(super) mod setup;
mod source;
