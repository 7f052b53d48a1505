//! What cannot be right about services, from the specs of a site alone.
//!
//! Always holds: the same problems are found for a manifest (which says where they stand in the file) and for a change of
//! the state (which refuses what was not wrong before). Must not: know which VMs run.

use crate::service::{
    AffinityKind, Attractor, HealthCheck, HealthKind, MAX_LIMIT, MAX_MEMBER_WEIGHT, MAX_MEMBERS,
    MAX_PORTS, ServiceSpec,
};
use crate::{NetworkName, NetworkSpec, ServiceName, VmName, VmSpec};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The specs that services are held against.
#[derive(Debug, Clone, Default)]
pub struct Site<'a> {
    /// Networks.
    pub networks: BTreeMap<&'a NetworkName, &'a NetworkSpec>,
    /// VMs.
    pub vms: BTreeMap<&'a VmName, &'a VmSpec>,
    /// Services.
    pub services: BTreeMap<&'a ServiceName, &'a ServiceSpec>,
}

/// Something wrong with a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceProblem {
    /// Which.
    pub service: ServiceName,
    /// Where in its spec: `["health", "timeout"]`.
    pub path: Vec<String>,
    /// Where in a VM's spec, when it lies there as well.
    pub vm: Option<(VmName, Vec<String>)>,
    /// The other service that it does not go with.
    pub other: Option<ServiceName>,
    /// What is wrong, in one line.
    pub message: String,
    /// What to do about it; can be empty.
    pub hint: String,
}

struct Finder<'a> {
    site: &'a Site<'a>,
    name: &'a ServiceName,
    spec: &'a ServiceSpec,
    found: Vec<ServiceProblem>,
}

/// All problems.
#[must_use]
pub fn find(site: &Site<'_>) -> Vec<ServiceProblem> {
    let mut found = Vec::new();
    for (name, spec) in &site.services {
        let mut finder = Finder {
            site,
            name,
            spec,
            found: Vec::new(),
        };
        finder.addresses();
        finder.ports();
        finder.others();
        finder.members();
        finder.affinity();
        finder.limits();
        if let Some(health) = &spec.health {
            finder.health(health);
        }
        found.append(&mut finder.found);
    }
    found
}

