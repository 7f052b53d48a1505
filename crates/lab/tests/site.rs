//! The lab itself, without Quorate: network, faults, power, watchdog, fence agent. Needs root.
#![allow(clippy::unwrap_used)]

mod support;

use quorate_lab::fence_agent::Bmc;
use quorate_lab::site::CLIENT;
use quorate_lab::supervisor::protocol::{Power, Request, Who};
use quorate_lab::{Lab, LabError, Link, Networks};
use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{DAEMON, Fixture, eventually, history, ping, up};

fn status(fixture: &Fixture, host: &str) -> quorate_lab::supervisor::protocol::HostStatus {
    fixture.lab.ask(host, &Request::Status).unwrap()
}

#[test]
fn cables_are_cut_one_way_both_ways_and_by_network_and_mended() {
    let fixture = up("net1", 2, DAEMON, |_| {});
    let lab = &fixture.lab;
    for host in ["h1", "h2"] {
        lab.start(host).unwrap();
    }
    let lan = |host: &str| lab.site().lan_address(host).unwrap();
    let mgmt = |host: &str| lab.site().cluster_address(host).unwrap();
    assert!(ping(&fixture, "h1", lan("h2")) && ping(&fixture, "h1", mgmt("h2")));
    assert!(ping(&fixture, CLIENT, lan("h1")));

    lab.cut("h1", "h2", Link::Mgmt, false).unwrap();
    assert!(
        ping(&fixture, "h1", lan("h2")),
        "only the cluster's network is cut"
    );
    assert!(!ping(&fixture, "h1", mgmt("h2")));
    assert!(ping(&fixture, CLIENT, mgmt("h2")), "the client is not cut");
    assert_eq!(lab.status().unwrap().cuts.len(), 2);
    lab.heal().unwrap();
    assert!(ping(&fixture, "h1", mgmt("h2")));

    lab.cut("h1", "h2", Link::Lan, true).unwrap();
    assert_eq!(lab.status().unwrap().cuts.len(), 1);
    assert!(!ping(&fixture, "h2", lan("h1")), "answers are lost");
    lab.heal().unwrap();

    lab.isolate("h1", Link::All).unwrap();
    assert!(!ping(&fixture, CLIENT, lan("h1")) && !ping(&fixture, "h2", mgmt("h1")));
    assert!(ping(&fixture, CLIENT, lan("h2")));
    lab.heal().unwrap();
    assert!(ping(&fixture, "h2", mgmt("h1")));
    assert!(lab.cut("h1", "h9", Link::All, false).is_err());
}

#[test]
fn a_power_cut_ends_everything_and_a_start_is_a_new_boot() {
    let fixture = up("power1", 1, DAEMON, |spec| spec.networks = Networks::Single);
    let lab = &fixture.lab;
    let first = lab.start("h1").unwrap();
    eventually("daemon and its child", || {
        status(&fixture, "h1").processes >= 3
    });
    let tap = ["tuntap", "add", "dev", "tap7", "mode", "tap"];
    assert!(
        lab.command("h1", "ip")
            .args(tap)
            .status()
            .unwrap()
            .success()
    );

    let off = lab.kill("h1").unwrap();
    assert_eq!(
        (off.power, off.processes, off.daemon_pid),
        (Power::Off, 0, None)
    );
    assert!(!ping(
        &fixture,
        CLIENT,
        lab.site().lan_address("h1").unwrap()
    ));

    let second = lab.start("h1").unwrap();
    assert_ne!(first.boot, second.boot);
    let address = lab.site().lan_address("h1").unwrap();
    eventually("carrier", || ping(&fixture, CLIENT, address));
    let links = lab
        .command("h1", "ls")
        .arg("/sys/class/net")
        .output()
        .unwrap();
    let links = String::from_utf8(links.stdout).unwrap();
    assert!(
        links.contains("br-lan") && !links.contains("tap7"),
        "{links}"
    );
}

#[test]
fn an_unfed_watchdog_ends_the_host_whatever_state_it_is_in() {
    watchdog_ends_the_host(&up("dog1", 1, DAEMON, |_| {}));
}

#[test]
fn the_same_where_there_are_no_cgroups() {
    watchdog_ends_the_host(&up("dog3", 1, DAEMON, |spec| spec.cgroups = false));
}

