//! Admission control: does every VM find a place when hosts fail?
//!
//! ```text
//! picture at rest --for each set of hosts--> take its VMs away -> place them as a start would -> put all back
//! ```
//! Owns: restart plans ("if h2 fails: db -> h3, app -> h1"), how many failures the cluster survives,
//! which VM breaks that and why. Always holds: a plan is constructive, made host by host with the very
//! rules and scores that recovery uses, wave by wave as dependencies allow; a set of hosts is any set
//! (a host, a rack, any k hosts); work is bounded, and an answer that is not complete says so. What it
//! leaves out: preemption. A VM that has to be stopped for another one has not survived.
//!
//! A VM that may only run on the hosts that failed (`hosts`) was not meant to survive that: it is
//! named, and does not count.

use crate::Input;
use crate::place::no_host;
use crate::work::{Own, Vm, Work};
use quorate_membership::HostHealth;
use quorate_state::{OrderKind, State};
use quorate_types::{HostName, VmName, VmSpec};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Most questions "does this VM fit there?" in one answer.
const MAX_FITS: u64 = 40_000_000;
/// Most sets of hosts that are looked at for one number of failures.
const MAX_SETS: u64 = 5_000;
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

struct Found {
    broken: Vec<Broken>,
    complete: bool,
}

/// The picture that hosts are taken out of and put back into.
struct Site<'a> {
    work: Work<'a>,
    fits: u64,
    bound: BTreeMap<VmName, BTreeSet<HostName>>,
}

/// What a VM was before it was taken away.
struct Before<'a> {
    vm: usize,
    own: Own,
    spec: &'a VmSpec,
    saved: bool,
}

impl<'a> Site<'a> {
    fn new(input: &Input<'a>) -> Self {
        Self {
            work: Work::new(
                &Input {
                    settled: true,
                    ..*input
                },
                false,
            ),
            fits: 0,
            bound: BTreeMap::new(),
        }
    }

    /// A host that takes VMs and could fail.
    fn fails(&self, at: usize) -> bool {
        self.work.hosts[at].good() && self.work.hosts[at].proof.is_none()
    }

    /// Ends what is under way: migrations have arrived, stops have ended, what shall run runs where it
    /// would be started now. Returns what finds no place even so.
    fn rest(&mut self) -> Vec<Broken> {
        let mut free = Vec::new();
        for vm in self.work.order.clone() {
            let seen = &self.work.vms[vm];
            let stays = match seen.own {
                Own::Owned {
                    host,
                    order: OrderKind::Run,
                    ..
                } => Some(host),
                Own::Migrating(moving) => Some(moving.to),
                _ => None,
            };
            let stays = stays.filter(|host| seen.wanted && self.fails(*host));
            match stays {
                Some(host) => self.give(vm, host),
                None => {
                    self.take(vm);
                    if self.work.vms[vm].wanted {
                        free.push(vm);
                    }
                }
            }
        }
        self.place(&free, &BTreeSet::new()).1
    }

    fn give(&mut self, vm: usize, host: usize) {
        let own = Own::Owned {
            host,
            epoch: None,
            order: OrderKind::Run,
        };
        self.work.set_own(vm, own, |_| {});
    }