impl Finder<'_> {
    fn report(&mut self, path: &[&str], message: String, hint: impl Into<String>) {
        self.found.push(ServiceProblem {
            service: self.name.clone(),
            path: path.iter().map(|&step| step.to_owned()).collect(),
            vm: None,
            other: None,
            message,
            hint: hint.into(),
        });
    }

    fn fields(&self) -> Vec<(&'static str, IpAddr)> {
        let second = self.spec.address6.map(|v6| ("address6", IpAddr::V6(v6)));
        [("address", self.spec.address)]
            .into_iter()
            .chain(second)
            .collect()
    }

    fn addresses(&mut self) {
        let network = &self.spec.network;
        let Some(of) = self.site.networks.get(network).copied() else {
            let message = format!("unknown network `{network}`");
            self.report(&["network"], message, "add it under `networks:`");
            return;
        };
        if self.spec.address6.is_some() && self.spec.address.is_ipv6() {
            let message = "`address` is an IPv6 address already".to_owned();
            self.report(
                &["address6"],
                message,
                "give the IPv4 address as `address`, or leave `address6` out",
            );
        }
        for (field, address) in self.fields() {
            if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
                let message = format!("{address} cannot be a service's address");
                self.report(&[field], message, "choose a free address of the network");
                continue;
            }
            // What routers are told of may be anywhere.
            if self.spec.attractor != Attractor::Bgp
                && let Some(subnet) = of.subnet_for(address)
                && !subnet.contains(address)
            {
                let message = format!("{address} is not in network `{network}` ({subnet})");
                let inside = self.site.networks.iter().find(|(_, spec)| {
                    let subnet = spec.subnet_for(address);
                    subnet.is_some_and(|subnet| subnet.contains(address))
                });
                let hint = match inside {
                    Some((other, _)) => format!("it is in network `{other}`: name that one"),
                    None => {
                        "it is in no network of the cluster: choose a free address of one".into()
                    }
                };
                self.report(&[field], message, hint);
            }
            self.same_as_a_vm(field, address);
        }
        if self.spec.attractor == Attractor::Bgp && of.bgp.is_none() {
            let message = format!("network `{network}` does not say who its routers are");
            let hint = "give it `bgp: {as: 65001, neighbors: [{address: ..., as: ...}]}`";
            self.report(&["attractor"], message, hint);
        }
    }

    fn same_as_a_vm(&mut self, field: &str, address: IpAddr) {
        let site = self.site;
        for (vm, spec) in &site.vms {
            for (index, nic) in spec.nics.iter().enumerate() {
                if nic.network != self.spec.network || !nic.addresses().any(|own| own == address) {
                    continue;
                }
                let of_nic = match nic.address == Some(address) {
                    true => "address",
                    false => "address6",
                };
                let path = ["nics".to_owned(), index.to_string(), of_nic.to_owned()];
                self.found.push(ServiceProblem {
                    service: self.name.clone(),
                    path: vec![field.to_owned()],
                    vm: Some(((*vm).clone(), path.into())),
                    other: None,
                    message: format!(
                        "{address} is the address of VM `{vm}` and of service `{}`",
                        self.name
                    ),
                    hint: "a service needs an address of its own".into(),
                });
            }
        }
    }

    fn ports(&mut self) {
        let ports = &self.spec.ports;
        if ports.is_empty() || ports.len() > MAX_PORTS {
            let message = format!("a service has from 1 to {MAX_PORTS} ports and port ranges");
            self.report(&["ports"], message, "write for example `ports: [80, 443]`");
        }
        for (index, port) in ports.iter().enumerate() {
            let mut before = ports[..index].iter();
            if let Some(other) = before.find(|other| other.overlaps(port)) {
                let message = format!("`{port}` overlaps with `{other}`");
                self.report(
                    &["ports", &index.to_string()],
                    message,
                    "write each port once",
                );
            }
        }
    }

    /// Services that come before this one and have a port of one of its addresses.
    fn others(&mut self) {
        let (site, me) = (self.site, self.name);
        let before = site.services.iter().take_while(|(name, _)| **name < me);
        for (other, theirs) in before {
            let address = self.fields().into_iter().find(|(_, address)| {
                theirs.network == self.spec.network && theirs.addresses().contains(address)
            });
            let Some((field, address)) = address else {
                continue;
            };
            if theirs.attractor != self.spec.attractor {
                let message = format!(
                    "service `{other}` has {address} too, with the attractor `{}`",
                    theirs.attractor
                );
                self.other(
                    other,
                    &["attractor"],
                    message,
                    "one address is attracted in one way",
                );
            }
            for (index, port) in self.spec.ports.iter().enumerate() {
                if let Some(taken) = theirs.ports.iter().find(|taken| taken.overlaps(port)) {
                    let message =
                        format!("`{port}` of {address} belongs to service `{other}` (`{taken}`)");
                    let path = ["ports", &index.to_string()];
                    let hint = format!("choose another port, or another `{field}`");
                    self.other(other, &path, message, hint);
                }
            }
        }
    }

    fn other(
        &mut self,
        other: &ServiceName,
        path: &[&str],
        message: String,
        hint: impl Into<String>,
    ) {
        self.report(path, message, hint);
        if let Some(last) = self.found.last_mut() {
            last.other = Some(other.clone());
        }
    }

    fn members(&mut self) {
        let (site, spec) = (self.site, self.spec);
        for (vm, member) in &spec.members {
            if !site.vms.contains_key(vm) {
                let message = format!("unknown VM `{vm}`");
                let near = near(vm.as_str(), site.vms.keys().map(|vm| vm.as_str()));
                let hint = near.map_or_else(
                    || "add it under `vms:`".to_owned(),
                    |near| format!("did you mean `{near}`?"),
                );
                self.report(&["members", vm.as_str()], message, hint);
            }
            if !(1..=MAX_MEMBER_WEIGHT).contains(&member.weight) {
                let message = format!("a weight is from 1 to {MAX_MEMBER_WEIGHT}");
                let hint = "leave a VM out to give it no connections, or drain it";
                self.report(&["members", vm.as_str(), "weight"], message, hint);
            }
        }
        let members: Vec<(&VmName, &VmSpec)> = site
            .vms
            .iter()
            .filter(|(vm, of)| spec.weight(vm, &of.labels).is_some())
            .map(|(vm, of)| (*vm, *of))
            .collect();
        if members.is_empty() && spec.select.is_empty() && spec.members.is_empty() {
            let message = "the service has no member".to_owned();
            self.report(
                &[],
                message,
                "name VMs under `members:`, or labels under `select:`",
            );
        } else if members.is_empty() && !spec.select.is_empty() {
            let message = "no VM has these labels".to_owned();
            self.report(&["select"], message, "give VMs `labels:`, or name members");
        }
        if members.len() > MAX_MEMBERS {
            let message = format!(
                "{} members; a service has at most {MAX_MEMBERS}",
                members.len()
            );
            self.report(&["members"], message, "make several services of it");
        }
        for (vm, of) in members {
            self.reachable(vm, of);
        }
    }

    /// A member is steered to by its MAC and its own addresses in the service's network.
    fn reachable(&mut self, vm: &VmName, of: &VmSpec) {
        let spec = self.spec;
        let by_name = spec.members.contains_key(vm);
        let path: &[&str] = match by_name {
            true => &["members", vm.as_str()],
            false => &["select"],
        };
        let network = &spec.network;
        let mut nics = of.nics.iter().enumerate();
        let Some((index, nic)) = nics.find(|(_, nic)| nic.network == *network) else {
            let message = format!("member `{vm}` has no NIC in network `{network}`");
            let hint = format!("give it one, or take it out of service `{}`", self.name);
            self.at_vm(path, vm, vec!["nics".into()], message, hint);
            return;
        };
        for (_, address) in self.fields() {
            let same = |own: &IpAddr| own.is_ipv4() == address.is_ipv4();
            if nic.addresses().any(|own| same(&own)) {
                continue;
            }
            let (family, field) = match address.is_ipv4() {
                true => ("IPv4", "address"),
                false => ("IPv6", "address6"),
            };
            let message = format!(
                "member `{vm}` has no {family} address of its own in network `{network}`: packets to {address} could not reach it"
            );
            let hint = format!("say it as `{field}` of its NIC {index}");
            self.at_vm(
                path,
                vm,
                vec!["nics".into(), index.to_string()],
                message,
                hint,
            );
        }
    }

    fn at_vm(
        &mut self,
        path: &[&str],
        vm: &VmName,
        at: Vec<String>,
        message: String,
        hint: String,
    ) {
        self.report(path, message, hint);
        if let Some(last) = self.found.last_mut() {
            last.vm = Some((vm.clone(), at));
        }
    }

    fn affinity(&mut self) {
        let affinity = self.spec.affinity;
        if !(1..=32).contains(&affinity.prefix) {
            let message = format!("{} is not a prefix of IPv4 addresses", affinity.prefix);
            self.report(
                &["affinity", "prefix"],
                message,
                "it is from 1 to 32, as in `24`",
            );
        }
        if !(1..=128).contains(&affinity.prefix6) {
            let message = format!("{} is not a prefix of IPv6 addresses", affinity.prefix6);
            self.report(
                &["affinity", "prefix6"],
                message,
                "it is from 1 to 128, as in `64`",
            );
        }
        match affinity.timeout {
            Some(timeout) if timeout.0 == 0 => {
                let message = "a time-out of 0 remembers nobody".to_owned();
                self.report(
                    &["affinity", "timeout"],
                    message,
                    "leave it out, or write `10m`",
                );
            }
            Some(_) if affinity.kind == AffinityKind::None => {
                let message = "without affinity no client is remembered".to_owned();
                let hint = "write `kind: source` or `kind: subnet`, or leave the time-out out";
                self.report(&["affinity", "timeout"], message, hint);
            }
            _ => {}
        }
    }

    fn limits(&mut self) {
        let limits = self.spec.limits;
        for (field, limit) in [
            ("new_per_member", limits.new_per_member),
            ("new_per_client", limits.new_per_client),
        ] {
            if limit.is_some_and(|limit| !(1..=MAX_LIMIT).contains(&limit)) {
                let message = format!("`{field}` is a number from 1 to {MAX_LIMIT} in a second");
                let hint = "leave it out for no limit; drain a member to give it none";
                self.report(&["limits", field], message, hint);
            }
        }
        if let (Some(client), Some(member)) = (limits.new_per_client, limits.new_per_member)
            && client > member
        {
            let message =
                format!("one client may begin {client} a second, and all together {member}");
            let hint =
                "give `new_per_client` a smaller number than `new_per_member`, or leave it out";
            self.report(&["limits", "new_per_client"], message, hint);
        }
    }

    fn health(&mut self, health: &HealthCheck) {
        if health.interval.0 < 100 {
            let message = format!("{} between two tries is too little", health.interval);
            self.report(
                &["health", "interval"],
                message,
                "write at least `100ms`, as in `2s`",
            );
        }
        if health.timeout.0 == 0 || health.timeout > health.interval {
            let message = format!(
                "a try may take {}, and one is made every {}",
                health.timeout, health.interval
            );
            let hint = "write a `timeout` above 0 and at most as long as `interval`";
            self.report(&["health", "timeout"], message, hint);
        }
        for (field, count) in [("rise", health.rise), ("fall", health.fall)] {
            if !(1..=100).contains(&count) {
                let message = format!("`{field}` is a number of tries from 1 to 100");
                self.report(&["health", field], message, "write for example `3`");
            }
        }
        let needs_port = health.kind != HealthKind::Agent;
        if needs_port && (self.spec.health_port().is_none() || health.port == Some(0)) {
            let message = "the check needs a TCP port, and the service has none".to_owned();
            self.report(
                &["health"],
                message,
                "say it as `port`, or use `kind: agent`",
            );
        }
        if !health.path.starts_with('/') || health.path.chars().any(|c| c.is_control() || c == ' ')
        {
            let message = format!("`{}` is not a path of a request", health.path);
            self.report(&["health", "path"], message, "write for example `/health`");
        }
    }
}

