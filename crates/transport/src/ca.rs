//! The cluster's certificate authority: makes itself, and issues host certificates.
//!
//! Owns nothing durable: the caller keeps certificate and key (PEM) in the replicated state. What always holds: the names
//! in a host certificate come from the caller's [`Subject`], never from the request, so a host cannot ask to be another
//! one. Certificates start one hour in the past, because the clocks of hosts differ.

use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SubjectPublicKeyInfo,
};
use time::OffsetDateTime;

use crate::cert::{self, CertError, node_uri};

/// Clocks of hosts may differ by this much without a fresh certificate being "not yet valid".
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Why the CA could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The cluster id cannot stand in a URI.
    #[error("cluster id {0:?} is not usable: use 1 to 64 letters, digits, '-', '_' or '.'")]
    BadClusterId(String),
    /// The host name is not a DNS name.
    #[error(
        "host name {0:?} is not usable: use 1 to 253 letters, digits, '-' and '.', beginning and ending with a letter or digit"
    )]
    BadHostName(String),
    /// The stored CA cannot be read.
    #[error(
        "the cluster's CA is unreadable ({reason}): the replicated state is damaged, restore it from a backup"
    )]
    Unreadable {
        /// What is broken.
        reason: String,
    },
    /// The certificate request or key of the host cannot be used.
    #[error(
        "the host's certificate request is not usable ({reason}): send an ECDSA P-256 request made by quorate"
    )]
    BadRequest {
        /// What is wrong with it.
        reason: String,
    },
    /// Signing failed.
    #[error(
        "issuing a certificate for host {host} failed ({reason}): this is a defect, please report it"
    )]
    Issue {
        /// Host, or the cluster for the CA itself.
        host: String,
        /// What the library says.
        reason: String,
    },
}

/// How long certificates live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaOptions {
    /// Life of the CA certificate. Default 10 years.
    pub ca_life: Duration,
    /// Life of a host certificate. Default 30 days.
    pub host_life: Duration,
}

impl Default for CaOptions {
    fn default() -> Self {
        Self {
            ca_life: DAY * 3653,
            host_life: DAY * 30,
        }
    }
}

/// Whom a host certificate names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Cluster id.
    pub cluster: String,
    /// Node id.
    pub node: u64,
    /// Host name.
    pub host: String,
}

/// The public half of a host's key, as it came from the host.
#[derive(Debug, Clone)]
pub struct HostPublicKey(SubjectPublicKeyInfo);

impl HostPublicKey {
    /// From a certificate request (PEM). The request proves that the host holds the private key; the names in it are ignored.
    ///
    /// # Errors
    /// [`CaError::BadRequest`].
    pub fn from_csr_pem(pem: &str) -> Result<Self, CaError> {
        let csr = CertificateSigningRequestParams::from_pem(pem).map_err(bad_request)?;
        Self::from_der(&csr.public_key.subject_public_key_info())
    }

    /// From a bare public key (PEM, `BEGIN PUBLIC KEY`): for a renewal that an authenticated host asks for.
    ///
    /// # Errors
    /// [`CaError::BadRequest`].
    pub fn from_public_key_pem(pem: &str) -> Result<Self, CaError> {
        let key = SubjectPublicKeyInfo::from_pem(pem).map_err(bad_request)?;
        Self::checked(key)
    }

    fn from_der(der: &[u8]) -> Result<Self, CaError> {
        Self::checked(SubjectPublicKeyInfo::from_der(der).map_err(bad_request)?)
    }

    fn checked(key: SubjectPublicKeyInfo) -> Result<Self, CaError> {
        if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(CaError::BadRequest {
                reason: "the key is not ECDSA P-256".to_owned(),
            });
        }
        Ok(Self(key))
    }
}

/// A cluster's CA: its certificate and key.
pub struct Ca {
    cluster: String,
    cert_pem: String,
    key: KeyPair,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ca({})", self.cluster)
    }
}

