//! What a host certificate says, and why one is not accepted.
//!
//! A host certificate names its host (subject CN and `dns:` name) and, as a URI, its place in the cluster:
//! `quorate://<cluster id>/node/<node id>`. The URI is what the transport trusts; the names are for people.
//!
//! Pure: the time is an input everywhere.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const URI_SCHEME: &str = "quorate://";

/// Why a certificate is not accepted. Each variant says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertError {
    /// The certificate's time is over.
    #[error(
        "the certificate of host {host} expired at {}: compare the clocks of both hosts; if they are right, join {host} again with a new token", show_time(*.not_after)
    )]
    Expired {
        /// Host the certificate names.
        host: String,
        /// End of its validity.
        not_after: SystemTime,
    },
    /// The certificate's time has not begun.
    #[error(
        "the certificate of host {host} is valid only from {}: one of the two clocks is wrong, set it and try again", show_time(*.not_before)
    )]
    NotYetValid {
        /// Host the certificate names.
        host: String,
        /// Start of its validity.
        not_before: SystemTime,
    },
    /// Another CA issued the certificate, although it claims this cluster's id.
    #[error(
        "the certificate of host {host} was not issued by the CA of cluster {cluster}: the host belongs to an older cluster of this id or is an impostor; join it again with a new token"
    )]
    ForeignCa {
        /// Host the certificate names (unproven).
        host: String,
        /// This cluster.
        cluster: String,
    },
    /// The certificate belongs to another cluster.
    #[error(
        "host {host} belongs to cluster {found}, not to {expected}: correct the address, or remove the host from {found} and join it here"
    )]
    WrongCluster {
        /// Host the certificate names.
        host: String,
        /// This cluster.
        expected: String,
        /// Cluster that the other side claims.
        found: String,
    },
    /// The host at this address is another member.
    #[error(
        "node {found} (host {host}) answers where node {expected} was expected: the addresses of the two are swapped or stale, correct the host's address"
    )]
    WrongNode {
        /// Node that was called.
        expected: u64,
        /// Node that answered.
        found: u64,
        /// Host name of the node that answered.
        host: String,
    },
    /// The certificate chain has no certificate with the pinned fingerprint.
    #[error(
        "the host at this address does not present the CA of the token (its fingerprint starts with {wanted}): check the address, or make a new token in the right cluster"
    )]
    WrongFingerprint {
        /// First digits of the fingerprint in the token.
        wanted: String,
    },
    /// The other side refused this host's certificate.
    #[error(
        "the other host refused this host's certificate ({alert}; it is valid until {}): compare the clocks; if they are right, join this host again with a new token", show_time(*.own_not_after)
    )]
    RefusedByPeer {
        /// The TLS alert that was received.
        alert: String,
        /// End of validity of this host's certificate.
        own_not_after: SystemTime,
    },
    /// The other side does not know the CA of this host's certificate.
    #[error(
        "the other host does not know the CA of this host's cluster: it belongs to another cluster, or joined an earlier one of this id; correct the address, or join it again with a new token"
    )]
    UnknownToPeer,
    /// The key is not the one in the certificate.
    #[error(
        "the key does not belong to the certificate of host {host}: restore both from one backup, or join the host again with a new token"
    )]
    KeyMismatch {
        /// Host the certificate names.
        host: String,
    },
    /// Not a host certificate at all.
    #[error("not a host certificate of a cluster: {reason}; join the host with a token")]
    Malformed {
        /// What is missing or broken.
        reason: String,
    },
    /// TLS failed for another reason.
    #[error("TLS with the other host failed: {reason}; check that quorate listens at this address")]
    Handshake {
        /// What the TLS library says.
        reason: String,
    },
}

/// The facts of one host certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertInfo {
    /// Cluster id.
    pub cluster: String,
    /// Node id.
    pub node: u64,
    /// Host name.
    pub host: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// SHA-256 of the certificate, lower-case hex.
    pub fingerprint: String,
}

impl CertInfo {
    /// Reads a DER certificate. Proves nothing about who issued it.
    ///
    /// # Errors
    /// [`CertError::Malformed`].
    pub fn from_der(der: &[u8]) -> Result<Self, CertError> {
        let (_, cert) = X509Certificate::from_der(der)
            .map_err(|e| malformed(format!("it is not X.509 ({e})")))?;
        let (cluster, node) = names_of(&cert)?;
        let host = cert
            .subject()
            .iter_common_name()
            .next()
            .and_then(|name| name.as_str().ok())
            .ok_or_else(|| malformed("the subject has no common name"))?
            .to_owned();
        Ok(Self {
            cluster,
            node,
            host,
            not_before: unix_time(cert.validity().not_before.timestamp()),
            not_after: unix_time(cert.validity().not_after.timestamp()),
            fingerprint: fingerprint(der),
        })
    }

