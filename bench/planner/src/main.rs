//! How long the planner takes, on synthetic sites.
//!
//! ```text
//! quorate-planner-bench measure               table and $QUORATE_BENCH_DIR/planner.json
//! quorate-planner-bench questions             the same for questions: questions.json
//! quorate-planner-bench site --hosts 200 --vms 5000 [--cib]   the site itself
//! quorate-planner-bench again --hosts 200 --vms 5000 [--cold]  one plan over and over, for a profiler
//! ```
//! Owns: the generator of sites and the measurement. Must not: judge; it says what was asked for
//! beside what was measured, and ends with status 1 where that was missed.

mod cib;
mod questions;
mod site;
mod work;

use clap::{Parser, Subcommand};
use quorate_bench::Report;
use quorate_planner::{checked, plan, waiting};
use site::Site;
use std::process::{Command, ExitCode};
use std::time::Instant;

/// Samples of each figure.
const SAMPLES: usize = 5;
/// Samples of what takes long.
const LONG_SAMPLES: usize = 3;
/// The largest site that is given to `crm_simulate`.
const PEER_VMS: usize = 500;
/// From here on the kernel's count of ticks is exact enough.
const TICKS_MS: f64 = 40.0;
/// Sites with their limits in milliseconds: one host down, cold start.
const SITES: [(usize, usize, f64, f64); 4] = [
    (10, 100, 2.0, 2.0),
    (50, 500, 150.0, 10_000.0),
    (200, 5_000, 150.0, 10_000.0),
    (1_000, 20_000, 1_000.0, 10_000.0),
];

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure, and print a table.
    Measure,
    /// Measure how long questions take.
    Questions,
    /// Make one plan over and over, for a profiler.
    Again {
        /// Hosts.
        #[arg(long, default_value_t = 200)]
        hosts: usize,
        /// VMs.
        #[arg(long, default_value_t = 5_000)]
        vms: usize,
        /// A cold start instead of a host that is down.
        #[arg(long)]
        cold: bool,
        /// How often.
        #[arg(long, default_value_t = 50)]
        times: usize,
    },
    /// Print a site: its manifest as JSON, or a Pacemaker configuration.
    Site {
        /// Hosts.
        #[arg(long, default_value_t = 10)]
        hosts: usize,
        /// VMs.
        #[arg(long, default_value_t = 100)]
        vms: usize,
        /// As a Pacemaker configuration.
        #[arg(long)]
        cib: bool,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().command {
        Task::Site { hosts, vms, cib } => {
            let text = if cib {
                cib::write(hosts, vms)?
            } else {
                serde_json::to_string_pretty(&site::manifest(hosts, vms))?
            };
            println!("{text}");
            Ok(ExitCode::SUCCESS)
        }
        Task::Measure => measure(),
        Task::Questions => questions::measure(),
        Task::Again {
            hosts,
            vms,
            cold,
            times,
        } => again(hosts, vms, cold, times),
    }
}

fn again(hosts: usize, vms: usize, cold: bool, times: usize) -> anyhow::Result<ExitCode> {
    let mut site = Site::new(hosts, vms)?;
    if !cold {
        site.start_all(|site| plan(&site.input()))?;
        site.kill(1)?;
    }
    let begun = Moment::now();
    repeat(&site, times);
    println!("{:.2} ms each", ms(begun) / times.max(1) as f64);
    Ok(ExitCode::SUCCESS)
}

/// A function of its own: its name is what a profiler is told to look at (`--toggle-collect`).
#[inline(never)]
fn repeat(site: &Site, times: usize) {
    for _ in 0..times {
        std::hint::black_box(plan(&site.input()));
    }
}

/// What a site took, in milliseconds.
struct Times {
    /// The first plan of a cold start.
    cold: Vec<f64>,
    /// All plans until everything runs.
    cold_all: Vec<f64>,
    /// A host has died.
    down: Vec<f64>,
    /// The same with the linter's second look.
    linted: Vec<f64>,
    /// Why each VM waits, after the death.
    waiting: Vec<f64>,
    /// Everything that a plan rests on is looked at once, and nothing is done with it.
    walk: Vec<f64>,
}

/// A point in time: by the processor's time of this thread where the kernel tells it. The planner
/// does nothing but compute, so on a quiet machine the two are the same, and on a busy one this is
/// the one that says something.
#[derive(Clone, Copy)]
struct Moment(Instant, Option<u64>);

impl Moment {
    fn now() -> Self {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
        let spent = text.and_then(|text| text.split(' ').next()?.parse().ok());
        Self(Instant::now(), spent)
    }
}

fn ms(since: Moment) -> f64 {
    let Moment(now, spent) = Moment::now();
    let wall = now.duration_since(since.0).as_secs_f64() * 1000.0;
    let spent = since
        .1
        .zip(spent)
        .map(|(before, after)| after.saturating_sub(before) as f64 / 1e6);
    // The kernel counts in ticks: what is short is measured by the clock.
    spent.filter(|spent| *spent >= TICKS_MS).unwrap_or(wall)
}