impl Ca {
    /// Makes a new CA for a cluster, valid from (an hour before) `now`.
    ///
    /// # Errors
    /// [`CaError::BadClusterId`], [`CaError::Issue`].
    pub fn create(cluster: &str, options: &CaOptions, now: SystemTime) -> Result<Self, CaError> {
        check_cluster_id(cluster)?;
        let failed = |e: rcgen::Error| issue_failed(cluster, &e);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("quorate cluster {cluster}"));
        params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
        params.not_after = OffsetDateTime::from(now + options.ca_life);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert = params.self_signed(&key).map_err(failed)?;
        Ok(Self {
            cluster: cluster.to_owned(),
            cert_pem: cert.pem(),
            key,
        })
    }

    /// Reads a CA back from what [`Ca::cert_pem`] and [`Ca::key_pem`] gave.
    ///
    /// # Errors
    /// [`CaError::Unreadable`], [`CaError::BadClusterId`].
    pub fn from_pem(cluster: &str, cert_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        check_cluster_id(cluster)?;
        let unreadable = |e: rcgen::Error| CaError::Unreadable {
            reason: e.to_string(),
        };
        let key = KeyPair::from_pem(key_pem).map_err(unreadable)?;
        let ca = Self {
            cluster: cluster.to_owned(),
            cert_pem: cert_pem.to_owned(),
            key,
        };
        ca.issuer()?;
        Ok(ca)
    }

    /// The certificate, PEM. Public.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The private key, PEM. Belongs into the replicated state and nowhere else.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// SHA-256 of the certificate: what a join token pins.
    ///
    /// # Errors
    /// [`CaError::Unreadable`].
    pub fn fingerprint(&self) -> Result<String, CaError> {
        cert::first_certificate(&self.cert_pem)
            .map(|der| cert::fingerprint(&der))
            .map_err(|e| unreadable_ca(&e))
    }

    /// Issues a host certificate (PEM), valid from (an hour before) `now` for `options.host_life`.
    ///
    /// # Errors
    /// [`CaError::BadHostName`], [`CaError::BadClusterId`] (also for another cluster's subject), [`CaError::Issue`].
    pub fn issue(
        &self,
        subject: &Subject,
        key: &HostPublicKey,
        options: &CaOptions,
        now: SystemTime,
    ) -> Result<String, CaError> {
        if subject.cluster != self.cluster {
            return Err(CaError::BadClusterId(subject.cluster.clone()));
        }
        check_host_name(&subject.host)?;
        let failed = |e: rcgen::Error| issue_failed(&subject.host, &e);
        let ia5 = |text: String| Ia5String::try_from(text).map_err(failed);
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&subject.host);
        params.subject_alt_names = vec![
            SanType::DnsName(ia5(subject.host.clone())?),
            SanType::URI(ia5(node_uri(&subject.cluster, subject.node))?),
        ];
        params.not_before = OffsetDateTime::from(now - CLOCK_SKEW);
        params.not_after = OffsetDateTime::from(now + options.host_life);
        params.is_ca = IsCa::ExplicitNoCa;
        // Key encipherment is for QEMU, which refuses a certificate without it for encrypted migrations.
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let cert = params.signed_by(&key.0, &self.issuer()?).map_err(failed)?;
        Ok(cert.pem())
    }

    fn issuer(&self) -> Result<Issuer<'_, &KeyPair>, CaError> {
        let der = cert::first_certificate(&self.cert_pem).map_err(|e| unreadable_ca(&e))?;
        Issuer::from_ca_cert_der(&der, &self.key).map_err(|e| CaError::Unreadable {
            reason: e.to_string(),
        })
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

fn bad_request(error: rcgen::Error) -> CaError {
    CaError::BadRequest {
        reason: error.to_string(),
    }
}

fn issue_failed(host: &str, error: &rcgen::Error) -> CaError {
    CaError::Issue {
        host: host.to_owned(),
        reason: error.to_string(),
    }
}

