//! Who may write a LUN: SCSI-3 persistent reservations of one block device.
//!
//! Owns: keys ([`ReservationKey`]), what a device says ([`Facts`], [`Inspection`]), what to do
//! about it ([`plan`], pure), doing it ([`Reservation`]), and trying a device out ([`drill`]).
//! For LUNs on the host's own kernel: open-iscsi, Fibre Channel, multipath.
//!
//! Always holds:
//! - the reservation is of type 5 (write exclusive, registrants only): every registered host
//!   writes, no other does, all read. So exactly one host of the cluster is registered, apart
//!   from the target of a live migration, which registers beforehand and preempts the source
//!   at the pause before the switchover;
//! - what is reported as done was read back from the device;
//! - every operation is idempotent, bounded in time and in commands;
//! - a newer epoch wins; a stranger's key is refused unless forced; nobody else is pushed out
//!   unless the caller asks for just that.
//!
//! Must not: know of clusters, leases or VMs. Registering *is* write access, so the caller
//! registers a host only while that host holds a valid lease for that epoch; the device cannot
//! know that an epoch is over. The same goes for the target of a migration that was cancelled:
//! its key is newer than the owner's, so only its host's ledger keeps it from coming back. A take-over that succeeded is proof that the old owner's writes
//! fail from that moment on, unless it registers again.
//!
//! ```text
//!            acquire / take_over                       register (target)
//!   Nobody --------------------> Owner            Nobody -----------> Beside
//!     ^  ^                       | | ^                                  | |
//!     |  '------- release -------' | '-------------- hand_over ---------' |
//!     '---- preempted by a newer --'       (preempts the source)          |
//!     '------------------------- release ---------------------------------'
//! ```

pub mod device;
pub mod drill;
mod error;
mod facts;
pub mod fake;
mod key;
pub mod linux;
pub mod plan;
mod run;
#[cfg(test)]
mod tests;
mod units;
mod wire;

pub use device::{Command, DeviceError, ReservationDevice, ReservationType};
pub use drill::{DrillReport, DrillStep};
pub use error::ReservationError;
pub(crate) use facts::pause;
pub use facts::{Facts, Inspection};
pub use fake::FakeLun;
pub use key::{ClusterTag, KeyError, ReservationKey};
pub use linux::LinuxDevice;
pub use plan::{Refusal, Strangers};
pub use run::{Claim, Outcome, Reservation, fulfil};
pub use units::{Trouble, Units};
