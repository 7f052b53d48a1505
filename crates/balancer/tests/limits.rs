//! Limits on new flows, and the count of what guests were kept from sending; run on single frames by the kernel.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{ACK, Frame, RST, SYN};
use common::{CLIENT4, Site, VIP4, VIP6, mac, own_namespace, own4, permitted, version};
use quorate_balancer::{
    Datapath as _, FlowKey, Guard, LinuxDatapath, MemberCounters, Pin, ServiceTable,
};
use quorate_types::VmName;
use quorate_types::service::{Limits, Offences, Protocol, ServiceId};
use std::time::{Duration, Instant};

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;

/// A member at `qt-1` whose service has these limits.
async fn member(limits: Limits) -> Site {
    own_namespace();
    common::ip("link add br0 type bridge");
    let site = Site::new().await;
    site.datapath.lease(u64::MAX);
    apply(&site.datapath, limits).await;
    common::tap(1);
    site.datapath.attach_edge(&common::edge(1)).await.unwrap();
    site.datapath.open_edge("qt-1").await.unwrap();
    site
}

fn limited(limits: Limits) -> ServiceTable {
    ServiceTable {
        limits,
        ..common::table(vec![version(1, &[1])])
    }
}

async fn apply(datapath: &LinuxDatapath, limits: Limits) {
    let applied = datapath.apply(&common::wanted(limited(limits))).await;
    assert_eq!(applied.unwrap().services[&common::service()].problem, None);
}

fn gets(site: &Site, frame: &Frame) -> bool {
    let index = common::index("qt-1");
    let frame = frame.clone().to(mac(1)).build();
    let run = site.datapath.test_run("edge_to_guest", &frame, index, 1);
    match run.unwrap().code {
        NEXT => true,
        DROP => false,
        code => panic!("verdict {code}"),
    }
}

fn syn(client: &str, vip: &str, port: u16) -> Frame {
    Frame::tcp(client, vip, port, 80, SYN)
}

async fn counted(site: &Site) -> MemberCounters {
    let counters = site.datapath.counters().await.unwrap();
    let members = &counters.services[&common::service()].members;
    let member = *members.values().next().unwrap();
    assert_eq!(counters.causes["limited"], member.refused);
    member
}

