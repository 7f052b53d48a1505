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
//! What QEMU 10.0.2 does (measured):
//! - with `copy-mode: write-blocking` a write is acknowledged to the guest when both sides have it; a flush
//!   goes to the guest's own disk only;
//! - with a `reconnect-delay` requests wait for a server that is gone, instead of failing. Without, or when the server
//!   answers with an error, the job ends by itself and *the guest goes on alone*: so the delay is long;
//! - what waits is let go by `yank` (a connection that hangs) and by a forced cancel (one that is being made
//!   again). Whoever calls [`Guest::drop_mirror`] has made sure that the copy does not count any more;
//! - nodes with a job on them cannot be given up: a freeze keeps the disks;
//! - a mirror takes no bitmap, and a backup takes no node that a mirror is on. So the mirror is on the disk's node, and the
//!   backup on the file's below it, both to the same export. A write passes the backup's filter first, which copies what
//!   was there and waits for the job where that is just being copied; then it goes to the disk; then to the copy. So what is
//!   old never follows what is new (`tests/resync.rs` compares the bytes). The mirror begins *before* the map
//!   is read, so that each write is in the map, or mirrored, or both;
//! - a job ends with a drain, which waits for all writes, in QEMU's main loop, as a guest's pause does: begun while one
//!   of them waits for a server that is gone it would stop QEMU's monitor for good; and a pause flushes all nodes, used or
//!   not. So while a copy gets what it lacks there is no connection that waits for a server. A backup does not end by itself, but by hand ([`Guest::finish_resync`]) when no write
//!   is under way, and stops at an error; then the mirror's target is led to a connection that waits
//!   (a connection's delay cannot be changed), and only then the copy can be in step;
//! - so a write that needs something old to be copied fails when that cannot be done: `werror=stop` pauses the guest,
//!   with that write kept for when it is resumed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::write_map::{CHUNK, map_name};
use super::{Guest, QUICK};
use crate::error::HypervisorError;
use crate::mirror::{MirrorStatus, MirrorTarget, Resync, WriteMap};
use crate::qemu::command_line::{disk_node, file_node};

/// For so many seconds a request waits for a server that is gone: longer than anybody does.
const WAIT_FOR_SERVER_S: u32 = 86_400;
/// Longest wait for the first connection, in milliseconds.
const OPEN_WITHIN_MS: u32 = 2_000;
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

/// The mirror's connection while the copy gets what it lacks: it fails at once when the server is gone.
fn quick_node(disk: usize) -> String {
    format!("quick{disk}")
}

/// The mirror's connection after that: it waits for a server that is gone.
fn patient_node(disk: usize) -> String {
    format!("patient{disk}")
}

/// All of them, the ones above first.
fn connections(disk: usize) -> [String; 4] {
    [
        copy_node(disk),
        quick_node(disk),
        patient_node(disk),
        again_node(disk),
    ]
}

/// The mirror's target while its connection is to change.
fn copy_options(disk: usize, connection: String) -> Value {
    json!({
        "driver": "raw",
        "node-name": copy_node(disk),
        "discard": "unmap",
        "file": connection,
    })
}

/// The options of a connection, but for its name and its patience.
fn connection_options(disk: usize, target: &MirrorTarget) -> Value {
    let mut node = json!({
        "driver": "nbd",
        "server": {
            "type": "inet",
            "host": target.address.ip().to_string(),
            "port": target.address.port().to_string(),
        },
        "export": target.export,
        "open-timeout": OPEN_WITHIN_MS / 1000,
        "discard": "unmap",
    });
    if let Some(tls) = &target.tls {
        node["tls-creds"] = json!(tls_id(disk));
        if let Some(hostname) = &tls.hostname {
            node["tls-hostname"] = json!(hostname);
        }
    }
    node
}

