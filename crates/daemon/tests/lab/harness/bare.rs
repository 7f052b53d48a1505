//! The same guests migrated by bare QMP commands, without Quorate: what Quorate's moves are compared with.
//!
//! Owns: QEMU processes on lab hosts, with the very command line that Quorate's driver made for
//! the guest (read from `/proc`), only with other sockets, another console log and a tap of their own.
//! Always holds: they are gone when this is dropped.

use super::Cluster;
use super::guest::Guest;
use super::process::Copy;
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// Of TCP, for what is migrated; a guest adds the last number of its address.
const PORT: u16 = 7700;
/// For a guest to boot or to arrive.
const LIMIT: Duration = Duration::from_secs(60);

/// A QMP connection; events are skipped.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(cluster: &Cluster, socket: &Path) -> Self {
        let stream = cluster.eventually("QEMU's socket", Duration::from_secs(20), || {
            UnixStream::connect(socket).map_err(|error| error.to_string())
        });
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut qmp = Self(BufReader::new(stream));
        let greeting = qmp.line();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        qmp.run("qmp_capabilities", &json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut text = String::new();
        self.0.read_line(&mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn run(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        let mut text = request.to_string();
        text.push('\n');
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let answer = self.line();
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }
}

/// One QEMU.
struct Qemu {
    child: Child,
    qmp: Qmp,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest without Quorate.
pub(crate) struct Bare<'a> {
    cluster: &'a Cluster,
    guest: Guest,
    command: Vec<String>,
    runtime_dir: String,
    host: String,
    qemu: Qemu,
    count: u32,
}

/// What waits for a guest on another host.
struct Target {
    host: String,
    qemu: Qemu,
    uri: String,
}

/// The command line of a process.
pub(crate) fn command_line(copy: &Copy) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{}/cmdline", copy.pid)).unwrap();
    let line = line.strip_suffix(b"\0").unwrap_or(&line);
    line.split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

impl<'a> Bare<'a> {
    /// Stops a guest of Quorate's and boots the same one without it on the same host.
    pub(crate) fn instead_of(cluster: &'a Cluster, guest: &Guest) -> Self {
        let copy = cluster.wait_one_copy(&guest.name, LIMIT);
        let mut command = command_line(&copy);
        if let Some(at) = command.iter().position(|word| word == "-incoming") {
            command.drain(at..at + 2);
        }
        cluster.must(&["vm", "stop", &guest.name, "--hard", "--wait"]);
        let at = command.iter().position(|word| word == "-pidfile").unwrap() + 1;
        let runtime_dir = Path::new(&command[at]).parent().unwrap();
        let runtime_dir = runtime_dir.to_string_lossy().into_owned();
        let tap = tap(guest);
        let script =
            format!("ip tuntap add dev {tap} mode tap && ip link set {tap} master br-lan up");
        for host in cluster.hosts() {
            let mut shell = cluster.lab.command(&host, "sh");
            assert!(shell.args(["-c", &script]).status().unwrap().success());
        }
        Self {
            cluster,
            guest: guest.clone(),
            qemu: start(cluster, guest, &command, &runtime_dir, &copy.host, 0),
            command,
            runtime_dir,
            host: copy.host,
            count: 0,
        }
    }

    /// The host that it is on.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Waits until it has booted.
    pub(crate) fn wait_ready(&self) {
        let log = dir(self.cluster, &self.guest, 0).join("serial.log");
        self.cluster.eventually("the bare guest", LIMIT, || {
            let bytes = std::fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            text.contains(quorate_guest::READY_LINE)
                .then_some(())
                .ok_or_else(|| text.into_owned())
        });
    }

    /// Migrates it to another host under the 1 ms pinger; the blackout in milliseconds.
    pub(crate) fn blackout(&mut self, to: &str) -> f64 {
        let target = self.prepare(to);
        let pinger = self
            .cluster
            .lab
            .pinger(self.guest.address, Duration::from_millis(1))
            .unwrap();
        quorate_lab::wait::pause(Duration::from_millis(300));
        self.depart(&target);
        let (_, source) = self.arrive(target);
        quorate_lab::wait::pause(Duration::from_millis(500));
        let report = pinger.finish().unwrap();
        drop(source);
        report.longest_gap_us as f64 / 1000.0
    }

    fn prepare(&mut self, to: &str) -> Target {
        self.count += 1;
        let (cluster, guest) = (self.cluster, &self.guest);
        let mut qemu = start(
            cluster,
            guest,
            &self.command,
            &self.runtime_dir,
            to,
            self.count,
        );
        let address = cluster.lab.site().cluster_address(to).unwrap();
        let uri = format!("tcp:{address}:{}", PORT + u16::from(last_number(guest)));
        qemu.qmp.run("migrate-incoming", &json!({"uri": uri}));
        let host = to.to_owned();
        Target { host, qemu, uri }
    }

    fn depart(&mut self, target: &Target) {
        self.qemu.qmp.run("migrate", &json!({"uri": target.uri}));
    }

    /// QEMU's downtime in milliseconds, and the process at the source, which has nothing left to do.
    fn arrive(&mut self, target: Target) -> (f64, Qemu) {
        let source = &mut self.qemu;
        let cluster = self.cluster;
        let downtime = cluster.eventually("the end of the bare migration", LIMIT, || {
            let status = source.qmp.run("query-migrate", &json!({}));
            match status["status"].as_str() {
                Some("completed") => Ok(status["downtime"].as_f64().unwrap()),
                Some("failed" | "cancelled") => panic!("{status}"),
                _ => Err(status.to_string()),
            }
        });
        self.host = target.host;
        (downtime, std::mem::replace(&mut self.qemu, target.qemu))
    }
}

/// Moves guests to other hosts, all at once; QEMU's downtimes in milliseconds.
pub(crate) fn move_at_once(moves: Vec<(&mut Bare<'_>, String)>) -> Vec<f64> {
    let prepare = |(bare, to): (_, String)| {
        let bare: &mut Bare<'_> = bare;
        let target = bare.prepare(&to);
        (bare, target)
    };
    let mut ready: Vec<_> = moves.into_iter().map(prepare).collect();
    for (bare, target) in &mut ready {
        bare.depart(target);
    }
    // The sources end together: the end of a process takes time from guests that still move.
    let arrived: Vec<_> = ready
        .into_iter()
        .map(|(bare, target)| bare.arrive(target))
        .collect();
    arrived.into_iter().map(|(downtime, _)| downtime).collect()
}

fn last_number(guest: &Guest) -> u8 {
    guest.address.octets()[3]
}

fn tap(guest: &Guest) -> String {
    format!("bare{}", last_number(guest))
}

fn dir(cluster: &Cluster, guest: &Guest, count: u32) -> PathBuf {
    let name = format!("bare-{}-{count}", guest.name);
    cluster.lab.site().dir.join(name)
}

/// Starts its process: the first boots, later ones wait for the guest.
fn start(
    cluster: &Cluster,
    guest: &Guest,
    command: &[String],
    runtime_dir: &str,
    host: &str,
    count: u32,
) -> Qemu {
    let dir = dir(cluster, guest, count);
    std::fs::create_dir_all(&dir).unwrap();
    let own = dir.to_string_lossy().into_owned();
    let mut words: Vec<String> = Vec::new();
    for word in command {
        let mut word = word.replace(runtime_dir, &own);
        if let Some(at) = word.find("logfile=") {
            word.truncate(at);
            word.push_str(&format!("logfile={own}/serial.log"));
        }
        if let Some(mut json) = serde_json::from_str::<Value>(&word)
            .ok()
            .filter(|json| json["type"] == "tap")
        {
            json["ifname"] = tap(guest).into();
            word = json.to_string();
        }
        words.push(word);
    }
    if count > 0 {
        words.extend(["-incoming".to_owned(), "defer".to_owned()]);
    }
    let child = cluster
        .lab
        .command(host, &words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let qmp = Qmp::connect(cluster, &dir.join("qmp.sock"));
    Qemu { child, qmp }
}
