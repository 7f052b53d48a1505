//! Damaged frames: every program ends with a verdict, and every frame that is dropped is counted.
//!
//! `QUORATE_FUZZ_FRAMES` sets the number, `QUORATE_FUZZ_SEED` the seed; both are printed when something is wrong.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{ACK, FIN, Frame, RST, SYN, arp, neighbour};
use common::{
    CLIENT_MAC, CLIENT4, CLIENT6, Site, VIP4, VIP6, mac, own_namespace, own4, own6, permitted,
    version,
};
use quorate_balancer::{Datapath as _, Guard, mac as macs};

const VIRTUAL: [u8; 6] = [2, 0x51, 0x56, 0, 0, 7];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Good frames of every kind.
fn seeds() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for (client, vip, own) in [(CLIENT4, VIP4, own4(1)), (CLIENT6, VIP6, own6(1))] {
        let kinds = if vip == VIP4 { [3, 11, 12] } else { [1, 2, 4] };
        let mut all = vec![
            Frame::echo(client, vip),
            Frame::udp(client, vip, 1000, 5003),
        ];
        for flags in [SYN, ACK, RST, FIN | ACK, 0, 0xff] {
            all.push(Frame::tcp(client, vip, 1000, 80, flags));
            all.push(Frame::tcp(&own, client, 80, 1000, flags));
            all.push(Frame::tcp(&own, vip, 1000, 80, flags));
        }
        for kind in kinds {
            all.push(Frame::error(
                client,
                vip,
                kind,
                &Frame::tcp(vip, client, 80, 1000, ACK),
                8,
            ));
            all.push(Frame::error(
                &own,
                client,
                kind,
                &Frame::udp(client, &own, 1000, 53),
                8,
            ));
        }
        for (offset, more) in [(0, true), (16, false), (16, true)] {
            for (from, to) in [(client, vip), (&own, client)] {
                let mut piece = Frame::udp(from, to, 1000, 53);
                piece.fragment = Some((9, offset, more));
                all.push(piece);
            }
        }
        let mut options = Frame::tcp(client, vip, 1000, 80, SYN);
        options.options = vec![1; 40];
        all.push(options);
        frames.extend(all.iter().map(Frame::build));
        let mut tagged = all[1].build();
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        frames.push(tagged);
    }
    frames.push(arp(1, CLIENT_MAC, CLIENT4, VIP4));
    frames.push(arp(2, CLIENT_MAC, VIP4, CLIENT4));
    frames.push(neighbour(135, CLIENT_MAC, CLIENT6, VIP6, true));
    frames.push(neighbour(136, CLIENT_MAC, VIP6, VIP6, false));
    frames
}

fn damage(random: &mut Random, frame: &mut Vec<u8>) {
    match random.below(4) {
        0 => frame.truncate(14 + random.below(frame.len() - 13)),
        1 => frame.extend((0..random.below(80)).map(|n| u8::try_from(n).unwrap())),
        _ => {}
    }
    for _ in 0..random.below(5) {
        // Headers are the interesting part.
        let at = random.below(frame.len().min(90));
        frame[at] = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => frame[at] ^ (1 << random.below(8)),
            _ => u8::try_from(random.below(256)).unwrap(),
        };
    }
}

#[tokio::test]
async fn every_frame_ends_and_every_drop_is_counted() {
    if !permitted("fuzz") {
        return;
    }
    let (seed, count) = (
        setting("QUORATE_FUZZ_SEED", 1),
        setting("QUORATE_FUZZ_FRAMES", 100_000),
    );
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::new().await;
    site.datapath.lease(u64::MAX);
    let mut table = common::table(vec![version(1, &[2]), version(2, &[1, 3])]);
    table.affinity.timeout = Some(quorate_types::Millis(5000));
    table.affinity.kind = quorate_types::service::AffinityKind::Source;
    site.datapath.apply(&common::wanted(table)).await.unwrap();
    common::tap(1);
    let mut edge = common::edge(1);
    edge.guard = Guard {
        mac: true,
        dhcp_server: true,
        router_advertisement: true,
        // Its packets from other addresses would all end there.
        address: false,
    };
    site.datapath.attach_edge(&edge).await.unwrap();
    site.datapath.open_edge("qt-1").await.unwrap();
    let tap = common::index("qt-1");
    let mut random = Random(seed);
    let seeds = seeds();
    let mut drops = 0_u64;
    for round in 0..count {
        let mut frame = seeds[random.below(seeds.len())].clone();
        let (program, to, from) = match random.below(3) {
            0 => ("director", VIRTUAL, CLIENT_MAC),
            1 => ("edge_to_guest", mac(1), macs::bounced_mac(2)),
            _ => (
                "edge_from_guest",
                [VIRTUAL, CLIENT_MAC][random.below(2)],
                mac(1),
            ),
        };
        if frame[0] & 1 == 0 {
            frame[0..6].copy_from_slice(&to);
        }
        if program != "edge_to_guest" || random.below(2) == 0 {
            frame[6..12].copy_from_slice(&from);
        }
        damage(&mut random, &mut frame);
        // The kernel lets tcx programs run on whole IP headers only (a tap may pass less, which `director` covers).
        let shortest = if frame.get(12) == Some(&0x86) { 54 } else { 34 };
        if program != "director" && frame.len() < shortest {
            continue;
        }
        let verdict = site.datapath.test_run(program, &frame, tap, 1);
        let verdict = verdict.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        drops += u64::from(match (program, verdict.code) {
            ("director", 1) | ("edge_to_guest" | "edge_from_guest", 2) => true,
            ("director", 2 | 3) | ("edge_to_guest" | "edge_from_guest", u32::MAX | 7) => false,
            other => panic!("seed {seed}, round {round}: {other:?}"),
        });
    }
    let causes = site.datapath.counters().await.unwrap().causes;
    let dropping = [
        "no-lease",
        "malformed",
        "no-service",
        "no-port",
        "no-member",
        "elsewhere",
        "fragment",
        "icmp",
        "spoofed",
        "dhcp-server",
        "router-advertisement",
        "straggler",
        "kernel-error",
    ];
    let counted: u64 = dropping.iter().map(|name| causes[*name]).sum();
    // A guest's claim of a service's address is dropped too; one that is a question is answered instead.
    let claims = causes["address-claimed"];
    assert!(
        counted <= drops && drops <= counted + claims,
        "seed {seed}: {drops} dropped, {causes:?}"
    );
    assert!(drops > count / 20, "{causes:?}");
    for cause in [
        "malformed",
        "no-port",
        "icmp",
        "fragment",
        "spoofed",
        "bounced",
        "echo-answered",
        "self-call",
    ] {
        assert!(
            causes[cause] > 0 || count < 10_000,
            "{cause} never happened: {causes:?}"
        );
    }
    assert_eq!(causes["kernel-error"], 0, "{causes:?}");
    println!("MEASURED fuzz: {count} frames, {drops} dropped");
}
