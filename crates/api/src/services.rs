//! What clients see of services: members, ring, holder, problems, and which member a client gets. Stable JSON: fields
//! are added, never changed.
//!
//! Always holds: pure; without observations (no leader) no member is said to serve. What is traced is what every
//! director computes from the same state; pins are known to hosts only, and that is said.

use crate::answers::StageView;
use crate::build::Observed;
use crate::error::{ApiError, ErrorCode};
use quorate_agent_logic::service_table;
use quorate_balancer::{TraceAnswer, TraceQuery, trace::trace};
use quorate_membership::HostHealth;
use quorate_state::{Ownership, ServiceRecord, State, VmRecord};
use quorate_types::service::{Protocol, UplinkMode};
use quorate_types::{
    HostName, ServiceName, ServiceReport, ServiceSpec, Timestamp, VmName, VmPhase,
};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use utoipa::ToSchema;

/// A service in full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceView {
    /// Name.
    #[schema(value_type = String)]
    pub name: ServiceName,
    /// Definition.
    #[schema(value_type = Object)]
    pub spec: ServiceSpec,
    /// Its number; the last three bytes of its virtual MAC.
    pub id: u32,
    /// The MAC address that clients find its address at.
    pub virtual_mac: String,
    /// Epoch of the ring in force; 0: none yet.
    pub epoch: u64,
    /// Epoch of the ring that directors prepare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preparing: Option<u64>,
    /// Slots of its ring.
    pub slots: u32,
    /// The host that answers for its address; absent: nobody, or every host (`bgp`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<HolderView>,
    /// Members by name.
    pub members: Vec<MemberView>,
    /// Directors by host.
    pub directors: Vec<DirectorView>,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// Who answers for an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HolderView {
    /// Which host.
    #[schema(value_type = String)]
    pub host: HostName,
    /// Since when. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub since: Timestamp,
    /// The host before, which answers too until this one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub leaving: Option<HostName>,
}

/// How a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// It gets new connections.
    Serving,
    /// It is on its way to another host, and serves.
    Moving,
    /// It gets connections because no member is better.
    Fallback,
    /// It gets no new connections; old ones go on.
    Draining,
    /// It has no connections and gets none.
    Drained,
    /// Its health check fails.
    Unhealthy,
    /// Its VM does not run, or is not ready.
    Down,
    /// It serves and its ring is not in force yet.
    Joining,
    /// Nobody who could know was asked (no leader).
    Unknown,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberView {
    /// Its VM.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// How it stands.
    pub state: MemberState,
    /// Why, where there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Its share against the others.
    pub weight: u32,
    /// It is in the ring in force.
    pub in_ring: bool,
    /// The host that has it.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
    /// Its own addresses in the service's network.
    pub addresses: Vec<String>,
    /// Connections that it still serves; known while it is being drained only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<u64>,
    /// Connections that the service's limits refused at it, since it is on its host; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<u64>,
    /// Since when it is being drained. Milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub draining_since: Option<Timestamp>,
    /// Connections that ended with the drain's time-out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<u64>,
}

/// The director of one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirectorView {
    /// Which host.
    #[schema(value_type = String)]
    pub host: HostName,
    /// `driver`, `generic`, `none` (no uplink: only its own guests are clients), or what is wrong; absent: not heard.
    pub uplink: Option<String>,
    /// Epoch of the ring that it steers by; absent: it does not.
    pub active: Option<u64>,
    /// Epoch of the coming ring that it holds.
    pub prepared: Option<u64>,
    /// It answers for the address.
    pub holding: bool,
    /// What is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Which member a client gets, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TraceView {
    /// The service.
    #[schema(value_type = String)]
    pub service: ServiceName,
    /// The client.
    #[schema(value_type = String)]
    pub client: IpAddr,
    /// Its port; absent: it does not matter.
    pub client_port: Option<u16>,
    /// The service's port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Epoch of the ring.
    pub epoch: u64,
    /// The client's slot.
    pub slot: u32,
    /// Of so many.
    pub slots: u32,
    /// The member that gets a new connection; absent: nobody.
    #[schema(value_type = Option<String>)]
    pub member: Option<VmName>,
    /// The host that has it.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostName>,
    /// The member that had the slot before: a connection that it owns goes on there.
    #[schema(value_type = Option<String>)]
    pub previous: Option<VmName>,
    /// The member that gets the slot with the coming ring.
    #[schema(value_type = Option<String>)]
    pub next: Option<VmName>,
    /// The steps, in words.
    pub why: Vec<String>,
}

