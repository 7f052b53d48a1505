//! Rings, health, drains and holders, decided on small sites.

use crate::{
    ServiceInput, ServiceMemory, holder_steps, service_problems, service_steps, taken_from,
};
use quorate_membership::{HostHealth, Instant};
use quorate_state::{
    Action, Command, Envelope, FORMAT, GuestAbi, HostMode, Plan, PlannedAction, Reason,
    ServiceChange, State,
};
use quorate_types::report::{Capacity, HypervisorFacts};
use quorate_types::service::MemberReport;
use quorate_types::{
    BootId, Epoch, HostName, HostReport, Millis, NetworkName, Revision, ServiceName, ServiceReport,
    Timestamp, UplinkMode, VmName, VmPhase, VmReport,
};
use serde_json::json;
use std::collections::BTreeMap;

fn host(n: u32) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

/// Three hosts, VMs a on h1, b on h2, c on h3, all members of `web`.
struct World {
    state: State,
    reports: BTreeMap<HostName, HostReport>,
    health: BTreeMap<HostName, HostHealth>,
    memory: ServiceMemory,
    now: Instant,
}

impl World {
    fn new(checked: bool) -> Self {
        let mut world = Self {
            state: State::default(),
            reports: BTreeMap::new(),
            health: BTreeMap::new(),
            memory: ServiceMemory::default(),
            now: Instant(1_000_000_000_000),
        };
        world.apply(Command::CreateCluster {
            id: "c".into(),
            name: "c".into(),
            ca_certificate: String::new(),
            ca_key: String::new(),
            host: host(1),
            address: "h1:1".into(),
            settings: Default::default(),
        });
        for n in 2..=3 {
            world.apply(Command::CreateToken {
                hash: format!("t{n}"),
                expires: Timestamp(9),
            });
            world.apply(Command::AdmitHost {
                token: format!("t{n}"),
                host: host(n),
                address: format!("h{n}:1"),
            });
        }
        let nic = |n: u32| json!([{ "network": "lan", "address": format!("10.0.0.{n}") }]);
        let mut web = json!({ "network": "lan", "address": "10.0.0.100", "ports": ["80"],
            "members": { "a": {}, "b": {}, "c": {} }, "drain_timeout": "60s" });
        if checked {
            web["health"] = json!({ "kind": "tcp" });
        }
        world.manifest(json!({
            "networks": { "lan": { "bridge": "br0" } },
            "vms": {
                "a": { "memory": "64MiB", "nics": nic(11) },
                "b": { "memory": "64MiB", "nics": nic(12) },
                "c": { "memory": "64MiB", "nics": nic(13) },
            },
            "services": { "web": web },
        }));
        for n in 1..=3 {
            world.health.insert(host(n), HostHealth::Up);
            world.reports.insert(host(n), report(n));
        }
        for (name, on) in [("a", 1), ("b", 2), ("c", 3)] {
            let abi = GuestAbi {
                machine: "m".into(),
                cpu_model: "c".into(),
            };
            world.plan(Action::Start {
                vm: vm(name),
                host: host(on),
                abi,
            });
            world.says(on, name, VmPhase::Running);
        }
        world
    }

