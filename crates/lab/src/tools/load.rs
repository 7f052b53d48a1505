//! Holds many TCP connections to a service and judges them: numbered, checksummed records, each answered with the
//! identity of who answers.
//!
//! ```text
//! connect -> greeting: the member's name -> record n -> answer n (same bytes, who) -> pause -> record n + 1 ...
//! ```
//! Always holds: a connection counts as *broken* when it ends, or when an answer is damaged, out of order or absent
//! for [`ANSWER_WITHIN`]; as *moved* when somebody else than before answers. Nothing is tried again on a broken one.
//! *Fresh* connections (`--fresh-ms`) ask one record each: they tell whom new clients reach.

use super::end_of_input;
use quorate_guest::flow::{RECORD, Record};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An answer that takes longer is none.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// For a connection to be made.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Waits for an answer that are noted.
const STALL: Duration = Duration::from_millis(20);
/// Stalls kept for each connection, the newest ones.
const STALLS: usize = 400;
/// Between two writings of the report while it works.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct LoadArgs {
    /// Address and port of the service; of several servers, each has its share of the connections.
    #[arg(required = true)]
    pub targets: Vec<SocketAddr>,
    /// Connections held.
    #[arg(long, default_value_t = 24)]
    pub connections: u32,
    /// Pause between an answer and the next record, in microseconds.
    #[arg(long, default_value_t = 5000)]
    pub interval_us: u64,
    /// Opens a connection more for one record, so often; 0: none.
    #[arg(long, default_value_t = 0)]
    pub fresh_ms: u64,
    /// Writes the report there meanwhile, again and again.
    #[arg(long)]
    pub state: Option<PathBuf>,
}

/// Result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Connections held, in order.
    pub connections: Vec<Connection>,
    /// Fresh ones.
    pub fresh: Fresh,
}

/// One connection.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Connection {
    /// The client's address and port.
    pub local: Option<SocketAddr>,
    /// Name of the VM that answered first.
    pub member: String,
    /// Answers.
    pub exchanges: u64,
    /// Times that somebody else answered.
    pub moved: u64,
    /// Why it is broken.
    pub broken: Option<String>,
    /// When it broke, milliseconds since 1970.
    pub broken_at_ms: Option<u64>,
    /// Longest wait for an answer, in microseconds.
    pub longest_us: u64,
    /// Waits of 20 ms and more.
    pub stalls: Vec<Stall>,
}

/// A long wait for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// How long, in microseconds.
    pub length_us: u64,
    /// When it ended, milliseconds since 1970.
    pub until_ms: u64,
}

/// Connections for one record each.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Fresh {
    /// Answered, by the VM's name.
    pub answered: BTreeMap<String, u64>,
    /// Not answered.
    pub failed: u64,
    /// The last failure.
    pub last_failure: Option<String>,
    /// Longest time from the first SYN to the answer, in microseconds.
    pub longest_us: u64,
    /// When the last one was answered, milliseconds since 1970.
    pub last_ms: u64,
}

impl LoadArgs {
    /// Whom a connection is made to, by its number.
    fn target(&self, number: usize) -> SocketAddr {
        self.targets[number % self.targets.len()]
    }
}

impl LoadReport {
    /// Connections that answer.
    #[must_use]
    pub fn held(&self) -> usize {
        let held = |one: &&Connection| one.exchanges > 0 && one.broken.is_none();
        self.connections.iter().filter(held).count()
    }

    /// Connections that are broken.
    #[must_use]
    pub fn broken(&self) -> Vec<&Connection> {
        let broken = |one: &&Connection| one.broken.is_some();
        self.connections.iter().filter(broken).collect()
    }

    /// Times that a connection was answered by somebody else.
    #[must_use]
    pub fn moved(&self) -> u64 {
        self.connections.iter().map(|one| one.moved).sum()
    }

    /// How many connections each VM has.
    #[must_use]
    pub fn members(&self) -> BTreeMap<&str, usize> {
        let mut members = BTreeMap::new();
        for one in &self.connections {
            *members.entry(one.member.as_str()).or_default() += 1;
        }
        members
    }

