//! The agent's side of the guard: keeps one running, connected and informed.
//!
//! ```text
//! connect (spawn a guard if none listens) -> Hello -> Lease, Register* -> armed -> requests, events
//!    ^                                                                          |
//!    +------------------ connection lost, no answer within 1 s -----------------+
//! ```
//! Always holds: what must be guarded is in the registry before it is told to the guard, so that a guard that was
//! started anew learns all of it before the host counts as armed; requests are answered or fail within
//! their time; a `Froze` is passed on before the answer that follows it.

use super::GuardOptions;
use super::sys::{PACKET_MAX, boottime_ns, recv_packet, send_packet, watch_readable};
use super::wire::{FromGuard, PROTOCOL, Request, ToGuard};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// A guard that is alive answers within this.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// A guard that was just started listens within this.
const LISTEN_WITHIN: Duration = Duration::from_secs(3);
const CONNECT_AGAIN: Duration = Duration::from_millis(5);
/// Between attempts that failed altogether.
const RETRY: Duration = Duration::from_millis(200);
const CALLS_MAX: usize = 256;
/// Requests under way at once while a new guard is told of all guests.
const WINDOW: usize = 32;

/// How the guard is started.
#[derive(Debug, Clone)]
pub struct GuardConfig {
    /// Program and first arguments, for example `quorate guard`.
    pub command: Vec<OsString>,
    /// Its options.
    pub options: GuardOptions,
    /// File for its messages.
    pub log: PathBuf,
}

/// Why the guard did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuardError {
    /// It refused.
    #[error("{0}")]
    Refused(String),
    /// There is no answer; the agent is starting a new one.
    #[error("the guard does not answer: nothing is started or resumed until it does")]
    Unreachable,
}

/// What the guard did by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardEvent {
    /// It froze a guest, confirmed.
    Froze {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
    },
    /// It killed a guest.
    Killed {
        /// Which VM.
        vm: String,
        /// Which process.
        run: u64,
    },
}

/// How the guard is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuardStatus {
    /// It knows every guest and the lease, and answers.
    pub armed: bool,
    /// Its process.
    pub pid: Option<u32>,
    /// The bound of the watchdog, when armed.
    pub watchdog_ms: Option<u64>,
    /// What is wrong.
    pub problem: Option<String>,
}

/// A guest under guard.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The agent's token of the process.
    pub run: u64,
    /// Process id.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: Arc<OwnedFd>,
    /// QMP socket for the guard alone.
    pub qmp: PathBuf,
    /// It can be frozen; otherwise only killed.
    pub freezable: bool,
}

impl Registration {
    fn message(&self, vm: &str) -> ToGuard {
        ToGuard::Register {
            vm: vm.to_owned(),
            run: self.run,
            pid: self.pid,
            qmp: self.qmp.clone(),
            freezable: self.freezable,
        }
    }
}

#[derive(Debug, Default)]
struct Registry {
    guests: BTreeMap<String, Registration>,
    lease: Option<(u64, u64)>,
    /// The guard said that it ends as it was told: none is started again.
    left: bool,
}

struct Call {
    body: ToGuard,
    fd: Option<Arc<OwnedFd>>,
    reply: Option<oneshot::Sender<Result<(), GuardError>>>,
}

/// The handle; cheap to clone.
#[derive(Debug, Clone)]
pub struct GuardClient {
    registry: Arc<Mutex<Registry>>,
    calls: mpsc::Sender<Call>,
    status: watch::Receiver<GuardStatus>,
    stop: CancellationToken,
}

