//! Pools: values of their fields, and disks that name units of a SAN.

use super::Checker;
use quorate_types::pool::{AccessControl, check_iscsi_name};
use quorate_types::spec::{DiskFormat, DiskSpec};
use quorate_types::{IscsiPool, PoolSpec, RbdPool};

impl Checker<'_> {
    pub(super) fn pool(&mut self, name: &str, pool: &PoolSpec) {
        match pool {
            PoolSpec::Directory { path, .. } => {
                self.absolute(&["pools", name, "path"], path, "a pool's path");
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
            Some(PoolSpec::Directory { .. }) | None => return false,
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
}
