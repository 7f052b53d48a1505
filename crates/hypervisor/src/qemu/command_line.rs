//! QEMU's command line, from a [`GuestConfig`]. Pure.
//!
//! Always holds:
//! - nothing that is not named here exists in the machine (`-nodefaults -no-user-config`), and the same
//!   configuration gives the same machine on every host, so that it can migrate;
//! - every block node has a name (`disk0` over `file0`, in the order of the configuration), the
//!   images' locks are on, and a failing disk pauses the guest instead of telling it;
//! - a target has no `-S`: it runs by itself at the end of the stream, so that the blackout has no
//!   round trip of ours in it.
//!
//! Must not: name anything that can change while the guest lives, such as certificates; those are
//! given over QMP when they are needed.

use serde_json::{Value, json};

use crate::config::{Boot, DiskConfig, DiskSource, GuestConfig, NicConfig, StartMode};

/// The system calls QEMU may not make: no programs, no privileges, no priorities.
pub(crate) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// A command that a SAN does not answer for this long is tried again over a new connection; after some such tries the
/// guest is paused by an I/O error. Without it a guest would hang and nothing would say so.
const COMMAND_TIMEOUT_S: u32 = 5;
/// Name of the guest agent's port, fixed by the agent.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// The name of the block node that the guest's disk number `index` is.
#[must_use]
pub fn disk_node(index: usize) -> String {
    format!("disk{index}")
}

/// The name of the node below it, which has the bytes.
#[must_use]
pub fn file_node(index: usize) -> String {
    format!("file{index}")
}

/// The number of the disk whose format or file node this is.
#[must_use]
pub fn disk_of_node(node: &str) -> Option<usize> {
    node.strip_prefix("disk")
        .or_else(|| node.strip_prefix("file"))?
        .parse()
        .ok()
}

/// The arguments with which QEMU runs this guest (the program itself left out).
#[must_use]
pub fn command_line(config: &GuestConfig, mode: &StartMode) -> Vec<String> {
    let mut line = Line::default();
    line.pair(
        "-name",
        format!("guest={},debug-threads=on", escape(&config.name)),
    );
    line.pair("-uuid", config.uuid.clone());
    line.one("-nodefaults").one("-no-user-config");
    line.pair("-display", "none");
    line.pair("-msg", "timestamp=on");
    if config.sandbox {
        line.pair("-sandbox", SANDBOX);
    }
    machine(&mut line, config);
    boot(&mut line, config);
    control(&mut line, config);
    let bus = if config.is_microvm() { "device" } else { "pci" };
    for (index, disk) in config.disks.iter().enumerate() {
        add_disk(&mut line, config, bus, index, disk);
    }
    for (index, nic) in config.nics.iter().enumerate() {
        add_nic(&mut line, bus, index, nic);
    }
    line.json(
        "-object",
        json!({ "qom-type": "rng-random", "id": "rng0", "filename": "/dev/urandom" }),
    );
    line.json(
        "-device",
        json!({ "driver": format!("virtio-rng-{bus}"), "id": "vrng0", "rng": "rng0" }),
    );
    if config.guest_agent {
        guest_agent(&mut line, config, bus);
    }
    if !config.is_microvm() {
        line.json(
            "-device",
            json!({ "driver": "pvpanic-pci", "id": "panic0" }),
        );
    }
    if matches!(mode, StartMode::Incoming | StartMode::Restore(_)) {
        line.pair("-incoming", "defer");
    }
    line.0
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn one(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.to_owned());
        self
    }
    fn pair(&mut self, flag: &str, value: impl Into<String>) {
        self.0.extend([flag.to_owned(), value.into()]);
    }
    fn json(&mut self, flag: &str, value: Value) {
        self.pair(flag, value.to_string());
    }
}

/// QEMU's own quoting: a comma in a value is written twice.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

