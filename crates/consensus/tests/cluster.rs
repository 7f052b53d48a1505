//! Three nodes whose links are cut and healed.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, eventually};
use quorate_consensus::{MembershipError, ProposeError, RaftMethod};
use tokio::time::{Instant, sleep, timeout};

/// Longer than any election.
const LONG_CUT: Duration = Duration::from_millis(2500);

/// Within a few elections, on a machine with other work too.
const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_leader_is_replaced_and_comes_back_as_follower() {
    let cluster = Cluster::of(3).await;
    let first = cluster.propose("one").await;
    assert_eq!(first.reply, b"1");
    let old = cluster.leader().await;
    let rest = cluster.others(old);
    let term = cluster.nodes[&old].leadership().borrow().term;

    let cut_at = Instant::now();
    for id in &rest {
        cluster.wires.cut(old, *id);
    }
    let new = cluster.leader_among(&rest).await;
    let outage = cut_at.elapsed();
    assert!(outage < SOON, "new leader after {outage:?}");
    println!("new leader after {outage:?}");

    let lost = cluster.nodes[&old].propose(b"lost".to_vec(), Duration::from_millis(300));
    let lost = lost.await.unwrap_err();
    assert!(
        matches!(
            lost,
            ProposeError::OutcomeUnknown { .. } | ProposeError::NotLeader { leader: None }
        ),
        "{lost:?}"
    );
    let two = cluster.nodes[&new].propose(b"two".to_vec(), PATIENCE).await;
    let two = two.unwrap();

    // The old leader says so itself before anybody reaches it, and then refuses at once.
    let mut said = cluster.nodes[&old].leadership();
    let gave_up = timeout(
        PATIENCE,
        said.wait_for(|l| !l.is_self && l.leader.is_none()),
    );
    gave_up.await.unwrap().unwrap();
    let refused = cluster.nodes[&old].propose(b"no".to_vec(), PATIENCE).await;
    assert_eq!(refused, Err(ProposeError::NotLeader { leader: None }));

    cluster.wires.heal();
    cluster.wait_applied(old, two.index).await;
    assert_eq!(cluster.journal(old), ["one", "two"]);
    let seen = timeout(PATIENCE, said.wait_for(|l| l.leader == Some(new))).await;
    assert!(seen.unwrap().unwrap().term > term);
    cluster.propose("three").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healed_follower_does_not_depose_the_leader() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let follower = cluster.others(leader)[0];
    let before = *cluster.nodes[&leader].leadership().borrow();
    for id in cluster.others(follower) {
        cluster.wires.cut(follower, id);
    }
    let mut alone = cluster.nodes[&follower].leadership();
    let silence = timeout(PATIENCE, alone.wait_for(|l| l.leader.is_none())).await;
    silence.expect("it hears nobody").unwrap();
    sleep(LONG_CUT).await;
    cluster.propose("meanwhile").await;

    let mut watch = cluster.nodes[&leader].leadership();
    watch.mark_unchanged();
    cluster.wires.heal();
    let last = cluster.propose("after").await;
    cluster.wait_applied(follower, last.index).await;
    let back = timeout(PATIENCE, alone.wait_for(|l| l.leader == Some(leader))).await;
    let term = back.unwrap().unwrap().term;
    assert_eq!(
        term, before.term,
        "the term grew while nobody could be elected"
    );
    assert!(!watch.has_changed().unwrap(), "the leader was disturbed");
    assert_eq!(*cluster.nodes[&leader].leadership().borrow(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_cut_from_the_leader_alone_changes_nothing() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let (cut, third) = (cluster.others(leader)[0], cluster.others(leader)[1]);
    let before = *cluster.nodes[&leader].leadership().borrow();
    cluster.wires.cut(leader, cut);
    let votes = || {
        let calls = cluster.wires.calls.lock().unwrap();
        calls.get(&RaftMethod::Vote).copied().unwrap_or(0)
    };
    let asked = votes();
    eventually("the cut follower asks for votes", || votes() > asked + 3).await;
    sleep(LONG_CUT).await;
    let now = *cluster.nodes[&leader].leadership().borrow();
    assert_eq!(now, before);
    assert_eq!(
        cluster.nodes[&third].leadership().borrow().leader,
        Some(leader)
    );
    assert_eq!(cluster.nodes[&cut].leadership().borrow().term, before.term);
    cluster.propose("still here").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quorum_acknowledgement_stops_with_the_majority() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let node = &cluster.nodes[&leader];
    let rest = cluster.others(leader);
    assert_eq!(cluster.nodes[&rest[0]].last_quorum_ack(), None);

    let first = node.last_quorum_ack().unwrap();
    assert!(first <= std::time::Instant::now());
    eventually("it advances while idle", || {
        node.last_quorum_ack() > Some(first + Duration::from_millis(300))
    })
    .await;

    // One of two followers is enough.
    cluster.wires.cut(leader, rest[0]);
    let cut_one = std::time::Instant::now();
    eventually("it advances with one follower", || {
        node.last_quorum_ack() > Some(cut_one)
    })
    .await;

    // Requests arrive, answers do not: nothing is acknowledged.
    cluster.wires.cut_one_way(rest[1], leader);
    let cut_all = std::time::Instant::now();
    let mut watch = node.leadership();
    let gave_up = timeout(PATIENCE, watch.wait_for(|l| !l.is_self)).await;
    gave_up.unwrap().unwrap();
    let at_most = cut_all + Duration::from_millis(5);
    assert!(node.last_quorum_ack().is_none_or(|at| at <= at_most));
    assert!(
        node.quorum_ack_age()
            .is_none_or(|age| age >= Duration::from_millis(900))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_heard_but_hears_nobody_is_replaced() {
    let cluster = Cluster::of(3).await;
    let old = cluster.leader().await;
    let rest = cluster.others(old);
    for id in &rest {
        cluster.wires.cut_one_way(*id, old);
    }
    let at = Instant::now();
    let new = cluster.leader_among(&rest).await;
    let outage = at.elapsed();
    assert!(outage < SOON, "after {outage:?}");
    println!("replaced after {outage:?}");
    let node = &cluster.nodes[&new];
    // Its voters had been silent before they voted, and the old leader's last majority is at least as old.
    let silent = node.predecessors_silent_for();
    assert!(silent >= Duration::from_millis(590), "{silent:?}");
    let last = cluster.nodes[&old].quorum_ack_age();
    assert!(last.is_none_or(|age| age >= silent), "{last:?} {silent:?}");
    node.propose(b"on".to_vec(), PATIENCE).await.unwrap();
    cluster.wires.heal();
    let last = cluster.propose("all").await;
    cluster.wait_applied(old, last.index).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_total_cut_the_cluster_works_at_once() {
    let cluster = Cluster::of(3).await;
    cluster.leader().await;
    for (a, b) in [(1, 2), (2, 3), (1, 3)] {
        cluster.wires.cut(a, b);
    }
    sleep(LONG_CUT).await;
    for node in cluster.nodes.values() {
        assert_eq!(node.leadership().borrow().leader, None);
    }
    let at = Instant::now();
    cluster.wires.heal();
    cluster.leader().await;
    let outage = at.elapsed();
    println!("works again after {outage:?}");
    assert!(outage < SOON, "after {outage:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_barrier_needs_a_majority() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let rest = cluster.others(leader);
    let applied = cluster.propose("one").await;
    assert!(cluster.nodes[&leader].barrier().await.unwrap() >= applied.index);
    let elsewhere = cluster.nodes[&rest[0]].barrier().await.unwrap_err();
    assert!(
        elsewhere.to_string().contains("not the leader"),
        "{elsewhere}"
    );
    for id in &rest {
        cluster.wires.cut(leader, *id);
    }
    assert!(cluster.nodes[&leader].barrier().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_and_go() {
    let mut cluster = Cluster::of(1).await;
    let one = cluster.nodes[&1].clone();
    assert_eq!(
        one.change_voters([1, 2].into()).await,
        Err(MembershipError::UnknownNode { node: 2 })
    );
    assert_eq!(one.remove_node(1).await, Err(MembershipError::NoVoterLeft));
    for id in 2..=4 {
        cluster.start(id).await;
        one.add_learner(id).await.unwrap();
        one.add_learner(id).await.unwrap();
    }
    one.change_voters([1, 2, 3].into()).await.unwrap();
    let members = one.membership();
    assert_eq!(members.voters, [1, 2, 3].into());
    assert_eq!(members.learners, [4].into());
    assert!(!members.changing);
    let applied = cluster.propose("for all").await;
    cluster.wait_applied(4, applied.index).await;
    eventually("replication is reported", || {
        one.replication().get(&4).copied().flatten() >= Some(applied.index)
    })
    .await;
    assert!(cluster.nodes[&4].replication().is_empty());

    one.remove_node(4).await.unwrap();
    one.remove_node(3).await.unwrap();
    assert_eq!(one.membership().voters, [1, 2].into());
    assert!(one.membership().learners.is_empty());

    // The leader itself goes; the rest carries on.
    one.remove_node(1).await.unwrap();
    assert_eq!(cluster.leader_among(&[2]).await, 2);
    cluster.nodes[&2]
        .propose(b"alone".to_vec(), PATIENCE)
        .await
        .unwrap();
    assert_eq!(cluster.nodes[&2].membership().voters, [2].into());
}

/// How long clusters are without a leader; printed, with a generous bound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn election_times() {
    let mut times = Vec::new();
    for _ in 0..15 {
        let cluster = Cluster::of(3).await;
        let old = cluster.leader().await;
        let rest = cluster.others(old);
        let at = Instant::now();
        for id in &rest {
            cluster.wires.cut(old, *id);
        }
        cluster.leader_among(&rest).await;
        times.push(at.elapsed());
    }
    times.sort_unstable();
    println!("election: median {:?}, worst {:?}", times[7], times[14]);
    assert!(times[14] < Duration::from_secs(3));
}
