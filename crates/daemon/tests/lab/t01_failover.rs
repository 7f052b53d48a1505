//! A host dies: how soon its guests begin elsewhere, by which proof, and what is lost (nothing).

use crate::harness::guest::Guest;
use crate::harness::measure::{judge_rounds, seconds};
use crate::harness::{Cluster, LONG, find_host, process};
use quorate_api::view::HostState;
use quorate_lab::wait;
use std::time::Duration;

/// Enough for a limit; `make bench` asks for more.
const ROUNDS: usize = 3;
const BENCH_ROUNDS: usize = 5;

/// What passed between the cut and the guest being ready elsewhere, each in seconds from the cut.
#[derive(Debug, Default)]
struct Stages {
    /// The new QEMU process begins, as `/proc` has it: what the limits are about.
    started: Vec<f64>,
    /// A leader calls the host's lease expired, as seen by looking at it every few milliseconds.
    expired: Vec<f64>,
    /// The proof is there: the ownership is released by a commit.
    proven: Vec<f64>,
    /// The guest's web server answers.
    ready: Vec<f64>,
}

impl Stages {
    fn report(&self, report: &mut quorate_bench::Report, whose: &str) {
        for (name, samples) in [
            ("lease expired", &self.expired),
            ("proof committed", &self.proven),
            ("QEMU started", &self.started),
            ("guest ready", &self.ready),
        ] {
            let name = format!("{whose} killed -> {name}");
            report.add(&name, "s", samples, None);
        }
    }
}

/// Cuts the power of the host that owns `vm`, and waits until the guest is ready elsewhere.
///
/// From: the instant at which the supervisor froze the host's cgroup (its history). To: the start of the
/// process as `/proc` has it. Both are CLOCK_BOOTTIME of the one kernel.
fn fail_over(cluster: &Cluster, vm: &str, stages: &mut Stages) {
    let old = cluster.copy(vm);
    let seen = cluster.vm(vm).epoch;
    let begun = cluster.cut_power(&old.host);
    let since = || seconds(process::boottime().saturating_sub(begun));
    // The new process may be there before a look shows the host as down: both look at their own pace.
    let expired = cluster.wait("an expired lease", LONG, |view| {
        let host = find_host(view, &old.host)?;
        let down = matches!(host.state, HostState::Down);
        down.then(since).ok_or_else(|| format!("{host:?}"))
    });
    let new = cluster.new_copy(vm, std::slice::from_ref(&old), Duration::from_secs(15));
    assert_ne!(new.host, old.host);
    let started = seconds(new.started.saturating_sub(begun));
    cluster.say(&format!("{} -> {}: {started:.2} s", old.host, new.host));
    cluster.wait_ready(&[vm], LONG);
    stages.ready.push(since());
    stages.started.push(started);
    stages.expired.push(expired);
    stages.proven.extend(released(cluster, vm, begun));
    let why = cluster.why(vm);
    assert!(
        why.contains("lease-expired"),
        "the proof is not named: {why}"
    );
    assert!(cluster.vm(vm).epoch > seen, "the epoch did not grow");
}

/// When the ownership of a VM was released last, in seconds from an instant since the machine's boot.
fn released(cluster: &Cluster, vm: &str, begun: Duration) -> Option<f64> {
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).ok()?;
    let booted = now.checked_sub(process::boottime())?;
    let events = cluster.explain(vm).events;
    let releases = events.iter().filter(|event| event.kind == "release");
    let at = Duration::from_millis(releases.max_by_key(|event| event.sequence)?.at.0);
    Some(seconds(at.checked_sub(booted + begun)?))
}

/// Rounds with a follower's host and with the leader's, in turns.
fn rounds(cluster: &Cluster, profile: &str, follower_limit: f64, leader_limit: f64) {
    let (mut follower, mut leader) = (Stages::default(), Stages::default());
    let wanted = quorate_bench::wanted();
    for _ in 0..if wanted { BENCH_ROUNDS } else { ROUNDS } {
        let victim = cluster.follower();
        cluster.place("db", &victim);
        fail_over(cluster, "db", &mut follower);
        cluster.boot(&victim);

        let victim = cluster.leader();
        cluster.place("db", &victim);
        fail_over(cluster, "db", &mut leader);
        cluster.boot(&victim);
    }
    let mut report = quorate_bench::Report::new();
    follower.report(&mut report, "follower's host");
    leader.report(&mut report, "leader's host");
    report.publish(&format!("failover-{profile}")).unwrap();
    judge_rounds(
        &format!("failover, follower's host, {profile}"),
        &follower.started,
        "s",
        follower_limit,
    );
    judge_rounds(
        &format!("failover, leader's host, {profile}"),
        &leader.started,
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
    rounds(&cluster, "fast", 1.7, 2.8);

    let reports = cluster.judge(witness);
    assert!(reports[0].ranges.len() > ROUNDS, "{:?}", reports[0]);
}
