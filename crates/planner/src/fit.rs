//! Hard rules: whether a host may take a VM, and if not, why, in words.
//!
//! Always holds: nothing is placed or moved against one of these, not even on an operator's
//! explicit wish. [`Work::fit`] says why not, [`Work::passes`] only whether; they agree.

use crate::abi;
use crate::reach::{HostSet, Kind, Needs};
use crate::room::Short;
use crate::work::{Own, Work};
use quorate_membership::HostHealth;
use quorate_state::{HostMode, OrderKind};
use std::rc::Rc;

/// What is asked: may `vm`, together with `with`, be given to a host?
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Query<'q> {
    pub(crate) vm: usize,
    /// Companions that move at the same time.
    pub(crate) with: &'q [usize],
    /// The guest's memory comes from there.
    pub(crate) from: Option<usize>,
    /// By live migration.
    pub(crate) live: bool,
    /// Only this host will do.
    pub(crate) only: Option<usize>,
    /// Not this host.
    pub(crate) not: Option<usize>,
    /// Room for the companions that have no place yet is not asked for.
    pub(crate) alone: bool,
    /// Disks of `local` pools are copied to it first.
    pub(crate) copies: bool,
    /// It moves: companions on a host that is no good hold nobody there.
    pub(crate) moves: bool,
}

impl Query<'_> {
    pub(crate) fn unit(&self) -> impl Iterator<Item = usize> + '_ {
        std::iter::once(self.vm).chain(self.with.iter().copied())
    }

    fn has(&self, vm: usize) -> bool {
        vm == self.vm || self.with.contains(&vm)
    }
}

/// Why a host is rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reject {
    NotMember,
    Mode(HostMode),
    Health(Option<HostHealth>),
    NoReport,
    HereAlready,
    NotAsked(usize),
    NotAllowed(usize),
    /// Lacks a label that the VM asks for.
    Label(usize),
    Abi(String),
    Pool(String),
    Network(String),
    Link(String),
    Accel(String),
    Apart(usize, usize),
    /// A rule over domains.
    Domain(usize, usize),
    With(usize, usize),
    Contradiction(usize, usize),
    Room {
        short: Short,
        group: bool,
    },
}

impl Reject {
    pub(crate) fn describe(&self, work: &Work<'_>, host: usize) -> String {
        let vm = |at: usize| work.vms[at].name;
        let on = |at: usize| work.hosts[at].name;
        match self {
            Self::NotMember => "is not a host of this cluster".into(),
            Self::Mode(HostMode::Draining) => "is being drained".into(),
            Self::Mode(_) => "is in maintenance".into(),
            Self::Health(Some(HostHealth::Suspect)) => "has fallen silent".into(),
            Self::Health(Some(HostHealth::Expired | HostHealth::Dead)) => "is lost".into(),
            Self::Health(_) => "has not been heard of".into(),
            Self::NoReport => "has not reported yet".into(),
            Self::HereAlready => "has it now".into(),
            Self::NotAsked(asked) => format!("{} was asked for", on(*asked)),
            Self::NotAllowed(who) => format!("is not among the hosts allowed for {}", vm(*who)),
            Self::Label(who) => {
                let labels = work.vms[*who].record.spec.host_labels.keys();
                let labels: Vec<&str> = labels.map(|label| label.as_str()).collect();
                format!(
                    "has not the labels that {} asks for ({})",
                    vm(*who),
                    labels.join(", ")
                )
            }
            Self::Abi(text)
            | Self::Pool(text)
            | Self::Network(text)
            | Self::Link(text)
            | Self::Accel(text) => text.clone(),
            Self::Apart(who, other) => {
                let moves = matches!(work.vms[*other].own, Own::Migrating(_));
                let state = if moves {
                    "is moving from or to it"
                } else {
                    "is on it"
                };
                format!(
                    "{} must be kept apart from {}, which {state}",
                    vm(*who),
                    vm(*other)
                )
            }
            Self::Domain(_, rule) => work.domains.describe(*rule, &work.facts(host)),
            Self::With(other, seat) => {
                format!(
                    "must be kept with {}, which is on {}",
                    vm(*other),
                    on(*seat)
                )
            }
            Self::Contradiction(a, b) => {
                format!(
                    "rules keep {} and {} both together and apart",
                    vm(*a),
                    vm(*b)
                )
            }
            Self::Room { short, group } => {
                format!("{} has {}", on(host), describe_room(work, short, *group))
            }
        }
    }
}

