//! The record of a guest in its runtime directory: what was started, and as which process.
//!
//! Written before the spawn without an identity (intent), again after it (fact), each time whole: a new
//! file, synced, renamed over the old one. The runtime directory may be on a RAM disk: after a reboot no
//! guest lives, and a boot id in the identity says so as well.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{GuestConfig, RuntimePaths, StartMode};
use crate::guest::ProcessIdentity;

/// Format of the record; a reader refuses a higher one.
const VERSION: u32 = 1;

/// What is known about a started guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// What it was started with.
    pub config: GuestConfig,
    /// What it did first.
    pub mode: StartMode,
    /// Its process; `None` while it is being spawned.
    pub identity: Option<ProcessIdentity>,
}

impl Record {
    /// A record of this version.
    #[must_use]
    pub fn new(config: GuestConfig, mode: StartMode, identity: Option<ProcessIdentity>) -> Self {
        Self {
            version: VERSION,
            config,
            mode,
            identity,
        }
    }

    /// Writes the record whole, or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self) -> io::Result<()> {
        let paths = self.config.paths();
        let draft = paths.dir.join("guest.json.new");
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&draft, paths.record())?;
        File::open(&paths.dir)?.sync_all()
    }

    /// Reads the record in `dir`; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        let bytes = match fs::read(RuntimePaths::new(dir).record()) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let record: Self = serde_json::from_slice(&bytes)?;
        if record.version > VERSION {
            let detail = format!(
                "guest.json has format {}, this build reads up to {VERSION}; use a newer build",
                record.version
            );
            return Err(io::Error::other(detail));
        }
        Ok(Some(record))
    }
}
