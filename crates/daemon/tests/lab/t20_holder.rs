//! The host that answers for a service's address dies, hangs or is cut off: another one takes over, connections to
//! members elsewhere go on, and the old one is silent from the end of its lease on, by itself.

use crate::harness::measure::{SLACK, measured, missed};
use crate::harness::service::{ADDRESS, web, webs};
use crate::harness::{Cluster, LONG};
use quorate_lab::supervisor::protocol::Who;
use quorate_lab::tools::capture::{CaptureReport, boot_ns};
use quorate_lab::{Link, wait};
use std::time::{Duration, Instant};

/// The default lease.
const LEASE: Duration = Duration::from_secs(2);
/// How long after its lease the old holder's frames may still arrive at the switch.
const AFTER: Duration = Duration::from_millis(10);
/// How long the old holder is watched after its lease has ended.
const WATCHED: Duration = Duration::from_secs(2);

/// What happens to the holder's host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Its power is cut.
    Killed,
    /// Its daemon hangs; its kernel goes on.
    Stopped,
    /// It hears nobody of the cluster, and every client.
    Cut,
}

const MEMBERS: [&str; 2] = ["web1", "web2"];

/// A cluster with a service, its members not on the holder's host.
fn site(environment: &[(&str, &str)]) -> Cluster {
    let cluster = Cluster::with_environment(environment);
    let guests = webs(2);
    cluster.apply_service(&guests, &web(&MEMBERS, ""));
    cluster.wait_ready(&MEMBERS, LONG);
    cluster.wait_ring(&MEMBERS);
    cluster
}

fn members_elsewhere(cluster: &Cluster, holder: &str) {
    let others: Vec<String> = cluster
        .hosts()
        .into_iter()
        .filter(|host| host != holder)
        .collect();
    for (member, host) in MEMBERS.iter().zip(&others) {
        cluster.place(member, host);
    }
}

/// Does it to the holder while clients ask for the address all the time; what the switch saw, and when the fault was.
fn disturb(cluster: &Cluster, fault: Fault, holder: &str) -> (CaptureReport, u64) {
    let hosts = cluster.hosts();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let frames = cluster.watch_frames(&hosts);
    wait::pause(Duration::from_millis(500));
    // No lease is longer than one that was granted for a heartbeat sent just now.
    match fault {
        Fault::Killed => drop(cluster.lab.kill(holder).unwrap()),
        Fault::Stopped => drop(cluster.lab.pause(holder, Who::Daemon).unwrap()),
        Fault::Cut => cluster.lab.isolate(holder, Link::Mgmt).unwrap(),
    }
    let at = boot_ns();
    let end = Instant::now() + LEASE + WATCHED;
    while Instant::now() < end {
        // Everybody is asked for the address again: whoever answers shows himself.
        forget_neighbours(cluster);
        wait::pause(Duration::from_millis(100));
    }
    (frames.finish().unwrap(), at)
}

fn forget_neighbours(cluster: &Cluster) {
    let done = cluster
        .lab
        .command("client", "ip")
        .args(["neigh", "flush", "dev", "lan0"])
        .output();
    assert!(done.unwrap().status.success());
}

fn mend(cluster: &Cluster, fault: Fault, holder: &str) {
    match fault {
        Fault::Killed => return cluster.boot(holder),
        Fault::Stopped => drop(cluster.lab.resume(holder, Who::Daemon).unwrap()),
        Fault::Cut => cluster.lab.heal().unwrap(),
    }
    cluster.wait_healthy();
}

/// Frames of the old holder that came after its lease had ended for certain.
fn late(report: &CaptureReport, holder: &str, fault_at_ns: u64) -> usize {
    let span = u64::try_from((LEASE + AFTER).as_nanos()).unwrap();
    let port = &report.ports[&format!("lan-{holder}")];
    assert_eq!(port.lost, 0, "the capture was too slow");
    port.after(fault_at_ns + span)
}

