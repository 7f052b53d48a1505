//! QEMU dies, does not start, or does not listen; dependents wait for readiness.

use crate::harness::guest::{Guest, Ready};
use crate::harness::measure::{judge_rounds, measured, seconds};
use crate::harness::{Cluster, LONG, find_vm, process};
use quorate_api::view::VmState;
use std::time::Duration;

/// `db` counts as ready this long after its boot.
const READY_AFTER: Duration = Duration::from_secs(3);

#[test]
fn dead_qemus_are_restarted_at_once_and_dependents_wait_for_readiness() {
    let cluster = Cluster::up();
    let db = Guest::new("db", 1)
        .ready(Ready::Says)
        .words(&format!("qr.ready_after_ms={}", READY_AFTER.as_millis()));
    let app = Guest::new("app", 2).after("db");
    let guests = [db, app];
    cluster.apply(&guests);
    cold_start(&cluster);
    let witness = cluster.witness(&guests);
    killed_qemu(&cluster);
    cluster.judge(witness);
    ignored_shutdown(&cluster);
    no_start(&cluster);
}

/// The dependent begins when `db` said that it is ready, long after its process began.
fn cold_start(cluster: &Cluster) {
    let db = cluster.copy("db");
    let app = cluster.new_copy("app", &[], LONG);
    let waited = seconds(app.started.saturating_sub(db.started));
    measured(
        "cold start: the dependent's process begins after that of what it needs",
        waited,
        "s",
        &format!(">= {} s, when that is ready", seconds(READY_AFTER)),
    );
    assert!(waited >= seconds(READY_AFTER), "it waited only {waited} s");
    let vm = cluster.vm("db");
    assert!(vm.ready, "{vm:?}");
    cluster.wait_ready(&["db", "app"], LONG);
}

/// From the kill to the start of the new process; the new process's start is exact to 10 ms.
fn killed_qemu(cluster: &Cluster) {
    let mut rounds = Vec::new();
    // Back-off grows with every crash of one life, so each guest is killed once or twice.
    for vm in ["db", "app", "db"] {
        let old = cluster.wait_one_copy(vm, LONG);
        let other = if vm == "db" {
            cluster.copy("app")
        } else {
            cluster.copy("db")
        };
        let epoch = cluster.vm(vm).epoch;
        let begun = process::boottime();
        process::kill(&old);
        let new = cluster.new_copy(vm, std::slice::from_ref(&old), Duration::from_secs(10));
        rounds.push(seconds(
            (new.started + Duration::from_millis(10)).saturating_sub(begun),
        ));
        assert_eq!(new.host, old.host, "a crash is no reason to move");
        assert_eq!(cluster.vm(vm).epoch, epoch);
        cluster.wait_ready(&["db", "app"], LONG);
        assert!(process::alive(&other), "the other guest was touched");
        cluster.say(&format!("{vm} restarted"));
        if rounds.len() == 2 {
            // So that the second crash of `db` is judged like a first one.
            cluster.must(&["vm", "stop", "db", "--hard", "--wait"]);
            cluster.must(&["vm", "start", "db", "--wait"]);
        }
    }
    judge_rounds("QEMU killed: restart begins", &rounds, "s", 0.3);
}

/// A guest that ignores the power button is powered off after its timeout.
fn ignored_shutdown(cluster: &Cluster) {
    let guest = Guest::new("deaf", 3)
        .words("qr.ignore_shutdown=1")
        .line("shutdown_timeout: 3s");
    cluster.run(std::slice::from_ref(&guest));
    let copy = cluster.copy("deaf");
    let begun = process::boottime();
    cluster.must(&["vm", "stop", "deaf", "--wait"]);
    let took = seconds(process::boottime() - begun);
    assert!(!process::alive(&copy));
    measured(
        "a guest that ignores its shutdown (timeout 3 s) is off after",
        took,
        "s",
        "3 to 6 s",
    );
    assert!((3.0..6.0).contains(&took), "{took}");
    cluster.must(&["delete", "vm", "deaf", "--wait"]);
}

/// A QEMU that cannot start: the reason is shown, others are not disturbed, and a repair is enough.
fn no_start(cluster: &Cluster) {
    let broken = cluster.file("not-a-kernel", "this is no kernel");
    let guest = Guest::new("broken", 4).ready(Ready::Running);
    cluster.apply(&[guest.clone().kernel(&broken.to_string_lossy())]);
    let failing = cluster.wait("a VM that fails", LONG, |view| {
        let vm = find_vm(view, "broken")?;
        let tells = format!("{:?} {}", vm.problem, vm.why);
        (vm.state == VmState::Failing)
            .then_some(tells.clone())
            .ok_or(tells)
    });
    cluster.say(&format!("a QEMU that does not start: {failing}"));
    let copy = std::fs::read(&cluster.image().kernel).unwrap();
    std::fs::write(&broken, copy).unwrap();
    cluster.wait_ready(&["broken"], LONG);
    cluster.must(&["delete", "vm", "broken", "--wait"]);
}
