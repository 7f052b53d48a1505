//! Services: found by the rules that the state has too, told where they stand in the file.

use super::{Checker, Problem};
use quorate_types::service_check::{Site, find};

impl Checker<'_> {
    pub(super) fn services(&mut self) {
        let manifest = self.manifest;
        let site = Site {
            networks: self.all.networks.iter().collect(),
            vms: self.all.vms.iter().collect(),
            services: self.all.services.iter().collect(),
        };
        for found in find(&site) {
            let service = found.service.as_str();
            // Where the manifest has a part in it: the service, the other service, or the VM.
            let path = match (&found.vm, &found.other) {
                _ if manifest.services.contains_key(&found.service) => {
                    [vec!["services".to_owned(), service.to_owned()], found.path].concat()
                }
                (_, Some(other)) if manifest.services.contains_key(other) => {
                    vec!["services".to_owned(), other.to_string()]
                }
                (Some((vm, path)), _) if manifest.vms.contains_key(vm) => {
                    [vec!["vms".to_owned(), vm.to_string()], path.clone()].concat()
                }
                _ => continue,
            };
            let hint = Some(found.hint).filter(|hint| !hint.is_empty());
            self.problems.push(Problem {
                path,
                message: found.message,
                hint,
            });
        }
        self.guests_in_subnets();
    }

    /// A guest's own address outside its network is a slip of the pen.
    fn guests_in_subnets(&mut self) {
        let manifest = self.manifest;
        for (name, vm) in &manifest.vms {
            for (index, nic) in vm.nics.iter().enumerate() {
                let network = self.all.networks.get(&nic.network).cloned();
                for address in nic.addresses() {
                    let subnet = network.as_ref().and_then(|of| of.subnet_for(address));
                    let Some(subnet) = subnet.filter(|subnet| !subnet.contains(address)) else {
                        continue;
                    };
                    let field = match nic.address == Some(address) {
                        true => "address",
                        false => "address6",
                    };
                    let path = ["vms", name.as_str(), "nics", &index.to_string(), field];
                    let message =
                        format!("{address} is not in network `{}` ({subnet})", nic.network);
                    self.report(&path, message, "choose an address of the network's subnet");
                }
            }
        }
    }
}
