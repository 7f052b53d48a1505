//! Doors, which a director looks for first: they are there, and what they say follows what the other tables say. The
//! program `memory` passes through doors only; `director` has another way without.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{ACK, Frame, Seen};
use common::{CLIENT4, CLIENT6, Site, VIP4, VIP6, mac, own_namespace, permitted, table, version};
use quorate_balancer::{
    Datapath as _, FlowKey, LinuxDatapath, Pin, ServiceTable, TraceQuery, Wanted, ring,
};
use quorate_types::ServiceName;
use quorate_types::service::{Affinity, AffinityKind, Protocol, ServiceId};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const TX: u32 = 3;

async fn site() -> Site {
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::new().await;
    site.datapath.lease(u64::MAX);
    site
}

async fn apply(datapath: &LinuxDatapath, wanted: &Wanted) {
    let applied = datapath.apply(wanted).await.unwrap();
    for (name, loaded) in applied.services {
        assert_eq!(loaded.problem, None, "{name}");
    }
}

fn frame(vip: IpAddr, client_port: u16, port: u16) -> Frame {
    let client = if vip.is_ipv4() { CLIENT4 } else { CLIENT6 };
    Frame::tcp(client, &vip.to_string(), client_port, port, ACK)
}

fn has_door(datapath: &LinuxDatapath, vip: IpAddr) -> bool {
    let mut bytes = frame(vip, 1000, 80).build();
    bytes.resize(96, 0);
    datapath.series(&bytes, 0, 0, TX).unwrap();
    datapath.test_run("memory", &bytes, 0, 1).unwrap().code == TX
}

/// Who gets the packet.
fn steered(datapath: &LinuxDatapath, frame: &Frame) -> [u8; 6] {
    let verdict = datapath.test_run("director", &frame.build(), 0, 1).unwrap();
    assert_eq!(verdict.code, TX);
    Seen(&verdict.frame).destination_mac().try_into().unwrap()
}

fn both() -> [IpAddr; 2] {
    [VIP4.parse().unwrap(), VIP6.parse().unwrap()]
}

async fn steers_as_trace_says(datapath: &LinuxDatapath) {
    for client_port in 1000..1050 {
        for vip in both() {
            let query = TraceQuery {
                service: common::service(),
                client: if vip.is_ipv4() { CLIENT4 } else { CLIENT6 }
                    .parse()
                    .unwrap(),
                client_port,
                port: Some(80),
                protocol: Some(Protocol::Tcp),
            };
            let answer = datapath.trace(&query).await.unwrap();
            let number = answer.member.unwrap().as_str()[2..].parse().unwrap();
            assert_eq!(steered(datapath, &frame(vip, client_port, 80)), mac(number));
        }
    }
}

#[tokio::test]
async fn directors_find_the_door_of_every_address() {
    if !permitted("doors") {
        return;
    }
    let site = site().await;
    let mut all = common::wanted(table(Vec::new()));
    all.services.clear();
    let mut addresses = Vec::new();
    for number in 0..500_u16 {
        let mut one = table(vec![version(1, &[1, 2])]);
        one.id = ServiceId(u32::from(number) + 1);
        one.addresses = vec![
            Ipv4Addr::from_bits(0x0a01_0000 + u32::from(number)).into(),
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, number).into(),
        ];
        addresses.extend(one.addresses.clone());
        let name = ServiceName::new(format!("s{number}")).unwrap();
        all.services.insert(name, one);
    }
    apply(&site.datapath, &all).await;
    let found = |datapath: &LinuxDatapath| {
        let found = addresses.iter().filter(|vip| has_door(datapath, **vip));
        found.count()
    };
    // A quarter of the places is taken: four in a row seldom are.
    assert!(found(&site.datapath) > 990, "{}", found(&site.datapath));
    // A later daemon knows where they are: it makes none twice, and takes all away.
    let later = LinuxDatapath::new(site.options.clone()).await.unwrap();
    apply(&later, &all).await;
    assert!(found(&later) > 990);
    all.services.clear();
    apply(&later, &all).await;
    assert_eq!(found(&later), 0);
}