fn path(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

fn machine(line: &mut Line, config: &GuestConfig) {
    let options = if config.is_microvm() {
        // This machine's ACPI leaves stock kernels without their devices; without it QEMU announces
        // them on the kernel's command line.
        ",acpi=off,isa-serial=on"
    } else {
        ""
    };
    line.pair(
        "-machine",
        format!("{}{options},memory-backend=ram0", config.machine),
    );
    line.pair("-accel", config.accel.as_str());
    line.pair("-cpu", config.cpu_model.clone());
    line.pair("-smp", config.cpus.to_string());
    line.pair("-m", format!("size={}M", config.memory_mib));
    let bytes = config.memory_mib << 20;
    line.json(
        "-object",
        json!({ "qom-type": "memory-backend-ram", "id": "ram0", "size": bytes }),
    );
}

fn boot(line: &mut Line, config: &GuestConfig) {
    if let Boot::Kernel {
        kernel,
        initrd,
        append,
    } = &config.boot
    {
        line.pair("-kernel", path(kernel));
        if let Some(initrd) = initrd {
            line.pair("-initrd", path(initrd));
        }
        line.pair("-append", append.clone());
    }
}

fn control(line: &mut Line, config: &GuestConfig) {
    let paths = config.paths();
    line.pair("-pidfile", path(&paths.pidfile()));
    for (id, socket) in [("qmp", paths.qmp()), ("guard", paths.guard())] {
        let socket = escape(&path(&socket));
        line.pair(
            "-chardev",
            format!("socket,id={id},path={socket},server=on,wait=off"),
        );
        line.pair("-mon", format!("chardev={id},mode=control"));
    }
    let socket = escape(&path(&paths.console()));
    let log = escape(&path(&config.serial_log));
    line.pair(
        "-chardev",
        format!("socket,id=console,path={socket},server=on,wait=off,logfile={log},logappend=on"),
    );
    line.pair("-serial", "chardev:console");
}

fn secret_id(index: usize) -> String {
    format!("secret{index}")
}

/// The node that has the bytes.
fn protocol(index: usize, disk: &DiskConfig) -> Value {
    let mut node = match &disk.source {
        DiskSource::File(file) => json!({
            "driver": "file",
            "filename": path(file),
            "locking": "on",
            "aio": "threads",
        }),
        DiskSource::HostDevice(device) => json!({
            "driver": "host_device",
            "filename": path(device),
            "aio": "threads",
        }),
        DiskSource::Iscsi(unit) => {
            let mut node = json!({
                "driver": "iscsi",
                "transport": "tcp",
                "portal": unit.portal,
                "target": unit.target,
                "lun": unit.lun,
                "initiator-name": unit.initiator,
                "timeout": COMMAND_TIMEOUT_S,
            });
            if let Some(user) = &unit.user {
                node["user"] = json!(user);
                node["password-secret"] = json!(secret_id(index));
            }
            node
        }
        DiskSource::Rbd(disk) => {
            let mut node = json!({
                "driver": "rbd",
                "pool": disk.pool,
                "image": disk.image,
                "conf": disk.conf,
                "user": disk.user,
            });
            if disk.key.is_some() {
                node["key-secret"] = json!(secret_id(index));
            }
            node
        }
    };
    node["node-name"] = json!(file_node(index));
    node["read-only"] = json!(disk.read_only);
    node["cache"] = json!({ "direct": disk.direct.unwrap_or(false), "no-flush": false });
    node["discard"] = json!("unmap");
    node
}

fn add_disk(line: &mut Line, config: &GuestConfig, bus: &str, index: usize, disk: &DiskConfig) {
    let node = disk_node(index);
    if disk.password().is_some() {
        let file = path(&config.paths().secret(index));
        line.json(
            "-object",
            json!({ "qom-type": "secret", "id": secret_id(index), "file": file }),
        );
    }
    let file = protocol(index, disk);
    line.json(
        "-blockdev",
        json!({
            "driver": disk.format.as_str(),
            "node-name": node,
            "read-only": disk.read_only,
            "discard": "unmap",
            "file": file,
        }),
    );
    let mut device = json!({
        "driver": format!("virtio-blk-{bus}"),
        "id": format!("blk{index}"),
        "drive": node,
        "werror": "stop",
        "rerror": "stop",
    });
    if let Some(serial) = &disk.serial {
        device["serial"] = json!(serial);
    }
    if index == 0 && config.boot == Boot::Disk {
        device["bootindex"] = json!(0);
    }
    line.json("-device", device);
}

fn add_nic(line: &mut Line, bus: &str, index: usize, nic: &NicConfig) {
    line.json(
        "-netdev",
        json!({
            "type": "tap",
            "id": format!("net{index}"),
            "ifname": nic.ifname,
            "script": "no",
            "downscript": "no",
            "vhost": false,
        }),
    );
    let mut device = json!({
        "driver": format!("virtio-net-{bus}"),
        "id": format!("nic{index}"),
        "netdev": format!("net{index}"),
        "mac": nic.mac,
    });
    if bus == "pci" {
        device["romfile"] = json!(""); // no network boot; its option ROM only costs time
    }
    line.json("-device", device);
}

fn guest_agent(line: &mut Line, config: &GuestConfig, bus: &str) {
    let socket = escape(&path(&config.paths().agent()));
    line.pair(
        "-chardev",
        format!("socket,id=agent,path={socket},server=on,wait=off"),
    );
    line.json(
        "-device",
        json!({ "driver": format!("virtio-serial-{bus}"), "id": "vser0" }),
    );
    line.json(
        "-device",
        json!({ "driver": "virtserialport", "id": "agent0", "chardev": "agent", "name": AGENT_PORT }),
    );
}

#[cfg(test)]
#[path = "command_line_tests.rs"]
mod tests;
