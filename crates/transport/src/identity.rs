//! A host's identity: its private key, its certificate and the cluster's CA certificate.
//!
//! Owns the file `identity.pem`. What always holds: the private key is made on the host and leaves it never; key,
//! certificate and CA are one file, replaced by one rename, so a crash in a renewal leaves the old or the new identity,
//! never a mix; the file is readable by its owner only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, KeyPair};
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::cert::{CertError, CertInfo};
use crate::tls;

const FILE: &str = "identity.pem";
const TEMPORARY: &str = "identity.pem.new";
const MAX_FILE: u64 = 256 * 1024;

/// Why an identity cannot be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is none.
    #[error(
        "{} does not exist: this host is in no cluster, use `quorate init` or `quorate join`", .path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file system failed.
    #[error("cannot {operation} {}: correct the permissions or the disk and try again", .path.display())]
    Io {
        /// `read`, `write`, ...
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is not what [`Identity::save`] wrote.
    #[error(
        "{} is damaged ({reason}): restore it from a backup, or join this host again with a new token", .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is broken.
        reason: String,
    },
    /// The certificate cannot be used.
    #[error(transparent)]
    Cert(#[from] CertError),
    /// The crypto library failed.
    #[error("cannot make a key for this host ({0}): this is a defect, please report it")]
    Key(String),
    /// A swap to an identity of someone else.
    #[error(
        "the new certificate is for node {found_node} of cluster {found_cluster}, but this host is node {node} of {cluster}: ask the cluster for a certificate again"
    )]
    NotMine {
        /// This host's node id.
        node: u64,
        /// This host's cluster.
        cluster: String,
        /// Node id in the new certificate.
        found_node: u64,
        /// Cluster in the new certificate.
        found_cluster: String,
    },
}

/// A host's private key (ECDSA P-256), made here and never shown but to the identity file.
pub struct HostKey(KeyPair);

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostKey(..)")
    }
}

impl HostKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// [`IdentityError::Key`].
    pub fn generate() -> Result<Self, IdentityError> {
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(|e| IdentityError::Key(e.to_string()))
    }

    /// A certificate request (PEM): proves possession of the key, asks for no name.
    ///
    /// # Errors
    /// [`IdentityError::Key`].
    pub fn csr_pem(&self) -> Result<String, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .serialize_request(&self.0)
            .and_then(|request| request.pem())
            .map_err(|e| IdentityError::Key(e.to_string()))
    }

    /// The public key (PEM).
    #[must_use]
    pub fn public_key_pem(&self) -> String {
        self.0.public_key_pem()
    }

    fn pem(&self) -> String {
        self.0.serialize_pem()
    }
}

/// A host's key with a certificate for it and the CA that issued it.
#[derive(Clone)]
pub struct Identity {
    key_pem: String,
    cert_pem: String,
    ca_pem: String,
    info: CertInfo,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.info).finish()
    }
}

impl Identity {
    /// Puts an identity together and checks that key, certificate and CA fit. Does not check the time: see
    /// [`Identity::check`].
    ///
    /// # Errors
    /// [`IdentityError::Cert`] with [`CertError::ForeignCa`], [`CertError::KeyMismatch`] or [`CertError::Malformed`].
    pub fn new(key: &HostKey, cert_pem: &str, ca_pem: &str) -> Result<Self, IdentityError> {
        Self::from_parts(key.pem(), cert_pem.to_owned(), ca_pem.to_owned())
    }

    fn from_parts(
        key_pem: String,
        cert_pem: String,
        ca_pem: String,
    ) -> Result<Self, IdentityError> {
        let info = CertInfo::from_pem(&cert_pem)?;
        let identity = Self {
            key_pem,
            cert_pem,
            ca_pem,
            info,
        };
        let loaded = Loaded::new(identity.clone())?;
        // Inside the validity: a certificate that has expired since is still this host's.
        let inside = identity.info.not_before + Duration::from_secs(1);
        tls::check_issued(&loaded, inside)?;
        Ok(identity)
    }

