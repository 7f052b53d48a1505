//! Copies of the guest's disks on other hosts.
//!
//! ```text
//! (none) --start--> copying --everything copied--> in step --drop--> (none)
//!                      |                              |
//!                      +---------drop ----------------+
//!
//! with a write map, what the copy lacks:
//!
//!   guest --> mirror (new writes, to both) --> backup's filter (old data first) --> file --backup job--> copy
//!                     copyN                                                                 againN
//! ```
//! QEMU is connected to a relay on this host ([`crate::qemu::relay`]), never to the other host: what waits, waits there.
//!
//! What QEMU 10.0.2 does (measured):
//! - with `copy-mode: write-blocking` a write is acknowledged to the guest when both sides have it; a flush
//!   goes to the guest's own disk only;
//! - a request that fails, because the relay has ended or the server answers with an error, ends the job, and *the
//!   guest goes on alone*. The relay answers when the export does, however long that takes;
//! - when a mirror begins or ends, as when the guest is paused, QEMU waits in its main loop for all that is under way on
//!   any disk, and answers nobody meanwhile. So a copy is let go of by ending its relay first, which needs no answer.
//!   Whoever calls [`Guest::drop_mirror`] has made sure that the copy does not count any more;
//! - nodes with a job on them cannot be given up: a freeze keeps the disks;
//! - a mirror takes no bitmap, and a backup takes no node that a mirror is on. So the mirror is on the disk's node, and the
//!   backup on the file's below it, both to the same export. A write passes the backup's filter first, which copies what
//!   was there and waits for the job where that is just being copied; then it goes to the disk; then to the copy. So what is
//!   old never follows what is new (`tests/mirror.rs` compares the bytes). The mirror begins *before* the map
//!   is read, so that each write is in the map, or mirrored, or both;
//! - a backup does not end by itself, but by hand ([`Guest::finish_resync`]) when no write is under way: its end waits for all
//!   writes. Until then the copy cannot be in step, so whatever takes too long here costs only another attempt;
//! - a write that needs something old to be copied fails when that cannot be done: `werror=stop` pauses the guest,
//!   with that write kept for when it is resumed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::write_map::{CHUNK, map_name};
use super::{Guest, QUICK};
use crate::error::HypervisorError;
use crate::mirror::{MirrorStatus, MirrorTarget, Resync, WriteMap};
use crate::qemu::command_line::{disk_node, file_node};
use crate::qemu::export::ExportError;
use crate::qemu::relay;

/// Bound of the start of a relay, which connects to the export.
const RELAY_WITHIN: Duration = Duration::from_secs(4);
/// Bound for the end of a job that was cancelled.
const END_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The bitmap that a resync works off: a copy of a write map.
const LACKS: &str = "lacks";
/// The speed of a mirror whose copy still gets what it lacks; a mark, since nothing else says so without another question.
const NOT_YET: u64 = 1 << 50;

/// What the mirror writes to.
fn copy_node(disk: usize) -> String {
    format!("copy{disk}")
}

/// What the backup writes to: a second connection to the same export.
fn again_node(disk: usize) -> String {
    format!("again{disk}")
}

/// A connection to the relay, which fails at once when that has ended.
fn connection(name: String, socket: &Path, target: &MirrorTarget) -> Value {
    json!({
        "driver": "nbd",
        "node-name": name,
        "server": { "type": "unix", "path": socket },
        "export": target.export,
        "reconnect-delay": 0,
        "discard": "unmap",
    })
}

/// By when QEMU has done what it does at once, unless it waits for a copy.
fn soon() -> Instant {
    Instant::now() + QUICK
}

/// What the jobs of a mirror are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// Copies everything, then what is written.
    Whole,
    /// Copies what is written.
    Follow,
    /// Copies what the copy lacked before.
    Lacking,
}

impl Part {
    const ALL: [Self; 3] = [Self::Whole, Self::Follow, Self::Lacking];

    fn word(self) -> &'static str {
        match self {
            Self::Whole => "mirror",
            Self::Follow => "follow",
            Self::Lacking => "resync",
        }
    }

    fn job(self, disk: usize, tag: &str) -> String {
        format!("{}-{disk}-{tag}", self.word())
    }

    /// The part, the disk and the tag of a job that belongs to a mirror.
    fn of_job(id: &str) -> Option<(Self, usize, String)> {
        let (word, rest) = id.split_once('-')?;
        let part = Self::ALL.into_iter().find(|part| part.word() == word)?;
        let (disk, tag) = rest.split_once('-')?;
        Some((part, disk.parse().ok()?, tag.to_owned()))
    }
}

