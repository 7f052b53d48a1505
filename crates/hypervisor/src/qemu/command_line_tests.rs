//! Golden command lines: what a machine looks like is a compatibility matter, since a guest migrates
//! only between equal ones.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use super::*;
use crate::config::{Accel, DiskFormat};
use crate::guest::SavedState;

fn config() -> GuestConfig {
    GuestConfig {
        name: "db".into(),
        uuid: "6c0f7a52-5d0f-4a43-9d6a-0b8f3d1f5a01".into(),
        cpus: 2,
        memory_mib: 256,
        machine: "pc-q35-10.0".into(),
        accel: Accel::Tcg,
        cpu_model: "max".into(),
        boot: Boot::Kernel {
            kernel: "/img/vmlinuz".into(),
            initrd: Some("/img/initrd".into()),
            append: "console=ttyS0 ip=10.0.0.2,x".into(),
        },
        disks: vec![
            DiskConfig {
                id: "root".into(),
                source: DiskSource::File("/pool/db.qcow2".into()),
                format: DiskFormat::Qcow2,
                read_only: false,
                serial: Some("db-root".into()),
                direct: Some(true),
            },
            DiskConfig {
                id: "seed".into(),
                source: DiskSource::File("/pool/a,b.img".into()),
                format: DiskFormat::Raw,
                read_only: true,
                serial: None,
                direct: None,
            },
        ],
        nics: vec![NicConfig {
            id: "lan".into(),
            mac: "52:54:00:00:00:01".into(),
            ifname: "qr-db-0".into(),
        }],
        serial_log: "/log/db,1.log".into(),
        guest_agent: true,
        runtime_dir: PathBuf::from("/run/q/db"),
        sandbox: true,
    }
}

/// One argument pair a line, which is how a reviewer wants to see a change.
fn text(config: &GuestConfig, mode: &StartMode) -> String {
    let mut text = String::new();
    for argument in command_line(config, mode) {
        let separator = if text.is_empty() {
            ""
        } else if argument.starts_with('-') {
            "\n"
        } else {
            " "
        };
        text.push_str(separator);
        text.push_str(&argument);
    }
    text
}

const Q35: &str = r#"-name guest=db,debug-threads=on
-uuid 6c0f7a52-5d0f-4a43-9d6a-0b8f3d1f5a01
-nodefaults
-no-user-config
-display none
-msg timestamp=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine pc-q35-10.0,memory-backend=ram0
-accel tcg
-cpu max
-smp 2
-m size=256M
-object {"id":"ram0","qom-type":"memory-backend-ram","size":268435456}
-kernel /img/vmlinuz
-initrd /img/initrd
-append console=ttyS0 ip=10.0.0.2,x
-pidfile /run/q/db/qemu.pid
-chardev socket,id=qmp,path=/run/q/db/qmp.sock,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=guard,path=/run/q/db/guard.sock,server=on,wait=off
-mon chardev=guard,mode=control
-chardev socket,id=console,path=/run/q/db/console.sock,server=on,wait=off,logfile=/log/db,,1.log,logappend=on
-serial chardev:console
-blockdev {"discard":"unmap","driver":"qcow2","file":{"aio":"threads","cache":{"direct":true,"no-flush":false},"discard":"unmap","driver":"file","filename":"/pool/db.qcow2","locking":"on","node-name":"file0","read-only":false},"node-name":"disk0","read-only":false}
-device {"drive":"disk0","driver":"virtio-blk-pci","id":"blk0","rerror":"stop","serial":"db-root","werror":"stop"}
-blockdev {"discard":"unmap","driver":"raw","file":{"aio":"threads","cache":{"direct":false,"no-flush":false},"discard":"unmap","driver":"file","filename":"/pool/a,b.img","locking":"on","node-name":"file1","read-only":true},"node-name":"disk1","read-only":true}
-device {"drive":"disk1","driver":"virtio-blk-pci","id":"blk1","rerror":"stop","werror":"stop"}
-netdev {"downscript":"no","id":"net0","ifname":"qr-db-0","script":"no","type":"tap","vhost":false}
-device {"driver":"virtio-net-pci","id":"nic0","mac":"52:54:00:00:00:01","netdev":"net0","romfile":""}
-object {"filename":"/dev/urandom","id":"rng0","qom-type":"rng-random"}
-device {"driver":"virtio-rng-pci","id":"vrng0","rng":"rng0"}
-chardev socket,id=agent,path=/run/q/db/agent.sock,server=on,wait=off
-device {"driver":"virtio-serial-pci","id":"vser0"}
-device {"chardev":"agent","driver":"virtserialport","id":"agent0","name":"org.qemu.guest_agent.0"}
-device {"driver":"pvpanic-pci","id":"panic0"}"#;