    fn apply(&mut self, command: Command) {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "test".into(),
            command,
        };
        self.state.apply(&envelope).unwrap();
    }

    fn manifest(&mut self, value: serde_json::Value) {
        let manifest = serde_json::from_value(value).unwrap();
        let base = None;
        self.apply(Command::ApplyManifest { base, manifest });
    }

    fn plan(&mut self, action: Action) {
        let reason = Reason::new("test");
        self.apply(Command::CommitPlan(Plan {
            base: self.state.revision,
            actions: vec![PlannedAction { action, reason }],
        }));
    }

    /// What a host says of a VM.
    fn says(&mut self, on: u32, name: &str, phase: VmPhase) {
        let owners = self.state.vms[&vm(name)].ownership.hosts();
        let epoch = owners
            .iter()
            .find(|(owner, _)| **owner == host(on))
            .map_or(Epoch(0), |(_, epoch)| *epoch);
        let of = VmReport {
            epoch,
            phase,
            ready: true,
            closed: Epoch(0),
            saved: None,
            guest_shutdown: false,
            restarts: 0,
            since: Timestamp(0),
            error: None,
            save_failures: 0,
            handed_over: None,
            migration: None,
            resident: Default::default(),
            mirrors: Vec::new(),
        };
        let report = self.reports.get_mut(&host(on)).unwrap();
        report.vms.insert(vm(name), of);
    }

    fn said(&mut self, on: u32) -> &mut ServiceReport {
        let report = self.reports.get_mut(&host(on)).unwrap();
        report.services.entry(service("web")).or_default()
    }

    fn member(&mut self, on: u32, name: &str) -> &mut MemberReport {
        self.said(on).members.entry(vm(name)).or_default()
    }

    /// Every host's director has done what the state says.
    fn follow(&mut self) {
        for n in 1..=3 {
            self.follows(n);
        }
    }

    fn follows(&mut self, on: u32) {
        let record = &self.state.services[&service("web")];
        let (active, prepared) = (record.active(), record.next.as_ref().map(|next| next.epoch));
        let holding = record.is_held_by(&host(on));
        let said = self.said(on);
        (said.active, said.prepared, said.holding) = (active, prepared, holding);
    }

    fn input(&self) -> ServiceInput<'_> {
        ServiceInput {
            state: &self.state,
            reports: &self.reports,
            health: &self.health,
            now: self.now,
        }
    }

    fn steps(&mut self) -> Vec<ServiceChange> {
        let mut memory = std::mem::take(&mut self.memory);
        let mut steps = holder_steps(&self.input(), &mut memory);
        steps.extend(service_steps(&self.input(), &mut memory));
        self.memory = memory;
        steps
    }

    fn problems(&self) -> Vec<String> {
        let all = service_problems(&self.input(), &self.memory);
        all.into_values().flatten().collect()
    }

    /// Looks, commits, and lets directors follow, until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..20 {
            let changes = self.steps();
            if changes.is_empty() {
                return;
            }
            self.apply(Command::ChangeServices { changes });
            self.follow();
        }
        panic!("it never settles");
    }

    fn ring(&self) -> String {
        let ring = self.state.services[&service("web")].ring();
        let members = ring.map(|ring| ring.members.iter());
        let names = members.into_iter().flatten();
        names.map(|member| member.vm.to_string()).collect()
    }

    fn holder(&self, name: &str) -> Option<HostName> {
        let holder = self.state.services[&service(name)].holder.as_ref();
        holder.map(|holder| holder.host.clone())
    }
}

fn report(n: u32) -> HostReport {
    HostReport {
        host: host(n),
        boot: BootId("b".into()),
        sequence: 1,
        version: "0".into(),
        applied: Revision(0),
        guard_armed: true,
        watchdog_ms: None,
        capacity: Capacity::default(),
        hypervisor: HypervisorFacts::default(),
        networks: Default::default(),
        pools: BTreeMap::new(),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::from([(service("web"), ServiceReport::default())]),
        uplinks: BTreeMap::from([(NetworkName::new("lan").unwrap(), UplinkMode::Driver)]),
        offences: BTreeMap::new(),
    }
}

fn is_activate(change: &ServiceChange) -> bool {
    matches!(change, ServiceChange::ActivateRing { .. })
}

#[test]
fn a_ring_comes_into_force_when_every_live_director_holds_it() {
    let mut world = World::new(false);
    let first = world.steps();
    assert!(first.iter().any(|step| matches!(step, ServiceChange::PrepareRing { epoch: 1, members, .. } if members.len() == 3)));
    world.apply(Command::ChangeServices { changes: first });
    assert!(!world.steps().iter().any(is_activate));
    world.follows(1);
    world.follows(2);
    assert!(
        !world.steps().iter().any(is_activate),
        "h3 has not prepared it"
    );
    // Silent, but its lease may run: it still blocks; past its lease it does not.
    world.health.insert(host(3), HostHealth::Suspect);
    assert!(!world.steps().iter().any(is_activate));
    world.now = world.now.plus(Millis::secs(6));
    assert!(
        world
            .problems()
            .iter()
            .any(|text| text.contains("ring 1 waits for h3 since 6s"))
    );
    world.health.insert(host(3), HostHealth::Expired);
    let steps = world.steps();
    assert!(
        steps
            .iter()
            .any(|step| is_activate(step) || matches!(step, ServiceChange::AbandonRing { .. }))
    );
    world.settle();
    assert_eq!(world.ring(), "ab");
}

