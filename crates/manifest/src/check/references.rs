//! Names that must exist.

use super::Checker;
use crate::suggest;
use quorate_types::HostName;
use std::collections::BTreeSet;

impl Checker<'_> {
    pub(super) fn references(&mut self) {
        let manifest = self.manifest;
        for (name, vm) in &manifest.vms {
            let here = name.as_str();
            for (index, disk) in vm.disks.iter().enumerate() {
                let known: Vec<String> = names(self.all.pools.keys());
                let path = ["vms", here, "disks", &index.to_string(), "pool"];
                self.known(&path, "pool", disk.pool.as_str(), &known, "pools");
            }
            for (index, nic) in vm.nics.iter().enumerate() {
                let known: Vec<String> = names(self.all.networks.keys());
                let path = ["vms", here, "nics", &index.to_string(), "network"];
                self.known(&path, "network", nic.network.as_str(), &known, "networks");
            }
            for other in vm.depends_on.keys() {
                let known: Vec<String> = names(self.all.vms.keys().filter(|vm| *vm != name));
                if other != name {
                    let path = ["vms", here, "depends_on", other.as_str()];
                    self.known(&path, "VM", other.as_str(), &known, "vms");
                }
            }
            self.hosts(&["vms", here, "hosts"], &vm.hosts);
            for (index, preference) in vm.prefer.iter().enumerate() {
                let path = ["vms", here, "prefer", &index.to_string(), "hosts"];
                self.hosts(&path, &preference.hosts);
            }
        }
        for name in manifest.hosts.keys() {
            self.hosts(&["hosts"], &BTreeSet::from([name.clone()]));
        }
        for (name, pool) in &manifest.pools {
            self.hosts(&["pools", name.as_str(), "hosts"], pool.hosts());
        }
        for (name, rule) in &manifest.rules {
            let kind = rule.kind.field();
            for vm in rule.vms() {
                let known: Vec<String> = names(self.all.vms.keys());
                let path = ["rules", name.as_str(), kind, vm.as_str()];
                self.known(&path, "VM", vm.as_str(), &known, "vms");
            }
        }
        if let Some(cluster) = &manifest.cluster {
            for host in cluster.fencing.keys() {
                let one = BTreeSet::from([host.clone()]);
                self.hosts(&["cluster", "fencing"], &one);
            }
        }
    }

    fn known(&mut self, path: &[&str], what: &str, name: &str, known: &[String], section: &str) {
        if known.iter().any(|k| k == name) {
            return;
        }
        let near = suggest::nearest(name, known.iter().map(String::as_str));
        let hint = match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("add it under `{section}:`"),
        };
        self.report(path, format!("unknown {what} `{name}`"), hint);
    }

    fn hosts(&mut self, path: &[&str], hosts: &BTreeSet<HostName>) {
        if self.all.hosts.is_empty() {
            return;
        }
        for host in hosts {
            if self.all.hosts.contains(host) {
                continue;
            }
            let known = names(self.all.hosts.iter());
            let hint = suggest::hint(
                host.as_str(),
                "hosts of this cluster",
                known.iter().map(String::as_str),
            );
            let mut path = path.to_vec();
            path.push(host.as_str());
            self.report(
                &path,
                format!("unknown host `{host}`"),
                hint.unwrap_or_default(),
            );
        }
    }
}

fn names<'a, T: AsRef<str> + 'a>(names: impl Iterator<Item = &'a T>) -> Vec<String> {
    names.map(|name| name.as_ref().to_owned()).collect()
}
