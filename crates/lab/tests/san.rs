//! The lab's SAN, used by QEMU's tools from the hosts: access, faults, power cuts. Needs root.
#![allow(clippy::unwrap_used)]

mod support;

use quorate_fence::target::{TargetAccess as _, TargetError, Tgt};
use quorate_lab::site::SAN;
use quorate_lab::{LabError, Link, Lun, San};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use support::{DAEMON, Fixture, eventually, ping, up};

const MIB: u64 = 1024 * 1024;
const LIMIT: Duration = Duration::from_secs(20);

fn site_with_san(name: &str, hosts: u32) -> (Fixture, San) {
    let fixture = up(name, hosts, DAEMON, |spec| spec.san = true);
    for host in &fixture.lab.site().hosts {
        fixture.lab.start(host).unwrap();
    }
    let san = fixture.lab.san().unwrap();
    (fixture, san)
}

fn initiator(host: &str) -> String {
    format!("iqn.2025-01.lab.quorate.initiator:{host}")
}

/// One `qemu-io` from a host to its end; what it said.
fn once(fixture: &Fixture, host: &str, options: &str, action: &str) -> (bool, String) {
    let mut command = fixture.lab.command(host, "timeout");
    command.args(["20", "qemu-io", "-c", action, "--image-opts", options]);
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

fn try_once(fixture: &Fixture, host: &str, lun: &Lun, action: &str) -> bool {
    let (good, text) = once(fixture, host, &lun.image_options(&initiator(host)), action);
    good && !text.contains("failed")
}

/// A `qemu-io` that keeps its session open.
struct Session {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Session {
    fn open(fixture: &Fixture, host: &str, lun: &Lun) -> Self {
        let mut command = fixture.lab.command(host, "qemu-io");
        command.args(["--image-opts", &lun.image_options(&initiator(host))]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            while output.read_line(&mut line).is_ok_and(|length| length > 0) {
                let _ = sender.send(std::mem::take(&mut line));
            }
        });
        Self {
            child,
            input,
            lines,
        }
    }

    fn ask(&mut self, action: &str) {
        self.input
            .write_all(format!("{action}\n").as_bytes())
            .unwrap();
    }

    /// Whether a write has succeeded; `None` while it hangs.
    fn answer(&self, limit: Duration) -> Option<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).ok()?;
            if line.contains("wrote ") {
                return Some(true);
            }
            if line.contains("failed") {
                return Some(false);
            }
        }
    }

    fn write(&mut self, limit: Duration) -> Option<bool> {
        self.ask("write -P 7 0 4k");
        self.answer(limit)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_lun_is_used_by_whom_the_san_lets_in_and_by_nobody_else() {
    let (fixture, san) = site_with_san("san1", 2);
    let db = san.create_lun("db", 8 * MIB).unwrap();
    let web = san.create_lun("web", MIB).unwrap();
    assert!(!try_once(&fixture, "h1", &db, "write -P 1 0 4k"));
    san.allow("db", &initiator("h1")).unwrap();
    assert!(try_once(&fixture, "h1", &db, "write -P 1 0 4k"));
    assert!(try_once(&fixture, "h1", &db, "read -P 1 0 4k"));
    assert!(!try_once(&fixture, "h2", &db, "read 0 4k"), "another host");
    assert!(!try_once(&fixture, "h1", &web, "read 0 4k"), "another LUN");

    // The plain URL takes an initiator name of QEMU's own.
    let mut info = fixture.lab.command("h1", "qemu-img");
    info.args(["info", "--output", "json", "--image-opts"]);
    info.arg(db.image_options(&initiator("h1")));
    let info = info.output().unwrap();
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["virtual-size"], 8 * MIB);
    assert!(db.url().starts_with("iscsi://10.79.0.240:3260/iqn."));

    // Plain `tgtadm`, as a host runs it, and what the lab's own command line says.
    let control = san.control().unwrap().to_string();
    let mut show = fixture.lab.command("h2", "tgtadm");
    show.args([
        "-C", &control, "--lld", "iscsi", "--mode", "target", "--op", "show",
    ]);
    let shown = String::from_utf8(show.output().unwrap().stdout).unwrap();
    assert!(
        shown.contains(&db.target) && shown.contains(&initiator("h1")),
        "{shown}"
    );
    let site = fixture.lab.site();
    let said = Command::new(env!("CARGO_BIN_EXE_quorate-lab-tool"))
        .args(["--json", "lab", "--site", &site.site, "--root"])
        .arg(fixture.dir.path())
        .args(["san", "show"])
        .output()
        .unwrap();
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(said["targets"][0]["initiators"][0], initiator("h1"));

    san.delete_lun("web").unwrap();
    assert!(matches!(
        san.lun("web"),
        Err(LabError::UnknownLun { known, .. }) if known == "db"
    ));
    assert!(matches!(
        san.create_lun("db", MIB),
        Err(LabError::BadLun { .. })
    ));
    assert!(matches!(
        san.create_lun("../db", MIB),
        Err(LabError::BadLun { .. })
    ));
}

