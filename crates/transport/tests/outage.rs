//! Cut networks: how soon calls work again, and the ways round a cut.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Host, LONG, PROMPT, Proxy, Site, eventually};
use quorate_transport::{CallError, Direct, Peers};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, sleep_until};

const CUT: Duration = Duration::from_millis(1500);

/// Heartbeats like an agent's: one each 200 ms, whatever became of the last.
async fn first_answer(peers: Peers, target: u64) -> Instant {
    let (tx, mut rx) = tokio::sync::mpsc::channel(64);
    loop {
        let (peers, tx) = (peers.clone(), tx.clone());
        tokio::spawn(async move {
            let limit = Duration::from_millis(600);
            if peers.call(target, "echo", "x", limit).await.is_ok() {
                let _ = tx.send(Instant::now()).await;
            }
        });
        tokio::select! {
            answered = rx.recv() => return answered.unwrap(),
            () = sleep(Duration::from_millis(200)) => {}
        }
    }
}

#[tokio::test]
async fn a_cut_of_a_second_and_a_half_costs_little_after_it() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    let proxy = Proxy::start(b.addr).await;
    a.knows(&[(2, proxy.addr)]);
    let mut costs = Vec::new();
    // Odd lengths: the heal falls anywhere between two attempts.
    for odd in [0, 70, 140] {
        let cut = CUT + Duration::from_millis(odd);
        assert_eq!(a.text(2, "echo", LONG).await, "x");
        let began = Instant::now();
        proxy.cut();
        let answered = tokio::spawn({
            let peers = a.peers.clone();
            async move { first_answer(peers, 2).await }
        });
        sleep_until(began + cut).await;
        assert!(!answered.is_finished(), "the cut does not cut");
        let healed = Instant::now();
        proxy.heal();
        let answered = tokio::time::timeout(LONG, answered).await.unwrap().unwrap();
        costs.push(answered.saturating_duration_since(healed));
    }
    costs.sort();
    println!("answer after the heal: {costs:?}");
    assert!(costs[1] < PROMPT, "{costs:?}");
}

#[tokio::test]
async fn one_waiting_call_is_served_when_the_network_is_back() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    let proxy = Proxy::start(b.addr).await;
    a.knows(&[(2, proxy.addr)]);
    assert_eq!(a.text(2, "echo", LONG).await, "x");
    proxy.cut();
    // Nobody calls: the prober alone must notice.
    eventually("the link is seen as down", || {
        matches!(a.peers.links()[&2].direct, Direct::Down { .. })
    })
    .await;
    let call = a.peers.call(2, "echo", "y", LONG);
    tokio::pin!(call);
    tokio::select! {
        answer = &mut call => panic!("answered through a cut: {answer:?}"),
        () = sleep(CUT) => {}
    }
    proxy.heal();
    let healed = Instant::now();
    assert_eq!(&call.await.unwrap()[..], b"y");
    println!("waiting call served {:?} after the heal", healed.elapsed());
    assert!(healed.elapsed() < PROMPT, "{:?}", healed.elapsed());
}

#[tokio::test]
async fn links_tell_the_truth_without_traffic() {
    let site = Site::new("c1");
    let (a, mut b) = (site.host(1).await, site.host(2).await);
    a.knows(&[(2, b.addr)]);
    for _ in 0..2 {
        eventually("up", || a.peers.links()[&2].direct == Direct::Up).await;
        b.down().await;
        eventually("down", || {
            matches!(a.peers.links()[&2].direct, Direct::Down { .. })
        })
        .await;
        let limit = Duration::from_millis(300);
        let error = a.peers.call(2, "echo", "x", limit).await.unwrap_err();
        assert!(matches!(error, CallError::Unreachable { .. }), "{error}");
        b.up().await;
    }
}

/// Hosts 1 to 3; host 1 reaches host 3 by the address given.
async fn three(site: &Site) -> (Host, Host, Host) {
    let (a, b, c) = (site.host(1).await, site.host(2).await, site.host(3).await);
    b.knows(&[(1, a.addr), (3, c.addr)]);
    c.knows(&[(1, a.addr), (2, b.addr)]);
    eventually("the relay is connected", || {
        b.peers.links()[&3].direct == Direct::Up
    })
    .await;
    (a, b, c)
}

