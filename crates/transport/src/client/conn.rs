//! One connection to one peer: opened, introduced (`hello`), used until it ends or fails, then never again.
//!
//! What always holds: a connection is handed out only after the peer's certificate, cluster and protocol were accepted by
//! both sides; it ends at the first call that times out on it. Calls under way on an ended connection run on to their own
//! deadlines, since their answers may still come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use super::http::{self, Lost, Reply, Sender, Tap};
use super::{CallError, Options, PeerAddr};
use crate::cert::CertInfo;
use crate::identity::Loaded;
use crate::socket;
use crate::tls::{self, Slot};
use crate::wire::{self, HELLO, Hello, ProtocolRange};

/// How long a server must be faster than its caller, so that its "too late" arrives while the caller still listens: then the
/// connection is known to be sound and is kept.
const DEADLINE_SLACK_MAX: Duration = Duration::from_millis(50);

/// Wakes a link's task.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    notify: Notify,
    ping: AtomicBool,
    nudge: AtomicBool,
}

impl Wake {
    pub(crate) fn ring(&self) {
        self.notify.notify_one();
    }

    /// Asks for a ping now: an answer is overdue.
    pub(crate) fn suspect(&self) {
        self.ping.store(true, Ordering::Relaxed);
        self.ring();
    }

    /// Says that the peer is alive: it has just connected to us.
    pub(crate) fn nudge(&self) {
        self.nudge.store(true, Ordering::Relaxed);
        self.ring();
    }

    pub(crate) async fn rung(&self) {
        self.notify.notified().await;
    }

    pub(crate) fn take_ping(&self) -> bool {
        self.ping.swap(false, Ordering::Relaxed)
    }

    pub(crate) fn take_nudge(&self) -> bool {
        self.nudge.swap(false, Ordering::Relaxed)
    }
}

/// A request, whichever way it goes.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) method: String,
    pub(crate) body: Bytes,
    /// The caller's whole timeout, for messages.
    pub(crate) timeout: Duration,
    pub(crate) deadline: Instant,
    pub(crate) route: Route,
}

impl Spec {
    pub(crate) fn timed_out(&self, node: u64) -> CallError {
        CallError::Timeout {
            node,
            method: self.method.clone(),
            after: self.timeout,
        }
    }
}

/// Which part of its way a request is on.
#[derive(Debug, Clone)]
pub(crate) enum Route {
    /// From its origin to its target.
    Direct,
    /// From its origin to a relay, for this target.
    ToRelay(u64),
    /// From a relay to its target.
    FromRelay(Origin),
}

/// For whom a relay passes a request on.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) node: u64,
    pub(crate) host: String,
    pub(crate) protocol: ProtocolRange,
}

/// Why a request on this connection has no answer.
#[derive(Debug)]
pub(crate) enum Failed {
    /// It was not sent.
    Unsent,
    /// It was, perhaps.
    Sent(CallError),
}

/// What is needed to open a connection.
pub(crate) struct Dial {
    pub(crate) loaded: Arc<Loaded>,
    pub(crate) node: u64,
    pub(crate) addr: PeerAddr,
    pub(crate) options: Arc<Options>,
    pub(crate) wake: Arc<Wake>,
    /// For all that follows the TCP connection.
    pub(crate) handshake_timeout: Duration,
}

/// A connection that was accepted by both sides.
#[derive(Debug)]
pub(crate) struct Conn {
    node: u64,
    send: Sender,
    cluster: String,
    protocol: ProtocolRange,
    pub(crate) hello: Hello,
    pub(crate) hello_rtt: Duration,
    pub(crate) opened: Instant,
    suspect_after: Duration,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    ended: OnceLock<(CallError, Instant)>,
    base: Instant,
    last_ok_us: AtomicU64,
    wake: Arc<Wake>,
}

impl State {
    fn end(&self, error: CallError, since: Instant) {
        if self.ended.set((error, since)).is_ok() {
            self.wake.ring();
        }
    }

    fn last_ok(&self) -> Instant {
        self.base + Duration::from_micros(self.last_ok_us.load(Ordering::Relaxed))
    }

