//! Guests whose disks are LUNs of the lab's SAN: what a host that was cut off can still write, and a Debian that boots
//! from the SAN. Needs root, the guest image (`make guest`) and the Debian image (`make guest-debian`).
#![allow(clippy::unwrap_used)]

mod support;

use quorate_lab::guest::{DEBIAN_ADDRESS, find_debian, judge};
use quorate_lab::tools::acks::AckReport;
use quorate_lab::{Lun, San, Site, wait};
use std::time::{Duration, Instant};
use support::guest::{DAEMON, place, wait_ready};
use support::{Fixture, eventually, up};

fn initiator(host: &str) -> String {
    format!("iqn.2025-01.lab.quorate.initiator:{host}")
}

/// For QEMU's `-drive`.
fn drive(lun: &Lun, host: &str) -> String {
    lun.image_options(&initiator(host))
}

fn two_hosts(name: &str) -> (Fixture, San) {
    let fixture = up(name, 2, DAEMON, |spec| spec.san = true);
    let san = fixture.lab.san().unwrap();
    let lun = san.create_lun("db", 1024 * 1024).unwrap();
    for host in ["h1", "h2"] {
        place(&fixture, host, &drive(&lun, host));
    }
    (fixture, san)
}

#[test]
fn late_writes_of_a_host_that_was_shut_out_fail() {
    let (fixture, san) = two_hosts("sang1");
    let lab = &fixture.lab;
    san.allow("db", &initiator("h1")).unwrap();
    lab.start("h1").unwrap();
    wait_ready(&fixture, "h1");
    let guest = Site::guest_address(1);
    let collector = lab.ack_collector(guest).unwrap();
    wait::pause(Duration::from_secs(2));

    let mut severed = lab.sever("h1", false).unwrap();
    let begun = Instant::now();
    san.deny("db", &initiator("h1")).unwrap();
    println!("shut out {:?} after the cut", begun.elapsed());
    san.allow("db", &initiator("h2")).unwrap();
    lab.start("h2").unwrap();
    wait_ready(&fixture, "h2");
    assert!(severed.tries().unwrap() == 0, "not before it is healed");
    // Only its storage comes back: frames of two guests with one address would lead the bridges astray.
    let unplug = ["link", "set", "tap0", "down"];
    let unplugged = lab.command("h1", "ip").args(unplug).status().unwrap();
    assert!(unplugged.success());
    severed.heal().unwrap();
    eventually("the old guest's tries to write", || {
        severed.tries().unwrap() > 10
    });
    // Let it try for a while.
    wait::pause(Duration::from_secs(4));
    println!("the old host sent {} frames", severed.tries().unwrap());
    let sessions = san.sessions("db").unwrap();
    assert!(
        sessions.iter().all(|one| one.initiator == initiator("h2")),
        "{sessions:?}"
    );
    lab.kill("h1").unwrap();
    eventually("acknowledgements of the new guest", || {
        lab.guest_status(guest)
            .is_ok_and(|status| status.last_acked_seq > 0)
    });
    wait::pause(Duration::from_secs(3));
    let acks = collector.finish().unwrap();
    lab.kill("h2").unwrap();
    assert_eq!(acks.ranges.len(), 2, "{acks:?}");
    let verdict = lab.judge_lun("db", &acks).unwrap();
    println!("{} acknowledged records", verdict.acknowledged);
    assert!(verdict.good(), "{:?}", verdict.findings);
    assert_eq!(verdict.boots.len(), 2);
    // An initiator sees the same as the SAN.
    let copy = fixture.dir.path().join("copy.raw");
    san.read_image("db", &copy).unwrap();
    let seen = judge(&copy, &acks).unwrap();
    assert!(seen.good() && seen.last == verdict.last, "{seen:?}");
}

/// The negative control: without the SAN's help the judge sees two writers.
#[test]
fn a_host_that_is_only_cut_off_writes_again_when_it_is_healed() {
    let (fixture, san) = two_hosts("sang2");
    let lab = &fixture.lab;
    for host in ["h1", "h2"] {
        san.allow("db", &initiator(host)).unwrap();
    }
    lab.start("h1").unwrap();
    wait_ready(&fixture, "h1");
    let mut severed = lab.sever("h1", false).unwrap();
    lab.start("h2").unwrap();
    wait_ready(&fixture, "h2");
    severed.heal().unwrap();
    let mut found = Vec::new();
    eventually("two writers to be seen", || {
        let verdict = lab.judge_lun("db", &AckReport::default()).unwrap();
        found = verdict.findings;
        !found.is_empty()
    });
    println!("{}", found[0]);
    severed.wake().unwrap();
}

#[test]
fn a_debian_boots_from_the_san_and_answers() {
    let fixture = up("sang3", 1, DAEMON, |spec| spec.san = true);
    let lab = &fixture.lab;
    let san = lab.san().unwrap();
    let image = find_debian().unwrap();
    let bytes = std::fs::metadata(&image).unwrap().len();
    let lun = san.create_lun("debian", bytes).unwrap();
    let begun = Instant::now();
    san.write_image("debian", &image).unwrap();
    println!("image copied to the LUN in {:?}", begun.elapsed());
    san.allow("debian", &initiator("h1")).unwrap();
    let script = format!(
        "ip tuntap add dev tap0 mode tap\nip link set tap0 master br-lan up\n\
         exec qemu-system-x86_64 -M q35 -accel tcg -m 256 -display none -nodefaults \
         -drive {},if=virtio -netdev tap,id=n,ifname=tap0,script=no,downscript=no \
         -device virtio-net-pci,netdev=n,romfile= -device virtio-rng-pci\n",
        drive(&lun, "h1")
    );
    std::fs::write(lab.site().data_dir("h1").join("run"), script).unwrap();
    let begun = Instant::now();
    lab.start("h1").unwrap();
    let limit = Duration::from_secs(150);
    wait::until("an answer", limit, Duration::from_millis(200), || {
        let visitor = lab.visitor(DEBIAN_ADDRESS, "/", 1).ok()?;
        let report = visitor.finish().ok()?;
        (report.failures.is_empty() && report.good > 0).then_some(())
    })
    .unwrap();
    println!("HTTP after {:?}", begun.elapsed());
    let visitor = lab.visitor(DEBIAN_ADDRESS, "/boot-id", 5).unwrap();
    let report = visitor.finish().unwrap();
    assert!(
        report.failures.is_empty() && report.bodies.len() == 1,
        "{report:?}"
    );
}
