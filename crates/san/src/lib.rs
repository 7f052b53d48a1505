//! A SAN for tests: a LIO target in one guest, hosts with the kernel's iSCSI initiator in others.
//!
//! Owns: a network namespace with a bridge, the guests in it, the disks of the target. Always
//! holds: everything is gone when a [`San`] is dropped; guests die with the process that made
//! them, and namespaces of dead processes are removed by the next. Must not: know what is tested.
//! Why guests: kernels of test machines rarely have a target, and a host that is cut off from its SAN
//! needs a kernel of its own. The image comes from `scripts/build-san-guest.sh`.
//!
//! ```text
//!   namespace qr-san-PID:   bridge br0 10.79.0.254
//!      |- tap-t  guest: LIO target 10.79.0.1, LUNs from files, reservations kept on a disk of its own
//!      |- tap-1  guest: host 1     10.79.0.11, /dev/sda, /dev/sdb
//!      '- tap-2  guest: host 2     10.79.0.12
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod guest;

use anyhow::{Context as _, Result, bail};
use guest::Guest;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The target's name.
pub const TARGET_IQN: &str = "iqn.2026-01.net.quorate.lab:san";
/// The cluster's id, as its hosts' reservation keys carry it.
pub const CLUSTER: &str = "san-of-the-tests";
/// The target's address.
pub const TARGET_ADDRESS: &str = "10.79.0.1";
/// Initiators that may log in besides the hosts: for test tools.
pub const TOOLS: [&str; 2] = [
    "iqn.2026-01.net.quorate.lab:tool-1",
    "iqn.2026-01.net.quorate.lab:tool-2",
];

/// The account of the target with one LUN of its own, and its password.
pub const ACCOUNT: &str = "quorate";
/// See [`ACCOUNT`].
pub const PASSWORD: &str = "a-secret-of-the-san";

const NAMESPACE_PREFIX: &str = "qr-san-";
/// Until a guest is ready: it boots in a few seconds, on a busy machine in a minute.
const BOOT: Duration = Duration::from_secs(240);
/// For an answer of a host.
const ANSWER: Duration = Duration::from_secs(90);
/// Of a host's console, after a failure.
const LAST_LINES: usize = 30;
/// For a path to be mended that a starved machine lost for a moment.
const MENDED: Duration = Duration::from_secs(120);
/// What a host says of a path that is being mended: nothing of it is about who may write.
const PASSING: [&str; 7] = [
    "no path to the device answers",
    "the path to the device was disturbed",
    "did not finish within",
    "did not answer within",
    "the device answered sense 6/",
    "os error 5)",
    "os error 110)",
];

/// How the target treats reservations when it loses its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// It keeps them, where APTPL was asked for.
    Keeps,
    /// It has forgotten them when it comes back, whatever it promised.
    Forgets,
}

/// The SAN.
#[derive(Debug)]
pub struct San {
    dir: PathBuf,
    namespace: String,
    image: PathBuf,
    target: Option<Guest>,
}

/// A host of the SAN.
#[derive(Debug)]
pub struct SanHost {
    number: u8,
    guest: Guest,
    control: BufReader<UnixStream>,
}

impl San {
    /// The folder with the guest's image, or where to get it.
    ///
    /// # Errors
    /// When it was not built.
    pub fn image() -> Result<PathBuf> {
        let program = std::env::current_exe().unwrap_or_default();
        let found = program
            .ancestors()
            .map(|folder| folder.join("lab/san"))
            .find(|dir| dir.join("initrd.img").exists());
        found.context("the SAN's guest is missing: run scripts/build-san-guest.sh")
    }

    /// The name of the target with one LUN of its own: a host can be shut out of it alone.
    pub fn third() -> String {
        format!("{TARGET_IQN}:third")
    }

    /// The name by which host `number` logs in to it, as a pool of the kind `iscsi` makes it.
    pub fn third_initiator(number: u8) -> String {
        let cluster: String = CLUSTER
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .collect();
        let cluster = cluster.get(..12).unwrap_or(&cluster);
        format!(
            "{}:{cluster}.h{number}",
            quorate_types::pool::INITIATOR_PREFIX
        )
    }

    /// Words before a command that is to run at the SAN, given the program that stands for `ssh` there.
    pub fn shell(&self, ssh: &str) -> Vec<String> {
        let port = self.dir.join("target.control");
        vec![ssh.to_owned(), port.display().to_string()]
    }

