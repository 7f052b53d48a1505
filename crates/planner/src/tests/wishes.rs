//! Labels, resources, limits, domains, weights, waits: each constraint by itself.

use crate::testing::*;
use crate::{Violation, checked, lint, waiting};
use quorate_state::{Action, Command, Plan, PlannedAction, Reason};
use quorate_types::{ByteSize, Millis};
use serde_json::{Value, json};

/// Six hosts in three racks: h1, h2 in r1 and so on; h1, h3, h5 have SSDs; h2 has two GPUs.
fn hosts() -> Value {
    let mut hosts = serde_json::Map::new();
    for n in 1..=6 {
        let mut spec = json!({ "labels": { "rack": format!("r{}", (n + 1) / 2) } });
        if n % 2 == 1 {
            spec["labels"]["disk"] = "ssd".into();
        }
        if n == 2 {
            spec["resources"] = json!({ "gpu": 2 });
        }
        hosts.insert(format!("h{n}"), spec);
    }
    hosts.into()
}

fn site(vms: Value, rules: Value) -> World {
    World::new(6, json!({ "hosts": hosts(), "vms": vms, "rules": rules }))
}

fn said(world: &mut World, name: &str) -> String {
    world.observe();
    waiting(&world.input())
        .remove(&vm(name))
        .unwrap_or_default()
}

fn rack(world: &World, name: &str) -> u32 {
    let host = world.at(name).unwrap();
    host[1..].parse::<u32>().unwrap().div_ceil(2)
}

#[test]
fn labels_allow_and_preferences_choose() {
    let mut world = site(
        json!({
            "ssd": { "memory": "64MiB", "host_labels": { "disk": ["ssd"], "rack": ["r2", "r3"] } },
            "liked": { "memory": "64MiB", "prefer": [{ "hosts": ["h4"], "weight": 500 }] },
            "shy": { "memory": "64MiB", "hosts": ["h5", "h6"],
                "prefer": [{ "labels": { "disk": ["ssd"] }, "weight": -500 }] },
        }),
        json!({}),
    );
    world.run(10);
    assert!(["h3", "h5"].contains(&world.at("ssd").unwrap().as_str()));
    assert_eq!(world.at("liked").as_deref(), Some("h4"));
    assert_eq!(world.at("shy").as_deref(), Some("h6"));
    // A label that goes away moves what needs it, live.
    let at = world.at("ssd").unwrap();
    world.command(Command::LabelHost {
        host: host(&at),
        set: Default::default(),
        remove: ["disk".parse().unwrap()].into(),
    });
    let words = world.words();
    assert_eq!(words.len(), 1, "{words:?}");
    assert!(words[0].starts_with("migrate ssd to h"), "{words:?}");
}

#[test]
fn counted_resources_are_used_up() {
    let mut world = site(
        json!({
            "a": { "memory": "64MiB", "resources": { "gpu": 1 } },
            "b": { "memory": "64MiB", "resources": { "gpu": 1 } },
        }),
        json!({}),
    );
    world.run(10);
    assert_eq!(
        (world.at("a"), world.at("b")),
        (Some("h2".into()), Some("h2".into()))
    );
    let spec = json!({ "hosts": { "h2": { "resources": { "gpu": 2 } }, "h3": { "resources": { "gpu": 1 } } },
        "vms": { "c": { "memory": "64MiB", "resources": { "gpu": 1 } } } });
    world.command(Command::ApplyManifest {
        base: None,
        manifest: serde_json::from_value(spec).unwrap(),
    });
    world.reports.get_mut(&host("h3")).unwrap().capacity.memory = ByteSize::mib(100);
    let text = said(&mut world, "c");
    assert!(
        text.contains("h2 has 0 of 2 gpu free; 1 are needed"),
        "{text}"
    );
    assert!(text.contains("h1 has 0 of 0 gpu free"), "{text}");
}

