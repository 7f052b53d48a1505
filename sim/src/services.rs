//! Services: the datapath of each host, as its kernel keeps it, and clients with long connections.
//!
//! ```text
//!   state applied --a little later--> Datapath{tables, revision} of the host (outlives its daemon, not its kernel)
//!   lease acknowledged --tables as fresh as it--> Datapath.deadline
//!   client --frame--> whoever announced the address last: lease? -> pin or slot -> member's edge: flow known? -> or
//!   second chance -> member
//! ```
//! What counts as broken:
//! * **one-address**: a host serves an address past its lease, or after the address was taken from it; a move that was
//!   planned may overlap.
//! * **connections**: a frame of a connection reaches another member than its own, while its own still has it.
//!
//! Always holds: the clients' generator is their own, so a world without services does not see them. A connection is
//! excused when every host that knows its flow was without a lease while a ring changed: nobody could ask for what to pin.
//! A daemon that starts leaves the kernel alone until its replica, which begins at an older revision, has caught up.
//! Which hosts know a flow, and what is pinned: [`crate::flows`].

use crate::event::{D, Event, HostId, W};
use crate::faults::Op;
use crate::guest::{ProcId, StreamPhase, Vcpu};
use crate::mutate::Mutation;
use crate::rng::Rng;
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_agent_logic::services_wanted;
use quorate_balancer::ring::{NONE, Ring, Slot};
use quorate_membership::Instant;
use quorate_state::{Action, Command, Envelope, Outcome, Refusal, ServiceChange, State};
use quorate_types::service::MemberReport;
use quorate_types::{HostName, Millis, Revision, ServiceName, ServiceReport, UplinkMode, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// Time between two frames of each connection.
const TICK: u64 = 100 * MS;
/// Slots of the model's rings: enough to share out, quick to build.
const SLOTS: u32 = 127;
/// Connections at a time.
const CONNECTIONS: usize = 24;

/// A service in a host's kernel.
#[derive(Debug)]
pub(crate) struct Loaded {
    ring: Option<Ring>,
    /// As it will be with the list that is being prepared.
    pub(crate) coming: Option<Ring>,
    /// Epochs in force and prepared.
    active: u64,
    prepared: Option<u64>,
    holder: bool,
    /// Of the holder that these tables name, where that is this host.
    generation: u64,
}

/// What a host's kernel has of services. It outlives the daemon.
#[derive(Debug, Default)]
pub(crate) struct Datapath {
    pub(crate) loaded: BTreeMap<ServiceName, Loaded>,
    revision: Revision,
    deadline: Option<Instant>,
    /// The lease that was really granted, for the check.
    granted: Option<Instant>,
}

/// A connection of a client.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) service: ServiceName,
    pub(crate) slot: u32,
    pub(crate) member: VmName,
    /// The life of the guest that has it.
    pub(crate) proc: ProcId,
    /// That guest was there at this time.
    seen: u64,
    /// Hosts with an edge that knows its flow, or an agent that remembers it.
    pub(crate) known: BTreeSet<HostId>,
    pub(crate) pinned: bool,
    excused: bool,
}

/// Clients, switches, and what the checks remember.
#[derive(Debug)]
pub(crate) struct Clients {
    rng: Rng,
    /// For what happens between hosts.
    pub(crate) ways: Rng,
    pub(crate) connections: Vec<Connection>,
    /// Where the switch learned the address last: the generation of the holder, and its host.
    learned: BTreeMap<ServiceName, (u64, HostId)>,
    /// Hosts from which an address was taken because their lease was over.
    taken: BTreeSet<(ServiceName, HostName)>,
    /// Members whose service fails though they run.
    sick: BTreeSet<VmName>,
    /// Connections that were opened, and ring changes that some of them lived through.
    pub(crate) opened: u64,
    pub(crate) survived: u64,
}

