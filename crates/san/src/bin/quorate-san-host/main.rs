//! Runs in a guest that plays a host: does on the guest's LUNs what the test asks for, with the real pools and the real
//! reservation module, and answers on a serial port. In the target's guest it runs the commands of an administrator ([`shell`]).
//!
//! Owns: one line in, one line of JSON out. Always holds: a record of the log counts as
//! acknowledged only after the device said that it is durable. Must not: decide anything.
//! Why a serial port: it works when the network, and with it the SAN, is cut.
//!
//! ```text
//! acquire|register|handover|takeover|release H E [force]      H: host number, E: epoch; force: of acquire
//! repair H E [H E]        the second pair: the target of a migration under way
//! inspect | read | drill H E | stranger KEY
//! log start BOOT | log status | log stop | log pause | log resume    paused: nothing of it is under way, as of a guest that stands still
//! vm own H E SPENT in|out [busy] [KEY...] | vm register H E | vm handover H E [H E] | vm leave H | cut VICTIM E     what the agent does, on both LUNs;
//!                         KEY: a stranger's that may be pushed off the first one
//! use lun0 | use third PASSWORD [list]     which unit all but `vm` is about: of the pool of block devices, or of one of the
//!                         kind `iscsi` that the kernel opens, by reservations or by the SAN's list
//! pool                    what the pool of that unit says: its check, its images, what it proves, and the unit
//! attempt H               the drill of a pool (`quorate storage drill`), as the daemon records it
//! patience SECONDS        after which requests to a lost session fail
//! ```
#![allow(
    clippy::disallowed_methods,
    reason = "a guest program whose pace is time itself"
)]

mod shell;
mod writer;

use quorate_san::{ACCOUNT, CLUSTER, TARGET_IQN};
use quorate_storage::reservation::{
    Claim, ClusterTag, Command, Facts, Inspection, LinuxDevice, Outcome, Reservation,
    ReservationDevice as _, ReservationError, ReservationKey, Strangers, Trouble, Units,
};
use quorate_storage::{
    BlockConfig, BlockPoolDriver, DiskFormat, DiskSource, IscsiConfig, IscsiPoolDriver, Login, Pool,
};
use quorate_types::HostName;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use writer::Writer;

