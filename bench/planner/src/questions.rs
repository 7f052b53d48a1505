//! How long questions take: what would happen, what is survived, what would even out load.
//!
//! Owns: the measurement and its limit. A person waits for the answer, so one question about a site of
//! 200 hosts and 5,000 VMs shall take some seconds at most (the drain of a whole host, step by step, takes longest).

use crate::site::{Site, host_name};
use crate::{Moment, ms};
use quorate_bench::Report;
use quorate_planner::{
    CapacityQuestion, Snapshot, Step, balance, capacity, forecast, plan, shortfall,
};
use quorate_state::Command;
use quorate_types::{Millis, Timestamp};
use std::process::ExitCode;

const SAMPLES: usize = 3;
/// The sites; the last one is judged.
const SITES: [(usize, usize); 3] = [(10, 100), (50, 500), (200, 5_000)];
/// What one question may take.
const LIMIT_MS: f64 = 8_000.0;

pub(crate) fn measure() -> anyhow::Result<ExitCode> {
    let mut report = Report::new();
    let mut missed = Vec::new();
    for (hosts, vms) in SITES {
        let site = at_rest(hosts, vms)?;
        for (what, samples) in questions(&site)? {
            let name = format!("{hosts} hosts x {vms} VMs, {what}");
            let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
            if least > LIMIT_MS {
                missed.push(format!("{name}: {least:.0} ms, more than {LIMIT_MS} ms"));
            }
            report.add(&name, "ms", &samples, None);
        }
    }
    report.publish("questions")?;
    for text in &missed {
        println!("missed: {text}");
    }
    Ok(match missed.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn at_rest(hosts: usize, vms: usize) -> anyhow::Result<Site> {
    let mut site = Site::new(hosts, vms)?;
    for n in 0..hosts {
        let command = Command::RecordArmed {
            host: host_name(n).parse()?,
            armed: Some(Millis(500)),
        };
        site.command(command)?;
    }
    site.start_all(|site| plan(&site.input()))?;
    Ok(site)
}

type Samples = Vec<(&'static str, Vec<f64>)>;

fn questions(site: &Site) -> anyhow::Result<Samples> {
    let mut snapshot = Snapshot::of(&site.input(), "0.1.0", Timestamp(1_000_000));
    let nodes = site.state.hosts.values().map(|host| host.node);
    snapshot.seen.voters = nodes.take(3).collect();
    let step = |fail: &[usize], drain: &[usize]| -> anyhow::Result<Step> {
        let hosts = |numbers: &[usize]| {
            let names = numbers.iter().map(|n| host_name(*n).parse());
            names.collect::<Result<_, _>>()
        };
        Ok(Step {
            fail: hosts(fail)?,
            drain: hosts(drain)?,
            ..Step::default()
        })
    };
    let (fail, drain) = (step(&[4], &[])?, step(&[], &[5])?);
    let one = CapacityQuestion {
        failures: Some(1),
        ..CapacityQuestion::default()
    };
    let foresee = |steps: &[Step]| -> anyhow::Result<()> {
        std::hint::black_box(forecast(&snapshot, steps)?);
        Ok(())
    };
    Ok(vec![
        (
            "a host fails",
            time(|| foresee(std::slice::from_ref(&fail)))?,
        ),
        (
            "a host is drained",
            time(|| foresee(std::slice::from_ref(&drain)))?,
        ),
        (
            "a host fails, then one is drained",
            time(|| foresee(&[fail.clone(), drain.clone()]))?,
        ),
        (
            "any one host fails",
            time(|| done(capacity(&site.input(), &one)))?,
        ),
        (
            "how many failures are survived",
            time(|| done(capacity(&site.input(), &CapacityQuestion::default())))?,
        ),
        (
            "what a change takes away",
            time(|| done(shortfall(&site.input(), &site.state)))?,
        ),
        ("balance", time(|| done(balance(&site.input())))?),
    ])
}

fn done<T>(answer: T) -> anyhow::Result<()> {
    std::hint::black_box(answer);
    Ok(())
}

fn time(mut ask: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    (0..SAMPLES)
        .map(|_| {
            let begun = Moment::now();
            ask()?;
            Ok(ms(begun))
        })
        .collect()
}
