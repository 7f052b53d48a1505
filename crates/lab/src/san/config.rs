//! What the SAN keeps over a power cut: targets, backing files, who may log in, CHAP secrets.

use super::tgt::Target;
use crate::site::Site;
use crate::{LabError, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

/// The SAN's own record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Config {
    /// The number of its management socket.
    pub(super) control: u16,
    /// CHAP users with their secrets.
    pub(super) accounts: BTreeMap<String, String>,
    /// The targets.
    pub(super) targets: Vec<Target>,
}

impl Config {
    fn path(site: &Site) -> PathBuf {
        site.san_dir().join("config.json")
    }

    /// Reads it; an empty one when there is none yet.
    pub(super) fn load(site: &Site) -> Result<Self> {
        let path = Self::path(site);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(LabError::file("read", path)(error)),
        };
        serde_json::from_slice(&bytes).map_err(|source| LabError::Corrupt { path, source })
    }

    /// Writes it, for root's eyes only.
    pub(super) fn save(&self, site: &Site) -> Result<()> {
        let path = Self::path(site);
        let text = serde_json::to_vec_pretty(self).map_err(|source| LabError::Corrupt {
            path: path.clone(),
            source,
        })?;
        let new = path.with_extension("new");
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| std::io::Write::write_all(&mut file, &text))
            .and_then(|()| std::fs::rename(&new, &path));
        written.map_err(LabError::file("write", path))
    }
}
