//! Disks that are on particular hosts.

use crate::testing::{World, host, vm};
use crate::waiting;
use quorate_membership::HostHealth;
use quorate_types::report::{
    MigrationOutcome, MigrationReport, MirrorPhase, MirrorReport, PoolReport,
};
use quorate_types::{BootId, ByteSize, VmPhase};
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

/// A VM on h1 whose copy on h3 is in step; h1 is being drained.
fn drained(policy: &str) -> World {
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
    world
}

#[test]
fn a_drain_moves_it_live_to_its_copys_host() {
    let mut world = drained("live");
    let done = world.run(9);
    assert_eq!(done[0], "migrate db to h3", "{done:?}");
    assert!(done[1].contains("arrived"), "{done:?}");
    let record = world.state.copies(&"own".parse().unwrap(), "db").unwrap();
    assert!(record.hosts[&host("h3")].in_step && !record.hosts[&host("h1")].in_step);
}

#[test]
fn a_drain_stops_it_where_that_is_wanted() {
    let mut world = drained("cold");
    let done = world.run(9);
    assert_eq!(done[0], "shut db down", "{done:?}");
    assert!(done.contains(&"start db on h3".to_owned()), "{done:?}");
}

#[test]
fn a_move_whose_writes_wait_for_its_target_is_given_up() {
    let id = |world: &World| match world.state.vms[&vm("db")].ownership {
        quorate_state::Ownership::Migrating { id, .. } => id,
        _ => panic!("it does not move"),
    };
    let sending = |world: &mut World, switchover| {
        let said = crate::testing::migration(id(world), MigrationOutcome::InProgress);
        let report = world.reports.get_mut(&host("h1")).unwrap();
        let report = report.vms.get_mut(&vm("db")).unwrap();
        report.phase = VmPhase::MigratingOut;
        report.migration = Some(MigrationReport { switchover, ..said });
    };
    // Its target is silent, not proven dead: it ends first, and then its copy is dropped.
    let mut world = drained("live");
    assert_eq!(world.step(), ["migrate db to h3"]);
    sending(&mut world, false);
    world.health.insert(host("h3"), HostHealth::Expired);
    let number = id(&world);
    assert_eq!(world.step(), [format!("cancel migration {number} of db")]);
    // The same when the target is proven dead: only the source knows whether it has handed it over.
    world.kill("h3");
    assert!(world.words().is_empty());
    // It has: of its disks only the lost host's counts.
    sending(&mut world, true);
    let done = world.step();
    let text = format!("migration {number} of db lost its target after the switchover");
    assert_eq!(done, [text, "power db off".to_owned()]);
    let done = world.run(9);
    assert!(
        done.iter().all(|text| !text.starts_with("start")),
        "{done:?}"
    );
    let record = world.state.copies(&"own".parse().unwrap(), "db").unwrap();
    assert!(record.hosts[&host("h3")].in_step && !record.hosts[&host("h1")].in_step);
    // A copy that is broken ends a move as well.
    let mut world = drained("live");
    world.step();
    sending(&mut world, false);
    say(&mut world, "h1", "h3", MirrorPhase::Failed);
    let number = id(&world);
    assert_eq!(world.step(), [format!("cancel migration {number} of db")]);
}

/// A VM with a local disk on h1 that shall go to another host.
fn asked(to: Option<&str>) -> World {
    let mut world = world("local");
    world.run(9);
    world.command(quorate_state::Command::RequestMove {
        vm: vm("db"),
        to: to.map(host),
    });
    world
}

#[test]
fn a_local_disk_is_copied_before_its_guest_moves() {
    let mut world = asked(None);
    assert_eq!(world.step(), ["copy disk db of db on h2"]);
    say(&mut world, "h1", "h2", MirrorPhase::Syncing);
    assert!(world.words().is_empty());
    let why = &waiting(&world.input())[&vm("db")];
    assert!(why.contains("is copied to h2 first"), "{why}");
    say(&mut world, "h1", "h2", MirrorPhase::Ready);
    assert_eq!(world.step(), ["in step: disk db of db on h2"]);
    let done = world.run(9);
    assert_eq!(done[0], "migrate db to h2", "{done:?}");
    let record = world.state.copies(&"own".parse().unwrap(), "db").unwrap();
    assert_eq!(record.hosts.keys().collect::<Vec<_>>(), [&host("h2")]);
}

#[test]
fn a_copy_for_a_move_goes_with_the_wish_to_move_and_with_its_host() {
    let remove = ["remove the copy of disk db of db on h3"];
    let mut world = asked(Some("h3"));
    assert_eq!(world.step(), ["copy disk db of db on h3"]);
    world.command(quorate_state::Command::CancelMove { vm: vm("db") });
    assert_eq!(world.step(), remove);
    assert!(world.words().is_empty());

    let mut world = asked(Some("h3"));
    world.step();
    world.kill("h3");
    assert_eq!(world.step(), remove);

    // It cannot be made: the wish is answered, after a while.
    let mut world = asked(Some("h3"));
    world.step();
    say(&mut world, "h1", "h3", MirrorPhase::Waiting);
    assert!(world.words().is_empty());
    world.now = world.now.plus(quorate_types::Millis::secs(20));
    assert_eq!(world.step(), [remove[0], "give up moving db"]);
    assert!(world.words().is_empty());
}

