//! Random clusters in random disorder: what must hold whatever happens.
//!
//! Every plan passes through [`World::plan`], which lints it and checks that it is deterministic,
//! and is then taken by the real `apply`.

use crate::plan;
use crate::testing::*;
use proptest::prelude::*;
use quorate_membership::HostHealth;
use quorate_state::{Action, Command, HostMode, Ownership};
use quorate_types::report::MigrationOutcome;
use quorate_types::spec::Power;
use quorate_types::{ByteSize, Epoch, Manifest, Millis, VmPhase};
use serde_json::{Value, json};

const HOSTS: u32 = 4;
const VMS: usize = 8;

/// Definitions: dependencies only point to lower numbers, so there is no circle.
fn manifest() -> impl Strategy<Value = Value> {
    let vm = (
        prop_oneof![Just(64u64), Just(256), Just(700)],
        -1i32..3,
        prop::collection::vec(any::<prop::sample::Index>(), 0..2),
        any::<bool>(),
        prop_oneof![
            6 => Just("live"), 1 => Just("quick"), 1 => Just("cold"), 1 => Just("never")
        ],
        prop::bool::weighted(0.2),
    );
    let rule = (any::<bool>(), prop::collection::btree_set(0..VMS, 2..4));
    let rules = prop::collection::vec(rule, 0..3);
    let settings = (any::<bool>(), any::<bool>());
    (prop::collection::vec(vm, VMS), rules, settings).prop_map(|(vms, rules, settings)| {
        let mut specs = serde_json::Map::new();
        for (n, (memory, priority, needs, checked, policy, pinned)) in vms.iter().enumerate() {
            let mut spec = json!({
                "memory": format!("{memory}MiB"), "priority": priority, "migration": policy,
            });
            if n > 0 {
                for need in needs {
                    let other = format!("v{}", need.index(n));
                    spec["depends_on"][other] = json!({});
                }
            }
            if *checked {
                spec["ready"] = json!({ "probe": { "serial": "up" } });
            }
            if *pinned {
                spec["hosts"] = json!(["h1", "h2"]);
            }
            specs.insert(format!("v{n}"), spec);
        }
        let mut named = serde_json::Map::new();
        for (n, (apart, vms)) in rules.iter().enumerate() {
            let kind = if *apart { "keep_apart" } else { "keep_with" };
            let vms: Vec<String> = vms.iter().map(|n| format!("v{n}")).collect();
            named.insert(format!("r{n}"), json!({ kind: vms }));
        }
        let (preempts, balances) = settings;
        let cluster = json!({
            "preemption": if preempts { "lower_priority" } else { "off" },
            "balancing": { "mode": if balances { "auto" } else { "off" } },
        });
        json!({ "vms": specs, "rules": named, "cluster": cluster })
    })
}

/// One thing that happens.
#[derive(Debug, Clone)]
enum Happening {
    Plan,
    Act,
    Pass(u64),
    Kill(u32),
    Silent(u32, HostHealth),
    Back(u32),
    Restart(u32),
    Drain(u32),
    Resume(u32),
    Power(usize, bool),
    Move(usize, Option<u32>),
    Cancel(usize),
    Delete(usize),
    Phase(usize, u8),
    Closed(usize),
    Outcome(usize, bool, u8),
    Full(u32),
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    let host = 1..=HOSTS;
    let health = prop_oneof![
        Just(HostHealth::Suspect),
        Just(HostHealth::Expired),
        Just(HostHealth::Dead)
    ];
    prop_oneof![
        6 => Just(Plan),
        6 => Just(Act),
        2 => (1u64..400).prop_map(Pass),
        2 => host.clone().prop_map(Kill),
        1 => (host.clone(), health).prop_map(|(host, health)| Silent(host, health)),
        2 => host.clone().prop_map(Back),
        1 => host.clone().prop_map(Restart),
        1 => host.clone().prop_map(Drain),
        2 => host.clone().prop_map(Resume),
        2 => (0..VMS, any::<bool>()).prop_map(|(vm, on)| Power(vm, on)),
        3 => (0..VMS, prop::option::of(host.clone())).prop_map(|(vm, to)| Move(vm, to)),
        1 => (0..VMS).prop_map(Cancel),
        1 => (0..VMS).prop_map(Delete),
        2 => (0..VMS, 0u8..6).prop_map(|(vm, phase)| Phase(vm, phase)),
        1 => (0..VMS).prop_map(Closed),
        3 => (0..VMS, any::<bool>(), 0u8..4).prop_map(|(vm, source, o)| Outcome(vm, source, o)),
        1 => host.prop_map(Full),
    ]
}

/// Commands of people may be refused; nothing else may.
fn ask(world: &mut World, command: Command) {
    let envelope = quorate_state::Envelope {
        format: quorate_state::FORMAT,
        at: quorate_types::Timestamp(1),
        by: "ann".into(),
        command,
    };
    let _ = world.state.apply(&envelope);
}