    /// Makes the network, and the disks of the target in `dir`: LUN 0 and LUN 1, and that of the third target.
    ///
    /// # Errors
    /// When something of it cannot be made; it needs root.
    pub fn new(dir: &Path, lun_mebibytes: u64) -> Result<Self> {
        remove_dead_namespaces();
        let namespace = format!("{NAMESPACE_PREFIX}{}", std::process::id());
        let san = Self {
            dir: dir.to_owned(),
            namespace,
            image: Self::image()?,
            target: None,
        };
        run("ip", &["netns", "add", &san.namespace])?;
        san.ip("link add br0 type bridge")?;
        san.ip("addr add 10.79.0.254/24 dev br0")?;
        san.ip("link set br0 up")?;
        san.ip("link set lo up")?;
        for tap in ["tap-t", "tap-1", "tap-2"] {
            san.ip(&format!("tuntap add dev {tap} mode tap"))?;
            san.ip(&format!("link set {tap} master br0 up"))?;
        }
        for lun in [0, 1, 2] {
            make_file(&san.lun(lun), lun_mebibytes)?;
        }
        make_file(&san.state(), 16)?;
        let state = san.state().display().to_string();
        // With a journal: the target is killed while it writes there.
        run(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-J", "size=4", &state],
        )?;
        Ok(san)
    }

    /// The file behind a LUN.
    pub fn lun(&self, number: u8) -> PathBuf {
        self.dir.join(format!("lun{number}.raw"))
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state.raw")
    }

    /// The name of host `number`'s initiator.
    fn initiator(number: u8) -> String {
        format!("iqn.2026-01.net.quorate.lab:host-{number}")
    }

    /// Switches the target on and waits until it serves.
    ///
    /// # Errors
    /// When it does not boot, with what it said.
    pub fn start_target(&mut self, memory: Memory) -> Result<()> {
        let who = [Self::initiator(1), Self::initiator(2)].join(",");
        let forgets = if memory == Memory::Forgets {
            " san.noaptpl"
        } else {
            ""
        };
        let line = format!(
            "san.role=target san.ip={TARGET_ADDRESS}/24 san.acl={who},{}{forgets} san.third={},{} san.user={ACCOUNT} \
             san.password={PASSWORD}",
            TOOLS.join(","),
            Self::third_initiator(1),
            Self::third_initiator(2)
        );
        let disks = [self.state(), self.lun(0), self.lun(1), self.lun(2)];
        let mut target = Guest::start(self, "target", "tap-t", 1, &line, &disks)?;
        target.wait_ready(BOOT)?;
        self.target = Some(target);
        Ok(())
    }

    /// The target loses its power.
    pub fn kill_target(&mut self) {
        self.target = None;
    }

    /// What the target said since it was switched on.
    pub fn target_console(&self) -> String {
        self.target.as_ref().map(Guest::console).unwrap_or_default()
    }

    /// Switches a host on, 1 or 2; wait for it with [`SanHost::wait_ready`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_host(&self, number: u8) -> Result<SanHost> {
        let line = format!(
            "san.role=host san.ip=10.79.0.1{number}/24 san.portal={TARGET_ADDRESS} san.name=h{number} san.iqn={}",
            Self::initiator(number)
        );
        let name = format!("host{number}");
        let tap = format!("tap-{number}");
        let guest = Guest::start(self, &name, &tap, 10 + number, &line, &[])?;
        let control = UnixStream::connect(guest.control())
            .with_context(|| format!("no control port of {name}"))?;
        control.set_read_timeout(Some(ANSWER))?;
        Ok(SanHost {
            number,
            guest,
            control: BufReader::new(control),
        })
    }

    /// Cuts or mends a host's cable to the SAN.
    ///
    /// # Errors
    /// When the network does not obey.
    pub fn set_cable(&self, number: u8, connected: bool) -> Result<()> {
        let way = if connected { "up" } else { "down" };
        self.ip(&format!("link set tap-{number} {way}"))
    }

    /// Runs a program in the SAN's network; its output, whatever its exit code.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run_tool(&self, tool: &str, arguments: &[&str]) -> Result<String> {
        let tools = self.image.join("tools");
        let output = Command::new("timeout")
            .args(["-k", "5", "300", "ip", "netns", "exec", &self.namespace])
            .arg(tools.join(tool))
            .args(arguments)
            .env("LD_LIBRARY_PATH", &tools)
            .output()
            .with_context(|| format!("{tool} cannot be run"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(text(&output.stdout) + &text(&output.stderr))
    }

    /// Where the threads of the target hang, for whoever has to find out why it does not answer.
    fn target_threads(&self) -> String {
        const SCRIPT: &str = "for p in /proc/[0-9]*; do read -r name < $p/comm; case $name in \
            iscsi*|tmr*|target*|kworker*) grep -q . $p/stack && echo $name && cat $p/stack;; esac; done";
        let ask = || -> Result<String> {
            let mut port = UnixStream::connect(self.dir.join("target.control"))?;
            port.set_read_timeout(Some(Duration::from_secs(20)))?;
            let asked = serde_json::json!({ "words": ["sh", "-c", SCRIPT], "input": "" });
            port.write_all(format!("{asked}\n").as_bytes())?;
            let mut line = String::new();
            BufReader::new(port).read_line(&mut line)?;
            let told: Value = serde_json::from_str(&line)?;
            Ok(told["out"].as_str().unwrap_or_default().to_owned())
        };
        ask().unwrap_or_else(|error| format!("{error:#}"))
    }

    fn ip(&self, words: &str) -> Result<()> {
        let arguments: Vec<&str> = ["-n", &self.namespace]
            .into_iter()
            .chain(words.split(' '))
            .collect();
        run("ip", &arguments)
    }
}

