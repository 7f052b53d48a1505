//! The host agent: carries out what [`quorate_agent_logic`] decides.
//!
//! ```text
//!  replica (watch) ---+                     +--> VmTask per VM --> hypervisor, network, pools
//!  lease_ack ---------+--> Host (1 task) ---+--> ledger (redb)
//!  peers' questions --+    HostLogic        +--> report (watch)
//!  guard's events ----+                     +--> GuardClient <== socket ==> guard process --> guests
//! ```
//!
//! Owns: the ledger file, the guests' runtime directories, the guard process ([`guard`]), the report.
//!
//! Always holds: **guests-outlive-agents**: nothing here ends a guest but an act of the logic, and the guard
//! when the lease ends; a restarted agent adopts what lives before it decides anything.
//!
//! Must not: decide. What is to be done comes from the pure crate, which the simulator tests.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod agent;
mod cut;
mod exports;
mod facts;
pub mod guard;
mod guest_config;
mod host;
mod ledger;
mod mark;
mod ports;
mod services;
mod vm;

pub use agent::{Agent, AgentError, AgentHandle};
pub use cut::UnitsCut;
pub use facts::{capacity, hypervisor_facts};
pub use ledger::{LedgerError, LedgerStore};
pub use ports::{AgentConfig, Drivers, GuestGuard, PeerAsk, PoolDefinition, PoolFactory, Pools};
pub use quorate_agent_logic::{ExportOffer, ExportRequest, FlushRequest, TargetSays};
pub use services::RefusingDatapath;
pub use services::edges::ShippedFlows;