impl Clients {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed ^ 0x5e21_11ce),
            ways: Rng::new(seed ^ 0xf10_35a1),
            connections: Vec::new(),
            learned: BTreeMap::new(),
            taken: BTreeSet::new(),
            sick: BTreeSet::new(),
            opened: 0,
            survived: 0,
        }
    }
}

/// Where a frame ends.
enum Reached {
    /// Nowhere: it will be sent again.
    Lost,
    Member(VmName),
}

impl World {
    pub(crate) fn begin_clients(&mut self) {
        if self.newest().services.is_empty() {
            return;
        }
        self.after(5 * SEC, Event::World(W::Clients));
        self.after(12 * SEC, Event::World(W::ServiceOp));
    }

    /// The replica has advanced: the agent tells the kernel a little later.
    pub(crate) fn services_applied(&mut self, host: HostId) {
        let state = self.hosts[host].daemon.as_ref().map(|d| &d.state);
        if state.is_some_and(|state| !state.services.is_empty()) {
            let slow = self.hosts[host].apply_slow;
            let delay = self.clients.rng.range(1, if slow { 400 } else { 15 }) * MS;
            self.daemon_after(host, delay, D::Datapath);
        }
    }

    /// Loads what the replica says.
    pub(crate) fn load_services(&mut self, host: HostId) {
        let daemon = self.hosts[host].daemon.as_ref();
        let hasty = self.mutated(Mutation::DatapathOldReplica);
        let ready = daemon.filter(|d| d.caught_up || hasty);
        let Some(state) = ready.map(|d| d.state.clone()) else {
            return;
        };
        let name = self.hosts[host].name.clone();
        let wanted = services_wanted(&state, &name);
        let mut loaded = BTreeMap::new();
        for (service, table) in wanted.services {
            let record = state.services.get(&service);
            let holder = record.and_then(|record| record.holder.as_ref());
            let here = holder.filter(|holder| holder.host == name);
            let mut lists = table.history.clone();
            lists.extend(table.next.clone());
            let of = Loaded {
                ring: Ring::build(&table.history, table.next.as_ref(), SLOTS),
                coming: table
                    .next
                    .as_ref()
                    .and_then(|_| Ring::build(&lists, None, SLOTS)),
                active: table.history.last().map_or(0, |ring| ring.epoch),
                prepared: table.next.as_ref().map(|next| next.epoch),
                holder: table.holder,
                generation: here.map_or(0, |holder| holder.generation),
            };
            loaded.insert(service, of);
        }
        let datapath = &mut self.hosts[host].datapath;
        datapath.loaded = loaded;
        datapath.revision = state.revision;
        self.pin_strays(host);
        self.forget_left(host);
        self.refresh_report(host);
        self.check_addresses();
    }

    /// A heartbeat was acknowledged. After a lapse the kernel may serve again only with tables as fresh as that.
    pub(crate) fn datapath_lease(&mut self, host: HostId, until: Instant, revision: Revision) {
        let now = self.hosts[host].local(self.now);
        let stale = self.mutated(Mutation::DatapathStaleTables);
        let datapath = &mut self.hosts[host].datapath;
        datapath.granted = datapath.granted.max(Some(until));
        let held = datapath.deadline.is_some_and(|end| now < end);
        let loaded = datapath.revision;
        if held || stale || loaded >= revision {
            datapath.deadline = datapath.deadline.max(Some(until));
        }
        let daemon = self.hosts[host].daemon.as_mut();
        if let Some(daemon) = daemon.filter(|d| !d.caught_up && d.state.revision >= revision) {
            daemon.caught_up = true;
            self.services_applied(host);
        }
    }

    /// Whether the host's kernel forwards and answers now.
    fn datapath_on(&self, host: HostId) -> bool {
        let at = &self.hosts[host];
        let held = at
            .datapath
            .deadline
            .is_some_and(|end| at.local(self.now) < end);
        let held = held || self.mutated(Mutation::DatapathNoLease);
        at.on && self.now >= at.stopped_until && held
    }

    fn serves(&self, host: HostId, service: &ServiceName) -> bool {
        let loaded = self.hosts[host].datapath.loaded.get(service);
        loaded.is_some_and(|of| of.holder) && self.datapath_on(host)
    }

