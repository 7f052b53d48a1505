//! `capacity`: how many failures are survived, and how. Pure but for the question.

use super::args::CapacityArgs;
use super::error::CliError;
use super::output::{Output, Tone, cell, count, trimmed};
use super::{Context, saved};
use quorate_api::answers::{BrokenView, CapacityView, PlaceView, RestartPlanView};
use quorate_api::questions;
use quorate_types::{AdmissionMode, HostName};
use std::time::Duration;

/// A question about a large cluster may take long.
const PATIENCE: Duration = Duration::from_secs(300);
/// Restarts named in one row.
const RESTARTS: usize = 12;
/// Broken restarts that are told.
const BROKEN: usize = 8;

pub(crate) async fn run(context: &Context, args: CapacityArgs) -> Result<(), CliError> {
    let answer: CapacityView = match &args.saved.state {
        Some(path) => questions::capacity(&saved::read(path)?, args.failures, args.domain.as_ref()),
        None => {
            let failures = args.failures.map(|failures| format!("failures={failures}"));
            let domain = args.domain.as_ref().map(|label| format!("domain={label}"));
            let query: Vec<String> = failures.into_iter().chain(domain).collect();
            let path = format!("/api/v1/capacity?{}", query.join("&"));
            context.client.clone().timeout(PATIENCE).get(&path).await?
        }
    };
    context.output.print(&answer, |out| page(out, &answer))
}

/// All of it.
pub(crate) fn page(out: &Output, capacity: &CapacityView) -> String {
    let mut parts = vec![headline(out, capacity)];
    parts.extend(broken(out, capacity));
    parts.push(String::new());
    if !capacity.plans.is_empty() {
        parts.push(plans(out, &capacity.plans));
        parts.push(String::new());
    }
    parts.extend(remarks(out, capacity));
    let policy = match capacity.mode {
        AdmissionMode::Off => "Admission control is off (`cluster.admission`).".to_owned(),
        AdmissionMode::Warn => format!(
            "Wanted: {} (`cluster.admission`); a change that takes it away is made with a warning.",
            count(capacity.wanted as usize, "failure")
        ),
        AdmissionMode::Refuse => format!(
            "Wanted: {} (`cluster.admission`); a change that takes it away is refused.",
            count(capacity.wanted as usize, "failure")
        ),
    };
    parts.push(out.paint(Tone::Dim, &policy));
    parts.join("\n")
}

fn headline(out: &Output, capacity: &CapacityView) -> String {
    let already = capacity.broken.iter().any(|broken| broken.fails.is_empty());
    let at_least = if capacity.complete {
        ""
    } else {
        " (more were not looked at)"
    };
    let (tone, text) = match (capacity.survives, capacity.plans.len()) {
        _ if already => (Tone::Bad, "Not every VM finds a place even now.".to_owned()),
        (0, 0 | 1) => (
            Tone::Warn,
            "There is no second host that takes VMs: nothing can be taken over.".to_owned(),
        ),
        (0, _) => (
            Tone::Bad,
            "Not every host may fail: some VMs would find no place.".to_owned(),
        ),
        (1, _) => (
            Tone::Good,
            format!("Any one host may fail: every VM finds a place{at_least}."),
        ),
        (n, _) => (
            Tone::Good,
            format!("Any {n} hosts may fail at once: every VM finds a place{at_least}."),
        ),
    };
    out.paint(tone, &text)
}

fn join(hosts: &[HostName]) -> String {
    let names: Vec<&str> = hosts.iter().map(HostName::as_str).collect();
    names.join(" and ")
}

/// What breaks the next number of failures.
fn broken(out: &Output, capacity: &CapacityView) -> Vec<String> {
    let mark = match capacity.survives {
        0 => out.paint(Tone::Bad, "✗"),
        _ => out.paint(Tone::Dim, "·"),
    };
    // For one host the table below says it.
    let shown = capacity
        .broken
        .iter()
        .filter(|broken| broken.fails.len() != 1);
    let shown: Vec<&BrokenView> = shown.collect();
    let mut lines: Vec<String> = shown
        .iter()
        .take(BROKEN)
        .map(|broken| match broken.fails.as_slice() {
            [] => format!("  {mark} {}: {}", broken.vm, broken.why),
            hosts => format!(
                "  {mark} if {} fail: {} finds no place",
                join(hosts),
                broken.vm
            ),
        })
        .collect();
    let more = (shown.len().saturating_sub(BROKEN)) + capacity.broken_more;
    if more > 0 && !shown.is_empty() {
        lines.push(format!("  {mark} and {more} more"));
    }
    lines
}

fn plans(out: &Output, plans: &[RestartPlanView]) -> String {
    let mut table = out.table(&["IF IT FAILS", "ITS VMS START ON", "NO PLACE FOR"]);
    for plan in plans {
        let name = match &plan.domain {
            Some(domain) => domain.clone(),
            None => join(&plan.fails),
        };
        let places = |places: &[PlaceView]| {
            let places = places.iter().take(RESTARTS);
            let places = places.map(|place| match &place.host {
                Some(host) => format!("{} > {host}", place.vm),
                None => place.vm.to_string(),
            });
            places.collect::<Vec<_>>().join(", ")
        };
        let mut text = places(&plan.restarts);
        if plan.restarts.len() > RESTARTS {
            text.push_str(&format!(", ... ({})", plan.restarts.len()));
        }
        if text.is_empty() {
            text.push('-');
        }
        if !plan.makes_room.is_empty() {
            let moves = places(&plan.makes_room);
            text.push_str(&format!("\nafter these moved away: {moves}"));
        }
        let broken: Vec<String> = plan
            .broken
            .iter()
            .take(RESTARTS)
            .map(|broken| format!("{}: {}", broken.vm, broken.why))
            .collect();
        let broken = match broken.is_empty() {
            true => cell("-", Tone::Dim),
            false => cell(broken.join("\n"), Tone::Bad),
        };
        table.add_row([cell(name, Tone::Bold), cell(text, Tone::Plain), broken]);
    }
    trimmed(&table)
}

fn remarks(out: &Output, capacity: &CapacityView) -> Vec<String> {
    let mark = out.paint(Tone::Warn, "!");
    let mut lines = Vec::new();
    if !capacity.unproven.is_empty() && capacity.plans.len() > 1 {
        lines.push(format!(
            "{mark} The failure of {} is not proven by itself (no armed guard and watchdog, no fence device): their VMs wait for `quorate host confirm-dead`.",
            join(&capacity.unproven)
        ));
    }
    if let Some(spare) = capacity
        .quorum_survives
        .filter(|spare| *spare < capacity.survives)
    {
        let text = match spare {
            0 => "the failure of a voter leaves no majority".to_owned(),
            n => format!(
                "no more than {} may fail at once, or no majority is left",
                count(n as usize, "voter")
            ),
        };
        lines.push(format!(
            "{mark} There is room for more, but {text}: then nothing is started anywhere."
        ));
    }
    for bound in &capacity.bound {
        lines.push(format!(
            "{mark} {} may only run on {} (`hosts`): nothing else takes it over. That is not counted.",
            bound.vm,
            join(&bound.hosts)
        ));
    }
    if !lines.is_empty() {
        lines.push(String::new());
    }
    lines
}
