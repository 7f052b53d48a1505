//! A guest that is a real Debian, with its root on the SAN: it boots on any host, answers HTTP through a live
//! migration, and starts elsewhere when its host dies.

use crate::harness::measure::{measured, seconds};
use crate::harness::{Cluster, LONG, Options};
use quorate_lab::guest::{DEBIAN_ADDRESS, find_debian};
use quorate_lab::tools::http::HttpReport;
use quorate_lab::wait;
use std::time::{Duration, Instant};

const VM: &str = "debian";
/// For its boot under emulation, on cores that others use too.
const BOOT: Duration = Duration::from_secs(240);
/// Requests of a visit, 20 ms apart.
const REQUESTS: u64 = 150;

#[test]
fn a_debian_boots_from_the_san_answers_through_a_migration_and_starts_where_it_is_needed() {
    let cluster = Cluster::with(Options {
        san: true,
        ..Options::default()
    });
    let disk = find_debian().unwrap();
    let san = cluster.lab.san().unwrap();
    san.create_lun(VM, std::fs::metadata(&disk).unwrap().len())
        .unwrap();
    san.write_image(VM, &disk).unwrap();
    cluster.say("its disk is on the LUN");
    let begun = Instant::now();
    cluster.apply_text(&manifest(&cluster)).unwrap();
    cluster.wait_ready(&[VM], BOOT);
    measured(
        "Debian from the SAN: start -> answers",
        seconds(begun.elapsed()),
        "s",
        "about 20 s",
    );
    let first = visit(&cluster, || {});
    let life = first.bodies.first().cloned().unwrap();

    cluster.place(VM, "h1");
    let moved = visit(&cluster, || {
        cluster.must(&["vm", "migrate", VM, "--to", "h2", "--wait"]);
    });
    assert_eq!(cluster.owner(VM), "h2");
    assert!(
        moved.bodies.contains(&life) && moved.bodies.len() == 1,
        "it has booted again: {moved:?}"
    );
    measured(
        "Debian from the SAN: longest request through a live migration",
        moved.longest_us as f64 / 1000.0,
        "ms",
        "none fails",
    );

    // With h1 in maintenance only the third host is left.
    cluster.must(&["host", "drain", "h1", "--wait"]);
    let begun = Instant::now();
    cluster.cut_power("h2");
    cluster.eventually("the Debian on h3", LONG, || {
        let copies = cluster.copies(VM);
        let there = copies.iter().any(|copy| copy.host == "h3");
        there.then_some(()).ok_or_else(|| format!("{copies:?}"))
    });
    cluster.wait_ready(&[VM], BOOT);
    measured(
        "Debian from the SAN: host killed -> answers on a third host",
        seconds(begun.elapsed()),
        "s",
        "about 25 s",
    );
    assert_eq!(cluster.owner(VM), "h3");
    let last = visit(&cluster, || {});
    assert!(!last.bodies.contains(&life), "not a cold start: {last:?}");
}

fn manifest(cluster: &Cluster) -> String {
    format!(
        "networks:\n  lan: {{bridge: br-lan}}\n{}vms:\n  {VM}:\n    memory: 256MiB\n    disks: [{{pool: san, image: {VM}}}]\n    \
         nics: [{{network: lan, address: {DEBIAN_ADDRESS}}}]\n    \
         ready: {{probe: {{tcp: {{address: {DEBIAN_ADDRESS}, port: 80}}}}}}\n",
        cluster.pools()
    )
}

/// Visits its web server while something happens; no request may fail.
fn visit(cluster: &Cluster, meanwhile: impl FnOnce()) -> HttpReport {
    let visitor = cluster
        .lab
        .visitor(DEBIAN_ADDRESS, "/boot-id", REQUESTS)
        .unwrap();
    wait::pause(Duration::from_millis(700));
    meanwhile();
    // What comes after the move counts too.
    wait::pause(Duration::from_millis(2500));
    let report = visitor.finish().unwrap();
    cluster.say(&format!("{} of {} answered", report.good, report.asked));
    assert!(report.asked >= REQUESTS, "{report:?}");
    assert_eq!(report.good, report.asked, "{:?}", report.failures);
    report
}
