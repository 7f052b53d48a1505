//! Disks without a SAN: a synchronous copy on another host. Owner lost, copy's host lost, both.

use crate::harness::guest::{Guest, manifest};
use crate::harness::measure::{judge_rounds, measured, median, missed, rounds, seconds};
use crate::harness::{Cluster, LONG, find_vm, process};
use quorate_api::view::VmState;
use quorate_lab::wait;
use std::path::PathBuf;
use std::time::Duration;

/// Enough for a limit; `QUORATE_ROUNDS` asks for more.
const ROUNDS: usize = 2;
/// A resync of a small disk, guests and daemons on the same two cores.
const RESYNC: Duration = Duration::from_secs(120);

pub(crate) fn own(cluster: &Cluster, host: &str) -> PathBuf {
    cluster.lab.site().dir.join(format!("own-{host}"))
}

/// Applies guests whose pool is the hosts' own.
pub(crate) fn run(cluster: &Cluster, guests: &[Guest], kind: &str) {
    for host in cluster.hosts() {
        std::fs::create_dir_all(own(cluster, &host)).unwrap();
    }
    let path = own(cluster, "{host}");
    let pools = format!(
        "pools:\n  own: {{kind: {kind}, path: \"{}\"}}\n",
        path.display()
    );
    let text = manifest(guests, &cluster.image(), &pools);
    cluster.apply_text(&text).unwrap();
    let names: Vec<&str> = guests.iter().map(|guest| guest.name.as_str()).collect();
    cluster.wait_ready(&names, Duration::from_secs(120));
}

/// Waits until the VM's disk is in step on a second host, and returns that host.
pub(crate) fn in_step(cluster: &Cluster, vm: &str) -> String {
    cluster.wait("a copy that is in step", RESYNC, |view| {
        let vm = find_vm(view, vm)?;
        let owner = vm.host.clone().ok_or("no owner")?;
        let mut copies = vm.copies.iter().filter(|copy| copy.host != owner);
        let copy = copies.find(|copy| copy.in_step && copy.problem.is_none());
        copy.map(|copy| copy.host.to_string())
            .ok_or_else(|| format!("{:?}", vm.copies))
    })
}

/// Waits until no other host has a copy in step.
pub(crate) fn alone(cluster: &Cluster, vm: &str) {
    cluster.wait("a copy that is dropped", LONG, |view| {
        let vm = find_vm(view, vm)?;
        match vm.copies.iter().filter(|copy| copy.in_step).count() {
            1 => Ok(()),
            _ => Err(format!("{:?}", vm.copies)),
        }
    });
}

#[test]
fn the_copy_has_every_acknowledged_record_when_its_owner_is_killed() {
    let cluster = Cluster::up();
    let guests = [Guest::new("db", 1).pool("own")];
    run(&cluster, &guests, "mirrored");
    let witness = cluster.witness(&guests);
    let (mut started, mut ready) = (Vec::new(), Vec::new());
    for _ in 0..rounds(ROUNDS) {
        let copy = in_step(&cluster, "db");
        let old = cluster.copy("db");
        cluster.say(&format!("{} has it, {copy} follows", old.host));
        let begun = cluster.cut_power(&old.host);
        let new = cluster.new_copy("db", std::slice::from_ref(&old), Duration::from_secs(20));
        assert_eq!(new.host, copy, "it starts where its copy is");
        started.push(seconds(new.started.saturating_sub(begun)));
        cluster.wait_ready(&["db"], LONG);
        ready.push(seconds(process::boottime().saturating_sub(begun)));
        // So that there is something to lose.
        wait::pause(Duration::from_secs(1));
        let why = cluster.why("db");
        assert!(why.contains("lease-expired"), "{why}");
        // The old owner's image may have writes that nobody was told of.
        let view = cluster.vm("db");
        let theirs = view.copies.iter().find(|c| c.host.as_str() == old.host);
        assert!(!theirs.unwrap().in_step, "{view:?}");
        cluster.boot(&old.host);
    }
    let list: Vec<String> = ready.iter().map(|value| format!("{value:.2}")).collect();
    cluster.say(&format!("ready after {} s", list.join(" ")));
    let mut report = quorate_bench::Report::new();
    report.add("owner killed -> QEMU started", "s", &started, None);
    report.add("owner killed -> guest ready", "s", &ready, None);
    report.publish("mirrored-failover").unwrap();
    judge_rounds("mirrored: owner killed -> QEMU started", &started, "s", 4.5);
    let last = cluster.owner("db");
    let dir = own(&cluster, &last);
    let reports = cluster.judge_at(witness, |_| dir.join("db.raw"));
    assert!(reports[0].ranges.len() > 1, "{:?}", reports[0]);
}