/// Seconds from the fault to the first frame with the virtual MAC from another host.
fn taken_over(report: &CaptureReport, holder: &str, fault_at_ns: u64) -> f64 {
    let others = report
        .ports
        .iter()
        .filter(|(port, _)| **port != format!("lan-{holder}"));
    let virtual_frames = others.flat_map(|(_, port)| {
        let from_then = port.noted.iter().filter(|one| one.at_ns > fault_at_ns);
        from_then.filter(|one| one.source.starts_with("02:51:56"))
    });
    let first = virtual_frames.map(|one| one.at_ns).min().unwrap();
    (first - fault_at_ns) as f64 / 1e9
}

#[test]
fn another_host_takes_over_and_the_old_one_is_silent_by_itself() {
    let cluster = site(&[]);
    for fault in [Fault::Stopped, Fault::Cut, Fault::Killed] {
        let holder = cluster.holder();
        members_elsewhere(&cluster, &holder);
        // Then a new leader is elected first, while the lease runs out: the limit is the same.
        let role = match cluster.leader() == holder {
            true => "the leader",
            false => "a follower",
        };
        let load = cluster.hold(24, 0);
        let (frames, at) = disturb(&cluster, fault, &holder);
        let took = taken_over(&frames, &holder, at);
        let late = late(&frames, &holder, at);
        let report = load.finish().unwrap();
        crate::harness::service::assert_unbroken(&report, &format!("{fault:?}"));
        let waits = report.connections.iter().map(|one| one.longest_us).max();
        let limit = (LEASE + Duration::from_millis(600)).as_secs_f64();
        measured(
            &format!("services: take-over, holder {fault:?}"),
            took,
            "s",
            &format!(
                "<= {limit} s; the host was {role}; longest wait of a client {:.2} s",
                waits.unwrap_or(0) as f64 / 1e6
            ),
        );
        measured(
            &format!("services: frames of the old holder after its lease, {fault:?}"),
            late as f64,
            "frames",
            "0",
        );
        assert_eq!(
            late, 0,
            "{fault:?}: {holder} spoke for {ADDRESS} after its lease"
        );
        if took > limit * SLACK {
            missed(&format!("take-over of an address, {fault:?}"));
        }
        assert!(took <= limit * SLACK, "{fault:?}: {took} s");
        mend(&cluster, fault, &holder);
    }
}

/// Somebody else claims the address: said with its MAC address and where it was heard, and no more once it is gone.
fn impostor_is_named(cluster: &Cluster) {
    let problems = || {
        let web = cluster.web()?;
        Ok::<_, String>(web["problems"].to_string())
    };
    assert!(!problems().unwrap().contains("claimed"), "too early");
    let impostor = cluster.lab.impostor(ADDRESS).unwrap();
    let named = cluster.eventually("the impostor is named", LONG, || {
        let problems = problems()?;
        let named = problems.contains("02:00:00:00:0b:ad") && problems.contains("lan0");
        named.then(|| problems.clone()).ok_or(problems)
    });
    cluster.say(&format!("named: {named}"));
    let report = impostor.finish().unwrap();
    assert!(report.announced > 0, "{report:?}");
}

/// The negative controls: an impostor is found, and the check of silence finds a datapath that does not look at its
/// lease.
#[test]
fn an_impostor_and_a_datapath_without_a_lease_check_are_found_out() {
    let cluster = site(&[("QUORATE_TEST_WITHOUT_LEASE_CHECK", "1")]);
    let holder = cluster.holder();
    impostor_is_named(&cluster);
    members_elsewhere(&cluster, &holder);
    // New clients ask for the address all the time.
    let load = cluster.hold(4, 50);
    let (frames, at) = disturb(&cluster, Fault::Cut, &holder);
    let late = late(&frames, &holder, at);
    drop(load);
    measured(
        "services: frames after the lease, without a lease check",
        late as f64,
        "frames",
        "more than 0: the check can fail",
    );
    assert!(
        late > 0,
        "the check of silence finds nothing even without a lease check"
    );
}
