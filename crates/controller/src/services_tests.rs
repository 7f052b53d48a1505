//! Services in the controller's task: an address leaves a silent host, which learns of it before it may serve again.

use super::tests::{FakeGroup, Site, host};
use super::*;
use quorate_state::Command;
use quorate_types::report::{Capacity, HypervisorFacts};
use quorate_types::{
    BootId, HostName, HostReport, Manifest, NetworkName, Revision, ServiceName, ServiceReport,
    UplinkMode,
};
use std::collections::BTreeMap;
use std::sync::Arc;

fn web() -> ServiceName {
    ServiceName::new("web").unwrap()
}

fn report(n: u8) -> HostReport {
    HostReport {
        host: host(n),
        boot: BootId("b".into()),
        sequence: 1,
        version: "0".into(),
        applied: Revision(0),
        guard_armed: false,
        watchdog_ms: None,
        capacity: Capacity::default(),
        hypervisor: HypervisorFacts::default(),
        networks: Default::default(),
        pools: BTreeMap::new(),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::from([(web(), ServiceReport::default())]),
        uplinks: BTreeMap::from([(NetworkName::new("lan").unwrap(), UplinkMode::Driver)]),
        offences: BTreeMap::new(),
    }
}

fn manifest() -> Manifest {
    serde_json::from_value(serde_json::json!({
        "networks": { "lan": { "bridge": "br0" } },
        "vms": { "a": { "memory": "64MiB", "power": "stopped", "nics": [{ "network": "lan", "address": "10.0.0.1" }] } },
        "services": { "web": { "network": "lan", "address": "10.0.0.9", "ports": ["80"], "members": { "a": {} } } },
    }))
    .unwrap()
}

fn beat(site: &Site, n: u8) -> Option<HeartbeatReply> {
    site.controller.heartbeat(HeartbeatRequest {
        host: host(n),
        boot: BootId("b".into()),
        guard_armed: false,
        watchdog_ms: None,
        applied: Revision(0),
        sequence: 1,
        report: Some(Box::new(report(n))),
    })
}

fn holder(group: &Arc<FakeGroup>) -> Option<HostName> {
    let state = group.state();
    let holder = state.services.get(&web())?.holder.as_ref()?;
    Some(holder.host.clone())
}

#[tokio::test]
async fn an_address_leaves_a_silent_host_which_learns_of_it_with_its_next_lease() {
    let site = Site::new().await;
    let apply = Command::ApplyManifest {
        base: None,
        manifest: manifest(),
    };
    site.group.apply(apply).unwrap();
    site.until("a host answers for the address", |site| {
        let _ = (beat(site, 1), beat(site, 2));
        holder(&site.group).is_some()
    })
    .await;
    let first = holder(&site.group).unwrap();
    let (silent, other) = if first == host(1) { (1, 2) } else { (2, 1) };
    let told = |site: &Site| site.controller.picture().unwrap().services;
    assert!(
        told(&site)[&web()]
            .iter()
            .any(|text| text.contains("no member serves"))
    );
    let taken = site.group.state().revision;
    site.until("another host answers", |site| {
        let _ = beat(site, other);
        holder(&site.group) == Some(host(other))
    })
    .await;
    site.until("it gets leases again", |site| {
        beat(site, silent).is_some_and(|reply| reply.granted_ms > 0 && reply.revision > taken)
    })
    .await;
}
