//! Flows and pins in the kernel's tables.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use super::host::Host;
use super::object::{errno, kernel};
use super::sys;
use crate::BalancerError;
use crate::abi::{self, Address};
use crate::flow::{Flow, FlowKey, Pin, strays_of};
use crate::model::ServiceTable;
use quorate_types::service::{Protocol, ServiceId};

/// A pin that was not used for so long (in units of 2^30 ns: two hours) is dropped.
const PIN_IDLE: u32 = 6700;

fn protocol(number: u8) -> Protocol {
    if number == Protocol::Udp.number() {
        Protocol::Udp
    } else {
        Protocol::Tcp
    }
}

fn units(ns: u64) -> u32 {
    u32::try_from(ns >> 30).unwrap_or(u32::MAX)
}

fn key_of(index: u32, key: &FlowKey) -> abi::FlowKey {
    abi::FlowKey {
        ifindex: index,
        client_port: key.client_port,
        port: key.port,
        client: Address::from(key.client),
        protocol: key.protocol.number(),
        zero: [0; 7],
    }
}

fn pin_key(service: u16, key: &FlowKey) -> abi::PinKey {
    abi::PinKey {
        service: u32::from(service),
        client_port: key.client_port,
        port: key.port,
        client: Address::from(key.client),
        protocol: key.protocol.number(),
        zero: [0; 7],
    }
}

/// Gone already is as good.
fn removed(
    result: Result<(), aya::maps::MapError>,
    what: &'static str,
) -> Result<(), BalancerError> {
    match result {
        Err(error) if errno(&error) != Some(libc::ENOENT) => Err(kernel("removing", what)(error)),
        _ => Ok(()),
    }
}

impl Host {
    fn all_flows(&self) -> Result<Vec<(abi::FlowKey, abi::Flow)>, BalancerError> {
        sys::entries(self.tables.all_flows.fd().as_fd()).map_err(kernel("reading", "flows"))
    }

    fn all_pins(&self) -> Result<Vec<(abi::PinKey, abi::Pin)>, BalancerError> {
        sys::entries(self.tables.all_pins.fd().as_fd()).map_err(kernel("reading", "pins"))
    }

    fn edge_index(&self, ifname: &str) -> Result<u32, BalancerError> {
        let edge = self.edges.get(ifname);
        edge.map(|edge| edge.ifindex)
            .ok_or_else(|| BalancerError::NoEdge {
                ifname: ifname.to_owned(),
            })
    }

    fn flow(&self, key: &abi::FlowKey, flow: &abi::Flow, now: u32) -> Option<Flow> {
        let service = match flow.kind {
            abi::FLOW_OWNED => Some(ServiceId(self.services.get(&flow.service)?.entry.id)),
            abi::FLOW_DIRECT => None,
            // A guest that calls itself: its next packet makes the entry again.
            _ => return None,
        };
        Some(Flow {
            service,
            key: FlowKey {
                protocol: protocol(key.protocol),
                client: IpAddr::from(key.client),
                client_port: key.client_port,
                port: key.port,
            },
            idle_ms: u64::from(now.saturating_sub(flow.seen)) * (1 << 30) / 1_000_000,
            closing: flow.bits & abi::FLOW_RESET > 0
                || flow.bits & abi::FLOW_FINS == abi::FLOW_FINS,
        })
    }

    /// See [`crate::Datapath::flows`].
    pub(super) fn flows(&self, ifname: &str) -> Result<Vec<Flow>, BalancerError> {
        let index = self.edge_index(ifname)?;
        let now = units(sys::boottime_ns());
        let mut flows: Vec<Flow> = self
            .all_flows()?
            .iter()
            .filter(|(key, _)| key.ifindex == index)
            .filter_map(|(key, flow)| self.flow(key, flow, now))
            .collect();
        flows.sort();
        Ok(flows)
    }

