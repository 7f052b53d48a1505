//! More that is true of the service of `t19_services`, on its cluster: IPv6, health by real probes, limits, guards.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::service::{ADDRESS, web};
use crate::harness::{Cluster, LONG, find_vm};
use quorate_lab::tools::capture::CaptureReport;
use quorate_lab::tools::load::LoadReport;
use quorate_lab::wait;
use std::net::Ipv6Addr;
use std::time::Duration;

/// The service's IPv6 address.
pub(crate) const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x200);
/// The client's.
const CLIENT6: &str = "fd77::250/64";
/// Said of the network: its guests are kept from sending what is not theirs.
pub(crate) const NETWORK: &str =
    "subnet: 10.77.0.0/24, subnet6: 'fd77::/64', guard: {source: true, dhcp: true, router: true}";
/// What a guest that misbehaves makes itself out to be; see `crates/guest/src/init/rogue.rs`.
const PRETENDED_MAC: &str = "02:0b:ad";
const PRETENDED_ADDRESS: &str = "10.77.0.199";

/// The line of a service with both addresses.
pub(crate) fn address6() -> String {
    format!("    address6: '{ADDRESS6}'\n")
}

fn client(cluster: &Cluster, program: &str, arguments: &[&str]) -> String {
    let output = cluster
        .lab
        .command("client", program)
        .args(arguments)
        .output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Connections over IPv6 live over a move of all members (`swap`), and only the holder tells where the address is.
pub(crate) fn over_ipv6(cluster: &Cluster, swap: impl FnOnce()) {
    let on = "echo 0 > /proc/sys/net/ipv6/conf/lan0/disable_ipv6";
    client(cluster, "sh", &["-c", on]);
    client(
        cluster,
        "ip",
        &["-6", "addr", "add", CLIENT6, "dev", "lan0", "nodad"],
    );
    let load = cluster.hold_at(ADDRESS6, 24, 100);
    let report = cluster.unbroken("over IPv6, at the beginning");
    cluster.say(&format!("connections over IPv6: {:?}", report.members()));
    let neighbour = client(
        cluster,
        "ip",
        &["-6", "neigh", "show", &ADDRESS6.to_string()],
    );
    let told = cluster.web().unwrap()["virtual_mac"].to_string();
    assert!(neighbour.contains(told.trim_matches('"')), "{neighbour}");
    let holder = cluster.holder();
    let speakers = speakers(cluster);
    assert_eq!(speakers, [holder], "who tells where the address is");
    swap();
    let report = load.finish().unwrap();
    judge(&report, "over IPv6");
    measured(
        "services: connections over IPv6 broken or moved by a swap of all members",
        0.0,
        "connections",
        "0 of 24",
    );
}

fn judge(report: &LoadReport, what: &str) {
    crate::harness::service::assert_unbroken(report, what);
    let fresh = &report.fresh;
    assert_eq!(fresh.failed, 0, "{what}: {fresh:?}");
    assert!(
        fresh.answered.values().sum::<u64>() > 0,
        "{what}: {fresh:?}"
    );
}

/// Hosts that answer for the service's addresses while the client asks for them again and again.
fn speakers(cluster: &Cluster) -> Vec<String> {
    let hosts = cluster.hosts();
    let parts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let frames = cluster.lab.capture("lan", &parts, "02:51:56").unwrap();
    for _ in 0..5 {
        wait::pause(Duration::from_millis(100));
        client(cluster, "ip", &["-6", "neigh", "flush", "dev", "lan0"]);
    }
    wait::pause(Duration::from_millis(300));
    let report: CaptureReport = frames.finish().unwrap();
    let spoke = |host: &&String| report.ports[&format!("lan-{host}")].matching > 0;
    hosts.iter().filter(spoke).cloned().collect()
}

/// Three services of the same members, checked by HTTP, by the guest agent and by connecting: a member that fails, and closes
/// its port, leaves all rings, nobody's connections break, and it comes back.
pub(crate) fn by_health(cluster: &Cluster, guests: &[Guest], members: &[&str]) {
    let check = |kind: &str| {
        format!("    health: {{kind: {kind}, interval: 1s, timeout: 1s, rise: 2, fall: 3}}\n")
    };
    let another = |name: &str, last: u8, kind: &str| {
        format!(
            "  {name}:\n    network: lan\n    address: 10.77.0.{last}\n    ports: [{}]\n    members: [{}]\n{}",
            quorate_guest::FLOW_PORT,
            members[..2].join(", "),
            check(kind)
        )
    };
    let others = another("pulse", 201, "agent") + &another("port", 202, "tcp");
    let http = check("http, port: 80");
    let service = web(members, &format!("{}{http}{others}", address6()));
    cluster.apply_service_on(guests, &service, NETWORK);
    let others_have = |ring: &[&str]| {
        cluster.wait_ring_of("pulse", ring);
        cluster.wait_ring_of("port", ring);
    };
    others_have(&members[..2]);
    cluster.wait_ring(members);
    let load = cluster.hold(24, 0);
    let sick = find_guest(guests, members[1]);
    tell(cluster, sick, "sick");
    let well = members.iter().copied().filter(|one| *one != sick.name);
    cluster.wait_ring(&well.collect::<Vec<&str>>());
    others_have(&members[..1]);
    for (service, why) in [("web", "HTTP status 503"), ("port", "refused")] {
        let problems = cluster.service(service).unwrap()["problems"].to_string();
        assert!(problems.contains(why), "{problems}");
        cluster.say(&format!("{} is out of all rings: {problems}", sick.name));
    }
    cluster.unbroken("without a sick member");
    tell(cluster, sick, "well");
    cluster.wait_ring(members);
    others_have(&members[..2]);
    let report = load.finish().unwrap();
    crate::harness::service::assert_unbroken(&report, "with a member that was sick");
}

fn find_guest<'g>(guests: &'g [Guest], name: &str) -> &'g Guest {
    guests.iter().find(|guest| guest.name == name).unwrap()
}

