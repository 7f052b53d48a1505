//! Jobs on the disk of this host: one file for each, replaced in one step.

use crate::error::ImageError;
use quorate_types::ImageJob;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Jobs that are kept after they are over.
const KEPT: usize = 100;

/// What a host knows of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Format of this file.
    pub(crate) format: u32,
    /// What everybody may see.
    pub(crate) job: ImageJob,
    /// Names the parts that the job writes.
    pub(crate) part: String,
    /// The source as it was when the copy began.
    #[serde(default)]
    pub(crate) source: Option<String>,
    /// Bytes that are copied and durable.
    #[serde(default)]
    pub(crate) marked: u64,
    /// The target has been written to.
    #[serde(default)]
    pub(crate) begun: bool,
}

/// Where records are kept.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    folder: PathBuf,
}

impl Store {
    pub(crate) fn open(folder: &Path) -> Result<(Self, Vec<Record>), ImageError> {
        let failed = |error| ImageError::io(format!("{} cannot be used", folder.display()))(error);
        fs::create_dir_all(folder).map_err(failed)?;
        let mut records = Vec::new();
        for entry in fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|ext| ext != "json") {
                continue;
            }
            let read = fs::read(&path).map_err(failed)?;
            match serde_json::from_slice::<Record>(&read) {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a job's record cannot be read");
                }
            }
        }
        records.sort_by_key(|record| record.job.asked);
        let store = Self {
            folder: folder.to_owned(),
        };
        Ok((store, records))
    }

    /// For sockets and passwords on their way.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    /// Writes a record durably.
    pub(crate) fn save(&self, record: &Record) -> Result<(), ImageError> {
        let path = self.path(&record.job.id);
        let write = || -> std::io::Result<()> {
            let fresh = path.with_extension("new");
            let mut file = fs::File::create(&fresh)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            fs::File::open(&self.folder)?.sync_all()
        };
        write().map_err(ImageError::io("a job cannot be recorded"))
    }

    /// Forgets the oldest jobs that are over.
    pub(crate) fn prune(&self, records: &mut Vec<Record>) {
        let over = |record: &Record| record.job.state.is_over() && !record.job.resumable;
        let mut extra = records.iter().filter(|record| over(record)).count();
        extra = extra.saturating_sub(KEPT);
        records.retain(|record| {
            if extra == 0 || !over(record) {
                return true;
            }
            extra -= 1;
            // What cannot be removed is read again at the next start.
            let _ = fs::remove_file(self.path(&record.job.id));
            false
        });
    }
}
