//! Commits per second and latency. Not part of the normal run; `make bench` runs
//! `cargo test --release -p quorate-consensus --test throughput -- --ignored --nocapture`.
//!
//! What the log costs beside the disk: the baseline of one voter's latency is a write of the same size
//! with fdatasync into a plain file of the same file system, in the same run.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write as _;
use std::time::Instant;

use common::{Cluster, PATIENCE};
use quorate_bench::{Report, median};

const ROUNDS: usize = 5;
const COMMITS: usize = 400;
const WRITERS: usize = 32;
const BYTES: usize = 512;

/// Milliseconds of one plain durable write, median.
fn plain_write() -> f64 {
    let mut file = tempfile::tempfile().unwrap();
    let mut write = || {
        let at = Instant::now();
        file.write_all(&[b'x'; BYTES]).unwrap();
        file.sync_data().unwrap();
        at.elapsed().as_secs_f64() * 1000.0
    };
    let samples: Vec<f64> = (0..COMMITS).map(|_| write()).collect();
    median(&samples).unwrap()
}

async fn measure(report: &mut Report, voters: u64) {
    let cluster = Cluster::of(voters).await;
    let node = cluster.nodes[&cluster.leader().await].clone();
    let command = vec![b'x'; BYTES];
    let (mut alone, mut together, mut middle, mut slow) = (vec![], vec![], vec![], vec![]);
    let mut plain = Vec::new();
    for _ in 0..ROUNDS {
        plain.push(plain_write());
        let mut latencies = Vec::new();
        let start = Instant::now();
        for _ in 0..COMMITS {
            let at = Instant::now();
            node.propose(command.clone(), PATIENCE).await.unwrap();
            latencies.push(at.elapsed().as_secs_f64() * 1000.0);
        }
        alone.push(COMMITS as f64 / start.elapsed().as_secs_f64());
        latencies.sort_by(f64::total_cmp);
        middle.push(latencies[COMMITS / 2]);
        slow.push(latencies[COMMITS * 99 / 100]);
        let start = Instant::now();
        let writers = (0..WRITERS).map(|_| async {
            for _ in 0..COMMITS / WRITERS {
                node.propose(command.clone(), PATIENCE).await.unwrap();
            }
        });
        futures_util::future::join_all(writers).await;
        together.push((COMMITS / WRITERS * WRITERS) as f64 / start.elapsed().as_secs_f64());
    }
    let plain = median(&plain);
    let name = |what: &str| format!("{what}, {voters} voters, {BYTES} bytes");
    report.add(&name("commit latency, median"), "ms", &middle, plain);
    report.add(&name("commit latency, 99th percentile"), "ms", &slow, plain);
    report.add(&name("commits, one writer"), "1/s", &alone, None);
    report.add(&name("commits, 32 writers"), "1/s", &together, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn throughput() {
    let mut report = Report::new();
    measure(&mut report, 1).await;
    measure(&mut report, 3).await;
    report.publish("consensus").unwrap();
}
