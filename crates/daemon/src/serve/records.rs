//! What the cluster is told about images: which host has one that was made in a pool of the hosts' own disks, when the job
//! is done; and that an image is written to no more.
//!
//! Always holds: looked at again and again, so a job that was done while there was no leader is recorded later; an image
//! that the cluster knows already is left as it is.

use super::core::Core;
use super::images::written;
use quorate_state::{Command, ImageWrite, State};
use quorate_types::{HostName, ImageJob, ImageRef, ImageTask, JobState, PoolName};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs for the life of the daemon.
pub(crate) async fn keep(core: Arc<Core>) {
    let mut idle = BTreeSet::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // Twice in a row: between the word that an image will be written and the job there is a moment.
        let now = left_behind(&core.state(), &core.me, &core.images.list());
        for image in now.intersection(&idle) {
            release(&core, image).await;
        }
        idle = now;
        for image in due(&core.state(), &core.images.list()) {
            record(&core, &image).await;
        }
    }
}

/// Images that this host is said to write to, and has no job for that may go on.
fn left_behind(state: &State, me: &HostName, jobs: &[ImageJob]) -> BTreeSet<(PoolName, String)> {
    let open = jobs
        .iter()
        .filter(|job| !job.state.is_over() || job.resumable);
    let open: Vec<&ImageRef> = open.filter_map(|job| written(&job.task)).collect();
    let writes = state.image_writes.iter();
    let writes = writes.flat_map(|(pool, writes)| writes.iter().map(move |write| (pool, write)));
    let idle = |(pool, (image, write)): &(&PoolName, (&String, &ImageWrite))| {
        let this = |other: &&ImageRef| other.pool == **pool && other.image == **image;
        write.host == *me && !open.iter().any(this)
    };
    writes
        .filter(idle)
        .map(|(pool, (image, _))| (pool.clone(), image.clone()))
        .collect()
}

async fn release(core: &Core, (pool, image): &(PoolName, String)) {
    let command = Command::EndImageWrite {
        pool: pool.clone(),
        image: image.clone(),
        host: core.me.clone(),
    };
    if let Err(error) = core.propose("images", command).await {
        tracing::warn!(%pool, image, %error, "the cluster does not know yet that an image is not written to");
    }
}

async fn record(core: &Core, image: &ImageRef) {
    // It may have been deleted since.
    let Ok(pool) = core.agent.pool(&image.pool) else {
        return;
    };
    let format = quorate_storage::DiskFormat::Raw;
    if pool.disk_info(&image.image, format).await.is_err() {
        return;
    }
    let command = Command::RecordDisk {
        pool: image.pool.clone(),
        image: image.image.clone(),
        host: core.me.clone(),
    };
    if let Err(error) = core.propose("images", command).await {
        tracing::warn!(%image, %error, "the cluster does not know yet where an image is");
    }
}

/// Images that were made here and that the cluster does not know.
fn due(state: &State, jobs: &[ImageJob]) -> Vec<ImageRef> {
    let made = |job: &ImageJob| match &job.task {
        ImageTask::Import { to, .. } | ImageTask::Clone { to, .. } => Some(to.clone()),
        _ => None,
    };
    let done = jobs.iter().filter(|job| job.state == JobState::Done);
    let unknown = |image: &ImageRef| {
        let pool = state.pools.get(&image.pool);
        let own = pool.is_some_and(|pool| pool.spec.is_hosts_own());
        own && state.copies(&image.pool, &image.image).is_none()
    };
    let mut images: Vec<ImageRef> = done.filter_map(made).filter(unknown).collect();
    images.dedup();
    images
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(kind: &str) -> State {
        let state = serde_json::json!({
            "revision": 7, "cluster": null, "hosts": {}, "networks": {}, "rules": {}, "vms": {},
            "tokens": {}, "topology_changed": 1, "last_node": 2, "log": { "last": 0, "events": [] },
            "pools": { "own": { "spec": { "kind": kind, "path": "/p" }, "changed": 1 } },
            "disk_copies": { "own": { "known": { "created": 1, "hosts": {
                "h1": { "in_step": true, "since": 2, "at": 0 },
            } } } },
        });
        serde_json::from_value(state).unwrap()
    }

    fn job(state: &str, image: &str) -> ImageJob {
        let job = serde_json::json!({
            "id": "h1-1", "host": "h1", "by": "ann", "state": state, "asked": 0,
            "task": { "op": "import", "file": "/f", "to": format!("own/{image}") },
        });
        serde_json::from_value(job).unwrap()
    }

    #[test]
    fn what_no_job_writes_to_is_free_again() {
        let mut state = state("local");
        let writes: quorate_state::ImageWrites = serde_json::from_value(serde_json::json!({
            "own": {
                "new": { "host": "h1", "what": "import", "at": 0 },
                "half": { "host": "h1", "what": "import", "at": 0 },
                "done": { "host": "h1", "what": "import", "at": 0 },
                "theirs": { "host": "h2", "what": "import", "at": 0 },
            }
        }))
        .unwrap();
        state.image_writes = writes;
        let mut half = job("failed", "half");
        half.resumable = true;
        let jobs = [job("running", "new"), half, job("done", "done")];
        let me = "h1".parse().unwrap();
        let free = left_behind(&state, &me, &jobs);
        let free: Vec<&str> = free.iter().map(|(_, image)| image.as_str()).collect();
        assert_eq!(free, ["done"]);
        assert_eq!(left_behind(&state, &me, &[]).len(), 3);
    }

    #[test]
    fn an_image_that_was_made_here_is_recorded_once() {
        let jobs = [
            job("done", "new"),
            job("done", "known"),
            job("failed", "half"),
        ];
        for (kind, expected) in [("local", 1), ("mirrored", 1), ("directory", 0)] {
            let found = due(&state(kind), &jobs);
            assert_eq!(found.len(), expected, "{kind}: {found:?}");
        }
    }
}