    /// Hosts that answer for a service's address, for scenarios.
    pub(crate) fn answering(&self, service: &str) -> String {
        let Ok(service) = ServiceName::new(service) else {
            return "nobody".to_owned();
        };
        let hosts = (0..self.hosts.len()).filter(|host| self.serves(*host, &service));
        let names: Vec<&str> = hosts.map(|host| self.hosts[host].name.as_str()).collect();
        match names.is_empty() {
            true => "nobody".to_owned(),
            false => names.join(" "),
        }
    }

    /// **one-address**.
    pub(crate) fn check_addresses(&mut self) {
        let state = self.newest();
        for (service, record) in &state.services {
            for host in 0..self.hosts.len() {
                if !self.serves(host, service) {
                    continue;
                }
                let at = &self.hosts[host];
                let name = at.name.clone();
                let now = at.local(self.now);
                if at.datapath.granted.is_none_or(|end| now >= end) {
                    let text = format!("{name} answers for {service} without a lease");
                    self.fail("one-address", text);
                }
                let taken = self
                    .clients
                    .taken
                    .contains(&(service.clone(), name.clone()));
                if taken && !record.is_held_by(&name) {
                    let text = format!("{name} answers for {service}, which was taken from it");
                    self.fail("one-address", text);
                }
            }
        }
    }

    /// A command was applied for the first time.
    pub(crate) fn check_services_applied(
        &mut self,
        before: &State,
        envelope: &Envelope,
        result: &Result<Outcome, Refusal>,
    ) {
        if result.is_err() {
            return;
        }
        match &envelope.command {
            Command::ChangeServices { changes } => {
                for change in changes {
                    self.service_changed(before, change);
                }
            }
            Command::CommitPlan(plan) => {
                for planned in &plan.actions {
                    if let Action::Start { vm, .. } | Action::Release { vm, .. } = &planned.action {
                        self.clients.connections.retain(|of| of.member != *vm);
                    }
                }
            }
            _ => {}
        }
    }

    fn service_changed(&mut self, before: &State, change: &ServiceChange) {
        let service = change.service().clone();
        let old = before.services.get(&service);
        match change {
            ServiceChange::SetHolder { host, planned, .. } => {
                let from = old.and_then(|old| old.holder.as_ref());
                if let Some(from) = from.filter(|_| !planned) {
                    let key = (service.clone(), from.host.clone());
                    self.clients.taken.insert(key);
                }
                self.clients.taken.remove(&(service, host.clone()));
            }
            ServiceChange::PrepareRing { .. } | ServiceChange::ActivateRing { .. } => {
                let silent: Vec<HostId> = (0..self.hosts.len())
                    .filter(|host| !self.datapath_on(*host))
                    .collect();
                for of in &mut self.clients.connections {
                    if of.service == service {
                        of.excused |= of.known.iter().all(|at| silent.contains(at));
                        self.clients.survived += 1;
                    }
                }
            }
            ServiceChange::DrainEnded { vm, .. } => {
                let ended = |of: &Connection| of.service == service && of.member == *vm;
                self.clients.connections.retain(|of| !ended(of));
            }
            _ => {}
        }
    }

    /// Every connection sends a frame; some end, some begin.
    pub(crate) fn clients_tick(&mut self) {
        self.after(TICK, Event::World(W::Clients));
        self.check_addresses();
        self.learn();
        let state = self.newest();
        let mut kept = Vec::new();
        for mut of in std::mem::take(&mut self.clients.connections) {
            let ends = self.clients.rng.chance(8);
            if ends || !state.services.contains_key(&of.service) || !self.follow_guest(&mut of) {
                continue;
            }
            match self.frame(&of.service, of.slot, Some(&of)) {
                Reached::Lost => kept.push(of),
                Reached::Member(vm) if vm == of.member => {
                    of.known.extend(self.host_of(&vm));
                    kept.push(of);
                }
                Reached::Member(_) if of.excused => {}
                Reached::Member(vm) => {
                    let text = format!(
                        "a connection of {} to {} (slot {}) reaches {vm}: {}",
                        of.member,
                        of.service,
                        of.slot,
                        self.tables(&of.service, of.slot)
                    );
                    self.fail("connections", text);
                }
            }
        }
        self.clients.connections = kept;
        let services: Vec<ServiceName> = state.services.keys().cloned().collect();
        if self.clients.connections.len() < CONNECTIONS
            && let Some(service) = self.clients.rng.pick(&services).cloned()
        {
            self.open(service);
        }
    }

