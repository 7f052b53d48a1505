//! The director and the answers on the wire, run on single frames by the kernel.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{ACK, Frame, SYN, Seen, arp, neighbour};
use common::{
    CLIENT_MAC, CLIENT4, CLIENT6, Site, VIP4, VIP6, mac, own_namespace, permitted, version,
};
use quorate_balancer::linux::Verdict;
use quorate_balancer::{Datapath as _, TraceQuery, mac as macs};
use quorate_types::service::{AffinityKind, Attractor, Protocol, ServiceId};

const DROP: u32 = 1;
const PASS: u32 = 2;
const TX: u32 = 3;

const VIRTUAL: [u8; 6] = [2, 0x51, 0x56, 0, 0, 7];

struct Director(Site);

impl Director {
    async fn new(members: &[u8]) -> Self {
        Self::with(common::table(vec![version(1, members)])).await
    }

    async fn with(table: quorate_balancer::ServiceTable) -> Self {
        own_namespace();
        common::ip("link add br0 type bridge");
        let site = Site::new().await;
        let applied = site.datapath.apply(&common::wanted(table)).await.unwrap();
        let loaded = &applied.services[&common::service()];
        assert_eq!(loaded.problem, None);
        site.datapath.lease(u64::MAX);
        Self(site)
    }

    fn run(&self, frame: &[u8]) -> Verdict {
        self.0.datapath.test_run("director", frame, 0, 1).unwrap()
    }

    async fn cause(&self, name: &str) -> u64 {
        self.0.datapath.counters().await.unwrap().causes[name]
    }
}

#[tokio::test]
async fn packets_to_a_service_go_to_the_member_that_trace_names() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1, 2, 3]).await;
    let mut seen = std::collections::BTreeSet::new();
    for port in 1000..1040 {
        for (client, vip) in [(CLIENT4, VIP4), (CLIENT6, VIP6)] {
            for (protocol, frame) in [
                (Protocol::Tcp, Frame::tcp(client, vip, port, 80, SYN)),
                (Protocol::Udp, Frame::udp(client, vip, port, 5005)),
            ] {
                let bytes = frame.build();
                let verdict = director.run(&bytes);
                assert_eq!(verdict.code, TX);
                let query = TraceQuery {
                    service: common::service(),
                    client: client.parse().unwrap(),
                    client_port: port,
                    port: (protocol == Protocol::Udp).then_some(5005),
                    protocol: Some(protocol),
                };
                let answer = director.0.datapath.trace(&query).await.unwrap();
                let number = answer.member.unwrap().as_str()[2..].parse().unwrap();
                seen.insert(number);
                let out = Seen(&verdict.frame);
                assert_eq!(out.destination_mac(), mac(number));
                assert_eq!(out.source_mac(), macs::director_mac(1));
                assert_eq!(verdict.frame[12..], bytes[12..], "only the MACs change");
            }
        }
    }
    assert_eq!(seen.len(), 3);
    let counters = director.0.datapath.counters().await.unwrap();
    assert_eq!(counters.services[&common::service()].steered, 160);
}

#[tokio::test]
async fn what_is_not_a_service_s_is_left_alone() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1]).await;
    let mut tagged = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN).build();
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    for frame in [
        Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN).to(mac(1)).build(),
        Frame::tcp(CLIENT4, "10.0.0.5", 1000, 80, SYN)
            .to(mac(9))
            .build(),
        tagged,
        vec![0; 14],
        arp(1, CLIENT_MAC, CLIENT4, "10.0.0.5"),
        arp(2, CLIENT_MAC, CLIENT4, VIP4),
        neighbour(135, CLIENT_MAC, CLIENT6, "fd00::5", true),
    ] {
        let verdict = director.run(&frame);
        assert_eq!((verdict.code, &verdict.frame), (PASS, &frame));
    }
    assert_eq!(director.cause("tagged").await, 1);
}

