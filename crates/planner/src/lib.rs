//! What the cluster does next: a pure function from state, reports and health to a [`Plan`].
//!
//! ```text
//! Input{state, reports, health, proofs, now, memory} --plan()--> Plan{base, actions with reasons}
//!   settle migrations -> release what is proven stopped -> stop -> start -> asked moves -> relocate -> make room -> host modes -> balance
//! ```
//!
//! Owns: every choice (who runs where, what moves, what waits). Always holds:
//! * equal input gives an equal plan;
//! * no VM is started that was not released with a proof (**proof-before-start**), and `apply`
//!   checks that again;
//! * no VM is stopped because of what happens to another one (**dependents-stay-up**);
//! * each VM is judged by itself: the recovery of one never waits for the migration of another;
//! * a plan that has been carried out is not planned again: with unchanged input the loop of plan
//!   and apply comes to rest.
//!
//! Must not: read a clock, draw random numbers, do I/O, believe silence. Within one plan later
//! steps see the picture that earlier ones leave ([`work::Work`]), so room is never given twice.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod abi;
mod act;
mod balance;
mod capacity;
mod choose;
mod copies;
mod depends;
mod domains;
pub mod engine;
mod explain;
mod fit;
mod forecast;
mod groups;
mod heard;
mod hosts;
mod lint;
mod lists;
mod lost;
mod make_room;
mod memory;
mod migrate;
mod moves;
mod names;
mod place;
mod preempt;
mod reach;
mod recover;
mod relocate;
mod repair;
mod room;
mod score;
mod snapshot;
mod stop;
mod work;

pub use abi::{cpu_baseline, guest_abi};
pub use balance::{Advice, Balance, HostLoad, balance};
pub use capacity::{
    Bound, Broken, Capacity, CapacityQuestion, FailureSet, Restart, RestartPlan, Shortfall,
    capacity, shortfall,
};
pub use explain::{Explanation, explain, waiting, waiting_hosts, what_move};
pub use forecast::{
    End, Forecast, ForecastError, Foreseen, Moved, Outage, Stage, Stays, Step, Unplaced, forecast,
    forecast_on,
};
pub use lint::{Violation, checked, lint};
pub use memory::Memory;
pub use snapshot::{SNAPSHOT_FORMAT, Seen, Snapshot, SnapshotError};

use quorate_membership::{FenceProof, HostHealth, Instant};
use quorate_state::{Plan, State};
use quorate_types::{HostName, HostReport};
use std::collections::BTreeMap;
use work::Work;

/// Memory that QEMU needs beside the guest's own, in bytes.
pub const OVERHEAD_BYTES: u64 = 64 << 20;

/// Virtual CPUs per CPU thread up to which a host is not thought to be crowded.
pub const CPU_OVERCOMMIT: u32 = 8;

/// Everything a decision rests on.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// What is agreed.
    pub state: &'a State,
    /// Newest report of each host that this leader has heard.
    pub reports: &'a BTreeMap<HostName, HostReport>,
    /// How each host looks to this leader.
    pub health: &'a BTreeMap<HostName, HostHealth>,
    /// Proofs about whole hosts that hold now. One about a host that is up is not used.
    pub proofs: &'a [FenceProof],
    /// The leader's clock.
    pub now: Instant,
    /// What this leader remembers; the caller keeps it up to date with [`Memory::observe`].
    pub memory: &'a Memory,
    /// This leader has waited long enough to have heard every live host once. Before that nothing
    /// is placed or moved unless every host is heard or proven dead.
    pub settled: bool,
}

/// Decides what to do now. Empty when there is nothing to do.
#[must_use]
pub fn plan(input: &Input<'_>) -> Plan {
    let work = decide(input, false);
    Plan {
        base: input.state.revision,
        actions: work.actions,
    }
}

/// Runs all steps; with `notes`, also collects why nothing is done for what is not as wanted.
fn decide<'a>(input: &Input<'a>, notes: bool) -> Work<'a> {
    let mut work = Work::new(input, notes);
    if input.state.cluster.is_none() {
        return work;
    }
    migrate::run(&mut work);
    recover::run(&mut work);
    copies::run(&mut work);
    stop::run(&mut work);
    place::run(&mut work);
    moves::run(&mut work);
    relocate::run(&mut work);
    make_room::run(&mut work);
    hosts::run(&mut work);
    balance::run(&mut work);
    work
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
