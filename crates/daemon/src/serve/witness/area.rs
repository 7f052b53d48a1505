//! Where a witness's lease and log are: files of a pool, or a raw disk. Blocking, for threads of their own.
//!
//! Always holds, in both: a holder's log is complete before it is its own, and is made from that of the holder before it; what an
//! earlier holder writes late, however late, reaches nothing that is read any more. Must not: decide who holds the lease.

use super::files::FileArea;
use super::raw::RawArea;
use quorate_consensus::{Media, Tenure};
use quorate_membership::Block;
use std::io;
use std::path::{Path, PathBuf};

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AreaError {
    /// The pool is not what it should be, or is away.
    #[error(transparent)]
    Pool(#[from] quorate_storage::PoolError),
    /// The unit is away, or does not let this host in.
    #[error(transparent)]
    Unit(#[from] quorate_storage::iscsi::session::IscsiError),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// The disk has no room for a witness.
    #[error(
        "{} has {} MiB: a disk witness needs {} MiB", path.display(), have_bytes >> 20, super::raw::AREA_BYTES >> 20
    )]
    TooSmall { path: PathBuf, have_bytes: u64 },
    /// An earlier write of this host hangs: until it has ended nobody knows where it lands.
    #[error("{}: an earlier write of this host has not ended yet", .0.display())]
    Busy(PathBuf),
    /// What must be there is not: the log is lost.
    #[error("{} is missing or empty", .0.display())]
    Lost(PathBuf),
    /// What must be there is something else: the log is lost.
    #[error("{}: {what} is damaged", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    /// The right to the files ran out meanwhile.
    #[error("the lease on the witness ran out")]
    Over,
}

pub(super) fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, AreaError> {
    let path = path.to_owned();
    result.map_err(|source| AreaError::Io { path, source })
}

/// Where a witness's lease and log are.
#[derive(Debug, Clone)]
pub(crate) enum Area {
    Files(FileArea),
    Raw(RawArea),
}

/// The two blocks of the lease.
pub(crate) trait LeasePlace: Send {
    /// Both blocks.
    fn read(&mut self) -> Result<[Option<Block>; 2], AreaError>;

    /// Writes a block to its place, durably.
    fn write(&mut self, block: &Block) -> Result<(), AreaError>;

    /// Is it still the one that others see?
    fn is_there(&self) -> Result<bool, AreaError>;
}

/// The log of a holder.
#[derive(Debug)]
pub(crate) enum Prepared {
    /// In this directory.
    Dir(PathBuf),
    /// On these media, which messages call so.
    Media(Box<Media>, PathBuf),
}

impl Area {
    /// Opens the lease; makes it where there is none.
    pub(crate) fn open_lease(&self) -> Result<Box<dyn LeasePlace>, AreaError> {
        Ok(match self {
            Self::Files(area) => Box::new(area.open_lease()?),
            Self::Raw(area) => Box::new(area.open_lease()?),
        })
    }

    /// Has no holder ever kept a log here?
    pub(crate) fn is_fresh(&self) -> Result<bool, AreaError> {
        match self {
            Self::Files(area) => area.is_fresh(),
            Self::Raw(area) => area.is_fresh(),
        }
    }

    /// Makes the log of a generation, from that of the one before it.
    pub(crate) fn prepare(&self, generation: u64, tenure: &Tenure) -> Result<Prepared, AreaError> {
        match self {
            Self::Files(area) => area.prepare(generation, tenure).map(Prepared::Dir),
            Self::Raw(area) => {
                let media = area.prepare(generation, tenure)?;
                Ok(Prepared::Media(Box::new(media), area.name()))
            }
        }
    }

    /// Removes what generations before this one, and witnesses before this one, left behind.
    pub(crate) fn clean(&self, generation: u64) -> Result<(), AreaError> {
        match self {
            Self::Files(area) => area.clean(generation),
            // Slots are written over.
            Self::Raw(_) => Ok(()),
        }
    }
}
