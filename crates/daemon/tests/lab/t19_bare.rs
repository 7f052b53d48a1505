//! The control of `t19_services`: its members without Quorate, their clients and the moves of all of them at once.

use crate::harness::Cluster;
use crate::harness::bare::{Bare, move_at_once};
use crate::harness::guest::Guest;
use crate::t19_services::{Swap, waits};
use quorate_lab::tools::load::wall_ms;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

/// Guests of Quorate's go, and the same ones run by bare QEMU come: what clients that speak to them directly wait when all
/// of them move at once.
pub(crate) fn by_bare_qemu(
    cluster: &Cluster,
    guests: &[Guest],
    connections: u32,
    rounds: usize,
) -> Swap {
    let mac = |guest: &Guest| cluster.mac_of(&guest.name);
    let macs: BTreeMap<&str, String> = guests.iter().map(|one| (&*one.name, mac(one))).collect();
    let instead = guests.iter().map(|guest| Bare::instead_of(cluster, guest));
    let mut bare: Vec<Bare<'_>> = instead.collect();
    bare.iter().for_each(Bare::wait_ready);
    cluster.say("the same guests run without Quorate");
    let servers: Vec<IpAddr> = guests.iter().map(|guest| guest.address.into()).collect();
    let load = cluster.hold_with(&servers, connections, 100);
    let mut all = Swap::default();
    for round in 1..=rounds {
        let begun = Instant::now();
        let swap = swap(cluster, &macs, &mut bare);
        cluster.say(&format!(
            "bare swap {round} of {rounds}: {:.1} s, {}",
            begun.elapsed().as_secs_f64(),
            swap.told(),
        ));
        all.add(swap);
    }
    load.finish().unwrap();
    all
}

fn swap(cluster: &Cluster, macs: &BTreeMap<&str, String>, bare: &mut [Bare<'_>]) -> Swap {
    let hosts = cluster.hosts();
    let next = |host: &str| {
        let at = hosts.iter().position(|one| one == host).unwrap();
        hosts[(at + 1) % hosts.len()].clone()
    };
    let moves = bare.iter_mut().map(|one| {
        let to = next(one.host());
        (one, to)
    });
    let listening = cluster.listen();
    let begun_ms = wall_ms();
    let downtimes = move_at_once(moves.collect());
    waits(cluster, macs, listening, begun_ms, || downtimes)
}
