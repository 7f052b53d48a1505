//! `plan`: what would happen. The pages are pure: answers in, text out.

use super::args::PlanArgs;
use super::error::CliError;
use super::output::{Output, Tone, cell, count, span, trimmed};
use super::{Context, cib, manifest, saved, show};
use clap::{Arg, ArgAction, ArgMatches, value_parser};
use quorate_api::answers::{
    ActionView, BalanceView, PlaceView, PlanRequest, PlanView, StageEnd, StageView, StepRequest,
};
use quorate_api::{ClientError, questions};
use quorate_state::ActionKind;
use quorate_types::{BalancingMode, HostName, VmName};
use std::collections::BTreeMap;
use std::time::Duration;

/// Rows of one table; `--output json` has them all.
const ROWS: usize = 200;
/// VMs named in one line.
const NAMED: usize = 12;
/// A question about a large cluster may take long.
const PATIENCE: Duration = Duration::from_secs(300);

/// What comes after what was asked first, in the order of the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Thens(pub(crate) Vec<Then>);

/// One step after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Then {
    Fail(HostName),
    Drain(HostName),
}

const THEN_FAIL: &str = "then_fail";
const THEN_DRAIN: &str = "then_drain";

impl clap::FromArgMatches for Thens {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut thens = Self::default();
        thens.update_from_arg_matches(matches)?;
        Ok(thens)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let of = |id: &str, make: fn(HostName) -> Then| {
            let places = matches.indices_of(id).into_iter().flatten();
            let hosts = matches.get_many::<HostName>(id).into_iter().flatten();
            let both = places.zip(hosts.cloned().map(make));
            both.collect::<Vec<(usize, Then)>>()
        };
        let mut all = of(THEN_FAIL, Then::Fail);
        all.extend(of(THEN_DRAIN, Then::Drain));
        all.sort_by_key(|(place, _)| *place);
        self.0 = all.into_iter().map(|(_, then)| then).collect();
        Ok(())
    }
}

