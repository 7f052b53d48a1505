//! What the view says in each condition.

use super::*;
use crate::view::{HostState, Level, VmState, VmView};
use quorate_membership::HostHealth;
use quorate_state::{GuestAbi, HostRecord, Object, OrderKind, Ownership, VmRecord};
use quorate_types::report::{
    Capacity, HypervisorFacts, LinkReport, MigrationOutcome, MigrationReport, PoolReport,
};
use quorate_types::{
    BootId, ByteSize, Epoch, MigrationId, Revision, Timestamp, VmPhase, VmReport, VmSpec,
};

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn vm(name: &str) -> VmName {
    name.parse().unwrap()
}

/// An idle host that can, or cannot, use the pool `shared`.
pub(super) fn with_pool(name: &HostName, usable: bool) -> ObservedHost {
    let mut report = report(name.as_str());
    let pool = PoolReport {
        usable,
        ..PoolReport::default()
    };
    report.pools = [("shared".parse().unwrap(), pool)].into();
    ObservedHost {
        health: HostHealth::Up,
        lease_left: Millis(1800),
        report: Some(report),
        fencing: None,
    }
}

struct Scene {
    state: State,
    seen: Observed,
}

impl Scene {
    /// Three hosts that are well, one VM on h2.
    fn new() -> Self {
        let mut state = State::default();
        let mut seen = Observed {
            leader: Some(host("h1")),
            quorate: true,
            voters: [1, 2, 3].into(),
            ..Observed::default()
        };
        for (node, name) in [(1, "h1"), (2, "h2"), (3, "h3")] {
            let record = HostRecord {
                node,
                address: format!("192.0.2.{node}:7420"),
                mode: quorate_state::HostMode::Active,
                spec: Default::default(),
                joined: Timestamp(0),
                armed: Some(Millis(500)),
                changed: Revision(1),
            };
            state.hosts.insert(host(name), record);
            let observed = ObservedHost {
                health: HostHealth::Up,
                lease_left: Millis(1800),
                report: Some(report(name)),
                fencing: None,
            };
            seen.hosts.insert(host(name), observed);
        }
        let mut scene = Self { state, seen };
        scene.own("db", owned("h2", 3));
        scene.phase("h2", "db", 3, VmPhase::Running);
        scene
    }

