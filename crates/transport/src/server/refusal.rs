//! Who was refused, and why: for the log, for `status`, for the operator who wonders.
//!
//! Bounded. The same reason from the same address is logged once a minute, since a refused peer tries again each second.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::cert::CertError;
use crate::wire::ProtocolRange;

const KEPT: usize = 32;
const LOG_AGAIN: Duration = Duration::from_secs(60);

/// Why a caller was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefusalReason {
    /// Its certificate, or it did not accept ours.
    #[error(transparent)]
    Certificate(CertError),
    /// It has none, and wanted more than to join.
    #[error("{path} needs a host certificate: join the host with a token first")]
    NoCertificate {
        /// What it wanted.
        path: String,
    },
    /// It names another cluster.
    #[error(
        "host {host} calls for cluster {found}, but this is {expected}: correct its configuration"
    )]
    Cluster {
        /// The caller.
        host: String,
        /// This cluster.
        expected: String,
        /// The cluster it names.
        found: String,
    },
    /// No protocol version in common.
    #[error(
        "host {host} speaks peer protocol {theirs}, this host {ours}: upgrade the older of the two"
    )]
    Version {
        /// The caller.
        host: String,
        /// Versions this host speaks.
        ours: ProtocolRange,
        /// Versions the caller speaks.
        theirs: String,
    },
    /// It was removed from the cluster.
    #[error(
        "node {node} (host {host}) was removed from the cluster: stop quorate there, or join it again with a new token"
    )]
    Removed {
        /// The caller's node id.
        node: u64,
        /// The caller.
        host: String,
    },
    /// Too many callers without a certificate at once.
    #[error("too many hosts try to join at once: try again in a minute")]
    TooManyAnonymous,
}

/// One refused caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// When.
    pub at: SystemTime,
    /// From where.
    pub from: SocketAddr,
    /// Why.
    pub reason: RefusalReason,
}

#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<VecDeque<Refusal>>);

impl Refusals {
    pub(super) fn add(&self, from: SocketAddr, reason: RefusalReason) {
        let at = SystemTime::now();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept
            .iter()
            .any(|old| same(old, from.ip(), &reason) && is_recent(old.at, at));
        if known {
            tracing::debug!(%from, %reason, "refused again");
            return;
        }
        tracing::warn!(%from, %reason, "refused");
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Refusal { at, from, reason });
    }

    pub(super) fn list(&self) -> Vec<Refusal> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().cloned().collect()
    }
}

fn same(old: &Refusal, from: IpAddr, reason: &RefusalReason) -> bool {
    old.from.ip() == from && old.reason == *reason
}

fn is_recent(then: SystemTime, now: SystemTime) -> bool {
    now.duration_since(then).is_ok_and(|age| age < LOG_AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_bounded_and_not_repeated() {
        let refusals = Refusals::default();
        let from = SocketAddr::from(([127, 0, 0, 1], 1000));
        for n in 0..100 {
            for _ in 0..2 {
                refusals.add(
                    from,
                    RefusalReason::NoCertificate {
                        path: format!("/{n}"),
                    },
                );
            }
        }
        let list = refusals.list();
        assert_eq!(list.len(), KEPT);
        let path = "/99".to_owned();
        let last = list.last().map(|r| r.reason.clone());
        assert_eq!(last, Some(RefusalReason::NoCertificate { path }));
    }
}
