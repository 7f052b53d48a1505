//! What is taken from whom on which proof, in tables.

use crate::testing::*;
use crate::waiting;
use quorate_membership::HostHealth;
use quorate_state::{Action, StopMode};
use quorate_types::spec::Power;
use quorate_types::{Epoch, Millis, VmPhase};
use serde_json::json;

fn two_vms() -> World {
    let small = json!({ "memory": "128MiB" });
    World::new(3, json!({ "vms": { "app": small, "db": small } }))
}

#[test]
fn a_lost_host_is_recovered_in_one_plan() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h1");
    world.kill("h1");
    let words = world.step();
    assert_eq!(
        words[..2],
        [
            "release app (h1 by lease-expired)",
            "release db (h1 by lease-expired)"
        ]
    );
    assert_eq!(words.len(), 4, "{words:?}");
    assert!(words[2..].iter().all(|word| word.starts_with("start ")));
    assert_ne!(world.at("db"), world.at("app"), "spread");
}

#[test]
fn silence_is_no_proof() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h2");
    for health in [HostHealth::Suspect, HostHealth::Expired, HostHealth::Dead] {
        world.health.insert(host("h1"), health);
        assert!(world.words().is_empty(), "{health:?}");
        let waits = waiting(&world.input());
        assert!(waits[&vm("db")].contains("h1"), "{waits:?}");
    }
    let waits = waiting(&world.input());
    assert!(waits[&vm("db")].contains("quorate host confirm-dead h1"));
}

#[test]
fn a_proof_about_a_host_that_is_up_is_not_used() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h1");
    world.proofs.push(dead("h1"));
    assert!(world.words().is_empty());
}

#[test]
fn a_restarted_host_that_has_not_reported_its_vm_keeps_it() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h2");
    world.reports.insert(host("h1"), report("h1"));
    assert!(world.words().is_empty());
}

#[test]
fn a_closed_epoch_frees_a_vm_only_from_that_epoch() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h2");
    world.says("h1", "db", |report| report.closed = Epoch(0));
    assert!(world.words().is_empty());
    world.says("h1", "db", |report| {
        report.closed = Epoch(1);
        report.phase = VmPhase::Absent;
    });
    let words = world.step();
    assert_eq!(words[0], "release db (h1 by stopped-by-owner)");
    assert!(words[1].starts_with("start db on "), "{words:?}");
    assert_eq!(world.record("db").last_epoch, Epoch(2));
    world.act();
    assert!(
        world.words().is_empty(),
        "the old epoch says nothing of the new"
    );
}

#[test]
fn recovery_does_not_wait_for_another_vms_migration() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h2");
    world.begin("app", "h3");
    world.kill("h1");
    let words = world.words();
    assert_eq!(words[0], "release db (h1 by lease-expired)");
    assert!(words[1].starts_with("start db on "), "{words:?}");
}

#[test]
fn a_guest_that_keeps_ending_waits_longer_and_longer() {
    let mut world = two_vms();
    world.put("app", "h2");
    world.put("db", "h1");
    let end = |world: &mut World| {
        let at = world.at("db").unwrap();
        let epoch = world.record("db").last_epoch;
        world.says(&at, "db", |report| report.closed = epoch);
        world.step()
    };
    for _ in 0..2 {
        assert_eq!(end(&mut world).len(), 2, "release and start at once");
    }
    assert_eq!(end(&mut world).len(), 1, "the third waits");
    assert!(waiting(&world.input())[&vm("db")].contains("next try is in 5 s"));
    assert_eq!(
        world.memory.next_due(world.now),
        Some(world.now.plus(Millis::secs(5)))
    );
    world.pass(Millis::secs(5));
    assert_eq!(world.step().len(), 1);
    assert_eq!(end(&mut world).len(), 1);
    world.pass(Millis::secs(9));
    assert!(world.step().is_empty());
    world.pass(Millis::secs(1));
    assert_eq!(world.step().len(), 1);
}

#[test]
fn a_crash_loop_tries_each_other_host_once() {
    let mut world = two_vms();
    world.put("app", "h2");
    world.put("db", "h1");
    let mut tried = vec![];
    for _ in 0..2 {
        let at = world.at("db").unwrap();
        world.says(&at, "db", |report| {
            report.phase = VmPhase::BackOff;
            report.restarts = 3;
        });
        assert_eq!(world.step(), ["power db off"]);
        world.act();
        world.step();
        world.act();
        tried.push(world.at("db").unwrap());
    }
    tried.sort();
    assert_eq!(tried, ["h2", "h3"]);
    let at = world.at("db").unwrap();
    world.says(&at, "db", |report| {
        report.phase = VmPhase::BackOff;
        report.restarts = 3;
    });
    assert!(
        world.words().is_empty(),
        "all were tried: its own host goes on trying"
    );
    world.pass(Millis::secs(700));
    assert_eq!(world.step(), ["power db off"], "and later again");
}