#[tokio::test]
async fn what_no_service_wants_is_dropped_and_counted() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1]).await;
    let good = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN);
    let mut bad_version = good.build();
    bad_version[14] = 0x55;
    let mut short_header = good.build();
    short_header[14] = 0x44;
    let mut too_long = good.build();
    too_long[16] = 0xff;
    let mut not_ip = good.build();
    not_ip[12] = 0x12;
    let mut bad6 = Frame::tcp(CLIENT6, VIP6, 1000, 80, SYN).build();
    bad6[14] = 0x40;
    for (cause, frame) in [
        ("no-port", Frame::tcp(CLIENT4, VIP4, 1000, 81, SYN).build()),
        ("no-port", Frame::udp(CLIENT6, VIP6, 1000, 80).build()),
        (
            "no-port",
            Frame::new(CLIENT4, VIP4, 132, vec![0; 30]).build(),
        ),
        (
            "no-service",
            Frame::tcp(CLIENT4, "10.0.0.7", 1000, 80, SYN).build(),
        ),
        ("no-service", not_ip),
        ("malformed", good.build()[..40].to_vec()),
        ("malformed", bad_version),
        ("malformed", short_header),
        ("malformed", too_long),
        ("malformed", bad6),
        (
            "icmp",
            Frame::new(CLIENT4, VIP4, 1, vec![13, 0, 0, 0, 0, 0, 0, 0]).build(),
        ),
    ] {
        let before = director.cause(cause).await;
        assert_eq!(director.run(&frame).code, DROP, "{cause}");
        assert_eq!(director.cause(cause).await, before + 1, "{cause}");
    }
    // A wrong checksum is the receiver's business: it gets the packet as it is.
    let mut wrong = good.build();
    wrong[50] ^= 0x55;
    let verdict = director.run(&wrong);
    assert_eq!(verdict.code, TX);
    assert!(!Seen(&verdict.frame).is_right());
}

#[tokio::test]
async fn options_and_extension_headers_are_passed_over() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1]).await;
    for (client, vip) in [(CLIENT4, VIP4), (CLIENT6, VIP6)] {
        let mut frame = Frame::tcp(client, vip, 1000, 80, SYN);
        frame.options = vec![1; 8];
        let verdict = director.run(&frame.build());
        assert_eq!(verdict.code, TX, "{client}");
        assert!(Seen(&verdict.frame).is_right());
    }
}

#[tokio::test]
async fn past_the_lease_nothing_is_steered_or_answered() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1]).await;
    let frames = [
        Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN).build(),
        Frame::echo(CLIENT6, VIP6).build(),
    ];
    assert_eq!(director.run(&frames[0]).code, TX);
    director
        .0
        .datapath
        .lease(common::boottime_ns() + 20_000_000);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while director.run(&frames[0]).code != DROP {
        assert!(std::time::Instant::now() < deadline);
    }
    assert_eq!(director.run(&frames[1]).code, DROP);
    let request = arp(1, CLIENT_MAC, CLIENT4, VIP4);
    assert_eq!(director.run(&request).code, PASS);
    assert!(director.cause("no-lease").await >= 3);
    let announced = arp(2, VIRTUAL, VIP4, VIP4);
    let guarded = |frame: &[u8]| {
        director
            .0
            .datapath
            .test_run("announcements", frame, 1, 1)
            .unwrap()
            .code
    };
    assert_eq!(guarded(&announced), 2, "announcements are dropped too");
    assert_eq!(guarded(&arp(2, CLIENT_MAC, CLIENT4, CLIENT4)), u32::MAX);
}

