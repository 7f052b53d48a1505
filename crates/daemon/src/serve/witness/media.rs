//! What a witness's slot on a raw disk holds: small records, a log of changing length, a snapshot.
//!
//! Always holds: a record is at two places in turn, so that a torn write leaves the one before it; a snapshot is complete before
//! its record names it; nothing is written once the tenure is over, so what a late holder leaves is at most what was under way.
//! Must not: know whose slot it is.

use quorate_consensus::{LogMedium, SnapshotMedium, Tenure};
use quorate_membership::checksum;
use quorate_storage::{RAW_BLOCK, RawDisk};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const BLOCK: usize = RAW_BLOCK as usize;
/// A record has so many bytes at most: with its head and sum it fits in the smallest piece that disks write at once.
const RECORD_MAX: usize = 512 - 36;
const MAGIC: &[u8; 8] = b"QRWITN01";
/// Bytes between the two places of a record.
const APART: u64 = 64 << 10;
/// Most that is read or written at once.
pub(super) const PIECE: usize = 256 << 10;

pub(super) type Disk = Box<dyn RawDisk>;

/// A small record at two places.
#[derive(Debug, Clone, Copy)]
pub(super) struct Twin {
    /// The first place; the second is [`APART`] after it.
    pub(super) at: u64,
    /// Whose: records of others are none.
    pub(super) key: u64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found<T> {
    /// Nothing of ours.
    Nothing,
    /// The newest, with its number.
    Record(u64, T),
    /// Ours was here.
    Damaged,
}

impl<T> Found<T> {
    fn next(&self) -> u64 {
        match self {
            Self::Record(number, _) => number + 1,
            Self::Nothing | Self::Damaged => 0,
        }
    }
}

impl Twin {
    /// The newest record of both places.
    pub(super) fn read<T: DeserializeOwned>(self, disk: &mut Disk) -> io::Result<Found<T>> {
        let (mut newest, mut damaged) = (Found::Nothing, false);
        for place in 0..2 {
            let mut block = vec![0; BLOCK];
            disk.read(self.at + place * APART, &mut block)?;
            if block[..8] != *MAGIC || block[8..16] != self.key.to_be_bytes() {
                continue;
            }
            match decode(&block) {
                Some((number, record)) if number >= newest.next() => {
                    newest = Found::Record(number, record);
                }
                Some(_) => {}
                None => damaged = true,
            }
        }
        Ok(match newest {
            Found::Nothing if damaged => Found::Damaged,
            newest => newest,
        })
    }

    /// Puts a record in the place of the older one, durably.
    pub(super) fn write<T: Serialize>(
        self,
        disk: &mut Disk,
        number: u64,
        record: &T,
    ) -> io::Result<()> {
        let body = serde_json::to_vec(record)?;
        if body.len() > RECORD_MAX {
            return Err(io::Error::other("a record is too long"));
        }
        let mut block = MAGIC.to_vec();
        block.extend(self.key.to_be_bytes());
        block.extend(number.to_be_bytes());
        block.extend((body.len() as u32).to_be_bytes());
        block.extend(body);
        let sum = checksum(&block);
        block.extend(sum.to_be_bytes());
        block.resize(BLOCK, 0);
        disk.write(self.at + number % 2 * APART, &block)?;
        disk.sync()
    }

    /// Puts a record in both places: no single damage takes it away.
    pub(super) fn write_twice<T: Serialize + DeserializeOwned>(
        self,
        disk: &mut Disk,
        record: &T,
    ) -> io::Result<()> {
        let next = self.read::<T>(disk)?.next();
        self.write(disk, next, record)?;
        self.write(disk, next + 1, record)
    }
}

fn decode<T: DeserializeOwned>(block: &[u8]) -> Option<(u64, T)> {
    let number = u64::from_be_bytes(*block.get(16..)?.first_chunk()?);
    let length = u32::from_be_bytes(*block.get(24..)?.first_chunk()?) as usize;
    let end = 28 + Some(length).filter(|length| *length <= RECORD_MAX)?;
    let sum = block.get(end..)?.first_chunk::<8>()?;
    if checksum(&block[..end]).to_be_bytes() != *sum {
        return None;
    }
    Some((number, serde_json::from_slice(&block[28..end]).ok()?))
}

/// This process's only writer of its slot, until the last thread that may write there has ended.
#[derive(Debug)]
pub(super) struct OnlyWriter(Arc<AtomicBool>);

impl OnlyWriter {
    /// `None`: another is there.
    pub(super) fn begin(taken: &Arc<AtomicBool>) -> Option<Self> {
        let free = taken.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst);
        free.ok().map(|_| Self(Arc::clone(taken)))
    }
}

impl Drop for OnlyWriter {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The disk of a holder, for its log and its snapshot.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    disk: Arc<Mutex<(Disk, OnlyWriter)>>,
    tenure: Tenure,
}

impl Shared {
    pub(super) fn new(disk: Disk, only: OnlyWriter, tenure: Tenure) -> Self {
        Self {
            disk: Arc::new(Mutex::new((disk, only))),
            tenure,
        }
    }

    fn lock(&self) -> MutexGuard<'_, (Disk, OnlyWriter)> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_write(&self) -> io::Result<()> {
        match self.tenure.holds() {
            true => Ok(()),
            false => Err(io::Error::other("the lease on the witness ran out")),
        }
    }
}

/// Length of the log, as a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Length {
    pub(super) bytes: u64,
}

/// A log in a part of the disk.
#[derive(Debug)]
pub(super) struct RawLog {
    shared: Shared,
    length: Twin,
    at: u64,
    most: u64,
    /// The record of the length, and its number.
    known: Mutex<(u64, u64)>,
}