    /// For each connection the longest wait that ended at that time or later, in microseconds.
    #[must_use]
    pub fn longest_since(&self, since_ms: u64) -> Vec<u64> {
        let longest = |one: &Connection| {
            let recent = one.stalls.iter().filter(|stall| stall.until_ms >= since_ms);
            recent.map(|stall| stall.length_us).max().unwrap_or(0)
        };
        self.connections.iter().map(longest).collect()
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn wall_ms() -> u64 {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(wall.map_or(0, |span| span.as_millis())).unwrap_or(u64::MAX)
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

type SharedReport = Rc<RefCell<LoadReport>>;

/// Works until the standard input ends.
pub fn run(args: &LoadArgs) -> std::io::Result<LoadReport> {
    let ended = end_of_input();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report: SharedReport = Rc::default();
    let count = usize::try_from(args.connections).unwrap_or(0);
    report.borrow_mut().connections = vec![Connection::default(); count];
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        let pause = Duration::from_micros(args.interval_us);
        for index in 0..count {
            let (report, target) = (Rc::clone(&report), args.target(index));
            tokio::task::spawn_local(async move { hold(&report, index, target, pause).await });
        }
        if args.fresh_ms > 0 {
            let every = Duration::from_millis(args.fresh_ms);
            tokio::task::spawn_local(open_fresh(Rc::clone(&report), args.clone(), every));
        }
        let mut shown = Instant::now();
        while !ended.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
            if shown.elapsed() >= SHOW_EVERY {
                shown = Instant::now();
                show(args.state.as_deref(), &report.borrow());
            }
        }
    });
    Ok(report.borrow().clone())
}

/// Replaced as a whole, so that a reader never sees half of it.
fn show(path: Option<&Path>, report: &LoadReport) {
    let Some(path) = path else {
        return;
    };
    let part = path.with_extension("part");
    if let Ok(text) = serde_json::to_vec(report)
        && std::fs::write(&part, text).is_ok()
    {
        let _ = std::fs::rename(&part, path);
    }
}

async fn hold(report: &SharedReport, index: usize, target: SocketAddr, pause: Duration) {
    let Err(why) = talk(report, index, target, pause).await;
    let one = &mut report.borrow_mut().connections[index];
    one.broken = Some(why);
    one.broken_at_ms = Some(wall_ms());
}

enum Never {}

async fn talk(
    report: &SharedReport,
    index: usize,
    target: SocketAddr,
    pause: Duration,
) -> Result<Never, String> {
    let (mut stream, member) = connect(target).await?;
    {
        let one = &mut report.borrow_mut().connections[index];
        one.local = stream.local_addr().ok();
        one.member = member;
    }
    let connection = u32::try_from(index).unwrap_or(u32::MAX);
    let mut known = None;
    for number in 1.. {
        let asked = Instant::now();
        let who = ask(&mut stream, connection, number).await?;
        let took = asked.elapsed();
        {
            let one = &mut report.borrow_mut().connections[index];
            one.exchanges = number;
            one.moved += u64::from(known.is_some_and(|known| known != who));
            note(one, took);
        }
        known = Some(who);
        tokio::time::sleep(pause).await;
    }
    Err("it has no numbers left".to_owned())
}

fn note(one: &mut Connection, took: Duration) {
    one.longest_us = one.longest_us.max(micros(took));
    if took >= STALL {
        if one.stalls.len() == STALLS {
            one.stalls.remove(0);
        }
        one.stalls.push(Stall {
            length_us: micros(took),
            until_ms: wall_ms(),
        });
    }
}

/// Connects and reads the member's name.
async fn connect(target: SocketAddr) -> Result<(TcpStream, String), String> {
    let connecting = async {
        let mut stream = TcpStream::connect(target).await?;
        stream.set_nodelay(true)?;
        let mut greeting = [0; RECORD];
        stream.read_exact(&mut greeting).await?;
        let name = String::from_utf8_lossy(&greeting)
            .trim_end_matches('\0')
            .to_owned();
        Ok::<_, std::io::Error>((stream, name))
    };
    match timeout(CONNECT_WITHIN, connecting).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(error)) => Err(format!("cannot connect: {error}")),
        Err(_) => Err("cannot connect: no answer".to_owned()),
    }
}