#[tokio::test]
async fn the_holder_answers_who_has_the_address() {
    if !permitted("director") {
        return;
    }
    let mut table = common::table(vec![version(1, &[1])]);
    let director = Director::with(table.clone()).await;
    let verdict = director.run(&arp(1, CLIENT_MAC, CLIENT4, VIP4));
    assert_eq!(verdict.code, TX);
    let mut wanted = arp(2, VIRTUAL, VIP4, CLIENT4);
    wanted[0..6].copy_from_slice(&CLIENT_MAC);
    wanted[32..38].copy_from_slice(&CLIENT_MAC);
    assert_eq!(verdict.frame, wanted);
    for option in [true, false] {
        let verdict = director.run(&neighbour(135, CLIENT_MAC, CLIENT6, VIP6, option));
        assert_eq!((verdict.code, verdict.frame.len()), (TX, 86));
        let out = Seen(&verdict.frame);
        assert!(out.is_right());
        assert_eq!(out.destination_mac(), CLIENT_MAC);
        assert_eq!(out.destination().to_string(), CLIENT6);
        let (_, icmp) = out.payload();
        assert_eq!((icmp[0], icmp[4]), (136, 0x60));
        assert_eq!(icmp[24..32], [2, 1, 2, 0x51, 0x56, 0, 0, 7]);
    }
    // A probe for duplicates is told to all.
    let verdict = director.run(&neighbour(135, CLIENT_MAC, "::", VIP6, false));
    assert_eq!(verdict.code, TX);
    let out = Seen(&verdict.frame);
    assert!(out.is_right());
    assert_eq!(out.destination().to_string(), "ff02::1");
    assert_eq!(out.destination_mac(), [0x33, 0x33, 0, 0, 0, 1]);
    table.holder = false;
    let wanted = common::wanted(table);
    director.0.datapath.apply(&wanted).await.unwrap();
    assert_eq!(director.run(&arp(1, CLIENT_MAC, CLIENT4, VIP4)).code, PASS);
    assert_eq!(
        director
            .run(&neighbour(135, CLIENT_MAC, CLIENT6, VIP6, true))
            .code,
        PASS
    );
}

#[tokio::test]
async fn a_foreign_claim_of_the_address_is_written_down() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1]).await;
    let thief = [2, 9, 9, 9, 9, 9];
    director.run(&arp(2, thief, VIP4, CLIENT4));
    director.run(&arp(1, thief, VIP4, VIP4));
    director.run(&neighbour(136, thief, VIP6, VIP6, true));
    // Another host's announcements are ours.
    director.run(&arp(2, VIRTUAL, VIP4, VIP4));
    let counters = director.0.datapath.counters().await.unwrap();
    let claims: Vec<(String, [u8; 6], u64)> = counters
        .duplicates
        .iter()
        .map(|one| (one.address.to_string(), one.mac, one.count))
        .collect();
    assert_eq!(
        claims,
        [(VIP4.to_owned(), thief, 2), (VIP6.to_owned(), thief, 1)]
    );
    assert_eq!(counters.duplicates[0].ifname, "lo");
}

#[tokio::test]
async fn a_ping_is_answered() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1]).await;
    for (client, vip, kind) in [(CLIENT4, VIP4, 0), (CLIENT6, VIP6, 129)] {
        let mut frame = Frame::echo(client, vip);
        frame.ttl = 3;
        let verdict = director.run(&frame.build());
        assert_eq!(verdict.code, TX);
        let out = Seen(&verdict.frame);
        assert!(out.is_right(), "{client}");
        assert_eq!(out.source().to_string(), vip);
        assert_eq!(out.destination().to_string(), client);
        assert_eq!(out.source_mac(), VIRTUAL);
        assert_eq!(out.payload().1[0], kind);
    }
}

#[tokio::test]
async fn errors_follow_the_flow_that_they_are_about() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1, 2, 3]).await;
    for port in 1000..1010 {
        for (client, vip, kind) in [(CLIENT4, VIP4, 3), (CLIENT6, VIP6, 2)] {
            let flow = director.run(&Frame::tcp(client, vip, port, 80, ACK).build());
            let sent = Frame::tcp(vip, client, 80, port, ACK);
            let router = if vip == VIP4 {
                "10.0.0.254"
            } else {
                "fd00::254"
            };
            let error = Frame::error(router, vip, kind, &sent, 8);
            let verdict = director.run(&error.build());
            assert_eq!(verdict.code, TX);
            assert_eq!(verdict.frame[0..6], flow.frame[0..6], "{client} {port}");
        }
    }
    // About a packet that no member sent.
    let other = Frame::tcp("10.0.0.77", CLIENT4, 80, 1000, ACK);
    let error = Frame::error("10.0.0.254", VIP4, 3, &other, 8);
    assert_eq!(director.run(&error.build()).code, DROP);
}

