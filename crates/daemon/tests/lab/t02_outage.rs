//! A host's cable is out for a moment, or for long.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::{Cluster, LONG, process};
use quorate_lab::{Link, wait};
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(1500);

#[test]
fn an_outage_of_a_second_and_a_half_moves_and_kills_nothing() {
    let cluster = Cluster::up();
    let guests = [
        Guest::new("a", 1).only_on(&["h1", "h2"]),
        Guest::new("b", 2).only_on(&["h2", "h3"]),
    ];
    cluster.run(&guests);
    let witness = cluster.witness(&guests);
    let before = [cluster.copy("a"), cluster.copy("b")];
    let epochs = [cluster.vm("a").epoch, cluster.vm("b").epoch];
    // Every host in turn, so the leader's too.
    for host in cluster.hosts() {
        cluster.lab.isolate(&host, Link::All).unwrap();
        wait::pause(SHORT);
        cluster.lab.heal().unwrap();
        cluster.wait_healthy();
        cluster.wait_ready(&["a", "b"], LONG);
        cluster.say(&format!("{host} was cut for {SHORT:?}"));
    }
    for (name, (copy, epoch)) in ["a", "b"].into_iter().zip(before.into_iter().zip(epochs)) {
        assert_eq!(
            cluster.wait_one_copy(name, LONG),
            copy,
            "{name} was restarted"
        );
        assert_eq!(cluster.vm(name).epoch, epoch, "{name} was moved");
    }
    let reports = cluster.judge(witness);
    for report in &reports {
        assert_eq!(
            report.ranges.len(),
            1,
            "a guest has booted again: {report:?}"
        );
    }

    long_cut(&cluster, &guests[0]);
}

/// Longer than a lease: the guest moves; the frozen copy is killed when the cable is mended, and has written nothing.
fn long_cut(cluster: &Cluster, guest: &Guest) {
    cluster.must(&["vm", "start", &guest.name, "--wait"]);
    let witness = cluster.witness(std::slice::from_ref(guest));
    let old = cluster.copy(&guest.name);
    wait::pause(Duration::from_secs(1));
    cluster.lab.isolate(&old.host, Link::All).unwrap();
    let new = cluster.new_copy(
        &guest.name,
        std::slice::from_ref(&old),
        Duration::from_secs(15),
    );
    // From here on the old one may not run.
    if process::alive(&old) {
        let both = [old.clone(), new.clone()];
        cluster.holds("only the new copy runs", Duration::from_secs(1), || {
            let running = process::running(&both);
            if running.contains(&old) {
                Err(format!("{running:?}"))
            } else {
                Ok(())
            }
        });
    }
    cluster.wait_ready(&[&guest.name], LONG);
    let frozen = process::alive(&old);
    measured(
        "long cut: the old copy was kept frozen",
        f64::from(u8::from(frozen)),
        "(1 yes, 0 killed)",
        "either",
    );
    cluster.lab.heal().unwrap();
    cluster.eventually("the end of the frozen copy", LONG, || {
        (!process::alive(&old))
            .then_some(())
            .ok_or_else(|| format!("{old:?}"))
    });
    cluster.wait_healthy();
    assert_eq!(cluster.wait_one_copy(&guest.name, LONG), new);
    // The client has to find the guest at its new place before it hears what is acknowledged there.
    wait::pause(Duration::from_secs(3));
    let reports = cluster.judge(witness);
    assert_eq!(reports[0].ranges.len(), 2, "{:?}", reports[0]);
}
