//! One request: checked, bounded, then answered here, passed on, or given to the handler.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};

use super::{BODY_UNIT, Caller, RefusalReason, Remote, Request, Shared, still_valid};
use crate::cert::CertInfo;
use crate::client::{Origin, Route, Spec};
use crate::wire::{self, Fault, FaultKind, HELLO, PING, ProtocolRange};

const MAX_DEADLINE: Duration = Duration::from_secs(600);
const MAX_JOIN_BODY: usize = 64 * 1024;

type HttpRequest = hyper::Request<Incoming>;
type HttpResponse = Response<Full<Bytes>>;

/// Where a request of a peer goes.
enum Way {
    /// The handler here, on behalf of the caller or of another peer.
    Here(Option<Origin>),
    /// Another host.
    PassOn(u64),
}

impl Shared {
    pub(super) async fn answer(&self, remote: &Remote, request: HttpRequest) -> HttpResponse {
        match self.dispatch(remote, request).await {
            Ok(body) => Response::new(Full::new(body)),
            Err(fault) => fault_response(&fault),
        }
    }

    async fn dispatch(&self, remote: &Remote, request: HttpRequest) -> Result<Bytes, Fault> {
        let path = request.uri().path();
        let join = path == wire::JOIN_PATH;
        let method = match path.strip_prefix(wire::PEER_PATH) {
            _ if join => wire::JOIN_METHOD,
            Some(method) => method,
            None => return Err(refused(404, format!("there is nothing at {path}"))),
        };
        if request.method() != Method::POST {
            return Err(refused(405, format!("{path} takes POST only")));
        }
        if !wire::valid_method(method) {
            return Err(refused(404, format!("there is nothing at {path}")));
        }
        let method = method.to_owned();
        let deadline = self.deadline(request.headers());
        match &remote.cert {
            Some(cert) => {
                self.check_peer(remote, cert, request.headers())?;
                self.peer(cert, method, deadline, request).await
            }
            None if join => {
                let from = Caller::Anonymous;
                self.here(from, None, method, deadline, request, MAX_JOIN_BODY)
                    .await
            }
            None => {
                let path = path.to_owned();
                let reason = RefusalReason::NoCertificate { path };
                Err(self.refuse(remote, 401, reason))
            }
        }
    }

    fn refuse(&self, remote: &Remote, code: u16, reason: RefusalReason) -> Fault {
        let message = reason.to_string();
        let kind = match &reason {
            RefusalReason::Version { .. } => FaultKind::Version,
            RefusalReason::Cluster { .. } => FaultKind::Cluster,
            _ => FaultKind::Refused,
        };
        self.refusals.add(remote.addr, reason);
        let mut fault = Fault::new(kind, code, message);
        if kind != FaultKind::Refused {
            fault.hello = Some(self.hello());
        }
        fault
    }

    fn check_peer(
        &self,
        remote: &Remote,
        cert: &CertInfo,
        headers: &HeaderMap,
    ) -> Result<(), Fault> {
        if let Err(error) = still_valid(cert) {
            return Err(self.refuse(remote, 401, RefusalReason::Certificate(error)));
        }
        if self.is_removed(cert.node) {
            let (node, host) = (cert.node, cert.host.clone());
            return Err(self.refuse(remote, 403, RefusalReason::Removed { node, host }));
        }
        let host = cert.host.clone();
        let expected = self.credentials.loaded().info().cluster.clone();
        let found = text(headers, wire::H_CLUSTER).to_owned();
        if found != expected {
            let reason = RefusalReason::Cluster {
                host,
                expected,
                found,
            };
            return Err(self.refuse(remote, 421, reason));
        }
        let ours = self.options.protocol;
        if protocol(headers).and_then(|p| p.common(ours)).is_none() {
            let theirs = text(headers, wire::H_PROTOCOL).to_owned();
            let reason = RefusalReason::Version { host, ours, theirs };
            return Err(self.refuse(remote, 426, reason));
        }
        Ok(())
    }

    async fn peer(
        &self,
        cert: &CertInfo,
        method: String,
        deadline: Instant,
        request: HttpRequest,
    ) -> Result<Bytes, Fault> {
        match self.way(request.headers())? {
            Way::PassOn(target) => self.pass_on(cert, target, method, deadline, request).await,
            Way::Here(_) if method == PING => Ok(Bytes::new()),
            Way::Here(_) if method == HELLO => serde_json::to_vec(&self.hello())
                .map(Bytes::from)
                .map_err(|e| refused(500, e.to_string())),
            Way::Here(origin) => {
                let (from, via) = match origin {
                    Some(Origin { node, host, .. }) => {
                        (Caller::Peer { node, host }, Some(cert.node))
                    }
                    None => {
                        let (node, host) = (cert.node, cert.host.clone());
                        (Caller::Peer { node, host }, None)
                    }
                };
                let limit = self.options.max_body;
                self.here(from, via, method, deadline, request, limit).await
            }
        }
    }