#[tokio::test]
async fn later_fragments_follow_the_first_one() {
    if !permitted("director") {
        return;
    }
    let director = Director::new(&[1, 2, 3]).await;
    for (client, vip) in [(CLIENT4, VIP4), (CLIENT6, VIP6)] {
        for id in 1..10 {
            let mut first = Frame::udp(client, vip, 1000 + u16::try_from(id).unwrap(), 53);
            first.fragment = Some((id, 0, true));
            let mut later = Frame::new(client, vip, 17, vec![7; 24]);
            later.fragment = Some((id, 16, false));
            assert_eq!(director.run(&later.build()).code, DROP);
            let to = director.run(&first.build());
            assert_eq!(to.code, TX);
            let verdict = director.run(&later.build());
            assert_eq!((verdict.code, &verdict.frame[0..6]), (TX, &to.frame[0..6]));
        }
    }
    assert_eq!(director.cause("fragment").await, 18);
}

#[tokio::test]
async fn affinity_keeps_a_client_or_its_subnet_together() {
    if !permitted("director") {
        return;
    }
    let mut table = common::table(vec![version(1, &[1, 2, 3, 4])]);
    table.affinity.kind = AffinityKind::Subnet;
    let director = Director::with(table).await;
    let first = |client: &str, vip: &str, port| {
        director
            .run(&Frame::tcp(client, vip, port, 80, SYN).build())
            .frame[0..6]
            .to_vec()
    };
    let home = first("10.0.0.1", VIP4, 1000);
    let home6 = first("fd00::1", VIP6, 1000);
    for n in 1..100_u16 {
        assert_eq!(first(&format!("10.0.0.{n}"), VIP4, n), home);
        assert_eq!(first(&format!("fd00::{n:x}:1"), VIP6, n), home6);
    }
    let others: std::collections::BTreeSet<_> = (0..50)
        .map(|n| first(&format!("10.1.{n}.1"), VIP4, 1))
        .collect();
    assert_eq!(others.len(), 4);
}

#[tokio::test]
async fn routers_send_to_the_host_and_multicast_reaches_all_hosts() {
    if !permitted("director") {
        return;
    }
    let mut table = common::table(vec![version(1, &[1, 2])]);
    table.attractor = Attractor::Bgp;
    table.holder = false;
    let director = Director::with(table.clone()).await;
    let text = std::process::Command::new("ip")
        .args(["-o", "link", "show", "br0"])
        .output()
        .unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    let bridge = text
        .split("link/ether ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let bridge: Vec<u8> = bridge
        .split(':')
        .map(|pair| u8::from_str_radix(pair, 16).unwrap())
        .collect();
    let bridge: [u8; 6] = bridge.try_into().unwrap();
    let frame = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN);
    assert_eq!(director.run(&frame.clone().to(bridge).build()).code, TX);
    assert_eq!(director.run(&frame.clone().to(mac(9)).build()).code, PASS);
    let other = Frame::tcp(CLIENT4, "10.0.0.5", 1000, 80, SYN).to(bridge);
    assert_eq!(director.run(&other.build()).code, PASS);

    table.attractor = Attractor::Igmp;
    table.holder = true;
    director
        .0
        .datapath
        .apply(&common::wanted(table))
        .await
        .unwrap();
    let group = macs::multicast(ServiceId(7)).1;
    let answer = director.run(&arp(1, CLIENT_MAC, CLIENT4, VIP4));
    assert_eq!(
        (&answer.frame[22..28], &answer.frame[6..12]),
        (&group[..], &VIRTUAL[..])
    );
    // No member is here: another host serves it.
    assert_eq!(director.run(&frame.clone().to(group).build()).code, DROP);
    for n in [1, 2] {
        common::tap(n);
        director
            .0
            .datapath
            .attach_edge(&common::edge(n))
            .await
            .unwrap();
        director
            .0
            .datapath
            .open_edge(&format!("qt-{n}"))
            .await
            .unwrap();
    }
    assert_eq!(director.run(&frame.to(group).build()).code, PASS);
}
