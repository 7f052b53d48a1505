//! A witness on a raw disk: a LUN or a block device of its own, the first 512 MiB of it.
//!
//! ```text
//! 0         title, for people and for `quorum set`        a slot:  0        records: header, length, snapshot
//! 64 KiB    the two blocks of the lease                            1 MiB    log, 30 MiB
//! 1 MiB     slot 0: 63 MiB                                         31 MiB   snapshot, one half
//! 64 MiB    slot 1 ... 7                                           47 MiB   snapshot, the other half
//! ```
//!
//! Always holds: **each host writes in its own slot only** (which is whose is replicated state), beside the lease and the title.
//! So a write of another host that comes late, however late, lands where nobody reads any more: a new holder copies the newest
//! complete slot into its own. A late write of this very host is over before it writes again: an iSCSI target ends the host's
//! earlier session, and what was asked in it, at the login of the next ([`RawUnit`]); a block device is opened by one
//! process alone, and a process, or a call, that hangs in the kernel keeps it. A slot being made says so in its header; the newest
//! generation whose header says "complete" counts, and a header of ours that is damaged means that the log is lost.
//! Must not: decide who holds the lease.

use super::area::{AreaError, LeasePlace, at};
use super::media::{
    Disk, Found, Halves, Head, Length, OnlyWriter, PIECE, RawLog, RawSnapshot, Shared, Twin,
};
use quorate_consensus::{Media, NodeId, Tenure};
use quorate_membership::{Block, checksum};
use quorate_storage::iscsi::session::Peer;
use quorate_storage::{RAW_BLOCK, RawFile, RawUnit};
use quorate_types::Lun;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const MIB: u64 = 1 << 20;
/// What a witness needs of the disk.
pub(crate) const AREA_BYTES: u64 = 512 * MIB;
const LEASE_AT: u64 = 64 << 10;
const SLOTS_AT: u64 = MIB;
const SLOT_BYTES: u64 = 63 * MIB;
const SLOTS: u8 = quorate_state::WITNESS_SLOTS;
/// Within a slot.
const HEADER_AT: u64 = 0;
const LENGTH_AT: u64 = 128 << 10;
const HEAD_AT: u64 = 256 << 10;
const LOG_AT: u64 = MIB;
const LOG_BYTES: u64 = 30 * MIB;
const HALF_AT: u64 = 31 * MIB;
const HALF_BYTES: u64 = 16 * MIB;
/// What is looked at before a disk is taken.
const LOOKED_AT: usize = MIB as usize;
const TITLE: &str = "quorate disk witness 1";

/// Which sessions of this host end each other.
const LEASE_SESSION: u8 = 1;
const LOG_SESSION: u8 = 2;

/// A disk, and how to open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A block device of this host.
    Device(PathBuf),
    /// A unit of an iSCSI target.
    Unit { peers: Peers, unit: Lun },
    /// A file, in tests.
    #[cfg(test)]
    File(PathBuf),
}

/// The ways to a target.
#[derive(Debug, Clone)]
pub(crate) struct Peers(pub(crate) Vec<Peer>);

impl PartialEq for Peers {
    fn eq(&self, other: &Self) -> bool {
        let key = |peers: &Self| -> Vec<_> {
            let login = |peer: &Peer| {
                let login = peer.login.as_ref();
                login.map(|login| (login.user.clone(), login.password.clone()))
            };
            let peers = peers.0.iter();
            peers
                .map(|peer| (peer.portal.clone(), peer.initiator.clone(), login(peer)))
                .collect()
        };
        key(self) == key(other)
    }
}

impl Eq for Peers {}

impl Source {
    fn name(&self) -> PathBuf {
        match self {
            Self::Device(path) => path.clone(),
            Self::Unit { unit, .. } => unit.to_string().into(),
            #[cfg(test)]
            Self::File(path) => path.clone(),
        }
    }

    fn open(&self, session: u8) -> Result<Disk, AreaError> {
        let alone = session == LOG_SESSION;
        let disk: Disk = match self {
            Self::Device(path) => Box::new(at(path, RawFile::open_device(path, alone))?),
            Self::Unit { peers, unit } => Box::new(RawUnit::open(&peers.0, unit, session)?),
            #[cfg(test)]
            Self::File(path) => Box::new(at(path, RawFile::open(path, alone))?),
        };
        if disk.bytes() < AREA_BYTES {
            return Err(AreaError::TooSmall {
                path: self.name(),
                have_bytes: disk.bytes(),
            });
        }
        Ok(disk)
    }
}

/// Whose a slot's content is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Header {
    generation: u64,
    complete: bool,
}

/// What is on a disk that a witness is to be put on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zeroes, where something would be.
    Nothing,
    /// A witness, perhaps an earlier one of this cluster.
    Witness { ours: bool },
    /// Something else.
    Other,
}

