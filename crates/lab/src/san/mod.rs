//! The lab's SAN: `tgtd`, a userspace iSCSI target, in a namespace of its own on a network of its own.
//!
//! Owns: targets (one per LUN, so that access can be taken per LUN), their backing files, who may log
//! in, the SAN's power. Always holds: what `tgtd` was told last, by whomever, is there again after
//! [`San::kill`] and [`San::start`], as on an array with a battery: an initiator that was shut out stays
//! shut out. Must not: know which host may write; that is the cluster's business.
//!
//! ```text
//!   qr-h1  san0 10.79.0.1 ----.
//!   qr-h2  san0 10.79.0.2 ----+-- bridge sw-san (in qr-switch) -- san0 10.79.0.240:3260  qr-san
//!   ...                       '                                   tgtd, backing files in LAB/san/
//! ```
//! # The management path
//! `tgtadm -C NUMBER` talks to `tgtd -C NUMBER` by the socket `/var/run/tgtd/socket.NUMBER`. That is a
//! socket with a path, not an abstract one, so it is reached from every network namespace that sees the
//! machine's `/var/run`, which the lab's hosts do: they run plain `tgtadm -C NUMBER`, however their cables
//! are cut. (A management network that can be cut as well would need a wrapper.) The number is between 0
//! and 32766 (`tgtadm` takes no other), one per lab, taken from the lab's folder and the next free one if another `tgtd` holds it;
//! [`San::control`] says it. `tgtd` refuses to start while another one locks `socket.NUMBER.lock`; a stale
//! socket does no harm. `TGT_IPC_SOCKET` in the environment stands for `/var/run/tgtd/socket`.
//!
//! - A new target lets nobody in. `--op bind -Q INITIATOR` lets one in by name, `--op unbind` takes that
//!   away; sessions that exist go on until `--mode conn --op delete --tid T --sid S --cid C`, with T, S and C
//!   as `--mode target --op show` lists them. An initiator without access is told that there is no such target.
//! - A session is gone from that list when its last command has ended, so then nothing more is written. A session for which
//!   `tgtd` has unsent data (its host was cut while it was reading) stays there until the network lets go of the
//!   connection, which takes minutes; `ss -K dst HOST sport = :3260` in the SAN's namespace ends it at once.
//! - `--mode target --op delete --force` ends `tgtd` itself when commands are under way.
//! - A target with names lets in only these, also when an address or `ALL` is bound too.
//!
//! # Faults
//! [`San::kill`] is a power cut, [`San::start`] the return of power; [`San::pause`] (SIGSTOP) is a hang: connections
//! stay, nothing is answered. [`Lab::isolate`](crate::Lab::isolate) of `san`, [`Lab::cut`](crate::Lab::cut) of a host
//! and `san` and [`Lab::make_lossy`](crate::Lab::make_lossy) act on cables. [`Lab::slow`](crate::Lab::slow) limits how
//! much a cable carries each way (a token bucket of 4 KiB in the kernel, no session is dropped): at 512 kbit/s a
//! write of 4 KiB takes about 70 ms.

pub(crate) mod cli;
mod config;
mod keeper;
mod tgt;

pub use keeper::{KeepSanArgs, keep};
pub use tgt::{Session, Target, Unit};

use crate::net;
use crate::process::{Found, in_namespace, namespace_of, run};
use crate::site::{SAN, Site};
use crate::{LabError, Result, wait};
use config::Config;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::Signal;
use serde::Serialize;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tgt::Tgt;

/// Where `tgtd` listens until its configuration is complete.
const CONTROLLER: &str = "127.0.0.1:3259";
/// The LUN's number on its target; `tgtd` keeps 0 for itself.
pub const LUN_NUMBER: u32 = 1;
/// Begin of all target names.
pub const TARGET_PREFIX: &str = "iqn.2025-01.lab.quorate:";
/// Numbers of management sockets; `tgtd` refuses 32767 and more.
const CONTROLS: std::ops::Range<u16> = 1024..32_767;
/// For the SAN to open its door after its start, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// For processes to end or to stop after a signal.
const SIGNAL_LIMIT: Duration = Duration::from_secs(10);

/// Where initiators find the SAN.
fn portal(site: &Site) -> Result<String> {
    Ok(format!("{}:3260", site.san_address(SAN)?))
}

/// The SAN of a lab.
#[derive(Debug, Clone)]
pub struct San {
    site: Site,
}

