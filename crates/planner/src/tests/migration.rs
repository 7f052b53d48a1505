//! The whole table of what both sides can say and be.

use crate::testing::*;
use crate::waiting;
use quorate_membership::HostHealth;
use quorate_types::report::MigrationOutcome::{self, Arrived, Failed, InProgress, Sent};
use quorate_types::{Epoch, MigrationId, Millis, VmPhase};
use serde_json::json;

/// `db` migrates from h1 to h2; h3 is there too.
fn moving() -> World {
    let mut world = World::new(3, json!({ "vms": { "db": { "memory": "128MiB" } } }));
    world.put("db", "h1");
    world.begin("db", "h2");
    world
}

fn hand_over(world: &mut World) {
    world.says("h1", "db", |report| report.phase = VmPhase::HandedOver);
}

fn is(world: &mut World, wanted: &[&str]) {
    let id = world.migration("db").to_string();
    let words = world.step();
    let words: Vec<String> = words
        .into_iter()
        .map(|word| word.replace(&format!("migration {id} "), "migration # "))
        .collect();
    assert_eq!(words, wanted);
}

const STAYS: &str = "migration # of db failed, it goes on at its source";
const REFUSED: &str = "migration # of db failed at its target, it goes on at its source";
const LOST: &str = "migration # of db lost its target, it goes on at its source";
const CANCEL: &str = "cancel migration # of db";
const ARRIVED: &str = "migration # of db arrived";

#[test]
fn under_way_nothing_is_done() {
    let mut world = moving();
    assert!(world.words().is_empty());
    assert!(waiting(&world.input())[&vm("db")].contains("under way"));
}

#[test]
fn arrival_is_adopted_whatever_became_of_the_source() {
    for source in [Some(InProgress), Some(Sent), None] {
        for dead in [false, true] {
            let mut world = moving();
            hand_over(&mut world);
            match source {
                Some(outcome) => world.says_outcome("h1", "db", outcome),
                None => world.says("h1", "db", |report| report.migration = None),
            }
            world.says_outcome("h2", "db", Arrived);
            if dead {
                world.kill("h1");
            }
            is(&mut world, &[ARRIVED]);
            assert_eq!(world.at("db").unwrap(), "h2");
        }
    }
}

#[test]
fn arrival_is_adopted_even_if_the_target_died_after_it() {
    let mut world = moving();
    hand_over(&mut world);
    world.says_outcome("h2", "db", Arrived);
    world.kill("h2");
    let words = world.step();
    assert!(words[0].ends_with("of db arrived"), "{words:?}");
    assert_eq!(words[1], "release db (h2 by lease-expired)");
    assert!(words[2].starts_with("start db on "), "{words:?}");
}

#[test]
fn reports_of_other_migrations_are_ignored() {
    let mut world = moving();
    let old = MigrationId(world.migration("db").0 - 1);
    for outcome in [Arrived, Failed, Sent] {
        for on in ["h1", "h2"] {
            world.says(on, "db", |report| {
                report.migration = Some(migration(old, outcome))
            });
            assert!(world.words().is_empty(), "{on} {outcome:?}");
        }
    }
}

#[test]
fn a_failure_before_the_switchover_leaves_it_at_its_source() {
    let mut world = moving();
    world.says_outcome("h1", "db", Failed);
    is(&mut world, &[STAYS]);
    assert_eq!(world.at("db").unwrap(), "h1");
    assert_eq!(world.record("db").failed_moves, 1);
}

#[test]
fn a_target_that_gives_up_lets_the_source_end_it_first() {
    let mut world = moving();
    world.says_outcome("h2", "db", Failed);
    is(&mut world, &[CANCEL]);
    assert!(world.words().is_empty(), "cancelled once");
    world.pass(Millis::secs(31));
    is(&mut world, &[REFUSED]);
}

#[test]
fn a_target_that_gives_up_gives_it_back_at_once_if_the_source_has_no_process() {
    let mut world = moving();
    world.says("h1", "db", |report| report.phase = VmPhase::Absent);
    world.says_outcome("h2", "db", Failed);
    is(&mut world, &[REFUSED]);
}

#[test]
fn a_target_that_gives_up_after_the_switchover_gives_it_back() {
    for sent in [false, true] {
        let mut world = moving();
        hand_over(&mut world);
        if sent {
            world.says_outcome("h1", "db", Sent);
        }
        world.says_outcome("h2", "db", Failed);
        is(&mut world, &[REFUSED]);
    }
}

#[test]
fn a_dead_target_gives_it_back_before_the_switchover() {
    let mut world = moving();
    world.kill("h2");
    is(&mut world, &[LOST]);
    assert_eq!(world.at("db").unwrap(), "h1");
}

