//! The guest's network services: UDP echo, the control port, numbered records, HTTP.
//!
//! Control port, one command per line:
//! ```text
//! status    -> one line of JSON
//! stream    -> `boot <boot id> <first>`, then `ack <seq>` for every record as it becomes durable
//! poweroff  -> `ok`, then an orderly shutdown     crash -> the kernel crashes
//! sick      -> `ok`; HTTP answers 503, the guest agent no more, and no new connection of records is accepted; those that
//!              there are go on
//! well      -> `ok`; all of them are as before
//! rogue ADDRESS -> `ok`, and it sends what guests must not, also as that address
//! ```

use crate::console::say;
use crate::power;
use crate::rogue;
use crate::shared::{Shared, uptime_ns, wall_ns};
use quorate_guest::flow::{RECORD, Record, identity};
use quorate_guest::{CONTROL_PORT, ECHO_PORT, FLOW_PORT, HTTP_PORT};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Connections served at the same time; more are closed at once.
const MAX_CONNECTIONS: usize = 64;
/// The same for connections of records: a test may hold 200 of them, all at one guest at worst.
const MAX_FLOWS: usize = 256;
const MAX_LINE: u64 = 4096;

/// Starts echo, control port and records.
pub(crate) fn start(shared: &Arc<Shared>) {
    std::thread::spawn(echo);
    let control = Arc::clone(shared);
    std::thread::spawn(move || listen(CONTROL_PORT, MAX_CONNECTIONS, &control, serve_control));
    let flows = Arc::clone(shared);
    std::thread::spawn(move || {
        let open = Arc::default();
        while listen_while_well(FLOW_PORT, MAX_FLOWS, &open, &flows) {}
    });
}

/// Starts HTTP: the sign that the guest is ready.
pub(crate) fn start_http(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || listen(HTTP_PORT, MAX_CONNECTIONS, &shared, serve_http));
}

fn echo() {
    let bound = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT));
    let socket = match bound.or_else(|_| UdpSocket::bind(("0.0.0.0", ECHO_PORT))) {
        Ok(socket) => socket,
        Err(error) => return say(&format!("guest: cannot bind UDP {ECHO_PORT}: {error}")),
    };
    let mut buffer = [0; 2048];
    loop {
        if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], peer);
        }
    }
}

type Serve = fn(TcpStream, &Arc<Shared>) -> io::Result<()>;

/// Both IPv6 and IPv4 where the kernel has IPv6.
fn bind(port: u16) -> Option<TcpListener> {
    let bound = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
    let bound = bound.or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    bound
        .inspect_err(|error| say(&format!("guest: cannot bind TCP {port}: {error}")))
        .ok()
}

fn listen(port: u16, most: usize, shared: &Arc<Shared>, serve: Serve) {
    let open = Arc::default();
    for stream in bind(port).iter().flat_map(TcpListener::incoming).flatten() {
        accept(stream, most, &open, shared, serve);
    }
}

