//! The errors of this crate: one variant per operation, with the VM and what to do next.

use std::path::PathBuf;

use crate::qemu::qmp::QmpError;

/// Why an operation on a guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// The configuration cannot work.
    #[error("the configuration of VM {vm} cannot work: {problem}")]
    InvalidConfig {
        /// The VM.
        vm: String,
        /// What is wrong and how to mend it.
        problem: String,
    },
    /// A guest lives in that runtime directory already.
    #[error("VM {vm} runs already here as process {pid}; adopt it, or stop it first")]
    AlreadyRunning {
        /// The VM.
        vm: String,
        /// Its process.
        pid: i32,
    },
    /// QEMU ended, or refused, while it was being started. The process is gone and reaped.
    #[error("QEMU did not start VM {vm}: {reason}{}", tail(.stderr))]
    StartFailed {
        /// The VM.
        vm: String,
        /// What was seen.
        reason: String,
        /// The end of QEMU's own messages.
        stderr: String,
    },
    /// QEMU was not ready in time. The process was killed and reaped.
    #[error("QEMU did not get VM {vm} ready within {after_ms} ms (at: {stage}){}", tail(.stderr))]
    StartTimeout {
        /// The VM.
        vm: String,
        /// The deadline of the whole start.
        after_ms: u64,
        /// What it was waiting for.
        stage: &'static str,
        /// The end of QEMU's own messages.
        stderr: String,
    },
    /// The process between QEMU and a copy.
    #[error("VM {vm}: cannot {action} the relay to a disk's copy")]
    Relay {
        /// The VM.
        vm: String,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: crate::qemu::export::ExportError,
    },
    /// A file or directory of the guest could not be used.
    #[error("VM {vm}: cannot {action} {}", .path.display())]
    Io {
        /// The VM.
        vm: String,
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The guest's process is gone.
    #[error("VM {vm} is gone: its QEMU process has ended ({exit})")]
    Gone {
        /// The VM.
        vm: String,
        /// How it ended.
        exit: String,
    },
    /// QEMU did not do what it was told.
    #[error("VM {vm}: cannot {action}")]
    Qmp {
        /// The VM.
        vm: String,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: QmpError,
    },
    /// The guest could not be confirmed paused in time; it must be killed.
    #[error("VM {vm} could not be frozen: {detail}; kill it before its lease ends")]
    FreezeFailed {
        /// The VM.
        vm: String,
        /// What was seen.
        detail: String,
    },
    /// A frozen guest could not take its disks back: somebody else holds an image.
    #[error(
        "VM {vm} cannot be thawed: another process holds one of its disks ({detail}); kill this copy"
    )]
    DiskLockLost {
        /// The VM.
        vm: String,
        /// QEMU's words.
        detail: String,
    },
    /// The guest did not run after it was told to.
    #[error("VM {vm} does not run after `cont`: its state is {state}")]
    NotRunning {
        /// The VM.
        vm: String,
        /// What QEMU reports.
        state: String,
    },
    /// A graceful stop cannot be asked for.
    #[error("VM {vm} has no way to be shut down gracefully ({detail}); use a hard stop")]
    NoPowerdown {
        /// The VM.
        vm: String,
        /// Why not.
        detail: String,
    },
    /// SIGKILL was sent, the process has not ended yet.
    #[error(
        "VM {vm}: process {pid} was killed but has not ended within {after_ms} ms (stuck in the kernel?); its host must be fenced before the VM starts elsewhere"
    )]
    KillUnconfirmed {
        /// The VM.
        vm: String,
        /// Its process.
        pid: i32,
        /// How long was waited.
        after_ms: u64,
    },
    /// The guest agent did not answer.
    #[error("the guest agent of VM {vm} does not answer: {detail}")]
    Agent {
        /// The VM.
        vm: String,
        /// What was seen.
        detail: String,
    },
    /// The guest's memory could not be saved; the guest goes on.
    #[error("VM {vm} could not be saved to {}: {detail}", .path.display())]
    SaveFailed {
        /// The VM.
        vm: String,
        /// The file, removed again.
        path: PathBuf,
        /// What was seen.
        detail: String,
    },
    /// A migration could not be started or steered.
    #[error("migration of VM {vm}: {detail}")]
    Migration {
        /// The VM.
        vm: String,
        /// What was seen, and what to do.
        detail: String,
    },
    /// A disk cannot be worked on.
    #[error("disk {disk} of VM {vm}: {detail}")]
    Disk {
        /// The VM.
        vm: String,
        /// Its number, from 0.
        disk: usize,
        /// Why not.
        detail: String,
    },
    /// The host could not be examined.
    #[error("cannot examine QEMU on this host: {detail}")]
    Probe {
        /// What was seen, and what to do.
        detail: String,
    },
}

fn tail(stderr: &str) -> String {
    let text = stderr.trim();
    if text.is_empty() {
        String::new()
    } else {
        format!("; it said: {text}")
    }
}