#[test]
fn memory_that_may_be_older_than_the_disk_is_not_resumed() {
    let sent: [fn(&mut World); 2] = [hand_over, |world| world.says_outcome("h1", "db", Sent)];
    for past in sent {
        let mut world = moving();
        past(&mut world);
        world.kill("h2");
        is(&mut world, &[LOST, "power db off"]);
        world.act();
        let words = world.step();
        assert_eq!(words[0], "release db (h1 by stopped-by-owner)");
        assert!(words[1].starts_with("start db on "), "{words:?}");
    }
    // A target that closed the epoch and does not say that it never ran it is no better.
    let mut world = moving();
    hand_over(&mut world);
    world.says("h2", "db", |report| {
        report.closed = Epoch(2);
        report.migration = None;
    });
    is(&mut world, &[LOST, "power db off"]);
}

#[test]
fn a_dead_target_and_a_silent_source_wait() {
    let mut world = moving();
    world.kill("h2");
    world.health.insert(host("h1"), HostHealth::Expired);
    assert!(world.words().is_empty());
    world.kill("h1");
    let words = world.step();
    assert_eq!(
        words[0],
        "release db (h1 by lease-expired, h2 by lease-expired)"
    );
    assert_eq!(words[1], "start db on h3");
}

#[test]
fn a_dead_target_and_a_source_that_says_nothing_or_is_frozen_wait() {
    let mut world = moving();
    world.kill("h2");
    world.says("h1", "db", |report| report.phase = VmPhase::Frozen);
    assert!(world.words().is_empty());
    world.reports.insert(host("h1"), report("h1"));
    assert!(world.words().is_empty());
}

#[test]
fn a_dead_source_waits_for_the_targets_word() {
    let mut world = moving();
    world.kill("h1");
    is(&mut world, &[CANCEL]);
    assert!(world.words().is_empty(), "cancelled once");
    world.says_outcome("h2", "db", Failed);
    world.says("h2", "db", |report| report.closed = Epoch(2));
    let words = world.step();
    assert_eq!(
        words[0],
        "release db (h1 by lease-expired, h2 by stopped-by-owner)"
    );
    assert!(words[1].starts_with("start db on "), "{words:?}");
}

#[test]
fn a_dead_source_and_a_target_that_failed_without_closing_are_settled_too() {
    let mut world = moving();
    world.kill("h1");
    world.says_outcome("h2", "db", Failed);
    let words = world.step();
    assert_eq!(words.len(), 3, "{words:?}");
    assert!(
        words[0].ends_with(&REFUSED["migration # ".len()..]),
        "{words:?}"
    );
    assert_eq!(words[1], "release db (h1 by lease-expired)");
}

#[test]
fn a_source_that_failed_and_died_is_recovered_with_its_own_proof() {
    let mut world = moving();
    world.says_outcome("h1", "db", Failed);
    world.kill("h1");
    let words = world.step();
    assert_eq!(words[1], "release db (h1 by lease-expired)");
    assert_eq!(words.len(), 3);
}

#[test]
fn a_migration_that_stands_still_is_cancelled_once() {
    let mut world = moving();
    world.observe();
    world.pass(Millis::secs(301));
    is(&mut world, &[CANCEL]);
    assert!(world.words().is_empty());
}

#[test]
fn one_that_transfers_but_never_converges_is_cancelled_after_half_an_hour() {
    let mut world = moving();
    let id = world.migration("db");
    for minute in 0..45u64 {
        world.says("h1", "db", |report| {
            let mut seen = migration(id, InProgress);
            seen.transferred.0 = minute << 30;
            seen.remaining.0 = if minute < 25 { 100 - minute } else { 76 } << 20;
            report.migration = Some(seen);
        });
        let words = world.words();
        if minute <= 34 {
            assert!(words.is_empty(), "minute {minute}: {words:?}");
        }
        if !words.is_empty() {
            assert!(words[0].starts_with("cancel"), "{words:?}");
            return;
        }
        world.pass(Millis::secs(60));
    }
    panic!("never cancelled");
}

#[test]
fn after_the_switchover_a_silent_target_is_asked_to_decide() {
    let mut world = moving();
    hand_over(&mut world);
    world.observe();
    world.pass(Millis::secs(11));
    is(&mut world, &[CANCEL]);
}

#[test]
fn killing_a_side_at_any_step_ends_with_one_owner() {
    let outcomes: [Option<MigrationOutcome>; 4] =
        [None, Some(InProgress), Some(Failed), Some(Arrived)];
    for target in outcomes {
        for past in [false, true] {
            for dies in ["h1", "h2", "both"] {
                let mut world = moving();
                if past {
                    hand_over(&mut world);
                }
                match target {
                    Some(outcome) => world.says_outcome("h2", "db", outcome),
                    None => world.reports.get_mut(&host("h2")).unwrap().vms.clear(),
                }
                for name in ["h1", "h2"] {
                    if dies == name || dies == "both" {
                        world.kill(name);
                    }
                }
                world.step();
                world.run(20);
                let at = world.at("db").unwrap();
                let case = format!("{target:?} past {past} {dies}");
                assert!(!at.contains('>') && at != dies, "{case}: {at}");
                let up = |name: &str| world.health[&host(name)] == HostHealth::Up;
                assert!(up(&at), "{case}: {at}");
            }
        }
    }
}
