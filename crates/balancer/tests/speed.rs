//! What the datapath costs, next to what it is compared with; `BENCH=services make bench` runs it on a release build.
//! Everything of a comparison runs in one process, on one core, in turns.
#![allow(clippy::unwrap_used, unsafe_code)]

mod common;

use common::frame::{ACK, Frame, SYN};
use common::site::{Host, Spaces, WAIT, build, receivers, serve};
use common::{CLIENT4, CLIENT6, Site, VIP4, VIP6, edge, own_namespace, own4, permitted, version};
use quorate_balancer::linux::{How, Receivers};
use quorate_balancer::{Capacity, Datapath as _, FlowKey, Pin, ring};
use quorate_bench::Report;
use quorate_types::ServiceName;
use quorate_types::service::{Protocol, ServiceId};

const DROP: u32 = 1;
const PASS: u32 = 2;
const TX: u32 = 3;
const RUNS: u32 = 1_000_000;

/// The last four octets of [`VIP4`] and [`VIP6`] as numbers.
const FIRST4: u32 = 0x0a00_0064;
const FIRST6: u32 = 0x100;

fn rounds() -> usize {
    if quorate_bench::wanted() { 9 } else { 3 }
}

/// The short way: limits are the edges'.
const LIMITED: &str = "TCP over IPv4, a service with limits";
/// The long way.
const PINNED: &str = "TCP over IPv4, a service with pins";

