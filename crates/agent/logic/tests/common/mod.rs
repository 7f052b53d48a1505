//! Builders, and one host whose effects are collected and answered by hand.
#![allow(dead_code, unreachable_pub, missing_docs)]

use quorate_agent_logic::{
    Act, Adopted, Effect, Exit, GuestEvent, HostLogic, Input, Ledger, LedgerRecord, Observed,
    ObservedMigration, Token,
};
use quorate_membership::Instant;
use quorate_state::{GuestAbi, Order, StopMode};
use quorate_types::report::{MigrationOutcome, SavedState};
use quorate_types::spec::{DiskSpec, Machine, Power};
use quorate_types::{
    ByteSize, Epoch, HostName, LeaseTimings, MigrationId, Millis, PoolName, Revision, Timestamp,
    VmName, VmPhase, VmReport, VmSpec,
};
use std::collections::BTreeSet;

pub fn vm() -> VmName {
    VmName::new("db").unwrap()
}

pub fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

pub fn spec() -> VmSpec {
    VmSpec {
        cpus: 1,
        memory: ByteSize::mib(64),
        machine: Machine::Q35,
        boot: Default::default(),
        disks: vec![DiskSpec {
            pool: PoolName::new("san").unwrap(),
            image: "db.img".into(),
            format: Default::default(),
            size: None,
        }],
        nics: vec![],
        ready: None,
        depends_on: Default::default(),
        hosts: Default::default(),
        host_labels: Default::default(),
        labels: Default::default(),
        prefer: Vec::new(),
        resources: Default::default(),
        priority: 0,
        power: Power::Running,
        migration: Default::default(),
        shutdown_timeout: Millis::secs(60),
    }
}

pub fn abi() -> GuestAbi {
    GuestAbi {
        machine: "pc-q35-10.0".into(),
        cpu_model: "qemu64".into(),
    }
}

pub fn run(epoch: u64) -> Order {
    Order::Run {
        epoch: Epoch(epoch),
        spec: spec(),
        abi: abi(),
        restore: None,
    }
}

pub fn restore(epoch: u64) -> Order {
    Order::Run {
        epoch: Epoch(epoch),
        spec: spec(),
        abi: abi(),
        restore: Some(SavedState {
            pool: PoolName::new("san").unwrap(),
            file: "db.memory".into(),
        }),
    }
}

pub fn stop(epoch: u64, mode: StopMode) -> Order {
    Order::Stop {
        epoch: Epoch(epoch),
        mode,
        spec: spec(),
    }
}

pub fn out(id: u64, epoch: u64, cancel: bool) -> Order {
    Order::MigrateOut {
        id: MigrationId(id),
        epoch: Epoch(epoch),
        to: host("h2"),
        cancel,
        spec: spec(),
        abi: abi(),
    }
}

pub fn incoming(id: u64, epoch: u64, cancel: bool) -> Order {
    Order::MigrateIn {
        id: MigrationId(id),
        epoch: Epoch(epoch),
        from: host("h1"),
        cancel,
        spec: spec(),
        abi: abi(),
    }
}

pub fn exit(detail: &str) -> GuestEvent {
    GuestEvent::Exited(Exit {
        by_guest: false,
        by_guard: false,
        ran: false,
        detail: detail.into(),
    })
}