fn describe_room(work: &Work<'_>, short: &Short, group: bool) -> String {
    let name = work.room.name(short.column);
    let count = |n: u64| match name {
        None => mib(n),
        Some(_) => n.to_string(),
    };
    let what = name.map(|name| format!(" {name}")).unwrap_or_default();
    let mut text = format!("{} of {}{what} free", count(short.free), count(short.have));
    if short.kept > 0 {
        text.push_str(&format!(", {} more are kept for others", count(short.kept)));
    }
    text.push_str(&format!("; {} are needed", count(short.need)));
    if group {
        text.push_str(" for all that are kept together");
    }
    text
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{}MiB", bytes >> 20)
}

/// A question made ready to be put to every host.
#[derive(Debug)]
pub(crate) struct Ask {
    /// Hosts that could take all of it if they were empty.
    pub(crate) set: HostSet,
    /// What arrives, but for members that a host has already.
    pub(crate) arriving: Vec<usize>,
    pub(crate) need: Vec<u64>,
    /// Hard rules: rule, members that arrive, of these the ones that come from `from`.
    rules: Vec<(usize, u32, u32)>,
    from: Option<usize>,
    /// The host that it ran on last.
    pub(crate) last: Option<usize>,
    /// Something is remembered of it that counts for or against hosts.
    pub(crate) remembered: bool,
    /// Where it has no short answer, each host is looked at in full.
    slow: bool,
}

impl<'a> Work<'a> {
    /// Checks every hard rule.
    pub(crate) fn fit(&self, query: &Query<'_>, at: usize) -> Result<(), Reject> {
        self.host_takes(query, at)?;
        let followers = self.followers(query, at);
        for vm in query.unit() {
            self.fits_one(vm, at, query)?;
        }
        self.anchored(query, at)?;
        for vm in &followers {
            self.fits_one(*vm, at, query)?;
        }
        let all: Vec<usize> = query.unit().chain(followers.iter().copied()).collect();
        if all.len() > 1 {
            self.together(&all, at)?;
        }
        self.has_room(query, at, &all)
    }

    fn host_takes(&self, query: &Query<'_>, at: usize) -> Result<(), Reject> {
        let host = &self.hosts[at];
        let Some(record) = host.record else {
            return Err(Reject::NotMember);
        };
        if query.not == Some(at) {
            return Err(Reject::HereAlready);
        }
        if record.mode != HostMode::Active {
            return Err(Reject::Mode(record.mode));
        }
        if !host.up || host.proof.is_some() {
            return Err(Reject::Health(host.health));
        }
        if host.report.is_none() {
            return Err(Reject::NoReport);
        }
        match query.only {
            Some(only) if only != at => Err(Reject::NotAsked(only)),
            _ => Ok(()),
        }
    }

    /// Rules about one VM and one host.
    fn fits_one(&self, vm: usize, at: usize, query: &Query<'_>) -> Result<(), Reject> {
        let from = self.memory_from(vm, query);
        self.reaches(vm, at, from, query.copies)?;
        if let Some(from) = from.filter(|_| query.live) {
            self.linked(from, at)?;
        }
        let own = self.vms[vm].own;
        let broken = self.domains.hard(vm).find(|(_, rule)| !rule.takes(own, at));
        let Some((index, rule)) = broken else {
            return Ok(());
        };
        let near = |other: &&usize| **other != vm && self.vms[**other].own.on(at);
        match rule.vms.iter().find(near).filter(|_| rule.plain()) {
            Some(other) => Err(Reject::Apart(vm, *other)),
            None => Err(Reject::Domain(vm, index)),
        }
    }

    /// The host that a VM's memory comes from, if it has any.
    fn memory_from(&self, vm: usize, query: &Query<'_>) -> Option<usize> {
        let seen = &self.vms[vm];
        let last = seen.record.last_host.as_ref().filter(|_| seen.saved);
        let last = last.and_then(|last| self.host_index.get(last));
        query.from.filter(|_| seen.own != Own::Free).or(last)
    }

