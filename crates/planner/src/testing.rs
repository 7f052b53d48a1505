//! A small cluster to plan for: a real state, made by real commands, and hosts that report.
//!
//! Owns: the builder of the tests' inputs and agents that carry out every order at once. Every
//! plan that is committed through it is linted, and must be taken by `apply`.

use crate::{Input, Memory, Snapshot, lint, plan};
use quorate_membership::{Evidence, FenceProof, HostHealth, Instant};
use quorate_state::{
    Action, Command, Envelope, FORMAT, HostMode, Order, Outcome, Ownership, Plan, State, StopMode,
    VmRecord,
};
use quorate_types::report::{
    Capacity, HypervisorFacts, MigrationOutcome, MigrationReport, PoolReport, SavedState,
};
use quorate_types::spec::Power;
use quorate_types::{
    BootId, ByteSize, ClusterSettings, Epoch, HostName, HostReport, Manifest, MigrationId, Millis,
    Timestamp, VmName, VmPhase, VmReport,
};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

pub(crate) fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) reports: BTreeMap<HostName, HostReport>,
    pub(crate) health: BTreeMap<HostName, HostHealth>,
    pub(crate) proofs: Vec<FenceProof>,
    pub(crate) memory: Memory,
    pub(crate) now: Instant,
    pub(crate) settled: bool,
}

/// A host with 4 threads and 2 GiB, all networks and pools named in the tests.
pub(crate) fn report(name: &str) -> HostReport {
    let pool = PoolReport {
        usable: true,
        marker: Some("m1".into()),
        ..PoolReport::default()
    };
    let machines = [("q35", "pc-q35-10.0"), ("microvm", "microvm")];
    let machines = machines.map(|(family, newest)| (family.into(), newest.into()));
    HostReport {
        host: host(name),
        boot: BootId("b1".into()),
        sequence: 1,
        version: "0.1.0".into(),
        applied: Default::default(),
        guard_armed: true,
        watchdog_ms: Some(500),
        capacity: Capacity {
            cpus: 4,
            memory: ByteSize::mib(2048),
        },
        hypervisor: HypervisorFacts {
            qemu: "10.0.2".into(),
            accel: "tcg".into(),
            cpu_models: BTreeSet::from(["qemu64".to_owned()]),
            machines: machines.into(),
        },
        networks: ["lan"].map(|name| name.parse().unwrap()).into(),
        pools: BTreeMap::from([("shared".parse().unwrap(), pool)]),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::new(),
        uplinks: BTreeMap::new(),
        offences: BTreeMap::new(),
    }
}

impl World {
    /// Hosts `h1` to `hN`, all up and heard, and a manifest.
    pub(crate) fn new(hosts: u32, manifest: serde_json::Value) -> Self {
        Self::with(hosts, serde_json::from_value(manifest).unwrap())
    }

    pub(crate) fn with(hosts: u32, manifest: Manifest) -> Self {
        let mut world = Self {
            state: State::default(),
            reports: BTreeMap::new(),
            health: BTreeMap::new(),
            proofs: Vec::new(),
            memory: Memory::default(),
            now: Instant(1_000_000_000_000),
            settled: true,
        };
        world.command(Command::CreateCluster {
            id: "c1".into(),
            name: "lab".into(),
            ca_certificate: String::new(),
            ca_key: String::new(),
            host: host("h1"),
            address: "10.0.0.1:7".into(),
            settings: ClusterSettings::default(),
        });
        for n in 2..=hosts {
            world.command(Command::CreateToken {
                hash: format!("t{n}"),
                expires: Timestamp(u64::MAX),
            });
            world.command(Command::AdmitHost {
                token: format!("t{n}"),
                host: host(&format!("h{n}")),
                address: format!("10.0.0.{n}:7"),
            });
        }
        for n in 1..=hosts {
            let name = format!("h{n}");
            world.health.insert(host(&name), HostHealth::Up);
            world.reports.insert(host(&name), report(&name));
        }
        world.command(Command::ApplyManifest {
            base: None,
            manifest,
        });
        world
    }