#[test]
fn a_host_without_room_is_not_given_a_copy() {
    let mut world = asked(Some("h3"));
    let report = world.reports.get_mut(&host("h3")).unwrap();
    report.pools.get_mut(&"own".parse().unwrap()).unwrap().free = ByteSize(1 << 20);
    assert_eq!(world.step(), ["give up moving db"]);
    let decisions = &world.state.vms[&vm("db")].decisions;
    let why = &decisions.last().unwrap().reason.summary;
    assert!(
        why.contains("disk db needs 1024MiB, pool own has 1MiB there"),
        "{why}"
    );
}

#[test]
fn an_operator_is_told_which_copy_can_be_accepted() {
    let mut world = world("mirrored");
    world.run(9);
    say(&mut world, "h1", "h3", MirrorPhase::Ready);
    world.step();
    // Both hosts are lost at once, and h3 is back, booted anew: its copy was in its memory.
    world.kill("h1");
    world.reports.get_mut(&host("h3")).unwrap().boot = BootId("b2".into());
    assert_eq!(world.run(9), ["release db (h1 by lease-expired)"]);
    let why = waiting(&world.input());
    let why = &why[&vm("db")];
    for part in [
        "h1 has it whole and is not up",
        "`quorate storage copies accept db db --host h3`",
        "only in h3's memory",
    ] {
        assert!(why.contains(part), "{why}");
    }
    let pool: quorate_types::PoolName = "own".parse().unwrap();
    let since = world.state.copies(&pool, "db").unwrap().hosts[&host("h3")].since;
    world.command(quorate_state::Command::AcceptCopy {
        vm: vm("db"),
        pool,
        image: "db".into(),
        host: host("h3"),
        since,
    });
    assert_eq!(world.run(9), ["start db on h3"]);
}

#[test]
fn a_hand_over_that_was_begun_may_not_have_come_to_a_target_that_was_booted_again() {
    for begun in [false, true] {
        let mut world = drained("live");
        assert_eq!(world.step(), ["migrate db to h3"]);
        let id = world.migration("db");
        world.kill("h1");
        world.kill("h3");
        let text = "release db (h1 by lease-expired, h3 by lease-expired)";
        assert_eq!(world.step()[0], text);
        for (name, boot) in [("h1", "b1"), ("h3", "b2")] {
            world.health.insert(host(name), HostHealth::Up);
            world.reports.get_mut(&host(name)).unwrap().boot = BootId(boot.into());
        }
        world.proofs.clear();
        world.says("h1", "db", |report| {
            report.closed = report.epoch;
            report.handed_over = begun.then_some(id);
        });
        let done = world.step();
        if !begun {
            assert_eq!(done, ["settled: disk db of db on h1 counts"]);
            continue;
        }
        assert!(done.is_empty(), "{done:?}");
        let why = &waiting(&world.input())[&vm("db")];
        for part in ["accept db db --host h3`", "the copy on h1 lacks only"] {
            assert!(why.contains(part), "{why}");
        }
    }
}

#[test]
fn a_host_that_lost_its_copy_in_the_moment_of_the_start_does_not_keep_the_vm() {
    let mut world = world("mirrored");
    world.run(9);
    say(&mut world, "h1", "h3", MirrorPhase::Ready);
    world.step();
    world.kill("h1");
    assert_eq!(
        world.step(),
        ["release db (h1 by lease-expired)", "start db on h3"]
    );
    world.act();
    // It is booted anew before it has said that the guest runs: what it had of the disk was in its memory.
    world.reports.get_mut(&host("h3")).unwrap().boot = BootId("b2".into());
    world.says("h3", "db", |report| report.phase = VmPhase::BackOff);
    assert_eq!(
        world.run(9),
        ["power db off", "release db (h3 by stopped-by-owner)"]
    );
    let why = waiting(&world.input());
    let why = &why[&vm("db")];
    assert!(
        why.contains("`quorate storage copies accept db db --host h3`"),
        "{why}"
    );
}

#[test]
fn a_vm_waits_for_the_job_that_writes_to_its_disk() {
    let mut world = world("local");
    let pool: quorate_types::PoolName = "own".parse().unwrap();
    world.command(quorate_state::Command::BeginImageWrite {
        pool: pool.clone(),
        image: "db".into(),
        host: host("h2"),
        what: "import /iso/debian.qcow2 to own/db".into(),
    });
    assert!(world.run(9).is_empty());
    let why = waiting(&world.input());
    let why = &why[&vm("db")];
    assert!(why.contains("h2 writes to its disk own/db"), "{why}");
    assert!(why.contains("import /iso/debian.qcow2"), "{why}");
    world.command(quorate_state::Command::EndImageWrite {
        pool,
        image: "db".into(),
        host: host("h2"),
    });
    assert_eq!(world.run(9), ["start db on h1"]);
}