    fn own(&mut self, name: &str, ownership: Ownership) {
        let spec: VmSpec = serde_json::from_str(r#"{"memory": "128MiB"}"#).unwrap();
        let record = VmRecord {
            active: Some(spec.clone()),
            spec,
            abi: Some(GuestAbi {
                machine: "q35".into(),
                cpu_model: "qemu64".into(),
            }),
            ownership,
            last_epoch: Epoch(3),
            saved: None,
            move_request: None,
            failed_moves: 0,
            deleting: false,
            last_host: Some(host("h2")),
            decisions: Vec::new(),
            changed: Revision(2),
        };
        self.state.vms.insert(vm(name), record);
    }

    fn report(&mut self, name: &str) -> &mut HostReport {
        self.seen
            .hosts
            .get_mut(&host(name))
            .unwrap()
            .report
            .as_mut()
            .unwrap()
    }

    fn phase(&mut self, on: &str, name: &str, epoch: u64, phase: VmPhase) -> &mut VmReport {
        let report = VmReport {
            epoch: Epoch(epoch),
            phase,
            ready: phase == VmPhase::Running,
            closed: Epoch(0),
            saved: None,
            guest_shutdown: false,
            restarts: 0,
            since: Timestamp(5),
            error: None,
            save_failures: 0,
            handed_over: None,
            migration: None,
            resident: ByteSize(0),
            mirrors: Vec::new(),
        };
        let vms = &mut self.report(on).vms;
        vms.insert(vm(name), report);
        vms.get_mut(&vm(name)).unwrap()
    }

    fn health(&mut self, name: &str, health: HostHealth) {
        self.seen.hosts.get_mut(&host(name)).unwrap().health = health;
    }

    fn view(&self) -> ClusterView {
        let me = Answering {
            host: host("h1"),
            version: "1".into(),
        };
        build(&self.state, Some(&self.seen), &me)
    }

    fn db(&self) -> VmView {
        self.view().vms.remove(0)
    }

    fn texts(&self) -> Vec<String> {
        self.view()
            .cluster
            .problems
            .into_iter()
            .map(|p| p.text)
            .collect()
    }
}

fn owned(on: &str, epoch: u64) -> Ownership {
    Ownership::Owned {
        host: host(on),
        epoch: Epoch(epoch),
        order: OrderKind::Run,
    }
}

fn report(name: &str) -> HostReport {
    HostReport {
        host: host(name),
        boot: BootId("b".into()),
        sequence: 1,
        version: "1".into(),
        applied: Revision(2),
        guard_armed: true,
        watchdog_ms: Some(500),
        capacity: Capacity {
            cpus: 4,
            memory: ByteSize::mib(4096),
        },
        hypervisor: HypervisorFacts::default(),
        networks: BTreeSet::new(),
        pools: BTreeMap::new(),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::new(),
        uplinks: BTreeMap::new(),
        offences: BTreeMap::new(),
    }
}

#[test]
fn what_a_guard_keeps_a_guest_from_is_told_for_its_vm() {
    let mut scene = Scene::new();
    let offences = quorate_types::service::Offences {
        dhcp_server: 3,
        ..Default::default()
    };
    scene.report("h1").offences.insert(vm("db"), offences);
    assert_eq!(scene.db().problem, None, "another host's word");
    scene.report("h2").offences.insert(vm("db"), offences);
    let problem = scene.db().problem.unwrap();
    assert!(
        problem.contains("drops what it sends: 3 of a DHCP server"),
        "{problem}"
    );
    assert_eq!(scene.db().state, VmState::Running);
}

#[test]
fn all_well_has_no_problems() {
    let scene = Scene::new();
    let view = scene.view();
    assert_eq!(view.cluster.problems, []);
    assert_eq!(
        (scene.db().state, scene.db().ready),
        (VmState::Running, true)
    );
    assert_eq!(view.hosts[1].vms, [vm("db")]);
    assert_eq!(view.hosts[1].used.memory, ByteSize::mib(128));
}

#[test]
fn each_phase_has_its_state() {
    for (phase, state) in [
        (VmPhase::Absent, VmState::Starting),
        (VmPhase::Starting, VmState::Starting),
        (VmPhase::Running, VmState::Running),
        (VmPhase::Frozen, VmState::Frozen),
        (VmPhase::IoError, VmState::Failing),
        (VmPhase::BackOff, VmState::Failing),
        (VmPhase::Stopping, VmState::Stopping),
        (VmPhase::MigratingOut, VmState::Migrating),
    ] {
        let mut scene = Scene::new();
        scene.phase("h2", "db", 3, phase);
        assert_eq!(scene.db().state, state, "{phase:?}");
    }
}

#[test]
fn a_report_under_an_older_epoch_claims_nothing() {
    let mut scene = Scene::new();
    scene.phase("h2", "db", 2, VmPhase::Running);
    let db = scene.db();
    assert_eq!((db.state, db.ready), (VmState::Starting, false));
}

#[test]
fn a_dead_owner_means_recovering_and_says_what_is_missing() {
    let mut scene = Scene::new();
    scene.health("h2", HostHealth::Dead);
    scene.seen.hosts.get_mut(&host("h2")).unwrap().fencing =
        Some("fence_ipmilan: timed out".into());
    assert_eq!(scene.db().state, VmState::Recovering);
    let texts = scene.texts();
    assert!(
        texts[0].contains("still owns db: fence_ipmilan: timed out"),
        "{texts:?}"
    );
    assert!(texts[0].contains("quorate host confirm-dead h2"));
    assert_eq!(
        texts.len(),
        1,
        "the VM's trouble follows from the host's: {texts:?}"
    );
}

#[test]
fn a_migration_shows_its_own_progress_only() {
    let mut scene = Scene::new();
    let ownership = Ownership::Migrating {
        id: MigrationId(9),
        from: host("h2"),
        epoch: Epoch(3),
        to: host("h3"),
        target_epoch: Epoch(4),
        cancel: false,
    };
    scene.own("db", ownership);
    let progress = |id| MigrationReport {
        id: MigrationId(id),
        outcome: MigrationOutcome::InProgress,
        transferred: ByteSize(30),
        remaining: ByteSize(10),
        downtime_ms: None,
        switchover: false,
        reason: None,
    };
    scene.phase("h2", "db", 3, VmPhase::MigratingOut).migration = Some(progress(9));
    let migration = scene.db().migration.unwrap();
    assert_eq!((migration.percent, migration.to), (75, host("h3")));
    scene.phase("h2", "db", 3, VmPhase::MigratingOut).migration = Some(progress(8));
    assert_eq!(scene.db().migration.unwrap().percent, 0, "a stale record");
}

#[test]
fn what_is_in_the_way_is_said() {
    let mut scene = Scene::new();
    scene.own("db", Ownership::Free);
    scene
        .seen
        .waiting
        .insert(vm("db"), "no host has 8 GiB of memory free".into());
    let db = scene.db();
    assert_eq!(
        (db.state, db.why.as_str()),
        (VmState::Waiting, "no host has 8 GiB of memory free")
    );
    assert_eq!(
        scene.texts(),
        ["VM db waits: no host has 8 GiB of memory free"]
    );
}

#[test]
fn waiting_for_a_dependency_is_no_error() {
    let mut scene = Scene::new();
    scene.phase("h2", "db", 3, VmPhase::Starting);
    scene.own("app", Ownership::Free);
    let app = scene.state.vms.get_mut(&vm("app")).unwrap();
    app.spec.depends_on.insert(vm("db"), Default::default());
    scene
        .seen
        .waiting
        .insert(vm("app"), "waits for db: it is not ready".into());
    let view = scene.view();
    assert_eq!(view.vms[0].waiting_for, [vm("db")]);
    assert_eq!(view.cluster.problems[0].level, Level::Warning);
    assert_eq!(view.cluster.problems[0].text, "VM app waits for db");
    scene.phase("h2", "db", 3, VmPhase::Running);
    assert_eq!(scene.view().vms[0].waiting_for, []);
    scene
        .seen
        .waiting
        .insert(vm("app"), "next: start app on h1 (it is wanted)".into());
    assert_eq!(scene.view().vms[0].state, VmState::Starting);
}

#[test]
fn a_broken_link_is_told_once_and_not_for_dead_hosts() {
    let mut scene = Scene::new();
    let down = LinkReport {
        up: false,
        relayed_by: Some(host("h3")),
        rtt_us: None,
        error: None,
    };
    scene.report("h1").links.insert(host("h2"), down.clone());
    scene.report("h2").links.insert(host("h1"), down);
    let texts = scene.texts();
    assert_eq!(
        texts,
        ["h1 and h2 cannot reach each other directly (h3 relays); mend the network between them"]
    );
    scene.health("h2", HostHealth::Dead);
    assert!(
        scene
            .texts()
            .iter()
            .all(|text| !text.contains("reach each other"))
    );
}

#[test]
fn the_lowest_layer_comes_first() {
    let mut scene = Scene::new();
    scene.phase("h2", "db", 3, VmPhase::BackOff).error = Some("QEMU ended".into());
    let pool = quorate_types::PoolSpec::Directory {
        path: "/srv".into(),
        hosts: BTreeSet::new(),
    };
    let object = Object {
        spec: pool,
        changed: Revision(1),
    };
    scene.state.pools.insert("shared".parse().unwrap(), object);
    let broken = PoolReport {
        problem: Some("not mounted".into()),
        ..PoolReport::default()
    };
    scene
        .report("h2")
        .pools
        .insert("shared".parse().unwrap(), broken);
    scene.health("h3", HostHealth::Dead);
    let about: Vec<String> = scene
        .view()
        .cluster
        .problems
        .into_iter()
        .map(|p| p.about)
        .collect();
    assert_eq!(about, ["host/h3", "pool/shared", "vm/db"]);
}

#[test]
fn a_host_that_nothing_can_fence_is_a_warning() {
    let mut scene = Scene::new();
    scene.report("h3").watchdog_ms = None;
    let problems = scene.view().cluster.problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].level, Level::Warning);
    assert!(
        problems[0]
            .text
            .contains("cannot be taken over without you")
    );
}

