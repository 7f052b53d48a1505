//! What a copy lacks when it returns: which write maps the owner keeps, and when one may be relied on.
//!
//! ```text
//! owner:       map n begun .... no write under way ..... asks ............................ older maps forgotten
//! copy's host:                                            flushes the image, then marks it
//! ```
//! A map tells where the guest has written to since it was begun. A write of before is on the copy's host once no
//! write was under way later; and on stable storage there once its host has flushed the image after that. So a copy that
//! bears the mark is its owner's disk, but for what the map names, even when its host was booted again meanwhile.
//!
//! Always holds: the mark names VM, epoch and life of the copy, as its export did; whoever else writes to the image takes
//! the mark away first; maps end with the guest's process. So the oldest map of the marked life tells all that is lacking;
//! and where there is none, the whole disk is copied.

use crate::mirror::export_name;
use quorate_types::{Epoch, PoolName, VmName};
use serde::{Deserialize, Serialize};

/// A write map of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// The life of the copy in which it was begun.
    pub tag: String,
    /// Later ones have higher numbers.
    pub number: u32,
    /// So much was written to.
    pub bytes: u64,
}

/// What an owner remembers of a disk's maps; lost with the agent, which does no harm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MapMemory {
    /// This one was begun just now: a moment without a write under way is to be later.
    pub begun: Option<u32>,
    /// Everything from before this one is on stable storage at the copy's host.
    pub flushed: Option<u32>,
}

/// What is to be done about a disk's maps, while its copy is in step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapStep {
    /// Nothing.
    Nothing,
    /// Begin one with this number.
    Begin(u32),
    /// Ask the copy's host to flush and mark its image; then this map is enough.
    Flush(u32),
    /// Forget all but the newest.
    Forget,
}

/// The next step, for the life `tag` of the copy. `maps` has the oldest first; `quiet`: no write is under
/// way; `due`: it is time to begin a new map.
#[must_use]
pub fn map_step(tag: &str, maps: &[Map], memory: MapMemory, quiet: bool, due: bool) -> MapStep {
    let Some(newest) = maps.last() else {
        return MapStep::Begin(1);
    };
    let next = MapStep::Begin(newest.number.saturating_add(1));
    if newest.tag != tag {
        return next;
    }
    match memory.flushed == Some(newest.number) {
        true if maps.len() > 1 => MapStep::Forget,
        true if due && newest.bytes > 0 => next,
        false if quiet && memory.begun != Some(newest.number) => MapStep::Flush(newest.number),
        _ => MapStep::Nothing,
    }
}

/// The map that tells what a marked copy lacks.
#[must_use]
pub fn lacks<'m>(
    mark: Option<&str>,
    vm: &VmName,
    epoch: Epoch,
    maps: &'m [Map],
) -> Option<&'m Map> {
    let mark = mark?;
    maps.iter()
        .find(|map| export_name(vm, epoch, &map.tag) == mark)
}

/// What an owner asks of the host of a copy that is in step: what it has of it in memory goes to stable storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlushRequest {
    /// The disk's pool.
    pub pool: PoolName,
    /// Its image.
    pub image: String,
    /// The export by which it is written; the image is marked with it.
    pub export: String,
}

impl FlushRequest {
    /// For the copy that is written to in this life of it.
    #[must_use]
    pub fn new(pool: PoolName, image: String, vm: &VmName, epoch: Epoch, tag: &str) -> Self {
        let export = export_name(vm, epoch, tag);
        Self {
            pool,
            image,
            export,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(tag: &str, number: u32, bytes: u64) -> Map {
        let tag = tag.to_owned();
        Map { tag, number, bytes }
    }

    #[test]
    fn a_map_is_relied_on_after_a_quiet_moment_and_a_flush() {
        use MapStep::{Begin, Flush, Forget, Nothing};
        let (one, two) = (map("7", 1, 64), map("7", 2, 64));
        let other = map("9", 3, 64);
        let memory = |begun, flushed| MapMemory { begun, flushed };
        for (tag, maps, memory, quiet, due, step) in [
            ("7", vec![], memory(None, None), true, true, Begin(1)),
            ("7", vec![&one], memory(Some(1), None), true, true, Nothing),
            ("7", vec![&one], memory(None, None), false, true, Nothing),
            ("7", vec![&one], memory(None, None), true, false, Flush(1)),
            ("7", vec![&one], memory(None, Some(1)), true, false, Nothing),
            (
                "7",
                vec![&one],
                memory(None, Some(1)),
                false,
                true,
                Begin(2),
            ),
            (
                "7",
                vec![&one, &two],
                memory(Some(2), Some(1)),
                true,
                true,
                Nothing,
            ),
            (
                "7",
                vec![&one, &two],
                memory(None, Some(1)),
                true,
                true,
                Flush(2),
            ),
            (
                "7",
                vec![&one, &two],
                memory(None, Some(2)),
                false,
                false,
                Forget,
            ),
            // Another life of the copy: what went before counts until the copy has it for good.
            (
                "9",
                vec![&two],
                memory(None, Some(2)),
                true,
                false,
                Begin(3),
            ),
            (
                "9",
                vec![&two, &other],
                memory(None, Some(2)),
                true,
                false,
                Flush(3),
            ),
        ] {
            let maps: Vec<Map> = maps.into_iter().cloned().collect();
            let did = map_step(tag, &maps, memory, quiet, due);
            assert_eq!(did, step, "{tag} {maps:?} {memory:?} {quiet} {due}");
        }
        let idle = [map("7", 1, 0)];
        let step = map_step("7", &idle, memory(None, Some(1)), true, true);
        assert_eq!(
            step, Nothing,
            "a guest that does not write needs no new map"
        );
    }

    #[test]
    fn only_a_mark_of_the_same_owner_epoch_and_life_finds_a_map() {
        let vm = VmName::new("db").unwrap();
        let maps = [map("7", 1, 5), map("7", 2, 3), map("9", 3, 1)];
        let found = |mark| lacks(mark, &vm, Epoch(3), &maps).map(|map| map.number);
        assert_eq!(found(Some("db-3-7")), Some(1), "the oldest has all of them");
        assert_eq!(found(Some("db-3-9")), Some(3));
        for mark in ["db-2-7", "db-3-8", "app-3-7", ""] {
            assert_eq!(found(Some(mark)), None, "{mark}");
        }
        assert_eq!(found(None), None);
    }
}
