//! The replicated state machine: what the cluster has agreed on.
//!
//! ```text
//! Envelope{at, by, Command} --State::apply--> Outcome{revision, events} | Refusal (nothing changed)
//! State --orders_for(host)--> what that host must do now
//! ```
//!
//! Owns: the cluster's objects, who owns which VM under which epoch, and the log of what happened.
//! Always holds: `apply` is total and deterministic and either does all of a command or nothing; an
//! epoch of a VM is handed out once; ownership leaves a host only with fence proofs that cover it
//! (**proof-before-start**). Must not: read a clock, do I/O, choose: choosing is the planner's.
//!
//! The life of a VM's ownership:
//! ```text
//!            Start                     Migrate
//!   Free ------------> Owned(Run) ---------------> Migrating{id, from, to}
//!    ^                  |  ^   ^---- failed/return --------|   |
//!    |          Stop    v  |                               |   | arrived
//!    |<--Release-- Owned(Stop)      Owned by `to` <--------|---'
//!    |<--------------- Release with proofs for both -------'
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod apply;
mod command;
mod copies;
mod event;
mod model;
mod order;
mod plan;
mod quorum;
mod service;
mod stops;
mod writes;

pub use command::{Command, Envelope, FORMAT, Outcome, Refusal, ServiceChange};
pub use copies::{COPIES, DiskCopies, DiskCopy, DiskRecords, Unsettled};
pub use event::{Event, EventKind, EventLog, Subject};
pub use model::{
    ClusterInfo, Decision, GuestAbi, HostMode, HostRecord, MoveRequest, Object, OrderKind,
    Ownership, PoolDrill, State, StopMode, TokenRecord, UnitTake, VmRecord,
};
pub use order::Order;
pub use plan::{Action, ActionKind, Candidate, CopyOf, MigrationEnd, Plan, PlannedAction, Reason};
pub use quorum::{Quorum, WITNESS_SLOTS, Witness, WitnessChoice, WitnessUnit};
pub use service::{Drain, Health, Holder, RINGS_KEPT, ServiceRecord, slots_for};
pub use stops::Stopped;
pub use writes::{ImageWrite, ImageWrites};

#[cfg(test)]
mod tests;
