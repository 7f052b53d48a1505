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
use crate::domains::Domains;
use crate::fit::{Query, Reject, mib};
use crate::place;
use crate::room::MEMORY;
use crate::work::{Own, Vm, Work};
use quorate_membership::HostHealth;
use quorate_state::{OrderKind, State};
use quorate_types::{HostName, Preemption, RuleKind, VmName, VmSpec};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Most questions "does this VM fit there?" in one answer.
const MAX_FITS: u64 = 40_000_000;
/// Most sets of hosts that are looked at for one number of failures.
const MAX_SETS: u64 = 5_000;
/// Most broken restarts that are told.
const MAX_BROKEN: usize = 100;
/// Hosts named in a reason.
const HOSTS_TOLD: usize = 6;
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
        let settled = Input {
            settled: true,
            ..*input
        };
        let mut work = Work::new(&settled, false);
        work.settings.preemption = Preemption::Off;
        Self {
            work,
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
        let broken = self.place(&free, &BTreeSet::new()).1;
        // Which hosts would do for a VM is found while all of them are there.
        for vm in 0..self.work.vms.len() {
            if self.work.vms[vm].wanted {
                self.work.choices(vm);
            }
        }
        broken
    }

    fn give(&mut self, vm: usize, host: usize) {
        let own = Own::Owned {
            host,
            epoch: None,
            order: OrderKind::Run,
        };
        self.work.set_own(vm, own, |_| {});
        self.work.assumed.insert(vm);
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
        self.work.assumed.remove(&vm);
        before
    }

    fn put_back(&mut self, before: &Before<'a>) {
        let (spec, saved) = (before.spec, before.saved);
        self.work.set_own(before.vm, Own::Free, |_| {});
        match before.own {
            Own::Free => self.work.assumed.remove(&before.vm),
            _ => self.work.assumed.insert(before.vm),
        };
        self.work
            .set_own(before.vm, before.own, |seen: &mut Vm<'a>| {
                seen.spec = spec;
                seen.saved = saved;
            });
    }

    /// Starts VMs as recovery does, by its own steps: wave by wave, as dependencies allow.
    fn place(&mut self, vms: &[usize], fails: &BTreeSet<HostName>) -> (Vec<Restart>, Vec<Broken>) {
        let free = |work: &Work<'_>, vm: usize| work.vms[vm].own == Own::Free;
        let mut restarts = Vec::new();
        let mut left = vms.to_vec();
        while !left.is_empty() {
            self.fits += (left.len() * self.work.hosts.len()) as u64;
            place::run(&mut self.work);
            self.work.actions.clear();
            self.work.stuck.clear();
            let placed: Vec<usize> = left
                .iter()
                .copied()
                .filter(|vm| !free(&self.work, *vm))
                .collect();
            if placed.is_empty() {
                break;
            }
            left.retain(|vm| free(&self.work, *vm));
            for vm in placed {
                self.work.assumed.insert(vm);
                if let Some(host) = self.work.seat(vm) {
                    restarts.push(Restart {
                        vm: self.work.vms[vm].name.clone(),
                        to: self.work.hosts[host].name.clone(),
                    });
                }
            }
        }
        let mut broken = Vec::new();
        for vm in left {
            let seen = &self.work.vms[vm];
            if self.tied(vm, fails) {
                let hosts = self.allowed(vm);
                self.bound.entry(seen.name.clone()).or_insert(hosts);
                continue;
            }
            let unmet = self.work.unmet(vm);
            broken.push(Broken {
                fails: fails.clone(),
                vm: seen.name.clone(),
                why: match unmet.first() {
                    Some(unmet) => unmet.why.clone(),
                    None => self.why(vm, fails),
                },
            });
        }
        (restarts, broken)
    }

    /// Why no host that is left can take it: in short, for a table.
    fn why(&self, vm: usize, fails: &BTreeSet<HostName>) -> String {
        let query = Query {
            vm,
            alone: true,
            ..Query::default()
        };
        let hosts = (0..self.work.hosts.len()).filter(|at| {
            let host = &self.work.hosts[*at];
            host.record.is_some() && !fails.contains(host.name)
        });
        let mut said: Vec<String> = Vec::new();
        let mut more = 0;
        for at in hosts {
            let name = self.work.hosts[at].name;
            let text = match self.work.fit(&query, at) {
                Ok(()) => {
                    format!("{name} has room for it alone, not for all that are kept together")
                }
                Err(Reject::Room { short, .. }) if short.column == MEMORY => {
                    format!("{name} has {} free", mib(short.free))
                }
                Err(reject) => {
                    let text = reject.describe(&self.work, at);
                    match text.starts_with(name.as_str()) {
                        true => text,
                        false => format!("{name}: {text}"),
                    }
                }
            };
            match said.len() < HOSTS_TOLD {
                true => said.push(text),
                false => more += 1,
            }
        }
        if more > 0 {
            said.push(format!("and {more} more hosts"));
        }
        let need = mib(self.work.room.need(vm)[MEMORY]);
        match said.is_empty() {
            true => format!("it needs {need} and no host is left"),
            false => format!("it needs {need}; {}", said.join(", ")),
        }
    }

    /// Members that its own wishes let it run on.
    fn allowed(&self, vm: usize) -> BTreeSet<HostName> {
        let spec = &self.work.vms[vm].record.spec;
        let members = self.work.input.state.hosts.iter();
        let allowed = members.filter(|(name, record)| spec.allows(name, &record.spec));
        allowed.map(|(name, _)| name.clone()).collect()
    }

    /// It may only run on hosts that fail.
    fn tied(&self, vm: usize, fails: &BTreeSet<HostName>) -> bool {
        let members = self.work.input.state.hosts.len();
        let allowed = self.allowed(vm);
        !fails.is_empty() && allowed.len() < members && allowed.is_subset(fails)
    }

    /// What is known of hosts at a glance is found anew.
    fn hosts_changed(&mut self) {
        let work = &mut self.work;
        work.good_hosts = work.hosts.iter().filter(|host| host.good()).count();
        // An even share is one of the domains that are left.
        let shares =
            |rule: &quorate_types::RuleSpec| rule.kind == RuleKind::Spread && rule.max.is_none();
        if work
            .input
            .state
            .rules
            .values()
            .any(|rule| shares(&rule.spec))
        {
            let facts: Vec<_> = (0..work.hosts.len()).map(|at| work.facts(at)).collect();
            work.domains = Domains::new(work.input.state, &work.vm_index, &facts);
            for vm in 0..work.vms.len() {
                let own = work.vms[vm].own;
                work.domains.account(vm, own, true);
            }
        }
        for group in 0..work.homes.len() {
            work.settle_group(group);
        }
    }

    /// The hosts of a set fail together.
    fn fail(&mut self, set: &FailureSet) -> RestartPlan {
        let index = &self.work.host_index;
        let hosts: Vec<usize> = set
            .hosts
            .iter()
            .filter_map(|name| index.get(name))
            .collect();
        let was: Vec<_> = hosts
            .iter()
            .map(|at| (*at, self.work.hosts[*at].up, self.work.hosts[*at].health))
            .collect();
        for at in &hosts {
            self.work.hosts[*at].up = false;
            self.work.hosts[*at].health = Some(HostHealth::Dead);
        }
        self.hosts_changed();
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
        for (at, up, health) in was {
            self.work.hosts[at].up = up;
            self.work.hosts[at].health = health;
        }
        self.hosts_changed();
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
        hosts.sort_by_key(|at| (std::cmp::Reverse(self.work.room.used(*at)[MEMORY]), *at));
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
