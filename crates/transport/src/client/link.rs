//! The link to one peer: one task that keeps one good connection, or tries to get one.
//!
//! ```text
//!            attempt succeeds                      a call or ping times out,
//!   Down ------------------------> Up ------------ the connection breaks -----> Down
//!    |  attempts every 200 ms, at   |  ping every 500 ms, or 200 ms after
//!    |  most 3 at once, first wins  |  an answer is overdue
//!    |  (every 1 s after 30 s, or   |  a newer connection replaces it after
//!    |  when a person must act)     |  an hour or a change of certificate
//!    '-- ping through relays --'
//! ```
//!
//! Why several short attempts: a SYN lost in an outage is repeated by the kernel after 1 s, then 2 s; a fresh attempt every
//! 200 ms finds a healed network within 200 ms. One of the three may take its time in the TLS handshake, so that a
//! machine too busy to answer in half a second is still reached.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::conn::{Conn, Dial, Route, Spec, Wake};
use super::http::Reply;
use super::{CallError, Direct, Inner, LinkState, Options, PeerAddr};
use crate::identity::Credentials;
use crate::wire::PING;

const MAX_ATTEMPTS: usize = 3;
/// The pace when a link has been down for long, or when only a person can mend it.
const SLOW_INTERVAL: Duration = Duration::from_secs(1);
const SLOW_AFTER: Duration = Duration::from_secs(30);
/// Not more often than this, whoever asks for an attempt.
const ATTEMPT_GAP: Duration = Duration::from_millis(50);
/// How long the one patient attempt may take in the handshake.
const PATIENT_HANDSHAKE: Duration = Duration::from_secs(3);

/// What callers see of a link.
#[derive(Debug, Clone)]
pub(crate) enum View {
    Up(Arc<Conn>),
    Down(Down),
}

#[derive(Debug, Clone)]
pub(crate) struct Down {
    node: u64,
    pub(crate) since: Instant,
    pub(crate) since_wall: SystemTime,
    pub(crate) error: CallError,
}

impl Down {
    fn new(node: u64, since: Instant, error: CallError) -> Self {
        let since_wall = SystemTime::now() - since.elapsed();
        Self {
            node,
            since,
            since_wall,
            error,
        }
    }
}

/// What callers and the task both count.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Direct calls that failed since the last one that did not.
    pub(crate) failures: AtomicU32,
    relay: Mutex<Option<u64>>,
    rtt_us: AtomicU64,
}

impl Health {
    pub(crate) fn relay(&self) -> Option<u64> {
        *self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_relay(&self, relay: Option<u64>) {
        *self.relay.lock().unwrap_or_else(PoisonError::into_inner) = relay;
    }

    fn set_rtt(&self, rtt: Duration) {
        let us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1);
        self.rtt_us.store(us, Ordering::Relaxed);
    }
}

/// Keeps a link's task going; when both have ended, callers see their `view` close.
#[derive(Debug)]
pub(crate) struct Keeper {
    addr: watch::Sender<PeerAddr>,
    view: Arc<watch::Sender<View>>,
}

impl Keeper {
    pub(crate) fn set_addr(&self, addr: PeerAddr) {
        let changed = self.addr.send_if_modified(|old| {
            let changed = *old != addr;
            *old = addr;
            changed
        });
        if changed {
            forget_error(&self.view);
        }
    }
}

/// What was seen at the old address says nothing about the new one: calls wait instead of failing.
fn forget_error(view: &watch::Sender<View>) {
    view.send_if_modified(|view| match view {
        View::Down(down) => {
            down.error = CallError::moved(down.node);
            true
        }
        View::Up(_) => false,
    });
}

/// What callers hold of a link.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) node: u64,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) health: Arc<Health>,
}

impl Link {
    /// Starts a link. Must be called in a tokio runtime.
    pub(crate) fn start(
        node: u64,
        addr: PeerAddr,
        credentials: Arc<Credentials>,
        options: Arc<Options>,
        peers: Weak<Inner>,
    ) -> (Self, Keeper) {
        let (addr, addr_rx) = watch::channel(addr);
        let now = Instant::now();
        let first = Down::new(node, now, CallError::unreachable(node, "not connected yet"));
        let (view_tx, view) = watch::channel(View::Down(first));
        let view_tx = Arc::new(view_tx);
        let wake = Arc::new(Wake::default());
        let health = Arc::new(Health::default());
        let task = Task {
            node,
            changes: credentials.changes(),
            credentials,
            options,
            peers,
            addr: addr_rx,
            view: view_tx.clone(),
            wake: wake.clone(),
            health: health.clone(),
            attempts: JoinSet::new(),
            patient: false,
            pings: JoinSet::new(),
            refresh: false,
            last_attempt: now - SLOW_INTERVAL,
            next_attempt: now,
            next_ping: now,
        };
        tokio::spawn(task.run());
        let link = Self {
            node,
            view,
            wake,
            health,
        };
        let keeper = Keeper {
            addr,
            view: view_tx,
        };
        (link, keeper)
    }

