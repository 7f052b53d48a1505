//! TLS 1.3 with the cluster's CA: who may be at the other end.
//!
//! What always holds: the chain, the time, the cluster id and (for a client) the node id of every peer are checked in every
//! handshake; there is no session resumption, which would skip the check. Host names are not compared: the node id in the
//! certificate says who it is, wherever it listens. The crypto provider is named explicitly; no process-wide default.
//!
//! Each handshake has its own verifier with a slot, in which it leaves the typed reason of a refusal: the TLS library's own
//! error must stay what it is, since it chooses the alert that the other side sees.

use std::io;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::cert::{CertError, CertInfo, fingerprint};
use crate::identity::Loaded;

/// The crypto provider of every TLS connection here.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .clone()
}

/// Where a verifier leaves the typed reason of a refusal.
#[derive(Debug, Clone, Default)]
pub(crate) struct Slot(Arc<std::sync::Mutex<Option<CertError>>>);

impl Slot {
    pub(crate) fn put(&self, error: CertError) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    pub(crate) fn take(&self) -> Option<CertError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Whom a client accepts.
#[derive(Debug, Clone)]
enum Accept {
    /// This node, under these roots.
    Node(u64, Arc<RootCertStore>),
    /// Any node, under a CA with this fingerprint that the server presents itself.
    Pinned(String),
}

#[derive(Debug)]
struct ServerVerifier {
    cluster: String,
    accept: Accept,
    slot: Slot,
}

impl ServerVerifier {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refused> {
        let pinned;
        let roots = match &self.accept {
            Accept::Node(_, roots) => roots.as_ref(),
            Accept::Pinned(wanted) => {
                pinned = pinned_root(wanted, intermediates)?;
                &pinned
            }
        };
        let info = CertInfo::from_der(end_entity)?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms.all;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            roots,
            intermediates,
            now,
            algorithms,
        )
        .map_err(|e| Refused {
            reason: Box::new(explain(&e, &info, &self.cluster)),
            tls: e,
        })?;
        same_cluster(&info, &self.cluster)?;
        match self.accept {
            Accept::Node(node, _) if node != info.node => Err(CertError::WrongNode {
                expected: node,
                found: info.node,
                host: info.host,
            }
            .into()),
            _ => Ok(()),
        }
    }
}

/// A refusal: the typed reason, and the TLS library's error that chooses the alert.
struct Refused {
    reason: Box<CertError>,
    tls: rustls::Error,
}

impl From<CertError> for Refused {
    fn from(reason: CertError) -> Self {
        let tls = CertificateError::ApplicationVerificationFailure.into();
        Self {
            reason: Box::new(reason),
            tls,
        }
    }
}

impl From<rustls::Error> for Refused {
    fn from(tls: rustls::Error) -> Self {
        let reason = CertError::Handshake {
            reason: tls.to_string(),
        };
        Self {
            reason: Box::new(reason),
            tls,
        }
    }
}

