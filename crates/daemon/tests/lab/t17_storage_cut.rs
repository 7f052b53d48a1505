//! Disks on a SAN: a host that is cut off from everything is shut out there, and its VM starts elsewhere on that proof.

use crate::harness::guest::Guest;
use crate::harness::measure::{judge_rounds, rounds, seconds};
use crate::harness::{Cluster, LONG, Options, process};
use quorate_lab::Link;
use quorate_lab::san::TARGET_PREFIX;
use quorate_lab::supervisor::protocol::Who;
use quorate_lab::wait;
use std::time::Duration;

/// Enough for a limit; `QUORATE_ROUNDS` asks for more.
const ROUNDS: usize = 4;
/// From the end of the lease to the start of QEMU elsewhere, in seconds.
const LIMIT: f64 = 1.0;
/// The default lease, with the drift that the leader allows for.
const LEASE: f64 = 2.0;
/// A guest that nobody stopped has that long to try to write after its host is healed.
const LATE: Duration = Duration::from_secs(3);

#[test]
fn a_host_that_is_cut_off_is_shut_out_at_the_san_and_nothing_is_lost() {
    // Without watchdogs an expired lease proves nothing: only the cut does.
    let cluster = Cluster::with(Options {
        watchdog: false,
        san: true,
        ..Options::default()
    });
    let guest = Guest::new("db", 1).on_lun();
    let san = cluster.lab.san().unwrap();
    san.create_lun("db", 16 << 20).unwrap();
    cluster.run(std::slice::from_ref(&guest));
    let witness = cluster.witness(std::slice::from_ref(&guest));
    let (mut followers, mut leaders) = (Vec::new(), Vec::new());
    for round in 0..rounds(ROUNDS) {
        // A live migration on the SAN brings it there. Every other time nobody on the host stops the guest, as if its
        // guard had hung.
        let (victim, took) = match round % 4 {
            2 => (cluster.leader(), &mut leaders),
            _ => (cluster.follower(), &mut followers),
        };
        cluster.place("db", &victim);
        took.push(cut_off(&cluster, "db", round % 2 == 1));
    }
    let mut report = quorate_bench::Report::new();
    for (whose, samples) in [("follower's", &followers), ("leader's", &leaders)] {
        let name = format!("end of the {whose} lease -> QEMU started elsewhere");
        report.add(&name, "s", samples, None);
    }
    report.publish("storage-cut").unwrap();
    judge_rounds(
        "storage cut: end of a follower's lease -> QEMU started elsewhere",
        &followers,
        "s",
        LIMIT,
    );
    judge_rounds(
        "storage cut: end of the leader's lease -> QEMU started elsewhere",
        &leaders,
        "s",
        LIMIT,
    );
    let reports = cluster.judge(witness);
    assert!(
        reports[0].ranges.len() > rounds(ROUNDS) / 2,
        "{:?}",
        reports[0]
    );
}

/// Cuts the owner off from everything; returns the seconds from the end of its lease to the new start.
fn cut_off(cluster: &Cluster, vm: &str, hung: bool) -> f64 {
    let old = cluster.copy(vm);
    let initiator_of = |host: &str| format!(".{host}");
    let epoch = cluster.vm(vm).epoch;
    if hung {
        for who in [Who::Daemon, Who::Guard] {
            cluster.lab.pause(&old.host, who).unwrap();
        }
    }
    let begun = process::boottime();
    cluster.lab.isolate(&old.host, Link::All).unwrap();
    let new = cluster.new_copy(vm, std::slice::from_ref(&old), Duration::from_secs(20));
    let after_lease = seconds(new.started.saturating_sub(begun)) - LEASE;
    cluster.say(&format!(
        "{} -> {}{}: {after_lease:.2} s after the lease",
        old.host,
        new.host,
        if hung { " (its guard hung)" } else { "" }
    ));
    cluster.wait_ready(&[vm], LONG);
    let why = cluster.why(vm);
    assert!(why.contains("storage-cut"), "the proof is not named: {why}");
    assert!(cluster.vm(vm).epoch > epoch);

    cluster.lab.heal().unwrap();
    if hung {
        // The old guest runs and tries to reach its disk: it is not let in.
        assert_eq!(cluster.copies(vm).len(), 2, "the old guest is still there");
        let san = cluster.lab.san().unwrap();
        cluster.holds("the old host is shut out", LATE, || {
            let target = san.target(vm).map_err(|error| error.to_string())?;
            let ending = initiator_of(&old.host);
            let theirs = |name: &&String| {
                name.starts_with("iqn.2026-01.local.quorate:") && name.ends_with(&ending)
            };
            let listed = target.initiators.iter().any(|name| theirs(&name));
            let session = target
                .sessions
                .iter()
                .any(|session| theirs(&&session.initiator));
            if listed || session {
                return Err(format!("{TARGET_PREFIX}{vm} lets it in: {target:?}"));
            }
            Ok(())
        });
        for who in [Who::Guard, Who::Daemon] {
            cluster.lab.resume(&old.host, who).unwrap();
        }
    }
    cluster.wait_one_copy(vm, LONG);
    // It is let in again once its old guest is gone.
    cluster.eventually("the SAN to let the host in again", LONG, || {
        let target = cluster
            .lab
            .san()
            .unwrap()
            .target(vm)
            .map_err(|error| error.to_string())?;
        let ending = initiator_of(&old.host);
        let listed = target.initiators.iter().any(|name| name.ends_with(&ending));
        listed
            .then_some(())
            .ok_or_else(|| format!("{:?}", target.initiators))
    });
    cluster.wait_healthy();
    wait::pause(Duration::from_millis(500));
    after_lease
}
