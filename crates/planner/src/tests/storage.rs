//! Storage that is lost, and access that was cut.

use crate::testing::*;
use crate::waiting;
use quorate_membership::{DiskCut, Evidence, FenceProof, HostHealth};
use quorate_state::Command;
use quorate_types::{Epoch, Millis, PoolName, VmPhase};
use serde_json::json;
use std::collections::BTreeSet;

fn shared() -> PoolName {
    PoolName::new("shared").unwrap()
}

/// `db` with a disk in the pool `shared`, on h1 of three hosts.
fn world() -> World {
    let disk = json!([{ "pool": "shared", "image": "db.raw" }]);
    let mut world = World::new(
        3,
        json!({
            "pools": { "shared": { "kind": "directory", "path": "/srv" } },
            "vms": { "db": { "memory": "64MiB", "disks": disk } },
        }),
    );
    world.put("db", "h1");
    world.act();
    world
}

fn lose(world: &mut World, on: &str) {
    let report = world.reports.get_mut(&host(on)).unwrap();
    let seen = report.pools.get_mut(&shared()).unwrap();
    seen.usable = false;
    seen.problem = Some("the portal 10.0.0.5:3260 does not answer".into());
}

#[test]
fn a_guest_leaves_a_host_that_lost_its_storage_live_and_not_before_the_hiccup_is_over() {
    let mut world = world();
    lose(&mut world, "h1");
    assert!(world.step().is_empty());
    world.pass(Millis(4_000));
    assert!(world.step().is_empty(), "it may be a hiccup");
    world.pass(Millis(1_001));
    let words = world.step();
    assert_eq!(words.len(), 1, "{words:?}");
    assert!(words[0].starts_with("migrate db to "), "{words:?}");
    let reason = &world.record("db").decisions.last().unwrap().reason.summary;
    assert!(
        reason.contains("h1 has lost pool shared: the portal"),
        "{reason}"
    );
}

#[test]
fn a_guest_whose_move_failed_or_that_was_paused_by_the_error_is_ended_and_starts_elsewhere() {
    let mut world = world();
    lose(&mut world, "h1");
    world.step();
    world.pass(Millis(6_000));
    let words = world.step();
    assert!(words[0].starts_with("migrate db to "), "{words:?}");
    let id = world.migration("db");
    let failed = quorate_types::report::MigrationOutcome::Failed;
    world.says("h1", "db", |report| {
        report.migration = Some(migration(id, failed))
    });
    let words = world.step();
    assert!(
        words
            .iter()
            .any(|word| word.contains("goes on at its source")),
        "{words:?}"
    );
    assert_eq!(world.step(), ["power db off"]);

    let mut world = self::world();
    lose(&mut world, "h1");
    world.says("h1", "db", |report| report.phase = VmPhase::IoError);
    world.step();
    world.pass(Millis(6_000));
    assert_eq!(world.step(), ["power db off"]);
}

#[test]
fn when_all_hosts_lost_it_nothing_moves_and_the_layer_is_named() {
    let mut world = world();
    for on in ["h1", "h2", "h3"] {
        lose(&mut world, on);
    }
    world.says("h1", "db", |report| {
        report.phase = VmPhase::IoError;
        report.error = Some("disk0: write failed".into());
    });
    world.step();
    world.pass(Millis(100_000));
    assert!(world.step().is_empty());
    let waits = waiting(&world.input())[&vm("db")].clone();
    assert!(waits.contains("10.0.0.5:3260"), "{waits}");
    assert_eq!(world.at("db").unwrap(), "h1");
}

#[test]
fn when_the_storage_comes_back_hosts_have_time_to_notice_one_after_the_other() {
    let mut world = world();
    for name in ["h1", "h2", "h3"] {
        lose(&mut world, name);
    }
    world.step();
    world.pass(Millis(20_000));
    assert!(world.step().is_empty());
    for name in ["h2", "h3"] {
        let report = world.reports.get_mut(&host(name)).unwrap();
        report.pools.get_mut(&shared()).unwrap().usable = true;
    }
    assert!(world.step().is_empty(), "h1 may say the same in a moment");
    world.pass(Millis(4_000));
    assert!(world.step().is_empty());
    world.pass(Millis(1_001));
    assert_eq!(world.step().len(), 1, "it does not come back on h1");
}

#[test]
fn a_cut_of_every_disk_releases_a_vm_and_its_host_takes_none_until_it_is_let_in() {
    let mut world = world();
    world.health.insert(host("h1"), HostHealth::Expired);
    assert!(
        world.step().is_empty(),
        "an expired lease alone proves nothing"
    );
    let pools = BTreeSet::from([shared()]);
    world.command(Command::CutStorage {
        host: host("h1"),
        pools,
    });
    let cut = |image: &str| {
        let evidence = Evidence::StorageCut {
            vm: vm("db"),
            epoch: Epoch(1),
            disks: vec![DiskCut {
                pool: shared(),
                image: image.into(),
                how: "off the list".into(),
                verified: true,
                took: Millis(3),
            }],
        };
        FenceProof::from_evidence(host("h1"), evidence).unwrap()
    };
    world.proofs.push(cut("other.raw"));
    assert!(world.step().is_empty(), "another disk was cut");
    world.proofs.push(cut("db.raw"));
    let done = world.run(4);
    assert!(
        done.iter().any(|word| word.starts_with("start db on h")),
        "{done:?}"
    );
    assert_ne!(world.at("db").unwrap(), "h1");
    let home = world.at("db").unwrap();
    // h1 is back, but still shut out.
    world.health.insert(host("h1"), HostHealth::Up);
    world.proofs.clear();
    world.ask_move("db", Some("h1"));
    world.step();
    assert_eq!(world.at("db").unwrap(), home);
    let pools = world.state.storage_cuts[&host("h1")].clone();
    world.command(Command::RestoreStorage {
        host: host("h1"),
        pools,
    });
    world.ask_move("db", Some("h1"));
    let words = world.step();
    assert!(words.iter().any(|word| word.contains("to h1")), "{words:?}");
}