impl clap::Args for Thens {
    fn augment_args(command: clap::Command) -> clap::Command {
        let then = |id: &'static str, long: &'static str, help: &'static str| {
            Arg::new(id)
                .long(long)
                .value_name("HOST")
                .value_parser(value_parser!(HostName))
                .action(ArgAction::Append)
                .help(help)
        };
        command
            .arg(then(
                THEN_FAIL,
                "then-fail",
                "Then, with all that at rest, this host fails",
            ))
            .arg(then(
                THEN_DRAIN,
                "then-drain",
                "Then, with all that at rest, this host is drained",
            ))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

pub(crate) async fn run(context: &Context, args: PlanArgs) -> Result<(), CliError> {
    if let Some(file) = &args.cib.cib {
        return cib::plan(&context.output, file, args.cib.partial);
    }
    let client = context.client.clone().timeout(PATIENCE);
    if args.balance {
        let answer: BalanceView = match &args.saved.state {
            Some(path) => questions::balance(&saved::read(path)?),
            None => client.get("/api/v1/balance").await?,
        };
        return context
            .output
            .print(&answer, |out| balance_page(out, &answer));
    }
    let request = request(&args)?;
    let answer: PlanView = match &args.saved.state {
        Some(path) => questions::plan(&saved::read(path)?, &request).map_err(ClientError::from)?,
        None => client.post("/api/v1/plan", &request).await?,
    };
    context
        .output
        .print(&answer, |out| page(out, &answer, args.verbose))
}

fn request(args: &PlanArgs) -> Result<PlanRequest, CliError> {
    let mut steps = Vec::new();
    if let Some(path) = &args.apply {
        let apply = Some(manifest::request(path)?);
        steps.push(StepRequest {
            apply,
            ..StepRequest::default()
        });
    }
    if !args.fail.is_empty() || !args.drain.is_empty() {
        steps.push(StepRequest {
            fail: args.fail.clone(),
            drain: args.drain.clone(),
            ..StepRequest::default()
        });
    }
    for then in &args.then.0 {
        let mut step = StepRequest::default();
        match then {
            Then::Fail(host) => step.fail.push(host.clone()),
            Then::Drain(host) => step.drain.push(host.clone()),
        }
        steps.push(step);
    }
    Ok(PlanRequest { steps })
}

/// All of a plan.
pub(crate) fn page(out: &Output, plan: &PlanView, verbose: bool) -> String {
    let mut parts = Vec::new();
    let asked =
        plan.stages.len() > 1 || plan.stages.iter().any(|stage| stage.asked != NOTHING_ASKED);
    for (n, stage) in plan.stages.iter().enumerate() {
        let title = match (asked, n) {
            (false, _) => "What happens by itself".to_owned(),
            (true, 0) => format!("If {}", stage.asked),
            (true, _) => format!("then, if {}", stage.asked),
        };
        parts.push(out.paint(Tone::Bold, &title));
        parts.push(stage_text(out, stage, verbose));
        parts.push(String::new());
    }
    if asked {
        parts.push(places(out, &plan.placement));
        parts.push(String::new());
        if let Some(line) = afterwards(out, plan) {
            parts.push(line);
        }
    }
    let note = format!(
        "Nothing was changed. From revision {}; times are estimates.",
        plan.revision
    );
    parts.push(out.paint(Tone::Dim, &note));
    parts.join("\n")
}

/// What the planner says where there are no steps.
const NOTHING_ASKED: &str = "nothing is asked";

fn afterwards(out: &Output, plan: &PlanView) -> Option<String> {
    let well = |stage: &StageView| {
        stage.unplaced.is_empty() && stage.stays.is_empty() && stage.end == StageEnd::Rest
    };
    let all = plan.stages.iter().all(well);
    let line = match plan.survives_then? {
        _ if !all => return None,
        0 => out.paint(
            Tone::Warn,
            "After that the failure of one more host would leave VMs without a place.",
        ),
        1 => "After that any one more host may fail.".to_owned(),
        n => format!("After that any {n} more hosts may fail at once."),
    };
    Some(line)
}

fn stage_text(out: &Output, stage: &StageView, verbose: bool) -> String {
    let mut parts = Vec::new();
    let rows = rows(stage);
    if !rows.is_empty() {
        let mut table = out.table(&["WHEN", "ACTION", "VM", "FROM", "TO", "TAKES", "WHY"]);
        for row in rows.iter().take(ROWS) {
            table.add_row([
                cell(format!("+{}", span(row.at_ms)), Tone::Dim),
                cell(row.action, row.tone),
                cell(&row.vm, Tone::Bold),
                cell(&row.from, Tone::Plain),
                cell(&row.to, Tone::Plain),
                cell(&row.takes, Tone::Plain),
                cell(&row.why, Tone::Plain),
            ]);
        }
        parts.push(trimmed(&table));
        if rows.len() > ROWS {
            parts.push(format!(
                "  ... and {} more: `--output json` has them all",
                rows.len() - ROWS
            ));
        }
    }
    if verbose {
        parts.push(String::new());
        parts.extend(
            stage
                .actions
                .iter()
                .filter(|action| row(action).is_some())
                .map(|action| reason(out, action)),
        );
    }
    parts.extend(ending(out, stage, rows.is_empty()));
    parts.join("\n")
}

/// What a line of the table shows.
struct Row {
    at_ms: u64,
    action: &'static str,
    tone: Tone,
    vm: String,
    from: String,
    to: String,
    takes: String,
    why: String,
}

/// The actions worth a line; VMs that leave one lost host together take one.
fn rows(stage: &StageView) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for new in stage.actions.iter().filter_map(row) {
        match rows.last_mut() {
            Some(last) if new.action == LOST && last.action == LOST && last.from == new.from => {
                last.vm = format!("{} {}", last.vm, new.vm);
            }
            _ => rows.push(new),
        }
    }
    for row in rows.iter_mut().filter(|row| row.action == LOST) {
        let names: Vec<&str> = row.vm.split(' ').collect();
        if names.len() > NAMED {
            row.vm = format!("{} ... ({})", names[..NAMED].join(" "), names.len());
        }
    }
    rows
}

const LOST: &str = "take over";

