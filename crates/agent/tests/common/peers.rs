//! Hosts that ask each other's agents without a network.

use async_trait::async_trait;
use quorate_agent::{AgentHandle, ExportOffer, ExportRequest, FlushRequest, PeerAsk, ShippedFlows};
use quorate_agent_logic::TargetSays;
use quorate_types::{HostName, MigrationId, VmName};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Peers in one process.
#[derive(Default, Clone)]
pub struct Peers(pub Arc<Mutex<BTreeMap<HostName, AgentHandle>>>);

impl Peers {
    pub fn get(&self, host: &HostName) -> Option<AgentHandle> {
        self.0.lock().unwrap().get(host).cloned()
    }
}

#[async_trait]
impl PeerAsk for Peers {
    async fn ask_incoming(
        &self,
        to: HostName,
        vm: VmName,
        id: MigrationId,
        ready: bool,
    ) -> Result<String, String> {
        let agent = self.get(&to).ok_or("unreachable")?;
        agent.incoming_address(vm, id, ready).await
    }
    async fn ask_export(
        &self,
        to: HostName,
        request: ExportRequest,
    ) -> Result<ExportOffer, String> {
        let agent = self.get(&to).ok_or("unreachable")?;
        agent.export(request).await
    }
    async fn ask_flush(&self, to: HostName, request: FlushRequest) -> Result<(), String> {
        let agent = self.get(&to).ok_or("unreachable")?;
        agent.flush_copy(request).await
    }
    async fn ask_hand_over(&self, to: HostName, vm: VmName, id: MigrationId) -> Result<(), String> {
        let agent = self.get(&to).ok_or("unreachable")?;
        agent.hand_over(vm, id).await
    }
    async fn ship_flows(&self, to: HostName, flows: ShippedFlows) -> Result<(), String> {
        let agent = self.get(&to).ok_or("unreachable")?;
        agent.put_flows(&flows).await
    }
    async fn send_pins(
        &self,
        to: HostName,
        pins: Vec<quorate_balancer::Pin>,
    ) -> Result<(), String> {
        let agent = self.get(&to).ok_or("unreachable")?;
        agent.pin(&pins).await
    }
    async fn ask_outcome(&self, to: HostName, vm: VmName, id: MigrationId) -> TargetSays {
        match self.get(&to) {
            Some(agent) => agent.outcome(vm, id).await,
            None => TargetSays::Unknown,
        }
    }
}
