//! What only the leader does: collect reports, keep leases, weigh evidence, plan, commit.
//!
//! ```text
//!  heartbeat (any host) --> Leases (LeaseTable + reports) --> grant
//!                                 |
//!  state changed / report / timer |
//!          v                      v
//!      Controller::round: proofs -> planner::plan -> Command::CommitPlan -> consensus
//!                                 |                                   (agents act on what is applied)
//!                                 '-> storage and power fencing, voters, `armed` records
//! ```
//!
//! Owns: one [`Controller`] per host, idle unless that host leads. Always holds: decisions are made by
//! the pure crates (`quorate-controller-logic`, the planner); a proof that was handed to the planner keeps its host sealed until the outcome
//! of the commit is applied here; nothing is granted before a barrier in the leader's own term.
//! Must not: touch a guest, or do anything slow between two rounds (power fencing runs beside).
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod clock;
mod controller;
mod group;
mod leaving;
mod operator;
mod picture;
mod power;
mod services;
#[cfg(test)]
mod services_tests;
mod storage;
#[cfg(test)]
mod tests;

pub use clock::boot_now;
pub use controller::Controller;
pub use group::{Group, Leading, ProposeFailure};
pub use operator::ControllerError;
pub use picture::{HostPicture, Picture, VotePicture};
pub use power::PowerSwitch;
pub use quorate_controller_logic::{
    Door, Gate, GroupMembers, HeartbeatReply, HeartbeatRequest, Shut,
};
pub use storage::StorageGate;
