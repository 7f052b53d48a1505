//! Room for failures: restart plans, what breaks them, what a change takes away.

use crate::testing::*;
use crate::{Capacity, CapacityQuestion, FailureSet, Step, capacity, forecast, shortfall};
use proptest::prelude::*;
use quorate_state::{Command, Envelope, FORMAT, State};
use quorate_types::{Timestamp, VmName};
use serde_json::{Value, json};

fn ask(world: &World) -> Capacity {
    capacity(&world.input(), &CapacityQuestion::default())
}

/// "h1: db>h3 app>h2 !big".
fn told(answer: &Capacity) -> Vec<String> {
    let plans = answer.plans.iter().map(|plan| {
        let hosts: Vec<&str> = plan.fails.hosts.iter().map(|host| host.as_str()).collect();
        let mut text = format!("{}:", hosts.join("+"));
        for restart in &plan.restarts {
            text.push_str(&format!(" {}>{}", restart.vm, restart.to));
        }
        for broken in &plan.broken {
            text.push_str(&format!(" !{}", broken.vm));
        }
        text
    });
    plans.collect()
}

/// VMs of these sizes, each put on a host.
fn site(hosts: u32, vms: &[(&str, u64, &str)]) -> World {
    let mut specs = serde_json::Map::new();
    for (name, mib, _) in vms {
        specs.insert((*name).into(), json!({ "memory": format!("{mib}MiB") }));
    }
    let mut world = World::new(hosts, json!({ "vms": specs }));
    world.arm();
    for (name, _, host) in vms {
        world.put(name, host);
    }
    world
}

#[test]
fn every_host_has_a_restart_plan() {
    let world = site(
        3,
        &[("app", 300, "h1"), ("db", 500, "h2"), ("web", 300, "h1")],
    );
    let answer = ask(&world);
    assert_eq!(told(&answer), ["h1: app>h3 web>h3", "h2: db>h3", "h3:"]);
    assert_eq!(
        (answer.survives, answer.checked, answer.complete),
        (2, 2, true)
    );
    assert!(answer.broken.is_empty() && answer.bound.is_empty() && answer.unproven.is_empty());
}

#[test]
fn what_breaks_it_is_named_with_the_reason() {
    // 2048 MiB a host; each VM needs 64 MiB more.
    let world = site(
        3,
        &[("a", 1500, "h1"), ("b", 1500, "h2"), ("c", 1500, "h3")],
    );
    let answer = ask(&world);
    assert_eq!(told(&answer), ["h1: !a", "h2: !b", "h3: !c"]);
    assert_eq!((answer.survives, answer.checked), (0, 1));
    let why = &answer.broken[0].why;
    assert!(
        why == "it needs 1564MiB; h2 has 484MiB free, h3 has 484MiB free",
        "{why}"
    );
    // Two failures break what one does not.
    let world = site(
        4,
        &[("a", 1500, "h1"), ("b", 1500, "h2"), ("c", 1500, "h3")],
    );
    let answer = ask(&world);
    assert_eq!((answer.survives, answer.checked), (1, 2));
    let fails: Vec<&str> = answer.broken[0]
        .fails
        .iter()
        .map(|host| host.as_str())
        .collect();
    assert_eq!(fails, ["h1", "h2"]);
}

#[test]
fn guests_that_may_make_room_count_as_if_they_had() {
    for allowed in [false, true] {
        let mut world = World::new(
            3,
            json!({
                "cluster": { "make_room": allowed },
                "vms": {
                    "a": { "memory": "600MiB" }, "b": { "memory": "600MiB" },
                    "big": { "memory": "1800MiB" },
                },
            }),
        );
        world.arm();
        for (name, host) in [("a", "h1"), ("b", "h2"), ("big", "h3")] {
            world.put(name, host);
        }
        let answer = ask(&world);
        // The same question again: all was put back.
        assert_eq!(ask(&world), answer);
        let plan = &answer.plans[2];
        if !allowed {
            assert_eq!(told(&answer)[2], "h3: !big");
            assert!(plan.makes_room.is_empty());
            continue;
        }
        assert_eq!(told(&answer)[2], "h3: big>h1");
        let moved: Vec<String> = plan
            .makes_room
            .iter()
            .map(|moved| format!("{}>{}", moved.vm, moved.to))
            .collect();
        assert_eq!(moved, ["a>h2"]);
        assert_eq!(answer.survives, 1);
        // The forecast of the same failure comes to the same.
        let mut snapshot = world.snapshot();
        snapshot.seen.voters = [1].into();
        let fail = Step {
            fail: [host("h3")].into(),
            ..Step::default()
        };
        let found = forecast(&snapshot, &[fail]).unwrap();
        assert_eq!(found.placement[&vm("big")], Some(host("h1")));
        assert_eq!(found.placement[&vm("a")], Some(host("h2")));
    }
}