#[test]
fn without_a_leader_nothing_is_claimed() {
    let scene = Scene::new();
    let me = Answering {
        host: host("h1"),
        version: "1".into(),
    };
    let view = build(&scene.state, None, &me);
    assert_eq!(view.vms[0].state, VmState::Unknown);
    assert_eq!(view.hosts[0].state, HostState::Unknown);
    assert_eq!(view.cluster.problems.len(), 1);
}

mod storage {
    use super::*;
    use crate::storage::{ImageSeen, ImageState, PoolLook, pool, with_images};
    use quorate_types::{Secret, Timestamp};

    fn scene() -> Scene {
        let mut scene = Scene::new();
        for (name, spec) in [
            (
                "shared",
                serde_json::json!({ "kind": "directory", "path": "/srv" }),
            ),
            (
                "san",
                serde_json::json!({
                    "kind": "iscsi", "portals": ["192.0.2.5"], "target": "iqn.2026-01.com.example:san", "lun": 1,
                    "chap": { "user": "q", "secret": "san-chap" }, "access": { "tgt": {} }, "hosts": ["h1", "h2"],
                }),
            ),
        ] {
            let object = Object {
                spec: serde_json::from_value(spec).unwrap(),
                changed: Revision(1),
            };
            scene.state.pools.insert(name.parse().unwrap(), object);
        }
        let seen = |usable, free| PoolReport {
            usable,
            free: ByteSize::mib(free),
            total: ByteSize::mib(100),
            latency_us: 400,
            problem: (!usable).then(|| "not mounted".to_owned()),
            since: Some(Timestamp(5)),
            ..PoolReport::default()
        };
        for (host, usable, free) in [("h1", true, 40), ("h2", true, 30), ("h3", false, 0)] {
            let pools = &mut scene.report(host).pools;
            pools.insert("shared".parse().unwrap(), seen(usable, free));
        }
        let disks = serde_json::json!([
            { "pool": "san", "image": "db/1" },
            { "pool": "san", "image": "log" },
            { "pool": "shared", "image": "new", "size": "1GiB" },
            { "pool": "shared", "image": "lost" },
        ]);
        let db = scene.state.vms.get_mut(&vm("db")).unwrap();
        db.spec.disks = serde_json::from_value(disks).unwrap();
        scene
    }

