//! The lab guest in real QEMU on the lab's network: boot, measurement, loss of its host, judgement.
//! Needs root and the guest image (`make guest`).
#![allow(clippy::unwrap_used)]

mod support;

use quorate_lab::guest::{judge, make_disk};
use quorate_lab::tools::acks::AckReport;
use quorate_lab::{Link, Site, wait};
use std::path::Path;
use std::time::{Duration, Instant};
use support::guest::{DAEMON, place, wait_ready};
use support::{eventually, up};

/// For QEMU's `-drive`: a raw image.
fn drive(disk: &Path) -> String {
    format!("file={},format=raw", disk.display())
}

#[test]
fn a_guest_that_moves_by_restart_loses_no_acknowledged_record() {
    let fixture = up("guest1", 2, DAEMON, |_| {});
    let lab = &fixture.lab;
    let disk = lab.site().shared_dir().join("db.raw");
    make_disk(&disk, 1).unwrap();
    for host in ["h1", "h2"] {
        place(&fixture, host, &drive(&disk));
    }
    let begun = Instant::now();
    lab.start("h1").unwrap();
    wait_ready(&fixture, "h1");
    println!("guest ready {:?} after power on", begun.elapsed());

    let guest = Site::guest_address(1);
    let says = lab.guest_status(guest).unwrap();
    assert!(
        says.name == "db" && says.ready && says.last_acked_seq > 0,
        "{says:?}"
    );
    let collector = lab.ack_collector(guest).unwrap();
    let pinger = lab.pinger(guest, Duration::from_millis(1)).unwrap();
    wait::pause(Duration::from_secs(2));
    let pings = pinger.finish().unwrap();
    println!("undisturbed: {pings:?}");
    assert!(pings.received > 500, "{pings:?}");

    // A cut that the pinger must see.
    let pinger = lab.pinger(guest, Duration::from_millis(1)).unwrap();
    wait::pause(Duration::from_millis(500));
    lab.isolate("h1", Link::Lan).unwrap();
    wait::pause(Duration::from_millis(700));
    lab.heal().unwrap();
    wait::pause(Duration::from_secs(1));
    let pings = pinger.finish().unwrap();
    assert!(
        (600_000..3_000_000).contains(&pings.longest_gap_us),
        "{pings:?}"
    );

    assert_eq!(lab.kill("h1").unwrap().guests, 0);
    lab.start("h2").unwrap();
    wait_ready(&fixture, "h2");
    // The collector has found the guest again when it knows a second boot; ask it by ending it.
    wait::pause(Duration::from_secs(4));
    let acks = collector.finish().unwrap();
    lab.kill("h2").unwrap();
    let verdict = judge(&disk, &acks).unwrap();
    println!(
        "{} acknowledged records, boots {:?}",
        verdict.acknowledged, verdict.boots
    );
    assert!(verdict.good(), "{:?}", verdict.findings);
    assert_eq!(verdict.boots.len(), 2);
    assert_eq!(acks.ranges.len(), 2, "{acks:?}");
    assert!(verdict.acknowledged > 100);

    // The judge would have noticed a lost one.
    let mut more = acks.clone();
    more.ranges[1].last = verdict.last + 1;
    assert_eq!(judge(&disk, &more).unwrap().findings.len(), 1);
}

#[test]
fn two_copies_on_one_disk_are_caught() {
    let fixture = up("guest2", 2, DAEMON, |_| {});
    let lab = &fixture.lab;
    let disk = lab.site().shared_dir().join("db.raw");
    make_disk(&disk, 1).unwrap();
    // QEMU's own lock would refuse the second copy.
    for host in ["h1", "h2"] {
        place(
            &fixture,
            host,
            &format!("{},file.locking=off", drive(&disk)),
        );
    }
    lab.start("h1").unwrap();
    wait_ready(&fixture, "h1");
    lab.start("h2").unwrap();
    wait_ready(&fixture, "h2");
    let mut found = Vec::new();
    eventually("two writers to be seen", || {
        found = judge(&disk, &AckReport::default()).unwrap().findings;
        !found.is_empty()
    });
    println!("{}", found[0]);
}
