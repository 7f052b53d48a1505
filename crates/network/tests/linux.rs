//! The Linux driver against a real kernel, each test in a network namespace of its own.
//!
//! The site of every test: bridge `br0` with uplink `up0`, whose other end `peer0` is
//! where the rest of the world would be. Frames are captured there. Needs root; without
//! it the tests say so and pass, because they cannot say anything.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::future::Future;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use quorate_network::linux::packet::PacketSocket;
use quorate_network::linux::tun::attach_plain;
use quorate_network::{
    Announcement, BridgeSpec, LinuxNetwork, MacAddr, NetworkDriver, NetworkError, Schedule,
    TapFacts, TapSpec, nic_mac, tap_name,
};

/// The EtherType of test frames: reserved for local experiments.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const PEER_MAC: MacAddr = MacAddr::new([0x02, 0xee, 0, 0, 0, 1]);
const DEADLINE: Duration = Duration::from_secs(60);

#[allow(unsafe_code)]
mod netns {
    /// Moves the calling thread, and those it starts, into a new network namespace.
    pub(super) fn enter_new() -> std::io::Result<()> {
        // SAFETY: only NEWNET is unshared, never the table of file descriptors.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)? };
        Ok(())
    }
}

/// Runs a test on a thread with a namespace of its own, which ends with the thread.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Site) -> F + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        netns::enter_new().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let site = Site::build().await;
            test(site).await;
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {output:?}");
}

struct Site {
    driver: LinuxNetwork,
    peer: PacketSocket,
}

impl Site {
    async fn build() -> Self {
        // The highest address there is: the kernel would prefer any tap's for the bridge.
        ip("link add up0 address fe:ff:ff:ff:ff:ff type veth peer name peer0");
        ip("link set peer0 address 02:ee:00:00:00:01 up");
        let driver = LinuxNetwork::open().unwrap();
        driver.ensure_bridge(&bridge(1500)).await.unwrap();
        wait_forwarding("up0");
        let index = ifindex("peer0");
        Self {
            driver,
            peer: PacketSocket::capture(index).unwrap(),
        }
    }

    async fn tap(&self, vm: &str, muted: bool) -> Guest {
        let spec = tap_spec(vm, muted);
        self.driver.create_tap(&spec).await.unwrap();
        let port = attach_plain(&spec.ifname).unwrap();
        rustix::io::ioctl_fionbio(&port, true).unwrap();
        if !muted {
            wait_forwarding(&spec.ifname);
        }
        Guest {
            port,
            mac: spec.guest_mac,
            ifname: spec.ifname,
            sent: 0,
        }
    }

    /// Waits for the test frame with this number from this guest and returns the numbers
    /// of all frames of `watched` that came before.
    fn frames_until(&self, watched: MacAddr, sentinel: (MacAddr, u32)) -> Vec<u32> {
        let mut seen = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let frame = receive(&self.peer, deadline);
            if frame[12..14] != ETHERTYPE {
                // Anything else with the guest's address counts as a leak.
                assert_ne!(frame[6..12], watched.octets(), "unexpected: {frame:02x?}");
                continue;
            }
            let number = u32::from_be_bytes(frame[14..18].try_into().unwrap());
            let source = MacAddr::new(frame[6..12].try_into().unwrap());
            if (source, number) == sentinel {
                return seen;
            }
            if source == watched {
                seen.push(number);
            }
        }
    }
}

struct Guest {
    port: File,
    mac: MacAddr,
    ifname: String,
    sent: u32,
}

impl Guest {
    fn send(&mut self) -> std::io::Result<u32> {
        let number = self.sent;
        self.sent += 1;
        (&self.port).write_all(&frame(MacAddr::BROADCAST, self.mac, number))?;
        Ok(number)
    }

    /// The next test frame that reaches the guest from this sender, if it comes in time. The kernel sends frames of its own
    /// from the addresses of its interfaces, whenever it likes.
    fn receive_from(&self, source: MacAddr, deadline: Instant) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        loop {
            match (&self.port).read(&mut buffer) {
                Ok(len) if buffer[6..12] == source.octets() && buffer[12..14] == ETHERTYPE => {
                    return Some(buffer[..len].to_vec());
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if Instant::now() > deadline {
                        return None;
                    }
                    std::thread::yield_now();
                }
                Err(error) => panic!("reading the tap: {error}"),
            }
        }
    }
}