#[test]
fn a_guest_that_does_not_come_up_is_tried_elsewhere() {
    let mut world = two_vms();
    world.put("app", "h2");
    world.put("db", "h1");
    let phase = |world: &mut World, phase| world.says("h1", "db", |report| report.phase = phase);
    phase(&mut world, VmPhase::BackOff);
    assert!(world.words().is_empty());
    assert_eq!(
        world.memory.next_due(world.now),
        Some(world.now.plus(Millis(15_001)))
    );
    world.pass(Millis::secs(8));
    phase(&mut world, VmPhase::Starting);
    assert!(world.words().is_empty());
    world.pass(Millis::secs(8));
    phase(&mut world, VmPhase::BackOff);
    assert_eq!(world.step(), ["power db off"]);
    world.act();
    world.step();
    assert_eq!(world.at("db").as_deref(), Some("h3"));
}

#[test]
fn crashes_that_were_overcome_do_not_count() {
    let mut world = two_vms();
    world.put("app", "h2");
    world.put("db", "h1");
    world.says("h1", "db", |report| report.restarts = 5);
    world.observe();
    world.pass(Millis::secs(61));
    world.observe();
    let crash = |world: &mut World, restarts| {
        world.says("h1", "db", |report| {
            report.phase = VmPhase::BackOff;
            report.restarts = restarts;
        });
        world.words()
    };
    assert!(crash(&mut world, 6).is_empty());
    assert!(crash(&mut world, 7).is_empty());
    assert_eq!(crash(&mut world, 8), ["power db off"]);
}

#[test]
fn stops_in_reverse_order_only_what_shall_stop() {
    let mut world = World::new(
        3,
        json!({ "vms": {
            "db": { "memory": "128MiB" },
            "app": { "memory": "128MiB", "depends_on": { "db": {} } },
        }}),
    );
    world.run(10);
    // Only db is asked to stop: app goes on.
    world.power("db", Power::Stopped);
    assert_eq!(world.step(), ["shut db down"]);
    world.power("db", Power::Running);
    world.run(10);
    assert!(world.at("db").is_some());
    // Both are asked to stop: app first.
    world.power("db", Power::Stopped);
    world.power("app", Power::Stopped);
    assert_eq!(world.step(), ["shut app down"]);
    assert!(waiting(&world.input())[&vm("db")].contains("after app"));
    world.act();
    assert_eq!(
        world.step(),
        [
            "release app (".to_owned() + &app_host(&world, "app") + " by stopped-by-owner)",
            "shut db down".into()
        ]
    );
    world.run(10);
    assert_eq!(world.at("db"), None);
}

fn app_host(world: &World, name: &str) -> String {
    world.record(name).last_host.as_ref().unwrap().to_string()
}

#[test]
fn a_dependent_on_a_silent_host_does_not_hold_up_a_stop() {
    let mut world = World::new(
        3,
        json!({ "vms": {
            "db": { "memory": "128MiB" },
            "app": { "memory": "128MiB", "depends_on": { "db": {} } },
        }}),
    );
    world.put("db", "h1");
    world.put("app", "h2");
    world.health.insert(host("h2"), HostHealth::Dead);
    world.power("db", Power::Stopped);
    world.power("app", Power::Stopped);
    assert_eq!(world.step(), ["shut app down", "shut db down"]);
}

#[test]
fn deletes_after_the_stop_and_cancels_a_migration_for_it() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h2");
    world.begin("db", "h3");
    world.command(quorate_state::Command::DeleteVm { vm: vm("db") });
    let id = world.migration("db");
    assert_eq!(world.step(), [format!("cancel migration {id} of db")]);
    let done = world.run(10);
    assert_eq!(done.last().unwrap(), "forget db");
    assert!(!world.state.vms.contains_key(&vm("db")));
}

#[test]
fn saved_memory_is_kept_only_where_it_was_ordered() {
    let mut world = two_vms();
    world.put("db", "h1");
    world.put("app", "h2");
    world.commit(Action::Stop {
        vm: vm("db"),
        mode: StopMode::Save,
    });
    world.act();
    world.step();
    assert!(world.record("db").saved.is_some());
    assert!(world.at("db").is_some(), "resumes at once");
}

#[test]
fn a_new_leader_places_nothing_before_it_has_heard_all() {
    let mut world = two_vms();
    world.settled = false;
    world.health.remove(&host("h3"));
    world.reports.remove(&host("h3"));
    assert!(world.words().is_empty());
    world.proofs.push(dead("h3"));
    assert_eq!(world.words().len(), 2, "h3 is proven dead: all are known");
    world.proofs.clear();
    world.settled = true;
    assert_eq!(world.words().len(), 2);
}
