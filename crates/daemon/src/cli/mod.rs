//! The command line: every command is a client of the API of this host's daemon.
//!
//! Owns: grammar ([`args`]), printing, waiting. Always holds: results go to standard output,
//! progress and errors to standard error; the exit status is 0, 1, 2, 3 or 4 as `--help` says; what
//! is printed is made by pure functions from what the API answered. Must not: touch the daemon's
//! files; `init`, `join` and `serve` are the daemon's own work.

pub(crate) mod args;
mod capacity;
mod cib;
mod completion;
mod console;
mod copies;
mod error;
mod events;
mod host;
mod image;
mod import;
mod manifest;
mod output;
mod plan;
mod progress;
mod quorum;
mod reservation;
mod saved;
mod secret;
mod service;
mod setup;
mod show;
mod status;
mod storage;
mod take;
mod vm;
mod wait;
mod when;

#[cfg(test)]
mod tests;

use args::{Cli, Command, Global};
use clap::Parser as _;
use error::CliError;
use output::Output;
use quorate_api::Client;
use quorate_api::view::Changed;
use std::path::PathBuf;
use std::process::ExitCode;

/// What commands need.
pub(crate) struct Context {
    dir: PathBuf,
    client: Client,
    output: Output,
}

impl Context {
    fn new(global: &Global) -> Self {
        Self {
            dir: global.dir.clone(),
            client: Client::new(global.dir.join(quorate_api::SOCKET), who()),
            output: Output::new(global),
        }
    }

    /// Prints what a change did.
    fn changed(&self, changed: &Changed) -> Result<(), CliError> {
        self.output
            .print(changed, |_| match changed.events.is_empty() {
                true => "Nothing to change: it is so already.".to_owned(),
                false => {
                    let texts: Vec<&str> = changed
                        .events
                        .iter()
                        .map(|event| event.text.as_str())
                        .collect();
                    texts.join("\n")
                }
            })
    }
}

/// For the audit trail: the person behind root, and the host.
fn who() -> String {
    let user = ["SUDO_USER", "USER", "LOGNAME"]
        .iter()
        .find_map(|name| std::env::var(name).ok());
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    format!("{}@{host}", user.as_deref().unwrap_or("root"))
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// Runs the command that was given.
pub(crate) fn main() -> ExitCode {
    // The guard takes little memory and has no threads of an async runtime: it comes before all else.
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next();
    if first.as_ref().is_some_and(|word| word == "bgp-speaker") {
        return crate::serve::watch_speaker(arguments.next());
    }
    if first.is_some_and(|word| word == "guard") {
        return quorate_agent::guard::main(arguments);
    }
    match completion::answer() {
        Ok(false) => {}
        // What was to be completed is nonsense: the shell shows nothing.
        Ok(true) | Err(_) => return ExitCode::SUCCESS,
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; a terminal that is gone gets neither.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let result = match cli.command {
        // The lab works without an async runtime: its supervisor stands in for hardware.
        Command::Lab(args) => return lab(quorate_lab::cli::run(&args, lab_output(&cli.global))),
        Command::LabTool(command) => return lab(quorate_lab::cli::run_tool(&command)),
        command => runtime(cli.global, command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.render());
            error.exit_code()
        }
    }
}

fn lab(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn lab_output(global: &Global) -> quorate_lab::cli::Output {
    match global.output {
        args::Format::Table => quorate_lab::cli::Output::Table,
        args::Format::Json | args::Format::Yaml => quorate_lab::cli::Output::Json,
    }
}

fn runtime(global: Global, command: Command) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(run(&global, command));
    // A blocked read of standard input must not keep the program.
    runtime.shutdown_background();
    result
}

async fn run(global: &Global, command: Command) -> Result<(), CliError> {
    let context = Context::new(global);
    match command {
        Command::Status(args) => events::status(&context, args).await,
        Command::Events(args) => events::events(&context, args).await,
        Command::Explain(command) => vm::explain(&context, command).await,
        Command::Plan(args) => plan::run(&context, args).await,
        Command::Capacity(args) => capacity::run(&context, args).await,
        Command::State(command) => saved::run(&context, command).await,
        Command::Quorum(command) => quorum::run(&context, command).await,
        Command::Apply(args) => manifest::apply(&context, args).await,
        Command::Diff(args) => manifest::diff(&context, args).await,
        Command::Delete(command) => vm::delete(&context, command).await,
        Command::Vm(command) => vm::run(&context, command).await,
        Command::Host(command) => host::run(&context, command).await,
        Command::Service(command) => service::run(&context, command).await,
        Command::Storage(command) => storage::run(&context, command).await,
        Command::Image(command) => image::run(&context, command).await,
        Command::Secret(command) => secret::run(&context, command).await,
        Command::Import(command) => import::import(&context.output, &command),
        Command::Init(args) => setup::init(&context, args).await,
        Command::Token(command) => host::token(&context, command).await,
        Command::Join(args) => setup::join(&context, args).await,
        Command::Witness(command) => quorum::witness(&context, command).await,
        Command::Serve => {
            crate::serve::log_to_stderr();
            Ok(crate::serve::serve(&context.dir).await?)
        }
        // Ran before there was a runtime.
        Command::Lab(_) | Command::LabTool(_) => Ok(()),
        Command::Completion { shell } => {
            use std::io::Write as _;
            std::io::stdout().write_all(&completion::script(shell)?)?;
            Ok(())
        }
        Command::Man { to } => setup::man(to.as_deref()),
    }
}