impl GuardClient {
    /// Starts to keep a guard. Events go to `events`; the task ends with the last handle, the guard stays.
    #[must_use]
    pub fn start(config: GuardConfig, events: mpsc::Sender<GuardEvent>) -> Self {
        let registry = Arc::new(Mutex::new(Registry::default()));
        let (calls, calls_rx) = mpsc::channel(CALLS_MAX);
        let (status_tx, status) = watch::channel(GuardStatus::default());
        let keeper = Keeper {
            config,
            registry: registry.clone(),
            calls: calls_rx,
            status: status_tx,
            events,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled_owned(keeper.run()).await });
        Self {
            registry,
            calls,
            status,
            stop,
        }
    }

    /// Lets go of the guard, which goes on; requests fail from now on.
    pub fn detach(&self) {
        self.stop.cancel();
    }

    /// How the guard is, now and later.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<GuardStatus> {
        self.status.clone()
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the lease; a guard that is started later learns it too.
    pub fn lease(&self, deadline_ns: u64, freeze_before_ms: u64) {
        self.registry().lease = Some((deadline_ns, freeze_before_ms));
        let body = ToGuard::Lease {
            deadline_ns,
            freeze_before_ms,
        };
        // A full queue means that the guard hangs; the newest lease is in the registry.
        let _ = self.calls.try_send(Call {
            body,
            fd: None,
            reply: None,
        });
    }

    /// Asks leave to make a guest by `until_ns`, the end of the lease under which that was decided.
    ///
    /// # Errors
    /// When the lease is about to end, or there is no guard.
    pub async fn starting(
        &self,
        vm: &str,
        run: u64,
        needle: &str,
        until_ns: u64,
    ) -> Result<(), GuardError> {
        let body = ToGuard::Starting {
            vm: vm.to_owned(),
            run,
            needle: needle.to_owned(),
            until_ns,
        };
        self.call(body, None).await
    }

    /// Puts a guest under guard. It is in the registry even when this fails.
    ///
    /// # Errors
    /// When there is no guard now.
    pub async fn register(&self, vm: &str, registration: Registration) -> Result<(), GuardError> {
        let fd = registration.pidfd.clone();
        let body = registration.message(vm);
        self.registry().guests.insert(vm.to_owned(), registration);
        self.call(body, Some(fd)).await
    }

    /// Says whether a guest can be frozen from now on.
    ///
    /// # Errors
    /// When there is no guard now; the next one will know.
    pub async fn set_freezable(
        &self,
        vm: &str,
        run: u64,
        freezable: bool,
    ) -> Result<(), GuardError> {
        if let Some(guest) = self.registry().guests.get_mut(vm)
            && guest.run == run
        {
            guest.freezable = freezable;
        }
        let vm = vm.to_owned();
        self.call(ToGuard::Freezable { vm, run, freezable }, None)
            .await
    }

    /// Asks leave to resume a guest by `until_ns`, the end of the lease under which that was decided.
    ///
    /// # Errors
    /// When the lease is about to end, or there is no guard.
    pub async fn thawing(&self, vm: &str, run: u64, until_ns: u64) -> Result<(), GuardError> {
        let vm = vm.to_owned();
        self.call(ToGuard::Thawing { vm, run, until_ns }, None)
            .await
    }

    /// Says that the attempt to resume a guest is over.
    ///
    /// # Errors
    /// When there is no guard now.
    pub async fn thawed(&self, vm: &str, run: u64) -> Result<(), GuardError> {
        let vm = vm.to_owned();
        self.call(ToGuard::Thawed { vm, run }, None).await
    }

    /// Takes a guest that has ended, or was not made, from the guard.
    ///
    /// # Errors
    /// When it lives still, or there is no guard now.
    pub async fn unregister(&self, vm: &str, run: u64) -> Result<(), GuardError> {
        {
            let mut registry = self.registry();
            if registry.guests.get(vm).is_some_and(|one| one.run == run) {
                registry.guests.remove(vm);
            }
        }
        let vm = vm.to_owned();
        self.call(ToGuard::Unregister { vm, run }, None).await
    }

    /// Ends the guard in good order; `Ok` again when it has ended so already.
    ///
    /// # Errors
    /// While there are guests, or when there is no guard now: ask again.
    pub async fn exit(&self) -> Result<(), GuardError> {
        if self.registry().left {
            return Ok(());
        }
        let answer = self.call(ToGuard::Exit, None).await;
        // The answer may have come after this call's own time was over.
        if self.registry().left {
            return Ok(());
        }
        answer
    }

    async fn call(&self, body: ToGuard, fd: Option<Arc<OwnedFd>>) -> Result<(), GuardError> {
        let (reply, answer) = oneshot::channel();
        let reply = Some(reply);
        let call = Call { body, fd, reply };
        let work = async {
            self.calls.send(call).await.ok()?;
            answer.await.ok()
        };
        let answered = timeout(ANSWER_WITHIN * 2, work).await;
        answered
            .ok()
            .flatten()
            .unwrap_or(Err(GuardError::Unreachable))
    }
}

