//! Maintenance commands of the workspace: `cargo xtask verify | fix | tidy | cts`.
//!
//! `verify` only reads; `fix` mends what a program can mend.

mod cts;
mod tidy;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Maintenance of the workspace")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check everything, change nothing: format, lints, house rules, dependencies, tests.
    Verify {
        /// Leave the tests out (they run elsewhere).
        #[arg(long)]
        no_tests: bool,
    },
    /// Format, and apply the lints' suggestions.
    Fix,
    /// House rules that no other tool checks.
    Tidy,
    /// Plan Pacemaker's scheduler cases, and compare with what it does (docs/pacemaker.md).
    Cts {
        /// Pacemaker's folder cts/scheduler.
        #[arg(long, value_name = "PATH")]
        dir: PathBuf,
        /// Only the cases that this file names, one a line.
        #[arg(long, value_name = "FILE")]
        list: Option<PathBuf>,
        /// Print the whole plan of cases that fail.
        #[arg(long)]
        details: bool,
    },
}

fn main() -> ExitCode {
    let root = root();
    let result = match Arguments::parse().task {
        Task::Verify { no_tests } => verify(&root, no_tests),
        Task::Fix => fix(&root),
        Task::Tidy => tidy::check(&root),
        Task::Cts { dir, list, details } => cts::run(&dir, list.as_deref(), details),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .map_or_else(|| here.to_owned(), Path::to_owned)
}

fn run(root: &Path, program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => bail!("`{program} {}` failed ({status})", arguments.join(" ")),
        Err(error) => bail!("`{program}` cannot be run: {error}"),
    }
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<()> {
    run(
        root,
        &std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()),
        arguments,
    )
}

fn stage(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    let result = work();
    let word = if result.is_ok() { "ok" } else { "FAILED" };
    println!(
        "verify {name}: {word} ({:.1} s)",
        begun.elapsed().as_secs_f64()
    );
    result
}

fn verify(root: &Path, no_tests: bool) -> Result<()> {
    stage("format", || cargo(root, &["fmt", "--all", "--check"]))?;
    stage("house rules", || tidy::check(root))?;
    stage("lints", || {
        cargo(
            root,
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        )
    })?;
    // Run on request only, so no part of all targets.
    stage("lints of the lab's tests", || {
        let lab = ["clippy", "--quiet", "-p", "quorate-daemon", "--test", "lab"];
        cargo(root, &[&lab[..], &["--", "-D", "warnings"]].concat())
    })?;
    stage("eBPF objects", || {
        run(root, "crates/balancer/bpf/build.sh", &["--check"])
    })?;
    stage("dependencies", || dependencies(root))?;
    if !no_tests {
        stage("tests", || cargo(root, &["test", "--quiet", "--workspace"]))?;
    }
    Ok(())
}

/// Licences, banned crates and sources, by cargo-deny (`make tools` installs it).
fn dependencies(root: &Path) -> Result<()> {
    let local = root.join("target/tools/bin/cargo-deny");
    let program = if local.exists() {
        local.to_string_lossy().into_owned()
    } else {
        "cargo-deny".into()
    };
    if Command::new(&program).arg("--version").output().is_err() {
        bail!("cargo-deny is missing: run `make tools`");
    }
    run(
        root,
        &program,
        &[
            "--log-level",
            "error",
            "check",
            "licenses",
            "bans",
            "sources",
        ],
    )
}

fn fix(root: &Path) -> Result<()> {
    cargo(
        root,
        &[
            "clippy",
            "--fix",
            "--allow-dirty",
            "--allow-staged",
            "--workspace",
            "--all-targets",
        ],
    )?;
    cargo(root, &["fmt", "--all"])
}
