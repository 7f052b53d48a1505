//! What would happen: the production planner and the production `apply` run forward in virtual time.
//!
//! ```text
//! Snapshot, steps --> for each step: ask -> [ plan -> apply -> hosts act -> time passes ] until rest --> Forecast
//! ```
//! Owns: the loop and what it tells people. Always holds: every action comes out of [`crate::plan`]
//! and went through `State::apply`; the same question on the same snapshot has the same answer; the
//! loop is bounded. Must not: change anything but its own copy. What it does not foresee: faults
//! that nobody asked for, load on hosts, guests that take their own time. Times are estimates
//! ([`estimate`]); migrations that run side by side share their hosts' links ([`links`]).

mod cuts;
mod estimate;
mod links;
mod world;

use crate::{Input, checked, explain, plan, waiting};
use quorate_state::{
    Action, ActionKind, Candidate, Command, HostMode, PlannedAction, Reason, Refusal,
};
use quorate_types::{HostName, Manifest, Millis, Revision, VmName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use world::World;

use crate::Snapshot;

/// Most looks of the planner in one forecast.
const MAX_ROUNDS: u32 = 20_000;
/// Most actions in one forecast.
const MAX_ACTIONS: usize = 100_000;
/// Longest time that is looked ahead.
const HORIZON: Millis = Millis::secs(24 * 3600);
/// Waits of the planner's own that are sat out in a row without anything happening.
const IDLE_WAKES: u32 = 8;
/// VMs without a place that are explained host by host.
const EXPLAINED: usize = 50;

/// One moment of a question: all of this happens at once, as soon as what came before is at rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// A manifest that is applied, with its name.
    pub apply: Option<(String, Manifest)>,
    /// Hosts that fail.
    pub fail: BTreeSet<HostName>,
    /// Hosts that are drained.
    pub drain: BTreeSet<HostName>,
}

impl Step {
    /// In words.
    #[must_use]
    pub fn describe(&self) -> String {
        let list = |hosts: &BTreeSet<HostName>| {
            let names: Vec<&str> = hosts.iter().map(HostName::as_str).collect();
            names.join(" and ")
        };
        let mut parts = Vec::new();
        if let Some((name, _)) = &self.apply {
            parts.push(format!("{name} is applied"));
        }
        match self.fail.len() {
            0 => {}
            1 => parts.push(format!("{} fails", list(&self.fail))),
            _ => parts.push(format!("{} fail at once", list(&self.fail))),
        }
        match self.drain.len() {
            0 => {}
            1 => parts.push(format!("{} is drained", list(&self.drain))),
            _ => parts.push(format!("{} are drained", list(&self.drain))),
        }
        if parts.is_empty() {
            "nothing is asked".to_owned()
        } else {
            parts.join(", ")
        }
    }
}

/// What would happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// The revision that it starts from.
    pub base: Revision,
    /// One for each step.
    pub stages: Vec<Stage>,
    /// Where every VM is in the end; absent: on no host.
    pub placement: BTreeMap<VmName, Option<HostName>>,
}

/// What one step leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What happens, in words.
    pub asked: String,
    /// When it begins, from the start of the forecast.
    pub begins: Millis,
    /// How long it takes until nothing is left to do.
    pub takes: Millis,
    /// How it ends.
    pub end: End,
    /// What is done, in order.
    pub actions: Vec<Foreseen>,
    /// VMs that are elsewhere afterwards.
    pub moved: Vec<Moved>,
    /// VMs whose guests do not run for a while.
    pub outages: Vec<Outage>,
    /// VMs that shall run and do not afterwards.
    pub unplaced: Vec<Unplaced>,
    /// VMs that run and stay where they should not: a drain that cannot be finished, a broken rule.
    pub stays: Vec<Stays>,
}

/// A VM that should leave its host and does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stays {
    /// Which.
    pub vm: VmName,
    /// Where it stays.
    pub host: Option<HostName>,
    /// Why, one sentence.
    pub why: String,
}

/// How a stage ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Nothing is left to do.
    Rest,
    /// No majority of the voters is left: nothing can be done, guests are frozen.
    NoQuorum,
    /// The forecast was given up; the text says why.
    GivenUp(String),
}

/// One action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreseen {
    /// When, from the start of the forecast.
    pub at: Millis,
    /// How long it will probably take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takes: Option<Millis>,
    /// From running CPUs until it is ready, where it has a check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_after: Option<Millis>,
    /// What kind.
    pub kind: ActionKind,
    /// About which VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// The host that it is on before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<HostName>,
    /// The host that gets it, or that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<HostName>,
    /// In words.
    pub text: String,
    /// It stops a guest that shall run.
    #[serde(default)]
    pub stops: bool,
    /// Why.
    pub reason: Reason,
}

/// A VM that is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Which.
    pub vm: VmName,
    /// From here; absent: it was on no host.
    pub from: Option<HostName>,
    /// To here; absent: it is on no host.
    pub to: Option<HostName>,
}