/// One host with one VM.
pub struct Bench {
    pub logic: HostLogic,
    pub now: Instant,
    pub revision: u64,
    /// All effects so far that were not taken.
    pub effects: Vec<Effect>,
    /// What is durable.
    pub disk: Ledger,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(Ledger::default(), &[])
    }

    pub fn with(ledger: Ledger, adopted: &[Adopted]) -> Self {
        let now = Instant(1_000_000_000);
        let disk = ledger.clone();
        let (logic, effects) = HostLogic::new(LeaseTimings::default(), ledger, adopted, now);
        let mut bench = Self {
            logic,
            now,
            revision: 0,
            effects: vec![],
            disk,
        };
        bench.take_in(effects);
        bench
    }

    /// The agent's process ends, another one finds these guests.
    pub fn restart(self, adopted: &[Adopted]) -> Self {
        let mut next = Self::with(self.disk, adopted);
        next.now = self.now;
        next.revision = self.revision;
        next
    }

    fn take_in(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            if let Effect::Ledger(record) = &effect {
                self.disk.apply(record);
            }
            self.effects.push(effect);
        }
    }

    pub fn step(&mut self, input: Input) {
        let effects = self.logic.step(self.now, input);
        self.take_in(effects);
        assert_eq!(&self.disk, self.logic.ledger());
    }

    pub fn order(&mut self, order: Option<Order>) {
        self.revision += 1;
        let known: BTreeSet<VmName> = [vm()].into();
        let orders = order.map(|order| (vm(), order)).into_iter().collect();
        self.step(Input::Orders {
            revision: Revision(self.revision),
            orders,
            known,
        });
    }

    pub fn ack(&mut self) {
        self.ack_from(self.revision);
    }

    pub fn ack_from(&mut self, revision: u64) {
        self.step(Input::LeaseAck {
            sent: self.now,
            granted: Millis(2000),
            revision: Revision(revision),
        });
    }

    /// Time passes; the lease is renewed meanwhile.
    pub fn held(&mut self, span: Millis) {
        let end = self.now.plus(span);
        while self.now < end {
            let next = self.now.plus(Millis(200)).min(end);
            while let Some(at) = self.logic.next_wakeup(self.now).filter(|at| *at <= next) {
                self.now = at;
                self.step(Input::Tick);
            }
            self.now = next;
            self.ack();
        }
    }

    /// Time passes without a heartbeat.
    pub fn silent(&mut self, span: Millis) {
        let end = self.now.plus(span);
        while let Some(at) = self.logic.next_wakeup(self.now).filter(|at| *at <= end) {
            self.now = at;
            self.step(Input::Tick);
        }
        self.now = end;
        self.step(Input::Tick);
    }

    pub fn event(&mut self, token: Token, event: GuestEvent) {
        self.step(Input::Guest {
            vm: vm(),
            token,
            event,
        });
    }

    /// The acts asked for since the last time, with their tokens.
    pub fn acts(&mut self) -> Vec<(Token, Act)> {
        let effects = std::mem::take(&mut self.effects);
        let act = |effect| match effect {
            Effect::Guest { token, act, .. } => Some((token, act)),
            _ => None,
        };
        effects.into_iter().filter_map(act).collect()
    }

    /// The only act asked for since the last time.
    pub fn act(&mut self) -> (Token, Act) {
        let mut acts = self.acts();
        assert_eq!(acts.len(), 1, "{acts:?}");
        acts.remove(0)
    }

    pub fn records(&mut self) -> Vec<LedgerRecord> {
        let record = |effect: &Effect| match effect {
            Effect::Ledger(record) => Some(record.clone()),
            _ => None,
        };
        self.effects.iter().filter_map(record).collect()
    }

    pub fn report(&self) -> VmReport {
        self.logic.report(Timestamp(0))[&vm()].clone()
    }

    pub fn phase(&self) -> VmPhase {
        self.report().phase
    }

    /// A guest that runs under the epoch; its process.
    pub fn running(epoch: u64) -> (Self, Token) {
        let mut bench = Self::new();
        bench.order(Some(run(epoch)));
        bench.ack();
        let (token, act) = bench.act();
        assert!(matches!(act, Act::Start { .. }));
        bench.event(token, GuestEvent::Started);
        assert_eq!(bench.phase(), VmPhase::Running);
        bench.effects.clear();
        (bench, token)
    }
}

pub fn is_start(act: &Act) -> bool {
    matches!(act, Act::Start { .. })
}

pub fn adopted(observed: Observed, migration: ObservedMigration) -> Adopted {
    Adopted {
        vm: vm(),
        run: Token(1),
        observed,
        migration,
    }
}

pub fn outcome(bench: &Bench) -> MigrationOutcome {
    bench.report().migration.unwrap().outcome
}