fn frame(to: MacAddr, from: MacAddr, number: u32) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[0..6].copy_from_slice(&to.octets());
    frame[6..12].copy_from_slice(&from.octets());
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame[14..18].copy_from_slice(&number.to_be_bytes());
    frame
}

fn receive(socket: &PacketSocket, deadline: Instant) -> Vec<u8> {
    let mut buffer = [0; 2048];
    loop {
        match socket.receive(&mut buffer) {
            Ok(len) => return buffer[..len].to_vec(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "no frame in time");
                std::thread::yield_now();
            }
            Err(error) => panic!("receiving: {error}"),
        }
    }
}

fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap().as_micros()).unwrap()
}

fn ifindex(name: &str) -> u32 {
    let output = Command::new("ip")
        .args(["-o", "link", "show", name])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(':').next().unwrap().trim().parse().unwrap()
}

/// Waits until the bridge passes frames on to a port: the kernel enables one some time after its carrier
/// has come up.
fn wait_forwarding(name: &str) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let output = Command::new("bridge")
            .args(["-d", "link", "show", "dev", name])
            .output()
            .unwrap();
        if String::from_utf8_lossy(&output.stdout).contains("state forwarding") {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{name} never forwards: {output:?}"
        );
        std::thread::yield_now();
    }
}

/// Creates a tap, and waits until nobody holds it: a program that another test starts at that moment has a copy of the
/// driver's descriptor for as long as it is not executed.
async fn let_go(driver: &LinuxNetwork, spec: &TapSpec) -> TapFacts {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let facts = driver.create_tap(spec).await.unwrap();
        if !facts.attached {
            return facts;
        }
        assert!(Instant::now() < deadline, "{facts:?}");
        std::thread::yield_now();
    }
}

fn bridge(mtu: u32) -> BridgeSpec {
    BridgeSpec {
        name: "br0".into(),
        uplink: Some("up0".into()),
        mtu,
    }
}

fn tap_spec(vm: &str, muted: bool) -> TapSpec {
    TapSpec {
        ifname: tap_name(vm, 0),
        bridge: "br0".into(),
        guest_mac: nic_mac("test", vm, 0),
        nic: format!("{vm}/0"),
        owner_uid: Some(1000),
        muted,
    }
}

#[test]
fn a_muted_tap_leaks_nothing_and_an_unmuted_one_loses_nothing() {
    in_namespace(async |site: Site| {
        let mut witness = site.tap("witness", false).await;
        let mut guest = site.tap("guest", true).await;
        let taps = site.driver.list_taps().await.unwrap();
        let facts = taps.iter().find(|tap| tap.ifname == guest.ifname).unwrap();
        assert!(facts.muted && facts.attached, "{facts:?}");
        for round in 0..20 {
            for _ in 0..20 {
                assert!(guest.send().is_err(), "a muted tap took a frame");
            }
            let sentinel = (witness.mac, witness.send().unwrap());
            let leaked = site.frames_until(guest.mac, sentinel);
            assert_eq!(leaked, [0; 0], "round {round}");

            site.driver.unmute(&guest.ifname).await.unwrap();
            let first = guest.sent;
            let mut expected = Vec::new();
            for _ in 0..20 {
                expected.push(guest.send().unwrap());
            }
            let sentinel = (witness.mac, witness.send().unwrap());
            let arrived = site.frames_until(guest.mac, sentinel);
            assert_eq!(arrived, expected, "round {round}, first {first}");

            site.driver.mute(&guest.ifname).await.unwrap();
        }
    });
}

