//! Answers to questions, as clients see them: plans, room for failures, balance, past placements.
//! Stable JSON: fields are added, never changed.

use crate::view::{DecisionView, ManifestRequest};
use quorate_planner as planner;
use quorate_state::{ActionKind, Candidate};
use quorate_types::{AdmissionMode, BalancingMode, HostName, Millis, Revision, Timestamp, VmName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A question: what would happen?
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// One after the other, each when the one before is at rest. None: what is done by itself now.
    #[serde(default)]
    pub steps: Vec<StepRequest>,
}

/// What happens at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StepRequest {
    /// A manifest is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply: Option<ManifestRequest>,
    /// These hosts fail at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub fail: Vec<HostName>,
    /// These hosts are drained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub drain: Vec<HostName>,
}

/// What would happen. Nothing is changed by asking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanView {
    /// The revision that it starts from.
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// When that held. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// One for each step.
    pub stages: Vec<StageView>,
    /// Where every VM is in the end.
    pub placement: Vec<PlaceView>,
    /// Any so many hosts may fail then; absent: it was not worked out.
    pub survives_then: Option<u32>,
}

/// How a stage ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageEnd {
    /// Nothing is left to do.
    Rest,
    /// No majority of the voters is left: nothing can be done, guests are frozen.
    NoQuorum,
    /// The forecast was given up.
    GivenUp,
}

/// What one step leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageView {
    /// What happens, in words.
    pub asked: String,
    /// When it begins, from the start.
    pub begins_ms: u64,
    /// How long until nothing is left to do. An estimate.
    pub takes_ms: u64,
    /// How it ends.
    pub end: StageEnd,
    /// Why it was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// What is done, in order.
    pub actions: Vec<ActionView>,
    /// VMs that are elsewhere afterwards.
    pub moved: Vec<MovedView>,
    /// VMs whose guests do not run for a while.
    pub outages: Vec<OutageView>,
    /// VMs that shall run and do not afterwards.
    pub unplaced: Vec<UnplacedView>,
    /// VMs that run and stay where they should not: a drain that cannot be finished, a broken rule.
    pub stays: Vec<StaysView>,
    /// Services whose members move or stand still, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
}

/// A VM that should leave its host and does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StaysView {
    /// Which.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// Where it stays.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
    /// Why, one sentence.
    pub why: String,
}

/// One action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ActionView {
    /// When, from the start.
    pub at_ms: u64,
    /// How long it will probably take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takes_ms: Option<u64>,
    /// How long after that it will probably be ready, where it has a check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_after_ms: Option<u64>,
    /// `start`, `stop`, `release`, `migrate`, `finish_migration`, ...
    #[schema(value_type = String)]
    pub kind: ActionKind,
    /// About which VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vm: Option<VmName>,
    /// The host that it is on before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub from: Option<HostName>,
    /// The host that gets it, or that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub to: Option<HostName>,
    /// In words.
    pub text: String,
    /// It stops a guest that shall run.
    pub stops: bool,
    /// Why, one sentence.
    pub why: String,
    /// Facts it rests on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
    /// Hosts that were looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub candidates: Vec<Candidate>,
}

/// A VM that is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MovedView {
    /// Which.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// From here; absent: it was on no host.
    #[schema(value_type = Option<String>)]
    pub from: Option<HostName>,
    /// To here; absent: it is on no host.
    #[schema(value_type = Option<String>)]
    pub to: Option<HostName>,
}

/// A guest that does not run for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OutageView {
    /// Which.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// For so long; absent: it does not come back.
    pub lasts_ms: Option<u64>,
    /// VMs that need it and run without it meanwhile.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub left_without: Vec<VmName>,
}

/// A VM that shall run and does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnplacedView {
    /// Which.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// Why, one sentence.
    pub why: String,
    /// Every host with its score or its rejection.
    #[schema(value_type = Vec<Object>)]
    pub candidates: Vec<Candidate>,
}

/// Where a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlaceView {
    /// Which.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// The host; absent: none.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
}

/// How many failures the cluster survives, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CapacityView {
    /// Any so many hosts may fail at once and every VM finds a place.
    pub survives: u32,
    /// So many failures at once were looked at.
    pub checked: u32,
    /// False: there are too many sets of more hosts to look at them all.
    pub complete: bool,
    /// So many voters may fail at once before nothing can be decided.
    pub quorum_survives: Option<u32>,
    /// What the settings want (`cluster.admission`).
    pub wanted: u32,
    /// `off`, `warn`, `refuse`.
    #[schema(value_type = String)]
    pub mode: AdmissionMode,
    /// One plan for each host, and for each failure domain.
    pub plans: Vec<RestartPlanView>,
    /// Restarts that fail at the first number of failures that is not survived.
    pub broken: Vec<BrokenView>,
    /// So many more are not listed.
    pub broken_more: usize,
    /// VMs that may only run on hosts that can fail together.
    pub bound: Vec<BoundView>,
    /// Hosts whose failure nothing but a person can prove.
    #[schema(value_type = Vec<String>)]
    pub unproven: Vec<HostName>,
}

/// What becomes of the VMs of hosts that fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestartPlanView {
    /// The failure domain; absent: just these hosts.
    pub domain: Option<String>,
    /// The hosts.
    #[schema(value_type = Vec<String>)]
    pub fails: Vec<HostName>,
    /// Where each VM starts again, in order.
    pub restarts: Vec<PlaceView>,
    /// What finds no place.
    pub broken: Vec<BrokenView>,
    /// Running guests that move away first, live, and where to (`make_room`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub makes_room: Vec<PlaceView>,
}

