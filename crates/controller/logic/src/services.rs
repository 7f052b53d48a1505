//! What the leader decides about services: who is in a ring, when a ring comes into force, when a drain is over.
//!
//! ```text
//!   desired != ring, every live director steers by it --PrepareRing--> prepared by every live director --ActivateRing-->
//!                                                    '--- desired changed meanwhile: AbandonRing
//! ```
//! Always holds: what is not known changes nothing (a member that migrates, a host that is silent but may hold its
//! lease, a health check that is suspended: each keeps its place or its absence); if nobody would be left the last ring
//! stays; a director blocks a change exactly as long as its lease may run. Must not: choose who answers for an address
//! (that is [`crate::addresses`]), or judge hosts: it is told their health.

use quorate_membership::{HostHealth, Instant};
use quorate_state::{OrderKind, Ownership, ServiceChange, ServiceRecord, State, VmRecord};
use quorate_types::service::RingMember;
use quorate_types::{
    HostName, HostReport, Millis, ServiceName, ServiceReport, VmName, VmPhase, VmReport,
};
use std::collections::{BTreeMap, BTreeSet};

/// No connection was seen at a drained member for so long: it has none.
const QUIET: Millis = Millis::secs(2);
/// A ring change that takes longer is a problem to tell of.
const SLOW: Millis = Millis::secs(5);

/// What the decisions are made from.
#[derive(Clone, Copy)]
pub struct ServiceInput<'a> {
    /// What is agreed on.
    pub state: &'a State,
    /// The newest report of each host.
    pub reports: &'a BTreeMap<HostName, HostReport>,
    /// How each host looks.
    pub health: &'a BTreeMap<HostName, HostHealth>,
    /// Now.
    pub now: Instant,
}

/// What one leadership remembers between two looks.
#[derive(Debug, Clone, Default)]
pub struct ServiceMemory {
    /// Since when a coming ring is being prepared.
    preparing: BTreeMap<ServiceName, (u64, Instant)>,
    /// Drains: since when no director gives the member new connections, and since when it has none.
    drains: BTreeMap<(ServiceName, VmName), (Instant, Option<Instant>)>,
    /// When an address was moved for the sake of balance last.
    pub(crate) balanced: Option<Instant>,
}

/// What is to be done about a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stance {
    /// It serves.
    In,
    /// It does not.
    Out,
    /// Nobody can say: as it was.
    Hold,
}

impl ServiceInput<'_> {
    pub(crate) fn health(&self, host: &HostName) -> Option<HostHealth> {
        self.health.get(host).copied()
    }

    /// Whether the host's lease may still run. One that is not in the cluster has none.
    pub(crate) fn may_serve(&self, host: &HostName) -> bool {
        self.health(host)
            .is_some_and(|health| health < HostHealth::Expired)
    }

    /// A host's word about a service.
    fn report(&self, host: &HostName, service: &ServiceName) -> Option<&ServiceReport> {
        self.reports.get(host)?.services.get(service)
    }

    /// Directors that have to follow a ring change, with what they say; `None`: nothing yet. A host that has reported
    /// without this service does not steer for it, and one whose lease is over is silent by itself.
    fn directors<'s>(
        &'s self,
        service: &'s ServiceName,
    ) -> impl Iterator<Item = (&'s HostName, Option<&'s ServiceReport>)> {
        let live = self.state.hosts.keys().filter(|host| self.may_serve(host));
        live.filter_map(move |host| match self.reports.get(host) {
            None => Some((host, None)),
            Some(report) => Some((host, Some(report.services.get(service)?))),
        })
    }

    /// Every live director that steers at all steers by this ring.
    fn all_steer_by(&self, service: &ServiceName, epoch: u64) -> bool {
        self.directors(service)
            .all(|(_, report)| report.is_some_and(|report| report.active == epoch || idle(report)))
    }

    /// Live directors that do not hold the coming ring yet.
    fn not_prepared<'s>(&'s self, service: &'s ServiceName, epoch: u64) -> Vec<&'s HostName> {
        let lacks = |report: Option<&ServiceReport>| {
            report.is_none_or(|report| report.prepared != Some(epoch) && !idle(report))
        };
        let directors = self.directors(service);
        directors
            .filter(|(_, report)| lacks(*report))
            .map(|(host, _)| host)
            .collect()
    }
}

