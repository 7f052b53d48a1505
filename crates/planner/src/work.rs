//! The picture that a plan is made in: facts by index, and what the actions so far leave.
//!
//! Always holds: [`Vm::own`] is what the state will say once the actions collected so far are
//! applied, and each host's use is the sum over it. A VM counts on every host that may have it:
//! during a migration on both.

use crate::groups::Groups;
use crate::{Input, OVERHEAD_BYTES};
use quorate_membership::{FenceProof, HostHealth};
use quorate_state::{GuestAbi, HostMode, HostRecord, OrderKind, Ownership, VmRecord};
use quorate_state::{PlannedAction, StopMode};
use quorate_types::spec::{Machine, Power};
use quorate_types::{
    ClusterSettings, Epoch, HostName, HostReport, MigrationId, PoolName, VmName, VmReport, VmSpec,
};
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
    /// Bytes that its guests need.
    pub(crate) used: u64,
    pub(crate) cpus_used: u32,
    pub(crate) guests: u32,
    /// Moves that it takes part in: migrations, and guests stopped to start elsewhere.
    pub(crate) moves: u32,
    /// Bytes kept for VMs of higher priority that wait for something.
    pub(crate) held: u64,
}

impl Host<'_> {
    pub(crate) fn active(&self) -> bool {
        self.record
            .is_some_and(|record| record.mode == HostMode::Active)
    }

    /// Guests can be given to it.
    pub(crate) fn good(&self) -> bool {
        self.active() && self.up && self.report.is_some()
    }

    pub(crate) fn memory(&self) -> u64 {
        self.report.map_or(0, |report| report.capacity.memory.0)
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
}

impl Vm<'_> {
    /// Memory that it needs on a host, in bytes.
    pub(crate) fn need(&self) -> u64 {
        self.spec.memory.0.saturating_add(OVERHEAD_BYTES)
    }
}

/// The picture.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) input: Input<'a>,
    pub(crate) settings: ClusterSettings,
    pub(crate) hosts: Vec<Host<'a>>,
    pub(crate) host_index: BTreeMap<&'a HostName, usize>,
    pub(crate) vms: Vec<Vm<'a>>,
    pub(crate) vm_index: BTreeMap<&'a VmName, usize>,
    pub(crate) groups: Groups,
    /// Where each group belongs now, as [`Work::home`] has it.
    pub(crate) homes: Vec<Option<(usize, usize)>>,
    /// VMs by effective priority, then how many need them, then name.
    pub(crate) order: Vec<usize>,
    /// VMs that need each VM directly.
    pub(crate) needed_by: Vec<Vec<usize>>,
    /// The identity that a pool has where nothing else decides.
    pub(crate) markers: BTreeMap<&'a PoolName, &'a str>,
    /// New guests' CPU and machine, by family.
    pub(crate) abis: [Option<GuestAbi>; 2],
    pub(crate) actions: Vec<PlannedAction>,
    notes: Option<BTreeMap<usize, String>>,
    pub(crate) host_notes: BTreeMap<usize, String>,
}