#[test]
fn virtual_cpus_are_a_hard_limit_where_that_is_said() {
    let vms =
        json!({ "a": { "memory": "64MiB", "cpus": 4 }, "b": { "memory": "64MiB", "cpus": 4 } });
    let mut world = World::new(1, json!({ "vms": vms }));
    world.run(10);
    assert_eq!(world.at("b").as_deref(), Some("h1"), "without a limit");
    let manifest = json!({ "cluster": { "cpu_overcommit_percent": 100 }, "vms": vms });
    let mut world = World::new(1, manifest);
    world.run(10);
    assert_eq!(world.at("b"), None);
    let text = said(&mut world, "b");
    assert!(
        text.contains("0 of 4 virtual CPUs free; 4 are needed"),
        "{text}"
    );
    let manifest = json!({ "cluster": { "cpu_overcommit_percent": 100 }, "vms": vms,
        "hosts": { "h1": { "cpu_overcommit_percent": 200 } } });
    let mut world = World::new(1, manifest);
    world.run(10);
    assert_eq!(
        world.at("b").as_deref(),
        Some("h1"),
        "the host's own word counts"
    );
}

#[test]
fn a_rack_has_at_most_as_many_as_the_rule_says() {
    let vms = json!({ "a": { "memory": "64MiB" }, "b": { "memory": "64MiB" }, "c": { "memory": "64MiB" } });
    let rules = json!({ "racks": { "keep_apart": ["a", "b", "c"], "across": "rack" } });
    let mut world = site(vms.clone(), rules);
    world.run(10);
    let racks: std::collections::BTreeSet<u32> = ["a", "b", "c"].map(|vm| rack(&world, vm)).into();
    assert_eq!(racks.len(), 3);
    // The host of one dies: its rack still has another.
    let (lost, before) = (world.at("a").unwrap(), rack(&world, "a"));
    world.kill(&lost);
    world.run(10);
    assert_eq!(rack(&world, "a"), before);
    // The whole rack dies: hard is hard.
    let other = world.at("a").unwrap();
    world.kill(&other);
    world.run(10);
    assert_eq!(world.at("a"), None);
    let text = said(&mut world, "a");
    assert!(
        text.contains("rule racks allows at most 1 of its VMs in rack r"),
        "{text}"
    );
}

#[test]
fn an_even_share_follows_the_racks_that_are_left() {
    let names: Vec<String> = (0..6).map(|n| format!("v{n}")).collect();
    let vms: serde_json::Map<String, Value> = names
        .iter()
        .map(|name| (name.clone(), json!({ "memory": "64MiB" })))
        .collect();
    let rules = json!({ "even": { "spread": names, "across": "rack" } });
    let mut world = site(vms.into(), rules);
    world.run(10);
    let count = |world: &World, wanted: u32| {
        (0..6)
            .filter(|n| rack(world, &format!("v{n}")) == wanted)
            .count()
    };
    assert_eq!([1, 2, 3].map(|rack| count(&world, rack)), [2, 2, 2]);
    world.kill("h1");
    world.kill("h2");
    world.run(10);
    assert_eq!(
        [2, 3].map(|rack| count(&world, rack)),
        [3, 3],
        "a lost rack stops nothing"
    );
}

#[test]
fn soft_rules_are_weighed_and_never_stop_a_start() {
    let mut world = World::new(
        2,
        json!({
            "vms": {
                "a": { "memory": "64MiB" }, "b": { "memory": "64MiB" }, "c": { "memory": "64MiB" },
                "x": { "memory": "64MiB" }, "y": { "memory": "64MiB" },
            },
            "rules": {
                "apart": { "keep_apart": ["a", "b", "c"], "weight": 200 },
                "near": { "keep_with": ["x", "y"], "weight": 300 },
            },
        }),
    );
    world.run(10);
    assert_eq!(world.at("x"), world.at("y"));
    let on: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|name| world.at(name).unwrap())
        .collect();
    assert!(
        on.contains(&"h1".to_owned()) && on.contains(&"h2".to_owned()),
        "{on:?}"
    );
    assert!(world.words().is_empty(), "a broken soft rule moves nothing");
}

