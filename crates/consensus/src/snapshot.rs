//! The snapshot file.
//!
//! Owns `snapshot` (and `snapshot.tmp`) in the node's directory, or the same bytes on a medium. What always holds: the file is replaced
//! by write, fsync, rename, directory fsync, so a crash leaves the old or the new one; its checksum covers
//! header and contents; an older snapshot never replaces a newer one. It must not look into the contents.
//!
//! ```text
//! "QRSNAP01" | header_length[4] | header(JSON: openraft's snapshot meta) | sha256[32] | state
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
#[cfg(test)]
use std::path::Path;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use crate::error::OpenError;
use crate::media::SnapshotMedium;
use crate::types::SnapshotMeta;

const MAGIC_PREFIX: &[u8; 6] = b"QRSNAP";
const MAGIC: &[u8; 8] = b"QRSNAP01";
const NAME: &str = "snapshot";
const TEMPORARY: &str = "snapshot.tmp";

/// Where the snapshot is.
#[derive(Debug)]
pub(crate) enum Place {
    /// In this directory.
    Dir(PathBuf),
    /// On a medium that messages call so.
    Medium(Box<dyn SnapshotMedium>, PathBuf),
}

impl Place {
    fn path(&self) -> PathBuf {
        match self {
            Self::Dir(dir) => dir.join(NAME),
            Self::Medium(_, name) => name.clone(),
        }
    }

    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Medium(medium, _) => medium.load(),
            Self::Dir(dir) => match fs::read(dir.join(NAME)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    /// Stores the parts one after the other, in the place of what was there.
    fn replace(&self, parts: &[&[u8]]) -> io::Result<()> {
        let dir = match self {
            Self::Medium(medium, _) => return medium.replace(&parts.concat()),
            Self::Dir(dir) => dir,
        };
        let temporary = dir.join(TEMPORARY);
        let mut file = File::create(&temporary)?;
        for part in parts {
            file.write_all(part)?;
        }
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, dir.join(NAME))?;
        File::open(dir)?.sync_all()
    }
}

/// The snapshot file of one node.
#[derive(Debug)]
pub(crate) struct SnapshotStore {
    place: Place,
    /// The lock also serialises writers.
    state: Mutex<StoreState>,
}

#[derive(Debug)]
struct StoreState {
    /// Meta of the file on the disk.
    current: Option<SnapshotMeta>,
    closed: bool,
}

/// A snapshot with its meta.
#[derive(Debug)]
pub(crate) struct StoredSnapshot {
    pub(crate) meta: SnapshotMeta,
    pub(crate) state: Vec<u8>,
}

impl SnapshotStore {
    /// Reads and checks the file in `dir`, if there is one.
    #[cfg(test)]
    pub(crate) fn open(dir: &Path) -> Result<(Self, Option<StoredSnapshot>), OpenError> {
        Self::open_in(Place::Dir(dir.to_path_buf()))
    }

    /// Reads and checks what is there, if there is anything.
    pub(crate) fn open_in(place: Place) -> Result<(Self, Option<StoredSnapshot>), OpenError> {
        if let Place::Dir(dir) = &place {
            match fs::remove_file(dir.join(TEMPORARY)) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(OpenError::Io {
                        path: dir.join(TEMPORARY),
                        source,
                    });
                }
                _ => {}
            }
        }
        let path = place.path();
        let snapshot = match place.load() {
            Ok(Some(bytes)) => Some(decode(&bytes).map_err(|e| match e {
                DecodeError::Version(found) => OpenError::SnapshotFormat {
                    path: path.clone(),
                    found,
                },
                DecodeError::Damaged(reason) => OpenError::SnapshotCorrupt {
                    path: path.clone(),
                    reason,
                },
            })?),
            Ok(None) => None,
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                let reason = e.to_string();
                return Err(OpenError::SnapshotCorrupt { path, reason });
            }
            Err(source) => return Err(OpenError::Io { path, source }),
        };
        let store = Self {
            place,
            state: Mutex::new(StoreState {
                current: snapshot.as_ref().map(|s| s.meta.clone()),
                closed: false,
            }),
        };
        Ok((store, snapshot))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.place.path()
    }

    fn lock(&self) -> MutexGuard<'_, StoreState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a writer and refuses all later ones: the directory may belong to somebody else soon.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Makes the snapshot durable, unless a newer one is there. Blocks on the disk.
    pub(crate) fn save(&self, meta: &SnapshotMeta, state: &[u8]) -> io::Result<()> {
        let mut store = self.lock();
        if store.closed {
            return Err(io::Error::other("the node is stopped"));
        }
        if store
            .current
            .as_ref()
            .is_some_and(|c| c.last_log_id > meta.last_log_id)
        {
            return Ok(());
        }
        let header = serde_json::to_vec(meta).map_err(io::Error::other)?;
        let length = u32::try_from(header.len()).map_err(io::Error::other)?;
        let sum = digest(&header, state);
        self.place
            .replace(&[MAGIC, &length.to_be_bytes(), &header, &sum, state])?;
        store.current = Some(meta.clone());
        Ok(())
    }

    /// Reads the file again. Blocks on the disk.
    pub(crate) fn load(&self) -> io::Result<Option<StoredSnapshot>> {
        let store = self.lock();
        if store.current.is_none() {
            return Ok(None);
        }
        let bytes = self.place.load()?;
        drop(store);
        let bytes = bytes.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        decode(&bytes).map(Some).map_err(|e| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                match e {
                    DecodeError::Version(v) => format!("unknown format {v}"),
                    DecodeError::Damaged(reason) => reason,
                },
            )
        })
    }
}