/// Tells a guest something, until it is heard.
fn tell(cluster: &Cluster, guest: &Guest, word: &str) {
    cluster.eventually("the guest is told", LONG, || {
        let told = cluster.lab.tell_guest(guest.address, word);
        told.map_err(|error| error.to_string())
    });
}

/// One client may begin two connections in a second at each member: what has begun goes on, and what is refused is told.
pub(crate) fn by_limits(cluster: &Cluster, guests: &[Guest], members: &[&str]) {
    let load = cluster.hold(8, 20);
    let limits = "    limits: {new_per_member: 100, new_per_client: 2}\n";
    let service = web(members, &format!("{}{limits}", address6()));
    cluster.apply_service_on(guests, &service, NETWORK);
    let refused = cluster.eventually("connections are refused", LONG, || {
        let web = cluster.web()?;
        let all = web["members"].as_array().cloned().unwrap_or_default();
        let refused: u64 = all.iter().filter_map(|one| one["refused"].as_u64()).sum();
        (refused > 0).then_some(refused).ok_or(web.to_string())
    });
    let shown = cluster.quorate(&["service", "show", "web"]).unwrap();
    assert!(shown.contains("refused by the limits"), "{shown}");
    cluster.say(&format!("{refused} connections to {ADDRESS} were refused"));
    let report = load.finish().unwrap();
    crate::harness::service::assert_unbroken(&report, "with limits");
    cluster.apply_service_on(guests, &web(members, &address6()), NETWORK);
}

/// A guest sends as somebody else, as a DHCP server and as a router: nothing of it gets out, and it is told.
pub(crate) fn by_guards(cluster: &Cluster, guest: &Guest) {
    let host = find_vm(&cluster.view(), &guest.name).unwrap().host;
    let host = host.unwrap().to_string();
    let frames = cluster.lab.capture("lan", &[&host], PRETENDED_MAC).unwrap();
    tell(cluster, guest, &format!("rogue {PRETENDED_ADDRESS}"));
    let problem = cluster.eventually("what the guest was kept from", LONG, || {
        let view = cluster.try_view()?;
        let vm = find_vm(&view, &guest.name)?;
        let problem = vm.problem.unwrap_or_default();
        let all = ["another's address", "DHCP server", "IPv6 router"];
        let told = all.iter().all(|kind| problem.contains(kind));
        told.then(|| problem.clone()).ok_or(problem)
    });
    cluster.say(&format!("{}: {problem}", guest.name));
    // It is back, and heard again: what it pretended is over.
    tell(cluster, guest, "well");
    let report = frames.finish().unwrap();
    let port = &report.ports[&format!("lan-{host}")];
    assert!(port.frames > 0, "the capture heard nothing at all");
    assert_eq!(port.matching, 0, "frames with another's MAC got out");
    let neighbours = client(cluster, "ip", &["neigh", "show", PRETENDED_ADDRESS]);
    assert!(!neighbours.contains("lladdr"), "{neighbours}");
}
