//! Two hosts: a third vote lets either of them go on without the other, and never both.

use crate::harness::guest::Guest;
use crate::harness::measure::{judge_rounds, measured, rounds, seconds};
use crate::harness::{Cluster, LONG, Options, find_host, process};
use crate::t16_mirrored as mirrored;
use quorate_api::quorum::QuorumView;
use quorate_api::view::HostState;
use quorate_lab::supervisor::protocol::Who;
use quorate_lab::{Link, wait};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Rounds of cutting the pair; the 50 with `QUORATE_ROUNDS=50`.
const ROUNDS: usize = 3;
/// A cut pair must have decided by then.
const DECIDED: f64 = 5.0;

fn two() -> Cluster {
    Cluster::with(Options {
        hosts: 2,
        ..Options::default()
    })
}

fn votes(cluster: &Cluster) -> Result<QuorumView, String> {
    cluster.get(&cluster.desk(), "/api/v1/quorum")
}

/// Waits until both hosts and the witness vote and answer.
fn wait_three_votes(cluster: &Cluster) -> QuorumView {
    cluster.eventually("three votes", LONG, || {
        let view = votes(cluster)?;
        let good = view.quorate && view.votes == 3 && view.votes_up == 3 && view.survives == 1;
        good.then(|| view.clone())
            .ok_or_else(|| format!("{view:?}"))
    })
}

fn other(host: &str) -> &'static str {
    if host == "h1" { "h2" } else { "h1" }
}

/// Which hosts have a quorum and a leader, as each says itself.
fn sides(cluster: &Cluster) -> Vec<String> {
    let mut with = cluster.hosts();
    with.retain(|host| {
        let view = cluster.view_from(host);
        view.is_ok_and(|view| view.cluster.quorate && view.cluster.leader.is_some())
    });
    with
}

/// Cuts the hosts from each other, for guests too, and waits until exactly one goes on and can change things. Returns it and
/// how long that took.
fn cut_round(cluster: &Cluster, round: usize) -> (String, f64) {
    let begun = Instant::now();
    cluster.lab.cut("h1", "h2", Link::Mgmt, false).unwrap();
    let winner = cluster.eventually("exactly one side that goes on", LONG, || {
        // A side that lost its quorum still says for up to a lease that it has one: what counts is a commit.
        for host in cluster.hosts() {
            let label = format!("round=r{round}");
            let words = ["host", "label", &host, &label];
            if cluster
                .lab
                .quorate_for(&host, &words, Duration::from_secs(6))
                .is_ok()
            {
                return Ok(host);
            }
        }
        Err("neither side can change anything".to_owned())
    });
    let took = seconds(begun.elapsed());
    // Never two: the other says that it has none, and goes on saying so.
    cluster.eventually(
        "the other side to have no quorum",
        Duration::from_secs(10),
        || match sides(cluster).as_slice() {
            [_] => Ok(()),
            sides => Err(format!("{sides:?} have one, {winner} could change things")),
        },
    );
    cluster.holds("one side at most", Duration::from_secs(1), || {
        let sides = sides(cluster);
        (sides.len() < 2)
            .then_some(())
            .ok_or_else(|| format!("{sides:?}"))
    });
    let loser = other(&winner);
    cluster.say(&format!(
        "round {round}: {winner} goes on after {took:.2} s, {loser} waits"
    ));
    (winner, took)
}

fn copies_run_once(cluster: &Cluster) -> Result<(), String> {
    let copies = cluster.copies("db");
    let running = process::running(&copies);
    match running.len() {
        0 | 1 => Ok(()),
        _ => Err(format!("two copies run: {copies:?}")),
    }
}

