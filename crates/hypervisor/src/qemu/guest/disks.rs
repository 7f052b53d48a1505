//! Disks of a running guest: more room, snapshots.
//!
//! Always holds: a guest whose file systems were quiesced is let go on, whatever became of the snapshot. What QEMU
//! 10.0.2 does: `block_resize` of the format node grows a file and tells the guest; of a unit of a SAN it asks for the
//! size anew and refuses more than there is. `blockdev-snapshot-internal-sync` takes the node's name as `device`.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::Guest;
use crate::error::HypervisorError;
use crate::qemu::agent_channel;
use crate::qemu::command_line::disk_node;
use crate::vm::Quiesced;

/// Bound of a command that writes to the storage.
const STORAGE: Duration = Duration::from_secs(60);
/// Bound of a freeze of the guest's file systems: they write out what they hold.
const FREEZE: Duration = Duration::from_secs(10);
const THAW: Duration = Duration::from_secs(5);

impl Guest {
    fn disk_command(&self, index: usize) -> Result<String, HypervisorError> {
        match index < self.config().disks.len() {
            true => Ok(disk_node(index)),
            false => Err(HypervisorError::Disk {
                vm: self.config().name.clone(),
                disk: index,
                detail: "it was started without this disk: the definition changed since".to_owned(),
            }),
        }
    }

    /// Gives a disk a larger size, and tells the guest.
    ///
    /// # Errors
    /// When there is no such disk, or QEMU refuses.
    pub async fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), HypervisorError> {
        let node = self.disk_command(index)?;
        let arguments = json!({ "node-name": node, "size": bytes });
        let deadline = Instant::now() + STORAGE;
        let done = self.command("resize a disk", "block_resize", arguments, deadline);
        done.await.map(drop)
    }

    /// Makes a snapshot inside a qcow2 image, with the guest's file systems quiesced where its agent answers.
    ///
    /// # Errors
    /// When there is no such disk, or QEMU refuses.
    pub async fn snapshot_disk(
        &self,
        index: usize,
        name: &str,
    ) -> Result<Quiesced, HypervisorError> {
        let node = self.disk_command(index)?;
        let arguments = json!({ "device": node, "name": name });
        let quiesced = self.quiesce().await;
        let deadline = Instant::now() + STORAGE;
        let command = "blockdev-snapshot-internal-sync";
        let made = self
            .command("make a snapshot", command, arguments, deadline)
            .await;
        // Also where the answer to the freeze came too late: the guest may have obeyed.
        let thawed = self.unquiesce().await;
        made?;
        if let (Quiesced::Yes, Err(detail)) = (&quiesced, thawed) {
            tracing::warn!(
                vm = self.config().name,
                detail,
                "its file systems may be frozen"
            );
            return Ok(Quiesced::Stuck(detail));
        }
        Ok(quiesced)
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// When there is no such disk or snapshot, or QEMU refuses.
    pub async fn delete_disk_snapshot(
        &self,
        index: usize,
        name: &str,
    ) -> Result<(), HypervisorError> {
        let node = self.disk_command(index)?;
        let arguments = json!({ "device": node, "name": name });
        let command = "blockdev-snapshot-delete-internal-sync";
        let deadline = Instant::now() + STORAGE;
        let done: Result<Value, _> = self
            .command("delete a snapshot", command, arguments, deadline)
            .await;
        done.map(drop)
    }

    async fn quiesce(&self) -> Quiesced {
        if !self.config().guest_agent {
            return Quiesced::No("it has no guest agent".to_owned());
        }
        let socket = self.config().paths().agent();
        match agent_channel::freeze_file_systems(&socket, FREEZE).await {
            Ok(()) => Quiesced::Yes,
            Err(error) => Quiesced::No(error.to_string()),
        }
    }

    /// Lets the guest's file systems go on, if its agent answers.
    ///
    /// # Errors
    /// What was seen.
    pub async fn unquiesce(&self) -> Result<(), String> {
        if !self.config().guest_agent {
            return Ok(());
        }
        let socket = self.config().paths().agent();
        let thawed = agent_channel::thaw_file_systems(&socket, THAW).await;
        thawed.map_err(|error| error.to_string())
    }
}
