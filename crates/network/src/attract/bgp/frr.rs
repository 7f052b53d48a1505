//! FRR's bgpd, alone (without zebra): its configuration, and how a running one is changed.

use super::Speaker;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

/// Where Debian's package has its daemons.
pub const BGPD: &str = "/usr/lib/frr/bgpd";

/// The configuration, whole.
#[must_use]
pub fn config(speaker: &Speaker) -> String {
    let mut text = String::from("! Made by Quorate: changes are overwritten.\n");
    text.push_str("frr defaults datacenter\n!\n");
    let local = speaker
        .sessions
        .first()
        .map_or(0, |session| session.local_as);
    let _ = writeln!(
        text,
        "router bgp {local}\n \
           bgp router-id {}\n \
           no bgp ebgp-requires-policy\n \
           no bgp network import-check\n \
           no bgp default ipv4-unicast\n \
           bgp graceful-restart-disable",
        speaker.router_id
    );
    for session in &speaker.sessions {
        let neighbor = session.neighbor;
        let _ = writeln!(
            text,
            " neighbor {neighbor} remote-as {}\n \
              neighbor {neighbor} timers {} {}\n \
              neighbor {neighbor} timers connect 2",
            session.remote_as,
            (session.hold_s / 3).max(1),
            session.hold_s,
        );
    }
    for (family, v4) in [("ipv4", true), ("ipv6", false)] {
        let _ = writeln!(text, " address-family {family} unicast");
        for route in speaker.routes_of(v4) {
            let _ = writeln!(text, "  network {route}");
        }
        let sessions = speaker.sessions.iter();
        for session in sessions.filter(|session| session.neighbor.is_ipv4() == v4) {
            let neighbor = session.neighbor;
            let _ = writeln!(
                text,
                "  neighbor {neighbor} activate\n  \
                   neighbor {neighbor} next-hop-self\n  \
                   neighbor {neighbor} route-map quorate-none in"
            );
        }
        text.push_str(" exit-address-family\n");
    }
    text.push_str("!\nroute-map quorate-none deny 10\n!\n");
    text
}

/// The commands that make a running bgpd announce other addresses; `None`: more has changed than that, and it must be
/// started anew.
#[must_use]
pub fn change(from: &Speaker, to: &Speaker) -> Option<Vec<String>> {
    let fixed = |speaker: &Speaker| {
        let mut fixed = speaker.clone();
        fixed.routes = BTreeSet::new();
        fixed
    };
    if fixed(from) != fixed(to) {
        return None;
    }
    let local = to.sessions.first()?.local_as;
    let mut commands = vec![
        "configure terminal".to_owned(),
        format!("router bgp {local}"),
    ];
    for (family, v4) in [("ipv4", true), ("ipv6", false)] {
        commands.push(format!("address-family {family} unicast"));
        let network = |address: &IpAddr| {
            let length = if v4 { 32 } else { 128 };
            format!("network {address}/{length}")
        };
        let gone = from.routes.difference(&to.routes);
        let gone = gone.filter(|address| address.is_ipv4() == v4);
        commands.extend(gone.map(|address| format!("no {}", network(address))));
        let new = to.routes.difference(&from.routes);
        let new = new.filter(|address| address.is_ipv4() == v4);
        commands.extend(new.map(network));
        commands.push("exit-address-family".to_owned());
    }
    commands.push("end".to_owned());
    Some(commands)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Program;
    use super::super::tests::speaker;
    use super::*;

    #[test]
    fn every_address_is_a_host_route_and_nothing_is_learnt() {
        let text = config(&speaker(Program::Frr));
        for line in [
            "router bgp 65001",
            " bgp router-id 10.77.0.1",
            " neighbor fd77::250 remote-as 65000",
            " neighbor 10.77.0.250 timers 1 3",
            "  network 10.77.0.200/32",
            "  network fd77::200/128",
            "  neighbor 10.77.0.250 route-map quorate-none in",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_running_one_is_changed_by_what_differs() {
        let from = speaker(Program::Frr);
        let mut to = from.clone();
        to.routes.remove(&"10.77.0.200".parse::<IpAddr>().unwrap());
        to.routes.insert("fd77::201".parse().unwrap());
        assert_eq!(
            change(&from, &to).unwrap(),
            [
                "configure terminal",
                "router bgp 65001",
                "address-family ipv4 unicast",
                "no network 10.77.0.200/32",
                "exit-address-family",
                "address-family ipv6 unicast",
                "network fd77::201/128",
                "exit-address-family",
                "end"
            ]
        );
        to.sessions.pop();
        assert_eq!(change(&from, &to), None);
    }
}
