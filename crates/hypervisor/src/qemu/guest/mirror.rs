//! Copies of the guest's disks on other hosts.
//!
//! ```text
//! (none) --start--> copying --everything copied--> in step --drop--> (none)
//!                      |                              |
//!                      +---------drop ----------------+
//! ```
//! What QEMU 10.0.2 does (measured):
//! - with `copy-mode: write-blocking` a write is acknowledged to the guest when both sides have it; a flush
//!   goes to the guest's own disk only;
//! - with a `reconnect-delay` requests wait for a server that is gone, instead of failing. Without, or when the server
//!   answers with an error, the job ends by itself and *the guest goes on alone*: so the delay is long;
//! - what waits is let go by `yank` (a connection that hangs) and by a forced cancel (one that is being made
//!   again). Whoever calls [`Guest::drop_mirror`] has made sure that the copy does not count any more;
//! - nodes with a job on them cannot be given up: a freeze keeps the disks.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Guest, QUICK};
use crate::error::HypervisorError;
use crate::mirror::{MirrorStatus, MirrorTarget};
use crate::qemu::command_line::disk_node;

/// For so many seconds a request waits for a server that is gone: longer than anybody does.
const WAIT_FOR_SERVER_S: u32 = 86_400;
/// Longest wait for the first connection, in milliseconds.
const OPEN_WITHIN_MS: u32 = 2_000;
/// Bound for the end of a job that was cancelled.
const END_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

fn copy_node(disk: usize) -> String {
    format!("copy{disk}")
}

fn tls_id(disk: usize) -> String {
    format!("copy-tls{disk}")
}

fn job_id(disk: usize, tag: &str) -> String {
    format!("mirror-{disk}-{tag}")
}

/// The disk and the tag of a job that is a mirror.
fn of_job(id: &str) -> Option<(usize, String)> {
    let (disk, tag) = id.strip_prefix("mirror-")?.split_once('-')?;
    Some((disk.parse().ok()?, tag.to_owned()))
}

fn status(job: &Value) -> Option<MirrorStatus> {
    let (disk, tag) = of_job(job["device"].as_str()?)?;
    let yes = |field: &str| job[field].as_bool() == Some(true);
    let failed = match job["io-status"].as_str() {
        Some("ok") | None => None,
        Some(other) => Some(format!("a write to the copy failed ({other})")),
    };
    let error = job["error"].as_str().map(str::to_owned);
    Some(MirrorStatus {
        disk,
        tag,
        in_step: yes("ready") && yes("actively-synced") && !yes("paused"),
        done: job["offset"].as_u64().unwrap_or_default(),
        total: job["len"].as_u64().unwrap_or_default(),
        problem: error.or(failed),
    })
}

impl Guest {
    /// Begins to copy a disk, all of it, and then to keep the copy in step. `speed` bounds the copying, in bytes
    /// per second. `tag` (letters, digits) names this mirror later.
    ///
    /// # Errors
    /// When the server cannot be reached or QEMU refuses; then nothing is left.
    pub async fn start_mirror(
        &self,
        disk: usize,
        tag: &str,
        target: &MirrorTarget,
        speed: Option<u64>,
    ) -> Result<(), HypervisorError> {
        let deadline = Instant::now() + Duration::from_millis(u64::from(OPEN_WITHIN_MS)) + QUICK;
        let begun = self.begin_mirror(disk, tag, target, speed, deadline).await;
        if begun.is_err() {
            self.forget_copy(disk, Instant::now() + QUICK).await;
        }
        begun
    }

