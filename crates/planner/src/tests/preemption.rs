//! Making room for what counts more.

use crate::testing::*;
use quorate_state::Command;
use serde_json::json;

/// Each host has 2048 MiB; the VMs that run are put as said, the others shall start.
fn site(on: bool, vms: serde_json::Value, put: &[(&str, &str)]) -> World {
    let preemption = if on { "lower_priority" } else { "off" };
    let mut world = World::new(
        2,
        json!({ "cluster": { "preemption": preemption, "balancing": { "mode": "off" } } }),
    );
    world.command(Command::ApplyManifest {
        base: None,
        manifest: serde_json::from_value(json!({ "vms": vms })).unwrap(),
    });
    for (name, host) in put {
        world.put(name, host);
    }
    world
}

fn crowded(on: bool) -> World {
    site(
        on,
        json!({
            "low": { "memory": "900MiB", "priority": 1 },
            "mid": { "memory": "900MiB", "priority": 5 },
            "other": { "memory": "1800MiB", "priority": 5 },
            "top": { "memory": "900MiB", "priority": 10 },
        }),
        &[("low", "h1"), ("mid", "h1"), ("other", "h2")],
    )
}

#[test]
fn nobody_is_stopped_unless_it_is_allowed() {
    let mut world = crowded(false);
    assert!(world.words().is_empty());
    assert!(crate::waiting(&world.input())[&vm("top")].contains("no host can take it"));
}

#[test]
fn the_least_important_makes_room_and_waits() {
    let mut world = crowded(true);
    assert_eq!(world.step(), ["shut low down"]);
    let why = &world.record("low").decisions.last().unwrap().reason;
    assert_eq!(
        why.summary,
        "top (priority 10) shall run and finds no room; on h1 this one (priority 1) counts less"
    );
    assert!(why.evidence[0].contains("964MiB"), "{:?}", why.evidence);
    // While it shuts down nobody else is stopped.
    assert!(world.words().is_empty());
    let waits = crate::waiting(&world.input());
    assert_eq!(waits[&vm("top")], "waits for what is being stopped on h1");
    let done = world.run(10);
    assert_eq!(
        done,
        ["release low (h1 by stopped-by-owner)", "start top on h1"]
    );
    assert_eq!(world.at("low"), None);
    assert_eq!(world.at("mid").as_deref(), Some("h1"));
}

#[test]
fn equal_priority_is_not_enough() {
    let mut world = site(
        true,
        json!({
            "a": { "memory": "1800MiB", "priority": 3 },
            "b": { "memory": "1800MiB", "priority": 3 },
            "c": { "memory": "900MiB", "priority": 3 },
        }),
        &[("a", "h1"), ("b", "h2")],
    );
    assert!(world.words().is_empty());
}

#[test]
fn what_something_important_needs_is_spared() {
    let mut world = site(
        true,
        json!({
            "base": { "memory": "1800MiB", "priority": 0 },
            "vip": { "memory": "100MiB", "priority": 20, "depends_on": { "base": {} } },
            "small": { "memory": "1800MiB", "priority": 1 },
            "top": { "memory": "900MiB", "priority": 10 },
        }),
        &[("base", "h1"), ("vip", "h1"), ("small", "h2")],
    );
    assert_eq!(world.step(), ["shut small down"]);
}

#[test]
fn dependents_are_stopped_before_what_they_need() {
    let mut world = site(
        true,
        json!({
            "base": { "memory": "900MiB", "priority": 1 },
            "leaf": { "memory": "900MiB", "priority": 1, "depends_on": { "base": {} } },
            "full": { "memory": "1900MiB", "priority": 10 },
            "top": { "memory": "1800MiB", "priority": 10 },
        }),
        &[("base", "h1"), ("leaf", "h1"), ("full", "h2")],
    );
    assert_eq!(world.step(), ["shut leaf down", "shut base down"]);
    world.run(10);
    assert_eq!(world.at("top").as_deref(), Some("h1"));
}

#[test]
fn two_that_need_room_do_not_count_it_twice() {
    let mut world = site(
        true,
        json!({
            "l1": { "memory": "1900MiB", "priority": 1 },
            "l2": { "memory": "1900MiB", "priority": 1 },
            "t1": { "memory": "1900MiB", "priority": 9 },
            "t2": { "memory": "1900MiB", "priority": 9 },
        }),
        &[("l1", "h1"), ("l2", "h2")],
    );
    assert_eq!(world.step().len(), 2);
    assert!(world.words().is_empty(), "both wait for their own room");
    world.run(10);
    let mut hosts = [world.at("t1"), world.at("t2")];
    hosts.sort();
    assert_eq!(hosts, [Some("h1".into()), Some("h2".into())]);
}

#[test]
fn never_for_a_move() {
    let mut world = site(
        true,
        json!({
            "low": { "memory": "1900MiB", "priority": 1 },
            "top": { "memory": "1900MiB", "priority": 9 },
        }),
        &[("low", "h1"), ("top", "h2")],
    );
    world.drain("h2");
    assert!(world.words().is_empty());
    let waits = crate::waiting(&world.input());
    assert!(
        waits[&vm("top")].contains("no host can take it"),
        "{waits:?}"
    );
}

#[test]
fn one_that_could_not_be_saved_by_it_stops_nobody() {
    let mut world = site(
        true,
        json!({
            "low": { "memory": "500MiB", "priority": 1 },
            "big": { "memory": "1300MiB", "priority": 9 },
            "more": { "memory": "1900MiB", "priority": 9 },
            "top": { "memory": "3GiB", "priority": 10 },
        }),
        &[("low", "h1"), ("more", "h2")],
    );
    // `top` fits nowhere at all, `big` fits as it is: nobody has to go.
    assert_eq!(world.run(5), ["start big on h1"]);
    assert_eq!(world.at("low").as_deref(), Some("h1"));
}

#[test]
fn one_that_is_being_deleted_lends_its_priority_to_nobody() {
    let mut world = site(
        true,
        json!({
            "base": { "memory": "1900MiB", "priority": 0 },
            "gone": { "memory": "64MiB", "priority": 9, "depends_on": { "base": {} } },
            "l1": { "memory": "1900MiB", "priority": 1 },
            "l2": { "memory": "1900MiB", "priority": 1 },
        }),
        &[("l1", "h1"), ("l2", "h2")],
    );
    world.command(Command::DeleteVm { vm: vm("gone") });
    assert_eq!(world.step(), ["forget gone"]);
    assert!(world.words().is_empty(), "what needed it has gone");
}

#[test]
fn one_that_is_off_lends_its_dependents_priority_to_nobody() {
    let mut world = site(
        true,
        json!({
            "base": { "memory": "1900MiB", "priority": 0 },
            "off": { "memory": "64MiB", "priority": 0, "power": "stopped", "depends_on": { "base": {} } },
            "top": { "memory": "64MiB", "priority": 9, "depends_on": { "off": {} } },
            "l1": { "memory": "1900MiB", "priority": 1 },
            "l2": { "memory": "1900MiB", "priority": 1 },
        }),
        &[("l1", "h1"), ("l2", "h2")],
    );
    assert!(
        world.words().is_empty(),
        "what it is needed for does not run"
    );
    world.power("off", quorate_types::spec::Power::Running);
    assert_eq!(world.step().len(), 1, "one makes room");
}
