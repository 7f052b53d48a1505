//! The lab guest from the lab's side: where its image is, how it is started, how its disk is judged.

use crate::lab::Lab;
use crate::tools::acks::AckReport;
use crate::{LabError, Result};
use quorate_guest::verify::{Verdict, verify};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where `scripts/build-debian-guest.sh` puts the disk, below the build folder.
const DEBIAN_DISK: &str = "lab-cache/debian/disk.img";
/// Address of the Debian guest, as its build sets it.
pub const DEBIAN_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 50);
/// What the Debian guest says on its console when it answers HTTP.
pub const DEBIAN_READY: &str = "quorate: debian guest ready";

/// Kernel and initial RAM file system of the lab guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: PathBuf,
}

impl GuestImage {
    /// Finds the image: `QUORATE_GUEST_DIR`, or `lab/guest` beside the program's own build folder.
    pub fn find() -> Result<Self> {
        let given = std::env::var_os("QUORATE_GUEST_DIR").map(PathBuf::from);
        let program = std::env::current_exe().unwrap_or_default();
        let near = program.ancestors().map(|folder| folder.join("lab/guest"));
        let dir = given
            .into_iter()
            .chain(near)
            .find(|dir| dir.join("initrd.img").exists());
        let Some(dir) = dir else {
            return Err(LabError::File {
                verb: "find the lab guest (build it with `make guest`), wanted",
                path: PathBuf::from("target/lab/guest/initrd.img"),
                source: std::io::ErrorKind::NotFound.into(),
            });
        };
        Ok(Self {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
        })
    }

    /// Copies the image to where all hosts see it.
    pub fn copy_to(&self, dir: &Path) -> Result<Self> {
        let copy = Self {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
        };
        for (from, to) in [(&self.kernel, &copy.kernel), (&self.initrd, &copy.initrd)] {
            std::fs::copy(from, to).map_err(LabError::file("write", to))?;
        }
        Ok(copy)
    }
}

/// The kernel command line of a guest; `extra` holds more `qr.` words.
#[must_use]
pub fn command_line(name: &str, address: Ipv4Addr, extra: &str) -> String {
    let line = format!(
        "console=ttyS0 quiet panic=-1 qr.name={name} qr.ip={address}/24 qr.disk=/dev/vda {extra}"
    );
    line.trim_end().to_owned()
}

/// Makes an empty raw image for a guest's log.
pub fn make_disk(path: &Path, mebibytes: u64) -> Result<()> {
    std::fs::File::create(path)
        .and_then(|file| file.set_len(mebibytes * 1024 * 1024))
        .map_err(LabError::file("create", path))
}

/// Judges a guest's raw image against what the client saw acknowledged.
pub fn judge(image: &Path, acknowledged: &AckReport) -> Result<Verdict> {
    std::fs::File::open(image)
        .and_then(|file| verify(file, &acknowledged.ranges))
        .map_err(LabError::file("judge", image))
}

/// The disk of the lab's Debian guest: `QUORATE_DEBIAN_IMAGE`, or where the build puts it, beside the program's own
/// build folder.
pub fn find_debian() -> Result<PathBuf> {
    let given = std::env::var_os("QUORATE_DEBIAN_IMAGE").map(PathBuf::from);
    let program = std::env::current_exe().unwrap_or_default();
    let near = program.ancestors().map(|folder| folder.join(DEBIAN_DISK));
    let found = given.into_iter().chain(near).find(|path| path.exists());
    found.ok_or_else(|| LabError::File {
        verb: "find the Debian guest (build it with `make guest-debian`), wanted",
        path: Path::new("target").join(DEBIAN_DISK),
        source: std::io::ErrorKind::NotFound.into(),
    })
}

impl Lab {
    /// Judges a guest's log on a LUN of the SAN. The LUN is read where the SAN keeps it, so no session and no
    /// access is needed; all that the SAN has acknowledged is there, also while it is off. Nobody may be writing.
    pub fn judge_lun(&self, name: &str, acknowledged: &AckReport) -> Result<Verdict> {
        judge(&self.san()?.backing_file(name)?, acknowledged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_guest::config::Config;

    #[test]
    fn the_guest_understands_its_command_line() {
        let address = Ipv4Addr::new(10, 77, 0, 11);
        let (config, bad) = Config::parse(&command_line("db", address, "qr.dirty_mib=8"));
        assert!(bad.is_empty());
        assert_eq!(config.name, "db");
        assert_eq!(config.ip.as_deref(), Some("10.77.0.11/24"));
        assert_eq!(config.dirty_mib, 8);
    }
}
