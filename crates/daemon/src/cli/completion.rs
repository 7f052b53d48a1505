//! Completion in the shell: words of the grammar, and the names of VMs, hosts, pools and secrets, asked of the daemon.
//!
//! `quorate completion SHELL` prints a small script; with each press of Tab it calls `quorate` again with
//! [`VARIABLE`] set, and [`answer`] prints the candidates. Always holds: Tab never waits longer than
//! [`WITHIN`], and never prints an error into the line; without an answer there are just no names. An argument is
//! known to be the name of something by its type, so a new command needs nothing here.

use super::args::{Cli, DEFAULT_DIR};
use clap::builder::StyledStr;
use clap::{Arg, Command, CommandFactory as _};
use clap_complete::env::{CompleteEnv, Shells};
use clap_complete::{ArgValueCompleter, CompletionCandidate, Shell};
use quorate_api::Client;
use quorate_types::{HostName, ImageRef, PoolName, SecretName, ServiceName, VmName};
use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

/// Set by the script to the shell's name.
const VARIABLE: &str = "QUORATE_COMPLETE";
/// Longest that a person waits after Tab.
const WITHIN: Duration = Duration::from_millis(500);
/// Commands whose names are new ones.
const NAMES_ANEW: &[&str] = &["init", "join"];

/// Answers a script's question, if this is one. Returns whether it was.
pub(crate) fn answer() -> clap::error::Result<bool> {
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(grammar)
        .var(VARIABLE)
        .try_complete(std::env::args_os(), here.as_deref())
}

/// The script for a shell.
pub(crate) fn script(shell: Shell) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let shells = Shells::builtins();
    let name = shell.to_string();
    let of_shell = shells
        .completer(&name)
        .ok_or_else(|| std::io::Error::other(format!("no completion for {name}")))?;
    of_shell.write_registration(VARIABLE, "quorate", "quorate", "quorate", &mut text)?;
    Ok(text)
}

fn grammar() -> Command {
    with_names(Cli::command())
}

/// The command, with completers where its arguments, or its subcommands', are names.
fn with_names(command: Command) -> Command {
    if NAMES_ANEW.contains(&command.get_name()) {
        return command;
    }
    let command = command.mut_args(|arg| match path_of(&arg) {
        Some(path) => {
            let image = arg.get_value_parser().type_id() == TypeId::of::<ImageRef>();
            arg.add(ArgValueCompleter::new(move |begun: &OsStr| match image {
                true => images(path, begun),
                false => candidates(path, begun),
            }))
        }
        None => arg,
    });
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, with_names)
    })
}

/// Where the API lists what an argument names.
fn path_of(arg: &Arg) -> Option<&'static str> {
    let kind = arg.get_value_parser().type_id();
    if kind == TypeId::of::<VmName>() {
        Some("/api/v1/vms")
    } else if kind == TypeId::of::<HostName>() {
        Some("/api/v1/hosts")
    } else if kind == TypeId::of::<ServiceName>() {
        Some("/api/v1/services")
    } else if kind == TypeId::of::<SecretName>() {
        Some("/api/v1/secrets")
    } else if kind == TypeId::of::<PoolName>() || kind == TypeId::of::<ImageRef>() {
        Some("/api/v1/pools")
    } else {
        None
    }
}

fn candidates(path: &str, begun: &OsStr) -> Vec<CompletionCandidate> {
    let begun = begun.to_string_lossy();
    let listed: Vec<serde_json::Value> = ask(path).unwrap_or_default();
    let named = listed.into_iter().filter_map(|object| {
        let name = object["name"]
            .as_str()
            .filter(|name| name.starts_with(&*begun))?;
        let help = ["state", "health", "mode", "kind"]
            .iter()
            .find_map(|key| object[key].as_str());
        let help = help.map(|help| StyledStr::from(help.to_owned()));
        Some(CompletionCandidate::new(name.to_owned()).help(help))
    });
    named.collect()
}

/// `POOL/`, and behind it the images of the pool.
fn images(pools: &str, begun: &OsStr) -> Vec<CompletionCandidate> {
    let text = begun.to_string_lossy();
    let Some((pool, _)) = text.split_once('/') else {
        let named = candidates(pools, begun);
        let open = |candidate: CompletionCandidate| {
            let name = candidate.get_value().to_string_lossy();
            CompletionCandidate::new(format!("{name}/"))
        };
        return named.into_iter().map(open).collect();
    };
    let looked: Option<serde_json::Value> = ask(&format!("{pools}/{pool}"));
    let looked = looked.unwrap_or_default();
    let listed = looked["images"].as_array().into_iter().flatten();
    let names = listed.filter_map(|image| Some(format!("{pool}/{}", image["image"].as_str()?)));
    names
        .filter(|name| name.starts_with(&*text))
        .map(CompletionCandidate::new)
        .collect()
}

fn ask<T: serde::de::DeserializeOwned>(path: &str) -> Option<T> {
    let socket = dir(std::env::args_os()).join(quorate_api::SOCKET);
    let client = Client::new(socket, "completion").timeout(WITHIN);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let answer = runtime.block_on(async { tokio::time::timeout(WITHIN, client.get(path)).await });
    runtime.shutdown_background();
    answer.ok()?.ok()
}

/// The directory that the unfinished line names, or what the command itself would take.
fn dir(words: impl Iterator<Item = OsString>) -> PathBuf {
    let words: Vec<OsString> = words.collect();
    let named = words.iter().enumerate().find_map(|(at, word)| {
        let word = word.to_str()?;
        match word.strip_prefix("--dir")? {
            "" => words.get(at + 1).map(PathBuf::from),
            rest => rest.strip_prefix('=').map(PathBuf::from),
        }
    });
    let usual =
        || std::env::var_os("QUORATE_DIR").map_or_else(|| DEFAULT_DIR.into(), PathBuf::from);
    named.unwrap_or_else(usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_taken_from_the_line() {
        let dir = |line: &str| dir(line.split(' ').map(OsString::from));
        assert_eq!(
            dir("quorate -- quorate --dir /a vm show"),
            PathBuf::from("/a")
        );
        assert_eq!(dir("quorate vm --dir=/b show"), PathBuf::from("/b"));
    }

    #[test]
    fn names_of_new_hosts_are_not_completed() {
        let grammar = grammar();
        let completes = |path: &[&str], id: &str| {
            let at = path
                .iter()
                .fold(&grammar, |at, name| at.find_subcommand(name).unwrap());
            let arg = at.get_arguments().find(|arg| arg.get_id() == id).unwrap();
            arg.get::<ArgValueCompleter>().is_some()
        };
        assert!(completes(&["vm", "migrate"], "name"));
        assert!(completes(&["vm", "migrate"], "to"));
        assert!(completes(&["explain", "vm"], "name"));
        assert!(!completes(&["init"], "host"));
        assert!(completes(&["delete", "pool"], "name"));
        assert!(completes(&["secret", "delete"], "name"));
        assert!(completes(&["service", "drain"], "service"));
        assert!(completes(&["service", "drain"], "member"));
        assert!(!completes(&["delete", "rule"], "name"));
    }
}
