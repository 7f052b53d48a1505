//! Admission control: does every VM find a place when hosts fail?
//!
//! ```text
//! picture at rest --for each set of hosts--> take its VMs away -> place them as a start would -> put all back
//! ```
//! Owns: restart plans ("if h2 fails: db -> h3, app -> h1"), how many failures the cluster survives,
//! which VM breaks that and why. Always holds: a plan is constructive, made host by host with the very
//! rules and scores that recovery uses, wave by wave as dependencies allow, and with guests that move
//! away live where the cluster allows it (`make_room`); a set of hosts is any set
//! (a host, a rack, any k hosts); work is bounded, and an answer that is not complete says so. What it
//! leaves out: preemption. A VM that has to be stopped for another one has not survived.
//!
//! A VM that may only run on the hosts that failed (`hosts`) was not meant to survive that: it is
//! named, and does not count.

mod site;

use crate::Input;
use quorate_state::State;
use quorate_types::{HostName, VmName};
use serde::{Deserialize, Serialize};
use site::{Found, Site};
use std::collections::BTreeSet;

/// Most broken restarts that are told.
const MAX_BROKEN: usize = 100;
/// More failures at once are not looked at by itself.
const MAX_FAILURES: u32 = 8;

/// Hosts that fail together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FailureSet {
    /// What they have in common: `rack=r1`; absent: just these hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The hosts.
    pub hosts: BTreeSet<HostName>,
}

/// What is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapacityQuestion {
    /// Look at up to so many failures at once; absent: as far as it is cheap.
    pub failures: Option<u32>,
    /// Sets of hosts that fail together: racks, rooms.
    pub domains: Vec<FailureSet>,
}

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Any so many hosts may fail at once and every VM finds a place.
    pub survives: u32,
    /// So many failures at once were looked at.
    pub checked: u32,
    /// False: there are too many sets of more hosts to look at them all, so it may survive more.
    pub complete: bool,
    /// So many voters may fail at once before nothing can be decided; absent: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quorum_survives: Option<u32>,
    /// One for each host, and one for each domain.
    pub plans: Vec<RestartPlan>,
    /// Restarts that fail at the first number of failures that is not survived.
    pub broken: Vec<Broken>,
    /// So many more of them are not listed.
    pub broken_more: usize,
    /// VMs that may only run on hosts that can fail together: nothing can take them over.
    pub bound: Vec<Bound>,
    /// Hosts whose failure nothing but a person can prove.
    pub unproven: Vec<HostName>,
}

/// What becomes of the VMs of hosts that fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPlan {
    /// Which hosts.
    pub fails: FailureSet,
    /// Where each VM starts again, in order.
    pub restarts: Vec<Restart>,
    /// What finds no place.
    pub broken: Vec<Broken>,
    /// Running guests that move away for them, live (`make_room`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub makes_room: Vec<Restart>,
}

/// A restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Which VM.
    pub vm: VmName,
    /// Its new host.
    pub to: HostName,
}

/// A VM that finds no place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Broken {
    /// When these fail; empty: already now.
    pub fails: BTreeSet<HostName>,
    /// Which VM.
    pub vm: VmName,
    /// Why, one sentence.
    pub why: String,
}

/// A VM that is tied to hosts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Bound {
    /// Which VM.
    pub vm: VmName,
    /// Where alone it may run.
    pub hosts: BTreeSet<HostName>,
}

/// Restart plans for every host and domain, and how many failures are survived.
#[must_use]
pub fn capacity(input: &Input<'_>, question: &CapacityQuestion) -> Capacity {
    let mut site = Site::new(input);
    let now = site.rest();
    let mut answer = Capacity {
        complete: true,
        unproven: unproven(input.state),
        ..Capacity::default()
    };
    answer.tell(&now);
    for at in 0..site.work.hosts.len() {
        if site.fails(at) {
            let set = FailureSet {
                name: None,
                hosts: [site.work.hosts[at].name.clone()].into(),
            };
            answer.plans.push(site.fail(&set));
        }
    }
    for domain in &question.domains {
        answer.plans.push(site.fail(domain));
    }
    let hosts = u32::try_from(answer.plans.len() - question.domains.len()).unwrap_or(u32::MAX);
    let most = question
        .failures
        .unwrap_or(MAX_FAILURES)
        .min(hosts.saturating_sub(1));
    if now.is_empty() {
        answer.levels(&mut site, most, hosts as usize);
    }
    answer.bound = site
        .bound
        .into_iter()
        .map(|(vm, hosts)| Bound { vm, hosts })
        .collect();
    answer
}

/// What a change takes from the room for failures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortfall {
    /// So many hosts should be able to fail at once.
    pub wanted: u32,
    /// Restarts that would fail and did not before.
    pub broken: Vec<Broken>,
}

/// Whether `after` leaves the room for failures that its own settings want, as far as it was there
/// before. `None`: it does.
#[must_use]
pub fn shortfall(before: &Input<'_>, after: &State) -> Option<Shortfall> {
    let wanted = after.settings().admission.failures;
    let members = u32::try_from(after.hosts.len()).unwrap_or(u32::MAX);
    // A cluster that is too small for it cannot be held to it.
    let failures = wanted.min(members.saturating_sub(1));
    let find = |state: &State| -> Vec<Broken> {
        let mut site = Site::new(&Input { state, ..*before });
        let mut broken = site.rest();
        if failures > 0 {
            broken.extend(site.any(failures).broken);
        }
        broken
    };
    let broken = find(after);
    if broken.is_empty() {
        return None;
    }
    let known: BTreeSet<(BTreeSet<HostName>, VmName)> = find(before.state)
        .into_iter()
        .map(|broken| (broken.fails, broken.vm))
        .collect();
    let is_new = |broken: &Broken| !known.contains(&(broken.fails.clone(), broken.vm.clone()));
    let mut broken: Vec<Broken> = broken.into_iter().filter(is_new).collect();
    broken.truncate(MAX_BROKEN);
    (!broken.is_empty()).then_some(Shortfall { wanted, broken })
}

fn unproven(state: &State) -> Vec<HostName> {
    let settings = state.settings();
    let proves = |name: &HostName| {
        settings
            .fencing
            .get(name)
            .is_some_and(|some| !some.is_empty())
    };
    let hosts = state.hosts.iter();
    hosts
        .filter(|(name, record)| record.armed.is_none() && !proves(name))
        .map(|(name, _)| name.clone())
        .collect()
}

impl Capacity {
    /// One failure, then more, until something breaks or the work is too much.
    fn levels(&mut self, site: &mut Site<'_>, most: u32, hosts: usize) {
        for failures in 1..=most {
            let found = if failures == 1 {
                let single = self.plans.iter().take(hosts);
                Found {
                    broken: single.flat_map(|plan| plan.broken.clone()).collect(),
                    complete: true,
                }
            } else {
                site.any(failures)
            };
            if !found.complete && found.broken.is_empty() {
                // Nothing is claimed of what was not looked at.
                self.complete = false;
                return;
            }
            self.checked = failures;
            if !found.broken.is_empty() {
                self.tell(&found.broken);
                return;
            }
            self.survives = failures;
        }
    }

    fn tell(&mut self, broken: &[Broken]) {
        let room = MAX_BROKEN.saturating_sub(self.broken.len());
        self.broken.extend(broken.iter().take(room).cloned());
        self.broken_more += broken.len().saturating_sub(room);
    }
}