    fn seen(image: &str, problem: Option<&str>) -> ImageSeen {
        ImageSeen {
            image: image.into(),
            virtual_bytes: Some(1 << 30),
            actual_bytes: Some(1 << 20),
            format: "raw".into(),
            problem: problem.map(str::to_owned),
        }
    }

    #[test]
    fn a_pool_tells_who_reaches_it_and_what_it_proves() {
        let mut scene = scene();
        let cuts = [("san".parse().unwrap(), Revision(7))].into();
        scene.state.storage_cuts.insert(host("h2"), cuts);
        let shared = pool(&scene.state, &scene.seen, &"shared".parse().unwrap()).unwrap();
        assert_eq!(
            (shared.free, shared.total),
            (Some(30 << 20), Some(100 << 20))
        );
        assert_eq!(shared.fence.proof, None);
        assert!(shared.fence.meaning.contains("confirm-dead"));
        let broken = &shared.hosts[2];
        assert_eq!(
            (broken.usable, broken.since, broken.problem.as_deref()),
            (Some(false), Some(Timestamp(5)), Some("not mounted"))
        );
        let san = pool(&scene.state, &scene.seen, &"san".parse().unwrap()).unwrap();
        let hosts: Vec<&str> = san.hosts.iter().map(|of| of.host.as_str()).collect();
        assert_eq!(hosts, ["h1", "h2"], "h3 is not meant to reach it");
        assert_eq!(san.hosts[0].usable, None, "not heard is not broken");
        assert_eq!(san.fence.by.as_deref(), Some("tgt"));
        assert_eq!((san.cuts.len(), san.cuts[0].revision), (1, Revision(7)));
        assert!(!san.secrets[0].known);
        let secret = Secret::new("open sesame").unwrap();
        scene
            .state
            .secrets
            .insert("san-chap".parse().unwrap(), secret);
        let san = pool(&scene.state, &scene.seen, &"san".parse().unwrap()).unwrap();
        assert!(san.secrets[0].known);
        let text = serde_json::to_string(&san).unwrap() + &format!("{san:?}");
        assert!(!text.contains("open sesame"));
        assert!(pool(&scene.state, &scene.seen, &"none".parse().unwrap()).is_none());
    }