#[test]
fn access_that_is_taken_away_ends_writes_at_once_and_a_power_cut_does_not_give_it_back() {
    let (fixture, san) = site_with_san("san2", 2);
    let lun = san.create_lun("db", MIB).unwrap();
    for host in ["h1", "h2"] {
        san.allow("db", &initiator(host)).unwrap();
    }
    let mut old = Session::open(&fixture, "h1", &lun);
    assert_eq!(old.write(LIMIT), Some(true));
    let sessions = san.sessions("db").unwrap();
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].initiator, initiator("h1"));
    assert_eq!(sessions[0].addresses, ["10.79.0.1"]);

    let begun = Instant::now();
    san.deny("db", &initiator("h1")).unwrap();
    println!("access taken away in {:?}", begun.elapsed());
    assert!(san.sessions("db").unwrap().is_empty());
    assert!(try_once(&fixture, "h2", &lun, "write -P 2 0 4k"));
    // It tries for ever to log in again; whatever comes of that, nothing is written.
    assert_ne!(old.write(Duration::from_secs(2)), Some(true));
    assert!(try_once(&fixture, "h2", &lun, "read -P 2 0 4k"));

    san.restart().unwrap();
    assert!(try_once(&fixture, "h2", &lun, "read -P 2 0 4k"));
    assert_ne!(old.answer(Duration::from_secs(4)), Some(true));
    assert!(!try_once(&fixture, "h1", &lun, "read 0 4k"));
    let target = san.target("db").unwrap();
    assert_eq!(target.initiators, [initiator("h2")]);

    // What others told `tgtd`, past the lab, is kept too.
    let control = san.control().unwrap().to_string();
    let id = target.id.to_string();
    let mut bind = fixture.lab.command("h2", "tgtadm");
    bind.args(["-C", &control, "--lld", "iscsi", "--mode", "target", "--op"]);
    bind.args(["unbind", "--tid", &id, "-Q", &initiator("h2")]);
    assert!(bind.status().unwrap().success());
    san.restart().unwrap();
    assert!(san.target("db").unwrap().initiators.is_empty());
}

