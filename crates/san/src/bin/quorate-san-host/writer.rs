//! The guest of a host: a thread that writes a checksummed log on its unit.
//!
//! Always holds: a record counts as acknowledged only after the device said that it is durable.

use quorate_guest::log::{
    GuestBoot, Kind, RECORD_BYTES, Record, Sector, checksum, find_end, slot_of,
};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_millis(4);
/// The name in the log's records.
const NAME: &str = "san";

/// What became of the log's records.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    first: u64,
    last: u64,
    records: u64,
    /// Until the first of them, from the start.
    first_us: u64,
    /// Failed because another host has the reservation (EBADE).
    refused: u64,
    /// Failed for another reason, and the last such.
    failed: u64,
    errno: i32,
}

impl Counts {
    pub(super) fn show(self) -> Value {
        json!({ "first": self.first, "last": self.last, "records": self.records,
            "first_us": self.first_us, "refused": self.refused, "failed": self.failed, "errno": self.errno })
    }
}

/// The thread that writes the log until it is told to stop, whatever the device says.
pub(super) struct Writer {
    counts: Arc<Mutex<Counts>>,
    stop: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
    /// Held while a write is under way.
    writes: Arc<Mutex<()>>,
    thread: JoinHandle<()>,
}

impl Writer {
    pub(super) fn start(path: &Path, boot: u8) -> io::Result<Self> {
        let begun = Instant::now();
        let mut log = Log::open(path, boot)?;
        let counts = Arc::new(Mutex::new(Counts::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, stopped) = (Arc::clone(&counts), Arc::clone(&stop));
        let (paused, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(())));
        let (pauses, write) = (Arc::clone(&paused), Arc::clone(&writes));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let under_way = write.lock().unwrap_or_else(PoisonError::into_inner);
                if pauses.load(Ordering::SeqCst) {
                    drop(under_way);
                    std::thread::sleep(PERIOD);
                    continue;
                }
                let result = log.append();
                drop(under_way);
                let mut counts = told.lock().unwrap_or_else(PoisonError::into_inner);
                match result {
                    Ok(seq) => {
                        if counts.records == 0 {
                            counts.first = seq;
                            counts.first_us = begun.elapsed().as_micros() as u64;
                        }
                        counts.last = seq;
                        counts.records += 1;
                    }
                    Err(error)
                        if error.raw_os_error() == Some(rustix::io::Errno::BADE.raw_os_error()) =>
                    {
                        counts.refused += 1;
                    }
                    Err(error) => {
                        counts.failed += 1;
                        counts.errno = error.raw_os_error().unwrap_or(-1);
                    }
                }
                drop(counts);
                std::thread::sleep(PERIOD);
            }
        });
        Ok(Self {
            counts,
            stop,
            paused,
            writes,
            thread,
        })
    }

    /// Stands still, or goes on. When it stands still nothing of it is under way.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
        drop(self.writes.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stop(self) -> Counts {
        self.stop.store(true, Ordering::SeqCst);
        let counts = Arc::clone(&self.counts);
        let _ = self.thread.join();
        *counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `O_DIRECT` wants aligned memory.
#[repr(align(4096))]
struct Aligned(Sector);

struct Log {
    disk: File,
    slots: u64,
    boot: GuestBoot,
    kind: Kind,
    next: u64,
    previous: u32,
}

impl Log {
    fn open(path: &Path, boot: u8) -> io::Result<Self> {
        let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC;
        let mut disk = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let slots = disk.seek(SeekFrom::End(0))? / RECORD_BYTES as u64;
        let end = find_end(slots, |slot| {
            let mut buffer = Aligned([0; RECORD_BYTES]);
            disk.read_exact_at(&mut buffer.0, slot * RECORD_BYTES as u64)?;
            Ok(buffer.0)
        })?;
        let mut log = Self {
            disk,
            slots,
            boot: GuestBoot([boot; 16]),
            kind: Kind::Header,
            next: 0,
            previous: 0,
        };
        match end {
            Some((newest, sum)) => (log.next, log.previous) = (newest.seq + 1, sum),
            None => {
                log.append()?;
            }
        }
        log.kind = Kind::Boot;
        Ok(log)
    }

    /// Writes the next record; when that fails it stays the next one.
    fn append(&mut self) -> io::Result<u64> {
        let seq = self.next;
        let buffer = Aligned(
            Record {
                kind: self.kind,
                seq,
                boot: self.boot,
                wall_ns: 0,
                uptime_ns: 0,
                previous: self.previous,
                name: NAME.into(),
            }
            .encode(),
        );
        let at = slot_of(seq, self.slots) * RECORD_BYTES as u64;
        self.disk.write_all_at(&buffer.0, at)?;
        self.previous = checksum(&buffer.0);
        self.next += 1;
        self.kind = Kind::Data;
        Ok(seq)
    }
}