    /// What the certificate says.
    #[must_use]
    pub fn info(&self) -> &CertInfo {
        &self.info
    }

    /// The host certificate (PEM).
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The CA certificate (PEM).
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The public key (PEM), to ask for a renewal under the same key.
    ///
    /// # Errors
    /// [`IdentityError::Key`].
    pub fn public_key_pem(&self) -> Result<String, IdentityError> {
        KeyPair::from_pem(&self.key_pem)
            .map(|key| key.public_key_pem())
            .map_err(|e| IdentityError::Key(e.to_string()))
    }

    /// This identity with a new certificate for the same key.
    ///
    /// # Errors
    /// As [`Identity::new`].
    pub fn with_certificate(&self, cert_pem: &str, ca_pem: &str) -> Result<Self, IdentityError> {
        Self::from_parts(self.key_pem.clone(), cert_pem.to_owned(), ca_pem.to_owned())
    }

    /// Whether this identity can be used now in this cluster.
    ///
    /// # Errors
    /// [`CertError::WrongCluster`], [`CertError::Expired`], [`CertError::NotYetValid`].
    pub fn check(&self, cluster: &str, now: SystemTime) -> Result<(), CertError> {
        if self.info.cluster != cluster {
            return Err(CertError::WrongCluster {
                host: self.info.host.clone(),
                expected: cluster.to_owned(),
                found: self.info.cluster.clone(),
            });
        }
        self.info.check_time(now)
    }

    /// Reads the identity kept in `dir`.
    ///
    /// # Errors
    /// [`IdentityError::Missing`], [`IdentityError::Io`], [`IdentityError::Damaged`], [`IdentityError::Cert`].
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(FILE);
        let text = read_bounded(&path)?;
        let damaged = |reason: &str| IdentityError::Damaged {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        let blocks = pem_blocks(&text);
        let [key, cert, ca @ ..] = blocks.as_slice() else {
            return Err(damaged(
                "it must hold a key, a certificate and a CA certificate",
            ));
        };
        if ca.is_empty() {
            return Err(damaged("the CA certificate is missing"));
        }
        if !key.contains("PRIVATE KEY") {
            return Err(damaged("it does not begin with a private key"));
        }
        Self::from_parts((*key).to_owned(), (*cert).to_owned(), ca.concat()).map_err(|error| {
            match error {
                IdentityError::Cert(CertError::Malformed { reason }) => damaged(&reason),
                other => other,
            }
        })
    }

    /// Writes the identity into `dir` (which must exist), durably and in one step, readable by the owner only.
    ///
    /// # Errors
    /// [`IdentityError::Io`].
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        let temporary = dir.join(TEMPORARY);
        let path = dir.join(FILE);
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io {
                operation,
                path,
                source,
            }
        };
        // A left-over of a crash may have other permissions: begin afresh.
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &temporary)(e));
            }
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed("create", &temporary))?;
        let text = [&self.key_pem, &self.cert_pem, &self.ca_pem]
            .map(|block| block.trim_end().to_owned() + "\n")
            .concat();
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(failed("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(failed("replace", &path))?;
        File::open(dir)
            .and_then(|d| d.sync_all())
            .map_err(failed("sync", dir))
    }
}

fn read_bounded(path: &Path) -> Result<String, IdentityError> {
    let failed = |source: io::Error| {
        if source.kind() == io::ErrorKind::NotFound {
            IdentityError::Missing {
                path: path.to_owned(),
            }
        } else {
            IdentityError::Io {
                operation: "read",
                path: path.to_owned(),
                source,
            }
        }
    };
    let damaged = |reason: &str| IdentityError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(damaged("it is too large"));
    }
    let bytes = fs::read(path).map_err(failed)?;
    String::from_utf8(bytes).map_err(|_| damaged("it is not text"))
}

/// The PEM blocks of a text, each with its end line.
fn pem_blocks(text: &str) -> Vec<&str> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(begin) = rest.find("-----BEGIN ") {
        let Some(end) = rest[begin..].find("-----END ") else {
            break;
        };
        let tail = begin + end;
        let stop = rest[tail..]
            .find('\n')
            .map_or(rest.len(), |newline| tail + newline + 1);
        blocks.push(&rest[begin..stop]);
        rest = &rest[stop..];
    }
    blocks
}