#[test]
fn unmuting_takes_about_a_millisecond() {
    in_namespace(async |site: Site| {
        let mut guest = site.tap("guest", true).await;
        let mut calls = Vec::new();
        let mut first_frames = Vec::new();
        for _ in 0..40 {
            let begin = Instant::now();
            site.driver.unmute(&guest.ifname).await.unwrap();
            calls.push(begin.elapsed());
            let number = guest.send().unwrap();
            site.frames_until(MacAddr::BROADCAST, (guest.mac, number));
            first_frames.push(begin.elapsed());
            site.driver.mute(&guest.ifname).await.unwrap();
        }
        calls.sort();
        first_frames.sort();
        let median = first_frames[20];
        println!(
            "unmute: call median {:?}, p95 {:?}; first frame on the wire median {median:?}, p95 {:?}",
            calls[20], calls[38], first_frames[38]
        );
        assert!(median < Duration::from_millis(10), "{median:?}");
    });
}

#[test]
fn the_bridge_port_state_would_not_keep_a_tap_mute() {
    in_namespace(async |site: Site| {
        // The negative control for the choice made in `linux`: a port set to `disabled`.
        let spec = tap_spec("guest", false);
        site.driver.create_tap(&spec).await.unwrap();
        let status = Command::new("bridge")
            .args(["link", "set", "dev", &spec.ifname, "state", "0"])
            .status()
            .unwrap();
        assert!(status.success());
        let port = attach_plain(&spec.ifname).unwrap();
        let deadline = Instant::now() + DEADLINE;
        let mut number = 0;
        // A frame gets through once the kernel has noticed that the tap is in use.
        loop {
            (&port)
                .write_all(&frame(MacAddr::BROADCAST, spec.guest_mac, number))
                .unwrap();
            number += 1;
            let mut buffer = [0; 2048];
            if let Ok(len) = site.peer.receive(&mut buffer)
                && buffer[..len][6..12] == spec.guest_mac.octets()
            {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the kernel keeps such a port mute now"
            );
            std::thread::yield_now();
        }
    });
}

#[test]
fn the_bridge_follows_a_silent_guest() {
    in_namespace(async |mut site: Site| {
        let mut other = site.tap("other", false).await;
        let guest = site.tap("guest", true).await;
        // The guest is elsewhere: the bridge has learnt it behind the uplink.
        site.peer
            .send(&frame(MacAddr::BROADCAST, guest.mac, 0))
            .unwrap();
        let deadline = Instant::now() + DEADLINE;
        assert!(other.receive_from(guest.mac, deadline).is_some());
        let to_guest = frame(guest.mac, other.mac, 77);
        (&other.port).write_all(&to_guest).unwrap();
        site.frames_until(guest.mac, (other.mac, 77));

        // It moves here and stays silent: frames reach it, and only it.
        site.driver.unmute(&guest.ifname).await.unwrap();
        (&other.port).write_all(&to_guest).unwrap();
        assert!(
            guest
                .receive_from(other.mac, Instant::now() + DEADLINE)
                .is_some()
        );
        let number = other.send().unwrap();
        site.peer = drained(site.peer, other.mac, number, 77);

        // It is muted: frames no longer end in its port.
        site.driver.mute(&guest.ifname).await.unwrap();
        (&other.port).write_all(&to_guest).unwrap();
        site.frames_until(guest.mac, (other.mac, 77));
    });
}