fn mode(world: &mut World, n: u32, mode: HostMode) {
    let host = host(&format!("h{n}"));
    ask(world, Command::SetHostMode { host, mode });
}

fn happen(world: &mut World, what: &Happening) {
    let name = |n: u32| format!("h{n}");
    match what {
        Happening::Plan => drop(world.step()),
        Happening::Act => {
            world.act();
        }
        Happening::Pass(seconds) => world.pass(Millis::secs(*seconds)),
        Happening::Kill(n) => {
            if world.health[&host(&name(*n))] == HostHealth::Up {
                world.kill(&name(*n));
            }
        }
        Happening::Silent(n, health) => {
            world.health.insert(host(&name(*n)), *health);
        }
        Happening::Back(n) => back(world, *n),
        Happening::Restart(n) => {
            if let Some(report) = world.reports.get_mut(&host(&name(*n))) {
                report.vms.clear();
            }
        }
        Happening::Drain(n) => mode(world, *n, HostMode::Draining),
        Happening::Resume(n) => mode(world, *n, HostMode::Active),
        Happening::Full(n) => {
            if let Some(report) = world.reports.get_mut(&host(&name(*n))) {
                report.capacity.memory = ByteSize::mib(300);
            }
        }
        Happening::Phase(n, phase) => {
            let phases = [
                VmPhase::Running,
                VmPhase::Frozen,
                VmPhase::BackOff,
                VmPhase::IoError,
                VmPhase::HandedOver,
                VmPhase::Starting,
            ];
            says(world, &format!("v{n}"), true, |report| {
                report.phase = phases[usize::from(*phase)];
                report.restarts = 3;
                report.ready = false;
            });
        }
        Happening::Closed(n) => says(world, &format!("v{n}"), true, |report| {
            report.closed = report.epoch;
            report.phase = VmPhase::Absent;
        }),
        Happening::Outcome(n, source, outcome) => outcome_of(world, *n, *source, *outcome),
        wish => ask(world, command(wish)),
    }
}

/// What people ask for.
fn command(wish: &Happening) -> Command {
    let name = |n: usize| vm(&format!("v{n}"));
    match wish {
        Happening::Power(n, on) => Command::SetPower {
            vm: name(*n),
            power: if *on { Power::Running } else { Power::Stopped },
            mode: quorate_state::StopMode::Graceful,
        },
        Happening::Move(n, to) => Command::RequestMove {
            vm: name(*n),
            to: to.map(|to| host(&format!("h{to}"))),
        },
        Happening::Cancel(n) => Command::CancelMove { vm: name(*n) },
        Happening::Delete(n) => Command::DeleteVm { vm: name(*n) },
        other => panic!("{other:?} is no command"),
    }
}

/// One side says how the migration stands.
fn outcome_of(world: &mut World, n: usize, source: bool, outcome: u8) {
    let name = format!("v{n}");
    let seen = world.state.vms.get(&vm(&name));
    let Some(Ownership::Migrating { id, .. }) = seen.map(|seen| &seen.ownership) else {
        return;
    };
    let outcomes = [
        MigrationOutcome::InProgress,
        MigrationOutcome::Failed,
        MigrationOutcome::Arrived,
        MigrationOutcome::Sent,
    ];
    let (id, outcome) = (*id, outcomes[usize::from(outcome)]);
    says(world, &name, source, |report| {
        report.migration = Some(migration(id, outcome))
    });
}

fn back(world: &mut World, n: u32) {
    let name = format!("h{n}");
    world.health.insert(host(&name), HostHealth::Up);
    world.proofs.retain(|proof| *proof.host() != host(&name));
    // What it was told before, it has in its ledger: everything that is not its any more is closed.
    let owned = world.state.orders_for(&host(&name));
    let report = world.reports.get_mut(&host(&name)).unwrap();
    report.vms.retain(|vm, _| owned.contains_key(vm));
}

/// The owner (or the source), or the target, changes its word.
fn says(
    world: &mut World,
    name: &str,
    source: bool,
    change: impl FnOnce(&mut quorate_types::VmReport),
) {
    let Some(record) = world.state.vms.get(&vm(name)) else {
        return;
    };
    let sides: Vec<(String, Epoch)> = record
        .ownership
        .hosts()
        .into_iter()
        .map(|(host, epoch)| (host.to_string(), epoch))
        .collect();
    let side = if source { sides.first() } else { sides.last() };
    if let Some((on, epoch)) = side {
        world.says(on, name, |report| {
            report.epoch = *epoch;
            change(report);
        });
    }
}

fn build(manifest: Value) -> Option<World> {
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    let mut world = World::new(HOSTS, json!({}));
    let before = world.state.vms.len();
    ask(
        &mut world,
        Command::ApplyManifest {
            base: None,
            manifest,
        },
    );
    (world.state.vms.len() > before).then_some(world)
}

