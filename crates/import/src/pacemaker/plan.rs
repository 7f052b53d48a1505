//! What the engine decides for a CIB, in Pacemaker's names.

use super::judge::Judged;
use super::model::Cib;
use super::site;
use crate::Problem;
use quorate_planner::engine::{self, Flaw, Step};
use std::collections::BTreeMap;

/// Something to do. What does not apply is absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// `fence`, `stop`, `migrate`, `start` or `shutdown`.
    pub action: &'static str,
    /// Which resource.
    pub resource: Option<String>,
    /// The host that is left; for `fence` and `shutdown` the host itself.
    pub from: Option<String>,
    /// The host that is gone to.
    pub to: Option<String>,
}

/// What is to be done, and where everything is afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// In an order in which it can be done.
    pub actions: Vec<Action>,
    /// Host of each resource when it is done; stopped ones are absent.
    pub placement: BTreeMap<String, String>,
    /// Resources that are stopped when it is done.
    pub stopped: Vec<String>,
    /// What was ignored.
    pub warnings: Vec<Problem>,
    /// Constraints that name what does not exist: ignored, as Pacemaker does.
    pub unknown: Vec<Problem>,
    /// Constraints that cannot hold together. What they are about never starts.
    pub contradictions: Vec<Problem>,
    /// Promises that the plan would break: mistakes of Quorate's, found by its own second look.
    pub flaws: Vec<Flaw>,
}

/// Plans for a CIB with its status, at a time in seconds since 1970 (that of the CIB itself, if it
/// says one).
#[must_use]
pub fn plan(cib: &Cib, now: i64) -> Planned {
    let mut judged = Judged::new(cib, cib.execution_date.unwrap_or(now));
    let question = site::question(cib, &mut judged);
    let outcome = engine::solve(&question.site);
    let flaws = engine::lint(&question.site, &outcome);
    let host = |host: usize| Some(question.site.hosts[host].name.clone());
    let unit = |unit: usize| Some(question.site.units[unit].name.clone());
    let actions = outcome.steps.iter().map(|step| match *step {
        Step::Fence { host: at } => action("fence", None, host(at), None),
        Step::Stop {
            unit: one,
            host: at,
        } => action("stop", unit(one), host(at), None),
        Step::Migrate {
            unit: one,
            from,
            to,
        } => action("migrate", unit(one), host(from), host(to)),
        Step::Start {
            unit: one,
            host: at,
        } => action("start", unit(one), None, host(at)),
        Step::Release { host: at } => action("shutdown", None, host(at), None),
    });
    let actions = actions.collect();
    let mut placement = BTreeMap::new();
    let mut stopped = Vec::new();
    for (one, hosts) in outcome.placement.iter().enumerate() {
        if question.things[one].is_none() {
            continue;
        }
        match (unit(one), hosts.first().and_then(|at| host(*at))) {
            (Some(name), Some(host)) => {
                placement.insert(name, host);
            }
            (Some(name), None) => stopped.push(name),
            (None, _) => {}
        }
    }
    let mut warnings = cib.warnings.clone();
    warnings.extend(question.warnings);
    Planned {
        actions,
        placement,
        stopped,
        warnings,
        unknown: question.unknown,
        contradictions: question.contradictions,
        flaws,
    }
}

fn action(
    action: &'static str,
    resource: Option<String>,
    from: Option<String>,
    to: Option<String>,
) -> Action {
    Action {
        action,
        resource,
        from,
        to,
    }
}
