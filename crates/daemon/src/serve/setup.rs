//! `init` and `join`: how a directory becomes a host of a cluster.
//!
//! Always holds: `node.json` is written last, so a directory with it is complete; a failed attempt
//! can be repeated.

use super::group::wall_clock;
use super::link::Alone;
use super::machine::{Machine, Reply};
use super::node::{NODE_FORMAT, NodeFile};
use anyhow::{Context as _, Result, bail};
use quorate_consensus::{Config, Consensus};
use quorate_state::{Command, Envelope, FORMAT};
use quorate_transport::{Ca, CaOptions, HostKey, HostPublicKey, Identity, JoinToken, Subject};
use quorate_types::{ClusterSettings, HostName, LeaseTimings, NodeId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How long the first host may take to elect itself.
const FIRST_ELECTION: Duration = Duration::from_secs(10);
/// How long a join may take.
const JOIN_DEADLINE: Duration = Duration::from_secs(15);

/// What `join` sends.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JoinRequest {
    /// SHA-256 of the token's secret is what the state knows.
    pub(crate) secret: String,
    /// The new host.
    pub(crate) host: HostName,
    /// Where peers reach it.
    pub(crate) address: String,
    /// Its certificate request, PEM.
    pub(crate) request: String,
    /// It is no host but a witness.
    #[serde(default)]
    pub(crate) witness: bool,
}

/// What it gets back.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JoinReply {
    /// Its number.
    pub(crate) node: NodeId,
    /// Its certificate, PEM.
    pub(crate) certificate: String,
    /// The authority's certificate, PEM.
    pub(crate) ca_certificate: String,
    /// Cluster's identity.
    pub(crate) cluster_id: String,
    /// Cluster's name.
    pub(crate) cluster_name: String,
    /// Timing of the lease, for a start before the state has arrived.
    pub(crate) lease: LeaseTimings,
}

fn prepare_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    NodeFile::refuse_existing(dir)?;
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(dir)
        .with_context(|| format!("cannot create the state directory {}", dir.display()))
}

fn parse_address(address: &str) -> Result<SocketAddr> {
    let parsed: SocketAddr = address
        .parse()
        .with_context(|| format!("`{address}` is not ADDRESS:PORT, for example 192.0.2.11:7420"))?;
    if parsed.ip().is_unspecified() {
        bail!(
            "`{address}` is no address that other hosts can reach: give the one of this host on the cluster network"
        );
    }
    Ok(parsed)
}

/// The raft node's settings for a lease of this duration: elections take less than half a lease.
pub(crate) fn raft_config(node: NodeId, dir: &Path) -> Config {
    Config::new(node, dir.join("raft"))
}

/// Makes a cluster with this host as its first.
pub(crate) async fn init(
    dir: &Path,
    name: &str,
    host: HostName,
    address: &str,
    settings: ClusterSettings,
) -> Result<NodeFile> {
    parse_address(address)?;
    settings
        .check()
        .map_err(|problem| anyhow::anyhow!("settings: {problem}"))?;
    prepare_dir(dir)?;
    let lease = settings.lease;
    let now = SystemTime::now();
    let cluster_id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
        .trim()
        .to_owned();
    let options = CaOptions::default();
    let ca = Ca::create(&cluster_id, &options, now)?;
    let key = HostKey::generate()?;
    let subject = Subject {
        cluster: cluster_id.clone(),
        node: 1,
        host: host.to_string(),
    };
    let certificate = ca.issue(
        &subject,
        &HostPublicKey::from_csr_pem(&key.csr_pem()?)?,
        &options,
        now,
    )?;
    Identity::new(&key, &certificate, ca.cert_pem())?.save(dir)?;

    let (machine, _published) = Machine::new();
    let consensus =
        Consensus::open(raft_config(1, dir), machine, std::sync::Arc::new(Alone)).await?;
    consensus.bootstrap().await?;
    let mut leadership = consensus.leadership();
    tokio::time::timeout(
        FIRST_ELECTION,
        leadership.wait_for(|leading| leading.is_self),
    )
    .await
    .context("the first host did not elect itself: is the disk very slow?")?
    .context("the replicated log stopped")?;
    let envelope = Envelope {
        format: FORMAT,
        at: wall_clock(),
        by: "init".into(),
        command: Command::CreateCluster {
            id: cluster_id.clone(),
            name: name.to_owned(),
            ca_certificate: ca.cert_pem().to_owned(),
            ca_key: ca.key_pem(),
            host: host.clone(),
            address: address.to_owned(),
            settings,
        },
    };
    let applied = consensus
        .propose(serde_json::to_vec(&envelope)?, FIRST_ELECTION)
        .await?;
    let reply: Reply = serde_json::from_slice(&applied.reply)?;
    reply?;
    consensus.shutdown().await;
    let file = NodeFile {
        format: NODE_FORMAT,
        cluster_id,
        cluster_name: name.to_owned(),
        host,
        node: 1,
        address: address.to_owned(),
        lease,
        witness: false,
    };
    file.save(dir)?;
    Ok(file)
}

/// Makes this host a member of the token's cluster.
pub(crate) async fn join(
    dir: &Path,
    token: &str,
    host: HostName,
    address: &str,
) -> Result<NodeFile> {
    join_as(dir, token, host, address, false).await
}

/// Makes this machine the witness of the token's cluster.
pub(crate) async fn join_witness(
    dir: &Path,
    token: &str,
    name: HostName,
    address: &str,
) -> Result<NodeFile> {
    join_as(dir, token, name, address, true).await
}

async fn join_as(
    dir: &Path,
    token: &str,
    host: HostName,
    address: &str,
    witness: bool,
) -> Result<NodeFile> {
    parse_address(address)?;
    let token: JoinToken = token.parse()?;
    prepare_dir(dir)?;
    let key = HostKey::generate()?;
    let request = JoinRequest {
        secret: token.secret.reveal(),
        host: host.clone(),
        address: address.to_owned(),
        request: key.csr_pem()?,
        witness,
    };
    let body = serde_json::to_vec(&request)?;
    let answer = quorate_transport::join(&token, body, JOIN_DEADLINE).await?;
    let reply: JoinReply =
        serde_json::from_slice(&answer).context("the cluster's answer cannot be read")?;
    Identity::new(&key, &reply.certificate, &reply.ca_certificate)?.save(dir)?;
    let file = NodeFile {
        format: NODE_FORMAT,
        cluster_id: reply.cluster_id,
        cluster_name: reply.cluster_name,
        host,
        node: reply.node,
        address: address.to_owned(),
        lease: reply.lease,
        witness,
    };
    file.save(dir)?;
    Ok(file)
}