/// A LUN as initiators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lun {
    /// Its name in the lab.
    pub name: String,
    /// Address and port.
    pub portal: String,
    /// The target's iSCSI name.
    pub target: String,
    /// The LUN's number.
    pub lun: u32,
    /// Its backing file, for looking behind the SAN's back.
    pub file: PathBuf,
}

impl Lun {
    /// As QEMU's tools name it: `iscsi://PORTAL/TARGET/LUN`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("iscsi://{}/{}/{}", self.portal, self.target, self.lun)
    }

    /// For `--image-opts` of QEMU's tools, and `-drive`, under an initiator's name.
    #[must_use]
    pub fn image_options(&self, initiator: &str) -> String {
        format!(
            "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={},file.target={},file.lun={},\
             file.initiator-name={initiator}",
            self.portal, self.target, self.lun
        )
    }
}

/// The SAN as it is now.
#[derive(Debug, Clone, Serialize)]
pub struct SanStatus {
    /// `tgtd` runs.
    pub running: bool,
    /// It is stopped (SIGSTOP).
    pub paused: bool,
    /// Address and port.
    pub portal: String,
    /// The number of its management socket, for `tgtadm -C`.
    pub control: u16,
    /// Its targets with their sessions; as last known while it does not answer.
    pub targets: Vec<Target>,
}

impl San {
    /// The SAN of a site.
    pub(crate) fn of(site: &Site) -> Result<Self> {
        site.check_part(SAN)?;
        Ok(Self { site: site.clone() })
    }

    /// The number for `tgtadm -C`, from any namespace.
    pub fn control(&self) -> Result<u16> {
        Ok(Config::load(&self.site)?.control)
    }

    /// Where initiators find the SAN: address and port.
    pub fn portal(&self) -> Result<String> {
        portal(&self.site)
    }

    // --- power -------------------------------------------------------------------------------

    /// Switches the SAN on; it has its old configuration when initiators can log in. Nothing to do when it runs.
    pub fn start(&self) -> Result<()> {
        run("tgtadm", &["--version"])?;
        if self.daemon().is_some() {
            return Ok(());
        }
        let dir = self.site.san_dir();
        std::fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
        let mut config = Config::load(&self.site)?;
        config.control = free_control(&self.site, config.control);
        config.save(&self.site)?;
        self.spawn_keeper()?;
        let tgt = Tgt::new(config.control);
        let door = self.portal()?;
        let (what, step) = ("start of the SAN", Duration::from_millis(10));
        let mut seen = false;
        let opened = wait::until(what, START_LIMIT, step, || {
            let running = !self.processes().is_empty();
            seen |= running;
            if seen && !running {
                return Some(false);
            }
            let shown = tgt.run("--mode portal --op show", &[]).ok()?;
            let open = shown.contains(&door) && !shown.contains(CONTROLLER);
            open.then_some(true)
        });
        if matches!(opened, Ok(true)) {
            return Ok(());
        }
        let said = std::fs::read_to_string(self.log()).unwrap_or_default();
        let last: Vec<&str> = said.lines().rev().take(3).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        Err(LabError::San {
            problem: format!("does not start: {}", last.join("; ")),
            log: self.log(),
        })
    }

    fn log(&self) -> PathBuf {
        self.site.san_dir().join("san.log")
    }

    fn spawn_keeper(&self) -> Result<()> {
        let path = self.log();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(LabError::file("write", &path))?;
        let errors = log.try_clone().map_err(LabError::file("write", &path))?;
        let namespace = net::namespace_path(&self.site.namespace(SAN));
        Command::new("setsid")
            .args(["--fork", "nsenter"])
            .arg(format!("--net={namespace}"))
            .args(&self.site.tool)
            .args(["keep-san", "--record"])
            .arg(self.site.record())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .status()
            .map(drop)
            .map_err(|source| LabError::MissingTool {
                tool: "setsid".to_owned(),
                source,
            })
    }

    /// Cuts the SAN's power. What it was told before is kept: its door for orders is closed first, then its
    /// configuration is written down, then it ends.
    pub fn kill(&self) -> Result<()> {
        let open = Tgt::new(self.control()?);
        let closed = open.aside();
        let answers = self.daemon().is_some_and(|found| found.state != 'T');
        if answers {
            std::fs::rename(open.path(), closed.path())
                .map_err(LabError::file("rename", open.path()))?;
            self.remember(&closed).inspect_err(|_| {
                let _ = std::fs::rename(closed.path(), open.path());
            })?;
        }
        let what = "end of the SAN";
        let done = wait::until(what, SIGNAL_LIMIT, Duration::from_millis(2), || {
            let found = self.processes();
            found
                .iter()
                .for_each(|process| process.signal(Signal::KILL));
            found.is_empty().then_some(())
        });
        let _ = std::fs::rename(closed.path(), open.path());
        done
    }

