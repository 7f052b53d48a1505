//! Commits per second and latency, printed. Not part of the normal run:
//! `cargo test --release -p quorate-consensus --test throughput -- --ignored --nocapture`
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Instant;

use common::{Cluster, PATIENCE};

const COMMITS: usize = 1000;
const WRITERS: usize = 32;

async fn measure(voters: u64) {
    let cluster = Cluster::of(voters).await;
    let node = cluster.nodes[&cluster.leader().await].clone();
    let command = vec![b'x'; 512];
    let mut latencies = Vec::new();
    let start = Instant::now();
    for _ in 0..COMMITS {
        let at = Instant::now();
        node.propose(command.clone(), PATIENCE).await.unwrap();
        latencies.push(at.elapsed());
    }
    let one_by_one = COMMITS as f64 / start.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let start = Instant::now();
    let writers = (0..WRITERS).map(|_| async {
        for _ in 0..COMMITS / WRITERS {
            node.propose(command.clone(), PATIENCE).await.unwrap();
        }
    });
    futures_util::future::join_all(writers).await;
    let together = (COMMITS / WRITERS * WRITERS) as f64 / start.elapsed().as_secs_f64();
    println!(
        "{voters} voters, 512 bytes: {one_by_one:.0}/s one by one, median {:?}, p99 {:?}; {together:.0}/s from {WRITERS} writers",
        latencies[COMMITS / 2],
        latencies[COMMITS * 99 / 100]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn throughput() {
    measure(1).await;
    measure(3).await;
}
