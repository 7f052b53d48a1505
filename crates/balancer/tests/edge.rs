//! Edges: rewriting, second chance, guards, and guests as clients; run on single frames by the kernel.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::{ACK, FIN, Frame, RST, SYN, Seen, arp, neighbour};
use common::{
    CLIENT_MAC, CLIENT4, CLIENT6, Site, VIP4, VIP6, mac, own_namespace, own4, own6, permitted,
    version,
};
use quorate_balancer::linux::Verdict;
use quorate_balancer::{
    Datapath as _, Flow, FlowKey, Guard, LinuxDatapath, Pin, ServiceTable, mac as macs,
};
use quorate_types::Millis;
use quorate_types::service::{AffinityKind, Protocol, ServiceId};

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

const VIRTUAL: [u8; 6] = [2, 0x51, 0x56, 0, 0, 7];

struct Edges(Site);

impl Edges {
    /// With taps of members 1 to 3, of which those in `open` run here.
    async fn new(table: ServiceTable, open: &[u8]) -> Self {
        own_namespace();
        common::ip("link add br0 type bridge");
        let edges = Self(Site::new().await);
        edges.0.datapath.lease(u64::MAX);
        edges.apply(table).await;
        for n in 1..=3 {
            common::tap(n);
            edges
                .0
                .datapath
                .attach_edge(&common::edge(n))
                .await
                .unwrap();
        }
        for n in open {
            edges
                .0
                .datapath
                .open_edge(&format!("qt-{n}"))
                .await
                .unwrap();
        }
        edges
    }

    async fn apply(&self, table: ServiceTable) {
        let applied = self.0.datapath.apply(&common::wanted(table)).await.unwrap();
        assert_eq!(applied.services[&common::service()].problem, None);
    }

    fn run(&self, program: &'static str, n: u8, frame: &[u8]) -> Verdict {
        let index = common::index(&format!("qt-{n}"));
        self.0.datapath.test_run(program, frame, index, 1).unwrap()
    }

    fn guest_gets(&self, n: u8, frame: &Frame) -> Verdict {
        self.run("edge_to_guest", n, &frame.clone().to(mac(n)).build())
    }

    fn guest_sends(&self, n: u8, frame: &Frame) -> Verdict {
        let to = if frame.destination_mac == VIRTUAL {
            CLIENT_MAC
        } else {
            frame.destination_mac
        };
        self.run(
            "edge_from_guest",
            n,
            &frame.clone().from(mac(n)).to(to).build(),
        )
    }

    /// A guest's packet to the service.
    fn call(&self, n: u8, frame: &Frame) -> Verdict {
        self.run(
            "edge_from_guest",
            n,
            &frame.clone().from(mac(n)).to(VIRTUAL).build(),
        )
    }

    async fn cause(&self, name: &str) -> u64 {
        self.0.datapath.counters().await.unwrap().causes[name]
    }

    async fn flows(&self, n: u8) -> Vec<Flow> {
        flows(&self.0.datapath, n).await
    }
}

/// What an edge knows; how long ago depends on the machine.
async fn flows(datapath: &LinuxDatapath, n: u8) -> Vec<Flow> {
    let mut flows = datapath.flows(&format!("qt-{n}")).await.unwrap();
    for flow in &mut flows {
        assert!(flow.idle_ms < 600_000);
        flow.idle_ms = 0;
    }
    flows
}

/// Addresses of both families: client, service, own address of a member.
fn families(n: u8) -> [(&'static str, &'static str, String); 2] {
    [(CLIENT4, VIP4, own4(n)), (CLIENT6, VIP6, own6(n))]
}

fn rewritten(verdict: &Verdict, source: &str, destination: &str) {
    assert_eq!(verdict.code, NEXT);
    let out = Seen(&verdict.frame);
    assert_eq!(out.source().to_string(), source);
    assert_eq!(out.destination().to_string(), destination);
    assert!(out.is_right(), "checksums of {:x?}", verdict.frame);
}