/// It cannot load the service and says so: it steers nothing, so it can do nothing wrong.
fn idle(report: &ServiceReport) -> bool {
    report.active == 0 && report.problem.is_some()
}

/// What a member's host says of it, where that host is up.
fn vm_report<'a>(input: &ServiceInput<'a>, host: &HostName, vm: &VmName) -> Option<&'a VmReport> {
    let up = input.health(host) == Some(HostHealth::Up);
    input.reports.get(host).filter(|_| up)?.vms.get(vm)
}

fn stance(
    input: &ServiceInput<'_>,
    service: &ServiceName,
    record: &ServiceRecord,
    name: &VmName,
    vm: &VmRecord,
) -> Stance {
    if record.draining.contains_key(name) || !vm.wanted() {
        return Stance::Out;
    }
    let (host, epoch) = match &vm.ownership {
        Ownership::Free => return Stance::Out,
        Ownership::Migrating { .. } => return Stance::Hold,
        Ownership::Owned {
            order: OrderKind::Stop(_),
            ..
        } => return Stance::Out,
        Ownership::Owned { host, epoch, .. } => (host, *epoch),
    };
    if !input.may_serve(host) {
        return Stance::Out;
    }
    let Some(report) = vm_report(input, host, name).filter(|report| report.epoch == epoch) else {
        return Stance::Hold;
    };
    // Its edge is silent with the director of its host.
    let silent = |of: &HostReport| of.cannot_serve(service, &record.spec.network);
    if record.active() > 0 && input.reports.get(host).is_some_and(silent) {
        return Stance::Out;
    }
    match report.phase {
        VmPhase::Running if !report.ready => Stance::Hold,
        VmPhase::Running if record.spec.health.is_none() => Stance::In,
        VmPhase::Running => match record.health.get(name) {
            None => Stance::Hold,
            Some(health) if health.healthy => Stance::In,
            Some(_) => Stance::Out,
        },
        VmPhase::Frozen | VmPhase::MigratingOut | VmPhase::Incoming | VmPhase::HandedOver => {
            Stance::Hold
        }
        VmPhase::Absent
        | VmPhase::Starting
        | VmPhase::IoError
        | VmPhase::Stopping
        | VmPhase::BackOff => Stance::Out,
    }
}

/// The members that the ring should have; empty: nobody serves, and the last ring stays.
fn desired(
    input: &ServiceInput<'_>,
    service: &ServiceName,
    record: &ServiceRecord,
) -> Vec<RingMember> {
    let had = |vm: &VmName| match &record.next {
        Some(next) => next.has(vm),
        None => record.ring().is_some_and(|ring| ring.has(vm)),
    };
    let members = input.state.members(&record.spec);
    let wanted = members.filter(
        |(name, vm, _)| match stance(input, service, record, name, vm) {
            Stance::In => true,
            Stance::Out => false,
            Stance::Hold => had(name),
        },
    );
    wanted
        .filter_map(|(name, _, weight)| input.state.ring_member(&record.spec, name, weight))
        .collect()
}

/// Members of earlier rings whose guest has ended, and with it the connections that it had; one that moves, or is frozen
/// with its host, has them still. Only when every director steers by a ring without it: what comes up meanwhile may have
/// got new ones.
fn gone_step(
    input: &ServiceInput<'_>,
    service: &ServiceName,
    record: &ServiceRecord,
) -> Option<ServiceChange> {
    let ended = |vm: &VmName| match input.state.vms.get(vm).map(|of| &of.ownership) {
        None => true,
        Some(Ownership::Free) => input.state.vms.get(vm).is_some_and(|of| of.saved.is_none()),
        Some(Ownership::Migrating { .. }) => false,
        Some(Ownership::Owned { host, epoch, .. }) => {
            let report = vm_report(input, host, vm).filter(|report| report.epoch == *epoch);
            // One that is being started may serve already.
            let phase = report.map(|report| report.phase);
            matches!(phase, Some(VmPhase::BackOff | VmPhase::Absent))
        }
    };
    let stays = |vm: &VmName| record.ring().is_some_and(|ring| ring.has(vm));
    let rings = record.history.iter();
    let known = rings.flat_map(|ring| {
        let members = ring.members.iter().map(|member| &member.vm);
        members.filter(|vm| !ring.gone.contains(*vm))
    });
    let vms: BTreeSet<VmName> = known
        .filter(|vm| !stays(vm) && ended(vm))
        .cloned()
        .collect();
    let service = service.clone();
    let now = !vms.is_empty() && input.all_steer_by(&service, record.active());
    now.then_some(ServiceChange::MembersGone { service, vms })
}

