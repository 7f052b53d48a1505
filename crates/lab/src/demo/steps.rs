//! The steps of the tour.

use super::stage::{MANIFEST, Outcome, SETTLE, Stage, milliseconds, now_ms};
use crate::{Link, wait};
use anyhow::{Context as _, Result};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A short outage: every lease outlives it.
const SHORT_CUT: Duration = Duration::from_millis(1200);
/// About a lease (2 s, frozen 0.25 s before its end): guests freeze, nobody has a proof yet.
const LEASE_CUT: Duration = Duration::from_millis(2150);
/// A guest that is silent for longer than this was frozen, not slow.
const FROZEN_MS: f64 = 250.0;

/// One step.
pub(super) struct Step {
    pub(super) title: &'static str,
    /// Without it the others make no sense.
    pub(super) foundation: bool,
    pub(super) run: fn(&mut Stage) -> Result<Outcome>,
}

const fn step(title: &'static str, run: fn(&mut Stage) -> Result<Outcome>) -> Step {
    Step {
        title,
        foundation: false,
        run,
    }
}

/// All of them, in order.
pub(super) const STEPS: &[Step] = &[
    Step {
        title: "form a cluster of three hosts",
        foundation: true,
        run: form,
    },
    Step {
        title: "apply examples/three-tier.yaml",
        foundation: true,
        run: apply,
    },
    step("live-migrate db under a 1 ms pinger", migrate),
    step("drain a host", drain),
    step("cut a host for 1.2 s", cut_short),
    step(
        "cut a host for about a lease: freeze and thaw",
        cut_about_a_lease,
    ),
    step("cut a host for longer: move, end the frozen copy", cut_long),
    step("kill a host", kill),
    step("restart every daemon", restart),
    step("judge every guest's disk", judge_all),
];

fn form(stage: &mut Stage) -> Result<Outcome> {
    let begun = Instant::now();
    stage.say("init, two tokens, two joins");
    stage.lab.form_cluster("demo", None)?;
    let view = stage.view()?;
    Ok(Outcome {
        good: view.cluster.quorate && view.hosts.len() == 3,
        measured: format!(
            "{} hosts, leader {}, in {:.1} s",
            view.hosts.len(),
            view.cluster.leader.as_deref().unwrap_or("unknown"),
            begun.elapsed().as_secs_f64()
        ),
    })
}

fn apply(stage: &mut Stage) -> Result<Outcome> {
    let begun = Instant::now();
    let path = stage.lab.site().dir.join("three-tier.yaml");
    std::fs::write(&path, MANIFEST).context("cannot write the manifest")?;
    stage.say("waiting until db, app, web1 and web2 are ready");
    stage.run(&[
        "apply",
        "--file",
        &path.to_string_lossy(),
        "--wait",
        "--timeout",
        "4m",
    ])?;
    let took = begun.elapsed();
    let view = stage.wait_well(&stage.speaker()?)?;
    stage.collect()?;
    let events = stage.events_after(0)?;
    let started = |vm: &str| {
        let subject = format!("vm/{vm}");
        let first = events
            .iter()
            .find(|event| event.kind == "start" && event.subject == subject);
        first.map(|event| event.at)
    };
    let waited = started("app")
        .zip(started("db"))
        .map(|(app, db)| app.saturating_sub(db));
    let page = stage.run(&["status"])?;
    stage.quiet();
    println!("\n{page}\n");
    let apart = view.vm("web1").map(|vm| &vm.host) != view.vm("web2").map(|vm| &vm.host);
    Ok(Outcome {
        good: apart && waited.is_some_and(|waited| waited > 500),
        measured: format!(
            "4 VMs ready in {:.1} s; app was started {:.1} s after db, when db was ready; web1 and web2 {}",
            took.as_secs_f64(),
            Duration::from_millis(waited.unwrap_or(0)).as_secs_f64(),
            if apart { "apart" } else { "NOT apart" }
        ),
    })
}

fn migrate(stage: &mut Stage) -> Result<Outcome> {
    let (before, from) = (stage.boots()?, stage.owner("db")?);
    let pinger = stage.pinger("db")?;
    stage.say("moving db");
    stage.run(&["vm", "migrate", "db", "--wait", "--timeout", "2m"])?;
    // The first packets from the new place belong to the blackout.
    wait::pause(Duration::from_millis(500));
    let pings = pinger.finish()?;
    let (after, to) = (stage.boots()?, stage.owner("db")?);
    let same = before == after;
    Ok(Outcome {
        good: same && from != to && pings.received > 0,
        measured: format!(
            "{from} -> {to}, blackout {:.0} ms, {} of {} datagrams lost (the pinger itself was up to {:.0} ms late); {}",
            milliseconds(pings.longest_gap_us),
            pings.sent.saturating_sub(pings.received),
            pings.sent,
            milliseconds(pings.sender_gap_us),
            if same {
                "no guest restarted"
            } else {
                "A GUEST RESTARTED"
            }
        ),
    })
}

