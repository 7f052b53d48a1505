//! What the datapath costs, next to what it is compared with; `BENCH=services make bench` runs it on a release build.
//! Everything of a comparison runs in one process, on one core, in turns.
#![allow(clippy::unwrap_used, unsafe_code)]

mod common;

use common::frame::{ACK, Frame, SYN};
use common::{CLIENT4, CLIENT6, Site, VIP4, VIP6, own_namespace, permitted, version};
use quorate_balancer::linux::{How, Receivers};
use quorate_balancer::{Capacity, Datapath as _};
use quorate_bench::Report;

const PASS: u32 = 2;
const TX: u32 = 3;
const RUNS: u32 = 1_000_000;

/// The last four octets of [`VIP4`] and [`VIP6`] as numbers.
const FIRST4: u32 = 0x0a00_0064;
const FIRST6: u32 = 0x100;

fn rounds() -> usize {
    if quorate_bench::wanted() { 9 } else { 3 }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn a_packet_costs_at_most_100_ns() {
    if !permitted("speed") {
        return;
    }
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::with(Capacity::default()).await;
    site.datapath.lease(u64::MAX);
    let mut table = common::table(vec![version(1, &[1, 2, 3, 4])]);
    table.slots = quorate_balancer::ring::SLOTS;
    site.datapath.apply(&common::wanted(table)).await.unwrap();
    let mut report = Report::new();
    for (name, first, frame) in [
        (
            "TCP over IPv4",
            FIRST4,
            Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK),
        ),
        ("UDP over IPv4", FIRST4, Frame::udp(CLIENT4, VIP4, 1000, 53)),
        (
            "TCP over IPv6",
            FIRST6,
            Frame::tcp(CLIENT6, VIP6, 1000, 80, ACK),
        ),
    ] {
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

/// Million frames per second: `frame` comes in at `ifname`, for the director or for the kernel.
fn rate(site: &Site, program: &'static str, frame: &Frame, ifname: &str, frames: u32) -> f64 {
    let mut bytes = frame.build();
    bytes.resize(96, 0);
    site.datapath.series(&bytes, 0, 0, PASS).unwrap();
    let how = How {
        ifindex: common::index(ifname),
        repeat: frames,
        live: true,
    };
    let begun = std::time::Instant::now();
    site.datapath.run_program(program, &bytes, how).unwrap();
    f64::from(frames) / begun.elapsed().as_secs_f64() / 1e6
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
    one_core();
    common::ip("link add br0 type bridge");
    let site = Site::with(Capacity::default()).await;
    site.datapath.lease(u64::MAX);
    // The director: in at `u0`, back out of `u0`.
    common::ip("link add u0 type veth peer name u1");
    common::ip("link set u0 up");
    sink("u1");
    let _drain = Receivers::swallow(&["u1"]).unwrap();
    let mut wanted = common::wanted(common::table(vec![version(1, &[1, 2, 3, 4])]));
    wanted.networks.get_mut(&common::network()).unwrap().uplink = Some("u0".to_owned());
    site.datapath.apply(&wanted).await.unwrap();
    // The bridge: in at `b0`, out of `b1`.
    for (port, other) in [("b0", "b2"), ("b1", "b3")] {
        common::ip(&format!("link add {port} type veth peer name {other}"));
        common::ip(&format!("link set {port} master br0 up"));
        sink(other);
    }
    common::ip("link set br0 up");
    common::ip("link set b3 address 02:00:00:00:09:09");
    std::process::Command::new("bridge")
        .args("fdb add 02:00:00:00:09:09 dev b1 master static".split(' '))
        .status()
        .unwrap();
    // DNAT: in at `n0`, out of `n1`.
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
    let dnat = |protocol| {
        let frame = if protocol == 6 {
            Frame::tcp("10.1.0.9", "10.1.0.100", 1000, 80, SYN)
        } else {
            Frame::udp("10.1.0.9", "10.1.0.100", 1000, 53)
        };
        frame.to([2, 0, 0, 0, 8, 8])
    };
    let tcp = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN);
    let count = if quorate_bench::wanted() {
        1_000_000
    } else {
        200_000
    };
    let mut samples: [Vec<f64>; 6] = Default::default();
    for _ in 0..rounds() {
        let plain = tcp.clone().to([2, 0, 0, 0, 9, 9]);
        let runs = [
            rate(&site, "measure", &tcp, "u0", count),
            rate(
                &site,
                "measure",
                &Frame::udp(CLIENT4, VIP4, 1000, 53),
                "u0",
                count,
            ),
            rate(
                &site,
                "measure",
                &Frame::tcp(CLIENT6, VIP6, 1000, 80, SYN),
                "u0",
                count,
            ),
            rate(&site, "calibrate", &plain, "b0", count),
            rate(&site, "calibrate", &dnat(6), "n0", count),
            rate(&site, "calibrate", &dnat(17), "n0", count),
        ];
        for (all, one) in samples.iter_mut().zip(runs) {
            all.push(one);
        }
    }
    let counters = site.datapath.counters().await.unwrap();
    let steered = counters.services[&common::service()].steered;
    assert!(
        steered >= u64::from(count) * 3,
        "the director saw {steered}"
    );
    let sent = |name: &str| -> u64 {
        let text = std::process::Command::new("ip")
            .args(["-j", "-s", "link", "show", name])
            .output()
            .unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text.stdout).unwrap();
        value[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    };
    let frames = u64::from(count) * u64::try_from(rounds()).unwrap();
    for (name, times) in [("u1", 3), ("b3", 1), ("n3", 2)] {
        println!(
            "MEASURED {name}: {} of {} frames arrived",
            sent(name),
            frames * times
        );
    }
    let mut report = Report::new();
    let medians: Vec<f64> = samples
        .iter()
        .map(|all| quorate_bench::median(all).unwrap())
        .collect();
    report.add(
        "director, TCP, against nftables DNAT",
        "Mpps",
        &samples[0],
        Some(medians[4]),
    );
    report.add(
        "director, UDP, against nftables DNAT",
        "Mpps",
        &samples[1],
        Some(medians[5]),
    );
    report.add(
        "director, TCP, against the plain bridge",
        "Mpps",
        &samples[0],
        Some(medians[3]),
    );
    report.add(
        "director, TCP over IPv6, against the plain bridge",
        "Mpps",
        &samples[2],
        Some(medians[3]),
    );
    report.add("plain bridge", "Mpps", &samples[3], None);
    report.add("nftables DNAT, TCP", "Mpps", &samples[4], None);
    report.add("nftables DNAT, UDP", "Mpps", &samples[5], None);
    report.publish("services-rate").unwrap();
}
