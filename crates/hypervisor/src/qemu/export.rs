//! Exports: an image of this host that another host's guest is mirrored to, served by a `qemu-storage-daemon`.
//!
//! Always holds: one process for each export, in a directory of its own, with a record that a later agent finds it
//! by; it outlives the agent, as guests do; it holds QEMU's lock on the image, so that no guest starts on it
//! meanwhile; when [`close`] has returned, no late write can reach the image.
//!
//! Must not: know whether the copy counts.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use super::process::Watched;
use super::storage_daemon::{self, Files, failed};
use crate::guest::ProcessIdentity;

/// Ports are tried so often: between the choice of a free one and its use somebody else may take it.
const PORT_TRIES: u32 = 5;

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportConfig {
    /// The raw image.
    pub image: PathBuf,
    /// Name of the export: whoever does not know it gets nothing.
    pub name: String,
    /// Address of this host on which it is served.
    pub address: IpAddr,
    /// Directory with this host's certificates; absent: not encrypted.
    pub tls: Option<PathBuf>,
    /// What the caller wants to find again.
    pub note: String,
}

/// An export that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// What is served.
    pub config: ExportConfig,
    /// Where.
    pub address: SocketAddr,
    /// By which process.
    pub identity: ProcessIdentity,
}

/// Why there is no export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A file of it cannot be used.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The program did not come up.
    #[error("qemu-storage-daemon does not serve {}: {detail}", .image.display())]
    Start {
        /// Of which image.
        image: PathBuf,
        /// What it said.
        detail: String,
    },
    /// The same for a relay.
    #[error("the export at {address} cannot be used: {detail}")]
    Relay {
        /// Of the export.
        address: SocketAddr,
        /// What it said.
        detail: String,
    },
}

fn record(dir: &Path) -> PathBuf {
    dir.join("export.json")
}

fn files(dir: &Path) -> Files {
    Files {
        record: record(dir),
        pidfile: dir.join("export.pid"),
        log: dir.join("export.log"),
    }
}

/// The export whose directory this is, if it still lives.
///
/// # Errors
/// When that cannot be told.
pub fn find(dir: &Path) -> Result<Option<Export>, ExportError> {
    let path = record(dir);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", &path)(error)),
    };
    // A record that was not finished belongs to a process that was not started.
    let Ok(export) = serde_json::from_slice::<Export>(&bytes) else {
        return Ok(None);
    };
    let alive = Watched::open(&export.identity).map_err(failed("look at", &path))?;
    Ok(alive.map(|_| export))
}

/// Serves an image, with `dir` for its files. What was served there before has been closed.
///
/// # Errors
/// [`ExportError`]; then no process is left.
pub async fn open(
    program: &Path,
    dir: &Path,
    config: &ExportConfig,
    within: Duration,
) -> Result<Export, ExportError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("create", dir))?;
    let deadline = Instant::now() + within;
    let mut last = String::new();
    for _ in 0..PORT_TRIES {
        let free = TcpListener::bind((config.address, 0)).and_then(|socket| socket.local_addr());
        let address = free.map_err(failed("find a port for", dir))?;
        let export = |identity| Export {
            config: config.clone(),
            address,
            identity,
        };
        let line = arguments(config, address);
        match storage_daemon::start(program, &files(dir), line, export, deadline).await? {
            Ok(export) => return Ok(export),
            Err(said) => last = said,
        }
        if Instant::now() >= deadline || !last.contains("in use") {
            break;
        }
    }
    Err(ExportError::Start {
        image: config.image.clone(),
        detail: last,
    })
}

fn arguments(config: &ExportConfig, address: SocketAddr) -> Vec<String> {
    let mut server = json!({
        "addr": {
            "type": "inet",
            "host": address.ip().to_string(),
            "port": address.port().to_string(),
        },
        "max-connections": 4,
    });
    let mut line = Vec::new();
    if let Some(tls) = &config.tls {
        let object = json!({
            "qom-type": "tls-creds-x509",
            "id": "tls0",
            "dir": tls,
            "endpoint": "server",
            "verify-peer": true,
        });
        line.extend(["--object".to_owned(), object.to_string()]);
        server["tls-creds"] = json!("tls0");
    }
    // What the copy once took up it keeps, so that it cannot run out of space while it is in step.
    let file = json!({
        "driver": "file",
        "node-name": "file0",
        "filename": config.image,
        "locking": "on",
        "aio": "threads",
        "discard": "ignore",
    });
    let disk = json!({ "driver": "raw", "node-name": "disk0", "file": "file0" });
    let export = json!({
        "type": "nbd",
        "id": "export0",
        "node-name": "disk0",
        "name": config.name,
        "writable": true,
    });
    for (flag, value) in [
        ("--blockdev", file),
        ("--blockdev", disk),
        ("--nbd-server", server),
        ("--export", export),
    ] {
        line.extend([flag.to_owned(), value.to_string()]);
    }
    line
}

/// Ends an export: what it has taken is on stable storage, and nothing more is taken. None is no error.
///
/// # Errors
/// When it lives on.
pub async fn close(dir: &Path) -> Result<(), ExportError> {
    let Some(export) = find(dir)? else {
        return Ok(());
    };
    let path = record(dir);
    storage_daemon::end_recorded(&export.identity, &path).await?;
    let image = &export.config.image;
    match fs::File::open(image).and_then(|file| file.sync_all()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("flush", image)(error));
        }
        _ => {}
    }
    fs::remove_file(&path).map_err(failed("remove", &path))
}