#[test]
fn a_wait_has_a_limit() {
    let db = json!({ "memory": "64MiB", "ready": { "probe": { "serial": "up" } } });
    let app = |on_timeout: &str| {
        json!({ "memory": "64MiB",
        "depends_on": { "db": { "timeout": "1m", "on_timeout": on_timeout } } })
    };
    let vms = json!({ "db": db, "app": app("start"), "log": app("wait") });
    let mut world = World::new(1, json!({ "vms": vms }));
    assert_eq!(world.step(), ["start db on h1"]);
    world.act();
    world.says("h1", "db", |report| report.ready = false);
    world.observe();
    let (now, due) = (world.now, world.memory.next_due(world.now));
    assert_eq!(due, Some(now.plus(Millis::secs(60))));
    assert!(world.words().is_empty());
    world.pass(Millis::secs(61));
    assert_eq!(world.step(), ["start app on h1"]);
    let text = said(&mut world, "log");
    assert!(
        text.ends_with("(for longer than its limit of 1m)"),
        "{text}"
    );
}

#[test]
fn an_advisory_order_waits_only_for_what_comes() {
    let needs = json!({ "db": { "advisory": true } });
    let vms = |power: &str, memory: &str| {
        json!({
            "db": { "memory": memory, "power": power, "ready": { "probe": { "serial": "up" } } },
            "app": { "memory": "64MiB", "depends_on": needs },
        })
    };
    let mut world = World::new(1, json!({ "vms": vms("running", "64MiB") }));
    assert_eq!(world.step(), ["start db on h1"]);
    world.act();
    world.says("h1", "db", |report| report.ready = false);
    assert!(world.words().is_empty(), "it comes, so it is waited for");
    let mut world = World::new(1, json!({ "vms": vms("stopped", "64MiB") }));
    assert_eq!(world.step(), ["start app on h1"], "it shall not run");
    let mut world = World::new(1, json!({ "vms": vms("running", "64GiB") }));
    assert_eq!(world.step(), ["start app on h1"], "it finds no host");
}

#[test]
fn a_cold_move_pauses_where_that_is_borne() {
    let vms = |bears: &str| {
        json!({
            "db": { "memory": "64MiB", "migration": "cold" },
            "app": { "memory": "64MiB", "depends_on": { "db": { "tolerates": bears } } },
        })
    };
    for (bears, word, asks) in [
        ("pause", "save db for a quick migration", false),
        ("stop", "shut db down", false),
        ("nothing", "shut db down", true),
    ] {
        let mut world = World::new(2, json!({ "vms": vms(bears) }));
        world.put("db", "h1");
        world.put("app", "h2");
        assert_eq!(
            !world.state.stopped_by_drain(&host("h1")).is_empty(),
            asks,
            "{bears}"
        );
        if asks {
            let stops = world.state.stopped_by_move(&vm("db")).unwrap();
            assert_eq!(
                stops.to_string(),
                "db can only move by being stopped; app would be without it meanwhile"
            );
        }
        world.drain("h1");
        assert_eq!(world.words(), [word], "{bears}");
    }
}

#[test]
fn a_diamond_is_drained_live_all_at_once() {
    let mut world = World::new(
        2,
        json!({
            "cluster": { "parallel_migrations": 6 },
            "vms": {
                "base": { "memory": "64MiB" },
                "left": { "memory": "64MiB", "depends_on": { "base": {} } },
                "right": { "memory": "64MiB", "depends_on": { "base": {} } },
                "top": { "memory": "64MiB", "depends_on": { "left": {}, "right": {} } },
            },
        }),
    );
    for name in ["base", "left", "right", "top"] {
        world.put(name, "h1");
    }
    world.drain("h1");
    let mut words = world.step();
    words.sort();
    let all = ["base", "left", "right", "top"].map(|name| format!("migrate {name} to h2"));
    assert_eq!(words, all);
    assert!(world.words().is_empty(), "nothing stops while they move");
}