fn row(action: &ActionView) -> Option<Row> {
    let lost = action.kind == ActionKind::Release && action.why.contains("is lost");
    let (name, tone) = match action.kind {
        ActionKind::Start => ("start", Tone::Good),
        ActionKind::Migrate => ("migrate", Tone::Busy),
        ActionKind::Stop if action.stops => ("stop", Tone::Bad),
        ActionKind::Stop => ("stop", Tone::Warn),
        ActionKind::Release if lost => (LOST, Tone::Warn),
        ActionKind::CancelMigration => ("cancel", Tone::Warn),
        ActionKind::SetHostMode => ("empty", Tone::Good),
        ActionKind::Forget => ("forget", Tone::Plain),
        ActionKind::AbandonSave => ("go on", Tone::Warn),
        ActionKind::AddCopy => ("copy", Tone::Plain),
        ActionKind::CopyInStep => ("in step", Tone::Good),
        ActionKind::CopyOutOfStep => ("out of step", Tone::Warn),
        ActionKind::SettleCopies => ("settle", Tone::Plain),
        ActionKind::RemoveCopy => ("uncopy", Tone::Plain),
        ActionKind::Release | ActionKind::FinishMigration | ActionKind::ClearMove => return None,
    };
    let host = |host: &Option<HostName>| {
        host.as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string)
    };
    let takes = match (action.takes_ms, action.ready_after_ms) {
        (Some(takes), Some(ready)) => format!("{}, ready +{}", span(takes), span(ready)),
        (Some(takes), None) => span(takes),
        _ => "-".to_owned(),
    };
    let starts = action.kind == ActionKind::Start;
    Some(Row {
        at_ms: action.at_ms,
        action: name,
        tone,
        vm: action
            .vm
            .as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string),
        from: if starts {
            "-".to_owned()
        } else {
            host(&action.from)
        },
        to: host(&action.to),
        takes,
        why: action.why.clone(),
    })
}

/// An action with what it rests on.
fn reason(out: &Output, action: &ActionView) -> String {
    let mut lines = vec![format!(
        "  {}  {}",
        out.paint(Tone::Dim, &format!("+{}", span(action.at_ms))),
        action.text
    )];
    lines.push(format!("      because {}", action.why));
    lines.extend(action.evidence.iter().map(|fact| format!("      - {fact}")));
    let candidates = action.candidates.iter();
    lines.extend(candidates.map(|candidate| show::candidate_line(candidate, 6)));
    lines.join("\n")
}

/// How it ends: what stands still, what does not run.
fn ending(out: &Output, stage: &StageView, nothing: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let bad = |text: String| format!("  {} {text}", out.paint(Tone::Bad, "✗"));
    match stage.end {
        StageEnd::Rest if nothing && stage.unplaced.is_empty() && stage.stays.is_empty() => {
            lines.push("  Nothing is to be done.".to_owned());
        }
        StageEnd::Rest if nothing => {}
        StageEnd::Rest => {
            let stops = match stage.outages.len() {
                0 => "; no guest stands still",
                _ => "",
            };
            lines.push(format!("  At rest after {}{stops}.", span(stage.takes_ms)));
        }
        StageEnd::NoQuorum => lines.push(bad(
            "No majority of the voters is left: nothing can be started or moved, and the guests that are left freeze until one is back.".to_owned(),
        )),
        StageEnd::GivenUp => {
            let why = stage.problem.as_deref().unwrap_or("no cause is known");
            lines.push(bad(format!("The forecast was given up: {why}.")));
        }
    }
    let back: Vec<String> = stage
        .outages
        .iter()
        .filter_map(|outage| Some(format!("{} {}", outage.vm, span(outage.lasts_ms?))))
        .collect();
    if !back.is_empty() {
        let shown = back
            .iter()
            .take(NAMED)
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        let more = match back.len().saturating_sub(NAMED) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        lines.push(format!("  Stand still meanwhile: {shown}{more}."));
    }
    let left = stage
        .outages
        .iter()
        .filter(|one| !one.left_without.is_empty());
    lines.extend(left.take(NAMED).map(|outage| {
        let names: Vec<&str> = outage.left_without.iter().map(VmName::as_str).collect();
        format!("  Without {} meanwhile: {}.", outage.vm, names.join(", "))
    }));
    let services = stage.services.iter().take(NAMED);
    lines.extend(services.map(|text| format!("  {text}.")));
    let shown = stage.unplaced.iter().take(NAMED);
    lines.extend(shown.map(|missing| bad(format!("{} does not run: {}", missing.vm, missing.why))));
    match stage.unplaced.len().saturating_sub(NAMED) {
        0 => {}
        n => lines.push(bad(format!("and {} more", count(n, "VM")))),
    }
    let mark = out.paint(Tone::Warn, "!");
    for stays in stage.stays.iter().take(NAMED) {
        let place = match &stays.host {
            Some(host) => format!(" on {host}"),
            None => String::new(),
        };
        lines.push(format!("  {mark} {} stays{place}: {}", stays.vm, stays.why));
    }
    match stage.stays.len().saturating_sub(NAMED) {
        0 => {}
        n => lines.push(format!("  {mark} and {} more stay", count(n, "VM"))),
    }
    lines
}

