//! The API over a real socket, with a fake daemon behind it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Site, TWO, host, manifest, vm};
use futures_util::StreamExt as _;
use quorate_api::view::{
    Applied, Changed, ClusterView, Done, EventView, Explanation, HostView, JoinToken,
    MigrateRequest, TokenRequest, VmState, VmView,
};
use quorate_api::{ApiError, ClientError, ErrorCode, Limits};
use quorate_state::{Command, HostMode};
use quorate_types::{Millis, Revision};
use serde_json::json;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Longest that any wait of these tests may take.
const SOON: Duration = Duration::from_secs(10);

async fn site() -> Site {
    Site::start(Limits::default()).await
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ApiError {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn apply_creates_once_and_says_what_it_did() {
    let site = site().await;
    let applied = site.apply(TWO).await;
    let names: Vec<_> = applied.changes.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["app", "db"]);
    let again = site.apply(TWO).await;
    assert_eq!(again.changes, []);
    assert_eq!(again.revision, applied.revision);
    let view: ClusterView = site.client.get("/api/v1/cluster").await.unwrap();
    assert_eq!(view.cluster.revision, applied.revision);
    assert_eq!(view.vms[0].state, VmState::Starting);
    assert_eq!(site.fake.callers.lock().unwrap().as_slice(), ["alice@h1"]);
}

#[tokio::test]
async fn a_bad_manifest_changes_nothing_and_is_pointed_at() {
    let site = site().await;
    let text = TWO.replace("depends_on: [db]", "depends_on: [dbb], memroy: 1");
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/apply", &manifest(&text))
            .await,
    );
    assert_eq!(error.code, ErrorCode::InvalidManifest);
    assert!(error.message.contains("nothing was changed"));
    let diagnostics = error.diagnostics.unwrap();
    assert!(
        diagnostics.to_string().contains("--> test.yaml:4:"),
        "{diagnostics}"
    );
    let text = TWO.replace("[db]", "[dbb]");
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/diff", &manifest(&text))
            .await,
    );
    let said = error.diagnostics.unwrap().to_string();
    assert!(said.contains("did you mean `db`?"), "{said}");
    let view: ClusterView = site.client.get("/api/v1/cluster").await.unwrap();
    assert_eq!(view.vms, []);
}

#[tokio::test]
async fn a_change_in_between_is_retried_or_refused_as_asked() {
    let site = site().await;
    site.fake.stale.store(2, Ordering::SeqCst);
    let applied = site.apply(TWO).await;
    assert_eq!(applied.changes.len(), 2);
    let mut request = manifest(&TWO.replace("128MiB", "256MiB"));
    request.base = Some(Revision(1));
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/apply", &request)
            .await,
    );
    assert_eq!(error.code, ErrorCode::Stale);
    site.fake.stale.store(100, Ordering::SeqCst);
    request.base = None;
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/apply", &request)
            .await,
    );
    assert_eq!(error.code, ErrorCode::Stale);
    assert_eq!(
        site.fake.stale.load(Ordering::SeqCst),
        97,
        "retries are bounded"
    );
}

#[tokio::test]
async fn without_quorum_status_answers_and_changes_are_refused() {
    let site = site().await;
    site.apply(TWO).await;
    site.fake.quorate.store(false, Ordering::SeqCst);
    let view: ClusterView = site.client.get("/api/v1/cluster").await.unwrap();
    assert!(!view.cluster.quorate);
    assert!(view.cluster.problems[0].text.starts_with("no quorum"));
    assert_eq!(view.vms[0].state, VmState::Unknown);
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/apply", &manifest(TWO))
            .await,
    );
    assert_eq!(error.code, ErrorCode::NoQuorum);
    assert!(error.message.contains("no quorum"));
    let diff: Applied = site
        .client
        .post("/api/v1/manifest/diff", &manifest(TWO))
        .await
        .unwrap();
    assert_eq!(diff.changes, []);
    let metrics = site.client.text("/metrics").await.unwrap();
    assert!(metrics.contains("quorate_quorum 0"), "{metrics}");
}