#[test]
fn a_cut_pair_with_a_disk_witness_goes_on_at_exactly_one_side() {
    let cluster = Cluster::with(Options {
        hosts: 2,
        san: true,
        ..Options::default()
    });
    let guest = Guest::new("db", 1);
    cluster.run(std::slice::from_ref(&guest));
    let text = cluster.must(&["quorum", "show"]);
    assert!(text.contains("--witness disk --pool"), "{text}");
    let set = ["quorum", "set", "--witness", "disk", "--pool", "shared"];
    let said = cluster.must(&set);
    assert!(said.contains("3 votes with the witness"), "{said}");
    wait_three_votes(&cluster);
    cluster.say("two hosts and the disk witness vote");
    let witness = cluster.witness(std::slice::from_ref(&guest));

    let mut decided = Vec::new();
    let mut moved = 0;
    for round in 1..=rounds(ROUNDS) {
        // By turns at the leader's and at the other host.
        let leader = cluster.leader();
        let at = if round % 2 == 0 {
            leader.as_str()
        } else {
            other(&leader)
        };
        cluster.place("db", at);
        let before = cluster.copy("db");
        let (winner, took) = cut_round(&cluster, round);
        decided.push(took);
        cluster.eventually("the guest at the side that goes on", LONG, || {
            copies_run_once(&cluster)?;
            let copies = cluster.copies("db");
            let there = process::running(&copies)
                .iter()
                .any(|copy| copy.host == winner);
            there.then_some(()).ok_or_else(|| format!("{copies:?}"))
        });
        moved += usize::from(before.host != winner);
        cluster.lab.heal().unwrap();
        cluster.wait_healthy();
        wait_three_votes(&cluster);
        cluster.wait_one_copy("db", LONG);
    }
    measured(
        "cut pair: guests restarted at the other side",
        moved as f64,
        "guests",
        "none",
    );
    let mut report = quorate_bench::Report::new();
    report.add("cut pair: one side goes on", "s", &decided, None);
    report.publish("quorum").unwrap();
    judge_rounds(
        "cut pair with disk witness: one side goes on",
        &decided,
        "s",
        DECIDED,
    );
    killed(&cluster);
    paused(&cluster);
    lost_and_repaired(&cluster);
    on_a_lun(&cluster);
    in_order(&cluster);
    cluster.judge(witness);
}

/// Either host is killed: the other goes on, and the guest with it.
fn killed(cluster: &Cluster) {
    for leads in [true, false] {
        let leader = cluster.leader();
        let victim = if leads {
            leader.as_str()
        } else {
            other(&leader)
        };
        cluster.place("db", victim);
        let old = cluster.copy("db");
        let begun = cluster.cut_power(victim);
        let survivor = other(victim);
        cluster.eventually("the other host goes on", LONG, || {
            let view = cluster.view_from(survivor)?;
            let leads = view
                .cluster
                .leader
                .as_ref()
                .is_some_and(|host| host.as_str() == survivor);
            (view.cluster.quorate && leads)
                .then_some(())
                .ok_or_else(|| format!("{:?}", view.cluster))
        });
        let role = if leads { "leader" } else { "follower" };
        let quorate = seconds(process::boottime().saturating_sub(begun));
        measured(
            &format!("{role} of two killed: the other goes on"),
            quorate,
            "s",
            "none",
        );
        let new = cluster.new_copy("db", &[old], LONG);
        let started = seconds(new.started.saturating_sub(begun));
        measured(
            &format!("{role} of two killed: its guest starts"),
            started,
            "s",
            "none",
        );
        cluster.wait_ready(&["db"], LONG);
        cluster.boot(victim);
        wait_three_votes(cluster);
    }
}

/// Two hosts, a third vote, and nothing shared: the owner of a mirrored disk is killed, the other host has every record.
fn without_a_san(cluster: &Cluster) {
    let guests = [Guest::new("safe", 2).pool("own")];
    mirrored::run(cluster, &guests, "mirrored");
    let witness = cluster.witness(&guests);
    let copy = mirrored::in_step(cluster, "safe");
    let old = cluster.copy("safe");
    // So that there is something to lose.
    wait::pause(Duration::from_secs(2));
    let begun = cluster.cut_power(&old.host);
    let new = cluster.new_copy("safe", std::slice::from_ref(&old), LONG);
    assert_eq!(new.host, copy, "it starts where its copy is");
    let started = seconds(new.started.saturating_sub(begun));
    measured(
        "mirrored disk on two hosts, owner killed -> QEMU started",
        started,
        "s",
        "none",
    );
    cluster.wait_ready(&["safe"], LONG);
    cluster.boot(&old.host);
    wait_three_votes(cluster);
    mirrored::in_step(cluster, "safe");
    let image = mirrored::own(cluster, &cluster.owner("safe")).join("safe.raw");
    let reports = cluster.judge_at(witness, |_| image.clone());
    assert!(reports[0].ranges.len() > 1, "{:?}", reports[0]);
}

/// The leader's daemon, which runs the witness, stands still: the other takes both over, and the late one finds that out.
fn paused(cluster: &Cluster) {
    let leader = cluster.leader();
    let rest = other(&leader);
    cluster.lab.pause(&leader, Who::Daemon).unwrap();
    cluster.eventually("the other host goes on", LONG, || {
        let words = ["host", "label", rest, "paused=peer"];
        let limit = Duration::from_secs(6);
        let said = cluster.lab.quorate_for(rest, &words, limit);
        said.map(drop).map_err(|error| error.to_string())
    });
    cluster.lab.resume(&leader, Who::Daemon).unwrap();
    cluster.wait_healthy();
    wait_three_votes(cluster);
    cluster.wait_one_copy("db", LONG);
}

