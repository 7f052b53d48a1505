//! A host: its clock, its processes and what survives them.

use crate::doors::Tasks;
use crate::event::HostId;
use crate::guest::ProcId;
use crate::leader::Leader;
use crate::raft::Node;
use crate::services::Datapath;
use crate::time::Clock;
use quorate_agent_logic::{AskToken, Effect, HostLogic, Input, Ledger, LedgerRecord, Token};
use quorate_membership::Instant;
use quorate_state::State;
use quorate_types::{BootId, HostName, HostReport, Millis, NodeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// A machine.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: HostName,
    pub(crate) node: NodeId,
    /// Only a voter: no host of the cluster, and no controller runs there.
    pub(crate) witness: bool,
    pub(crate) memory_mib: u64,
    pub(crate) clock: Clock,
    pub(crate) on: bool,
    /// Kept off by whoever switched it off.
    pub(crate) held_off: bool,
    /// Lives of the operating system.
    pub(crate) boots: u32,
    /// Lives of the daemon and of the guard.
    pub(crate) daemon_inc: u32,
    pub(crate) guard_inc: u32,
    /// Nothing at all runs before.
    pub(crate) stopped_until: u64,
    pub(crate) daemon_stopped_until: u64,
    pub(crate) guard_stopped_until: u64,
    pub(crate) daemon: Option<Box<Daemon>>,
    pub(crate) guard: Option<Guard>,
    /// Bound of its watchdog, if it has one.
    pub(crate) watchdog: Option<Millis>,
    /// True time of the last feed; absent: not armed.
    pub(crate) fed: Option<u64>,
    /// Durable: term, vote and log of the consensus group.
    pub(crate) raft: Node,
    /// Durable: up to here the state machine is rebuilt after a restart.
    pub(crate) snapshot: usize,
    /// Durable.
    pub(crate) ledger: Ledger,
    /// Time of a write to its own disk.
    pub(crate) disk_slow: bool,
    pub(crate) apply_slow: bool,
    /// The shared storage cannot be reached from here.
    pub(crate) storage_lost: bool,
    /// Services in its kernel.
    pub(crate) datapath: Datapath,
    /// What a broken ledger would still have after a restart.
    pub(crate) ledger_synced: (u64, Ledger),
}

impl Host {
    pub(crate) fn local(&self, now: u64) -> Instant {
        self.clock.local(now)
    }

    pub(crate) fn boot_id(&self) -> BootId {
        BootId(format!("{}-{}", self.name, self.boots))
    }

    pub(crate) fn guard_runs(&self, now: u64) -> bool {
        self.on && self.guard.is_some() && now >= self.stopped_until.max(self.guard_stopped_until)
    }
}

/// One life of `quorate serve`.
#[derive(Debug)]
pub(crate) struct Daemon {
    /// Absent until the ledger is loaded and the guests are found.
    pub(crate) logic: Option<HostLogic>,
    pub(crate) inbox: VecDeque<Input>,
    pub(crate) effects: VecDeque<Effect>,
    pub(crate) writing: Option<LedgerRecord>,
    pub(crate) runs: BTreeMap<Token, ProcId>,
    pub(crate) spawning: BTreeSet<Token>,
    pub(crate) asks: BTreeMap<AskToken, (HostId, Token, u32, quorate_types::VmName)>,
    pub(crate) next_ask: u64,
    pub(crate) applied: usize,
    pub(crate) state: Arc<State>,
    pub(crate) report: HostReport,
    /// The leader that has the report, and which.
    pub(crate) reported: Option<(NodeId, u64)>,
    pub(crate) wake_at: u64,
    pub(crate) raft_at: u64,
    pub(crate) apply_at: u64,
    /// Its replica has reached the revision of a grant once: it began with an older one.
    pub(crate) caught_up: bool,
    pub(crate) leader: Leader,
    /// Its tasks at the doors of the SAN.
    pub(crate) tasks: Tasks,
}

/// One life of `quorate guard`.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    pub(crate) deadline: Option<Instant>,
    /// Guests that it holds, and whether their pause is confirmed.
    pub(crate) guests: BTreeMap<ProcId, bool>,
    /// Freezes that wait for QEMU's answer.
    pub(crate) freezing: BTreeSet<ProcId>,
}
