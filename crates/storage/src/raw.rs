//! Bytes that several hosts read and write in turn, past every cache of this host: what a disk witness lies on.
//!
//! Owns: the trait [`RawDisk`] with a block device or file behind it ([`RawFile`]), or a unit of an iSCSI target
//! ([`RawUnit`], by this program's own initiator).
//!
//! Always holds: offsets and lengths are multiples of [`RAW_BLOCK`]; what was read came from the disk; after
//! [`RawDisk::sync`] what was written is durable. Calls block, those to a SAN for a bounded time: a thread of their own is the
//! caller's business. Must not: know what the bytes mean, or who may write when.
//!
//! Why not QEMU's initiator (through `qemu-nbd`), which opens the disks of VMs: it reconnects for ever and then repeats what it
//! had not got through, minutes later and after this program has ended. Here a write must be over when its connection is.

use crate::iscsi::session::{IscsiError, Peer, Session, UnitInfo};
use quorate_types::Lun;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

/// What is read and written at once, in bytes: the largest block of the disks in use.
pub const RAW_BLOCK: u64 = 4096;
/// Most bytes of one command to a SAN.
const PIECE: usize = 64 << 10;

/// A disk as bytes.
pub trait RawDisk: fmt::Debug + Send {
    /// Its size.
    fn bytes(&self) -> u64;

    /// Reads from the disk itself.
    ///
    /// # Errors
    /// When it cannot be read, or not so.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes.
    ///
    /// # Errors
    /// When it cannot be written, or not so; a part of it may have been.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// When that fails: then nobody knows what is.
    fn sync(&mut self) -> io::Result<()>;
}

/// Whether such a piece may be read or written.
fn check(offset: u64, length: usize, bytes: u64) -> io::Result<()> {
    let length = length as u64;
    let aligned = offset.is_multiple_of(RAW_BLOCK) && length.is_multiple_of(RAW_BLOCK);
    let inside = offset.checked_add(length).is_some_and(|end| end <= bytes);
    match aligned && inside {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{length} bytes at {offset} of {bytes} cannot be read or written"),
        )),
    }
}

/// A block device, or a file in its place.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    bytes: u64,
    /// Past the page cache.
    direct: bool,
    /// Longer than a piece by a block, so that an aligned piece fits in.
    buffer: Vec<u8>,
}

impl RawFile {
    /// Opens it for reading and writing. `alone`: and refuses it while a file system, or another opening of this kind, has it on
    /// this host (block devices only).
    ///
    /// # Errors
    /// When there is none, or it is in use.
    pub fn open(path: &Path, alone: bool) -> io::Result<Self> {
        use rustix::fs::OFlags;
        let device = std::fs::metadata(path)?.file_type().is_block_device();
        let exclusive = match alone && device {
            true => OFlags::EXCL,
            false => OFlags::empty(),
        };
        let open = |flags: OFlags| {
            let bits = i32::try_from((flags | exclusive).bits()).unwrap_or(0);
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(bits).open(path)
        };
        let (mut file, direct) = match open(OFlags::DIRECT) {
            Ok(file) => (file, true),
            // Some file systems cannot; every block device can.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                (open(OFlags::empty())?, false)
            }
            Err(error) => return Err(error),
        };
        let bytes = file.seek(SeekFrom::End(0))?;
        let buffer = vec![0; PIECE + RAW_BLOCK as usize];
        Ok(Self {
            file,
            bytes,
            direct,
            buffer,
        })
    }

    /// The same, of a block device only.
    ///
    /// # Errors
    /// When it is none, or as [`RawFile::open`].
    pub fn open_device(path: &Path, alone: bool) -> io::Result<Self> {
        if !std::fs::metadata(path)?.file_type().is_block_device() {
            return Err(io::Error::other("it is not a block device"));
        }
        Self::open(path, alone)
    }

    fn aligned(&self) -> usize {
        let block = RAW_BLOCK as usize;
        self.buffer.as_ptr().align_offset(block).min(block)
    }
}