/// Where every VM is in the end.
fn places(out: &Output, placement: &[PlaceView]) -> String {
    let mut hosts: BTreeMap<Option<&HostName>, Vec<&str>> = BTreeMap::new();
    for place in placement {
        hosts
            .entry(place.host.as_ref())
            .or_default()
            .push(place.vm.as_str());
    }
    let mut table = out.table(&["THEN ON", "VMS"]);
    let none = hosts.remove(&None);
    let rows = hosts
        .into_iter()
        .map(|(host, vms)| (host.map(HostName::as_str), vms));
    for (host, vms) in rows.chain(none.map(|vms| (None, vms))) {
        let names = match vms.len() {
            0..=20 => vms.join(" "),
            n => format!("{} ... ({n})", vms[..16].join(" ")),
        };
        table.add_row([
            cell(host.unwrap_or("no host"), Tone::Bold),
            cell(names, Tone::Plain),
        ]);
    }
    trimmed(&table)
}

/// What would even out load.
pub(crate) fn balance_page(out: &Output, balance: &BalanceView) -> String {
    let mut parts = Vec::new();
    let headline = match (&balance.blocked, balance.moves.len()) {
        (Some(why), _) => format!("Not now: {why}."),
        (None, 0) => "Evenly enough loaded: no move gains more than it costs.".to_owned(),
        (None, n) => format!("{} would even out load.", count(n, "live migration")),
    };
    parts.push(out.paint(Tone::Bold, &headline));
    if !balance.moves.is_empty() {
        let mut table = out.table(&["VM", "FROM", "TO", "GAIN", "TAKES", "WHY"]);
        for advice in &balance.moves {
            let vms: Vec<&str> = advice.vms.iter().map(|vm| vm.as_str()).collect();
            table.add_row([
                cell(vms.join(" "), Tone::Bold),
                cell(&advice.from, Tone::Plain),
                cell(&advice.to, Tone::Plain),
                cell(format!("{} %", advice.gain_percent), Tone::Good),
                cell(span(advice.takes_ms), Tone::Plain),
                cell(&advice.why, Tone::Plain),
            ]);
        }
        parts.push(String::new());
        parts.push(trimmed(&table));
    }
    let mut table = out.table(&["HOST", "NOW", "THEN"]);
    for host in &balance.hosts {
        table.add_row([
            cell(&host.host, Tone::Bold),
            cell(format!("{} %", host.now_percent), Tone::Plain),
            cell(format!("{} %", host.then_percent), Tone::Plain),
        ]);
    }
    parts.push(String::new());
    parts.push(trimmed(&table));
    let mode = match balance.mode {
        BalancingMode::Off => {
            "Balancing is off (`cluster.balancing.mode`: `advise` shows this in `quorate status`)."
                .to_owned()
        }
        BalancingMode::Advise => {
            "Nothing is moved by itself (`cluster.balancing.mode`: `auto` would).".to_owned()
        }
        BalancingMode::Auto => format!(
            "These moves are made by themselves, one at a time; {} left in this hour.",
            count(balance.left_this_hour as usize, "move")
        ),
    };
    parts.push(String::new());
    parts.push(out.paint(Tone::Dim, &mode));
    parts.join("\n")
}
