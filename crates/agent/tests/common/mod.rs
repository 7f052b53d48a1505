//! A guard as a real process, guests to kill, and a QMP server that plays QEMU.
#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod peers;

use quorate_agent::guard::GuardOptions;
use quorate_agent::guard::client::{GuardClient, GuardConfig, GuardEvent, Registration};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

pub const SOON: Duration = Duration::from_secs(20);

/// This very program as a guard: the test binary must have a test `guard_process`.
pub fn config(dir: &Path) -> GuardConfig {
    let exe = std::env::current_exe().unwrap();
    let words = ["--exact", "guard_process", "--nocapture", "--", "--guard"];
    let mut command = vec![exe.into_os_string()];
    command.extend(words.map(Into::into));
    GuardConfig {
        command,
        options: GuardOptions {
            socket: dir.join("guard.sock"),
            watchdog: Some(format!("unix:{}", dir.join("wd").display())),
            watchdog_timeout: Duration::from_millis(500),
        },
        log: dir.join("guard.log"),
    }
}

/// What `guard_process` does when the binary was started as a guard.
pub fn be_a_guard() {
    let mut args = std::env::args_os();
    if args.any(|arg| arg == "--guard") {
        quorate_agent::guard::main(args);
    }
}

pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

pub struct Site {
    pub dir: TempDir,
    pub guard: GuardClient,
    pub events: mpsc::Receiver<GuardEvent>,
    /// What the supervisor that plays the watchdog has received.
    pub fed: std::sync::mpsc::Receiver<Vec<u8>>,
}

impl Site {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fed = supervise(&dir.path().join("wd"));
        let (events_tx, events) = mpsc::channel(16);
        let guard = GuardClient::start(config(dir.path()), events_tx);
        let site = Self {
            dir,
            guard,
            events,
            fed,
        };
        site.armed().await;
        site
    }

    pub async fn armed(&self) {
        let mut status = self.guard.status();
        let armed = status.wait_for(|status| status.armed && status.watchdog_ms == Some(500));
        let waited = tokio::time::timeout(SOON, armed).await.is_ok();
        let log = std::fs::read_to_string(self.dir.path().join("guard.log"));
        assert!(waited, "{log:?}");
    }

    pub fn guard_pid(&self) -> Pid {
        let pid = self.guard.status().borrow().pid.unwrap();
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }

    /// Returns the deadline.
    pub fn lease(&self, left: Duration) -> Instant {
        let left_ns = u64::try_from(left.as_nanos()).unwrap();
        self.guard.lease(boottime_ns() + left_ns, 250);
        Instant::now() + left
    }

    pub async fn guest(&self, vm: &str, qmp: &Path) -> Guest {
        let guest = Guest::spawn(&[]);
        self.register(vm, 1, &guest, qmp).await;
        guest
    }

    pub async fn register(&self, vm: &str, run: u64, guest: &Guest, qmp: &Path) {
        let pid = i32::try_from(guest.child.id()).unwrap();
        let raw = Pid::from_raw(pid).unwrap();
        let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).unwrap();
        let registration = Registration {
            run,
            pid,
            pidfd: Arc::new(pidfd),
            qmp: qmp.to_owned(),
            freezable: true,
        };
        self.guard.register(vm, registration).await.unwrap();
    }

    pub async fn event(&mut self) -> GuardEvent {
        let event = tokio::time::timeout(SOON, self.events.recv());
        event.await.unwrap().unwrap()
    }

    /// Whether the watchdog is fed within the time.
    pub fn fed_within(&self, time: Duration) -> bool {
        while self.fed.try_recv().is_ok() {}
        self.fed.recv_timeout(time).is_ok()
    }
}

/// Reads what the watchdog is told, as long as anybody wants to know.
fn supervise(path: &Path) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let socket = UnixDatagram::bind(path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok(len) = socket.recv(&mut buffer) {
            if sender.send(buffer[..len].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Drop for Site {
    fn drop(&mut self) {
        let pid = self.guard.status().borrow().pid;
        if let Some(pid) = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

pub struct Guest {
    pub child: Child,
}

impl Guest {
    /// A process that waits for the end of its input, which is the end of this program at the latest: however a
    /// test ends, nothing is left behind. It has no child, and these words on its command line.
    pub fn spawn(words: &[&str]) -> Self {
        let child = Command::new("sh")
            .args(["-c", "read line", "qemu"])
            .args(words)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { child }
    }

    /// The signal that ended it; waits for the end.
    pub async fn signal(&mut self) -> Option<i32> {
        let end = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.signal();
            }
            assert!(Instant::now() < end, "it lives still");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A QMP server that plays QEMU.
#[derive(Clone, Default)]
pub struct Fake {
    /// It knows `blockdev-set-active`.
    pub disks: bool,
    /// An outgoing migration is under way.
    pub migrating: bool,
    pub stops: Arc<AtomicU32>,
    /// Makes it resume by itself.
    pub resume: Arc<tokio::sync::Notify>,
}

pub fn serve(path: PathBuf, fake: Fake) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(talk(stream, fake.clone()));
        }
    });
}

async fn talk(stream: tokio::net::UnixStream, fake: Fake) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let greeting = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    let mut alive = write.write_all(greeting).await.is_ok();
    let (mut running, mut migrating) = (true, fake.migrating);
    while alive {
        let line = tokio::select! {
            line = lines.next_line() => line,
            () = fake.resume.notified() => {
                running = true;
                alive = write.write_all(b"{\"event\": \"RESUME\"}\r\n").await.is_ok();
                continue;
            }
        };
        let Ok(Some(line)) = line else {
            return;
        };
        let request: serde_json::Value = serde_json::from_str(&line).unwrap();
        let id = request["id"].clone();
        let answer =
            |value: serde_json::Value| format!("{{\"return\": {value}, \"id\": {id}}}\r\n");
        let text = match request["execute"].as_str().unwrap() {
            "stop" => {
                running = false;
                fake.stops.fetch_add(1, Ordering::SeqCst);
                answer(serde_json::json!({}))
            }
            "query-migrate" if migrating => answer(serde_json::json!({"status": "active"})),
            "query-migrate" => answer(serde_json::json!({"status": "cancelled"})),
            "migrate_cancel" => {
                // As QEMU does: the source is resumed.
                (migrating, running) = (false, true);
                answer(serde_json::json!({})) + "{\"event\": \"RESUME\"}\r\n"
            }
            "blockdev-set-active" if !fake.disks => {
                let error = "{\"class\": \"CommandNotFound\", \"desc\": \"x\"}";
                format!("{{\"error\": {error}, \"id\": {id}}}\r\n")
            }
            "query-status" => answer(serde_json::json!({"running": running})),
            _ => answer(serde_json::json!({})),
        };
        alive = write.write_all(text.as_bytes()).await.is_ok();
    }
}

/// A QEMU that can be frozen, serving in the site's directory.
pub fn good(site: &Site, name: &str) -> (PathBuf, Fake) {
    let path = site.dir.path().join(name);
    let fake = Fake {
        disks: true,
        ..Fake::default()
    };
    serve(path.clone(), fake.clone());
    (path, fake)
}

pub fn froze(vm: &str) -> GuardEvent {
    let (vm, run) = (vm.to_owned(), 1);
    GuardEvent::Froze { vm, run }
}
