//! What a leader knows and decides beside the planner: leases and reports, seals, voters, storage cuts,
//! when to fence again, rings of services and who answers for their addresses.
//!
//! ```text
//!   heartbeat --> Leases --> grant            Leases --> proofs, health --> planner (pure too)
//!                                             GroupMembers + Leases --> next_change --> voters
//! ```
//! Owns: the leader's volatile picture of one term, and the heartbeat's wire format. Always holds: every decision is a
//! function of its arguments, so the daemon's controller and the simulator run the very same code. Must not: know
//! a clock, a task or the network; the shell around it is `quorate-controller`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod addresses;
mod cuts;
mod keeper;
mod leases;
mod retry;
mod services;
mod storage;
mod voters;
mod wire;

#[cfg(test)]
mod services_tests;
#[cfg(test)]
mod tests;

pub use addresses::{holder_steps, taken_from};
pub use cuts::Cuts;
pub use keeper::{Keeping, KeptDoor, Restorable, doors_to_keep, taken_back, time_for_a_call};
pub use leases::{Leases, owns_something};
pub use retry::fence_again_after;
pub use services::{ServiceInput, ServiceMemory, next_drain_end, service_problems, service_steps};
pub use storage::{CutJob, Door, Gate, Shut, Wanted, cut_job, doors_wanted, restorable};
pub use voters::{Change, GroupMembers, before_leaving, next_change, standing};
pub use wire::{HeartbeatReply, HeartbeatRequest};