/// An identity, ready for TLS.
pub(crate) struct Loaded {
    pub(crate) identity: Identity,
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) roots: Arc<RootCertStore>,
}

impl Loaded {
    fn new(identity: Identity) -> Result<Self, IdentityError> {
        let malformed = |reason: String| IdentityError::Cert(CertError::Malformed { reason });
        let mut roots = RootCertStore::empty();
        let mut chain = vec![crate::cert::first_certificate(&identity.cert_pem)?];
        for ca in CertificateDer::pem_slice_iter(identity.ca_pem.as_bytes()) {
            let ca = ca.map_err(|e| malformed(format!("CA certificate unreadable ({e})")))?;
            roots
                .add(ca.clone())
                .map_err(|e| malformed(format!("CA certificate unusable ({e})")))?;
            // The CA goes with the chain, so that a joining host can compare it with its token.
            chain.push(ca);
        }
        if roots.is_empty() {
            return Err(malformed("no CA certificate".to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes())
            .map_err(|e| malformed(format!("private key unreadable ({e})")))?;
        let key = CertifiedKey::from_der(chain, key, &tls::provider()).map_err(|e| match e {
            rustls::Error::InconsistentKeys(_) => IdentityError::Cert(CertError::KeyMismatch {
                host: identity.info.host.clone(),
            }),
            other => malformed(other.to_string()),
        })?;
        Ok(Self {
            identity,
            key: Arc::new(key),
            roots: Arc::new(roots),
        })
    }

    pub(crate) fn info(&self) -> &CertInfo {
        &self.identity.info
    }
}

/// The identity in use, shared by server and client, replaced at run time by a renewal.
#[derive(Debug)]
pub struct Credentials {
    current: RwLock<Arc<Loaded>>,
    generation: watch::Sender<u64>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.identity.fmt(f)
    }
}

impl Credentials {
    /// Starts with an identity.
    ///
    /// # Errors
    /// As [`Identity::new`].
    pub fn new(identity: Identity) -> Result<Arc<Self>, IdentityError> {
        Ok(Arc::new(Self {
            current: RwLock::new(Arc::new(Loaded::new(identity)?)),
            generation: watch::Sender::new(0),
        }))
    }

    /// Uses `identity` for every connection from now on. Clients replace their connections at once (the old ones finish what
    /// is under way); a server's connections keep the old certificate until the client renews them, at most an hour.
    ///
    /// # Errors
    /// [`IdentityError::NotMine`] for another node or cluster; else as [`Identity::new`].
    pub fn replace(&self, identity: Identity) -> Result<(), IdentityError> {
        let old = self.info();
        if (identity.info.node, &identity.info.cluster) != (old.node, &old.cluster) {
            return Err(IdentityError::NotMine {
                node: old.node,
                cluster: old.cluster,
                found_node: identity.info.node,
                found_cluster: identity.info.cluster,
            });
        }
        let loaded = Arc::new(Loaded::new(identity)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        self.generation.send_modify(|g| *g += 1);
        Ok(())
    }

    /// What the certificate in use says.
    #[must_use]
    pub fn info(&self) -> CertInfo {
        self.loaded().identity.info.clone()
    }

    /// The identity in use.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.loaded().identity.clone()
    }

