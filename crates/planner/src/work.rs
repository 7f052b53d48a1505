//! The picture that a plan is made in: facts by index, and what the actions so far leave.
//!
//! Always holds: [`Vm::own`] is what the state will say once the actions collected so far are
//! applied, and each host's use is the sum over it. A VM counts on every host that may have it:
//! during a migration on both.

use crate::Input;
use crate::domains::{Domains, HostFacts};
use crate::groups::Groups;
use crate::heard::{Heard, Word};
use crate::lists::Lists;
use crate::names::Names;
use crate::reach::Reach;
use crate::room::Room;
use quorate_membership::{FenceProof, HostHealth};
use quorate_state::{GuestAbi, HostMode, HostRecord, OrderKind, Ownership, State, VmRecord};
use quorate_state::{PlannedAction, StopMode};
use quorate_types::spec::Machine;
use quorate_types::{
    ClusterSettings, Epoch, HostName, HostReport, LabelSelector, MigrationId, NetworkName,
    PoolName, VmName, VmReport, VmSpec,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// A migration as the state has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moving {
    /// `None`: begun in this plan.
    pub(crate) id: Option<MigrationId>,
    pub(crate) from: usize,
    pub(crate) epoch: Epoch,
    pub(crate) to: usize,
    pub(crate) target_epoch: Epoch,
    pub(crate) cancel: bool,
}

/// Who may run a VM, by index of host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    Free,
    Owned {
        host: usize,
        /// `None`: given to it in this plan.
        epoch: Option<Epoch>,
        order: OrderKind,
    },
    Migrating(Moving),
}

impl Own {
    /// Hosts that may have it.
    pub(crate) fn hosts(self) -> impl Iterator<Item = usize> {
        let (a, b) = match self {
            Self::Free => (None, None),
            Self::Owned { host, .. } => (Some(host), None),
            Self::Migrating(moving) => (Some(moving.from), Some(moving.to)),
        };
        a.into_iter().chain(b)
    }

    pub(crate) fn on(self, host: usize) -> bool {
        self.hosts().any(|other| other == host)
    }
}

/// A host with what its guests use.
#[derive(Debug)]
pub(crate) struct Host<'a> {
    pub(crate) name: &'a HostName,
    /// Absent: it is named as an owner but is no member.
    pub(crate) record: Option<&'a HostRecord>,
    pub(crate) report: Option<&'a HostReport>,
    pub(crate) up: bool,
    pub(crate) health: Option<HostHealth>,
    pub(crate) proof: Option<&'a FenceProof>,
    pub(crate) guests: u32,
    /// Moves that it takes part in: migrations, and guests stopped to start elsewhere.
    pub(crate) moves: u32,
    /// CPU threads.
    pub(crate) threads: u32,
    /// Its guard and watchdog are armed.
    pub(crate) armed: bool,
}

/// Most dependents that are counted: beyond that VMs are equally important.
const DEPENDENTS_COUNTED: u32 = 256;

impl<'a> Host<'a> {
    fn facts(&self) -> HostFacts<'a> {
        HostFacts {
            spec: self.record.map(|record| &record.spec),
            good: self.good(),
        }
    }

    pub(crate) fn active(&self) -> bool {
        self.record
            .is_some_and(|record| record.mode == HostMode::Active)
    }

    /// Guests can be given to it.
    pub(crate) fn good(&self) -> bool {
        self.active() && self.up && self.report.is_some()
    }

    /// It has the labels that are asked for.
    pub(crate) fn labelled(&self, selector: &LabelSelector) -> bool {
        selector.is_empty() || self.record.is_some_and(|host| host.spec.matches(selector))
    }
}

