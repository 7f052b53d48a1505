//! Makes the view of the cluster from the state and what the leader observes.
//!
//! Owns: the words in which the cluster's condition is told. Always holds: pure; without
//! observations (no leader) nothing is claimed to run or to be up. Must not: decide anything.

mod hosts;
mod problems;
mod quorum;
mod vms;

pub use quorum::quorum;
pub(crate) use vms::met;

#[cfg(test)]
mod tests;

use crate::view::{
    ClusterSummary, ClusterView, HostProblem, NetworkView, PoolView, ProblemView, RuleView,
};
use quorate_membership::HostHealth;
use quorate_state::State;
use quorate_types::{HostName, HostReport, Millis, NodeId, PoolSpec, ServiceName, VmName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What the leader knows and the replicated state does not.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Observed {
    /// The leader.
    pub leader: Option<HostName>,
    /// It has confirmed a majority within its lease.
    pub quorate: bool,
    /// Voters.
    pub voters: BTreeSet<NodeId>,
    /// How each host and the witness stand in the consensus group.
    #[serde(default)]
    pub votes: BTreeMap<NodeId, ObservedVote>,
    /// Hosts.
    pub hosts: BTreeMap<HostName, ObservedHost>,
    /// Why a VM is not as wanted, one sentence each.
    pub waiting: BTreeMap<VmName, String>,
    /// Whole-cluster problems, each a sentence that says what to do.
    pub problems: Vec<String>,
    /// What would even out load, one sentence.
    #[serde(default)]
    pub advice: Option<String>,
    /// What is wrong with services, one sentence each.
    #[serde(default)]
    pub services: BTreeMap<ServiceName, Vec<String>>,
}

/// A member of the consensus group as the leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedVote {
    /// For how long nothing was heard of it; absent: it is up.
    pub silent: Option<Millis>,
    /// Its log is as new as the leader's, or nearly.
    pub caught_up: bool,
}

/// A host as the leader sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ObservedHost {
    /// Whether it is alive.
    pub health: HostHealth,
    /// Lease left, as the leader counts it.
    pub lease_left: Millis,
    /// Its newest report.
    pub report: Option<HostReport>,
    /// Why its fencing does not get on.
    pub fencing: Option<String>,
}

/// The host that answers.
#[derive(Debug, Clone)]
pub struct Answering {
    /// Its name.
    pub host: HostName,
    /// Its program's version.
    pub version: String,
}

/// The view. `observed` is what the leader knows; `None` when no leader answers.
#[must_use]
pub fn build(state: &State, observed: Option<&Observed>, me: &Answering) -> ClusterView {
    let nothing = Observed::default();
    let seen = observed.unwrap_or(&nothing);
    let quorate = observed.is_some_and(|seen| seen.quorate);
    let hosts = hosts::hosts(state, seen, observed.is_some());
    let vms = vms::vms(state, seen, observed.is_some());
    let pools = pools(state, seen);
    let networks = networks(state, seen);
    let rules = state
        .rules
        .iter()
        .map(|(name, object)| RuleView {
            name: name.clone(),
            spec: object.spec.clone(),
        })
        .collect();
    let cluster = state.cluster.as_ref();
    let mut view = ClusterView {
        cluster: ClusterSummary {
            id: cluster.map(|c| c.id.clone()).unwrap_or_default(),
            name: cluster.map(|c| c.name.clone()).unwrap_or_default(),
            answered_by: me.host.clone(),
            leader: seen.leader.clone(),
            quorate,
            revision: state.revision,
            version: me.version.clone(),
            problems: Vec::new(),
            advice: seen.advice.clone(),
        },
        hosts,
        vms,
        pools,
        networks,
        rules,
        services: crate::services::services(state, observed),
    };
    view.cluster.problems = problems::problems(&view, seen);
    if let Some(text) = quorum::witness_problem(state, seen).filter(|_| quorate) {
        let found = problem(crate::view::Level::Warning, "cluster", text);
        view.cluster.problems.insert(0, found);
    }
    view
}

/// Live hosts with their reports.
fn reports(seen: &Observed) -> impl Iterator<Item = (&HostName, &HostReport)> {
    seen.hosts
        .iter()
        .filter(|(_, host)| matches!(host.health, HostHealth::Up | HostHealth::Suspect))
        .filter_map(|(name, host)| Some((name, host.report.as_ref()?)))
}

fn pools(state: &State, seen: &Observed) -> Vec<PoolView> {
    let view = |(name, object): (&quorate_types::PoolName, &quorate_state::Object<PoolSpec>)| {
        let spec = &object.spec;
        let mut pool = PoolView {
            name: name.clone(),
            spec: spec.clone(),
            usable_on: Vec::new(),
            broken_on: Vec::new(),
            free: None,
            total: None,
        };
        for (host, report) in reports(seen) {
            let expected = spec.hosts().is_empty() || spec.hosts().contains(host);
            let Some(report) = report.pools.get(name).filter(|_| expected) else {
                continue;
            };
            if report.usable {
                pool.usable_on.push(host.clone());
                // Pools of whole units have no room of their own.
                let sized = report.total.0 > 0;
                if sized && pool.free.is_none_or(|free| report.free.0 < free) {
                    pool.free = Some(report.free.0);
                    pool.total = Some(report.total.0);
                }
            } else {
                let problem = report.problem.clone();
                pool.broken_on.push(HostProblem {
                    host: host.clone(),
                    problem: problem.unwrap_or_else(|| "it cannot be used".to_owned()),
                });
            }
        }
        pool
    };
    state.pools.iter().map(view).collect()
}

fn networks(state: &State, seen: &Observed) -> Vec<NetworkView> {
    let view = |(name, object): (
        &quorate_types::NetworkName,
        &quorate_state::Object<quorate_types::NetworkSpec>,
    )| {
        let (up, down): (Vec<_>, Vec<_>) =
            reports(seen).partition(|(_, report)| report.networks.contains(name));
        let names = |hosts: Vec<(&HostName, &HostReport)>| {
            hosts.into_iter().map(|(host, _)| host.clone()).collect()
        };
        NetworkView {
            name: name.clone(),
            spec: object.spec.clone(),
            up_on: names(up),
            down_on: names(down),
        }
    };
    state.networks.iter().map(view).collect()
}

/// For a problem list that only needs text.
fn problem(
    level: crate::view::Level,
    about: impl Into<String>,
    text: impl Into<String>,
) -> ProblemView {
    ProblemView {
        level,
        about: about.into(),
        text: text.into(),
    }
}
