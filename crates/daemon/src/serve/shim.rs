//! The place of the agent until it lands: reports a host that runs no guests.
#![allow(dead_code, missing_docs, clippy::unused_async)]
use quorate_types::*;
use std::collections::BTreeMap;
#[derive(Clone)]
pub(crate) struct AgentHandle(pub(crate) HostName);
impl AgentHandle {
    pub(crate) fn set_links(&self, _: BTreeMap<HostName, report::LinkReport>) {}
    pub(crate) async fn report_changed(&self) {
        std::future::pending().await
    }
    pub(crate) fn report(&self) -> HostReport {
        HostReport {
            host: self.0.clone(),
            boot: BootId("x".into()),
            sequence: 1,
            version: "0".into(),
            applied: Revision(0),
            guard_armed: true,
            watchdog_ms: Some(500),
            capacity: Default::default(),
            hypervisor: Default::default(),
            networks: Default::default(),
            pools: Default::default(),
            links: Default::default(),
            vms: Default::default(),
        }
    }
    pub(crate) fn lease_ack(&self, _: quorate_membership::Instant, _: Millis, _: Revision) {}
    pub(crate) async fn incoming_address(
        &self,
        _: VmName,
        _: MigrationId,
        _: bool,
    ) -> Result<String, String> {
        panic!()
    }
    pub(crate) async fn shutdown(&self) {}
    pub(crate) fn log(&self, _: &VmName) -> std::path::PathBuf {
        panic!()
    }
}
