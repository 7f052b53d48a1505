//! What a host knows of itself, in `DIR/node.json`: written once, by `init` or `join`.

use anyhow::{Context as _, Result, bail};
use quorate_types::{HostName, LeaseTimings, NodeId};
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Identity of this host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeFile {
    /// Format of this file.
    pub(crate) format: u32,
    /// Cluster's identity.
    pub(crate) cluster_id: String,
    /// Cluster's name.
    pub(crate) cluster_name: String,
    /// This host.
    pub(crate) host: HostName,
    /// Its number.
    pub(crate) node: NodeId,
    /// Where peers reach it, `address:port`.
    pub(crate) address: String,
    /// Timing of the lease when the host joined, for a start before the state has arrived.
    #[serde(default)]
    pub(crate) lease: LeaseTimings,
    /// It is no host but a witness.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) witness: bool,
}

/// Format this program writes.
pub(crate) const NODE_FORMAT: u32 = 1;

fn path(dir: &Path) -> PathBuf {
    dir.join("node.json")
}

impl NodeFile {
    /// Reads it.
    pub(crate) fn load(dir: &Path) -> Result<Self> {
        let path = path(dir);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "{} cannot be read: this host belongs to no cluster yet; run `quorate init` or `quorate join TOKEN`",
                path.display()
            )
        })?;
        let file: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        if file.format > NODE_FORMAT {
            bail!(
                "{} was written by a newer program (format {}): upgrade this host",
                path.display(),
                file.format
            );
        }
        Ok(file)
    }

    /// Fails if the directory belongs to a cluster already.
    pub(crate) fn refuse_existing(dir: &Path) -> Result<()> {
        if path(dir).exists() {
            let file = Self::load(dir)?;
            bail!(
                "{} belongs to host {} of cluster {} already; use another --dir, or remove the host from that cluster and delete the directory",
                dir.display(),
                file.host,
                file.cluster_name
            );
        }
        Ok(())
    }

    /// Writes it durably, last of all files: it marks the directory as complete.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        let path = path(dir);
        let temporary = path.with_extension("json.new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .with_context(|| format!("cannot create {}", temporary.display()))?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        std::fs::File::open(dir)?.sync_all()?;
        Ok(())
    }
}