struct Keeper {
    config: GuardConfig,
    registry: Arc<Mutex<Registry>>,
    calls: mpsc::Receiver<Call>,
    status: watch::Sender<GuardStatus>,
    events: mpsc::Sender<GuardEvent>,
}

/// Why a connection is over.
enum Over {
    /// Begin anew.
    Lost(String),
    /// Nobody needs the guard any more.
    Done,
}

struct Pending {
    asked: Instant,
    /// It was told to end.
    exit: bool,
    reply: Option<oneshot::Sender<Result<(), GuardError>>>,
}

struct Link {
    socket: AsyncFd<OwnedFd>,
    seq: u64,
    pending: BTreeMap<u64, Pending>,
    /// Guests that the guard does not know yet.
    backlog: VecDeque<(String, Registration)>,
    /// Armed when this request is answered, once all were sent.
    armed_by: u64,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            let over = match self.connect().await {
                Ok(socket) => self.serve(socket).await,
                Err(error) => Over::Lost(format!("the guard cannot be started: {error}")),
            };
            let Over::Lost(problem) = over else {
                return;
            };
            tracing::warn!(problem, "the guard is lost; starting it again");
            self.status.send_modify(|status| {
                *status = GuardStatus {
                    problem: Some(problem),
                    ..GuardStatus::default()
                };
            });
            // Who waits must not wait for the next guard.
            while let Ok(call) = self.calls.try_recv() {
                if let Some(reply) = call.reply {
                    let _ = reply.send(Err(GuardError::Unreachable));
                }
            }
            let left = self.registry.lock().is_ok_and(|one| one.left);
            if left || self.calls.is_closed() {
                return;
            }
            sleep(RETRY / 10).await;
        }
    }

    async fn connect(&mut self) -> io::Result<AsyncFd<OwnedFd>> {
        let path = &self.config.options.socket;
        if let Ok(socket) = connect(path) {
            return Ok(socket);
        }
        let mut child = self.spawn()?;
        let give_up = Instant::now() + LISTEN_WITHIN;
        loop {
            match connect(path) {
                Ok(socket) => return Ok(socket),
                Err(error) if Instant::now() >= give_up => {
                    sleep(RETRY).await;
                    return Err(error);
                }
                Err(_) => {}
            }
            if let Some(status) = child.try_wait()? {
                // Perhaps another guard was faster.
                if let Ok(socket) = connect(path) {
                    return Ok(socket);
                }
                sleep(RETRY).await;
                let log = self.config.log.display();
                let text = format!("it ended at once ({status}); see {log}");
                return Err(io::Error::other(text));
            }
            sleep(CONNECT_AGAIN).await;
        }
    }

    fn spawn(&self) -> io::Result<tokio::process::Child> {
        let mut words = self.config.command.iter();
        let program = words.next().ok_or(io::ErrorKind::InvalidInput)?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.config.log)?;
        let mut command = tokio::process::Command::new(program);
        command
            .args(words)
            .args(self.config.options.to_args())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(false);
        command.spawn()
    }

    async fn serve(&mut self, socket: AsyncFd<OwnedFd>) -> Over {
        let mut link = Link {
            socket,
            seq: 0,
            pending: BTreeMap::new(),
            backlog: VecDeque::new(),
            armed_by: 0,
        };
        if let Err(error) = self.introduce(&mut link) {
            return Over::Lost(error.to_string());
        }
        let mut buffer = vec![0; PACKET_MAX];
        let mut check = tokio::time::interval(ANSWER_WITHIN / 4);
        loop {
            tokio::select! {
                biased;
                ready = link.socket.readable() => {
                    let Ok(mut ready) = ready else {
                        return Over::Lost("its socket failed".into());
                    };
                    match ready.try_io(|socket| recv_packet(socket, &mut buffer)) {
                        Err(_would_block) => {}
                        Ok(Ok((0, _))) => return Over::Lost("it has ended".into()),
                        Ok(Ok((len, _))) => {
                            drop(ready);
                            let len = len.min(buffer.len());
                            self.on_message(&mut link, &buffer[..len]).await;
                        }
                        Ok(Err(error)) => return Over::Lost(error.to_string()),
                    }
                }
                call = self.calls.recv() => {
                    let Some(call) = call else {
                        return Over::Done;
                    };
                    let fd = call.fd.as_ref().map(AsFd::as_fd);
                    if let Err(error) = link.send(call.body, fd, call.reply) {
                        return Over::Lost(error.to_string());
                    }
                }
                _ = check.tick() => {
                    if link.oldest().is_some_and(|asked| asked.elapsed() > ANSWER_WITHIN) {
                        return Over::Lost("it does not answer".into());
                    }
                }
            }
        }
    }

    /// Tells a guard all it must know.
    fn introduce(&self, link: &mut Link) -> io::Result<()> {
        let protocol = PROTOCOL;
        link.send(ToGuard::Hello { protocol }, None, None)?;
        let (lease, guests) = {
            let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
            (registry.lease, registry.guests.clone())
        };
        if let Some((deadline_ns, freeze_before_ms)) = lease {
            let body = ToGuard::Lease {
                deadline_ns,
                freeze_before_ms,
            };
            link.send(body, None, None)?;
        }
        link.backlog = guests.into_iter().collect();
        link.armed_by = link.seq;
        link.top_up()
    }

    async fn on_message(&mut self, link: &mut Link, bytes: &[u8]) {
        let Ok(message) = serde_json::from_slice::<FromGuard>(bytes) else {
            return tracing::warn!("the guard said something that is not understood");
        };
        let event = match message {
            FromGuard::Hello {
                pid,
                locked,
                realtime,
                guests,
                ..
            } => {
                tracing::info!(pid, locked, realtime, ?guests, "the guard is there");
                self.status.send_modify(|status| status.pid = Some(pid));
                return;
            }
            FromGuard::Answer { seq, error } => {
                let pending = link.pending.remove(&seq);
                if error.is_none() && pending.as_ref().is_some_and(|one| one.exit) {
                    let registry = self.registry.lock();
                    registry.unwrap_or_else(PoisonError::into_inner).left = true;
                }
                if let Some(reply) = pending.and_then(|one| one.reply) {
                    let _ = reply.send(error.map_or(Ok(()), |why| Err(GuardError::Refused(why))));
                } else if let Some(error) = error {
                    tracing::warn!(error, "the guard refused");
                }
                // A socket that fails is noticed by the next read.
                let _ = link.top_up();
                if seq == link.armed_by && link.backlog.is_empty() {
                    self.status.send_modify(|status| status.armed = true);
                }
                return;
            }
            FromGuard::Watchdog { bound_ms, problem } => {
                self.status.send_modify(|status| {
                    status.watchdog_ms = bound_ms;
                    status.problem = problem;
                });
                return;
            }
            FromGuard::Froze { vm, run } => GuardEvent::Froze { vm, run },
            FromGuard::Killed { vm, run } => {
                let now = boottime_ns();
                tracing::warn!(vm, now, "the guard has ended a guest: its lease ran out");
                GuardEvent::Killed { vm, run }
            }
        };
        // The receiver ends only with the agent.
        let _ = self.events.send(event).await;
    }
}

impl Link {
    fn send(
        &mut self,
        body: ToGuard,
        fd: Option<rustix::fd::BorrowedFd<'_>>,
        reply: Option<oneshot::Sender<Result<(), GuardError>>>,
    ) -> io::Result<()> {
        self.seq += 1;
        let exit = matches!(body, ToGuard::Exit);
        let request = Request {
            seq: self.seq,
            body,
        };
        let bytes = serde_json::to_vec(&request)?;
        send_packet(self.socket.get_ref(), &bytes, fd)?;
        let asked = Instant::now();
        self.pending
            .insert(self.seq, Pending { asked, exit, reply });
        Ok(())
    }

    /// Tells of more guests; never so many that the socket is full.
    fn top_up(&mut self) -> io::Result<()> {
        while self.pending.len() < WINDOW
            && let Some((vm, guest)) = self.backlog.pop_front()
        {
            self.send(guest.message(&vm), Some(guest.pidfd.as_fd()), None)?;
            self.armed_by = self.seq;
        }
        Ok(())
    }

    fn oldest(&self) -> Option<Instant> {
        self.pending.first_key_value().map(|(_, one)| one.asked)
    }
}

fn connect(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    watch_readable(socket)
}