/// Asks one record; who has answered.
async fn ask(stream: &mut TcpStream, connection: u32, number: u64) -> Result<u64, String> {
    let asked = Record {
        connection,
        number,
        who: 0,
    };
    let exchange = async {
        stream.write_all(&asked.encode()).await?;
        let mut bytes = [0; RECORD];
        stream.read_exact(&mut bytes).await?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = match timeout(ANSWER_WITHIN, exchange).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => return Err(format!("record {number}: {error}")),
        Err(_) => return Err(format!("record {number}: no answer")),
    };
    match Record::decode(&bytes) {
        Some(answer) if (Record { who: 0, ..answer }) == asked => Ok(answer.who),
        Some(answer) => Err(format!("record {number}: answered with {answer:?}")),
        None => Err(format!("record {number}: the answer is damaged")),
    }
}

async fn open_fresh(report: SharedReport, args: LoadArgs, every: Duration) {
    for number in 1.. {
        let target = args.target(usize::try_from(number).unwrap_or(0));
        let report = Rc::clone(&report);
        // One that hangs must not hold up the next.
        tokio::task::spawn_local(async move {
            let begun = Instant::now();
            let asked = async {
                let (mut stream, member) = connect(target).await?;
                ask(&mut stream, u32::MAX, number).await?;
                Ok::<_, String>(member)
            };
            let result = asked.await;
            let fresh = &mut report.borrow_mut().fresh;
            match result {
                Ok(member) => {
                    *fresh.answered.entry(member).or_default() += 1;
                    fresh.longest_us = fresh.longest_us.max(micros(begun.elapsed()));
                    fresh.last_ms = wall_ms();
                }
                Err(why) => {
                    fresh.failed += 1;
                    fresh.last_failure = Some(why);
                }
            }
        });
        tokio::time::sleep(every).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn serve(answers: Vec<(u64, u64)>) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut greeting = [0; RECORD];
            greeting[..3].copy_from_slice(b"web");
            stream.write_all(&greeting).await.unwrap();
            for (number, who) in answers {
                let mut bytes = [0; RECORD];
                stream.read_exact(&mut bytes).await.unwrap();
                let record = Record::decode(&bytes).unwrap();
                let answer = Record {
                    number,
                    who,
                    ..record
                };
                stream.write_all(&answer.encode()).await.unwrap();
            }
        });
        address
    }

    async fn judge(answers: Vec<(u64, u64)>) -> Connection {
        let report: SharedReport = Rc::default();
        report.borrow_mut().connections = vec![Connection::default()];
        let address = serve(answers).await;
        hold(&report, 0, address, Duration::ZERO).await;
        report.take().connections.remove(0)
    }

    #[test]
    fn servers_have_equal_shares_of_the_connections() {
        let servers = ["10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"].map(|one| one.parse().unwrap());
        let args = LoadArgs {
            targets: servers.to_vec(),
            connections: 7,
            interval_us: 0,
            fresh_ms: 0,
            state: None,
        };
        let targets: Vec<SocketAddr> = (0..7).map(|number| args.target(number)).collect();
        assert_eq!(
            targets,
            [servers.as_slice(), &servers, &servers[..1]].concat()
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_end_a_wrong_answer_and_another_member_are_told_apart() {
        let tasks = tokio::task::LocalSet::new();
        tasks
            .run_until(async {
                let ended = judge(vec![(1, 5), (2, 5)]).await;
                assert_eq!((ended.exchanges, ended.moved), (2, 0));
                assert_eq!(ended.member, "web");
                assert!(ended.broken.unwrap().starts_with("record 3"));
                let doubled = judge(vec![(1, 5), (1, 5)]).await;
                assert!(doubled.broken.unwrap().contains("answered with"));
                let moved = judge(vec![(1, 5), (2, 6), (3, 6)]).await;
                assert_eq!((moved.exchanges, moved.moved), (3, 1));
            })
            .await;
    }
}
