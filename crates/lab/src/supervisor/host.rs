//! The host itself: its power, its processes, its daemon.
//!
//! Always holds: `power` is changed before the processes end, so that nothing is started again
//! behind a power cut. Lock order: `state` is never taken while [`CHILDREN`] is held.

use super::protocol::{HostStatus, Power, Request, Who};
use crate::cgroup::Cgroup;
use crate::process::{CHILDREN, Found, in_namespace, namespace_of};
use crate::site::Site;
use crate::{net, wait};
use rustix::process::{Signal, WaitOptions};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How often ended children are collected and the daemon is looked after.
const TICK: Duration = Duration::from_millis(25);
/// Before a daemon that ended by itself is started again; the init system of a real host would wait too.
const RESTART_DELAY: Duration = Duration::from_millis(500);
/// For all processes of a host to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// For a daemon to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(10);

struct State {
    power: Power,
    boot: String,
    /// The daemon is to run.
    wanted: bool,
    daemon: Option<Found>,
    deaths: u32,
    restart_at: Option<Instant>,
    reboot_at: Option<Instant>,
    watchdog: Option<Duration>,
    fired: u32,
}

/// The host.
pub(super) struct Host {
    site: Site,
    name: String,
    cgroup: Option<Cgroup>,
    namespace: Option<u64>,
    owner: Option<Found>,
    state: Mutex<State>,
    finish: AtomicBool,
    /// The power went away since the watchdog last looked.
    cut: AtomicBool,
}

