//! Whether a guest's disks answer: asked before a migration begins.
//!
//! At the switchover QEMU waits for every request to its disks that is under way, without end and without answering
//! anybody. A disk that has gone silent (a dead path to a SAN, a hung file server) would hold the whole process there.
//! So requests that are under way must get on first.
//!
//! Always holds: a guest without requests under way costs two commands; one that gets on costs moments; a QEMU that
//! cannot tell (older than 7.2) is not held up.

use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::{Instant, sleep};

use crate::error::HypervisorError;
use crate::qemu::guest::{Guest, QUICK};

/// Requests that do not get on for so long do not get on.
const PATIENCE: Duration = Duration::from_millis(1500);
const LOOK_AGAIN: Duration = Duration::from_millis(30);
/// Queues of one device that are looked at.
const QUEUES_MAX: u64 = 16;

/// Fails when requests to disks are under way and none of them ends within the patience.
pub(super) async fn disks_answer(guest: &Guest) -> Result<(), HypervisorError> {
    let begun = Instant::now();
    let mut first = None;
    loop {
        let deadline = Instant::now() + QUICK;
        let Some(waiting) = requests(guest, deadline).await? else {
            return Ok(());
        };
        let done = completed(guest, deadline).await?;
        let before = *first.get_or_insert(done);
        if waiting == 0 || done != before {
            return Ok(());
        }
        if begun.elapsed() >= PATIENCE {
            let vm = guest.config().name.clone();
            let detail = format!(
                "its disks do not answer ({waiting} requests are under way): a guest can only be sent while its storage works"
            );
            return Err(HypervisorError::Migration { vm, detail });
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Requests to disks that are under way; `None`: QEMU cannot tell.
async fn requests(guest: &Guest, deadline: Instant) -> Result<Option<u64>, HypervisorError> {
    let ask = |command: &'static str, arguments: Value| {
        guest.command("look at its disks", command, arguments, deadline)
    };
    let devices = match ask("x-query-virtio", Value::Null).await {
        Ok(devices) => devices,
        Err(error @ HypervisorError::Gone { .. }) => return Err(error),
        Err(_) => return Ok(None),
    };
    let mut waiting = 0;
    let devices = devices.as_array().map_or(&[][..], Vec::as_slice);
    let disks = devices
        .iter()
        .filter(|device| device["name"] == "virtio-blk");
    for path in disks.filter_map(|device| device["path"].as_str()) {
        for queue in 0..QUEUES_MAX {
            let arguments = json!({ "path": path, "queue": queue });
            // There is no such queue.
            let Ok(status) = ask("x-query-virtio-queue-status", arguments).await else {
                break;
            };
            waiting += status["inuse"].as_u64().unwrap_or(0);
        }
    }
    Ok(Some(waiting))
}

/// Requests that have ended so far, well or not.
async fn completed(guest: &Guest, deadline: Instant) -> Result<u64, HypervisorError> {
    let stats = guest
        .command(
            "look at its disks",
            "query-blockstats",
            Value::Null,
            deadline,
        )
        .await?;
    const COUNTERS: [&str; 8] = [
        "rd_operations",
        "wr_operations",
        "flush_operations",
        "unmap_operations",
        "failed_rd_operations",
        "failed_wr_operations",
        "failed_flush_operations",
        "failed_unmap_operations",
    ];
    let of = |device: &Value| -> u64 {
        let counters = COUNTERS
            .iter()
            .filter_map(|name| device["stats"][*name].as_u64());
        counters.sum()
    };
    let devices = stats.as_array().map_or(&[][..], Vec::as_slice);
    Ok(devices.iter().map(of).sum())
}