/// `tgtd` keeps a session while it has something to send: a host that was cut while it was reading.
#[test]
fn a_host_that_was_cut_while_it_was_reading_is_shut_out_too() {
    let (fixture, san) = site_with_san("san9", 1);
    let lun = san.create_lun("db", 256 * MIB).unwrap();
    san.allow("db", &initiator("h1")).unwrap();
    let mut session = Session::open(&fixture, "h1", &lun);
    assert_eq!(session.write(LIMIT), Some(true));
    // Fits into the pipe, and takes longer than all that follows.
    for _ in 0..300 {
        session.ask(&"aio_read -q 0 8M\n".repeat(8));
        session.ask("aio_flush");
    }
    let unsent = || {
        let mut ss = fixture.lab.command(SAN, "ss");
        ss.args(["-Htn", "sport", "=", ":3260"]);
        let said = String::from_utf8(ss.output().unwrap().stdout).unwrap();
        said.split_whitespace()
            .nth(2)
            .and_then(|bytes| bytes.parse::<u64>().ok())
            .unwrap_or(0)
    };
    eventually("a cut with a full send buffer", || {
        fixture.lab.isolate("h1", Link::All).unwrap();
        let full = unsent() > 2_400_000;
        if !full {
            fixture.lab.heal().unwrap();
        }
        full
    });
    // The cluster's own driver. Where it cannot reach the SAN's kernel it does not call the door shut.
    let namespace = fixture.lab.site().namespace(SAN);
    let inside = [
        "nsenter".to_owned(),
        format!("--net=/run/netns/{namespace}"),
    ];
    let begun = Instant::now();
    assert!(!driver_cuts(&san, &lun.target, &[]));
    assert_eq!(san.sessions("db").unwrap().len(), 1);
    println!(
        "not shut out without the SAN's kernel: {:?}",
        begun.elapsed()
    );
    let begun = Instant::now();
    assert!(driver_cuts(&san, &lun.target, &inside));
    println!("shut out while reading in {:?}", begun.elapsed());
    assert!(san.sessions("db").unwrap().is_empty());
    san.deny("db", &initiator("h1")).unwrap();
}

