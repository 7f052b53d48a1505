//! A host that is in no cluster yet.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::raw::Raw;
use common::{LONG, Site};
use quorate_transport::{CertError, JoinError, JoinToken, TokenSecret, join};

fn token(site: &Site, addresses: &[String]) -> JoinToken {
    let token = JoinToken {
        addresses: addresses.to_vec(),
        cluster: site.cluster.clone(),
        ca_fingerprint: site.ca.fingerprint().unwrap(),
        secret: TokenSecret::generate().unwrap(),
    };
    token.to_string().parse().unwrap()
}

#[tokio::test]
async fn a_token_opens_the_join_route_and_nothing_else() {
    let site = Site::new("c1");
    let a = site.host(1).await;
    // The first address is of a host that is gone.
    let token = token(&site, &["127.0.0.1:1".into(), a.addr.to_string()]);
    let answer = join(&token, token.secret.reveal(), LONG).await.unwrap();
    assert_eq!(&answer[..], b"anonymous");

    let mut raw = Raw::connect(a.addr, None).await;
    for method in ["echo", "hello", "ping", "join"] {
        let headers = [("quorate-cluster", "c1"), ("quorate-protocol", "1-1")];
        let path = format!("/peer/v1/{method}");
        let (status, body) = raw.post(&path, &headers, "x").await.unwrap();
        assert_eq!(status, 401, "{method}: {body}");
        assert!(body.contains("join the host with a token"), "{body}");
    }
    let large = "x".repeat(65 * 1024);
    let (status, _) = raw.post("/join/v1", &[], &large).await.unwrap();
    assert_eq!(status, 413);
    assert_eq!(a.handler.calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_wrong_fingerprint_is_refused_before_the_secret_is_sent() {
    let (site, other) = (Site::new("c1"), Site::new("c1"));
    let a = site.host(1).await;
    let mut wrong = token(&other, &[a.addr.to_string()]);
    let error = join(&wrong, wrong.secret.reveal(), LONG).await.unwrap_err();
    assert!(
        matches!(
            &error,
            JoinError::Untrusted {
                error: CertError::WrongFingerprint { .. },
                ..
            }
        ),
        "{error}"
    );
    // The right CA, but a token for another cluster.
    wrong.ca_fingerprint = site.ca.fingerprint().unwrap();
    wrong.cluster = "c9".into();
    let error = join(&wrong, wrong.secret.reveal(), LONG).await.unwrap_err();
    assert!(
        matches!(
            &error,
            JoinError::Untrusted {
                error: CertError::WrongCluster { .. },
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(a.handler.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn addresses_where_nobody_answers_are_all_named() {
    let site = Site::new("c1");
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let token = token(&site, &["127.0.0.1:1".into(), silent.clone()]);
    let limit = Duration::from_millis(400);
    let error = join(&token, "x", limit).await.unwrap_err();
    let JoinError::Unreachable { tried } = &error else {
        panic!("{error}");
    };
    assert_eq!(tried.len(), 2);
    assert!(tried[0].starts_with("127.0.0.1:1: "), "{tried:?}");
    assert!(tried[1].starts_with(&silent), "{tried:?}");
}
