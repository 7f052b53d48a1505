//! The guest's disk log: 512-byte records, one per sector, each with a checksum of itself and the
//! checksum of the record before it.
//!
//! Owns: the bytes of a record and where a record lies. Always holds: record `seq` lies in slot
//! [`slot_of`]`(seq)`; sequence numbers are contiguous over all boots; the first record of a boot
//! has kind [`Kind::Boot`]; each record names its predecessor by checksum, so a second writer
//! breaks the chain even where it overwrote whole records. Must not: open or write disks.
//!
//! ```text
//! byte   0 magic(8) | 8 kind(1) zero(7) | 16 seq(8) | 24 boot id(16) | 40 wall clock ns(8)
//!       48 uptime ns(8) | 56 checksum of the previous record(4) zero(4) | 64 VM name(64)
//!      128 filler made from seq and boot id(380) | 508 checksum of bytes 0..508(4)      little endian
//! ```

use crate::crc::crc32;
use std::{fmt, io};

/// Size of a record: one sector.
pub const RECORD_BYTES: usize = 512;
/// A record as it lies on the disk.
pub type Sector = [u8; RECORD_BYTES];

const MAGIC: [u8; 8] = *b"QRLOG\0\0\x01";
const FILLER: std::ops::Range<usize> = 128..508;
const NAME: std::ops::Range<usize> = 64..128;

/// One life of a guest: random, made at its boot. Live migration keeps it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestBoot(pub [u8; 16]);

impl fmt::Display for GuestBoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for GuestBoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for GuestBoot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a guest boot id (32 hexadecimal digits)");
        if text.len() != 32 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

impl serde::Serialize for GuestBoot {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for GuestBoot {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Slot 0: names the VM; written once.
    Header,
    /// The first record of a boot.
    Boot,
    /// Any other record.
    Data,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: Kind,
    /// Sequence number; 0 only for the header.
    pub seq: u64,
    /// The life of the guest that wrote it.
    pub boot: GuestBoot,
    /// Wall clock at the write, nanoseconds since 1970.
    pub wall_ns: u64,
    /// Time since the guest's boot, nanoseconds.
    pub uptime_ns: u64,
    /// Checksum of the record before it; 0 for the header.
    pub previous: u32,
    /// Name of the VM.
    pub name: String,
}

/// Why a sector is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// All zero: never written.
    Blank,
    /// Written, but not by this format.
    Foreign,
    /// A record whose checksum or filler is wrong: torn or overwritten.
    Damaged,
}

impl Record {
    /// The record's bytes.
    #[must_use]
    pub fn encode(&self) -> Sector {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = match self.kind {
            Kind::Header => 0,
            Kind::Boot => 1,
            Kind::Data => 2,
        };
        bytes[16..24].copy_from_slice(&self.seq.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.boot.0);
        bytes[40..48].copy_from_slice(&self.wall_ns.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.uptime_ns.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.previous.to_le_bytes());
        let name = self.name.as_bytes();
        let length = name.len().min(NAME.len());
        bytes[NAME][..length].copy_from_slice(&name[..length]);
        fill(&mut bytes[FILLER], self.seq, self.boot);
        let sum = crc32(&bytes[..508]);
        bytes[508..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads a sector.
    pub fn decode(bytes: &Sector) -> Result<Self, Flaw> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(Flaw::Blank);
        }
        if bytes[..8] != MAGIC {
            return Err(Flaw::Foreign);
        }
        if checksum(bytes) != crc32(&bytes[..508]) {
            return Err(Flaw::Damaged);
        }
        let kind = match bytes[8] {
            0 => Kind::Header,
            1 => Kind::Boot,
            2 => Kind::Data,
            _ => return Err(Flaw::Damaged),
        };
        let mut boot = [0; 16];
        boot.copy_from_slice(&bytes[24..40]);
        let (seq, boot) = (long(bytes, 16), GuestBoot(boot));
        let mut filler = [0; FILLER.end - FILLER.start];
        fill(&mut filler, seq, boot);
        if bytes[FILLER] != filler {
            return Err(Flaw::Damaged);
        }
        let name = &bytes[NAME];
        let end = name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(name.len());
        Ok(Self {
            kind,
            seq,
            boot,
            wall_ns: long(bytes, 40),
            uptime_ns: long(bytes, 48),
            previous: u32::from_le_bytes([bytes[56], bytes[57], bytes[58], bytes[59]]),
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
        })
    }
}

