//! The guard's one loop: control socket, guests, time, watchdog.

use super::GuardOptions;
use super::guest::{Guest, News};
use super::sys::{self, Settled, boottime_ns, recv_packet, send_packet};
use super::wire::{FromGuard, PROTOCOL, Request, ToGuard};
use quorate_fence::watchdog::Watchdog;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;

const MS: u64 = 1_000_000;
/// A guard without a lease grants its first guests this long: an agent that has just started gets one
/// within it, or they are frozen.
const NO_LEASE_NS: u64 = 1_000 * MS;
/// A watchdog that cannot be opened is tried again after this.
const WATCHDOG_AGAIN_NS: u64 = 5_000 * MS;
/// Guests being made are looked for in `/proc` this often, past the time to freeze.
const SEARCH_EVERY_NS: u64 = 20 * MS;
/// Pause after a failed wait.
const SLOWER: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};
/// Longest sleep.
const IDLE_NS: u64 = 1_000 * MS;
/// Most guests; more is a fault of the agent.
const GUESTS_MAX: usize = 4096;

/// A guest that the agent is making.
#[derive(Debug)]
struct Starting {
    run: u64,
    needle: String,
    /// The end of the lease that it was decided under.
    until_ns: u64,
    /// Whether a process was there by then: `Some(false)` means that one that appears later was made by an
    /// agent that stood still, for an order that may be long void.
    in_time: Option<bool>,
    /// Processes that are being killed.
    found: Vec<OwnedFd>,
}

impl Starting {
    fn is_void(&self) -> bool {
        self.in_time == Some(false)
    }

    /// What is there now.
    fn look(&self) -> Vec<OwnedFd> {
        let open = |pid| sys::open_pidfd(pid).ok();
        match sys::find_by_argument(&self.needle) {
            Ok(pids) => pids.into_iter().filter_map(open).collect(),
            Err(error) => {
                eprintln!("quorate guard: /proc: {error}");
                Vec::new()
            }
        }
    }

    fn end(&mut self) {
        self.found = self.look();
        for pidfd in &self.found {
            if let Err(error) = sys::kill(pidfd) {
                eprintln!("quorate guard: kill: {error}");
            }
        }
    }
}

pub(super) struct Server {
    listener: OwnedFd,
    agent: Option<OwnedFd>,
    settled: Settled,
    guests: BTreeMap<String, Guest>,
    starting: BTreeMap<String, Starting>,
    search_at_ns: u64,
    deadline_ns: Option<u64>,
    freeze_before_ns: u64,
    options: GuardOptions,
    watchdog: Option<Watchdog>,
    watchdog_problem: Option<String>,
    watchdog_at_ns: u64,
    exit: bool,
    buffer: Vec<u8>,
    /// Held as long as this process lives: there is one guard for a socket.
    _lock: File,
}

