//! Where a disk was written to: what a copy lacks that was in step when a map was begun.
//!
//! A map is a dirty bitmap on the disk's file node, in QEMU's memory: it ends with the guest's process, and its bits are
//! set when a write to the disk has ended, before the guest hears of it. Its name tells all that is known of
//! it, so that an agent that was restarted finds it.
//!
//! Must not: know what a map is good for, which depends on what the copy's host has on stable storage.

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Guest, QUICK};
use crate::error::HypervisorError;
use crate::mirror::WriteMap;
use crate::qemu::command_line::file_node;

/// Bytes for each bit of a map: what a backup copies at a time.
pub(super) const CHUNK: u32 = 64 << 10;

pub(super) fn map_name(tag: &str, number: u32) -> String {
    format!("writes-{tag}-{number}")
}

fn map(bitmap: &Value) -> Option<WriteMap> {
    let (tag, number) = bitmap["name"]
        .as_str()?
        .strip_prefix("writes-")?
        .rsplit_once('-')?;
    Some(WriteMap {
        tag: tag.to_owned(),
        number: number.parse().ok()?,
        bytes: bitmap["count"].as_u64().unwrap_or_default(),
    })
}

impl Guest {
    /// The write maps of a disk, the oldest first.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn write_maps(&self, disk: usize) -> Result<Vec<WriteMap>, HypervisorError> {
        let action = "list its write maps";
        let (flat, deadline) = (json!({ "flat": true }), Instant::now() + QUICK);
        let reply = self
            .command(action, "query-named-block-nodes", flat, deadline)
            .await?;
        let nodes = reply.as_array().map(Vec::as_slice).unwrap_or_default();
        let name = file_node(disk);
        let node = nodes.iter().find(|node| node["node-name"] == name.as_str());
        let bitmaps = node.and_then(|node| node["dirty-bitmaps"].as_array());
        let mut maps: Vec<WriteMap> = bitmaps.into_iter().flatten().filter_map(map).collect();
        maps.sort_by_key(|map| map.number);
        Ok(maps)
    }

    /// Begins a map: from now on it tells where the disk is written to.
    ///
    /// # Errors
    /// When QEMU does not answer or refuses.
    pub async fn begin_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError> {
        let bitmap = json!({
            "node": file_node(disk),
            "name": map_name(tag, number),
            "granularity": CHUNK,
        });
        let (action, deadline) = ("begin a write map", Instant::now() + QUICK);
        self.command(action, "block-dirty-bitmap-add", bitmap, deadline)
            .await
            .map(drop)
    }

    /// Forgets a map.
    ///
    /// # Errors
    /// When QEMU does not answer or refuses.
    pub async fn forget_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError> {
        let bitmap = json!({ "node": file_node(disk), "name": map_name(tag, number) });
        let (action, deadline) = ("forget a write map", Instant::now() + QUICK);
        self.command(action, "block-dirty-bitmap-remove", bitmap, deadline)
            .await
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_known_by_its_name() {
        let seen = map(&json!({ "name": map_name("42", 7), "count": 65536 })).unwrap();
        assert_eq!(
            (seen.tag.as_str(), seen.number, seen.bytes),
            ("42", 7, 65536)
        );
        for name in ["lacks", "writes-7", "writes-7-x"] {
            assert_eq!(map(&json!({ "name": name })), None, "{name}");
        }
    }
}
