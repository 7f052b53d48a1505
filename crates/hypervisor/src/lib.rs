//! Runs virtual machines on one host.
//!
//! Owns: the [`Hypervisor`] and [`Vm`] traits that the agent works with, the QEMU driver behind
//! them ([`qemu`]), and an in-memory [`fake`] with scripted faults for tests of the agent.
//!
//! Always holds:
//! - a guest outlives the process that started it; a later process adopts it ([`Hypervisor::adopt`]);
//! - an exit is an event (a pidfd), never found by polling, and never guessed from a lost connection;
//! - a freeze is reported only when the hypervisor confirmed that the guest is paused;
//! - a failed or cancelled migration leaves the source running unless the switchover had begun.
//!
//! Must not: decide *whether* a guest may run. Leases, epochs and proofs are the agent's business;
//! this crate knows no other host and no cluster state, so that it can be tested alone.

pub mod config;
mod disk;
mod error;
pub mod fake;
pub mod guest;
pub mod migration;
mod mirror;
pub mod qemu;
mod vm;

pub use config::{Accel, Boot, GuestConfig, NicConfig, StartMode};
pub use disk::{DiskConfig, DiskFormat, DiskSource, IscsiDisk, Password, RbdDisk};
pub use error::HypervisorError;
pub use guest::{ExitInfo, Frozen, GuestEvent, GuestState, ProcessIdentity, SavedState};
pub use migration::{
    Downtime, IncomingMigration, IncomingOutcome, ListenRequest, MigrationControl, MigrationPhase,
    MigrationRequest, MigrationStatus, OutgoingMigration, Progress, TlsMaterial,
};
pub use mirror::{MirrorStatus, MirrorTarget, Resync, WriteMap};
pub use vm::{Adoption, Hypervisor, Quiesced, Vm};
