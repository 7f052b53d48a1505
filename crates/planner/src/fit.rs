//! Hard rules: whether a host may take a VM, and if not, why, in words.
//!
//! Always holds: nothing is placed or moved against one of these, not even on an operator's
//! explicit wish.

use crate::abi;
use crate::work::{Own, Work};
use quorate_membership::HostHealth;
use quorate_state::{HostMode, OrderKind};

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
    /// It moves: companions on a host that is no good hold nobody there.
    pub(crate) moves: bool,
}

impl Query<'_> {
    fn unit(&self) -> impl Iterator<Item = usize> + '_ {
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
    Abi(String),
    Pool(String),
    Network(String),
    Link(String),
    Accel(String),
    Apart(usize, usize),
    With(usize, usize),
    Contradiction(usize, usize),
    Memory(Room),
}

/// Memory of a host that does not suffice, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    free: u64,
    all: u64,
    need: u64,
    /// Of the free memory, promised to others.
    kept: u64,
    /// Companions are counted in.
    group: bool,
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
            Self::Memory(room) => format!("{} has {}", on(host), room.describe()),
        }
    }
}

impl Room {
    fn describe(self) -> String {
        let mut text = format!("{} of {} free", mib(self.free), mib(self.all));
        if self.kept > 0 {
            text.push_str(&format!(", {} more are kept for others", mib(self.kept)));
        }
        text.push_str(&format!("; {} are needed", mib(self.need)));
        if self.group {
            text.push_str(" for all that are kept together");
        }
        text
    }
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{}MiB", bytes >> 20)
}

impl Work<'_> {
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
        for (n, a) in all.iter().enumerate() {
            if let Some(b) = all[n + 1..]
                .iter()
                .find(|b| self.groups.apart[*a].contains(b))
            {
                return Err(Reject::Contradiction(*a, *b));
            }
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
        let Some(report) = self.hosts[at].report else {
            return Err(Reject::NoReport);
        };
        let seen = &self.vms[vm];
        let allowed = &seen.record.spec.hosts;
        if !allowed.is_empty() && !allowed.contains(self.hosts[at].name) {
            return Err(Reject::NotAllowed(vm));
        }
        // Memory needs the CPU and machine that it was made with; what starts anew gets the ones
        // that all hosts have.
        let last = seen.record.last_host.as_ref().filter(|_| seen.saved);
        let last = last.and_then(|last| self.host_index.get(last).copied());
        let from = query.from.filter(|_| seen.own != Own::Free).or(last);
        match seen.abi.filter(|_| seen.saved || from.is_some()) {
            Some(abi) => abi::supports(report, abi).map_err(Reject::Abi)?,
            None => {
                let family = seen.spec.machine.alias();
                if !report.hypervisor.machines.contains_key(family) {
                    return Err(Reject::Abi(format!("it has no working QEMU for {family}")));
                }
            }
        }
        self.reaches_pools(vm, at, from)?;
        for nic in &seen.spec.nics {
            if !report.networks.contains(&nic.network) {
                let text = format!("network {} is not up there", nic.network);
                return Err(Reject::Network(text));
            }
        }
        if let Some(from) = from {
            self.takes_memory(from, at, query.live)?;
        }
        let apart = &self.groups.apart[vm];
        let near = apart.iter().find(|other| self.vms[**other].own.on(at));
        near.map_or(Ok(()), |other| Err(Reject::Apart(vm, *other)))
    }

    /// Whether a guest's memory can go from one host to the other.
    fn takes_memory(&self, from: usize, at: usize, live: bool) -> Result<(), Reject> {
        let (source, target) = (self.hosts[from].report, self.hosts[at].report);
        let (Some(source), Some(target)) = (source, target) else {
            return Ok(());
        };
        let (from, to) = (self.hosts[from].name, self.hosts[at].name);
        let link = source.links.get(to).or_else(|| target.links.get(from));
        if live && link.is_some_and(|link| !link.up) {
            return Err(Reject::Link(format!(
                "the direct link from {from} to it is down"
            )));
        }
        let (old, new) = (&source.hypervisor.accel, &target.hypervisor.accel);
        if old != new {
            let text = format!("a guest of {old} cannot go on under {new}");
            return Err(Reject::Accel(text));
        }
        Ok(())
    }

    fn reaches_pools(&self, vm: usize, at: usize, from: Option<usize>) -> Result<(), Reject> {
        let name = self.hosts[at].name;
        let Some(report) = self.hosts[at].report else {
            return Err(Reject::NoReport);
        };
        let record = self.vms[vm].record;
        let last = record.last_host.as_ref();
        let last = last.and_then(|host| self.host_index.get(host).copied());
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
            let Some(seen) = report.pools.get(pool).filter(|seen| seen.usable) else {
                let problem = report.pools.get(pool).and_then(|seen| seen.problem.clone());
                let problem = problem.unwrap_or_else(|| "it has not reported it".into());
                return Err(Reject::Pool(format!(
                    "pool {pool} cannot be used there: {problem}"
                )));
            };
            // The disk is where the guest ran last; where that is unknown, where most hosts look.
            let marker_at = |host: usize| {
                let pools = self.hosts[host].report.map(|report| &report.pools);
                pools.and_then(|pools| pools.get(pool)?.marker.as_deref())
            };
            let same = from.or(last).and_then(marker_at);
            let same = same.or_else(|| self.markers.get(pool).copied());
            if seen.marker.as_deref() != same && same.is_some() {
                let text = format!("pool {pool} there is not the one that holds its disk");
                return Err(Reject::Pool(text));
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
        let host = &self.hosts[at];
        let arriving = all.iter().filter(|vm| !self.vms[**vm].own.on(at));
        let need: u64 = arriving.map(|vm| self.vms[*vm].need()).sum();
        let kept = host.held + self.reserved(at, self.groups.of[query.vm]);
        let free = host.memory().saturating_sub(host.used);
        if need <= free.saturating_sub(kept) {
            return Ok(());
        }
        Err(Reject::Memory(Room {
            free: free.saturating_sub(kept),
            all: host.memory(),
            need,
            kept: kept.min(free),
            group: all.len() > 1,
        }))
    }

    /// Bytes kept on a host for members of groups that are at home there and still have to come.
    fn reserved(&self, at: usize, except: Option<usize>) -> u64 {
        if !self.hosts[at].good() {
            return 0;
        }
        let homes = self.homes.iter().enumerate();
        let at_home = homes.filter(|(group, home)| {
            Some(*group) != except && home.is_some_and(|(seat, _)| seat == at)
        });
        let coming = at_home.flat_map(|(group, _)| self.groups.members[group].iter().copied());
        coming
            .filter(|vm| self.pending(*vm, at))
            .map(|vm| self.vms[vm].need())
            .sum()
    }
}