    /// Reads the first certificate of a PEM text.
    ///
    /// # Errors
    /// [`CertError::Malformed`].
    pub fn from_pem(pem: &str) -> Result<Self, CertError> {
        Self::from_der(&first_certificate(pem)?)
    }

    /// Whether `now` lies in the validity.
    ///
    /// # Errors
    /// [`CertError::Expired`] or [`CertError::NotYetValid`].
    pub fn check_time(&self, now: SystemTime) -> Result<(), CertError> {
        if now > self.not_after {
            return Err(CertError::Expired {
                host: self.host.clone(),
                not_after: self.not_after,
            });
        }
        if now < self.not_before {
            return Err(CertError::NotYetValid {
                host: self.host.clone(),
                not_before: self.not_before,
            });
        }
        Ok(())
    }

    /// Whether the certificate should be renewed now. See [`renewal_due`].
    #[must_use]
    pub fn renewal_due(&self, now: SystemTime) -> bool {
        renewal_due(self.not_before, self.not_after, now)
    }
}

/// Renew when a third or less of the life is left (and always after its end).
#[must_use]
pub fn renewal_due(not_before: SystemTime, not_after: SystemTime, now: SystemTime) -> bool {
    let life = not_after
        .duration_since(not_before)
        .unwrap_or(Duration::ZERO);
    let left = not_after.duration_since(now).unwrap_or(Duration::ZERO);
    left <= life / 3
}

/// SHA-256 of a DER certificate as lower-case hex.
#[must_use]
pub fn fingerprint(der: &[u8]) -> String {
    hex(&Sha256::digest(der))
}

/// The URI that places a node in a cluster.
pub(crate) fn node_uri(cluster: &str, node: u64) -> String {
    format!("{URI_SCHEME}{cluster}/node/{node}")
}

/// The first certificate of a PEM text.
pub(crate) fn first_certificate(pem: &str) -> Result<CertificateDer<'static>, CertError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| malformed(format!("no certificate in the PEM text ({e})")))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A time as RFC 3339 in UTC.
pub(crate) fn show_time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| format!("{time:?}"), |t| format!("{t:.0}"))
}

fn malformed(reason: impl Into<String>) -> CertError {
    CertError::Malformed {
        reason: reason.into(),
    }
}

fn unix_time(seconds: i64) -> SystemTime {
    u64::try_from(seconds).map_or(UNIX_EPOCH, |s| UNIX_EPOCH + Duration::from_secs(s))
}

fn names_of(cert: &X509Certificate<'_>) -> Result<(String, u64), CertError> {
    let names = cert
        .subject_alternative_name()
        .map_err(|e| malformed(format!("its alternative names are damaged ({e})")))?
        .ok_or_else(|| malformed("it has no alternative names"))?;
    for name in &names.value.general_names {
        let GeneralName::URI(uri) = name else {
            continue;
        };
        if let Some(found) = parse_uri(uri) {
            return Ok(found);
        }
    }
    Err(malformed("it has no name quorate://<cluster>/node/<id>"))
}

fn parse_uri(uri: &str) -> Option<(String, u64)> {
    let (cluster, node) = uri.strip_prefix(URI_SCHEME)?.split_once("/node/")?;
    if cluster.is_empty() {
        return None;
    }
    Some((cluster.to_owned(), node.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn renewal_is_due_in_the_last_third() {
        let start = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let end = start + Duration::from_secs(30);
        for (age, due) in [
            (0, false),
            (19, false),
            (20, true),
            (29, true),
            (30, true),
            (90, true),
        ] {
            assert_eq!(
                renewal_due(start, end, start + Duration::from_secs(age)),
                due,
                "at age {age}"
            );
        }
        assert!(
            renewal_due(end, start, start),
            "a life without length is over"
        );
    }

    #[test]
    fn the_uri_is_read_back_and_others_are_not() {
        assert_eq!(parse_uri(&node_uri("c1", 7)), Some(("c1".into(), 7)));
        for bad in [
            "quorate:///node/1",
            "quorate://c1/node/",
            "quorate://c1/node/-1",
            "quorate://c1/vm/1",
            "https://c1/node/1",
        ] {
            assert_eq!(parse_uri(bad), None, "{bad}");
        }
    }

    #[test]
    fn times_read_like_times() {
        assert_eq!(
            show_time(UNIX_EPOCH + Duration::from_millis(1500)),
            "1970-01-01T00:00:01Z"
        );
    }
}
