//! A host dies: how soon its guests begin elsewhere, by which proof, and what is lost (nothing).

use crate::harness::guest::Guest;
use crate::harness::measure::{judge_rounds, seconds};
use crate::harness::{Cluster, LONG};
use quorate_lab::wait;
use std::time::Duration;

const ROUNDS: usize = 3;

/// Cuts the power of the host that owns `vm`; seconds until its QEMU process elsewhere begins.
///
/// From: the instant at which the supervisor froze the host's cgroup (its history). To: the start of the
/// process as `/proc` has it. Both are CLOCK_BOOTTIME of the one kernel.
fn fail_over(cluster: &Cluster, vm: &str) -> f64 {
    let old = cluster.copy(vm);
    let begun = cluster.cut_power(&old.host);
    let new = cluster.new_copy(vm, std::slice::from_ref(&old), Duration::from_secs(15));
    assert_ne!(new.host, old.host);
    let took = seconds(new.started.saturating_sub(begun));
    cluster.say(&format!("{} -> {}: {took:.2} s", old.host, new.host));
    cluster.wait_ready(&[vm], LONG);
    let why = cluster.why(vm);
    assert!(
        why.contains("lease-expired"),
        "the proof is not named: {why}"
    );
    took
}

/// Rounds with a follower's host and with the leader's, in turns.
fn rounds(cluster: &Cluster, profile: &str, follower_limit: f64, leader_limit: f64) {
    let (mut follower, mut leader) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let victim = cluster.follower();
        cluster.place("db", &victim);
        follower.push(fail_over(cluster, "db"));
        cluster.boot(&victim);

        let victim = cluster.leader();
        cluster.place("db", &victim);
        leader.push(fail_over(cluster, "db"));
        cluster.boot(&victim);
    }
    judge_rounds(
        &format!("failover, follower's host, {profile}"),
        &follower,
        "s",
        follower_limit,
    );
    judge_rounds(
        &format!("failover, leader's host, {profile}"),
        &leader,
        "s",
        leader_limit,
    );
}

#[test]
fn a_dead_hosts_guests_start_elsewhere_in_time_and_lose_nothing() {
    let cluster = Cluster::up();
    let guests = [Guest::new("db", 1), Guest::new("other", 2)];
    cluster.run(&guests);
    let witness = cluster.witness(&guests[..1]);
    // So that there is something to lose.
    wait::pause(Duration::from_secs(1));
    rounds(&cluster, "default", 3.0, 4.5);

    // The documented profile, taken over while the cluster runs.
    let profile = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/fast.yaml");
    cluster.must(&["apply", "-f", profile]);
    cluster.wait_healthy();
    rounds(&cluster, "fast profile", 1.7, 2.8);

    let reports = cluster.judge(witness);
    assert!(reports[0].ranges.len() > ROUNDS, "{:?}", reports[0]);
}
