//! A service whose address routers are told of: every host announces it, a router spreads clients over the hosts by the
//! hash of addresses and ports, and the end of one of these hosts breaks no connection. And one whose packets a switch
//! that snoops delivers to all hosts, and to hosts only.

use crate::harness::measure::measured;
use crate::harness::service::{assert_unbroken, webs};
use crate::harness::{Cluster, LONG};
use quorate_lab::{SwitchSettings, wait};
use quorate_types::ServiceId;
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// In no network of the lab.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
/// Of a service that every host hears.
const CAST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 201);
const MEMBERS: [&str; 2] = ["web1", "web2"];

/// BIRD in the client's namespace: the client is its own router.
struct Router(Child);

impl Router {
    fn start(cluster: &Cluster) -> Self {
        let config = cluster.file(
            "router.conf",
            "router id 10.77.0.250;\nlog stderr all;\nprotocol device { scan time 1; }\n\
             protocol bfd { interface \"lan0\" { interval 100 ms; multiplier 3; }; }\n\
             protocol kernel { merge paths on limit 8; ipv4 { import none; export all; }; }\n\
             protocol bgp hosts {\n  local as 65000;\n  neighbor range 10.77.0.0/24 as 65001;\n  \
             dynamic name \"host\";\n  hold time 3;\n  bfd on;\n  ipv4 { import all; export none; };\n}\n",
        );
        let by_port = cluster
            .lab
            .command("client", "sh")
            .args([
                "-c",
                "echo 1 > /proc/sys/net/ipv4/fib_multipath_hash_policy",
            ])
            .status();
        assert!(by_port.unwrap().success());
        let control = cluster.lab.site().dir.join("router.ctl");
        let bird = cluster
            .lab
            .command("client", "bird")
            .arg("-f")
            .arg("-c")
            .arg(config)
            .arg("-s")
            .arg(control)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(bird.unwrap())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Hosts that the client's kernel sends to for the address.
fn ways(cluster: &Cluster) -> usize {
    let output = cluster
        .lab
        .command("client", "ip")
        .args(["route", "show", &ADDRESS.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.matches("via ").count()
}

fn wait_ways(cluster: &Cluster, count: usize) {
    cluster.eventually(&format!("{count} ways to {ADDRESS}"), LONG, || {
        let found = ways(cluster);
        (found == count).then_some(()).ok_or(format!("{found}"))
    });
}

/// The switch snoops, asks who wants what, and has a station more, which wants nothing.
fn set_up_switch(cluster: &Cluster) {
    let lab = &cluster.lab;
    lab.plug_spare("lan").unwrap();
    let settings = SwitchSettings {
        snooping: true,
        querier: true,
        ..SwitchSettings::default()
    };
    lab.set_switch("lan", settings).unwrap();
}

/// All hosts are members of the service's group, and what clients send to its MAC reaches them and nobody else.
fn every_host_hears_it_and_nobody_else(cluster: &Cluster) {
    cluster.wait_ring_of("cast", &MEMBERS);
    let id = cluster.service("cast").unwrap()["id"].as_u64().unwrap();
    let (group, mac) = quorate_balancer::mac::multicast(ServiceId(u32::try_from(id).unwrap()));
    let mac = quorate_balancer::mac::text(mac);
    set_up_switch(cluster);
    cluster.eventually("all hosts in the group", LONG, || {
        let groups = cluster
            .lab
            .switch_groups("lan")
            .map_err(|error| error.to_string())?;
        let members = groups.get(&group.to_string()).cloned().unwrap_or_default();
        let hosts = cluster.hosts().into_iter().collect();
        (members == hosts)
            .then_some(())
            .ok_or(format!("{groups:?}"))
    });
    // Not before: whoever hears another's report, as a router does, need not say the same.
    for host in cluster.hosts() {
        cluster.lab.set_router_port("lan", &host).unwrap();
    }
    // A switch that has begun to snoop floods until it has asked everybody.
    let sent = cluster.eventually("delivered to hosts only", LONG, || {
        let frames = cluster
            .lab
            .capture("lan", &["client", "spare"], "")
            .unwrap();
        let load = cluster.hold_at(CAST, 24, 0);
        wait::pause(Duration::from_millis(500));
        let report = load.finish().unwrap();
        assert_unbroken(&report, "by multicast");
        assert_eq!(report.members().len(), MEMBERS.len(), "{report:?}");
        let frames = frames.finish().unwrap();
        let to_service = |part: &str| {
            let noted = &frames.ports[&format!("lan-{part}")].noted;
            noted.iter().filter(|one| one.destination == mac).count()
        };
        let (sent, strayed) = (to_service("client"), to_service("spare"));
        match (sent, strayed) {
            (1.., 0) => Ok(sent),
            _ => Err(format!("{sent} sent, {strayed} heard by a bystander")),
        }
    });
    measured(
        "services: frames to a multicast MAC heard by a bystander",
        0.0,
        "frames",
        &format!("0 of {sent}; every host is in group {group}"),
    );
}

#[test]
fn routers_learn_the_address_of_every_host_and_lose_one_without_breaking_a_connection() {
    let cluster = Cluster::up();
    let _router = Router::start(&cluster);
    let guests = webs(2);
    let service = format!(
        "services:\n  web:\n    network: lan\n    address: {ADDRESS}\n    ports: [{}]\n    members: [web1, web2]\n    attractor: bgp\n  \
         cast:\n    network: lan\n    address: {CAST}\n    ports: [{}]\n    members: [web1, web2]\n    attractor: igmp\n",
        quorate_guest::FLOW_PORT,
        quorate_guest::FLOW_PORT
    );
    let network = "bgp: {as: 65001, bfd: true, neighbors: [{address: 10.77.0.250, as: 65000}]}";
    cluster.apply_service_on(&guests, &service, network);
    cluster.wait_ready(&MEMBERS, LONG);
    cluster.wait_ring(&MEMBERS);
    wait_ways(&cluster, 3);
    cluster.say("the router has three ways");
    cluster.place("web1", "h1");
    cluster.place("web2", "h2");
    every_host_hears_it_and_nobody_else(&cluster);
    let load = cluster.hold_at(ADDRESS, 24, 100);
    wait::pause(Duration::from_millis(500));
    cluster.unbroken("before a host dies");
    let begun = Instant::now();
    cluster.lab.kill("h3").unwrap();
    wait_ways(&cluster, 2);
    measured(
        "services: a dead host's route is gone",
        begun.elapsed().as_secs_f64(),
        "s",
        "0.3 s by BFD, 3 s by BGP's hold time",
    );
    // Who waits for a packet that went to the dead host sends it again.
    wait::pause(Duration::from_secs(3));
    let report = load.finish().unwrap();
    assert_unbroken(&report, "after a host's death");
    let longest = report.connections.iter().map(|one| one.longest_us).max();
    measured(
        "services: longest wait when one of three directors dies",
        longest.unwrap_or(0) as f64 / 1e6,
        "s",
        "no connection broken",
    );
    assert_eq!(ways(&cluster), 2);
}