    async fn begin_mirror(
        &self,
        disk: usize,
        tag: &str,
        target: &MirrorTarget,
        speed: Option<u64>,
        deadline: Instant,
    ) -> Result<(), HypervisorError> {
        self.forget_copy(disk, deadline).await;
        let mut node = json!({
            "driver": "nbd",
            "node-name": copy_node(disk),
            "server": {
                "type": "inet",
                "host": target.address.ip().to_string(),
                "port": target.address.port().to_string(),
            },
            "export": target.export,
            "reconnect-delay": WAIT_FOR_SERVER_S,
            "open-timeout": OPEN_WITHIN_MS / 1000,
            "discard": "unmap",
        });
        if let Some(tls) = &target.tls {
            let object = json!({
                "qom-type": "tls-creds-x509",
                "id": tls_id(disk),
                "dir": tls.dir,
                "endpoint": "client",
                "verify-peer": true,
            });
            let action = "load the certificates for a copy";
            self.command(action, "object-add", object, deadline).await?;
            node["tls-creds"] = json!(tls_id(disk));
            if let Some(hostname) = &tls.hostname {
                node["tls-hostname"] = json!(hostname);
            }
        }
        self.command("open a disk's copy", "blockdev-add", node, deadline)
            .await?;
        let mut job = json!({
            "job-id": job_id(disk, tag),
            "device": disk_node(disk),
            "target": copy_node(disk),
            "sync": "full",
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
        });
        if let Some(speed) = speed {
            job["speed"] = json!(speed);
        }
        self.command("copy a disk", "blockdev-mirror", job, deadline)
            .await
            .map(|_| ())
    }

    /// Mirrors that exist.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn mirrors(&self) -> Result<Vec<MirrorStatus>, HypervisorError> {
        self.mirrors_by(Instant::now() + QUICK).await
    }

    async fn mirrors_by(&self, deadline: Instant) -> Result<Vec<MirrorStatus>, HypervisorError> {
        let action = "ask for its mirrors";
        let reply = self
            .command(action, "query-block-jobs", Value::Null, deadline)
            .await?;
        let jobs = reply.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(jobs.iter().filter_map(status).collect())
    }

    /// Lets go of a disk's copy, whatever the connection to it does: writes that wait for it are completed
    /// without it. None is no error.
    ///
    /// # Errors
    /// When the job has not ended.
    pub async fn drop_mirror(&self, disk: usize) -> Result<(), HypervisorError> {
        let deadline = Instant::now() + END_WITHIN;
        let yank = json!({
            "instances": [{ "type": "block-node", "node-name": copy_node(disk) }],
        });
        loop {
            let jobs = self.mirrors_by(deadline).await?;
            let Some(job) = jobs.iter().find(|job| job.disk == disk) else {
                break;
            };
            // Refused when there is no connection, or when the job ends just now.
            let _ = self
                .command("cut a copy", "yank", yank.clone(), deadline)
                .await;
            let cancel = json!({ "device": job_id(disk, &job.tag), "force": true });
            let _ = self
                .command("end a mirror", "block-job-cancel", cancel, deadline)
                .await;
            if Instant::now() >= deadline {
                return Err(HypervisorError::Io {
                    vm: self.config().name.clone(),
                    action: "end the mirror of",
                    path: disk_node(disk).into(),
                    source: std::io::ErrorKind::TimedOut.into(),
                });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        self.forget_copy(disk, deadline).await;
        Ok(())
    }

    /// Removes what is left of a mirror that has ended; usually there is nothing.
    async fn forget_copy(&self, disk: usize, deadline: Instant) {
        let (node, tls) = (copy_node(disk), tls_id(disk));
        for (command, arguments) in [
            ("blockdev-del", json!({ "node-name": node })),
            ("object-del", json!({ "id": tls })),
        ] {
            // Refused when it is not there.
            let _ = self
                .command("forget a copy", command, arguments, deadline)
                .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_of_others_are_no_mirrors() {
        let job = json!({
            "device": "mirror-1-42", "ready": true, "actively-synced": true, "paused": false,
            "offset": 5, "len": 7, "io-status": "ok", "type": "mirror",
        });
        let seen = status(&job).unwrap();
        assert_eq!(
            (seen.disk, seen.tag.as_str(), seen.in_step),
            (1, "42", true)
        );
        assert_eq!((seen.done, seen.total, seen.problem), (5, 7, None));
        for id in ["backup0", "mirror-x-1", "mirror-1"] {
            assert_eq!(of_job(id), None, "{id}");
        }
        let mut bad = job;
        bad["io-status"] = json!("nospace");
        bad["actively-synced"] = json!(false);
        let seen = status(&bad).unwrap();
        assert!(!seen.in_step);
        assert!(seen.problem.unwrap().contains("nospace"));
    }
}