    pub(crate) fn loaded(&self) -> Arc<Loaded> {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::{Ca, CaOptions, HostPublicKey, Subject};

    fn ca(cluster: &str) -> Ca {
        Ca::create(cluster, &CaOptions::default(), SystemTime::now()).unwrap()
    }

    fn issue(ca: &Ca, cluster: &str, key: &HostKey, now: SystemTime) -> String {
        let subject = Subject {
            cluster: cluster.into(),
            node: 1,
            host: "h1".into(),
        };
        let public = HostPublicKey::from_csr_pem(&key.csr_pem().unwrap()).unwrap();
        ca.issue(&subject, &public, &CaOptions::default(), now)
            .unwrap()
    }

    #[test]
    fn an_identity_is_saved_private_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Identity::load(dir.path()).unwrap_err();
        assert!(
            matches!(missing, IdentityError::Missing { .. }),
            "{missing}"
        );

        let ca = ca("c1");
        let key = HostKey::generate().unwrap();
        let now = SystemTime::now();
        let first = Identity::new(&key, &issue(&ca, "c1", &key, now), ca.cert_pem()).unwrap();
        first.save(dir.path()).unwrap();
        let path = dir.path().join(FILE);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = Identity::load(dir.path()).unwrap();
        assert_eq!(read.info(), first.info());
        assert_eq!(read.public_key_pem().unwrap(), key.public_key_pem());

        // A renewal replaces it, also when an earlier one crashed half way.
        fs::write(dir.path().join(TEMPORARY), "half").unwrap();
        let renewed = issue(&ca, "c1", &key, now + Duration::from_secs(60));
        let second = read.with_certificate(&renewed, ca.cert_pem()).unwrap();
        second.save(dir.path()).unwrap();
        let read = Identity::load(dir.path()).unwrap();
        assert!(read.info().not_after > first.info().not_after);
        assert!(!dir.path().join(TEMPORARY).exists());
    }

    #[test]
    fn damaged_files_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ca("c1");
        let key = HostKey::generate().unwrap();
        let now = SystemTime::now();
        let identity = Identity::new(&key, &issue(&ca, "c1", &key, now), ca.cert_pem()).unwrap();
        identity.save(dir.path()).unwrap();
        let path = dir.path().join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        let half = &text[..text.len() / 2];
        let swapped = [
            identity.cert_pem.clone(),
            identity.key_pem.clone(),
            identity.ca_pem.clone(),
        ]
        .concat();
        for bad in ["", half, swapped.as_str(), &text.replace("MI", "MA")] {
            fs::write(&path, bad).unwrap();
            let error = Identity::load(dir.path()).unwrap_err();
            assert!(matches!(error, IdentityError::Damaged { .. }), "{error}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let (mine, other) = (ca("c1"), ca("c1"));
        let key = HostKey::generate().unwrap();
        let now = SystemTime::now();
        let cert = issue(&mine, "c1", &key, now);
        let foreign = Identity::new(&key, &cert, other.cert_pem()).unwrap_err();
        assert!(
            matches!(foreign, IdentityError::Cert(CertError::ForeignCa { .. })),
            "{foreign}"
        );
        let stranger = HostKey::generate().unwrap();
        let mismatch = Identity::new(&stranger, &cert, mine.cert_pem()).unwrap_err();
        assert!(
            matches!(mismatch, IdentityError::Cert(CertError::KeyMismatch { .. })),
            "{mismatch}"
        );
        // An expired certificate is still readable: the host must be able to say so.
        let old = now - Duration::from_secs(40 * 24 * 3600);
        let expired = Identity::new(&key, &issue(&mine, "c1", &key, old), mine.cert_pem());
        // The CA is younger than that certificate, which does not matter here.
        let expired = expired.unwrap();
        assert!(matches!(
            expired.check("c1", now),
            Err(CertError::Expired { .. })
        ));
        assert!(matches!(
            expired.check("c2", now),
            Err(CertError::WrongCluster { .. })
        ));
    }

    #[test]
    fn a_swap_to_another_node_is_refused() {
        let (c1, c2) = (ca("c1"), ca("c2"));
        let key = HostKey::generate().unwrap();
        let now = SystemTime::now();
        let mine = Identity::new(&key, &issue(&c1, "c1", &key, now), c1.cert_pem()).unwrap();
        let foreign = Identity::new(&key, &issue(&c2, "c2", &key, now), c2.cert_pem()).unwrap();
        let credentials = Credentials::new(mine).unwrap();
        assert!(matches!(
            credentials.replace(foreign),
            Err(IdentityError::NotMine { .. })
        ));
        assert_eq!(credentials.info().cluster, "c1");
    }
}
