//! Spawning QEMU, detached.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::identity;
use super::record::Record;
use super::sys::detach;
use super::watched::Watched;
use crate::config::{GuestConfig, RuntimePaths, StartMode};
use crate::error::HypervisorError;
use crate::qemu::command_line::command_line;

/// How much of QEMU's messages an error quotes.
const TAIL_MAX_BYTES: u64 = 2048;

/// A QEMU that was just spawned; it is not known yet whether it will work.
#[derive(Debug)]
pub struct Spawned {
    /// Its process.
    pub process: Watched,
    /// Where its messages begin in its log.
    pub log_start: u64,
}

/// Prepares the runtime directory, writes the record and spawns QEMU. Blocking, for a few milliseconds.
///
/// # Errors
/// [`HypervisorError::AlreadyRunning`], [`HypervisorError::Io`], [`HypervisorError::StartFailed`].
pub fn spawn(
    binary: &Path,
    config: &GuestConfig,
    mode: &StartMode,
) -> Result<Spawned, HypervisorError> {
    let paths = config.paths();
    let io_error = |action: &'static str, path: &Path, source: io::Error| HypervisorError::Io {
        vm: config.name.clone(),
        action,
        path: path.to_path_buf(),
        source,
    };
    create_private_dir(&paths.dir).map_err(|e| io_error("create the directory", &paths.dir, e))?;
    refuse_second(config, &paths)?;
    for socket in [
        paths.qmp(),
        paths.guard(),
        paths.console(),
        paths.agent(),
        paths.pidfile(),
    ] {
        remove_if_there(&socket).map_err(|e| io_error("remove the old file", &socket, e))?;
    }
    let log_path = paths.log();
    let log = open_log(&log_path).map_err(|e| io_error("open the log", &log_path, e))?;
    let log_start = log.metadata().map_or(0, |meta| meta.len());
    let errors = log
        .try_clone()
        .map_err(|e| io_error("open the log", &log_path, e))?;

    let write_record = |record: Record| {
        record
            .write()
            .map_err(|e| io_error("write the record", &paths.record(), e))
    };
    write_record(Record::new(config.clone(), mode.clone(), None))?;

    write_secrets(config, &paths).map_err(|e| io_error("write a secret below", &paths.dir, e))?;

    let mut command = Command::new(binary);
    command.args(command_line(config, mode));
    command.stdin(Stdio::null()).stdout(log).stderr(errors);
    detach(&mut command);
    let child = command
        .spawn()
        .map_err(|source| HypervisorError::StartFailed {
            vm: config.name.clone(),
            reason: format!("cannot execute {}: {source}", binary.display()),
            stderr: String::new(),
        })?;
    let pid = i32::try_from(child.id()).unwrap_or_default();
    // The child is not reaped before its pidfd is open, so its pid still means it, dead or alive. The
    // standard library's handle is let go: the end is observed, and reaped, through the pidfd.
    let process = identity::of_pid(pid)
        .and_then(|identity| Watched::open_unreaped(&identity))
        .and_then(|process| process.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)))
        .map_err(|e| io_error("watch the process", Path::new(&format!("/proc/{pid}")), e));
    let process = match process {
        Ok(process) => process,
        Err(error) => return Err(undo(child, error)),
    };
    let fact = Record::new(
        config.clone(),
        mode.clone(),
        Some(process.identity().clone()),
    );
    if let Err(error) = write_record(fact) {
        return Err(undo(child, error));
    }
    Ok(Spawned { process, log_start })
}

/// Passwords go through files that only this user can read, and only while QEMU starts: arguments can be seen by all.
fn write_secrets(config: &GuestConfig, paths: &RuntimePaths) -> io::Result<()> {
    for (index, disk) in config.disks.iter().enumerate() {
        let Some(password) = disk.password() else {
            continue;
        };
        let path = paths.secret(index);
        remove_if_there(&path)?;
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file?.write_all(password.0.as_bytes())?;
    }
    Ok(())
}

/// Removes what [`spawn`] wrote for QEMU to read at its start.
pub fn remove_secrets(config: &GuestConfig) {
    let paths = config.paths();
    let with = config.disks.iter().enumerate();
    for (index, _) in with.filter(|(_, disk)| disk.password().is_some()) {
        if let Err(error) = remove_if_there(&paths.secret(index)) {
            tracing::warn!(vm = config.name, %error, "a secret's file stays");
        }
    }
}

/// Ends a child that could not be put under watch.
fn undo(mut child: std::process::Child, error: HypervisorError) -> HypervisorError {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::error!(pid = child.id(), %error, "a QEMU that failed to start may still run");
    }
    error
}

/// A guest may live in the directory: started by us or by an earlier process.
fn refuse_second(config: &GuestConfig, paths: &RuntimePaths) -> Result<(), HypervisorError> {
    let live = Record::read(&paths.dir).and_then(|record| match record {
        Some(Record {
            identity: Some(identity),
            ..
        }) => Watched::open(&identity),
        Some(Record { identity: None, .. }) => {
            let found = identity::find_by_argument(&paths.pidfile().to_string_lossy())?;
            found.map_or(Ok(None), |identity| Watched::open(&identity))
        }
        None => Ok(None),
    });
    match live {
        Ok(None) => Ok(()),
        Ok(Some(process)) => Err(HypervisorError::AlreadyRunning {
            vm: config.name.clone(),
            pid: process.identity().pid,
        }),
        Err(source) => Err(HypervisorError::Io {
            vm: config.name.clone(),
            action: "tell whether it runs already from",
            path: paths.record(),
            source,
        }),
    }
}

fn create_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// The end of what QEMU wrote to its log since `start`.
#[must_use]
pub fn stderr_tail(log: &Path, start: u64) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let from = start.max(file.metadata()?.len().saturating_sub(TAIL_MAX_BYTES));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(TAIL_MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_else(|error| format!("({}: {error})", log.display()))
}

/// Whether files in this directory can be opened past the host's page cache.
#[must_use]
pub fn supports_direct_io(file: &Path) -> bool {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(file)
        .is_ok()
}