/// Keeps a host from taking a copy: its image is moved aside, and a directory is in its place.
fn block(cluster: &Cluster, host: &str) {
    let dir = own(cluster, host);
    std::fs::rename(dir.join("db.raw"), dir.join("db.stale")).unwrap();
    std::fs::create_dir(dir.join("db.raw")).unwrap();
}

fn unblock(cluster: &Cluster, host: &str) {
    let dir = own(cluster, host);
    std::fs::remove_dir(dir.join("db.raw")).unwrap();
    std::fs::rename(dir.join("db.stale"), dir.join("db.raw")).unwrap();
}

#[test]
fn a_lost_copy_holds_the_guest_up_shortly_and_is_never_started_from() {
    let cluster = Cluster::up();
    let guests = [Guest::new("db", 1).pool("own")];
    run(&cluster, &guests, "mirrored");
    let copy = in_step(&cluster, "db");
    let owner = cluster.owner("db");
    let shown = cluster.must(&["vm", "show", "db"]);
    assert!(shown.contains(&format!("on {copy}: in step")), "{shown}");

    let acks = cluster.lab.ack_collector(guests[0].address).unwrap();
    wait::pause(Duration::from_secs(1));
    cluster.cut_power(&copy);
    alone(&cluster, "db");
    // It goes on: the gap has an end.
    wait::pause(Duration::from_secs(2));
    assert_eq!(cluster.owner("db"), owner);
    let report = acks.finish().unwrap();
    let gap = seconds(Duration::from_micros(report.longest_gap_us));
    judge_rounds(
        "mirrored: the copy's host killed -> the guest writes again",
        &[gap],
        "s",
        3.0,
    );

    // The copy's host is back, and the owner dies before the copy is in step: nothing may start from it.
    block(&cluster, &copy);
    cluster.boot(&copy);
    cluster.cut_power(&owner);
    let why = cluster.wait("a refusal", LONG, |view| {
        let vm = find_vm(view, "db")?;
        let refused = vm.why.contains("it lacks writes that were acknowledged");
        match refused && vm.state == VmState::Waiting {
            true => Ok(vm.why),
            false => Err(format!("{vm:?}")),
        }
    });
    cluster.say(&why);
    cluster.holds("no copy of db", Duration::from_secs(3), || {
        let copies = cluster.copies("db");
        copies.is_empty().then_some(()).ok_or(format!("{copies:?}"))
    });
    cluster.boot(&owner);
    cluster.wait_ready(&["db"], LONG);
    assert_eq!(cluster.owner("db"), owner);
    unblock(&cluster, &copy);
    assert_eq!(in_step(&cluster, "db"), copy);
    cluster.say("resynchronised");
    accepted(&cluster, &owner, &copy);
}

/// The owner is lost for good while its copy is out of step: an operator decides, and the VM starts from that copy. When
/// the old owner is back after all, its disk becomes the copy.
fn accepted(cluster: &Cluster, owner: &str, copy: &str) {
    block(cluster, copy);
    for pid in cluster.storage_daemons(copy) {
        process::kill_pid(pid);
    }
    alone(cluster, "db");
    cluster.cut_power(owner);
    let word = format!("quorate storage copies accept db db.raw --host {copy}");
    cluster.wait("advice", LONG, |view| {
        let vm = find_vm(view, "db")?;
        let told = vm.why.contains(&word);
        told.then_some(()).ok_or_else(|| format!("{vm:?}"))
    });
    unblock(cluster, copy);
    let asked = cluster.quorate(&[
        "storage", "copies", "accept", "db", "db.raw", "--host", copy,
    ]);
    assert!(asked.is_err(), "it asks first, and there is no terminal");
    let accept = [
        "storage", "copies", "accept", "db", "db.raw", "--host", copy, "--yes",
    ];
    let said = cluster.must(&accept);
    assert!(said.contains("by an operator's word"), "{said}");
    cluster.wait_ready(&["db"], LONG);
    assert_eq!(cluster.owner("db"), copy);
    cluster.boot(owner);
    assert_eq!(in_step(cluster, "db"), owner);
}

