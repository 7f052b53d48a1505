//! Services on hosts with a datapath in memory: edges with the guests, flows ahead of them, pins before a ring, health.

use super::*;
use quorate_balancer::{Duplicate, Flow, FlowKey, fake::FakeEdge};
use quorate_network::tap_name;
use quorate_state::ServiceChange;
use quorate_types::service::{
    HealthCheck, HealthKind, Protocol, RingVersion, ServiceReport, UplinkMode,
};
use quorate_types::{Manifest, ServiceName};
use serde_json::json;

fn web() -> ServiceName {
    ServiceName::new("web").unwrap()
}

impl World {
    /// A service whose member is the VM.
    fn make_service(&self, health: Option<HealthCheck>) {
        self.make_service_of(1, health);
    }

    fn make_service_of(&self, weight: u64, health: Option<HealthCheck>) {
        let mut db = serde_json::to_value(&self.state.borrow().vms[&vm()].spec).unwrap();
        db["nics"][0]["address"] = json!("10.9.0.11");
        let manifest: Manifest = serde_json::from_value(json!({
            "vms": { "db": db },
            "services": { "web": {
                "network": "lan", "address": "10.9.0.100", "ports": ["80"], "members": { "db": { "weight": weight } },
                "health": health,
            } },
        }))
        .unwrap();
        let base = None;
        self.apply(Command::ApplyManifest { base, manifest });
    }

    /// A service of these VMs and `db`; only that one runs.
    fn make_service_with(&self, others: &[&str]) {
        let mut db = serde_json::to_value(&self.state.borrow().vms[&vm()].spec).unwrap();
        db["nics"][0]["address"] = json!("10.9.0.11");
        let (mut vms, mut members) = (json!({ "db": db.clone() }), json!({ "db": {} }));
        for (index, name) in others.iter().enumerate() {
            let mut other = db.clone();
            other["nics"][0]["address"] = json!(format!("10.9.0.{}", 12 + index));
            other["disks"] = json!([]);
            vms[*name] = other;
            members[*name] = json!({});
        }
        let manifest: Manifest = serde_json::from_value(json!({
            "vms": vms,
            "services": { "web": {
                "network": "lan", "address": "10.9.0.100", "ports": ["80"], "members": members,
            } },
        }))
        .unwrap();
        let base = None;
        self.apply(Command::ApplyManifest { base, manifest });
    }

    fn prepare_ring_of(&self, epoch: u64, member: &str) {
        let member = VmName::new(member).unwrap();
        let members = {
            let state = self.state.borrow();
            let spec = &state.services[&web()].spec;
            state.ring_member(spec, &member, 1).into_iter().collect()
        };
        let service = web();
        self.change(ServiceChange::PrepareRing {
            service,
            epoch,
            members,
        });
    }

    /// A ring of one member, in force.
    fn ring_of(&self, epoch: u64, member: &str) {
        self.prepare_ring_of(epoch, member);
        self.activate_ring(epoch);
    }

    /// Instead of the ring that is being prepared.
    fn prepare_ring_again(&self, epoch: u64) {
        self.change(ServiceChange::AbandonRing {
            service: web(),
            epoch: epoch - 1,
        });
        self.prepare_ring(epoch);
    }

    fn change(&self, change: ServiceChange) {
        let changes = vec![change];
        self.apply(Command::ChangeServices { changes });
    }

    fn ring(&self, epoch: u64) -> RingVersion {
        let state = self.state.borrow();
        let weight = u32::try_from(epoch).unwrap();
        let member = state.ring_member(&state.services[&web()].spec, &vm(), weight);
        RingVersion {
            epoch,
            members: member.into_iter().collect(),
            ..RingVersion::default()
        }
    }

    /// Makes a ring of the member the one in force.
    fn make_ring(&self, epoch: u64) {
        self.prepare_ring(epoch);
        self.activate_ring(epoch);
    }

    fn activate_ring(&self, epoch: u64) {
        self.change(ServiceChange::ActivateRing {
            service: web(),
            epoch,
        });
    }

    fn prepare_ring(&self, epoch: u64) {
        // A ring that is in force already would be none.
        self.make_service_of(epoch, None);
        let members = self.ring(epoch).members;
        let service = web();
        self.change(ServiceChange::PrepareRing {
            service,
            epoch,
            members,
        });
    }

