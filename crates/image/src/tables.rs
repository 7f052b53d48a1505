//! What is on a disk, by its first bytes: partition tables and file systems. Pure.

/// Bytes from the beginning of a disk that are looked at.
pub(crate) const LOOK_AT: usize = 128 << 10;

/// What a disk holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes where there would be something.
    Blank,
    /// Something that has a name.
    Known(&'static str),
    /// Data without a mark.
    Unknown,
}

fn at(bytes: &[u8], offset: usize, mark: &[u8]) -> bool {
    bytes.get(offset..offset + mark.len()) == Some(mark)
}

/// What the first [`LOOK_AT`] bytes of a disk suggest.
#[must_use]
pub fn content(bytes: &[u8]) -> Content {
    const MARKS: &[(usize, &[u8], &str)] = &[
        (512, b"EFI PART", "a GPT partition table"),
        (4096, b"EFI PART", "a GPT partition table"),
        (0x438, &[0x53, 0xef], "an ext file system"),
        (0, b"XFSB", "an XFS file system"),
        (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
        (512, b"LABELONE", "an LVM volume"),
        (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
        (4086, b"SWAPSPACE2", "swap space"),
        (3, b"NTFS    ", "an NTFS file system"),
        (0x52, b"FAT32", "a FAT file system"),
        (0x36, b"FAT1", "a FAT file system"),
        (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of a RAID"),
        (0x1_0000, &[0x01, 0x16, 0x19, 0x70], "a GFS2 file system"),
        (0x8001, b"CD001", "a CD image"),
    ];
    let known = MARKS
        .iter()
        .find(|(offset, mark, _)| at(bytes, *offset, mark));
    if let Some((_, _, what)) = known {
        return Content::Known(what);
    }
    if !partitions(bytes).is_empty() {
        return Content::Known("a partition table");
    }
    match bytes.iter().all(|byte| *byte == 0) {
        true => Content::Blank,
        false => Content::Unknown,
    }
}

/// First sector and length of the entries of an MBR.
fn partitions(bytes: &[u8]) -> Vec<(u8, u64, u64)> {
    if !at(bytes, 510, &[0x55, 0xaa]) {
        return Vec::new();
    }
    let entry = |index: usize| {
        let entry = bytes.get(446 + 16 * index..462 + 16 * index)?;
        let le32 = |at: usize| {
            let four = entry.get(at..at + 4)?;
            Some(u64::from(u32::from_le_bytes(four.try_into().ok()?)))
        };
        let (kind, first, length) = (entry[4], le32(8)?, le32(12)?);
        let active = entry[0] & 0x7f == 0;
        (kind != 0 && length > 0 && active).then_some((kind, first, length))
    };
    (0..4).filter_map(entry).collect()
}

/// How many bytes a disk must have for its partition table to make sense, if it has fewer: it was cut off, or
/// somebody lies about its size.
#[must_use]
pub fn ends_beyond(bytes: &[u8], size: u64) -> Option<u64> {
    const SECTOR: u64 = 512;
    const PROTECTIVE: u8 = 0xee;
    let mut need = 0;
    for sector in [512, 4096] {
        if at(bytes, sector, b"EFI PART") {
            let le64 = |offset: usize| {
                let eight = bytes.get(sector + offset..sector + offset + 8);
                eight.map_or(0, |eight| {
                    u64::from_le_bytes(eight.try_into().unwrap_or_default())
                })
            };
            // The backup header is in the last sector.
            need = le64(32).saturating_add(1).saturating_mul(sector as u64);
        }
    }
    if need == 0 {
        let real = partitions(bytes)
            .into_iter()
            .filter(|(kind, _, _)| *kind != PROTECTIVE);
        let ends = real.map(|(_, first, length)| (first + length).saturating_mul(SECTOR));
        need = ends.max().unwrap_or(0);
    }
    (need > size).then_some(need)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Vec<u8> {
        vec![0; LOOK_AT]
    }

    fn put(bytes: &mut [u8], offset: usize, mark: &[u8]) {
        bytes[offset..offset + mark.len()].copy_from_slice(mark);
    }

    #[test]
    fn content_is_recognised() {
        assert_eq!(content(&disk()), Content::Blank);
        let mut ext = disk();
        put(&mut ext, 0x438, &[0x53, 0xef]);
        assert_eq!(content(&ext), Content::Known("an ext file system"));
        let mut some = disk();
        some[70_000] = 1;
        assert_eq!(content(&some), Content::Unknown);
        assert_eq!(content(&[]), Content::Blank);
    }

    #[test]
    fn a_table_that_ends_beyond_the_disk_is_told() {
        let mut mbr = disk();
        put(&mut mbr, 510, &[0x55, 0xaa]);
        put(
            &mut mbr,
            446,
            &[0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0],
        );
        assert_eq!(content(&mbr), Content::Known("a partition table"));
        let need = (2048 + 65_536) * 512;
        assert_eq!(ends_beyond(&mbr, need), None);
        assert_eq!(ends_beyond(&mbr, need - 1), Some(need));
        let mut gpt = mbr;
        put(&mut gpt, 512, b"EFI PART");
        put(&mut gpt, 512 + 32, &999u64.to_le_bytes());
        assert_eq!(ends_beyond(&gpt, 512_000), None);
        assert_eq!(ends_beyond(&gpt, 511_999), Some(512_000));
        assert_eq!(ends_beyond(&disk(), 0), None);
    }
}