fn watchdog_ends_the_host(fixture: &Fixture) {
    let lab = &fixture.lab;
    lab.start("h1").unwrap();
    eventually("daemon and its child", || {
        status(fixture, "h1").processes >= 3
    });
    let socket = UnixDatagram::unbound().unwrap();
    socket
        .connect(lab.site().host_dir("h1").join("watchdog.sock"))
        .unwrap();
    let feed = |timeout: u64| socket.send(&timeout.to_le_bytes()).unwrap();

    // Disarmed in order: nothing happens.
    feed(100);
    eventually("armed", || status(fixture, "h1").watchdog_ms == Some(100));
    socket.send(b"V").unwrap();
    eventually("disarmed", || status(fixture, "h1").watchdog_ms.is_none());
    assert_eq!(status(fixture, "h1").watchdog_fired, 0);

    // Everything stopped, as when agent and guard hang: nobody feeds.
    feed(400);
    lab.pause("h1", Who::All).unwrap();
    let fed = Instant::now();
    feed(400);
    eventually("death by watchdog", || {
        status(fixture, "h1").watchdog_fired == 1
    });
    assert!(
        fed.elapsed() >= Duration::from_millis(400),
        "fired early: {:?}",
        fed.elapsed()
    );
    let now = status(fixture, "h1");
    assert_eq!(
        (now.power, now.processes, now.watchdog_ms),
        (Power::Dead, 0, None)
    );
    let mut done = serde_json::Value::Null;
    eventually("record", || {
        let mut lines = history(fixture, "h1").into_iter();
        done = lines
            .find(|line| line["event"] == "watchdog done")
            .unwrap_or_default();
        !done.is_null()
    });
    let after_due = Duration::from_micros(done["after_due_us"].as_u64().unwrap());
    println!("watchdog: all processes gone {after_due:?} after the deadline");
    assert!(after_due < Duration::from_secs(1));

    // A feed of the life before does not arm the next one.
    feed(100);
    lab.start("h1").unwrap();
    eventually("daemon", || status(fixture, "h1").processes >= 3);
    assert_eq!(status(fixture, "h1").watchdog_fired, 1);
}

#[test]
fn a_host_boots_again_after_its_watchdog_if_told_to() {
    let fixture = up("dog2", 1, DAEMON, |spec| spec.reboot_after_ms = Some(100));
    let before = fixture.lab.start("h1").unwrap();
    let socket = UnixDatagram::unbound().unwrap();
    let path = fixture.lab.site().host_dir("h1").join("watchdog.sock");
    socket.send_to(&50_u64.to_le_bytes(), path).unwrap();
    eventually("reset", || status(&fixture, "h1").watchdog_fired == 1);
    eventually("boot", || {
        let now = status(&fixture, "h1");
        now.power == Power::On && now.daemon_pid.is_some() && now.boot != before.boot
    });
}

#[test]
fn a_daemon_is_restarted_and_its_guests_go_on() {
    let fixture = up("daemon1", 1, DAEMON, |_| {});
    let lab = &fixture.lab;
    lab.start("h1").unwrap();
    eventually("daemon and its child", || {
        status(&fixture, "h1").processes >= 3
    });
    let before = status(&fixture, "h1").daemon_pid.unwrap();
    let after = lab.restart_daemon("h1", false).unwrap();
    assert_ne!(after.daemon_pid, Some(before));
    assert_eq!(after.daemon_deaths, 0, "a restart is no death");
    // The first daemon's `sleep 1000` is still there beside the second one's.
    eventually("both children", || sleepers(&fixture) == 2);

    lab.ask("h1", &Request::Kill { who: Who::Daemon }).unwrap();
    eventually("restart after a death", || {
        let now = status(&fixture, "h1");
        now.daemon_deaths == 1 && now.daemon_pid.is_some()
    });
    lab.ask("h1", &Request::StopDaemon { hard: true }).unwrap();
    assert_eq!(status(&fixture, "h1").daemon_pid, None);
    assert!(sleepers(&fixture) >= 2);
}

fn sleepers(fixture: &Fixture) -> usize {
    let output = Command::new("ip")
        .args(["netns", "pids", &fixture.lab.site().namespace("h1")])
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).ok())
        .filter(|line| line == b"sleep\x001000\x00")
        .count()
}

#[test]
fn paused_processes_go_on_when_resumed() {
    let fixture = up("pause1", 1, DAEMON, |_| {});
    fixture.lab.start("h1").unwrap();
    eventually("daemon and its child", || {
        status(&fixture, "h1").processes >= 3
    });
    let paused = fixture.lab.pause("h1", Who::Daemon).unwrap();
    assert_eq!(paused.paused, 1);
    let paused = fixture.lab.pause("h1", Who::All).unwrap();
    assert_eq!(paused.paused, paused.processes);
    assert_eq!(fixture.lab.resume("h1", Who::All).unwrap().paused, 0);
    let error = fixture.lab.pause("h1", Who::Guard).unwrap_err().to_string();
    assert!(error.contains("no such process"), "{error}");
}