impl Server {
    /// Takes the socket over.
    pub(super) fn open(options: &GuardOptions, settled: Settled) -> io::Result<Self> {
        let lock = File::create(options.socket.with_extension("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            io::Error::new(io::ErrorKind::AddrInUse, "another guard serves it already")
        })?;
        // Ours by the lock: what is there was left behind.
        match std::fs::remove_file(&options.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::bind(&listener, &SocketAddrUnix::new(&options.socket)?)?;
        rustix::net::listen(&listener, 4)?;
        let mut server = Self {
            listener,
            agent: None,
            settled,
            guests: BTreeMap::new(),
            starting: BTreeMap::new(),
            search_at_ns: 0,
            deadline_ns: None,
            freeze_before_ns: 250 * MS,
            options: options.clone(),
            watchdog: None,
            watchdog_problem: None,
            watchdog_at_ns: 0,
            exit: false,
            buffer: vec![0; sys::PACKET_MAX],
            _lock: lock,
        };
        server.rehearse();
        Ok(server)
    }

    /// Touches what an emergency needs, so that it is in memory then.
    fn rehearse(&mut self) {
        let _ = sys::find_by_argument("quorate-guard-rehearsal");
        if let Ok(own) = sys::open_pidfd(i32::try_from(std::process::id()).unwrap_or(0)) {
            let mut guest = Guest::new(0, 0, own, "/nonexistent/guard.sock".into(), true);
            guest.keep_connected(0);
            guest.freeze(0);
        }
        self.enforce(boottime_ns());
    }

    pub(super) fn run(&mut self) {
        while !self.exit {
            let now = boottime_ns();
            self.enforce(now);
            self.feed(now);
            if let Err(error) = self.wait(now) {
                // Nothing to wait on, or no memory: the loop goes on, a little slower.
                eprintln!("quorate guard: poll: {error}");
                let _ = poll(&mut [], Some(&SLOWER));
            }
        }
    }

    fn freeze_at_ns(&self) -> Option<u64> {
        self.deadline_ns
            .map(|end| end.saturating_sub(self.freeze_before_ns))
    }

    fn past_freeze(&self, now: u64) -> bool {
        self.freeze_at_ns().is_none_or(|at| now >= at)
    }

    fn past_deadline(&self, now: u64) -> bool {
        self.deadline_ns.is_none_or(|at| now >= at)
    }

    /// What the time asks for.
    fn enforce(&mut self, now: u64) {
        let (freeze, kill) = (self.past_freeze(now), self.past_deadline(now));
        for guest in self.guests.values_mut() {
            guest.keep_connected(now);
            if kill && !guest.is_safe() {
                guest.kill(now);
            } else if freeze {
                guest.freeze(now);
            }
        }
        self.enforce_starting(now, freeze);
    }

    /// Ends processes of guests that were being made when the lease was about to end, or that appear
    /// after the lease under which that was decided.
    fn enforce_starting(&mut self, now: u64, freeze: bool) {
        for starting in self.starting.values_mut() {
            if starting.in_time.is_none() && now >= starting.until_ns {
                starting.in_time = Some(!starting.look().is_empty());
            }
        }
        if now < self.search_at_ns {
            return;
        }
        for starting in self.starting.values_mut() {
            if freeze || starting.is_void() {
                self.search_at_ns = now + SEARCH_EVERY_NS;
                starting.end();
            }
        }
    }

    /// Every guest is under control.
    fn is_safe(&self, now: u64) -> bool {
        !self.past_deadline(now)
            || (self.guests.values().all(Guest::is_safe)
                && self.starting.values().all(|one| one.found.is_empty()))
    }

    fn feed(&mut self, now: u64) {
        let Some(spec) = &self.options.watchdog else {
            return;
        };
        if now < self.watchdog_at_ns {
            return;
        }
        if !self.guests_or_starting_are_safe(now) {
            // Looked at again with the next loop; the host may end first, and rightly so.
            self.watchdog_at_ns = now + 5 * MS;
            return;
        }
        let fed = match &self.watchdog {
            Some(watchdog) => watchdog.feed(),
            None => match Watchdog::open(spec, self.options.watchdog_timeout) {
                Ok(watchdog) => {
                    self.watchdog = Some(watchdog);
                    self.watchdog_problem = None;
                    self.tell_watchdog();
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        self.watchdog_at_ns = now + WATCHDOG_AGAIN_NS;
        match (fed, &self.watchdog) {
            (Ok(()), Some(watchdog)) => {
                let bound = u64::try_from(watchdog.bound().as_nanos()).unwrap_or(u64::MAX);
                self.watchdog_at_ns = now + bound / 5;
            }
            (Err(error), _) => {
                if self.watchdog.take().is_some() {
                    self.watchdog_at_ns = now; // opened anew at once
                }
                let problem = Some(error.to_string());
                if self.watchdog_problem != problem {
                    self.watchdog_problem = problem;
                    self.tell_watchdog();
                }
            }
            _ => {}
        }
    }

    fn guests_or_starting_are_safe(&self, now: u64) -> bool {
        (self.guests.is_empty() && self.starting.is_empty()) || self.is_safe(now)
    }

    fn tell_watchdog(&mut self) {
        let bound = self.watchdog.as_ref().map(|watchdog| watchdog.bound());
        self.tell(&FromGuard::Watchdog {
            bound_ms: bound.map(|bound| u64::try_from(bound.as_millis()).unwrap_or(u64::MAX)),
            problem: self.watchdog_problem.clone(),
        });
    }

    fn next_wakeup_ns(&self, now: u64) -> u64 {
        let busy = !self.guests.is_empty() || !self.starting.is_empty();
        let lease = [self.freeze_at_ns(), self.deadline_ns]
            .into_iter()
            .flatten();
        let lease = lease.filter(|at| *at > now);
        let watchdog = self
            .options
            .watchdog
            .is_some()
            .then_some(self.watchdog_at_ns);
        let search = self.starting.values().map(|one| {
            if self.past_freeze(now) || one.is_void() {
                self.search_at_ns
            } else {
                one.until_ns
            }
        });
        let guests = self.guests.values().filter_map(Guest::wakeup_ns);
        let idle = now + if busy { IDLE_NS / 10 } else { IDLE_NS };
        lease
            .chain(watchdog)
            .chain(search)
            .chain(guests)
            .min()
            .unwrap_or(idle)
            .clamp(now, idle)
    }

    /// Sleeps until something happens or is due, then takes it in.
    fn wait(&mut self, now: u64) -> io::Result<()> {
        let left = self.next_wakeup_ns(now) - now;
        let timeout = Timespec {
            tv_sec: i64::try_from(left / 1_000_000_000).unwrap_or(0),
            tv_nsec: i64::try_from(left % 1_000_000_000).unwrap_or(0),
        };
        let mut names = Vec::with_capacity(self.guests.len() * 2);
        let mut fds = Vec::with_capacity(self.guests.len() * 2 + 2);
        fds.push(PollFd::from_borrowed_fd(
            self.listener.as_fd(),
            PollFlags::IN,
        ));
        if let Some(agent) = &self.agent {
            fds.push(PollFd::from_borrowed_fd(agent.as_fd(), PollFlags::IN));
        }
        let first_guest = fds.len();
        for (name, guest) in &self.guests {
            names.push((name.clone(), true));
            fds.push(PollFd::from_borrowed_fd(guest.pidfd(), PollFlags::IN));
            if let Some(qmp) = guest.qmp_fd() {
                names.push((name.clone(), false));
                fds.push(PollFd::from_borrowed_fd(qmp, PollFlags::IN));
            }
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let hit = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let (connecting, agent) = (hit(&fds[0]), first_guest == 2 && hit(&fds[1]));
        let guests: Vec<(String, bool)> = names
            .into_iter()
            .zip(&fds[first_guest..])
            .filter(|(_, fd)| hit(fd))
            .map(|(name, _)| name)
            .collect();
        drop(fds);
        for (name, ended) in guests {
            self.on_guest(&name, ended);
        }
        if agent {
            self.on_agent();
        }
        if connecting {
            self.on_connect();
        }
        Ok(())
    }

    fn on_guest(&mut self, name: &str, ended: bool) {
        let Some(guest) = self.guests.get_mut(name) else {
            return;
        };
        let (vm, run) = (name.to_owned(), guest.run);
        if ended {
            let killed = guest.killed_at_ns.is_some();
            self.guests.remove(name);
            if killed {
                self.tell(&FromGuard::Killed { vm, run });
            }
        } else if guest.on_readable(boottime_ns()) == News::Froze {
            self.tell(&FromGuard::Froze { vm, run });
        }
    }

    /// The newest agent is the agent.
    fn on_connect(&mut self) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        if let Ok(agent) = rustix::net::accept_with(&self.listener, flags) {
            self.agent = Some(agent);
        }
    }

    fn on_agent(&mut self) {
        // Bounded, so that a flood does not keep the guests waiting.
        for _ in 0..64 {
            let Some(agent) = &self.agent else {
                return;
            };
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = recv_packet(agent, &mut buffer);
            let packet = match received {
                Ok((0, _)) => {
                    self.agent = None;
                    None
                }
                Ok((len, fd)) => {
                    let request = serde_json::from_slice::<Request>(&buffer[..len]);
                    request.ok().map(|request| (request, fd))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.buffer = buffer;
                    return;
                }
                Err(_) => {
                    self.agent = None;
                    None
                }
            };
            self.buffer = buffer;
            if let Some((request, fd)) = packet {
                let error = self.obey(request.body, fd).err();
                let seq = request.seq;
                self.tell(&FromGuard::Answer { seq, error });
            }
        }
    }

    /// An agent that does not read loses its connection, and asks anew.
    fn tell(&mut self, message: &FromGuard) {
        let Some(agent) = &self.agent else {
            return;
        };
        let sent = serde_json::to_vec(message)
            .map_err(io::Error::from)
            .and_then(|bytes| send_packet(agent, &bytes, None));
        if sent.is_err() {
            self.agent = None;
        }
    }

    fn obey(&mut self, body: ToGuard, fd: Option<OwnedFd>) -> Result<(), String> {
        let now = boottime_ns();
        match body {
            ToGuard::Hello { .. } => self.hello(),
            ToGuard::Lease {
                deadline_ns,
                freeze_before_ms,
            } => {
                self.freeze_before_ns = freeze_before_ms.saturating_mul(MS);
                self.deadline_ns = self.deadline_ns.max(Some(deadline_ns));
                if !self.past_freeze(now) {
                    self.guests.values_mut().for_each(Guest::lease_renewed);
                }
            }
            ToGuard::Starting {
                vm,
                run,
                needle,
                until_ns,
            } => {
                self.check_lease(now, until_ns)?;
                let starting = Starting {
                    run,
                    needle,
                    until_ns,
                    in_time: None,
                    found: Vec::new(),
                };
                self.starting.insert(vm, starting);
            }
            ToGuard::Register {
                vm,
                run,
                pid,
                qmp,
                freezable,
            } => {
                let pidfd = fd.ok_or("no pidfd came with it")?;
                self.register(vm, Guest::new(run, pid, pidfd, qmp, freezable), now)?;
            }
            ToGuard::Freezable { vm, run, freezable } => {
                self.guest(&vm, run)?.freezable = freezable;
            }
            ToGuard::Thawing { vm, run, until_ns } => {
                self.check_lease(now, until_ns)?;
                let guest = self.guest(&vm, run)?;
                guest.thaw_allowed()?;
                guest.begin_thaw();
            }
            ToGuard::Thawed { vm, run } => self.guest(&vm, run)?.thawing = false,
            ToGuard::Unregister { vm, run } => {
                if self.starting.get(&vm).is_some_and(|one| one.run == run) {
                    self.starting.remove(&vm);
                }
                if let Some(guest) = self.guests.get(&vm).filter(|guest| guest.run == run) {
                    if !guest.has_ended() {
                        return Err(format!("{vm} runs still as process {}", guest.pid));
                    }
                    self.guests.remove(&vm);
                }
            }
            ToGuard::Exit => self.leave()?,
        }
        Ok(())
    }

    fn hello(&mut self) {
        // A new agent adopts what an earlier one was making; what it had not made yet is void.
        self.starting
            .retain(|_, one| sys::find_by_argument(&one.needle).is_ok_and(|pids| !pids.is_empty()));
        for guest in self.guests.values_mut() {
            guest.thawing = false;
        }
        self.tell(&FromGuard::Hello {
            protocol: PROTOCOL,
            pid: std::process::id(),
            guests: self.guests.keys().cloned().collect(),
            locked: self.settled.locked,
            realtime: self.settled.realtime,
        });
        self.tell_watchdog();
    }

    fn check_lease(&self, now: u64, until_ns: u64) -> Result<(), String> {
        if self.past_freeze(now) {
            return Err("the guard has no lease that is long enough".into());
        }
        if now >= until_ns {
            return Err("the lease under which it was decided has ended".into());
        }
        Ok(())
    }

    fn guest(&mut self, vm: &str, run: u64) -> Result<&mut Guest, String> {
        let guest = self.guests.get_mut(vm).filter(|guest| guest.run == run);
        guest.ok_or_else(|| format!("{vm} is not registered with process token {run}"))
    }

    fn register(&mut self, vm: String, mut guest: Guest, now: u64) -> Result<(), String> {
        if self.guests.len() >= GUESTS_MAX && !self.guests.contains_key(&vm) {
            return Err(format!("more than {GUESTS_MAX} guests"));
        }
        if let Some(starting) = self.starting.get_mut(&vm) {
            if starting.run == guest.run && starting.is_void() {
                starting.end();
                return Err("it was made too late, for an order that may be void".into());
            }
            self.starting.remove(&vm);
        }
        if self.deadline_ns.is_none() {
            self.deadline_ns = Some(now + NO_LEASE_NS);
        }
        match self.guests.get_mut(&vm) {
            // A new agent, or an agent that lost the connection: what this guard saw stays true.
            Some(old) if old.pid == guest.pid => {
                old.run = guest.run;
                old.freezable = guest.freezable;
                if old.is_safe() {
                    let run = old.run;
                    self.tell(&FromGuard::Froze { vm, run });
                }
            }
            _ => {
                guest.keep_connected(now);
                self.guests.insert(vm, guest);
            }
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), String> {
        if !self.guests.is_empty() || !self.starting.is_empty() {
            let names: Vec<&str> = self.guests.keys().map(String::as_str).collect();
            return Err(format!("there are guests still: {}", names.join(", ")));
        }
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.disarm().map_err(|error| error.to_string())?;
        }
        self.exit = true;
        Ok(())
    }
}