    fn note_ok(&self) {
        let us = u64::try_from(self.base.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.last_ok_us.fetch_max(us, Ordering::Relaxed);
    }
}

impl Dial {
    /// Opens a connection: TCP, TLS, `hello`.
    pub(crate) async fn open(self) -> Result<Conn, CallError> {
        let node = self.node;
        let addr = self.addr.addr;
        let limit = self.options.connect_timeout;
        let stream = timeout(limit, TcpStream::connect(addr))
            .await
            .map_err(|_| {
                CallError::unreachable(node, format!("no answer from {addr} within {limit:?}"))
            })?
            .and_then(|stream| socket::prepare(&stream).map(|()| stream))
            .map_err(|e| CallError::unreachable(node, format!("connecting to {addr}: {e}")))?;
        let limit = self.handshake_timeout;
        timeout(limit, self.introduce(stream)).await.map_err(|_| {
            let reason = format!("{addr} accepts connections but says nothing for {limit:?}");
            CallError::unreachable(node, reason)
        })?
    }

    async fn introduce(self, stream: TcpStream) -> Result<Conn, CallError> {
        let node = self.node;
        let own = self.loaded.info().clone();
        let trust = |error| CallError::Tls { node, error };
        let (config, slot) = tls::peer_client(&self.loaded, node).map_err(trust)?;
        // The name is not compared (the node id is), and an address is sent to nobody.
        let name = ServerName::IpAddress(self.addr.addr.ip().into());
        let stream = TlsConnector::from(config)
            .connect(name, stream)
            .await
            .map_err(|e| match tls::reason_of(&e, &slot, Some(&own)) {
                Some(reason) => trust(reason),
                None => CallError::unreachable(node, format!("TLS with {}: {e}", self.addr.addr)),
            })?;
        let tap = Tap::new(stream, slot.clone(), Some(own.clone()));
        let (send, driver) = http::start(tap)
            .await
            .map_err(|e| CallError::unreachable(node, format!("HTTP/2: {e}")))?;
        let now = Instant::now();
        let state = Arc::new(State {
            ended: OnceLock::new(),
            base: now,
            last_ok_us: AtomicU64::new(0),
            wake: self.wake.clone(),
        });
        drive(node, driver, state.clone());
        self.say_hello(send, state, &own, &slot).await
    }

    async fn say_hello(
        self,
        mut send: Sender,
        state: Arc<State>,
        own: &CertInfo,
        slot: &Slot,
    ) -> Result<Conn, CallError> {
        let node = self.node;
        let asked = Instant::now();
        let spec = Spec {
            method: HELLO.to_owned(),
            body: Bytes::new(),
            timeout: self.handshake_timeout,
            deadline: asked + self.handshake_timeout,
            route: Route::Direct,
        };
        let request = build(&spec, &own.cluster, self.options.protocol)
            .map_err(|reason| CallError::unreachable(node, reason))?;
        let body = match http::exchange(&mut send, request).await {
            Ok(Reply::Ok(body)) => body,
            Ok(Reply::Fault(fault)) => {
                let ours = self.options.protocol;
                let limit = self.handshake_timeout;
                return Err(CallError::from_fault(
                    fault,
                    node,
                    HELLO,
                    limit,
                    ours,
                    &own.cluster,
                ));
            }
            Err(lost) => {
                return Err(match slot.take() {
                    Some(error) => CallError::Tls { node, error },
                    None => CallError::unreachable(node, format!("hello: {}", show_lost(lost))),
                });
            }
        };
        let hello: Hello = serde_json::from_slice(&body)
            .map_err(|e| CallError::unreachable(node, format!("hello is unreadable: {e}")))?;
        if self.options.protocol.common(hello.protocol).is_none() {
            return Err(CallError::VersionMismatch {
                node,
                ours: self.options.protocol,
                theirs: hello.protocol,
                version: hello.version,
            });
        }
        state.note_ok();
        Ok(Conn {
            node,
            send,
            cluster: own.cluster.clone(),
            protocol: self.options.protocol,
            hello,
            hello_rtt: asked.elapsed(),
            opened: asked,
            suspect_after: self.options.suspect_after,
            state,
        })
    }
}

fn drive<F>(node: u64, driver: F, state: Arc<State>)
where
    F: Future<Output = hyper::Result<()>> + Send + 'static,
{
    tokio::spawn(async move {
        let reason = match driver.await {
            Ok(()) => "the connection was closed".to_owned(),
            Err(error) => format!("the connection broke: {error}"),
        };
        state.end(CallError::unreachable(node, reason), Instant::now());
    });
}

impl Conn {
    /// Whether calls may still be sent on it.
    pub(crate) fn usable(&self) -> bool {
        self.state.ended.get().is_none() && !self.send.is_closed()
    }

