//! The listener for peers: TLS, HTTP/2, who may call what, within which bounds.
//!
//! What always holds: the handler sees a peer's request only after certificate, cluster, protocol and membership were
//! checked *for that request* (a connection outlives a certificate); a caller without a certificate reaches `/join/v1` only,
//! over few, short-lived connections and with small bodies; the handler's future is dropped at the deadline, and when the
//! caller goes away, so work that must go on belongs into a task of its own.
//!
//! `hello`, `ping` and relaying are answered here and never wait behind the handler's requests.

mod handle;
mod refusal;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;

pub use refusal::{Refusal, RefusalReason};

use crate::cert::{CertError, CertInfo};
use crate::client::Peers;
use crate::identity::Credentials;
use crate::wire::{Hello, MAX_BODY, PROTOCOL, ProtocolRange, RpcStatus};
use crate::{socket, tls};
use refusal::Refusals;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: usize = 512;
/// Connections without a certificate: few, and not for long.
const MAX_ANONYMOUS: usize = 16;
const ANONYMOUS_LIFE: Duration = Duration::from_secs(120);
const MAX_STREAMS: u32 = 256;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failed `accept` (no file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bodies held at once, in units of [`BODY_UNIT`] bytes.
const BODY_BUDGET: usize = 4 * MAX_BODY / BODY_UNIT;
pub(crate) const BODY_UNIT: usize = 1024;

/// Who sent a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A host of this cluster.
    Peer {
        /// Its node id.
        node: u64,
        /// Its host name.
        host: String,
    },
    /// Someone without a certificate, on the join route.
    Anonymous,
}

/// A request for the handler.
#[derive(Debug, Clone)]
pub struct Request {
    /// Who sent it.
    pub from: Caller,
    /// The host that passed it on, if it did not come directly: `from` is then what that host says. Refuse such a request
    /// where the caller's identity decides, as in the renewal of its certificate.
    pub via: Option<u64>,
    /// The method; `join` for the join route.
    pub method: String,
    /// The body.
    pub body: Bytes,
    /// The caller listens until then; the handler is dropped then.
    pub deadline: Instant,
}

/// What answers requests.
#[async_trait::async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers a request. Dropped at the deadline or when the caller goes away.
    async fn handle(&self, request: Request) -> Result<Bytes, RpcStatus>;
}

/// Bounds of the server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Protocol versions this host speaks.
    pub protocol: ProtocolRange,
    /// Software version, shown to peers.
    pub version: String,
    /// Largest body of a request, in bytes; at most [`MAX_BODY`].
    pub max_body: usize,
    /// Requests in the handler at once; others wait for their turn until their deadline.
    pub max_requests: usize,
    /// For a request that names no deadline.
    pub default_deadline: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            max_body: MAX_BODY,
            max_requests: 256,
            default_deadline: Duration::from_secs(30),
        }
    }
}

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be used.
    #[error(
        "cannot listen on {addr}: choose an address of this host and a port that no other program uses"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
}

/// A running listener. Stops when dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on `addr`. Requests to be relayed go out through `peers`.
    ///
    /// # Errors
    /// [`ServerError::Bind`].
    pub async fn bind(
        addr: SocketAddr,
        credentials: Arc<Credentials>,
        peers: Peers,
        handler: Arc<dyn Handler>,
        options: ServerOptions,
    ) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            requests: Semaphore::new(options.max_requests),
            relays: Semaphore::new(options.max_requests),
            bodies: Arc::new(Semaphore::new(BODY_BUDGET)),
            anonymous: Arc::new(Semaphore::new(MAX_ANONYMOUS)),
            removed: RwLock::default(),
            refusals: Refusals::default(),
            credentials,
            peers,
            handler,
            options,
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        tracing::info!(addr = %local, "listening for peers");
        Ok(Self {
            addr: local,
            shared,
            task,
        })
    }

    /// The address it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Nodes that were removed from the cluster: refused, although their certificates are still valid.
    pub fn set_removed(&self, nodes: BTreeSet<u64>) {
        let mut removed = self
            .shared
            .removed
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *removed = Arc::new(nodes);
    }

    /// The last callers that were refused, oldest first, and why.
    #[must_use]
    pub fn refusals(&self) -> Vec<Refusal> {
        self.shared.refusals.list()
    }

    /// Stops listening and closes every connection.
    pub async fn shutdown(mut self) {
        self.task.abort();
        // It ends by the abort: nothing to learn from the result.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    credentials: Arc<Credentials>,
    peers: Peers,
    handler: Arc<dyn Handler>,
    options: ServerOptions,
    requests: Semaphore,
    relays: Semaphore,
    bodies: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
    removed: RwLock<Arc<BTreeSet<u64>>>,
    refusals: Refusals,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn hello(&self) -> Hello {
        let info = self.credentials.info();
        Hello {
            cluster_id: info.cluster,
            node: info.node,
            host: info.host,
            protocol: self.options.protocol,
            version: self.options.version.clone(),
        }
    }

    fn is_removed(&self, node: u64) -> bool {
        self.removed
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&node)
    }
}

