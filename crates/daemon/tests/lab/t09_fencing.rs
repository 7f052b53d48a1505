//! Hosts without watchdogs: their power has to be cut, and when that cannot be, a person decides.

use crate::harness::guest::Guest;
use crate::harness::measure::{measured, seconds};
use crate::harness::{Cluster, LONG, Options};
use quorate_lab::Link;
use quorate_lab::fence_agent::Bmc;
use quorate_lab::supervisor::protocol::Power;
use std::fmt::Write as _;
use std::time::Duration;

fn with_fencing(hosts: u32) -> Cluster {
    let mut settings = String::from("  fencing:\n");
    for number in 1..=hosts {
        let _ = writeln!(
            settings,
            "    h{number}: [{{agent: fence_lab, options: {{ip: \"{{dir}}\", plug: h{number}}}}}]"
        );
    }
    Cluster::with(Options {
        hosts,
        settings,
        watchdog: false,
        san: false,
        environment: Vec::new(),
    })
}

#[test]
fn power_fencing_and_an_operators_word() {
    let cluster = with_fencing(3);
    let guest = Guest::new("db", 1);
    cluster.run(std::slice::from_ref(&guest));
    let witness = cluster.witness(std::slice::from_ref(&guest));
    fenced(&cluster);
    unreachable(&cluster);
    by_command(&cluster);
    cluster.judge(witness);
}

/// A host that is cut off, not dead: only its power switch gives a proof.
fn fenced(cluster: &Cluster) {
    let victim = cluster.follower();
    cluster.place("db", &victim);
    let old = cluster.copy("db");
    let begun = crate::harness::process::boottime();
    cluster.lab.isolate(&victim, Link::All).unwrap();
    let new = cluster.new_copy("db", &[old], Duration::from_secs(30));
    measured(
        "power fencing: cut cable to guest start elsewhere",
        seconds(new.started.saturating_sub(begun)),
        "s",
        "none",
    );
    assert_eq!(
        cluster.status(&victim).power,
        Power::Off,
        "it was started without power-off"
    );
    cluster.wait_ready(&["db"], LONG);
    let why = cluster.why("db");
    assert!(
        why.contains("power-off") && why.contains("fence_lab"),
        "{why}"
    );
    cluster.lab.heal().unwrap();
    cluster.boot(&victim);
}

/// The power switch does not answer: it is said what is missing, nothing starts, a person's word is enough.
fn unreachable(cluster: &Cluster) {
    let victim = cluster.follower();
    cluster.place("db", &victim);
    let bmc = Bmc {
        unreachable: true,
        ..Bmc::default()
    };
    bmc.set(cluster.lab.site(), &victim).unwrap();
    let old = cluster.copy("db");
    cluster.cut_power(&victim);
    let said = cluster.wait("a problem that says what is missing", LONG, |view| {
        let texts: Vec<&str> = view
            .cluster
            .problems
            .iter()
            .map(|problem| problem.text.as_str())
            .collect();
        let text = texts.join("\n");
        let tells = text.contains("confirm-dead") && text.contains("fence_lab");
        tells.then_some(text.clone()).ok_or(text)
    });
    cluster.say(&format!("power switch unreachable: {said}"));
    let page = cluster.must(&["status"]);
    assert!(page.contains("confirm-dead"), "{page}");
    cluster.holds(
        "nothing starts without a proof",
        Duration::from_secs(3),
        || {
            let copies = cluster.copies("db");
            copies
                .iter()
                .all(|copy| *copy == old)
                .then_some(())
                .ok_or_else(|| format!("{copies:?}"))
        },
    );
    // Asked without a terminal it refuses; with --yes it is believed.
    let error = cluster
        .quorate(&["host", "confirm-dead", &victim])
        .unwrap_err();
    assert!(error.contains("--yes"), "{error}");
    cluster.must(&["host", "confirm-dead", &victim, "--yes"]);
    let new = cluster.new_copy("db", &[old], Duration::from_secs(15));
    assert_ne!(new.host, victim);
    cluster.wait_ready(&["db"], LONG);
    let why = cluster.why("db");
    assert!(why.contains("operator-confirmed"), "{why}");
    Bmc::default().set(cluster.lab.site(), &victim).unwrap();
    cluster.boot(&victim);
}

/// `host fence` cuts the power of a host that still runs.
fn by_command(cluster: &Cluster) {
    let victim = cluster.follower();
    cluster.place("db", &victim);
    let old = cluster.copy("db");
    let said = cluster.must(&["host", "fence", &victim]);
    cluster.say(&format!("host fence: {said}"));
    assert_eq!(cluster.status(&victim).power, Power::Off);
    let new = cluster.new_copy("db", &[old], Duration::from_secs(15));
    assert_ne!(new.host, victim);
    cluster.wait_ready(&["db"], LONG);
    cluster.boot(&victim);
}

/// Two hosts whose power switches are slow lose each other: one of them survives.
#[test]
fn two_hosts_with_slow_switches_never_kill_each_other() {
    let cluster = with_fencing(2);
    let guests = [Guest::new("a", 1), Guest::new("b", 2)];
    cluster.run(&guests);
    cluster.place("a", "h1");
    cluster.place("b", "h2");
    let witness = cluster.witness(&guests);
    for host in ["h1", "h2"] {
        let bmc = Bmc {
            delay_ms: 2000,
            ..Bmc::default()
        };
        bmc.set(cluster.lab.site(), host).unwrap();
    }
    cluster.lab.cut("h1", "h2", Link::All, false).unwrap();
    let off = |host: &str| cluster.status(host).power != Power::On;
    let victim = cluster.eventually("one host to be fenced", LONG, || {
        let gone: Vec<&str> = ["h1", "h2"].into_iter().filter(|host| off(host)).collect();
        match gone.as_slice() {
            [one] => Ok((*one).to_owned()),
            other => Err(format!("{other:?}")),
        }
    });
    // Longer than a fence device takes with its confirmation.
    cluster.holds("one host survives", Duration::from_secs(8), || {
        let both = off("h1") && off("h2");
        (!both)
            .then_some(())
            .ok_or_else(|| "both were killed".to_owned())
    });
    cluster.wait_ready(&["a", "b"], LONG);
    measured(
        "two hosts with slow fence agents cut apart: hosts killed",
        1.0,
        "host",
        "never both",
    );
    for host in ["h1", "h2"] {
        Bmc::default().set(cluster.lab.site(), host).unwrap();
    }
    cluster.lab.heal().unwrap();
    cluster.boot(&victim);
    cluster.judge(witness);
}
