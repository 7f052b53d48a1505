//! A host loses its path to the SAN: its VM goes where the disk is. The SAN itself fails: everybody waits for it.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::{Cluster, LONG, Options};
use quorate_lab::{Link, wait};
use std::time::{Duration, Instant};

/// For QEMU to give a command of a silent SAN up, and for the guest to be moved or ended, and started.
const LEAVES_WITHIN: Duration = Duration::from_secs(150);
/// How long the SAN is off.
const OUTAGE: Duration = Duration::from_secs(12);

#[test]
fn a_lost_path_moves_the_vm_and_a_lost_san_moves_nothing() {
    let cluster = Cluster::with(Options {
        san: true,
        ..Options::default()
    });
    let guests = [Guest::new("db", 1).on_lun(), Guest::new("web", 2).on_lun()];
    let san = cluster.lab.san().unwrap();
    for guest in &guests {
        san.create_lun(&guest.name, 16 << 20).unwrap();
    }
    cluster.run(&guests);
    let witness = cluster.witness(&guests[..1]);
    wait::pause(Duration::from_secs(2));
    lost_path(&cluster, "db");
    lost_san(&cluster);
    cluster.judge(witness);
}

/// Only the cable to the SAN is cut: the host is up and says so.
fn lost_path(cluster: &Cluster, vm: &str) {
    let old = cluster.owner(vm);
    let begun = Instant::now();
    cluster.lab.isolate(&old, Link::San).unwrap();
    let (new, why) = cluster.wait("the VM to be where its disk is", LEAVES_WITHIN, |view| {
        let seen = view
            .vms
            .iter()
            .find(|seen| seen.name.as_str() == vm)
            .ok_or("it is gone")?;
        let host = seen.host.as_ref().map(ToString::to_string);
        match host {
            Some(host) if host != old && seen.ready => Ok((host, seen.why.clone())),
            _ => Err(format!("{seen:?}")),
        }
    });
    let took = begun.elapsed().as_secs_f64();
    cluster.say(&format!("{old} -> {new} in {took:.1} s: {why}"));
    measured(
        "lost path to the SAN -> guest ready where its disk is",
        took,
        "s",
        "as fast as its last command is given up",
    );
    assert!(
        cluster.why(vm).contains("has lost pool san"),
        "{}",
        cluster.why(vm)
    );
    cluster.lab.heal().unwrap();
    cluster.wait_one_copy(vm, LONG);
    cluster.wait_healthy();
}

/// Nobody is fenced, nothing moves, the guests go on when the SAN is back.
fn lost_san(cluster: &Cluster) {
    let owners: Vec<_> = ["db", "web"]
        .iter()
        .map(|vm| (*vm, cluster.copy(vm)))
        .collect();
    let san = cluster.lab.san().unwrap();
    san.kill().unwrap();
    let end = Instant::now() + OUTAGE;
    let mut named = String::new();
    while Instant::now() < end {
        let view = cluster.view();
        for (vm, copy) in &owners {
            let seen = view
                .vms
                .iter()
                .find(|seen| seen.name.as_str() == *vm)
                .unwrap();
            assert_eq!(
                seen.host.as_ref().unwrap().as_str(),
                copy.host,
                "{vm} was moved"
            );
        }
        if let Some(problem) = view
            .cluster
            .problems
            .iter()
            .find(|problem| problem.text.contains("does not answer"))
        {
            named.clone_from(&problem.text);
        }
        wait::pause(Duration::from_millis(200));
    }
    assert!(
        named.contains("does not answer"),
        "the broken layer is not named: {named:?}"
    );
    san.start().unwrap();
    cluster.wait_ready(&["db", "web"], LONG);
    for (vm, copy) in &owners {
        assert_eq!(cluster.wait_one_copy(vm, LONG), *copy, "{vm} was restarted");
    }
    cluster.say("the SAN is back; the guests went on");
    wait::pause(Duration::from_secs(3));
}