    pub(crate) fn command(&mut self, command: Command) -> Outcome {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "ann".into(),
            command,
        };
        self.state.apply(&envelope).unwrap()
    }

    pub(crate) fn input(&self) -> Input<'_> {
        Input {
            state: &self.state,
            reports: &self.reports,
            health: &self.health,
            proofs: &self.proofs,
            now: self.now,
            memory: &self.memory,
            settled: self.settled,
        }
    }

    /// All of it as a file would keep it.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::of(&self.input(), "0.1.0", Timestamp(1_000_000));
        snapshot.seen.voters = self.state.hosts.values().map(|host| host.node).collect();
        snapshot
    }

    /// Guards and watchdogs of all hosts are armed.
    pub(crate) fn arm(&mut self) {
        for host in self.state.hosts.keys().cloned().collect::<Vec<_>>() {
            let armed = Some(Millis(500));
            self.command(Command::RecordArmed { host, armed });
        }
    }

    pub(crate) fn observe(&mut self) {
        self.memory.observe(&self.state, &self.reports, self.now);
    }

    /// The plan for now, checked.
    pub(crate) fn plan(&mut self) -> Plan {
        self.observe();
        let made = plan(&self.input());
        assert_eq!(made, plan(&self.input()), "not deterministic");
        let found = lint(&self.input(), &made);
        assert!(found.is_empty(), "{found:?}\nin {:#?}", words(&made));
        made
    }

    /// What would be done now, in words.
    pub(crate) fn words(&mut self) -> Vec<String> {
        words(&self.plan())
    }

    /// Plans and commits once; returns what was done, in words.
    pub(crate) fn step(&mut self) -> Vec<String> {
        let plan = self.plan();
        let words = words(&plan);
        if !plan.actions.is_empty() {
            self.command(Command::CommitPlan(plan));
        }
        words
    }

    /// Plans, commits and lets all hosts that are up act, until nothing changes any more.
    pub(crate) fn run(&mut self, rounds: u32) -> Vec<String> {
        let mut done = Vec::new();
        for _ in 0..rounds {
            let words = self.step();
            let changed = self.act();
            if words.is_empty() && !changed {
                return done;
            }
            done.extend(words);
        }
        panic!("no rest after {rounds} rounds: {done:#?}");
    }

    pub(crate) fn pass(&mut self, span: Millis) {
        self.now = self.now.plus(span);
    }

    pub(crate) fn record(&self, name: &str) -> &VmRecord {
        &self.state.vms[&vm(name)]
    }

    /// The host that owns a VM.
    pub(crate) fn at(&self, name: &str) -> Option<String> {
        match &self.record(name).ownership {
            Ownership::Free => None,
            Ownership::Owned { host, .. } => Some(host.to_string()),
            Ownership::Migrating { from, to, .. } => Some(format!("{from}>{to}")),
        }
    }

    pub(crate) fn migration(&self, name: &str) -> MigrationId {
        match &self.record(name).ownership {
            Ownership::Migrating { id, .. } => *id,
            other => panic!("{name} is {other:?}"),
        }
    }

    pub(crate) fn host_mode(&self, name: &str) -> HostMode {
        self.state.hosts[&host(name)].mode
    }

    /// Changes what one host says of one VM.
    pub(crate) fn says(&mut self, on: &str, name: &str, change: impl FnOnce(&mut VmReport)) {
        let report = self.reports.get_mut(&host(on)).unwrap();
        let seen = report
            .vms
            .entry(vm(name))
            .or_insert_with(|| blank(Epoch(0)));
        change(seen);
    }

    /// One side's word on the migration that is going on.
    pub(crate) fn says_outcome(&mut self, on: &str, name: &str, outcome: MigrationOutcome) {
        let id = self.migration(name);
        self.says(on, name, |report| {
            report.migration = Some(migration(id, outcome))
        });
    }

    pub(crate) fn kill(&mut self, name: &str) {
        self.health.insert(host(name), HostHealth::Dead);
        self.proofs.push(dead(name));
    }

    pub(crate) fn power(&mut self, name: &str, power: Power) {
        let mode = StopMode::Graceful;
        self.command(Command::SetPower {
            vm: vm(name),
            power,
            mode,
        });
    }

    pub(crate) fn drain(&mut self, name: &str) {
        let mode = HostMode::Draining;
        self.command(Command::SetHostMode {
            host: host(name),
            mode,
        });
    }

    pub(crate) fn ask_move(&mut self, name: &str, to: Option<&str>) {
        let to = to.map(host);
        self.command(Command::RequestMove { vm: vm(name), to });
    }

    /// Puts a VM on a host, running and ready.
    pub(crate) fn put(&mut self, name: &str, on: &str) {
        let action = Action::Start {
            vm: vm(name),
            host: host(on),
            abi: crate::guest_abi(self.reports.values(), self.record(name).spec.machine).unwrap(),
        };
        self.commit(action);
        self.act();
    }

    pub(crate) fn commit(&mut self, action: Action) {
        let reason = quorate_state::Reason::new("test");
        let plan = Plan {
            base: self.state.revision,
            actions: vec![quorate_state::PlannedAction { action, reason }],
        };
        self.command(Command::CommitPlan(plan));
    }

    /// Commits one action at this time of the wall clock.
    pub(crate) fn commit_at(&mut self, at: u64, action: Action) {
        let reason = quorate_state::Reason::new("test");
        let plan = Plan {
            base: self.state.revision,
            actions: vec![quorate_state::PlannedAction { action, reason }],
        };
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(at),
            by: "planner".into(),
            command: Command::CommitPlan(plan),
        };
        self.state.apply(&envelope).unwrap();
    }

    /// Begins a migration; both sides have taken it up.
    pub(crate) fn begin(&mut self, name: &str, to: &str) {
        self.commit(Action::Migrate {
            vm: vm(name),
            to: host(to),
        });
        let Ownership::Migrating {
            from, target_epoch, ..
        } = self.record(name).ownership.clone()
        else {
            panic!("not migrating")
        };
        self.says(from.as_str(), name, |report| {
            report.phase = VmPhase::MigratingOut
        });
        self.says_outcome(from.as_str(), name, MigrationOutcome::InProgress);
        self.says(to, name, |report| {
            report.epoch = target_epoch;
            report.phase = VmPhase::Incoming;
        });
        self.says_outcome(to, name, MigrationOutcome::InProgress);
    }

    /// Every host that is up carries out its orders; migrations need two rounds. Returns whether
    /// anything changed.
    pub(crate) fn act(&mut self) -> bool {
        let before = self.reports.clone();
        let up: Vec<HostName> = self
            .reports
            .keys()
            .filter(|name| self.health[*name] == HostHealth::Up)
            .cloned()
            .collect();
        for name in up {
            let orders = self.state.orders_for(&name);
            let report = self.reports.get_mut(&name).unwrap();
            let old = std::mem::take(&mut report.vms);
            for (vm, seen) in &old {
                if !orders.contains_key(vm) && seen.closed.0 > 0 {
                    let closed = seen.closed;
                    let gone = VmReport {
                        closed,
                        ..blank(Epoch(0))
                    };
                    report.vms.insert(vm.clone(), gone);
                }
            }
            for (vm, order) in orders {
                let was = old.get(&vm).cloned();
                let arrived = before.values().any(|report| {
                    let seen = report.vms.get(&vm).and_then(|seen| seen.migration.as_ref());
                    seen.is_some_and(|seen| seen.outcome == MigrationOutcome::Arrived)
                });
                report.vms.insert(vm, obey(&order, was, arrived));
            }
        }
        before != self.reports
    }
}