/// A guest that does not run for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    /// Which.
    pub vm: VmName,
    /// For so long; absent: it does not come back.
    pub lasts: Option<Millis>,
    /// VMs that need it and run without it meanwhile.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left_without: BTreeSet<VmName>,
}

/// A VM that shall run and does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unplaced {
    /// Which.
    pub vm: VmName,
    /// Why, one sentence.
    pub why: String,
    /// Every host with its score or its rejection.
    pub candidates: Vec<Candidate>,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForecastError {
    /// It names a host that is not there.
    #[error("there is no host `{0}`")]
    UnknownHost(HostName),
    /// The state machine refuses what is asked.
    #[error("{0}")]
    Refused(Refusal),
}

/// Answers a question. Without steps: what would be done by itself.
///
/// # Errors
/// When the question names what is not there, or asks for what would be refused.
pub fn forecast(snapshot: &Snapshot, steps: &[Step]) -> Result<Forecast, ForecastError> {
    forecast_on(snapshot, steps).map(|(forecast, _)| forecast)
}

/// [`forecast`], with the snapshot as it would be afterwards.
///
/// # Errors
/// As [`forecast`].
pub fn forecast_on(
    snapshot: &Snapshot,
    steps: &[Step],
) -> Result<(Forecast, Snapshot), ForecastError> {
    for host in steps
        .iter()
        .flat_map(|step| step.fail.iter().chain(&step.drain))
    {
        if !snapshot.state.hosts.contains_key(host) {
            return Err(ForecastError::UnknownHost(host.clone()));
        }
    }
    let mut run = Run {
        world: World::new(snapshot),
        rounds: 0,
        actions: 0,
    };
    let alone = [Step::default()];
    let steps = if steps.is_empty() { &alone } else { steps };
    let mut stages = Vec::new();
    for step in steps {
        stages.push(run.stage(step)?);
        run.world.replace_voters();
    }
    let placement = run.placement();
    let forecast = Forecast {
        base: snapshot.state.revision,
        stages,
        placement,
    };
    let after = Snapshot {
        state: run.world.state,
        seen: run.world.seen,
        ..snapshot.clone()
    };
    Ok((forecast, after))
}

struct Run {
    world: World,
    rounds: u32,
    actions: usize,
}

impl Run {
    fn stage(&mut self, step: &Step) -> Result<Stage, ForecastError> {
        let before = self.placement();
        let begins = self.world.elapsed();
        self.ask(step)?;
        let mut stage = Stage {
            asked: step.describe(),
            begins,
            takes: Millis(0),
            end: End::Rest,
            actions: Vec::new(),
            moved: Vec::new(),
            outages: Vec::new(),
            unplaced: Vec::new(),
            stays: Vec::new(),
        };
        stage.end = if self.world.quorate() {
            self.settle(&mut stage)
        } else {
            End::NoQuorum
        };
        let last = stage.actions.last();
        let last = last.map_or(0, |last| last.at.0 + last.takes.map_or(0, |takes| takes.0));
        stage.takes = Millis(last.max(self.world.elapsed().0).saturating_sub(begins.0));
        for (vm, down) in std::mem::take(&mut self.world.down) {
            stage.outages.push(Outage {
                vm,
                lasts: None,
                left_without: down.left_without,
            });
        }
        stage.outages.sort_by(|a, b| a.vm.cmp(&b.vm));
        stage.moved = moved(&before, &self.placement());
        if stage.end != End::NoQuorum {
            stage.unplaced = unplaced(&self.world);
            stage.stays = stays(&self.world);
        }
        Ok(stage)
    }

    fn ask(&mut self, step: &Step) -> Result<(), ForecastError> {
        let mut commands = Vec::new();
        if let Some((_, manifest)) = &step.apply {
            let manifest = manifest.clone();
            commands.push(Command::ApplyManifest {
                base: None,
                manifest,
            });
        }
        for host in &step.drain {
            let mode = HostMode::Draining;
            commands.push(Command::SetHostMode {
                host: host.clone(),
                mode,
            });
        }
        for command in commands {
            self.world
                .command(command)
                .map_err(ForecastError::Refused)?;
        }
        self.world.fail(&step.fail);
        Ok(())
    }

