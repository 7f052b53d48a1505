//! Runs seeds.

use anyhow::Context;
use clap::Parser;
use quorate_sim::{Detail, Mutation, Verdict, run_scenario, run_seed, run_seeds};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Runs the cluster's decisions on virtual time with random faults and checks every promise.
#[derive(Debug, Parser)]
#[command(name = "quorate-sim")]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    start: u64,
    /// Run this seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// With --seed: show what happens; twice: every step.
    #[arg(long, action = clap::ArgAction::Count)]
    trace: u8,
    /// Run a deliberately broken variant.
    #[arg(long)]
    mutate: Option<Mutation>,
    /// Run the script of a scenario file and show what happens.
    #[arg(long)]
    scenario: Option<PathBuf>,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: u64,
    /// Stop after so many failing seeds.
    #[arg(long, default_value_t = 10)]
    max_failures: usize,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    Ok(match (&args.scenario, args.seed) {
        (Some(file), _) => scenario(file)?,
        (None, Some(seed)) => one(&args, seed),
        (None, None) => many(&args),
    })
}

fn scenario(file: &Path) -> anyhow::Result<ExitCode> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let outcome = run_scenario(&text, false).with_context(|| format!("in {}", file.display()))?;
    print!("{}", outcome.actual);
    for failure in &outcome.failures {
        println!("failed: {failure}");
    }
    if outcome.actual != outcome.expected {
        println!(
            "the transcript differs from the one in the file; UPDATE=1 cargo test -p quorate-sim writes it anew"
        );
    }
    Ok(ExitCode::from(u8::from(!outcome.failures.is_empty())))
}

fn one(args: &Args, seed: u64) -> ExitCode {
    let detail = match args.trace {
        0 => Detail::Nothing,
        1 => Detail::Events,
        _ => Detail::All,
    };
    let (verdict, _) = run_seed(seed, args.mutate, detail);
    report(&verdict, args.mutate);
    let failed = u64::from(verdict.broken.is_some());
    println!("{} passed, {failed} failed", 1 - failed);
    ExitCode::from(u8::from(failed > 0))
}

fn many(args: &Args) -> ExitCode {
    let began = Instant::now();
    let (done, events, time) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (cuts, connections) = (AtomicU64::new(0), AtomicU64::new(0));
    let each = |verdict: &Verdict| {
        cuts.fetch_add(verdict.storage_cuts, Ordering::Relaxed);
        connections.fetch_add(verdict.connections, Ordering::Relaxed);
        let n = done.fetch_add(1, Ordering::Relaxed) + 1;
        events.fetch_add(verdict.events, Ordering::Relaxed);
        time.fetch_add(verdict.virtual_ns, Ordering::Relaxed);
        if verdict.broken.is_some() {
            report(verdict, args.mutate);
        }
        if n.is_multiple_of(200) {
            println!(
                "{n} of {} seeds, {:.0} s",
                args.seeds,
                began.elapsed().as_secs_f64()
            );
        }
    };
    let failed = run_seeds(
        args.start,
        args.seeds,
        args.threads,
        args.mutate,
        args.max_failures,
        &each,
    );
    let done = done.into_inner();
    println!(
        "{} passed, {} failed ({} events, {:.1} h of virtual time, {} VMs taken over on a storage cut, {} connections through ring changes, {:.1} s)",
        done - failed.len() as u64,
        failed.len(),
        events.into_inner(),
        time.into_inner() as f64 / 3.6e12,
        cuts.into_inner(),
        connections.into_inner(),
        began.elapsed().as_secs_f64()
    );
    if let Some(first) = failed.first() {
        println!("replay: {}", replay(first.seed, args.mutate));
    }
    ExitCode::from(u8::from(!failed.is_empty()))
}

fn replay(seed: u64, mutate: Option<Mutation>) -> String {
    let mutate = mutate.map_or(String::new(), |mutation| format!(" --mutate {mutation}"));
    format!("cargo run --release -p quorate-sim -- --seed {seed} --trace{mutate}")
}

fn report(verdict: &Verdict, mutate: Option<Mutation>) {
    if let Some(broken) = &verdict.broken {
        println!(
            "seed {}: BROKEN {} at {:.3} s: {}\n  replay: {}",
            verdict.seed,
            broken.promise,
            broken.at as f64 / 1e9,
            broken.text,
            replay(verdict.seed, mutate)
        );
    }
}