#[tokio::test]
async fn the_guest_sees_its_own_address_and_the_client_the_service_s() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    for (client, vip, own) in families(1) {
        for (to, from) in [
            (
                Frame::tcp(client, vip, 1000, 80, SYN),
                Frame::tcp(&own, client, 80, 1000, SYN | ACK),
            ),
            (
                Frame::udp(client, vip, 1000, 53),
                Frame::udp(&own, client, 53, 1000),
            ),
        ] {
            rewritten(&edges.guest_gets(1, &to), client, &own);
            rewritten(&edges.guest_sends(1, &from), vip, client);
            // With options.
            let (mut to, mut from) = (to, from);
            to.options = vec![1; 4];
            from.options = vec![1; 4];
            rewritten(&edges.guest_gets(1, &to), client, &own);
            rewritten(&edges.guest_sends(1, &from), vip, client);
        }
    }
    let counters = edges.0.datapath.counters().await.unwrap();
    let member = counters.services[&common::service()]
        .members
        .values()
        .next()
        .unwrap();
    assert_eq!(
        (member.packets_in, member.packets_out, member.flows),
        (8, 8, 4)
    );
}

#[tokio::test]
async fn no_checksum_stays_none_and_a_wrong_one_stays_wrong() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    let mut frame = Frame::udp(CLIENT4, VIP4, 1000, 53).to(mac(1)).build();
    frame[40..42].fill(0);
    let verdict = edges.run("edge_to_guest", 1, &frame);
    assert_eq!((verdict.code, &verdict.frame[40..42]), (NEXT, &[0, 0][..]));
    let mut frame = Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN).to(mac(1)).build();
    frame[50] ^= 0x11;
    let verdict = edges.run("edge_to_guest", 1, &frame);
    assert_eq!(verdict.code, NEXT);
    assert_eq!(Seen(&verdict.frame).destination().to_string(), own4(1));
    assert!(!Seen(&verdict.frame).is_right());
}

#[tokio::test]
async fn who_speaks_to_the_guest_s_own_address_is_answered_from_there() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    for (client, _, own) in families(1) {
        let to = Frame::tcp(client, &own, 1000, 80, SYN);
        rewritten(&edges.guest_gets(1, &to), client, &own);
        let from = Frame::tcp(&own, client, 80, 1000, SYN | ACK);
        rewritten(&edges.guest_sends(1, &from), &own, client);
        // What the guest begins by itself, also from such a port.
        let begins = Frame::tcp(&own, client, 80, 2000, SYN);
        rewritten(&edges.guest_sends(1, &begins), &own, client);
        rewritten(
            &edges.guest_sends(1, &Frame::tcp(&own, client, 80, 2000, ACK)),
            &own,
            client,
        );
        rewritten(
            &edges.guest_sends(1, &Frame::tcp(&own, client, 3000, 443, ACK)),
            &own,
            client,
        );
    }
    let flows = edges.flows(1).await;
    assert_eq!(flows.len(), 4);
    assert!(flows.iter().all(|flow| flow.service.is_none()));
}

#[tokio::test]
async fn a_reply_is_proof_of_a_flow() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(
        common::table(vec![version(1, &[2]), version(2, &[1])]),
        &[1],
    )
    .await;
    let middle = Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK);
    // Unknown here: the member that had the slot may know it.
    let verdict = edges.guest_gets(1, &middle);
    assert_eq!(
        (verdict.code, &verdict.frame[0..6]),
        (REDIRECT, &mac(2)[..])
    );
    assert!(edges.flows(1).await.is_empty());
    // A reset proves nothing, data does.
    let own = own4(1);
    rewritten(
        &edges.guest_sends(1, &Frame::tcp(&own, CLIENT4, 80, 1000, RST)),
        VIP4,
        CLIENT4,
    );
    assert!(edges.flows(1).await.is_empty());
    rewritten(
        &edges.guest_sends(1, &Frame::tcp(&own, CLIENT4, 80, 1000, ACK)),
        VIP4,
        CLIENT4,
    );
    assert_eq!(edges.flows(1).await.len(), 1);
    rewritten(&edges.guest_gets(1, &middle), CLIENT4, &own);
    // Goodbyes from both sides close it.
    edges.guest_gets(1, &Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK | FIN));
    assert!(!edges.flows(1).await[0].closing);
    edges.guest_sends(1, &Frame::tcp(&own, CLIENT4, 80, 1000, ACK | FIN));
    assert!(edges.flows(1).await[0].closing);
    rewritten(&edges.guest_gets(1, &middle), CLIENT4, &own);
}