    #[test]
    fn images_are_used_unused_missing_or_still_to_be_made() {
        let scene = scene();
        let look = |name: &str, images| {
            let view = pool(&scene.state, &scene.seen, &name.parse().unwrap()).unwrap();
            let host = host("h1");
            let view = with_images(view, &scene.state, PoolLook { host, images });
            let short = view.images.unwrap().into_iter();
            short
                .map(|image| (image.image, image.state))
                .collect::<Vec<_>>()
        };
        // `db/1` and `db` are one unit where 1 is the pool's LUN.
        let san = look(
            "san",
            vec![seen("db", None), seen("old", None), seen("log", Some("x"))],
        );
        let pairs = |list: &[(&str, ImageState)]| -> Vec<(String, ImageState)> {
            list.iter()
                .map(|(name, state)| ((*name).to_owned(), *state))
                .collect()
        };
        assert_eq!(
            san,
            pairs(&[
                ("db", ImageState::Used),
                ("log", ImageState::Broken),
                ("old", ImageState::Unused),
            ])
        );
        assert_eq!(
            look("shared", Vec::new()),
            pairs(&[("lost", ImageState::Missing), ("new", ImageState::Planned)])
        );
    }
}

#[test]
fn services_in_trouble_are_told_after_what_lies_below_them() {
    let mut scene = Scene::new();
    let manifest = serde_json::json!({
        "networks": { "lan": { "bridge": "br0" } },
        "services": { "web": { "network": "lan", "address": "10.0.0.9", "ports": ["80"], "members": { "db": {} } } },
    });
    let manifest: quorate_types::Manifest = serde_json::from_value(manifest).unwrap();
    let (name, spec) = manifest.services.into_iter().next().unwrap();
    let record = serde_json::json!({ "spec": spec, "id": 1, "slots": 65_537, "last_epoch": 0, "changed": 1 });
    let record = serde_json::from_value(record).unwrap();
    scene.state.services.insert(name.clone(), record);
    assert_eq!(scene.view().services[0].members[0].vm, vm("db"));
    let text = "no member serves yet".to_owned();
    scene.seen.services.insert(name, vec![text]);
    scene.health("h1", HostHealth::Suspect);
    let problems = scene.view().cluster.problems;
    let last = problems.last().unwrap();
    assert_eq!(last.text, "service web: no member serves yet");
    assert_eq!(
        (last.level, last.about.as_str()),
        (Level::Error, "service/web")
    );
    assert!(problems.len() > 1);
}
