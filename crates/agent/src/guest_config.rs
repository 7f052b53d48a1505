//! From what the cluster wants to what the drivers are told.
//!
//! Always holds: everything that the guest sees is a function of the definition, the cluster and the VM's
//! name, so both sides of a migration make the same machine.

use quorate_hypervisor::{
    Accel, Boot, DiskConfig, DiskFormat, DiskSource, GuestConfig, NicConfig, config::RuntimePaths,
};
use quorate_network::{Announcement, MacAddr, TapSpec, nic_mac, tap_name};
use quorate_state::{GuestAbi, State};
use quorate_types::spec;
use quorate_types::{NetworkName, VmName, VmSpec};

use std::path::{Path, PathBuf};

/// Files of the VMs below the agent's directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
}

impl Layout {
    /// Sockets, record and log of the guest's process.
    pub(crate) fn runtime(&self, vm: &VmName) -> PathBuf {
        self.guests().join(vm.as_str())
    }

    pub(crate) fn guests(&self) -> PathBuf {
        self.dir.join("run")
    }

    pub(crate) fn paths(&self, vm: &VmName) -> RuntimePaths {
        RuntimePaths::new(&self.runtime(vm))
    }

    pub(crate) fn serial_log(&self, vm: &VmName) -> PathBuf {
        self.dir.join("log").join(format!("{vm}.serial.log"))
    }

    /// How long the serial log was when the guest's process was made.
    pub(crate) fn serial_begins(&self, vm: &VmName) -> PathBuf {
        self.runtime(vm).join("serial.begins")
    }

    /// One directory for each export of a copy.
    pub(crate) fn exports(&self) -> PathBuf {
        self.dir.join("exports")
    }

    /// Files of the BGP speaker.
    pub(crate) fn speaker(&self) -> PathBuf {
        self.dir.join("bgp")
    }

    pub(crate) fn ledger(&self) -> PathBuf {
        self.dir.join("ledger.redb")
    }

    pub(crate) fn guard_socket(&self) -> PathBuf {
        self.dir.join("guard.sock")
    }

    pub(crate) fn guard_log(&self) -> PathBuf {
        self.dir.join("log").join("guard.log")
    }
}

/// One NIC as the network driver is told.
#[derive(Debug, Clone)]
pub(crate) struct Nic {
    pub(crate) network: NetworkName,
    pub(crate) bridge: quorate_network::BridgeSpec,
    pub(crate) tap: TapSpec,
    pub(crate) announcement: Announcement,
}

/// The NICs of a VM.
///
/// # Errors
/// A network that the cluster does not have, or a malformed address.
pub(crate) fn nics(
    state: &State,
    cluster_id: &str,
    vm: &VmName,
    spec: &VmSpec,
    muted: bool,
) -> Result<Vec<Nic>, String> {
    let one = |(index, nic): (usize, &spec::NicSpec)| {
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let network = state.networks.get(&nic.network);
        let network =
            network.ok_or_else(|| format!("NIC {index}: there is no network {}", nic.network))?;
        let mac = match &nic.mac {
            Some(text) => text
                .parse::<MacAddr>()
                .map_err(|error| format!("NIC {index}: {error}"))?,
            None => nic_mac(cluster_id, vm.as_str(), number),
        };
        let bridge = quorate_network::BridgeSpec {
            name: network.spec.bridge.clone(),
            uplink: network.spec.uplink.clone(),
            mtu: network.spec.mtu,
        };
        let announcement = Announcement {
            bridge: bridge.name.clone(),
            mac,
            address: nic.address,
        };
        let tap = TapSpec {
            ifname: tap_name(vm.as_str(), number),
            bridge: bridge.name.clone(),
            guest_mac: mac,
            nic: format!("{vm}/{index}"),
            owner_uid: None,
            muted,
        };
        Ok(Nic {
            network: nic.network.clone(),
            bridge,
            tap,
            announcement,
        })
    };
    spec.nics.iter().enumerate().map(one).collect()
}

/// The guest as the hypervisor is told; `disks` say where the images are, in order.
#[allow(clippy::too_many_arguments)] // the sources of one configuration
pub(crate) fn guest_config(
    layout: &Layout,
    cluster_id: &str,
    vm: &VmName,
    spec: &VmSpec,
    abi: &GuestAbi,
    accel: Accel,
    sandbox: bool,
    disks: &[DiskSource],
    nics: &[Nic],
) -> GuestConfig {
    let disk = |(index, (disk, source)): (usize, (&spec::DiskSpec, &DiskSource))| DiskConfig {
        id: format!("disk{index}"),
        source: source.clone(),
        format: match disk.format {
            spec::DiskFormat::Raw => DiskFormat::Raw,
            spec::DiskFormat::Qcow2 => DiskFormat::Qcow2,
        },
        read_only: false,
        serial: None,
        direct: None,
    };
    let nic = |(index, nic): (usize, &Nic)| NicConfig {
        id: format!("nic{index}"),
        mac: nic.tap.guest_mac.to_string(),
        ifname: nic.tap.ifname.clone(),
    };
    GuestConfig {
        name: vm.to_string(),
        uuid: uuid(cluster_id, vm),
        cpus: spec.cpus,
        memory_mib: spec.memory.as_mib(),
        machine: abi.machine.clone(),
        accel,
        cpu_model: abi.cpu_model.clone(),
        boot: match &spec.boot {
            spec::Boot::Disk => Boot::Disk,
            spec::Boot::Kernel(boot) => Boot::Kernel {
                kernel: Path::new(&boot.kernel).to_owned(),
                initrd: boot.initrd.as_ref().map(PathBuf::from),
                append: boot.append.clone(),
            },
        },
        disks: spec.disks.iter().zip(disks).enumerate().map(disk).collect(),
        nics: nics.iter().enumerate().map(nic).collect(),
        serial_log: layout.serial_log(vm),
        guest_agent: true,
        runtime_dir: layout.runtime(vm),
        sandbox,
    }
}

/// A UUID (version 8: made by the application) that is the same on every host.
fn uuid(cluster_id: &str, vm: &VmName) -> String {
    let half = |salt: u8| {
        // FNV-1a: spreads well enough for names, and is stable for ever.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let bytes = cluster_id
            .bytes()
            .chain([0, salt])
            .chain(vm.as_str().bytes());
        for byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        hash
    };
    let high = (half(1) & !0xf000) | 0x8000;
    let low = (half(2) & !(0xc000 << 48)) | (0x8000 << 48);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_well_formed_stable_and_distinct() {
        let name = |text| VmName::new(text).unwrap();
        let db = uuid("c1", &name("db"));
        assert_eq!(db, uuid("c1", &name("db")));
        assert_ne!(db, uuid("c2", &name("db")));
        assert_ne!(db, uuid("c1", &name("db2")));
        let lengths: Vec<_> = db.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(&db[14..15], "8");
    }
}