#[tokio::test]
async fn the_second_chance_has_two_hops_and_an_end() {
    if !permitted("edge") {
        return;
    }
    let table = common::table(vec![version(1, &[2]), version(2, &[1])]);
    let edges = Edges::new(table, &[1, 2]).await;
    for (client, vip, own) in families(1) {
        let own2 = if vip == VIP4 { own4(2) } else { own6(2) };
        let tcp = Frame::tcp(client, vip, 1000, 80, ACK);
        let udp = Frame::udp(client, vip, 1000, 53);
        for frame in [&tcp, &udp] {
            // Member 1 is primary, member 2 was.
            let once = edges.guest_gets(1, frame);
            assert_eq!(once.code, REDIRECT);
            assert_eq!(Seen(&once.frame).source_mac(), macs::bounced_mac(1));
            assert_eq!(Seen(&once.frame).destination_mac(), mac(2));
        }
        // A connection that nobody knows: the guest's reset is the truth.
        rewritten(
            &edges.guest_gets(2, &tcp.clone().from(macs::bounced_mac(1))),
            client,
            &own2,
        );
        // A datagram that nobody knows is the primary's, for good.
        let back = edges.guest_gets(2, &udp.clone().from(macs::bounced_mac(1)));
        assert_eq!(back.code, REDIRECT);
        assert_eq!(Seen(&back.frame).source_mac(), macs::final_mac(1));
        assert_eq!(Seen(&back.frame).destination_mac(), mac(1));
        rewritten(
            &edges.guest_gets(1, &udp.clone().from(macs::final_mac(1))),
            client,
            &own,
        );
        // From now on it is known.
        rewritten(&edges.guest_gets(1, &udp), client, &own);
        // A new connection stays where it comes to.
        rewritten(
            &edges.guest_gets(1, &Frame::tcp(client, vip, 1001, 80, SYN)),
            client,
            &own,
        );
    }
    assert_eq!(
        (edges.cause("bounced").await, edges.cause("returned").await),
        (4, 2)
    );
}

#[tokio::test]
async fn while_a_ring_is_prepared_the_coming_member_asks_the_primary() {
    if !permitted("edge") {
        return;
    }
    let mut table = common::table(vec![version(1, &[1])]);
    table.next = Some(version(2, &[2]));
    let edges = Edges::new(table, &[1, 2]).await;
    let frame = Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK);
    let verdict = edges.guest_gets(2, &frame);
    assert_eq!(
        (verdict.code, &verdict.frame[0..6]),
        (REDIRECT, &mac(1)[..])
    );
    rewritten(&edges.guest_gets(1, &frame), CLIENT4, &own4(1));
}

#[tokio::test]
async fn a_client_that_is_remembered_comes_back_to_its_member() {
    if !permitted("edge") {
        return;
    }
    let mut table = common::table(vec![version(1, &[2])]);
    table.affinity.kind = AffinityKind::Source;
    table.affinity.timeout = Some(Millis(600_000));
    let edges = Edges::new(table.clone(), &[1, 2]).await;
    let syn = |port| Frame::tcp(CLIENT4, VIP4, port, 80, SYN);
    rewritten(&edges.guest_gets(2, &syn(1000)), CLIENT4, &own4(2));
    table.history.push(version(2, &[1]));
    edges.apply(table).await;
    // A new connection: member 1 has not seen the client and asks, member 2 has.
    let asked = edges.guest_gets(1, &syn(1001));
    assert_eq!((asked.code, &asked.frame[0..6]), (REDIRECT, &mac(2)[..]));
    rewritten(
        &edges.guest_gets(2, &syn(1001).from(macs::bounced_mac(1))),
        CLIENT4,
        &own4(2),
    );
    // Another client: member 2 sends it back.
    let other = Frame::tcp("10.0.0.3", VIP4, 1000, 80, SYN);
    assert_eq!(edges.guest_gets(1, &other).code, REDIRECT);
    let back = edges.guest_gets(2, &other.clone().from(macs::bounced_mac(1)));
    assert_eq!(
        (back.code, &back.frame[6..12]),
        (REDIRECT, &macs::final_mac(1)[..])
    );
    rewritten(
        &edges.guest_gets(1, &other.from(macs::final_mac(1))),
        "10.0.0.3",
        &own4(1),
    );
}

