//! Disks of running guests whose `size` in the manifest is larger than it was when they were started.
//!
//! Always holds: only the owner's host does it, by an image job like anybody's, so it is seen in `quorate image jobs`; what
//! failed is tried again after a while that doubles; a disk that is large enough already is left alone.

use super::core::Core;
use quorate_api::storage::listed_name;
use quorate_state::{OrderKind, Ownership, State};
use quorate_storage::DiskFormat;
use quorate_types::spec::DiskSpec;
use quorate_types::{ByteSize, HostName, ImageRef, ImageTask, JobState, PoolSpec, VmName};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const LOOK_EVERY: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_secs(30);
const AGAIN_MOST: Duration = Duration::from_secs(3_600);

/// What shall be larger.
type Wish = (VmName, ImageRef, u64);

#[derive(Default)]
struct Tried {
    job: Option<String>,
    times: u32,
    next: Option<Instant>,
    done: bool,
}

/// Runs for the life of the daemon.
pub(crate) async fn keep(core: Arc<Core>) {
    let mut tried: BTreeMap<Wish, Tried> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let wishes = wishes(&core.state(), &core.me);
        tried.retain(|wish, _| wishes.contains(wish));
        for wish in wishes {
            let tried = tried.entry(wish.clone()).or_default();
            if !tried.done && core.agent.guest(&wish.0).is_some() {
                look(&core, &wish, tried).await;
            }
        }
    }
}

async fn look(core: &Core, wish: &Wish, tried: &mut Tried) {
    let (vm, image, bytes) = wish;
    let now = Instant::now();
    if let Some(id) = &tried.job {
        let job = core.images.get(id);
        match job.map(|job| job.state) {
            Some(JobState::Done) => tried.done = true,
            Some(state) if !state.is_over() => {}
            _ => {
                tried.job = None;
                let wait = AGAIN
                    .saturating_mul(1 << tried.times.min(10))
                    .min(AGAIN_MOST);
                (tried.times, tried.next) = (tried.times + 1, Some(now + wait));
            }
        }
        return;
    }
    if tried.next.is_some_and(|next| now < next) {
        return;
    }
    if large_enough(core, image, *bytes).await {
        tried.done = true;
        return;
    }
    let (image, size) = (image.clone(), ByteSize(*bytes));
    match core
        .images
        .submit("manifest", ImageTask::Resize { image, size })
    {
        Ok(job) => {
            tracing::info!(%vm, job = job.id, task = %job.task, "its definition has a larger disk");
            tried.job = Some(job.id);
        }
        // Another job works on the image.
        Err(error) => tracing::debug!(%vm, %error, "its disk does not grow now"),
    }
}

/// Whether an image has that many bytes. A unit of a SAN may have them, and its guest not know it.
async fn large_enough(core: &Core, image: &ImageRef, bytes: u64) -> bool {
    let state = core.state();
    let pool = state.pools.get(&image.pool).map(|pool| &pool.spec);
    if pool.is_none_or(|pool| matches!(pool, PoolSpec::Iscsi(_) | PoolSpec::Block(_))) {
        return false;
    }
    let Ok(driver) = core.agent.pool(&image.pool) else {
        return false;
    };
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        if let Ok(info) = driver.disk_info(&image.image, format).await {
            return info.virtual_bytes >= bytes;
        }
    }
    false
}

/// Disks of this host's guests that are defined larger than they were at the start.
fn wishes(state: &State, me: &HostName) -> Vec<Wish> {
    let mut wishes = Vec::new();
    for (name, record) in &state.vms {
        let runs = matches!(&record.ownership,
            Ownership::Owned { host, order: OrderKind::Run, .. } if host == me);
        let Some(active) = record.active.as_ref().filter(|_| runs) else {
            continue;
        };
        for disk in &active.disks {
            let Some(pool) = state.pools.get(&disk.pool) else {
                continue;
            };
            let this = |other: &&DiskSpec| other.pool == disk.pool && other.image == disk.image;
            let wanted = record
                .spec
                .disks
                .iter()
                .find(this)
                .and_then(|disk| disk.size);
            if let Some(wanted) = wanted.filter(|wanted| disk.size.is_some_and(|had| *wanted > had))
            {
                let (pool, image) = (disk.pool.clone(), listed_name(&pool.spec, &disk.image));
                wishes.push((name.clone(), ImageRef { pool, image }, wanted.0));
            }
        }
    }
    wishes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owners_host_makes_a_disk_larger_and_none_smaller() {
        let disk = |image: &str, size: &str| serde_json::json!({ "pool": "own", "image": image, "size": size });
        let spec = |root: &str, data: &str| {
            serde_json::json!({
                "memory": "64MiB", "disks": [disk("root", root), disk("data", data)],
            })
        };
        let state = serde_json::json!({
            "revision": 7, "cluster": null, "hosts": {}, "networks": {}, "rules": {},
            "tokens": {}, "topology_changed": 1, "last_node": 2, "log": { "last": 0, "events": [] },
            "pools": { "own": { "spec": { "kind": "mirrored", "path": "/p" }, "changed": 1 } },
            "vms": { "db": {
                "spec": spec("3GiB", "1GiB"), "active": spec("2GiB", "2GiB"), "abi": null,
                "ownership": { "owned": { "host": "h1", "epoch": 3, "order": "run" } },
                "last_epoch": 3, "saved": null, "move_request": null, "failed_moves": 0,
                "deleting": false, "last_host": "h1", "decisions": [], "changed": 7,
            } },
        });
        let state: State = serde_json::from_value(state).unwrap();
        let found = wishes(&state, &"h1".parse().unwrap());
        assert_eq!(found.len(), 1);
        let (vm, image, bytes) = &found[0];
        assert_eq!(
            (vm.as_str(), image.to_string().as_str()),
            ("db", "own/root")
        );
        assert_eq!(*bytes, 3 << 30);
        assert!(wishes(&state, &"h2".parse().unwrap()).is_empty());
    }
}