/// Who is at the other end of one connection.
struct Remote {
    addr: SocketAddr,
    /// `None`: no certificate.
    cert: Option<CertInfo>,
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Owns the connections: they end with this task.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, addr)) if connections.len() < MAX_CONNECTIONS => {
                    connections.spawn(serve(stream, addr, shared.clone()));
                }
                Ok((_, addr)) => tracing::warn!(%addr, "too many connections, one is turned away"),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(done) = connections.join_next() => {
                if let Err(error) = done {
                    tracing::error!(%error, "a connection's task failed");
                }
            }
        }
    }
}

async fn serve(stream: TcpStream, addr: SocketAddr, shared: Arc<Shared>) {
    match timeout(HANDSHAKE_TIMEOUT, handshake(stream, addr, &shared)).await {
        Err(_) => tracing::debug!(%addr, "no TLS handshake in time"),
        Ok(Err(reason)) => {
            shared
                .refusals
                .add(addr, RefusalReason::Certificate(reason));
        }
        Ok(Ok(None)) => {}
        Ok(Ok(Some((stream, cert)))) => {
            let remote = Arc::new(Remote { addr, cert });
            match &remote.cert {
                Some(cert) => {
                    shared.peers.nudge(cert.node);
                    http(stream, remote.clone(), shared).await;
                }
                None => {
                    let Ok(_place) = shared.anonymous.clone().try_acquire_owned() else {
                        shared.refusals.add(addr, RefusalReason::TooManyAnonymous);
                        return;
                    };
                    // A join is short: whoever stays longer is cut off, which is no error here.
                    let _ = timeout(ANONYMOUS_LIFE, http(stream, remote.clone(), shared)).await;
                }
            }
        }
    }
}

type Stream = tokio_rustls::server::TlsStream<TcpStream>;

/// `None`: the other side went away, or speaks no TLS.
async fn handshake(
    stream: TcpStream,
    addr: SocketAddr,
    shared: &Shared,
) -> Result<Option<(Stream, Option<CertInfo>)>, CertError> {
    if let Err(error) = socket::prepare(&stream) {
        tracing::debug!(%addr, %error, "connection is gone");
        return Ok(None);
    }
    let loaded = shared.credentials.loaded();
    let (config, slot) = tls::server(&loaded)?;
    let stream = match TlsAcceptor::from(config).accept(stream).await {
        Ok(stream) => stream,
        Err(error) => {
            return match tls::reason_of(&error, &slot, Some(loaded.info())) {
                Some(reason) => Err(reason),
                None => {
                    tracing::debug!(%addr, %error, "no TLS handshake");
                    Ok(None)
                }
            };
        }
    };
    let chain = stream.get_ref().1.peer_certificates();
    let cert = match chain.and_then(<[_]>::first) {
        Some(der) => Some(CertInfo::from_der(der)?),
        None => None,
    };
    Ok(Some((stream, cert)))
}

async fn http(stream: Stream, remote: Arc<Remote>, shared: Arc<Shared>) {
    let addr = remote.addr;
    let service = service_fn(move |request| {
        let (remote, shared) = (remote.clone(), shared.clone());
        async move { Ok::<_, std::convert::Infallible>(shared.answer(&remote, request).await) }
    });
    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%addr, %error, "connection ended");
    }
}

/// Whether a peer's certificate is still valid now.
fn still_valid(cert: &CertInfo) -> Result<(), CertError> {
    cert.check_time(SystemTime::now())
}