#[tokio::test]
async fn errors_are_rewritten_inside_too() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    for (client, vip, own) in families(1) {
        let (router, too_big, unreachable) = if vip == VIP4 {
            ("10.0.0.254", 3, 3)
        } else {
            ("fd00::254", 2, 1)
        };
        edges.guest_gets(1, &Frame::udp(client, vip, 1000, 53));
        edges.guest_gets(1, &Frame::tcp(client, vip, 1000, 80, SYN));
        // Too big, about what the guest sent.
        let sent = Frame::tcp(vip, client, 80, 1000, ACK);
        let error = Frame::error(router, vip, too_big, &sent, 8);
        let verdict = edges.guest_gets(1, &error);
        rewritten(&verdict, router, &own);
        let quoted = Frame::tcp(&own, client, 80, 1000, ACK).build();
        let header = if vip == VIP4 { 20 } else { 40 };
        let inner = &Seen(&verdict.frame).payload().1[8..8 + header + 4];
        assert_eq!(inner, &quoted[14..14 + header + 4]);
        // Unreachable, from the guest about what a client sent.
        let got = Frame::udp(client, &own, 1000, 53);
        let verdict = edges.guest_sends(1, &Frame::error(&own, client, unreachable, &got, 8));
        rewritten(&verdict, vip, client);
        let quoted = Frame::udp(client, vip, 1000, 53).build();
        assert_eq!(
            &Seen(&verdict.frame).payload().1[8..8 + header + 4],
            &quoted[14..14 + header + 4]
        );
        // About a flow of its own: as it is.
        let got = Frame::udp(client, &own, 1001, 9);
        rewritten(
            &edges.guest_sends(1, &Frame::error(&own, client, unreachable, &got, 8)),
            &own,
            client,
        );
    }
}

#[tokio::test]
async fn fragments_of_both_directions_are_rewritten() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(
        common::table(vec![version(1, &[2]), version(2, &[1])]),
        &[1, 2],
    )
    .await;
    for (client, vip, own) in families(1) {
        let piece = |mut frame: Frame, offset, more| {
            frame.fragment = Some((77, offset, more));
            frame
        };
        let later = |source: &str, destination: &str| {
            piece(Frame::new(source, destination, 17, vec![7; 24]), 16, false)
        };
        let address = |verdict: &Verdict| Seen(&verdict.frame).destination().to_string();
        assert_eq!(edges.guest_gets(1, &later(client, vip)).code, DROP);
        // Unknown: both pieces are sent on to the member that had the slot.
        let first = piece(Frame::udp(client, vip, 1000, 53), 0, true);
        for frame in [&first, &later(client, vip)] {
            let verdict = edges.guest_gets(1, frame);
            assert_eq!(
                (verdict.code, &verdict.frame[0..6]),
                (REDIRECT, &mac(2)[..])
            );
        }
        // Final: both are delivered.
        rewritten(
            &edges.guest_gets(1, &first.clone().from(macs::final_mac(1))),
            client,
            &own,
        );
        let verdict = edges.guest_gets(1, &later(client, vip).from(macs::final_mac(1)));
        assert_eq!((verdict.code, address(&verdict)), (NEXT, own.clone()));
        // Answers.
        rewritten(
            &edges.guest_sends(1, &piece(Frame::udp(&own, client, 53, 1000), 0, true)),
            vip,
            client,
        );
        let verdict = edges.guest_sends(1, &later(&own, client));
        assert_eq!(
            (verdict.code, Seen(&verdict.frame).source().to_string()),
            (NEXT, vip.to_owned())
        );
    }
}

