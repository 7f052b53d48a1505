//! Relays: the owner's end of a copy, a `qemu-storage-daemon` between the guest's QEMU and the export on the other host.
//!
//! ```text
//! QEMU --NBD, unix socket--> relay --NBD, TLS--> export on the copy's host
//!      requests fail at once        requests wait for an export that hangs or is gone
//!      when the relay has ended
//! ```
//! Why: QEMU waits in its main loop for everything that is under way to end, on any of its disks, whenever a mirror begins or
//! ends. What waits there for another host keeps QEMU from hearing that it shall not wait any more: a guest with two copies
//! on a host that was lost stood still for good (measured, QEMU 10.0.2). Waiting in a process of its own, it is let go of by ending that
//! process, which needs no answer of QEMU's.
//!
//! Always holds: one process for each mirror of a disk at most, with its files in the guest's runtime directory, known by a
//! record; it outlives the agent, and not the guest; where it has ended QEMU waits for nothing of that copy.
//!
//! Must not: know whether the copy counts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use super::export::ExportError;
use super::process::identity;
use super::storage_daemon::{self, Files, failed, remove};
use crate::guest::ProcessIdentity;
use crate::mirror::MirrorTarget;

/// For so many seconds a request waits for a server that is gone: longer than anybody does.
const WAIT_FOR_SERVER_S: u32 = 86_400;
/// Longest wait for the first connection.
const OPEN_WITHIN_S: u32 = 2;
/// A mirror and a backup, and one that is not noticed to be closed yet.
const CONNECTIONS: u32 = 4;
const RECORD: &str = ".relay.json";

#[derive(Debug, Serialize, Deserialize)]
struct Relay {
    identity: ProcessIdentity,
}

fn files(dir: &Path, disk: usize) -> Files {
    Files {
        record: dir.join(format!("copy{disk}{RECORD}")),
        pidfile: dir.join(format!("copy{disk}.pid")),
        log: dir.join(format!("copy{disk}.log")),
    }
}

/// Where QEMU finds it.
pub(super) fn socket(dir: &Path, disk: usize) -> PathBuf {
    dir.join(format!("copy{disk}.sock"))
}

fn arguments(socket: &Path, target: &MirrorTarget) -> Vec<String> {
    let mut line = Vec::new();
    let mut node = json!({
        "driver": "nbd",
        "node-name": "copy",
        "server": {
            "type": "inet",
            "host": target.address.ip().to_string(),
            "port": target.address.port().to_string(),
        },
        "export": target.export,
        "open-timeout": OPEN_WITHIN_S,
        "reconnect-delay": WAIT_FOR_SERVER_S,
        "discard": "unmap",
    });
    if let Some(tls) = &target.tls {
        let object = json!({
            "qom-type": "tls-creds-x509",
            "id": "tls0",
            "dir": tls.dir,
            "endpoint": "client",
            "verify-peer": true,
        });
        line.extend(["--object".to_owned(), object.to_string()]);
        node["tls-creds"] = json!("tls0");
        if let Some(hostname) = &tls.hostname {
            node["tls-hostname"] = json!(hostname);
        }
    }
    let server = json!({
        "addr": { "type": "unix", "path": socket },
        "max-connections": CONNECTIONS,
    });
    let export = json!({
        "type": "nbd",
        "id": "export0",
        "node-name": "copy",
        "name": target.export,
        "writable": true,
    });
    for (flag, value) in [
        ("--blockdev", node),
        ("--nbd-server", server),
        ("--export", export),
    ] {
        line.extend([flag.to_owned(), value.to_string()]);
    }
    line
}

/// Starts one for a disk; what there was has ended.
pub(super) async fn open(
    dir: &Path,
    disk: usize,
    target: &MirrorTarget,
    deadline: Instant,
) -> Result<PathBuf, ExportError> {
    close(dir, disk).await?;
    let (files, socket) = (files(dir, disk), socket(dir, disk));
    let line = arguments(&socket, target);
    let relay = |identity| Relay { identity };
    let started = storage_daemon::start(&target.program, &files, line, relay, deadline).await?;
    started.map(|_| socket).map_err(|said| ExportError::Relay {
        address: target.address,
        detail: said,
    })
}

/// Ends the one of a disk. None is no error.
pub(super) async fn close(dir: &Path, disk: usize) -> Result<(), ExportError> {
    let (files, socket) = (files(dir, disk), socket(dir, disk));
    let found = match fs::read(&files.record) {
        Ok(bytes) => serde_json::from_slice::<Relay>(&bytes).ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed("read", &files.record)(error)),
    };
    let found = match found {
        Some(relay) => Some(relay.identity),
        // The agent died between its start and the record of it.
        None if files.log.exists() => {
            let pidfile = files.pidfile.display().to_string();
            identity::find_by_argument(&pidfile).map_err(failed("look for", &files.pidfile))?
        }
        None => return Ok(()),
    };
    if let Some(identity) = found {
        storage_daemon::end_recorded(&identity, &files.record).await?;
    }
    // The log last: without it nothing is looked for.
    for file in [&socket, &files.pidfile, &files.record, &files.log] {
        remove(file)?;
    }
    Ok(())
}

/// Ends all that a guest had which has ended.
pub(super) async fn close_all(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let disk = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("copy")?
            .strip_suffix(".log")?
            .parse()
            .ok()
    };
    let disks: Vec<usize> = entries.filter_map(disk).collect();
    for disk in disks {
        if let Err(error) = close(dir, disk).await {
            tracing::warn!(%error, "a relay to a copy stays");
        }
    }
}