#[tokio::test]
async fn a_relay_serves_while_the_direct_way_is_a_black_hole() {
    let site = Site::new("c1");
    let (a, b, c) = three(&site).await;
    // Accepted by the kernel, never by anyone.
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    a.knows(&[(2, b.addr), (3, hole.local_addr().unwrap())]);
    let began = Instant::now();
    assert_eq!(a.text(3, "who", LONG).await, "1 h1 via 2");
    println!("first relayed answer after {:?}", began.elapsed());
    assert!(began.elapsed() < PROMPT);
    let began = Instant::now();
    assert_eq!(a.text(3, "who", LONG).await, "1 h1 via 2");
    assert!(began.elapsed() < PROMPT);
    let link = &a.peers.links()[&3];
    assert!(matches!(link.direct, Direct::Down { .. }), "{link:?}");
    assert_eq!(link.relayed_by, Some(2));
    // What the target says is passed on as it is.
    let error = a.peers.call(3, "conflict", "", LONG).await.unwrap_err();
    assert!(
        matches!(
            error,
            CallError::Refused {
                node: 3,
                code: 409,
                ..
            }
        ),
        "{error}"
    );
    let limit = Duration::from_millis(400);
    let error = a.peers.call(3, "hang", "", limit).await.unwrap_err();
    assert!(
        matches!(error, CallError::Timeout { node: 3, .. }),
        "{error}"
    );

    a.knows(&[(2, b.addr), (3, c.addr)]);
    eventually("the direct way is used again", || {
        a.peers.links()[&3].direct == Direct::Up
    })
    .await;
    assert_eq!(a.text(3, "who", LONG).await, "1 h1");
    assert_eq!(a.peers.links()[&3].relayed_by, None);
}

#[tokio::test]
async fn the_direct_way_is_resumed_when_it_comes_back() {
    let site = Site::new("c1");
    let (a, b, c) = three(&site).await;
    let proxy = Proxy::start(c.addr).await;
    a.knows(&[(2, b.addr), (3, proxy.addr)]);
    eventually("all links are up", || {
        a.peers.links().values().all(|l| l.direct == Direct::Up)
    })
    .await;
    assert_eq!(a.text(3, "who", LONG).await, "1 h1");
    proxy.cut();
    eventually("the relay is found without any call", || {
        a.peers.links()[&3].relayed_by == Some(2)
    })
    .await;
    assert_eq!(a.text(3, "who", LONG).await, "1 h1 via 2");
    proxy.heal();
    let healed = Instant::now();
    eventually("the direct way is used again", || {
        a.peers.links()[&3].direct == Direct::Up
    })
    .await;
    assert!(healed.elapsed() < PROMPT);
    assert_eq!(a.text(3, "who", LONG).await, "1 h1");
}

#[tokio::test]
async fn a_slow_relay_is_overtaken_by_another() {
    let site = Site::new("c1");
    let (a, b, c) = three(&site).await;
    let d = site.host(4).await;
    let to_d = Proxy::start(d.addr).await;
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    b.knows(&[(1, a.addr), (3, c.addr), (4, to_d.addr)]);
    c.knows(&[(1, a.addr), (2, b.addr), (4, d.addr)]);
    let hole = hole.local_addr().unwrap();
    a.knows(&[(2, b.addr), (3, c.addr), (4, hole)]);
    eventually("relays are connected", || {
        [&b, &c]
            .iter()
            .all(|h| h.peers.links()[&4].direct == Direct::Up)
    })
    .await;
    assert_eq!(a.text(4, "who", LONG).await, "1 h1 via 2");
    // Host 2 still believes in its connection, so it tries and says nothing.
    to_d.cut();
    let began = Instant::now();
    assert_eq!(a.text(4, "who", LONG).await, "1 h1 via 3");
    println!("overtaken after {:?}", began.elapsed());
    assert!(began.elapsed() < PROMPT);
}

#[tokio::test]
async fn a_dead_target_is_unreachable_within_the_timeout() {
    let site = Site::new("c1");
    let (a, b, mut c) = three(&site).await;
    a.knows(&[(2, b.addr), (3, c.addr)]);
    assert_eq!(a.text(3, "who", LONG).await, "1 h1");
    c.down().await;
    let limit = Duration::from_millis(800);
    let began = Instant::now();
    let error = a.peers.call(3, "who", "", limit).await.unwrap_err();
    assert!(
        matches!(error, CallError::Unreachable { node: 3, .. }),
        "{error}"
    );
    assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
    assert_eq!(a.peers.links()[&3].relayed_by, None);
}

#[tokio::test]
async fn a_peer_that_leaves_the_address_book_fails_its_calls() {
    let site = Site::new("c1");
    let a = site.host(1).await;
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    a.knows(&[(2, hole.local_addr().unwrap())]);
    let call = a.peers.call(2, "echo", "x", LONG);
    let remove = async {
        sleep(Duration::from_millis(50)).await;
        a.knows(&[]);
    };
    let began = Instant::now();
    let (result, ()) = tokio::join!(call, remove);
    assert!(matches!(
        result,
        Err(CallError::Unreachable { node: 2, .. })
    ));
    assert!(began.elapsed() < PROMPT);
    assert!(a.peers.links().is_empty());
}
