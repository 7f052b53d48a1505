//! Agents with the real QEMU and the real guard, on this machine: firmware without anything to boot is
//! guest enough.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::peers::Peers;
use common::{SOON, be_a_guard};
use quorate_agent::{Agent, AgentConfig, AgentHandle, Drivers, Pools};
use quorate_hypervisor::Accel;
use quorate_hypervisor::qemu::QemuDriver;
use quorate_membership::Instant as BootInstant;
use quorate_network::FakeNetwork;
use quorate_state::{
    Action, Command, Envelope, FORMAT, GuestAbi, MigrationEnd, Ownership, Plan, PlannedAction,
    Reason, State, StopMode,
};
use quorate_storage::{DirectoryConfig, DirectoryPool, Pool as _};
use quorate_types::report::MigrationOutcome;
use quorate_types::{
    BootId, ByteSize, ClusterSettings, Epoch, HostName, Millis, Timestamp, VmName, VmPhase,
    VmReport,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::watch;

/// Not a test: the guard's process, when this very program is started as one.
#[test]
fn guard_process() {
    be_a_guard();
}

fn host(n: u8) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn vm() -> VmName {
    VmName::new("db").unwrap()
}

struct World {
    dir: TempDir,
    peers: Peers,
    state: watch::Sender<Arc<State>>,
    leases: Arc<AtomicBool>,
}

impl World {
    async fn new(hosts: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let san = dir.path().join("san");
        std::fs::create_dir(&san).unwrap();
        DirectoryPool::new(DirectoryConfig::new("san", &san, "c1", "h1"))
            .define()
            .await
            .unwrap();
        let world = Self {
            dir,
            peers: Peers::default(),
            state: watch::channel(Arc::new(State::default())).0,
            leases: Arc::new(AtomicBool::new(true)),
        };
        world.apply(Command::CreateCluster {
            id: "c1".into(),
            name: "lab".into(),
            ca_certificate: "cert".into(),
            ca_key: "key".into(),
            host: host(1),
            address: "127.0.0.1:7".into(),
            settings: ClusterSettings::default(),
        });
        for n in 2..=hosts {
            world.apply(Command::CreateToken {
                hash: n.to_string(),
                expires: Timestamp(9999),
            });
            world.apply(Command::AdmitHost {
                token: n.to_string(),
                host: host(n),
                address: format!("127.0.0.1:{n}"),
            });
        }
        let manifest = serde_json::json!({
            "pools": { "san": { "kind": "directory", "path": san } },
            "vms": { "db": {
                "memory": "64MiB",
                "disks": [{ "pool": "san", "image": "db.raw", "size": "1MiB" }],
            } },
        });
        world.apply(Command::ApplyManifest {
            base: None,
            manifest: serde_json::from_value(manifest).unwrap(),
        });
        for n in 1..=hosts {
            world.start_agent(n).await;
        }
        world.renew_leases();
        world
    }

    fn renew_leases(&self) {
        let (state, peers) = (self.state.subscribe(), self.peers.clone());
        let leases = self.leases.clone();
        tokio::spawn(async move {
            loop {
                let agents: Vec<AgentHandle> = peers.0.lock().unwrap().values().cloned().collect();
                let revision = state.borrow().revision;
                for agent in agents {
                    if leases.load(Ordering::SeqCst) {
                        let now = BootInstant(common::boottime_ns());
                        agent.lease_ack(now, Millis(2000), revision);
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }

    fn agent_dir(&self, n: u8) -> PathBuf {
        self.dir.path().join(format!("h{n}"))
    }

    async fn start_agent(&self, n: u8) {
        let dir = self.agent_dir(n);
        let config = AgentConfig {
            host: host(n),
            cluster_id: "c1".into(),
            boot: BootId("boot".into()),
            version: "0".into(),
            accel: Accel::Tcg,
            sandbox: true,
            facts: Default::default(),
            reserved_memory: ByteSize::mib(64),
            migration_address: [127, 0, 0, 1].into(),
            migration_tls: None,
            guard_command: common::config(&dir).command,
            speaker_command: vec![],
            watchdog: None,
            watchdog_timeout: Duration::from_millis(500),
            dir,
        };
        let drivers = Drivers {
            hypervisor: Arc::new(QemuDriver::new("qemu-system-x86_64")),
            network: Arc::new(FakeNetwork::new()),
            datapath: Arc::new(quorate_balancer::FakeDatapath::new()),
            pools: Arc::new(Pools {
                cluster_id: "c1".into(),
                host: host(n),
            }),
            peers: Arc::new(self.peers.clone()),
            guard: None,
        };
        let agent = Agent::start(config, drivers, self.state.subscribe());
        let agent = agent.await.unwrap();
        self.peers.0.lock().unwrap().insert(host(n), agent);
    }

    async fn stop_agent(&self, n: u8) {
        let agent = self.peers.0.lock().unwrap().remove(&host(n)).unwrap();
        agent.shutdown().await;
    }

    fn agent(&self, n: u8) -> AgentHandle {
        self.peers.get(&host(n)).unwrap()
    }

    fn apply(&self, command: Command) {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1000),
            by: "test".into(),
            command,
        };
        self.state.send_modify(|state| {
            let mut next = State::clone(state);
            next.apply(&envelope).unwrap();
            *state = Arc::new(next);
        });
    }

    fn act(&self, action: Action) {
        let base = self.state.borrow().revision;
        let reason = Reason::new("test");
        let actions = vec![PlannedAction { action, reason }];
        self.apply(Command::CommitPlan(Plan { base, actions }));
    }

    fn start_vm(&self, n: u8) {
        let abi = GuestAbi {
            machine: "q35".into(),
            cpu_model: "qemu64".into(),
        };
        let (vm, host) = (vm(), host(n));
        self.act(Action::Start { vm, host, abi });
    }

    async fn until(&self, n: u8, what: &str, good: impl Fn(&VmReport) -> bool) -> VmReport {
        let mut reports = self.agent(n).reports();
        let seen = reports.wait_for(|report| report.vms.get(&vm()).is_some_and(&good));
        match tokio::time::timeout(SOON, seen).await {
            Ok(report) => report.unwrap().vms[&vm()].clone(),
            Err(_) => panic!("h{n} never was {what}: {:#?}", self.agent(n).report().vms),
        }
    }

    async fn phase(&self, n: u8, phase: VmPhase) -> VmReport {
        let what = format!("{phase:?}");
        self.until(n, &what, |vm| vm.phase == phase).await
    }

    fn pid(&self, n: u8) -> i32 {
        let path = self.agent_dir(n).join("run/db/qemu.pid");
        let text = std::fs::read_to_string(path).unwrap();
        text.trim().parse().unwrap()
    }

    async fn stop_vm(&self, n: u8) {
        self.act(Action::Stop {
            vm: vm(),
            mode: StopMode::Hard,
        });
        let epoch = self.agent(n).report().vms[&vm()].epoch;
        self.until(n, "closed", |vm| vm.closed == epoch).await;
    }

    /// Ends what would outlive the test.
    async fn clean(self, hosts: u8) {
        for n in 1..=hosts {
            let end = Instant::now() + SOON;
            while let Err(error) = self.agent(n).retire_guard().await {
                assert!(Instant::now() < end, "the guard does not end: {error}");
            }
            self.stop_agent(n).await;
        }
    }
}

impl Drop for World {
    /// A test that failed leaves nothing behind: what has this test's directory in its command line is
    /// ours.
    fn drop(&mut self) {
        let ours = self.dir.path().to_string_lossy().into_owned();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok());
            if String::from_utf8_lossy(&line).contains(&ours)
                && let Some(pid) = pid.and_then(rustix::process::Pid::from_raw)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_lease_freezes_and_a_renewed_one_thaws() {
    let world = World::new(1).await;
    world.start_vm(1);
    world.phase(1, VmPhase::Running).await;
    let pid = world.pid(1);
    world.leases.store(false, Ordering::SeqCst);
    let lost = Instant::now();
    world.phase(1, VmPhase::Frozen).await;
    let took = lost.elapsed();
    tokio::time::sleep_until((lost + Duration::from_millis(2600)).into()).await;
    assert_eq!(world.pid(1), pid);
    world.leases.store(true, Ordering::SeqCst);
    let renewed = Instant::now();
    world.phase(1, VmPhase::Running).await;
    println!(
        "frozen after {took:?}, thawed {:?} after the renewal",
        renewed.elapsed()
    );
    assert_eq!(world.pid(1), pid, "the same guest");
    world.stop_vm(1).await;
    world.clean(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guard_acts_without_an_agent_and_the_next_agent_thaws() {
    let world = World::new(1).await;
    world.start_vm(1);
    world.phase(1, VmPhase::Running).await;
    let pid = world.pid(1);
    world.leases.store(false, Ordering::SeqCst);
    world.stop_agent(1).await;
    let gone = Instant::now();
    tokio::time::sleep_until((gone + Duration::from_millis(2400)).into()).await;
    world.start_agent(1).await;
    let report = world.until(1, "adopted", |_| true).await;
    assert_eq!(report.phase, VmPhase::Frozen, "the guard did it");
    world.leases.store(true, Ordering::SeqCst);
    world.phase(1, VmPhase::Running).await;
    assert_eq!(world.pid(1), pid);
    world.stop_vm(1).await;
    world.clean(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_qemu_is_made_anew_at_once() {
    // The machine may have other work: it is the quickest of some that says how quick it is.
    let mut quickest = Duration::MAX;
    for _ in 0..5 {
        let world = World::new(1).await;
        world.start_vm(1);
        world.phase(1, VmPhase::Running).await;
        let pid = rustix::process::Pid::from_raw(world.pid(1)).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let killed = Instant::now();
        world.until(1, "restarting", |vm| vm.restarts == 1).await;
        let began = killed.elapsed();
        quickest = quickest.min(began);
        world.phase(1, VmPhase::Running).await;
        println!(
            "restart begun after {began:?}, running after {:?}",
            killed.elapsed()
        );
        world.stop_vm(1).await;
        world.clean(1).await;
        if quickest < Duration::from_millis(300) {
            break;
        }
    }
    assert!(quickest < Duration::from_millis(300), "{quickest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_to_and_fro_and_through_a_file() {
    let world = World::new(2).await;
    world.start_vm(1);
    world.phase(1, VmPhase::Running).await;
    for (from, to) in [(1, 2), (2, 1)] {
        world.act(Action::Migrate {
            vm: vm(),
            to: host(to),
        });
        let begun = Instant::now();
        let Ownership::Migrating { id, epoch, .. } = world.state.borrow().vms[&vm()].ownership
        else {
            panic!("it does not migrate")
        };
        let arrived = |vm: &VmReport| {
            let ours = vm.migration.as_ref().filter(|one| one.id == id);
            ours.is_some_and(|one| one.outcome == MigrationOutcome::Arrived)
        };
        world.until(to, "arrived", arrived).await;
        let report = world.phase(from, VmPhase::HandedOver).await;
        let downtime = report.migration.unwrap().downtime_ms;
        println!(
            "arrived after {:?}, downtime {downtime:?} ms",
            begun.elapsed()
        );
        world.act(Action::FinishMigration {
            vm: vm(),
            id,
            end: MigrationEnd::Arrived { downtime_ms: None },
        });
        world.until(from, "closed", |vm| vm.closed == epoch).await;
        world.phase(to, VmPhase::Running).await;
    }
    // Quick migration: save, start elsewhere from the file.
    world.act(Action::Stop {
        vm: vm(),
        mode: StopMode::Save,
    });
    let epoch = world.agent(1).report().vms[&vm()].epoch;
    let report = world.until(1, "saved", |vm| vm.closed == epoch).await;
    let evidence = quorate_membership::Evidence::Closed {
        vm: vm(),
        closed: epoch,
    };
    let proof = quorate_membership::FenceProof::from_evidence(host(1), evidence).unwrap();
    assert!(report.saved.is_some());
    world.act(Action::Release {
        vm: vm(),
        proofs: vec![proof],
        saved: report.saved,
    });
    world.start_vm(2);
    let report = world.phase(2, VmPhase::Running).await;
    assert_eq!(report.epoch, Epoch(epoch.0 + 1));
    assert_eq!(report.error, None);
    world.stop_vm(2).await;
    world.clean(2).await;
}