    /// See [`crate::Datapath::put_flows`].
    pub(super) fn put_flows(&mut self, ifname: &str, flows: &[Flow]) -> Result<(), BalancerError> {
        let index = self.edge_index(ifname)?;
        let now = units(sys::boottime_ns());
        for flow in flows {
            let (service, kind) = match flow.service {
                None => (0, abi::FLOW_DIRECT),
                // Of a service that is not loaded here: the guest's replies will tell, once it is.
                Some(id) => match self.indexes.get(&id.0) {
                    Some(index) => (*index, abi::FLOW_OWNED),
                    None => continue,
                },
            };
            let value = abi::Flow {
                seen: now.saturating_sub(units(flow.idle_ms.saturating_mul(1_000_000))),
                service,
                kind,
                bits: if flow.closing { abi::FLOW_FINS } else { 0 },
            };
            // What this edge has seen itself is newer: BPF_NOEXIST.
            match self.tables.flows.insert(key_of(index, &flow.key), value, 1) {
                Err(error) if errno(&error) != Some(libc::EEXIST) => {
                    return Err(kernel("writing", "flows")(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// All that an edge knew.
    pub(super) fn forget_flows(&mut self, index: u32) -> Result<(), BalancerError> {
        for (key, _) in self.all_flows()? {
            if key.ifindex == index {
                removed(self.tables.flows.remove(&key), "a flow")?;
            }
        }
        Ok(())
    }

    /// Flows and pins of a service that is gone.
    pub(super) fn forget_service(&mut self, index: u16) -> Result<(), BalancerError> {
        for (key, flow) in self.all_flows()? {
            if flow.service == index && flow.kind != abi::FLOW_DIRECT {
                removed(self.tables.flows.remove(&key), "a flow")?;
            }
        }
        if self.pins.remove(&u32::from(index)).is_some() {
            for (key, _) in self.all_pins()? {
                if key.service == u32::from(index) {
                    removed(self.tables.pins.remove(&key), "a pin")?;
                }
            }
        }
        Ok(())
    }

    /// See [`crate::Datapath::strays`].
    pub(super) fn strays(&self, table: &ServiceTable) -> Result<Vec<Pin>, BalancerError> {
        let now = units(sys::boottime_ns());
        let mut by_edge: BTreeMap<u32, Vec<Flow>> = BTreeMap::new();
        for (key, flow) in self.all_flows()? {
            if let Some(flow) = self.flow(&key, &flow, now) {
                by_edge.entry(key.ifindex).or_default().push(flow);
            }
        }
        let mut pins = Vec::new();
        for edge in self.edges.values() {
            if let Some(flows) = by_edge.get(&edge.ifindex) {
                pins.extend(strays_of(table, edge.spec.mac, flows));
            }
        }
        pins.sort();
        Ok(pins)
    }

    /// See [`crate::Datapath::pin`].
    pub(super) fn pin(&mut self, pins: &[Pin]) -> Result<(), BalancerError> {
        let now = units(sys::boottime_ns());
        for pin in pins {
            let not_loaded = || BalancerError::NotLoaded {
                service: pin.service.to_string(),
            };
            let service = self
                .indexes
                .get(&pin.service.0)
                .copied()
                .ok_or_else(not_loaded)?;
            let member = self.members.get(&pin.mac).copied().ok_or_else(not_loaded)?;
            let value = abi::Pin {
                seen: now,
                member,
                zero: 0,
            };
            self.tables
                .pins
                .insert(pin_key(service, &pin.flow), value, 0)
                .map_err(|error| match errno(&error) {
                    Some(libc::E2BIG | libc::ENOSPC) => BalancerError::Full {
                        table: "pins",
                        limit: u64::from(self.capacity.pins),
                        advice: "wait until old connections end before members change again, or raise the datapath's capacity",
                    },
                    _ => kernel("writing", "pins")(error),
                })?;
        }
        self.count_pins()?;
        self.flag_pins()
    }

    /// Whether the flow is pinned, and to whom.
    pub(super) fn pinned(&self, service: u16, key: &FlowKey) -> Option<[u8; 6]> {
        let pin = self.tables.pins.get(&pin_key(service, key), 0).ok()?;
        let mut members = self.members.iter();
        members
            .find(|(_, index)| **index == pin.member)
            .map(|(mac, _)| *mac)
    }

    pub(super) fn count_pins(&mut self) -> Result<(), BalancerError> {
        self.pins.clear();
        for (key, _) in self.all_pins()? {
            *self.pins.entry(key.service).or_default() += 1;
        }
        Ok(())
    }

    /// Directors look for pins of services that have some only.
    fn flag_pins(&mut self) -> Result<(), BalancerError> {
        let mut changed = Vec::new();
        for (service, known) in &mut self.services {
            let index = u32::from(*service);
            let others = known.entry.flags & !abi::SERVICE_PINS;
            let flags = if self.pins.contains_key(&index) {
                others | abi::SERVICE_PINS
            } else {
                others
            };
            if known.entry.flags != flags {
                known.entry.flags = flags;
                self.tables
                    .services
                    .set(index, known.entry, 0)
                    .map_err(kernel("writing", "services"))?;
                changed.push(*service);
            }
        }
        for service in changed {
            self.write_doors_of(service)?;
        }
        Ok(())
    }

    /// Drops pins that nobody used for long, and those to members that are no more.
    pub(super) fn expire_pins(&mut self) -> Result<(), BalancerError> {
        if self.pins.is_empty() {
            return Ok(());
        }
        let now = units(sys::boottime_ns());
        let members: std::collections::BTreeSet<u16> = self.members.values().copied().collect();
        for (key, pin) in self.all_pins()? {
            if now.saturating_sub(pin.seen) > PIN_IDLE || !members.contains(&pin.member) {
                removed(self.tables.pins.remove(&key), "a pin")?;
            }
        }
        self.count_pins()
    }
}
