//! A hundred units and a hundred VMs come at once: when does every host see them, and how long does a look take?

use crate::harness::measure::{judge_rounds, measured};
use crate::harness::{Cluster, LONG, Options};
use quorate_api::storage::{ImageState, StorageView};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Units, and VMs that have one each.
const MANY: usize = 100;
/// Looks of each host.
const ROUNDS: usize = 5;
/// For a look into the pool with all of them, in seconds.
const LIMIT: f64 = 1.0;

/// What a host that looks itself sees of the pool.
fn look(cluster: &Cluster, host: &str) -> Result<(), String> {
    let view: StorageView = cluster.get(host, "/api/v1/pools/san")?;
    if view.seen_by.as_ref().is_none_or(|by| by.as_str() != host) {
        return Err(format!("{host} cannot look: {:?}", view.images_problem));
    }
    let images = view.images.unwrap_or_default();
    let good = |state: ImageState| images.iter().filter(|of| of.state == state).count();
    match good(ImageState::Used) {
        MANY => Ok(()),
        good => Err(format!(
            "{host} sees {good}; the first: {:?}",
            images.first()
        )),
    }
}

#[test]
#[ignore = "a measurement of half a minute: BENCH=storage make bench"]
fn a_hundred_units_and_vms_at_once() {
    let cluster = Cluster::with(Options {
        san: true,
        ..Options::default()
    });
    // `tgtd` answers nobody while it has no target.
    let san = cluster.lab.san().unwrap();
    san.create_lun("first", 1 << 20).unwrap();
    cluster.apply(&[]);
    cluster.eventually("a pool that every host reaches", LONG, || {
        let view: StorageView = cluster.get(&cluster.desk(), "/api/v1/pools/san")?;
        let usable = view.hosts.iter().filter(|host| host.usable == Some(true));
        (usable.count() == 3)
            .then_some(())
            .ok_or_else(|| format!("{view:?}"))
    });
    let mut text = "vms:\n".to_owned();
    for at in 0..MANY {
        san.create_lun(&format!("many-{at:02}"), 1 << 20).unwrap();
        let _ = write!(
            text,
            "  many-{at:02}:\n    memory: 64MiB\n    power: stopped\n    boot: {{kernel: {{kernel: /k}}}}\n    disks: [{{pool: san, image: many-{at:02}}}]\n",
        );
    }
    cluster.say(&format!("{MANY} units are made"));
    let path = cluster.file("many.yaml", &text);
    let desk = cluster.leader();
    let begun = Instant::now();
    let arguments = ["apply", "-f", &path.to_string_lossy()];
    cluster
        .lab
        .quorate_for(&desk, &arguments, Duration::from_secs(60))
        .unwrap();
    let applied = begun.elapsed().as_secs_f64();
    for host in cluster.hosts() {
        cluster.eventually("all units on every host", LONG, || look(&cluster, &host));
    }
    let seen = begun.elapsed().as_secs_f64();
    measured(
        "storage: 100 VMs applied by one manifest",
        applied,
        "s",
        "<= 1 s",
    );
    measured(
        "storage: 100 new units and VMs -> every host is let in to all and sees them",
        seen,
        "s",
        "none; the SAN is told 300 times",
    );
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        for host in cluster.hosts() {
            let begun = Instant::now();
            look(&cluster, &host).unwrap();
            samples.push(begun.elapsed().as_secs_f64());
        }
    }
    let mut report = quorate_bench::Report::new();
    report.add("100 VMs applied", "s", &[applied], None);
    report.add("applied -> every host sees its units", "s", &[seen], None);
    report.add("look into a pool of 100 units", "s", &samples, None);
    report.publish("storage-many").unwrap();
    judge_rounds(
        "storage: look into a pool of 100 units",
        &samples,
        "s",
        LIMIT,
    );
}
