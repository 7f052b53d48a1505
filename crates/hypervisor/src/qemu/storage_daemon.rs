//! A `qemu-storage-daemon`: started detached, known by a record, ended by its pidfd.
//!
//! Always holds: it outlives us, as guests do; when it has ended, nothing that was sent to it takes effect any more. Where
//! memory runs out others are ended before it (proc(5), `oom_score_adj`): it is small, and a guest's writes hang on it.
//!
//! Must not: know what it serves.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, timeout};

use super::export::ExportError;
use super::process::{Watched, detach, identity, stderr_tail};
use crate::guest::ProcessIdentity;

/// `oom_score_adj`: after everything that may be ended at all.
const SPARED: &str = "-999";
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Bound of the end of a process that was killed.
const END_WITHIN: Duration = Duration::from_secs(2);

/// The files of one.
#[derive(Debug)]
pub(super) struct Files {
    /// Which process it is, for a later agent.
    pub(super) record: PathBuf,
    /// Written by it when it serves.
    pub(super) pidfile: PathBuf,
    /// What it says.
    pub(super) log: PathBuf,
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    move |source| ExportError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Removes a file; none is no error.
pub(super) fn remove(path: &Path) -> Result<(), ExportError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Starts one, and waits until it serves. What is recorded is returned; the inner error is what the program said.
pub(super) async fn start<T: Serialize>(
    program: &Path,
    files: &Files,
    mut arguments: Vec<String>,
    recorded: impl FnOnce(ProcessIdentity) -> T,
    deadline: Instant,
) -> Result<Result<T, String>, ExportError> {
    let (pidfile, log) = (&files.pidfile, &files.log);
    for old in [pidfile, &files.record] {
        remove(old)?;
    }
    let mut options = fs::OpenOptions::new();
    let messages = options.create(true).truncate(true).write(true).mode(0o600);
    let messages = messages.open(log).map_err(failed("open", log))?;
    let errors = messages.try_clone().map_err(failed("open", log))?;
    arguments.extend(["--pidfile".to_owned(), pidfile.display().to_string()]);
    let mut command = Command::new(program);
    command.args(arguments);
    command.stdin(Stdio::null()).stdout(messages).stderr(errors);
    detach(&mut command);
    let child = command.spawn().map_err(failed("execute", program))?;
    let pid = i32::try_from(child.id()).unwrap_or_default();
    // Needs CAP_SYS_RESOURCE; without it the process is one among others.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), SPARED);
    // As for guests: the end is observed, and reaped, through the pidfd.
    let process = identity::of_pid(pid).and_then(|identity| {
        let process = Watched::open_unreaped(&identity)?;
        process.ok_or_else(|| io::ErrorKind::NotFound.into())
    });
    let process = process.map_err(failed("watch", log))?;
    let record = recorded(process.identity().clone());
    let written = serde_json::to_vec(&record).map_err(io::Error::from);
    let written = written.and_then(|bytes| fs::write(&files.record, bytes));
    if let Err(error) = written {
        end(&process).await;
        return Err(failed("write", &files.record)(error));
    }
    loop {
        if fs::metadata(pidfile).is_ok_and(|meta| meta.len() > 0) {
            return Ok(Ok(record));
        }
        if timeout(LOOK_AGAIN, process.ended()).await.is_ok() {
            return Ok(Err(stderr_tail(log, 0)));
        }
        if Instant::now() >= deadline {
            end(&process).await;
            return Ok(Err("it did not get ready in time".into()));
        }
    }
}

/// Ends the process that was recorded. One that has ended is no error.
pub(super) async fn end_recorded(
    identity: &ProcessIdentity,
    record: &Path,
) -> Result<(), ExportError> {
    let process = Watched::open(identity).map_err(failed("look at", record))?;
    match process {
        Some(process) if !end(&process).await => Err(failed("end the process of", record)(
            io::ErrorKind::TimedOut.into(),
        )),
        _ => Ok(()),
    }
}

/// Whether it has ended.
async fn end(process: &Watched) -> bool {
    // Its connections may hang: there is nothing to wait for, what it has taken is in the file.
    if process.kill().is_err() {
        return false;
    }
    timeout(END_WITHIN, process.ended()).await.is_ok()
}