#[test]
fn migrations_are_limited_by_host_network_and_cluster() {
    let vms = |nics: bool| {
        let mut vms = serde_json::Map::new();
        for n in 0..6 {
            let mut spec = json!({ "memory": "64MiB" });
            if nics {
                spec["nics"] = json!([{ "network": "lan" }]);
            }
            vms.insert(format!("v{n}"), spec);
        }
        Value::from(vms)
    };
    let lan = json!({ "lan": { "bridge": "br-lan", "parallel_migrations": 3 } });
    let many = json!({ "parallel_migrations": 6 });
    let total = json!({ "parallel_migrations": 6, "total_migrations": 4 });
    for (manifest, count) in [
        (json!({ "cluster": many, "vms": vms(false) }), 6),
        (json!({ "cluster": total, "vms": vms(false) }), 4),
        (
            json!({ "cluster": many, "vms": vms(true), "networks": lan }),
            3,
        ),
        (
            json!({ "cluster": many, "vms": vms(false), "hosts": { "h1": { "parallel_migrations": 1 } } }),
            1,
        ),
    ] {
        let mut world = World::new(3, manifest);
        for n in 0..6 {
            world.put(&format!("v{n}"), "h1");
        }
        world.drain("h1");
        assert_eq!(world.words().len(), count);
    }
}

#[test]
fn running_guests_make_room_only_where_that_is_allowed() {
    for allowed in [false, true] {
        let mut world = World::new(
            2,
            json!({
                "cluster": { "make_room": allowed },
                "vms": {
                    "a": { "memory": "600MiB" }, "b": { "memory": "600MiB" },
                    "big": { "memory": "1800MiB", "power": "stopped" },
                },
            }),
        );
        world.put("a", "h1");
        world.put("b", "h2");
        world.power("big", quorate_types::spec::Power::Running);
        if !allowed {
            assert!(world.words().is_empty());
            continue;
        }
        let words = world.words();
        assert_eq!(words, ["migrate a to h2"]);
        world.run(20);
        assert_eq!(world.at("big").as_deref(), Some("h1"));
    }
}

#[test]
fn what_finds_no_host_is_helped_by_moving_others_aside() {
    // By score both small ones go to different hosts, and the large one fits nowhere.
    let mut world = World::new(
        2,
        json!({ "vms": {
            "a": { "memory": "600MiB" }, "b": { "memory": "600MiB" },
            "big": { "memory": "1800MiB", "priority": -1 },
        }}),
    );
    world.run(10);
    assert!(world.at("big").is_some());
    assert_eq!(world.at("a"), world.at("b"));
}

#[test]
fn lint_knows_the_new_constraints_and_strips_what_breaks_them() {
    let mut world = site(
        json!({
            "a": { "memory": "64MiB", "host_labels": { "rack": ["r1"] } },
            "b": { "memory": "64MiB", "resources": { "gpu": 1 } },
            "c": { "memory": "64MiB" }, "d": { "memory": "64MiB" },
        }),
        json!({ "racks": { "keep_apart": ["c", "d"], "across": "rack" } }),
    );
    world.observe();
    let abi = crate::guest_abi(world.reports.values(), Default::default()).unwrap();
    let start = |name: &str, on: &str| PlannedAction {
        action: Action::Start {
            vm: vm(name),
            host: host(on),
            abi: abi.clone(),
        },
        reason: Reason::new("test"),
    };
    let plan = Plan {
        base: world.state.revision,
        actions: vec![
            start("a", "h5"),
            start("b", "h4"),
            start("c", "h1"),
            start("d", "h2"),
        ],
    };
    let found = lint(&world.input(), &plan);
    let has = |wanted: fn(&Violation) -> bool| found.iter().any(wanted);
    assert!(has(
        |v| matches!(v, Violation::BadTarget { why, .. } if why == "not allowed")
    ));
    assert!(has(
        |v| matches!(v, Violation::Capacity { what, .. } if what == "gpu")
    ));
    assert!(has(
        |v| matches!(v, Violation::Domain { rule, .. } if rule.as_str() == "racks")
    ));
    let good = Plan {
        base: world.state.revision,
        actions: vec![start("a", "h5"), start("c", "h3"), start("d", "h1")],
    };
    let (rest, found) = checked(&world.input(), good);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        words(&rest),
        ["start c on h3", "start d on h1"],
        "one bad action, the rest goes on"
    );
}