fn mac_text(mac: [u8; 6]) -> String {
    let pairs: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

/// Every service.
#[must_use]
pub fn services(state: &State, seen: Option<&Observed>) -> Vec<ServiceView> {
    let all = state.services.iter();
    all.map(|(name, record)| view(state, seen, name, record))
        .collect()
}

/// One service; `None`: there is no such one.
#[must_use]
pub fn service(state: &State, seen: Option<&Observed>, name: &ServiceName) -> Option<ServiceView> {
    let record = state.services.get(name)?;
    Some(view(state, seen, name, record))
}

fn view(
    state: &State,
    seen: Option<&Observed>,
    name: &ServiceName,
    record: &ServiceRecord,
) -> ServiceView {
    let members = state.members(&record.spec);
    let holder = record.holder.as_ref();
    let problems = seen.and_then(|seen| seen.services.get(name));
    ServiceView {
        name: name.clone(),
        id: record.id.0,
        virtual_mac: mac_text(record.id.virtual_mac()),
        epoch: record.active(),
        preparing: record.next.as_ref().map(|next| next.epoch),
        slots: record.slots,
        holder: holder.map(|holder| HolderView {
            host: holder.host.clone(),
            since: holder.since,
            leaving: holder.leaving.clone(),
        }),
        members: members
            .map(|(vm, of, weight)| member(seen, name, record, vm, of, weight))
            .collect(),
        directors: state
            .hosts
            .keys()
            .map(|host| director(seen, name, record, host))
            .collect(),
        problems: problems.cloned().unwrap_or_default(),
        spec: record.spec.clone(),
    }
}

/// A host's report about a service, if it is alive.
fn said<'a>(
    seen: Option<&'a Observed>,
    name: &ServiceName,
    host: &HostName,
) -> Option<&'a ServiceReport> {
    let host = seen?.hosts.get(host)?;
    let alive = matches!(host.health, HostHealth::Up | HostHealth::Suspect);
    host.report.as_ref().filter(|_| alive)?.services.get(name)
}

fn member(
    seen: Option<&Observed>,
    name: &ServiceName,
    record: &ServiceRecord,
    vm: &VmName,
    of: &VmRecord,
    weight: u32,
) -> MemberView {
    let in_ring = record.ring().is_some_and(|ring| ring.has(vm));
    let host = of.ownership.host();
    let (state, why) = match seen {
        None => (MemberState::Unknown, None),
        Some(seen) => standing(seen, name, record, vm, of, in_ring),
    };
    let report = host.and_then(|host| said(seen, name, host)?.members.get(vm));
    let drain = record.draining.get(vm);
    let mut nics = of.effective().nics.iter();
    let nic = nics.find(|nic| nic.network == record.spec.network);
    let addresses = nic.into_iter().flat_map(|nic| nic.addresses());
    MemberView {
        vm: vm.clone(),
        state,
        why,
        weight,
        in_ring,
        host: host.cloned(),
        addresses: addresses.map(|address| address.to_string()).collect(),
        flows: drain
            .filter(|drain| drain.ended.is_none())
            .and_then(|_| report?.flows),
        refused: report.and_then(|report| report.refused),
        draining_since: drain.map(|drain| drain.since),
        cut: drain.and_then(|drain| drain.ended).map(|(_, cut)| cut),
    }
}

