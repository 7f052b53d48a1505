//! A datapath in memory, for tests of the agent and for the simulator: it keeps the same promises about state, records
//! what was asked, and fails on demand. No packet passes through it.

use crate::flow::{Flow, Pin, strays_of};
use crate::model::{Applied, Counters, EdgeSpec, Loaded, ServiceTable, Wanted};
use crate::trace::{TraceAnswer, TraceQuery};
use crate::{BalancerError, Datapath};
use quorate_types::service::UplinkMode;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An edge of the fake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeEdge {
    /// What was attached.
    pub spec: EdgeSpec,
    /// Whether the director delivers to it.
    pub open: bool,
    /// Whether stragglers go out of the uplink.
    pub forwards: bool,
    /// What it knows.
    pub flows: Vec<Flow>,
}

/// A host's datapath that exists only in memory.
#[derive(Debug, Default)]
pub struct FakeDatapath {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    wanted: Wanted,
    lease_ns: u64,
    edges: BTreeMap<String, FakeEdge>,
    pins: BTreeSet<Pin>,
    counters: Counters,
    failing: BTreeSet<&'static str>,
}

impl FakeDatapath {
    /// With nothing loaded.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every following call of the operation fail, or succeed again. Operations are named like the trait's
    /// functions.
    pub fn set_failing(&self, operation: &'static str, failing: bool) {
        let mut inner = self.lock();
        if failing {
            inner.failing.insert(operation);
        } else {
            inner.failing.remove(operation);
        }
    }

    /// What was applied last.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        self.lock().wanted.clone()
    }

    /// The deadline written last.
    #[must_use]
    pub fn lease_ns(&self) -> u64 {
        self.lock().lease_ns
    }

    /// The edges by tap.
    #[must_use]
    pub fn edges(&self) -> BTreeMap<String, FakeEdge> {
        self.lock().edges.clone()
    }

    /// The pins.
    #[must_use]
    pub fn pins(&self) -> Vec<Pin> {
        self.lock().pins.iter().cloned().collect()
    }

    /// Makes an edge know a flow, as traffic would.
    pub fn see(&self, ifname: &str, flow: Flow) {
        if let Some(edge) = self.lock().edges.get_mut(ifname) {
            edge.flows.push(flow);
        }
    }

    /// What [`Datapath::counters`] answers from now on.
    pub fn set_counters(&self, counters: Counters) {
        self.lock().counters = counters;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, operation: &'static str) -> Result<MutexGuard<'_, Inner>, BalancerError> {
        let inner = self.lock();
        if inner.failing.contains(operation) {
            return Err(BalancerError::Injected { operation });
        }
        Ok(inner)
    }
}

impl Inner {
    fn edge(&mut self, ifname: &str) -> Result<&mut FakeEdge, BalancerError> {
        self.edges
            .get_mut(ifname)
            .ok_or_else(|| BalancerError::NoEdge {
                ifname: ifname.to_owned(),
            })
    }
}

#[async_trait::async_trait]
impl Datapath for FakeDatapath {
    async fn apply(&self, wanted: &Wanted) -> Result<Applied, BalancerError> {
        let mut inner = self.begin("apply")?;
        inner.wanted = wanted.clone();
        let mut applied = Applied::default();
        for (name, network) in &wanted.networks {
            let mode = match &network.uplink {
                Some(_) => UplinkMode::Driver,
                None => UplinkMode::None,
            };
            applied.uplinks.insert(name.clone(), mode);
        }
        for (name, table) in &wanted.services {
            let here = wanted.networks.contains_key(&table.network);
            let loaded = Loaded {
                active: table.active().filter(|_| here).map_or(0, |list| list.epoch),
                prepared: table.next.as_ref().filter(|_| here).map(|list| list.epoch),
                problem: (!here)
                    .then(|| format!("network `{}` is not on this host", table.network)),
            };
            applied.services.insert(name.clone(), loaded);
        }
        Ok(applied)
    }

    fn lease(&self, deadline_ns: u64) {
        self.lock().lease_ns = deadline_ns;
    }

    async fn attach_edge(&self, edge: &EdgeSpec) -> Result<(), BalancerError> {
        let mut inner = self.begin("attach_edge")?;
        match inner.edges.get_mut(&edge.ifname) {
            Some(known) => known.spec = edge.clone(),
            None => {
                let fresh = FakeEdge {
                    spec: edge.clone(),
                    open: false,
                    forwards: false,
                    flows: Vec::new(),
                };
                inner.edges.insert(edge.ifname.clone(), fresh);
            }
        }
        Ok(())
    }

    async fn open_edge(&self, ifname: &str) -> Result<(), BalancerError> {
        let mut inner = self.begin("open_edge")?;
        let edge = inner.edge(ifname)?;
        edge.open = true;
        edge.forwards = false;
        Ok(())
    }

    async fn close_edge(&self, ifname: &str, forward_to_wire: bool) -> Result<(), BalancerError> {
        let mut inner = self.begin("close_edge")?;
        if let Some(edge) = inner.edges.get_mut(ifname) {
            edge.open = false;
            edge.forwards = forward_to_wire;
        }
        Ok(())
    }

    async fn detach_edge(&self, ifname: &str) -> Result<(), BalancerError> {
        self.begin("detach_edge")?.edges.remove(ifname);
        Ok(())
    }

    async fn flows(&self, ifname: &str) -> Result<Vec<Flow>, BalancerError> {
        let mut inner = self.begin("flows")?;
        Ok(inner.edge(ifname)?.flows.clone())
    }

    async fn put_flows(&self, ifname: &str, flows: &[Flow]) -> Result<(), BalancerError> {
        let mut inner = self.begin("put_flows")?;
        let edge = inner.edge(ifname)?;
        edge.flows
            .retain(|known| !flows.iter().any(|flow| flow.key == known.key));
        edge.flows.extend_from_slice(flows);
        Ok(())
    }

