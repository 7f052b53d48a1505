//! Where a node keeps its log and its snapshot when there is no directory for them: the seam to a raw disk.
//!
//! Always holds: the node asks for one thing at a time of each medium, from threads that may block; after
//! [`LogMedium::sync`] and [`SnapshotMedium::replace`] it relies on what was written. Must not: know what is behind.

use redb::StorageBackend;
use std::fmt::Debug;
use std::io;

/// Bytes of changing length, for the log.
pub trait LogMedium: Debug + Send + Sync + 'static {
    /// Their length.
    ///
    /// # Errors
    /// When it cannot be told.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are none.
    ///
    /// # Errors
    /// As [`LogMedium::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads, within the length.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Cuts or prolongs them, by zeroes, durably.
    ///
    /// # Errors
    /// When there is no room.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Writes, within the length.
    ///
    /// # Errors
    /// When they cannot be written.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// When that fails.
    fn sync(&self) -> io::Result<()>;
}

/// A place for one snapshot.
pub trait SnapshotMedium: Debug + Send + Sync + 'static {
    /// The snapshot that was stored last.
    ///
    /// # Errors
    /// `InvalidData`: it is damaged. Others: it cannot be read now.
    fn load(&self) -> io::Result<Option<Vec<u8>>>;

    /// Puts another in its place, durably: whatever happens, either the old or the new one is there.
    ///
    /// # Errors
    /// When it cannot be stored.
    fn replace(&self, bytes: &[u8]) -> io::Result<()>;
}

/// Both, for one node.
#[derive(Debug)]
pub struct Media {
    /// For the log.
    pub log: Box<dyn LogMedium>,
    /// For the snapshot.
    pub snapshot: Box<dyn SnapshotMedium>,
}

/// The log's medium as redb uses it.
#[derive(Debug)]
pub(crate) struct Backend(pub(crate) Box<dyn LogMedium>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}
