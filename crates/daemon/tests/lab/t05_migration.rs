//! Live migration: how long the guest is silent, and what happens when it is disturbed.

use crate::harness::bare::Bare;
use crate::harness::guest::Guest;
use crate::harness::measure::{measured, median, missed, rounds};
use crate::harness::process::{self, Copy};
use crate::harness::{Cluster, LONG, Options, find_vm};
use quorate_lab::wait;
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;
/// How much longer than bare QEMU's the blackout may be, in milliseconds.
const MORE_THAN_BARE_MS: f64 = 10.0;

/// One migration to the other of two hosts under the 1 ms pinger; the blackout in milliseconds.
fn blackout(cluster: &Cluster, guest: &Guest) -> f64 {
    let from = cluster.owner(&guest.name);
    let to = if from == "h1" { "h2" } else { "h1" };
    let pinger = cluster
        .lab
        .pinger(guest.address, Duration::from_millis(1))
        .unwrap();
    wait::pause(Duration::from_millis(300));
    cluster.must(&["vm", "migrate", &guest.name, "--to", to, "--wait"]);
    wait::pause(Duration::from_millis(500));
    let report = pinger.finish().unwrap();
    assert_eq!(cluster.owner(&guest.name), to);
    assert!(report.received > 100, "{report:?}");
    report.longest_gap_us as f64 / 1000.0
}

/// Two guests of one kind, one with Quorate and one with bare QMP commands, are moved in turns, so that both
/// meet the same noise. The blackout of an emulated guest is mostly the translation of its code at the
/// target, which takes longer on busy cores: when five rounds do not settle it, more are added, up to
/// three times as many, and all of them count.
#[test]
fn a_blackout_is_hardly_longer_than_bare_qemus() {
    let cluster = Cluster::up();
    let guests = [
        Guest::new("db", 1).only_on(&["h1", "h2"]),
        Guest::new("bare", 2).only_on(&["h1", "h2"]),
    ];
    cluster.run(&guests);
    let witness = cluster.witness(&guests[..1]);
    // The process with the command line of Quorate's driver goes, the same one without Quorate comes.
    let mut bare = Bare::instead_of(&cluster, &guests[1]);
    bare.wait_ready();

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    while ours.len() < ROUNDS * 3 {
        ours.push(blackout(&cluster, &guests[0]));
        theirs.push(bare.blackout(other_host(bare.host())));
        let settled = median(&ours) - median(&theirs) <= MORE_THAN_BARE_MS;
        if ours.len() >= ROUNDS && ours.len() % ROUNDS == 0 && settled {
            break;
        }
    }
    drop(bare);
    let (our_median, their_median) = (median(&ours), median(&theirs));
    measured(
        "migration blackout, Quorate",
        our_median,
        "ms",
        &format!("rounds {ours:.1?}"),
    );
    measured(
        "migration blackout, bare QEMU",
        their_median,
        "ms",
        &format!("rounds {theirs:.1?}"),
    );
    let more = our_median - their_median;
    measured(
        "migration blackout, more than bare QEMU",
        more,
        "ms",
        "<= 10 ms",
    );
    let mut report = quorate_bench::Report::new();
    report.add("migration blackout", "ms", &ours, Some(their_median));
    report.publish("migration").unwrap();
    let reports = cluster.judge(witness);
    assert_eq!(
        reports[0].ranges.len(),
        1,
        "it was restarted: {:?}",
        reports[0]
    );
    if more > MORE_THAN_BARE_MS {
        missed("blackout against bare QEMU");
    }
    assert!(
        more <= MORE_THAN_BARE_MS,
        "{our_median} against {their_median}"
    );
}

/// What disturbs a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Cancel,
    TargetDies,
    SourceDies,
    SourceDaemonDies,
    TargetDaemonDies,
    LeaderDaemonDies,
}

const FAULTS: [Fault; 6] = [
    Fault::Cancel,
    Fault::SourceDaemonDies,
    Fault::TargetDaemonDies,
    Fault::LeaderDaemonDies,
    Fault::TargetDies,
    Fault::SourceDies,
];

/// When it is disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// As soon as it is asked for: the commit and the target's preparation.
    Prepare,
    /// Its memory is being copied.
    Copy,
    /// About when the last one switched over; a little earlier or later with every fault.
    Switchover,
}