/// Where the pool finds its devices, and the name of the one there.
const POOL: &str = "/run/luns";
const IMAGE: &str = "lun0";
const DISK: &str = "/dev/sda";
/// The second one, in which nobody writes a log.
const SECOND: (&str, &str) = ("lun1", "/dev/sdb");
const DEADLINE: Duration = Duration::from_secs(20);

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
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (path, name, portal) = match &words[..] {
        [path, name, portal] => (path, name.clone(), portal.clone()),
        [path, _target] => (path, String::new(), String::new()),
        _ => {
            return Err(io::Error::other(
                "usage: quorate-san-host TTY target|NAME PORTAL",
            ));
        }
    };
    let mut tty = OpenOptions::new().read(true).write(true).open(path)?;
    let mut raw = rustix::termios::tcgetattr(&tty)?;
    raw.make_raw();
    rustix::termios::tcsetattr(&tty, rustix::termios::OptionalActions::Now, &raw)?;
    if name.is_empty() {
        return shell::serve(tty);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::fs::create_dir_all(POOL)?;
    for (image, disk) in [(IMAGE, DISK), SECOND] {
        std::os::unix::fs::symlink(disk, format!("{POOL}/{image}"))?;
    }
    let pool = Arc::new(BlockPoolDriver::new(BlockConfig {
        pool: "san".into(),
        path: POOL.into(),
        cluster: CLUSTER.into(),
        reservations: true,
        deadline: DEADLINE,
    }));
    let mut host = Host {
        subject: Subject {
            pool: Arc::clone(&pool) as Arc<dyn Pool>,
            image: IMAGE.to_owned(),
            device: DISK.into(),
        },
        name,
        portal,
        pool,
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

/// The unit that commands are about.
struct Subject {
    pool: Arc<dyn Pool>,
    image: String,
    device: PathBuf,
}

struct Host {
    name: String,
    portal: String,
    pool: Arc<BlockPoolDriver>,
    subject: Subject,
    log: Option<Writer>,
}

/// Has requests to a session that is lost fail after so many seconds.
fn set_patience(seconds: &str) -> io::Result<()> {
    for session in std::fs::read_dir("/sys/class/iscsi_session")? {
        std::fs::write(session?.path().join("recovery_tmo"), seconds)?;
    }
    Ok(())
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

    /// The pool of the target with an account, opened by the kernel.
    fn iscsi(&self, password: &str, has_list: bool) -> Result<IscsiPoolDriver, String> {
        let mut spec = json!({
            "portals": [self.portal], "target": TARGET_IQN, "opened_by": "kernel",
            "chap": { "user": ACCOUNT, "secret": "san" },
        });
        if has_list {
            spec["access"] = json!({ "lio": {} });
        }
        let spec: quorate_types::IscsiPool =
            serde_json::from_value(spec).map_err(|error| error.to_string())?;
        let host = HostName::new(&self.name).map_err(|error| error.to_string())?;
        Ok(IscsiPoolDriver::new(IscsiConfig {
            pool: "iscsi".into(),
            initiator: spec.initiator(CLUSTER, &host),
            cluster: CLUSTER.into(),
            login: Some(Login {
                user: ACCOUNT.into(),
                password: password.to_owned(),
            }),
            missing_secret: None,
            deadline: DEADLINE,
            spec,
        }))
    }

    async fn choose(&mut self, words: &[&str]) -> Result<Value, String> {
        let (pool, image): (Arc<dyn Pool>, &str) = match words {
            ["third", password, list @ ..] => {
                (Arc::new(self.iscsi(password, !list.is_empty())?), "third")
            }
            [image] => (Arc::clone(&self.pool) as Arc<dyn Pool>, *image),
            _ => return Err(format!("`use {}` is no command", words.join(" "))),
        };
        let info = pool.disk_info(image, DiskFormat::Raw).await;
        let info = info.map_err(|error| error.to_string())?;
        let DiskSource::Device(device) = info.source else {
            return Err(format!("{image} is no device: {:?}", info.source));
        };
        let told = json!({ "device": device, "bytes": info.virtual_bytes });
        let image = image.to_owned();
        self.subject = Subject {
            pool,
            image,
            device,
        };
        Ok(told)
    }

    /// What `quorate storage show` is made of.
    async fn look(&self) -> Result<Value, String> {
        let Subject { pool, image, .. } = &self.subject;
        let facts = pool.check().await;
        let images = pool.list_images().await.map_err(|e| e.to_string())?;
        let info = pool.disk_info(image, DiskFormat::Raw).await;
        let images: Vec<Value> = images
            .into_iter()
            .map(|seen| json!({ "image": seen.image, "bytes": seen.virtual_bytes, "problem": seen.problem }))
            .collect();
        Ok(json!({
            "kind": pool.kind(),
            "usable": facts.usable(),
            "problem": facts.problem,
            "proof": pool.fence_proof().map(|proof| format!("{proof:?}")),
            "images": images,
            "bytes": info.map_err(|e| e.to_string())?.virtual_bytes,
        }))
    }

    /// The unit's reservations; where its pool does not use them, what is asked is answered all the same.
    async fn reservation(&self) -> Result<Reservation, String> {
        let Subject {
            pool,
            image,
            device,
        } = &self.subject;
        let unit = pool.reservation(image).await.map_err(|e| e.to_string())?;
        Ok(unit.unwrap_or_else(|| {
            let device = Arc::new(LinuxDevice::new(device));
            Reservation::new(device, ClusterTag::of(CLUSTER), DEADLINE)
        }))
    }

    async fn as_the_agent(&self, words: &[&str]) -> Result<Value, String> {
        let units = self.vm().await?;
        let done = match words {
            ["own", host, epoch, spent, cut, more @ ..] => {
                let keys = more.iter().filter(|word| **word != "busy");
                let taken = Strangers::These {
                    keys: keys.map(|key| number(key)).collect::<Result<_, _>>()?,
                    hold: true,
                };
                let claim = Claim {
                    spent: spent.parse().map_err(|_| "SPENT is an epoch")?,
                    past_cut: *cut == "in",
                    busy: more.contains(&"busy"),
                    taken: [(IMAGE.to_owned(), taken)].into(),
                };
                units.own(key(host, epoch)?, &claim).await
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
        match words {
            ["use", words @ ..] => return self.choose(words).await,
            ["pool"] => return self.look().await,
            ["log", words @ ..] => return self.writing(words),
            ["patience", seconds] => {
                let set = set_patience(seconds).map_err(|error| error.to_string());
                return set.map(|()| json!({}));
            }
            _ => {}
        }
        let reservation = self.reservation().await?;
        let strangers = match words.last() {
            Some(&"force") => Strangers::All,
            _ => Strangers::Refuse,
        };
        match words {
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
                let device = LinuxDevice::new(&self.subject.device);
                let facts = Facts::read(&device).map_err(|e| e.to_string())?;
                Ok(json!({ "generation": facts.generation }))
            }
            ["drill", host, epoch] => {
                let report = reservation.drill(key(host, epoch)?).await.map_err(say)?;
                Ok(
                    json!({ "report": report.to_string(), "proof": report.proof.is_some(),
                    "persistent": report.persistent }),
                )
            }
            ["attempt", host] => {
                let report = reservation.drill(key(host, "1")?).await.map_err(say)?;
                Ok(
                    json!({ "passed": report.proof.is_some(), "steps": report.sentences(&self.name) }),
                )
            }
            ["stranger", raw] => {
                let raw = number(raw)?;
                let commands = [
                    Command::Register { key: raw },
                    Command::Reserve { key: raw },
                ];
                for command in commands {
                    LinuxDevice::new(&self.subject.device)
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
                    "acquire" => reservation.acquire(mine, strangers).await,
                    "register" => reservation.register(mine).await,
                    "handover" => reservation.hand_over(mine, None).await,
                    "takeover" => reservation.take_over(mine).await,
                    "release" => reservation.release(mine).await,
                    _ => return Err(format!("`{verb}` is no command")),
                })
            }
            _ => Err(format!("`{}` is no command", words.join(" "))),
        }
    }
}

impl Host {
    fn writing(&mut self, words: &[&str]) -> Result<Value, String> {
        const NONE: &str = "no log was started";
        match words {
            ["start", boot] => {
                let boot = boot.parse::<u8>().map_err(|_| "boot is a number")?;
                let log = Writer::start(&self.subject.device, boot);
                self.log = Some(log.map_err(|e| e.to_string())?);
                Ok(json!({}))
            }
            ["status"] => Ok(self.log.as_ref().ok_or(NONE)?.counts().show()),
            [pace @ ("pause" | "resume")] => {
                let log = self.log.as_ref().ok_or(NONE)?;
                log.set_paused(*pace == "pause");
                Ok(json!({}))
            }
            ["stop"] => Ok(self.log.take().ok_or(NONE)?.stop().show()),
            _ => Err(format!("`log {}` is no command", words.join(" "))),
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