    async fn service(
        &self,
        n: u8,
        what: &str,
        good: impl Fn(&ServiceReport) -> bool,
    ) -> ServiceReport {
        let mut reports = self.agent(n).reports();
        let seen = reports.wait_for(|report| report.services.get(&web()).is_some_and(&good));
        match tokio::time::timeout(SOON, seen).await {
            Ok(report) => report.unwrap().services[&web()].clone(),
            Err(_) => panic!(
                "h{n} never said {what}: {:#?}",
                self.agent(n).report().services
            ),
        }
    }

    fn edge(&self, n: u8) -> Option<FakeEdge> {
        let edges = self.datapaths[usize::from(n - 1)].edges();
        edges.get(&tap_name("db", 0)).cloned()
    }

    /// What came for the guest is sent after it, by that host.
    async fn passes_on(&self, n: u8) {
        let end = Instant::now() + SOON;
        let network = &self.networks[usize::from(n - 1)];
        loop {
            if let Some(passed) = network.passed_on().first() {
                assert_eq!(passed.ifname, tap_name("db", 0));
                assert_eq!(passed.source.octets()[..3], quorate_balancer::mac::HELD);
                return;
            }
            assert!(Instant::now() < end, "h{n} sent nothing after the guest");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn edge_is(&self, n: u8, what: &str, good: impl Fn(Option<&FakeEdge>) -> bool) {
        let end = Instant::now() + SOON;
        while !good(self.edge(n).as_ref()) {
            assert!(Instant::now() < end, "the edge on h{n} was never {what}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test]
async fn what_comes_for_a_guest_without_a_service_follows_it_too() {
    let world = World::running().await;
    world.migrate(2);
    world
        .until(2, "arrived", |vm| {
            let outcome = vm.migration.as_ref().map(|migration| migration.outcome);
            outcome == Some(MigrationOutcome::Arrived)
        })
        .await;
    world.passes_on(1).await;
    assert!(world.networks[1].passed_on().is_empty());
}

#[tokio::test]
async fn what_comes_for_a_guest_that_stays_is_not_sent_after_it() {
    let world = World::running().await;
    world
        .site
        .fault("db", Fault::MigrationFails(FailAt::Active));
    world.migrate(2);
    world
        .until(1, "failed", |vm| {
            let outcome = vm.migration.as_ref().map(|migration| migration.outcome);
            outcome == Some(MigrationOutcome::Failed)
        })
        .await;
    assert!(world.networks[0].passed_on().is_empty());
}

fn flow(client_port: u16) -> Flow {
    Flow {
        service: Some(quorate_types::ServiceId(1)),
        key: FlowKey {
            protocol: Protocol::Tcp,
            client: "10.9.0.1".parse().unwrap(),
            client_port,
            port: 80,
        },
        idle_ms: 0,
        closing: false,
    }
}

#[tokio::test]
async fn an_edge_travels_with_its_guest_and_its_flows_go_ahead() {
    let world = World::running().await;
    assert!(world.edge(1).is_none(), "nothing needs an edge");
    world.make_service(None);
    // A guest that runs already gets one, open.
    world
        .edge_is(1, "open", |edge| edge.is_some_and(|edge| edge.open))
        .await;
    world.datapaths[0].see(&tap_name("db", 0), flow(1000));
    let id = world.migrate(2);
    world.edge_is(2, "there", |edge| edge.is_some()).await;
    world
        .until(2, "arrived", |vm| {
            let outcome = vm.migration.as_ref().map(|migration| migration.outcome);
            outcome == Some(MigrationOutcome::Arrived)
        })
        .await;
    world
        .edge_is(2, "open with the flows", |edge| {
            edge.is_some_and(|edge| edge.open && edge.flows == [flow(1000)])
        })
        .await;
    // Stragglers follow the guest.
    world
        .edge_is(1, "closed", |edge| {
            edge.is_some_and(|edge| !edge.open && edge.forwards)
        })
        .await;
    world.passes_on(1).await;
    world.finish(
        id,
        MigrationEnd::Arrived {
            downtime_ms: Some(1),
        },
    );
    world.edge_is(1, "gone", |edge| edge.is_none()).await;
}

#[tokio::test]
async fn a_migration_that_fails_at_the_switchover_opens_the_edge_again() {
    let world = World::running().await;
    world.make_service(None);
    world
        .edge_is(1, "open", |edge| edge.is_some_and(|edge| edge.open))
        .await;
    world
        .site
        .fault("db", Fault::MigrationFails(FailAt::PreSwitchover));
    world.migrate(2);
    world
        .until(1, "failed", |vm| {
            let outcome = vm.migration.as_ref().map(|migration| migration.outcome);
            outcome == Some(MigrationOutcome::Failed)
        })
        .await;
    world
        .edge_is(1, "open again", |edge| {
            edge.is_some_and(|edge| edge.open && !edge.forwards)
        })
        .await;
}

#[tokio::test]
async fn a_ring_is_prepared_when_every_director_has_the_pins() {
    let world = World::running().await;
    world.make_service(None);
    world.make_ring(1);
    let report = world
        .service(1, "ring 1", |service| service.active == 1)
        .await;
    assert_eq!(report.prepared, None);
    world
        .service(2, "ring 1", |service| service.active == 1)
        .await;
    world.datapaths[0].see(&tap_name("db", 0), flow(1000));
    for epoch in 2..12 {
        world.prepare_ring(epoch);
        world
            .service(1, "prepared", |service| service.prepared == Some(epoch))
            .await;
        world
            .service(2, "prepared", |service| service.prepared == Some(epoch))
            .await;
        world.activate_ring(epoch);
    }
    assert!(
        world.datapaths[0].lease_ns() > 0,
        "the datapath has no lease"
    );
}

#[tokio::test]
async fn a_datapath_that_refuses_a_ring_is_silent_before_it_is_said_to_steer_nothing() {
    let world = World::running().await;
    world.make_service(None);
    world.make_ring(1);
    for n in [1, 2] {
        world
            .service(n, "ring 1", |service| service.active == 1)
            .await;
    }
    let datapath = world.datapaths[1].clone();
    // For a moment: its lease goes on, and nobody is told that it steers nothing.
    datapath.set_failing("apply", true);
    world.prepare_ring(2);
    let report = world
        .service(2, "a problem", |service| service.problem.is_some())
        .await;
    let silent = datapath.lease_ns();
    if report.active == 0 {
        // A machine that was asleep meanwhile.
        assert!(boot_now().0 >= silent, "it is silent: {report:?}");
    } else {
        assert_eq!((report.active, report.prepared), (1, None));
        let problem = report.problem.unwrap();
        assert!(problem.contains("silent when its lease ends"), "{problem}");
    }
    datapath.set_failing("apply", false);
    world
        .service(2, "ring 2 held", |service| service.prepared == Some(2))
        .await;
    // For long: the kernel steers by ring 2 while the lease lasts that it was given before, which is waited for.
    datapath.set_failing("apply", true);
    world.prepare_ring_again(3);
    world
        .service(2, "a problem", |service| service.problem.is_some())
        .await;
    let silent = datapath.lease_ns();
    let report = world
        .service(2, "that it steers nothing", |service| service.active == 0)
        .await;
    assert!(boot_now().0 >= silent, "it may steer still: {report:?}");
    assert_eq!(datapath.lease_ns(), silent, "it was given a longer lease");
    assert!(!report.holding);
    let problem = report.problem.unwrap();
    assert!(problem.contains("serves nothing until"), "{problem}");
    let uplinks = world.agent(2).report().uplinks;
    assert!(
        uplinks
            .values()
            .all(|mode| matches!(mode, UplinkMode::Problem(_))),
        "{uplinks:?}"
    );
    // As soon as it takes the tables it serves again.
    datapath.set_failing("apply", false);
    world
        .service(2, "ring 3 held", |service| {
            service.active == 1 && service.prepared == Some(3) && service.problem.is_none()
        })
        .await;
    let end = Instant::now() + SOON;
    while datapath.lease_ns() <= boot_now().0 {
        assert!(Instant::now() < end, "it has no lease again");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn an_agent_that_crashes_in_the_middle_of_a_ring_change_finishes_it() {
    let world = World::running().await;
    world.make_service(None);
    world.make_ring(1);
    world
        .edge_is(1, "open", |edge| edge.is_some_and(|edge| edge.open))
        .await;
    world.datapaths[0].see(&tap_name("db", 0), flow(1000));
    for (epoch, goes_on) in [(2, true), (3, false)] {
        world.prepare_ring(epoch);
        world
            .service(1, "prepared", |service| service.prepared == Some(epoch))
            .await;
        world.stop_agent(1).await;
        // Its datapath goes on meanwhile; what was prepared comes into force, or is given up.
        let edge = world.edge(1).unwrap();
        assert!(edge.open && edge.flows == [flow(1000)]);
        match goes_on {
            true => world.activate_ring(epoch),
            false => world.change(ServiceChange::AbandonRing {
                service: web(),
                epoch,
            }),
        }
        world.start_agent(1).await;
        let report = world
            .service(1, "ring 2", |service| service.active == 2)
            .await;
        assert_eq!(report.prepared, None);
        let table = world.datapaths[0].wanted().services[&web()].clone();
        assert_eq!((table.active().unwrap().epoch, table.next), (2, None));
        let edge = world.edge(1).unwrap();
        assert!(edge.open && edge.flows == [flow(1000)], "{edge:?}");
    }
}

#[tokio::test]
async fn a_host_without_a_datapath_runs_guests_and_says_why_it_serves_nothing() {
    let world = World::running().await;
    for operation in ["apply", "attach_edge", "counters"] {
        world.datapaths[1].set_failing(operation, true);
    }
    world.make_service(None);
    world.make_ring(1);
    let report = world
        .service(2, "why", |service| service.problem.is_some())
        .await;
    assert_eq!((report.active, report.holding), (0, false));
    world.migrate(2);
    world
        .until(2, "arrived", |vm| {
            let outcome = vm.migration.as_ref().map(|migration| migration.outcome);
            outcome == Some(MigrationOutcome::Arrived)
        })
        .await;
    assert_eq!(world.executing(), [world.runtime(2)]);
}

/// A ring that takes the slots of one whose flows are still there: neither its primary nor its previous member.
#[tokio::test]
async fn flows_that_a_ring_would_strand_are_pinned_at_every_director_first() {
    let world = World::running().await;
    world.make_service_with(&["x1", "x2"]);
    let ring = |epoch, vm: &str| world.ring_of(epoch, vm);
    ring(1, "db");
    for n in [1, 2] {
        world
            .service(n, "ring 1", |service| service.active == 1)
            .await;
    }
    world
        .edge_is(1, "open", |edge| edge.is_some_and(|edge| edge.open))
        .await;
    world.datapaths[0].see(&tap_name("db", 0), flow(1000));
    // The member before is asked for it: no pin.
    ring(2, "x1");
    world
        .service(1, "ring 2", |service| service.active == 2)
        .await;
    assert!(world.datapaths[0].pins().is_empty());
    // Nobody would ask it any more.
    let other = &world.datapaths[1];
    world.prepare_ring_of(3, "x2");
    world
        .service(1, "prepared", |service| service.prepared == Some(3))
        .await;
    // Said only when the other director knows: or the connection would break there.
    let pins = other.pins();
    assert_eq!(pins.len(), 1, "{pins:?}");
    assert_eq!(pins, world.datapaths[0].pins());
    assert_eq!(pins[0].flow, flow(1000).key);
    world.activate_ring(3);
    world
        .service(2, "ring 3", |service| service.active == 3)
        .await;
    let query = |client_port| quorate_balancer::TraceQuery {
        service: web(),
        client: "10.9.0.1".parse().unwrap(),
        client_port,
        port: None,
        protocol: None,
    };
    let answer = world.agent(2).datapath().trace(&query(1000)).await.unwrap();
    assert!(answer.pinned);
    assert_eq!(answer.member.unwrap(), vm());
    let answer = world.agent(2).datapath().trace(&query(1001)).await.unwrap();
    assert!(!answer.pinned);
    assert_eq!(answer.member.unwrap().as_str(), "x2");
}

impl World {
    /// A flow that ring 3 would strand is on h1, whose agent cannot look for strays yet; h2 has found none and holds ring
    /// 3. Then the guest moves to h2.
    async fn moved_under_a_ring(flows_come: bool) -> (Self, MigrationId) {
        let world = World::running().await;
        world.make_service_with(&["x1", "x2"]);
        world.ring_of(1, "db");
        world
            .edge_is(1, "open", |edge| edge.is_some_and(|edge| edge.open))
            .await;
        world.datapaths[0].see(&tap_name("db", 0), flow(1000));
        world.ring_of(2, "x1");
        for n in [1, 2] {
            world
                .service(n, "ring 2", |service| service.active == 2)
                .await;
        }
        world.datapaths[0].set_failing("strays", true);
        world.datapaths[1].set_failing("put_flows", !flows_come);
        world.prepare_ring_of(3, "x2");
        world
            .service(2, "prepared", |service| service.prepared == Some(3))
            .await;
        let id = world.migrate(2);
        world
            .until(2, "arrived", |vm| {
                let outcome = vm.migration.as_ref().map(|migration| migration.outcome);
                outcome == Some(MigrationOutcome::Arrived)
            })
            .await;
        world
            .edge_is(1, "closed", |edge| edge.is_some_and(|edge| !edge.open))
            .await;
        (world, id)
    }

    async fn is_pinned_everywhere(&self) {
        let end = Instant::now() + SOON;
        let pinned = |datapath: &FakeDatapath| {
            let pins = datapath.pins();
            pins.iter().any(|pin| pin.flow == flow(1000).key)
        };
        while !self.datapaths.iter().all(|datapath| pinned(datapath)) {
            assert!(Instant::now() < end, "the flow is not pinned everywhere");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// They may not have come with it: its edge there learns them by and by, too late for the ring.
#[tokio::test]
async fn a_source_that_prepares_a_ring_late_pins_the_flows_of_a_guest_that_has_left() {
    for edge_is_gone in [false, true] {
        let (world, id) = World::moved_under_a_ring(false).await;
        if edge_is_gone {
            let downtime_ms = Some(1);
            world.finish(id, MigrationEnd::Arrived { downtime_ms });
            world.edge_is(1, "gone", |edge| edge.is_none()).await;
        }
        world.datapaths[0].set_failing("strays", false);
        world
            .service(1, "prepared", |service| service.prepared == Some(3))
            .await;
        for datapath in &world.datapaths {
            let pins = datapath.pins();
            assert!(!pins.is_empty(), "edge gone: {edge_is_gone}");
            assert!(pins.iter().all(|pin| pin.flow == flow(1000).key));
        }
    }
}

/// The source may be dead by then, and would be waited for no more.
#[tokio::test]
async fn a_target_that_had_prepared_a_ring_pins_the_flows_that_come_with_a_guest() {
    let (world, _) = World::moved_under_a_ring(true).await;
    world.is_pinned_everywhere().await;
    world
        .service(2, "prepared again", |service| service.prepared == Some(3))
        .await;
    let source = world.agent(1).report().services[&web()].clone();
    assert_eq!(source.prepared, None);
}

#[tokio::test]
async fn health_is_told_by_the_members_host_and_a_duplicate_is_named() {
    let world = World::running().await;
    let mut check = HealthCheck::new(HealthKind::Agent);
    check.interval = Millis(100);
    check.timeout = Millis(90);
    world.make_service(Some(check));
    let healthy = |service: &ServiceReport, wanted| {
        let member = service.members.get(&vm());
        member.is_some_and(|member| member.healthy == Some(wanted))
    };
    world
        .service(1, "healthy", |service| healthy(service, true))
        .await;
    let elsewhere = world.agent(2).report();
    assert!(elsewhere.services[&web()].members.is_empty());
    let mut counters = quorate_balancer::Counters::default();
    counters.duplicates.push(Duplicate {
        address: "10.9.0.100".parse().unwrap(),
        mac: [2, 0, 0, 0, 0x0b, 0xad],
        ifname: tap_name("db", 0),
        age_ms: 5,
        count: 1,
    });
    world.datapaths[0].set_counters(counters);
    let report = world
        .service(1, "the duplicate", |service| service.problem.is_some())
        .await;
    let problem = report.problem.unwrap();
    assert!(
        problem.contains("02:00:00:00:0b:ad (VM db claims it"),
        "{problem}"
    );
}
