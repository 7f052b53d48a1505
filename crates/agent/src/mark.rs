//! The mark of a copy: an extended attribute of its image, so that it goes where the image goes and ends with it.
//!
//! Always holds: when an image bears a mark, everything that was written to it before is on stable storage.
//!
//! Must not: know what a mark means ([`quorate_agent_logic::FlushRequest`]).

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::Path;

const NAME: &str = "user.quorate.copy";
/// Longest mark.
const MOST: usize = 256;

/// Flushes an image and marks it.
///
/// # Errors
/// When it cannot be flushed, or the file system has no extended attributes.
pub(crate) fn set(image: &Path, mark: &str) -> io::Result<()> {
    let file = File::options().write(true).open(image)?;
    file.sync_all()?;
    fsetxattr(&file, NAME, mark.as_bytes(), XattrFlags::empty())?;
    file.sync_all()
}

/// The mark of an image. What cannot be read is no mark.
pub(crate) fn read(image: &Path) -> Option<String> {
    let file = File::open(image).ok()?;
    let mut value = [0; MOST];
    let length = fgetxattr(&file, NAME, &mut value[..]).ok()?;
    String::from_utf8(value.get(..length)?.to_vec()).ok()
}

/// Takes the mark away, durably.
///
/// # Errors
/// When it may still be there.
pub(crate) fn remove(image: &Path) -> io::Result<()> {
    let file = File::options().write(true).open(image)?;
    match fremovexattr(&file, NAME) {
        Ok(()) => file.sync_all(),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_back_until_it_is_removed_or_the_image_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("db.raw");
        std::fs::write(&image, b"data").unwrap();
        assert_eq!(read(&image), None);
        remove(&image).unwrap();
        match set(&image, "db-3-7") {
            Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => return,
            other => other.unwrap(),
        }
        assert_eq!(read(&image).as_deref(), Some("db-3-7"));
        set(&image, "db-3-9").unwrap();
        assert_eq!(read(&image).as_deref(), Some("db-3-9"));
        let copied = dir.path().join("other.raw");
        std::fs::write(&copied, std::fs::read(&image).unwrap()).unwrap();
        assert_eq!(read(&copied), None);
        remove(&image).unwrap();
        assert_eq!(read(&image), None);
    }
}