    /// What does not change while a plan is made.
    fn reaches(
        &self,
        vm: usize,
        at: usize,
        from: Option<usize>,
        copies: bool,
    ) -> Result<(), Reject> {
        let Some(report) = self.hosts[at].report else {
            return Err(Reject::NoReport);
        };
        let seen = &self.vms[vm];
        let wishes = &seen.record.spec;
        if !wishes.hosts.is_empty() && !wishes.hosts.contains(self.hosts[at].name) {
            return Err(Reject::NotAllowed(vm));
        }
        if !self.hosts[at].labelled(&wishes.host_labels) {
            return Err(Reject::Label(vm));
        }
        // Memory needs the CPU and machine that it was made with; what starts anew gets the ones
        // that all hosts have.
        match seen.abi.filter(|_| seen.saved || from.is_some()) {
            Some(abi) => abi::supports(report, abi).map_err(Reject::Abi)?,
            None => {
                let family = seen.spec.machine.alias();
                if !report.hypervisor.machines.contains_key(family) {
                    return Err(Reject::Abi(format!("it has no working QEMU for {family}")));
                }
            }
        }
        self.reaches_pools(vm, at, from, copies)?;
        for nic in &seen.spec.nics {
            if !report.networks.contains(&nic.network) {
                let text = format!("network {} is not up there", nic.network);
                return Err(Reject::Network(text));
            }
        }
        let source = from.and_then(|from| self.hosts[from].report);
        let accels = source.map(|source| (&source.hypervisor.accel, &report.hypervisor.accel));
        match accels.filter(|(old, new)| old != new) {
            Some((old, new)) => {
                let text = format!("a guest of {old} cannot go on under {new}");
                Err(Reject::Accel(text))
            }
            None => Ok(()),
        }
    }

    /// Whether there is a direct way from one host to the other.
    fn linked(&self, from: usize, at: usize) -> Result<(), Reject> {
        let (source, target) = (self.hosts[from].report, self.hosts[at].report);
        let (Some(source), Some(target)) = (source, target) else {
            return Ok(());
        };
        let (from, to) = (self.hosts[from].name, self.hosts[at].name);
        let link = source.links.get(to).or_else(|| target.links.get(from));
        if link.is_some_and(|link| !link.up) {
            return Err(Reject::Link(format!(
                "the direct link from {from} to it is down"
            )));
        }
        Ok(())
    }

    fn reaches_pools(
        &self,
        vm: usize,
        at: usize,
        from: Option<usize>,
        copies: bool,
    ) -> Result<(), Reject> {
        let name = self.hosts[at].name;
        let Some(report) = self.hosts[at].report else {
            return Err(Reject::NoReport);
        };
        let state = self.input.state;
        let own = |pool| {
            let pool = state.pools.get(pool);
            pool.is_some_and(|pool| pool.spec.is_hosts_own())
        };
        for disk in &self.vms[vm].spec.disks {
            let pool = &disk.pool;
            let listed = self
                .input
                .state
                .pools
                .get(pool)
                .map(|object| object.spec.hosts());
            if listed.is_some_and(|hosts| !hosts.is_empty() && !hosts.contains(name)) {
                let text = format!("pool {pool} is not for it: add it to the pool's hosts");
                return Err(Reject::Pool(text));
            }
            if self.input.state.is_cut(name, pool) {
                let text = format!("it is cut off from pool {pool} until its old guests are gone");
                return Err(Reject::Pool(text));
            }
            let Some(seen) = report.pools.get(pool).filter(|seen| seen.usable) else {
                let problem = report.pools.get(pool).and_then(|seen| seen.problem.clone());
                let problem = problem.unwrap_or_else(|| "it has not reported it".into());
                return Err(Reject::Pool(format!(
                    "pool {pool} cannot be used there: {problem}"
                )));
            };
            // What is there is another thing on each host.
            if own(pool) {
                continue;
            }
            let same = self.marker_wanted(vm, pool, from);
            if seen.marker.as_deref() != same && same.is_some() {
                let text = format!("pool {pool} there is not the one that holds its disk");
                return Err(Reject::Pool(text));
            }
        }
        let there = state.check_copies(self.vms[vm].spec, name, Some(&report.boot));
        match there {
            Err(_) if copies => self.takes_copies(vm, at).map_err(Reject::Pool),
            there => there.map_err(Reject::Pool),
        }
    }

