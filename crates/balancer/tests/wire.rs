//! Real TCP over a switch and two hosts, each a network namespace: director, edges, a move of a member between hosts,
//! a restart of a daemon, a take-over of the address.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame::arp;
use common::site::{Host, Spaces, WAIT, arrive, build, leave, receivers, send, serve};
use common::{VIP4, VIP6, edge, permitted, version};
use quorate_balancer::{Datapath as _, ServiceTable};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const VIRTUAL: [u8; 6] = [2, 0x51, 0x56, 0, 0, 7];

/// A connection that counts.
struct Connection {
    stream: TcpStream,
    member: u8,
    count: u64,
}

impl Connection {
    fn open(vip: &str) -> Self {
        let address = SocketAddr::new(vip.parse().unwrap(), 80);
        let mut stream = TcpStream::connect_timeout(&address, WAIT).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut member = [0];
        stream.read_exact(&mut member).unwrap();
        Self {
            stream,
            member: member[0],
            count: 0,
        }
    }

    fn echo(&mut self) {
        self.count += 1;
        let mut back = [0; 8];
        self.stream.write_all(&self.count.to_be_bytes()).unwrap();
        self.stream.read_exact(&mut back).unwrap();
        assert_eq!(u64::from_be_bytes(back), self.count);
    }
}

#[test]
fn connections_survive_moves_restarts_and_a_take_over() {
    if !permitted("wire") {
        return;
    }
    let spaces = Spaces::new(&["sw", "h1", "h2", "c", "g1", "g2"]);
    build(&spaces);
    let _receivers = receivers(&spaces);
    let mut first = Host::new(&spaces, "h1", 1);
    let second = Host::new(&spaces, "h2", 2);
    for (host, holder) in [(&first, true), (&second, false)] {
        host.apply(&spaces, holder);
        host.get().lease(u64::MAX);
    }
    spaces.run("h1", first.get().attach_edge(&edge(1))).unwrap();
    spaces.run("h1", first.get().open_edge("qt-1")).unwrap();
    spaces
        .run("h2", second.get().attach_edge(&edge(2)))
        .unwrap();
    spaces.run("h2", second.get().open_edge("qt-2")).unwrap();
    serve(&spaces, 1);
    serve(&spaces, 2);
    let mut connections: Vec<Connection> =
        spaces.inside("c", || (0..24).map(|_| Connection::open(VIP4)).collect());
    for n in [1, 2] {
        let have = connections.iter().filter(|one| one.member == n).count();
        assert!(have > 0, "member {n} serves nobody");
    }
    let all = |connections: &mut Vec<Connection>| connections.iter_mut().for_each(Connection::echo);
    all(&mut connections);

    let mut six: Vec<Connection> =
        spaces.inside("c", || (0..24).map(|_| Connection::open(VIP6)).collect());
    all(&mut six);
    assert!(six.iter().any(|one| one.member == 1) && six.iter().any(|one| one.member == 2));
    drop(six);

    // Traffic goes on while member 1 moves and the first host's daemon restarts.
    let stop = Arc::new(AtomicBool::new(false));
    let mut moving = connections.split_off(12);
    let traffic = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::Relaxed) {
                moving.iter_mut().for_each(Connection::echo);
            }
            moving
        }
    });
    spaces
        .run("h2", second.get().attach_edge(&edge(1)))
        .unwrap();
    leave(&spaces, 1, "h1");
    let flows = spaces.run("h1", first.get().flows("qt-1")).unwrap();
    assert!(!flows.is_empty());
    spaces
        .run("h2", second.get().put_flows("qt-1", &flows))
        .unwrap();
    spaces
        .run("h1", first.get().close_edge("qt-1", true))
        .unwrap();
    spaces.run("h2", second.get().open_edge("qt-1")).unwrap();
    arrive(&spaces, 1, "h2");
    all(&mut connections);
    spaces.run("h1", first.get().detach_edge("qt-1")).unwrap();
    first.restart(&spaces);
    all(&mut connections);
    first.apply(&spaces, true);
    stop.store(true, Ordering::Relaxed);
    connections.extend(traffic.join().unwrap());
    all(&mut connections);

    // The first host loses its lease: it is silent, whoever asks.
    first.get().lease(0);
    let address = format!("{VIP4}:80").parse().unwrap();
    let short = Duration::from_millis(300);
    let silence = Instant::now() + WAIT;
    // Each CPU looks at the deadline once per tick.
    while spaces.inside("c", || TcpStream::connect_timeout(&address, short).is_ok()) {
        assert!(Instant::now() < silence, "it goes on");
    }
    // The second one takes the address over and says so.
    second.apply(&spaces, true);
    assert!(spaces.inside("h2", || send("u0", &arp(2, VIRTUAL, VIP4, VIP4))));
    all(&mut connections);
    let before = spaces.run("h2", second.get().counters()).unwrap();
    let steered = before.services[&common::service()].steered;
    assert!(steered >= 24, "{before:?}");
    // What the silent host announces does not get out.
    assert!(!spaces.inside("h1", || send("u0", &arp(2, VIRTUAL, VIP4, VIP4))));
    all(&mut connections);
    let after = spaces.run("h2", second.get().counters()).unwrap();
    assert!(after.services[&common::service()].steered >= steered + 24);
}