#[test]
fn a_director_that_cannot_load_does_not_block_and_one_that_lags_does() {
    let mut world = World::new(false);
    world.said(3).problem = Some("no XDP".into());
    let changes = world.steps();
    world.apply(Command::ChangeServices { changes });
    world.follows(1);
    world.follows(2);
    let changes = world.steps();
    assert!(changes.iter().any(is_activate));
    world.apply(Command::ChangeServices { changes });
    assert!(world.problems().iter().any(|text| text == "h3: no XDP"));
    // h2 has not activated ring 1: ring 2 is not even prepared.
    world.follows(1);
    world.says(3, "c", VmPhase::BackOff);
    assert!(
        !world
            .steps()
            .iter()
            .any(|step| matches!(step, ServiceChange::PrepareRing { .. }))
    );
    world.follows(2);
    assert!(
        world
            .steps()
            .iter()
            .any(|step| matches!(step, ServiceChange::PrepareRing { .. }))
    );
}

#[test]
fn what_is_not_known_changes_nothing() {
    let mut world = World::new(true);
    for (n, name) in [(1, "a"), (2, "b")] {
        world.member(n, name).healthy = Some(true);
    }
    world.settle();
    // c was never found healthy.
    assert_eq!(world.ring(), "ab");
    world.member(3, "c").healthy = Some(true);
    world.settle();
    assert_eq!(world.ring(), "abc");
    // A check that is suspended, a migration, a silent host, a frozen guest: each keeps its place.
    world.member(3, "c").healthy = None;
    world.plan(Action::Migrate {
        vm: vm("b"),
        to: host(1),
    });
    world.says(2, "b", VmPhase::MigratingOut);
    world.member(2, "b").healthy = Some(false);
    world.says(1, "a", VmPhase::Frozen);
    world.settle();
    assert_eq!(world.ring(), "abc");
    world.health.insert(host(3), HostHealth::Suspect);
    assert_eq!(world.steps(), []);
}

#[test]
fn members_leave_for_cause_and_come_back() {
    let mut world = World::new(true);
    for (n, name) in [(1, "a"), (2, "b"), (3, "c")] {
        world.member(n, name).healthy = Some(true);
    }
    world.settle();
    world.member(1, "a").healthy = Some(false);
    world.member(1, "a").problem = Some("refused".into());
    world.settle();
    assert_eq!(world.ring(), "bc");
    assert!(
        world
            .problems()
            .contains(&"a does not serve: refused".to_owned())
    );
    world.says(2, "b", VmPhase::BackOff);
    world.settle();
    assert_eq!(world.ring(), "c");
    // a runs and has its connections still; those of b have ended with it.
    let history = &world.state.services[&service("web")].history;
    let known = |name: &str| {
        let mut rings = history.iter();
        rings.any(|ring| ring.has(&vm(name)) && !ring.gone.contains(&vm(name)))
    };
    assert!(known("a") && !known("b"));
    // Started again: what was known of it was about another life.
    world.says(2, "b", VmPhase::Running);
    world.member(2, "b").healthy = None;
    world.settle();
    assert_eq!(world.ring(), "c");
    world.member(2, "b").healthy = Some(true);
    world.member(1, "a").healthy = Some(true);
    world.settle();
    assert_eq!(world.ring(), "abc");
    // Its host is lost.
    world.health.insert(host(3), HostHealth::Dead);
    world.settle();
    assert_eq!(world.ring(), "ab");
}

