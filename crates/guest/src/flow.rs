//! Records of the connections that a client of a service holds: numbered, checksummed, and answered with the name
//! of who answers.
//!
//! Always holds: an answer is the record as it was sent plus [`Record::who`], so a client sees at once when bytes were
//! lost, changed or doubled, and when somebody else goes on with its connection.
//!
//! ```text
//! magic 4 | connection 4 | number 8 | who 8 | zero 4 | CRC-32 4      little-endian, 32 bytes
//! ```

use crate::crc::crc32;

/// Length of a record.
pub const RECORD: usize = 32;
const MAGIC: u32 = 0x4c46_5251; // "QRFL"

/// One question or answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Which connection.
    pub connection: u32,
    /// Counts from 1.
    pub number: u64,
    /// 0 in a question; in an answer see [`identity`].
    pub who: u64,
}

impl Record {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.connection.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.who.to_le_bytes());
        let sum = crc32(&bytes[..28]);
        bytes[28..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads a record; `None` when it is damaged.
    #[must_use]
    pub fn decode(bytes: &[u8; RECORD]) -> Option<Self> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let (head, sum) = (word(0), word(24) >> 32);
        let good = head & 0xffff_ffff == u64::from(MAGIC) && sum == u64::from(crc32(&bytes[..28]));
        good.then(|| Self {
            connection: u32::try_from(head >> 32).unwrap_or(u32::MAX),
            number: word(8),
            who: word(16),
        })
    }
}

/// The number by which a VM names itself in answers: the VM's name and the boot's, so that a guest that was started
/// anew is somebody else. Never 0.
#[must_use]
pub fn identity(name: &str, boot: u64) -> u64 {
    // FNV-1a.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes().chain(boot.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was_and_a_damaged_one_does_not() {
        let record = Record {
            connection: 7,
            number: 1 << 40,
            who: identity("web-1", 3),
        };
        let bytes = record.encode();
        assert_eq!(Record::decode(&bytes), Some(record));
        for at in 0..RECORD {
            let mut bad = bytes;
            bad[at] ^= 1;
            assert_eq!(Record::decode(&bad), None, "byte {at}");
        }
    }

    #[test]
    fn another_name_or_boot_is_somebody_else() {
        assert_ne!(identity("a", 1), identity("b", 1));
        assert_ne!(identity("a", 1), identity("a", 2));
        assert_ne!(identity("", 0), 0);
    }
}