    /// What each host would do with a slot, for whoever has to find out.
    fn tables(&self, service: &ServiceName, slot: u32) -> String {
        let learned = self.clients.learned.get(service).map(|(_, host)| *host);
        let one = |host: HostId| {
            let loaded = self.hosts[host].datapath.loaded.get(service);
            let entry = loaded.and_then(|of| {
                let ring = of.ring.as_ref()?;
                let slot = ring.slots[slot as usize];
                let names = [slot.primary, slot.previous, slot.next];
                let names = names.map(|member| vm_of(ring, member).map_or("-", VmName::as_str));
                Some(format!("ring {} {}", of.active, names.join("/")))
            });
            format!(
                "{}{}{} {}",
                self.hosts[host].name,
                if learned == Some(host) { "*" } else { "" },
                if self.datapath_on(host) {
                    ""
                } else {
                    " silent"
                },
                entry.unwrap_or_default()
            )
        };
        let all: Vec<String> = (0..self.hosts.len()).map(one).collect();
        all.join(", ")
    }

    /// Whether the guest that has the connection is still there; it may have moved.
    fn follow_guest(&self, of: &mut Connection) -> bool {
        if let Some(guest) = self.guests.get(&of.proc) {
            of.seen = self.now;
            // Handed over, and its life ended at the other host: what is left here is frozen for good.
            let out = guest.out.as_ref();
            let left = out.filter(|out| out.phase == StreamPhase::Completed);
            return left.is_none_or(|out| self.guests.contains_key(&out.target));
        }
        let moved = self.guests.iter().find(|(_, guest)| {
            guest.vm == of.member
                && guest.incoming.is_some()
                && guest.ever_ran
                && guest.started_at <= of.seen
        });
        let Some((proc, _)) = moved else {
            return false;
        };
        (of.proc, of.seen) = (*proc, self.now);
        true
    }

    /// A switch learns where an address is from whoever announced it under the newest generation.
    fn learn(&mut self) {
        for host in 0..self.hosts.len() {
            if !self.datapath_on(host) {
                continue;
            }
            let loaded = self.hosts[host].datapath.loaded.iter();
            let holds = loaded.filter(|(_, of)| of.holder && of.generation > 0);
            let holds: Vec<_> = holds
                .map(|(service, of)| (service.clone(), of.generation))
                .collect();
            for (service, generation) in holds {
                let known = self.clients.learned.entry(service).or_default();
                if generation > known.0 {
                    *known = (generation, host);
                }
            }
        }
    }

    /// A client says hello.
    fn open(&mut self, service: ServiceName) {
        let slot = u32::try_from(self.clients.rng.below(u64::from(SLOTS))).unwrap_or(0);
        let Reached::Member(member) = self.frame(&service, slot, None) else {
            return;
        };
        let Some(proc) = self.running(&member) else {
            return;
        };
        self.clients.opened += 1;
        let seen = self.now;
        self.clients.connections.push(Connection {
            service,
            slot,
            member,
            proc,
            seen,
            known: self.host_of_proc(proc).into_iter().collect(),
            pinned: false,
            excused: false,
        });
    }

    fn running(&self, vm: &VmName) -> Option<ProcId> {
        let mut guests = self.guests.iter();
        let runs = |guest: &crate::guest::Guest| {
            guest.vm == *vm && guest.vcpu == Vcpu::Running && !guest.self_resumed
        };
        guests.find(|(_, guest)| runs(guest)).map(|(proc, _)| *proc)
    }