    /// Power cut and return of power.
    pub fn restart(&self) -> Result<()> {
        self.kill()?;
        self.start()
    }

    /// Stops `tgtd` (SIGSTOP): connections stay, nothing is answered.
    pub fn pause(&self) -> Result<()> {
        let daemon = self.running()?;
        self.remember(&Tgt::new(self.control()?))?;
        daemon.signal(Signal::STOP);
        let step = Duration::from_millis(2);
        wait::until("pause of the SAN", SIGNAL_LIMIT, step, || {
            self.daemon().filter(|found| found.state == 'T').map(drop)
        })
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.running()?.signal(Signal::CONT);
        Ok(())
    }

    fn running(&self) -> Result<Found> {
        self.daemon().ok_or_else(|| LabError::San {
            problem: "is not running; start it with `quorate lab start san`".to_owned(),
            log: self.log(),
        })
    }

    fn processes(&self) -> Vec<Found> {
        let namespace = net::namespace_path(&self.site.namespace(SAN));
        namespace_of(&namespace)
            .map(in_namespace)
            .unwrap_or_default()
    }

    fn daemon(&self) -> Option<Found> {
        self.processes().into_iter().find(|found| {
            let program = found.command.first().map(Path::new);
            program.and_then(Path::file_name) == Some("tgtd".as_ref())
        })
    }

    // --- LUNs --------------------------------------------------------------------------------