/// The last record that a guest has acknowledged, and when that was asked.
fn last_record(cluster: &Cluster, guest: &Guest) -> (u64, Duration) {
    let acks = cluster.lab.ack_collector(guest.address).unwrap();
    wait::pause(Duration::from_millis(700));
    let report = acks.finish().unwrap();
    let last = report.ranges.iter().map(|range| range.last).max();
    (last.unwrap(), process::boottime())
}

/// Records, each written and flushed, in a second.
fn rate(cluster: &Cluster, guest: &Guest) -> f64 {
    let (first, begun) = last_record(cluster, guest);
    wait::pause(Duration::from_secs(3));
    let (last, ended) = last_record(cluster, guest);
    (last - first) as f64 / seconds(ended - begun)
}

/// Waits until both sides are so large.
fn have(cluster: &Cluster, copy: &str, bytes: u64) {
    for host in [copy, &cluster.owner("db")] {
        let image = own(cluster, host).join("db.raw");
        cluster.eventually("a larger image", RESYNC, || {
            let length = std::fs::metadata(&image).map_or(0, |meta| meta.len());
            let text = format!("{length} bytes on {host}");
            (length == bytes).then_some(()).ok_or(text)
        });
    }
}

#[test]
fn a_mirrored_disk_is_at_least_half_as_fast() {
    let cluster = Cluster::up();
    let guests = [Guest::new("db", 1).pool("own").words("qr.log_hz=100000")];
    run(&cluster, &guests, "mirrored");
    let (mut mirrored, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let copy = in_step(&cluster, "db");
        mirrored.push(rate(&cluster, &guests[0]));
        block(&cluster, &copy);
        for pid in cluster.storage_daemons(&copy) {
            process::kill_pid(pid);
        }
        alone(&cluster, "db");
        plain.push(rate(&cluster, &guests[0]));
        unblock(&cluster, &copy);
    }
    let copy = in_step(&cluster, "db");
    let log = cluster.log_tail(&cluster.owner("db"), 100_000);
    assert!(log.contains("the copy gets what it lacks"), "{log}");
    // Both sides become larger under the guest.
    cluster.must(&["image", "resize", "own/db.raw", "24MiB"]);
    assert_eq!(in_step(&cluster, "db"), copy);
    have(&cluster, &copy, 24 << 20);
    // The same by the manifest.
    let before = cluster.copy("db");
    let guest = guests[0].clone().disk(32);
    let text = manifest(&[guest], &cluster.image(), "");
    cluster.apply_text(&text).unwrap();
    have(&cluster, &copy, 32 << 20);
    assert_eq!(in_step(&cluster, "db"), copy);
    assert_eq!(cluster.copy("db"), before, "it was started anew");
    let mut report = quorate_bench::Report::new();
    report.add("fsynced writes, plain disk", "/s", &plain, None);
    report.add(
        "fsynced writes, mirrored disk",
        "/s",
        &mirrored,
        Some(median(&plain)),
    );
    report.publish("mirrored").unwrap();
    let (mirrored, plain) = (median(&mirrored), median(&plain));
    measured("fsynced writes, plain disk", plain, "/s", "none");
    measured("fsynced writes, mirrored disk", mirrored, "/s", "none");
    let share = mirrored / plain;
    measured("mirrored : plain", share, "", ">= 0.55");
    if share < 0.55 {
        missed(&format!(
            "a mirrored disk has {share:.2} of a plain one's writes"
        ));
    }
    assert!(share >= 0.55, "{share:.2}");
}

#[test]
fn a_local_disk_restarts_only_with_its_host() {
    let cluster = Cluster::up();
    let guests = [Guest::new("db", 1).pool("own")];
    run(&cluster, &guests, "local");
    let owner = cluster.owner("db");
    let shown = cluster.must(&["vm", "show", "db"]);
    assert!(
        shown.contains(&format!("restarts on  {owner} only")),
        "{shown}"
    );
    cluster.cut_power(&owner);
    let why = cluster.wait("a refusal", LONG, |view| {
        let vm = find_vm(view, "db")?;
        let only = vm.why.contains(&format!("is on {owner} only"));
        only.then(|| vm.why.clone())
            .ok_or_else(|| format!("{vm:?}"))
    });
    cluster.say(&why);
    cluster.boot(&owner);
    cluster.wait_ready(&["db"], LONG);
    assert_eq!(cluster.owner("db"), owner);
}