/// Looks at a disk; writes nothing.
pub(crate) fn look(disk: &mut Disk, cluster: &str) -> std::io::Result<Content> {
    let bytes = usize::try_from(disk.bytes()).unwrap_or(LOOKED_AT);
    let mut start = vec![0; LOOKED_AT.min(bytes - bytes % RAW_BLOCK as usize)];
    disk.read(0, &mut start)?;
    let text = String::from_utf8_lossy(start.get(..512).unwrap_or_default());
    if text.starts_with(TITLE) {
        let ours = text.contains(&format!("cluster {cluster}\n"));
        return Ok(Content::Witness { ours });
    }
    Ok(match start.iter().all(|byte| *byte == 0) {
        true => Content::Nothing,
        false => Content::Other,
    })
}

/// Where a witness is on a raw disk, for one host.
#[derive(Debug, Clone)]
pub(crate) struct RawArea {
    source: Source,
    cluster: String,
    node: NodeId,
    slot: u8,
    taken: Arc<AtomicBool>,
}

/// The blocks of the lease on a raw disk.
#[derive(Debug)]
pub(crate) struct RawLease {
    disk: Disk,
    name: PathBuf,
}

impl RawArea {
    /// `slot`: this host's. `taken`: one for all areas of this process.
    pub(crate) fn new(
        source: Source,
        cluster: &str,
        node: NodeId,
        slot: u8,
        taken: Arc<AtomicBool>,
    ) -> Self {
        let cluster = cluster.to_owned();
        Self {
            source,
            cluster,
            node,
            slot: slot.min(SLOTS - 1),
            taken,
        }
    }

    /// What messages call it.
    pub(crate) fn name(&self) -> PathBuf {
        self.source.name()
    }

    pub(crate) fn open_lease(&self) -> Result<RawLease, AreaError> {
        Ok(RawLease {
            disk: self.source.open(LEASE_SESSION)?,
            name: self.name(),
        })
    }

    /// Tells records of this witness from all others.
    fn key(&self) -> u64 {
        checksum(format!("{} {}", self.cluster, self.node).as_bytes())
    }

    fn twin(&self, slot: u8, at: u64) -> Twin {
        Twin {
            at: slot_at(slot) + at,
            key: self.key(),
        }
    }

    fn halves(&self, slot: u8) -> Halves {
        Halves {
            head: self.twin(slot, HEAD_AT),
            at: slot_at(slot) + HALF_AT,
            most: HALF_BYTES,
        }
    }

    /// The newest complete generation, and its slot.
    fn newest(&self, disk: &mut Disk) -> Result<Option<(u64, u8)>, AreaError> {
        let mut newest = None;
        for slot in 0..SLOTS {
            let found = self.twin(slot, HEADER_AT).read::<Header>(disk);
            match at(&self.name(), found)? {
                Found::Record(_, header) if header.complete => {
                    newest = newest.max(Some((header.generation, slot)));
                }
                Found::Record(..) | Found::Nothing => {}
                Found::Damaged => return Err(self.damaged("the header of a slot")),
            }
        }
        Ok(newest)
    }

    fn damaged(&self, what: &'static str) -> AreaError {
        AreaError::Damaged {
            path: self.name(),
            what,
        }
    }

    /// Has no holder ever kept a log here? Over a session of its own, which this host's writer does not mind.
    pub(crate) fn is_fresh(&self) -> Result<bool, AreaError> {
        let mut disk = self.writer()?.0;
        Ok(self.newest(&mut disk)?.is_none())
    }

    /// The disk for this host's only writer.
    fn writer(&self) -> Result<(Disk, OnlyWriter), AreaError> {
        let only = OnlyWriter::begin(&self.taken);
        let only = only.ok_or_else(|| AreaError::Busy(self.name()))?;
        Ok((self.source.open(LOG_SESSION)?, only))
    }

    /// Makes this host's slot that of a generation, from the newest one before it.
    pub(crate) fn prepare(&self, generation: u64, tenure: &Tenure) -> Result<Media, AreaError> {
        let name = self.name();
        let (mut disk, only) = self.writer()?;
        let newest = self.newest(&mut disk)?;
        if newest.is_some_and(|(newest, _)| newest > generation) {
            // Somebody came after this holder, or the lease was lost and counts from one again.
            return Err(match tenure.holds() {
                true => AreaError::Lost(name),
                false => AreaError::Over,
            });
        }
        let check = || match tenure.holds() {
            true => Ok(()),
            false => Err(AreaError::Over),
        };
        let header = self.twin(self.slot, HEADER_AT);
        check()?;
        if newest.is_none_or(|(_, slot)| slot != self.slot) {
            let making = Header {
                generation,
                complete: false,
            };
            at(&name, header.write_twice(&mut disk, &making))?;
            self.fill(&mut disk, newest.map(|(_, slot)| slot), tenure)?;
        } else {
            // What this host wrote last: it is the newest, and nothing of it is under way any more.
            self.stored(&mut disk, self.slot)?;
        }
        check()?;
        let title = self.title();
        at(&name, disk.write(0, &title).and_then(|()| disk.sync()))?;
        let complete = Header {
            generation,
            complete: true,
        };
        check()?;
        at(&name, header.write_twice(&mut disk, &complete))?;
        check()?;
        let shared = Shared::new(disk, only, tenure.clone());
        let log = RawLog::open(
            shared.clone(),
            self.twin(self.slot, LENGTH_AT),
            slot_at(self.slot) + LOG_AT,
            LOG_BYTES,
        );
        Ok(Media {
            log: Box::new(at(&name, log)?),
            snapshot: Box::new(RawSnapshot {
                shared,
                halves: self.halves(self.slot),
            }),
        })
    }

