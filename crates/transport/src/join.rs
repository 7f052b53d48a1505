//! The first call of a host that is in no cluster yet.
//!
//! What always holds: the request (it carries the token's secret) is sent only over a connection whose server holds a
//! certificate of the CA that the token pins, for the cluster that the token names.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use rustls_pki_types::ServerName;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use crate::cert::CertError;
use crate::client::http::{self, Reply, Tap};
use crate::socket;
use crate::tls;
use crate::token::JoinToken;
use crate::wire::{Fault, FaultKind, H_CLUSTER, H_DEADLINE, JOIN_PATH};

/// No single address may use up the whole time.
const PER_ADDRESS: Duration = Duration::from_secs(5);
const MAX_ADDRESSES: usize = 16;

/// Why joining failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The server at this address is not what the token promises.
    #[error("{address}: {error}")]
    Untrusted {
        /// Address from the token.
        address: String,
        /// Why it is not trusted.
        error: CertError,
    },
    /// The cluster refused.
    #[error("the cluster refused the join at {address}: {message} (code {code})")]
    Refused {
        /// Address from the token.
        address: String,
        /// Code of the handler.
        code: u16,
        /// Why.
        message: String,
    },
    /// No address of the token answered.
    #[error(
        "no address of the token can be reached: {}; check the network and that quorate runs there, or make a new token", .tried.join("; ")
    )]
    Unreachable {
        /// Each address with what was seen.
        tried: Vec<String>,
    },
}

/// What one address gave.
enum Tried {
    Answer(Bytes),
    /// The cluster's last word.
    Final(JoinError),
    /// Another address may do better.
    Next(String),
    /// As `Next`, but to be reported if none does.
    Untrusted(CertError),
}

/// Sends a join request to the first address of the token that answers, and returns the answer.
///
/// # Errors
/// [`JoinError`]. Except after `Untrusted`, the request may have been executed.
pub async fn join(
    token: &JoinToken,
    body: impl Into<Bytes>,
    timeout: Duration,
) -> Result<Bytes, JoinError> {
    let body = body.into();
    let deadline = Instant::now() + timeout;
    let mut tried = Vec::new();
    let mut untrusted = None;
    for address in token.addresses.iter().take(MAX_ADDRESSES) {
        let until = deadline.min(Instant::now() + PER_ADDRESS.max(timeout / 2));
        let one = timeout_at(until, try_address(token, address, body.clone(), until));
        match one.await {
            Ok(Tried::Answer(answer)) => return Ok(answer),
            Ok(Tried::Final(error)) => return Err(error),
            Ok(Tried::Next(reason)) => tried.push(format!("{address}: {reason}")),
            Ok(Tried::Untrusted(error)) => {
                let address = address.clone();
                tried.push(format!("{address}: {error}"));
                untrusted.get_or_insert(JoinError::Untrusted { address, error });
            }
            Err(_) => tried.push(format!("{address}: no answer in time")),
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(untrusted.unwrap_or(JoinError::Unreachable { tried }))
}

async fn try_address(token: &JoinToken, address: &str, body: Bytes, until: Instant) -> Tried {
    let resolved = match lookup_host(address).await.map(|mut all| all.next()) {
        Ok(Some(resolved)) => resolved,
        Ok(None) => return Tried::Next("it has no address".to_owned()),
        Err(error) => return Tried::Next(error.to_string()),
    };
    let stream = match TcpStream::connect(resolved).await {
        Ok(stream) => stream,
        Err(error) => return Tried::Next(error.to_string()),
    };
    if let Err(error) = socket::prepare(&stream) {
        return Tried::Next(error.to_string());
    }
    let (config, slot) = match tls::join_client(&token.cluster, &token.ca_fingerprint) {
        Ok(config) => config,
        Err(error) => return Tried::Untrusted(error),
    };
    let name = ServerName::IpAddress(resolved.ip().into());
    let stream = match TlsConnector::from(config).connect(name, stream).await {
        Ok(stream) => stream,
        Err(error) => {
            return match tls::reason_of(&error, &slot, None) {
                Some(reason) => Tried::Untrusted(reason),
                None => Tried::Next(error.to_string()),
            };
        }
    };
    let (mut send, driver) = match http::start(Tap::new(stream, slot, None)).await {
        Ok(started) => started,
        Err(error) => return Tried::Next(error.to_string()),
    };
    // Ends when `send` is dropped; its error is also the exchange's.
    tokio::spawn(driver);
    let left = until.saturating_duration_since(Instant::now());
    let request = Request::post(format!("https://peer{JOIN_PATH}"))
        .header(H_CLUSTER, &token.cluster)
        .header(H_DEADLINE, left.as_millis().to_string())
        .body(Full::new(body));
    let request = match request {
        Ok(request) => request,
        Err(error) => return Tried::Next(error.to_string()),
    };
    match http::exchange(&mut send, request).await {
        Ok(Reply::Ok(answer)) => Tried::Answer(answer),
        Ok(Reply::Fault(fault)) => after_fault(address, fault),
        Err(lost) => Tried::Next(format!("{lost:?}")),
    }
}

/// 502 to 504 mean "not here, not now": another host may know the leader.
fn after_fault(address: &str, fault: Fault) -> Tried {
    if fault.kind == FaultKind::Deadline || (502..=504).contains(&fault.code) {
        return Tried::Next(fault.message);
    }
    Tried::Final(JoinError::Refused {
        address: address.to_owned(),
        code: fault.code,
        message: fault.message,
    })
}