#[tokio::test]
async fn guests_are_clients_too() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1, 2])]), &[1, 2, 3]).await;
    for (_, vip, own) in families(3) {
        // Who has the address? This host answers each guest, holder or not.
        let ask = if vip == VIP4 {
            arp(1, mac(3), &own, vip)
        } else {
            neighbour(135, mac(3), &own, vip, true)
        };
        let verdict = edges.run("edge_from_guest", 3, &ask);
        assert_eq!(
            (verdict.code, Seen(&verdict.frame).source_mac()),
            (REDIRECT, &VIRTUAL[..])
        );
        assert_eq!(Seen(&verdict.frame).destination_mac(), mac(3));
        let verdict = edges.call(3, &Frame::echo(&own, vip));
        assert_eq!(
            (verdict.code, Seen(&verdict.frame).source().to_string()),
            (REDIRECT, vip.to_owned())
        );
        assert!(Seen(&verdict.frame).is_right());
        let frame = Frame::tcp(&own, vip, 1000, 80, SYN);
        let verdict = edges.call(3, &frame);
        assert_eq!(verdict.code, NEXT);
        assert!([mac(1), mac(2)].contains(&verdict.frame[0..6].try_into().unwrap()));
        assert_eq!(
            Seen(&verdict.frame).source_mac(),
            mac(3),
            "its own port may learn it"
        );
        assert_eq!(
            edges.call(3, &Frame::tcp(&own, vip, 1000, 81, SYN)).code,
            DROP
        );
    }
}

#[tokio::test]
async fn a_member_may_call_its_own_service_and_get_itself() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    for (_, vip, own) in families(1) {
        let redirected = |verdict: &Verdict| {
            assert_eq!(verdict.code, REDIRECT);
            let out = Seen(&verdict.frame);
            assert!(out.is_right());
            assert_eq!(out.destination_mac(), mac(1));
            assert_eq!(out.source_mac(), VIRTUAL);
            assert_eq!(out.source().to_string(), vip);
            assert_eq!(out.destination().to_string(), own);
            verdict.frame.clone()
        };
        // The client's side asks; the server's side sees the service as its client, and answers it.
        let asked = redirected(&edges.call(1, &Frame::tcp(&own, vip, 1000, 80, SYN)));
        assert_eq!(edges.run("edge_to_guest", 1, &asked).frame, asked);
        let answer = redirected(&edges.call(1, &Frame::tcp(&own, vip, 80, 1000, SYN | ACK)));
        assert_eq!(edges.run("edge_to_guest", 1, &answer).frame, answer);
        redirected(&edges.call(1, &Frame::tcp(&own, vip, 1000, 80, ACK)));
        redirected(&edges.call(1, &Frame::tcp(&own, vip, 80, 1000, ACK)));
    }
    assert_eq!(edges.cause("self-call").await, 8);
}