fn tls_id(disk: usize) -> String {
    format!("copy-tls{disk}")
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
        let deadline = Instant::now() + Duration::from_millis(u64::from(OPEN_WITHIN_MS)) + QUICK;
        self.forget_copy(disk, deadline).await;
        let begun = async {
            let node = self.connection(disk, target, deadline).await?;
            match lacks {
                None => {
                    self.connect(&node, copy_node(disk), WAIT_FOR_SERVER_S, deadline)
                        .await?;
                    self.mirror(Part::Whole, disk, tag, speed, deadline).await
                }
                Some(map) => {
                    self.connect_twice(disk, &node, deadline).await?;
                    self.mirror(Part::Follow, disk, tag, Some(NOT_YET), deadline)
                        .await?;
                    self.copy_lacking(disk, tag, speed, map, deadline).await
                }
            }
        };
        let begun = begun.await;
        if begun.is_err() {
            // A write may wait for it already.
            self.drop_mirror(disk).await?;
        }
        begun
    }

    /// The options of a connection to a copy, with the certificates loaded.
    async fn connection(
        &self,
        disk: usize,
        target: &MirrorTarget,
        deadline: Instant,
    ) -> Result<Value, HypervisorError> {
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
        }
        Ok(connection_options(disk, target))
    }

    /// Connects to a copy; requests wait so many seconds for a server that is gone.
    async fn connect(
        &self,
        node: &Value,
        name: String,
        wait: u32,
        deadline: Instant,
    ) -> Result<(), HypervisorError> {
        let mut node = node.clone();
        node["node-name"] = json!(name);
        node["reconnect-delay"] = json!(wait);
        self.command("open a disk's copy", "blockdev-add", node, deadline)
            .await
            .map(drop)
    }

    async fn mirror(
        &self,
        part: Part,
        disk: usize,
        tag: &str,
        speed: Option<u64>,
        deadline: Instant,
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
        self.command("copy a disk", "blockdev-mirror", job, deadline)
            .await
            .map(drop)
    }

    async fn connect_twice(
        &self,
        disk: usize,
        node: &Value,
        deadline: Instant,
    ) -> Result<(), HypervisorError> {
        for (name, wait) in [(quick_node(disk), 0), (again_node(disk), 0)] {
            self.connect(node, name, wait, deadline).await?;
        }
        let node = copy_options(disk, quick_node(disk));
        self.command("open a disk's copy", "blockdev-add", node, deadline)
            .await
            .map(drop)
    }

    async fn copy_lacking(
        &self,
        disk: usize,
        tag: &str,
        speed: Option<u64>,
        map: &WriteMap,
        deadline: Instant,
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
        self.command(action, "transaction", actions, deadline)
            .await?;
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
        self.command(action, "blockdev-backup", job, deadline)
            .await
            .map(drop)
    }

    /// Ends the copying of what a copy lacked, where that is due; the target is the same. What is said of the mirror
    /// after it tells whether it is in step.
    ///
    /// # Errors
    /// When QEMU does not answer or refuses.
    pub async fn finish_resync(
        &self,
        disk: usize,
        target: &MirrorTarget,
    ) -> Result<(), HypervisorError> {
        let (action, deadline) = ("finish a resync", Instant::now() + END_WITHIN);
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
        // One that is left over from an attempt before may be dead.
        let stale = json!({ "node-name": patient_node(disk) });
        let _ = self.command(action, "blockdev-del", stale, deadline).await;
        let node = connection_options(disk, target);
        let patient = patient_node(disk);
        self.connect(&node, patient, WAIT_FOR_SERVER_S, deadline)
            .await?;
        let patient = json!({ "options": [copy_options(disk, patient_node(disk))] });
        self.command(action, "blockdev-reopen", patient, deadline)
            .await?;
        let follow = Part::Follow.job(disk, &mirror.tag);
        let settled = json!({ "device": follow, "speed": 0 });
        self.command(action, "block-job-set-speed", settled, deadline)
            .await?;
        for (command, arguments) in [
            ("job-dismiss", job),
            ("blockdev-del", json!({ "node-name": quick_node(disk) })),
            ("blockdev-del", json!({ "node-name": again_node(disk) })),
        ] {
            // What stays does no harm, and ends with the mirror.
            let _ = self.command(action, command, arguments, deadline).await;
        }
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
    /// When the job has not ended.
    pub async fn drop_mirror(&self, disk: usize) -> Result<(), HypervisorError> {
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
            self.end_job(disk, job, deadline).await;
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

    /// One step to the end of a job, whatever its connections do.
    async fn end_job(&self, disk: usize, job: &Value, deadline: Instant) {
        let id = job["device"].as_str().unwrap_or_default();
        if job["status"].as_str() == Some("concluded") {
            let job = json!({ "id": id });
            let _ = self
                .command("forget a job", "job-dismiss", job, deadline)
                .await;
            return;
        }
        for node in connections(disk) {
            let yank = json!({ "instances": [{ "type": "block-node", "node-name": node }] });
            // Refused when there is no connection, or when the job ends just now.
            let _ = self.command("cut a copy", "yank", yank, deadline).await;
        }
        let cancel = json!({ "device": id, "force": true });
        let _ = self
            .command("end a mirror", "block-job-cancel", cancel, deadline)
            .await;
    }

    /// Removes what is left of a mirror that has ended; usually there is nothing.
    async fn forget_copy(&self, disk: usize, deadline: Instant) {
        let lacks = json!({ "node": file_node(disk), "name": LACKS });
        let nodes = connections(disk).map(|node| ("blockdev-del", json!({ "node-name": node })));
        let first = [("block-dirty-bitmap-remove", lacks)];
        let last = [("object-del", json!({ "id": tls_id(disk) }))];
        for (command, arguments) in first.into_iter().chain(nodes).chain(last) {
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