fn pinned_root(wanted: &str, presented: &[CertificateDer<'_>]) -> Result<RootCertStore, CertError> {
    let ca = presented
        .iter()
        .find(|der| fingerprint(der) == *wanted)
        .ok_or_else(|| CertError::WrongFingerprint {
            wanted: wanted.chars().take(16).collect(),
        })?;
    let mut roots = RootCertStore::empty();
    roots
        .add(ca.clone().into_owned())
        .map_err(|e| CertError::Malformed {
            reason: format!("its CA certificate is unusable ({e})"),
        })?;
    Ok(roots)
}

fn same_cluster(info: &CertInfo, cluster: &str) -> Result<(), CertError> {
    if info.cluster == cluster {
        return Ok(());
    }
    Err(CertError::WrongCluster {
        host: info.host.clone(),
        expected: cluster.to_owned(),
        found: info.cluster.clone(),
    })
}

/// The typed reason behind a chain that does not verify.
fn explain(error: &rustls::Error, info: &CertInfo, cluster: &str) -> CertError {
    use CertificateError as E;
    let rustls::Error::InvalidCertificate(why) = error else {
        return CertError::Handshake {
            reason: error.to_string(),
        };
    };
    let host = info.host.clone();
    #[allow(deprecated)]
    match why {
        E::Expired | E::ExpiredContext { .. } => CertError::Expired {
            host,
            not_after: info.not_after,
        },
        E::NotValidYet | E::NotValidYetContext { .. } => CertError::NotYetValid {
            host,
            not_before: info.not_before,
        },
        E::UnknownIssuer | E::BadSignature => {
            let cluster = cluster.to_owned();
            same_cluster(info, &cluster)
                .err()
                .unwrap_or(CertError::ForeignCa { host, cluster })
        }
        other => CertError::Handshake {
            reason: other.to_string(),
        },
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.check(end_entity, intermediates, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(refused) => {
                self.slot.put(*refused.reason);
                Err(refused.tls)
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[derive(Debug)]
struct ClientVerifier {
    cluster: String,
    chain: Arc<dyn ClientCertVerifier>,
    slot: Slot,
}

impl ClientVerifier {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refused> {
        let info = CertInfo::from_der(end_entity)?;
        self.chain
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(|e| Refused {
                reason: Box::new(explain(&e, &info, &self.cluster)),
                tls: e,
            })?;
        Ok(same_cluster(&info, &self.cluster)?)
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.check(end_entity, intermediates, now) {
            Ok(()) => Ok(ClientCertVerified::assertion()),
            Err(refused) => {
                self.slot.put(*refused.reason);
                Err(refused.tls)
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// A TLS configuration that could not be built. Only a defect or a broken identity leads here.
fn config_error(error: &dyn std::fmt::Display) -> CertError {
    CertError::Handshake {
        reason: format!("TLS configuration: {error}"),
    }
}

/// For a connection to `node`, with this host's certificate.
pub(crate) fn peer_client(
    loaded: &Loaded,
    node: u64,
) -> Result<(Arc<ClientConfig>, Slot), CertError> {
    let accept = Accept::Node(node, loaded.roots.clone());
    let cluster = &loaded.info().cluster;
    client(cluster, accept, Some(loaded))
}

/// For a connection of a host that is in no cluster yet.
pub(crate) fn join_client(
    cluster: &str,
    ca_fingerprint: &str,
) -> Result<(Arc<ClientConfig>, Slot), CertError> {
    client(cluster, Accept::Pinned(ca_fingerprint.to_owned()), None)
}

fn client(
    cluster: &str,
    accept: Accept,
    own: Option<&Loaded>,
) -> Result<(Arc<ClientConfig>, Slot), CertError> {
    let slot = Slot::default();
    let verifier = Arc::new(ServerVerifier {
        cluster: cluster.to_owned(),
        accept,
        slot: slot.clone(),
    });
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| config_error(&e))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match own {
        Some(loaded) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.key.clone())))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok((Arc::new(config), slot))
}

/// For one accepted connection.
pub(crate) fn server(loaded: &Loaded) -> Result<(Arc<ServerConfig>, Slot), CertError> {
    let slot = Slot::default();
    let chain = WebPkiClientVerifier::builder_with_provider(loaded.roots.clone(), provider())
        .build()
        .map_err(|e| config_error(&e))?;
    let verifier = Arc::new(ClientVerifier {
        cluster: loaded.info().cluster.clone(),
        chain,
        slot: slot.clone(),
    });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| config_error(&e))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.key.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok((Arc::new(config), slot))
}

/// Whether an identity's own CA issued its certificate, at time `at`.
pub(crate) fn check_issued(loaded: &Loaded, at: SystemTime) -> Result<(), CertError> {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let verifier = ServerVerifier {
        cluster: loaded.info().cluster.clone(),
        accept: Accept::Node(loaded.info().node, loaded.roots.clone()),
        slot: Slot::default(),
    };
    let (leaf, rest) = loaded
        .key
        .cert
        .split_first()
        .ok_or_else(|| CertError::Malformed {
            reason: "no certificate".to_owned(),
        })?;
    verifier
        .check(leaf, rest, UnixTime::since_unix_epoch(seconds))
        .map_err(|refused| *refused.reason)
}

/// The typed reason why a handshake or an early read failed, if TLS is the reason at all.
pub(crate) fn reason_of(
    error: &io::Error,
    slot: &Slot,
    own: Option<&CertInfo>,
) -> Option<CertError> {
    if let Some(reason) = slot.take() {
        return Some(reason);
    }
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())?;
    let rustls::Error::AlertReceived(alert) = tls else {
        return Some(CertError::Handshake {
            reason: tls.to_string(),
        });
    };
    if *alert == AlertDescription::UnknownCA && own.is_some() {
        return Some(CertError::UnknownToPeer);
    }
    match (own, is_about_certificate(*alert)) {
        (Some(own), true) => Some(CertError::RefusedByPeer {
            alert: format!("{alert:?}"),
            own_not_after: own.not_after,
        }),
        _ => Some(CertError::Handshake {
            reason: format!("the other side sent the alert {alert:?}"),
        }),
    }
}

fn is_about_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::CertificateExpired
            | A::CertificateUnknown
            | A::CertificateRevoked
            | A::CertificateRequired
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::AccessDenied
            | A::DecryptError
    )
}