fn fence(fixture: &Fixture, action: &str) -> Option<i32> {
    let site = fixture.lab.site();
    let mut child = Command::new(site.bin_dir().join("fence_lab"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let options = format!("action={action}\nip={}\nplug=h1\n", site.dir.display());
    child
        .stdin
        .take()
        .unwrap()
        .write_all(options.as_bytes())
        .unwrap();
    child.wait().unwrap().code()
}

#[test]
fn the_fence_agent_speaks_as_the_standard_ones_do() {
    let fixture = up("fence1", 1, DAEMON, |_| {});
    fixture.lab.start("h1").unwrap();
    assert_eq!(fence(&fixture, "status"), Some(0));
    Bmc {
        ignores_off: true,
        ..Bmc::default()
    }
    .set(fixture.lab.site(), "h1")
    .unwrap();
    assert_eq!(fence(&fixture, "off"), Some(0));
    assert_eq!(
        fence(&fixture, "status"),
        Some(0),
        "a lying BMC is found out by status"
    );
    Bmc {
        delay_ms: 300,
        ..Bmc::default()
    }
    .set(fixture.lab.site(), "h1")
    .unwrap();
    let begun = Instant::now();
    assert_eq!(fence(&fixture, "off"), Some(0));
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(fence(&fixture, "status"), Some(2));
    assert_eq!(status(&fixture, "h1").processes, 0);
    assert_eq!(fence(&fixture, "on"), Some(0));
    assert_eq!(fence(&fixture, "status"), Some(0));
    assert_eq!(fence(&fixture, "dance"), Some(1));
}

#[test]
fn nothing_outlives_the_lab() {
    let fixture = up("end1", 2, DAEMON, |_| {});
    let lab = (*fixture.lab).clone();
    lab.start("h1").unwrap();
    eventually("daemon and its child", || {
        status(&fixture, "h1").processes >= 3
    });
    let pid = status(&fixture, "h1").daemon_pid.unwrap();
    assert_eq!(Lab::all(fixture.dir.path()), ["end1"]);
    lab.down().unwrap();
    // A killed process stays as a zombie until init collects it.
    let gone = || !std::path::Path::new(&format!("/proc/{pid}/exe")).exists();
    eventually("end of the daemon", gone);
    assert!(!std::path::Path::new("/run/netns/qr-end1-h1").exists());
    assert!(!lab.site().dir.exists());
    lab.down().unwrap();
    assert!(matches!(
        Lab::open(fixture.dir.path(), "end1"),
        Err(LabError::NotUp { .. })
    ));
}

#[test]
fn a_lab_ends_with_its_owner() {
    let mut owner = Command::new("sleep").arg("1000").spawn().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tool = std::path::Path::new(env!("CARGO_BIN_EXE_quorate-lab-tool"));
    let mut spec = quorate_lab::SiteSpec::new(tool);
    spec.site = "owner1".to_owned();
    spec.hosts = 1;
    spec.root = dir.path().to_owned();
    spec.daemon = ["sh", "-c", DAEMON, "daemon"].map(str::to_owned).to_vec();
    spec.owner = Some(owner.id());
    let lab = Lab::up(spec).unwrap();
    let pid = lab.start("h1").unwrap().daemon_pid.unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    eventually("end of the daemon", || {
        !std::path::Path::new(&format!("/proc/{pid}")).exists()
    });
    eventually("end of the supervisor", || {
        lab.ask("h1", &Request::Status).is_err()
    });
    lab.down().unwrap();
}

#[test]
fn a_lab_whose_supervisors_died_is_removed_all_the_same() {
    let fixture = up("crash1", 2, DAEMON, |spec| spec.cgroups = false);
    let lab = &fixture.lab;
    lab.start("h1").unwrap();
    eventually("daemon and its child", || {
        status(&fixture, "h1").processes >= 3
    });
    let pid = status(&fixture, "h1").daemon_pid.unwrap();
    for host in ["h1", "h2"] {
        let file = lab.site().host_dir(host).join("supervisor.pid");
        let supervisor = std::fs::read_to_string(file).unwrap();
        assert!(
            Command::new("kill")
                .args(["-9", &supervisor])
                .status()
                .unwrap()
                .success()
        );
    }
    eventually("dead supervisor", || {
        lab.ask("h1", &Request::Status).is_err()
    });
    assert!(lab.status().unwrap().hosts[0].error.is_some());
    lab.down().unwrap();
    let gone = || !std::path::Path::new(&format!("/proc/{pid}/exe")).exists();
    eventually("end of the daemon", gone);
    assert!(!lab.site().dir.exists());
}

#[test]
fn an_interrupted_program_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_string_lossy().into_owned();
    // Forming the cluster fails for ever: this program is no daemon. Ctrl-C comes meanwhile.
    let mut child = Command::new(env!("CARGO_BIN_EXE_quorate-lab-tool"))
        .args([
            "lab",
            "--site",
            "int1",
            "--root",
            &root,
            "up",
            "--hosts",
            "1",
            "--daemon",
            "/bin/true",
        ])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("a lab that is up", || {
        Lab::open(dir.path(), "int1").is_ok_and(|lab| lab.ask("h1", &Request::Status).is_ok())
    });
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!std::path::Path::new("/run/netns/qr-int1-h1").exists());
    assert!(!dir.path().join("int1").exists());
}