fn unreadable_ca(error: &CertError) -> CaError {
    CaError::Unreadable {
        reason: error.to_string(),
    }
}

fn check_cluster_id(id: &str) -> Result<(), CaError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=64).contains(&id.len()) && id.chars().all(good) {
        Ok(())
    } else {
        Err(CaError::BadClusterId(id.to_owned()))
    }
}

fn check_host_name(name: &str) -> Result<(), CaError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let fits = (1..=253).contains(&name.len()) && name.chars().all(good);
    if fits && edge(name.chars().next()) && edge(name.chars().last()) {
        Ok(())
    } else {
        Err(CaError::BadHostName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{CertInfo, HostKey};

    fn subject() -> Subject {
        Subject {
            cluster: "c1".into(),
            node: 7,
            host: "h7.example".into(),
        }
    }

    #[test]
    fn a_host_certificate_names_what_the_ca_was_told() {
        let now = SystemTime::now();
        let options = CaOptions::default();
        let ca = Ca::create("c1", &options, now).unwrap();
        let ca = Ca::from_pem("c1", ca.cert_pem(), &ca.key_pem()).unwrap();
        let key = HostKey::generate().unwrap();
        for public in [
            HostPublicKey::from_csr_pem(&key.csr_pem().unwrap()).unwrap(),
            HostPublicKey::from_public_key_pem(&key.public_key_pem()).unwrap(),
        ] {
            let pem = ca.issue(&subject(), &public, &options, now).unwrap();
            let info = CertInfo::from_pem(&pem).unwrap();
            assert_eq!((info.cluster.as_str(), info.node), ("c1", 7));
            assert_eq!(info.host, "h7.example");
            let life = info.not_after.duration_since(info.not_before).unwrap();
            assert!(life.abs_diff(DAY * 30 + CLOCK_SKEW) < Duration::from_secs(2));
            assert!(!info.renewal_due(now));
            assert!(info.renewal_due(now + DAY * 21));
            info.check_time(now).unwrap();
            assert!(matches!(
                info.check_time(now + DAY * 31),
                Err(CertError::Expired { .. })
            ));
            assert!(matches!(
                info.check_time(now - DAY),
                Err(CertError::NotYetValid { .. })
            ));
        }
    }

    #[test]
    fn names_that_cannot_be_used_are_refused() {
        let now = SystemTime::now();
        let options = CaOptions::default();
        for bad in ["", "a b", "a/b", &"x".repeat(65)] {
            let refused = Ca::create(bad, &options, now);
            assert!(matches!(refused, Err(CaError::BadClusterId(_))), "{bad}");
        }
        let ca = Ca::create("c1", &options, now).unwrap();
        let key =
            HostPublicKey::from_csr_pem(&HostKey::generate().unwrap().csr_pem().unwrap()).unwrap();
        for bad in ["", "-h", "h.", "h_1", "h\u{e9}"] {
            let named = Subject {
                host: bad.into(),
                ..subject()
            };
            let refused = ca.issue(&named, &key, &options, now);
            assert!(matches!(refused, Err(CaError::BadHostName(_))), "{bad}");
        }
        let foreign = Subject {
            cluster: "c2".into(),
            ..subject()
        };
        assert!(matches!(
            ca.issue(&foreign, &key, &options, now),
            Err(CaError::BadClusterId(_))
        ));
    }

    #[test]
    fn damaged_requests_and_other_algorithms_are_refused() {
        let good = HostKey::generate().unwrap().csr_pem().unwrap();
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let ed = CertificateParams::default()
            .serialize_request(&other)
            .unwrap();
        for bad in [
            "nonsense",
            &good[..good.len() / 2],
            ed.pem().unwrap().as_str(),
        ] {
            let refused = HostPublicKey::from_csr_pem(bad);
            assert!(matches!(refused, Err(CaError::BadRequest { .. })), "{bad}");
        }
        assert!(matches!(
            Ca::from_pem("c1", "junk", "junk"),
            Err(CaError::Unreadable { .. })
        ));
    }
}
