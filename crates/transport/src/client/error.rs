//! Why a call has no answer.

use std::time::Duration;

use crate::cert::CertError;
use crate::wire::{Fault, FaultKind, ProtocolRange};

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No connection, neither direct nor through a relay. If it broke while the request was under way, the request may
    /// have been executed.
    #[error(
        "node {node} is unreachable: {reason}; check that its host is up and the network between the hosts"
    )]
    Unreachable {
        /// The target.
        node: u64,
        /// What was seen last.
        reason: String,
    },
    /// The request was sent, no answer came in time; it may have been executed.
    #[error(
        "node {node} did not answer {method} within {after:?}: it is overloaded, or the network between the hosts is cut"
    )]
    Timeout {
        /// The target.
        node: u64,
        /// The method called.
        method: String,
        /// The caller's timeout.
        after: Duration,
    },
    /// The target answered, and refused.
    #[error("node {node} refused: {message} (code {code})")]
    Refused {
        /// The target.
        node: u64,
        /// Code of the handler's `RpcStatus`, or an HTTP status of the transport.
        code: u16,
        /// Why.
        message: String,
    },
    /// The other side is not who it must be, or does not accept us.
    #[error("node {node} cannot be trusted: {error}")]
    Tls {
        /// The target.
        node: u64,
        /// Why.
        error: CertError,
    },
    /// No protocol version in common.
    #[error(
        "node {node} runs quorate {version} with peer protocol {theirs}, this host speaks {ours}: upgrade the older of the two"
    )]
    VersionMismatch {
        /// The target.
        node: u64,
        /// Versions this host speaks.
        ours: ProtocolRange,
        /// Versions the target speaks.
        theirs: ProtocolRange,
        /// The target's software version.
        version: String,
    },
}

impl CallError {
    /// Whether trying again soon, or another way, cannot help: someone must act first.
    pub(crate) fn needs_a_person(&self) -> bool {
        matches!(
            self,
            Self::Tls { .. }
                | Self::VersionMismatch { .. }
                | Self::Refused {
                    code: 401 | 403,
                    ..
                }
        )
    }

    pub(crate) fn unreachable(node: u64, reason: impl Into<String>) -> Self {
        Self::Unreachable {
            node,
            reason: reason.into(),
        }
    }

    pub(crate) fn moved(node: u64) -> Self {
        Self::unreachable(node, "its address was changed and is not connected yet")
    }

    /// What a fault of `node` means to the caller.
    pub(crate) fn from_fault(
        fault: Fault,
        node: u64,
        method: &str,
        after: Duration,
        ours: ProtocolRange,
        cluster: &str,
    ) -> Self {
        match (fault.kind, fault.hello) {
            (FaultKind::Deadline, _) => Self::Timeout {
                node,
                method: method.to_owned(),
                after,
            },
            (FaultKind::Version, Some(hello)) => Self::VersionMismatch {
                node,
                ours,
                theirs: hello.protocol,
                version: hello.version,
            },
            (FaultKind::Cluster, Some(hello)) => Self::Tls {
                node,
                error: CertError::WrongCluster {
                    host: hello.host,
                    expected: cluster.to_owned(),
                    found: hello.cluster_id,
                },
            },
            (FaultKind::RelayUnreachable | FaultKind::RelayFailed, _) => {
                Self::unreachable(node, fault.message)
            }
            _ => Self::Refused {
                node,
                code: fault.code,
                message: fault.message,
            },
        }
    }
}