fn standing(
    seen: &Observed,
    name: &ServiceName,
    record: &ServiceRecord,
    vm: &VmName,
    of: &VmRecord,
    in_ring: bool,
) -> (MemberState, Option<String>) {
    if let Some(drain) = record.draining.get(vm) {
        return match (&drain.ended, in_ring) {
            (Some(_), _) => (MemberState::Drained, None),
            (None, true) => {
                let why = "it is in the ring until another member serves".to_owned();
                (MemberState::Draining, Some(why))
            }
            (None, false) => (MemberState::Draining, None),
        };
    }
    let host = match &of.ownership {
        Ownership::Free => {
            let why = "its VM does not run".to_owned();
            return (fallback(in_ring, MemberState::Down), Some(why));
        }
        Ownership::Migrating { from, to, .. } => {
            let why = format!("it moves from {from} to {to}");
            return (MemberState::Moving, Some(why)).filtered(in_ring);
        }
        Ownership::Owned { host, .. } => host,
    };
    let heard = seen.hosts.get(host);
    let alive = heard.filter(|of| matches!(of.health, HostHealth::Up | HostHealth::Suspect));
    if alive.is_none() {
        let why = format!("{host} is not heard");
        return (fallback(in_ring, MemberState::Down), Some(why));
    }
    if let Some(health) = record.health.get(vm).filter(|health| !health.healthy) {
        let state = fallback(in_ring, MemberState::Unhealthy);
        return (state, health.problem.clone());
    }
    let of_host = alive.and_then(|of| of.report.as_ref());
    if let Some(report) = of_host
        && report.cannot_serve(name, &record.spec.network)
    {
        let why = format!("{host} cannot serve it now");
        return (fallback(in_ring, MemberState::Down), Some(why));
    }
    let report = of_host.and_then(|of| of.vms.get(vm));
    match report.map(|report| (report.phase, report.ready)) {
        Some((VmPhase::Running, true)) if in_ring => (MemberState::Serving, None),
        Some((VmPhase::Running, true))
            if record.spec.health.is_some() && !record.health.contains_key(vm) =>
        {
            let why = "its first health check has not succeeded yet".to_owned();
            (MemberState::Joining, Some(why))
        }
        Some((VmPhase::Running, true)) => (MemberState::Joining, None),
        Some((VmPhase::Running, false)) => {
            let why = "its VM is not ready".to_owned();
            (fallback(in_ring, MemberState::Down), Some(why))
        }
        _ => {
            let why = "its VM does not run".to_owned();
            (fallback(in_ring, MemberState::Down), Some(why))
        }
    }
}

/// What is in the ring gets connections, whatever its condition.
fn fallback(in_ring: bool, state: MemberState) -> MemberState {
    match in_ring {
        true => MemberState::Fallback,
        false => state,
    }
}

trait Filtered {
    fn filtered(self, in_ring: bool) -> Self;
}

impl Filtered for (MemberState, Option<String>) {
    /// One that moves and was in no ring before is in none meanwhile.
    fn filtered(self, in_ring: bool) -> Self {
        match in_ring {
            true => self,
            false => (MemberState::Joining, self.1),
        }
    }
}

fn director(
    seen: Option<&Observed>,
    name: &ServiceName,
    record: &ServiceRecord,
    host: &HostName,
) -> DirectorView {
    let report = said(seen, name, host);
    let of = seen.and_then(|seen| seen.hosts.get(host)?.report.as_ref());
    let uplink = of.and_then(|report| report.uplinks.get(&record.spec.network));
    DirectorView {
        host: host.clone(),
        uplink: uplink.map(|mode| match mode {
            UplinkMode::Driver => "driver".to_owned(),
            UplinkMode::Generic => "generic".to_owned(),
            UplinkMode::None => "none".to_owned(),
            UplinkMode::Problem(text) => text.clone(),
        }),
        active: report
            .map(|report| report.active)
            .filter(|epoch| *epoch > 0),
        prepared: report.and_then(|report| report.prepared),
        holding: report.is_some_and(|report| report.holding),
        problem: report.and_then(|report| report.problem.clone()),
    }
}

/// A client as people write it: `10.0.0.1`, `10.0.0.1:4711`, `fd00::1`, `[fd00::1]:4711`.
///
/// # Errors
/// It is none of these.
pub fn client(text: &str) -> Result<(IpAddr, Option<u16>), ApiError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((address, None));
    }
    match text.parse::<SocketAddr>() {
        Ok(both) => Ok((both.ip(), Some(both.port()))),
        Err(_) => Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("`{text}` is not a client's address"),
        )
        .hint("write `10.0.0.1`, `10.0.0.1:4711` or `[fd00::1]:4711`")),
    }
}