impl RawLog {
    pub(super) fn open(shared: Shared, length: Twin, at: u64, most: u64) -> io::Result<Self> {
        let found = length.read::<Length>(&mut shared.lock().0)?;
        let known = match found {
            Found::Record(number, length) => (number, length.bytes),
            // A log without its length is none: it is empty, and empty is lost.
            Found::Nothing | Found::Damaged => (0, 0),
        };
        Ok(Self {
            shared,
            length,
            at,
            most,
            known: Mutex::new(known),
        })
    }

    fn known(&self) -> MutexGuard<'_, (u64, u64)> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inside(&self, offset: u64, length: usize) -> io::Result<()> {
        let end = offset.checked_add(length as u64);
        match end.is_some_and(|end| end <= self.known().1) {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The whole blocks around a piece: their place, their length, and where the piece begins in them.
fn around(offset: u64, length: usize) -> (u64, usize, usize) {
    let skip = offset % RAW_BLOCK;
    let bytes = (skip as usize + length).next_multiple_of(BLOCK);
    (offset - skip, bytes, skip as usize)
}

impl LogMedium for RawLog {
    fn len(&self) -> io::Result<u64> {
        Ok(self.known().1)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.inside(offset, into.len())?;
        let (from, bytes, skip) = around(offset, into.len());
        let mut blocks = vec![0; bytes];
        self.shared.lock().0.read(self.at + from, &mut blocks)?;
        into.copy_from_slice(&blocks[skip..skip + into.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.shared.may_write()?;
        if len > self.most {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "the witness's slot has room for a log of {} bytes",
                    self.most
                ),
            ));
        }
        let mut known = self.known();
        let mut shared = self.shared.lock();
        let zeroes = vec![0; PIECE];
        let (mut at, end) = (
            known.1.next_multiple_of(RAW_BLOCK),
            len.next_multiple_of(RAW_BLOCK),
        );
        // The rest of a block that was cut is as new.
        if known.1 < len && !known.1.is_multiple_of(RAW_BLOCK) {
            let mut block = vec![0; BLOCK];
            let (from, keep) = (at - RAW_BLOCK, (known.1 % RAW_BLOCK) as usize);
            shared.0.read(self.at + from, &mut block)?;
            block[keep..].fill(0);
            shared.0.write(self.at + from, &block)?;
        }
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            shared.0.write(self.at + at, &zeroes[..bytes])?;
            at += bytes as u64;
        }
        shared.0.sync()?;
        let number = known.0 + 1;
        self.length
            .write(&mut shared.0, number, &Length { bytes: len })?;
        *known = (number, len);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inside(offset, data.len())?;
        self.shared.may_write()?;
        let (from, bytes, skip) = around(offset, data.len());
        let mut shared = self.shared.lock();
        if bytes == data.len() {
            return shared.0.write(self.at + from, data);
        }
        let mut blocks = vec![0; bytes];
        shared.0.read(self.at + from, &mut blocks)?;
        blocks[skip..skip + data.len()].copy_from_slice(data);
        shared.0.write(self.at + from, &blocks)
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.lock().0.sync()
    }
}

/// Which half has the snapshot, as a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Head {
    pub(super) half: u64,
    /// 0: there is none.
    pub(super) bytes: u64,
    pub(super) sum: u64,
}

/// Two halves for a snapshot in turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Halves {
    pub(super) head: Twin,
    pub(super) at: u64,
    /// Of one half.
    pub(super) most: u64,
}

impl Halves {
    fn damaged(what: &str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
    }

    pub(super) fn load(&self, disk: &mut Disk) -> io::Result<Option<Vec<u8>>> {
        let head = match self.head.read::<Head>(disk)? {
            Found::Nothing => return Ok(None),
            Found::Record(_, head) if head.bytes == 0 => return Ok(None),
            Found::Record(_, head) if head.bytes <= self.most && head.half < 2 => head,
            _ => return Err(Self::damaged("its record is damaged")),
        };
        let length = usize::try_from(head.bytes).map_err(io::Error::other)?;
        let mut bytes = vec![0; length.next_multiple_of(BLOCK)];
        disk.read(self.at + head.half * self.most, &mut bytes)?;
        bytes.truncate(length);
        match checksum(&bytes) == head.sum {
            true => Ok(Some(bytes)),
            false => Err(Self::damaged("its checksum does not match")),
        }
    }

    pub(super) fn replace(&self, disk: &mut Disk, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() as u64;
        if length > self.most {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "the witness's slot has room for a snapshot of {} bytes",
                    self.most
                ),
            ));
        }
        let found = self.head.read::<Head>(disk)?;
        let half = match found {
            Found::Record(_, head) => 1 - head.half.min(1),
            Found::Nothing | Found::Damaged => 0,
        };
        let mut blocks = bytes.to_vec();
        blocks.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let mut at = self.at + half * self.most;
        for piece in blocks.chunks(PIECE) {
            disk.write(at, piece)?;
            at += piece.len() as u64;
        }
        disk.sync()?;
        let head = Head {
            half,
            bytes: length,
            sum: checksum(bytes),
        };
        self.head.write(disk, found.next(), &head)
    }
}

/// A snapshot in a part of the disk.
#[derive(Debug)]
pub(super) struct RawSnapshot {
    pub(super) shared: Shared,
    pub(super) halves: Halves,
}

impl SnapshotMedium for RawSnapshot {
    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        self.halves.load(&mut self.shared.lock().0)
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        self.shared.may_write()?;
        self.halves.replace(&mut self.shared.lock().0, bytes)
    }
}

#[cfg(test)]
pub(super) mod tests_support {
    use std::os::unix::fs::FileExt as _;

    /// Flips a byte of a file.
    pub(crate) fn scribble(path: &std::path::Path, at: u64) {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}
