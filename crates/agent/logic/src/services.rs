//! What the datapath of one host is to have loaded, as the state has it.
//!
//! Always holds: a pure function of the state and the host's name, so hosts that have applied the same revision steer
//! alike. Must not: know what is loaded, or whether the host has a lease: the datapath watches the lease by itself.

use quorate_balancer::{ServiceTable, UplinkWanted, Wanted};
use quorate_state::{ServiceRecord, State};
use quorate_types::HostName;

/// A service as directors and edges know it; `holder`: this host answers for its address.
#[must_use]
pub fn service_table(record: &ServiceRecord, holder: bool) -> ServiceTable {
    ServiceTable {
        id: record.id,
        network: record.spec.network.clone(),
        addresses: record.spec.addresses(),
        ports: record.spec.ports.clone(),
        affinity: record.spec.affinity,
        slots: record.slots,
        history: record.history.clone(),
        next: record.next.clone(),
        holder,
        attractor: record.spec.attractor,
        limits: record.spec.limits,
    }
}

/// Everything that a host should have loaded; a host that is not in the cluster: nothing.
#[must_use]
pub fn services_wanted(state: &State, me: &HostName) -> Wanted {
    let mut wanted = Wanted::default();
    if !state.hosts.contains_key(me) {
        return wanted;
    }
    for (name, record) in &state.services {
        let Some(network) = state.networks.get(&record.spec.network) else {
            continue;
        };
        let uplink = UplinkWanted {
            bridge: network.spec.bridge.clone(),
            uplink: network.spec.uplink.clone(),
        };
        wanted.networks.insert(record.spec.network.clone(), uplink);
        let holder = record.spec.attractor.has_holder() && record.is_held_by(me);
        let table = service_table(record, holder);
        wanted.services.insert(name.clone(), table);
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_state::{Command, Envelope, FORMAT, ServiceChange};
    use quorate_types::{Manifest, ServiceName, Timestamp};
    use serde_json::json;

    fn apply(state: &mut State, command: Command) {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "test".into(),
            command,
        };
        state.apply(&envelope).unwrap();
    }

    fn site() -> State {
        let mut state = State::default();
        let host = HostName::new("h1").unwrap();
        apply(
            &mut state,
            Command::CreateCluster {
                id: "c".into(),
                name: "c".into(),
                ca_certificate: String::new(),
                ca_key: String::new(),
                host,
                address: "1:1".into(),
                settings: Default::default(),
            },
        );
        let manifest: Manifest = serde_json::from_value(json!({
            "networks": { "lan": { "bridge": "br0", "uplink": "eth0" } },
            "vms": { "web1": { "memory": "64MiB", "nics": [{ "network": "lan", "address": "10.0.0.11" }] } },
            "services": { "web": { "network": "lan", "address": "10.0.0.100", "ports": ["80"], "members": { "web1": {} } } },
        }))
        .unwrap();
        let base = None;
        apply(&mut state, Command::ApplyManifest { base, manifest });
        state
    }

    #[test]
    fn a_host_is_told_all_services_and_what_it_answers_for() {
        let mut state = site();
        let (h1, h2) = (HostName::new("h1").unwrap(), HostName::new("h2").unwrap());
        let web = ServiceName::new("web").unwrap();
        let wanted = services_wanted(&state, &h1);
        assert_eq!(wanted.networks.len(), 1);
        assert!(!wanted.services[&web].holder);
        let changes = vec![ServiceChange::SetHolder {
            service: web.clone(),
            host: h1.clone(),
            expect: 0,
            planned: false,
        }];
        apply(&mut state, Command::ChangeServices { changes });
        assert!(services_wanted(&state, &h1).services[&web].holder);
        assert_eq!(services_wanted(&state, &h2), Wanted::default());
    }
}
