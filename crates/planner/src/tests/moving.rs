//! Moves, drains and migration bookkeeping, in tables.

use crate::testing::*;
use crate::{waiting, waiting_hosts, what_move};
use quorate_state::{Command, HostMode};
use quorate_types::report::{LinkReport, MigrationOutcome};
use quorate_types::{ByteSize, Manifest, Millis, VmPhase};
use serde_json::{Value, json};

fn world(vms: Value, rules: Value) -> World {
    World::new(3, json!({ "vms": vms, "rules": rules }))
}

fn small() -> Value {
    json!({ "memory": "64MiB" })
}

#[test]
fn a_drain_moves_live_in_bounded_numbers_and_ends_in_maintenance() {
    let mut world = world(
        json!({ "a": small(), "b": small(), "c": small(), "d": small(), "e": small() }),
        json!({}),
    );
    for name in ["a", "b", "c", "d", "e"] {
        world.put(name, "h1");
    }
    world.drain("h1");
    let words = world.step();
    assert_eq!(words.len(), 2, "two at a time: {words:?}");
    assert!(words.iter().all(|word| word.starts_with("migrate ")));
    assert!(waiting(&world.input())[&vm("e")].contains("waits for its turn"));
    assert!(waiting_hosts(&world.input())[&host("h1")].contains("to leave"));
    let done = world.run(30);
    assert_eq!(done.last().unwrap(), "host h1 is now maintenance");
    assert!(
        !done
            .iter()
            .any(|word| word.contains("shut") || word.contains("power"))
    );
    assert_eq!(world.host_mode("h1"), HostMode::Maintenance);
}

#[test]
fn a_dependency_is_drained_without_stopping_what_needs_it() {
    let mut world = world(
        json!({ "db": small(), "app": { "memory": "64MiB", "depends_on": { "db": {} } } }),
        json!({}),
    );
    world.put("db", "h1");
    world.put("app", "h1");
    world.drain("h1");
    let done = world.run(20);
    assert!(
        done.iter().all(|word| !word.contains("shut app")),
        "{done:?}"
    );
    assert_eq!(
        world.record("app").last_epoch.0,
        2,
        "one migration, no restart"
    );
}

#[test]
fn each_policy_has_its_way() {
    let policy = |policy: &str| json!({ "memory": "64MiB", "migration": policy });
    let mut world = world(
        json!({ "cold": policy("cold"), "live": policy("live"), "never": policy("never"), "quick": policy("quick") }),
        json!({}),
    );
    let settings = quorate_types::ClusterSettings {
        parallel_migrations: 8,
        ..Default::default()
    };
    world.command(Command::ApplyManifest {
        base: None,
        manifest: Manifest {
            cluster: Some(settings),
            ..Default::default()
        },
    });
    for name in ["cold", "live", "never", "quick"] {
        world.put(name, "h1");
    }
    world.drain("h1");
    let mut words = world.step();
    words.sort();
    assert_eq!(
        words[1..],
        ["save quick for a quick migration", "shut cold down"]
    );
    assert!(words[0].starts_with("migrate live to "));
    world.run(20);
    assert_eq!(world.at("never").as_deref(), Some("h1"));
    for name in ["cold", "live", "quick"] {
        assert_ne!(world.at(name).as_deref(), Some("h1"), "{name}");
    }
    let said = waiting(&world.input()).remove(&vm("never")).unwrap();
    assert!(said.contains("quorate vm stop never"), "{said}");
    assert_eq!(world.host_mode("h1"), HostMode::Draining);
}

#[test]
fn a_guest_that_cannot_be_saved_goes_on_and_is_not_tried_at_once_again() {
    let mut world = world(
        json!({ "a": { "memory": "64MiB", "migration": "quick" } }),
        json!({}),
    );
    world.put("a", "h1");
    world.drain("h1");
    assert_eq!(world.step(), ["save a for a quick migration"]);
    for (failures, gives_up) in [(1, false), (2, false), (3, true)] {
        world.says("h1", "a", |report| {
            report.phase = VmPhase::Running;
            report.closed = quorate_types::Epoch(0);
            report.saved = None;
            report.save_failures = failures;
            report.error = Some("the pool is full".into());
        });
        assert_eq!(!world.words().is_empty(), gives_up, "{failures}");
        if !gives_up {
            let said = waiting(&world.input()).remove(&vm("a")).unwrap();
            assert!(said.contains("the pool is full"), "{said}");
        }
    }
    let planned = crate::plan(&world.input()).actions.remove(0);
    assert!(planned.reason.summary.contains("migration: cold"));
    assert!(planned.reason.evidence[0].contains("the pool is full"));
    let words = world.step();
    assert_eq!(
        words,
        ["quick migration of a failed, it goes on where it is"]
    );
    world.says("h1", "a", |report| report.save_failures = 0);
    assert!(world.words().is_empty(), "right after the failure");
    let said = waiting(&world.input()).remove(&vm("a")).unwrap();
    assert!(said.contains("the next try is in"), "{said}");
    world.pass(Millis::secs(6));
    assert_eq!(world.step(), ["save a for a quick migration"]);
}

