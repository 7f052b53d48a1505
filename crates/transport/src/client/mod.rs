//! Calls to peers: the address book, the choice between the direct way and a relay, the state of the links.
//!
//! What always holds: a call ends by its timeout; a call whose request was perhaps sent is not sent again on the direct way
//! (a relayed one may reach the target twice); certificate and version faults are reported at once and not worked round.

mod conn;
mod error;
pub(crate) mod http;
mod link;
mod relay;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

pub(crate) use conn::{Origin, Route, Spec};
pub use error::CallError;

use crate::identity::Credentials;
use crate::wire::{Fault, MAX_BODY, PROTOCOL, ProtocolRange, valid_method};
use conn::Failed;
use http::Reply;
use link::{Keeper, Link, View};

/// A relay is asked again after this, while a call still waits.
const RELAY_AGAIN: Duration = Duration::from_millis(250);
/// This many failed calls in a row make a call use a relay without further waiting.
const RELAY_AFTER_FAILURES: u32 = 2;

/// Where a peer listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddr {
    /// Host name, for messages.
    pub host: String,
    /// Address of its cluster port.
    pub addr: SocketAddr,
}

/// Versions and timing of the client side. The defaults fit a lease of 1 to 2 seconds.
#[derive(Debug, Clone)]
pub struct Options {
    /// Protocol versions this host speaks.
    pub protocol: ProtocolRange,
    /// Limit of a TCP connection attempt, and of a TLS handshake with `hello`. Below 1 s, the kernel's SYN repetition.
    pub connect_timeout: Duration,
    /// A link that is down tries again this often.
    pub attempt_interval: Duration,
    /// A link that is up is pinged this often.
    pub probe_interval: Duration,
    /// A ping without an answer for this long ends the connection.
    pub ping_timeout: Duration,
    /// A call without an answer for this long (and a connection without any) leads to a ping.
    pub suspect_after: Duration,
    /// Calls go through a relay when a link has been down for this long.
    pub relay_after: Duration,
    /// A second relay is asked after this.
    pub relay_stagger: Duration,
    /// A connection is replaced by a new one at this age, so that certificates are checked again.
    pub reconnect_every: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            protocol: PROTOCOL,
            connect_timeout: Duration::from_millis(500),
            attempt_interval: Duration::from_millis(200),
            probe_interval: Duration::from_millis(500),
            ping_timeout: Duration::from_millis(400),
            suspect_after: Duration::from_millis(200),
            relay_after: Duration::from_millis(300),
            relay_stagger: Duration::from_millis(150),
            reconnect_every: Duration::from_secs(3600),
        }
    }
}

/// The direct way to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Direct {
    /// It works.
    Up,
    /// It does not.
    Down {
        /// The peer was not heard since.
        since: SystemTime,
        /// What was seen last, and what to do.
        last_error: String,
    },
}

/// How a peer is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkState {
    /// The direct way.
    pub direct: Direct,
    /// The relay in use while the direct way is down, if one reaches the peer.
    pub relayed_by: Option<u64>,
    /// Round trip of the last ping on the direct way.
    pub rtt: Option<Duration>,
}

/// The peers of this host. Cheap to clone; the connections close when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    credentials: Arc<Credentials>,
    options: Arc<Options>,
    links: RwLock<BTreeMap<u64, (Arc<Link>, Keeper)>>,
}

impl Peers {
    /// Peers of the host whose credentials these are. The address book is empty.
    #[must_use]
    pub fn new(credentials: Arc<Credentials>, options: Options) -> Self {
        Self {
            inner: Arc::new(Inner {
                credentials,
                options: Arc::new(options),
                links: RwLock::default(),
            }),
        }
    }

    /// Replaces the address book. Links to peers that stay where they are go on undisturbed; this host's own entry is ignored.
    /// Must be called in a tokio runtime: each link has a task.
    pub fn set_peers(&self, peers: BTreeMap<u64, PeerAddr>) {
        let inner = &self.inner;
        let own = inner.credentials.loaded().info().node;
        let mut links = inner.links.write().unwrap_or_else(PoisonError::into_inner);
        links.retain(|node, _| peers.contains_key(node));
        for (node, addr) in peers {
            if node == own {
                continue;
            }
            match links.get(&node) {
                Some((_, keeper)) => keeper.set_addr(addr),
                None => {
                    let (link, keeper) = Link::start(
                        node,
                        addr,
                        inner.credentials.clone(),
                        inner.options.clone(),
                        Arc::downgrade(inner),
                    );
                    links.insert(node, (Arc::new(link), keeper));
                }
            }
        }
    }

