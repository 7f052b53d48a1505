//! `import`: the configuration of another cluster manager as a manifest.

use super::cib;
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
}

/// What was not carried over, as it is printed for programs.
#[derive(Debug, Serialize)]
struct NoteView<'a> {
    line: u32,
    column: u32,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
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
    print(output, &converted)
}

fn print(output: &Output, converted: &Converted) -> Result<(), CliError> {
    let report = converted.report.iter().map(|note| NoteView {
        line: note.place.line,
        column: note.place.column,
        message: &note.message,
        hint: note.hint.as_deref(),
    });
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
