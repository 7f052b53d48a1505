//! Questions answered from a snapshot: the same functions serve the routes and the command line
//! with a saved state, so that both give the same answer.
//!
//! Always holds: pure; nothing is changed by asking. May take long on large clusters: callers keep
//! it off the threads that serve requests.

use crate::answers::{
    BalanceView, BoundView, BrokenView, CapacityView, PlaceView, PlanRequest, PlanView,
    RestartPlanView, StepRequest, ThenView,
};
use crate::build::{Answering, Observed, ObservedHost, build};
use crate::error::{ApiError, ErrorCode};
use crate::routes::{existing, explanation};
use crate::view::{ClusterView, DecisionView, Explanation, PlacementView};
use quorate_manifest::{ParsedManifest, Problem, load};
use quorate_planner::{
    CapacityQuestion, FailureSet, ForecastError, Shortfall, Snapshot, Step, balance as even_out,
    capacity as room, forecast_on, shortfall,
};
use quorate_state::{Command, Envelope, FORMAT, State};
use quorate_types::{AdmissionMode, HostName, LabelName, Manifest, Millis, Timestamp, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// Steps in one question.
const MAX_STEPS: usize = 16;
/// Hosts times VMs up to which a plan also tells the room for failures afterwards.
const ROOM_WORKED_OUT: usize = 200_000;
/// Labels that are failure domains by their name.
const DOMAINS: &[&str] = &[
    "rack", "row", "room", "floor", "building", "site", "zone", "power",
];
/// VMs without a place that are pointed out in a manifest.
const POINTED_OUT: usize = 5;

/// What would happen.
///
/// # Errors
/// When the question names what is not there, or asks for what would be refused.
pub fn plan(snapshot: &Snapshot, request: &PlanRequest) -> Result<PlanView, ApiError> {
    if request.steps.len() > MAX_STEPS {
        let message = format!("a question has at most {MAX_STEPS} steps");
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let steps = request.steps.iter().map(|step| read(snapshot, step));
    let steps = steps.collect::<Result<Vec<Step>, ApiError>>()?;
    let (forecast, after) = forecast_on(snapshot, &steps).map_err(|error| match error {
        ForecastError::UnknownHost(host) => unknown_host(&snapshot.state, &host),
        ForecastError::Refused(refusal) => refusal.into(),
    })?;
    let work = snapshot.state.hosts.len() * snapshot.state.vms.len();
    let survives_then = (work <= ROOM_WORKED_OUT).then(|| {
        let question = CapacityQuestion {
            failures: Some(2),
            ..CapacityQuestion::default()
        };
        room(&after.input(), &question).survives
    });
    let place = |(vm, host)| PlaceView { vm, host };
    Ok(PlanView {
        revision: forecast.base,
        at: snapshot.saved,
        stages: forecast
            .stages
            .into_iter()
            .map(|stage| crate::services::told(&snapshot.state, stage.into()))
            .collect(),
        placement: forecast.placement.into_iter().map(place).collect(),
        survives_then,
    })
}

fn unknown_host(state: &State, host: &HostName) -> ApiError {
    ApiError::unknown(
        "host",
        host.as_str(),
        state.hosts.keys().map(HostName::as_str),
    )
}

fn read(snapshot: &Snapshot, step: &StepRequest) -> Result<Step, ApiError> {
    let apply = match &step.apply {
        None => None,
        Some(asked) => {
            let existing = existing(&snapshot.state);
            let parsed = load(&asked.text, &asked.file, &asked.variables, &existing)
                .map_err(ApiError::manifest)?;
            Some((asked.file.clone(), parsed.manifest))
        }
    };
    Ok(Step {
        apply,
        fail: step.fail.iter().cloned().collect(),
        drain: step.drain.iter().cloned().collect(),
    })
}

/// How many failures the cluster survives.
#[must_use]
pub fn capacity(
    snapshot: &Snapshot,
    failures: Option<u32>,
    domain: Option<&LabelName>,
) -> CapacityView {
    let question = CapacityQuestion {
        failures,
        domains: domains(&snapshot.state, domain),
    };
    let found = room(&snapshot.input(), &question);
    let admission = snapshot.state.settings().admission;
    let bound = |bound: quorate_planner::Bound| BoundView {
        vm: bound.vm,
        hosts: bound.hosts.into_iter().collect(),
    };
    CapacityView {
        survives: found.survives,
        checked: found.checked,
        complete: found.complete,
        quorum_survives: quorum_survives(snapshot),
        wanted: admission.failures,
        mode: admission.mode,
        plans: found.plans.into_iter().map(RestartPlanView::from).collect(),
        broken: found.broken.into_iter().map(BrokenView::from).collect(),
        broken_more: found.broken_more,
        bound: found.bound.into_iter().map(bound).collect(),
        unproven: found.unproven,
    }
}

/// Hosts that have the same value of a label fail together, for labels that are failure domains: those that
/// rules go by, those that are called so, and the one that is asked for.
fn domains(state: &State, asked: Option<&LabelName>) -> Vec<FailureSet> {
    let mut labels: BTreeSet<&LabelName> = asked.into_iter().collect();
    let rules = state.rules.values();
    labels.extend(rules.filter_map(|rule| rule.spec.across.as_ref()));
    let given = state
        .hosts
        .values()
        .flat_map(|host| host.spec.labels.keys());
    labels.extend(given.filter(|label| DOMAINS.contains(&label.as_str())));
    let mut sets: BTreeMap<(&LabelName, &LabelName), BTreeSet<HostName>> = BTreeMap::new();
    for (name, host) in &state.hosts {
        for (label, value) in host
            .spec
            .labels
            .iter()
            .filter(|(label, _)| labels.contains(label))
        {
            sets.entry((label, value)).or_default().insert(name.clone());
        }
    }
    // A domain of one host is that host.
    let several = sets.into_iter().filter(|(_, hosts)| hosts.len() > 1);
    several
        .map(|((label, value), hosts)| FailureSet {
            name: Some(format!("{label} {value}")),
            hosts,
        })
        .collect()
}

/// Voters that may fail at once and a majority is left.
fn quorum_survives(snapshot: &Snapshot) -> Option<u32> {
    let voters = &snapshot.seen.voters;
    let up = voters.iter().filter(|node| {
        let host = snapshot.state.host_of_node(**node);
        let health = host.and_then(|host| snapshot.seen.health.get(host));
        health == Some(&quorate_membership::HostHealth::Up)
    });
    let majority = voters.len() / 2 + 1;
    let spare = up.count().saturating_sub(majority);
    (!voters.is_empty()).then(|| u32::try_from(spare).unwrap_or(0))
}

/// What would even out load.
#[must_use]
pub fn balance(snapshot: &Snapshot) -> BalanceView {
    even_out(&snapshot.input()).into()
}

/// Why a VM is where it is, or was at a time in the past.
///
/// # Errors
/// When there is no such VM.
pub fn explain(
    snapshot: &Snapshot,
    vm: &VmName,
    at: Option<Timestamp>,
) -> Result<Explanation, ApiError> {
    let view = view(snapshot)?;
    let state = &snapshot.state;
    let names = || state.vms.keys().map(VmName::as_str);
    let found = view.vms.iter().find(|seen| seen.name == *vm).cloned();
    let found = found.ok_or_else(|| ApiError::unknown("VM", vm.as_str(), names()))?;
    let mut explained = explanation(state, &view.vms, found);
    let placement = quorate_planner::explain(&snapshot.input(), vm);
    explained.placement = placement.map(|found| PlacementView {
        best: found.best,
        candidates: found.candidates,
    });
    explained.then = at.map(|at| then(state, vm, at));
    Ok(explained)
}

/// The cluster as it was seen.
///
/// # Errors
/// When there is no host in it.
pub fn view(snapshot: &Snapshot) -> Result<ClusterView, ApiError> {
    let seen = &snapshot.seen;
    let host = |name: &HostName| {
        let health = seen.health.get(name).copied();
        let observed = ObservedHost {
            health: health.unwrap_or(quorate_membership::HostHealth::Suspect),
            lease_left: Millis(0),
            report: seen.reports.get(name).cloned(),
            fencing: None,
        };
        (name.clone(), observed)
    };
    let observed = seen.leader.as_ref().map(|leader| Observed {
        leader: Some(leader.clone()),
        quorate: true,
        voters: seen.voters.clone(),
        hosts: snapshot.state.hosts.keys().map(host).collect(),
        waiting: quorate_planner::waiting(&snapshot.input()),
        ..Observed::default()
    });
    let nobody = snapshot.state.hosts.keys().next().cloned();
    let Some(answers) = seen.leader.clone().or(nobody) else {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            "there is no host in this state",
        ));
    };
    let me = Answering {
        host: answers,
        version: snapshot.version.clone(),
    };
    Ok(build(&snapshot.state, observed.as_ref(), &me))
}