/// Whether the cluster's driver for `tgtd` says that h1 is shut out.
fn driver_cuts(san: &San, target: &str, via: &[String]) -> bool {
    let tgt = Tgt {
        control: san.control().unwrap().into(),
        via: via.to_vec(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let targets = [target.to_owned()];
    let done = runtime.block_on(async {
        let deadline = tokio::time::Instant::now() + 3 * LIMIT;
        tgt.cut(&targets, &initiator("h1"), deadline).await
    });
    match done.into_iter().next().unwrap() {
        Ok(_) => true,
        Err(TargetError::StillOpen { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_san_without_power_is_waited_for_and_what_was_written_is_there_again() {
    let (fixture, san) = site_with_san("san3", 1);
    let lun = san.create_lun("db", MIB).unwrap();
    san.allow("db", &initiator("h1")).unwrap();
    let mut session = Session::open(&fixture, "h1", &lun);
    assert_eq!(session.write(LIMIT), Some(true));

    san.kill().unwrap();
    assert!(!san.status().running);
    assert_eq!(san.status().targets.len(), 1, "as last known");
    assert!(!ping_san(&fixture, "h1") || !try_once(&fixture, "h1", &lun, "read 0 4k"));
    assert!(san.create_lun("more", MIB).is_err());
    session.ask("write -P 8 4k 4k");
    assert_eq!(session.answer(Duration::from_secs(1)), None);
    san.start().unwrap();
    san.start().unwrap();
    assert_eq!(session.answer(LIMIT), Some(true));
    assert!(try_once(&fixture, "h1", &lun, "read -P 7 0 4k"));
    assert!(try_once(&fixture, "h1", &lun, "read -P 8 4k 4k"));

    san.pause().unwrap();
    assert!(san.status().paused);
    session.ask("write -P 9 8k 4k");
    assert_eq!(session.answer(Duration::from_millis(500)), None);
    san.resume().unwrap();
    assert_eq!(session.answer(LIMIT), Some(true));
    // A SAN that hangs can lose its power too.
    san.pause().unwrap();
    san.restart().unwrap();
    assert!(try_once(&fixture, "h1", &lun, "read -P 9 8k 4k"));
}

fn ping_san(fixture: &Fixture, host: &str) -> bool {
    let address = fixture.lab.site().san_address(SAN).unwrap();
    ping(fixture, host, address)
}

#[test]
fn the_san_is_cut_from_one_host_and_from_all_and_slowed_down() {
    let (fixture, san) = site_with_san("san4", 2);
    let lab = &fixture.lab;
    let lun = san.create_lun("db", MIB).unwrap();
    san.allow("db", &initiator("h2")).unwrap();
    let lan = |host: &str| lab.site().lan_address(host).unwrap();
    assert!(ping_san(&fixture, "h1") && ping_san(&fixture, "h2"));

    lab.cut("h1", SAN, Link::All, false).unwrap();
    assert!(!ping_san(&fixture, "h1") && ping_san(&fixture, "h2"));
    assert!(ping(&fixture, "h1", lan("h2")), "only the path to the SAN");
    assert_eq!(lab.status().unwrap().cuts.len(), 2);
    lab.heal().unwrap();

    lab.isolate("h1", Link::All).unwrap();
    assert!(!ping_san(&fixture, "h1"), "cut from everything");
    assert!(ping_san(&fixture, "h2"));
    lab.heal().unwrap();
    lab.isolate(SAN, Link::All).unwrap();
    assert!(!ping_san(&fixture, "h1") && !ping_san(&fixture, "h2"));
    assert!(ping(&fixture, "h1", lan("h2")));
    lab.heal().unwrap();
    lab.isolate("h1", Link::Mgmt).unwrap();
    assert!(ping_san(&fixture, "h1"), "storage is not cluster traffic");
    lab.heal().unwrap();

    let mut session = Session::open(&fixture, "h2", &lun);
    assert_eq!(session.write(LIMIT), Some(true));
    let mut timed = |bytes: &str| {
        session.ask(&format!("write 0 {bytes}"));
        let begun = Instant::now();
        assert_eq!(session.answer(LIMIT), Some(true));
        begun.elapsed()
    };
    // At full speed this takes milliseconds; 128 KiB at 512 kbit/s take two seconds.
    lab.slow("h2", Link::San, 512).unwrap();
    let slow = timed("128k");
    println!("128 KiB at 512 kbit/s: {slow:?}");
    assert!(slow > Duration::from_secs(1), "{slow:?}");
    lab.heal().unwrap();
    lab.slow(SAN, Link::All, 1024).unwrap();
    let slow = timed("128k");
    println!("128 KiB at 1024 kbit/s: {slow:?}");
    assert!(slow > Duration::from_millis(500), "{slow:?}");
    lab.heal().unwrap();
    lab.heal().unwrap();
    println!("128 KiB at full speed: {:?}", timed("128k"));

    lab.kill("h1").unwrap();
    assert!(
        !ping(&fixture, "h2", lab.site().san_address("h1").unwrap()),
        "a host without power has no carrier"
    );
}

#[test]
fn a_chap_secret_is_wanted_once_it_is_set() {
    let (fixture, san) = site_with_san("san5", 1);
    let lun = san.create_lun("db", MIB).unwrap();
    san.allow("db", &initiator("h1")).unwrap();
    san.account("bob", "secret-of-bob").unwrap();
    san.require_account("db", "bob").unwrap();
    let try_with = |secret: &str| {
        let options = lun.image_options(&initiator("h1"));
        let mut command = fixture.lab.command("h1", "timeout");
        command.args(["20", "qemu-io", "-c", "read 0 4k", "--object"]);
        command.arg(format!("secret,id=s,data={secret}"));
        command.arg("--image-opts");
        command.arg(format!("{options},file.user=bob,file.password-secret=s"));
        command.output().unwrap().status.success()
    };
    assert!(!try_once(&fixture, "h1", &lun, "read 0 4k"));
    assert!(try_with("secret-of-bob") && !try_with("secret-of-eve"));
    san.restart().unwrap();
    assert!(try_with("secret-of-bob") && !try_with("secret-of-eve"));
}

#[test]
fn sans_of_two_labs_do_not_meet_and_nothing_outlives_them() {
    let (first, one) = site_with_san("san6", 1);
    let (second, other) = site_with_san("san7", 1);
    assert_ne!(one.control().unwrap(), other.control().unwrap());
    one.create_lun("db", MIB).unwrap();
    assert!(other.status().targets.is_empty());
    let socket = format!("/var/run/tgtd/socket.{}", one.control().unwrap());
    assert!(std::path::Path::new(&socket).exists());
    let namespace = first.lab.site().namespace(SAN);
    let pids = |namespace: &str| {
        let output = Command::new("ip")
            .args(["netns", "pids", namespace])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let mine: Vec<String> = pids(&namespace).lines().map(str::to_owned).collect();
    assert_eq!(mine.len(), 2, "the keeper and tgtd: {mine:?}");
    drop(first);
    eventually("end of the SAN", || {
        mine.iter()
            .all(|pid| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists())
    });
    assert!(!std::path::Path::new(&socket).exists());
    assert!(other.status().running);
    // Without its keeper `tgtd` ends too.
    let keeper = pids(&second.lab.site().namespace(SAN));
    let keeper = keeper
        .lines()
        .find(|pid| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            line.unwrap_or_default().contains("keep-san")
        })
        .unwrap();
    assert!(
        Command::new("kill")
            .args(["-9", keeper])
            .status()
            .unwrap()
            .success()
    );
    eventually("end of tgtd", || !other.status().running);
    other.start().unwrap();
    assert!(other.status().running);
}

/// `quorate lab ...` on a lab that is up; what it said.
fn command_line(fixture: &Fixture, words: &str, input: &str) -> (bool, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_quorate-lab-tool"))
        .args(["lab", "--site", &fixture.lab.site().site, "--root"])
        .arg(fixture.dir.path())
        .args(words.split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that wants no input may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn the_command_line_does_it_all() {
    let (fixture, san) = site_with_san("san10", 1);
    let must = |words: &str| {
        let (good, said) = command_line(&fixture, words, "");
        assert!(good, "{words}: {said}");
        said
    };
    assert!(must("status").contains("san: on, 10.79.0.240:3260, 0 LUNs"));
    assert!(must("san create db 1").contains("iscsi://10.79.0.240:3260/"));
    must("san allow db iqn.2026-01.com.example:h1");
    assert!(must("san show").contains("iqn.2026-01.com.example:h1"));
    must("san deny db iqn.2026-01.com.example:h1");
    assert!(!must("san show").contains("iqn.2026-01.com.example:h1"));
    let account = "san account bob --lun db";
    assert!(command_line(&fixture, account, "secret-of-bob\n").0);
    assert_eq!(san.target("db").unwrap().accounts, ["bob"]);
    let (good, said) = command_line(&fixture, "san account eve", "\n");
    assert!(!good && said.contains("no secret"), "{said}");

    must("pause san");
    assert!(must("status").contains("san: paused"));
    must("resume san");
    must("kill san");
    assert!(must("status").contains("san: off"));
    let (good, said) = command_line(&fixture, "san create web 1", "");
    assert!(!good && said.contains("quorate lab start san"), "{said}");
    must("start san");
    must("cut h1 san");
    assert!(must("status").contains("cut: h1 -> san on san"));
    must("slow h1 --network san --kbit-per-s 256");
    assert!(must("status").contains("slow: h1 on san"));
    must("heal");
    assert!(!must("status").contains("cut:"));
    let tbf = fixture.lab.command("h1", "tc").arg("qdisc").output();
    let queues = String::from_utf8(tbf.unwrap().stdout).unwrap();
    assert!(!queues.contains("tbf"), "{queues}");

    assert!(must("exec san ip -br addr").contains("10.79.0.240"));
    let (good, said) = command_line(&fixture, "verify lun:db", "");
    assert!(!good && said.contains("header"), "{said}");
    must("san delete db");
    let (good, said) = command_line(&fixture, "san delete db", "");
    assert!(!good && said.contains("has no LUN `db`"), "{said}");
    let (good, _) = command_line(&fixture, "san create none 0", "");
    assert!(!good);
}

#[test]
fn a_lab_without_a_san_says_how_to_get_one() {
    let fixture = up("san8", 1, DAEMON, |_| {});
    let error = fixture.lab.san().unwrap_err().to_string();
    assert!(error.contains("--san"), "{error}");
    assert!(fixture.lab.isolate(SAN, Link::All).is_err());
    assert!(fixture.lab.slow("h1", Link::San, 512).is_err());
}