impl Host {
    pub(super) fn new(site: Site, name: &str) -> Self {
        let owner = site
            .owner
            .and_then(|pid| Found::read(i32::try_from(pid).ok()?));
        Self {
            cgroup: site
                .cgroups
                .then(|| Cgroup::create(&site.site, name))
                .flatten(),
            namespace: namespace_of("/proc/self/ns/net"),
            owner,
            name: name.to_owned(),
            site,
            state: Mutex::new(State {
                power: Power::Off,
                boot: String::new(),
                wanted: false,
                daemon: None,
                deaths: 0,
                restart_at: None,
                reboot_at: None,
                watchdog: None,
                fired: 0,
            }),
            finish: AtomicBool::new(false),
            cut: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is asked; the error says why not.
    pub(super) fn obey(&self, request: &Request) -> Result<(), String> {
        match request {
            Request::Status => Ok(()),
            Request::On => self.power_on(),
            Request::Off => self.power_cut(Power::Off, "power off"),
            Request::Pause { who } => self.pause(*who),
            Request::Resume { who } => {
                self.signal(*who, Signal::CONT);
                Ok(())
            }
            Request::Kill { who: Who::All } => Err("to kill everything, cut the power".to_owned()),
            Request::Kill { who } => {
                self.signal(*who, Signal::KILL);
                Ok(())
            }
            Request::StartDaemon => self.start_daemon(),
            Request::StopDaemon { hard } => self.stop_daemon(*hard),
            Request::RestartDaemon { hard } => {
                self.stop_daemon(*hard)?;
                self.start_daemon()
            }
            Request::Finish => {
                let done = self.power_cut(Power::Off, "lab down");
                self.finish.store(true, Ordering::SeqCst);
                done
            }
        }
    }

    pub(super) fn status(&self) -> HostStatus {
        let members = self.members();
        let state = self.state();
        HostStatus {
            host: self.name.clone(),
            power: state.power,
            boot: state.boot.clone(),
            daemon_pid: state.daemon.as_ref().map(|daemon| daemon.pid),
            daemon_deaths: state.deaths,
            processes: members.len(),
            guests: members.iter().filter(|found| found.is_qemu()).count(),
            paused: members.iter().filter(|found| found.state == 'T').count(),
            watchdog_ms: state
                .watchdog
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            watchdog_fired: state.fired,
        }
    }

    pub(super) fn told_to_finish(&self) -> bool {
        self.finish.load(Ordering::SeqCst)
    }

    /// After the answer to `Finish` is out: nothing more to do, the main thread ends.
    pub(super) fn finish_if_told(&self) {
        if self.told_to_finish() {
            self.record("finished", &[]);
        }
    }

    // --- power -----------------------------------------------------------------------------

    fn power_on(&self) -> Result<(), String> {
        let mut state = self.state();
        if state.power == Power::On {
            return Ok(());
        }
        net::inside::boot(&self.site).map_err(|error| error.to_string())?;
        if let Some(cgroup) = &self.cgroup {
            // A process that was being started when the power went.
            let _ = cgroup.kill();
            cgroup
                .freeze(false)
                .map_err(|error| format!("cannot thaw the cgroup: {error}"))?;
        }
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
        state.boot = boot.map(|text| text.trim().to_owned()).unwrap_or_default();
        state.power = Power::On;
        state.deaths = 0;
        state.reboot_at = None;
        state.wanted = true;
        self.record("power on", &[]);
        self.spawn_daemon(&mut state)
    }

    /// Ends everything at one instant. First it is frozen, so that no process sees another one's end or closes its
    /// connections in order; then the carrier goes; then all are killed.
    fn power_cut(&self, power: Power, cause: &str) -> Result<(), String> {
        let mut state = self.state();
        let begun = Instant::now();
        state.power = power;
        state.wanted = false;
        state.daemon = None;
        state.restart_at = None;
        state.reboot_at = None;
        state.watchdog = None;
        self.cut.store(true, Ordering::SeqCst);
        let count = self.members().len();
        match &self.cgroup {
            Some(cgroup) => {
                let _ = cgroup.freeze(true);
            }
            None => self.signal(Who::All, Signal::STOP),
        }
        let unplugged = net::inside::unplug(&self.site);
        let gone = wait::until(
            "end of all processes",
            KILL_LIMIT,
            Duration::from_millis(1),
            || {
                if let Some(cgroup) = &self.cgroup {
                    let _ = cgroup.kill();
                } else {
                    self.signal(Who::All, Signal::KILL);
                }
                self.members().is_empty().then_some(())
            },
        );
        let took = begun.elapsed();
        self.record(
            cause,
            &[
                ("processes", count.to_string()),
                ("took_us", took.as_micros().to_string()),
            ],
        );
        gone.and(unplugged).map_err(|error| error.to_string())
    }

    /// Tells the watchdog once that the power went away.
    pub(super) fn power_was_cut(&self) -> bool {
        self.cut.swap(false, Ordering::SeqCst)
    }

    pub(super) fn watchdog_armed(&self, timeout: Option<Duration>) {
        self.state().watchdog = timeout;
    }

    /// The watchdog was not fed.
    pub(super) fn watchdog_fires(&self, timeout: Duration, due: Instant) {
        let late = due.elapsed();
        let _ = self.power_cut(Power::Dead, "watchdog fired");
        let mut state = self.state();
        state.fired += 1;
        state.reboot_at = self
            .site
            .reboot_after_ms
            .map(|after| Instant::now() + Duration::from_millis(after));
        drop(state);
        self.record(
            "watchdog done",
            &[
                ("timeout_ms", timeout.as_millis().to_string()),
                ("late_us", late.as_micros().to_string()),
                ("after_due_us", due.elapsed().as_micros().to_string()),
            ],
        );
    }

    // --- processes -------------------------------------------------------------------------

    fn members(&self) -> Vec<Found> {
        match &self.cgroup {
            Some(cgroup) => cgroup
                .members()
                .into_iter()
                .filter_map(Found::read)
                .collect(),
            None => {
                let me = i32::try_from(std::process::id()).unwrap_or(0);
                let mut all = self.namespace.map(in_namespace).unwrap_or_default();
                all.retain(|found| found.pid != me);
                all
            }
        }
    }

    fn select(&self, who: Who) -> Vec<Found> {
        let daemon = self.state().daemon.as_ref().map(|daemon| daemon.pid);
        let mut members = self.members();
        members.retain(|found| match who {
            Who::All => true,
            Who::Daemon => Some(found.pid) == daemon,
            Who::Guard => found.is_guard(),
            Who::Qemu => found.is_qemu(),
        });
        members
    }

    fn signal(&self, who: Who, signal: Signal) {
        // Not `select` for all: it takes the lock that a power cut holds.
        let chosen = if who == Who::All {
            self.members()
        } else {
            self.select(who)
        };
        for found in chosen {
            found.signal(signal);
        }
        self.record(
            "signal",
            &[
                ("to", format!("{who:?}")),
                ("signal", format!("{signal:?}")),
            ],
        );
    }

    /// Stops processes until none runs: one may have been started meanwhile.
    fn pause(&self, who: Who) -> Result<(), String> {
        if self.select(who).is_empty() {
            return Err(format!("there is no such process ({who:?}) to pause"));
        }
        wait::until(
            "pause of all processes",
            KILL_LIMIT,
            Duration::from_millis(2),
            || {
                self.signal(who, Signal::STOP);
                self.select(who)
                    .iter()
                    .all(|found| found.state == 'T')
                    .then_some(())
            },
        )
        .map_err(|error| error.to_string())
    }

    // --- the daemon ------------------------------------------------------------------------

    fn start_daemon(&self) -> Result<(), String> {
        let mut state = self.state();
        if state.power != Power::On {
            return Err("the host is not on; start it first".to_owned());
        }
        state.wanted = true;
        if state.daemon.is_some() {
            Ok(())
        } else {
            self.spawn_daemon(&mut state)
        }
    }

    fn stop_daemon(&self, hard: bool) -> Result<(), String> {
        let daemon = {
            let mut state = self.state();
            state.wanted = false;
            state.restart_at = None;
            state.daemon.clone()
        };
        let Some(daemon) = daemon else {
            return Ok(());
        };
        daemon.signal(if hard { Signal::KILL } else { Signal::TERM });
        // A stopped process takes SIGTERM only when it goes on.
        daemon.signal(Signal::CONT);
        let gone = || self.state().daemon.is_none().then_some(());
        let ended = wait::until(
            "end of the daemon",
            STOP_LIMIT,
            Duration::from_millis(2),
            gone,
        );
        if ended.is_ok() {
            return Ok(());
        }
        daemon.signal(Signal::KILL);
        Err("the daemon did not end after SIGTERM and was killed; see its log".to_owned())
    }

    /// Starts `quorate serve` in the host's cgroup.
    fn spawn_daemon(&self, state: &mut State) -> Result<(), String> {
        let log = self.site.daemon_log(&self.name);
        let open = || OpenOptions::new().create(true).append(true).open(&log);
        let (output, errors) = open()
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(|error| format!("cannot write {}: {error}", log.display()))?;
        let data = self.site.data_dir(&self.name);
        let members = self
            .cgroup
            .as_ref()
            .map(Cgroup::members_file)
            .unwrap_or_default();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            // The shell joins the cgroup and becomes the daemon.
            .arg(
                "[ -z \"$0\" ] || echo $$ > \"$0\"; echo 0 > /proc/self/oom_score_adj; exec \"$@\"",
            )
            .arg(members)
            .args(&self.site.daemon)
            .args(["serve", "--dir"])
            .arg(&data)
            .envs(&self.site.environment)
            .env("PATH", format!("{}:{path}", self.site.bin_dir().display()))
            .env("QUORATE_DIR", &data)
            .env("QUORATE_BOOT_ID", &state.boot)
            .env(
                "QUORATE_WATCHDOG",
                format!(
                    "unix:{}",
                    self.site
                        .host_dir(&self.name)
                        .join("watchdog.sock")
                        .display()
                ),
            )
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0);
        let child = {
            let _guard = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
            command
                .spawn()
                .map_err(|error| format!("cannot start the daemon: {error}"))?
        };
        let pid = i32::try_from(child.id()).unwrap_or(0);
        state.daemon = Found::read(pid).or(Some(Found {
            pid,
            started: 0,
            state: 'R',
            command: Vec::new(),
        }));
        state.restart_at = None;
        self.record("daemon started", &[("pid", pid.to_string())]);
        Ok(())
    }

    /// Collects ended children (guests whose daemon ended are adopted by the supervisor), restarts the daemon,
    /// boots after a watchdog reset, ends with the owner. Runs until the supervisor ends.
    pub(super) fn care_for_children(&self) {
        loop {
            wait::pause(TICK);
            let ended = {
                let _guard = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
                let next = || rustix::process::wait(WaitOptions::NOHANG).ok().flatten();
                std::iter::from_fn(next)
                    .map(|(pid, _)| pid.as_raw_pid())
                    .collect::<Vec<_>>()
            };
            self.look_after_daemon(&ended);
            if self.owner_is_gone() {
                let _ = self.obey(&Request::Finish);
            }
        }
    }

    fn look_after_daemon(&self, ended: &[i32]) {
        let mut state = self.state();
        let now = Instant::now();
        if state
            .daemon
            .as_ref()
            .is_some_and(|daemon| ended.contains(&daemon.pid))
        {
            state.daemon = None;
            if state.wanted {
                state.deaths += 1;
                state.restart_at = Some(now + RESTART_DELAY);
                self.record("daemon ended by itself", &[]);
            }
        }
        if state.restart_at.is_some_and(|at| at <= now)
            && let Err(error) = self.spawn_daemon(&mut state)
        {
            eprintln!("{error}");
            state.restart_at = Some(now + RESTART_DELAY);
        }
        if state.reboot_at.is_some_and(|at| at <= now) {
            state.reboot_at = None;
            drop(state);
            if let Err(error) = self.power_on() {
                eprintln!("reboot failed: {error}");
            }
        }
    }

    fn owner_is_gone(&self) -> bool {
        self.site.owner.is_some()
            && !self.told_to_finish()
            && self.owner.as_ref().is_none_or(|owner| {
                Found::read(owner.pid).is_none_or(|now| now.started != owner.started)
            })
    }

    /// One line of the host's history: `events.jsonl`.
    fn record(&self, event: &str, more: &[(&str, String)]) {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let mut line = serde_json::json!({
            "at_ms": u64::try_from(wall.map_or(0, |span| span.as_millis())).unwrap_or(0),
            "boottime_us": boot.tv_sec * 1_000_000 + boot.tv_nsec / 1000,
            "host": self.name,
            "event": event,
        });
        for (key, value) in more {
            line[*key] = value
                .parse::<u64>()
                .map_or_else(|_| value.as_str().into(), Into::into);
        }
        let path = self.site.host_dir(&self.name).join("events.jsonl");
        if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(path) {
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }
}