/// The mirrors that these jobs are.
fn statuses(jobs: &[Value]) -> Vec<MirrorStatus> {
    let mut found: BTreeMap<(usize, String), BTreeMap<Part, &Value>> = BTreeMap::new();
    for job in jobs {
        if let Some((part, disk, tag)) = job["device"].as_str().and_then(Part::of_job) {
            found.entry((disk, tag)).or_default().insert(part, job);
        }
    }
    let found = found.into_iter();
    found
        .map(|((disk, tag), parts)| status(disk, tag, &parts))
        .collect()
}

fn status(disk: usize, tag: String, parts: &BTreeMap<Part, &Value>) -> MirrorStatus {
    let number = |job: &Value, field: &str| job[field].as_u64().unwrap_or_default();
    let sum = |field: &str| parts.values().map(|job| number(job, field)).sum();
    let yes = |job: &Value, field: &str| job[field].as_bool() == Some(true);
    let writes = parts.get(&Part::Whole);
    let writes = writes.or_else(|| parts.get(&Part::Follow));
    let follows = writes
        .is_some_and(|job| yes(job, "ready") && yes(job, "actively-synced") && !yes(job, "paused"));
    let lacking = parts.get(&Part::Lacking);
    let settled = writes.is_some_and(|job| number(job, "speed") != NOT_YET);
    let over = lacking.and_then(|job| job["status"].as_str());
    let over = matches!(over, Some("pending" | "concluded"));
    let quiet = writes.is_some_and(|job| number(job, "offset") >= number(job, "len"));
    let missing = match (writes, lacking) {
        (None, _) => Some("its mirror has ended before it had everything"),
        (Some(_), None) if !settled => Some("what it lacks is not copied"),
        _ => None,
    };
    let failed = parts.values().find_map(|job| {
        let error = job["error"].as_str().map(str::to_owned);
        error.or_else(|| match job["io-status"].as_str() {
            Some("ok") | None => None,
            Some(other) => Some(format!("a write to the copy failed ({other})")),
        })
    });
    MirrorStatus {
        disk,
        tag,
        in_step: follows && settled,
        done: sum("offset"),
        total: sum("len"),
        problem: failed.clone().or(missing.map(str::to_owned)),
        resync: lacking.map(|job| Resync {
            done: number(job, "offset"),
            total: number(job, "len"),
            due: over && failed.is_none() && follows && quiet,
        }),
    }
}

impl Guest {
    /// Begins to copy a disk, and then to keep the copy in step. `speed` bounds the copying, in bytes
    /// per second. `tag` (letters, digits) names this mirror later. With a write map only what it
    /// names is copied: the copy has everything else.
    ///
    /// # Errors
    /// When the server cannot be reached or QEMU refuses; then nothing is left.
    pub async fn start_mirror(
        &self,
        disk: usize,
        tag: &str,
        target: &MirrorTarget,
        speed: Option<u64>,
        lacks: Option<&WriteMap>,
    ) -> Result<(), HypervisorError> {
        self.forget_copy(disk, soon()).await;
        let begun = async {
            let dir = &self.config().runtime_dir;
            let relay = relay::open(dir, disk, target, Instant::now() + RELAY_WITHIN).await;
            let socket = relay.map_err(|source| self.relay_error("open", source))?;
            self.connect(connection(copy_node(disk), &socket, target))
                .await?;
            let Some(map) = lacks else {
                return self.mirror(Part::Whole, disk, tag, speed).await;
            };
            self.connect(connection(again_node(disk), &socket, target))
                .await?;
            self.mirror(Part::Follow, disk, tag, Some(NOT_YET)).await?;
            self.copy_lacking(disk, tag, speed, map).await
        };
        let begun = begun.await;
        if begun.is_err() {
            // A write may wait for it already.
            self.drop_mirror(disk).await?;
        }
        begun
    }

    fn relay_error(&self, action: &'static str, source: ExportError) -> HypervisorError {
        HypervisorError::Relay {
            vm: self.config().name.clone(),
            action,
            source,
        }
    }

    async fn connect(&self, node: Value) -> Result<(), HypervisorError> {
        self.command("open a disk's copy", "blockdev-add", node, soon())
            .await
            .map(drop)
    }

