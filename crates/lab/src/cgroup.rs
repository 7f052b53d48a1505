//! One cgroup per host: everything of a host is frozen or ended at one instant.
//!
//! Where cgroup v2 cannot be used, the supervisor finds the host's processes by their network
//! namespace instead.

use std::io;
use std::path::{Path, PathBuf};

/// A host's cgroup.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup; `None` where there is no cgroup v2 that may be written, or it cannot kill.
    pub(crate) fn create(site: &str, host: &str) -> Option<Self> {
        let dir = mounted()?.join("quorate-lab").join(site).join(host);
        std::fs::create_dir_all(&dir).ok()?;
        dir.join("cgroup.kill").exists().then_some(Self { dir })
    }

    /// Removes the cgroups of a site, ending what is left in them.
    pub(crate) fn remove_site(site: &str) {
        let Some(dir) = mounted().map(|mount| mount.join("quorate-lab").join(site)) else {
            return;
        };
        let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        for host in entries.filter(|entry| entry.path().is_dir()) {
            let cgroup = Self { dir: host.path() };
            let _ = cgroup.kill();
            // The kernel removes a cgroup only when its last process has been collected.
            let second = std::time::Duration::from_secs(1);
            let step = std::time::Duration::from_millis(5);
            let _ = crate::wait::until("empty cgroup", second, step, || {
                let removed = std::fs::remove_dir(&cgroup.dir);
                (removed.is_ok() || !cgroup.dir.exists()).then_some(())
            });
        }
        let _ = std::fs::remove_dir(&dir);
        let _ = dir.parent().map(std::fs::remove_dir);
    }

    /// The file that takes the pid of a new member.
    pub(crate) fn members_file(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Pids of the members, zombies included.
    pub(crate) fn members(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.members_file()).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    pub(crate) fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// SIGKILL to every member at once, frozen ones too.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        std::fs::write(self.dir.join(file), value)
    }
}

/// Where cgroup v2 is mounted.
fn mounted() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (target, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| Path::new(target).to_owned())
    })
}
