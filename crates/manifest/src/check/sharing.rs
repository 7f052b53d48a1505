//! Things that only one object may have: images, directories, bridges, addresses.

use super::Checker;
use quorate_types::{NetworkName, PoolName, PoolSpec, VmName};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Who has a thing first: an object of what exists before one of the manifest.
type Holders<K> = BTreeMap<K, VmName>;

impl Checker<'_> {
    pub(super) fn sharing(&mut self) {
        self.bridges();
        self.directories();
        let mut images: Holders<String> = BTreeMap::new();
        let mut macs: Holders<String> = BTreeMap::new();
        let mut addresses: Holders<(NetworkName, IpAddr)> = BTreeMap::new();
        for (name, vm, touched) in self.vms_existing_first() {
            let here = name.as_str();
            for (index, disk) in vm.disks.iter().enumerate() {
                let key = match self.all.pools.get(&disk.pool) {
                    Some(pool) => pool.identity(&disk.pool, &disk.image),
                    None => format!("{}/{}", disk.pool, disk.image),
                };
                let path = ["vms", here, "disks", &index.to_string(), "image"];
                if let Some(purpose) = self.all.reserved.get(&key)
                    && touched
                {
                    let message = format!(
                        "the image `{}` in pool `{}` is {purpose}",
                        disk.image, disk.pool
                    );
                    self.report(&path, message, "no VM may use it: choose another");
                }
                if let Some(other) = images.insert(key, name.clone())
                    && touched
                {
                    let message = format!(
                        "the image `{}` in pool `{}` is used by `{other}` already",
                        disk.image, disk.pool
                    );
                    self.report(
                        &path,
                        message,
                        "one image belongs to one VM: choose another name",
                    );
                }
            }
            for (index, nic) in vm.nics.iter().enumerate() {
                let index = index.to_string();
                if let Some(mac) = &nic.mac
                    && let Some(other) = macs.insert(mac.to_lowercase(), name.clone())
                    && touched
                {
                    let path = ["vms", here, "nics", &index, "mac"];
                    let message = format!("the MAC address `{mac}` is used by `{other}` already");
                    self.report(
                        &path,
                        message,
                        "leave `mac` out and a unique one is derived",
                    );
                }
                for address in nic.addresses() {
                    let key = (nic.network.clone(), address);
                    let Some(other) = addresses.insert(key, name.clone()).filter(|_| touched)
                    else {
                        continue;
                    };
                    let field = match nic.address == Some(address) {
                        true => "address",
                        false => "address6",
                    };
                    let path = ["vms", here, "nics", &index, field];
                    let message = format!(
                        "the address {address} in network `{}` is used by `{other}` already",
                        nic.network
                    );
                    self.report(&path, message, "give each VM its own address");
                }
            }
        }
    }

    /// All VMs, those that the manifest does not touch first.
    fn vms_existing_first(&self) -> Vec<(VmName, quorate_types::VmSpec, bool)> {
        let mut vms: Vec<_> = self
            .all
            .vms
            .iter()
            .map(|(name, vm)| {
                (
                    name.clone(),
                    vm.clone(),
                    self.manifest.vms.contains_key(name),
                )
            })
            .collect();
        vms.sort_by_key(|(_, _, touched)| *touched);
        vms
    }

    fn bridges(&mut self) {
        let manifest = self.manifest;
        for (name, network) in &manifest.networks {
            let other = self.all.networks.iter().find(|(other, spec)| {
                let earlier = !manifest.networks.contains_key(*other) || *other < name;
                earlier && *other != name && spec.bridge == network.bridge
            });
            if let Some((other, _)) = other {
                let message = format!(
                    "the bridge `{}` belongs to the network `{other}` already",
                    network.bridge
                );
                self.report(
                    &["networks", name.as_str(), "bridge"],
                    message,
                    "one bridge is one network: name another bridge",
                );
            }
        }
    }

    /// One file must not be reachable under two names.
    fn directories(&mut self) {
        let manifest = self.manifest;
        for (name, pool) in &manifest.pools {
            let Some(path) = pool.path() else { continue };
            let overlapping = |(other, spec): (&'_ PoolName, &PoolSpec)| {
                let theirs = spec.path()?;
                let earlier = !manifest.pools.contains_key(other) || other < name;
                let overlaps = inside(path, theirs) || inside(theirs, path);
                (earlier && other != name && overlaps).then(|| (other.clone(), theirs.to_owned()))
            };
            if let Some((other, theirs)) = self.all.pools.iter().find_map(overlapping) {
                let message = format!("`{path}` overlaps with `{theirs}` of the pool `{other}`");
                self.report(
                    &["pools", name.as_str(), "path"],
                    message,
                    "an image must belong to one pool only: use separate directories",
                );
            }
        }
    }
}

/// `inner` is `outer` or lies below it.
fn inside(inner: &str, outer: &str) -> bool {
    let parts = |path: &str| -> Vec<String> {
        path.split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .map(str::to_owned)
            .collect()
    };
    parts(inner).starts_with(&parts(outer))
}
