//! Daemon, guard, or both stop; all daemons restart.

use crate::harness::guest::Guest;
use crate::harness::measure::{measured, seconds};
use crate::harness::{Cluster, LONG, process};
use quorate_lab::supervisor::protocol::{Power, Who};
use quorate_lab::wait;
use std::time::Duration;

/// A ping every 10 ms must not miss more than this while the daemons restart.
const PING_GAP_LIMIT_MS: f64 = 500.0;

#[test]
fn hung_and_restarted_daemons() {
    let cluster = Cluster::up();
    let guest = Guest::new("db", 1);
    let guests = [guest.clone(), Guest::new("app", 2), Guest::new("web", 3)];
    cluster.run(&guests);
    let witness = cluster.witness(&guests[..1]);
    restart_all(&cluster, &guests);
    hung_daemon(&cluster, "db");
    hung_host(&cluster, "db");
    cluster.judge(witness);
}

/// No guest notices: same processes, no gap in the pings, whether the daemons end in order or are killed.
fn restart_all(cluster: &Cluster, guests: &[Guest]) {
    let before: Vec<_> = guests
        .iter()
        .map(|guest| cluster.copy(&guest.name))
        .collect();
    let pinger = cluster
        .lab
        .pinger(guests[0].address, Duration::from_millis(10))
        .unwrap();
    for hard in [false, true] {
        for host in cluster.hosts() {
            cluster.lab.restart_daemon(&host, hard).unwrap();
        }
        cluster.wait_healthy();
        cluster.wait_ready(&["db", "app", "web"], LONG);
        for host in cluster.hosts().iter().filter(|_| !hard) {
            let log = cluster.log_tail(host, 400);
            assert!(
                log.contains("the others know that this host leaves"),
                "{log}"
            );
        }
    }
    // Longer than a lease after the last restart.
    wait::pause(Duration::from_secs(3));
    let report = pinger.finish().unwrap();
    for (guest, copy) in guests.iter().zip(before) {
        assert_eq!(
            cluster.wait_one_copy(&guest.name, LONG),
            copy,
            "{} noticed",
            guest.name
        );
    }
    // Restarts of six daemons on two cores delay pings, too; a frozen guest would be silent for much longer.
    let gap = report.longest_gap_us as f64 / 1000.0;
    measured(
        "restart of all daemons: longest silence of a guest",
        gap,
        "ms",
        &format!(
            "<= {PING_GAP_LIMIT_MS} ms; the pinger itself was {} ms late",
            report.sender_gap_us / 1000
        ),
    );
    assert!(gap <= PING_GAP_LIMIT_MS, "{report:?}");
}

/// The daemon alone hangs: the guard stops the guests in time, and the VM starts elsewhere.
fn hung_daemon(cluster: &Cluster, vm: &str) {
    let old = cluster.copy(vm);
    let begun = process::boottime();
    cluster.lab.pause(&old.host, Who::Daemon).unwrap();
    let stopped = cluster.eventually(
        "the guard to stop the guest",
        Duration::from_secs(5),
        || {
            if process::running(std::slice::from_ref(&old)).is_empty() {
                Ok(process::boottime() - begun)
            } else {
                Err("its CPUs run".to_owned())
            }
        },
    );
    measured(
        "daemon hung: guest does not run any more after",
        seconds(stopped),
        "s",
        "<= 2.5 s",
    );
    // A look takes a quarter of a second itself.
    assert!(seconds(stopped) <= 2.5, "{stopped:?}");
    let new = cluster.new_copy(vm, std::slice::from_ref(&old), Duration::from_secs(15));
    cluster.wait_ready(&[vm], LONG);
    assert!(process::running(std::slice::from_ref(&old)).is_empty());
    cluster.lab.resume(&old.host, Who::Daemon).unwrap();
    cluster.wait_healthy();
    assert_eq!(cluster.wait_one_copy(vm, LONG), new);
}

/// Daemon and guard hang together: the watchdog ends the host.
fn hung_host(cluster: &Cluster, vm: &str) {
    let old = cluster.copy(vm);
    let fired = cluster.status(&old.host).watchdog_fired;
    cluster.lab.pause(&old.host, Who::Guard).unwrap();
    cluster.lab.pause(&old.host, Who::Daemon).unwrap();
    let new = cluster.new_copy(vm, std::slice::from_ref(&old), Duration::from_secs(15));
    let status = cluster.status(&old.host);
    assert_eq!(status.power, Power::Dead, "{status:?}");
    assert_eq!(status.watchdog_fired, fired + 1);
    assert!(!process::alive(&old));
    let done = cluster.history(&old.host, "watchdog done").pop().unwrap();
    measured(
        "daemon and guard hung: the watchdog's work after its deadline",
        done["after_due_us"].as_f64().unwrap() / 1000.0,
        "ms",
        "before the VM starts elsewhere",
    );
    let dead_at = Duration::from_micros(done["boottime_us"].as_u64().unwrap());
    // The start of a process is exact to 10 ms, and never later than it was.
    assert!(
        new.started + Duration::from_millis(10) > dead_at,
        "started {:?}, dead {dead_at:?}",
        new.started
    );
    cluster.wait_ready(&[vm], LONG);
    cluster.boot(&old.host);
    assert_eq!(cluster.wait_one_copy(vm, LONG), new);
}