/// Reads up to the broadcast `until` and fails when the frame `forbidden` comes first.
#[test]
fn what_comes_for_a_guest_that_stands_still_follows_it() {
    in_namespace(async |site: Site| {
        let source = MacAddr::new([0x02, 0x51, 0x48, 0, 0, 1]);
        let guest = site.tap("guest", false).await;
        let deadline = Instant::now() + DEADLINE;
        let mut reaches_tap = |number| {
            site.peer.send(&frame(guest.mac, PEER_MAC, number)).unwrap();
            let got = guest.receive_from(PEER_MAC, deadline).unwrap();
            assert_eq!(got, frame(guest.mac, PEER_MAC, number));
        };
        // The kernel begins to note times some moments after the first listener has asked for them; until then a frame has
        // the time at which it is read.
        let mut first = site.driver.hold(&guest.ifname).await.unwrap();
        loop {
            reaches_tap(0);
            let from_then = MacAddr::new([0x02, 0x51, 0x48, 0, 0, 2]);
            if first.pass_on(now_us() + 1, from_then).unwrap() == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "times are never noted");
        }
        let mut held = site.driver.hold(&guest.ifname).await.unwrap();
        reaches_tap(1);
        let stopped_us = now_us() + 1;
        // Its next host says that it is there: the bridge does not believe it yet.
        let elsewhere = frame(MacAddr::BROADCAST, guest.mac, 0);
        site.peer.send(&elsewhere).unwrap();
        (2..5).for_each(&mut reaches_tap);
        // Nobody else's frames.
        site.peer.send(&frame(PEER_MAC, PEER_MAC, 9)).unwrap();

        site.driver.let_go(&guest.ifname).await.unwrap();
        assert_eq!(held.pass_on(stopped_us, source).unwrap(), 3);
        for number in 2..5 {
            let sent = loop {
                let frame = receive(&site.peer, deadline);
                if frame[6..12] == source.octets() {
                    break frame;
                }
            };
            assert_eq!(sent, frame(guest.mac, source, number));
        }
        assert_eq!(held.pass_on(stopped_us, source).unwrap(), 0, "once");
        // The guest stays after all: its next host is believed as ever.
        let mut held = site.driver.hold(&guest.ifname).await.unwrap();
        site.driver.unmute(&guest.ifname).await.unwrap();
        held.forget();
        reaches_tap(5);
        let other = site.tap("other", false).await;
        site.peer.send(&elsewhere).unwrap();
        assert!(other.receive_from(guest.mac, deadline).is_some());
        (&other.port)
            .write_all(&frame(guest.mac, other.mac, 6))
            .unwrap();
        while receive(&site.peer, deadline) != frame(guest.mac, other.mac, 6) {}
    });
}

fn drained(peer: PacketSocket, source: MacAddr, until: u32, forbidden: u32) -> PacketSocket {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let frame = receive(&peer, deadline);
        if frame[12..14] == ETHERTYPE && frame[6..12] == source.octets() {
            let number = u32::from_be_bytes(frame[14..18].try_into().unwrap());
            assert_ne!(
                number, forbidden,
                "a frame for a local guest left the bridge"
            );
            if number == until {
                return peer;
            }
        }
    }
}

#[test]
fn an_announcement_moves_the_guest_in_the_next_switch() {
    in_namespace(async |site: Site| {
        let what = Announcement {
            bridge: "br0".into(),
            mac: nic_mac("test", "guest", 0),
            address: Some("10.1.2.3".parse().unwrap()),
        };
        let begin = Instant::now();
        let sent = site.driver.announce(&what).await.unwrap();
        let rounds = Schedule::default().waits().count();
        assert_eq!(sent as usize, rounds * 2);
        assert!(begin.elapsed() >= Schedule::default().length());
        let deadline = Instant::now() + DEADLINE;
        let mut expected: Vec<_> = (0..rounds).flat_map(|_| what.frames()).collect();
        while !expected.is_empty() {
            let frame = receive(&site.peer, deadline);
            if frame[6..12] == what.mac.octets() {
                assert_eq!(frame, expected.remove(0));
            }
        }
    });
}