#[test]
fn members_whose_host_cannot_serve_get_no_new_connections() {
    let lan = || NetworkName::new("lan").unwrap();
    let mut world = World::new(false);
    world.settle();
    assert_eq!(world.ring(), "abc");
    // Its director alone is missing: the edges serve, and others steer to them.
    let problem = || UplinkMode::Problem("no XDP".into());
    let lost = |world: &mut World| {
        let report = world.reports.get_mut(&host(2)).unwrap();
        report.uplinks.insert(lan(), problem());
    };
    lost(&mut world);
    world.settle();
    assert_eq!(world.ring(), "abc");
    // It has gone silent and says so.
    let silent = |world: &mut World| {
        let said = world.said(2);
        (said.active, said.prepared, said.holding) = (0, None, false);
        said.problem = Some("map full".into());
    };
    for _ in 0..2 {
        silent(&mut world);
        let changes = world.steps();
        assert!(!changes.is_empty(), "{:?}", world.ring());
        world.apply(Command::ChangeServices { changes });
        world.follows(1);
        world.follows(3);
    }
    assert_eq!(world.ring(), "ac");
    // As soon as it serves again.
    world.said(2).problem = None;
    let report = world.reports.get_mut(&host(2)).unwrap();
    report.uplinks.insert(lan(), UplinkMode::Driver);
    world.follow();
    world.settle();
    assert_eq!(world.ring(), "abc");
}

#[test]
fn if_nobody_serves_the_last_ring_stays() {
    let mut world = World::new(true);
    for (n, name) in [(1, "a"), (2, "b"), (3, "c")] {
        world.member(n, name).healthy = Some(true);
    }
    world.settle();
    for (n, name) in [(1, "a"), (2, "b"), (3, "c")] {
        world.member(n, name).healthy = Some(false);
    }
    world.settle();
    assert_eq!(world.ring(), "abc");
    assert!(
        world
            .problems()
            .iter()
            .any(|text| text.starts_with("no member serves: the last ring stays"))
    );
    world.member(2, "b").healthy = Some(true);
    world.settle();
    assert_eq!(world.ring(), "b");
}

#[test]
fn a_coming_ring_that_is_not_wanted_any_more_is_given_up() {
    let mut world = World::new(false);
    world.settle();
    world.says(3, "c", VmPhase::BackOff);
    let changes = world.steps();
    world.apply(Command::ChangeServices { changes });
    world.says(3, "c", VmPhase::Running);
    let steps = world.steps();
    assert!(
        matches!(steps[..], [ServiceChange::AbandonRing { epoch: 2, .. }]),
        "{steps:?}"
    );
    world.settle();
    assert_eq!(
        (
            world.ring().as_str(),
            world.state.services[&service("web")].active()
        ),
        ("abc", 1)
    );
}

#[test]
fn a_drain_ends_when_connections_do_or_at_its_time_out() {
    for late in [false, true] {
        let mut world = World::new(false);
        world.settle();
        world.apply(Command::DrainMember {
            service: service("web"),
            vm: vm("b"),
        });
        world.settle();
        assert_eq!(world.ring(), "ac");
        world.member(2, "b").flows = Some(4);
        assert_eq!(world.steps(), []);
        world.now = world.now.plus(Millis::secs(30));
        assert_eq!(world.steps(), []);
        if late {
            world.now = world.now.plus(Millis::secs(31));
        } else {
            world.member(2, "b").flows = Some(0);
            assert_eq!(world.steps(), [], "quiet for a moment is not quiet");
            world.now = world.now.plus(Millis::secs(3));
        }
        let ended = ServiceChange::DrainEnded {
            service: service("web"),
            vm: vm("b"),
            cut: if late { 4 } else { 0 },
        };
        let changes = world.steps();
        assert_eq!(changes, [ended]);
        world.apply(Command::ChangeServices { changes });
        world.settle();
        world.apply(Command::ResumeMember {
            service: service("web"),
            vm: vm("b"),
        });
        world.settle();
        assert_eq!(world.ring(), "abc");
    }
}

#[test]
fn the_last_member_is_not_drained_before_another_serves() {
    let mut world = World::new(false);
    for (n, name) in [(1, "a"), (3, "c")] {
        world.says(n, name, VmPhase::BackOff);
    }
    world.settle();
    world.apply(Command::DrainMember {
        service: service("web"),
        vm: vm("b"),
    });
    world.now = world.now.plus(Millis::secs(120));
    world.settle();
    assert_eq!(world.ring(), "b");
    world.says(1, "a", VmPhase::Running);
    world.settle();
    assert_eq!(world.ring(), "a");
}