/// Records: the port is closed while the guest is sick. Whether it can be opened at all.
fn listen_while_well(
    port: u16,
    most: usize,
    open: &Arc<AtomicUsize>,
    shared: &Arc<Shared>,
) -> bool {
    let Some(listener) = bind(port) else {
        return false;
    };
    let sick = || shared.sick.load(Ordering::SeqCst);
    // `knock` is what shows a sickness to a thread that waits here.
    for stream in listener.incoming().flatten().take_while(|_| !sick()) {
        accept(stream, most, open, shared, serve_flow);
    }
    drop(listener);
    while sick() {
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}

/// Lets who listens there look up.
fn knock(port: u16) {
    drop(TcpStream::connect(("127.0.0.1", port)));
}

fn accept(
    stream: TcpStream,
    most: usize,
    open: &Arc<AtomicUsize>,
    shared: &Arc<Shared>,
    serve: Serve,
) {
    if open.fetch_add(1, Ordering::SeqCst) >= most {
        open.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    let (shared, open) = (Arc::clone(shared), Arc::clone(open));
    std::thread::spawn(move || {
        let _ = serve(stream, &shared);
        open.fetch_sub(1, Ordering::SeqCst);
    });
}

fn serve_control(stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    stream.set_write_timeout(Some(Duration::from_secs(120)))?;
    let mut answers = stream.try_clone()?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if lines.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim() {
            "status" => answers.write_all(status(shared).as_bytes())?,
            "stream" => return send_acknowledgements(&mut answers, shared),
            "poweroff" => {
                answers.write_all(b"ok\n")?;
                shared.request_shutdown();
            }
            "crash" => power::crash(),
            word @ ("sick" | "well") => {
                shared.sick.store(word == "sick", Ordering::SeqCst);
                knock(FLOW_PORT);
                answers.write_all(b"ok\n")?;
            }
            other => match (other.strip_prefix("rogue "), &shared.config.ip) {
                (Some(address), Some(own)) => {
                    // First the answer: while it pretends it is heard by nobody.
                    answers.write_all(b"ok\n")?;
                    let (own, address) = (own.clone(), address.to_owned());
                    std::thread::spawn(move || rogue::misbehave(&own, &address));
                }
                _ => writeln!(
                    answers,
                    "error: unknown command `{other}`; known: status, stream, poweroff, crash, sick, well, rogue ADDRESS"
                )?,
            },
        }
    }
}

fn status(shared: &Shared) -> String {
    let mut line = serde_json::json!({
        "name": shared.config.name,
        "boot_id": shared.boot,
        "uptime_ms": uptime_ns() / 1_000_000,
        "wall_ms": wall_ns() / 1_000_000,
        "ready": shared.ready(),
        "first_seq": shared.first(),
        "last_acked_seq": shared.acknowledged(),
        "log_errors": shared.log_errors.load(Ordering::SeqCst),
    })
    .to_string();
    line.push('\n');
    line
}

/// Sequence numbers are contiguous within a boot, so the cursor is the whole queue: a slow client costs nothing.
fn send_acknowledgements(answers: &mut TcpStream, shared: &Shared) -> io::Result<()> {
    shared.wait_first_record();
    let first = shared.first();
    answers.write_all(format!("boot {} {first}\n", shared.boot).as_bytes())?;
    // What was durable before the client came is as durable as what comes now: one line says it all.
    let mut sent = shared.acknowledged();
    answers.write_all(format!("ack {sent}\n").as_bytes())?;
    loop {
        let newest = shared.wait_newer(sent);
        if newest == sent {
            // Nothing for a second: let a dead connection show itself.
            answers.write_all(b"idle\n")?;
        }
        let mut lines = String::new();
        for seq in sent + 1..=newest {
            lines.push_str(&format!("ack {seq}\n"));
        }
        answers.write_all(lines.as_bytes())?;
        sent = newest;
    }
}

/// Says its name, padded to a record's length, then answers records; a damaged one ends the connection.
fn serve_flow(mut stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    stream.set_write_timeout(Some(Duration::from_secs(120)))?;
    let mut greeting = [0; RECORD];
    for (to, from) in greeting.iter_mut().zip(shared.config.name.bytes()) {
        *to = from;
    }
    stream.write_all(&greeting)?;
    let mut boot = [0; 8];
    boot.copy_from_slice(&shared.boot.0[..8]);
    let who = identity(&shared.config.name, u64::from_le_bytes(boot));
    let mut bytes = [0; RECORD];
    loop {
        stream.read_exact(&mut bytes)?;
        let Some(record) = Record::decode(&bytes) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        stream.write_all(&Record { who, ..record }.encode())?;
    }
}

fn serve_http(mut stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).take(MAX_LINE);
    let mut request = String::new();
    lines.read_line(&mut request)?;
    let mut header = String::new();
    while lines.read_line(&mut header)? > 0 && !header.trim().is_empty() {
        header.clear();
    }
    let (code, body) = if shared.sick.load(Ordering::SeqCst) {
        ("503 Service Unavailable", "sick, as asked\n".to_owned())
    } else if request.starts_with("GET / ") {
        ("200 OK", format!("{}\n", shared.config.name))
    } else {
        ("404 Not Found", "only / is here\n".to_owned())
    };
    write!(
        stream,
        "HTTP/1.1 {code}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}