/// VMs that shall run, do not, and have a host that would take them.
fn startable(world: &World) -> Vec<String> {
    let plan = plan(&world.input());
    let starts = plan
        .actions
        .iter()
        .filter_map(|planned| match &planned.action {
            Action::Start { vm, .. } => Some(vm.to_string()),
            _ => None,
        });
    starts.collect()
}

proptest! {
    #[test]
    fn every_plan_is_taken_and_breaks_no_promise(
        manifest in manifest(),
        story in prop::collection::vec(happening(), 1..60),
    ) {
        let Some(mut world) = build(manifest) else { return Ok(()) };
        for what in &story {
            happen(&mut world, what);
            // Linted, deterministic, accepted; a plan that was carried out is not made again.
            let first = world.step();
            if !first.is_empty() {
                let again = world.words();
                prop_assert!(again.iter().all(|word| !first.contains(word)), "{:?} then {:?}", first, again);
            }
        }
    }

    #[test]
    fn it_comes_to_rest_with_everything_running_that_fits(
        manifest in manifest(),
        story in prop::collection::vec(happening(), 0..40),
    ) {
        let Some(mut world) = build(manifest) else { return Ok(()) };
        for what in &story {
            happen(&mut world, what);
        }
        // The trouble ends: all hosts come back, agents do as they are told, time passes.
        for n in 1..=HOSTS {
            back(&mut world, n);
            mode(&mut world, n, HostMode::Active);
            let report = world.reports.get_mut(&host(&format!("h{n}"))).unwrap();
            report.capacity.memory = ByteSize::mib(2048);
            report.vms.values_mut().for_each(|seen| seen.migration = None);
        }
        let mut quiet = 0;
        for _ in 0..60 {
            let words = world.step();
            let changed = world.act();
            world.pass(Millis::secs(310));
            quiet = if words.is_empty() && !changed { quiet + 1 } else { 0 };
            if quiet == 4 {
                break;
            }
        }
        prop_assert_eq!(quiet, 4, "no rest; next {:?}", world.words());
        prop_assert!(startable(&world).is_empty());
        let waits = crate::waiting(&world.input());
        for (name, record) in &world.state.vms {
            prop_assert!(!record.deleting, "{} is not forgotten", name);
            match &record.ownership {
                Ownership::Free if record.wanted() => {
                    prop_assert!(waits.contains_key(name), "{} waits and nothing says why", name);
                }
                Ownership::Free => {}
                Ownership::Owned { .. } => prop_assert!(record.wanted()),
                Ownership::Migrating { .. } => prop_assert!(false, "{} still migrates", name),
            }
        }
    }
}

#[test]
fn lint_finds_what_it_is_for() {
    use crate::{Violation, lint};
    use quorate_state::{Plan, PlannedAction, Reason, StopMode};
    let mut world = World::new(
        2,
        json!({
            "vms": {
                "a": { "memory": "64MiB" }, "b": { "memory": "64MiB" },
                "c": { "memory": "64MiB", "depends_on": { "a": {} } },
            },
            "rules": { "apart": { "keep_apart": ["a", "b"] } },
        }),
    );
    world.put("a", "h1");
    let abi = crate::guest_abi(world.reports.values(), Default::default()).unwrap();
    let start = |name: &str, on: &str| Action::Start {
        vm: vm(name),
        host: host(on),
        abi: abi.clone(),
    };
    let check = |world: &World, actions: Vec<Action>| {
        let actions = actions
            .into_iter()
            .map(|action| PlannedAction {
                action,
                reason: Reason::new("test"),
            })
            .collect();
        let base = world.state.revision;
        lint(&world.input(), &Plan { base, actions })
    };
    let stop = Action::Stop {
        vm: vm("a"),
        mode: StopMode::Graceful,
    };
    assert_eq!(check(&world, vec![stop]), [Violation::Stop { vm: vm("a") }]);
    let found = check(&world, vec![start("b", "h1")]);
    assert!(matches!(found[..], [Violation::Rule { .. }]), "{found:?}");
    let found = check(&world, vec![start("a", "h2")]);
    assert!(matches!(found[..], [Violation::Refused(_)]), "{found:?}");
    let release = Action::Release {
        vm: vm("a"),
        proofs: vec![dead("h1")],
        saved: None,
    };
    let found = check(&world, vec![release, start("c", "h2"), start("a", "h2")]);
    assert!(
        matches!(
            found[..],
            [
                Violation::InventedProof { .. },
                Violation::Dependency { .. }
            ]
        ),
        "{found:?}"
    );
    world.health.insert(host("h2"), HostHealth::Suspect);
    let found = check(&world, vec![start("b", "h2")]);
    assert!(
        matches!(found[..], [Violation::BadTarget { .. }]),
        "{found:?}"
    );
    world.health.insert(host("h2"), HostHealth::Up);
    world.reports.get_mut(&host("h2")).unwrap().capacity.memory = ByteSize::mib(100);
    let found = check(&world, vec![start("b", "h2")]);
    assert!(
        matches!(found[..], [Violation::Capacity { .. }]),
        "{found:?}"
    );
}
