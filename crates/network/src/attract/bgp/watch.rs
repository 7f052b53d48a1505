//! The watcher: a process of its own that runs a speaker for as long as the host has a lease.
//!
//! ```text
//!            config there, lease good              config gone
//!  nothing ---------------------------> speaking -------------> ended
//!     ^                                   |  ^ a changed config is taken up
//!     +--- lease about to end, or died ---+--'
//! ```
//! Always holds: one watcher for a directory (a lock); the speaker is a child that the kernel kills when the watcher
//! dies; a deadline that cannot be read is the last one that could be. It lives on while the daemon is restarted.

use super::{MARGIN, Program, Speaker, frr};
use rustix::process::{Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at the lease.
const STEP: Duration = Duration::from_millis(20);
/// Before a speaker that ended is started again.
const AGAIN: Duration = Duration::from_secs(1);
/// Digits of a deadline: fixed, so that it is always overwritten as a whole.
const DIGITS: usize = 20;

/// The files through which daemon and watcher speak.
#[derive(Debug, Clone)]
pub struct Desk {
    dir: PathBuf,
}

impl Desk {
    /// Those of a directory, which is made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What is to be announced; `None` ends speaker and watcher.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(&self, speaker: Option<&Speaker>) -> io::Result<()> {
        let path = self.path("config.json");
        let Some(speaker) = speaker else {
            return match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        };
        let part = self.path("config.part");
        std::fs::write(&part, serde_json::to_vec_pretty(speaker)?)?;
        std::fs::rename(part, path)
    }

    /// The end of the lease, in nanoseconds of CLOCK_BOOTTIME.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn lease(&self, deadline_ns: u64) -> io::Result<()> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path("deadline"))?;
        file.write_all_at(format!("{deadline_ns:0DIGITS$}").as_bytes(), 0)
    }

    /// Whether a watcher is at work.
    #[must_use]
    pub fn watched(&self) -> bool {
        match File::options().write(true).open(self.path("lock")) {
            Ok(file) => file.try_lock().is_err(),
            Err(_) => false,
        }
    }

    fn speaker(&self) -> Option<Speaker> {
        serde_json::from_slice(&std::fs::read(self.path("config.json")).ok()?).ok()
    }

    fn deadline(&self) -> Option<u64> {
        let text = std::fs::read_to_string(self.path("deadline")).ok()?;
        (text.len() == DIGITS).then(|| text.parse().ok())?
    }
}

/// Nanoseconds of CLOCK_BOOTTIME.
#[must_use]
pub fn boot_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Watches until there is nothing to announce. Another watcher at work is no error: this one ends.
///
/// # Errors
/// When the directory cannot be used.
pub fn run(dir: &Path) -> io::Result<()> {
    let desk = Desk::open(dir)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(desk.path("lock"))?;
    if lock.try_lock().is_err() {
        return Ok(());
    }
    let mut watcher = Watcher {
        desk,
        running: None,
        deadline_ns: 0,
        not_before: None,
    };
    while watcher.look()? {
        pause(STEP);
    }
    Ok(())
}

#[allow(
    clippy::disallowed_methods,
    reason = "a process that looks at the clock and does nothing else"
)]
fn pause(span: Duration) {
    std::thread::sleep(span);
}

struct Running {
    child: Child,
    speaker: Speaker,
}

struct Watcher {
    desk: Desk,
    running: Option<Running>,
    deadline_ns: u64,
    not_before: Option<Instant>,
}