impl RawDisk for RawFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        check(offset, into.len(), self.bytes)?;
        if !self.direct {
            let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
        }
        let (from, mut at) = (self.aligned(), offset);
        for piece in into.chunks_mut(PIECE) {
            let buffer = &mut self.buffer[from..from + piece.len()];
            self.file.read_exact_at(buffer, at)?;
            piece.copy_from_slice(buffer);
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        check(offset, data.len(), self.bytes)?;
        let (from, mut at) = (self.aligned(), offset);
        for piece in data.chunks(PIECE) {
            let buffer = &mut self.buffer[from..from + piece.len()];
            buffer.copy_from_slice(piece);
            self.file.write_all_at(buffer, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A unit of an iSCSI target. After an error it is of no more use: open it anew.
pub struct RawUnit {
    /// Drives the session while a call lasts.
    runtime: Option<tokio::runtime::Runtime>,
    session: Option<Session>,
    info: UnitInfo,
    name: String,
}

impl fmt::Debug for RawUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawUnit")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Drop for RawUnit {
    fn drop(&mut self) {
        // Also where nothing may block.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl RawUnit {
    /// Logs in by the first peer that answers. `number` tells this host's writers apart: an earlier session under the same
    /// number is over, with all that was asked in it, once this returns.
    ///
    /// # Errors
    /// [`IscsiError`].
    pub fn open(peers: &[Peer], unit: &Lun, number: u8) -> Result<Self, IscsiError> {
        let target = unit.target.clone();
        let protocol = |detail: String| IscsiError::Protocol {
            target: target.clone(),
            detail,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| protocol(error.to_string()))?;
        let opened = runtime.block_on(async {
            let mut last = protocol("its pool names no portal".to_owned());
            for peer in peers {
                let found = async {
                    let mut session = Session::open_as(peer, &unit.target, number).await?;
                    let info = session.unit(unit.lun).await?;
                    Ok::<_, IscsiError>((session, info))
                };
                match found.await {
                    Ok(found) => return Ok(found),
                    Err(error @ (IscsiError::Portal { .. } | IscsiError::Timeout { .. })) => {
                        last = error;
                    }
                    Err(error) => return Err(error),
                }
            }
            Err(last)
        });
        let (session, info) = match opened {
            Ok((session, Some(info))) => (session, info),
            Ok((_, None)) => return Err(protocol(format!("LUN {} is not a disk", unit.lun))),
            Err(error) => return Err(error),
        };
        let block = u64::from(info.block_bytes);
        if block == 0 || block > RAW_BLOCK || !RAW_BLOCK.is_multiple_of(block) {
            return Err(protocol(format!(
                "LUN {} has blocks of {block} bytes: at most {RAW_BLOCK} can be used",
                unit.lun
            )));
        }
        Ok(Self {
            runtime: Some(runtime),
            session: Some(session),
            info,
            name: unit.to_string(),
        })
    }

    /// Runs a call; a failed one ends the session, at once.
    fn call<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Session, &UnitInfo) -> Result<T, IscsiError>,
    ) -> io::Result<T> {
        let (Some(runtime), Some(mut session)) = (&self.runtime, self.session.take()) else {
            return Err(io::Error::other(format!(
                "{}: its session is over",
                self.name
            )));
        };
        let info = &self.info;
        let done = runtime.block_on(async move {
            let done = work(&mut session, info).await;
            // What the target pings meanwhile is answered with the next call.
            done.map(|done| (done, session))
        });
        let (done, session) = done.map_err(io::Error::other)?;
        self.session = Some(session);
        Ok(done)
    }
}

impl RawDisk for RawUnit {
    fn bytes(&self) -> u64 {
        self.info.bytes
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        check(offset, into.len(), self.info.bytes)?;
        self.call(async |session, info| {
            let block_bytes = info.block_bytes as usize;
            let mut block = offset / u64::from(info.block_bytes);
            for piece in into.chunks_mut(PIECE) {
                let count = u16::try_from(piece.len() / block_bytes).unwrap_or(u16::MAX);
                let data = session
                    .read(info.lun, block, count, info.block_bytes)
                    .await?;
                if data.len() != piece.len() {
                    return Err(session.short(info.lun));
                }
                piece.copy_from_slice(&data);
                block += u64::from(count);
            }
            Ok(())
        })
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        check(offset, data.len(), self.info.bytes)?;
        self.call(async |session, info| {
            let block_bytes = info.block_bytes as usize;
            let mut block = offset / u64::from(info.block_bytes);
            for piece in data.chunks(PIECE) {
                let count = u32::try_from(piece.len() / block_bytes).unwrap_or(u32::MAX);
                session.write(info.lun, block, count, piece).await?;
                block += u64::from(count);
            }
            Ok(())
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        self.call(async |session, info| session.synchronize(info.lun).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_written_in_whole_blocks_within_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let mut one = RawFile::open(&path, true).unwrap();
        let mut other = RawFile::open(&path, true).unwrap();
        assert_eq!(one.bytes(), 1 << 20);
        // Longer than a piece.
        let data: Vec<u8> = (0..3 * PIECE + 4096).map(|at| (at % 251) as u8).collect();
        one.write(8192, &data).unwrap();
        one.sync().unwrap();
        let mut read = vec![0; data.len()];
        other.read(8192, &mut read).unwrap();
        assert_eq!(read, data);
        for (offset, length) in [
            (1, 4096),
            (0, 100),
            (1 << 20, 4096),
            (u64::MAX - 4095, 4096),
        ] {
            let error = one.read(offset, &mut vec![0; length]).unwrap_err();
            assert_eq!(
                error.kind(),
                io::ErrorKind::InvalidInput,
                "{offset} {length}"
            );
            assert!(one.write(offset, &vec![0; length]).is_err());
        }
        let error = RawFile::open_device(&path, true).unwrap_err();
        assert!(error.to_string().contains("not a block device"), "{error}");
    }
}