impl Drop for San {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the target said:\n{}", self.target_console());
            println!("its threads are at:\n{}", self.target_threads());
        }
        self.target = None;
        let _ = run("ip", &["netns", "delete", &self.namespace]);
    }
}

impl Drop for SanHost {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = self.guest.console();
            let lines: Vec<&str> = said.lines().collect();
            let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
            println!("host {} said last:\n{}", self.number, last.join("\n"));
        }
    }
}

impl SanHost {
    /// Waits until it is logged in and has its disks.
    ///
    /// # Errors
    /// When it does not get so far, with what it said.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.guest.wait_ready(BOOT)
    }

    /// Has it do something, again while its path to the SAN is disturbed, as its agent would; its answer, with `error` when
    /// it failed, and in `tries` how often it was asked. What is asked must bear being repeated.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask(&mut self, command: &str) -> Result<Value> {
        let deadline = Instant::now() + MENDED;
        for tries in 1.. {
            let mut answer = self.ask_once(command)?;
            let error = answer["error"].as_str().unwrap_or_default();
            let passes = PASSING.iter().any(|part| error.contains(part));
            if passes && Instant::now() < deadline {
                println!("host {} again: `{command}`: {error}", self.number);
                pause(Duration::from_millis(100));
                continue;
            }
            answer["tries"] = tries.into();
            return Ok(answer);
        }
        unreachable!("there is always another try")
    }

    /// The same once.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask_once(&mut self, command: &str) -> Result<Value> {
        let what = || format!("host {} was asked `{command}`", self.number);
        self.control
            .get_mut()
            .write_all(format!("{command}\n").as_bytes())
            .with_context(what)?;
        let mut line = String::new();
        self.control.read_line(&mut line).with_context(what)?;
        serde_json::from_str(&line).with_context(|| format!("{}: `{line}`", what()))
    }

    /// As [`Self::ask`]; an error of the host is an error.
    ///
    /// # Errors
    /// When it does not answer, or cannot do it.
    pub fn must(&mut self, command: &str) -> Result<Value> {
        let answer = self.ask(command)?;
        match answer.get("error") {
            Some(error) => bail!("host {}: `{command}`: {error}", self.number),
            None => Ok(answer),
        }
    }

    /// Asks until the answer is as wanted.
    ///
    /// # Errors
    /// When it is not within `limit`.
    pub fn until(
        &mut self,
        command: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.ask(command)?;
            if wanted(&answer) {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                bail!(
                    "host {}: `{command}` is {answer} after {limit:?}; its console:\n{}",
                    self.number,
                    self.guest.console()
                );
            }
            pause(Duration::from_millis(20));
        }
    }
}

/// The time between two looks at something that cannot be waited for.
#[allow(
    clippy::disallowed_methods,
    reason = "the one place of this crate that sleeps"
)]
pub(crate) fn pause(span: Duration) {
    std::thread::sleep(span);
}

fn make_file(path: &Path, mebibytes: u64) -> Result<()> {
    std::fs::File::create(path)
        .and_then(|file| file.set_len(mebibytes << 20))
        .with_context(|| format!("cannot create {}", path.display()))
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("{program} cannot be run"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    bail!("`{program} {}` failed: {said}", arguments.join(" "))
}

/// Namespaces whose maker was killed.
fn remove_dead_namespaces() {
    for entry in std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name
            .strip_prefix(NAMESPACE_PREFIX)
            .and_then(|pid| pid.parse::<u32>().ok());
        if maker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = run("ip", &["netns", "delete", &name]);
        }
    }
}