impl Watcher {
    /// One look; whether there is more to do.
    fn look(&mut self) -> io::Result<bool> {
        self.deadline_ns = self.desk.deadline().unwrap_or(self.deadline_ns);
        let margin = u64::try_from(MARGIN.as_nanos()).unwrap_or(0);
        let good = boot_ns().saturating_add(margin) < self.deadline_ns;
        let wanted = self.desk.speaker();
        let Some(wanted) = wanted else {
            self.end();
            return Ok(self.desk.path("config.json").exists());
        };
        if !good {
            self.end();
            return Ok(true);
        }
        let died = match &mut self.running {
            Some(running) => running.child.try_wait()?.is_some(),
            None => false,
        };
        if died {
            self.running = None;
            self.not_before = Some(Instant::now() + AGAIN);
        }
        match &mut self.running {
            None if self.not_before.is_none_or(|at| Instant::now() >= at) => self.start(wanted)?,
            None => {}
            Some(running) if running.speaker != wanted => self.change(wanted)?,
            Some(_) => {}
        }
        Ok(true)
    }

    fn start(&mut self, speaker: Speaker) -> io::Result<()> {
        let config = self.desk.path("speaker.conf");
        std::fs::write(&config, speaker.config())?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.desk.path("speaker.log"))?;
        // The kernel ends the speaker when this process dies, however it dies.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        match speaker.program {
            Program::Bird => {
                command.args(["bird", "-f", "-c"]).arg(&config);
                command.arg("-s").arg(self.desk.path("bird.ctl"));
            }
            Program::Frr => {
                command.arg(frr::BGPD);
                command.args(["-Z", "-S", "-u", "root", "-g", "root", "-P", "0", "-f"]);
                command.arg(&config).arg("-i").arg(self.desk.path("pid"));
                command.arg("--vty_socket").arg(&self.desk.dir);
                command.args(["--log", "stdout"]);
            }
        }
        let spawned = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn();
        match spawned {
            Ok(child) => self.running = Some(Running { child, speaker }),
            Err(error) => {
                let mut log = log;
                let _ = writeln!(log, "cannot start: {error}");
                self.not_before = Some(Instant::now() + AGAIN);
            }
        }
        Ok(())
    }

    fn change(&mut self, wanted: Speaker) -> io::Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let same = running.speaker.program == wanted.program;
        match wanted.program {
            Program::Bird if same => {
                std::fs::write(self.desk.path("speaker.conf"), wanted.config())?;
                if let Some(pid) = rustix::process::Pid::from_raw(running.child.id().cast_signed())
                {
                    let _ = kill_process(pid, Signal::HUP);
                }
                running.speaker = wanted;
            }
            Program::Frr if same && self.desk.tell_bgpd(&running.speaker, &wanted) => {
                running.speaker = wanted;
            }
            // With a new configuration, in the next look.
            _ => self.end(),
        }
        Ok(())
    }

    fn end(&mut self) {
        if let Some(mut running) = self.running.take() {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.end();
    }
}

impl Desk {
    fn tell_bgpd(&self, from: &Speaker, to: &Speaker) -> bool {
        let Some(commands) = frr::change(from, to) else {
            return false;
        };
        let mut vtysh = Command::new("vtysh");
        vtysh
            .arg("--vty_socket")
            .arg(&self.dir)
            .args(["-d", "bgpd"]);
        for command in commands {
            vtysh.args(["-c", &command]);
        }
        let done = vtysh.stdin(Stdio::null()).output();
        done.is_ok_and(|output| output.status.success())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::speaker;
    use super::*;

    #[test]
    fn what_the_daemon_writes_the_watcher_reads() {
        let dir = std::env::temp_dir().join(format!("quorate-desk-{}", std::process::id()));
        let desk = Desk::open(&dir).unwrap();
        assert_eq!((desk.speaker(), desk.deadline()), (None, None));
        desk.set(Some(&speaker(Program::Frr))).unwrap();
        desk.lease(u64::MAX).unwrap();
        desk.lease(7).unwrap();
        assert_eq!(desk.speaker(), Some(speaker(Program::Frr)));
        assert_eq!(desk.deadline(), Some(7));
        assert!(!desk.watched());
        // Nothing to announce: the watcher ends by itself.
        desk.set(None).unwrap();
        desk.set(None).unwrap();
        run(&dir).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}
