//! Bodies, deadlines, failing handlers.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Host, LONG, PROMPT, Site, eventually};
use quorate_transport::{CallError, MAX_BODY, Options, ServerOptions};
use tokio::time::Instant;

#[tokio::test]
async fn large_bodies_pass_and_oversized_ones_are_refused() {
    let site = Site::new("c1");
    let a = site.host(1).await;
    let options = ServerOptions {
        max_body: 4 << 20,
        ..ServerOptions::default()
    };
    let b = Host::start(site.identity(2), Options::default(), options).await;
    a.knows(&[(2, b.addr)]);
    let large = vec![7; 4 << 20];
    let answer = a.peers.call(2, "echo", large.clone(), LONG).await.unwrap();
    assert!(answer == large);

    let error = a.peers.call(2, "echo", vec![7; (4 << 20) + 1], LONG).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, CallError::Refused { code: 413, .. }),
        "{error}"
    );
    let error = a.peers.call(2, "echo", vec![0; MAX_BODY + 1], LONG).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, CallError::Refused { code: 413, .. }),
        "{error}"
    );
    assert_eq!(b.handler.calls.load(Ordering::SeqCst), 1);
    assert_eq!(
        a.text(2, "who", LONG).await,
        "1 h1",
        "the connection is sound"
    );
}

#[tokio::test]
async fn the_server_enforces_the_deadline() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    a.knows(&[(2, b.addr)]);
    assert_eq!(a.text(2, "echo", LONG).await, "x");
    let began = Instant::now();
    let limit = Duration::from_millis(500);
    let error = a.peers.call(2, "hang", "", limit).await.unwrap_err();
    assert!(
        matches!(error, CallError::Timeout { node: 2, .. }),
        "{error}"
    );
    assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
    eventually("the handler is dropped", || {
        b.handler.dropped.load(Ordering::SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn a_handler_that_panics_harms_only_its_request() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    a.knows(&[(2, b.addr)]);
    let error = a.peers.call(2, "panic", "", LONG).await.unwrap_err();
    assert!(
        matches!(error, CallError::Refused { code: 500, .. }),
        "{error}"
    );
    assert_eq!(a.text(2, "echo", LONG).await, "x");
}

#[tokio::test]
async fn many_calls_share_a_connection() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    a.knows(&[(2, b.addr)]);
    let calls = (0..300).map(|n| {
        let peers = a.peers.clone();
        async move { peers.call(2, "echo", format!("{n}"), LONG).await }
    });
    for (n, answer) in futures_util::future::join_all(calls)
        .await
        .iter()
        .enumerate()
    {
        assert_eq!(answer.as_ref().unwrap(), n.to_string().as_bytes());
    }
}