    /// Calls a method of a peer: directly if that works, else through a relay, else waiting for a connection, all within
    /// `timeout`.
    ///
    /// # Errors
    /// [`CallError`]. After `Timeout`, and `Unreachable` while under way, the method may have been executed.
    pub async fn call(
        &self,
        target: u64,
        method: &str,
        body: impl Into<Bytes>,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let body = body.into();
        let refuse = |code, message: String| CallError::Refused {
            node: target,
            code,
            message,
        };
        if !valid_method(method) {
            return Err(refuse(400, format!("{method:?} is not a method name")));
        }
        if body.len() > MAX_BODY {
            let message = format!("{method}: a body of {} bytes is over 64 MiB", body.len());
            return Err(refuse(413, message));
        }
        let spec = Spec {
            method: method.to_owned(),
            body,
            timeout,
            deadline: Instant::now() + timeout,
            route: Route::Direct,
        };
        let link = self.inner.link(target)?;
        self.inner.route(&link, &spec).await
    }

    /// How each peer is reached now. Kept true by pings, also without calls.
    #[must_use]
    pub fn links(&self) -> BTreeMap<u64, LinkState> {
        let links = self.inner.links();
        links.iter().map(|l| (l.node, l.state())).collect()
    }

    /// Takes note that a peer is alive, for instance because it has just called: a link that is down tries at once.
    pub fn nudge(&self, node: u64) {
        if let Ok(link) = self.inner.link(node) {
            link.wake.nudge();
        }
    }

    pub(crate) async fn forward(
        &self,
        target: u64,
        origin: Origin,
        spec: Spec,
    ) -> Result<Bytes, Fault> {
        self.inner.forward(target, origin, spec).await
    }
}

impl Inner {
    /// The links as they are now.
    fn links(&self) -> Vec<Arc<Link>> {
        let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
        links.values().map(|(link, _)| link.clone()).collect()
    }

    fn link(&self, target: u64) -> Result<Arc<Link>, CallError> {
        let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
        let found = links.get(&target).map(|(link, _)| link.clone());
        found.ok_or_else(|| {
            CallError::unreachable(target, "it is not in the address book of this host")
        })
    }

    fn fault(&self, fault: Fault, node: u64, spec: &Spec) -> CallError {
        let loaded = self.credentials.loaded();
        let (ours, cluster) = (self.options.protocol, &loaded.info().cluster);
        CallError::from_fault(fault, node, &spec.method, spec.timeout, ours, cluster)
    }

    async fn route(&self, link: &Link, spec: &Spec) -> Result<Bytes, CallError> {
        let mut view = link.view.clone();
        loop {
            if Instant::now() >= spec.deadline {
                return Err(self.gave_up(link));
            }
            let seen = view.borrow_and_update().clone();
            let mut again = Instant::now() + RELAY_AGAIN;
            match seen {
                View::Up(conn) if conn.usable() => {
                    if let Some(result) = self.direct(link, &conn, spec).await {
                        return result;
                    }
                }
                View::Down(down) if down.error.needs_a_person() => return Err(down.error),
                View::Down(down) => {
                    let after = down.since + self.options.relay_after;
                    let failures = link.health.failures.load(Ordering::Relaxed);
                    if failures >= RELAY_AFTER_FAILURES || Instant::now() >= after {
                        if let Some(result) = self.relay(link.node, &link.health, spec).await {
                            return result;
                        }
                        again = Instant::now() + RELAY_AGAIN;
                    } else {
                        again = after;
                    }
                }
                // It has ended; the link's task is about to say so.
                View::Up(_) => {}
            }
            tokio::select! {
                changed = view.changed() => if changed.is_err() {
                    let reason = "it was removed from the address book of this host";
                    return Err(CallError::unreachable(link.node, reason));
                },
                () = sleep_until(again.min(spec.deadline)) => {}
            }
        }
    }

    /// `None`: nothing was sent, another way may be tried.
    async fn direct(
        &self,
        link: &Link,
        conn: &conn::Conn,
        spec: &Spec,
    ) -> Option<Result<Bytes, CallError>> {
        let failures = &link.health.failures;
        match conn.call(spec).await {
            Ok(reply) => {
                failures.store(0, Ordering::Relaxed);
                Some(match reply {
                    Reply::Ok(body) => Ok(body),
                    Reply::Fault(fault) => Err(self.fault(fault, link.node, spec)),
                })
            }
            Err(Failed::Unsent) => {
                failures.fetch_add(1, Ordering::Relaxed);
                None
            }
            Err(Failed::Sent(error)) => {
                failures.fetch_add(1, Ordering::Relaxed);
                Some(Err(error))
            }
        }
    }

    fn gave_up(&self, link: &Link) -> CallError {
        link.health.failures.fetch_add(1, Ordering::Relaxed);
        match &*link.view.borrow() {
            View::Down(down) => match &down.error {
                // Why the link went down, not what became of this call.
                CallError::Timeout { .. } | CallError::Refused { .. } => {
                    CallError::unreachable(link.node, down.error.to_string())
                }
                other => other.clone(),
            },
            View::Up(_) => CallError::unreachable(link.node, "its connection has just ended"),
        }
    }
}