/// Each step is hit by every kind of fault, so six times. Dependents must never be touched; whatever
/// happens, one copy runs in the end, and every record that was acknowledged is there.
#[test]
fn a_disturbed_migration_leaves_one_copy_and_loses_nothing() {
    let cluster = Cluster::with(Options {
        settings: "  migration_mib_per_s: 24\n".to_owned(),
        ..Options::default()
    });
    let guest = Guest::new("db", 1)
        .memory(96)
        .words("qr.dirty_mib=16 qr.dirty_mib_per_s=6")
        .only_on(&["h1", "h2"]);
    let guests = [
        guest.clone(),
        Guest::new("app", 2).after("db").only_on(&["h3"]),
    ];
    cluster.run(&guests);
    let witness = cluster.witness(&guests);
    let app = cluster.copy("app");

    // Undisturbed, to know how long it lasts.
    let begun = Instant::now();
    let to = other_host(&cluster.owner("db"));
    cluster.must(&["vm", "migrate", "db", "--to", to]);
    cluster.wait("the guest at its target", LONG, |view| {
        let vm = find_vm(view, "db")?;
        let there = vm.host.as_ref().is_some_and(|host| host.as_str() == to);
        (there && vm.migration.is_none())
            .then_some(())
            .ok_or_else(|| format!("{vm:?}"))
    });
    let lasts = begun.elapsed();
    measured(
        "undisturbed migration of a busy guest",
        lasts.as_secs_f64(),
        "s",
        "long enough to be disturbed",
    );
    assert!(
        lasts > Duration::from_secs(1),
        "the migration is too short to be disturbed"
    );

    // By hand, with `QUORATE_ROUNDS=70`: cancels all over the switchover, which takes some tens of milliseconds.
    let begin = lasts.saturating_sub(Duration::from_millis(250));
    for round in 0..rounds(0) {
        let switchover = begin + Duration::from_millis(4 * round as u64);
        disturb(&cluster, Fault::Cancel, Step::Switchover, switchover);
    }
    let mut deaths = 0;
    for (number, fault) in FAULTS.into_iter().enumerate() {
        for step in [Step::Prepare, Step::Copy, Step::Switchover] {
            // From a tenth of a second before to a tenth of a second after.
            let late = lasts + Duration::from_millis(40 * number as u64);
            let switchover = late.saturating_sub(Duration::from_millis(100));
            deaths += usize::from(disturb(&cluster, fault, step, switchover));
            assert_eq!(cluster.copy("app"), app, "the dependent was touched");
        }
    }
    let reports = cluster.judge(witness);
    assert_eq!(reports[1].ranges.len(), 1, "the dependent has booted again");
    assert!(
        reports[0].ranges.len() <= 1 + deaths,
        "{deaths} restarts: {:?}",
        reports[0].ranges
    );
}

fn other_host(host: &str) -> &'static str {
    if host == "h1" { "h2" } else { "h1" }
}

/// One disturbed migration; whether the guest had to be restarted from its disk.
fn disturb(cluster: &Cluster, fault: Fault, step: Step, switchover: Duration) -> bool {
    let old = cluster.wait_one_copy("db", LONG);
    let to = other_host(&old.host);
    let begun = Instant::now();
    cluster.must(&["vm", "migrate", "db", "--to", to]);
    match step {
        Step::Prepare => {}
        Step::Copy => cluster.wait("memory being copied", LONG, |view| {
            let vm = find_vm(view, "db")?;
            let percent = vm
                .migration
                .as_ref()
                .map_or(0, |migration| migration.percent);
            (percent >= 10)
                .then_some(())
                .ok_or_else(|| format!("{vm:?}"))
        }),
        Step::Switchover => wait::pause(switchover.saturating_sub(begun.elapsed())),
    }
    strike(cluster, fault, &old.host, to);
    let one = cluster.wait_one_copy("db", LONG);
    cluster.say(&format!(
        "{fault:?} at {step:?}: {} -> {}",
        old.host, one.host
    ));
    check(fault, step, &old, &one);
    for host in [old.host.as_str(), to] {
        if matches!(fault, Fault::TargetDies | Fault::SourceDies) {
            cluster.lab.start(host).unwrap();
        }
    }
    cluster.wait_healthy();
    // Struck before its commit, the migration may begin only now that its target is back; or it is tried again.
    cluster.wait("the end of the move", LONG, |view| {
        let vm = find_vm(view, "db")?;
        (vm.migration.is_none() && !vm.move_requested)
            .then_some(())
            .ok_or_else(|| format!("{vm:?}"))
    });
    cluster.wait_ready(&["db"], LONG);
    restarted(fault, &old, &one)
}

fn strike(cluster: &Cluster, fault: Fault, from: &str, to: &str) {
    match fault {
        // It may be over already.
        Fault::Cancel => drop(cluster.quorate(&["vm", "cancel", "db"])),
        Fault::TargetDies => drop(cluster.cut_power(to)),
        Fault::SourceDies => drop(cluster.cut_power(from)),
        Fault::SourceDaemonDies => drop(cluster.lab.restart_daemon(from, true).unwrap()),
        Fault::TargetDaemonDies => drop(cluster.lab.restart_daemon(to, true).unwrap()),
        Fault::LeaderDaemonDies => {
            drop(cluster.lab.restart_daemon(&cluster.leader(), true).unwrap());
        }
    }
}

fn check(fault: Fault, step: Step, old: &Copy, one: &Copy) {
    let to = other_host(&old.host);
    match fault {
        Fault::Cancel if step != Step::Switchover => {
            assert_eq!(
                one, old,
                "a cancelled migration moved or restarted the guest"
            );
        }
        Fault::TargetDies if step != Step::Switchover => {
            assert_eq!(one, old, "the guest was not left running where it was");
        }
        // The migration went on and arrived, or was given up.
        Fault::Cancel
        | Fault::SourceDaemonDies
        | Fault::TargetDaemonDies
        | Fault::LeaderDaemonDies => {
            assert!(one == old || one.host == to, "{old:?} became {one:?}");
            if one == old {
                assert!(process::alive(old));
            }
        }
        Fault::TargetDies => assert_eq!(one.host, old.host),
        Fault::SourceDies => assert_eq!(one.host, to),
    }
}

/// The guest's memory is lost only when the host with its only copy died.
fn restarted(fault: Fault, old: &Copy, one: &Copy) -> bool {
    match fault {
        Fault::SourceDies => true,
        Fault::TargetDies => one != old,
        _ => false,
    }
}
