//! Renewal of this host's certificate: it signs its own with the cluster's key from the replicated
//! state when a third of the life is left, and swaps it in without a restart.

use quorate_consensus::Consensus;
use quorate_transport::{Ca, CaOptions, Credentials, HostPublicKey, Subject};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tracing::{info, warn};

use super::machine::Machine;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// Runs for the life of the daemon.
pub(crate) async fn renew(
    dir: PathBuf,
    consensus: Consensus<Machine>,
    credentials: Arc<Credentials>,
) {
    loop {
        if credentials.info().renewal_due(SystemTime::now()) {
            match renew_once(&dir, &consensus, &credentials) {
                Ok(()) => info!(not_after = ?credentials.info().not_after, "certificate renewed"),
                Err(error) => warn!(%error, "certificate cannot be renewed"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn renew_once(
    dir: &std::path::Path,
    consensus: &Consensus<Machine>,
    credentials: &Credentials,
) -> anyhow::Result<()> {
    let state = consensus.read(Machine::state);
    let cluster = state
        .cluster
        .as_ref()
        .ok_or_else(|| anyhow::anyhow!("the cluster's authority is not known here yet"))?;
    let identity = credentials.identity();
    let info = identity.info();
    let subject = Subject {
        cluster: cluster.id.clone(),
        node: info.node,
        host: info.host.clone(),
    };
    let ca = Ca::from_pem(&cluster.id, &cluster.ca_certificate, &cluster.ca_key)?;
    let key = HostPublicKey::from_public_key_pem(&identity.public_key_pem()?)?;
    let certificate = ca.issue(&subject, &key, &CaOptions::default(), SystemTime::now())?;
    let renewed = identity.with_certificate(&certificate, &cluster.ca_certificate)?;
    renewed.save(dir)?;
    super::tls::write(dir)?;
    credentials.replace(renewed)?;
    Ok(())
}
