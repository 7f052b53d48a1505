//! One address over several VMs: all of its members are moved at once, members come and go, and no connection breaks.

use crate::harness::guest::Guest;
use crate::harness::measure::{measured, median, missed, rounds};
use crate::harness::service::{assert_unbroken, web, webs};
use crate::harness::{Cluster, LONG, Options, find_vm};
use crate::t19_members::{NETWORK, address6, by_guards, by_health, by_limits, over_ipv6};
use quorate_api::view::VmState;
use quorate_lab::tools::load::{Connection, wall_ms};
use quorate_lab::wait;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const MEMBERS: [&str; 4] = ["web1", "web2", "web3", "web4"];

/// Connections that are held: enough to meet every member, or what `QUORATE_CONNECTIONS` asks for.
fn connections() -> u32 {
    let wanted = std::env::var("QUORATE_CONNECTIONS").ok();
    wanted.and_then(|text| text.parse().ok()).unwrap_or(24)
}

/// What a connection may wait longer than its member is silent: less than one retransmission, where clients share two
/// cores with all guests.
const WAITS_LONGER_MS: f64 = 200.0;

/// What one swap of all members came to; all times in milliseconds.
#[derive(Default)]
struct Swap {
    /// For each connection its longest wait.
    stalls: Vec<f64>,
    /// QEMU's own downtimes.
    downtimes: Vec<f64>,
    /// For how long each member said nothing.
    silences: Vec<f64>,
    /// For each connection how much longer than that it waited.
    longer: Vec<f64>,
    /// Frames that were sent after members.
    sent_after: usize,
    /// Migrations that were seen at one time.
    at_once: usize,
}

/// Moves every member to the next host, all at once; `meanwhile` is done while they move.
fn swap(cluster: &Cluster, members: &[&str], meanwhile: impl FnOnce()) -> Swap {
    let hosts = cluster.hosts();
    let view = cluster.view();
    let next = |name: &str| {
        let host = find_vm(&view, name).unwrap().host.unwrap().to_string();
        let at = hosts.iter().position(|one| *one == host).unwrap();
        hosts[(at + 1) % hosts.len()].clone()
    };
    let moves: Vec<(&str, String)> = members.iter().map(|name| (*name, next(name))).collect();
    let macs = members.iter().map(|name| (*name, cluster.mac_of(name)));
    let macs: BTreeMap<&str, String> = macs.collect();
    let listening = cluster.listen();
    let begun_ms = wall_ms();
    let before = cluster.lab.events(&cluster.desk()).unwrap();
    let last_event = before.last().map_or(0, |event| event.sequence);
    let (desk, lab) = (cluster.desk(), &*cluster.lab);
    std::thread::scope(|scope| {
        for (name, to) in &moves {
            let desk = &desk;
            scope.spawn(move || {
                lab.quorate(desk, &["vm", "migrate", name, "--to", to])
                    .unwrap()
            });
        }
    });
    meanwhile();
    let mut at_once = 0;
    cluster.wait("all members on other hosts", LONG, |view| {
        let migrating = view.vms.iter().filter(|vm| vm.migration.is_some());
        at_once = at_once.max(migrating.count());
        moves.iter().try_for_each(|(name, to)| {
            let vm = find_vm(view, name)?;
            let there = vm.host.as_ref().is_some_and(|host| host.as_str() == to);
            if !there
                && vm.state == VmState::Running
                && vm.migration.is_none()
                && !vm.move_requested
            {
                ask_again(cluster, name, to, last_event);
            }
            match there && vm.state == VmState::Running && vm.migration.is_none() {
                true => Ok(()),
                false => Err(format!("{vm:?}")),
            }
        })
    });
    // A connection whose packet was lost at the switchover goes on with its next retransmission.
    wait::pause(Duration::from_millis(1200));
    let report = cluster.unbroken("after a swap of all members");
    let heard = listening.finish();
    let silence = |mac: &String| heard.silence(mac).as_secs_f64() * 1000.0;
    let silences: BTreeMap<&str, f64> = macs.iter().map(|(vm, mac)| (*vm, silence(mac))).collect();
    let stalls = report.longest_since(begun_ms).into_iter();
    let stalls: Vec<f64> = stalls.map(|us| us as f64 / 1000.0).collect();
    let served = stalls.iter().zip(&report.connections);
    let longer = |(wait, one): (&f64, &Connection)| Some(wait - silences.get(&*one.member)?);
    Swap {
        longer: served.filter_map(longer).collect(),
        stalls,
        downtimes: downtimes(cluster, last_event),
        silences: silences.into_values().collect(),
        sent_after: heard.sent_after(),
        at_once,
    }
}

/// A move that fails is not tried again by itself; whoever asked is told why. Connections must not notice.
fn ask_again(cluster: &Cluster, name: &str, to: &str, since: u64) {
    for event in cluster.lab.events(&cluster.desk()).unwrap() {
        if event.sequence > since && event.text.contains(name) {
            cluster.say(&event.text);
        }
    }
    cluster.say(&format!("{name} was not moved to {to}: asked again"));
    // It may have begun meanwhile.
    drop(cluster.quorate(&["vm", "migrate", name, "--to", to]));
}

