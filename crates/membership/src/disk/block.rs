//! One block on the shared disk: who holds the lease, and its pulse.
//!
//! Always holds: a block whose bytes do not match its checksum is no block (a torn write); of two blocks the one with
//! the higher `(generation, counter)` counts.

/// Bytes of a block: the smallest piece that disks write at once.
pub const BLOCK_BYTES: usize = 512;
const MAGIC: &[u8; 8] = b"QRLEASE1";
const NAME_BYTES: usize = 64;

/// One block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Grows with every holder.
    pub generation: u64,
    /// Grows with every renewal.
    pub counter: u64,
    /// Tells claims of one host apart: random, one for each run of the host's program.
    pub nonce: u64,
    /// Held, or given back.
    pub held: bool,
    /// Who, for people.
    pub holder: String,
}

impl Block {
    /// What orders blocks, and what changes with each renewal.
    #[must_use]
    pub fn key(&self) -> (u64, u64) {
        (self.generation, self.counter)
    }

    /// Which of the two places it is written to: successive blocks alternate, so that a torn write never takes
    /// the block before it along.
    #[must_use]
    pub fn place(&self) -> usize {
        usize::from(!self.generation.wrapping_add(self.counter).is_multiple_of(2))
    }

    /// The bytes on the disk.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        let mut name = self.holder.as_bytes();
        name = &name[..name.len().min(NAME_BYTES)];
        let parts: [&[u8]; 6] = [
            MAGIC,
            &self.generation.to_be_bytes(),
            &self.counter.to_be_bytes(),
            &self.nonce.to_be_bytes(),
            &[u8::from(self.held), name.len() as u8],
            name,
        ];
        let mut at = 0;
        for part in parts {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let sum = checksum(&bytes[..BLOCK_BYTES - 8]);
        bytes[BLOCK_BYTES - 8..].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Reads a block; `None`: none, or a torn one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.get(..BLOCK_BYTES)?.split_at(BLOCK_BYTES - 8);
        if checksum(body).to_be_bytes() != sum || &body[..8] != MAGIC {
            return None;
        }
        let number = |at: usize| {
            let bytes = body[at..at + 8].try_into();
            bytes.map(u64::from_be_bytes).unwrap_or_default()
        };
        let name = body.get(34..34 + usize::from(body[33]))?;
        Some(Self {
            generation: number(8),
            counter: number(16),
            nonce: number(24),
            held: body[32] == 1,
            holder: String::from_utf8_lossy(name).into_owned(),
        })
    }

    /// The block that counts, of both places.
    #[must_use]
    pub fn newest(places: [Option<Self>; 2]) -> Option<Self> {
        places.into_iter().flatten().max_by_key(Self::key)
    }
}

/// FNV-1a with 64 bits: finds torn writes and flipped bits; nobody forges blocks here.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_read_back_and_a_torn_one_is_none() {
        let block = Block {
            generation: 7,
            counter: 300,
            nonce: u64::MAX,
            held: true,
            holder: "h1".into(),
        };
        let bytes = block.encode();
        assert_eq!(Block::decode(&bytes).as_ref(), Some(&block));
        let older = Block {
            counter: 298,
            ..block.clone()
        }
        .encode();
        for cut in [1, 20, 24, 100, 505, 511] {
            let mut torn = bytes;
            torn[cut..].copy_from_slice(&older[cut..]);
            let read = Block::decode(&torn);
            assert!(
                read.is_none() || torn == bytes || torn == older,
                "{cut}: {read:?}"
            );
        }
        assert_eq!(Block::decode(&[0; BLOCK_BYTES]), None);
        assert_eq!(Block::decode(&bytes[..100]), None);
        let next = Block {
            counter: 301,
            ..block.clone()
        };
        assert_ne!(next.place(), block.place());
        assert_eq!(Block::newest([Some(block), Some(next.clone())]), Some(next));
    }
}