/// Which member a client gets.
///
/// # Errors
/// The service has no such port, no address of the client's family, or the client's port matters and is not given.
pub fn trace_client(
    state: &State,
    name: &ServiceName,
    client: (IpAddr, Option<u16>),
    port: Option<u16>,
    protocol: Option<Protocol>,
) -> Result<TraceView, ApiError> {
    let Some(record) = state.services.get(name) else {
        let known = state.services.keys().map(ServiceName::as_str);
        return Err(ApiError::unknown("service", name.as_str(), known));
    };
    let (address, client_port) = client;
    let by_port = record.spec.affinity.kind == quorate_types::service::AffinityKind::None;
    if by_port && client_port.is_none() {
        return Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("without affinity each connection to {name} goes its own way: the client's port is needed"),
        )
        .hint(format!("write it behind the address, as in `{}`", SocketAddr::new(address, 40_000))));
    }
    let query = TraceQuery {
        service: name.clone(),
        client: address,
        client_port: client_port.unwrap_or(0),
        port,
        protocol,
    };
    let answer = trace(&service_table(record, false), &query)
        .map_err(|text| ApiError::new(ErrorCode::BadRequest, text))?;
    let host = answer
        .member
        .as_ref()
        .and_then(|vm| state.vms.get(vm)?.ownership.host());
    let mut why = answer.why;
    if let (Some(member), Some(host)) = (&answer.member, host) {
        why.push(format!("{member} is on {host}"));
    }
    Ok(TraceView {
        service: name.clone(),
        client: address,
        client_port: client_port.filter(|_| by_port),
        port: answer.flow.port,
        protocol: answer.flow.protocol.to_string(),
        epoch: answer.epoch,
        slot: answer.slot,
        slots: answer.slots,
        host: host.cloned(),
        member: answer.member,
        previous: answer.previous,
        next: answer.next,
        why,
    })
}

/// Adds what a host knows besides the state: a connection that a ring change would have stranded is pinned to its member
/// at every director. `found`: what that host's datapath answers to the same question; `None`: it does not steer.
pub fn add_pins(state: &State, view: &mut TraceView, by: &HostName, found: Option<&TraceAnswer>) {
    let Some(found) = found.filter(|found| found.epoch == view.epoch) else {
        if state
            .services
            .get(&view.service)
            .is_some_and(|of| of.history.len() > 1)
        {
            view.why.push(format!(
                "{by} does not steer by ring {} and cannot say whether the connection is pinned to another member",
                view.epoch
            ));
        }
        return;
    };
    if !found.pinned {
        return;
    }
    view.member.clone_from(&found.member);
    let vm = view.member.as_ref().and_then(|vm| state.vms.get(vm));
    view.host = vm.and_then(|vm| vm.ownership.host().cloned());
    let name = view.member.as_ref().map_or("its member", VmName::as_str);
    let place = match &view.host {
        Some(host) => format!(" on {host}"),
        None => String::new(),
    };
    view.why.push(format!(
        "but this connection is pinned to {name}{place}: {name} had it when the ring changed twice, and keeps it"
    ));
}

/// A stage of a plan with what it means for services.
pub(crate) fn told(state: &State, mut stage: StageView) -> StageView {
    let says = |(name, record): (&ServiceName, &ServiceRecord)| {
        let members: Vec<&VmName> = state.members(&record.spec).map(|(vm, ..)| vm).collect();
        let still = |vm: &&VmName| {
            let stands = stage.outages.iter().any(|outage| outage.vm == **vm);
            stands || stage.unplaced.iter().any(|missing| missing.vm == **vm)
        };
        let moves = |vm: &&VmName| stage.moved.iter().any(|moved| moved.vm == **vm);
        let (still, others): (Vec<&VmName>, Vec<&VmName>) =
            members.iter().partition(|vm| still(vm));
        let moving: Vec<&VmName> = others.iter().copied().filter(moves).collect();
        let names = |vms: &[&VmName]| {
            let names: Vec<&str> = vms.iter().map(|vm| vm.as_str()).collect();
            names.join(", ")
        };
        match (still.is_empty(), others.is_empty()) {
            (true, _) if moving.is_empty() => None,
            (true, _) => Some(format!(
                "service {name}: its connections go on while members move live ({})",
                names(&moving)
            )),
            (false, true) => Some(format!(
                "service {name}: nobody serves while its members stand still ({})",
                names(&still)
            )),
            (false, false) => Some(format!(
                "service {name}: connections to members that stand still wait or end ({}); others serve on ({})",
                names(&still),
                names(&others)
            )),
        }
    };
    stage.services = state.services.iter().filter_map(says).collect();
    stage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_written_with_or_without_a_port() {
        let parsed = |text| client(text).unwrap();
        assert_eq!(parsed("10.0.0.1"), ("10.0.0.1".parse().unwrap(), None));
        assert_eq!(parsed("10.0.0.1:80").1, Some(80));
        assert_eq!(parsed("fd00::1"), ("fd00::1".parse().unwrap(), None));
        assert_eq!(parsed("[fd00::1]:80").1, Some(80));
        assert!(client("web").unwrap_err().hint.is_some());
    }
}
