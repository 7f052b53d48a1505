//! Who may talk to whom.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use common::raw::Raw;
use common::{Host, LONG, Site, eventually};
use quorate_transport::{
    CallError, CertError, Direct, Options, ProtocolRange, RefusalReason, ServerOptions, fingerprint,
};

/// Path, headers, expected status.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], u16);

/// The headers of a well-behaved peer.
fn peer_headers<'a>() -> Vec<(&'a str, &'a str)> {
    vec![("quorate-cluster", "c1"), ("quorate-protocol", "1-1")]
}

async fn refused(a: &Host, target: u64) -> CertError {
    match a.peers.call(target, "echo", "x", LONG).await {
        Err(CallError::Tls { error, .. }) => error,
        other => panic!("not refused by TLS: {other:?}"),
    }
}

#[tokio::test]
async fn members_know_each_other() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    a.knows(&[(1, a.addr), (2, b.addr)]);
    b.knows(&[(1, a.addr), (2, b.addr)]);
    assert_eq!(a.text(2, "who", LONG).await, "1 h1");
    assert_eq!(b.text(1, "who", LONG).await, "2 h2");
    assert_eq!(a.peers.links().len(), 1, "no link to oneself");
    let link = &a.peers.links()[&2];
    assert_eq!(link.direct, Direct::Up);
    assert!(link.rtt.is_some());
    let conflict = a.peers.call(2, "conflict", "", LONG).await;
    let message = "the revision has moved: read it again".to_owned();
    assert_eq!(
        conflict,
        Err(CallError::Refused {
            node: 2,
            code: 409,
            message
        })
    );
    let unknown = a.peers.call(9, "echo", "", LONG).await;
    assert!(matches!(
        unknown,
        Err(CallError::Unreachable { node: 9, .. })
    ));
}

#[tokio::test]
async fn another_cluster_is_refused_on_both_sides() {
    let (ours, theirs) = (Site::new("c1"), Site::new("c2"));
    let (a, b) = (ours.host(1).await, theirs.host(2).await);
    a.knows(&[(2, b.addr)]);
    let error = refused(&a, 2).await;
    assert_eq!(
        error,
        CertError::WrongCluster {
            host: "h2".into(),
            expected: "c1".into(),
            found: "c2".into()
        }
    );
    eventually("the server knows that it was refused", || {
        b.server()
            .refusals()
            .iter()
            .any(|r| r.reason == RefusalReason::Certificate(CertError::UnknownToPeer))
    })
    .await;
}