    /// Takes a VM from its hosts: it would start anew, with what is defined now.
    fn take(&mut self, vm: usize) -> Before<'a> {
        let seen = &self.work.vms[vm];
        let before = Before {
            vm,
            own: seen.own,
            spec: seen.spec,
            saved: seen.saved,
        };
        self.work.set_own(vm, Own::Free, |seen: &mut Vm<'a>| {
            seen.spec = &seen.record.spec;
            seen.saved = false;
        });
        before
    }

    fn put_back(&mut self, before: &Before<'a>) {
        let (spec, saved) = (before.spec, before.saved);
        self.work.set_own(before.vm, Own::Free, |_| {});
        self.work
            .set_own(before.vm, before.own, |seen: &mut Vm<'a>| {
                seen.spec = spec;
                seen.saved = saved;
            });
    }

    /// Starts VMs as recovery does: wave by wave as dependencies allow, each in the planner's order.
    fn place(&mut self, vms: &[usize], fails: &BTreeSet<HostName>) -> (Vec<Restart>, Vec<Broken>) {
        let mut restarts = Vec::new();
        let mut left = vms.to_vec();
        loop {
            let placed = self.wave(&left);
            if placed.is_empty() {
                break;
            }
            left.retain(|vm| !placed.iter().any(|(done, _)| done == vm));
            restarts.extend(placed.into_iter().map(|(vm, host)| Restart {
                vm: self.work.vms[vm].name.clone(),
                to: self.work.hosts[host].name.clone(),
            }));
        }
        let mut broken = Vec::new();
        for vm in left {
            let seen = &self.work.vms[vm];
            if self.tied(vm, fails) {
                let hosts = seen.record.spec.hosts.clone();
                self.bound.entry(seen.name.clone()).or_insert(hosts);
                continue;
            }
            let why = match self.waits_for(vm, &[]) {
                Some(other) => format!(
                    "it needs {}, which does not run then",
                    self.work.vms[other].name
                ),
                None => no_host(&self.work, vm, &self.work.choose_start(vm, None)),
            };
            broken.push(Broken {
                fails: fails.clone(),
                vm: seen.name.clone(),
                why,
            });
        }
        (restarts, broken)
    }

    /// One look of [`crate::place`], with the dependencies that hold by now. Room is kept from VMs of
    /// lower priority for those that wait.
    fn wave(&mut self, vms: &[usize]) -> Vec<(usize, usize)> {
        let mut placed: Vec<(usize, usize)> = Vec::new();
        let mut waiting: Vec<(usize, u64)> = Vec::new();
        let mut priority = i32::MAX;
        for vm in vms.iter().copied() {
            if self.work.vms[vm].priority < priority {
                priority = self.work.vms[vm].priority;
                for (host, bytes) in waiting.drain(..) {
                    self.work.hosts[host].held += bytes;
                }
            }
            self.fits += self.work.hosts.len() as u64;
            let Some(best) = self.work.choose_start(vm, None).best else {
                continue;
            };
            match self.waits_for(vm, &placed) {
                Some(other) if self.work.vms[other].wanted => {
                    waiting.push((best, self.work.vms[vm].need()));
                }
                Some(_) => {}
                None => {
                    self.give(vm, best);
                    placed.push((vm, best));
                }
            }
        }
        for host in &mut self.work.hosts {
            host.held = 0;
        }
        placed
    }

    /// A dependency that does not run, or was only just placed.
    fn waits_for(&self, vm: usize, placed: &[(usize, usize)]) -> Option<usize> {
        let needs = self.work.vms[vm].record.spec.depends_on.keys();
        let mut needs = needs.filter_map(|name| self.work.vm_index.get(name).copied());
        needs.find(|other| {
            let runs = self.work.vms[*other].own != Own::Free;
            !runs || placed.iter().any(|(done, _)| done == other)
        })
    }

    /// It may only run on hosts that fail.
    fn tied(&self, vm: usize, fails: &BTreeSet<HostName>) -> bool {
        let allowed = &self.work.vms[vm].record.spec.hosts;
        let members = &self.work.input.state.hosts;
        let mut left = allowed
            .iter()
            .filter(|host| members.contains_key(*host) && !fails.contains(*host));
        !fails.is_empty() && !allowed.is_empty() && left.next().is_none()
    }

    /// The hosts of a set fail together.
    fn fail(&mut self, set: &FailureSet) -> RestartPlan {
        let index = &self.work.host_index;
        let hosts: Vec<usize> = set
            .hosts
            .iter()
            .filter_map(|name| index.get(name).copied())
            .collect();
        let mut health = Vec::new();
        for at in &hosts {
            let host = &mut self.work.hosts[*at];
            health.push((*at, host.up, host.health));
            host.up = false;
            host.health = Some(HostHealth::Dead);
        }
        // What waits for room already takes its turn among them.
        let lost = |vm: &usize| {
            let seen = &self.work.vms[*vm];
            seen.wanted && (seen.own == Own::Free || seen.own.hosts().any(|at| hosts.contains(&at)))
        };
        let lost: Vec<usize> = self.work.order.iter().copied().filter(lost).collect();
        let before: Vec<Before<'a>> = lost.iter().map(|vm| self.take(*vm)).collect();
        let (restarts, mut broken) = self.place(&lost, &set.hosts);
        let waited: BTreeSet<&VmName> = before
            .iter()
            .filter(|before| before.own == Own::Free)
            .map(|before| self.work.vms[before.vm].name)
            .collect();
        broken.retain(|broken| !waited.contains(&broken.vm));
        for before in before.iter().rev() {
            self.put_back(before);
        }
        for (at, up, old) in health {
            self.work.hosts[at].up = up;
            self.work.hosts[at].health = old;
        }
        for group in 0..self.work.homes.len() {
            self.work.homes[group] = self.work.home(group, &[]);
        }
        RestartPlan {
            fails: set.clone(),
            restarts,
            broken,
        }
    }

    /// Any so many hosts fail at once: the fullest first, so that what breaks is found soon.
    fn any(&mut self, failures: u32) -> Found {
        let mut hosts: Vec<usize> = (0..self.work.hosts.len())
            .filter(|at| self.fails(*at))
            .collect();
        hosts.sort_by_key(|at| (std::cmp::Reverse(self.work.hosts[*at].used), *at));
        let names: Vec<HostName> = hosts
            .iter()
            .map(|at| self.work.hosts[*at].name.clone())
            .collect();
        let mut found = Found {
            broken: Vec::new(),
            complete: true,
        };
        let mut sets = 0;
        let mut pick: Vec<usize> = (0..failures as usize).collect();
        if pick.len() > names.len() {
            return found;
        }
        loop {
            if sets >= MAX_SETS || self.fits > MAX_FITS || found.broken.len() > MAX_BROKEN {
                found.complete = false;
                return found;
            }
            sets += 1;
            let set = FailureSet {
                name: None,
                hosts: pick.iter().map(|at| names[*at].clone()).collect(),
            };
            found.broken.extend(self.fail(&set).broken);
            if !next_pick(&mut pick, names.len()) {
                return found;
            }
        }
    }
}

/// The next choice of so many out of `all`, in lexical order.
fn next_pick(pick: &mut [usize], all: usize) -> bool {
    let count = pick.len();
    let Some(at) = (0..count).rev().find(|at| pick[*at] < all - count + at) else {
        return false;
    };
    pick[at] += 1;
    for later in at + 1..count {
        pick[later] = pick[later - 1] + 1;
    }
    true
}
