//! The lab without the daemon: `quorate lab` and `quorate lab-tool` as a program of its own, for
//! the lab's own tests.

use clap::{Parser, Subcommand};
use quorate_lab::cli::{self, LabArgs, Output, ToolCommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "quorate-lab-tool")]
struct Arguments {
    /// JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// `quorate lab`.
    Lab(LabArgs),
    /// `quorate lab-tool`.
    #[command(subcommand, hide = true)]
    LabTool(ToolCommand),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let output = if arguments.json {
        Output::Json
    } else {
        Output::Table
    };
    let done = match &arguments.command {
        Command::Lab(args) => cli::run(args, output),
        Command::LabTool(command) => cli::run_tool(command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