impl<'a> Work<'a> {
    pub(crate) fn new(input: &Input<'a>, notes: bool) -> Self {
        let state = input.state;
        let (hosts, host_index) = hosts(input);
        let vm_index: BTreeMap<&VmName, usize> = state
            .vms
            .keys()
            .enumerate()
            .map(|(at, name)| (name, at))
            .collect();
        let vms: Vec<Vm<'a>> = state
            .vms
            .iter()
            .map(|(name, record)| vm(name, record, &host_index))
            .collect();
        let groups = Groups::new(state, &vm_index);
        let mut work = Self {
            input: *input,
            settings: state.settings(),
            hosts,
            host_index,
            needed_by: vec![Vec::new(); vms.len()],
            vms,
            vm_index,
            homes: vec![None; groups.members.len()],
            groups,
            order: Vec::new(),
            markers: BTreeMap::new(),
            abis: [None, None],
            actions: Vec::new(),
            notes: notes.then(BTreeMap::new),
            host_notes: BTreeMap::new(),
        };
        work.count_use();
        for group in 0..work.homes.len() {
            work.homes[group] = work.home(group, &[]);
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
        let (need, cpus) = (vm.need(), vm.spec.cpus);
        let stopping = OrderKind::Stop(StopMode::Graceful);
        let moves = match vm.own {
            Own::Migrating(_) => 1,
            Own::Owned { order, .. } if vm.wanted && order != OrderKind::Run => {
                u32::from(order == stopping || order == OrderKind::Stop(StopMode::Save))
            }
            _ => 0,
        };
        for host in vm.own.hosts() {
            let host = &mut self.hosts[host];
            if add {
                host.used = host.used.saturating_add(need);
                host.cpus_used = host.cpus_used.saturating_add(cpus);
                host.guests += 1;
                host.moves += moves;
            } else {
                host.used = host.used.saturating_sub(need);
                host.cpus_used = host.cpus_used.saturating_sub(cpus);
                host.guests = host.guests.saturating_sub(1);
                host.moves = host.moves.saturating_sub(moves);
            }
        }
    }

    /// Changes who may run a VM, and what it will be started with.
    pub(crate) fn set_own(&mut self, at: usize, own: Own, change: impl FnOnce(&mut Vm<'a>)) {
        self.account(at, false);
        self.vms[at].own = own;
        self.vms[at].touched = true;
        change(&mut self.vms[at]);
        self.account(at, true);
        if let Some(group) = self.groups.of[at] {
            self.homes[group] = self.home(group, &[]);
        }
    }

    /// Who needs whom, the effective priorities, and the order that follows.
    fn rank(&mut self) {
        for (at, vm) in self.vms.iter().enumerate() {
            let needs = vm.record.spec.depends_on.keys();
            for other in needs.filter_map(|other| self.vm_index.get(other)) {
                self.needed_by[*other].push(at);
            }
        }
        for at in 0..self.vms.len() {
            if self.needed_by[at].is_empty() {
                continue;
            }
            let mut seen = BTreeSet::new();
            let mut todo = self.needed_by[at].clone();
            while let Some(other) = todo.pop() {
                if other != at && seen.insert(other) {
                    todo.extend(&self.needed_by[other]);
                }
            }
            let wanted = seen.iter().filter(|other| self.vms[**other].wanted);
            let highest = wanted.map(|other| self.vms[*other].record.spec.priority);
            let highest = highest.max().unwrap_or(i32::MIN);
            let vm = &mut self.vms[at];
            vm.priority = vm.priority.max(highest);
            vm.dependents = u32::try_from(seen.len()).unwrap_or(u32::MAX);
        }
        let mut order: Vec<usize> = (0..self.vms.len()).collect();
        order.sort_by_key(|at| {
            let vm = &self.vms[*at];
            (
                std::cmp::Reverse(vm.priority),
                std::cmp::Reverse(vm.dependents),
                *at,
            )
        });
        self.order = order;
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
        self.hosts[host].report?.vms.get(self.vms[vm].name)
    }

    /// Every member is heard or proven dead, or there was time enough for it.
    pub(crate) fn may_place(&self) -> bool {
        let known = |host: &Host<'_>| {
            host.record.is_none() || host.proof.is_some() || (host.up && host.report.is_some())
        };
        self.input.settled || self.hosts.iter().all(known)
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

    pub(crate) fn take_notes(&mut self) -> BTreeMap<usize, String> {
        self.notes.take().unwrap_or_default()
    }
}

type Hosts<'a> = (Vec<Host<'a>>, BTreeMap<&'a HostName, usize>);

fn hosts<'a>(input: &Input<'a>) -> Hosts<'a> {
    let state = input.state;
    let mut names: BTreeSet<&HostName> = state.hosts.keys().collect();
    for vm in state.vms.values() {
        names.extend(vm.ownership.hosts().into_iter().map(|(host, _)| host));
    }
    let host = |name: &'a HostName| {
        let health = input.health.get(name).copied();
        let up = health == Some(HostHealth::Up);
        // Who is heard within its lease is not dead, whatever a proof says: it was made before.
        let mut proofs = input.proofs.iter().filter(|proof| proof.host() == name);
        let wide = |proof: &&FenceProof| {
            !matches!(
                proof.evidence(),
                quorate_membership::Evidence::Closed { .. }
            )
        };
        Host {
            name,
            record: state.hosts.get(name),
            report: input.reports.get(name),
            up,
            health,
            proof: proofs.find(wide).filter(|_| !up),
            used: 0,
            cpus_used: 0,
            guests: 0,
            moves: 0,
            held: 0,
        }
    };
    let hosts: Vec<Host<'a>> = names.into_iter().map(host).collect();
    let index = hosts
        .iter()
        .enumerate()
        .map(|(at, host)| (host.name, at))
        .collect();
    (hosts, index)
}

fn vm<'a>(name: &'a VmName, record: &'a VmRecord, hosts: &BTreeMap<&'a HostName, usize>) -> Vm<'a> {
    let at = |host: &HostName| hosts.get(host).copied().unwrap_or(0);
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
        priority: if record.spec.power == Power::Running {
            record.spec.priority
        } else {
            i32::MIN
        },
        dependents: 0,
        touched: false,
    }
}
