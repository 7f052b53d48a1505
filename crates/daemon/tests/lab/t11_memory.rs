//! What Quorate itself needs on a host with ten VMs.

use crate::harness::guest::{Guest, Ready};
use crate::harness::measure::measured;
use crate::harness::{Cluster, process};
use std::time::Duration;

const LIMIT_MIB: f64 = 60.0;

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
    let mut most = (0.0, 0.0, 0.0);
    cluster.holds("the limit", Duration::from_secs(5), || {
        let mib = |pid: i32| process::resident_kib(pid) as f64 / 1024.0;
        let (one, two) = (mib(daemon[0]), mib(guard[0]));
        if one + two > most.0 {
            most = (one + two, one, two);
        }
        (one + two < LIMIT_MIB)
            .then_some(())
            .ok_or_else(|| format!("daemon {one:.1} MiB, guard {two:.1} MiB"))
    });
    measured(
        "memory of daemon and guard with 10 VMs",
        most.0,
        "MiB",
        &format!(
            "< {LIMIT_MIB} MiB; daemon {:.1}, guard {:.1}, debug build",
            most.1, most.2
        ),
    );
}