#[test]
fn an_ipv6_announcement_replaces_what_neighbours_remember() {
    in_namespace(async |site: Site| {
        if !std::path::Path::new("/proc/sys/net/ipv6/conf/peer0").exists() {
            eprintln!("skipped: this kernel has no IPv6");
            return;
        }
        std::fs::write("/proc/sys/net/ipv6/conf/peer0/disable_ipv6", "0").unwrap();
        let address = "fd00::5";
        let neighbour = || {
            let show = ["-6", "neigh", "show", "dev", "peer0", "to", address];
            let output = Command::new("ip").args(show).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        ip("-6 neigh replace fd00::5 lladdr 02:00:00:00:00:99 dev peer0 nud stale");
        assert!(neighbour().contains("02:00:00:00:00:99"));
        let what = Announcement {
            bridge: "br0".into(),
            mac: nic_mac("test", "guest", 0),
            address: Some(address.parse().unwrap()),
        };
        site.driver.announce(&what).await.unwrap();
        let deadline = Instant::now() + DEADLINE;
        let advertisement = &what.frames()[1];
        while receive(&site.peer, deadline) != *advertisement {}
        // The kernel that plays the neighbour believed it: checksum and flags are right.
        let mac = what.mac.to_string();
        while !neighbour().contains(&mac) {
            assert!(Instant::now() < deadline, "{}", neighbour());
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn announcing_on_a_dead_bridge_is_an_error() {
    in_namespace(async |site: Site| {
        let mut what = Announcement {
            bridge: "br0".into(),
            mac: nic_mac("test", "guest", 0),
            address: None,
        };
        ip("link set br0 down");
        let error = site.driver.announce(&what).await.unwrap_err();
        assert!(matches!(error, NetworkError::Announce { .. }), "{error}");
        what.bridge = "nope".into();
        let error = site.driver.announce(&what).await.unwrap_err();
        assert!(
            matches!(error, NetworkError::BridgeMissing { .. }),
            "{error}"
        );
    });
}

#[test]
fn a_bridge_is_used_as_it_is_or_refused() {
    in_namespace(async |site: Site| {
        let driver = &site.driver;
        let again = driver.ensure_bridge(&bridge(1500)).await.unwrap();
        assert!(!again.created);
        let facts = driver.interface("up0").await.unwrap();
        assert_eq!(facts.controller.as_deref(), Some("br0"));
        assert!(facts.up && facts.exists && facts.carrier);
        assert!(!driver.interface("nope").await.unwrap().exists);

        let error = driver.ensure_bridge(&bridge(9000)).await.unwrap_err();
        assert!(matches!(
            error,
            NetworkError::MtuTooSmall {
                have: 1500,
                want: 9000,
                ..
            }
        ));
        let mut spec = bridge(1500);
        spec.uplink = Some("nope".into());
        let error = driver.ensure_bridge(&spec).await.unwrap_err();
        assert!(matches!(error, NetworkError::UplinkMissing { .. }));
        spec.name = "peer0".into();
        let error = driver.ensure_bridge(&spec).await.unwrap_err();
        assert!(matches!(error, NetworkError::NotABridge { .. }), "{error}");
        spec.name = "br1".into();
        spec.uplink = Some("up0".into());
        let error = driver.ensure_bridge(&spec).await.unwrap_err();
        assert!(matches!(error, NetworkError::UplinkTaken { .. }), "{error}");
        ip("addr add 192.0.2.1/24 dev peer0");
        spec.uplink = Some("peer0".into());
        let error = driver.ensure_bridge(&spec).await.unwrap_err();
        assert!(
            matches!(error, NetworkError::UplinkHasAddresses { .. }),
            "{error}"
        );
        assert_eq!(
            PEER_MAC,
            driver.interface("peer0").await.unwrap().mac.unwrap()
        );
    });
}

#[test]
fn taps_are_idempotent_labelled_and_outlive_the_driver() {
    in_namespace(async |site: Site| {
        let spec = tap_spec("db", true);
        let before = site.driver.interface("br0").await.unwrap().mac;
        let first = let_go(&site.driver, &spec).await;
        let second = let_go(&site.driver, &spec).await;
        assert_eq!(first, second);
        assert!(first.muted && !first.attached);
        assert_eq!(first.bridge.as_deref(), Some("br0"));
        assert_eq!(first.guest_mac, Some(spec.guest_mac));
        assert_eq!(first.nic.as_deref(), Some("db/0"));
        site.driver.unmute(&spec.ifname).await.unwrap();
        site.driver.unmute(&spec.ifname).await.unwrap();
        let after = site.driver.interface("br0").await.unwrap().mac;
        assert_eq!(before, after, "the bridge took the tap's address");

        // Another NIC whose name hashes alike must not take it over.
        let mut other = spec.clone();
        other.nic = "app/0".into();
        let error = site.driver.create_tap(&other).await.unwrap_err();
        assert!(matches!(error, NetworkError::TapConflict { .. }), "{error}");

        let restarted = LinuxNetwork::open().unwrap();
        drop(site.driver);
        let taps = restarted.list_taps().await.unwrap();
        assert_eq!(taps.len(), 1);
        assert!(!taps[0].muted);
        // Asked for a mute one, an open left-over is muted.
        assert!(restarted.create_tap(&spec).await.unwrap().muted);

        assert!(restarted.delete_tap(&spec.ifname).await.unwrap());
        assert!(!restarted.delete_tap(&spec.ifname).await.unwrap());
        assert!(restarted.list_taps().await.unwrap().is_empty());
        let error = restarted.delete_tap("up0").await.unwrap_err();
        assert!(matches!(error, NetworkError::NotOurs { .. }));
        let error = restarted.unmute(&spec.ifname).await.unwrap_err();
        assert!(matches!(error, NetworkError::TapMissing { .. }));
    });
}

#[test]
fn a_failed_creation_leaves_no_tap_behind() {
    in_namespace(async |site: Site| {
        let mut spec = tap_spec("db", true);
        spec.bridge = "nope".into();
        let error = site.driver.create_tap(&spec).await.unwrap_err();
        assert!(
            matches!(error, NetworkError::BridgeMissing { .. }),
            "{error}"
        );
        assert!(site.driver.list_taps().await.unwrap().is_empty());
    });
}

/// A real QEMU on the tap, told what to do over QMP.
struct Qemu {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Qemu {
    fn start(tap: &TapSpec) -> Option<Self> {
        let netdev = format!("tap,id=n0,ifname={},script=no,downscript=no", tap.ifname);
        let device = format!("virtio-net-pci,netdev=n0,mac={}", tap.guest_mac);
        let mut process = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-M", "q35,accel=tcg"])
            .args(["-netdev", &netdev, "-device", &device, "-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut qemu = Self {
            commands: process.stdin.take().unwrap(),
            answers: BufReader::new(process.stdout.take().unwrap()),
            process,
        };
        qemu.execute(r#"{"execute":"qmp_capabilities"}"#);
        Some(qemu)
    }

    /// Sends a command and waits for its answer.
    fn execute(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        let mut line = String::new();
        while !line.contains("\"return\"") {
            line.clear();
            let len = self.answers.read_line(&mut line).unwrap();
            assert!(len > 0 && !line.contains("\"error\""), "{command}: {line}");
        }
    }

    /// Makes QEMU announce its guest, as it does by itself after a migration.
    fn announce_self(&mut self) {
        self.execute(
            r#"{"execute":"announce-self","arguments":
            {"initial":10,"max":10,"rounds":3,"step":1}}"#,
        );
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn qemu_on_a_muted_tap_stays_mute_and_speaks_once_it_is_opened() {
    in_namespace(async |site: Site| {
        let mut witness = site.tap("witness", false).await;
        let spec = tap_spec("guest", true);
        site.driver.create_tap(&spec).await.unwrap();
        let Some(mut qemu) = Qemu::start(&spec) else {
            eprintln!("skipped: needs qemu-system-x86_64");
            return;
        };
        let taps = site.driver.list_taps().await.unwrap();
        let facts = taps.iter().find(|tap| tap.ifname == spec.ifname).unwrap();
        assert!(facts.attached && facts.muted, "{facts:?}");

        // Muted: QEMU sends its announcements, and none gets out. The tap counts them.
        qemu.announce_self();
        let deadline = Instant::now() + DEADLINE;
        while refused_frames(&spec.ifname) < 3 {
            assert!(Instant::now() < deadline, "QEMU announces nothing");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let sentinel = (witness.mac, witness.send().unwrap());
        site.frames_until(spec.guest_mac, sentinel);

        // Creating it again while a guest holds it changes nothing.
        assert!(site.driver.create_tap(&spec).await.unwrap().muted);
        site.driver.unmute(&spec.ifname).await.unwrap();
        qemu.announce_self();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let frame = receive(&site.peer, deadline);
            if frame[6..12] == spec.guest_mac.octets() {
                assert_eq!(frame[12..14], [0x80, 0x35], "a reverse ARP");
                return;
            }
        }
    });
}

/// How many frames the kernel refused from the process behind the tap.
fn refused_frames(ifname: &str) -> u64 {
    let output = Command::new("ip")
        .args(["-s", "-o", "link", "show", ifname])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let received = text.split("RX:").nth(1).unwrap();
    let numbers: Vec<u64> = received
        .split_whitespace()
        .filter_map(|word| word.trim_matches('\\').parse().ok())
        .take(4)
        .collect();
    // Bytes, packets, errors, dropped.
    numbers[3]
}