/// A VM that finds no place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BrokenView {
    /// When these fail; empty: already now.
    #[schema(value_type = Vec<String>)]
    pub fails: Vec<HostName>,
    /// Which VM.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// Why.
    pub why: String,
}

/// A VM that is tied to hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BoundView {
    /// Which VM.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// Where alone it may run.
    #[schema(value_type = Vec<String>)]
    pub hosts: Vec<HostName>,
}

/// What would even out load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalanceView {
    /// `off`, `advise`, `auto`.
    #[schema(value_type = String)]
    pub mode: BalancingMode,
    /// Why nothing is moved now.
    pub blocked: Option<String>,
    /// Moves left of this hour's budget.
    pub left_this_hour: u32,
    /// Moves worth making, one after the other.
    pub moves: Vec<AdviceView>,
    /// Load of each host now and after these moves.
    pub hosts: Vec<HostLoadView>,
}

/// A move worth making.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AdviceView {
    /// The VM, and those that are kept with it.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
    /// From here.
    #[schema(value_type = String)]
    pub from: HostName,
    /// To here.
    #[schema(value_type = String)]
    pub to: HostName,
    /// What it takes off the fuller host, in percent of a host.
    pub gain_percent: u32,
    /// How long it will take.
    pub takes_ms: u64,
    /// Why, one sentence.
    pub why: String,
}

/// How full a host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostLoadView {
    /// Which.
    #[schema(value_type = String)]
    pub host: HostName,
    /// Now, in percent.
    pub now_percent: u32,
    /// After the moves, in percent.
    pub then_percent: u32,
}

/// Where a VM was at a time in the past, by the decisions that are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ThenView {
    /// The time that was asked about. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// The host that had it; absent: none, or not known.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
    /// One sentence.
    pub text: String,
    /// The decision that held at that time.
    pub decision: Option<DecisionView>,
    /// The next decision after it.
    pub next: Option<DecisionView>,
}

impl From<planner::Stage> for StageView {
    fn from(stage: planner::Stage) -> Self {
        let (end, problem) = match stage.end {
            planner::End::Rest => (StageEnd::Rest, None),
            planner::End::NoQuorum => (StageEnd::NoQuorum, None),
            planner::End::GivenUp(why) => (StageEnd::GivenUp, Some(why)),
        };
        let moved = |moved: planner::Moved| MovedView {
            vm: moved.vm,
            from: moved.from,
            to: moved.to,
        };
        let outage = |outage: planner::Outage| OutageView {
            vm: outage.vm,
            lasts_ms: outage.lasts.map(|span| span.0),
            left_without: outage.left_without.into_iter().collect(),
        };
        let stays = |stays: planner::Stays| StaysView {
            vm: stays.vm,
            host: stays.host,
            why: stays.why,
        };
        let unplaced = |missing: planner::Unplaced| UnplacedView {
            vm: missing.vm,
            why: missing.why,
            candidates: missing.candidates,
        };
        Self {
            asked: stage.asked,
            begins_ms: stage.begins.0,
            takes_ms: stage.takes.0,
            end,
            problem,
            actions: stage.actions.into_iter().map(ActionView::from).collect(),
            moved: stage.moved.into_iter().map(moved).collect(),
            outages: stage.outages.into_iter().map(outage).collect(),
            unplaced: stage.unplaced.into_iter().map(unplaced).collect(),
            stays: stage.stays.into_iter().map(stays).collect(),
            services: Vec::new(),
        }
    }
}

impl From<planner::Foreseen> for ActionView {
    fn from(action: planner::Foreseen) -> Self {
        let millis = |span: Option<Millis>| span.map(|span| span.0);
        Self {
            at_ms: action.at.0,
            takes_ms: millis(action.takes),
            ready_after_ms: millis(action.ready_after),
            kind: action.kind,
            vm: action.vm,
            from: action.from,
            to: action.to,
            text: action.text,
            stops: action.stops,
            why: action.reason.summary,
            evidence: action.reason.evidence,
            candidates: action.reason.candidates,
        }
    }
}

impl From<planner::Broken> for BrokenView {
    fn from(broken: planner::Broken) -> Self {
        Self {
            fails: broken.fails.into_iter().collect(),
            vm: broken.vm,
            why: broken.why,
        }
    }
}

impl From<planner::RestartPlan> for RestartPlanView {
    fn from(plan: planner::RestartPlan) -> Self {
        let restart = |restart: planner::Restart| PlaceView {
            vm: restart.vm,
            host: Some(restart.to),
        };
        Self {
            domain: plan.fails.name,
            fails: plan.fails.hosts.into_iter().collect(),
            restarts: plan.restarts.into_iter().map(restart).collect(),
            broken: plan.broken.into_iter().map(BrokenView::from).collect(),
            makes_room: plan.makes_room.into_iter().map(restart).collect(),
        }
    }
}

impl From<planner::Balance> for BalanceView {
    fn from(balance: planner::Balance) -> Self {
        let advice = |advice: planner::Advice| AdviceView {
            vms: advice.vms,
            from: advice.from,
            to: advice.to,
            gain_percent: advice.gain_percent,
            takes_ms: advice.takes.0,
            why: advice.why,
        };
        let load = |load: planner::HostLoad| HostLoadView {
            host: load.host,
            now_percent: load.now_percent,
            then_percent: load.then_percent,
        };
        Self {
            mode: balance.mode,
            blocked: balance.blocked,
            left_this_hour: balance.left_this_hour,
            moves: balance.moves.into_iter().map(advice).collect(),
            hosts: balance.hosts.into_iter().map(load).collect(),
        }
    }
}
