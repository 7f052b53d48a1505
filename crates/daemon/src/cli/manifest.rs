//! `apply` and `diff`.

use super::Context;
use super::args::{ApplyArgs, DiffArgs};
use super::error::CliError;
use super::output::{Output, Tone, count, say};
use super::progress::Progress;
use super::wait::{Goal, wait};
use quorate_api::view::{Applied, ManifestRequest};
use quorate_manifest::{Change, ChangeKind, MAX_INPUT, variables_used};
use std::io::Read as _;
use std::path::Path;

/// Reads the file, and of the environment only what the file asks for.
pub(crate) fn request(path: &Path) -> Result<ManifestRequest, CliError> {
    let stdin = path.as_os_str() == "-";
    let bad = |error: std::io::Error| {
        CliError::Usage(format!("{} cannot be read: {error}", path.display()))
    };
    let reader: Box<dyn std::io::Read> = if stdin {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(bad)?)
    };
    let mut bytes = Vec::new();
    reader
        .take(MAX_INPUT as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(bad)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| CliError::Usage(format!("{} is not UTF-8 text", path.display())))?;
    let variables = variables_used(&text)
        .into_iter()
        .filter_map(|name| Some((name.clone(), std::env::var(name).ok()?)));
    Ok(ManifestRequest {
        variables: variables.collect(),
        file: if stdin {
            "standard input".to_owned()
        } else {
            path.display().to_string()
        },
        text,
        base: None,
    })
}

pub(crate) async fn diff(context: &Context, args: DiffArgs) -> Result<(), CliError> {
    let request = request(&args.file.file)?;
    let applied: Applied = context
        .client
        .post("/api/v1/manifest/diff", &request)
        .await?;
    context.output.print(&applied, |out| {
        if applied.changes.is_empty() {
            "Nothing would change.".to_owned()
        } else {
            format!(
                "{}\n\n{} would change.{}",
                changes(out, &applied.changes, true),
                count(applied.changes.len(), "object"),
                warnings(out, &applied.warnings)
            )
        }
    })
}

pub(crate) async fn apply(context: &Context, args: ApplyArgs) -> Result<(), CliError> {
    let request = request(&args.file.file)?;
    let applied: Applied = context
        .client
        .post("/api/v1/manifest/apply", &request)
        .await?;
    context.output.print(&applied, |out| {
        if applied.changes.is_empty() {
            format!(
                "Nothing to change: all is so already (revision {}).",
                applied.revision
            )
        } else {
            format!(
                "{}\nApplied as revision {}.{}",
                changes(out, &applied.changes, false),
                applied.revision,
                warnings(out, &applied.warnings)
            )
        }
    })?;
    let (vms, services) = (applied.vms.len(), applied.services.len());
    if !args.wait.wait || vms + services == 0 {
        return Ok(());
    }
    let mut progress = Progress::new(!context.output.is_table());
    let goal = Goal::AsWanted {
        vms: applied.vms.into_iter().collect(),
        services: applied.services.into_iter().collect(),
    };
    let took = wait(&context.client, &goal, args.wait.timeout, &mut progress).await?;
    drop(progress);
    if context.output.is_table() {
        let parts = [(vms, "VM"), (services, "service")];
        let parts = parts.iter().filter(|(number, _)| *number > 0);
        let parts: Vec<String> = parts.map(|(number, what)| count(*number, what)).collect();
        say(&format!(
            "{} as wanted after {:.1} s.",
            parts.join(" and "),
            took.as_secs_f32()
        ))?;
    }
    Ok(())
}

/// What the change takes from the room for failures.
fn warnings(out: &Output, warnings: &[String]) -> String {
    const SHOWN: usize = 3;
    let mark = out.paint(Tone::Warn, "!");
    let shown = warnings.iter().take(SHOWN);
    let mut text: String = shown.map(|warning| format!("\n{mark} {warning}")).collect();
    match warnings.len().saturating_sub(SHOWN) {
        0 => {}
        n => text.push_str(&format!(
            "\n{mark} and {n} more of this kind: `quorate capacity`"
        )),
    }
    text
}

/// New objects by name only, unless `full`; changed ones field by field.
pub(crate) fn changes(out: &Output, changes: &[Change], full: bool) -> String {
    let mut lines = Vec::new();
    for change in changes {
        let text = change.to_string();
        let mut text = text.lines();
        let tone = match change.kind {
            ChangeKind::Create => Tone::Good,
            ChangeKind::Update => Tone::Warn,
        };
        lines.push(out.paint(tone, text.next().unwrap_or_default()));
        if full || change.kind == ChangeKind::Update {
            lines.extend(text.map(str::to_owned));
        }
    }
    lines.join("\n")
}
