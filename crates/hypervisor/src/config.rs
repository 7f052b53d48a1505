//! What a guest is made of, as the driver sees it.
//!
//! Owns: [`GuestConfig`] and its validation. It is stored in the guest's runtime directory, so that
//! a restarted daemon adopts a guest with the configuration it was really started with.
//!
//! Must not: hold anything about ownership (epoch, lease); that belongs to the agent's ledger.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::disk::{DiskConfig, DiskFormat, DiskSource, IscsiDisk, Password, RbdDisk};
use crate::error::HypervisorError;
use crate::guest::SavedState;

/// Longest path that fits a unix socket address, the terminating zero included.
const SOCKET_PATH_MAX_BYTES: usize = 108;
/// The longest file name that is placed in a runtime directory.
const LONGEST_SOCKET_NAME: &str = "console.sock";

/// How the guest's CPUs are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accel {
    /// The name QEMU knows it by.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What the guest starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// A kernel that QEMU loads itself.
    Kernel {
        /// Path of the kernel image.
        kernel: PathBuf,
        /// Path of the initial RAM file system.
        initrd: Option<PathBuf>,
        /// The kernel command line.
        append: String,
    },
    /// The first disk, through the firmware.
    Disk,
}

/// One network card, attached to a tap device that exists already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicConfig {
    /// Name of the card, unique in the guest.
    pub id: String,
    /// Hardware address, as `52:54:00:12:34:56`.
    pub mac: String,
    /// The tap interface made by the network driver.
    pub ifname: String,
}

/// Everything needed to start a guest on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Name of the VM; for people and process lists.
    pub name: String,
    /// Identity of the VM, as the guest's firmware reports it.
    pub uuid: String,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Machine type: `microvm`, or a versioned one such as `pc-q35-10.0` (an alias like `q35` names
    /// different machines in different versions and so cannot migrate between them).
    pub machine: String,
    /// How CPUs are executed.
    pub accel: Accel,
    /// CPU model; all hosts the guest may move to must offer it.
    pub cpu_model: String,
    /// What the guest starts from.
    pub boot: Boot,
    /// Disks, in the order the guest numbers them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network cards, in the order the guest numbers them.
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// File that receives what the guest writes to its serial port.
    pub serial_log: PathBuf,
    /// Offer the channel for a guest agent.
    #[serde(default)]
    pub guest_agent: bool,
    /// Directory for sockets, the process record and QEMU's log. One guest each.
    pub runtime_dir: PathBuf,
    /// Confine QEMU's system calls (needs a QEMU with seccomp; the probe says).
    #[serde(default = "yes")]
    pub sandbox: bool,
}

fn yes() -> bool {
    true
}

/// What a started QEMU does first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartMode {
    /// Boot the guest.
    Boot,
    /// Wait for [`crate::Vm::listen`], then for the guest to arrive.
    Incoming,
    /// Load what [`crate::Vm::save`] wrote, then run it.
    Restore(SavedState),
}

/// Names of the files in a guest's runtime directory.
#[derive(Debug, Clone)]
pub struct RuntimePaths {
    /// The directory.
    pub dir: PathBuf,
}

impl RuntimePaths {
    /// The files of the guest that lives in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
        }
    }
    /// QMP socket of the agent.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }
    /// QMP socket of the guard process: its own, since a QMP server talks to one client at a time.
    #[must_use]
    pub fn guard(&self) -> PathBuf {
        self.dir.join("guard.sock")
    }
    /// The serial port, for `vm console`. One client at a time; it must keep reading, since a full
    /// socket stalls the guest's writes to the port.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join(LONGEST_SOCKET_NAME)
    }
    /// Channel to the guest agent.
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }
    /// The pid, written and locked by QEMU.
    #[must_use]
    pub fn pidfile(&self) -> PathBuf {
        self.dir.join("qemu.pid")
    }
    /// What QEMU wrote to its standard error.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }
    /// A password that QEMU reads at its start; gone as soon as it has.
    #[must_use]
    pub fn secret(&self, index: usize) -> PathBuf {
        self.dir.join(format!("secret{index}"))
    }
    /// The process record that adoption reads.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.dir.join("guest.json")
    }
}

impl GuestConfig {
    /// The files of this guest.
    #[must_use]
    pub fn paths(&self) -> RuntimePaths {
        RuntimePaths::new(&self.runtime_dir)
    }

    /// Whether the machine is a `microvm`: virtio over MMIO, no PCI, no ACPI.
    #[must_use]
    pub fn is_microvm(&self) -> bool {
        self.machine.split(',').next() == Some("microvm")
    }

    /// Checks what QEMU would refuse late or with an unclear message.
    ///
    /// # Errors
    /// [`HypervisorError::InvalidConfig`] names the first problem and how to mend it.
    pub fn validate(&self) -> Result<(), HypervisorError> {
        let fail = |problem: String| {
            Err(HypervisorError::InvalidConfig {
                vm: self.name.clone(),
                problem,
            })
        };
        if !is_name(&self.name, 63) {
            return fail("the name must be 1 to 63 letters, digits, '.', '_' or '-'".into());
        }
        if !is_uuid(&self.uuid) {
            return fail(format!(
                "'{}' is not a UUID (8-4-4-4-12 hex digits)",
                self.uuid
            ));
        }
        if self.cpus == 0 || self.cpus > 255 {
            return fail(format!("cpus is {}; give 1 to 255", self.cpus));
        }
        if self.memory_mib < 16 {
            return fail(format!(
                "memory is {} MiB; give at least 16",
                self.memory_mib
            ));
        }
        if self.is_microvm() && self.boot == Boot::Disk {
            return fail("a microvm boots a kernel directly; give boot.kernel or use q35".into());
        }
        if self.boot == Boot::Disk && self.disks.is_empty() {
            return fail("it boots from a disk but has none; add a disk or boot a kernel".into());
        }
        let longest = self.runtime_dir.join(LONGEST_SOCKET_NAME);
        if longest.as_os_str().len() >= SOCKET_PATH_MAX_BYTES {
            return fail(format!(
                "the runtime directory {} is too long for unix sockets; use a shorter path",
                self.runtime_dir.display()
            ));
        }
        self.validate_devices().or_else(fail)
    }

    fn validate_devices(&self) -> Result<(), String> {
        let mut ids = BTreeSet::new();
        for disk in &self.disks {
            if !is_name(&disk.id, 63) || !ids.insert(disk.id.as_str()) {
                return Err(format!("disk id '{}' is malformed or used twice", disk.id));
            }
            disk.validate()?;
        }
        let mut ids = BTreeSet::new();
        for nic in &self.nics {
            if !is_name(&nic.id, 63) || !ids.insert(nic.id.as_str()) {
                return Err(format!("NIC id '{}' is malformed or used twice", nic.id));
            }
            if !is_mac(&nic.mac) {
                return Err(format!(
                    "NIC '{}' has the malformed address '{}'",
                    nic.id, nic.mac
                ));
            }
            if nic.ifname.is_empty() || nic.ifname.len() > 15 {
                return Err(format!(
                    "NIC '{}': interface names have 1 to 15 bytes",
                    nic.id
                ));
            }
        }
        Ok(())
    }
}

fn is_name(text: &str, max_len: usize) -> bool {
    !text.is_empty()
        && text.len() <= max_len
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn is_uuid(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12])
        && parts
            .iter()
            .all(|part| part.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6
        && parts
            .iter()
            .all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
}