    /// Where a member runs.
    fn host_of(&self, vm: &VmName) -> Option<HostId> {
        self.host_of_proc(self.running(vm)?)
    }

    fn host_of_proc(&self, proc: ProcId) -> Option<HostId> {
        self.guests.get(&proc).map(|guest| guest.host)
    }

    /// The way of a frame; a hello has no connection yet.
    fn frame(&self, service: &ServiceName, slot: u32, of: Option<&Connection>) -> Reached {
        let Some((_, director)) = self.clients.learned.get(service) else {
            return Reached::Lost;
        };
        let loaded = self.hosts[*director].datapath.loaded.get(service);
        let Some(ring) = loaded.and_then(|of| of.ring.as_ref()) else {
            return Reached::Lost;
        };
        if !self.datapath_on(*director) {
            return Reached::Lost;
        }
        let pinned = of.filter(|of| of.pinned).map(|of| &of.member);
        let first = pinned.or_else(|| vm_of(ring, ring.slots[slot as usize].primary));
        let Some(first) = first else {
            return Reached::Lost;
        };
        self.edge(service, slot, first, of, true)
    }

    /// What a member's edge does with a frame.
    fn edge(
        &self,
        service: &ServiceName,
        slot: u32,
        me: &VmName,
        of: Option<&Connection>,
        direct: bool,
    ) -> Reached {
        let Some(host) = self.host_of(me).filter(|host| self.datapath_on(*host)) else {
            return Reached::Lost;
        };
        let known = of.is_none_or(|of| of.member == *me);
        if known || !direct || self.mutated(Mutation::NoSecondChance) {
            return Reached::Member(me.clone());
        }
        let loaded = self.hosts[host].datapath.loaded.get(service);
        let Some(ring) = loaded.and_then(|of| of.ring.as_ref()) else {
            return Reached::Lost;
        };
        let Slot {
            primary, previous, ..
        } = ring.slots[slot as usize];
        let other = match vm_of(ring, primary) {
            Some(primary) if primary != me => Some(primary),
            _ => vm_of(ring, previous),
        };
        match other {
            Some(other) => self.edge(service, slot, other, of, false),
            None => Reached::Member(me.clone()),
        }
    }

    /// What a host says of its services.
    pub(crate) fn service_reports(
        &self,
        host: HostId,
        state: &State,
    ) -> BTreeMap<ServiceName, ServiceReport> {
        let loaded = self.hosts[host].datapath.loaded.iter();
        let report = loaded.map(|(service, of)| {
            let record = state.services.get(service);
            let here = self.guests.values().filter(|guest| guest.host == host);
            let members = here.map(|guest| {
                let healthy = match guest.vcpu {
                    Vcpu::Running => Some(!self.clients.sick.contains(&guest.vm)),
                    _ => None,
                };
                let draining = record.is_some_and(|of| of.draining.contains_key(&guest.vm));
                let mine = |c: &&Connection| c.service == *service && c.member == guest.vm;
                let flows = self.clients.connections.iter().filter(mine).count();
                let member = MemberReport {
                    healthy,
                    problem: None,
                    flows: draining.then_some(flows as u64),
                    refused: None,
                };
                (guest.vm.clone(), member)
            });
            let report = ServiceReport {
                active: of.active,
                prepared: of.prepared,
                members: members.collect(),
                problem: None,
                holding: of.holder,
            };
            (service.clone(), report)
        });
        report.collect()
    }

