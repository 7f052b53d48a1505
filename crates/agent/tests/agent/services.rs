//! Services on hosts with a datapath in memory: edges with the guests, flows ahead of them, pins before a ring, health.

use super::*;
use quorate_balancer::{Duplicate, Flow, FlowKey, fake::FakeEdge};
use quorate_network::tap_name;
use quorate_state::ServiceChange;
use quorate_types::service::{HealthCheck, HealthKind, Protocol, RingVersion, ServiceReport};
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
    // The datapath cannot: nothing is claimed, and it is said why.
    world.datapaths[1].set_failing("apply", true);
    world.prepare_ring(12);
    let report = world
        .service(2, "a problem", |service| service.problem.is_some())
        .await;
    assert_eq!((report.active, report.prepared), (0, None));
    world.datapaths[1].set_failing("apply", false);
    world
        .service(2, "ring 12", |service| service.prepared == Some(12))
        .await;
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
