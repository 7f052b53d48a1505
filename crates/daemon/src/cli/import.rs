//! `import`: the configuration of another cluster manager as a manifest.

use super::cib::{self, NoteView};
use super::error::CliError;
use super::output::{Output, count, say};
use clap::{Args, Subcommand};
use quorate_import::pacemaker::{self, Converted};
use serde::Serialize;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum ImportCommand {
    /// Print the manifest that a Pacemaker cluster's configuration (its CIB) comes to.
    Pacemaker(PacemakerArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PacemakerArgs {
    /// The output of `cibadmin --query`; `-` reads standard input.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Make a VM of every primitive, not only of those that run virtual machines.
    #[arg(long)]
    pub(crate) every_primitive: bool,
    /// Leave out constraints that name hosts or resources that do not exist.
    #[arg(long)]
    pub(crate) partial: bool,
}

#[derive(Debug, Serialize)]
struct ImportView<'a> {
    /// The manifest, YAML.
    manifest: &'a str,
    report: Vec<NoteView<'a>>,
}

pub(crate) fn import(output: &Output, command: &ImportCommand) -> Result<(), CliError> {
    let ImportCommand::Pacemaker(args) = command;
    let (read, file) = cib::read(&args.file)?;
    let converted = pacemaker::convert(&read, &file, args.every_primitive, cib::now_s());
    if !args.partial {
        cib::refuse_with(
            "has constraints about what does not exist",
            &file,
            &converted.unknown,
            "correct the names, or leave these constraints out with --partial",
        )?;
    }
    cib::warn("left out", &converted.unknown, &file);
    print(output, &converted)
}

fn print(output: &Output, converted: &Converted) -> Result<(), CliError> {
    let report = converted.report.iter().map(NoteView::from);
    if output.is_json() {
        let view = ImportView {
            manifest: &converted.manifest,
            report: report.collect(),
        };
        return output.print(&view, |_| String::new());
    }
    // A manifest is YAML: for people and for `--output yaml` alike.
    say(converted.manifest.trim_end())?;
    eprintln!(
        "{} imported; {} not carried over or guessed: see the head of the manifest",
        count(converted.vms, "VM"),
        count(converted.report.len(), "thing"),
    );
    Ok(())
}
