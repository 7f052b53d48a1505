//! Which host has an image that was made in a pool of the hosts' own disks: said to the cluster when the job is done.
//!
//! Always holds: looked at again and again, so a job that was done while there was no leader is recorded later; an image
//! that the cluster knows already is left as it is.

use super::core::Core;
use quorate_state::{Command, State};
use quorate_types::{ImageJob, ImageRef, ImageTask, JobState};
use std::sync::Arc;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs for the life of the daemon.
pub(crate) async fn keep(core: Arc<Core>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for image in due(&core.state(), &core.images.list()) {
            record(&core, &image).await;
        }
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