#[test]
fn a_changing_ring_breaks_no_connection() {
    if !permitted("wire") {
        return;
    }
    let spaces = Spaces::new(&["sw", "h1", "h2", "c", "g1", "g2"]);
    build(&spaces);
    let _receivers = receivers(&spaces);
    let hosts = [Host::new(&spaces, "h1", 1), Host::new(&spaces, "h2", 2)];
    let load = |table: &ServiceTable| {
        for host in &hosts {
            let mut table = table.clone();
            table.holder = host.name == "h1";
            host.load(&spaces, table);
        }
    };
    let mut table = common::table(vec![version(1, &[1, 2])]);
    load(&table);
    for (host, n) in hosts.iter().zip([1, 2]) {
        host.get().lease(u64::MAX);
        let tap = format!("qt-{n}");
        spaces
            .run(host.name, host.get().attach_edge(&edge(n)))
            .unwrap();
        spaces.run(host.name, host.get().open_edge(&tap)).unwrap();
        serve(&spaces, n);
    }
    let mut connections: Vec<Connection> = Vec::new();
    for (epoch, members) in [
        (2, &[2][..]),
        (3, &[1, 2]),
        (4, &[1]),
        (5, &[2]),
        (6, &[1, 2]),
    ] {
        let fresh: Vec<Connection> =
            spaces.inside("c", || (0..12).map(|_| Connection::open(VIP4)).collect());
        let now = &table.active().unwrap().members;
        assert!(fresh.iter().all(|one| {
            now.iter()
                .any(|member| member.mac == common::mac(one.member))
        }));
        connections.extend(fresh);
        // Prepared everywhere, what it would not reach is pinned everywhere; then in force, one host after the other.
        table.next = Some(version(epoch, members));
        load(&table);
        for host in &hosts {
            let pins = spaces.run(host.name, host.get().strays(&table)).unwrap();
            for other in &hosts {
                spaces.run(other.name, other.get().pin(&pins)).unwrap();
            }
        }
        connections.iter_mut().for_each(Connection::echo);
        table.history.push(table.next.take().unwrap());
        for host in hosts.iter().rev() {
            let mut own = table.clone();
            own.holder = host.name == "h1";
            host.load(&spaces, own);
            connections.iter_mut().for_each(Connection::echo);
        }
    }
    let bounced: u64 = hosts
        .iter()
        .map(|host| spaces.run(host.name, host.get().counters()).unwrap().causes["bounced"])
        .sum();
    assert!(bounced > 0, "no connection needed a second chance");
}
