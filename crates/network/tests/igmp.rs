//! Memberships of multicast groups against a real kernel and a bridge that snoops, in a network namespace. Needs root;
//! without it the test says so and passes, because it cannot say anything.
#![allow(clippy::unwrap_used)]

use quorate_network::attract::igmp::Memberships;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 81, 0, 7);

#[allow(unsafe_code)]
mod netns {
    /// Moves the calling thread, and those it starts, into a new network namespace.
    pub(super) fn enter_new() -> std::io::Result<()> {
        // SAFETY: only NEWNET is unshared, never the table of file descriptors.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)? };
        Ok(())
    }
}

fn run(program: &str, args: &str) -> String {
    let output = Command::new(program)
        .args(args.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "{program} {args}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Ports of the switch that get the group's frames.
fn wait_switch(member: bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let table = run("bridge", "mdb show dev sw0");
        if table.contains(&format!("port sw-h grp {GROUP}")) == member {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "member: {member}, the switch has: {table}"
        );
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_switch_that_snoops_learns_who_is_a_member() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        netns::enter_new().unwrap();
        run(
            "ip",
            // Of IGMP 2, which is the default, a host tells its leave only if it has answered a query, some seconds after it.
            "link add sw0 type bridge mcast_snooping 1 mcast_querier 1 mcast_startup_query_interval 100 mcast_igmp_version 3",
        );
        run("ip", "link add sw-h type veth peer name up0");
        for port in ["sw-h master sw0", "sw0", "sw-h", "up0"] {
            let more = if port.contains("master") { "" } else { " up" };
            run("ip", &format!("link set {port}{more}"));
        }
        run("ip", "addr add 10.99.0.1/24 dev up0");
        let mut memberships = Memberships::default();
        let failed = memberships.set([("up0".to_owned(), GROUP), ("none0".to_owned(), GROUP)]);
        let failed: Vec<_> = failed.iter().map(|(name, _, _)| name.as_str()).collect();
        assert_eq!(failed, ["none0"]);
        wait_switch(true);
        assert!(memberships.set([("up0".to_owned(), GROUP)]).is_empty());
        // Leaving is told to the switch, which asks once more before it believes it.
        run(
            "ip",
            "link set sw0 type bridge mcast_last_member_interval 10",
        );
        assert!(memberships.set([]).is_empty());
        wait_switch(false);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