fn drain(stage: &mut Stage) -> Result<Outcome> {
    let view = stage.view()?;
    let most = view
        .hosts
        .iter()
        .max_by_key(|host| view.vms_on(&host.name).len());
    let host = most.context("there is no host")?.name.clone();
    let moved = view.vms_on(&host).len();
    let before = stage.boots()?;
    let pingers = stage.ping_all()?;
    let begun = Instant::now();
    stage.say(format!("draining {host} with {moved} VMs"));
    stage.run(&["host", "drain", &host, "--wait", "--timeout", "4m"])?;
    let took = begun.elapsed();
    wait::pause(Duration::from_millis(500));
    let (gap, whose) = pingers.finish()?;
    let left = stage.view()?.vms_on(&host).len();
    let same = before == stage.boots()?;
    stage.run(&["host", "resume", &host])?;
    Ok(Outcome {
        good: same && left == 0 && moved > 0,
        measured: format!(
            "{moved} VMs left {host} in {:.1} s, {left} remained; longest silence {gap:.0} ms ({whose}); {}",
            took.as_secs_f64(),
            if same {
                "nothing stopped"
            } else {
                "A GUEST RESTARTED"
            }
        ),
    })
}

/// Cuts a follower from the cluster's network for a while. The guests' network stays: it shows what the guests do.
fn cut_for(stage: &Stage, span: Duration) -> Result<Cut> {
    let (host, guest) = stage.follower_with_guest()?;
    let places = |stage: &Stage| -> Result<BTreeMap<String, (Option<String>, u64)>> {
        let vms = stage.view()?.vms;
        Ok(vms
            .into_iter()
            .map(|vm| (vm.name, (vm.host, vm.epoch)))
            .collect())
    };
    let (boots, before) = (stage.boots()?, places(stage)?);
    let pinger = stage.pinger(guest)?;
    stage.say(format!("{host} is cut off"));
    wait::pause(Duration::from_millis(300));
    stage.lab.isolate(&host, Link::Mgmt)?;
    wait::pause(span);
    stage.lab.heal()?;
    stage.say("mended");
    stage.wait_well(&stage.speaker()?)?;
    wait::pause(Duration::from_millis(500));
    Ok(Cut {
        gap_ms: milliseconds(pinger.finish()?.longest_gap_us),
        untouched: boots == stage.boots()? && before == places(stage)?,
        host,
        guest,
    })
}

struct Cut {
    host: String,
    guest: &'static str,
    gap_ms: f64,
    /// No guest was moved or restarted.
    untouched: bool,
}

impl Cut {
    fn measured(&self) -> String {
        format!(
            "{} cut off; longest silence of {} there {:.0} ms; {}",
            self.host,
            self.guest,
            self.gap_ms,
            if self.untouched {
                "nothing moved or restarted"
            } else {
                "A GUEST WAS MOVED OR RESTARTED"
            }
        )
    }
}

fn cut_short(stage: &mut Stage) -> Result<Outcome> {
    let cut = cut_for(stage, SHORT_CUT)?;
    Ok(Outcome {
        good: cut.untouched && cut.gap_ms < FROZEN_MS,
        measured: cut.measured(),
    })
}

fn cut_about_a_lease(stage: &mut Stage) -> Result<Outcome> {
    let cut = cut_for(stage, LEASE_CUT)?;
    Ok(Outcome {
        good: cut.untouched && cut.gap_ms > FROZEN_MS,
        measured: cut.measured(),
    })
}

fn cut_long(stage: &mut Stage) -> Result<Outcome> {
    let (host, _) = stage.follower_with_guest()?;
    let view = stage.view()?;
    let victims: Vec<String> = view.vms_on(&host).into_iter().map(str::to_owned).collect();
    let total = view.vms.len();
    let other = stage.lab.site().hosts.iter().find(|name| **name != host);
    let other = other.context("there is no other host")?.clone();
    let last = stage.last_event()?;
    stage.lab.isolate(&host, Link::Mgmt)?;
    let cut_at = now_ms();
    stage.say(format!(
        "{host} is cut off; waiting for {} elsewhere",
        victims.join(", ")
    ));
    stage
        .lab
        .wait_status_for(&other, "the VMs run elsewhere", SETTLE, |view| {
            victims.iter().all(|name| {
                view.vm(name).is_some_and(|vm| {
                    vm.host.as_deref().is_some_and(|now| now != host)
                        && vm.state == "running"
                        && vm.ready
                })
            })
        })?;
    let copies = stage.copies()?;
    stage.lab.heal()?;
    stage.say("mended; the frozen copies must end");
    wait::until(
        "the end of the frozen copies",
        SETTLE,
        Duration::from_millis(100),
        || {
            stage
                .copies()
                .is_ok_and(|copies| copies == total)
                .then_some(())
        },
    )?;
    stage.wait_well(&stage.speaker()?)?;
    let recovery = Recovery::read(stage, last, cut_at, &victims)?;
    let (records, wrong) = stage.check_records()?;
    Ok(Outcome {
        good: wrong.is_empty() && recovery.first_start_ms.is_some(),
        measured: format!(
            "{host} cut off: {}; {} frozen copies ended after the mend; {}",
            recovery.text(),
            copies.saturating_sub(total),
            judged(records, &wrong)
        ),
    })
}

