//! A host is drained for maintenance: nothing stops.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::{Cluster, LONG, find_host};
use quorate_api::view::{ClusterView, VmState};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Default of `parallel_migrations`.
const PARALLEL: usize = 2;

#[test]
fn a_drain_stops_nothing_and_spreads_the_guests() {
    let cluster = Cluster::up();
    let guests = [
        Guest::new("db", 1),
        Guest::new("app", 2).after("db"),
        Guest::new("web", 3).after("app"),
        Guest::new("extra", 4),
    ];
    let names = ["db", "app", "web", "extra"];
    cluster.run(&guests);
    for name in names {
        cluster.place(name, "h1");
    }
    let witness = cluster.witness(&guests);
    let pinger = cluster
        .lab
        .pinger(guests[0].address, Duration::from_millis(1))
        .unwrap();
    let begun = Instant::now();
    cluster.must(&["host", "drain", "h1"]);
    let mut most = 0;
    cluster.wait("maintenance", LONG * 2, |view| {
        most = most.max(migrating(view));
        nothing_stops(view)?;
        let host = find_host(view, "h1")?;
        let done = host.vms.is_empty() && format!("{:?}", host.mode) == "Maintenance";
        done.then_some(()).ok_or_else(|| format!("{host:?}"))
    });
    measured(
        "drain of four guests",
        begun.elapsed().as_secs_f64(),
        "s",
        "nothing stops",
    );
    let report = pinger.finish().unwrap();
    measured(
        "drain: longest silence of a guest",
        report.longest_gap_us as f64 / 1000.0,
        "ms",
        "a blackout",
    );
    assert!(
        (1..=PARALLEL).contains(&most),
        "{most} migrations at a time"
    );
    let mut homes: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        *homes
            .entry(cluster.wait_one_copy(name, LONG).host)
            .or_default() += 1;
    }
    measured(
        "drain: migrations at a time",
        most as f64,
        "migrations",
        &format!("at most {PARALLEL}"),
    );
    cluster.say(&format!("homes: {homes:?}"));
    assert!(!homes.contains_key("h1"));
    assert_eq!(homes.values().max(), Some(&2), "not balanced: {homes:?}");

    // A host in maintenance takes nothing, and says so.
    let error = cluster
        .quorate(&[
            "vm",
            "migrate",
            "db",
            "--to",
            "h1",
            "--wait",
            "--timeout",
            "5s",
        ])
        .unwrap_err();
    cluster.say(&format!("to a host in maintenance: {error}"));
    assert!(error.contains("maintenance"), "{error}");
    cluster.must(&["host", "resume", "h1"]);
    cluster.wait("an active host", LONG, |view| {
        let host = find_host(view, "h1")?;
        (format!("{:?}", host.mode) == "Active")
            .then_some(())
            .ok_or_else(|| format!("{host:?}"))
    });
    cluster.must(&["vm", "migrate", "db", "--to", "h1", "--wait"]);
    assert_eq!(cluster.wait_one_copy("db", LONG).host, "h1");
    for report in cluster.judge(witness) {
        assert_eq!(
            report.ranges.len(),
            1,
            "a guest has booted again: {report:?}"
        );
    }
}

fn migrating(view: &ClusterView) -> usize {
    view.vms.iter().filter(|vm| vm.migration.is_some()).count()
}

fn nothing_stops(view: &ClusterView) -> Result<(), String> {
    for vm in &view.vms {
        assert!(
            matches!(vm.state, VmState::Running | VmState::Migrating),
            "a drain stopped something: {vm:?}"
        );
    }
    Ok(())
}
