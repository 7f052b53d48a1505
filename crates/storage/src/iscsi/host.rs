//! The host's own iSCSI initiator (open-iscsi): logs in to a target, and finds the block device of a unit.
//!
//! Owns: one interface record for each pool, which carries the initiator's name, and one record for each target that the
//! pool logged in to. Those of others are left alone.
//!
//! ```text
//! session in /sys? --no--> records written, `iscsiadm --login` --> session --> device there? --no--> rescan --> device
//!        '-------------------------yes-----------------------------^
//! ```
//! Always holds: a session counts only if it is of this target and of this initiator; a password is written to the record
//! of the target, which only root reads, and is in no argument; no call outlives its deadline. Nobody logs out: a unit's
//! reservation decides who writes, not a session.
//!
//! Why `/sys` and not the tools' lists: a look costs no process, and says what the kernel has now. A name below
//! `/dev/disk/by-path` is given where udev has made one, because `/dev/sdX` may be another disk after the next login.

use crate::{Login, PoolError};
use quorate_types::Lun;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

/// For a login and what follows.
const LOGIN_WITHIN: Duration = Duration::from_secs(15);
/// Between two looks for a device.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// For udev to name a device that is there.
const NAMED_WITHIN: Duration = Duration::from_secs(2);
/// Longest name of an interface record that open-iscsi takes.
const INTERFACE_NAME_MAX: usize = 60;
/// LUNs from 256 on are told by the kernel with the address method of SAM in front: flat space.
const FLAT_SPACE: u32 = 0x4000;

/// The tool that talks to the initiator's daemon.
#[async_trait::async_trait]
pub(super) trait Tool: std::fmt::Debug + Send + Sync + 'static {
    /// Runs it: exit code, and what it said last.
    async fn run(&self, words: &[&str], until: Instant) -> io::Result<(i32, String)>;

    /// Whether it is there.
    fn is_installed(&self) -> bool;
}

/// `iscsiadm`.
#[derive(Debug)]
pub(super) struct Iscsiadm;

#[async_trait::async_trait]
impl Tool for Iscsiadm {
    async fn run(&self, words: &[&str], until: Instant) -> io::Result<(i32, String)> {
        let mut command = Command::new("iscsiadm");
        command.args(words).env("LC_ALL", "C").kill_on_drop(true);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = timeout_at(until, command.output()).await;
        let output = output.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = said.lines().rev().find(|line| !line.trim().is_empty());
        let said = last.unwrap_or("it said nothing").trim().to_owned();
        Ok((output.status.code().unwrap_or(-1), said))
    }

    fn is_installed(&self) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join("iscsiadm").is_file())
    }
}

/// Where the system has things, and how long it may take.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub(super) sys: PathBuf,
    pub(super) dev: PathBuf,
    /// Where open-iscsi keeps its records: distributions differ.
    pub(super) records: Vec<PathBuf>,
    /// It is there where udev runs.
    pub(super) udev: PathBuf,
    /// For a login, and for the kernel to find the units behind it.
    pub(super) login_within: Duration,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            dev: "/dev".into(),
            records: vec!["/etc/iscsi".into(), "/var/lib/iscsi".into()],
            udev: "/run/udev/control".into(),
            login_within: LOGIN_WITHIN,
        }
    }
}

/// The host's initiator, as one pool uses it.
#[derive(Debug)]
pub(super) struct HostInitiator {
    pool: String,
    initiator: String,
    login: Option<Login>,
    places: Places,
    tool: Arc<dyn Tool>,
    /// One login at a time: two for the same target would be two sessions.
    turn: Mutex<()>,
}

/// A session of the kernel.
struct KernelSession {
    /// `session3`.
    name: String,
    works: bool,
}

impl HostInitiator {
    pub(super) fn new(
        pool: &str,
        initiator: &str,
        login: Option<Login>,
        places: Places,
        tool: Arc<dyn Tool>,
    ) -> Self {
        Self {
            pool: pool.to_owned(),
            initiator: initiator.to_owned(),
            login,
            places,
            tool,
            turn: Mutex::new(()),
        }
    }