/// None of the measured packet's.
fn another_pin() -> Pin {
    Pin {
        service: ServiceId(7),
        flow: FlowKey {
            protocol: Protocol::Tcp,
            client: CLIENT4.parse().unwrap(),
            client_port: 999,
            port: 80,
        },
        mac: common::mac(1),
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn a_packet_costs_at_most_100_ns() {
    if !permitted("speed") {
        return;
    }
    own_namespace();
    one_core_alone();
    common::ip("link add br0 type bridge");
    let site = Site::with(Capacity::default()).await;
    site.datapath.lease(u64::MAX);
    let mut table = common::table(vec![version(1, &[1, 2, 3, 4])]);
    table.slots = quorate_balancer::ring::SLOTS;
    let unlimited = common::wanted(table.clone());
    site.datapath.apply(&unlimited).await.unwrap();
    table.limits.new_per_member = Some(1_000);
    let limited = common::wanted(table);
    let mut report = Report::new();
    let tcp = Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK);
    for (name, first, frame) in [
        ("TCP over IPv4", FIRST4, tcp.clone()),
        ("UDP over IPv4", FIRST4, Frame::udp(CLIENT4, VIP4, 1000, 53)),
        (
            "TCP over IPv6",
            FIRST6,
            Frame::tcp(CLIENT6, VIP6, 1000, 80, ACK),
        ),
        (LIMITED, FIRST4, tcp.clone()),
        (PINNED, FIRST4, tcp),
    ] {
        match name {
            LIMITED => drop(site.datapath.apply(&limited).await.unwrap()),
            PINNED => site.datapath.pin(&[another_pin()]).await.unwrap(),
            _ => {}
        }
        let mut bytes = frame.build();
        bytes.resize(bytes.len().max(96), 0);
        let (mut director, mut calibration) = (Vec::new(), Vec::new());
        for _ in 0..rounds() {
            site.datapath.series(&bytes, first, 1, TX).unwrap();
            let run = |program| site.datapath.test_run(program, &bytes, 0, RUNS).unwrap();
            let (measured, calibrated) = (run("measure"), run("calibrate"));
            assert_eq!((measured.code, calibrated.code), (TX, TX));
            director.push(f64::from(measured.ns));
            calibration.push(f64::from(calibrated.ns));
        }
        let base = quorate_bench::median(&calibration);
        report.add(&format!("director, {name}"), "ns", &director, base);
        report.add(&format!("calibration, {name}"), "ns", &calibration, None);
    }
    report.publish("services-packet").unwrap();
}

/// Where frames end: nothing that a router or bridge sends is heard.
fn sink(name: &str) {
    common::ip(&format!("link set {name} up"));
}

fn nft(script: &str) {
    let mut child = std::process::Command::new("nft")
        .args(["-f", "-"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Keeps this thread, and what the kernel does in its name, on one core.
fn one_core() {
    // SAFETY: zeros are a value of `cpu_set_t`, and the set lives through the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        assert_eq!(
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set),
            0
        );
    }
}

/// As [`one_core`], which is this thread's alone as far as the scheduler permits: what else the machine does would
/// count as a contender's time, and more of it as that of the slower ones.
fn one_core_alone() {
    one_core();
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters live through the call. Refused, the figures only spread more.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}

/// Frames that one run counts: as many as take a tenth of a second or two, so that runs of all contenders alternate.
const FAST: u32 = 1_000_000;
const SLOW: u32 = 131_072;

/// Million frames per second: `frame` comes in at `ifname` from 65,536 client ports in turn, for a program that may
/// decide (`measure`) or for the verdict named (`calibrate`).
fn rate(
    site: &Site,
    (program, verdict): (&'static str, u32),
    frame: &Frame,
    ifname: &str,
    frames: u32,
) -> f64 {
    let mut bytes = frame.build();
    bytes.resize(96, 0);
    let last: [u8; 4] = match frame.destination {
        std::net::IpAddr::V4(v4) => v4.octets(),
        std::net::IpAddr::V6(v6) => v6.octets()[12..].try_into().unwrap(),
    };
    let first = u32::from_be_bytes(last);
    site.datapath.series(&bytes, first, 1, verdict).unwrap();
    let how = How {
        ifindex: common::index(ifname),
        repeat: frames,
        live: true,
    };
    let begun = std::time::Instant::now();
    site.datapath.run_program(program, &bytes, how).unwrap();
    let rate = f64::from(frames) / begun.elapsed().as_secs_f64() / 1e6;
    // Others get their share of the core between runs, not in them.
    #[allow(clippy::disallowed_methods)]
    std::thread::sleep(std::time::Duration::from_millis(20));
    rate
}

/// The director: in at `u0`, back out of `u0`.
async fn uplink(site: &Site) -> Receivers {
    common::ip("link add u0 type veth peer name u1");
    common::ip("link set u0 up");
    sink("u1");
    let drain = Receivers::swallow(&["u1"]).unwrap();
    let mut table = common::table(vec![version(1, &[1, 2, 3, 4])]);
    table.slots = ring::SLOTS;
    let mut wanted = common::wanted(table);
    wanted.networks.get_mut(&common::network()).unwrap().uplink = Some("u0".to_owned());
    site.datapath.apply(&wanted).await.unwrap();
    drain
}

/// The bridge: in at `b0`, out of `b1`. Plain: without it the kernel shows bridged frames to nftables.
fn bridge() {
    for (port, other) in [("b0", "b2"), ("b1", "b3")] {
        common::ip(&format!("link add {port} type veth peer name {other}"));
        common::ip(&format!("link set {port} master br0 up"));
        sink(other);
    }
    common::ip("link set br0 up");
    std::process::Command::new("bridge")
        .args("fdb add 02:00:00:00:09:09 dev b1 master static".split(' '))
        .status()
        .unwrap();
    for family in ["iptables", "ip6tables", "arptables"] {
        // Not there: nobody could be shown anything.
        let _ = std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{family}"), "0");
    }
}

/// DNAT: in at `n0`, out of `n1`.
fn dnat() {
    for (port, other, address) in [("n0", "n2", "10.1.0.1/24"), ("n1", "n3", "10.2.0.1/24")] {
        common::ip(&format!("link add {port} type veth peer name {other}"));
        common::ip(&format!("link set {port} up"));
        common::ip(&format!("addr add {address} dev {port}"));
        sink(other);
    }
    common::ip("link set n0 address 02:00:00:00:08:08");
    common::ip("neigh add 10.2.0.2 lladdr 02:00:00:00:09:0a dev n1");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    nft(
        "table ip nat {\n chain pre {\n type nat hook prerouting priority -100\n \
         ip daddr 10.1.0.100 tcp dport 80 dnat to 10.2.0.2\n \
         ip daddr 10.1.0.100 udp dport 53 dnat to 10.2.0.2\n }\n}\n",
    );
}

fn arrived(name: &str) -> u64 {
    let text = std::process::Command::new("ip")
        .args(["-j", "-s", "link", "show", name])
        .output()
        .unwrap();
    let value: serde_json::Value = serde_json::from_slice(&text.stdout).unwrap();
    value[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
}

/// Director, nftables DNAT and a plain bridge, each from an interface where frames come in to one that they leave by.
/// The frames are made by the kernel (XDP on live frames); their end is the other side of the outgoing cable.
#[tokio::test]
#[ignore = "a measurement"]
async fn packets_per_second_of_one_core() {
    if !permitted("speed") {
        return;
    }
    own_namespace();
    one_core_alone();
    common::ip("link add br0 type bridge");
    let site = Site::with(Capacity::default()).await;
    site.datapath.lease(u64::MAX);
    let _drain = uplink(&site).await;
    bridge();
    dnat();
    let tcp = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN);
    let udp = Frame::udp(CLIENT4, VIP4, 1000, 53);
    let v6 = Frame::tcp(CLIENT6, VIP6, 1000, 80, SYN);
    let bridged = tcp.clone().to([2, 0, 0, 0, 9, 9]);
    let dnat_tcp = Frame::tcp("10.1.0.9", "10.1.0.100", 1000, 80, SYN).to([2, 0, 0, 0, 8, 8]);
    let dnat_udp = Frame::udp("10.1.0.9", "10.1.0.100", 1000, 53).to([2, 0, 0, 0, 8, 8]);
    // Connections are known to conntrack before its packets are counted.
    for frame in [&dnat_tcp, &dnat_udp] {
        rate(&site, ("calibrate", PASS), frame, "n0", 65_536);
    }
    let contenders = [
        (("measure", 0), &tcp, "u0", FAST),
        (("measure", 0), &udp, "u0", FAST),
        (("measure", 0), &v6, "u0", FAST),
        (("calibrate", PASS), &bridged, "b0", SLOW),
        (("calibrate", PASS), &dnat_tcp, "n0", SLOW),
        (("calibrate", PASS), &dnat_udp, "n0", SLOW),
        (("calibrate", TX), &tcp, "u0", FAST),
        (("calibrate", DROP), &tcp, "u0", FAST),
    ];
    let mut samples: [Vec<f64>; 8] = Default::default();
    for _ in 0..rounds() {
        for (all, (what, frame, ifname, frames)) in samples.iter_mut().zip(contenders) {
            all.push(rate(&site, what, frame, ifname, frames));
        }
    }
    let rounds = u64::try_from(rounds()).unwrap();
    let counters = site.datapath.counters().await.unwrap();
    let steered = counters.services[&common::service()].steered;
    assert_eq!(steered, u64::from(FAST) * rounds * 3, "of the director");
    for (name, frames) in [("u1", FAST * 4), ("b3", SLOW), ("n3", SLOW * 2)] {
        let (arrived, sent) = (arrived(name), u64::from(frames) * rounds);
        println!("MEASURED {name}: {arrived} of {sent} frames arrived");
        assert!(arrived >= sent, "{name}: frames were lost");
    }
    publish_rates(&samples);
}

fn publish_rates(samples: &[Vec<f64>; 8]) {
    let [tcp, udp, v6, bridge, dnat_tcp, dnat_udp, takes, makes] = samples;
    let mut report = Report::new();
    for (name, rates, base) in [
        ("director, TCP, against nftables DNAT", tcp, Some(dnat_tcp)),
        ("director, UDP, against nftables DNAT", udp, Some(dnat_udp)),
        ("director, TCP, against the plain bridge", tcp, Some(bridge)),
        ("director, UDP, against the plain bridge", udp, Some(bridge)),
        ("director, IPv6, against the plain bridge", v6, Some(bridge)),
        ("plain bridge", bridge, None),
        ("nftables DNAT, TCP", dnat_tcp, None),
        ("nftables DNAT, UDP", dnat_udp, None),
        ("frames made and sent, no decision", takes, None),
        ("frames made, and gone at once", makes, None),
    ] {
        let base = base.and_then(|base| quorate_bench::median(base));
        report.add(name, "Mpps", rates, base);
    }
    // What is left of a frame's time without its making, in nanoseconds: taking, deciding, sending, its end.
    let net = |rates: &[f64]| -> Vec<f64> {
        let both = rates.iter().zip(makes);
        both.map(|(rate, made)| 1000.0 / rate - 1000.0 / made)
            .collect()
    };
    let director = net(tcp);
    let base = quorate_bench::median(&director);
    report.add(
        "a frame at the director, without its making",
        "ns",
        &director,
        None,
    );
    report.add(
        "a frame at the bridge, without its making",
        "ns",
        &net(bridge),
        base,
    );
    report.add(
        "a frame at nftables DNAT, without its making",
        "ns",
        &net(dnat_tcp),
        base,
    );
    report.publish("services-rate").unwrap();
}

/// Samples of the director, and of memory alone.
type Both = (Vec<f64>, Vec<f64>);

/// Services that much traffic goes to, among many that have little.
const BUSY: u32 = 64;

/// 10,000 services x 50 members, each with an address of both families; what services have in common is one ring.
fn many_services(count: u32) -> quorate_balancer::Wanted {
    let mut wanted = common::wanted(common::table(Vec::new()));
    wanted.services.clear();
    for number in 0..count {
        let from = u8::try_from(number % 200).unwrap();
        let members: Vec<u8> = (0..50).map(|n| (from + n) % 250).collect();
        let mut table = common::table(vec![version(1, &members)]);
        for list in &mut table.history {
            list.members.sort();
        }
        table.id = ServiceId(number + 1);
        table.slots = ring::slots_for(count as usize - 1);
        let v6 = VIP6.parse::<std::net::Ipv6Addr>().unwrap().to_bits() - u128::from(FIRST6);
        table.addresses = vec![
            std::net::Ipv4Addr::from_bits(FIRST4 + number).into(),
            std::net::Ipv6Addr::from_bits(v6 + u128::from(FIRST6 + number)).into(),
        ];
        let name = ServiceName::new(format!("s{number}")).unwrap();
        wanted.services.insert(name, table);
    }
    wanted
}

/// What a lookup costs with one service and with 10,000, when frames are for one of them, for some in turn, for all in
/// turn. `memory` reads the same lines of the tables and decides nothing: what it costs more is what memory costs here.
#[tokio::test]
#[ignore = "a measurement"]
async fn ten_thousand_services_cost_hardly_more_than_one() {
    if !permitted("speed") {
        return;
    }
    own_namespace();
    one_core_alone();
    common::ip("link add br0 type bridge");
    let site = Site::with(Capacity {
        services: 16_384,
        addresses: 16_384,
        ..Capacity::default()
    })
    .await;
    site.datapath.lease(u64::MAX);
    let frames = [
        ("TCP", FIRST4, Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK)),
        ("UDP", FIRST4, Frame::udp(CLIENT4, VIP4, 1000, 53)),
        ("IPv6", FIRST6, Frame::tcp(CLIENT6, VIP6, 1000, 80, ACK)),
    ];
    // Loaded, of which frames go to so many.
    let cases = [(1, 1), (10_000, 1), (10_000, BUSY), (10_000, 10_000)];
    let mut samples = vec![vec![(Vec::new(), Vec::new()); frames.len()]; cases.len()];
    let mut loaded = 0;
    for (case, (count, used)) in cases.into_iter().enumerate() {
        if loaded != count {
            let begun = std::time::Instant::now();
            let applied = site.datapath.apply(&many_services(count)).await.unwrap();
            let took = begun.elapsed().as_secs_f64();
            println!("{count} services applied in {took:.1} s");
            assert!(applied.services.values().all(|loaded| loaded.active == 1));
            loaded = count;
        }
        for round in 0..rounds() {
            for (family, (_, first, frame)) in frames.iter().enumerate() {
                let mut bytes = frame.build();
                bytes.resize(bytes.len().max(96), 0);
                // Of one of many, another one in each round: some doors are not in their first place.
                let one = u32::try_from(round).unwrap() * 1237 % count;
                let first = if used == 1 { first + one } else { *first };
                let run = |program| {
                    site.datapath.series(&bytes, first, used, TX).unwrap();
                    let verdict = site.datapath.test_run(program, &bytes, 0, RUNS).unwrap();
                    assert_eq!(verdict.code, TX, "{program}");
                    f64::from(verdict.ns)
                };
                let idle = run("calibrate");
                let (director, memory) = &mut samples[case][family];
                director.push(run("measure") - idle);
                memory.push(run("memory") - idle);
            }
        }
    }
    let mut report = Report::new();
    let names = [
        "the only service".to_owned(),
        "one of 10,000 x 50 members".to_owned(),
        format!("{BUSY} of 10,000 in turn"),
        "10,000 of 10,000 in turn".to_owned(),
    ];
    for (family, (kind, ..)) in frames.iter().enumerate() {
        for (case, name) in names.iter().enumerate() {
            let base = |what: fn(&Both) -> &Vec<f64>| {
                quorate_bench::median(what(&samples[0][family])).filter(|_| case > 0)
            };
            let (director, memory) = &samples[case][family];
            report.add(
                &format!("{kind}, {name}"),
                "ns",
                director,
                base(|both| &both.0),
            );
            report.add(
                &format!("{kind}, {name}: memory alone"),
                "ns",
                memory,
                base(|both| &both.1),
            );
        }
    }
    report.publish("services-many").unwrap();
}

/// New connections per second: by way of director and edges, and by way of haproxy (TCP mode, one thread). Client, proxy
/// and servers share one core; each connection is opened, answered with one octet and closed.
#[test]
#[ignore = "a measurement"]
fn connections_per_second_of_one_core() {
    let haproxy = std::process::Command::new("haproxy").arg("-v").output();
    if !permitted("speed") || haproxy.is_err() {
        println!("SKIPPED connections: no haproxy");
        return;
    }
    one_core();
    let spaces = Spaces::new(&["sw", "h1", "h2", "c", "g1", "g2"]);
    build(&spaces);
    let _receivers = receivers(&spaces);
    let first = Host::new(&spaces, "h1", 1);
    let second = Host::new(&spaces, "h2", 2);
    for (host, holder) in [(&first, true), (&second, false)] {
        host.apply(&spaces, holder);
        host.get().lease(u64::MAX);
    }
    for (host, n) in [(&first, 1), (&second, 2)] {
        let tap = format!("qt-{n}");
        spaces
            .run(host.name, host.get().attach_edge(&edge(n)))
            .unwrap();
        spaces.run(host.name, host.get().open_edge(&tap)).unwrap();
        serve(&spaces, n);
    }
    // The proxy is where the director is: at host 1.
    spaces.ip("h1", "addr add 10.0.0.201/24 dev br0");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("haproxy.cfg");
    let backends: String = [1, 2]
        .map(|n| format!("  server s{n} {}:80\n", own4(n)))
        .concat();
    let text = format!(
        "global\n  nbthread 1\n  maxconn 2000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n\
         listen web\n  bind 10.0.0.201:80\n  balance roundrobin\n{backends}"
    );
    std::fs::write(&file, text).unwrap();
    let start = || {
        std::process::Command::new("haproxy")
            .arg("-db")
            .arg("-f")
            .arg(&file)
            .spawn()
            .unwrap()
    };
    let mut proxy = spaces.inside("h1", start);
    let run = |address: &str, count: u32| {
        let address = format!("{address}:80").parse().unwrap();
        spaces.inside("c", move || {
            let begun = std::time::Instant::now();
            for _ in 0..count {
                let mut stream = std::net::TcpStream::connect_timeout(&address, WAIT).unwrap();
                let mut answer = [0];
                std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
            }
            f64::from(count) / begun.elapsed().as_secs_f64()
        })
    };
    let ready = std::time::Instant::now();
    while spaces.inside("c", || {
        std::net::TcpStream::connect("10.0.0.201:80").is_err()
    }) {
        assert!(ready.elapsed() < WAIT, "haproxy does not listen");
        std::thread::yield_now();
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds() {
        ours.push(run(VIP4, 2_000));
        theirs.push(run("10.0.0.201", 2_000));
    }
    proxy.kill().unwrap();
    proxy.wait().unwrap();
    let mut report = Report::new();
    report.add(
        "director and edges",
        "connections/s",
        &ours,
        quorate_bench::median(&theirs),
    );
    report.add(
        "haproxy, TCP mode, one thread",
        "connections/s",
        &theirs,
        None,
    );
    report.publish("services-connections").unwrap();
}