#[test]
fn a_guest_that_is_being_saved_in_vain_can_be_stopped() {
    let mut world = world(
        json!({ "a": { "memory": "64MiB", "migration": "quick" } }),
        json!({}),
    );
    world.put("a", "h1");
    world.drain("h1");
    assert_eq!(world.step(), ["save a for a quick migration"]);
    world.says("h1", "a", |report| {
        report.phase = VmPhase::Running;
        report.closed = quorate_types::Epoch(0);
        report.saved = None;
        report.save_failures = 3;
    });
    world.power("a", quorate_types::spec::Power::Stopped);
    assert_eq!(world.words(), ["shut a down"]);
}

#[test]
fn nothing_is_stopped_for_a_move_that_has_no_target() {
    let mut world = world(
        json!({ "a": { "memory": "64MiB", "migration": "cold", "hosts": ["h1"] } }),
        json!({}),
    );
    world.put("a", "h1");
    world.drain("h1");
    assert!(world.words().is_empty());
    assert!(waiting(&world.input())[&vm("a")].contains("no host can take it"));
}

#[test]
fn a_failed_move_waits_and_tries_another_target_first() {
    let mut world = world(json!({ "a": small() }), json!({}));
    world.put("a", "h1");
    world.drain("h1");
    let mut targets = Vec::new();
    let mut now = world.now;
    for wait in [5, 10, 20] {
        let words = world.step();
        assert_eq!(words.len(), 1, "{words:?}");
        targets.push(words[0].clone());
        world.says_outcome("h1", "a", MigrationOutcome::Failed);
        world.step();
        world.says("h1", "a", |report| report.phase = VmPhase::Running);
        assert!(world.words().is_empty(), "right after the failure");
        world.pass(Millis::secs(wait - 1));
        assert!(world.words().is_empty(), "{wait}");
        assert!(waiting(&world.input())[&vm("a")].contains("the next try is in 1 s"));
        world.pass(Millis::secs(1));
        assert!(world.now > now);
        now = world.now;
    }
    assert_ne!(targets[0], targets[1]);
    assert_eq!(targets[0], targets[2]);
}

#[test]
fn companions_move_together_and_the_apart_stay_apart() {
    let mut world = world(
        json!({ "x": small(), "y": small(), "z": { "memory": "64MiB", "hosts": ["h2", "h3"] } }),
        json!({ "with": { "keep_with": ["x", "y"] }, "apart": { "keep_apart": ["y", "z"] } }),
    );
    world.put("x", "h1");
    world.put("y", "h1");
    world.put("z", "h2");
    world.ask_move("x", None);
    assert_eq!(world.step(), ["migrate x to h3", "migrate y to h3"]);
    world.run(20);
    assert_eq!(world.at("x").as_deref(), Some("h3"));
    assert_eq!(world.at("y").as_deref(), Some("h3"));
    let refused = what_move(&world.input(), &vm("x"), Some(&host("h2"))).unwrap_err();
    assert!(
        refused.summary.contains("y must be kept apart from z"),
        "{refused:?}"
    );
}

#[test]
fn a_group_whose_other_half_failed_to_move_is_brought_together() {
    let mut world = world(
        json!({ "x": small(), "y": small() }),
        json!({ "with": { "keep_with": ["x", "y"] } }),
    );
    world.put("x", "h1");
    world.put("y", "h1");
    world.ask_move("x", Some("h2"));
    world.step();
    world.act();
    world.says_outcome("h1", "y", MigrationOutcome::Failed);
    world.says("h2", "y", |report| report.migration = None);
    world.step();
    assert_eq!(
        (world.at("x").unwrap(), world.at("y").unwrap()),
        ("h2".into(), "h1".into())
    );
    world.act();
    assert!(world.words().is_empty(), "right after the failure");
    world.pass(Millis::secs(5));
    assert_eq!(world.step(), ["migrate y to h2"]);
}

#[test]
fn a_broken_rule_is_mended_live() {
    let mut world = world(json!({ "a": small(), "b": small() }), json!({}));
    world.put("a", "h1");
    world.put("b", "h1");
    let manifest = json!({ "rules": { "apart": { "keep_apart": ["a", "b"] } } });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    world.command(Command::ApplyManifest {
        base: None,
        manifest,
    });
    assert_eq!(world.step(), ["migrate b to h2"]);
    world.run(10);
    assert!(world.words().is_empty());
}

