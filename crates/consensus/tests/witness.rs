//! Two hosts and a witness: the third vote holds what a dead host had, gives it away and leads no longer.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, eventually};
use quorate_consensus::{ProposeError, RaftMethod, Tenure};
use tokio::time::{Instant, sleep, timeout};

const WITNESS: u64 = 3;

/// The host that leads; the witness may lead for a moment before it.
async fn leading_host(cluster: &Cluster) -> u64 {
    cluster.leader_among(&[1, 2]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_the_witness_has_reaches_the_other_host() {
    let mut cluster = Cluster::with_witnesses(3, &[WITNESS]).await;
    let old = leading_host(&cluster).await;
    let other = 3 - old;
    // The other host misses an entry that is confirmed by the witness.
    cluster.wires.cut(old, other);
    let alone = cluster.nodes[&old]
        .propose(b"only here".to_vec(), PATIENCE)
        .await;
    let alone = alone.unwrap();
    assert!(cluster.nodes[&other].log_status().last < Some(alone.index));
    cluster.wait_applied(WITNESS, alone.index - 1).await;

    let died = Instant::now();
    cluster.stop(old).await;
    cluster.wires.heal();
    let mut leads = cluster.nodes[&other].leadership();
    let elected = timeout(PATIENCE, leads.wait_for(|l| l.is_self)).await;
    elected.expect("the other host leads").unwrap();
    println!("the other host leads after {:?}", died.elapsed());
    assert!(
        died.elapsed() < Duration::from_secs(10),
        "{:?}",
        died.elapsed()
    );
    let next = cluster.nodes[&other]
        .propose(b"next".to_vec(), PATIENCE)
        .await
        .unwrap();
    assert_eq!(cluster.journal(other), ["only here", "next"]);
    cluster.wait_applied(WITNESS, next.index).await;
    assert!(!cluster.nodes[&WITNESS].leadership().borrow().is_self);
    // It stays so: the witness does not take the lead back.
    let term = cluster.nodes[&other].leadership().borrow().term;
    sleep(Duration::from_millis(2500)).await;
    let now = *cluster.nodes[&other].leadership().borrow();
    assert!(now.is_self && now.term == term, "{now:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_knows_everything_is_elected_before_the_witness() {
    let mut cluster = Cluster::with_witnesses(3, &[WITNESS]).await;
    cluster.propose("one").await;
    for _ in 0..3 {
        let old = leading_host(&cluster).await;
        let term = cluster.nodes[&old].leadership().borrow().term;
        let other = 3 - old;
        let applied = cluster.nodes[&old].log_status().applied.unwrap();
        cluster.wait_applied(other, applied).await;
        cluster.stop(old).await;
        let mut leads = cluster.nodes[&other].leadership();
        let elected = timeout(PATIENCE, leads.wait_for(|l| l.is_self)).await;
        let new = elected.unwrap().unwrap().term;
        assert!(
            new <= term + 2,
            "at most one failed attempt: {term} -> {new}"
        );
        assert!(!cluster.nodes[&WITNESS].leadership().borrow().is_self);
        cluster.start(old).await;
        let last = cluster.propose("more").await;
        cluster.wait_applied(old, last.index).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_witness_two_hosts_go_on_and_one_does_not() {
    let mut cluster = Cluster::with_witnesses(3, &[WITNESS]).await;
    cluster.propose("one").await;
    cluster.stop(WITNESS).await;
    cluster.propose("two").await;
    let old = cluster.leader().await;
    let other = 3 - old;
    cluster.stop(old).await;
    sleep(Duration::from_millis(2500)).await;
    let alone = cluster.nodes[&other].leadership();
    assert_eq!(alone.borrow().leader, None, "one of three votes");
    cluster.start(WITNESS).await;
    let last = cluster.propose("three").await;
    assert_eq!(cluster.journal(other), ["one", "two", "three"]);
    cluster.wait_applied(WITNESS, last.index).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_tenure_is_over_neither_answers_nor_stores() {
    let mut cluster = Cluster::empty();
    cluster.witnesses.insert(WITNESS);
    let tenure = Tenure::until(u64::MAX);
    cluster.tenures.insert(WITNESS, tenure.clone());
    cluster.start(1).await;
    cluster.nodes[&1].bootstrap().await.unwrap();
    for id in [2, WITNESS] {
        cluster.start(id).await;
        cluster.nodes[&1].add_learner(id).await.unwrap();
    }
    cluster.nodes[&1]
        .change_voters([1, 2, WITNESS].into())
        .await
        .unwrap();
    cluster.stop(2).await;
    cluster.propose("with the witness").await;
    let file = cluster.path(WITNESS).join("raft.redb");
    tenure.end();
    let before = std::fs::read(&file).unwrap();
    let refused = cluster.nodes[&WITNESS]
        .handle(RaftMethod::Append, b"")
        .await;
    assert!(refused.unwrap_err().to_string().contains("run out"));
    let lost = cluster.nodes[&1]
        .propose(b"lost".to_vec(), Duration::from_millis(500))
        .await;
    assert!(
        matches!(
            lost,
            Err(ProposeError::OutcomeUnknown { .. } | ProposeError::NotLeader { .. })
        ),
        "{lost:?}"
    );
    eventually("the leader notices", || {
        !cluster.nodes[&1].leadership().borrow().is_self
    })
    .await;
    let mut failed = cluster.nodes[&WITNESS].failed();
    let why = timeout(PATIENCE, failed.wait_for(Option::is_some)).await;
    assert!(
        why.unwrap()
            .unwrap()
            .as_deref()
            .unwrap()
            .contains("run out")
    );
    assert_eq!(
        std::fs::read(&file).unwrap(),
        before,
        "nothing is written afterwards"
    );

    // The next holder of the same files goes on where it ended.
    cluster.stop(WITNESS).await;
    cluster.tenures.insert(WITNESS, Tenure::until(u64::MAX));
    cluster.start(WITNESS).await;
    let last = cluster.propose("again").await;
    cluster.wait_applied(WITNESS, last.index).await;
}