/// The next step of one service's ring, if there is one to make.
fn ring_step(
    input: &ServiceInput<'_>,
    service: &ServiceName,
    record: &ServiceRecord,
) -> Option<ServiceChange> {
    let members = desired(input, service, record);
    let service = service.clone();
    if let Some(next) = &record.next {
        let epoch = next.epoch;
        if !members.is_empty() && members != next.members {
            return Some(ServiceChange::AbandonRing { service, epoch });
        }
        let waits = !input.not_prepared(&service, epoch).is_empty();
        return (!waits).then_some(ServiceChange::ActivateRing { service, epoch });
    }
    let same = record.ring().is_some_and(|ring| ring.members == members);
    if members.is_empty() || same || !input.all_steer_by(&service, record.active()) {
        return None;
    }
    Some(ServiceChange::PrepareRing {
        service,
        epoch: record.last_epoch + 1,
        members,
    })
}

/// What health checks found that is not recorded yet.
fn health_steps(
    input: &ServiceInput<'_>,
    service: &ServiceName,
    record: &ServiceRecord,
) -> Vec<ServiceChange> {
    if record.spec.health.is_none() {
        return Vec::new();
    }
    let found = |vm: &VmName, of: &VmRecord| -> Option<(bool, Option<String>)> {
        // Owned by one host, which is up: while it migrates nothing is judged.
        let Ownership::Owned { host, epoch, .. } = &of.ownership else {
            return None;
        };
        let report = vm_report(input, host, vm).filter(|report| report.epoch == *epoch)?;
        match report.phase {
            VmPhase::Running => {
                let member = input.report(host, service)?.members.get(vm)?;
                Some((member.healthy?, member.problem.clone()))
            }
            // What serves after this is another life of the guest.
            VmPhase::Starting | VmPhase::BackOff if record.health.contains_key(vm) => {
                Some((false, Some("its guest is started again".into())))
            }
            _ => None,
        }
    };
    let members = input.state.members(&record.spec);
    let changed = members.filter_map(|(vm, of, _)| {
        let (healthy, problem) = found(vm, of)?;
        let known = record.health.get(vm);
        let same = known.is_some_and(|known| known.healthy == healthy);
        (!same).then(|| ServiceChange::RecordHealth {
            service: service.clone(),
            vm: vm.clone(),
            healthy,
            problem,
        })
    });
    changed.collect()
}

/// Connections of a drained member, as its host counts them.
fn flows_left(input: &ServiceInput<'_>, service: &ServiceName, vm: &VmName) -> Option<u64> {
    let record = input.state.vms.get(vm)?;
    match &record.ownership {
        Ownership::Free => Some(0),
        Ownership::Owned { host, .. } => {
            let report = input.report(host, service)?;
            report.members.get(vm)?.flows
        }
        Ownership::Migrating { .. } => None,
    }
}

/// Drains that are over.
fn drain_steps(
    input: &ServiceInput<'_>,
    memory: &mut ServiceMemory,
    service: &ServiceName,
    record: &ServiceRecord,
) -> Vec<ServiceChange> {
    let mut ended = Vec::new();
    for (vm, drain) in &record.draining {
        let key = (service.clone(), vm.clone());
        if drain.ended.is_some() {
            memory.drains.remove(&key);
            continue;
        }
        let in_ring = record.ring().is_some_and(|ring| ring.has(vm))
            || record.next.as_ref().is_some_and(|next| next.has(vm));
        // A director that lags gives it new connections still: both times count from the last of them.
        if in_ring || !input.all_steer_by(service, record.active()) {
            memory.drains.remove(&key);
            continue;
        }
        let flows = flows_left(input, service, vm);
        let (first, quiet) = memory.drains.entry(key).or_insert((input.now, None));
        let quiet_since = *quiet.get_or_insert(input.now);
        if flows != Some(0) {
            *quiet = None;
        }
        let done = quiet.is_some() && input.now.since(quiet_since) >= QUIET;
        let late = input.now.since(*first) >= record.spec.drain_timeout;
        if done || late {
            ended.push(ServiceChange::DrainEnded {
                service: service.clone(),
                vm: vm.clone(),
                cut: flows.unwrap_or(0),
            });
        }
    }
    ended
}