/// The witness's log is damaged beyond use: the hosts go on, say so, and make a new one.
fn lost_and_repaired(cluster: &Cluster) {
    let before = wait_three_votes(cluster);
    let node = before.voters.last().unwrap().node;
    let area = cluster.lab.site().shared_dir().join(".quorate-witness");
    let away = area.join("away");
    std::fs::rename(area.join(node.to_string()), &away).unwrap();
    cluster.eventually(
        "a witness that is told to be lost, or replaced",
        LONG,
        || {
            let view = votes(cluster)?;
            let changed = view
                .voters
                .last()
                .is_some_and(|voter| voter.node != node || !voter.up);
            changed.then_some(()).ok_or_else(|| format!("{view:?}"))
        },
    );
    cluster.must(&["host", "label", "h1", "still=works"]);
    let begun = Instant::now();
    let after = wait_three_votes(cluster);
    assert_ne!(
        after.voters.last().unwrap().node,
        node,
        "a lost log must not come back under its number"
    );
    measured(
        "lost disk witness: replaced and voting",
        seconds(begun.elapsed()),
        "s",
        "none",
    );
    let events = cluster.must(&["events", "-n", "200"]);
    assert!(events.contains("begins anew"), "{events}");
    std::fs::remove_dir_all(&away).unwrap_or_default();
    cluster.wait_one_copy("db", LONG);
}

/// The witness moves onto a LUN of the SAN: the same holds, and nobody else gets the LUN.
fn on_a_lun(cluster: &Cluster) {
    let san = cluster.lab.san().unwrap();
    san.create_lun("small", 16 << 20).unwrap();
    san.create_lun("votes", 512 << 20).unwrap();
    let before = wait_three_votes(cluster).voters.last().unwrap().node;
    let set = |disk: &[&str]| {
        let words = ["quorum", "set", "--witness", "disk", "--pool", "san"];
        cluster.quorate(&[&words, disk].concat())
    };
    for (disk, text) in [
        (vec![], "--disk NAME"),
        (vec!["--disk", "small"], "needs 512 MiB"),
        (vec!["--disk", "nothing"], "cannot be used"),
    ] {
        let said = set(&disk).unwrap_err();
        assert!(said.contains(text), "{disk:?}: {said}");
    }
    let begun = Instant::now();
    let said = set(&["--disk", "votes"]).unwrap();
    assert!(said.contains("disk witness on votes of pool san"), "{said}");
    let node = wait_three_votes(cluster).voters.last().unwrap().node;
    assert!(node > before, "another log is another voter");
    measured(
        "disk witness on a LUN: chosen and voting",
        seconds(begun.elapsed()),
        "s",
        "none",
    );
    let image = san.lun("votes").unwrap().file;
    let taken = cluster.apply_text(&format!(
        "{}vms:\n  greedy: {{cpus: 1, memory: 64 MiB, disks: [{{pool: san, image: votes}}]}}\n",
        cluster.pools()
    ));
    let taken = taken.unwrap_err();
    assert!(taken.contains("the disk witness's"), "{taken}");

    let leader = cluster.leader();
    cluster.place("db", other(&leader));
    let (winner, took) = cut_round(cluster, 100);
    assert!(took < DECIDED, "decided after {took:.1} s");
    cluster.eventually("the guest at the side that goes on", LONG, || {
        copies_run_once(cluster)?;
        let copies = cluster.copies("db");
        let there = process::running(&copies)
            .iter()
            .any(|copy| copy.host == winner);
        there.then_some(()).ok_or_else(|| format!("{copies:?}"))
    });
    cluster.lab.heal().unwrap();
    cluster.wait_healthy();
    wait_three_votes(cluster);
    cluster.wait_one_copy("db", LONG);
    // Its holder stands still: the other takes it over, from one slot of the LUN into the other.
    paused(cluster);
    let text = std::fs::read(&image).unwrap();
    assert!(text.starts_with(b"quorate disk witness 1"), "its title");
    const MIB: usize = 1 << 20;
    for slot in [MIB, 64 * MIB] {
        assert_eq!(&text[slot..slot + 8], b"QRWITN01", "a slot at {slot}");
    }
    let after = wait_three_votes(cluster).voters.last().unwrap().node;
    assert_eq!(after, node, "the log went with it");
}

