//! Everything that can happen next.

use crate::faults::Fault;
use crate::guest::ProcId;
use crate::raft::Msg;
use crate::san::Call;
use quorate_agent_logic::{ExportRequest, GuestEvent, Observed, TargetSays, Token};
use quorate_controller_logic::{HeartbeatReply, HeartbeatRequest};
use quorate_membership::{Instant, PowerOffEvidence};
use quorate_types::report::SavedState;
use quorate_types::{Epoch, MigrationId, Revision, VmName};

/// Index of a host in the world.
pub(crate) type HostId = usize;

/// A message between daemons.
#[derive(Debug, Clone)]
pub(crate) enum Wire {
    Raft(Msg),
    Heartbeat {
        request: Box<HeartbeatRequest>,
        /// Kept by the sender: what the answer is matched with.
        sent: Instant,
        inc: u32,
    },
    HeartbeatReply {
        reply: HeartbeatReply,
        sequence: u64,
        sent: Instant,
        inc: u32,
    },
    AskTarget {
        token: Token,
        inc: u32,
        vm: VmName,
        id: MigrationId,
        ready: bool,
    },
    TargetSaysWhere {
        token: Token,
        inc: u32,
        vm: VmName,
        result: Result<String, String>,
    },
    /// Where shall the copy be written to?
    AskExport {
        proc: ProcId,
        inc: u32,
        request: ExportRequest,
    },
    ExportOpen {
        proc: ProcId,
        inc: u32,
        request: ExportRequest,
    },
    /// The guest is paused: its target takes its copy over.
    HandOver {
        proc: ProcId,
        vm: VmName,
        id: MigrationId,
    },
    HandedOver {
        proc: ProcId,
        id: MigrationId,
    },
    AskOutcome {
        token: Token,
        inc: u32,
        vm: VmName,
        id: MigrationId,
    },
    TargetSaysWhat {
        token: Token,
        inc: u32,
        vm: VmName,
        says: TargetSays,
    },
}

/// Events of one life of a daemon.
#[derive(Debug)]
pub(crate) enum D {
    /// The process has loaded its ledger and looks for its guests.
    Begin,
    RaftTick,
    /// What is committed here is applied.
    Apply,
    Heartbeat,
    AgentTick,
    LedgerDone,
    /// An answer or event of a guest.
    Guest {
        vm: VmName,
        token: Token,
        event: GuestEvent,
    },
    /// The guard says that it froze a guest.
    Froze(ProcId),
    /// A process is to be made.
    Spawn {
        token: Token,
        vm: VmName,
        epoch: Epoch,
        how: Spawn,
    },
    /// Probe of a ready check.
    Probe(ProcId),
    /// A peer has not answered.
    PeerTimeout {
        vm: VmName,
        token: Token,
        outcome: bool,
    },
    /// The source's driver hears that an ordered switchover failed.
    SwitchoverFailed(ProcId),
    /// Mirrors are looked at.
    Mirrors,
    /// The target of a migration has not taken over.
    HandOverTimeout(ProcId, MigrationId),
    /// Nobody ordered the switchover.
    SwitchoverWait(ProcId, Token),
    Round,
    ProposalTimeout(usize),
    FenceDone {
        host: HostId,
        generation: u64,
        result: Result<PowerOffEvidence, String>,
    },
    /// The SAN's management has answered a call, or has not in time.
    San {
        call: Call,
        why: Option<&'static str>,
    },
    /// The daemon starts a guard when there is none.
    RespawnGuard,
    /// The agent tells the kernel what is wanted of services.
    Datapath,
    /// The flows of a guest that is paused before its switchover go to its target.
    ShipFlows(ProcId),
    /// They are there.
    FlowsCome {
        source: ProcId,
        target: ProcId,
    },
}

/// How a process is made.
#[derive(Debug, Clone)]
pub(crate) enum Spawn {
    Boot { restore: Option<SavedState> },
    Incoming { id: MigrationId },
}

/// Events of one life of a guard.
#[derive(Debug)]
pub(crate) enum G {
    Feed,
    /// The lease may have come to its freeze or its end.
    Look,
    /// QEMU has answered to a freeze.
    Frozen {
        proc: ProcId,
        good: bool,
    },
}

/// What is asked of a guest by QMP.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Freeze,
    Dismiss,
    GuardFreeze(u32),
    Thaw,
    Query,
    Powerdown,
    Save(SavedState),
    Send { id: MigrationId, target: ProcId },
    Attach,
    Continue,
    Cancel,
}

/// Events of one QEMU process.
#[derive(Debug)]
pub(crate) enum Q {
    Boot,
    Listen,
    Write,
    /// A command of an agent's life.
    Ask {
        inc: u32,
        token: Token,
        ask: Ask,
    },
    Killed {
        by_guard: bool,
    },
    /// The guest has shut itself down.
    Off,
    SaveDone {
        inc: u32,
        token: Token,
        file: SavedState,
    },
    /// The stream makes progress, or not.
    Stream(MigrationId),
    /// The last state was sent.
    Final(MigrationId),
    /// The source knows that all was received.
    Acked(MigrationId),
}

/// Events of one boot of a host.
#[derive(Debug, Clone, Copy)]
pub(crate) enum H {
    Watchdog,
}

/// Events outside of all processes.
#[derive(Debug)]
pub(crate) enum W {
    Fault(Fault),
    /// A fault that has lasted long enough.
    Mend(Fault),
    PowerOn(HostId),
    /// Whoever kept a host off lets it on again.
    Revive(HostId),
    StartDaemon(HostId, u32),
    /// The fence device switches a host off.
    BmcOff(HostId),
    /// A target of the SAN lets a host in, or shuts it out.
    San {
        host: HostId,
        target: String,
        open: bool,
        /// The cut that whoever asked for it knew.
        knew: Option<Revision>,
    },
    NextFault,
    NextOp,
    /// Every client of a service sends a frame.
    Clients,
    /// An operator, or a member's program, does something to a service.
    ServiceOp,
}

/// An event.
#[derive(Debug)]
pub(crate) enum Event {
    Deliver {
        from: HostId,
        to: HostId,
        wire: Wire,
    },
    Daemon(HostId, u32, D),
    Guard(HostId, u32, G),
    Guest(ProcId, Q),
    Host(HostId, u32, H),
    World(W),
}

/// What a driver says of a guest.
pub(crate) fn observed_of(state: crate::guest::Vcpu) -> Observed {
    use crate::guest::Vcpu;
    match state {
        Vcpu::Starting => Observed::Unknown,
        Vcpu::Running => Observed::Running,
        Vcpu::Paused => Observed::Paused,
        Vcpu::IoError => Observed::IoError,
        Vcpu::InMigrate => Observed::InMigrate,
    }
}