    pub(crate) fn conn(&self) -> Option<Arc<Conn>> {
        match &*self.view.borrow() {
            View::Up(conn) if conn.usable() => Some(conn.clone()),
            _ => None,
        }
    }

    pub(crate) fn state(&self) -> LinkState {
        let direct = match &*self.view.borrow() {
            View::Up(_) => Direct::Up,
            View::Down(down) => Direct::Down {
                since: down.since_wall,
                last_error: down.error.to_string(),
            },
        };
        let relayed_by = match direct {
            Direct::Up => None,
            Direct::Down { .. } => self.health.relay(),
        };
        let rtt = match self.health.rtt_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        };
        LinkState {
            direct,
            relayed_by,
            rtt,
        }
    }
}

/// The result of one attempt.
struct Attempt {
    patient: bool,
    result: Result<Conn, CallError>,
}

struct Task {
    node: u64,
    credentials: Arc<Credentials>,
    changes: watch::Receiver<u64>,
    options: Arc<Options>,
    peers: Weak<Inner>,
    addr: watch::Receiver<PeerAddr>,
    view: Arc<watch::Sender<View>>,
    wake: Arc<Wake>,
    health: Arc<Health>,
    attempts: JoinSet<Attempt>,
    /// One of the attempts is the patient one.
    patient: bool,
    /// At most one at a time.
    pings: JoinSet<()>,
    /// The connection works, but a newer one shall replace it.
    refresh: bool,
    last_attempt: Instant,
    next_attempt: Instant,
    next_ping: Instant,
}