/// A host that is stopped in order takes nobody along, and the last one keeps the cluster even without the witness.
fn in_order(cluster: &Cluster) {
    let leader = cluster.leader();
    let stays = other(&leader);
    cluster.place("db", stays);
    let pid = cluster.programs(&leader, "serve");
    let [pid] = pid.as_slice() else {
        panic!("{pid:?}")
    };
    // The supervisor would start it again: its power goes off once it has left.
    assert!(
        std::process::Command::new("kill")
            .arg(pid.to_string())
            .status()
            .unwrap()
            .success()
    );
    cluster.eventually("the daemon has left", LONG, || {
        let log = cluster.log_tail(&leader, 400);
        log.contains("the others know that this host leaves")
            .then_some(())
            .ok_or(log)
    });
    cluster.lab.kill(&leader).unwrap();
    cluster.eventually("the last one votes alone", LONG, || {
        let view: QuorumView = cluster.get(stays, "/api/v1/quorum")?;
        let alone = view.quorate && view.votes == 1;
        alone.then_some(()).ok_or_else(|| format!("{view:?}"))
    });
    cluster.wait_ready(&["db"], LONG);
    cluster.boot(&leader);
    wait_three_votes(cluster);
}

/// The process of a remote witness on the lab's client machine.
struct Remote(Child);

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn remote(cluster: &Cluster, words: &[&str]) -> std::process::Command {
    let dir = cluster.lab.site().dir.join("witness");
    let mut command = cluster.lab.command("client", env!("CARGO_BIN_EXE_quorate"));
    command.args(words).env("QUORATE_DIR", dir);
    command
}

fn serve_remote(cluster: &Cluster) -> Remote {
    let log = cluster.lab.site().dir.join("witness.log");
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .unwrap();
    let mut command = remote(cluster, &["witness", "serve"]);
    Remote(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap(),
    )
}

#[test]
fn a_remote_witness_keeps_either_of_two_hosts_going() {
    let cluster = two();
    let guest = Guest::new("db", 1);
    cluster.run(std::slice::from_ref(&guest));
    let line = cluster.must(&["quorum", "set", "--witness", "remote"]);
    let token = line
        .split_whitespace()
        .find(|word| word.len() > 60)
        .unwrap()
        .to_owned();
    let address = format!(
        "{}:7420",
        cluster.lab.site().cluster_address("client").unwrap()
    );
    let join = [
        "witness",
        "join",
        &token,
        "--name",
        "w1",
        "--address",
        &address,
    ];
    let output = remote(&cluster, &join).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut witness = serve_remote(&cluster);
    wait_three_votes(&cluster);
    cluster.say("two hosts and the remote witness vote");
    let again = remote(&cluster, &join).output().unwrap();
    assert!(!again.status.success(), "a token is good once");
    let as_host = remote(&cluster, &["serve"]).output().unwrap();
    assert!(String::from_utf8_lossy(&as_host.stderr).contains("witness serve"));
    assert_eq!(cluster.view().hosts.len(), 2, "a witness is no host");

    killed(&cluster);
    without_a_san(&cluster);

    // Without the witness both go on, and say so; it comes back with what it knew.
    drop(witness);
    let text = cluster.wait("a problem that names the witness", LONG, |view| {
        let found = view
            .cluster
            .problems
            .iter()
            .find(|problem| problem.text.contains("w1"));
        found
            .map(|problem| problem.text.clone())
            .ok_or_else(|| format!("{:?}", view.cluster))
    });
    assert!(text.contains("quorate witness serve"), "{text}");
    cluster.must(&["host", "label", "h1", "still=works"]);
    witness = serve_remote(&cluster);
    wait_three_votes(&cluster);

    // The hosts hear each other through the witness: nothing moves.
    let copy = cluster.copy("db");
    cluster.lab.cut("h1", "h2", Link::Mgmt, false).unwrap();
    wait::pause(Duration::from_secs(4));
    let view = cluster.view();
    for host in ["h1", "h2"] {
        assert_eq!(
            find_host(&view, host).unwrap().state,
            HostState::Up,
            "{view:?}"
        );
    }
    assert_eq!(cluster.wait_one_copy("db", LONG), copy, "it was touched");
    cluster.lab.heal().unwrap();
    cluster.wait_healthy();

    // It is given up: one of the two votes alone, as before.
    cluster.must(&["quorum", "set", "--witness", "none"]);
    cluster.eventually("one vote", LONG, || {
        let view = votes(&cluster)?;
        (view.votes == 1)
            .then_some(())
            .ok_or_else(|| format!("{view:?}"))
    });
    drop(witness);
    cluster.must(&["host", "label", "h1", "still=alone"]);
}
