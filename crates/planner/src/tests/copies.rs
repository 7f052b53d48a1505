//! Disks that are on particular hosts.

use crate::testing::{World, host, vm};
use crate::waiting;
use quorate_membership::HostHealth;
use quorate_types::report::{MirrorPhase, MirrorReport, PoolReport};
use quorate_types::{BootId, ByteSize};
use serde_json::json;

/// Three hosts in two racks, a VM with a disk of this kind.
fn world(kind: &str) -> World {
    let mut world = World::new(
        3,
        json!({
            "hosts": {
                "h1": { "labels": { "rack": "r1" } },
                "h2": { "labels": { "rack": "r1" } },
                "h3": { "labels": { "rack": "r2" } },
            },
            "pools": { "own": { "kind": kind, "path": "/p" } },
            "vms": { "db": {
                "memory": "256MiB", "boot": { "kernel": { "kernel": "/k" } },
                "disks": [{ "pool": "own", "image": "db", "size": "1GiB" }],
            } },
        }),
    );
    for (n, name) in ["h1", "h2", "h3"].into_iter().enumerate() {
        let pool = PoolReport {
            usable: true,
            // Each host has a pool of its own.
            marker: Some(format!("m{n}")),
            free: ByteSize((10 - n as u64) << 30),
            ..PoolReport::default()
        };
        let report = world.reports.get_mut(&host(name)).unwrap();
        report.pools.insert("own".parse().unwrap(), pool);
    }
    world.arm();
    world
}

/// What the owner says of the copy.
fn say(world: &mut World, owner: &str, to: &str, phase: MirrorPhase) {
    let pool = "own".parse().unwrap();
    let record = world.state.copies(&pool, "db").unwrap();
    let said = MirrorReport {
        pool,
        image: "db".into(),
        to: host(to),
        since: record.hosts[&host(to)].since,
        phase,
        done: ByteSize(0),
        total: ByteSize(0),
        problem: Some("its disk is full".into()),
    };
    let report = world.reports.get_mut(&host(owner)).unwrap();
    report.vms.get_mut(&vm("db")).unwrap().mirrors = vec![said];
}

#[test]
fn a_local_disk_restarts_only_with_its_host() {
    let mut world = world("local");
    assert_eq!(world.run(9), ["start db on h1"]);
    world.kill("h1");
    let done = world.run(9);
    assert_eq!(done, ["release db (h1 by lease-expired)"]);
    let why = waiting(&world.input());
    let why = &why[&vm("db")];
    assert!(why.contains("disk db is on h1 only"), "{why}");
    world.proofs.clear();
    world.health.insert(host("h1"), HostHealth::Up);
    assert_eq!(world.run(9), ["start db on h1"]);
}

#[test]
fn a_copy_goes_to_another_rack_and_counts_when_the_owner_says_so() {
    let mut world = world("mirrored");
    let done = world.run(9);
    assert_eq!(done, ["start db on h1", "copy disk db of db on h3"]);
    say(&mut world, "h1", "h3", MirrorPhase::Syncing);
    assert!(world.words().is_empty());
    say(&mut world, "h1", "h3", MirrorPhase::Ready);
    assert_eq!(world.step(), ["in step: disk db of db on h3"]);
    assert!(
        world.words().is_empty(),
        "the report is about the life before"
    );
    world.kill("h1");
    let done = world.step();
    assert_eq!(done, ["release db (h1 by lease-expired)", "start db on h3"]);
}

#[test]
fn a_copy_that_is_out_of_step_is_not_started_from() {
    let mut world = world("mirrored");
    world.run(9);
    say(&mut world, "h1", "h3", MirrorPhase::Ready);
    world.step();
    say(&mut world, "h1", "h3", MirrorPhase::Failed);
    assert_eq!(world.step(), ["out of step: disk db of db on h3"]);
    world.kill("h1");
    let done = world.run(9);
    assert_eq!(done, ["release db (h1 by lease-expired)"]);
    let why = waiting(&world.input());
    let why = &why[&vm("db")];
    assert!(
        why.contains("it lacks writes that were acknowledged"),
        "{why}"
    );
    assert!(why.contains("disk db is on h1 and h3 only"), "{why}");
}

#[test]
fn a_silent_copy_is_dropped_while_its_owner_is_up_and_never_otherwise() {
    let mut one = world("mirrored");
    one.run(9);
    say(&mut one, "h1", "h3", MirrorPhase::Ready);
    one.step();
    one.health.insert(host("h3"), HostHealth::Expired);
    assert_eq!(one.words(), ["out of step: disk db of db on h3"]);
    one.health.insert(host("h1"), HostHealth::Suspect);
    assert!(one.words().is_empty(), "it may be the last good one");
}

#[test]
fn a_copy_whose_host_was_booted_again_is_not_started_from() {
    let mut world = world("mirrored");
    world.run(9);
    say(&mut world, "h1", "h3", MirrorPhase::Ready);
    world.step();
    world.kill("h1");
    world.reports.get_mut(&host("h3")).unwrap().boot = BootId("b2".into());
    assert_eq!(world.run(9), ["release db (h1 by lease-expired)"]);
    let why = waiting(&world.input());
    assert!(why[&vm("db")].contains("booted again"), "{why:?}");
}

#[test]
fn a_drain_moves_it_by_a_stop_where_that_is_allowed() {
    for (policy, moves) in [("live", false), ("cold", true)] {
        let mut world = world("mirrored");
        let text = json!({ "vms": { "db": {
            "memory": "256MiB", "boot": { "kernel": { "kernel": "/k" } }, "migration": policy,
            "disks": [{ "pool": "own", "image": "db", "size": "1GiB" }],
        } } });
        world.command(quorate_state::Command::ApplyManifest {
            base: None,
            manifest: serde_json::from_value(text).unwrap(),
        });
        world.run(9);
        say(&mut world, "h1", "h3", MirrorPhase::Ready);
        world.step();
        world.command(quorate_state::Command::SetHostMode {
            host: host("h1"),
            mode: quorate_state::HostMode::Draining,
        });
        let done = world.run(9);
        match moves {
            true => assert_eq!(done[0], "shut db down", "{done:?}"),
            false => {
                assert!(done.is_empty(), "{done:?}");
                let why = waiting(&world.input());
                assert!(why[&vm("db")].contains("`migration: cold`"), "{why:?}");
            }
        }
        if moves {
            assert!(done.contains(&"start db on h3".to_owned()), "{done:?}");
        }
    }
}