/// Where a VM was, by the decisions that are kept.
pub(crate) fn then(state: &State, vm: &VmName, at: Timestamp) -> ThenView {
    let decisions = state.vms.get(vm).map(|record| record.decisions.as_slice());
    let decisions = decisions.unwrap_or_default();
    let held = decisions.iter().rev().find(|decision| decision.at <= at);
    let next = decisions.iter().find(|decision| decision.at > at);
    let host = held.and_then(|decision| decision.host.clone());
    let text = match (held, &host) {
        (Some(_), Some(host)) => format!("{host} had it"),
        (Some(_), None) => "no host had it".to_owned(),
        (None, _) if decisions.is_empty() => "no decision about it is kept".to_owned(),
        (None, _) => "that is before the oldest decision about it that is kept".to_owned(),
    };
    ThenView {
        at,
        host,
        text,
        decision: held.map(DecisionView::from),
        next: next.map(DecisionView::from),
    }
}

/// What admission control says of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Admitted {
    /// Nothing.
    Yes,
    /// It is made with these warnings.
    Warned(Vec<String>),
    /// It takes room for failures that the settings want kept.
    No(Shortfall),
}

/// Judges a command by the room that it leaves for failures.
pub(crate) fn admit(snapshot: &Snapshot, command: &Command) -> Admitted {
    let mut after = snapshot.state.clone();
    let envelope = Envelope {
        format: FORMAT,
        at: snapshot.saved,
        by: "admission".into(),
        command: command.clone(),
    };
    // What the state machine refuses is told by it.
    if after.apply(&envelope).is_err() {
        return Admitted::Yes;
    }
    let mode = after.settings().admission.mode;
    if mode == AdmissionMode::Off {
        return Admitted::Yes;
    }
    match shortfall(&snapshot.input(), &after) {
        None => Admitted::Yes,
        Some(short) if mode == AdmissionMode::Refuse => Admitted::No(short),
        Some(short) => Admitted::Warned(short.broken.iter().map(sentence).collect()),
    }
}