    async fn strays(&self, table: &ServiceTable) -> Result<Vec<Pin>, BalancerError> {
        let inner = self.begin("strays")?;
        let edges = inner.edges.values();
        Ok(edges
            .flat_map(|edge| strays_of(table, edge.spec.mac, &edge.flows))
            .collect())
    }

    async fn pin(&self, pins: &[Pin]) -> Result<(), BalancerError> {
        self.begin("pin")?.pins.extend(pins.iter().cloned());
        Ok(())
    }

    async fn counters(&self) -> Result<Counters, BalancerError> {
        Ok(self.begin("counters")?.counters.clone())
    }

    async fn trace(&self, query: &TraceQuery) -> Result<TraceAnswer, BalancerError> {
        let inner = self.begin("trace")?;
        let service = query.service.to_string();
        let Some(table) = inner.wanted.services.get(&query.service) else {
            return Err(BalancerError::NotLoaded { service });
        };
        let mut answer = crate::trace::trace(table, query)
            .map_err(|reason| BalancerError::Service { service, reason })?;
        let mut pins = inner.pins.iter();
        let pin = pins.find(|pin| pin.service == table.id && pin.flow == answer.flow);
        if let Some(pin) = pin {
            let mut members = table.history.iter().flat_map(|list| &list.members);
            let member = members.find(|member| member.mac == pin.mac);
            answer.pinned = true;
            answer.member = member.map(|member| member.vm.clone());
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_types::service::{
        Affinity, Attractor, Protocol, RingMember, RingVersion, ServiceId,
    };
    use quorate_types::{NetworkName, ServiceName, VmName};

    fn edge(vm: &str, mac: [u8; 6]) -> EdgeSpec {
        EdgeSpec {
            ifname: format!("qt-{vm}"),
            network: NetworkName::new("lan").unwrap(),
            vm: VmName::new(vm).unwrap(),
            mac,
            addresses: Vec::new(),
            guard: crate::Guard::default(),
        }
    }

    fn table() -> ServiceTable {
        let member = |name: &str, last| RingMember {
            vm: VmName::new(name).unwrap(),
            mac: [2, 0, 0, 0, 0, last],
            weight: 1,
        };
        let version = |epoch, members| RingVersion {
            epoch,
            members,
            ..RingVersion::default()
        };
        ServiceTable {
            id: ServiceId(1),
            network: NetworkName::new("lan").unwrap(),
            addresses: vec!["10.0.0.9".parse().unwrap()],
            ports: vec!["80".parse().unwrap()],
            affinity: Affinity::default(),
            slots: 4_099,
            history: vec![
                version(1, vec![member("a", 1)]),
                version(2, vec![member("b", 2)]),
            ],
            next: Some(version(3, vec![member("c", 3)])),
            holder: false,
            attractor: Attractor::Arp,
            limits: Default::default(),
        }
    }

    fn flow(port: u16) -> Flow {
        Flow {
            service: Some(ServiceId(1)),
            key: crate::FlowKey {
                protocol: Protocol::Tcp,
                client: "10.0.0.1".parse().unwrap(),
                client_port: port,
                port: 80,
            },
            idle_ms: 0,
            closing: false,
        }
    }

    #[tokio::test]
    async fn strays_are_flows_that_a_coming_ring_would_not_reach() {
        let fake = FakeDatapath::new();
        fake.attach_edge(&edge("a", [2, 0, 0, 0, 0, 1]))
            .await
            .unwrap();
        fake.attach_edge(&edge("b", [2, 0, 0, 0, 0, 2]))
            .await
            .unwrap();
        fake.open_edge("qt-a").await.unwrap();
        fake.open_edge("qt-b").await.unwrap();
        // Its guest is at its switchover.
        fake.close_edge("qt-a", true).await.unwrap();
        fake.see("qt-a", flow(1000));
        fake.see("qt-b", flow(1001));
        fake.see(
            "qt-a",
            Flow {
                closing: true,
                ..flow(1002)
            },
        );
        // With ring 3, `c` is primary and `b` previous: only the flow of `a` is lost.
        let pins = fake.strays(&table()).await.unwrap();
        assert_eq!(pins.len(), 1);
        assert_eq!(pins[0].mac, [2, 0, 0, 0, 0, 1]);
        // No director would know where to: it must not keep the others' pins, and the ring, waiting.
        assert!(strays_of(&table(), [2, 0, 0, 0, 0, 9], &[flow(1000)]).is_empty());
        fake.pin(&pins).await.unwrap();
        assert_eq!(fake.pins(), pins);
    }

    #[tokio::test]
    async fn state_is_kept_and_failures_come_on_demand() {
        let fake = FakeDatapath::new();
        let name = ServiceName::new("web").unwrap();
        let mut wanted = Wanted::default();
        wanted.services.insert(name.clone(), table());
        let applied = fake.apply(&wanted).await.unwrap();
        assert!(applied.services[&name].problem.is_some());
        let network = crate::UplinkWanted {
            bridge: "br0".into(),
            uplink: None,
        };
        wanted
            .networks
            .insert(NetworkName::new("lan").unwrap(), network);
        let applied = fake.apply(&wanted).await.unwrap();
        assert_eq!(applied.services[&name].active, 2);
        assert_eq!(applied.services[&name].prepared, Some(3));
        assert!(fake.open_edge("qt-a").await.is_err());
        fake.set_failing("apply", true);
        assert!(fake.apply(&wanted).await.is_err());
        fake.lease(5);
        assert_eq!(fake.lease_ns(), 5);
    }
}
