//! Twenty random faults under guests whose every record is checked. A seed replays the choice of faults
//! (not their exact timing): `QUORATE_LAB_SEED=7`.

use crate::harness::guest::Guest;
use crate::harness::measure::measured;
use crate::harness::{Cluster, LONG};
use quorate_lab::supervisor::protocol::{Power, Who};
use quorate_lab::{Link, wait};
use std::time::Duration;

const FAULTS: u32 = 20;
const DEFAULT_SEED: u64 = 20_260_101;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<'a>(&mut self, from: &'a [String]) -> &'a str {
        &from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

#[test]
fn twenty_random_faults_lose_no_acknowledged_record() {
    let seed = std::env::var("QUORATE_LAB_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or(DEFAULT_SEED);
    let mut random = Random(seed);
    let cluster = Cluster::up();
    let guests = [
        Guest::new("db", 1),
        Guest::new("app", 2).after("db"),
        Guest::new("web", 3),
    ];
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    cluster.run(&guests);
    let witness = cluster.witness(&guests);
    let hosts = cluster.hosts();
    for number in 1..=FAULTS {
        let what = fault(&cluster, &mut random, &hosts, &names);
        cluster.say(&format!("fault {number} (seed {seed}): {what}"));
        // Most faults meet a cluster that is well, some meet the one before.
        if random.below(4) > 0 {
            settle(&cluster, &names);
        }
    }
    settle(&cluster, &names);
    for name in &names {
        cluster.wait_one_copy(name, LONG);
    }
    // Every guest must have gone on after the last fault.
    wait::pause(Duration::from_secs(3));
    let reports = cluster.judge(witness);
    let records: u64 = reports
        .iter()
        .map(quorate_lab::tools::acks::AckReport::records)
        .sum();
    measured(
        "20 random faults: acknowledged records that were lost",
        0.0,
        "records",
        &format!("0 of {records}, seed {seed}"),
    );
}

/// Mends everything and waits until all is well.
fn settle(cluster: &Cluster, names: &[String]) {
    cluster.lab.heal().unwrap();
    for host in cluster.hosts() {
        // The watchdog may end a host between the question and the answer to it.
        cluster.eventually(&format!("{host} mended"), LONG, || {
            let mended = match cluster.status(&host).power {
                Power::On => cluster.lab.resume(&host, Who::All).map(drop),
                Power::Off | Power::Dead => cluster.lab.start(&host).map(drop),
            };
            mended.map_err(|error| error.to_string())
        });
    }
    cluster.wait_healthy();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    cluster.wait_ready(&names, LONG);
}

/// One fault, of random length.
fn fault(cluster: &Cluster, random: &mut Random, hosts: &[String], names: &[String]) -> String {
    let host = random.pick(hosts).to_owned();
    let vm = random.pick(names).to_owned();
    let span = Duration::from_millis(200 + random.below(5000));
    let on = |host: &String| cluster.status(host).power == Power::On;
    let all_on = hosts.iter().all(on);
    match random.below(7) {
        // With another host down already, one more would leave no majority: rest instead.
        0 | 1 if all_on => {
            cluster.cut_power(&host);
            wait::pause(span);
            format!("power of {host} cut, {span:?} ago")
        }
        2 => {
            cluster.lab.isolate(&host, Link::All).unwrap();
            wait::pause(span);
            cluster.lab.heal().unwrap();
            format!("{host} cut off for {span:?}")
        }
        3 if on(&host) => {
            // The watchdog may end the host meanwhile, so that there is nobody left to resume.
            let who = if random.below(2) == 0 {
                Who::Daemon
            } else {
                Who::All
            };
            let _ = cluster.lab.pause(&host, who);
            wait::pause(span);
            let _ = cluster.lab.resume(&host, who);
            format!("{who:?} of {host} paused for {span:?}")
        }
        4 | 5 => match cluster.quorate(&["vm", "migrate", &vm]) {
            Ok(_) => {
                wait::pause(span / 4);
                format!("{vm} sent away, {:?} ago", span / 4)
            }
            Err(why) => format!(
                "{vm} could not be sent away: {}",
                why.lines().next().unwrap_or_default()
            ),
        },
        _ if on(&host) => {
            let hard = random.below(2) == 0;
            match cluster.lab.restart_daemon(&host, hard) {
                Ok(_) => format!("daemon of {host} restarted, hard: {hard}"),
                // The watchdog has ended the host meanwhile.
                Err(why) => format!("daemon of {host} not restarted: {why}"),
            }
        }
        _ => "none: another host is down".to_owned(),
    }
}
