//! What crosses the wire besides bodies: paths, headers, the version handshake and faults.
//!
//! ```text
//! POST /peer/v1/<method>        quorate-cluster: <id>           always
//!                               quorate-protocol: <min>-<max>   always
//!                               quorate-deadline-ms: <n>        how long the caller still waits
//!                               quorate-relay-to: <node>        "pass this on", caller to relay
//!                               quorate-origin: <node>          "passed on for", relay to target
//!                               quorate-origin-host: <host>
//! POST /join/v1                 the only path without a certificate
//! 200 + body                    the answer
//! 4xx, 5xx + JSON fault         a refusal, of the handler or of the transport (`kind`)
//! ```
//!
//! A request with both relay headers is refused, and a relay sends on only with `quorate-origin`: a loop cannot be written.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Largest body of a request or an answer, in bytes.
pub const MAX_BODY: usize = 64 * 1024 * 1024;
/// The peer protocol versions that this build speaks.
pub const PROTOCOL: ProtocolRange = ProtocolRange { min: 1, max: 1 };

pub(crate) const PEER_PATH: &str = "/peer/v1/";
pub(crate) const JOIN_PATH: &str = "/join/v1";
pub(crate) const JOIN_METHOD: &str = "join";
pub(crate) const HELLO: &str = "hello";
pub(crate) const PING: &str = "ping";

pub(crate) const H_CLUSTER: &str = "quorate-cluster";
pub(crate) const H_PROTOCOL: &str = "quorate-protocol";
pub(crate) const H_DEADLINE: &str = "quorate-deadline-ms";
pub(crate) const H_RELAY_TO: &str = "quorate-relay-to";
pub(crate) const H_ORIGIN: &str = "quorate-origin";
pub(crate) const H_ORIGIN_HOST: &str = "quorate-origin-host";

/// The versions of the peer protocol that a host speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtocolRange {
    /// Oldest.
    pub min: u32,
    /// Newest.
    pub max: u32,
}

impl ProtocolRange {
    /// The newest version that both speak.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u32> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (min, max) = text.split_once('-')?;
        let (min, max) = (min.parse().ok()?, max.parse().ok()?);
        (min <= max).then_some(Self { min, max })
    }
}

impl fmt::Display for ProtocolRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.min, self.max)
    }
}

/// How a host introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Cluster id.
    pub cluster_id: String,
    /// Node id.
    pub node: u64,
    /// Host name.
    pub host: String,
    /// Peer protocol versions it speaks.
    pub protocol: ProtocolRange,
    /// Version of the software, for people.
    pub version: String,
}

/// A handler's refusal. Codes are read like those of HTTP (404: not here, 409: conflict, 503: try again).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} (code {code})")]
pub struct RpcStatus {
    /// What kind of refusal.
    pub code: u16,
    /// Why, and what to do.
    pub message: String,
}

impl RpcStatus {
    /// A refusal.
    #[must_use]
    pub fn new(code: u16, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// Who refused, and on what ground.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FaultKind {
    /// The handler.
    Handler,
    /// The deadline passed at the server.
    Deadline,
    /// The transport: not allowed, no such path, too large, too busy.
    Refused,
    /// No common protocol version.
    Version,
    /// Another cluster.
    Cluster,
    /// The relay has no working connection to the target.
    RelayUnreachable,
    /// The relay had one, but no answer came.
    RelayFailed,
    /// A kind of a newer release.
    #[serde(other)]
    Unknown,
}

/// The body of an answer that is not 200.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub(crate) kind: FaultKind,
    pub(crate) code: u16,
    pub(crate) message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hello: Option<Hello>,
}

impl Fault {
    pub(crate) fn new(kind: FaultKind, code: u16, message: impl Into<String>) -> Self {
        Self {
            kind,
            code,
            message: message.into(),
            hello: None,
        }
    }
}

impl From<RpcStatus> for Fault {
    fn from(status: RpcStatus) -> Self {
        Self::new(FaultKind::Handler, status.code, status.message)
    }
}

/// Whether `method` can stand in a path.
pub(crate) fn valid_method(method: &str) -> bool {
    let good = |b: u8| {
        b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'/' | b'.')
    };
    (1..=64).contains(&method.len()) && method.bytes().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_found() {
        let range = |min, max| ProtocolRange { min, max };
        assert_eq!(range(1, 3).common(range(2, 5)), Some(3));
        assert_eq!(range(2, 5).common(range(1, 3)), Some(3));
        assert_eq!(range(1, 1).common(range(2, 3)), None);
        assert_eq!(range(4, 4).common(range(2, 3)), None);
    }

    #[test]
    fn ranges_read_back_and_damaged_ones_do_not() {
        let range = ProtocolRange { min: 2, max: 7 };
        assert_eq!(ProtocolRange::parse(&range.to_string()), Some(range));
        for bad in ["", "1", "3-2", "-1-2", "1-x"] {
            assert_eq!(ProtocolRange::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_fault_of_a_newer_release_is_still_read() -> Result<(), serde_json::Error> {
        let fault: Fault =
            serde_json::from_str(r#"{"kind":"moon_phase","code":418,"message":"m","more":1}"#)?;
        assert_eq!(fault.kind, FaultKind::Unknown);
        assert_eq!(fault.code, 418);
        Ok(())
    }
}