#[tokio::test]
async fn a_guest_sends_only_what_it_may() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    let own = own4(3);
    let thief = Frame::tcp("10.0.0.66", CLIENT4, 1000, 80, SYN).to(CLIENT_MAC);
    let dhcp = Frame::udp(&own, CLIENT4, 67, 68).to(CLIENT_MAC);
    let mut router = Frame::new(
        &own6(3),
        "ff02::1",
        58,
        vec![134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    router.destination_mac = [0x33, 0x33, 0, 0, 0, 1];
    let lease = Frame::udp("0.0.0.0", "255.255.255.255", 68, 67).to([0xff; 6]);
    let local = Frame::udp("fe80::3", "ff02::fb", 5353, 5353).to([0x33, 0x33, 0, 0, 0, 0xfb]);
    let run = |frame: &[u8]| edges.run("edge_from_guest", 3, frame).code;
    let frames = [
        thief.clone().from(mac(3)).build(),
        thief.clone().from(mac(9)).build(),
        dhcp.from(mac(3)).build(),
        router.from(mac(3)).build(),
        arp(2, mac(3), "10.0.0.66", CLIENT4),
        arp(2, mac(9), &own, CLIENT4),
    ];
    for frame in &frames {
        assert_eq!(run(frame), NEXT);
    }
    // Never: the datapath's own addresses, a service's address.
    for prefix in [
        macs::VIRTUAL,
        macs::DIRECTOR,
        macs::BOUNCED,
        macs::FINAL,
        macs::HELD,
    ] {
        let [a, b, c] = prefix;
        assert_eq!(run(&thief.clone().from([a, b, c, 0, 0, 1]).build()), DROP);
    }
    assert_eq!(run(&arp(2, mac(3), VIP4, CLIENT4)), DROP);
    assert_eq!(run(&neighbour(136, mac(3), VIP6, VIP6, true)), DROP);
    let mut guarded = common::edge(3);
    guarded.guard = Guard {
        mac: true,
        address: true,
        dhcp_server: true,
        router_advertisement: true,
    };
    edges.0.datapath.attach_edge(&guarded).await.unwrap();
    for frame in &frames {
        assert_eq!(run(frame), DROP);
    }
    for frame in [
        lease,
        local,
        Frame::tcp(&own, CLIENT4, 1000, 80, SYN).to(CLIENT_MAC),
    ] {
        assert_eq!(run(&frame.from(mac(3)).build()), NEXT);
    }
    assert_eq!(run(&arp(1, mac(3), &own, CLIENT4)), NEXT);
}

#[tokio::test]
async fn what_comes_for_a_guest_that_has_left_follows_it_once() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    let frame = Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK);
    let director = |n| {
        edges.0.datapath.test_run(
            "director",
            &Frame::tcp(CLIENT4, VIP4, n, 80, ACK).build(),
            0,
            1,
        )
    };
    assert_eq!(director(1).unwrap().code, 2, "delivered here");
    edges.0.datapath.close_edge("qt-1", true).await.unwrap();
    assert_eq!(director(1).unwrap().code, 3, "back to the wire");
    let verdict = edges.guest_gets(1, &frame);
    assert_eq!(verdict.code, REDIRECT);
    let mut sent = frame.clone().to(mac(1)).from(macs::bounced_mac(1)).build();
    assert_eq!(verdict.frame, sent);
    for address in [macs::bounced_mac(2), macs::final_mac(2), macs::held_mac(2)] {
        sent[6..12].copy_from_slice(&address);
        assert_eq!(edges.run("edge_to_guest", 1, &sent).code, DROP);
    }
    assert_eq!(
        edges.guest_gets(1, &frame.clone().to([0xff; 6])).code,
        REDIRECT
    );
    edges.0.datapath.open_edge("qt-1").await.unwrap();
    rewritten(&edges.guest_gets(1, &frame), CLIENT4, &own4(1));
}

#[tokio::test]
async fn what_waited_for_a_guest_at_its_last_host_passes_as_it_is() {
    if !permitted("edge") {
        return;
    }
    let edges = Edges::new(common::table(vec![version(1, &[1])]), &[1]).await;
    for (client, vip, own) in families(1) {
        // The other host's edge has rewritten it: here it is no packet for the guest's own address, whose replies would
        // stay as they are, not even the first of a connection.
        let known = edges.flows(1).await.len();
        for flags in [SYN, ACK] {
            let held = Frame::tcp(client, &own, 1000, 80, flags).from(macs::held_mac(2));
            let verdict = edges.guest_gets(1, &held);
            assert_eq!(verdict.code, NEXT);
            assert_eq!(verdict.frame, held.to(mac(1)).build());
        }
        assert_eq!(edges.flows(1).await.len(), known);
        let reply = Frame::tcp(&own, client, 80, 1000, SYN | ACK);
        rewritten(&edges.guest_sends(1, &reply), vip, client);
    }
}