enum DecodeError {
    Version(String),
    Damaged(String),
}

fn digest(header: &[u8], state: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(header);
    hasher.update(state);
    hasher.finalize().into()
}

fn decode(bytes: &[u8]) -> Result<StoredSnapshot, DecodeError> {
    let cut = || DecodeError::Damaged("it is cut short".into());
    let (magic, rest) = bytes.split_at_checked(8).ok_or_else(cut)?;
    if magic != MAGIC {
        return Err(match magic.strip_prefix(MAGIC_PREFIX) {
            Some(version) => DecodeError::Version(String::from_utf8_lossy(version).into_owned()),
            None => DecodeError::Damaged("it does not start like a snapshot".into()),
        });
    }
    let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| cut())?;
    let (header, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
    let (sum, state) = rest.split_first_chunk::<32>().ok_or_else(cut)?;
    if digest(header, state) != *sum {
        return Err(DecodeError::Damaged("its checksum does not match".into()));
    }
    let meta = serde_json::from_slice(header)
        .map_err(|e| DecodeError::Damaged(format!("its header does not parse: {e}")))?;
    Ok(StoredSnapshot {
        meta,
        state: state.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use openraft::{CommittedLeaderId, LogId};

    fn meta(index: u64) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: Some(LogId::new(CommittedLeaderId::new(1, 1), index)),
            snapshot_id: index.to_string(),
            ..SnapshotMeta::default()
        }
    }

    #[test]
    fn a_snapshot_is_read_back_and_never_replaced_by_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let (store, none) = SnapshotStore::open(dir.path()).unwrap();
        assert!(none.is_none() && store.load().unwrap().is_none());
        store.save(&meta(7), b"seven").unwrap();
        store.save(&meta(5), b"five").unwrap();
        assert_eq!(store.load().unwrap().unwrap().state, b"seven");
        store.close();
        assert!(store.save(&meta(9), b"nine").is_err());
        fs::write(dir.path().join(TEMPORARY), b"left over").unwrap();
        let (_, again) = SnapshotStore::open(dir.path()).unwrap();
        let again = again.unwrap();
        assert_eq!((again.meta, again.state), (meta(7), b"seven".to_vec()));
        assert!(!dir.path().join(TEMPORARY).exists());
    }

    #[test]
    fn damage_and_other_formats_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = SnapshotStore::open(dir.path()).unwrap();
        store.save(&meta(7), b"seven").unwrap();
        let good = fs::read(store.path()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(store.path(), &bad).unwrap();
            assert!(SnapshotStore::open(dir.path()).is_err(), "flip at {at}");
        }
        for cut in [0, 5, 9, good.len() - 1] {
            fs::write(store.path(), &good[..cut]).unwrap();
            assert!(matches!(
                SnapshotStore::open(dir.path()),
                Err(OpenError::SnapshotCorrupt { .. })
            ));
        }
        let mut newer = good;
        newer[..8].copy_from_slice(b"QRSNAP02");
        fs::write(store.path(), &newer).unwrap();
        assert!(matches!(
            SnapshotStore::open(dir.path()),
            Err(OpenError::SnapshotFormat { .. })
        ));
    }
}
