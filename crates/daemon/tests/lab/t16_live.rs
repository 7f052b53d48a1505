//! Disks without a SAN: live migration.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::{Cluster, LONG, Options, find_vm};
use crate::t16_mirrored::{alone, in_step, own, run};
use quorate_api::view::VmState;
use quorate_lab::wait;
use std::time::Duration;

/// Long enough to be disturbed: 96 MiB take some seconds.
const SLOW: &str = "  migration_mib_per_s: 16\n";

fn cluster() -> Cluster {
    Cluster::with(Options {
        settings: SLOW.to_owned(),
        ..Options::default()
    })
}

/// Waits until it runs on a host and does not move.
fn rests_on(cluster: &Cluster, host: &str) {
    cluster.wait("the guest where it shall be", LONG, |view| {
        let vm = find_vm(view, "db")?;
        let there = vm.host.as_ref().is_some_and(|at| at.as_str() == host);
        let rests = vm.migration.is_none() && vm.state == VmState::Running;
        (there && rests)
            .then_some(())
            .ok_or_else(|| format!("{vm:?}"))
    });
}

#[test]
fn a_guest_moves_live_to_its_copy_and_back_and_survives_the_loss_of_its_target() {
    let cluster = cluster();
    let guests = [Guest::new("db", 1).pool("own")];
    run(&cluster, &guests, "mirrored");
    let witness = cluster.witness(&guests);
    let copy = in_step(&cluster, "db");
    let first = cluster.owner("db");
    let pinger = cluster
        .lab
        .pinger(guests[0].address, Duration::from_millis(1))
        .unwrap();
    cluster.must(&["vm", "migrate", "db", "--wait"]);
    assert_eq!(cluster.owner("db"), copy, "it goes where its copy is");
    wait::pause(Duration::from_millis(300));
    let gap = pinger.finish().unwrap().longest_gap_us as f64 / 1000.0;
    measured("mirrored: blackout", gap, "ms", "none");

    // What was the owner's is the copy now, and is brought up to date.
    assert_eq!(in_step(&cluster, "db"), first);
    cluster.must(&["host", "drain", &copy]);
    rests_on(&cluster, &first);
    cluster.must(&["host", "resume", &copy]);

    // Its target, which has the copy, dies while the memory is sent.
    assert_eq!(in_step(&cluster, "db"), copy);
    cluster.must(&["vm", "migrate", "db"]);
    cluster.wait("a migration", LONG, |view| {
        let vm = find_vm(view, "db")?;
        vm.migration
            .clone()
            .map(drop)
            .ok_or_else(|| format!("{vm:?}"))
    });
    wait::pause(Duration::from_millis(800));
    cluster.cut_power(&copy);
    alone(&cluster, "db");
    rests_on(&cluster, &first);
    wait::pause(Duration::from_secs(1));
    let dir = own(&cluster, &first);
    let reports = cluster.judge_at(witness, |_| dir.join("db.raw"));
    assert_eq!(
        reports[0].ranges.len(),
        1,
        "it was restarted: {:?}",
        reports[0]
    );
}

#[test]
fn a_guest_takes_its_local_disk_along_and_one_on_a_device_goes_to_it() {
    let cluster = Cluster::up();
    let guests = [Guest::new("db", 1).pool("own")];
    run(&cluster, &guests, "local");
    let witness = cluster.witness(&guests);
    let first = cluster.owner("db");
    let mut hosts = cluster.hosts();
    hosts.retain(|host| *host != first);
    for (from, to) in [(&first, &hosts[0]), (&hosts[0], &hosts[1])] {
        cluster.must(&["vm", "migrate", "db", "--to", to, "--wait"]);
        assert_eq!(cluster.owner("db"), *to);
        let copies = cluster.vm("db").copies;
        let on: Vec<&str> = copies.iter().map(|copy| copy.host.as_str()).collect();
        assert_eq!(on, [to.as_str()], "the disk is there, and only there");
        let left = own(&cluster, from).join("db.raw");
        cluster.eventually("the old image removed", LONG, || {
            (!left.exists())
                .then_some(())
                .ok_or_else(|| left.display().to_string())
        });
    }
    // A host that cannot take it: the guest stays, and its target has nothing of it.
    let blocked = own(&cluster, &first).join("db.raw");
    std::fs::create_dir(&blocked).unwrap();
    let refused = cluster
        .quorate(&["vm", "migrate", "db", "--to", &first, "--wait"])
        .unwrap_err();
    assert!(refused.contains("cannot be copied"), "{refused}");
    assert_eq!(cluster.owner("db"), hosts[1]);
    let dir = own(&cluster, &hosts[1]);
    let reports = cluster.judge_at(witness, |_| dir.join("db.raw"));
    assert_eq!(
        reports[0].ranges.len(),
        1,
        "it was restarted: {:?}",
        reports[0]
    );
    crate::t22_block::a_guest_on_a_device(&cluster);
}