/// All steps about rings, health and drains.
#[must_use]
pub fn service_steps(input: &ServiceInput<'_>, memory: &mut ServiceMemory) -> Vec<ServiceChange> {
    let mut steps = Vec::new();
    for (service, record) in &input.state.services {
        steps.extend(health_steps(input, service, record));
        steps.extend(ring_step(input, service, record));
        steps.extend(gone_step(input, service, record));
        steps.extend(drain_steps(input, memory, service, record));
    }
    remember(input, memory);
    steps
}

/// Keeps what is still of use.
fn remember(input: &ServiceInput<'_>, memory: &mut ServiceMemory) {
    let services = &input.state.services;
    memory.drains.retain(|(service, vm), _| {
        let record = services.get(service);
        record.is_some_and(|record| record.draining.contains_key(vm))
    });
    memory.preparing.retain(|service, (epoch, _)| {
        let next = services
            .get(service)
            .and_then(|record| record.next.as_ref());
        next.is_some_and(|next| next.epoch == *epoch)
    });
    for (service, record) in services {
        if let Some(next) = &record.next {
            let since = (next.epoch, input.now);
            memory.preparing.entry(service.clone()).or_insert(since);
        }
    }
}

/// When a drain is over by its time-out, for the controller's timer.
#[must_use]
pub fn next_drain_end(state: &State, memory: &ServiceMemory, now: Instant) -> Option<Instant> {
    let ends = memory
        .drains
        .iter()
        .filter_map(|((service, _), (first, quiet))| {
            let timeout = state.services.get(service)?.spec.drain_timeout;
            let quiet = quiet.map(|since| since.plus(QUIET));
            quiet.into_iter().chain([first.plus(timeout)]).min()
        });
    ends.filter(|at| *at > now).min()
}

/// What is wrong with a service, one sentence each; empty: nothing.
#[must_use]
pub fn service_problems(
    input: &ServiceInput<'_>,
    memory: &ServiceMemory,
) -> BTreeMap<ServiceName, Vec<String>> {
    let all = input.state.services.iter().map(|(service, record)| {
        let mut problems = ring_problems(input, memory, service, record);
        problems.extend(host_problems(input, service));
        problems.extend(crate::addresses::holder_problem(input, record));
        (service.clone(), problems)
    });
    all.filter(|(_, problems)| !problems.is_empty()).collect()
}

fn ring_problems(
    input: &ServiceInput<'_>,
    memory: &ServiceMemory,
    service: &ServiceName,
    record: &ServiceRecord,
) -> Vec<String> {
    let mut problems = Vec::new();
    let members: BTreeSet<&VmName> = input
        .state
        .members(&record.spec)
        .map(|(name, ..)| name)
        .collect();
    if members.is_empty() {
        problems.push("no VM is a member of it: give it members in the manifest".to_owned());
    } else if desired(input, service, record).is_empty() {
        problems.push(match record.ring() {
            Some(_) => "no member serves: the last ring stays until one does".to_owned(),
            None => "no member serves yet".to_owned(),
        });
    }
    let sick = record.health.iter().filter(|(vm, health)| {
        let draining = record.draining.contains_key(*vm);
        members.contains(vm) && !health.healthy && !draining
    });
    problems.extend(sick.map(|(vm, health)| match &health.problem {
        Some(why) => format!("{vm} does not serve: {why}"),
        None => format!("{vm} does not serve"),
    }));
    if let Some(next) = &record.next
        && let Some((_, since)) = memory.preparing.get(service)
        && input.now.since(*since) >= SLOW
    {
        let waits = input.not_prepared(service, next.epoch);
        let names: Vec<&str> = waits.iter().map(|host| host.as_str()).collect();
        problems.push(format!(
            "ring {} waits for {} since {}",
            next.epoch,
            names.join(" and "),
            Millis(input.now.since(*since).0 / 1000 * 1000)
        ));
    }
    problems
}

fn host_problems(input: &ServiceInput<'_>, service: &ServiceName) -> Vec<String> {
    let reports = input
        .reports
        .iter()
        .filter(|(host, _)| input.may_serve(host));
    let said = reports.filter_map(|(host, report)| {
        let problem = report.services.get(service)?.problem.as_ref()?;
        Some(format!("{host}: {problem}"))
    });
    said.collect()
}