/// The checksum that a record carries: what its successor names it by.
#[must_use]
pub fn checksum(bytes: &Sector) -> u32 {
    u32::from_le_bytes([bytes[508], bytes[509], bytes[510], bytes[511]])
}

fn long(bytes: &Sector, at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// Filler that differs in every byte position and record, so that a mix of two records shows.
fn fill(filler: &mut [u8], seq: u64, boot: GuestBoot) {
    let mut state = u64::from(crc32(&boot.0)) << 32 | u64::from(crc32(&seq.to_le_bytes()));
    for chunk in filler.chunks_mut(8) {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// Where record `seq` lies on a disk of `slots` sectors: slot 0 is the header's, the rest a ring.
#[must_use]
pub fn slot_of(seq: u64, slots: u64) -> u64 {
    match seq.checked_sub(1) {
        None => 0,
        Some(index) => 1 + index % (slots - 1),
    }
}

/// Finds the newest record of a log by bisection (a boot must not read the whole disk): `read`
/// returns one slot. `None`: no header, so an unused disk.
pub fn find_end(
    slots: u64,
    mut read: impl FnMut(u64) -> io::Result<Sector>,
) -> io::Result<Option<(Record, u32)>> {
    let mut load = |slot: u64| -> io::Result<Option<(Record, u32)>> {
        let bytes = read(slot)?;
        Ok(Record::decode(&bytes)
            .ok()
            .filter(|record| slot_of(record.seq, slots) == slot)
            .map(|record| (record, checksum(&bytes))))
    };
    let Some(header) = load(0)? else {
        return Ok(None);
    };
    let Some(mut newest) = load(1)? else {
        // Slot 1 blank: only the header. Slot 1 torn at the turn of the ring: the last slot is newest.
        return Ok(Some(load(slots - 1)?.unwrap_or(header)));
    };
    // Slots 1..=low hold this turn of the ring; slots from high on hold the turn before, or nothing.
    let (first, mut low, mut high) = (newest.0.seq, 1, slots);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match load(middle)? {
            Some(found) if found.0.seq == first + (middle - 1) => {
                newest = found;
                low = middle;
            }
            _ => high = middle,
        }
    }
    Ok(Some(newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn record(seq: u64, boot: u8, previous: u32, kind: Kind) -> Record {
        Record {
            kind,
            seq,
            boot: GuestBoot([boot; 16]),
            wall_ns: 7,
            uptime_ns: 9,
            previous,
            name: "db".to_owned(),
        }
    }

    #[test]
    fn a_record_reads_back() {
        let wanted = record(77, 3, 0xdead_beef, Kind::Boot);
        assert_eq!(Record::decode(&wanted.encode()), Ok(wanted));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = record(5, 1, 2, Kind::Data).encode();
        for bit in 0..RECORD_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(&bad).is_err(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn the_end_is_found_at_every_fill_level() {
        let slots = 8;
        for newest in 0..30_u64 {
            let mut disk = vec![[0; RECORD_BYTES]; 8];
            for seq in 0..=newest {
                let kind = if seq == 0 { Kind::Header } else { Kind::Data };
                disk[slot_of(seq, slots) as usize] = record(seq, 1, 0, kind).encode();
            }
            let found = find_end(slots, |slot| Ok(disk[slot as usize])).unwrap();
            assert_eq!(found.map(|(record, _)| record.seq), Some(newest));
        }
    }

    #[test]
    fn an_unused_disk_has_no_end() {
        assert!(find_end(8, |_| Ok([0; RECORD_BYTES])).unwrap().is_none());
    }

    #[test]
    fn boot_ids_read_back() {
        let boot = GuestBoot([0xa5; 16]);
        assert_eq!(boot.to_string().parse(), Ok(boot));
        assert!("12".parse::<GuestBoot>().is_err());
    }
}
