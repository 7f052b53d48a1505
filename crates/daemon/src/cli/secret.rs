//! `secret`: passwords that pools name.
//!
//! Always holds: a value comes from standard input, from a terminal without echo, or from a file; never from an
//! argument, where every process list shows it. Nothing here prints one.

use super::Context;
use super::error::CliError;
use super::output::{Output, Tone, cell, trimmed};
use clap::{Subcommand, ValueHint};
use quorate_api::view::{Changed, SecretRequest, SecretView};
use quorate_types::SecretName;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// Most that is read: a secret has 256 bytes at most.
const MAX_INPUT: u64 = 4096;

#[derive(Debug, Subcommand)]
pub(crate) enum SecretCommand {
    /// Keep a password, or replace it. Asks for it without echo; a pipe is read to its end.
    Set {
        /// Its name, as in a pool's `chap.secret`.
        name: SecretName,
        /// Read it from this file instead; one line break at the end is not part of it.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
    },
    /// The names of all secrets and what uses them. Never the values.
    List,
    /// Forget a secret that no pool names.
    Delete {
        /// Which.
        name: SecretName,
    },
}

pub(crate) async fn run(context: &Context, command: SecretCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        SecretCommand::Set { name, file } => {
            let value = match file.as_deref().filter(|path| *path != Path::new("-")) {
                Some(path) => from_file(path)?,
                None if std::io::stdin().is_terminal() => ask(&name)?,
                None => read(std::io::stdin().lock(), "standard input")?,
            };
            let path = format!("/api/v1/secrets/{name}");
            let changed: Changed = client.post(&path, &SecretRequest { value }).await?;
            context.changed(&changed)
        }
        SecretCommand::List => {
            let secrets: Vec<SecretView> = client.get("/api/v1/secrets").await?;
            context.output.print(&secrets, |out| page(out, &secrets))
        }
        SecretCommand::Delete { name } => {
            let changed: Changed = client.delete(&format!("/api/v1/secrets/{name}")).await?;
            context.changed(&changed)
        }
    }
}

pub(crate) fn page(out: &Output, secrets: &[SecretView]) -> String {
    if secrets.is_empty() {
        return "No secrets yet: `quorate secret set NAME`.".to_owned();
    }
    let mut table = out.table(&["SECRET", "USED BY"]);
    for secret in secrets {
        let users = match secret.used_by.is_empty() {
            true => cell("nothing", Tone::Dim),
            false => cell(secret.used_by.join(", "), Tone::Plain),
        };
        table.add_row(vec![cell(&secret.name, Tone::Bold), users]);
    }
    trimmed(&table)
}

fn from_file(path: &Path) -> Result<String, CliError> {
    let name = path.display().to_string();
    let file = std::fs::File::open(path)
        .map_err(|error| CliError::Usage(format!("{name} cannot be read: {error}")))?;
    read(file, &name)
}

/// The whole of it, without one line break at the end.
fn read(from: impl std::io::Read, name: &str) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    from.take(MAX_INPUT).read_to_end(&mut bytes)?;
    let mut text = String::from_utf8(bytes)
        .map_err(|_| CliError::Usage(format!("{name} is not text in UTF-8")))?;
    chomp(&mut text);
    Ok(text)
}

fn chomp(text: &mut String) {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
}

/// The terminal as it was before; put back when dropped.
struct NoEcho(Termios);

impl NoEcho {
    fn enter() -> Result<Self, CliError> {
        let before = tcgetattr(std::io::stdin()).map_err(std::io::Error::from)?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        quiet.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &quiet)
            .map_err(std::io::Error::from)?;
        Ok(Self(before))
    }
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        // The terminal is gone: there is nothing to put back.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Asks twice, since nobody sees what is typed.
fn ask(name: &SecretName) -> Result<String, CliError> {
    let quiet = NoEcho::enter()?;
    let first = line(&format!("Value of secret {name}: "))?;
    let second = line("Once more: ")?;
    drop(quiet);
    match first == second {
        true => Ok(first),
        false => Err(CliError::Usage(
            "the two are not the same; nothing was changed".to_owned(),
        )),
    }
}

fn line(prompt: &str) -> Result<String, CliError> {
    let mut err = std::io::stderr();
    write!(err, "{prompt}")?;
    err.flush()?;
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(MAX_INPUT)
        .read_line(&mut text)?;
    chomp(&mut text);
    Ok(text)
}
