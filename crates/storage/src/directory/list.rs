//! What images a directory has.

use super::{image, paths};
use crate::{DiskFormat, ImageEntry, PoolError};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Most images and folders that are looked at.
const MOST: usize = 20_000;

/// All images below the pool's directory by name; the cluster's own files are left out, links are not followed.
pub(super) fn images(pool: &str, root: &Path) -> Result<Vec<ImageEntry>, PoolError> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        let failed = |error| PoolError::io(pool, &folder, "listing images", error);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            seen += 1;
            let path = entry.path();
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            let Some(name) = path.strip_prefix(root).ok().and_then(Path::to_str) else {
                continue;
            };
            if hidden || name.starts_with(paths::RESERVED) || seen > MOST {
                continue;
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                found.push(look(pool, name, &path));
            }
        }
    }
    found.sort_by(|a, b| a.image.cmp(&b.image));
    Ok(found)
}

fn look(pool: &str, name: &str, path: &Path) -> ImageEntry {
    let mut entry = ImageEntry {
        image: name.to_owned(),
        virtual_bytes: None,
        actual_bytes: fs::metadata(path).ok().map(|meta| meta.blocks() * 512),
        format: DiskFormat::Raw,
        problem: None,
    };
    match image::look(pool, name, path) {
        Ok((format, bytes)) => (entry.format, entry.virtual_bytes) = (format, bytes),
        Err(error) => entry.problem = Some(error.to_string()),
    }
    entry
}