#[test]
fn q35_boots_a_kernel() {
    assert_eq!(text(&config(), &StartMode::Boot), Q35);
}

#[test]
fn a_target_and_a_restore_differ_only_by_incoming() {
    let saved = SavedState {
        path: "/pool/db.state".into(),
        mapped_ram: true,
    };
    for mode in [StartMode::Incoming, StartMode::Restore(saved)] {
        assert_eq!(text(&config(), &mode), format!("{Q35}\n-incoming defer"));
    }
}

#[test]
fn microvm_uses_mmio_devices_and_no_acpi() {
    let mut config = config();
    config.machine = "microvm".into();
    config.sandbox = false;
    let line = command_line(&config, &StartMode::Boot);
    assert!(line.contains(&"microvm,acpi=off,isa-serial=on,memory-backend=ram0".to_owned()));
    let text = line.join(" ");
    for driver in [
        "virtio-blk-device",
        "virtio-net-device",
        "virtio-rng-device",
        "virtio-serial-device",
    ] {
        assert!(text.contains(driver), "{driver} is missing in {text}");
    }
    for absent in ["-pci", "romfile", "-sandbox"] {
        assert!(!text.contains(absent), "{absent} does not belong in {text}");
    }
}

#[test]
fn a_disk_boot_takes_the_first_disk_through_the_firmware() {
    let mut config = config();
    config.boot = Boot::Disk;
    let text = text(&config, &StartMode::Boot);
    assert_eq!(text.matches("\"bootindex\":0").count(), 1);
    assert!(!text.contains("-kernel") && !text.contains("-append"));
}

#[test]
fn node_names_lead_back_to_disks() {
    assert_eq!(disk_of_node(&disk_node(3)), Some(3));
    assert_eq!(disk_of_node("file12"), Some(12));
    assert_eq!(disk_of_node("#block123"), None);
}

#[test]
fn validation_names_the_problem() {
    let problem = |change: fn(&mut GuestConfig)| {
        let mut config = config();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    };
    config().validate().unwrap();
    assert!(problem(|c| c.name = "a b".into()).contains("name"));
    assert!(problem(|c| c.uuid = "x".into()).contains("UUID"));
    assert!(problem(|c| c.cpus = 0).contains("cpus"));
    assert!(problem(|c| c.disks[1].id = "root".into()).contains("twice"));
    assert!(problem(|c| c.nics[0].mac = "52:54".into()).contains("address"));
    assert!(problem(|c| c.nics[0].ifname = "sixteen-letters!".into()).contains("interface"));
    assert!(problem(|c| c.runtime_dir = "/x".repeat(60).into()).contains("too long"));
    assert!(
        problem(|c| {
            c.boot = Boot::Disk;
            c.machine = "microvm".into();
        })
        .contains("microvm")
    );
}

#[test]
fn a_unit_of_a_san_is_opened_by_qemu_and_its_password_stays_out_of_the_arguments() {
    let mut config = config();
    config.disks[0].source = DiskSource::Iscsi(crate::disk::IscsiDisk {
        portal: "10.0.0.5:3260".into(),
        target: "iqn.2026-01.com.example:db".into(),
        lun: 1,
        initiator: "iqn.2026-01.local.quorate:c1.h1".into(),
        user: Some("quorate".into()),
        password: Some(crate::disk::Password("hush".into())),
    });
    config.disks[1].source = DiskSource::HostDevice("/dev/disk/by-id/scsi-1".into());
    let mut third = config.disks[1].clone();
    third.source = DiskSource::Rbd(crate::disk::RbdDisk {
        pool: "vms".into(),
        image: "db".into(),
        conf: "/etc/ceph/ceph.conf".into(),
        user: "quorate".into(),
        key: Some(crate::disk::Password("hush".into())),
    });
    config.disks.push(third);
    let line = command_line(&config, &StartMode::Boot).join(" ");
    assert!(!line.contains("hush"), "{line}");
    for part in [
        r#"{"file":"/run/q/db/secret0","id":"secret0","qom-type":"secret"}"#,
        r#""driver":"iscsi","initiator-name":"iqn.2026-01.local.quorate:c1.h1","lun":1"#,
        r#""password-secret":"secret0","portal":"10.0.0.5:3260""#,
        r#""driver":"rbd","image":"db","key-secret":"secret2""#,
        r#""driver":"host_device","filename":"/dev/disk/by-id/scsi-1""#,
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}