    async fn mirror(
        &self,
        part: Part,
        disk: usize,
        tag: &str,
        speed: Option<u64>,
    ) -> Result<(), HypervisorError> {
        let mut job = json!({
            "job-id": part.job(disk, tag),
            "device": disk_node(disk),
            "target": copy_node(disk),
            "sync": if part == Part::Whole { "full" } else { "none" },
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
        });
        if let Some(speed) = speed {
            job["speed"] = json!(speed);
        }
        self.command("copy a disk", "blockdev-mirror", job, soon())
            .await
            .map(drop)
    }

    async fn copy_lacking(
        &self,
        disk: usize,
        tag: &str,
        speed: Option<u64>,
        map: &WriteMap,
    ) -> Result<(), HypervisorError> {
        let node = file_node(disk);
        let actions = json!({ "actions": [
            { "type": "block-dirty-bitmap-add", "data": {
                "node": node, "name": LACKS, "granularity": CHUNK, "disabled": true,
            }},
            { "type": "block-dirty-bitmap-merge", "data": {
                "node": node, "target": LACKS, "bitmaps": [map_name(&map.tag, map.number)],
            }},
        ]});
        let action = "read where a disk was written to";
        self.command(action, "transaction", actions, soon()).await?;
        let mut job = json!({
            "job-id": Part::Lacking.job(disk, tag),
            "device": node,
            "target": again_node(disk),
            "sync": "bitmap",
            "bitmap": LACKS,
            "bitmap-mode": "never",
            "on-source-error": "stop",
            "on-target-error": "stop",
            "auto-finalize": false,
            "auto-dismiss": false,
        });
        if let Some(speed) = speed {
            job["speed"] = json!(speed);
        }
        let action = "copy what a disk's copy lacks";
        self.command(action, "blockdev-backup", job, soon())
            .await
            .map(drop)
    }

    /// Ends the copying of what a copy lacked, where that is due. What is said of the mirror after it tells whether it
    /// is in step.
    ///
    /// # Errors
    /// When QEMU does not answer or refuses; then the copy is let go of: it was not counted on.
    pub async fn finish_resync(&self, disk: usize) -> Result<(), HypervisorError> {
        let finished = self.try_finish(disk).await;
        if finished.is_err() {
            self.drop_mirror(disk).await?;
        }
        finished
    }

