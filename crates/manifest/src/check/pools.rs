//! Pools: values of their fields, and disks that name units of a SAN or are on particular hosts.

use super::Checker;
use quorate_types::pool::{AccessControl, check_iscsi_name};
use quorate_types::spec::{DiskFormat, DiskSpec, MigrationPolicy};
use quorate_types::{IscsiPool, PoolSpec, RbdPool, VmSpec};

impl Checker<'_> {
    pub(super) fn pool(&mut self, name: &str, pool: &PoolSpec) {
        match pool {
            PoolSpec::Directory { path, .. } => {
                self.absolute(&["pools", name, "path"], path, "a pool's path");
            }
            PoolSpec::Local(pool) => {
                self.absolute(&["pools", name, "path"], &pool.path, "a pool's path");
            }
            PoolSpec::Mirrored(pool) => {
                self.absolute(&["pools", name, "path"], &pool.path, "a pool's path");
                if pool.hosts.len() == 1 {
                    let message = "a mirrored pool has its disks on two hosts, and one is listed";
                    let hint = "add a second host, or use `kind: local`";
                    self.report(&["pools", name, "hosts"], message, hint);
                }
            }
            PoolSpec::Iscsi(pool) => self.iscsi(name, pool),
            PoolSpec::Rbd(pool) => self.rbd(name, pool),
            PoolSpec::Block(pool) => {
                self.absolute(
                    &["pools", name, "path"],
                    &pool.path,
                    "the devices' directory",
                );
            }
        }
    }

    fn rbd(&mut self, name: &str, pool: &RbdPool) {
        self.absolute(
            &["pools", name, "conf"],
            &pool.conf,
            "the configuration's path",
        );
        let bad =
            |text: &str| text.is_empty() || text.starts_with('-') || text.contains(['/', '@', ' ']);
        for (field, value) in [("ceph_pool", &pool.ceph_pool), ("user", &pool.user)] {
            if bad(value) {
                let message = format!("`{value}` is not a name in Ceph");
                self.report(&["pools", name, field], message, "");
            }
        }
    }

    fn iscsi(&mut self, name: &str, pool: &IscsiPool) {
        if pool.portals.is_empty() {
            let message = "the pool has no portal";
            self.report(
                &["pools", name, "portals"],
                message,
                "list one, as in `portals: [10.0.0.5]`",
            );
        }
        for (index, portal) in pool.portals().enumerate() {
            if portal.parse::<std::net::SocketAddr>().is_err() {
                let message = format!("`{}` is not an address", pool.portals[index]);
                let hint = "write an IP address, with a port if it is not 3260: `10.0.0.5`, `10.0.0.5:3261`, `[fd00::5]:3260`";
                self.report(
                    &["pools", name, "portals", &index.to_string()],
                    message,
                    hint,
                );
            }
        }
        if let Err(message) = check_iscsi_name(&pool.target) {
            self.report(&["pools", name, "target"], message, "");
        }
        if let Some(Err(message)) = pool.initiator.as_deref().map(check_iscsi_name) {
            self.report(&["pools", name, "initiator"], message, "");
        }
        if let Some(AccessControl::Exec(exec)) = &pool.access {
            let program = exec.command.first().map_or("", String::as_str);
            if !program.starts_with('/') {
                let message = format!("`{program}` is not an absolute path");
                let hint = "name the program by its path on the hosts; its arguments follow";
                self.report(&["pools", name, "access", "exec", "command"], message, hint);
            }
        }
    }

    /// Checks a disk of a pool that holds whole units; false: it is an image file.
    pub(super) fn unit(&mut self, path: &[&str], disk: &DiskSpec) -> bool {
        let problem = match self.all.pools.get(&disk.pool) {
            Some(PoolSpec::Iscsi(pool)) => pool.lun_of(&disk.image).err(),
            Some(PoolSpec::Block(_) | PoolSpec::Rbd(_)) => {
                let bad = disk.image.contains('/') || disk.image.starts_with('.');
                bad.then(|| {
                    format!(
                        "`{}` is not the name of a device or image in the pool",
                        disk.image
                    )
                })
            }
            Some(PoolSpec::Directory { .. } | PoolSpec::Local(_) | PoolSpec::Mirrored(_))
            | None => {
                return false;
            }
        };
        if let Some(message) = problem {
            self.report(path, message, "");
        }
        if disk.format != DiskFormat::Raw {
            let mut format: Vec<&str> = path.to_vec();
            format.pop();
            format.push("format");
            let message = format!(
                "`{}` is a whole unit of a SAN, which QEMU uses as it is",
                disk.image
            );
            self.report(&format, message, "write `format: raw`, or leave it out");
        }
        true
    }

    /// Checks a disk of a pool that is the hosts' own.
    pub(super) fn own_disk(&mut self, vm: &str, index: &str, spec: &VmSpec, disk: &DiskSpec) {
        let Some(pool) = self.all.pools.get(&disk.pool) else {
            return;
        };
        if !pool.is_hosts_own() {
            return;
        }
        let (kind, mirrored) = (pool.kind(), pool.is_mirrored());
        if mirrored && disk.format != DiskFormat::Raw {
            let message = "the copy of a mirrored disk is one of its bytes: its format is `raw`";
            let path = ["vms", vm, "disks", index, "format"];
            self.report(&path, message, "leave `format` out");
        }
        if disk.size.is_none() && (mirrored || spec.hosts.len() != 1) {
            let message = format!("a disk of a {kind} pool is made where its VM starts first");
            let hint = match mirrored {
                true => "say how large it is with `size`",
                false => {
                    "say how large it is with `size`, or name the one host that has it in `hosts` of the VM"
                }
            };
            self.report(&["vms", vm, "disks", index], message, hint);
        }
        if spec.migration == MigrationPolicy::Quick {
            let message = format!("a quick migration cannot take a disk of a {kind} pool along");
            let hint = "use `migration: cold`, which starts it anew where it has a copy in step";
            self.report(&["vms", vm, "migration"], message, hint);
        }
    }
}