    fn way(&self, headers: &HeaderMap) -> Result<Way, Fault> {
        let target = node(headers, wire::H_RELAY_TO)?;
        let origin = node(headers, wire::H_ORIGIN)?;
        match (target, origin) {
            (None, None) => Ok(Way::Here(None)),
            (Some(target), None) if target == self.credentials.loaded().info().node => {
                let message = format!("node {target} is this host: call it directly");
                Err(refused(400, message))
            }
            (Some(target), None) => Ok(Way::PassOn(target)),
            (None, Some(node)) if self.is_removed(node) => Err(refused(
                403,
                format!("node {node} was removed from the cluster"),
            )),
            (None, Some(node)) => Ok(Way::Here(Some(Origin {
                node,
                host: text(headers, wire::H_ORIGIN_HOST).to_owned(),
                protocol: protocol(headers).unwrap_or(self.options.protocol),
            }))),
            (Some(_), Some(_)) => Err(refused(400, "a request crosses one relay at most")),
        }
    }

    async fn pass_on(
        &self,
        cert: &CertInfo,
        target: u64,
        method: String,
        deadline: Instant,
        request: HttpRequest,
    ) -> Result<Bytes, Fault> {
        let busy = || {
            let message = "the relay has too much to do";
            Fault::new(FaultKind::RelayUnreachable, 503, message)
        };
        let _turn = self.relays.try_acquire().map_err(|_| busy())?;
        let origin = Origin {
            node: cert.node,
            host: cert.host.clone(),
            protocol: protocol(request.headers()).unwrap_or(self.options.protocol),
        };
        let (body, _held) = self.body(request, self.options.max_body, deadline).await?;
        let spec = Spec {
            method,
            body,
            timeout: deadline.saturating_duration_since(Instant::now()),
            deadline,
            route: Route::Direct,
        };
        self.peers.forward(target, origin, spec).await
    }

    async fn here(
        &self,
        from: Caller,
        via: Option<u64>,
        method: String,
        deadline: Instant,
        request: HttpRequest,
        limit: usize,
    ) -> Result<Bytes, Fault> {
        let _turn = turn(&self.requests, deadline).await?;
        let (body, _held) = self.body(request, limit, deadline).await?;
        let name = method.clone();
        let call = Request {
            from,
            via,
            method,
            body,
            deadline,
        };
        match timeout_at(deadline, self.handler.handle(call)).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(status)) => Err(status.into()),
            Err(_) => Err(too_late(format!("{name} was not done by its deadline"))),
        }
    }

    /// Reads a body, within its share of the memory for bodies. The share is kept until the second part is dropped.
    async fn body(
        &self,
        request: HttpRequest,
        limit: usize,
        deadline: Instant,
    ) -> Result<(Bytes, OwnedSemaphorePermit), Fault> {
        let too_large = || {
            let message = format!("the body is over the limit of {limit} bytes");
            refused(413, message)
        };
        let body = request.into_body();
        let said = body.size_hint().upper().unwrap_or(limit as u64);
        let size = usize::try_from(said).unwrap_or(usize::MAX);
        if size > limit {
            return Err(too_large());
        }
        let units = u32::try_from(size / BODY_UNIT + 1).unwrap_or(u32::MAX);
        let held = timeout_at(deadline, self.bodies.clone().acquire_many_owned(units)).await;
        let Ok(Ok(held)) = held else {
            return Err(too_late("this host holds too many large requests"));
        };
        match timeout_at(deadline, Limited::new(body, limit).collect()).await {
            Ok(Ok(collected)) => Ok((collected.to_bytes(), held)),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => Err(refused(400, format!("the body did not arrive: {error}"))),
            Err(_) => Err(too_late("the body did not arrive by the deadline")),
        }
    }

    fn deadline(&self, headers: &HeaderMap) -> Instant {
        let wanted = text(headers, wire::H_DEADLINE)
            .parse()
            .map_or(self.options.default_deadline, Duration::from_millis);
        Instant::now() + wanted.min(MAX_DEADLINE)
    }
}

async fn turn(semaphore: &Semaphore, deadline: Instant) -> Result<SemaphorePermit<'_>, Fault> {
    match timeout_at(deadline, semaphore.acquire()).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => Err(too_late("this host has too many requests under way")),
    }
}

fn refused(code: u16, message: impl Into<String>) -> Fault {
    Fault::new(FaultKind::Refused, code, message)
}

fn too_late(message: impl Into<String>) -> Fault {
    Fault::new(FaultKind::Deadline, 504, message)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("")
}

fn protocol(headers: &HeaderMap) -> Option<ProtocolRange> {
    ProtocolRange::parse(text(headers, wire::H_PROTOCOL))
}

fn node(headers: &HeaderMap, name: &str) -> Result<Option<u64>, Fault> {
    if !headers.contains_key(name) {
        return Ok(None);
    }
    match text(headers, name).parse() {
        Ok(node) => Ok(Some(node)),
        Err(_) => Err(refused(400, format!("{name} is not a node id"))),
    }
}

fn fault_response(fault: &Fault) -> HttpResponse {
    let body = serde_json::to_vec(fault).unwrap_or_default();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    let status = if (400..600).contains(&fault.code) {
        StatusCode::from_u16(fault.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    } else {
        StatusCode::INTERNAL_SERVER_ERROR
    };
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}