#[tokio::test]
async fn a_foreign_ca_with_the_same_cluster_id_is_refused() {
    let (ours, forged) = (Site::new("c1"), Site::new("c1"));
    let (a, b) = (ours.host(1).await, forged.host(2).await);
    a.knows(&[(2, b.addr)]);
    let foreign = |host: &str| CertError::ForeignCa {
        host: host.into(),
        cluster: "c1".into(),
    };
    assert_eq!(refused(&a, 2).await, foreign("h2"));

    // A client that does not mind the server still does not get in.
    let mut raw = Raw::connect(a.addr, Some(&forged.identity(3))).await;
    raw.post("/peer/v1/echo", &peer_headers(), "x")
        .await
        .unwrap_err();
    let reason = RefusalReason::Certificate(foreign("h3"));
    eventually("the refusal is listed", || {
        a.server().refusals().iter().any(|r| r.reason == reason)
    })
    .await;
    assert_eq!(a.handler.calls.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_expired_certificate_is_refused_in_both_directions() {
    let site = Site::new("c1");
    let old = Host::start(
        site.expired(1),
        Options::default(),
        ServerOptions::default(),
    )
    .await;
    let new = site.host(2).await;
    old.knows(&[(2, new.addr)]);
    new.knows(&[(1, old.addr)]);
    let not_after = old.credentials.info().not_after;

    let as_server = refused(&new, 1).await;
    let expired = CertError::Expired {
        host: "h1".into(),
        not_after,
    };
    assert_eq!(as_server, expired);
    assert!(as_server.to_string().contains("new token"), "{as_server}");

    let as_client = refused(&old, 2).await;
    let CertError::RefusedByPeer {
        alert,
        own_not_after,
    } = as_client
    else {
        panic!("{as_client:?}");
    };
    assert_eq!(
        (alert.as_str(), own_not_after),
        ("CertificateExpired", not_after)
    );
    let listed = new.server().refusals();
    assert!(
        listed
            .iter()
            .any(|r| r.reason == RefusalReason::Certificate(expired.clone())),
        "{listed:?}"
    );
}

#[tokio::test]
async fn another_node_at_the_address_is_seen() {
    let site = Site::new("c1");
    let (a, b, c) = (site.host(1).await, site.host(2).await, site.host(3).await);
    a.knows(&[(2, c.addr), (3, b.addr)]);
    let swapped = CertError::WrongNode {
        expected: 2,
        found: 3,
        host: "h3".into(),
    };
    assert_eq!(refused(&a, 2).await, swapped);
    // Corrected, it works at once.
    a.knows(&[(2, b.addr), (3, c.addr)]);
    assert_eq!(a.text(2, "who", LONG).await, "1 h1");
}

#[tokio::test]
async fn no_common_protocol_version_is_a_typed_error_on_both_sides() {
    let site = Site::new("c1");
    let a = site.host(1).await;
    let theirs = ProtocolRange { min: 2, max: 3 };
    let options = ServerOptions {
        protocol: theirs,
        version: "9.9.9".into(),
        ..ServerOptions::default()
    };
    let b = Host::start(site.identity(2), Options::default(), options).await;
    a.knows(&[(2, b.addr)]);
    let error = a.peers.call(2, "echo", "x", LONG).await.unwrap_err();
    let ours = ProtocolRange { min: 1, max: 1 };
    assert_eq!(
        error,
        CallError::VersionMismatch {
            node: 2,
            ours,
            theirs,
            version: "9.9.9".into()
        }
    );
    let refusal = b.server().refusals().pop().unwrap().reason;
    assert_eq!(
        refusal,
        RefusalReason::Version {
            host: "h1".into(),
            ours: theirs,
            theirs: "1-1".into()
        }
    );
}

#[tokio::test]
async fn a_removed_node_is_refused_although_its_certificate_is_valid() {
    let site = Site::new("c1");
    let (a, b) = (site.host(1).await, site.host(2).await);
    a.knows(&[(2, b.addr)]);
    assert_eq!(a.text(2, "who", LONG).await, "1 h1");
    b.server().set_removed(BTreeSet::from([1]));
    let error = a.peers.call(2, "echo", "x", LONG).await.unwrap_err();
    assert!(
        matches!(error, CallError::Refused { code: 403, .. }),
        "{error}"
    );
    eventually("the link is seen as down", || {
        matches!(a.peers.links()[&2].direct, Direct::Down { .. })
    })
    .await;
    b.server().set_removed(BTreeSet::new());
    eventually("the link is up again", || {
        a.peers.links()[&2].direct == Direct::Up
    })
    .await;
}

#[tokio::test]
async fn headers_are_checked_for_each_request() {
    let site = Site::new("c1");
    let a = site.host(1).await;
    let mut raw = Raw::connect(a.addr, Some(&site.identity(2))).await;
    let (status, body) = raw.post("/peer/v1/who", &peer_headers(), "").await.unwrap();
    assert_eq!((status, body.as_str()), (200, "2 h2"));
    let cases: [Case<'_>; 8] = [
        ("/peer/v1/who", &[("quorate-protocol", "1-1")], 421),
        (
            "/peer/v1/who",
            &[("quorate-cluster", "c2"), ("quorate-protocol", "1-1")],
            421,
        ),
        ("/peer/v1/who", &[("quorate-cluster", "c1")], 426),
        (
            "/peer/v1/who",
            &[("quorate-cluster", "c1"), ("quorate-protocol", "7-9")],
            426,
        ),
        ("/elsewhere", &[], 404),
        ("/peer/v1/UPPER", &[], 404),
        // A loop cannot be asked for.
        (
            "/peer/v1/who",
            &[
                ("quorate-cluster", "c1"),
                ("quorate-protocol", "1-1"),
                ("quorate-relay-to", "3"),
                ("quorate-origin", "2"),
            ],
            400,
        ),
        (
            "/peer/v1/who",
            &[
                ("quorate-cluster", "c1"),
                ("quorate-protocol", "1-1"),
                ("quorate-relay-to", "1"),
            ],
            400,
        ),
    ];
    for (path, headers, expected) in cases {
        let (status, body) = raw.post(path, headers, "").await.unwrap();
        assert_eq!(status, expected, "{path} {headers:?}: {body}");
    }
}

#[tokio::test]
async fn certificates_are_swapped_under_way() {
    // A busy machine may take longer for the swap than the old certificates live: then it was none under way.
    for seconds in [3, 30, 300] {
        if swapped_within(Duration::from_secs(seconds)).await {
            return;
        }
    }
    panic!("never swapped in time");
}

/// Whether the certificates were swapped within their life; if so, all that follows from it holds.
async fn swapped_within(life: Duration) -> bool {
    let site = Site::new("c1");
    let now = SystemTime::now();
    let late = || SystemTime::now() > now + life - Duration::from_secs(1);
    let short = |node| site.identity_until(node, now, life);
    let (client, server) = (Options::default(), ServerOptions::default());
    let a = Host::start(short(1), client.clone(), server.clone()).await;
    let b = Host::start(short(2), client.clone(), server.clone()).await;
    let stale = Host::start(short(3), client, server).await;
    a.knows(&[(2, b.addr)]);
    stale.knows(&[(2, b.addr)]);
    let first = a.peers.call(2, "who", "", LONG).await;
    let third = stale.peers.call(2, "who", "", LONG).await;
    if late() {
        return false;
    }
    assert_eq!(&first.unwrap()[..], b"1 h1");
    assert_eq!(&third.unwrap()[..], b"3 h3");

    a.credentials.replace(site.identity(1)).unwrap();
    let renewed = site.identity(2);
    b.credentials.replace(renewed.clone()).unwrap();
    if late() {
        return false;
    }
    let raw = Raw::connect(b.addr, None).await;
    assert_eq!(fingerprint(&raw.server_cert), renewed.info().fingerprint);

    // Not one call fails, also past the end of the old certificates; who did not renew is out, on an open connection too.
    let end = now + life + Duration::from_millis(1200);
    while SystemTime::now() < end {
        assert_eq!(a.text(2, "who", LONG).await, "1 h1");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let error = stale.peers.call(2, "who", "", LONG).await.unwrap_err();
    assert!(
        matches!(
            error,
            CallError::Refused { code: 401, .. }
                | CallError::Tls {
                    error: CertError::RefusedByPeer { .. },
                    ..
                }
        ),
        "{error}"
    );
    true
}
