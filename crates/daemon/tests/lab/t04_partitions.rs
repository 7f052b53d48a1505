//! Two of three hosts cannot hear each other, the third hears both.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::{Cluster, LONG, find_host};
use quorate_api::view::{ClusterView, HostState};
use quorate_lab::Link;
use std::time::Duration;

/// Two leases of the default settings.
const TWO_LEASES: Duration = Duration::from_secs(4);

fn broken_link(view: &ClusterView, from: &str, to: &str) -> Result<String, String> {
    let host = find_host(view, from)?;
    let link = host.links_down.iter().find(|link| link.to.as_str() == to);
    let link =
        link.ok_or_else(|| format!("{from} reports no broken link: {:?}", host.links_down))?;
    let relay = link.relayed_by.as_ref().ok_or("no relay is named")?;
    Ok(relay.to_string())
}

#[test]
fn a_broken_pair_is_relayed_and_moves_nothing() {
    let cluster = Cluster::up();
    let guests = [
        Guest::new("a", 1).only_on(&["h1", "h2"]),
        Guest::new("b", 2).only_on(&["h2", "h3"]),
        Guest::new("c", 3).only_on(&["h1", "h3"]),
    ];
    cluster.run(&guests);
    for (vm, host) in [("a", "h1"), ("b", "h2"), ("c", "h3")] {
        cluster.place(vm, host);
    }
    let names = ["a", "b", "c"];
    let before = names.map(|name| (cluster.copy(name), cluster.vm(name).epoch));
    let witness = cluster.witness(&guests);
    for (left, right, relay) in [("h1", "h2", "h3"), ("h2", "h3", "h1"), ("h1", "h3", "h2")] {
        let leader = cluster.leader();
        cluster.lab.cut(left, right, Link::Mgmt, false).unwrap();
        cluster.wait("the broken link in the status", TWO_LEASES, |view| {
            let seen =
                broken_link(view, left, right).or_else(|_| broken_link(view, right, left))?;
            (seen == relay)
                .then_some(())
                .ok_or_else(|| format!("relayed by {seen}"))
        });
        // Stable after two leases at the latest, and from then on.
        quorate_lab::wait::pause(TWO_LEASES);
        let settled = cluster.view();
        cluster.holds("a stable cluster", Duration::from_secs(3), || {
            let view = cluster.try_view()?;
            if let Some(bad) = view.hosts.iter().find(|host| host.state != HostState::Up) {
                return Err(format!("{bad:?}"));
            }
            if view.cluster.leader != settled.cluster.leader {
                return Err(format!("the leader changes: {:?}", view.cluster.leader));
            }
            Ok(())
        });
        for host in cluster.hosts() {
            let view = cluster.seen_by(&host);
            assert!(view.cluster.quorate, "{host}: {:?}", view.cluster);
        }
        let text = cluster.must(&["status"]);
        assert!(text.contains(left) && text.contains(right), "{text}");
        for (name, (copy, epoch)) in names.iter().zip(&before) {
            assert_eq!(
                cluster.wait_one_copy(name, LONG),
                *copy,
                "{name} was touched"
            );
            assert_eq!(cluster.vm(name).epoch, *epoch, "{name} was moved");
        }
        let role = match leader.as_str() {
            name if name == left || name == right => "leader and follower",
            _ => "two followers",
        };
        measured(
            &format!("{left} and {right} cut apart ({role}): VMs moved"),
            0.0,
            "VMs",
            "0",
        );
        cluster.lab.heal().unwrap();
        cluster.wait_healthy();
    }
    for report in cluster.judge(witness) {
        assert_eq!(
            report.ranges.len(),
            1,
            "a guest has booted again: {report:?}"
        );
    }
}