fn times(hosts: usize, vms: usize) -> anyhow::Result<Times> {
    let mut site = Site::new(hosts, vms)?;
    let sample = |site: &Site| {
        let begun = Moment::now();
        std::hint::black_box(plan(&site.input()));
        ms(begun)
    };
    let cold = (0..SAMPLES).map(|_| sample(&site)).collect();
    let mut cold_all = Vec::new();
    for _ in 0..LONG_SAMPLES {
        let mut copy = site.clone();
        let mut spent = 0.0;
        copy.start_all(|site| {
            let begun = Moment::now();
            let made = plan(&site.input());
            spent += ms(begun);
            made
        })?;
        cold_all.push(spent);
    }
    site.start_all(|site| plan(&site.input()))?;
    site.kill(1)?;
    let down = (0..SAMPLES).map(|_| sample(&site)).collect();
    let mut linted = Vec::new();
    for _ in 0..SAMPLES {
        let begun = Moment::now();
        let (_, broken) = checked(&site.input(), plan(&site.input()));
        linted.push(ms(begun));
        anyhow::ensure!(broken.is_empty(), "the linter found {broken:?}");
    }
    let time = |what: &dyn Fn(&Site)| {
        let begun = Moment::now();
        what(&site);
        ms(begun)
    };
    let waits = |site: &Site| drop(std::hint::black_box(waiting(&site.input())));
    let walks = |site: &Site| {
        std::hint::black_box(site.walk());
    };
    Ok(Times {
        cold,
        cold_all,
        down,
        linted,
        waiting: (0..SAMPLES).map(|_| time(&waits)).collect(),
        walk: (0..SAMPLES).map(|_| time(&walks)).collect(),
    })
}

fn measure() -> anyhow::Result<ExitCode> {
    let mut report = Report::new();
    let mut missed = Vec::new();
    for (hosts, vms, down_limit, cold_limit) in SITES {
        let times = times(hosts, vms)?;
        let name = |what: &str| format!("{hosts} hosts x {vms} VMs, {what}");
        let mut judge = |what: &str, samples: &[f64], limit: f64| {
            let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
            if least > limit {
                missed.push(format!(
                    "{}: {least:.1} ms, more than {limit} ms",
                    name(what)
                ));
            }
        };
        judge("one host down", &times.down, down_limit);
        judge("cold start", &times.cold, cold_limit);
        judge(
            "cold start, all rounds",
            &times.cold_all,
            cold_limit.max(10_000.0),
        );
        report.add(&name("cold start"), "ms", &times.cold, None);
        report.add(&name("cold start, all rounds"), "ms", &times.cold_all, None);
        let pacemaker = pacemaker(hosts, vms)?;
        report.add(&name("one host down"), "ms", &times.down, None);
        report.add(&name("one host down, linted"), "ms", &times.linted, None);
        report.add(&name("why each VM waits"), "ms", &times.waiting, None);
        if let Some(theirs) = pacemaker {
            report.add(
                &name("cold start against crm_simulate"),
                "ms",
                &times.cold,
                Some(theirs),
            );
        }
    }
    let curve = curve(&mut report)?;
    let counted = work::curve(&mut report)?;
    let peak = peak_mib();
    if let Some(peak) = peak {
        report.add("peak memory of all this", "MiB", &[peak], None);
        if peak > 1024.0 {
            missed.push(format!("{peak:.0} MiB of memory, more than 1 GiB"));
        }
    }
    report.publish("planner")?;
    println!("{curve}");
    match counted {
        Some((text, miss)) => {
            println!("{text}");
            missed.extend(miss);
        }
        None => println!("valgrind is not installed: the work of a plan was not counted"),
    }
    if !has_crm_simulate() {
        println!("crm_simulate is not installed (package pacemaker-cli-utils): not compared");
    }
    for text in &missed {
        println!("missed: {text}");
    }
    Ok(if missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// How the time grows with the number of VMs, on 200 hosts. Beside it how the time grows that a mere
/// look at everything takes: where a site outgrows the caches, each VM costs more to look at.
fn curve(report: &mut Report) -> anyhow::Result<String> {
    let mut text = String::from(
        "growth on 200 hosts (time over n log n, the first is 1):\n     VMs  host down    /n log n  cold start    /n log n  a mere look    /n log n\n",
    );
    let mut first: Option<[f64; 3]> = None;
    for vms in [1_250usize, 2_500, 5_000, 10_000, 20_000] {
        let times = times(200, vms)?;
        let scale = vms as f64 * (vms as f64).ln();
        let curves = [
            ("host down", &times.down),
            ("cold start", &times.cold),
            ("a mere look", &times.walk),
        ];
        let least =
            curves.map(|(_, samples)| samples.iter().copied().fold(f64::INFINITY, f64::min));
        let scaled = least.map(|least| least / scale);
        let begun = *first.get_or_insert(scaled);
        text.push_str(&format!("{vms:>8}"));
        for ((least, scaled), first) in least.iter().zip(scaled).zip(begun) {
            text.push_str(&format!(" {least:>8.2} ms {:>11.2}", scaled / first));
        }
        text.push('\n');
        for (what, samples) in curves {
            let name = format!("200 hosts x {vms} VMs, {what} (curve)");
            report.add(&name, "ms", samples, None);
        }
    }
    Ok(text)
}

/// Most memory that this process had.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

fn has_crm_simulate() -> bool {
    Command::new("crm_simulate")
        .arg("--version")
        .output()
        .is_ok()
}

/// What `crm_simulate` takes for a cold start of the same site, in milliseconds. Only for small ones:
/// 100 hosts x 2,000 VMs take it more than ten minutes.
fn pacemaker(hosts: usize, vms: usize) -> anyhow::Result<Option<f64>> {
    if vms > PEER_VMS || !has_crm_simulate() {
        return Ok(None);
    }
    let path = std::env::temp_dir().join(format!("quorate-bench-{}.xml", std::process::id()));
    std::fs::write(&path, cib::write(hosts, vms)?)?;
    let begun = Instant::now();
    let done = Command::new("crm_simulate")
        .arg("--run")
        .arg("--xml-file")
        .arg(&path)
        .output();
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    std::fs::remove_file(&path)?;
    let good = done.is_ok_and(|done| done.status.success());
    if !good {
        println!("crm_simulate did not take the site of {hosts} hosts x {vms} VMs: not compared");
    }
    Ok(good.then_some(took))
}
