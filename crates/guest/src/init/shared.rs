//! What the guest's threads share: the newest acknowledged record, readiness, the wish to shut down.

use quorate_guest::config::Config;
use quorate_guest::log::GuestBoot;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Nanoseconds since the guest's boot, standing still while its CPUs are stopped.
pub(crate) fn uptime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Nanoseconds since 1970 by the guest's clock.
pub(crate) fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |span| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
}

#[derive(Default)]
struct Progress {
    /// First record of this boot; 0 until there is one.
    first: u64,
    /// Newest acknowledged record.
    last: u64,
    shutdown: bool,
    writer_stopped: bool,
}

/// Shared by all threads.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) boot: GuestBoot,
    pub(crate) log_errors: AtomicU64,
    /// HTTP answers that it cannot serve, the guest agent nothing, and the port of records is closed.
    pub(crate) sick: AtomicBool,
    ready: AtomicBool,
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Shared {
    pub(crate) fn new(config: Config) -> Self {
        let mut boot = [0; 16];
        if let Ok(mut random) = File::open("/dev/urandom") {
            let _ = random.read_exact(&mut boot);
        }
        // A guest without entropy yet must still differ from its other boots.
        for (byte, salt) in boot.iter_mut().zip(wall_ns().to_le_bytes()) {
            *byte ^= salt;
        }
        Self {
            config,
            boot: GuestBoot(boot),
            log_errors: AtomicU64::new(0),
            sick: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            progress: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record is durable.
    pub(crate) fn acknowledge(&self, seq: u64) {
        let mut progress = self.progress();
        if progress.first == 0 {
            progress.first = seq;
        }
        progress.last = seq;
        self.changed.notify_all();
    }

    /// Newest acknowledged record; 0: none.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.progress().last
    }

    /// First record of this boot; 0: none.
    pub(crate) fn first(&self) -> u64 {
        self.progress().first
    }

    /// Waits for a record newer than `seen`; returns the newest, or `seen` after a second without one.
    pub(crate) fn wait_newer(&self, seen: u64) -> u64 {
        let progress = self.progress();
        let (progress, _) = self
            .changed
            .wait_timeout_while(progress, Duration::from_secs(1), |progress| {
                progress.last <= seen
            })
            .unwrap_or_else(PoisonError::into_inner);
        progress.last.max(seen)
    }

    /// Returns when this boot's first record is durable, at once when there is no disk.
    pub(crate) fn wait_first_record(&self) {
        if self.config.disk.is_some() {
            while self.wait_newer(0) == 0 {}
        }
    }

    pub(crate) fn set_ready(&self) {
        self.ready.store(true, Ordering::SeqCst);
    }

    pub(crate) fn ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    /// Asks PID 1 to power off.
    pub(crate) fn request_shutdown(&self) {
        self.progress().shutdown = true;
        self.changed.notify_all();
    }

    pub(crate) fn shutdown_requested(&self) -> bool {
        self.progress().shutdown
    }

    /// The log writer will not touch the disk again.
    pub(crate) fn writer_stopped(&self) {
        self.progress().writer_stopped = true;
        self.changed.notify_all();
    }

    /// Waits for the log writer to end, at most `limit`.
    pub(crate) fn wait_writer(&self, limit: Duration) {
        let running = |progress: &mut Progress| !progress.writer_stopped;
        if self.config.disk.is_some() {
            let _ = self
                .changed
                .wait_timeout_while(self.progress(), limit, running);
        }
    }

    /// Returns when a shutdown was asked for, or after a second (`false`).
    pub(crate) fn wait_shutdown(&self) -> bool {
        let progress = self.progress();
        let (progress, _) = self
            .changed
            .wait_timeout_while(progress, Duration::from_secs(1), |progress| {
                !progress.shutdown
            })
            .unwrap_or_else(PoisonError::into_inner);
        progress.shutdown
    }
}

/// Writes over a piece of memory again and again, so that a live migration takes long.
pub(crate) fn start_dirtying(shared: &Arc<Shared>) {
    const PAGE: usize = 4096;
    const TICK: Duration = Duration::from_millis(10);
    let pages = usize::try_from(shared.config.dirty_mib).unwrap_or(0) * 256;
    let per_tick = usize::try_from(shared.config.dirty_mib_per_s * 256 / 100).unwrap_or(0);
    if pages == 0 || per_tick == 0 {
        return;
    }
    std::thread::spawn(move || {
        let mut memory = vec![0_u8; pages * PAGE];
        let (mut page, mut value) = (0, 0_u8);
        loop {
            for _ in 0..per_tick {
                memory[page * PAGE] = value;
                page = (page + 1) % pages;
                value = value.wrapping_add(u8::from(page == 0));
            }
            std::hint::black_box(&mut memory);
            std::thread::sleep(TICK);
        }
    });
}