#[tokio::test]
async fn doors_follow_rings_pins_and_services() {
    if !permitted("doors that change") {
        return;
    }
    let site = site().await;
    let datapath = &site.datapath;
    let mut one = table(vec![version(1, &[1, 2, 3])]);
    apply(datapath, &common::wanted(one.clone())).await;
    steers_as_trace_says(datapath).await;
    // Another ring, of the other size, and a part of the client that counts.
    one.history.push(version(2, &[2, 3, 4]));
    one.slots = ring::SLOTS;
    apply(datapath, &common::wanted(one.clone())).await;
    steers_as_trace_says(datapath).await;
    one.affinity = Affinity {
        kind: AffinityKind::Subnet,
        prefix: 24,
        prefix6: 64,
        ..Affinity::default()
    };
    apply(datapath, &common::wanted(one.clone())).await;
    steers_as_trace_says(datapath).await;
    assert!(both().iter().all(|vip| has_door(datapath, *vip)));
    // Who has pins is looked up the long way.
    let pinned = frame(VIP4.parse().unwrap(), 7, 80);
    let others = [2, 3, 4].map(mac);
    let other = others
        .into_iter()
        .find(|mac| *mac != steered(datapath, &pinned));
    let pin = Pin {
        service: ServiceId(7),
        flow: FlowKey {
            protocol: Protocol::Tcp,
            client: CLIENT4.parse().unwrap(),
            client_port: 7,
            port: 80,
        },
        mac: other.unwrap(),
    };
    datapath.pin(&[pin]).await.unwrap();
    assert!(!both().iter().any(|vip| has_door(datapath, *vip)));
    assert_eq!(steered(datapath, &pinned), other.unwrap());
    // Another service has the address, another member, and no pins.
    let heir = ServiceTable {
        id: ServiceId(8),
        ..table(vec![version(1, &[5])])
    };
    apply(datapath, &common::wanted(heir)).await;
    assert!(both().iter().all(|vip| has_door(datapath, *vip)));
    assert_eq!(steered(datapath, &pinned), mac(5));
}

#[tokio::test]
async fn limits_are_the_edges_and_take_no_door_away() {
    if !permitted("doors beside limits") {
        return;
    }
    let site = site().await;
    let datapath = &site.datapath;
    let mut one = table(vec![version(1, &[1, 2, 3])]);
    for new_per_member in [Some(100), None, Some(7)] {
        one.limits.new_per_member = new_per_member;
        apply(datapath, &common::wanted(one.clone())).await;
        assert!(both().iter().all(|vip| has_door(datapath, *vip)));
        steers_as_trace_says(datapath).await;
    }
}

#[tokio::test]
async fn ports_that_a_door_has_no_room_for_are_served() {
    if !permitted("doors with many ports") {
        return;
    }
    let site = site().await;
    let mut many = table(vec![version(1, &[1])]);
    many.ports = (1..=8)
        .map(|n| (n * 10).to_string().parse().unwrap())
        .collect();
    let mut all = common::wanted(many);
    // And those of another service at the same address.
    let mut other = table(vec![version(1, &[2])]);
    other.id = ServiceId(8);
    other.ports = vec!["443".parse().unwrap()];
    let name = ServiceName::new("other").unwrap();
    all.services.insert(name, other);
    apply(&site.datapath, &all).await;
    for vip in both() {
        assert!(has_door(&site.datapath, vip));
        for n in 1..=8 {
            assert_eq!(steered(&site.datapath, &frame(vip, 1000, n * 10)), mac(1));
        }
        assert_eq!(steered(&site.datapath, &frame(vip, 1000, 443)), mac(2));
        let closed = frame(vip, 1000, 11).build();
        let verdict = site.datapath.test_run("director", &closed, 0, 1).unwrap();
        assert_ne!(verdict.code, TX);
    }
}
