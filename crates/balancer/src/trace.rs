//! Which member a client gets, and why: the same steps that the director takes, told in words.
//!
//! Always holds: [`trace`] on a table from the state and the kernel's answer agree, but for pins and the lease, which
//! only a host knows; those are added by its driver.

use crate::flow::{self, FlowKey};
use crate::model::ServiceTable;
use crate::ring::{NONE, Ring};
use quorate_types::service::{AffinityKind, Protocol, ServiceId};
use quorate_types::{ServiceName, VmName};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceQuery {
    /// The service.
    pub service: ServiceName,
    /// The client.
    pub client: IpAddr,
    /// Its port.
    pub client_port: u16,
    /// The service's port; `None`: its first one.
    pub port: Option<u16>,
    /// TCP or UDP; `None`: that of the service's first port that fits.
    pub protocol: Option<Protocol>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceAnswer {
    /// The service's number.
    pub service: ServiceId,
    /// The flow as it was taken.
    pub flow: FlowKey,
    /// Epoch of the ring.
    pub epoch: u64,
    /// The slot.
    pub slot: u32,
    /// Of so many.
    pub slots: u32,
    /// The member that gets the packet; `None`: nobody does.
    pub member: Option<VmName>,
    /// Who had the slot before.
    pub previous: Option<VmName>,
    /// Who gets the slot with the coming ring, where that is another.
    pub next: Option<VmName>,
    /// It is pinned to its member at this host.
    pub pinned: bool,
    /// The steps, in words.
    pub why: Vec<String>,
}

/// The flow that a question means in this service.
///
/// # Errors
/// In words, when the service has no such port.
pub fn flow_of(table: &ServiceTable, query: &TraceQuery) -> Result<FlowKey, String> {
    let fits = |range: &&quorate_types::service::PortRange| {
        query.protocol.is_none_or(|wanted| wanted == range.protocol)
            && query.port.is_none_or(|port| range.contains(port))
    };
    let range = table.ports.iter().find(fits).ok_or_else(|| {
        let all: Vec<String> = table.ports.iter().map(ToString::to_string).collect();
        format!(
            "the service has no such port: its ports are {}",
            all.join(", ")
        )
    })?;
    Ok(FlowKey {
        protocol: range.protocol,
        client: query.client,
        client_port: query.client_port,
        port: query.port.unwrap_or(range.first),
    })
}

/// Answers from a table alone.
///
/// # Errors
/// In words, when the service has no such port or none of its addresses is of the client's family.
pub fn trace(table: &ServiceTable, query: &TraceQuery) -> Result<TraceAnswer, String> {
    let key = flow_of(table, query)?;
    let same_family = |address: &&IpAddr| address.is_ipv4() == key.client.is_ipv4();
    let Some(address) = table.addresses.iter().find(same_family) else {
        return Err("the service has no address of the client's family (IPv4 or IPv6)".to_owned());
    };
    let hash = flow::hash(&table.affinity, &key);
    let slot = flow::slot(hash, table.slots);
    let mut answer = TraceAnswer {
        service: table.id,
        flow: key,
        epoch: table.active().map_or(0, |version| version.epoch),
        slot,
        slots: table.slots,
        member: None,
        previous: None,
        next: None,
        pinned: false,
        why: vec![
            format!(
                "{address} {}/{} belongs to the service (number {})",
                key.port, key.protocol, table.id
            ),
            counted(table, &key, slot),
        ],
    };
    let Some(ring) = Ring::build(&table.history, table.next.as_ref(), table.slots) else {
        answer
            .why
            .push("the ring has no member: nobody gets the packet".to_owned());
        return Ok(answer);
    };
    let entry = ring.slots[slot as usize];
    let name = |index: u16| ring.member(index).map(|member| member.vm.clone());
    answer.member = name(entry.primary);
    answer.previous = name(entry.previous);
    if let Some(member) = ring.member(entry.primary) {
        answer.why.push(format!(
            "slot {slot} belongs to {} ({}) in ring {}",
            member.vm,
            crate::mac::text(member.mac),
            answer.epoch,
        ));
    }
    if entry.previous != NONE
        && let Some(previous) = &answer.previous
    {
        answer.why.push(format!(
            "{previous} had the slot before: it is asked for a connection that the member does not know"
        ));
    }
    if entry.next != entry.primary {
        answer.next = name(entry.next);
        if let (Some(next), Some(coming)) = (&answer.next, &table.next) {
            answer.why.push(format!(
                "{next} gets the slot with ring {}, which is being prepared",
                coming.epoch
            ));
        }
    }
    Ok(answer)
}

fn counted(table: &ServiceTable, key: &FlowKey, slot: u32) -> String {
    let slots = table.slots;
    match table.affinity.kind {
        AffinityKind::None => format!(
            "affinity none: address and port ({} {}) choose slot {slot} of {slots}",
            key.client, key.client_port
        ),
        AffinityKind::Source => {
            format!(
                "affinity source: the address {} chooses slot {slot} of {slots}",
                key.client
            )
        }
        AffinityKind::Subnet => format!(
            "affinity subnet: the subnet of {} ({}) chooses slot {slot} of {slots}",
            key.client,
            flow::affine(&table.affinity, key.client)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_types::NetworkName;
    use quorate_types::service::{Affinity, Attractor, RingMember, RingVersion};

    fn table() -> ServiceTable {
        let member = |name: &str| RingMember {
            vm: VmName::new(name).unwrap(),
            mac: [2, 0, 0, 0, 0, 1],
            weight: 1,
        };
        let version = |epoch, names: &[&str]| RingVersion {
            epoch,
            members: names.iter().map(|name| member(name)).collect(),
            ..RingVersion::default()
        };
        ServiceTable {
            id: ServiceId(7),
            network: NetworkName::new("lan").unwrap(),
            addresses: vec!["10.0.0.9".parse().unwrap()],
            ports: vec!["80".parse().unwrap(), "53/udp".parse().unwrap()],
            affinity: Affinity::default(),
            slots: 4_099,
            history: vec![version(1, &["a", "b"]), version(2, &["b"])],
            next: Some(version(3, &["a"])),
            holder: true,
            attractor: Attractor::Arp,
            limits: Default::default(),
        }
    }

    fn query(client: &str, port: Option<u16>) -> TraceQuery {
        TraceQuery {
            service: ServiceName::new("web").unwrap(),
            client: client.parse().unwrap(),
            client_port: 40_000,
            port,
            protocol: None,
        }
    }

    #[test]
    fn every_step_is_told() {
        let answer = trace(&table(), &query("10.0.0.1", None)).unwrap();
        assert_eq!(answer.flow.port, 80);
        assert_eq!(answer.member.unwrap().as_str(), "b");
        assert_eq!(answer.next.unwrap().as_str(), "a");
        let text = answer.why.join("\n");
        for part in ["10.0.0.9 80/tcp", "affinity none", "belongs to b", "ring 3"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn what_cannot_be_is_said() {
        let error = trace(&table(), &query("10.0.0.1", Some(81))).unwrap_err();
        assert!(error.contains("80, 53/udp"), "{error}");
        assert!(trace(&table(), &query("fd00::1", None)).is_err());
        let mut empty = table();
        empty.history.clear();
        empty.next = None;
        let answer = trace(&empty, &query("10.0.0.1", None)).unwrap();
        assert_eq!(answer.member, None);
        assert!(answer.why.iter().any(|line| line.contains("no member")));
    }
}
