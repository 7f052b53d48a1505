//! What is on the disk counts: restarts, snapshots, damaged and foreign files.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Cluster, PATIENCE, eventually};
use quorate_consensus::{BootstrapError, OpenError, ProposeError};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_voter_keeps_what_it_confirmed() {
    let mut cluster = Cluster::of(1).await;
    assert!(cluster.nodes[&1].is_initialised().await.unwrap());
    assert_eq!(
        cluster.nodes[&1].bootstrap().await,
        Err(BootstrapError::AlreadyInitialised { node: 1 })
    );
    for i in 0..20 {
        cluster.propose(&format!("command {i}")).await;
    }
    let before = cluster.journal(1);
    cluster.stop(1).await;
    cluster.start(1).await;
    assert_eq!(cluster.journal(1), before, "without waiting for a leader");
    let at = Instant::now();
    cluster.leader().await;
    println!("leads after {:?}", at.elapsed());
    let next = cluster.propose("one more").await;
    assert_eq!(next.reply, b"21");
    let ack = cluster.nodes[&1].quorum_ack_age().unwrap();
    assert!(
        ack < Duration::from_millis(100),
        "a single voter is its own majority: {ack:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_keep_what_they_confirmed() {
    let mut cluster = Cluster::of(3).await;
    for i in 0..10 {
        cluster.propose(&format!("command {i}")).await;
    }
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.start(id).await;
    }
    let last = cluster.propose("after the restart").await;
    for id in 1..=3 {
        cluster.wait_applied(id, last.index).await;
        let journal = cluster.journal(id);
        assert_eq!(journal.len(), 11, "node {id}: {journal:?}");
        assert_eq!(journal[9], "command 9");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_learner_gets_a_snapshot_and_survives_a_restart() {
    let mut cluster = Cluster::empty();
    cluster.snapshot_every = 20;
    cluster.start(1).await;
    cluster.nodes[&1].bootstrap().await.unwrap();
    let padding = "x".repeat(60_000);
    for i in 0..100 {
        // About 6 MB: the snapshot does not fit one chunk.
        cluster.propose(&format!("command {i} {padding}")).await;
    }
    let snapshot = cluster.path(1).join("snapshot");
    eventually("a snapshot of several chunks", || {
        std::fs::metadata(&snapshot).is_ok_and(|m| m.len() > 3 * 1024 * 1024)
    })
    .await;
    cluster.start(2).await;
    cluster.nodes[&1].add_learner(2).await.unwrap();
    let last = cluster.propose("last").await;
    cluster.wait_applied(2, last.index).await;
    assert!(
        cluster.path(2).join("snapshot").exists(),
        "it came as a snapshot"
    );
    assert_eq!(cluster.journal(2), cluster.journal(1));

    cluster.stop(2).await;
    cluster.stop(1).await;
    cluster.start(2).await;
    let restored = cluster.journal(2);
    assert!(restored.len() >= 80, "only {} commands", restored.len());
    cluster.start(1).await;
    assert_eq!(cluster.journal(1).len(), 101, "snapshot and log together");
    let next = cluster.propose("next").await;
    cluster.wait_applied(2, next.index).await;
    assert_eq!(cluster.journal(2), cluster.journal(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_and_foreign_files_are_refused_by_name() {
    let mut cluster = Cluster::of(1).await;
    cluster.propose("one").await;
    cluster.nodes[&1].take_snapshot().await;
    let snapshot = cluster.path(1).join("snapshot");
    eventually("the snapshot", || snapshot.exists()).await;
    let second = cluster.try_start(1).await.unwrap_err();
    assert!(matches!(second, OpenError::InUse { .. }), "{second}");
    cluster.stop(1).await;

    let log = cluster.path(1).join("raft.redb");
    let good = std::fs::read(&log).unwrap();
    std::fs::rename(cluster.path(1), cluster.path(7)).unwrap();
    let foreign = cluster.try_start(7).await.unwrap_err();
    assert!(
        matches!(
            foreign,
            OpenError::WrongNode {
                found: 1,
                expected: 7,
                ..
            }
        ),
        "{foreign}"
    );
    std::fs::rename(cluster.path(7), cluster.path(1)).unwrap();

    let mut garbage = good.clone();
    garbage.fill(0xAA);
    std::fs::write(&log, &garbage).unwrap();
    let error = cluster.try_start(1).await.unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("raft.redb"), "{error}");
    assert!(error.to_string().contains("join it again"), "{error}");
    std::fs::write(&log, &good[..good.len() / 2]).unwrap();
    let error = cluster.try_start(1).await.unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");

    std::fs::write(&log, &good).unwrap();
    let state = std::fs::read(&snapshot).unwrap();
    std::fs::write(&snapshot, &state[..state.len() - 1]).unwrap();
    let error = cluster.try_start(1).await.unwrap_err();
    assert!(
        matches!(error, OpenError::SnapshotCorrupt { .. }),
        "{error}"
    );
    std::fs::write(&snapshot, &state).unwrap();
    cluster.start(1).await;
    assert_eq!(cluster.journal(1), ["one"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_single_damaged_block_of_the_log_goes_unnoticed_or_panics() {
    let mut cluster = Cluster::of(1).await;
    for i in 0..30 {
        cluster.propose(&format!("command {i}")).await;
    }
    let whole = cluster.journal(1);
    cluster.stop(1).await;
    let log = cluster.path(1).join("raft.redb");
    let good = std::fs::read(&log).unwrap();
    let (mut refused, mut harmless) = (0, 0);
    for block in good
        .chunks(4096)
        .enumerate()
        .filter(|(_, b)| b.iter().any(|x| *x != 0))
    {
        let mut bad = good.clone();
        let at = block.0 * 4096;
        for byte in &mut bad[at..(at + 4096).min(good.len())] {
            *byte ^= 0x5A;
        }
        std::fs::write(&log, &bad).unwrap();
        match cluster.try_start(1).await {
            Err(OpenError::Corrupt { .. }) => refused += 1,
            Err(e) => panic!("block {}: {e}", block.0),
            Ok(()) => {
                // A block that nothing refers to any more.
                harmless += 1;
                assert_eq!(cluster.journal(1), whole, "block {}", block.0);
                cluster.stop(1).await;
            }
        }
    }
    println!("{refused} blocks refused, {harmless} unused");
    assert!(refused >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_vanished_is_noticed() {
    let mut cluster = Cluster::empty();
    cluster.snapshot_every = 10;
    cluster.start(1).await;
    cluster.nodes[&1].bootstrap().await.unwrap();
    for i in 0..60 {
        cluster.propose(&format!("command {i}")).await;
    }
    let node = cluster.nodes[&1].clone();
    eventually("the log is purged", || node.log_status().purged > Some(0)).await;
    let status = node.log_status();
    assert!(status.purged < status.snapshot && status.snapshot <= status.last);
    cluster.stop(1).await;
    let snapshot = cluster.path(1).join("snapshot");
    std::fs::remove_file(&snapshot).unwrap();
    let error = cluster.try_start(1).await.unwrap_err();
    assert!(
        matches!(error, OpenError::SnapshotBehindLog { snapshot: None, .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_end_nothing_is_confirmed() {
    let mut cluster = Cluster::of(1).await;
    let node = cluster.nodes[&1].clone();
    let limit = node.propose(vec![0; 2 * 1024 * 1024], PATIENCE).await;
    assert!(matches!(limit, Err(ProposeError::TooLarge { .. })));
    cluster.stop(1).await;
    let after = node.propose(b"too late".to_vec(), PATIENCE).await;
    assert!(matches!(after, Err(ProposeError::Stopped(_))), "{after:?}");
    cluster.start(1).await;
    assert!(cluster.journal(1).is_empty());
}