#[tokio::test]
async fn vms_are_started_stopped_moved_and_deleted() {
    let site = site().await;
    site.apply(TWO).await;
    let client = &site.client;
    let stopped: Changed = client
        .post("/api/v1/vms/app/stop", &json!({"mode": "hard"}))
        .await
        .unwrap();
    assert_eq!(stopped.events[0].subject, "vm/app");
    let app: VmView = client.get("/api/v1/vms/app").await.unwrap();
    assert_eq!(app.state, VmState::Stopped);
    let error = refused(
        client
            .post::<Changed>("/api/v1/vms/app/migrate", &MigrateRequest::default())
            .await,
    );
    assert_eq!(error.code, ErrorCode::Conflict);
    let to = MigrateRequest {
        to: Some(host("h9")),
        accept_stops: false,
    };
    let error = refused(client.post::<Changed>("/api/v1/vms/app/migrate", &to).await);
    assert_eq!(error.code, ErrorCode::NotFound);
    let error = refused(client.delete::<Changed>("/api/v1/vms/db").await);
    assert!(error.message.contains("app depends on VM db"), "{error}");
    let _: Changed = client.delete("/api/v1/vms/app").await.unwrap();
    let app: VmView = client.get("/api/v1/vms/app").await.unwrap();
    assert_eq!(app.state, VmState::Deleting);
    let error = refused(client.get::<VmView>("/api/v1/vms/dbb").await);
    assert_eq!(
        (error.code, error.hint.as_deref()),
        (ErrorCode::NotFound, Some("did you mean `db`?"))
    );
    let error = refused(
        client
            .post::<Changed>("/api/v1/vms/NO..PE/start", &json!({}))
            .await,
    );
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_vm_is_explained() {
    let site = site().await;
    site.apply(TWO).await;
    let db: Explanation = site.client.get("/api/v1/vms/db/explain").await.unwrap();
    assert_eq!(db.needed_by, [vm("app")]);
    let app: Explanation = site.client.get("/api/v1/vms/app/explain").await.unwrap();
    assert_eq!(app.depends_on[0].vm, vm("db"));
    assert!(!app.depends_on[0].met);
    assert_eq!(app.events[0].text, "VM app created");
}

#[tokio::test]
async fn hosts_are_drained_resumed_and_removed() {
    let site = site().await;
    let client = &site.client;
    let _: Changed = client
        .post("/api/v1/hosts/h2/drain", &json!({}))
        .await
        .unwrap();
    let h2: HostView = client.get("/api/v1/hosts/h2").await.unwrap();
    assert_eq!(h2.mode, HostMode::Draining);
    let again: Changed = client
        .post("/api/v1/hosts/h2/drain", &json!({}))
        .await
        .unwrap();
    assert_eq!(again.events, []);
    let _: Changed = client
        .post("/api/v1/hosts/h2/resume", &json!({}))
        .await
        .unwrap();
    let error = refused(
        client
            .post::<Done>("/api/v1/hosts/h2/fence", &json!({}))
            .await,
    );
    assert_eq!(error.message, "h2 has no fence device");
    let done: Done = client
        .post("/api/v1/hosts/h2/confirm-dead", &json!({}))
        .await
        .unwrap();
    assert_eq!(done.text, "h2 is dead, says alice@h1");
    let _: Changed = client
        .post("/api/v1/hosts/h3/remove", &json!({}))
        .await
        .unwrap();
    let hosts: Vec<HostView> = client.get("/api/v1/hosts").await.unwrap();
    assert_eq!(hosts.len(), 2);
}

#[tokio::test]
async fn objects_in_use_stay() {
    let site = site().await;
    site.apply("networks: {lan: {bridge: br-lan}}\nvms: {db: {memory: 1GiB, boot: {kernel: {kernel: /k}}, nics: [{network: lan}]}}").await;
    let error = refused(site.client.delete::<Changed>("/api/v1/networks/lan").await);
    assert_eq!(error.code, ErrorCode::Conflict);
    let error = refused(site.client.delete::<Changed>("/api/v1/pools/lan").await);
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn tokens_have_a_bounded_life() {
    let site = site().await;
    let ttl = Millis::secs(60);
    let token: JoinToken = site
        .client
        .post(
            "/api/v1/tokens",
            &TokenRequest {
                ttl,
                witness: false,
            },
        )
        .await
        .unwrap();
    assert_eq!(token.token, "token");
    let request = json!({"ttl": "400d"});
    let error = refused(
        site.client
            .post::<JoinToken>("/api/v1/tokens", &request)
            .await,
    );
    assert_eq!(error.code, ErrorCode::BadRequest);
}

#[tokio::test]
async fn events_are_listed_followed_and_resumed() {
    let site = site().await;
    site.apply(TWO).await;
    let list: Vec<EventView> = site
        .client
        .get("/api/v1/events?subject=vm/db")
        .await
        .unwrap();
    assert_eq!(list.len(), 1);
    let newest: Vec<EventView> = site.client.get("/api/v1/events?limit=1").await.unwrap();
    let last = newest[0].sequence;
    let mut stream = site.client.events(last - 1).await.unwrap();
    let first = tokio::time::timeout(SOON, stream.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(first.sequence, last, "what was missed comes first");
    let _: Changed = site
        .client
        .post("/api/v1/vms/db/stop", &json!({}))
        .await
        .unwrap();
    let next = tokio::time::timeout(SOON, stream.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!((next.sequence, next.subject.as_str()), (last + 1, "vm/db"));
    drop(stream);
    let mut again = site.client.events(last).await.unwrap();
    let resumed = tokio::time::timeout(SOON, again.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(resumed, next);
}

/// A client that was away for longer than the log reaches is told so.
#[tokio::test]
async fn a_gap_is_told() {
    let site = site().await;
    site.apply(TWO).await;
    for _ in 0..600 {
        for mode in [HostMode::Draining, HostMode::Active] {
            let host = host("h2");
            site.fake
                .apply("test", Command::SetHostMode { host, mode })
                .unwrap();
        }
    }
    let text = raw(&site, "GET /api/v1/events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\nlast-event-id: 3\r\n\r\n", "event: gap").await;
    assert!(text.contains("data: 3"), "{text}");
}

/// Sends bytes and reads until the answer contains `until`.
async fn raw(site: &Site, request: &str, until: &str) -> String {
    let mut stream = tokio::net::UnixStream::connect(&site.socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let read = async {
        let mut buffer = vec![0; 4096];
        while !text.contains(until) {
            let n = stream.read(&mut buffer).await.unwrap();
            assert!(n > 0, "closed after: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    };
    tokio::time::timeout(SOON, read).await.unwrap();
    text
}

#[tokio::test]
async fn the_console_carries_both_directions() {
    let site = site().await;
    site.apply(TWO).await;
    let mut console = site.client.console("db").await.unwrap();
    let mut prompt = [0; 7];
    console.read_exact(&mut prompt).await.unwrap();
    assert_eq!(&prompt, b"login: ");
    console.write_all(b"root").await.unwrap();
    let mut echo = [0; 4];
    tokio::time::timeout(SOON, console.read_exact(&mut echo))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&echo, b"ROOT");
    match site.client.console("nope").await {
        Err(ClientError::Refused(error)) => assert_eq!(error.code, ErrorCode::NotFound),
        _ => panic!("a console of nothing"),
    }
    let error = refused(site.client.get::<Done>("/api/v1/vms/db/console").await);
    assert_eq!(error.code, ErrorCode::BadRequest);
}

#[tokio::test]
async fn logs_are_streamed() {
    let site = site().await;
    site.apply(TWO).await;
    let text = site
        .client
        .text("/api/v1/vms/db/logs?lines=7")
        .await
        .unwrap();
    assert_eq!(text, "7 lines\n");
    let mut stream = site
        .client
        .stream("/api/v1/vms/db/logs?lines=3&follow=true")
        .await
        .unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), "3 lines\n");
}

#[tokio::test]
async fn bodies_are_bounded_and_strict() {
    let site = site().await;
    let request = manifest(&"x".repeat(5 << 20));
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/apply", &request)
            .await,
    );
    assert_eq!(error.code, ErrorCode::TooLarge);
    let request = manifest(&"#".repeat(3 << 20));
    let error = refused(
        site.client
            .post::<Applied>("/api/v1/manifest/apply", &request)
            .await,
    );
    assert_eq!(error.code, ErrorCode::InvalidManifest);
    site.apply(TWO).await;
    let error = refused(
        site.client
            .post::<Changed>("/api/v1/vms/db/stop", &json!({"mood": 1}))
            .await,
    );
    assert_eq!(error.code, ErrorCode::BadRequest);
    let error = refused(site.client.get::<Done>("/api/v2/cluster").await);
    assert_eq!(error.code, ErrorCode::NotFound);
    let text = raw(
        &site,
        "PUT /api/v1/cluster HTTP/1.1\r\nhost: x\r\n\r\n",
        "bad_request",
    )
    .await;
    assert!(text.starts_with("HTTP/1.1 405"), "{text}");
    let text = raw(
        &site,
        "GET /api/v1/events?after=x HTTP/1.1\r\nhost: x\r\n\r\n",
        "\r\n\r\n",
    )
    .await;
    assert!(text.starts_with("HTTP/1.1 400"), "{text}");
}

#[tokio::test]
async fn too_many_streams_are_refused() {
    let limits = Limits {
        streams: 1,
        ..Limits::default()
    };
    let site = Site::start(limits).await;
    let first = site.client.events(0).await.unwrap();
    match site.client.events(0).await {
        Err(ClientError::Refused(error)) => assert_eq!(error.code, ErrorCode::Busy),
        _ => panic!("a second stream"),
    }
    drop(first);
    let deadline = tokio::time::Instant::now() + SOON;
    while site.client.events(0).await.is_err() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the place is never free again"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn metrics_tell_the_state() {
    let site = site().await;
    site.apply(TWO).await;
    let text = site.client.text("/metrics").await.unwrap();
    for line in [
        "quorate_quorum 1",
        "quorate_host_lease_left_milliseconds{name=\"h1\"} 1900",
        "quorate_vm_running{name=\"db\"} 0",
        "quorate_vms{state=\"starting\"} 2",
        "quorate_api_requests_total{method=\"POST\",route=\"/api/v1/manifest/apply\",status=\"200\"} 1",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    assert_eq!(text.matches("# EOF").count(), 1);
}

#[tokio::test]
async fn the_socket_is_private_and_secrets_stay_inside() {
    let site = site().await;
    let mode = std::fs::metadata(&site.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    for path in ["/api/v1/cluster", "/api/v1/events", "/metrics"] {
        let text = site.client.text(path).await.unwrap();
        assert!(!text.contains("secret-key"), "{path}");
    }
}

#[tokio::test]
async fn stopping_ends_streams_and_removes_the_socket() {
    let site = site().await;
    let mut stream = site.client.events(u64::MAX).await.unwrap();
    site.stop.send(true).unwrap();
    let end = tokio::time::timeout(SOON, stream.next()).await.unwrap();
    assert!(!matches!(end, Some(Ok(_))));
    tokio::time::timeout(SOON, site.server)
        .await
        .unwrap()
        .unwrap();
    assert!(!site.socket.exists());
    let error = site
        .client
        .get::<ClusterView>("/api/v1/cluster")
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }));
}

#[tokio::test]
async fn a_second_daemon_is_refused_and_a_dead_socket_replaced() {
    let site = site().await;
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let error = quorate_api::serve(axum::Router::new(), &site.socket, stopping.clone())
        .await
        .unwrap_err();
    assert!(
        matches!(error, quorate_api::ServeError::InUse(_)),
        "{error}"
    );
    let dir = tempfile::tempdir().unwrap();
    let dead = dir.path().join("api.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let path = dead.clone();
    let server =
        tokio::spawn(async move { quorate_api::serve(axum::Router::new(), &path, stopping).await });
    let deadline = tokio::time::Instant::now() + SOON;
    while tokio::net::UnixStream::connect(&dead).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.abort();
}

const POOL: &str = "
pools:
  san: {kind: iscsi, portals: [192.0.2.5], target: 'iqn.2026-01.com.example:san', chap: {user: q, secret: san-chap}}
";

#[tokio::test]
async fn secrets_go_in_and_never_come_out() {
    let site = site().await;
    let value = "open-sesame-42";
    let request = quorate_api::view::SecretRequest {
        value: value.into(),
    };
    assert!(!format!("{request:?}").contains(value));
    let path = "/api/v1/secrets/san-chap";
    let changed: quorate_api::view::Changed = site.client.post(path, &request).await.unwrap();
    assert_eq!(changed.events[0].text, "secret san-chap created");
    let again: quorate_api::view::Changed = site.client.post(path, &request).await.unwrap();
    assert!(again.events.is_empty());
    site.apply(POOL).await;
    let listed: Vec<quorate_api::view::SecretView> =
        site.client.get("/api/v1/secrets").await.unwrap();
    assert_eq!(listed[0].used_by, ["pool/san"]);
    let error = site.client.delete::<serde_json::Value>(path).await;
    assert!(error.unwrap_err().to_string().contains("pool san uses"));
    for path in [
        "/api/v1/cluster",
        "/api/v1/events",
        "/api/v1/secrets",
        "/api/v1/state",
        "/metrics",
    ] {
        let text = site.client.text(path).await.unwrap();
        assert!(!text.contains(value), "{path}");
    }
    // Wrong bodies are not quoted.
    for body in [
        serde_json::json!({ "valeu": value }),
        serde_json::json!({ "value": [value] }),
        serde_json::json!({ "value": format!("{value}\n") }),
        serde_json::json!({ "value": value.repeat(100) }),
        serde_json::json!(value),
    ] {
        let error = site.client.post::<serde_json::Value>(path, &body).await;
        let error = error.unwrap_err();
        let text = format!("{error:?} {error}");
        assert!(!text.contains(value), "{text}");
        assert!(
            matches!(error, ClientError::Refused(refused) if refused.code == ErrorCode::BadRequest)
        );
    }
    let gone = site
        .client
        .delete::<serde_json::Value>("/api/v1/secrets/san-chop")
        .await;
    assert!(
        matches!(gone, Err(ClientError::Refused(error)) if error.hint.as_deref() == Some("did you mean `san-chap`?"))
    );
}

#[tokio::test]
async fn a_job_on_an_image_is_made_watched_and_taken_back() {
    let site = site().await;
    site.apply("pools: {shared: {kind: directory, path: /srv}}")
        .await;
    let task = json!({ "op": "import", "file": "/a.qcow2", "to": "shared/a" });
    let jobs = "/api/v1/images/jobs";
    let job: quorate_types::ImageJob = site.client.post(jobs, &task).await.unwrap();
    assert_eq!((job.id.as_str(), job.by.as_str()), ("h1-0", "alice@h1"));
    let events = site
        .client
        .text(&format!("{jobs}/h1-0/events"))
        .await
        .unwrap();
    let done: Vec<u64> = events
        .lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data:")?.trim()).ok())
        .map(|job: quorate_types::ImageJob| job.done)
        .collect();
    assert_eq!(done, [50, 100], "{events}");
    let listed: Vec<quorate_types::ImageJob> = site.client.get(jobs).await.unwrap();
    assert_eq!(listed.len(), 1);
    let gone = refused(site.client.get::<Changed>(&format!("{jobs}/h1-9")).await);
    assert_eq!(gone.code, ErrorCode::NotFound);
    for bad in [
        json!({ "op": "import", "file": "/a", "to": "shared" }),
        json!({ "op": "burn", "image": "shared/a" }),
        json!({ "op": "delete", "image": "shared/a", "sure": true }),
    ] {
        let refused = refused(site.client.post::<Changed>(jobs, &bad).await);
        assert_eq!(refused.code, ErrorCode::BadRequest, "{bad}");
    }
    let unknown = json!({ "op": "delete", "image": "shaerd/a" });
    let refused = refused(site.client.post::<Changed>(jobs, &unknown).await);
    assert_eq!(refused.hint.as_deref(), Some("did you mean `shared`?"));
    let snapshots = "/api/v1/images/snapshots?image=shared/a";
    let listed: Vec<quorate_types::ImageSnapshot> = site.client.get(snapshots).await.unwrap();
    assert_eq!(listed[0].name, "before");
}
