//! What the datapath costs, next to what it is compared with; `BENCH=services make bench` runs it on a release build.
//! Everything of a comparison runs in one process, on one core, in turns.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{ACK, Frame};
use common::{CLIENT4, CLIENT6, Site, VIP4, VIP6, own_namespace, permitted, version};
use quorate_balancer::{Capacity, Datapath as _};
use quorate_bench::Report;

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
            site.datapath.series(first, 1).unwrap();
            let run = |program| site.datapath.test_run(program, &bytes, 0, RUNS).unwrap();
            let (measured, calibrated) = (run("measure"), run("calibrate"));
            assert_eq!((measured.code, calibrated.code), (3, 3));
            director.push(f64::from(measured.ns));
            calibration.push(f64::from(calibrated.ns));
        }
        let base = quorate_bench::median(&calibration);
        report.add(&format!("director, {name}"), "ns", &director, base);
        report.add(&format!("calibration, {name}"), "ns", &calibration, None);
    }
    report.publish("services-packet").unwrap();
}