#[test]
fn a_wish_is_met_or_answered() {
    let mut world = world(
        json!({ "a": small(), "n": { "memory": "64MiB", "migration": "never" } }),
        json!({}),
    );
    world.put("a", "h1");
    world.put("n", "h1");
    world.ask_move("a", Some("h3"));
    assert_eq!(world.step(), ["migrate a to h3"]);
    world.run(10);
    assert_eq!(world.at("a").as_deref(), Some("h3"));
    assert!(world.record("a").move_request.is_none());

    world.ask_move("n", None);
    assert_eq!(world.step(), ["give up moving n"]);
    assert!(world.record("n").move_request.is_none());

    world.reports.get_mut(&host("h2")).unwrap().capacity.memory = ByteSize::mib(10);
    world.ask_move("a", Some("h2"));
    assert_eq!(world.step(), ["give up moving a"]);
    let decision = world.record("a").decisions.last().unwrap();
    assert!(
        decision.reason.summary.contains("h2 has 10MiB"),
        "{decision:?}"
    );

    // Frozen for a moment: the wish is kept.
    world.ask_move("a", Some("h1"));
    world.says("h3", "a", |report| report.phase = VmPhase::Frozen);
    assert!(world.words().is_empty());
    world.says("h3", "a", |report| report.phase = VmPhase::Running);
    assert_eq!(world.step(), ["migrate a to h1"]);
}

#[test]
fn a_quick_move_goes_where_it_was_asked_to() {
    let mut world = world(
        json!({ "a": { "memory": "64MiB", "migration": "quick" } }),
        json!({}),
    );
    world.put("a", "h1");
    world.ask_move("a", Some("h3"));
    assert_eq!(world.step(), ["save a for a quick migration"]);
    world.act();
    let words = world.step();
    assert_eq!(
        words,
        [
            "release a (h1 by stopped-by-owner)",
            "start a on h3",
            "move of a done"
        ]
    );
    assert!(world.record("a").saved.is_some());
    world.act();
    assert!(world.words().is_empty());
}

#[test]
fn a_move_needs_the_link_and_the_same_machine() {
    let mut world = world(json!({ "a": small() }), json!({}));
    world.put("a", "h1");
    let down = LinkReport::default();
    let report = world.reports.get_mut(&host("h1")).unwrap();
    report.links.insert(host("h2"), down);
    let machines = &mut world
        .reports
        .get_mut(&host("h3"))
        .unwrap()
        .hypervisor
        .machines;
    machines.insert("q35".into(), "pc-q35-9.2".into());
    let refused = what_move(&world.input(), &vm("a"), None).unwrap_err();
    assert!(
        refused.summary.contains("direct link from h1"),
        "{refused:?}"
    );
    assert!(
        refused.summary.contains("no machine pc-q35-10.0"),
        "{refused:?}"
    );
    assert_eq!(refused.candidates.len(), 3);
}

#[test]
fn room_counts_on_both_sides_of_a_migration() {
    let mut world = world(
        json!({ "a": { "memory": "1GiB" }, "b": { "memory": "1GiB", "hosts": ["h1", "h2"] } }),
        json!({}),
    );
    world.put("a", "h1");
    world.begin("a", "h2");
    assert!(world.words().is_empty(), "b fits on neither while a moves");
    world.says_outcome("h2", "a", MigrationOutcome::Arrived);
    assert_eq!(world.step().last().unwrap(), "start b on h1");
}

#[test]
fn a_split_group_that_must_leave_goes_where_all_of_it_fits() {
    let half = json!({ "memory": "500MiB" });
    let vms = json!({ "x": half, "y": half, "fill": { "memory": "736MiB", "hosts": ["h4"] } });
    let mut world = World::new(4, json!({ "vms": vms }));
    world.put("fill", "h4");
    world.put("x", "h1");
    world.put("y", "h2");
    let rules = json!({ "rules": { "with": { "keep_with": ["x", "y"] } } });
    let manifest: Manifest = serde_json::from_value(rules).unwrap();
    world.command(Command::ApplyManifest {
        base: None,
        manifest,
    });
    let report = world.reports.get_mut(&host("h3")).unwrap();
    report.capacity.memory = ByteSize::mib(1100);
    world.drain("h1");
    world.drain("h2");
    let words = world.step();
    assert_eq!(
        words,
        ["migrate x to h4", "migrate y to h4"],
        "h3 is emptier, but has no room for both"
    );
}
