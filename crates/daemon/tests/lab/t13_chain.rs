//! A chain of dependencies is drained like guests that have nothing to do with each other: all live, side
//! by side, nothing stopped. A dependency that migrates stays satisfied.

use crate::harness::guest::Guest;
use crate::harness::measure::{measured, median, missed};
use crate::harness::{Cluster, LONG, find_host};
use quorate_api::view::VmState;
use std::time::Instant;

const GUESTS: u8 = 6;
const ROUNDS: usize = 3;
/// For `make bench`.
const BENCH_ROUNDS: usize = 5;
/// Default of `parallel_migrations`.
const PARALLEL: usize = 2;
/// How much longer a chain may take than as many independent guests.
const RATIO: f64 = 1.2;

fn guests(chained: bool) -> Vec<Guest> {
    let name = |number: u8| format!("c{number}");
    let guest = |number: u8| {
        let guest = Guest::new(&name(number), number).only_on(&["h1", "h2"]);
        if chained && number > 1 {
            guest.after(&name(number - 1))
        } else {
            guest
        }
    };
    (1..=GUESTS).map(guest).collect()
}

#[test]
fn a_chain_is_drained_as_fast_as_independent_guests() {
    let cluster = Cluster::up();
    let chain = guests(true);
    let names: Vec<&str> = chain.iter().map(|guest| guest.name.as_str()).collect();
    cluster.run(&chain);
    let witness = cluster.witness(&chain);
    for name in &names {
        cluster.place(name, "h1");
    }
    // To and fro, so that both kinds meet the same hosts and the same noise.
    let (mut chained, mut independent) = (Vec::new(), Vec::new());
    let mut most = 0;
    let wanted = quorate_bench::wanted();
    for _ in 0..if wanted { BENCH_ROUNDS } else { ROUNDS } {
        cluster.apply(&guests(true));
        chained.push(drain(&cluster, "h1", &mut most));
        cluster.apply(&guests(false));
        independent.push(drain(&cluster, "h2", &mut most));
    }
    let (ours, base) = (median(&chained), median(&independent));
    let mut report = quorate_bench::Report::new();
    report.add("drain of six chained guests", "s", &chained, Some(base));
    report.publish("drain").unwrap();
    measured(
        "drain of six chained guests, as a multiple of six independent ones",
        ours / base,
        "times",
        &format!("<= {RATIO}; {chained:.2?} s against {independent:.2?} s"),
    );
    for report in cluster.judge(witness) {
        assert_eq!(
            report.ranges.len(),
            1,
            "a guest has booted again: {report:?}"
        );
    }
    assert_eq!(most, PARALLEL, "migrations at a time");
    if ours > base * RATIO {
        missed("drain of a chain");
    }
    assert!(ours <= base * RATIO, "{chained:?} against {independent:?}");
}

/// Drains a host and takes it back; seconds until it was empty.
fn drain(cluster: &Cluster, from: &str, most: &mut usize) -> f64 {
    let begun = Instant::now();
    cluster.must(&["host", "drain", from]);
    let took = cluster.wait("an empty host", LONG * 2, |view| {
        let moving = view.vms.iter().filter(|vm| vm.migration.is_some());
        *most = (*most).max(moving.count());
        for vm in &view.vms {
            assert!(
                matches!(vm.state, VmState::Running | VmState::Migrating),
                "a drain stopped something: {vm:?}"
            );
        }
        let host = find_host(view, from)?;
        (host.vms.is_empty() && format!("{:?}", host.mode) == "Maintenance")
            .then(|| begun.elapsed().as_secs_f64())
            .ok_or_else(|| format!("{host:?}"))
    });
    cluster.say(&format!("{from} drained in {took:.2} s"));
    cluster.must(&["host", "resume", from]);
    took
}
