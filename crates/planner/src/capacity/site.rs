//! The picture of a site at rest, from which hosts are taken and to which they are given back.
//!
//! Owns: restart plans of one set of hosts, and the walk through sets. Always holds: after each set
//! everything is as it was before, so that answers do not depend on what was asked earlier.

use super::{Broken, FailureSet, MAX_BROKEN, Restart, RestartPlan};
use crate::Input;
use crate::domains::Domains;
use crate::fit::{Query, Reject, mib};
use crate::place;
use crate::room::MEMORY;
use crate::work::{Own, Vm, Work};
use quorate_membership::HostHealth;
use quorate_state::OrderKind;
use quorate_types::{HostName, Preemption, RuleKind, VmName, VmSpec};
use std::collections::{BTreeMap, BTreeSet};

/// Most questions "does this VM fit there?" in one answer.
const MAX_FITS: u64 = 40_000_000;
/// Most sets of hosts that are looked at for one number of failures.
const MAX_SETS: u64 = 5_000;
/// Hosts named in a reason.
const HOSTS_TOLD: usize = 6;

/// Restarts that fail when hosts fail, and whether all sets of hosts were looked at.
pub(super) struct Found {
    pub(super) broken: Vec<Broken>,
    pub(super) complete: bool,
}

/// The picture that hosts are taken out of and put back into.
pub(super) struct Site<'a> {
    pub(super) work: Work<'a>,
    fits: u64,
    pub(super) bound: BTreeMap<VmName, BTreeSet<HostName>>,
}

/// What became of VMs that were to start.
#[derive(Default)]
struct Placed<'a> {
    restarts: Vec<Restart>,
    broken: Vec<Broken>,
    /// Running guests that moved away for them, as they were before.
    moved: Vec<Before<'a>>,
}

/// What a VM was before it was taken away.
struct Before<'a> {
    vm: usize,
    own: Own,
    spec: &'a VmSpec,
    saved: bool,
}

impl<'a> Site<'a> {
    pub(super) fn new(input: &Input<'a>) -> Self {
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
    pub(super) fn fails(&self, at: usize) -> bool {
        self.work.hosts[at].good() && self.work.hosts[at].proof.is_none()
    }

    /// Ends what is under way: migrations have arrived, stops have ended, what shall run runs where it
    /// would be started now. Returns what finds no place even so.
    pub(super) fn rest(&mut self) -> Vec<Broken> {
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
                Some(host) if runs(seen.own) == Some(host) => {
                    self.work.assumed.insert(vm);
                }
                Some(host) => self.give(vm, host),
                None => {
                    self.take(vm);
                    if self.work.vms[vm].wanted {
                        free.push(vm);
                    }
                }
            }
        }
        let broken = self.place(&free, &BTreeSet::new()).broken;
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

    /// Has running guests move away where that is allowed, and takes it that they have arrived.
    fn make_room(&mut self, left: &[usize]) -> Vec<Before<'a>> {
        let ready = left.iter().filter(|vm| self.work.unmet(**vm).is_empty());
        self.work.stuck = ready.copied().collect();
        crate::make_room::run(&mut self.work);
        self.work.stuck.clear();
        self.work.actions.clear();
        let mut moved = Vec::new();
        for vm in 0..self.work.vms.len() {
            let seen = &self.work.vms[vm];
            let Own::Migrating(moving) = seen.own else {
                continue;
            };
            moved.push(Before {
                vm,
                own: Own::Owned {
                    host: moving.from,
                    epoch: Some(moving.epoch),
                    order: OrderKind::Run,
                },
                spec: seen.spec,
                saved: seen.saved,
            });
            self.give(vm, moving.to);
        }
        moved
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
                seen.touched = false;
            });
    }

    /// Starts VMs as recovery does, by its own steps: wave by wave, as dependencies allow.
    fn place(&mut self, vms: &[usize], fails: &BTreeSet<HostName>) -> Placed<'a> {
        let free = |work: &Work<'_>, vm: usize| work.vms[vm].own == Own::Free;
        let mut all = Placed::default();
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
                // Each guest moves once at most, so this ends.
                let moved = self.make_room(&left);
                if moved.is_empty() {
                    break;
                }
                all.moved.extend(moved);
                continue;
            }
            left.retain(|vm| free(&self.work, *vm));
            for vm in placed {
                self.work.assumed.insert(vm);
                if let Some(host) = self.work.seat(vm) {
                    all.restarts.push(self.restart(vm, host));
                }
            }
        }
        for vm in left {
            let seen = &self.work.vms[vm];
            if self.tied(vm, fails) {
                let hosts = self.allowed(vm);
                self.bound.entry(seen.name.clone()).or_insert(hosts);
                continue;
            }
            let unmet = self.work.unmet(vm);
            all.broken.push(Broken {
                fails: fails.clone(),
                vm: seen.name.clone(),
                why: match unmet.first() {
                    Some(unmet) => unmet.why.clone(),
                    None => self.why(vm, fails),
                },
            });
        }
        all
    }

    fn restart(&self, vm: usize, host: usize) -> Restart {
        Restart {
            vm: self.work.vms[vm].name.clone(),
            to: self.work.hosts[host].name.clone(),
        }
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
    pub(super) fn fail(&mut self, set: &FailureSet) -> RestartPlan {
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
        let mut placed = self.place(&lost, &set.hosts);
        let waited: BTreeSet<&VmName> = before
            .iter()
            .filter(|before| before.own == Own::Free)
            .map(|before| self.work.vms[before.vm].name)
            .collect();
        placed.broken.retain(|broken| !waited.contains(&broken.vm));
        let moved = placed.moved.iter().map(|before| before.vm);
        let makes_room = moved
            .filter_map(|vm| Some(self.restart(vm, self.work.seat(vm)?)))
            .collect();
        for before in before.iter().rev().chain(&placed.moved) {
            self.put_back(before);
        }
        for (at, up, health) in was {
            self.work.hosts[at].up = up;
            self.work.hosts[at].health = health;
        }
        self.hosts_changed();
        RestartPlan {
            fails: set.clone(),
            restarts: placed.restarts,
            broken: placed.broken,
            makes_room,
        }
    }

    /// Any so many hosts fail at once: the fullest first, so that what breaks is found soon.
    pub(super) fn any(&mut self, failures: u32) -> Found {
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

/// The host that runs it by an order of the state.
fn runs(own: Own) -> Option<usize> {
    match own {
        Own::Owned {
            host,
            epoch: Some(_),
            order: OrderKind::Run,
        } => Some(host),
        _ => None,
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
