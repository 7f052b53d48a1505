//! The same guest migrated by bare QMP commands, without Quorate: what the blackout is compared with.
//!
//! Owns: QEMU processes on two lab hosts, with the very command line that Quorate's driver made for
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

const TAP: &str = "bare0";
const PORT: u16 = 7799;

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

/// A guest without Quorate on one of two hosts.
pub(crate) struct Bare<'a> {
    cluster: &'a Cluster,
    guest: Guest,
    command: Vec<String>,
    runtime_dir: String,
    here: (String, Qemu),
    there: String,
    count: u32,
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
    /// Boots the guest on `from` with a command line that a Quorate guest had; it must be stopped by now.
    pub(crate) fn boot(
        cluster: &'a Cluster,
        guest: &Guest,
        command: Vec<String>,
        from: &str,
        to: &str,
    ) -> Self {
        let at = command.iter().position(|word| word == "-pidfile").unwrap() + 1;
        let runtime_dir = Path::new(&command[at])
            .parent()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        for host in [from, to] {
            let script =
                format!("ip tuntap add dev {TAP} mode tap && ip link set {TAP} master br-lan up");
            let done = cluster
                .lab
                .command(host, "sh")
                .arg("-c")
                .arg(script)
                .status()
                .unwrap();
            assert!(done.success());
        }
        let here = start(cluster, &command, &runtime_dir, from, 0, false);
        let mut bare = Self {
            cluster,
            guest: guest.clone(),
            command,
            runtime_dir,
            here: (from.to_owned(), here),
            there: to.to_owned(),
            count: 0,
        };
        bare.wait_ready();
        bare
    }

    fn wait_ready(&mut self) {
        let log = dir(self.cluster, 0).join("serial.log");
        self.cluster
            .eventually("the bare guest", Duration::from_secs(60), || {
                let bytes = std::fs::read(&log).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes);
                text.contains(quorate_guest::READY_LINE)
                    .then_some(())
                    .ok_or_else(|| text.into_owned())
            });
    }

    /// Migrates it to the other host under the 1 ms pinger; the blackout in milliseconds.
    pub(crate) fn migrate(&mut self) -> f64 {
        self.count += 1;
        let target_host = self.there.clone();
        let mut target = start(
            self.cluster,
            &self.command,
            &self.runtime_dir,
            &target_host,
            self.count,
            true,
        );
        let address = self
            .cluster
            .lab
            .site()
            .cluster_address(&target_host)
            .unwrap();
        let uri = format!("tcp:{address}:{PORT}");
        target.qmp.run("migrate-incoming", &json!({"uri": uri}));
        let pinger = self
            .cluster
            .lab
            .pinger(self.guest.address, Duration::from_millis(1))
            .unwrap();
        quorate_lab::wait::pause(Duration::from_millis(300));
        let source = &mut self.here.1;
        source.qmp.run("migrate", &json!({"uri": uri}));
        self.cluster.eventually(
            "the end of the bare migration",
            Duration::from_secs(60),
            || {
                let status = source.qmp.run("query-migrate", &json!({}));
                match status["status"].as_str() {
                    Some("completed") => Ok(()),
                    Some("failed" | "cancelled") => panic!("{status}"),
                    _ => Err(status.to_string()),
                }
            },
        );
        quorate_lab::wait::pause(Duration::from_millis(500));
        let report = pinger.finish().unwrap();
        let from = std::mem::replace(&mut self.here, (target_host, target));
        self.there = from.0;
        report.longest_gap_us as f64 / 1000.0
    }
}

fn dir(cluster: &Cluster, number: u32) -> PathBuf {
    cluster.lab.site().dir.join(format!("bare{number}"))
}

fn start(
    cluster: &Cluster,
    command: &[String],
    runtime_dir: &str,
    host: &str,
    number: u32,
    incoming: bool,
) -> Qemu {
    let dir = dir(cluster, number);
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
            json["ifname"] = TAP.into();
            word = json.to_string();
        }
        words.push(word);
    }
    if incoming {
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
