//! The tour: everything that Quorate promises about running VMs, shown on a lab with a measured line for each.
//!
//! Owns: the order of the steps and the table at the end. Always holds: a step that did not reach what it is
//! about is `MISSED`, the tour goes on with a settled cluster, and the exit status says so; the lab
//! is gone at the end, whatever happened. Must not: do anything that a user could not do with
//! `quorate` and `quorate lab`.

mod stage;
mod steps;

use crate::LabGuard;
use crate::site::SiteSpec;
use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use stage::{Outcome, Stage};
use std::process::ExitCode;
use std::time::Instant;

/// The tour's lab.
const SITE: &str = "demo";

/// Arguments of the tour.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {
    /// Only steps whose title contains this word (the cluster and its VMs come up in any case).
    #[arg(long, value_name = "WORD")]
    pub only: Option<String>,
}

struct Row {
    title: &'static str,
    good: bool,
    measured: String,
    seconds: f64,
}

/// Takes the tour. Fails when a step was missed.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let begun = Instant::now();
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut spec = SiteSpec::new(&program);
    spec.site = SITE.to_owned();
    println!("Quorate demo: three hosts, a client and a switch, all on this machine.\n");
    let lab = LabGuard::up(spec)?;
    let mut stage = Stage::new(lab);
    let mut rows = Vec::new();
    for step in steps::STEPS {
        let wanted = args
            .only
            .as_ref()
            .is_none_or(|word| step.title.contains(word.as_str()));
        if !wanted && !step.foundation {
            continue;
        }
        let row = take(&mut stage, step, rows.len() + 1);
        let stop = step.foundation && !row.good;
        let missed = !row.good;
        rows.push(row);
        if stop {
            println!("Without this nothing else can be shown.");
            stage.show_logs();
            break;
        }
        if missed && let Err(error) = stage.settle() {
            println!("   the cluster does not settle: {error:#}");
            stage.show_logs();
            break;
        }
    }
    let missed = rows.iter().filter(|row| !row.good).count();
    println!("\n{}", table(&rows));
    drop(stage);
    println!(
        "\nEverything is cleaned up. {:.0} s in all.",
        begun.elapsed().as_secs_f64()
    );
    if missed == 0 && rows.len() >= 2 {
        return Ok(ExitCode::SUCCESS);
    }
    println!("{missed} of {} steps missed.", rows.len());
    Ok(ExitCode::FAILURE)
}

fn take(stage: &mut Stage, step: &steps::Step, number: usize) -> Row {
    let begun = Instant::now();
    stage.announce(number, step.title);
    let outcome = (step.run)(stage).unwrap_or_else(|error| Outcome {
        good: false,
        measured: format!("{error:#}"),
    });
    stage.quiet();
    let word = if outcome.good { "ok" } else { "MISSED" };
    println!(
        "{number:2}. {}: {word}\n    {}",
        step.title, outcome.measured
    );
    Row {
        title: step.title,
        good: outcome.good,
        measured: outcome.measured,
        seconds: begun.elapsed().as_secs_f64(),
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    // Not a terminal (a log, a pipe): as wide as one usually is.
    if !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        table.set_width(120);
    }
    table.set_header(["STEP", "RESULT", "MEASURED", "TOOK"]);
    for row in rows {
        table.add_row([
            row.title.to_owned(),
            if row.good { "ok" } else { "MISSED" }.to_owned(),
            row.measured.clone(),
            format!("{:.0} s", row.seconds),
        ]);
    }
    table
}
