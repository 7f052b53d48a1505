//! The witness's files in a pool, and nothing else: blocking, for threads of their own.
//!
//! ```text
//! POOL/.quorate-witness/NODE/lease         two blocks, 4096 bytes apart
//! POOL/.quorate-witness/NODE/gen-G/        log and snapshot as the holder of generation G keeps them
//! POOL/.quorate-witness/NODE/gen-G.new/    being made from those of the holder before it
//! ```
//!
//! Always holds: a holder writes only below its own generation, which is complete before it has its name. So a write of
//! an earlier holder that comes late, however late, lands in files that nobody reads any more. Nothing is
//! touched where the pool's marker is not the expected one. Must not: decide who holds the lease.

use super::area::{AreaError, LeasePlace, at};
use quorate_consensus::{NodeId, Tenure};
use quorate_membership::Block;
use quorate_storage::{DirectoryConfig, directory};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Bytes between the two blocks: the largest piece that disks write at once.
const STRIDE: usize = 4096;
const LOG: &str = "raft.redb";
const SNAPSHOT: &str = "snapshot";

/// Where a witness's files are.
#[derive(Debug, Clone)]
pub(crate) struct FileArea {
    pool: DirectoryConfig,
    node: NodeId,
}

/// The open lease file.
pub(crate) struct LeaseFile {
    file: File,
    path: PathBuf,
    direct: bool,
    /// Twice [`STRIDE`], aligned within.
    buffer: Vec<u8>,
}

impl FileArea {
    pub(crate) fn new(pool: DirectoryConfig, node: NodeId) -> Self {
        Self { pool, node }
    }

    /// The directory of this witness, in a pool that is really there.
    fn dir(&self) -> Result<PathBuf, AreaError> {
        let all = directory::checked_root(&self.pool)?.join(".quorate-witness");
        Ok(all.join(self.node.to_string()))
    }

    /// Opens the lease file; makes it where there is none.
    pub(crate) fn open_lease(&self) -> Result<LeaseFile, AreaError> {
        let dir = self.dir()?;
        at(&dir, fs::create_dir_all(&dir))?;
        let path = dir.join("lease");
        let open = |flags: i32| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.mode(0o600).custom_flags(flags).open(&path)
        };
        let sync = rustix::fs::OFlags::DSYNC;
        let bits = |flags: rustix::fs::OFlags| i32::try_from(flags.bits()).unwrap_or(0);
        // Past the page cache, where the file system can: another machine's blocks must be seen.
        let (file, direct) = match open(bits(sync | rustix::fs::OFlags::DIRECT)) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                (at(&path, open(bits(sync)))?, false)
            }
            Err(source) => return Err(AreaError::Io { path, source }),
        };
        let size = 2 * STRIDE as u64;
        if at(&path, file.metadata())?.len() < size {
            at(&path, file.set_len(size))?;
        }
        Ok(LeaseFile {
            file,
            path,
            direct,
            buffer: vec![0; 3 * STRIDE],
        })
    }

    /// Newest complete generation.
    fn newest(dir: &Path) -> Result<Option<u64>, AreaError> {
        let mut newest = None;
        for entry in at(dir, fs::read_dir(dir))? {
            let name = at(dir, entry)?.file_name();
            let number = name
                .to_string_lossy()
                .strip_prefix("gen-")
                .and_then(|n| n.parse().ok());
            newest = newest.max(number);
        }
        Ok(newest)
    }

    /// Has any holder ever kept a log here?
    pub(crate) fn is_fresh(&self) -> Result<bool, AreaError> {
        Ok(Self::newest(&self.dir()?)?.is_none())
    }

    /// Makes the directory of a generation, from that of the one before it, and returns it.
    pub(crate) fn prepare(&self, generation: u64, tenure: &Tenure) -> Result<PathBuf, AreaError> {
        let dir = self.dir()?;
        let mine = dir.join(format!("gen-{generation}"));
        let making = dir.join(format!("gen-{generation}.new"));
        let newest = Self::newest(&dir)?;
        if newest > Some(generation) {
            // Somebody came after this holder, or the lease file was lost and counts from one again.
            return Err(match tenure.holds() {
                true => AreaError::Lost(dir.join("lease")),
                false => AreaError::Over,
            });
        }
        if newest == Some(generation) {
            // An earlier attempt of this very holder.
            stored(&mine)?;
            return Ok(mine);
        }
        if making.exists() {
            at(&making, fs::remove_dir_all(&making))?;
        }
        at(&making, fs::create_dir(&making))?;
        if let Some(before) = newest {
            let from = dir.join(format!("gen-{before}"));
            let log = stored(&from)?;
            copy(&log, &making.join(LOG))?;
            if from.join(SNAPSHOT).exists() {
                copy(&from.join(SNAPSHOT), &making.join(SNAPSHOT))?;
            }
        }
        sync(&making)?;
        if !tenure.holds() {
            return Err(AreaError::Over);
        }
        at(&mine, fs::rename(&making, &mine))?;
        sync(&dir)?;
        Ok(mine)
    }

    /// Removes what generations before this one, and witnesses before this one, left behind.
    pub(crate) fn clean(&self, generation: u64) -> Result<(), AreaError> {
        let dir = self.dir()?;
        for entry in at(&dir, fs::read_dir(&dir))? {
            let path = at(&dir, entry)?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let number = name
                .strip_prefix("gen-")
                .map(|n| n.trim_end_matches(".new").parse::<u64>());
            if matches!(number, Some(Ok(number)) if number < generation) {
                at(&path, fs::remove_dir_all(&path))?;
            }
        }
        let all = dir.parent().unwrap_or(&dir);
        for entry in at(all, fs::read_dir(all))? {
            let path = at(all, entry)?.path();
            let node = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .parse::<NodeId>();
            // Numbers grow: a smaller one was replaced.
            if node.is_ok_and(|node| node < self.node) {
                at(&path, fs::remove_dir_all(&path))?;
            }
        }
        Ok(())
    }
}

