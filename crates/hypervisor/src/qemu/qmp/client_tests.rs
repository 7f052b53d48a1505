//! The client against a scripted QEMU.
#![allow(clippy::unwrap_used)]

use tokio::net::UnixListener;

use super::*;

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":2,"minor":0,"major":10},"package":"Debian"},"capabilities":["oob","new-thing"]}}"#;
const LONG: Duration = Duration::from_secs(5);

struct Peer {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Peer {
    async fn request(&mut self) -> Value {
        let mut line = Vec::new();
        assert!(
            read_line(&mut self.read, &mut line).await.unwrap(),
            "the client hung up"
        );
        serde_json::from_slice(&line).unwrap()
    }

    async fn say(&mut self, line: &str) {
        self.write
            .write_all(format!("{line}\r\n").as_bytes())
            .await
            .unwrap();
    }
}

async fn pair() -> (QmpClient, Peer, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let serve = async {
        let (read, write) = listener.accept().await.unwrap().0.into_split();
        let mut peer = Peer {
            read: BufReader::new(read),
            write,
        };
        peer.say(GREETING).await;
        let request = peer.request().await;
        assert_eq!(request["execute"], "qmp_capabilities");
        peer.say(&json!({ "return": {}, "id": request["id"] }).to_string())
            .await;
        peer
    };
    let (client, peer) = tokio::join!(QmpClient::connect(&path, LONG), serve);
    (client.unwrap(), peer, dir)
}

#[tokio::test]
async fn greets_once_and_keeps_the_version() {
    let (client, _peer, _dir) = pair().await;
    assert_eq!(client.greeting().version, (10, 0, 2));
    assert_eq!(client.greeting().package, "Debian");
}

#[tokio::test]
async fn answers_find_their_callers_out_of_order() {
    let (client, mut peer, _dir) = pair().await;
    let serve = async {
        let first = peer.request().await;
        let second = peer.request().await;
        for request in [&second, &first] {
            let reply = json!({ "return": request["execute"], "id": request["id"] });
            peer.say(&reply.to_string()).await;
        }
    };
    let (a, b, ()) = tokio::join!(
        client.execute("a", Value::Null, LONG),
        client.execute("b", json!({ "x": 1 }), LONG),
        serve
    );
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn nothing_unknown_kills_the_client() {
    let (client, mut peer, _dir) = pair().await;
    let mut events = client.events();
    peer.say(r#"{"event":"FROM_THE_FUTURE","data":{"deep":[1,{"x":null}]},"timestamp":{"seconds":-1,"microseconds":-1}}"#).await;
    peer.say("this is not JSON").await;
    peer.say("[1,2,3]").await;
    peer.say(r#"{"return":{},"id":987654}"#).await;
    peer.say(r#"{"return":{},"id":"text"}"#).await;
    peer.say(r#"{"event":"STOP","timestamp":{"seconds":2,"microseconds":7}}"#)
        .await;
    let strange = events.recv().await.unwrap();
    assert_eq!(
        (strange.name.as_str(), strange.at_us),
        ("FROM_THE_FUTURE", 0)
    );
    assert_eq!(
        events.recv().await.unwrap(),
        QmpEvent {
            name: "STOP".into(),
            data: Value::Null,
            at_us: 2_000_007,
        }
    );
    let serve = async {
        let request = peer.request().await;
        let reply = json!({ "error": { "class": "NewClass", "desc": "no" }, "id": request["id"] });
        peer.say(&reply.to_string()).await;
    };
    let (result, ()) = tokio::join!(client.execute("x", Value::Null, LONG), serve);
    assert!(
        matches!(&result, Err(QmpError::Refused { class, desc, .. }) if class == "NewClass" && desc == "no"),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_lost_connection_fails_all_that_wait() {
    let (client, mut peer, _dir) = pair().await;
    let serve = async {
        peer.request().await;
        peer.request().await;
        drop(peer);
    };
    let (a, b, ()) = tokio::join!(
        client.execute("a", Value::Null, LONG),
        client.execute("b", Value::Null, LONG),
        serve
    );
    assert!(matches!(a, Err(QmpError::Closed { .. })), "{a:?}");
    assert!(matches!(b, Err(QmpError::Closed { .. })), "{b:?}");
    client.closed().await;
    let late = client.execute("c", Value::Null, LONG).await;
    assert!(matches!(late, Err(QmpError::Closed { .. })), "{late:?}");
}

#[tokio::test]
async fn a_deadline_ends_the_wait_and_frees_the_slot() {
    let (client, mut peer, _dir) = pair().await;
    for _ in 0..PENDING_MAX + 1 {
        let result = client
            .execute("slow", Value::Null, Duration::from_millis(1))
            .await;
        assert!(
            matches!(result, Err(QmpError::Timeout { after_ms: 1, .. })),
            "{result:?}"
        );
        peer.request().await;
    }
    assert_eq!(lock(&client.inner.calls).waiting.len(), 0);
}

#[tokio::test]
async fn commands_in_flight_are_bounded() {
    let (client, _peer, _dir) = pair().await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..PENDING_MAX {
        let client = client.clone();
        tasks.spawn(async move { client.execute("slow", Value::Null, LONG).await });
    }
    while lock(&client.inner.calls).waiting.len() < PENDING_MAX {
        tokio::task::yield_now().await;
    }
    let result = client.execute("one-more", Value::Null, LONG).await;
    assert!(matches!(result, Err(QmpError::Busy { .. })), "{result:?}");
}

#[tokio::test]
async fn a_silent_server_is_an_error_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let error = QmpClient::connect(&path, Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("another client may hold the socket"),
        "{error}"
    );
}

#[tokio::test]
async fn dropping_the_last_clone_closes_the_connection() {
    let (client, mut peer, _dir) = pair().await;
    drop(client);
    let mut line = Vec::new();
    let read = tokio::time::timeout(LONG, read_line(&mut peer.read, &mut line))
        .await
        .unwrap();
    assert!(!read.unwrap());
}