/// A VM.
#[derive(Debug)]
pub(crate) struct Vm<'a> {
    pub(crate) name: &'a VmName,
    pub(crate) record: &'a VmRecord,
    pub(crate) own: Own,
    /// What it runs with, or will be started with.
    pub(crate) spec: &'a VmSpec,
    /// CPU and machine it has to keep: it runs, or its memory is saved.
    pub(crate) abi: Option<&'a GuestAbi>,
    /// Its saved memory is to be resumed.
    pub(crate) saved: bool,
    pub(crate) wanted: bool,
    /// Highest priority among it and what needs it.
    pub(crate) priority: i32,
    /// How many VMs need it, directly or not.
    pub(crate) dependents: u32,
    /// An action of this plan is about it.
    pub(crate) touched: bool,
    /// It needs resources that are counted.
    counts: bool,
}

impl<'a> Vm<'a> {
    /// What it runs with and what it will be started with: mostly the same.
    fn specs(&self) -> impl Iterator<Item = &'a VmSpec> + use<'a> {
        let same = std::ptr::eq(self.spec, &self.record.spec);
        std::iter::once(self.spec).chain((!same).then_some(&self.record.spec))
    }
}

/// The picture.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) input: Input<'a>,
    pub(crate) settings: ClusterSettings,
    pub(crate) hosts: Vec<Host<'a>>,
    pub(crate) host_index: Names<'a, HostName>,
    pub(crate) vms: Vec<Vm<'a>>,
    pub(crate) vm_index: Names<'a, VmName>,
    heard: Heard<'a>,
    pub(crate) groups: Groups,
    pub(crate) room: Room<'a>,
    pub(crate) domains: Domains<'a>,
    pub(crate) reach: RefCell<Reach<'a>>,
    /// Hosts that take guests.
    pub(crate) good_hosts: usize,
    /// Moves at the same time in the whole cluster, and by network.
    pub(crate) moves: u32,
    pub(crate) network_moves: BTreeMap<&'a NetworkName, u32>,
    /// Where each group belongs now, as [`Work::home`] has it.
    pub(crate) homes: Vec<Option<(usize, usize)>>,
    /// Room kept there for members that still have to come.
    pub(crate) reserves: Vec<Option<(usize, Vec<u64>)>>,
    /// VMs by effective priority, then how many need them, then name.
    pub(crate) order: Vec<usize>,
    /// VMs that need each VM directly.
    pub(crate) needed_by: Lists,
    /// The identity that a pool has where nothing else decides.
    pub(crate) markers: BTreeMap<&'a PoolName, &'a str>,
    /// New guests' CPU and machine, by family.
    pub(crate) abis: [Option<GuestAbi>; 2],
    pub(crate) actions: Vec<PlannedAction>,
    /// VMs that shall run and find no host.
    pub(crate) stuck: Vec<usize>,
    /// VMs that are taken as running and ready, whatever is reported: what-if.
    pub(crate) assumed: BTreeSet<usize>,
    notes: Option<BTreeMap<usize, String>>,
    pub(crate) host_notes: BTreeMap<usize, String>,
}

impl<'a> Work<'a> {
    pub(crate) fn new(input: &Input<'a>, notes: bool) -> Self {
        let state = input.state;
        let (host_index, vms) = vms(state);
        let hosts: Vec<Host<'a>> = host_index.iter().map(|name| host(input, name)).collect();
        let vm_index = Names::new(state.vms.keys());
        let heard = Heard::new(hosts.iter().map(|host| host.report), &vm_index);
        let groups = Groups::new(state, &vm_index);
        let settings = state.settings();
        let facts: Vec<HostFacts<'a>> = hosts.iter().map(Host::facts).collect();
        let domains = Domains::new(state, &vm_index, &facts);
        let counting = vms.iter().filter(|vm| vm.counts);
        let specs = counting.flat_map(Vm::specs);
        let mut room = Room::new(specs, hosts.len(), vms.len());
        for (at, host) in hosts.iter().enumerate() {
            let spec = host.record.map(|record| &record.spec);
            room.set_host(at, host.report, spec, &settings);
        }
        for (at, vm) in vms.iter().enumerate() {
            room.set_vm(at, vm.spec);
        }
        let mut work = Self {
            input: *input,
            settings,
            good_hosts: hosts.iter().filter(|host| host.good()).count(),
            room,
            domains,
            reach: RefCell::default(),
            moves: 0,
            network_moves: BTreeMap::new(),
            hosts,
            host_index,
            needed_by: Lists::default(),
            vms,
            vm_index,
            heard,
            homes: vec![None; groups.members.len()],
            reserves: vec![None; groups.members.len()],
            groups,
            order: Vec::new(),
            markers: BTreeMap::new(),
            abis: [None, None],
            actions: Vec::new(),
            stuck: Vec::new(),
            assumed: BTreeSet::new(),
            notes: notes.then(BTreeMap::new),
            host_notes: BTreeMap::new(),
        };
        work.count_use();
        for group in 0..work.homes.len() {
            work.settle_group(group);
        }
        work.rank();
        work.find_markers();
        work.find_abis();
        work
    }

