//! Runs in a guest that plays a host: does on the guest's `/dev/sdX` what the test asks for, with the real
//! reservation module, and answers on a serial port.
//!
//! Owns: one line in, one line of JSON out. Always holds: a record of the log counts as
//! acknowledged only after the device said that it is durable. Must not: decide anything.
//! Why a serial port: it works when the network, and with it the SAN, is cut.
//!
//! ```text
//! acquire|register|handover|takeover|release H E [force]      H: host number, E: epoch
//! repair H E [H E]        the second pair: the target of a migration under way
//! inspect | read | drill H E | stranger KEY
//! log start BOOT | log status | log stop
//! vm own H E SPENT in|out | vm register H E | vm handover H E [H E] | vm leave H | cut VICTIM E     what the agent does, on both LUNs
//! ```
#![allow(
    clippy::disallowed_methods,
    reason = "a guest program whose pace is time itself"
)]

use quorate_guest::log::{
    GuestBoot, Kind, RECORD_BYTES, Record, Sector, checksum, find_end, slot_of,
};
use quorate_san::CLUSTER;
use quorate_storage::reservation::{
    ClusterTag, Command, Facts, Inspection, LinuxDevice, Outcome, ReservationDevice as _,
    ReservationError, ReservationKey, Trouble, Units,
};
use quorate_storage::{BlockConfig, BlockPoolDriver, Pool as _};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where the pool finds its devices, and the name of the one there.
const POOL: &str = "/run/luns";
const IMAGE: &str = "lun0";
const DISK: &str = "/dev/sda";
/// The second one, in which nobody writes a log.
const SECOND: (&str, &str) = ("lun1", "/dev/sdb");
const DEADLINE: Duration = Duration::from_secs(20);
const PERIOD: Duration = Duration::from_millis(4);
/// The name in the log's records.
const NAME: &str = "san";

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("quorate-san-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let path = std::env::args()
        .nth(1)
        .ok_or_else(|| io::Error::other("usage: quorate-san-host TTY"))?;
    let mut tty = OpenOptions::new().read(true).write(true).open(path)?;
    let mut raw = rustix::termios::tcgetattr(&tty)?;
    raw.make_raw();
    rustix::termios::tcsetattr(&tty, rustix::termios::OptionalActions::Now, &raw)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::fs::create_dir_all(POOL)?;
    for (image, disk) in [(IMAGE, DISK), SECOND] {
        std::os::unix::fs::symlink(disk, format!("{POOL}/{image}"))?;
    }
    let mut host = Host {
        pool: BlockPoolDriver::new(BlockConfig {
            pool: "san".into(),
            path: POOL.into(),
            cluster: CLUSTER.into(),
            reservations: true,
            deadline: DEADLINE,
        }),
        log: None,
    };
    println!("SAN-READY host");
    for line in BufReader::new(tty.try_clone()?).lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let begun = Instant::now();
        let mut answer = match runtime.block_on(host.answer(&words)) {
            Ok(answer) => answer,
            Err(problem) => json!({ "error": problem }),
        };
        answer["us"] = json!(begun.elapsed().as_micros() as u64);
        tty.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

struct Host {
    pool: BlockPoolDriver,
    log: Option<Writer>,
}

impl Host {
    /// The units of a VM with a disk on each LUN.
    async fn vm(&self) -> Result<Units, String> {
        let mut units = Units::new();
        for image in [IMAGE, SECOND.0] {
            let unit = self.pool.reservation(image).await;
            let unit = unit.map_err(|error| error.to_string())?;
            units.push(image.to_owned(), unit.ok_or("it has none")?);
        }
        Ok(units)
    }

    async fn as_the_agent(&self, words: &[&str]) -> Result<Value, String> {
        let units = self.vm().await?;
        let done = match words {
            ["own", host, epoch, spent, cut] => {
                let spent = spent.parse().map_err(|_| "SPENT is an epoch")?;
                units.own(key(host, epoch)?, spent, *cut == "in").await
            }
            ["register", host, epoch] => units.register(key(host, epoch)?).await,
            ["handover", host, epoch, source @ ..] => {
                let source = match source {
                    [host, epoch] => Some(key(host, epoch)?),
                    _ => None,
                };
                units.hand_over(key(host, epoch)?, source).await
            }
            ["leave", host] => {
                let host = host.parse().map_err(|_| "H is a host's number")?;
                units.leave(host).await
            }
            _ => return Err(format!("`vm {}` is no command", words.join(" "))),
        };
        let kind = |trouble: &Trouble| match trouble {
            Trouble::Failed(_) => "failed",
            Trouble::Refused(_) => "refused",
            Trouble::Superseded(_) => "superseded",
        };
        Ok(match done {
            Ok(()) => json!({}),
            Err(trouble) => json!({ "error": trouble.to_string(), "kind": kind(&trouble) }),
        })
    }

    async fn answer(&mut self, words: &[&str]) -> Result<Value, String> {
        let reservation = self
            .pool
            .reservation_of(IMAGE)
            .await
            .map_err(|e| e.to_string())?;
        let force = words.last() == Some(&"force");
        match words {
            ["log", "start", boot] => {
                let boot = boot.parse::<u8>().map_err(|_| "boot is a number")?;
                self.log = Some(Writer::start(DISK, boot).map_err(|e| e.to_string())?);
                Ok(json!({}))
            }
            ["log", "status"] => match &self.log {
                Some(writer) => Ok(writer.counts().show()),
                None => Err("no log was started".into()),
            },
            ["log", "stop"] => match self.log.take() {
                Some(writer) => Ok(writer.stop().show()),
                None => Err("no log was started".into()),
            },
            ["vm", words @ ..] => self.as_the_agent(words).await,
            ["cut", victim, epoch] => {
                let epoch = epoch.parse().map_err(|_| "E is an epoch")?;
                let fence = ReservationKey::fence(ClusterTag::of(CLUSTER), epoch);
                let fence = fence.map_err(|error| error.to_string())?;
                let victim = victim.parse().map_err(|_| "VICTIM is a host's number")?;
                show(reservation.cut(fence, victim).await)
            }
            ["inspect"] => {
                let mut told = show_inspection(reservation.inspect().await.map_err(say)?);
                told["may_write"] = json!(reservation.may_write().await.map_err(say)?);
                Ok(told)
            }
            ["read"] => {
                let facts = Facts::read(&LinuxDevice::new(DISK)).map_err(|e| e.to_string())?;
                Ok(json!({ "generation": facts.generation }))
            }
            ["drill", host, epoch] => {
                let report = reservation.drill(key(host, epoch)?).await.map_err(say)?;
                Ok(
                    json!({ "report": report.to_string(), "proof": report.proof.is_some(),
                    "persistent": report.persistent }),
                )
            }
            ["stranger", raw] => {
                let raw = number(raw)?;
                let commands = [
                    Command::Register { key: raw },
                    Command::Reserve { key: raw },
                ];
                for command in commands {
                    LinuxDevice::new(DISK)
                        .command(command)
                        .map_err(|error| error.to_string())?;
                }
                Ok(json!({}))
            }
            ["repair", host, epoch, beside @ ..] => {
                let beside = match beside {
                    [host, epoch] => Some(key(host, epoch)?),
                    _ => None,
                };
                show(reservation.repair(key(host, epoch)?, beside).await)
            }
            [verb, host, epoch, ..] => {
                let mine = key(host, epoch)?;
                show(match *verb {
                    "acquire" => reservation.acquire(mine, force).await,
                    "register" => reservation.register(mine).await,
                    "handover" => reservation.hand_over(mine, None).await,
                    "takeover" => reservation.take_over(mine, force).await,
                    "release" => reservation.release(mine).await,
                    _ => return Err(format!("`{verb}` is no command")),
                })
            }
            _ => Err(format!("`{}` is no command", words.join(" "))),
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).map_err(|error| error.to_string())
}

fn key(host: &str, epoch: &str) -> Result<ReservationKey, String> {
    let (Ok(host), Ok(epoch)) = (host.parse(), epoch.parse()) else {
        return Err(format!("`{host} {epoch}` is no host and epoch"));
    };
    ReservationKey::new(ClusterTag::of(CLUSTER), host, epoch).map_err(|error| error.to_string())
}

fn say(error: ReservationError) -> String {
    error.to_string()
}

fn hex(keys: impl IntoIterator<Item = u64>) -> Vec<String> {
    keys.into_iter().map(|key| format!("{key:#018x}")).collect()
}

fn show(result: Result<Outcome, ReservationError>) -> Result<Value, String> {
    let outcome = result.map_err(say)?;
    let commands: Vec<&str> = outcome.commands.iter().map(Command::name).collect();
    Ok(json!({
        "commands": commands,
        "cut": hex(outcome.cut()),
        "keys": hex(outcome.after.keys.keys().copied()),
        "holder": outcome.after.held.map(|held| format!("{:#018x}", held.key)),
        "generation": outcome.after.generation,
    }))
}

fn show_inspection(seen: Inspection) -> Value {
    let initiators: Vec<String> = seen
        .nexuses
        .unwrap_or_default()
        .into_iter()
        .map(|nexus| nexus.initiator)
        .collect();
    json!({
        "keys": hex(seen.facts.keys.keys().copied()),
        "holder": seen.facts.held.map(|held| format!("{:#018x}", held.key)),
        "kind": seen.facts.held.map(|held| held.kind.to_string()),
        "foreign": hex(seen.foreign),
        "persistent": seen.persistent,
        "initiators": initiators,
    })
}

/// What became of the log's records.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
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
    fn show(self) -> Value {
        json!({ "first": self.first, "last": self.last, "records": self.records,
            "first_us": self.first_us, "refused": self.refused, "failed": self.failed, "errno": self.errno })
    }
}

/// The thread that writes the log until it is told to stop, whatever the device says.
struct Writer {
    counts: Arc<Mutex<Counts>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(path: &str, boot: u8) -> io::Result<Self> {
        let begun = Instant::now();
        let mut log = Log::open(path, boot)?;
        let counts = Arc::new(Mutex::new(Counts::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, stopped) = (Arc::clone(&counts), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let result = log.append();
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
            thread,
        })
    }

    fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(self) -> Counts {
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
    fn open(path: &str, boot: u8) -> io::Result<Self> {
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
