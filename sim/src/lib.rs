//! The simulator: the decisions of production on virtual time, with faults, every promise checked after
//! every event.
//!
//! ```text
//!  seed --> Setup --> World{hosts, network, disks, guests, queue} --event--> World --checks--> ok | Broken
//!                        |  |                                                   ^
//!      quorate-agent-logic  quorate-membership, -planner, -state and            |
//!      of each host         -controller-logic of the leader --------------------'
//! ```
//!
//! Owns: models of what the pure crates stand on: Raft, network, QEMU, guard, watchdog, fence devices,
//! a SAN, disks of hosts with copies, operators. Always holds: a seed replays exactly (one queue ordered by time and number, one generator,
//! no hash map); the checks look at what really happened. Must not: decide anything that production
//! decides, nor switch anything off inside it: the broken variants ([`Mutation`]) are hooks of the models.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod agent;
mod build;
mod check;
mod check_san;
mod copies;
mod daemon;
mod doors;
mod event;
mod faults;
mod flows;
mod guard;
mod guest;
mod host;
mod leader;
mod mutate;
mod net;
mod power;
mod qemu;
mod queue;
mod raft;
mod rng;
mod runner;
mod san;
mod scenario;
mod serve;
mod services;
mod setup;
mod stream;
mod time;
mod world;

pub use faults::Fault;
pub use mutate::Mutation;
pub use rng::Rng;
pub use runner::{Verdict, run_seed, run_seeds};
pub use scenario::{Outcome, ScriptError, rendered, run_scenario};
pub use setup::{Profile, Setup, vm_spec};
pub use world::{Broken, Detail, World};