    async fn try_finish(&self, disk: usize) -> Result<(), HypervisorError> {
        let (action, deadline) = ("finish a resync", soon());
        let mirrors = self.mirrors_by(deadline).await?;
        let due = |mirror: &&MirrorStatus| {
            mirror.disk == disk && mirror.resync.is_some_and(|resync| resync.due)
        };
        let Some(mirror) = mirrors.iter().find(due) else {
            return Ok(());
        };
        let lacking = Part::Lacking.job(disk, &mirror.tag);
        let job = json!({ "id": lacking });
        if self.job_status(&lacking, deadline).await?.as_deref() == Some("pending") {
            self.command(action, "job-finalize", job.clone(), deadline)
                .await?;
        }
        while self.job_status(&lacking, deadline).await?.as_deref() != Some("concluded") {
            if Instant::now() >= deadline {
                return Ok(()); // it is seen again
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let follow = Part::Follow.job(disk, &mirror.tag);
        let settled = json!({ "device": follow, "speed": 0 });
        self.command(action, "block-job-set-speed", settled, deadline)
            .await?;
        // Its connection stays until the mirror ends: to close it would be to wait for all that is under way.
        let _ = self.command(action, "job-dismiss", job, deadline).await;
        Ok(())
    }

    async fn job_status(
        &self,
        id: &str,
        deadline: Instant,
    ) -> Result<Option<String>, HypervisorError> {
        let jobs = self.block_jobs(deadline).await?;
        let job = jobs.iter().find(|job| job["device"] == id);
        Ok(job.and_then(|job| job["status"].as_str().map(str::to_owned)))
    }

    /// Mirrors that exist.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn mirrors(&self) -> Result<Vec<MirrorStatus>, HypervisorError> {
        self.mirrors_by(Instant::now() + QUICK).await
    }

    async fn mirrors_by(&self, deadline: Instant) -> Result<Vec<MirrorStatus>, HypervisorError> {
        Ok(statuses(&self.block_jobs(deadline).await?))
    }

    async fn block_jobs(&self, deadline: Instant) -> Result<Vec<Value>, HypervisorError> {
        let action = "ask for its mirrors";
        let reply = self
            .command(action, "query-block-jobs", Value::Null, deadline)
            .await?;
        Ok(reply.as_array().cloned().unwrap_or_default())
    }

    /// Lets go of a disk's copy, whatever the connection to it does: writes that wait for it are completed
    /// without it. None is no error.
    ///
    /// # Errors
    /// When the job has not ended; it does when nothing that is under way waits for another copy.
    pub async fn drop_mirror(&self, disk: usize) -> Result<(), HypervisorError> {
        let closed = relay::close(&self.config().runtime_dir, disk).await;
        closed.map_err(|source| self.relay_error("end", source))?;
        let deadline = Instant::now() + END_WITHIN;
        loop {
            let jobs = self.block_jobs(deadline).await?;
            let mine = jobs.iter().filter_map(|job| {
                let (part, of, _) = Part::of_job(job["device"].as_str()?)?;
                (of == disk).then_some((part, job))
            });
            // The mirror first: see above.
            let Some((_, job)) = mine.min_by_key(|(part, _)| *part) else {
                break;
            };
            self.end_job(job, deadline).await;
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

    /// One step to the end of a job.
    async fn end_job(&self, job: &Value, deadline: Instant) {
        let id = job["device"].as_str().unwrap_or_default();
        if job["status"].as_str() == Some("concluded") {
            let job = json!({ "id": id });
            let _ = self
                .command("forget a job", "job-dismiss", job, deadline)
                .await;
            return;
        }
        let cancel = json!({ "device": id, "force": true });
        let _ = self
            .command("end a mirror", "block-job-cancel", cancel, deadline)
            .await;
    }

    /// Removes what is left of a mirror that has ended; usually there is nothing.
    async fn forget_copy(&self, disk: usize, deadline: Instant) {
        let lacks = json!({ "node": file_node(disk), "name": LACKS });
        let nodes = [copy_node(disk), again_node(disk)];
        let nodes = nodes.map(|node| ("blockdev-del", json!({ "node-name": node })));
        let first = [("block-dirty-bitmap-remove", lacks)];
        for (command, arguments) in first.into_iter().chain(nodes) {
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

    fn one(jobs: &[Value]) -> MirrorStatus {
        let mut found = statuses(jobs);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn jobs_of_others_are_no_mirrors() {
        let job = json!({
            "device": "mirror-1-42", "ready": true, "actively-synced": true, "paused": false,
            "offset": 5, "len": 7, "io-status": "ok", "type": "mirror",
        });
        let seen = one(&[job.clone(), json!({ "device": "backup0" })]);
        assert_eq!(
            (seen.disk, seen.tag.as_str(), seen.in_step),
            (1, "42", true)
        );
        assert_eq!((seen.done, seen.total, seen.problem), (5, 7, None));
        for id in ["backup0", "mirror-x-1", "mirror-1"] {
            assert_eq!(Part::of_job(id), None, "{id}");
        }
        let mut bad = job;
        bad["io-status"] = json!("nospace");
        bad["actively-synced"] = json!(false);
        let seen = one(&[bad]);
        assert!(!seen.in_step);
        assert!(seen.problem.unwrap().contains("nospace"));
    }

    #[test]
    fn a_copy_that_gets_what_it_lacks_is_in_step_only_when_that_has_ended_well() {
        let follow = |speed: u64| {
            json!({
                "device": "follow-0-9", "ready": true, "actively-synced": true, "paused": false,
                "offset": 5, "len": 5, "io-status": "ok", "status": "ready", "speed": speed,
            })
        };
        let resync = |status: &str, error: Option<&str>| {
            json!({
                "device": "resync-0-9", "offset": 3, "len": 4, "status": status, "error": error,
                "io-status": "ok",
            })
        };
        for (status, error, due) in [
            ("running", None, false),
            ("pending", None, true),
            ("concluded", None, true),
            ("concluded", Some("Input/output error"), false),
        ] {
            let seen = one(&[follow(NOT_YET), resync(status, error)]);
            let resync = seen.resync.unwrap();
            assert_eq!((seen.in_step, resync.due), (false, due), "{status}");
            assert_eq!((resync.done, resync.total), (3, 4));
            assert_eq!((seen.done, seen.total), (8, 9));
            assert_eq!(seen.problem.as_deref(), error);
        }
        let mut busy = follow(NOT_YET);
        busy["len"] = json!(6);
        let seen = one(&[busy, resync("pending", None)]);
        assert!(!seen.resync.unwrap().due, "a write is under way");
        let seen = one(&[follow(NOT_YET)]);
        assert!(seen.problem.unwrap().contains("not copied") && !seen.in_step);
        let seen = one(&[follow(0)]);
        assert!(seen.in_step && seen.problem.is_none());
        let alone = one(&[resync("concluded", None)]);
        assert!(!alone.in_step && alone.problem.unwrap().contains("ended"));
    }
}