    fn count_use(&mut self) {
        for at in 0..self.vms.len() {
            self.account(at, true);
        }
    }

    /// Adds a VM's needs to its hosts, or takes them away.
    fn account(&mut self, at: usize, add: bool) {
        let vm = &self.vms[at];
        let own = vm.own;
        let stopping = OrderKind::Stop(StopMode::Graceful);
        let moves = match own {
            Own::Migrating(_) => 1,
            Own::Owned { order, .. } if vm.wanted && order != OrderKind::Run => {
                u32::from(order == stopping || order == OrderKind::Stop(StopMode::Save))
            }
            _ => 0,
        };
        let change = |count: &mut u32, by: u32| {
            *count = if add {
                *count + by
            } else {
                count.saturating_sub(by)
            };
        };
        for host in own.hosts() {
            self.room.account(at, host, add);
            change(&mut self.hosts[host].guests, 1);
            change(&mut self.hosts[host].moves, moves);
        }
        if moves > 0 {
            change(&mut self.moves, moves);
            let networks: BTreeSet<&'a NetworkName> =
                vm.spec.nics.iter().map(|nic| &nic.network).collect();
            for network in networks {
                change(self.network_moves.entry(network).or_default(), moves);
            }
        }
        self.domains.account(at, own, add);
    }

    /// Changes who may run a VM, and what it will be started with.
    pub(crate) fn set_own(&mut self, at: usize, own: Own, change: impl FnOnce(&mut Vm<'a>)) {
        self.account(at, false);
        self.vms[at].own = own;
        self.vms[at].touched = true;
        change(&mut self.vms[at]);
        self.room.set_vm(at, self.vms[at].spec);
        self.account(at, true);
        if let Some(group) = self.groups.of[at] {
            self.settle_group(group);
        }
    }

    /// Finds a group's home anew, and what has to be kept free there.
    pub(crate) fn settle_group(&mut self, group: usize) {
        if let Some((seat, need)) = self.reserves[group].take() {
            self.room.reserve(seat, &need, false);
        }
        self.homes[group] = self.home(group, &[]);
        self.reserves[group] = self.reserve_for(group);
        if let Some((seat, need)) = &self.reserves[group] {
            self.room.reserve(*seat, need, true);
        }
    }

    pub(crate) fn facts(&self, host: usize) -> HostFacts<'a> {
        self.hosts[host].facts()
    }

    /// Who needs whom, the effective priorities, and the order that follows.
    fn rank(&mut self) {
        let mut needs: Vec<(usize, usize)> = Vec::new();
        for (at, vm) in self.vms.iter().enumerate() {
            let names = vm.record.spec.depends_on.keys();
            needs.extend(names.filter_map(|other| Some((at, self.vm_index.get(other)?))));
        }
        let count = self.vms.len();
        let backward: Vec<(usize, usize)> = needs.iter().map(|(at, other)| (*other, *at)).collect();
        self.needed_by = Lists::new(count, &backward);
        self.inherit_priorities(&Lists::new(count, &needs));
        self.count_dependents();
        let mut order: Vec<(std::cmp::Reverse<(i32, u32)>, usize)> = self
            .vms
            .iter()
            .enumerate()
            .map(|(at, vm)| (std::cmp::Reverse((vm.priority, vm.dependents)), at))
            .collect();
        order.sort_unstable();
        self.order = order.into_iter().map(|(_, at)| at).collect();
    }

