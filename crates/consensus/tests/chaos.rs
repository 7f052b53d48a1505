//! Cuts, restarts and proposals in random order: nothing confirmed is lost, no two nodes differ.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::Cluster;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::sleep;

const ROUNDS: usize = 20;

async fn disturb(cluster: &mut Cluster, rng: &mut StdRng) {
    let a = rng.random_range(1..=3);
    let b = a % 3 + 1;
    match rng.random_range(0..6) {
        0 => cluster.wires.cut(a, b),
        1 => cluster.wires.cut_one_way(a, b),
        2 => {
            for other in cluster.others(a) {
                cluster.wires.cut(a, other);
            }
        }
        3 => {
            cluster.stop(a).await;
            cluster.start(a).await;
        }
        _ => cluster.wires.heal(),
    }
}

async fn run(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::empty();
    cluster.snapshot_every = 15;
    cluster.start(1).await;
    cluster.nodes[&1].bootstrap().await.unwrap();
    for id in 2..=3 {
        cluster.start(id).await;
        cluster.nodes[&1].add_learner(id).await.unwrap();
    }
    let voters = [1, 2, 3].into();
    cluster.nodes[&1].change_voters(voters).await.unwrap();

    let mut confirmed: Vec<String> = Vec::new();
    for round in 0..ROUNDS {
        disturb(&mut cluster, &mut rng).await;
        // How long the disturbance lasts belongs to the seed.
        sleep(Duration::from_millis(rng.random_range(0..900))).await;
        for attempt in 0..4 {
            for (id, node) in &cluster.nodes {
                let command = format!("{round}/{attempt} at {id}");
                let deadline = Duration::from_millis(60);
                let outcome = node.propose(command.clone().into_bytes(), deadline).await;
                if outcome.is_ok() {
                    confirmed.push(command);
                }
            }
        }
    }
    cluster.wires.heal();
    let last = cluster.propose("last").await;
    confirmed.push("last".into());
    for id in 1..=3 {
        cluster.wait_applied(id, last.index).await;
    }
    let journal = cluster.journal(1);
    for id in 2..=3 {
        assert_eq!(
            cluster.journal(id),
            journal,
            "seed {seed}: nodes 1 and {id} differ"
        );
    }
    let mut rest = journal.iter();
    for command in &confirmed {
        assert!(
            rest.any(|c| c == command),
            "seed {seed}: '{command}' was confirmed and is lost or out of order"
        );
    }
    println!(
        "seed {seed}: {} confirmed, {} applied",
        confirmed.len(),
        journal.len()
    );
    assert!(
        confirmed.len() > ROUNDS / 2,
        "seed {seed}: too little got through"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_confirmed_is_lost() {
    for seed in 1..=2 {
        run(seed).await;
    }
}
