//! What Quorate itself needs on a host with ten VMs.

use crate::harness::guest::{Guest, Ready};
use crate::harness::measure::measured;
use crate::harness::{Cluster, process};
use std::time::Duration;

const LIMIT_MIB: f64 = 60.0;
/// What is not pages of the program's file: the limit of a debug build, whose code is several times as large.
const OWN_LIMIT_MIB: f64 = 30.0;

#[test]
fn daemon_and_guard_are_small_with_ten_guests() {
    let cluster = Cluster::up();
    // The leader's host has most to do.
    let host = cluster.leader();
    let guests: Vec<Guest> = (1..=10)
        .map(|number| {
            Guest::new(&format!("vm{number}"), number)
                .only_on(&[&host])
                .ready(Ready::Running)
                .words("qr.log_hz=1")
        })
        .collect();
    cluster.run(&guests);
    let daemon = cluster.programs(&host, "serve");
    let guard = cluster.programs(&host, "guard");
    assert_eq!((daemon.len(), guard.len()), (1, 1), "{daemon:?} {guard:?}");
    // Not a moment of luck: the largest of several looks.
    let mut most = Memory::default();
    let mut looks = Vec::new();
    cluster.holds("the limit", Duration::from_secs(5), || {
        let now = Memory::of(daemon[0], guard[0]);
        looks.push(now.counted);
        if now.counted > most.counted {
            most = now;
        }
        let small =
            now.own() < OWN_LIMIT_MIB && (cfg!(debug_assertions) || now.counted < LIMIT_MIB);
        small.then_some(()).ok_or_else(|| format!("{now:?}"))
    });
    let mut report = quorate_bench::Report::new();
    report.add("daemon and guard with 10 VMs", "MiB", &looks, None);
    report.publish("memory").unwrap();
    measured(
        "memory of daemon and guard with 10 VMs",
        most.counted,
        "MiB",
        &format!("< {LIMIT_MIB} MiB in release; own < {OWN_LIMIT_MIB}; {most:.1?}"),
    );
}

/// In MiB. Most of what is resident are pages of the program's file, which the two share, and which are
/// several times as many in a debug build: they count once, and are judged in release only.
#[derive(Debug, Clone, Copy, Default)]
#[allow(dead_code, reason = "printed")]
struct Memory {
    counted: f64,
    daemon_resident: f64,
    daemon_own: f64,
    guard_resident: f64,
    guard_own: f64,
}

impl Memory {
    fn own(&self) -> f64 {
        self.daemon_own + self.guard_own
    }

    fn of(daemon: i32, guard: i32) -> Self {
        let mib = |pid: i32, key: &str| process::status_kib(pid, key) as f64 / 1024.0;
        let all = |pid: i32| mib(pid, "VmRSS:");
        let own = |pid: i32| mib(pid, "RssAnon:") + mib(pid, "RssShmem:");
        let file = |pid: i32| all(pid) - own(pid);
        Self {
            counted: own(daemon) + own(guard) + file(daemon).max(file(guard)),
            daemon_resident: all(daemon),
            daemon_own: own(daemon),
            guard_resident: all(guard),
            guard_own: own(guard),
        }
    }
}