#[tokio::test]
async fn a_second_s_worth_may_begin_at_once_and_no_more() {
    if !permitted("limits") {
        return;
    }
    let site = member(Limits {
        new_per_member: Some(10),
        new_per_client: None,
    })
    .await;
    let begun = Instant::now();
    let mut served = Vec::new();
    for port in 1000..1040 {
        // Of clients of their own: there is no limit for one.
        let client = format!("10.0.1.{}", port - 999);
        if gets(&site, &syn(&client, VIP4, port)) {
            served.push((client, port));
        }
    }
    // A slow machine takes part of a second for it, in which more become due.
    let most = 11 + usize::try_from(begun.elapsed().as_millis() / 100).unwrap();
    assert!((10..=most).contains(&served.len()), "{}", served.len());
    let counted = counted(&site).await;
    assert_eq!(counted.flows, served.len() as u64);
    assert_eq!(counted.refused, 40 - served.len() as u64);
    // Connections that have begun go on, and a SYN that is sent again is none more.
    for (client, port) in &served {
        assert!(gets(&site, &syn(client, VIP4, *port)));
        assert!(gets(&site, &Frame::tcp(client, VIP4, *port, 80, ACK)));
    }
    // One that is refused comes again, as TCP does.
    let end = Instant::now() + Duration::from_secs(20);
    while !gets(&site, &syn("10.0.2.1", VIP4, 2000)) {
        assert!(Instant::now() < end, "nothing becomes due");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn pins_leave_limits_as_they_are() {
    if !permitted("limits beside pins") {
        return;
    }
    let site = member(Limits {
        new_per_member: Some(1),
        new_per_client: None,
    })
    .await;
    let pin = Pin {
        service: ServiceId(7),
        flow: FlowKey {
            protocol: Protocol::Tcp,
            client: CLIENT4.parse().unwrap(),
            client_port: 999,
            port: 80,
        },
        mac: mac(1),
    };
    site.datapath.pin(&[pin]).await.unwrap();
    let served = (1000..1060).filter(|port| gets(&site, &syn(CLIENT4, VIP4, *port)));
    assert!(served.count() < 60, "a minute's worth at once");
}

#[tokio::test]
async fn one_client_does_not_take_it_all() {
    if !permitted("limits of a client") {
        return;
    }
    let site = member(Limits {
        new_per_member: None,
        new_per_client: Some(1),
    })
    .await;
    let pairs = [
        // An address of IPv4, a /64 of IPv6.
        (["10.0.1.1", "10.0.1.1"], "10.0.1.2", VIP4),
        (["fd00:0:0:1::1", "fd00:0:0:1::2"], "fd00:0:0:2::1", VIP6),
    ];
    for (same, other, vip) in pairs {
        let begun = Instant::now();
        assert!(gets(&site, &syn(same[0], vip, 1000)), "{same:?}");
        let again = gets(&site, &syn(same[1], vip, 1001));
        assert!(!again || begun.elapsed() > Duration::from_millis(990));
        assert!(gets(&site, &syn(other, vip, 1000)), "{other}");
    }
    // UDP: what begins is limited, what has begun is not.
    let begun = Instant::now();
    let udp = |port| Frame::udp("10.0.1.9", VIP4, port, 53);
    assert!(gets(&site, &udp(1000)));
    let again = gets(&site, &udp(1001));
    assert!(!again || begun.elapsed() > Duration::from_millis(990));
    assert!(gets(&site, &udp(1000)), "it has begun");
    // One port for one connection after the other is no way round.
    let begun = Instant::now();
    let client = "10.0.1.10";
    assert!(gets(&site, &syn(client, VIP4, 1000)));
    assert!(gets(&site, &Frame::tcp(client, VIP4, 1000, 80, RST)));
    let again = gets(&site, &syn(client, VIP4, 1000));
    assert!(!again || begun.elapsed() > Duration::from_millis(990));
    // The guest's own address is not the service's.
    for port in 1000..1010 {
        let direct = Frame::tcp(client, &own4(1), port, 80, SYN);
        assert!(gets(&site, &direct));
    }
}

#[tokio::test]
async fn limits_are_changed_and_taken_away_while_it_serves() {
    if !permitted("a change of limits") {
        return;
    }
    let one = Limits {
        new_per_member: Some(1),
        new_per_client: None,
    };
    let site = member(Limits::default()).await;
    let burst = |from: u16| {
        let ports = from..from + 10;
        let gets = |port: &u16| gets(&site, &syn(CLIENT4, VIP4, *port));
        ports.filter(gets).count()
    };
    assert_eq!(burst(1000), 10);
    apply(&site.datapath, one).await;
    let begun = Instant::now();
    let served = burst(2000);
    let most = 2 + usize::try_from(begun.elapsed().as_secs()).unwrap();
    assert!((1..=most).contains(&served), "{served}");
    let refused = counted(&site).await.refused;
    assert_eq!(refused, 10 - served as u64);
    apply(&site.datapath, Limits::default()).await;
    assert_eq!(burst(3000), 10);
    assert_eq!(counted(&site).await.refused, refused);
    // A service that is made anew has refused nobody.
    site.datapath
        .apply(&quorate_balancer::Wanted::default())
        .await
        .unwrap();
    apply(&site.datapath, one).await;
    let counters = site.datapath.counters().await.unwrap();
    let members = &counters.services[&common::service()].members;
    assert_eq!(members.values().map(|one| one.refused).sum::<u64>(), 0);
}

#[tokio::test]
async fn what_a_guest_may_not_send_is_counted_for_it() {
    if !permitted("offences") {
        return;
    }
    let site = member(Limits::default()).await;
    let mut guarded = common::edge(1);
    guarded.guard = Guard {
        mac: true,
        address: true,
        dhcp_server: true,
        router_advertisement: true,
    };
    site.datapath.attach_edge(&guarded).await.unwrap();
    let none = site.datapath.counters().await.unwrap().offences;
    assert!(none.is_empty(), "{none:?}");
    let own = own4(1);
    let udp = |from: &str, port| {
        Frame::udp(from, CLIENT4, port, 68)
            .from(mac(1))
            .to([0xff; 6])
    };
    let bad = [udp(&own, 9).from(mac(9)), udp("10.0.0.9", 9), udp(&own, 67)];
    let index = common::index("qt-1");
    for frame in &bad {
        let run = site
            .datapath
            .test_run("edge_from_guest", &frame.build(), index, 1);
        assert_eq!(run.unwrap().code, DROP);
    }
    let found = site.datapath.counters().await.unwrap().offences;
    let expected = Offences {
        spoofed: 2,
        dhcp_server: 1,
        router_advertisement: 0,
    };
    assert_eq!(found[&VmName::new("vm1").unwrap()], expected);
    assert_eq!(
        expected.to_string(),
        "2 with another's address, 1 of a DHCP server"
    );
    site.datapath.detach_edge("qt-1").await.unwrap();
    let gone = site.datapath.counters().await.unwrap().offences;
    assert!(gone.is_empty(), "{gone:?}");
}
