//! BIRD 2: its configuration.

use super::Speaker;
use std::fmt::Write as _;

/// The configuration, whole. BIRD takes up a new one on SIGHUP and keeps its sessions where it can.
#[must_use]
pub fn config(speaker: &Speaker) -> String {
    let mut text = String::from("# Made by Quorate: changes are overwritten.\n");
    let _ = writeln!(text, "router id {};", speaker.router_id);
    // Nothing is exported to the kernel: there is no protocol for it.
    text.push_str("log stderr { info, remote, warning, error, auth, fatal, bug };\n");
    text.push_str("protocol device { scan time 5; }\n");
    if speaker.sessions.iter().any(|session| session.bfd) {
        text.push_str("protocol bfd { interface \"*\" { interval 100 ms; multiplier 3; }; }\n");
    }
    for (name, v4) in [("quorate4", true), ("quorate6", false)] {
        let channel = channel(v4);
        let _ = writeln!(text, "protocol static {name} {{\n  {channel};");
        for route in speaker.routes_of(v4) {
            let _ = writeln!(text, "  route {route} unreachable;");
        }
        text.push_str("}\n");
    }
    for (index, session) in speaker.sessions.iter().enumerate() {
        let v4 = session.neighbor.is_ipv4();
        let source = if v4 { "quorate4" } else { "quorate6" };
        let _ = writeln!(
            text,
            "protocol bgp router{index} {{\n  \
               local as {};\n  \
               neighbor {} as {};\n  \
               hold time {};\n  \
               connect delay time 1;\n  \
               connect retry time 2;\n  \
               error wait time 1, 5;\n  \
               graceful restart off;\n  \
               bfd {};\n  \
               {} {{ import none; export where proto = \"{source}\"; next hop self; }};\n}}",
            session.local_as,
            session.neighbor,
            session.remote_as,
            session.hold_s,
            if session.bfd { "on" } else { "off" },
            channel(v4),
        );
    }
    text
}

fn channel(v4: bool) -> &'static str {
    if v4 { "ipv4" } else { "ipv6" }
}

#[cfg(test)]
mod tests {
    use super::super::Program;
    use super::super::tests::speaker;
    use super::*;

    #[test]
    fn every_address_is_a_host_route_and_goes_to_routers_of_its_family() {
        let mut one = speaker(Program::Bird);
        let text = config(&one);
        for line in [
            "router id 10.77.0.1;",
            "  route 10.77.0.200/32 unreachable;",
            "  route 10.77.0.201/32 unreachable;",
            "  route fd77::200/128 unreachable;",
            "  neighbor 10.77.0.250 as 65000;",
            "  ipv6 { import none; export where proto = \"quorate6\"; next hop self; };",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
        assert!(!text.contains("protocol kernel") && !text.contains("protocol bfd"));
        one.sessions[0].bfd = true;
        assert!(config(&one).contains("protocol bfd"));
    }
}