    /// Why it ended, and since when the peer was not heard.
    pub(crate) fn end_reason(&self) -> (CallError, Instant) {
        self.state.ended.get().cloned().unwrap_or_else(|| {
            let error = CallError::unreachable(self.node, "the connection was closed");
            (error, Instant::now())
        })
    }

    /// Never uses it again.
    pub(crate) fn end(&self, error: CallError) {
        self.state.end(error, self.state.last_ok());
    }

    /// Sends a request and waits for the answer until its deadline.
    pub(crate) async fn call(&self, spec: &Spec) -> Result<Reply, Failed> {
        let request = build(spec, &self.cluster, self.protocol)
            .map_err(|reason| Failed::Sent(CallError::unreachable(self.node, reason)))?;
        let mut send = self.send.clone();
        let sent = Instant::now();
        let exchange = http::exchange(&mut send, request);
        tokio::pin!(exchange);
        let mut suspected = false;
        loop {
            tokio::select! {
                biased;
                reply = &mut exchange => return self.settle(spec, reply),
                () = sleep_until(spec.deadline) => {
                    let error = spec.timed_out(self.node);
                    self.end(error.clone());
                    return Err(Failed::Sent(error));
                }
                () = sleep_until(sent + self.suspect_after), if !suspected => {
                    suspected = true;
                    if self.state.last_ok() < sent {
                        self.state.wake.suspect();
                    }
                }
            }
        }
    }

    fn settle(&self, spec: &Spec, reply: Result<Reply, Lost>) -> Result<Reply, Failed> {
        let node = self.node;
        match reply {
            Ok(reply) => {
                self.state.note_ok();
                Ok(reply)
            }
            Err(Lost::Unsent(reason)) => {
                let error = CallError::unreachable(node, reason);
                self.state.end(error, Instant::now());
                Err(Failed::Unsent)
            }
            Err(Lost::Broken(reason)) => {
                let error = CallError::unreachable(node, reason);
                self.state.end(error.clone(), Instant::now());
                Err(Failed::Sent(error))
            }
            Err(lost) => {
                let message = format!("{} gave no answer: {}", spec.method, show_lost(lost));
                Err(Failed::Sent(CallError::Refused {
                    node,
                    code: 500,
                    message,
                }))
            }
        }
    }
}

fn show_lost(lost: Lost) -> String {
    match lost {
        Lost::Unsent(reason) | Lost::Broken(reason) => reason,
        Lost::Reset(reason) => format!("{reason}; the log of that host says why"),
        Lost::TooLarge => "its answer is larger than 64 MiB".to_owned(),
    }
}

fn build(
    spec: &Spec,
    cluster: &str,
    protocol: ProtocolRange,
) -> Result<Request<Full<Bytes>>, String> {
    let left = spec.deadline.saturating_duration_since(Instant::now());
    let for_server = left - (left / 10).min(DEADLINE_SLACK_MAX);
    let protocol = match &spec.route {
        Route::FromRelay(origin) => origin.protocol,
        _ => protocol,
    };
    let mut request = Request::post(format!("https://peer{}{}", wire::PEER_PATH, spec.method))
        .header(wire::H_CLUSTER, cluster)
        .header(wire::H_PROTOCOL, protocol.to_string())
        .header(wire::H_DEADLINE, for_server.as_millis().to_string());
    match &spec.route {
        Route::Direct => {}
        Route::ToRelay(target) => request = request.header(wire::H_RELAY_TO, target.to_string()),
        Route::FromRelay(origin) => {
            request = request
                .header(wire::H_ORIGIN, origin.node.to_string())
                .header(wire::H_ORIGIN_HOST, &origin.host);
        }
    }
    request
        .body(Full::new(spec.body.clone()))
        .map_err(|e| format!("the request cannot be written ({e})"))
}