    /// Whether this host has one at all.
    pub(super) fn check(&self) -> Result<(), PoolError> {
        match self.tool.is_installed() {
            true => Ok(()),
            false => Err(self.cannot_run("looking for it", &io::ErrorKind::NotFound.into())),
        }
    }

    /// The device of a unit that this host is logged in to.
    pub(super) fn attached(&self, unit: &Lun) -> Option<PathBuf> {
        let sessions = self.sessions(&unit.target).into_iter();
        let disk = sessions
            .filter(|session| session.works)
            .find_map(|session| self.disk(&session, unit.lun))?;
        Some(self.name_of(&disk, &unit.target))
    }

    /// Logs in to a unit's target through one of its portals (`address:port` and its group) unless it is done; its device.
    pub(super) async fn attach(
        &self,
        unit: &Lun,
        (portal, group): (&str, u16),
    ) -> Result<PathBuf, PoolError> {
        let until = Instant::now() + self.places.login_within;
        let _turn = self.turn.lock().await;
        if !self.is_logged_in(&unit.target) {
            self.log_in(&unit.target, portal, group, until).await?;
        }
        let (mut asked, mut seen) = (false, None);
        loop {
            let disk = || {
                let sessions = self.sessions(&unit.target).into_iter();
                sessions
                    .filter(|session| session.works)
                    .find_map(|session| self.disk(&session, unit.lun))
            };
            if let Some(disk) = disk() {
                // A device has a stable name a moment later, where somebody gives it one.
                let since = *seen.get_or_insert_with(Instant::now);
                let named = self.name_of(&disk, &unit.target);
                let plain = self.places.dev.join(&disk);
                let waits = self.places.udev.exists() && since.elapsed() < NAMED_WITHIN;
                if named != plain || !waits {
                    return Ok(named);
                }
            }
            if Instant::now() >= until {
                return Err(self.failed(
                    "finding a unit",
                    format!(
                        "{} has no LUN {} for {} within {} s of its login: map it to this initiator at the SAN, and look at the kernel log",
                        unit.target,
                        unit.lun,
                        self.initiator,
                        self.places.login_within.as_secs()
                    ),
                ));
            }
            if !asked && seen.is_none() && self.is_logged_in(&unit.target) {
                asked = true;
                self.rescan(unit, until).await?;
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Has the kernel look for new units of the target, and for sizes that changed.
    pub(super) async fn rescan(&self, unit: &Lun, until: Instant) -> Result<(), PoolError> {
        const OPERATION: &str = "looking for new units";
        for session in self.sessions(&unit.target) {
            let number = session.name.trim_start_matches("session");
            let words = ["-m", "session", "-r", number, "--rescan"];
            self.must(OPERATION, &words, &[0], until).await?;
        }
        Ok(())
    }

    fn is_logged_in(&self, target: &str) -> bool {
        self.sessions(target).iter().any(|session| session.works)
    }

    async fn log_in(
        &self,
        target: &str,
        portal: &str,
        group: u16,
        until: Instant,
    ) -> Result<(), PoolError> {
        const OPERATION: &str = "logging in";
        /// There is such a session.
        const EXISTS: i32 = 15;
        let interface = self.interface();
        self.name_interface(&interface, until).await?;
        let place = format!("{portal},{group}");
        let node = ["-m", "node", "-T", target, "-p", &place, "-I", &interface];
        let with = |more: &[&'static str]| [&node[..], more].concat();
        self.must(OPERATION, &with(&["-o", "new"]), &[0], until)
            .await?;
        self.write_record(target, portal, &interface)
            .map_err(|error| self.failed("writing a record of open-iscsi", error.to_string()))?;
        self.must(OPERATION, &with(&["--login"]), &[0, EXISTS], until)
            .await
    }

    fn interface(&self) -> String {
        let name = format!("quorate-{}", self.pool);
        name.chars().take(INTERFACE_NAME_MAX).collect()
    }

    /// The record that carries the initiator's name; the host's own name is left alone.
    async fn name_interface(&self, interface: &str, until: Instant) -> Result<(), PoolError> {
        const OPERATION: &str = "naming the initiator";
        let known = self.places.records.iter().any(|root| {
            let record = fs::read_to_string(root.join("ifaces").join(interface));
            let line = format!("iface.initiatorname = {}", self.initiator);
            record.is_ok_and(|text| text.lines().any(|known| known.trim() == line))
        });
        if known {
            return Ok(());
        }
        let record = ["-m", "iface", "-I", interface, "-o"];
        // Where it is there already, the change that follows is all there is to do.
        let make = [&record[..], &["new"]].concat();
        let made = self.tool.run(&make, until).await;
        made.map_err(|error| self.cannot_run(OPERATION, &error))?;
        let change = ["update", "-n", "iface.initiatorname", "-v", &self.initiator];
        self.must(OPERATION, &[&record[..], &change].concat(), &[0], until)
            .await
    }

    /// Sets what is ours in the record that the tool has made: no login at boot, and the account.
    fn write_record(&self, target: &str, portal: &str, interface: &str) -> io::Result<()> {
        let path = self.record_of(target, portal, interface)?;
        let settings = match &self.login {
            None => vec![("node.session.auth.authmethod", "None")],
            Some(login) => vec![
                ("node.session.auth.authmethod", "CHAP"),
                ("node.session.auth.username", login.user.as_str()),
                ("node.session.auth.password", login.password.as_str()),
            ],
        };
        if settings.iter().any(|(_, value)| value.contains('\n')) {
            return Err(io::Error::other("an account with a line break in it"));
        }
        let ours = settings.into_iter().chain([("node.startup", "manual")]);
        let text = merged(&fs::read_to_string(&path)?, &ours.collect::<Vec<_>>());
        let new = path.with_extension("quorate");
        let mut options = fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&new)?.write_all(text.as_bytes())?;
        fs::rename(&new, &path)
    }

    /// `nodes/TARGET/ADDRESS,PORT,GROUP/INTERFACE`.
    fn record_of(&self, target: &str, portal: &str, interface: &str) -> io::Result<PathBuf> {
        let (address, port) = portal.rsplit_once(':').unwrap_or((portal, "3260"));
        let bare = address.trim_start_matches('[').trim_end_matches(']');
        let begins = format!("{bare},{port},");
        let roots = self.places.records.iter();
        let found = roots
            .filter_map(|root| fs::read_dir(root.join("nodes").join(target)).ok())
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&begins))
            .map(|entry| entry.path().join(interface))
            .find(|record| record.is_file());
        found.ok_or_else(|| {
            io::Error::other(format!(
                "no record of {target} at {portal} below {}: is open-iscsi built with another folder?",
                self.places.records[0].display()
            ))
        })
    }

    /// Sessions with a target under our name, those that work first.
    fn sessions(&self, target: &str) -> Vec<KernelSession> {
        let all = self.places.sys.join("class/iscsi_session");
        let mut found: Vec<KernelSession> = names_in(&all)
            .into_iter()
            .filter_map(|name| {
                let says = |what: &str| {
                    let text = fs::read_to_string(all.join(&name).join(what));
                    text.unwrap_or_default().trim().to_owned()
                };
                let ours = says("targetname") == target && says("initiatorname") == self.initiator;
                let works = says("state") == "LOGGED_IN";
                ours.then_some(KernelSession { name, works })
            })
            .collect();
        found.sort_by_key(|session| !session.works);
        found
    }

    /// The kernel's name of a unit's disk: `sdb`.
    fn disk(&self, session: &KernelSession, lun: u32) -> Option<String> {
        let class = self.places.sys.join("class/iscsi_session");
        let device = class.join(&session.name).join("device");
        let targets = names_in(&device).into_iter();
        targets
            .filter(|name| name.starts_with("target"))
            .flat_map(|name| {
                let folder = device.join(name);
                names_in(&folder)
                    .into_iter()
                    .map(move |unit| folder.join(unit))
            })
            .filter(|unit| {
                let name = unit.file_name().map(|name| name.to_string_lossy());
                let number = name.and_then(|name| name.rsplit(':').next()?.parse::<u32>().ok());
                number == Some(lun) || number == Some(lun | FLAT_SPACE)
            })
            .find_map(|unit| names_in(&unit.join("block")).into_iter().next())
    }

    /// The best name of a disk: of the multipath map that has it, else the stable one that udev gave it, else the kernel's.
    fn name_of(&self, disk: &str, target: &str) -> PathBuf {
        let block = self.places.sys.join("block");
        for map in names_in(&block.join(disk).join("holders")) {
            let says = |what: &str| fs::read_to_string(block.join(&map).join("dm").join(what));
            if says("uuid").is_ok_and(|uuid| uuid.starts_with("mpath-"))
                && let Ok(name) = says("name")
            {
                return self.places.dev.join("mapper").join(name.trim());
            }
        }
        let by_path = self.places.dev.join("disk/by-path");
        let part = format!("-iscsi-{target}-lun-");
        let stable = names_in(&by_path).into_iter().find(|name| {
            let points_to = fs::read_link(by_path.join(name)).unwrap_or_default();
            name.contains(&part) && points_to.file_name().is_some_and(|to| to == disk)
        });
        match stable {
            Some(name) => by_path.join(name),
            None => self.places.dev.join(disk),
        }
    }

    async fn must(
        &self,
        operation: &'static str,
        words: &[&str],
        good: &[i32],
        until: Instant,
    ) -> Result<(), PoolError> {
        let done = self.tool.run(words, until).await;
        let (code, said) = done.map_err(|error| self.cannot_run(operation, &error))?;
        match good.contains(&code) {
            true => Ok(()),
            false => Err(self.failed(operation, explain(code, &said, &self.initiator))),
        }
    }

    fn cannot_run(&self, operation: &'static str, error: &io::Error) -> PoolError {
        let detail = match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no `iscsiadm`: install open-iscsi on every host of the pool, or let QEMU open its units (`opened_by: qemu`)"
                    .to_owned()
            }
            io::ErrorKind::TimedOut => format!(
                "iscsiadm did not end within {} s: is iscsid running, and does the portal answer?",
                self.places.login_within.as_secs()
            ),
            _ => format!("iscsiadm cannot be run: {error}"),
        };
        self.failed(operation, detail)
    }

    fn failed(&self, operation: &'static str, detail: String) -> PoolError {
        PoolError::HostInitiator {
            pool: self.pool.clone(),
            operation,
            detail,
        }
    }
}

