//! One hop through another host, when the direct way to a peer is cut.
//!
//! Candidates are the peers with a working direct connection: the one that worked last, then the others by node id. A second
//! one is started when the first has said nothing for 150 ms (both may then deliver: methods are idempotent). A relay uses
//! only its direct connection and answers at once when it has none.

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use std::sync::Arc;
use tokio::time::{Instant, sleep_until};

use super::conn::{Conn, Failed, Origin, Route, Spec};
use super::http::Reply;
use super::link::Health;
use super::{CallError, Inner};
use crate::wire::{Fault, FaultKind};

/// How many relays one round asks.
const MAX_RELAYS: usize = 3;

/// What one relay said.
enum Answer {
    /// The target's word, or the end of the deadline.
    Final(Result<Bytes, CallError>),
    /// This relay does not reach the target.
    NoWay,
    /// This relay said nothing until the deadline; the target may have got the request.
    Silent,
}

impl Inner {
    /// Asks relays to pass a request on. `None`: no relay reaches the target.
    pub(crate) async fn relay(
        &self,
        target: u64,
        health: &Health,
        spec: &Spec,
    ) -> Option<Result<Bytes, CallError>> {
        let mut waiting = self.candidates(target, health.relay()).into_iter();
        let mut asked = FuturesUnordered::new();
        let mut next_start = Instant::now();
        loop {
            if (asked.is_empty() || Instant::now() >= next_start)
                && let Some((relay, conn)) = waiting.next()
            {
                next_start = Instant::now() + self.options.relay_stagger;
                asked.push(async move { (relay, self.ask(&conn, target, spec).await) });
            }
            let more = waiting.len() > 0;
            tokio::select! {
                answer = asked.next() => match answer {
                    Some((relay, Answer::Final(result))) => {
                        health.set_relay(Some(relay));
                        return Some(result);
                    }
                    Some((_, Answer::NoWay)) if more || !asked.is_empty() => {
                        next_start = Instant::now();
                    }
                    Some((_, Answer::Silent)) => {
                        health.set_relay(None);
                        return Some(Err(spec.timed_out(target)));
                    }
                    _ => {
                        health.set_relay(None);
                        return None;
                    }
                },
                () = sleep_until(next_start), if more => {}
            }
        }
    }

    fn candidates(&self, target: u64, last_good: Option<u64>) -> Vec<(u64, Arc<Conn>)> {
        let mut found: Vec<_> = self
            .links()
            .iter()
            .filter(|link| link.node != target)
            .filter_map(|link| Some((link.node, link.conn()?)))
            .collect();
        found.sort_by_key(|(node, _)| (Some(*node) != last_good, *node));
        found.truncate(MAX_RELAYS);
        found
    }

    async fn ask(&self, conn: &Conn, target: u64, spec: &Spec) -> Answer {
        let spec = Spec {
            route: Route::ToRelay(target),
            ..spec.clone()
        };
        match conn.call(&spec).await {
            Ok(Reply::Ok(body)) => Answer::Final(Ok(body)),
            Ok(Reply::Fault(fault)) => match fault.kind {
                FaultKind::RelayUnreachable | FaultKind::RelayFailed => Answer::NoWay,
                _ => Answer::Final(Err(self.fault(fault, target, &spec))),
            },
            Err(Failed::Sent(CallError::Timeout { .. })) => Answer::Silent,
            Err(_) => Answer::NoWay,
        }
    }

    /// Passes on a request for `origin`, on the direct connection or not at all.
    pub(crate) async fn forward(
        &self,
        target: u64,
        origin: Origin,
        mut spec: Spec,
    ) -> Result<Bytes, Fault> {
        let conn = self.link(target).ok().and_then(|link| link.conn());
        let Some(conn) = conn else {
            let message = format!("the relay has no connection to node {target} either");
            return Err(Fault::new(FaultKind::RelayUnreachable, 503, message));
        };
        spec.route = Route::FromRelay(origin);
        match conn.call(&spec).await {
            Ok(Reply::Ok(body)) => Ok(body),
            Ok(Reply::Fault(fault)) => Err(fault),
            Err(Failed::Unsent) => {
                let message = format!("the relay has just lost its connection to node {target}");
                Err(Fault::new(FaultKind::RelayUnreachable, 503, message))
            }
            Err(Failed::Sent(error)) => {
                Err(Fault::new(FaultKind::RelayFailed, 504, error.to_string()))
            }
        }
    }
}
