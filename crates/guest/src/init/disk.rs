//! Writes the log: one record per period, each durable before it is acknowledged.

use crate::console::say;
use crate::shared::{Shared, uptime_ns, wall_ns};
use quorate_guest::log::{Kind, RECORD_BYTES, Record, Sector, checksum, find_end, slot_of};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// `O_DIRECT` wants aligned memory.
#[repr(align(4096))]
struct Aligned(Sector);

struct Log {
    disk: File,
    slots: u64,
    next: u64,
    previous: u32,
}

/// Starts the writer, if there is a disk.
pub(crate) fn start(shared: &Arc<Shared>) {
    if let Some(path) = shared.config.disk.clone() {
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            write_until_shutdown(&shared, &path);
            shared.writer_stopped();
        });
    }
}

fn write_until_shutdown(shared: &Shared, path: &str) {
    let mut log = loop {
        match Log::open(shared, path) {
            Ok(log) => break log,
            Err(error) => {
                say(&format!("guest: cannot open the log on {path}: {error}"));
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    };
    let period = Duration::from_secs(1) / shared.config.log_hz;
    let mut kind = Kind::Boot;
    let mut due = Instant::now();
    while !shared.shutdown_requested() {
        match log.append(shared, kind) {
            Ok(seq) => {
                shared.acknowledge(seq);
                kind = Kind::Data;
            }
            Err(error) => {
                // Not acknowledged: the same record is written again.
                if shared.log_errors.fetch_add(1, Ordering::SeqCst) == 0 {
                    say(&format!("guest: cannot write record {}: {error}", log.next));
                }
            }
        }
        // After a pause of the whole guest: go on, do not catch up.
        due = (due + period).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

impl Log {
    fn open(shared: &Shared, path: &str) -> io::Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !Path::new(path).exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC;
        let mut disk = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let slots = disk.seek(SeekFrom::End(0))? / RECORD_BYTES as u64;
        if slots < 2 {
            return Err(io::Error::other("the disk is too small for a log"));
        }
        let end = find_end(slots, |slot| {
            let mut buffer = Aligned([0; RECORD_BYTES]);
            disk.read_exact_at(&mut buffer.0, slot * RECORD_BYTES as u64)?;
            Ok(buffer.0)
        })?;
        let mut log = Self {
            disk,
            slots,
            next: 0,
            previous: 0,
        };
        match end {
            Some((newest, _)) if newest.name != shared.config.name => {
                return Err(io::Error::other(format!(
                    "the disk belongs to guest `{}`, this one is `{}`",
                    newest.name, shared.config.name
                )));
            }
            Some((newest, sum)) => (log.next, log.previous) = (newest.seq + 1, sum),
            None => {
                log.append(shared, Kind::Header)?;
            }
        }
        Ok(log)
    }

    fn append(&mut self, shared: &Shared, kind: Kind) -> io::Result<u64> {
        let record = Record {
            kind,
            seq: self.next,
            boot: shared.boot,
            wall_ns: wall_ns(),
            uptime_ns: uptime_ns(),
            previous: self.previous,
            name: shared.config.name.clone(),
        };
        let buffer = Aligned(record.encode());
        let offset = slot_of(record.seq, self.slots) * RECORD_BYTES as u64;
        self.disk.write_all_at(&buffer.0, offset)?;
        self.next += 1;
        self.previous = checksum(&buffer.0);
        Ok(record.seq)
    }
}