/// What an exit code of iscsiadm (`iscsi_err.h`) asks for.
fn explain(code: i32, said: &str, initiator: &str) -> String {
    let hint = match code {
        4 | 8 => "the portal does not answer: check its address and the network to the SAN",
        6 => "the records of open-iscsi cannot be written: is its folder (/etc/iscsi) writable?",
        12 => "the kernel has no iSCSI transport: `modprobe iscsi_tcp`",
        13 => "the daemon needs root for it",
        18 | 20 => "iscsid does not answer: `systemctl enable --now iscsid.socket`",
        24 => {
            "the target refuses the login: check `chap.user`, its secret and the access list, here and at the target"
        }
        19 => "the target refuses the login: does it let this initiator in?",
        _ => "look at the log of iscsid",
    };
    format!("{hint} (as {initiator}; iscsiadm ended with {code}: {said})")
}

/// A record with these settings and no others of their names.
fn merged(record: &str, settings: &[(&str, &str)]) -> String {
    let name_of = |line: &str| line.split('=').next().unwrap_or_default().trim().to_owned();
    let ours = |line: &&str| {
        let name = name_of(line);
        !settings.iter().any(|(known, _)| *known == name)
    };
    let (kept, end): (Vec<&str>, Vec<&str>) = record
        .lines()
        .filter(ours)
        .partition(|line| !line.starts_with("# END"));
    let set = settings
        .iter()
        .map(|(name, value)| format!("{name} = {value}"));
    let lines = kept.into_iter().map(str::to_owned).chain(set);
    let lines = lines.chain(end.into_iter().map(str::to_owned));
    lines.map(|line| line + "\n").collect()
}

/// Names in a folder, in order; none where there is no such folder.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