/// "if h2 failed, app would find no place: ...".
fn sentence(broken: &quorate_planner::Broken) -> String {
    let hosts: Vec<&str> = broken.fails.iter().map(HostName::as_str).collect();
    match hosts.as_slice() {
        [] => format!("{} finds no place: {}", broken.vm, broken.why),
        hosts => format!(
            "if {} failed, {} would find no place: {}",
            hosts.join(" and "),
            broken.vm,
            broken.why
        ),
    }
}

/// A refusal that points at what takes the room.
pub(crate) fn refused(short: &Shortfall, parsed: &ParsedManifest, state: &State) -> ApiError {
    let shown = short.broken.iter().take(POINTED_OUT);
    let problems: Vec<Problem> = shown
        .map(|broken| Problem {
            path: culprit(&parsed.manifest, state, &broken.vm),
            message: sentence(broken),
            hint: None,
        })
        .collect();
    let more = short.broken.len().saturating_sub(POINTED_OUT);
    ApiError {
        diagnostics: Some(parsed.diagnose(&problems)),
        ..no(format!("{}{}", wish(short), and_more(more)))
    }
}

/// A refusal without a manifest.
pub(crate) fn too_little(short: &Shortfall) -> ApiError {
    let first = short.broken.first().map(sentence).unwrap_or_default();
    let more = and_more(short.broken.len().saturating_sub(1));
    no(format!("{}: {first}{more}", wish(short)))
}

fn wish(short: &Shortfall) -> String {
    let hosts = match short.wanted {
        1 => "any host fails".to_owned(),
        n => format!("any {n} hosts fail"),
    };
    format!(
        "it was not done, because every VM shall find a place when {hosts} (`cluster.admission`)"
    )
}

fn and_more(more: usize) -> String {
    match more {
        0 => String::new(),
        n => format!(" (and {n} more like it)"),
    }
}

fn no(message: String) -> ApiError {
    ApiError::new(ErrorCode::Conflict, message).hint(
        "add memory or a host, or make VMs smaller (`quorate capacity` shows the room); `admission: {mode: warn}` under `cluster:` in the manifest lets it through",
    )
}

/// The part of the manifest that takes the room: the VM itself if it is new or changed there, else the
/// largest one that is.
fn culprit(manifest: &Manifest, state: &State, vm: &VmName) -> Vec<String> {
    let changes = |name: &VmName| {
        let old = state.vms.get(name).map(|record| &record.spec);
        manifest.vms.get(name).is_some_and(|new| old != Some(new))
    };
    let own = Some(vm).filter(|vm| changes(vm));
    let largest = manifest.vms.iter().filter(|(name, _)| changes(name));
    let largest = largest
        .max_by_key(|(_, spec)| spec.memory)
        .map(|(name, _)| name);
    match own.or(largest) {
        Some(name) => vec!["vms".into(), name.to_string(), "memory".into()],
        None if !manifest.rules.is_empty() => vec!["rules".into()],
        None => vec!["cluster".into()],
    }
}
