//! Values of single fields that their type lets through.

use super::Checker;
use quorate_types::spec::{Boot, DiskSpec, KernelBoot, Machine, Probe, ReadyCheck};
use quorate_types::{NetworkSpec, VmName, VmSpec};

/// Longest name of a Linux network interface.
const MAX_INTERFACE: usize = 15;
/// Most disks and NICs of a VM.
const MAX_DEVICES: usize = 16;
/// Least memory of a VM, in MiB.
const MIN_MEMORY_MIB: u64 = 1;
/// Longest kernel command line.
const MAX_COMMAND_LINE: usize = 2047;

impl Checker<'_> {
    pub(super) fn fields(&mut self) {
        let manifest = self.manifest;
        if let Some(cluster) = &manifest.cluster {
            if let Err(message) = cluster.check() {
                let field = message.split(' ').next().unwrap_or_default().to_owned();
                let path: Vec<&str> = std::iter::once("cluster").chain(field.split('.')).collect();
                self.report(&path, message, "");
            }
            for (host, devices) in &cluster.fencing {
                for (index, device) in devices.iter().enumerate() {
                    let bad = device.agent.contains('/') && !device.agent.starts_with('/');
                    if bad || device.agent.chars().any(char::is_whitespace) {
                        let path = [
                            "cluster",
                            "fencing",
                            host.as_str(),
                            &index.to_string(),
                            "agent",
                        ];
                        let message = format!(
                            "`{}` is neither a program's name nor an absolute path",
                            device.agent
                        );
                        self.report(&path, message, "write `fence_ipmilan` or `/usr/sbin/fence_ipmilan`; parameters go under `options:`");
                    }
                }
            }
        }
        for (name, network) in &manifest.networks {
            self.network(name.as_str(), network);
        }
        for (name, pool) in &manifest.pools {
            self.pool(name.as_str(), pool);
        }
        for (name, vm) in &manifest.vms {
            self.vm(name, vm);
        }
        for (name, rule) in &manifest.rules {
            if rule.vms().len() < 2 {
                let message = format!("the rule `{name}` names fewer than two VMs");
                self.report(
                    &["rules", name.as_str()],
                    message,
                    "list at least two VMs, or remove the rule",
                );
            }
        }
    }

    fn network(&mut self, name: &str, network: &NetworkSpec) {
        self.interface(&["networks", name, "bridge"], &network.bridge);
        if let Some(uplink) = &network.uplink {
            self.interface(&["networks", name, "uplink"], uplink);
            if *uplink == network.bridge {
                self.report(
                    &["networks", name, "uplink"],
                    format!("`{uplink}` cannot be its own uplink"),
                    "name the physical interface, or leave `uplink` out",
                );
            }
        }
    }

    fn interface(&mut self, path: &[&str], name: &str) {
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        let length = name.len();
        if length > MAX_INTERFACE {
            let message = format!(
                "`{name}` has {length} characters; an interface name has at most {MAX_INTERFACE}"
            );
            self.report(path, message, "shorten it");
        } else if name.is_empty() || matches!(name, "." | "..") || name.chars().any(bad) {
            let message = format!("`{name}` is not a valid interface name");
            self.report(path, message, "use letters, digits and `-`, as in `br-lan`");
        }
    }

    pub(super) fn absolute(&mut self, path: &[&str], value: &str, what: &str) {
        if !value.starts_with('/') {
            let message = format!("`{value}` is not an absolute path");
            self.report(
                path,
                message,
                format!("{what} starts with `/` and is the same on every host"),
            );
        } else if value.split('/').any(|part| part == "..") {
            let message = format!("`{value}` contains `..`");
            self.report(path, message, "write the path without it");
        } else if value.chars().any(|c| c.is_control() || c == ',') {
            let message = "the path contains a comma or a control character";
            self.report(path, message, "rename the directory or file");
        }
    }

    fn vm(&mut self, name: &VmName, vm: &VmSpec) {
        let here = name.as_str();
        if vm.cpus == 0 {
            self.report(&["vms", here, "cpus"], "a VM needs at least 1 CPU", "");
        }
        if vm.memory.as_mib() < MIN_MEMORY_MIB {
            let message = format!("{} is too little memory for a VM", vm.memory);
            self.report(
                &["vms", here, "memory"],
                message,
                "write for example `512MiB`",
            );
        }
        if vm.depends_on.contains_key(name) {
            let message = format!("`{name}` depends on itself");
            self.report(
                &["vms", here, "depends_on", here],
                message,
                "remove this entry",
            );
        }
        for (field, count) in [("disks", vm.disks.len()), ("nics", vm.nics.len())] {
            if count > MAX_DEVICES {
                let message =
                    format!("{count} {field} are more than the {MAX_DEVICES} that a VM can have");
                self.report(&["vms", here, field], message, "");
            }
        }
        self.boot(here, vm);
        for (index, disk) in vm.disks.iter().enumerate() {
            let index = index.to_string();
            self.disk(here, &index, disk);
            self.own_disk(here, &index, vm, disk);
        }
        for (index, nic) in vm.nics.iter().enumerate() {
            if let Some(mac) = &nic.mac {
                self.mac(&["vms", here, "nics", &index.to_string(), "mac"], mac);
            }
        }
        if let Some(ready) = &vm.ready {
            self.ready(here, ready);
        }
    }

    fn boot(&mut self, here: &str, vm: &VmSpec) {
        match &vm.boot {
            Boot::Disk if vm.machine == Machine::Microvm => self.report(
                &["vms", here, "machine"],
                "a microvm cannot boot from a disk: it has no firmware",
                "add `boot: {kernel: {kernel: /path/on/the/hosts}}`, or use `machine: q35`",
            ),
            Boot::Disk if vm.disks.is_empty() => self.report(
                &["vms", here],
                format!("`{here}` boots from its first disk but has none"),
                "add one under `disks:`, or boot a kernel with `boot: {kernel: {kernel: /path/on/the/hosts}}`",
            ),
            Boot::Disk => {}
            Boot::Kernel(KernelBoot { kernel, initrd, append }) => {
                let path = ["vms", here, "boot", "kernel", "kernel"];
                self.absolute(&path, kernel, "the kernel's path");
                if let Some(initrd) = initrd {
                    let path = ["vms", here, "boot", "kernel", "initrd"];
                    self.absolute(&path, initrd, "the initrd's path");
                }
                if append.len() > MAX_COMMAND_LINE || append.chars().any(char::is_control) {
                    self.report(
                        &["vms", here, "boot", "kernel", "append"],
                        format!("the kernel command line must be one line of at most {MAX_COMMAND_LINE} bytes"),
                        "",
                    );
                }
            }
        }
    }

    fn disk(&mut self, here: &str, index: &str, disk: &DiskSpec) {
        let path = ["vms", here, "disks", index, "image"];
        let image = disk.image.as_str();
        if self.unit(&path, disk) {
            return;
        }
        if image.starts_with('/') {
            let message = format!("`{image}` is an absolute path");
            self.report(&path, message, "write the image's path inside its pool");
        } else if image.split('/').any(|part| part == "..") {
            let message = format!("`{image}` leads out of its pool");
            self.report(&path, message, "an image lies inside its pool: remove `..`");
        } else if image.split('/').any(|part| part.is_empty() || part == ".") {
            let parts: Vec<&str> = image
                .split('/')
                .filter(|part| !part.is_empty() && *part != ".")
                .collect();
            let message = format!("`{image}` is not a plain relative path");
            self.report(&path, message, format!("write `{}`", parts.join("/")));
        } else if image.split('/').any(|part| part.starts_with('.')) {
            let message = format!("`{image}` has a hidden part");
            self.report(
                &path,
                message,
                "names that start with `.` are kept for the cluster's own files",
            );
        } else if image.chars().any(|c| c.is_control() || c == ',') {
            self.report(
                &path,
                "the image's name contains a comma or a control character",
                "rename the file",
            );
        }
        if let Some(size) = disk.size
            && (size.0 == 0 || size.0 % 512 != 0)
        {
            let path = ["vms", here, "disks", index, "size"];
            let message = format!("{size} is not a possible size of a disk");
            self.report(
                &path,
                message,
                "use a multiple of 512 bytes above 0, for example `16GiB`",
            );
        }
    }

    fn mac(&mut self, path: &[&str], mac: &str) {
        let parts: Vec<&str> = mac.split(':').collect();
        let octets: Option<Vec<u8>> = parts
            .iter()
            .map(|part| {
                (part.len() == 2)
                    .then(|| u8::from_str_radix(part, 16).ok())
                    .flatten()
            })
            .collect();
        match octets {
            Some(octets) if octets.len() == 6 => {
                if octets[0] & 1 == 1 {
                    let message = format!("`{mac}` is a group address");
                    self.report(
                        path,
                        message,
                        "the first octet must be even, as in `52:54:00:12:34:56`",
                    );
                } else if octets[..2] == [0x02, 0x51] {
                    let message = format!("`{mac}` is one of the service datapath's own addresses");
                    self.report(path, message, "take one that does not begin with `02:51`");
                } else if octets.iter().all(|o| *o == 0) {
                    let message = format!("`{mac}` is no address");
                    self.report(path, message, "leave `mac` out and a stable one is derived");
                }
            }
            _ => {
                let message = format!("`{mac}` is not a MAC address");
                let hint =
                    "write six pairs of hex digits, as in `52:54:00:12:34:56`, or leave `mac` out";
                self.report(path, message, hint);
            }
        }
    }

    fn ready(&mut self, here: &str, ready: &ReadyCheck) {
        if ready.timeout.0 == 0 {
            let path = ["vms", here, "ready", "timeout"];
            self.report(
                &path,
                "a timeout of 0 can never be met",
                "write for example `2m`",
            );
        }
        match &ready.probe {
            Probe::Tcp(probe) if probe.port == 0 => {
                let path = ["vms", here, "ready", "probe", "tcp", "port"];
                self.report(&path, "port 0 is no port", "");
            }
            Probe::Http(probe) if !probe.path.starts_with('/') => {
                let path = ["vms", here, "ready", "probe", "http", "path"];
                let message = format!("`{}` is not a path of a request", probe.path);
                self.report(&path, message, format!("write `/{}`", probe.path));
            }
            Probe::Serial(text) if text.trim().is_empty() => {
                let path = ["vms", here, "ready", "probe", "serial"];
                self.report(&path, "the text to wait for is empty", "");
            }
            _ => {}
        }
    }
}