    /// Makes a LUN of zeroes on a target of its own; nobody may log in yet.
    pub fn create_lun(&self, name: &str, bytes: u64) -> Result<Lun> {
        let bad = |problem| LabError::BadLun {
            name: name.to_owned(),
            problem,
        };
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=32).contains(&name.len()) || !name.bytes().all(good) {
            return Err(bad("use 1 to 32 lower-case letters, digits and dashes"));
        }
        let tgt = self.tgt()?;
        let targets = tgt.targets()?;
        let target = format!("{TARGET_PREFIX}{name}");
        if targets.iter().any(|other| other.name == target) {
            return Err(bad("there is one"));
        }
        let file = self.site.san_dir().join(format!("{name}.img"));
        std::fs::File::create(&file)
            .and_then(|image| image.set_len(bytes))
            .map_err(LabError::file("create", &file))?;
        let taken = |id: u32| targets.iter().any(|other| other.id == id);
        tgt.make(&Target {
            id: (1..).find(|id| !taken(*id)).unwrap_or(u32::MAX),
            name: target,
            luns: vec![Unit {
                number: LUN_NUMBER,
                serial: name.to_owned(),
                file,
            }],
            ..Target::default()
        })?;
        self.remember(&tgt)?;
        self.lun(name)
    }

    /// Removes a LUN and what is on it; sessions are dropped.
    pub fn delete_lun(&self, name: &str) -> Result<()> {
        let tgt = self.tgt()?;
        let target = self.target(name)?;
        let users = target.initiators.iter();
        let users = users.chain(target.sessions.iter().map(|session| &session.initiator));
        for initiator in users {
            self.deny(name, initiator)?;
        }
        // Not with `--force`: with commands under way `tgtd` itself would end.
        let words = format!("--mode target --op delete --tid {}", target.id);
        tgt.run(&words, &[])?;
        self.remember(&tgt)?;
        for unit in &target.luns {
            std::fs::remove_file(&unit.file).map_err(LabError::file("remove", &unit.file))?;
        }
        Ok(())
    }

    /// A LUN as initiators see it.
    pub fn lun(&self, name: &str) -> Result<Lun> {
        let target = self.target(name)?;
        let file = target.luns.first().map(|unit| unit.file.clone());
        Ok(Lun {
            name: name.to_owned(),
            portal: self.portal()?,
            target: target.name,
            lun: LUN_NUMBER,
            file: file.unwrap_or_default(),
        })
    }

    /// Copies an image of any format that QEMU knows onto a LUN, as an initiator of the SAN's own does it. The LUN must be
    /// as it was made: only what is not zero is written.
    pub fn write_image(&self, name: &str, image: &Path) -> Result<()> {
        let image = image.to_string_lossy();
        self.convert(name, |options| {
            let words = ["-n", "--target-is-zero", "--target-image-opts"];
            let mut words: Vec<String> = words.map(str::to_owned).to_vec();
            words.extend([image.into_owned(), options]);
            words
        })
    }

    /// Copies a LUN into a raw image, as initiators see it. Nobody should be writing.
    pub fn read_image(&self, name: &str, image: &Path) -> Result<()> {
        let image = image.to_string_lossy();
        self.convert(name, |options| {
            let words = ["-O", "raw", "--image-opts"].map(str::to_owned);
            let mut words = words.to_vec();
            words.extend([options, image.into_owned()]);
            words
        })
    }

    /// Runs `qemu-img convert` in the SAN's namespace under a name that is let in for this.
    fn convert(&self, name: &str, words: impl FnOnce(String) -> Vec<String>) -> Result<()> {
        let loader = format!("{TARGET_PREFIX}loader");
        let options = self.lun(name)?.image_options(&loader);
        let namespace = net::namespace_path(&self.site.namespace(SAN));
        let mut arguments = vec![format!("--net={namespace}")];
        arguments.extend(["timeout", "300", "qemu-img", "convert"].map(str::to_owned));
        arguments.extend(words(options));
        self.allow(name, &loader)?;
        let done = run("nsenter", &arguments);
        self.deny(name, &loader)?;
        done.map(drop)
    }

    /// The pool that a cluster in the lab needs for the SAN's LUNs, as a line of `pools:` in a manifest. A
    /// disk's image is the LUN's name.
    pub fn pool(&self) -> Result<String> {
        Ok(format!(
            "{{kind: iscsi, portals: [\"{}\"], target: \"{}\", lun: {LUN_NUMBER}, \
             access: {{tgt: {{control: {}, via: [nsenter, \"--net={}\"]}}}}}}",
            self.portal()?,
            TARGET_PREFIX.trim_end_matches(':'),
            self.control()?,
            net::namespace_path(&self.site.namespace(SAN)),
        ))
    }

    /// Where the SAN keeps a LUN, also while it is off.
    pub(crate) fn backing_file(&self, name: &str) -> Result<PathBuf> {
        let targets = self.status().targets;
        let target = find(&targets, name)?;
        let file = target.luns.first().map(|unit| unit.file.clone());
        Ok(file.unwrap_or_default())
    }

    /// The target of a LUN with its sessions and all who may log in.
    pub fn target(&self, name: &str) -> Result<Target> {
        let targets = self.tgt()?.targets()?;
        find(&targets, name).cloned()
    }

    // --- access ------------------------------------------------------------------------------

    /// Lets an initiator log in to a LUN.
    pub fn allow(&self, name: &str, initiator: &str) -> Result<()> {
        let target = self.target(name)?;
        if target.initiators.iter().any(|other| other == initiator) {
            return Ok(());
        }
        let words = format!("--mode target --op bind --tid {}", target.id);
        self.order(&words, &["-Q", initiator])
    }

    /// Takes that away and ends the initiator's sessions. When this returns, nothing more of it is written.
    pub fn deny(&self, name: &str, initiator: &str) -> Result<()> {
        let target = self.target(name)?;
        if target.initiators.iter().any(|other| other == initiator) {
            let words = format!("--mode target --op unbind --tid {}", target.id);
            self.order(&words, &["-Q", initiator])?;
        }
        self.drop_sessions(name, initiator)
    }

    /// Ends an initiator's sessions with a LUN; it may log in again.
    pub fn drop_sessions(&self, name: &str, initiator: &str) -> Result<()> {
        let tgt = self.tgt()?;
        let step = Duration::from_millis(2);
        let mut rounds = 0;
        wait::until("end of the sessions", SIGNAL_LIMIT, step, || {
            let target = self.target(name).ok()?;
            let sessions = target.sessions.iter();
            let left: Vec<_> = sessions.filter(|one| one.initiator == initiator).collect();
            for session in &left {
                // One that has ended meanwhile is an error of no interest.
                let _ = tgt.drop_session(target.id, session);
                if rounds > 1 {
                    self.reset_connections(session);
                }
            }
            rounds += 1;
            left.is_empty().then_some(())
        })
    }

    /// Takes a session's connections away from under `tgtd`, which would wait until it has sent what it has for them.
    fn reset_connections(&self, session: &Session) {
        let namespace = net::namespace_path(&self.site.namespace(SAN));
        for address in &session.addresses {
            let net = format!("--net={namespace}");
            let words = [&net, "ss", "-K", "dst", address, "sport", "=", ":3260"];
            let _ = run("nsenter", &words);
        }
    }

    /// Makes a CHAP user. The secret is in `tgtadm`'s arguments for a moment: it is the lab's.
    pub fn account(&self, user: &str, secret: &str) -> Result<()> {
        let more = ["--user", user, "--password", secret];
        self.tgt()?.run("--mode account --op new", &more)?;
        let mut config = Config::load(&self.site)?;
        config.accounts.insert(user.to_owned(), secret.to_owned());
        config.save(&self.site)
    }

    /// From now on a LUN wants this user's secret at each login.
    pub fn require_account(&self, name: &str, user: &str) -> Result<()> {
        let words = format!("--mode account --op bind --tid {}", self.target(name)?.id);
        self.order(&words, &["--user", user])
    }

    /// The sessions of a LUN.
    pub fn sessions(&self, name: &str) -> Result<Vec<Session>> {
        Ok(self.target(name)?.sessions)
    }

    /// How it is.
    #[must_use]
    pub fn status(&self) -> SanStatus {
        let config = Config::load(&self.site).unwrap_or_default();
        let daemon = self.daemon();
        let paused = daemon.as_ref().is_some_and(|found| found.state == 'T');
        let answered = (daemon.is_some() && !paused)
            .then(|| Tgt::new(config.control).targets().ok())
            .flatten();
        SanStatus {
            running: daemon.is_some(),
            paused,
            portal: self.portal().unwrap_or_default(),
            control: config.control,
            targets: answered.unwrap_or(config.targets),
        }
    }

    fn tgt(&self) -> Result<Tgt> {
        self.running()?;
        Ok(Tgt::new(self.control()?))
    }

    fn order(&self, words: &str, more: &[&str]) -> Result<()> {
        let tgt = self.tgt()?;
        tgt.run(words, more)?;
        self.remember(&tgt)
    }

    /// Writes down what `tgtd` has been told, by the lab or by others.
    fn remember(&self, tgt: &Tgt) -> Result<()> {
        let mut config = Config::load(&self.site)?;
        config.targets = tgt.targets()?;
        for target in &mut config.targets {
            target.sessions.clear();
        }
        config.save(&self.site)
    }
}

