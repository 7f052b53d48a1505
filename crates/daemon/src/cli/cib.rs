//! `plan --cib`: what Quorate would do in a Pacemaker cluster, from its configuration and status.

use super::error::CliError;
use super::now_ms;
use super::output::{Output, count};
use clap::Args;
use quorate_import::pacemaker::{self, Action, Cib, MAX_BYTES, Planned};
use quorate_import::{Problem, Problems};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct CibArgs {
    /// A Pacemaker cluster: the output of `cibadmin --query`; `-` reads standard input.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["fail", "drain", "apply", "then_fail", "then_drain", "balance", "state"]
    )]
    pub(crate) cib: Option<PathBuf>,
    /// Plan the rest where something is not supported (clones, bundles, remote nodes, tickets) or
    /// contradicts itself.
    #[arg(long, requires = "cib")]
    pub(crate) partial: bool,
}

/// One step, as it is printed for programs. What does not apply is absent.
#[derive(Debug, Serialize)]
struct ActionView<'a> {
    action: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'a str>,
}

/// A plan, as it is printed for programs. Resources that are stopped afterwards have no placement.
#[derive(Debug, Serialize)]
struct PlanView<'a> {
    actions: Vec<ActionView<'a>>,
    placement: &'a BTreeMap<String, String>,
    /// What was ignored; absent when nothing was.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<NoteView<'a>>,
}

/// Something with its place, as it is printed for programs.
#[derive(Debug, Serialize)]
pub(crate) struct NoteView<'a> {
    line: u32,
    column: u32,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
}

impl<'a> From<&'a Problem> for NoteView<'a> {
    fn from(problem: &'a Problem) -> Self {
        Self {
            line: problem.place.line,
            column: problem.place.column,
            message: &problem.message,
            hint: problem.hint.as_deref(),
        }
    }
}

/// Needs no daemon: the question brings its own site.
pub(crate) fn plan(output: &Output, file: &Path, partial: bool) -> Result<(), CliError> {
    let (cib, file) = read(file)?;
    if !partial {
        refuse(
            "has parts that Quorate cannot plan",
            &file,
            &cib.unsupported,
        )?;
    }
    let planned = pacemaker::plan(&cib, now_s());
    if !partial {
        refuse("contradicts itself", &file, &planned.contradictions)?;
    }
    warn("not planned", &cib.unsupported, &file);
    warn("cannot hold", &planned.contradictions, &file);
    warn("ignored", &planned.warnings, &file);
    warn("ignored", &planned.unknown, &file);
    unsound(&planned, partial)?;
    let warnings = planned.warnings.iter().chain(&planned.unknown);
    let view = PlanView {
        actions: planned.actions.iter().map(view).collect(),
        placement: &planned.placement,
        warnings: warnings.map(NoteView::from).collect(),
    };
    output.print(&view, |out| table(out, &planned))
}

fn refuse(what: &str, file: &str, problems: &[Problem]) -> Result<(), CliError> {
    refuse_with(
        what,
        file,
        problems,
        "--partial leaves this out of account and plans the rest",
    )
}

/// An error with all problems at their places, unless there are none.
pub(crate) fn refuse_with(
    what: &str,
    file: &str,
    problems: &[Problem],
    help: &str,
) -> Result<(), CliError> {
    if problems.is_empty() {
        return Ok(());
    }
    let problems = Problems {
        file: file.to_owned(),
        problems: problems.to_vec(),
    };
    Err(CliError::Usage(format!(
        "the CIB {what}:\n{problems}\n  help: {help}"
    )))
}

/// A plan that its own second look found unsound is not shown as if it could be trusted.
fn unsound(planned: &Planned, partial: bool) -> Result<(), CliError> {
    for flaw in &planned.flaws {
        eprintln!("UNSOUND: {flaw}");
    }
    match planned.flaws.len() {
        0 => Ok(()),
        _ if partial => Ok(()),
        flaws => Err(CliError::Usage(format!(
            "the plan for this CIB would break {}: this is a mistake of Quorate's, please report it with the CIB\n  help: --partial prints it nevertheless",
            count(flaws, "promise")
        ))),
    }
}

fn view(action: &Action) -> ActionView<'_> {
    ActionView {
        action: action.action,
        resource: action.resource.as_deref(),
        from: action.from.as_deref(),
        to: action.to.as_deref(),
    }
}

fn table(out: &Output, planned: &Planned) -> String {
    let mut text = String::new();
    if planned.actions.is_empty() {
        text.push_str("Nothing to do.\n");
    } else {
        let mut table = out.table(&["STEP", "ACTION", "RESOURCE", "FROM", "TO"]);
        for (number, action) in planned.actions.iter().enumerate() {
            let part = |part: &Option<String>| part.clone().unwrap_or_default();
            table.add_row([
                (number + 1).to_string(),
                action.action.to_owned(),
                part(&action.resource),
                part(&action.from),
                part(&action.to),
            ]);
        }
        text.push_str(&format!("{table}\n"));
    }
    text.push_str(&format!(
        "\n{} afterwards:\n\n",
        count(planned.placement.len() + planned.stopped.len(), "resource")
    ));
    let mut table = out.table(&["RESOURCE", "HOST"]);
    for (resource, host) in &planned.placement {
        table.add_row([resource, host]);
    }
    for resource in &planned.stopped {
        table.add_row([resource.as_str(), "(stopped)"]);
    }
    text.push_str(&table.to_string());
    text
}

/// Prints what was left out to standard error.
pub(crate) fn warn(what: &str, problems: &[Problem], file: &str) {
    for problem in problems {
        eprintln!("{what}: {}", problem.render(file));
    }
}

/// Reads a CIB, never more than the bound.
pub(crate) fn read(path: &Path) -> Result<(Cib, String), CliError> {
    let stdin = path.as_os_str() == "-";
    let file = match stdin {
        true => "standard input".to_owned(),
        false => path.display().to_string(),
    };
    let bad = |error: std::io::Error| CliError::Usage(format!("{file} cannot be read: {error}"));
    let reader: Box<dyn std::io::Read> = match stdin {
        true => Box::new(std::io::stdin()),
        false => Box::new(std::fs::File::open(path).map_err(bad)?),
    };
    let mut bytes = Vec::new();
    let limit = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX);
    reader
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(bad)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| CliError::Usage(format!("{file} is not UTF-8 text")))?;
    let cib = pacemaker::read(&text, &file).map_err(|error| CliError::Usage(error.to_string()))?;
    Ok((cib, file))
}

pub(crate) fn now_s() -> i64 {
    i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX)
}