    fn count_dependents(&mut self) {
        let mut seen = vec![usize::MAX; self.vms.len()];
        let mut todo: Vec<usize> = Vec::new();
        for at in 0..self.vms.len() {
            todo.extend(self.needed_by.of(at));
            let mut count = 0;
            seen[at] = at;
            while let Some(other) = todo.pop() {
                if seen[other] != at && count < DEPENDENTS_COUNTED {
                    seen[other] = at;
                    count += 1;
                    todo.extend(self.needed_by.of(other));
                }
            }
            self.vms[at].dependents = count;
        }
    }

    /// What is needed counts as much as the most important VM that needs it, directly or by others that shall run.
    fn inherit_priorities(&mut self, needs: &Lists) {
        let count = self.vms.len();
        let mut open: Vec<usize> = (0..count).map(|at| self.needed_by.of(at).len()).collect();
        let mut free: Vec<usize> = (0..count).filter(|at| open[*at] == 0).collect();
        while let Some(at) = free.pop() {
            let lends = self.vms[at].wanted.then_some(self.vms[at].priority);
            for other in needs.of(at) {
                let vm = &mut self.vms[*other];
                vm.priority = vm.priority.max(lends.unwrap_or(i32::MIN));
                open[*other] -= 1;
                if open[*other] == 0 {
                    free.push(*other);
                }
            }
        }
    }

    /// The most common identity of each pool; of two equally common ones the first by name.
    fn find_markers(&mut self) {
        let mut votes: BTreeMap<&PoolName, BTreeMap<&str, u32>> = BTreeMap::new();
        for report in self.hosts.iter().filter_map(|host| host.report) {
            for (pool, seen) in &report.pools {
                if let Some(marker) = seen.marker.as_deref().filter(|_| seen.usable) {
                    *votes.entry(pool).or_default().entry(marker).or_default() += 1;
                }
            }
        }
        for (pool, votes) in votes {
            let best = votes
                .iter()
                .max_by_key(|(marker, n)| (**n, std::cmp::Reverse(**marker)));
            if let Some((marker, _)) = best {
                self.markers.insert(pool, marker);
            }
        }
    }

    fn find_abis(&mut self) {
        let up = self.hosts.iter().filter(|host| host.up);
        let reports = up.filter_map(|host| host.report);
        self.abis = [
            crate::guest_abi(reports.clone(), Machine::Q35),
            crate::guest_abi(reports, Machine::Microvm),
        ];
    }

    /// CPU and machine of a guest of this family that is started now.
    pub(crate) fn new_abi(&self, machine: Machine) -> Option<&GuestAbi> {
        match machine {
            Machine::Q35 => self.abis[0].as_ref(),
            Machine::Microvm => self.abis[1].as_ref(),
        }
    }

    /// What a host says of a VM.
    pub(crate) fn report(&self, vm: usize, host: usize) -> Option<&'a VmReport> {
        self.word(vm, host).map(|word| word.report)
    }

    /// The short form of what a host says of a VM.
    pub(crate) fn word(&self, vm: usize, host: usize) -> Option<Word<'a>> {
        self.heard.get(vm, host)
    }

    /// Every member is heard or proven dead, or there was time enough for it.
    pub(crate) fn may_place(&self) -> bool {
        let known = |host: &Host<'_>| {
            host.record.is_none() || host.proof.is_some() || (host.up && host.report.is_some())
        };
        self.input.settled || self.hosts.iter().all(known)
    }

    /// Whether anybody wants to know why nothing is done.
    pub(crate) fn takes_notes(&self) -> bool {
        self.notes.is_some()
    }

    /// Notes why nothing is done for a VM; the first note stays.
    pub(crate) fn note(&mut self, vm: usize, text: impl FnOnce(&Self) -> String) {
        let missing = |notes: &BTreeMap<usize, String>| !notes.contains_key(&vm);
        if self.notes.as_ref().is_some_and(missing) {
            let text = text(self);
            if let Some(notes) = &mut self.notes {
                notes.insert(vm, text);
            }
        }
    }

    /// Replaces what is noted for a VM.
    pub(crate) fn note_anew(&mut self, vm: usize, text: String) {
        if let Some(notes) = &mut self.notes {
            notes.insert(vm, text);
        }
    }

    pub(crate) fn take_notes(&mut self) -> BTreeMap<usize, String> {
        self.notes.take().unwrap_or_default()
    }
}

