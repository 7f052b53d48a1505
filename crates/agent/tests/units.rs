//! Two agents whose VM has its disk on a unit with persistent reservations: who may write it, step by step.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use async_trait::async_trait;
use common::SOON;
use common::peers::Peers;
use quorate_agent::guard::client::{GuardError, GuardStatus};
use quorate_agent::{
    Agent, AgentConfig, AgentHandle, Drivers, GuestGuard, PoolDefinition, PoolFactory,
};
use quorate_hypervisor::fake::{FailAt, FakeSite, Fault};
use quorate_hypervisor::{Accel, ProcessIdentity};
use quorate_membership::{DiskCut, Evidence, FenceProof, Instant as BootInstant};
use quorate_network::FakeNetwork;
use quorate_state::{
    Action, Command, Envelope, FORMAT, GuestAbi, MigrationEnd, Ownership, Plan, PlannedAction,
    Reason, State, StopMode,
};
use quorate_storage::reservation::{ClusterTag, FakeLun, Reservation, ReservationKey};
use quorate_storage::{DiskFormat, FakePool, FakeStore, Pool};
use quorate_types::report::MigrationOutcome;
use quorate_types::{
    BootId, ByteSize, ClusterSettings, Epoch, HostName, MigrationId, Millis, PoolName, Timestamp,
    VmName, VmPhase, VmReport,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::watch;

fn host(n: u8) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn vm() -> VmName {
    VmName::new("db").unwrap()
}

fn boot_now() -> BootInstant {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap();
    BootInstant(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap())
}

/// A key of this cluster's.
fn key(host: u64, epoch: u64) -> ReservationKey {
    ReservationKey::new(ClusterTag::of("c1"), host, epoch).unwrap()
}

struct Allows(watch::Sender<GuardStatus>);

impl Allows {
    fn new() -> Arc<Self> {
        let status = GuardStatus {
            armed: true,
            watchdog_ms: Some(500),
            ..GuardStatus::default()
        };
        Arc::new(Self(watch::channel(status).0))
    }
}

#[async_trait]
impl GuestGuard for Allows {
    fn lease(&self, _: u64, _: u64) {}
    fn status(&self) -> watch::Receiver<GuardStatus> {
        self.0.subscribe()
    }
    async fn starting(&self, _: &VmName, _: u64, _: &str, _: u64) -> Result<(), GuardError> {
        Ok(())
    }
    async fn register(
        &self,
        _: &VmName,
        _: u64,
        _: &ProcessIdentity,
        _: PathBuf,
        _: bool,
    ) -> Result<(), GuardError> {
        Ok(())
    }
    async fn set_freezable(&self, _: &VmName, _: u64, _: bool) -> Result<(), GuardError> {
        Ok(())
    }
    async fn thawing(&self, _: &VmName, _: u64, _: u64) -> Result<(), GuardError> {
        Ok(())
    }
    async fn thawed(&self, _: &VmName, _: u64) -> Result<(), GuardError> {
        Ok(())
    }
    async fn unregister(&self, _: &VmName, _: u64) -> Result<(), GuardError> {
        Ok(())
    }
    async fn exit(&self) -> Result<(), GuardError> {
        Ok(())
    }
    fn detach(&self) {}
}

/// One host's pools: the store's images, over its own nexus.
struct Nexus {
    store: Arc<FakeStore>,
    number: u32,
}

impl PoolFactory for Nexus {
    fn open(&self, name: &PoolName, _: &PoolDefinition) -> Arc<dyn Pool> {
        let pool = FakePool::new(name.as_str(), self.store.clone());
        Arc::new(pool.with_nexus("c1", self.number))
    }
}

/// Two hosts that share a unit, a replica of the state, leases for ever.
struct World {
    dir: TempDir,
    site: FakeSite,
    store: Arc<FakeStore>,
    lun: FakeLun,
    peers: Peers,
    state: watch::Sender<Arc<State>>,
}

impl World {
    async fn new() -> Self {
        let (store, lun) = (FakeStore::new(), FakeLun::new());
        store.put("db", DiskFormat::Raw, 1 << 20);
        store.set_lun("db", lun.clone());
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
            site: FakeSite::new(),
            store,
            lun,
            peers: Peers::default(),
            state: watch::channel(Arc::new(State::default())).0,
        };
        world.form_cluster();
        for n in 1..=2 {
            world.start_agent(n).await;
        }
        let (state, peers) = (world.state.subscribe(), world.peers.clone());
        tokio::spawn(async move {
            loop {
                let agents: Vec<AgentHandle> = peers.0.lock().unwrap().values().cloned().collect();
                let revision = state.borrow().revision;
                for agent in agents {
                    agent.lease_ack(boot_now(), Millis(2000), revision);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        world
    }

    fn form_cluster(&self) {
        self.apply(Command::CreateCluster {
            id: "c1".into(),
            name: "lab".into(),
            ca_certificate: "cert".into(),
            ca_key: "key".into(),
            host: host(1),
            address: "10.0.0.1:7".into(),
            settings: ClusterSettings::default(),
        });
        self.apply(Command::CreateToken {
            hash: "t".into(),
            expires: Timestamp(9999),
        });
        self.apply(Command::AdmitHost {
            token: "t".into(),
            host: host(2),
            address: "10.0.0.2:7".into(),
        });
        let manifest = serde_json::json!({
            "pools": { "fc": { "kind": "block" } },
            "vms": { "db": { "memory": "64MiB", "disks": [{ "pool": "fc", "image": "db" }] } },
        });
        let manifest = serde_json::from_value(manifest).unwrap();
        let base = None;
        self.apply(Command::ApplyManifest { base, manifest });
    }

    async fn start_agent(&self, n: u8) {
        let config = AgentConfig {
            host: host(n),
            dir: self.agent_dir(n),
            cluster_id: "c1".into(),
            boot: BootId("boot".into()),
            version: "0".into(),
            accel: Accel::Tcg,
            sandbox: true,
            facts: Default::default(),
            reserved_memory: ByteSize::mib(64),
            migration_address: [10, 0, 0, n].into(),
            migration_tls: None,
            guard_command: vec![],
            watchdog: None,
            watchdog_timeout: Duration::from_millis(500),
            speaker_command: vec![],
        };
        let drivers = Drivers {
            hypervisor: Arc::new(self.site.host()),
            network: Arc::new(FakeNetwork::default()),
            pools: Arc::new(Nexus {
                store: self.store.clone(),
                number: n.into(),
            }),
            peers: Arc::new(self.peers.clone()),
            guard: Some(Allows::new()),
            datapath: Arc::new(quorate_balancer::FakeDatapath::new()),
        };
        let agent = Agent::start(config, drivers, self.state.subscribe());
        let agent = agent.await.unwrap();
        self.peers.0.lock().unwrap().insert(host(n), agent);
    }

    fn agent_dir(&self, n: u8) -> PathBuf {
        self.dir.path().join(format!("h{n}"))
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
            machine: "pc-q35-10.0".into(),
            cpu_model: "qemu64".into(),
        };
        let (vm, host) = (vm(), host(n));
        self.act(Action::Start { vm, host, abi });
    }

    fn migrate(&self, n: u8) -> MigrationId {
        self.act(Action::Migrate {
            vm: vm(),
            to: host(n),
        });
        let state = self.state.borrow();
        let Ownership::Migrating { id, .. } = state.vms[&vm()].ownership else {
            panic!("it does not migrate")
        };
        id
    }

    fn finish(&self, id: MigrationId, end: MigrationEnd) {
        self.act(Action::FinishMigration { vm: vm(), id, end });
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

    async fn outcome(&self, n: u8, id: MigrationId, outcome: MigrationOutcome) -> VmReport {
        let what = format!("{outcome:?}");
        self.until(n, &what, |vm| {
            let ours = vm.migration.as_ref().filter(|one| one.id == id);
            ours.is_some_and(|one| one.outcome == outcome)
        })
        .await
    }

    /// Hosts that may write.
    fn writers(&self) -> Vec<u32> {
        (1..=3).filter(|n| self.lun.may_write(*n)).collect()
    }

    async fn until_writers(&self, wanted: &[u32]) {
        let end = Instant::now() + SOON;
        while self.writers() != wanted {
            assert!(Instant::now() < end, "{:?} may write", self.writers());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Somebody outside of these agents, such as a third host.
    fn third(&self) -> Reservation {
        let device = Arc::new(self.lun.nexus(3));
        Reservation::new(device, ClusterTag::of("c1"), SOON)
    }

    async fn running() -> Self {
        let world = Self::new().await;
        world.start_vm(1);
        world.phase(1, VmPhase::Running).await;
        assert_eq!(world.writers(), [1]);
        world
    }
}

#[tokio::test]
async fn a_guest_has_its_unit_from_its_start_to_its_end() {
    let world = World::running().await;
    let seen = world.third().inspect().await.unwrap();
    assert_eq!(seen.ours, [key(1, 1)]);
    world.act(Action::Stop {
        vm: vm(),
        mode: StopMode::Hard,
    });
    world.until_writers(&[1, 2, 3]).await;
    assert!(!world.lun.is_reserved(), "it was let go of");
}

#[tokio::test]
async fn a_migration_hands_the_unit_over() {
    let world = World::running().await;
    for (from, to) in [(1_u8, 2_u8), (2, 1)] {
        let id = world.migrate(to);
        world.outcome(to, id, MigrationOutcome::Arrived).await;
        assert_eq!(world.writers(), [u32::from(to)], "before it is committed");
        world.phase(from, VmPhase::HandedOver).await;
        world.finish(id, MigrationEnd::Arrived { downtime_ms: None });
        let old = world.agent(from).report().vms[&vm()].epoch;
        world.until(from, "closed", |vm| vm.closed == old).await;
        assert_eq!(world.writers(), [u32::from(to)]);
    }
}

#[tokio::test]
async fn a_target_that_does_not_get_the_unit_gets_no_guest() {
    let world = World::running().await;
    world.site.copy_takes(Duration::from_millis(300));
    let id = world.migrate(2);
    world.until_writers(&[1, 2]).await;
    world.lun.set_down(2, true);
    world.outcome(1, id, MigrationOutcome::Failed).await;
    world.phase(1, VmPhase::Running).await;
    assert_eq!(world.writers(), [1], "the source took it back");
    world.lun.set_down(2, false);
    world.finish(id, MigrationEnd::StayedAtSource);
    // Its registration is gone already, and the next move works.
    world.outcome(2, id, MigrationOutcome::Failed).await;
    let id = world.migrate(2);
    world.outcome(2, id, MigrationOutcome::Arrived).await;
    assert_eq!(world.writers(), [2]);
}

#[tokio::test]
async fn a_broken_switchover_gives_the_unit_back_to_the_source() {
    let world = World::running().await;
    let fault = Fault::MigrationFails(FailAt::Device);
    world.site.fault("db", fault);
    let id = world.migrate(2);
    world.phase(1, VmPhase::HandedOver).await;
    assert!(!world.lun.may_write(1), "it was handed over");
    world.outcome(2, id, MigrationOutcome::Failed).await;
    world.finish(id, MigrationEnd::RefusedByTarget);
    world.phase(1, VmPhase::Running).await;
    assert_eq!(world.writers(), [1]);
}

#[tokio::test]
async fn a_unit_that_forgot_its_owner_is_told_again() {
    let world = World::running().await;
    world.lun.forget();
    assert_eq!(world.writers(), [1, 2, 3]);
    world.until_writers(&[1]).await;
    assert_eq!(world.agent(1).report().vms[&vm()].phase, VmPhase::Running);
}

#[tokio::test]
async fn a_guest_whose_unit_was_taken_is_paused_and_reported_then_ended() {
    let world = World::running().await;
    world.third().take_over(key(3, 2)).await.unwrap();
    let report = world.phase(1, VmPhase::IoError).await;
    let error = report.error.unwrap();
    assert!(
        error.contains("fc/db") && error.contains("has taken over"),
        "{error}"
    );
    assert!(world.site.executing("db").is_empty());
    world
        .until(1, "ended", |vm| vm.phase == VmPhase::Absent)
        .await;
    assert_eq!(world.writers(), [3]);
}

/// A target took the unit late, when its migration was long over: whatever it has under way is aborted, and not while the
/// guest here reads and writes.
#[tokio::test]
async fn a_guest_stands_still_while_another_host_is_cut_off_from_its_unit() {
    let world = World::running().await;
    world
        .site
        .fault("db", Fault::MigrationFails(FailAt::Device));
    let id = world.migrate(2);
    world.outcome(2, id, MigrationOutcome::Failed).await;
    world.finish(id, MigrationEnd::RefusedByTarget);
    world.phase(1, VmPhase::Running).await;
    let third = world.third();
    third.register(key(3, 2)).await.unwrap();
    third.hand_over(key(3, 2), Some(key(1, 1))).await.unwrap();
    assert_eq!(world.writers(), [3]);
    let report = world.phase(1, VmPhase::IoError).await;
    let error = report.error.unwrap();
    assert!(error.contains("stand still"), "{error}");
    world.until_writers(&[1]).await;
    world.phase(1, VmPhase::Running).await;
}

#[tokio::test]
async fn a_unit_of_a_stranger_is_refused() {
    let world = World::new().await;
    world.lun.put_key(3, 0xbad);
    world.start_vm(1);
    let refused = |vm: &VmReport| {
        vm.error
            .as_ref()
            .is_some_and(|e| e.contains("a stranger uses it"))
    };
    let report = world.until(1, "refused", refused).await;
    assert!(report.error.unwrap().contains("fc/db"));
    assert!(world.site.executing("db").is_empty());
    assert!(
        world
            .third()
            .facts()
            .await
            .unwrap()
            .keys
            .contains_key(&0xbad)
    );

    // An operator's word about another one, then about this one: the next try takes the unit.
    let word = |key: u64| Command::TakeUnit {
        pool: PoolName::new("fc").unwrap(),
        image: "db".into(),
        keys: [key].into(),
        hold: false,
    };
    world.apply(word(0xbae));
    world.until(1, "refused", refused).await;
    assert!(
        world
            .third()
            .facts()
            .await
            .unwrap()
            .keys
            .contains_key(&0xbad)
    );
    world.apply(word(0xbad));
    world.phase(1, VmPhase::Running).await;
    assert_eq!(world.writers(), [1]);
    assert!(world.third().inspect().await.unwrap().foreign.is_empty());
}

fn cut_of(n: u8, pool: &PoolName) -> Command {
    Command::CutStorage {
        host: host(n),
        pools: [pool.clone()].into(),
    }
}

#[tokio::test]
async fn a_host_that_was_cut_off_waits_until_it_is_let_in_again() {
    let world = World::running().await;
    let pool = PoolName::new("fc").unwrap();
    let epochs = || [("db".to_owned(), Epoch(1))].into();
    let early = world.agent(2).cut_units(&pool, &host(1), epochs()).await;
    let error = early["db"].as_ref().unwrap_err();
    assert!(error.contains("no cut of h1"), "{error}");
    assert_eq!(world.writers(), [1]);

    world.apply(cut_of(1, &pool));
    let done = world.agent(2).cut_units(&pool, &host(1), epochs()).await;
    let how = done["db"].as_ref().unwrap();
    assert!(
        how.contains("preempted") && how.contains("a cut, epoch 1"),
        "{how}"
    );
    assert_eq!(
        world.writers(),
        [2],
        "the host that made the cut, and runs nothing"
    );
    let report = world.phase(1, VmPhase::IoError).await;
    assert!(report.error.unwrap().contains("cut off"));
    let pid = |world: &World| {
        world
            .site
            .guest(&world.agent_dir(1).join("run/db"))
            .unwrap()
    };
    let before = pid(&world).identity().pid;
    let again = world.agent(2).cut_units(&pool, &host(1), epochs()).await;
    let how = again["db"].as_ref().unwrap();
    assert!(how.contains("no key of h1"), "{how}");

    let cuts = world.state.borrow().storage_cuts[&host(1)].clone();
    world.apply(Command::RestoreStorage {
        host: host(1),
        pools: cuts,
    });
    world.phase(1, VmPhase::Running).await;
    assert_eq!(world.writers(), [1]);
    assert_eq!(pid(&world).identity().pid, before, "its memory is kept");
}

#[tokio::test]
async fn after_a_cut_another_host_starts_the_vm_and_the_old_copy_ends() {
    let world = World::running().await;
    let pool = PoolName::new("fc").unwrap();
    world.apply(cut_of(1, &pool));
    let epochs = [("db".to_owned(), Epoch(1))].into();
    let done = world.agent(2).cut_units(&pool, &host(1), epochs).await;
    let disk = DiskCut {
        pool: pool.clone(),
        image: "db".into(),
        how: done["db"].clone().unwrap(),
        verified: true,
        took: Millis(1),
    };
    let evidence = Evidence::StorageCut {
        vm: vm(),
        epoch: Epoch(1),
        disks: vec![disk],
    };
    let proof = FenceProof::from_evidence(host(1), evidence).unwrap();
    world.act(Action::Release {
        vm: vm(),
        proofs: vec![proof],
        saved: None,
    });
    world.start_vm(2);
    world.phase(2, VmPhase::Running).await;
    world.until(1, "closed", |vm| vm.closed == Epoch(1)).await;
    assert_eq!(world.writers(), [2]);
    let seen = world.third().inspect().await.unwrap();
    assert_eq!(seen.ours, [key(2, 2)]);
}