    /// An operator drains and resumes; a member's program fails or comes back.
    pub(crate) fn service_op(&mut self) {
        if self.now >= self.chaos.until {
            self.clients.sick.clear();
            return (0..self.hosts.len()).for_each(|host| self.refresh_report(host));
        }
        let wait = self.clients.rng.range(1, 5) * SEC;
        self.after(wait, Event::World(W::ServiceOp));
        let state = self.newest();
        let services: Vec<ServiceName> = state.services.keys().cloned().collect();
        let Some(service) = self.clients.rng.pick(&services).cloned() else {
            return;
        };
        let record = &state.services[&service];
        let members: Vec<VmName> = state
            .members(&record.spec)
            .map(|(vm, ..)| vm.clone())
            .collect();
        let Some(vm) = self.clients.rng.pick(&members).cloned() else {
            return;
        };
        let drained = record.draining.keys().next().cloned();
        match (self.clients.rng.below(4), drained) {
            (0, _) if !self.clients.sick.remove(&vm) => {
                self.clients.sick.insert(vm);
            }
            (0, _) => {}
            (1 | 2, Some(vm)) => self.operate(Op::command(Command::ResumeMember { service, vm })),
            _ => self.operate(Op::command(Command::DrainMember { service, vm })),
        }
        for host in 0..self.hosts.len() {
            self.refresh_report(host);
        }
    }

    /// What is not as it should be yet, after everything was mended.
    pub(crate) fn service_unrest(&self, state: &State) -> Option<String> {
        for (service, record) in &state.services {
            if let Some(next) = &record.next {
                return Some(format!("ring {} of {service} is not in force", next.epoch));
            }
            let holder = record.holder.as_ref().map(|holder| &holder.host);
            let host = holder.and_then(|holder| self.host_id(holder));
            if !host.is_some_and(|host| self.serves(host, service)) {
                return Some(format!("nobody answers for {service}"));
            }
            if let Some((vm, _)) = record.draining.iter().find(|(vm, drain)| {
                let others = record.ring().is_some_and(|ring| !ring.has(vm));
                drain.ended.is_none() && others
            }) {
                return Some(format!("the drain of {vm} from {service} has not ended"));
            }
            let serves = |vm: &VmName| {
                let of = state.vms.get(vm);
                let owned = of.is_some_and(|of| of.wanted() && self.running(vm).is_some());
                owned && !record.draining.contains_key(vm)
            };
            let mut members = state.members(&record.spec);
            let missing = members
                .find(|(vm, ..)| serves(vm) && !record.ring().is_some_and(|ring| ring.has(vm)));
            if let Some((vm, ..)) = missing {
                return Some(format!("{vm} is not in the ring of {service}"));
            }
        }
        None
    }
}

pub(crate) fn vm_of(ring: &Ring, member: u16) -> Option<&VmName> {
    let found = (member != NONE).then(|| ring.member(member)).flatten();
    found.map(|member| &member.vm)
}

/// How uplinks look in the simulator.
pub(crate) fn uplinks() -> BTreeMap<quorate_types::NetworkName, UplinkMode> {
    let network = crate::setup::network().into_iter();
    network
        .map(|network| (network, UplinkMode::Driver))
        .collect()
}

/// Two services over the first VMs.
pub(crate) fn add_services(manifest: &mut quorate_types::Manifest) {
    let Some(network) = crate::setup::network() else {
        return;
    };
    let names: Vec<VmName> = manifest.vms.keys().cloned().collect();
    for (at, spec) in manifest.vms.values_mut().enumerate() {
        for nic in &mut spec.nics {
            nic.address = format!("10.0.1.{}", at + 1).parse().ok();
        }
    }
    for (at, name) in ["web", "dns"].into_iter().enumerate() {
        let address = format!("10.0.2.{}", at + 1);
        let (Ok(name), Ok(address)) = (ServiceName::new(name), address.parse()) else {
            continue;
        };
        let mut spec = quorate_types::ServiceSpec::new(network.clone(), address, 80);
        let members = names.iter().skip(at).take(4);
        spec.members = members.map(|vm| (vm.clone(), Default::default())).collect();
        spec.drain_timeout = Millis::secs(20);
        if at == 0 {
            let kind = quorate_types::service::HealthKind::Tcp;
            spec.health = Some(quorate_types::service::HealthCheck::new(kind));
        }
        manifest.services.insert(name, spec);
    }
}