/// All VMs, and all hosts by name: members, and those that are none but are named as owners.
fn vms<'a>(state: &'a State) -> (Names<'a, HostName>, Vec<Vm<'a>>) {
    let mut names: BTreeSet<&HostName> = BTreeSet::new();
    let mut known = Names::new(state.hosts.keys());
    // Once with the members, and only if there are others once more.
    loop {
        let mut strangers: BTreeSet<&HostName> = BTreeSet::new();
        let vms = state.vms.iter();
        let vms = vms.map(|(name, record)| {
            vm(name, record, |host| {
                known.get(host).unwrap_or_else(|| {
                    strangers.insert(host);
                    0
                })
            })
        });
        let vms: Vec<Vm<'a>> = vms.collect();
        if strangers.is_empty() {
            return (known, vms);
        }
        names.extend(state.hosts.keys());
        names.append(&mut strangers);
        known = Names::new(names.iter().copied());
    }
}

fn host<'a>(input: &Input<'a>, name: &'a HostName) -> Host<'a> {
    let health = input.health.get(name).copied();
    let up = health == Some(HostHealth::Up);
    // Who is heard within its lease is not dead, whatever a proof says: it was made before.
    let mut proofs = input.proofs.iter().filter(|proof| proof.host() == name);
    let wide = |proof: &&FenceProof| proof.vm().is_none();
    let report = input.reports.get(name);
    Host {
        name,
        record: input.state.hosts.get(name),
        report,
        up,
        health,
        proof: proofs.find(wide).filter(|_| !up),
        guests: 0,
        moves: 0,
        threads: report.map_or(1, |report| report.capacity.cpus.max(1)),
        armed: report.is_some_and(|report| report.guard_armed && report.watchdog_ms.is_some()),
    }
}

fn vm<'a>(
    name: &'a VmName,
    record: &'a VmRecord,
    mut at: impl FnMut(&'a HostName) -> usize,
) -> Vm<'a> {
    let own = match &record.ownership {
        Ownership::Free => Own::Free,
        Ownership::Owned { host, epoch, order } => Own::Owned {
            host: at(host),
            epoch: Some(*epoch),
            order: *order,
        },
        Ownership::Migrating {
            id,
            from,
            epoch,
            to,
            target_epoch,
            cancel,
        } => Own::Migrating(Moving {
            id: Some(*id),
            from: at(from),
            epoch: *epoch,
            to: at(to),
            target_epoch: *target_epoch,
            cancel: *cancel,
        }),
    };
    let resumes = record.saved.is_some() && record.active.is_some();
    let fresh = own == Own::Free && !resumes;
    let counting = |spec: &VmSpec| !spec.resources.is_empty();
    Vm {
        name,
        record,
        own,
        spec: if fresh {
            &record.spec
        } else {
            record.effective()
        },
        abi: record.abi.as_ref().filter(|_| !fresh),
        saved: own == Own::Free && resumes,
        wanted: record.wanted(),
        priority: if record.wanted() {
            record.spec.priority
        } else {
            i32::MIN
        },
        dependents: 0,
        touched: false,
        counts: counting(&record.spec) || record.active.as_ref().is_some_and(counting),
    }
}