fn three_services(world: &mut World) {
    let one = |n: u32| json!({ "network": "lan", "address": format!("10.0.0.{n}"), "ports": ["80"], "members": { "a": {} } });
    let shared = json!({ "network": "lan", "address": "10.0.0.100", "ports": ["443"], "members": { "a": {} } });
    world.manifest(json!({ "services": { "x": one(101), "y": one(102), "web-tls": shared } }));
}

#[test]
fn addresses_are_spread_and_a_shared_one_stays_together() {
    let mut world = World::new(false);
    three_services(&mut world);
    world.settle();
    let holders: Vec<_> = ["web", "x", "y"]
        .map(|name| world.holder(name).unwrap())
        .into();
    assert_eq!(holders, [host(1), host(2), host(3)]);
    assert_eq!(world.holder("web-tls"), world.holder("web"));
}

#[test]
fn an_address_leaves_a_host_when_its_lease_is_over_and_not_before() {
    let mut world = World::new(false);
    three_services(&mut world);
    world.settle();
    world.health.insert(host(1), HostHealth::Suspect);
    assert_eq!(world.steps(), []);
    world.health.insert(host(1), HostHealth::Expired);
    let changes = world.steps();
    let taken: Vec<_> = taken_from(&world.input(), &changes)
        .into_iter()
        .cloned()
        .collect();
    assert_eq!(taken, [host(1)]);
    let moved = changes.iter().filter(|step| matches!(step, ServiceChange::SetHolder { planned: false, host, .. } if *host != self::host(1)));
    assert_eq!(moved.count(), 2, "{changes:?}");
    world.apply(Command::ChangeServices { changes });
    assert_eq!(world.holder("web-tls"), world.holder("web"));
    // No other host left: it stays, and people are told.
    for n in 1..=3 {
        world.health.insert(host(n), HostHealth::Expired);
    }
    assert!(
        !world
            .steps()
            .iter()
            .any(|step| matches!(step, ServiceChange::SetHolder { .. }))
    );
    assert!(
        world
            .problems()
            .iter()
            .any(|text| text.contains("its lease is over"))
    );
}

#[test]
fn a_planned_move_makes_before_it_breaks() {
    let mut world = World::new(false);
    world.settle();
    assert_eq!(world.holder("web"), Some(host(1)));
    world.apply(Command::SetHostMode {
        host: host(1),
        mode: HostMode::Draining,
    });
    let changes = world.steps();
    assert!(
        changes
            .iter()
            .any(|step| matches!(step, ServiceChange::SetHolder { planned: true, .. })),
        "{changes:?}"
    );
    world.apply(Command::ChangeServices { changes });
    let record = &world.state.services[&service("web")];
    assert!(record.is_held_by(&host(1)) && record.is_held_by(&host(2)));
    assert!(
        !world
            .steps()
            .iter()
            .any(|step| matches!(step, ServiceChange::HolderSettled { .. }))
    );
    world.follow();
    world.settle();
    assert!(!world.state.services[&service("web")].is_held_by(&host(1)));
    // Back again: one address is not worth a move.
    world.apply(Command::SetHostMode {
        host: host(1),
        mode: HostMode::Active,
    });
    world.now = world.now.plus(Millis::secs(120));
    assert_eq!(world.steps(), []);
}

#[test]
fn addresses_are_evened_out_one_at_a_time() {
    let mut world = World::new(false);
    for n in [2, 3] {
        world.health.insert(host(n), HostHealth::Expired);
    }
    three_services(&mut world);
    world.settle();
    assert!(
        ["web", "x", "y"]
            .iter()
            .all(|name| world.holder(name) == Some(host(1)))
    );
    for n in [2, 3] {
        world.health.insert(host(n), HostHealth::Up);
    }
    world.settle();
    assert!(
        ["web", "x", "y"]
            .iter()
            .all(|name| world.holder(name) == Some(host(1)))
    );
    let moves = |steps: &[ServiceChange]| {
        let moved = steps
            .iter()
            .filter(|step| matches!(step, ServiceChange::SetHolder { planned: true, .. }));
        moved.count()
    };
    world.now = world.now.plus(Millis::secs(31));
    let changes = world.steps();
    assert!((1..=2).contains(&moves(&changes)), "{changes:?}");
    world.apply(Command::ChangeServices { changes });
    assert_eq!(moves(&world.steps()), 0);
}