#[test]
fn rules_count_like_room() {
    let mut world = World::new(
        2,
        json!({
            "vms": { "a": { "memory": "64MiB" }, "b": { "memory": "64MiB" } },
            "rules": { "r": { "keep_apart": ["a", "b"] } },
        }),
    );
    world.put("a", "h1");
    world.put("b", "h2");
    let answer = ask(&world);
    assert_eq!(told(&answer), ["h1: !a", "h2: !b"]);
    assert!(answer.broken[0].why.contains("kept apart from b"));
    assert_eq!(
        answer.unproven,
        [host("h1"), host("h2")],
        "nothing is armed"
    );
}

#[test]
fn a_vm_that_may_only_run_there_is_named_and_does_not_count() {
    let vms = json!({ "vms": {
        "cache": { "memory": "64MiB", "hosts": ["h1"] },
        "app": { "memory": "64MiB" },
    }});
    let mut world = World::new(3, vms);
    world.put("cache", "h1");
    world.put("app", "h1");
    let answer = ask(&world);
    assert_eq!(answer.survives, 2);
    assert_eq!(answer.bound[0].vm, vm("cache"));
    // A host in maintenance is no excuse: it could take the VM.
    let vms = json!({ "vms": { "app": { "memory": "64MiB", "hosts": ["h1", "h2"] } } });
    let mut world = World::new(3, vms);
    world.put("app", "h1");
    world.drain("h2");
    let answer = ask(&world);
    assert_eq!(answer.survives, 0);
    assert!(answer.bound.is_empty());
}

#[test]
fn domains_fail_together() {
    let world = site(4, &[("a", 1500, "h1"), ("b", 1500, "h2"), ("c", 64, "h3")]);
    let rack = FailureSet {
        name: Some("rack=r1".into()),
        hosts: [host("h1"), host("h2")].into(),
    };
    let question = CapacityQuestion {
        failures: Some(1),
        domains: vec![rack],
    };
    let answer = capacity(&world.input(), &question);
    assert_eq!(told(&answer)[4], "h1+h2: a>h4 b>h3");
    assert_eq!((answer.survives, answer.checked), (1, 1));
}

#[test]
fn what_has_no_place_already_breaks_it_at_once() {
    let mut world = site(2, &[("a", 1500, "h1"), ("b", 1500, "h2")]);
    world.command(apply(json!({ "vms": { "c": { "memory": "1GiB" } } })));
    let answer = ask(&world);
    assert_eq!((answer.survives, answer.checked), (0, 0));
    assert!(answer.broken[0].fails.is_empty());
    assert_eq!(answer.broken[0].vm, vm("c"));
}

#[test]
fn a_picture_on_the_move_is_judged_as_it_will_be() {
    let mut world = site(3, &[("a", 300, "h1"), ("b", 300, "h2")]);
    world.begin("a", "h3");
    assert_eq!(told(&ask(&world)), ["h1:", "h2: b>h1", "h3: a>h1"]);
    // h2 is dead already: what it had counts as started elsewhere.
    world.kill("h2");
    let answer = ask(&world);
    assert_eq!(told(&answer), ["h1: b>h3", "h3: a>h1"]);
}

fn apply(manifest: Value) -> Command {
    Command::ApplyManifest {
        base: None,
        manifest: serde_json::from_value(manifest).unwrap(),
    }
}

fn with(world: &World, command: Command) -> State {
    let mut state = world.state.clone();
    let envelope = Envelope {
        format: FORMAT,
        at: Timestamp(1),
        by: "ann".into(),
        command,
    };
    state.apply(&envelope).unwrap();
    state
}