/// The known name that differs in at most one letter.
fn near<'n>(name: &str, mut known: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    known.find(|other| {
        let differing = name.bytes().zip(other.bytes()).filter(|(a, b)| a != b);
        let lengths = name.len().abs_diff(other.len());
        differing.count() + lengths == 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Manifest;
    use serde_json::{Value, json};

    fn problems(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut value = json!({
            "networks": {
                "lan": { "bridge": "br0", "subnet": "10.0.0.0/24", "subnet6": "fd00::/64" },
                "dmz": { "bridge": "br1", "subnet": "10.1.0.0/24" },
            },
            "vms": {
                "web1": { "memory": "64MiB", "labels": { "tier": "web" },
                    "nics": [{ "network": "lan", "address": "10.0.0.11", "address6": "fd00::11" }] },
                "web2": { "memory": "64MiB",
                    "nics": [{ "network": "lan", "address": "10.0.0.12", "address6": "fd00::12" }] },
            },
            "services": {
                "web": { "network": "lan", "address": "10.0.0.100", "address6": "fd00::100",
                    "ports": ["80", "53/udp"], "members": { "web1": {}, "web2": {} },
                    "health": { "kind": "tcp" } },
            },
        });
        change(&mut value);
        let manifest: Manifest = serde_json::from_value(value).unwrap();
        let site = Site {
            networks: manifest.networks.iter().collect(),
            vms: manifest.vms.iter().collect(),
            services: manifest.services.iter().collect(),
        };
        let found = find(&site).into_iter();
        found
            .map(|problem| format!("{}: {}", problem.path.join("."), problem.message))
            .collect()
    }

    #[track_caller]
    fn one(part: &str, change: impl FnOnce(&mut Value)) {
        let found = problems(change);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(part), "{found:?}");
    }

    #[test]
    fn a_good_service_is_good() {
        assert_eq!(problems(|_| ()), Vec::<String>::new());
    }

    #[test]
    fn addresses_are_the_services_own_and_in_its_network() {
        one("address: 10.1.0.5 is not in network", |v| {
            v["services"]["web"]["address"] = json!("10.1.0.5");
        });
        one("address of VM `web2`", |v| {
            v["services"]["web"]["address"] = json!("10.0.0.12");
        });
        one("address6: fd00::12 is the address of VM", |v| {
            v["services"]["web"]["address6"] = json!("fd00::12");
        });
        one("cannot be", |v| {
            v["services"]["web"]["address"] = json!("224.0.0.1");
        });
        one("unknown network", |v| {
            v["services"]["web"]["network"] = json!("wan");
            v["vms"]["web1"]["nics"][0]["network"] = json!("wan");
            v["vms"]["web2"]["nics"][0]["network"] = json!("wan");
        });
        one("IPv6 address already", |v| {
            v["services"]["web"]["address"] = json!("fd00::101");
        });
    }

    #[test]
    fn limits_are_rates_that_let_somebody_in() {
        let limits = |limits: Value| move |v: &mut Value| v["services"]["web"]["limits"] = limits;
        let good = json!({ "new_per_member": 200, "new_per_client": 200 });
        assert_eq!(problems(limits(good)), Vec::<String>::new());
        one(
            "limits.new_per_member: `new_per_member` is a number from 1",
            limits(json!({ "new_per_member": 0 })),
        );
        one(
            "limits.new_per_client: `new_per_client` is a number from 1",
            limits(json!({ "new_per_client": 2_000_000 })),
        );
        one(
            "one client may begin 20 a second, and all together 10",
            limits(json!({ "new_per_member": 10, "new_per_client": 20 })),
        );
    }

    #[test]
    fn ports_of_one_address_belong_to_one_service() {
        let second = |ports: Value| json!({ "network": "lan", "address": "10.0.0.100", "ports": ports, "members": { "web1": {} } });
        one("belongs to service `web`", |v| {
            v["services"]["web-b"] = second(json!(["79-81"]));
        });
        assert!(problems(|v| v["services"]["web-b"] = second(json!(["53"]))).is_empty());
        one("`80-90` overlaps", |v| {
            v["services"]["web"]["ports"] = json!(["80", "80-90"]);
        });
        one("from 1 to 32 ports", |v| {
            v["services"]["web"]["ports"] = json!([]);
            v["services"]["web"]["health"]["port"] = json!(80);
        });
        one("with the attractor `arp`", |v| {
            v["services"]["web-b"] = second(json!(["53"]));
            v["networks"]["lan"]["bgp"] = json!({ "as": 1, "neighbors": [] });
            v["services"]["web-b"]["attractor"] = json!("bgp");
        });
    }

    #[test]
    fn routers_are_told_of_any_address_when_they_are_known() {
        one("does not say who its routers are", |v| {
            v["services"]["web"]["attractor"] = json!("bgp");
        });
        let routed = problems(|v| {
            v["services"]["web"]["attractor"] = json!("bgp");
            v["services"]["web"]["address"] = json!("192.0.2.1");
            v["networks"]["lan"]["bgp"] = json!({ "as": 1, "neighbors": [] });
        });
        assert_eq!(routed, Vec::<String>::new());
    }

    #[test]
    fn members_exist_and_can_be_reached() {
        one("unknown VM `web3`", |v| {
            v["services"]["web"]["members"] = json!({ "web1": {}, "web3": {} });
        });
        one("has no member", |v| {
            v["services"]["web"]["members"] = json!({});
        });
        one("no VM has these labels", |v| {
            v["services"]["web"]["members"] = json!({});
            v["services"]["web"]["select"] = json!({ "tier": ["app"] });
        });
        one("select: member `web1` has no IPv6", |v| {
            v["services"]["web"]["members"] = json!({});
            v["services"]["web"]["select"] = json!({ "tier": ["web"] });
            v["vms"]["web1"]["nics"][0]["address6"] = json!(null);
        });
        one("no NIC in network", |v| {
            v["vms"]["web2"]["nics"] = json!([]);
        });
        one("a weight is", |v| {
            v["services"]["web"]["members"]["web1"]["weight"] = json!(0);
        });
    }

    #[test]
    fn prefixes_and_times_are_possible() {
        one("affinity.prefix: 33", |v| {
            v["services"]["web"]["affinity"] = json!({ "kind": "subnet", "prefix": 33 });
        });
        one("affinity.timeout", |v| {
            v["services"]["web"]["affinity"] = json!({ "timeout": "5m" });
        });
        one("a try may take 3s", |v| {
            v["services"]["web"]["health"] = json!({ "kind": "tcp", "timeout": "3s" });
        });
        one("needs a TCP port", |v| {
            v["services"]["web"]["ports"] = json!(["53/udp"]);
        });
        one("`rise` is a number", |v| {
            v["services"]["web"]["health"]["rise"] = json!(0);
        });
        one("not a path", |v| {
            v["services"]["web"]["health"]["path"] = json!("x");
        });
    }
}