/// What a host reports after it carried out an order.
fn obey(order: &Order, was: Option<VmReport>, arrived: bool) -> VmReport {
    let closed = was.as_ref().map(|was| was.closed).unwrap_or_default();
    let mut report = VmReport {
        closed,
        ..blank(order.epoch())
    };
    match order {
        Order::Run { .. } => {
            report.phase = VmPhase::Running;
            report.ready = true;
        }
        Order::Stop { epoch, mode, .. } => {
            report.closed = *epoch;
            if *mode == StopMode::Save {
                report.saved = Some(SavedState {
                    pool: "shared".parse().unwrap(),
                    file: "saved".into(),
                });
            }
        }
        Order::MigrateOut { id, cancel, .. } => {
            report.phase = VmPhase::MigratingOut;
            report.ready = true;
            let mut outcome = MigrationOutcome::InProgress;
            if *cancel {
                report.phase = VmPhase::Running;
                outcome = MigrationOutcome::Failed;
            } else if arrived {
                report.phase = VmPhase::HandedOver;
                outcome = MigrationOutcome::Sent;
            }
            report.migration = Some(migration(*id, outcome));
        }
        Order::MigrateIn {
            id, cancel, epoch, ..
        } => {
            report.phase = VmPhase::Running;
            let mut outcome = MigrationOutcome::Arrived;
            if *cancel {
                report.phase = VmPhase::Absent;
                report.closed = *epoch;
                outcome = MigrationOutcome::Failed;
            }
            report.migration = Some(migration(*id, outcome));
        }
    }
    report
}

pub(crate) fn words(plan: &Plan) -> Vec<String> {
    let words = plan.actions.iter();
    words.map(|planned| planned.action.describe()).collect()
}

pub(crate) fn dead(name: &str) -> FenceProof {
    let evidence = Evidence::Lease {
        boot: None,
        silence: Millis(9000),
        bound: Millis(2525),
    };
    FenceProof::from_evidence(host(name), evidence).unwrap()
}

pub(crate) fn migration(id: MigrationId, outcome: MigrationOutcome) -> MigrationReport {
    MigrationReport {
        id,
        outcome,
        transferred: ByteSize(0),
        remaining: ByteSize(0),
        downtime_ms: None,
        switchover: false,
        reason: None,
    }
}

pub(crate) fn blank(epoch: Epoch) -> VmReport {
    VmReport {
        epoch,
        phase: VmPhase::Absent,
        ready: false,
        closed: Epoch(0),
        saved: None,
        guest_shutdown: false,
        restarts: 0,
        since: Timestamp(0),
        error: None,
        save_failures: 0,
        handed_over: None,
        migration: None,
        resident: ByteSize(0),
        mirrors: Vec::new(),
    }
}
