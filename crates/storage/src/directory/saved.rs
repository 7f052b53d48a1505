//! Saved states: files a VM's memory waits in between two hosts.
//!
//! One file per VM and epoch, so that a stale one is never resumed: `NAME.EPOCH.part`
//! while it is written, `NAME.EPOCH.state` from the moment it is whole and durable.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::{PoolError, SavedState};

use super::files;

const FOLDER: &str = ".quorate-saved";
const DONE: &str = "state";
const PART: &str = "part";

/// The files of one VM and epoch.
pub(super) fn place(root: &Path, vm: &str, epoch: u64) -> Result<SavedState, PoolError> {
    let valid = !vm.is_empty()
        && vm.len() <= 128
        && !vm.starts_with('.')
        && vm
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if !valid {
        return Err(PoolError::BadVmName { vm: vm.to_owned() });
    }
    let folder = root.join(FOLDER);
    Ok(SavedState {
        part: folder.join(format!("{vm}.{epoch}.{PART}")),
        done: folder.join(format!("{vm}.{epoch}.{DONE}")),
    })
}

pub(super) fn prepare(
    pool: &str,
    root: &Path,
    vm: &str,
    epoch: u64,
) -> Result<SavedState, PoolError> {
    let place = place(root, vm, epoch)?;
    let folder = root.join(FOLDER);
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(PoolError::io(pool, &folder, "making a folder", error));
        }
        _ => {}
    }
    // Both leftovers are of an attempt that was given up.
    for stale in [&place.part, &place.done] {
        remove(pool, stale)?;
    }
    Ok(place)
}

pub(super) fn commit(pool: &str, root: &Path, vm: &str, epoch: u64) -> Result<PathBuf, PoolError> {
    let place = place(root, vm, epoch)?;
    let failed = |error| PoolError::io(pool, &place.done, "committing a saved state", error);
    match File::open(&place.part) {
        Ok(file) => file.sync_all().map_err(failed)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return if place.done.is_file() {
                Ok(place.done)
            } else {
                Err(PoolError::StateMissing {
                    pool: pool.to_owned(),
                    vm: vm.to_owned(),
                    epoch,
                })
            };
        }
        Err(error) => return Err(failed(error)),
    }
    fs::rename(&place.part, &place.done).map_err(failed)?;
    files::sync_folder(&root.join(FOLDER)).map_err(failed)?;
    Ok(place.done)
}

pub(super) fn find(root: &Path, vm: &str, epoch: u64) -> Result<Option<PathBuf>, PoolError> {
    let place = place(root, vm, epoch)?;
    Ok(place.done.is_file().then_some(place.done))
}

pub(super) fn delete(pool: &str, root: &Path, vm: &str, up_to: u64) -> Result<u32, PoolError> {
    place(root, vm, up_to)?;
    let folder = root.join(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(PoolError::io(pool, &folder, "listing saved states", error)),
    };
    let mut deleted = 0;
    for entry in entries {
        let entry =
            entry.map_err(|error| PoolError::io(pool, &folder, "listing saved states", error))?;
        let name = entry.file_name();
        let epoch = name.to_str().and_then(|name| epoch_of(name, vm));
        if epoch.is_some_and(|epoch| epoch <= up_to) {
            remove(pool, &entry.path())?;
            deleted += 1;
        }
    }
    Ok(deleted)
}

/// The epoch in the name of a file, if it is this VM's.
fn epoch_of(name: &str, vm: &str) -> Option<u64> {
    let rest = name.strip_prefix(vm)?.strip_prefix('.')?;
    let (epoch, kind) = rest.split_once('.')?;
    (kind == DONE || kind == PART).then(|| epoch.parse().ok())?
}

fn remove(pool: &str, path: &Path) -> Result<(), PoolError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(PoolError::io(pool, path, "deleting a saved state", error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_belongs_to_one_vm_only() {
        assert_eq!(epoch_of("db.7.state", "db"), Some(7));
        assert_eq!(epoch_of("db.7.part", "db"), Some(7));
        assert_eq!(epoch_of("db.1.7.state", "db"), None);
        assert_eq!(epoch_of("db.1.7.state", "db.1"), Some(7));
        assert_eq!(epoch_of("db2.7.state", "db"), None);
        assert_eq!(epoch_of("db.7.other", "db"), None);
        assert_eq!(epoch_of("db.x.state", "db"), None);
    }
}