    /// How long the log in a slot is; an empty one is a lost one.
    fn stored(&self, disk: &mut Disk, slot: u8) -> Result<u64, AreaError> {
        let length = self.twin(slot, LENGTH_AT).read::<Length>(disk);
        match at(&self.name(), length)? {
            Found::Record(_, length) if (1..=LOG_BYTES).contains(&length.bytes) => Ok(length.bytes),
            Found::Record(_, Length { bytes: 0 }) | Found::Nothing => {
                Err(AreaError::Lost(self.name()))
            }
            Found::Record(..) | Found::Damaged => Err(self.damaged("the length of the log")),
        }
    }

    /// Fills this host's slot with what another has, or with an empty log.
    fn fill(&self, disk: &mut Disk, from: Option<u8>, tenure: &Tenure) -> Result<(), AreaError> {
        let name = self.name();
        let (length, snapshot) = match from {
            None => (0, None),
            Some(from) => {
                let length = self.stored(disk, from)?;
                let (source, target) = (slot_at(from) + LOG_AT, slot_at(self.slot) + LOG_AT);
                let whole = length.next_multiple_of(RAW_BLOCK);
                let mut buffer = vec![0; PIECE];
                let mut done = 0;
                while done < whole {
                    if !tenure.holds() {
                        return Err(AreaError::Over);
                    }
                    let bytes = usize::try_from(whole - done).unwrap_or(PIECE).min(PIECE);
                    let piece = &mut buffer[..bytes];
                    at(&name, disk.read(source + done, piece))?;
                    at(&name, disk.write(target + done, piece))?;
                    done += bytes as u64;
                }
                match self.halves(from).load(disk) {
                    Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                        return Err(self.damaged("the snapshot"));
                    }
                    snapshot => (length, at(&name, snapshot)?),
                }
            }
        };
        at(&name, disk.sync())?;
        let bytes = Length { bytes: length };
        at(
            &name,
            self.twin(self.slot, LENGTH_AT).write_twice(disk, &bytes),
        )?;
        let halves = self.halves(self.slot);
        match snapshot {
            Some(snapshot) => at(&name, halves.replace(disk, &snapshot)),
            None => {
                let none = Head {
                    half: 0,
                    bytes: 0,
                    sum: 0,
                };
                at(&name, halves.head.write_twice(disk, &none))
            }
        }
    }

    fn title(&self) -> Vec<u8> {
        let text = format!(
            "{TITLE}\ncluster {}\nnode {}\nNothing else may use this disk.\n",
            self.cluster, self.node
        );
        let mut block = text.into_bytes();
        block.resize(RAW_BLOCK as usize, 0);
        block
    }
}

fn slot_at(slot: u8) -> u64 {
    SLOTS_AT + u64::from(slot) * SLOT_BYTES
}

impl LeasePlace for RawLease {
    fn read(&mut self) -> Result<[Option<Block>; 2], AreaError> {
        let mut both = vec![0; 2 * RAW_BLOCK as usize];
        at(&self.name, self.disk.read(LEASE_AT, &mut both))?;
        let (first, second) = both.split_at(RAW_BLOCK as usize);
        Ok([Block::decode(first), Block::decode(second)])
    }

    fn write(&mut self, block: &Block) -> Result<(), AreaError> {
        let mut bytes = block.encode().to_vec();
        bytes.resize(RAW_BLOCK as usize, 0);
        let place = LEASE_AT + block.place() as u64 * RAW_BLOCK;
        let written = self.disk.write(place, &bytes);
        at(&self.name, written.and_then(|()| self.disk.sync()))
    }

    fn is_there(&self) -> Result<bool, AreaError> {
        Ok(true)
    }
}

/// A unit of this host's pool, opened for a look before a witness is put on it.
pub(crate) fn open_for_look(source: &Path) -> std::io::Result<Disk> {
    Ok(Box::new(RawFile::open_device(source, true)?))
}

#[cfg(test)]
#[path = "raw_tests.rs"]
pub(crate) mod tests;
