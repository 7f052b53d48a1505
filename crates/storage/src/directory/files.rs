//! Files that appear whole or not at all, and stay.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

/// 128 random bits as text.
pub(super) fn random_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Makes what was done to the names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes a file durable under a temporary name, lets `fill` write it, and puts it in its
/// place unless something is there already. Returns whether it was put there.
pub(super) fn place_new(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<bool> {
    let (folder, name) = split(path)?;
    let part = folder.join(format!(
        "{}-new.{name}.{}",
        super::paths::RESERVED,
        random_id()?
    ));
    let result = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&part)?;
        fill(&mut file)?;
        file.sync_all()?;
        drop(file);
        publish(&part, path)
    })();
    if !matches!(result, Ok(true)) {
        // It may never have come into being.
        let _ = fs::remove_file(&part);
    }
    result
}

/// Gives the finished file its name, never taking one away. Returns false when the name
/// is taken.
pub(super) fn publish(part: &Path, path: &Path) -> io::Result<bool> {
    let (folder, _) = split(path)?;
    match rustix::fs::renameat_with(CWD, part, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(false),
        // NFS knows no such rename, but refuses a second link of the same name.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match fs::hard_link(part, path) {
            Ok(()) => fs::remove_file(part)?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(false),
            Err(error) => return Err(error),
        },
        Err(errno) => return Err(errno.into()),
    }
    sync_folder(folder)?;
    Ok(true)
}

/// Writes 4 KiB to a file that is kept for this purpose, down to stable storage.
pub(super) fn probe_write(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(&[0x51; 4096])?;
    file.sync_data()
}

fn split(path: &Path) -> io::Result<(&Path, &str)> {
    match (
        path.parent(),
        path.file_name().and_then(|name| name.to_str()),
    ) {
        (Some(folder), Some(name)) => Ok((folder, name)),
        _ => Err(ErrorKind::InvalidInput.into()),
    }
}