impl Task {
    async fn run(mut self) {
        loop {
            let now = Instant::now();
            self.settle(now);
            self.obey_wake(now);
            self.start_attempt(now);
            self.start_ping(now);
            let due = self.next_due(now);
            tokio::select! {
                // A new address comes first: it makes the results of attempts void.
                biased;
                changed = self.addr.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.new_address();
                }
                Ok(()) = self.changes.changed() => {
                    self.refresh = true;
                    self.next_attempt = Instant::now();
                }
                Some(done) = self.attempts.join_next() => match done {
                    Ok(attempt) => self.attempt_done(attempt),
                    Err(error) => tracing::error!(node = self.node, %error, "attempt to connect failed"),
                },
                Some(_) = self.pings.join_next() => {}
                () = self.wake.rung() => {}
                () = sleep_until(due) => {}
            }
        }
    }

    fn conn(&self) -> Option<Arc<Conn>> {
        match &*self.view.borrow() {
            View::Up(conn) => Some(conn.clone()),
            View::Down(_) => None,
        }
    }

    /// Takes note of a connection that has ended or grown old.
    fn settle(&mut self, now: Instant) {
        let Some(conn) = self.conn() else { return };
        if conn.usable() {
            self.refresh |= now.duration_since(conn.opened) >= self.options.reconnect_every;
            return;
        }
        let (error, since) = conn.end_reason();
        tracing::warn!(node = self.node, host = conn.hello.host, %error, "link down");
        self.view
            .send_replace(View::Down(Down::new(self.node, since, error)));
        self.refresh = false;
        self.next_attempt = now.max(self.last_attempt + ATTEMPT_GAP);
        self.next_ping = now;
    }

    fn obey_wake(&mut self, now: Instant) {
        if self.wake.take_ping() {
            self.next_ping = now;
        }
        if self.wake.take_nudge() && self.conn().is_none() {
            let soonest = now.max(self.last_attempt + ATTEMPT_GAP);
            self.next_attempt = self.next_attempt.min(soonest);
        }
    }

    fn wants_connection(&self) -> bool {
        self.refresh || self.conn().is_none()
    }

    fn start_attempt(&mut self, now: Instant) {
        let full = self.attempts.len() >= MAX_ATTEMPTS;
        if full || now < self.next_attempt || !self.wants_connection() {
            return;
        }
        let patient = self.attempts.is_empty() || !self.patient;
        self.patient |= patient;
        self.last_attempt = now;
        self.next_attempt = now + self.interval(now);
        let dial = Dial {
            loaded: self.credentials.loaded(),
            node: self.node,
            addr: self.addr.borrow().clone(),
            options: self.options.clone(),
            wake: self.wake.clone(),
            handshake_timeout: if patient {
                PATIENT_HANDSHAKE
            } else {
                self.options.connect_timeout
            },
        };
        self.attempts.spawn(async move {
            let result = dial.open().await;
            Attempt { patient, result }
        });
    }

    fn interval(&self, now: Instant) -> Duration {
        match &*self.view.borrow() {
            View::Down(down) => {
                let long = now.saturating_duration_since(down.since) > SLOW_AFTER;
                if long || down.error.needs_a_person() {
                    SLOW_INTERVAL
                } else {
                    self.options.attempt_interval
                }
            }
            View::Up(_) => SLOW_INTERVAL,
        }
    }

    fn attempt_done(&mut self, attempt: Attempt) {
        self.patient &= !attempt.patient;
        match attempt.result {
            Ok(conn) => {
                if self.conn().is_none() {
                    let rtt = conn.hello_rtt;
                    tracing::info!(node = self.node, host = conn.hello.host, ?rtt, "link up");
                }
                self.attempts = JoinSet::new();
                self.refresh = false;
                self.health.failures.store(0, Ordering::Relaxed);
                self.health.set_relay(None);
                self.health.set_rtt(conn.hello_rtt);
                self.next_ping = Instant::now() + self.options.probe_interval;
                self.view.send_replace(View::Up(Arc::new(conn)));
            }
            Err(error) => {
                if error.needs_a_person() {
                    self.next_attempt = self.next_attempt.max(self.last_attempt + SLOW_INTERVAL);
                }
                self.view.send_if_modified(|view| match view {
                    View::Down(down) if down.error != error => {
                        tracing::debug!(node = self.node, %error, "no connection");
                        down.error = error;
                        true
                    }
                    _ => false,
                });
            }
        }
    }

    /// The peer has moved: what is under way goes to the wrong place.
    fn new_address(&mut self) {
        self.attempts = JoinSet::new();
        self.next_attempt = Instant::now();
        if let Some(conn) = self.conn() {
            conn.end(CallError::moved(self.node));
        }
        forget_error(&self.view);
    }

    fn ping_due(&self) -> Instant {
        match &*self.view.borrow() {
            View::Up(_) => self.next_ping,
            View::Down(down) => self.next_ping.max(down.since + self.options.relay_after),
        }
    }

    fn start_ping(&mut self, now: Instant) {
        if !self.pings.is_empty() || now < self.ping_due() {
            return;
        }
        self.next_ping = now + self.options.probe_interval;
        let spec = Spec {
            method: PING.to_owned(),
            body: Bytes::new(),
            timeout: self.options.ping_timeout,
            deadline: now + self.options.ping_timeout,
            route: Route::Direct,
        };
        let health = self.health.clone();
        let (node, options) = (self.node, self.options.clone());
        let cluster = self.credentials.loaded().info().cluster.clone();
        if let Some(conn) = self.conn() {
            self.pings.spawn(async move {
                match conn.call(&spec).await {
                    Ok(Reply::Ok(_)) => {
                        health.set_rtt(now.elapsed());
                        health.failures.store(0, Ordering::Relaxed);
                    }
                    Ok(Reply::Fault(fault)) => {
                        let limit = spec.timeout;
                        let ours = options.protocol;
                        conn.end(CallError::from_fault(
                            fault, node, PING, limit, ours, &cluster,
                        ));
                    }
                    // The connection has ended by itself.
                    Err(_) => {}
                }
            });
        } else if let Some(peers) = self.peers.upgrade() {
            self.pings.spawn(async move {
                peers.relay(node, &health, &spec).await;
            });
        }
    }

    fn next_due(&self, now: Instant) -> Instant {
        let mut due = now + SLOW_INTERVAL;
        if self.wants_connection() && self.attempts.len() < MAX_ATTEMPTS {
            due = due.min(self.next_attempt);
        }
        if self.pings.is_empty() {
            due = due.min(self.ping_due());
        }
        due
    }
}