#[tokio::test]
async fn flows_travel_and_outlive_the_daemon() {
    if !permitted("edge") {
        return;
    }
    let table = common::table(vec![version(1, &[2]), version(2, &[1])]);
    let edges = Edges::new(table.clone(), &[1]).await;
    edges.guest_gets(1, &Frame::tcp(CLIENT4, VIP4, 1000, 80, SYN));
    edges.guest_gets(1, &Frame::udp(CLIENT6, &own6(1), 1001, 53));
    let flows = edges.flows(1).await;
    assert_eq!(flows.len(), 2);
    // To another edge, as if there were another host.
    edges.0.datapath.put_flows("qt-3", &flows).await.unwrap();
    assert_eq!(edges.flows(3).await, flows);
    // Another process takes everything over: the member runs here still, the flow is known.
    let again = LinuxDatapath::new(edges.0.options.clone()).await.unwrap();
    again.attach_edge(&common::edge(1)).await.unwrap();
    assert_eq!(self::flows(&again, 1).await, flows);
    let middle = Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK);
    let index = common::index("qt-1");
    let run = |datapath: &LinuxDatapath| {
        let verdict = datapath
            .test_run(
                "edge_to_guest",
                &middle.clone().to(mac(1)).build(),
                index,
                1,
            )
            .unwrap();
        rewritten(&verdict, CLIENT4, &own4(1));
        let code = datapath
            .test_run("director", &middle.build(), 0, 1)
            .unwrap()
            .code;
        assert_eq!(code, 2, "delivered here");
    };
    run(&again);
    again.apply(&common::wanted(table)).await.unwrap();
    run(&again);
    again.detach_edge("qt-1").await.unwrap();
    assert!(again.flows("qt-1").await.is_err());
    assert_eq!(
        again
            .test_run("director", &middle.build(), 0, 1)
            .unwrap()
            .code,
        3
    );
}

#[tokio::test]
async fn pins_hold_flows_that_a_ring_would_lose() {
    if !permitted("edge") {
        return;
    }
    let mut table = common::table(vec![version(1, &[1]), version(2, &[2])]);
    let edges = Edges::new(table.clone(), &[1, 2]).await;
    let frame = Frame::tcp(CLIENT4, VIP4, 1000, 80, ACK);
    // Member 1 owns the flow, by way of the second chance.
    edges.guest_sends(1, &Frame::tcp(&own4(1), CLIENT4, 80, 1000, ACK));
    table.next = Some(version(3, &[3]));
    edges.apply(table.clone()).await;
    let pins = edges.0.datapath.strays(&table).await.unwrap();
    let key = FlowKey {
        protocol: Protocol::Tcp,
        client: CLIENT4.parse().unwrap(),
        client_port: 1000,
        port: 80,
    };
    let wanted = Pin {
        service: ServiceId(7),
        flow: key,
        mac: mac(1),
    };
    assert_eq!(pins, [wanted]);
    edges.0.datapath.pin(&pins).await.unwrap();
    table.history.push(table.next.take().unwrap());
    edges.apply(table).await;
    let to = |port| {
        let frame = Frame::tcp(CLIENT4, VIP4, port, 80, ACK).build();
        edges
            .0
            .datapath
            .test_run("director", &frame, 0, 1)
            .unwrap()
            .frame[0..6]
            .to_vec()
    };
    assert_eq!(to(1000), mac(1));
    assert_eq!(to(1001), mac(3));
    rewritten(&edges.guest_gets(1, &frame), CLIENT4, &own4(1));
    let query = quorate_balancer::TraceQuery {
        service: common::service(),
        client: CLIENT4.parse().unwrap(),
        client_port: 1000,
        port: None,
        protocol: None,
    };
    let answer = edges.0.datapath.trace(&query).await.unwrap();
    assert!(answer.pinned);
    assert_eq!(answer.member.unwrap().as_str(), "vm1");
}