/// What the events say about VMs that were started elsewhere.
struct Recovery {
    first_start_ms: Option<u64>,
    proof: String,
    count: usize,
}

impl Recovery {
    fn read(stage: &Stage, after: u64, since_ms: u64, victims: &[String]) -> Result<Self> {
        let events = stage.events_after(after)?;
        let mine = |subject: &str| victims.iter().any(|name| subject == format!("vm/{name}"));
        let of = |kind: &'static str| {
            events
                .iter()
                .filter(move |event| event.kind == kind && mine(&event.subject))
        };
        let proof = of("release")
            .next()
            .map_or("NO PROOF IN THE EVENTS", |event| &event.text);
        // `release db (h1 by lease expired): why` - the proof is in the brackets.
        let inner = proof
            .split_once('(')
            .and_then(|(_, rest)| rest.split_once(')'));
        Ok(Self {
            first_start_ms: of("start")
                .map(|event| event.at.saturating_sub(since_ms))
                .min(),
            proof: inner.map_or(proof, |(proof, _)| proof).to_owned(),
            count: victims.len(),
        })
    }

    fn text(&self) -> String {
        match self.first_start_ms {
            Some(ms) => format!(
                "first start elsewhere after {:.2} s, {} VMs, proof: {}",
                Duration::from_millis(ms).as_secs_f64(),
                self.count,
                self.proof
            ),
            None => "NO START IN THE EVENTS".to_owned(),
        }
    }
}

fn judged(records: u64, wrong: &[String]) -> String {
    match wrong.first() {
        None => format!("{records} acknowledged guest writes, none lost, one writer at a time"),
        Some(first) => format!("{} FINDINGS in the disks, the first: {first}", wrong.len()),
    }
}

fn kill(stage: &mut Stage) -> Result<Outcome> {
    let host = stage.owner("db")?;
    let view = stage.view()?;
    let led = view.cluster.leader.as_deref() == Some(&host);
    let victims: Vec<String> = view.vms_on(&host).into_iter().map(str::to_owned).collect();
    let other = stage.lab.site().hosts.iter().find(|name| **name != host);
    let other = other.context("there is no other host")?.clone();
    let last = stage.last_event()?;
    let killed_at = now_ms();
    stage.lab.kill(&host)?;
    let begun = Instant::now();
    stage.say(format!(
        "{host} is dead; waiting for {}",
        victims.join(", ")
    ));
    stage
        .lab
        .wait_status_for(&other, "all VMs are ready again", SETTLE, |view| {
            view.cluster.quorate
                && view.vms.iter().all(|vm| {
                    vm.state == "running" && vm.ready && vm.host.as_deref() != Some(host.as_str())
                })
        })?;
    let ready = begun.elapsed();
    let recovery = Recovery::read(stage, last, killed_at, &victims)?;
    let (records, wrong) = stage.check_records()?;
    stage.say(format!("{host} comes back"));
    stage.lab.start(&host)?;
    stage.wait_well(&other)?;
    Ok(Outcome {
        good: wrong.is_empty() && recovery.first_start_ms.is_some(),
        measured: format!(
            "{host}{} killed: {}, all ready after {:.1} s; {}",
            if led { " (the leader)" } else { "" },
            recovery.text(),
            ready.as_secs_f64(),
            judged(records, &wrong)
        ),
    })
}

fn restart(stage: &mut Stage) -> Result<Outcome> {
    let before = stage.boots()?;
    let pingers = stage.ping_all()?;
    let begun = Instant::now();
    for host in stage.lab.site().hosts.clone() {
        stage.say(format!("the daemon of {host}"));
        stage.lab.restart_daemon(&host, false)?;
        stage.wait_well(&host)?;
    }
    let took = begun.elapsed();
    let (gap, whose) = pingers.finish()?;
    let same = before == stage.boots()?;
    Ok(Outcome {
        good: same && gap < FROZEN_MS,
        measured: format!(
            "three restarts in {:.1} s; longest silence {gap:.0} ms ({whose}); {}",
            took.as_secs_f64(),
            if same {
                "no guest restarted"
            } else {
                "A GUEST RESTARTED"
            }
        ),
    })
}

fn judge_all(stage: &mut Stage) -> Result<Outcome> {
    let copies = stage.copies()?;
    let (records, wrong) = stage.check_records()?;
    Ok(Outcome {
        good: wrong.is_empty() && copies == 4,
        measured: format!("{}; {copies} guests running", judged(records, &wrong)),
    })
}
