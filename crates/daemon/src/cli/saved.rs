//! Saved states: made with `state save`, asked with `--state FILE`.

use super::Context;
use super::args::StateCommand;
use super::error::CliError;
use super::output::{bytes, say};
use quorate_planner::Snapshot;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Largest file that is read.
const MAX_FILE: u64 = 2 << 30;

pub(crate) async fn run(context: &Context, command: StateCommand) -> Result<(), CliError> {
    let StateCommand::Save { file } = command;
    let snapshot: Snapshot = context.client.get("/api/v1/state").await?;
    let text =
        serde_json::to_vec(&snapshot).map_err(|error| CliError::Failed(error.to_string()))?;
    if file.as_os_str() == "-" {
        return say(&String::from_utf8_lossy(&text));
    }
    let bad = |error: std::io::Error| {
        CliError::Failed(format!("{} cannot be written: {error}", file.display()))
    };
    // Names, addresses and settings of the cluster are nobody else's business.
    let mut open = std::fs::OpenOptions::new();
    let mut target = open
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&file)
        .map_err(bad)?;
    target.write_all(&text).map_err(bad)?;
    target.sync_all().map_err(bad)?;
    let known = match snapshot.seen.leader {
        Some(_) => "",
        None => {
            "\nNo leader answered: nothing is known of the hosts in it, so no plan can be made from it."
        }
    };
    say(&format!(
        "Saved revision {} to {} ({}), without the authority's key, join tokens and the parameters of fence devices.{known}\n  quorate plan --state {} --fail HOST",
        snapshot.state.revision,
        file.display(),
        bytes(text.len() as u64),
        file.display()
    ))
}

/// Reads a saved state.
pub(crate) fn read(path: &Path) -> Result<Snapshot, CliError> {
    let bad =
        |error: String| CliError::Usage(format!("{} cannot be read: {error}", path.display()));
    let size = std::fs::metadata(path)
        .map_err(|error| bad(error.to_string()))?
        .len();
    if size > MAX_FILE {
        return Err(bad(format!("it is larger than {}", bytes(MAX_FILE))));
    }
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    Snapshot::read(&text).map_err(|error| bad(error.to_string()))
}