/// The target of a LUN.
fn find<'a>(targets: &'a [Target], name: &str) -> Result<&'a Target> {
    let wanted = format!("{TARGET_PREFIX}{name}");
    let known: Vec<String> = targets.iter().map(short).collect();
    let found = targets.iter().find(|target| target.name == wanted);
    found.ok_or_else(|| LabError::UnknownLun {
        name: name.to_owned(),
        known: if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        },
    })
}

/// A LUN's name, from its target's.
fn short(target: &Target) -> String {
    let name = target.name.strip_prefix(TARGET_PREFIX);
    name.unwrap_or(&target.name).to_owned()
}

/// Removes what a SAN whose processes have ended left outside of the lab's folder.
pub(crate) fn forget(site: &Site) {
    if let (true, Ok(config)) = (site.san, Config::load(site)) {
        let path = Tgt::new(config.control).path();
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_file(path.with_added_extension("lock"));
    }
}

/// The number that the SAN had, or another one of which no `tgtd` holds the lock.
fn free_control(site: &Site, old: u16) -> u16 {
    // FNV-1a: labs at the same time should begin at different numbers.
    let hash = site
        .dir
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let first = if old == 0 {
        CONTROLS.start + u16::try_from(hash % CONTROLS.len() as u64).unwrap_or(0)
    } else {
        old
    };
    (first..CONTROLS.end)
        .chain(CONTROLS.start..first)
        .find(|number| !is_locked(*number))
        .unwrap_or(first)
}

/// A `tgtd` has this number.
fn is_locked(number: u16) -> bool {
    let path = format!("{}.{number}.lock", tgt::SOCKET);
    let Ok(file) = OpenOptions::new().write(true).open(path) else {
        return false;
    };
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::SiteSpec;

    #[test]
    fn every_lab_has_a_number_that_tgtd_takes() {
        for number in 0..500 {
            let mut spec = SiteSpec::new(Path::new("/bin/quorate"));
            spec.root = PathBuf::from(format!("/tmp/lab{number}"));
            let site = Site::plan(spec).unwrap();
            assert!(CONTROLS.contains(&free_control(&site, 0)));
        }
    }
}