    /// Plans and lets time pass until nothing is left to do.
    fn settle(&mut self, stage: &mut Stage) -> End {
        let mut idle = 0;
        let mut rest = self.world.seen.now;
        loop {
            self.rounds += 1;
            if self.rounds > MAX_ROUNDS || self.actions > MAX_ACTIONS {
                return End::GivenUp(format!(
                    "it was not at rest after {} looks and {} actions",
                    self.rounds, self.actions
                ));
            }
            if self.world.elapsed() > HORIZON {
                return End::GivenUp("it would take longer than a day".to_owned());
            }
            self.world.observe();
            // As the leader does it, with the linter's word.
            let (made, broken) = checked(&self.world.input(), plan(&self.world.input()));
            assert!(!cfg!(test) || broken.is_empty(), "{broken:?}");
            if !made.actions.is_empty() {
                idle = 0;
                rest = self.world.seen.now;
                self.actions += made.actions.len();
                let foreseen: Vec<Foreseen> = made
                    .actions
                    .iter()
                    .map(|planned| foresee(&self.world, planned))
                    .collect();
                if let Err(refusal) = self.world.command(Command::CommitPlan(made)) {
                    return End::GivenUp(format!("the state machine refused a plan: {refusal}"));
                }
                stage.actions.extend(foreseen);
                self.world.begin();
                continue;
            }
            self.world.begin();
            let due = self.world.next_due();
            let wake = self.world.seen.memory.next_due(self.world.seen.now);
            let wants = || !waiting(&self.world.input()).is_empty();
            let next = match (due, wake) {
                (Some(due), _) => {
                    rest = due;
                    due
                }
                (None, Some(wake)) if idle < IDLE_WAKES && wants() => {
                    idle += 1;
                    wake
                }
                _ => {
                    // Waits that came to nothing did not happen.
                    self.world.seen.now = rest;
                    return End::Rest;
                }
            };
            let passed = self.world.pass_until(next);
            let back = passed.back.into_iter();
            stage.outages.extend(back.map(|(vm, span, left)| Outage {
                vm,
                lasts: Some(span),
                left_without: left,
            }));
            for (vm, span) in passed.migrated {
                stage.took(&vm, span);
            }
        }
    }

    fn placement(&self) -> BTreeMap<VmName, Option<HostName>> {
        let vms = self.world.state.vms.iter();
        vms.map(|(vm, record)| {
            let host = record
                .ownership
                .host()
                .filter(|_| !record.wanted() || self.world.runs(vm));
            (vm.clone(), host.cloned())
        })
        .collect()
    }
}

impl Stage {
    /// A live migration took so long: alone it would have been faster.
    fn took(&mut self, vm: &VmName, span: Millis) {
        let mut newest = self.actions.iter_mut().rev();
        let begun = |action: &&mut Foreseen| {
            action.kind == ActionKind::Migrate && action.vm.as_ref() == Some(vm)
        };
        if let Some(action) = newest.find(begun) {
            action.takes = Some(span);
        }
    }
}

fn moved(
    before: &BTreeMap<VmName, Option<HostName>>,
    after: &BTreeMap<VmName, Option<HostName>>,
) -> Vec<Moved> {
    let vms: BTreeSet<&VmName> = before.keys().chain(after.keys()).collect();
    let change = |vm: &VmName| {
        let from = before.get(vm).cloned().flatten();
        let to = after.get(vm).cloned().flatten();
        (from != to).then(|| Moved {
            vm: vm.clone(),
            from,
            to,
        })
    };
    vms.into_iter().filter_map(change).collect()
}

fn stays(world: &World) -> Vec<Stays> {
    let said = waiting(&world.input()).into_iter();
    let runs = said.filter(|(vm, _)| world.runs(vm));
    runs.map(|(vm, why)| {
        let record = world.state.vms.get(&vm);
        let host = record.and_then(|record| record.ownership.host().cloned());
        Stays { vm, host, why }
    })
    .collect()
}

fn unplaced(world: &World) -> Vec<Unplaced> {
    let input: Input<'_> = world.input();
    let mut said = waiting(&input);
    let missing = world
        .state
        .vms
        .iter()
        .filter(|(vm, record)| record.wanted() && !world.runs(vm));
    missing
        .enumerate()
        .map(|(n, (vm, _))| {
            let explained = (n < EXPLAINED).then(|| explain(&input, vm)).flatten();
            Unplaced {
                vm: vm.clone(),
                why: said
                    .remove(vm)
                    .unwrap_or_else(|| "it does not run".to_owned()),
                candidates: explained.map(|found| found.candidates).unwrap_or_default(),
            }
        })
        .collect()
}

/// An action as people are told of it, before it is applied.
fn foresee(world: &World, planned: &PlannedAction) -> Foreseen {
    let action = &planned.action;
    let vm = action.vm();
    let record = vm.and_then(|vm| world.state.vms.get(vm));
    let owner = record.and_then(|record| record.ownership.host().cloned());
    let (mut takes, mut ready_after, mut stops) = (None, None, false);
    let mut to = None;
    match (action, record) {
        (Action::Start { vm, host, .. }, Some(record)) => {
            takes = Some(world.estimates.start(vm, record));
            ready_after = estimate::Estimates::ready(record);
            to = Some(host.clone());
        }
        (Action::Migrate { vm, to: target }, Some(record)) => {
            takes = Some(world.estimates.migration(vm, record));
            to = Some(target.clone());
        }
        (Action::Stop { mode, .. }, Some(record)) => {
            takes = Some(estimate::Estimates::stop(record, *mode));
            stops = record.wanted();
        }
        (Action::SetHostMode { host, .. }, _) => to = Some(host.clone()),
        _ => {}
    }
    Foreseen {
        at: world.elapsed(),
        takes,
        ready_after,
        kind: action.kind(),
        vm: vm.cloned(),
        from: owner,
        to,
        text: action.describe(),
        stops,
        reason: planned.reason.clone(),
    }
}