    /// The identity that a pool must have for a VM's disk: the one where the guest ran last; where
    /// that is unknown, the one that most hosts see.
    fn marker_wanted(
        &self,
        vm: usize,
        pool: &quorate_types::PoolName,
        from: Option<usize>,
    ) -> Option<&'a str> {
        let last = self.vms[vm].record.last_host.as_ref();
        let last = last.and_then(|host| self.host_index.get(host));
        let marker_at = |host: usize| {
            let pools = self.hosts[host].report.map(|report| &report.pools);
            pools.and_then(|pools| pools.get(pool)?.marker.as_deref())
        };
        let same = from.or(last).and_then(marker_at);
        same.or_else(|| self.markers.get(pool).copied())
    }

    /// Hosts that take guests and could take this VM if they were empty.
    fn reach(&self, vm: usize, query: &Query<'_>) -> Rc<HostSet> {
        let from = self.memory_from(vm, query);
        let seen = &self.vms[vm];
        let pools = seen.spec.disks.iter().map(|disk| &disk.pool);
        let needs = match seen.abi.filter(|_| seen.saved || from.is_some()) {
            Some(abi) => Needs::abi(abi),
            None => Needs::Family(seen.spec.machine.alias()),
        };
        let source = from.and_then(|from| self.hosts[from].report);
        let kind = Kind {
            hosts: &seen.record.spec.hosts,
            labels: &seen.record.spec.host_labels,
            pools: pools
                .map(|pool| (pool, self.marker_wanted(vm, pool, from)))
                .collect(),
            own: self
                .input
                .state
                .own_disks(seen.spec)
                .map(|disk| (&disk.pool, disk.image.as_str()))
                .collect(),
            copies: query.copies,
            networks: seen.spec.nics.iter().map(|nic| &nic.network).collect(),
            needs,
            accel: source.map(|source| source.hypervisor.accel.as_str()),
        };
        if let Some(known) = self.reach.borrow().known.get(&kind) {
            return Rc::clone(known);
        }
        let takes =
            |at: usize| self.hosts[at].good() && self.reaches(vm, at, from, query.copies).is_ok();
        let set = Rc::new(HostSet::of(self.hosts.len(), takes));
        self.reach.borrow_mut().known.insert(kind, Rc::clone(&set));
        set
    }

    /// How many hosts could take a VM that starts, if they were empty.
    pub(crate) fn choices(&self, vm: usize) -> u32 {
        let query = Query {
            vm,
            ..Query::default()
        };
        self.reach(vm, &query).count()
    }

    /// Makes a question ready.
    pub(crate) fn ask(&self, query: &Query<'_>) -> Ask {
        let followers = self.followers(query, usize::MAX);
        let arriving: Vec<usize> = query.unit().chain(followers).collect();
        let leaves = |vm: usize| match self.vms[vm].own {
            Own::Free => true,
            Own::Owned { host, .. } => query.not == Some(host),
            Own::Migrating(_) => false,
        };
        let slow = !arriving.iter().all(|vm| leaves(*vm));
        let mut set = HostSet::of(self.hosts.len(), |at| {
            self.hosts[at].good()
                && query.not != Some(at)
                && query.only.is_none_or(|only| only == at)
        });
        if let Some((seat, _)) = self.anchor(query) {
            set.keep(&HostSet::of(self.hosts.len(), |at| at == seat));
        }
        let mut rules: Vec<(usize, u32, u32)> = Vec::new();
        for vm in arriving.iter().filter(|_| !slow) {
            set.keep(&self.reach(*vm, query));
            let from = u32::from(self.vms[*vm].own != Own::Free);
            for (rule, _) in self.domains.hard(*vm) {
                match rules.iter_mut().find(|(other, _, _)| *other == rule) {
                    Some((_, members, coming)) => {
                        *members += 1;
                        *coming += from;
                    }
                    None => rules.push((rule, 1, from)),
                }
            }
        }
        Ask {
            set,
            need: self.room.sum(arriving.iter().copied()),
            arriving,
            rules,
            from: query.not,
            last: self.last_host(query.vm),
            remembered: self.input.memory.has_marks(self.vms[query.vm].name),
            slow,
        }
    }

    /// Whether [`Work::fit`] is `Ok`, for a host of the question's set.
    pub(crate) fn passes(&self, query: &Query<'_>, ask: &Ask, at: usize) -> bool {
        if ask.slow {
            return self.fit(query, at).is_ok();
        }
        let own = self.own_reserve(query, at);
        if !self.room.suffices(at, &ask.need, own) {
            return false;
        }
        let rules = ask.rules.iter().all(|(rule, members, coming)| {
            let rule = &self.domains.rules[*rule];
            let same = ask.from.is_some_and(|from| rule.same_domain(from, at));
            rule.takes_many(at, *members, if same { *coming } else { 0 })
        });
        rules
            && (!query.live
                || ask.arriving.iter().all(|vm| {
                    let from = self.memory_from(*vm, query);
                    from.is_none_or(|from| self.linked(from, at).is_ok())
                }))
    }

    /// Rules among VMs that arrive together.
    fn together(&self, all: &[usize], at: usize) -> Result<(), Reject> {
        for vm in all {
            for (index, rule) in self.domains.hard(*vm) {
                let members = rule.vms.iter().filter(|other| all.contains(other));
                let here = members.clone().filter(|other| {
                    let mut hosts = self.vms[**other].own.hosts();
                    hosts.any(|host| rule.same_domain(host, at))
                });
                let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                let (many, here) = (count(members.clone().count()), count(here.count()));
                if rule.takes_many(at, many, here) {
                    continue;
                }
                let mut pair = members.copied();
                return Err(match (pair.next(), pair.next()) {
                    (Some(a), Some(b)) if rule.plain() => Reject::Contradiction(a, b),
                    _ => Reject::Domain(*vm, index),
                });
            }
        }
        Ok(())
    }

    /// Companions without a good place, which will have to follow to `at`.
    fn followers(&self, query: &Query<'_>, at: usize) -> Vec<usize> {
        if query.alone || self.anchor(query).is_some() {
            return Vec::new();
        }
        let companions = self.groups.companions(query.vm);
        companions
            .filter(|other| !query.has(*other) && self.pending(*other, at))
            .collect()
    }

    /// The VM is wanted, not on `at`, and has no place where it can stay.
    fn pending(&self, vm: usize, at: usize) -> bool {
        let seen = &self.vms[vm];
        let settled = self.seat(vm).is_some_and(|seat| self.hosts[seat].good());
        seen.wanted && !seen.own.on(at) && !settled
    }

    /// Where a VM is, or will be when its migration has ended. One that is being stopped has no
    /// place: it will be given one anew.
    pub(crate) fn seat(&self, vm: usize) -> Option<usize> {
        match self.vms[vm].own {
            Own::Free => None,
            Own::Owned {
                host,
                order: OrderKind::Run,
                ..
            } => Some(host),
            Own::Owned { .. } => None,
            Own::Migrating(moving) => {
                let arrives = self.hosts[moving.to].up || !self.hosts[moving.from].up;
                Some(if arrives { moving.to } else { moving.from })
            }
        }
    }

    /// Where a group belongs: the host that most of its members are on, good hosts first. With it
    /// one member that is there.
    pub(crate) fn home(&self, group: usize, except: &[usize]) -> Option<(usize, usize)> {
        let members = self.groups.members[group].iter().copied();
        let seated = members.filter(|vm| self.vms[*vm].wanted && !except.contains(vm));
        let seats: Vec<(usize, usize)> = seated
            .filter_map(|vm| self.seat(vm).map(|seat| (seat, vm)))
            .collect();
        let rank = |seat: usize| {
            let here = seats.iter().filter(|(other, _)| *other == seat);
            let failed: u32 = here
                .clone()
                .map(|(_, vm)| self.vms[*vm].record.failed_moves)
                .sum();
            let host = &self.hosts[seat];
            let count = here.count();
            (
                host.good(),
                host.active(),
                count,
                std::cmp::Reverse(failed),
                std::cmp::Reverse(seat),
            )
        };
        seats
            .iter()
            .copied()
            .max_by_key(|(seat, vm)| (rank(*seat), std::cmp::Reverse(*vm)))
    }

    /// The place that companions hold the VM to.
    pub(crate) fn anchor(&self, query: &Query<'_>) -> Option<(usize, usize)> {
        let group = self.groups.of[query.vm]?;
        let moving: Vec<usize> = query.unit().collect();
        let home = self.home(group, &moving)?;
        (!query.moves || self.hosts[home.0].good()).then_some(home)
    }

    fn anchored(&self, query: &Query<'_>, at: usize) -> Result<(), Reject> {
        match self.anchor(query) {
            Some((seat, other)) if seat != at => Err(Reject::With(other, seat)),
            _ => Ok(()),
        }
    }

    fn has_room(&self, query: &Query<'_>, at: usize, all: &[usize]) -> Result<(), Reject> {
        let arriving = all.iter().filter(|vm| !self.vms[**vm].own.on(at));
        let need = self.room.sum(arriving.copied());
        match self.room.short(at, &need, self.own_reserve(query, at)) {
            None => Ok(()),
            Some(short) => Err(Reject::Room {
                short,
                group: all.len() > 1,
            }),
        }
    }

    /// What is kept on a host for the VM's own companions.
    fn own_reserve(&self, query: &Query<'_>, at: usize) -> Option<&[u64]> {
        let (seat, need) = self.reserves[self.groups.of[query.vm]?].as_ref()?;
        (*seat == at).then_some(need.as_slice())
    }

    /// Room that is kept on a group's home for members that still have to come.
    pub(crate) fn reserve_for(&self, group: usize) -> Option<(usize, Vec<u64>)> {
        let (seat, _) = self.homes[group].filter(|(seat, _)| self.hosts[*seat].good())?;
        let members = self.groups.members[group].iter().copied();
        let coming = members.filter(|vm| self.pending(*vm, seat));
        Some((seat, self.room.sum(coming)))
    }
}