/// Downtimes that QEMU said since an event.
fn downtimes(cluster: &Cluster, since: u64) -> Vec<f64> {
    let events = cluster.lab.events(&cluster.desk()).unwrap();
    let recent = events.iter().filter(|event| event.sequence > since);
    recent
        .filter_map(|event| {
            let (before, _) = event.text.split_once(" ms downtime")?;
            before.rsplit(' ').next()?.parse().ok()
        })
        .collect()
}

/// What all swaps came to; that no connection broke or moved has been asserted.
fn tell(found: &Swap, swaps: f64, connections: u32) {
    measured(
        "services: swaps of all members",
        swaps,
        "swaps",
        "25 by hand",
    );
    measured(
        "services: connections broken or moved",
        0.0,
        "connections",
        &format!("0 of {connections} in each of {swaps} swaps"),
    );
    measured(
        "services: migrations at a time",
        found.at_once as f64,
        "migrations",
        "4",
    );
}

/// Where clients' time went. Only the last part is held to a limit: the others are QEMU's.
fn judge_waits(all: &Swap) {
    let (wait, downtime) = (median(&all.stalls), median(&all.downtimes));
    let (silence, longer) = (median(&all.silences), median(&all.longer));
    measured(
        "services: median wait in a swap above QEMU's downtime",
        wait - downtime,
        "ms",
        &format!(
            "< 60 ms where guests are not emulated; wait {wait:.0} ms, downtime {downtime:.0} ms"
        ),
    );
    measured(
        "services: of which emulated members start cold",
        silence - downtime,
        "ms",
        &format!("they say nothing for {silence:.0} ms"),
    );
    measured(
        "services: median wait above a member's silence",
        longer,
        "ms",
        &format!("<= {WAITS_LONGER_MS} ms"),
    );
    measured(
        "services: packets sent after members",
        all.sent_after as f64,
        "packets",
        "> 0",
    );
    assert!(all.sent_after > 0, "what came at the stop was lost");
    if longer > WAITS_LONGER_MS {
        missed("wait above a member's silence");
    }
    assert!(longer <= WAITS_LONGER_MS, "{longer:.0} ms");
}

#[test]
fn all_members_are_moved_at_once_and_no_connection_breaks() {
    let cluster = Cluster::with(Options {
        settings: "  parallel_migrations: 8\n".to_owned(),
        ..Options::default()
    });
    let guests: Vec<Guest> = webs(5).into_iter().map(Guest::with_ipv6).collect();
    let apply = |members: &[&str]| {
        cluster.apply_service_on(&guests, &web(members, &address6()), NETWORK);
    };
    apply(&MEMBERS);
    cluster.wait_ready(&["web1", "web2", "web3", "web4", "web5"], LONG * 2);
    cluster.wait_ring(&MEMBERS);
    let holder = cluster.holder();
    cluster.say(&format!("{holder} answers for the address"));
    let connections = connections();
    let load = cluster.hold(connections, 100);
    let report = cluster.unbroken("at the beginning");
    cluster.say(&format!("connections: {:?}", report.members()));
    assert_eq!(report.members().len(), MEMBERS.len(), "a member has none");

    let rounds = rounds(2);
    let mut all = Swap::default();
    for round in 1..=rounds {
        let begun = Instant::now();
        let swap = swap(&cluster, &MEMBERS, || {});
        cluster.say(&format!(
            "swap {round} of {rounds}: {:.1} s, {} at a time, median wait {:.0} ms, downtimes {:?} ms",
            begun.elapsed().as_secs_f64(),
            swap.at_once,
            median(&swap.stalls),
            swap.downtimes,
        ));
        all.stalls.extend(swap.stalls);
        all.downtimes.extend(swap.downtimes);
        all.silences.extend(swap.silences);
        all.longer.extend(swap.longer);
        all.sent_after += swap.sent_after;
        all.at_once = all.at_once.max(swap.at_once);
    }
    // A member comes while all others move, and one goes.
    let five = ["web1", "web2", "web3", "web4", "web5"];
    swap(&cluster, &MEMBERS, || {
        apply(&five);
    });
    cluster.wait_ring(&five);
    cluster.say("a member has joined while the others moved");
    let before = cluster.unbroken("with a new member");
    swap(&cluster, &MEMBERS, || {
        apply(&MEMBERS);
    });
    cluster.wait_ring(&MEMBERS);
    cluster.say("it has left while the others moved");

    let report = load.finish().unwrap();
    assert_unbroken(&report, "in the end");
    let fresh = &report.fresh;
    cluster.say(&format!("new connections: {fresh:?}"));
    assert_eq!(
        fresh.failed, 0,
        "a new connection was not served: {fresh:?}"
    );
    assert!(
        fresh.answered.contains_key("web5"),
        "the new member got none: {:?} then {fresh:?}",
        before.fresh
    );
    tell(&all, (rounds + 2) as f64, connections);

    over_ipv6(&cluster, || {
        swap(&cluster, &MEMBERS, || {});
    });
    by_health(&cluster, &guests, &MEMBERS);
    by_limits(&cluster, &guests, &MEMBERS);
    by_guards(&cluster, &guests[4]);
    judge_waits(&all);
}
