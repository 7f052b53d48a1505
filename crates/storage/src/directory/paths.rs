//! Names to paths: the only place where a name given by a user becomes a path.
//!
//! Always holds: what comes out lies inside the pool, also when a component of the name
//! is a symbolic link.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use crate::PoolError;

/// What the names of this crate's own files begin with; users cannot name them.
pub(super) const RESERVED: &str = ".quorate";

/// Checks a name without looking at the storage.
pub(super) fn check_image_name(image: &str) -> Result<(), PoolError> {
    let parts: Vec<Component<'_>> = Path::new(image).components().collect();
    let reason = if image.is_empty() {
        "it is empty"
    } else if image.len() > 512 {
        "it has more than 512 bytes"
    } else if image.chars().any(char::is_control) {
        "it has control characters"
    } else if image.starts_with('/') {
        "it must be relative to the pool"
    } else if image.ends_with('/') || image.contains("//") {
        "it has an empty component"
    } else if !parts
        .iter()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        "`.` and `..` are not allowed"
    } else if parts.iter().any(|part| {
        part.as_os_str()
            .as_encoded_bytes()
            .starts_with(RESERVED.as_bytes())
    }) {
        "names that begin with `.quorate` are Quorate's own"
    } else {
        return Ok(());
    };
    Err(PoolError::BadImageName {
        image: image.to_owned(),
        reason,
    })
}

/// The pool's own path without symbolic links.
pub(super) fn root(pool: &str, path: &Path) -> Result<PathBuf, PoolError> {
    match fs::canonicalize(path) {
        Ok(root) if root.is_dir() => Ok(root),
        Ok(_) => Err(missing(pool, path)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(missing(pool, path))
        }
        Err(error) => Err(PoolError::io(pool, path, "looking the pool up", error)),
    }
}

fn missing(pool: &str, path: &Path) -> PoolError {
    PoolError::DirectoryMissing {
        pool: pool.to_owned(),
        path: path.to_owned(),
    }
}

/// Where an image is, or would be.
#[derive(Debug)]
pub(super) struct Place {
    /// Its path, without symbolic links.
    pub(super) path: PathBuf,
    /// Whether something is there.
    pub(super) exists: bool,
}

/// Finds the place of an image. With `make_folders`, missing folders on the way are made.
pub(super) fn resolve(
    pool: &str,
    root: &Path,
    image: &str,
    make_folders: bool,
) -> Result<Place, PoolError> {
    check_image_name(image)?;
    let relative = Path::new(image);
    let mut folder = root.to_owned();
    for part in relative.parent().into_iter().flat_map(Path::components) {
        let next = folder.join(part);
        if make_folders {
            match fs::create_dir(&next) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(PoolError::io(pool, &next, "making a folder", error));
                }
                _ => {}
            }
        }
        folder = match fs::canonicalize(&next) {
            Ok(folder) => inside(pool, root, image, folder)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Place {
                    path: root.join(relative),
                    exists: false,
                });
            }
            Err(error) => return Err(PoolError::io(pool, &next, "looking a folder up", error)),
        };
    }
    let path = match relative.file_name() {
        Some(name) => folder.join(name),
        None => folder,
    };
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_symlink() => {
            let target = fs::canonicalize(&path)
                .map_err(|error| PoolError::io(pool, &path, "following a link", error))?;
            Ok(Place {
                path: inside(pool, root, image, target)?,
                exists: true,
            })
        }
        Ok(_) => Ok(Place { path, exists: true }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Place {
            path,
            exists: false,
        }),
        Err(error) => Err(PoolError::io(pool, &path, "looking an image up", error)),
    }
}

/// Refuses a path outside of the pool. Both paths are without symbolic links.
pub(super) fn inside(
    pool: &str,
    root: &Path,
    image: &str,
    path: PathBuf,
) -> Result<PathBuf, PoolError> {
    if path.starts_with(root) {
        Ok(path)
    } else {
        Err(PoolError::Escape {
            pool: pool.to_owned(),
            image: image.to_owned(),
            path,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_that_could_lead_out_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "..",
            "../other/db.img",
            "a/../../b",
            "a/./b",
            "./b",
            "a//b",
            "a/",
            ".quorate-pool",
            "a/.quorate-probe.h1",
            "a\nb",
            "a\0b",
        ] {
            let result = check_image_name(bad);
            // `Path::components` hides an inner `.`, which is harmless.
            if bad == "a/./b" {
                result.unwrap();
            } else {
                assert!(
                    matches!(result, Err(PoolError::BadImageName { .. })),
                    "{bad:?}"
                );
            }
        }
        for good in [
            "db.img",
            "web/1/root.qcow2",
            ".hidden",
            "a..b",
            "with space",
        ] {
            check_image_name(good).unwrap();
        }
    }

    #[test]
    fn links_are_followed_inside_and_refused_outside() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap().join("pool");
        fs::create_dir(&root).unwrap();
        let outside = root.parent().unwrap().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("db.img"), b"").unwrap();
        fs::write(root.join("real.img"), b"").unwrap();
        let link = std::os::unix::fs::symlink::<&Path, PathBuf>;
        link(Path::new("real.img"), root.join("alias.img")).unwrap();
        link(&outside, root.join("folder")).unwrap();
        link(&outside.join("db.img"), root.join("file.img")).unwrap();

        let place = resolve("p", &root, "alias.img", false).unwrap();
        assert_eq!(place.path, root.join("real.img"));
        for name in ["folder/db.img", "folder/new.img", "file.img"] {
            for make in [false, true] {
                let error = resolve("p", &root, name, make).unwrap_err();
                assert!(matches!(error, PoolError::Escape { .. }), "{name}: {error}");
            }
        }
        let place = resolve("p", &root, "new/folders/a.img", false).unwrap();
        assert!(!place.exists && !root.join("new").exists());
        resolve("p", &root, "new/folders/a.img", true).unwrap();
        assert!(root.join("new/folders").is_dir());
    }
}