#[test]
fn a_change_is_judged_by_what_it_takes() {
    let world = site(3, &[("a", 1000, "h1"), ("b", 1000, "h2")]);
    let small = with(
        &world,
        apply(json!({ "vms": { "c": { "memory": "64MiB" } } })),
    );
    assert_eq!(shortfall(&world.input(), &small), None);
    // With another large one there is no host left for the VMs of a failed one.
    let large = with(
        &world,
        apply(json!({ "vms": { "c": { "memory": "1000MiB" } } })),
    );
    let short = shortfall(&world.input(), &large).unwrap();
    assert_eq!(short.wanted, 1);
    let vms: Vec<&VmName> = short.broken.iter().map(|broken| &broken.vm).collect();
    assert_eq!(vms.len(), 3, "{short:?}");
    // Two failures were not survived before either: nothing is taken, whatever is wanted.
    let two = json!({
        "cluster": { "admission": { "failures": 2 } },
        "vms": { "c": { "memory": "64MiB" } },
    });
    let two = with(&world, apply(two));
    assert_eq!(shortfall(&world.input(), &two), None);
    // What is broken before is no reason to refuse a change that does not add to it.
    let full = site(
        3,
        &[("a", 1500, "h1"), ("b", 1500, "h2"), ("c", 1500, "h3")],
    );
    let less = with(
        &full,
        apply(json!({ "vms": { "a": { "memory": "1400MiB" } } })),
    );
    assert_eq!(shortfall(&full.input(), &less), None);
}

#[test]
fn one_host_cannot_be_held_to_anything() {
    let world = site(1, &[("a", 1000, "h1")]);
    let more = with(
        &world,
        apply(json!({ "vms": { "b": { "memory": "64MiB" } } })),
    );
    assert_eq!(shortfall(&world.input(), &more), None);
    let answer = ask(&world);
    assert_eq!((answer.survives, answer.checked), (0, 0));
    // More than fits at all is refused even there.
    let more = with(
        &world,
        apply(json!({ "vms": { "b": { "memory": "2GiB" } } })),
    );
    assert_eq!(shortfall(&world.input(), &more).unwrap().broken.len(), 1);
}

/// Random sites at rest: VMs of three sizes with dependencies and one rule.
fn random() -> impl Strategy<Value = (u32, Value)> {
    let vm = (
        prop_oneof![Just(200u64), Just(500), Just(900)],
        0i32..3,
        prop::option::of(any::<prop::sample::Index>()),
    );
    let rule = (any::<bool>(), prop::collection::btree_set(0..6usize, 2..4));
    (
        2u32..5,
        prop::collection::vec(vm, 6),
        prop::option::of(rule),
    )
        .prop_map(|(hosts, vms, rule)| {
            let mut specs = serde_json::Map::new();
            for (n, (memory, priority, needs)) in vms.iter().enumerate() {
                let mut spec = json!({ "memory": format!("{memory}MiB"), "priority": priority });
                if let Some(other) = needs.filter(|_| n > 0) {
                    spec["depends_on"][format!("v{}", other.index(n))] = json!({});
                }
                specs.insert(format!("v{n}"), spec);
            }
            let mut rules = serde_json::Map::new();
            if let Some((apart, vms)) = rule {
                // More than there are hosts cannot be kept apart.
                let most = if apart { hosts as usize } else { 4 };
                let vms: Vec<String> = vms.iter().take(most).map(|n| format!("v{n}")).collect();
                let kind = if apart { "keep_apart" } else { "keep_with" };
                rules.insert("r".into(), json!({ kind: vms }));
            }
            (hosts, json!({ "vms": specs, "rules": rules }))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    /// The plan is what the production planner then does: a failure that is survived here is survived
    /// when it is played through, and the picture is put back as it was.
    #[test]
    fn restart_plans_hold_when_they_are_played_through((hosts, manifest) in random()) {
        let mut world = World::new(hosts, manifest);
        world.arm();
        world.run(60);
        let answer = ask(&world);
        prop_assert_eq!(&answer, &ask(&world));
        let mut snapshot = world.snapshot();
        snapshot.seen.voters.clear();
        let waits = |name: &VmName| answer.broken.iter().any(|broken| broken.fails.is_empty() && broken.vm == *name);
        for plan in &answer.plans {
            let step = Step { fail: plan.fails.hosts.clone(), ..Step::default() };
            let played = forecast(&snapshot, &[step]).unwrap();
            let missing: Vec<&VmName> = played.stages[0].unplaced.iter().map(|missing| &missing.vm).filter(|name| !waits(name)).collect();
            let foretold: Vec<&VmName> = plan.broken.iter().map(|broken| &broken.vm).collect();
            let sorted: std::collections::BTreeSet<&VmName> = foretold.iter().copied().collect();
            prop_assert!(missing.iter().copied().eq(sorted), "{:?} {:?} {:?}", plan, missing, played);
        }
    }
}
