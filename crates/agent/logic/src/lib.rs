//! What a host does with its guests: decisions only.
//!
//! ```text
//!  replica --Orders-->  +-----------+ --Ledger (durable first)-->  ledger
//!  leader --LeaseAck->  | HostLogic | --Guest{act}------------->  one task per VM -> QEMU, taps, guard
//!  guests --Guest---->  |  VmMachine| --AskTarget/AskOutcome---->  peers
//!  guard --Froze----->  +-----------+ --Report------------------>  heartbeats
//! ```
//!
//! Owns: the lease as the host sees it, the orders, the view of the ledger, and a state machine per VM (diagram
//! and table in [`vm`]).
//!
//! Always holds:
//! 1. Nothing is started or resumed but under a held lease, with a replica as fresh as its
//!    acknowledgement, an epoch that is not closed, and an order for this host.
//! 2. Nothing is ended for want of an order before a lease was held with a fresh replica once: a
//!    restarted agent sees old states first.
//! 3. An epoch is reported closed only when its process is gone and the ledger has it.
//! 4. A guest whose switchover was ordered is not resumed here unless ownership came back by commit and the
//!    target says that it never ran; without that word it is restarted from its disks.
//! 5. There is no dead end: what fails is tried again, later and later.
//!
//! Must not: freeze guests when the lease ends (the guard does, also when the agent hangs), read a clock,
//! touch files or sockets, spawn anything. The simulator drives this very crate.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod effect;
mod host;
mod input;
mod ledger;
mod mirror;
mod services;
pub mod vm;
mod write_map;

pub use effect::{Act, Effect, Token};
pub use host::HostLogic;
pub use input::{
    Adopted, AskToken, Exit, GuestEvent, Input, Observed, ObservedMigration, TargetSays,
};
pub use ledger::{Ledger, LedgerEntry, LedgerRecord, SendEntry, SendStage};
pub use mirror::{
    ExportOffer, ExportRequest, Mirror, MirrorStep, grow_step, keeps_export, may_export,
    mirror_step, silent_step,
};
pub use services::{service_table, services_wanted};
pub use write_map::{FlushRequest, Map, MapMemory, MapStep, lacks, map_step};