/// The log in a generation's directory, if it is there and not empty.
fn stored(dir: &Path) -> Result<PathBuf, AreaError> {
    let log = dir.join(LOG);
    match fs::metadata(&log) {
        Ok(found) if found.len() > 0 => Ok(log),
        Ok(_) => Err(AreaError::Lost(log)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(AreaError::Lost(log)),
        Err(source) => Err(AreaError::Io { path: log, source }),
    }
}

/// Copies durably.
fn copy(from: &Path, to: &Path) -> Result<(), AreaError> {
    at(from, fs::copy(from, to))?;
    at(to, File::open(to).and_then(|file| file.sync_all()))
}

fn sync(dir: &Path) -> Result<(), AreaError> {
    at(dir, File::open(dir).and_then(|dir| dir.sync_all()))
}

impl LeaseFile {
    fn aligned(&self) -> usize {
        self.buffer.as_ptr().align_offset(STRIDE).min(STRIDE)
    }
}

impl LeasePlace for LeaseFile {
    fn read(&mut self) -> Result<[Option<Block>; 2], AreaError> {
        if !self.direct {
            // What is in the page cache may be older than what another machine wrote.
            let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
        }
        let from = self.aligned();
        let both = &mut self.buffer[from..from + 2 * STRIDE];
        at(&self.path, self.file.read_exact_at(both, 0))?;
        Ok([
            Block::decode(&both[..STRIDE]),
            Block::decode(&both[STRIDE..]),
        ])
    }

    fn write(&mut self, block: &Block) -> Result<(), AreaError> {
        let from = self.aligned();
        let one = &mut self.buffer[from..from + STRIDE];
        let bytes = block.encode();
        one.fill(0);
        one[..bytes.len()].copy_from_slice(&bytes);
        let place = (block.place() * STRIDE) as u64;
        at(&self.path, self.file.write_all_at(one, place))
    }

    /// Is the file still the one at its path?
    fn is_there(&self) -> Result<bool, AreaError> {
        let mine = at(&self.path, self.file.metadata())?;
        let there = at(&self.path, fs::metadata(&self.path))?;
        Ok((mine.dev(), mine.ino()) == (there.dev(), there.ino()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(dir: &Path) -> FileArea {
        let root = dir.join("pool");
        fs::create_dir_all(&root).unwrap();
        let marker =
            serde_json::json!({ "version": 1, "cluster": "c", "pool": "shared", "id": "m1" });
        fs::write(root.join(".quorate-pool"), marker.to_string()).unwrap();
        let mut pool = DirectoryConfig::new("shared", root, "c", "h1");
        pool.expected_id = Some("m1".into());
        FileArea::new(pool, 5)
    }

    fn block(generation: u64, counter: u64) -> Block {
        Block {
            generation,
            counter,
            nonce: 7,
            held: true,
            holder: "h1".into(),
        }
    }

    #[test]
    fn blocks_are_read_by_another_opening() {
        let dir = tempfile::tempdir().unwrap();
        let area = area(dir.path());
        let mut one = area.open_lease().unwrap();
        assert_eq!(one.read().unwrap(), [None, None]);
        one.write(&block(1, 1)).unwrap();
        let mut other = area.open_lease().unwrap();
        assert_eq!(other.read().unwrap(), [Some(block(1, 1)), None]);
        other.write(&block(1, 2)).unwrap();
        assert_eq!(one.read().unwrap(), [Some(block(1, 1)), Some(block(1, 2))]);
        assert!(one.is_there().unwrap());
        fs::remove_file(&one.path).unwrap();
        assert!(one.is_there().is_err(), "gone");
        area.open_lease().unwrap();
        assert!(!one.is_there().unwrap(), "another file");
    }

    #[test]
    fn a_generation_is_made_from_the_one_before_and_late_writes_do_not_reach_it() {
        let dir = tempfile::tempdir().unwrap();
        let area = area(dir.path());
        let held = Tenure::until(u64::MAX);
        drop(area.open_lease().unwrap());
        assert!(area.is_fresh().unwrap());
        let first = area.prepare(1, &held).unwrap();
        assert!(!area.is_fresh().unwrap());
        assert!(
            matches!(area.prepare(2, &held), Err(AreaError::Lost(_))),
            "nothing was ever stored"
        );
        fs::write(first.join(LOG), "one").unwrap();
        fs::write(first.join(SNAPSHOT), "snap").unwrap();
        let late = OpenOptions::new()
            .write(true)
            .open(first.join(LOG))
            .unwrap();
        let third = area.prepare(3, &held).unwrap();
        late.write_all_at(b"two", 0).unwrap();
        assert_eq!(fs::read(third.join(LOG)).unwrap(), b"one");
        assert_eq!(fs::read(third.join(SNAPSHOT)).unwrap(), b"snap");
        assert_eq!(area.prepare(3, &held).unwrap(), third, "once more");
        assert!(
            matches!(area.prepare(2, &held), Err(AreaError::Lost(_))),
            "the lease counts anew"
        );
        // A claimant whose lease is over leaves no generation behind.
        held.end();
        assert!(matches!(area.prepare(4, &held), Err(AreaError::Over)));
        assert_eq!(FileArea::newest(&area.dir().unwrap()).unwrap(), Some(3));
        area.clean(3).unwrap();
        assert!(!first.exists() && third.exists());
        // An emptied log is a lost one, not a new one.
        fs::write(third.join(LOG), "").unwrap();
        let held = Tenure::until(u64::MAX);
        assert!(matches!(area.prepare(5, &held), Err(AreaError::Lost(_))));
    }

    #[test]
    fn nothing_is_made_where_the_pool_is_not_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let area = area(dir.path());
        let marker = dir.path().join("pool/.quorate-pool");
        fs::remove_file(&marker).unwrap();
        assert!(matches!(area.open_lease(), Err(AreaError::Pool(_))));
        assert!(!dir.path().join("pool/.quorate-witness").exists());
    }
}
