//! Judges a guest's disk image: is every acknowledged record there, and did one guest at a time
//! write it?
//!
//! Owns: the rules. Always holds: an image with no [`Finding`] holds an unbroken chain of records,
//! written by one boot after the other. Must not: repair anything.

use crate::log::{Flaw, GuestBoot, Kind, RECORD_BYTES, Record, Sector, checksum, slot_of};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};

/// Records that one boot of a guest reported as safely written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AckRange {
    /// The boot that wrote them.
    pub boot: GuestBoot,
    /// First sequence number.
    pub first: u64,
    /// Last sequence number, inclusive.
    pub last: u64,
}

/// Something wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub enum Finding {
    /// No valid header in slot 0.
    NoHeader,
    /// A sector that is no intact record.
    Damaged {
        /// Where.
        slot: u64,
    },
    /// An intact record that does not belong there.
    Misplaced {
        /// Where it lies.
        slot: u64,
        /// What it is.
        seq: u64,
    },
    /// Records that must exist do not.
    Missing {
        /// First one missing.
        first: u64,
        /// Last one missing.
        last: u64,
    },
    /// The record names another predecessor than the one that is there: two writers.
    BrokenChain {
        /// The record.
        seq: u64,
    },
    /// A boot wrote after another boot had taken over: two writers.
    TwoWriters {
        /// The record.
        seq: u64,
        /// The boot that came back.
        boot: GuestBoot,
    },
    /// A record of another VM: two VMs share the disk.
    OtherVm {
        /// The record.
        seq: u64,
        /// The other VM.
        name: String,
    },
    /// A record was acknowledged and is not there.
    AcknowledgedLost {
        /// The record.
        seq: u64,
        /// The boot that acknowledged it.
        boot: GuestBoot,
        /// The boot whose record is there instead.
        found: Option<GuestBoot>,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader => f.write_str("no valid header in slot 0"),
            Self::Damaged { slot } => write!(f, "slot {slot} is damaged"),
            Self::Misplaced { slot, seq } => write!(f, "slot {slot} holds record {seq}"),
            Self::Missing { first, last } => write!(f, "records {first} to {last} are missing"),
            Self::BrokenChain { seq } => {
                write!(
                    f,
                    "record {seq} does not follow the record before it: two writers"
                )
            }
            Self::TwoWriters { seq, boot } => {
                write!(
                    f,
                    "record {seq} is of boot {boot}, after another boot took over: two writers"
                )
            }
            Self::OtherVm { seq, name } => write!(f, "record {seq} was written by VM `{name}`"),
            Self::AcknowledgedLost { seq, boot, found } => {
                write!(f, "record {seq} was acknowledged by boot {boot} but ")?;
                match found {
                    Some(other) => write!(f, "boot {other} wrote over it"),
                    None => f.write_str("is not there"),
                }
            }
        }
    }
}

/// What an image holds.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Name in the header.
    pub name: String,
    /// Oldest record still there.
    pub first: u64,
    /// Newest record.
    pub last: u64,
    /// The boots that wrote, in order, with their records.
    pub boots: Vec<AckRange>,
    /// Acknowledged records that were compared.
    pub acknowledged: u64,
    /// What is wrong, at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
}

/// Findings kept; a destroyed image would have one per sector.
pub const MAX_FINDINGS: usize = 100;

impl Verdict {
    /// Nothing is wrong.
    #[must_use]
    pub fn good(&self) -> bool {
        self.findings.is_empty()
    }
}

struct Entry {
    boot: GuestBoot,
    previous: u32,
    sum: u32,
    kind: Kind,
}

/// Reads a whole raw image and judges it against what was acknowledged.
pub fn verify(image: impl Read, acknowledged: &[AckRange]) -> io::Result<Verdict> {
    let sectors = read_sectors(image)?;
    let slots = sectors.len() as u64;
    let mut findings = Vec::new();
    let mut entries = BTreeMap::new();
    let mut name = None;
    for (slot, bytes) in (0_u64..).zip(&sectors) {
        match Record::decode(bytes) {
            Ok(record) if slot_of(record.seq, slots) != slot => {
                findings.push(Finding::Misplaced {
                    slot,
                    seq: record.seq,
                });
            }
            Ok(record) => {
                if *name.get_or_insert_with(|| record.name.clone()) != record.name {
                    findings.push(Finding::OtherVm {
                        seq: record.seq,
                        name: record.name,
                    });
                }
                entries.insert(
                    record.seq,
                    Entry {
                        boot: record.boot,
                        previous: record.previous,
                        sum: checksum(bytes),
                        kind: record.kind,
                    },
                );
            }
            Err(Flaw::Blank) => {}
            Err(Flaw::Foreign | Flaw::Damaged) => findings.push(Finding::Damaged { slot }),
        }
    }
    if entries
        .get(&0)
        .is_none_or(|entry| entry.kind != Kind::Header)
    {
        findings.push(Finding::NoHeader);
    }
    let last = entries.last_key_value().map_or(0, |(seq, _)| *seq);
    let first = last.saturating_sub(slots.saturating_sub(2)).max(1);
    let boots = check_chain(&entries, first, last, &mut findings);
    let count = check_acknowledged(&entries, first, acknowledged, &mut findings);
    findings.truncate(MAX_FINDINGS);
    Ok(Verdict {
        name: name.unwrap_or_default(),
        first,
        last,
        boots,
        acknowledged: count,
        findings,
    })
}

fn read_sectors(mut image: impl Read) -> io::Result<Vec<Sector>> {
    let mut bytes = Vec::new();
    image.read_to_end(&mut bytes)?;
    let (sectors, rest) = bytes.as_chunks::<RECORD_BYTES>();
    if sectors.len() < 2 || !rest.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a raw guest log: its size is not a multiple of 512 bytes, or is too small",
        ));
    }
    Ok(sectors.to_vec())
}

fn check_chain(
    entries: &BTreeMap<u64, Entry>,
    first: u64,
    last: u64,
    findings: &mut Vec<Finding>,
) -> Vec<AckRange> {
    let mut boots: Vec<AckRange> = Vec::new();
    let mut expected = first;
    for (seq, entry) in entries.range(first..) {
        if *seq > expected {
            findings.push(Finding::Missing {
                first: expected,
                last: seq - 1,
            });
        }
        expected = seq + 1;
        // The predecessor of the oldest record in a ring is gone.
        if let Some(before) = entries.get(&(seq - 1))
            && (*seq != first || first == 1)
            && before.sum != entry.previous
        {
            findings.push(Finding::BrokenChain { seq: *seq });
        }
        match boots.last_mut() {
            Some(run) if run.boot == entry.boot => run.last = *seq,
            _ => {
                let came_back = boots.iter().any(|run| run.boot == entry.boot);
                let cut_in = entry.kind != Kind::Boot && *seq != first;
                if came_back || cut_in {
                    findings.push(Finding::TwoWriters {
                        seq: *seq,
                        boot: entry.boot,
                    });
                }
                boots.push(AckRange {
                    boot: entry.boot,
                    first: *seq,
                    last: *seq,
                });
            }
        }
    }
    debug_assert!(entries.is_empty() || last == 0 || expected == last + 1);
    boots
}

fn check_acknowledged(
    entries: &BTreeMap<u64, Entry>,
    oldest: u64,
    acknowledged: &[AckRange],
    findings: &mut Vec<Finding>,
) -> u64 {
    let mut count = 0;
    for range in acknowledged {
        for seq in range.first.max(oldest)..=range.last {
            count += 1;
            let found = entries.get(&seq).map(|entry| entry.boot);
            if found != Some(range.boot) && findings.len() < MAX_FINDINGS {
                findings.push(Finding::AcknowledgedLost {
                    seq,
                    boot: range.boot,
                    found,
                });
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log written by the given boots, each with its number of records.
    fn image(slots: usize, boots: &[(u8, u64)]) -> Vec<Sector> {
        let mut disk = vec![[0; RECORD_BYTES]; slots];
        let mut put = |seq: u64, boot: u8, previous: u32, kind: Kind| {
            let record = Record {
                kind,
                seq,
                boot: GuestBoot([boot; 16]),
                wall_ns: 0,
                uptime_ns: 0,
                previous,
                name: "db".to_owned(),
            };
            let bytes = record.encode();
            disk[slot_of(seq, slots as u64) as usize] = bytes;
            checksum(&bytes)
        };
        let mut sum = put(0, boots[0].0, 0, Kind::Header);
        let mut seq = 0;
        for (boot, records) in boots {
            for number in 0..*records {
                seq += 1;
                let kind = if number == 0 { Kind::Boot } else { Kind::Data };
                sum = put(seq, *boot, sum, kind);
            }
        }
        disk
    }

    fn judge(disk: &[Sector], acknowledged: &[AckRange]) -> Verdict {
        verify(disk.as_flattened(), acknowledged).unwrap()
    }

    fn range(boot: u8, first: u64, last: u64) -> AckRange {
        AckRange {
            boot: GuestBoot([boot; 16]),
            first,
            last,
        }
    }

    #[test]
    fn a_good_log_is_good() {
        let verdict = judge(
            &image(64, &[(1, 10), (2, 20)]),
            &[range(1, 1, 10), range(2, 11, 30)],
        );
        assert!(verdict.good(), "{:?}", verdict.findings);
        assert_eq!(verdict.acknowledged, 30);
        assert_eq!(verdict.boots, [range(1, 1, 10), range(2, 11, 30)]);
    }

    #[test]
    fn a_log_that_went_round_is_good() {
        let verdict = judge(
            &image(16, &[(1, 20), (2, 21)]),
            &[range(1, 1, 20), range(2, 21, 41)],
        );
        assert!(verdict.good(), "{:?}", verdict.findings);
        assert_eq!((verdict.first, verdict.last), (27, 41));
        assert_eq!(verdict.acknowledged, 15);
    }

    #[test]
    fn a_lost_acknowledged_record_is_found() {
        let verdict = judge(&image(64, &[(1, 10)]), &[range(1, 1, 11)]);
        assert_eq!(
            verdict.findings,
            [Finding::AcknowledgedLost {
                seq: 11,
                boot: GuestBoot([1; 16]),
                found: None
            }]
        );
    }

    #[test]
    fn a_hole_and_a_torn_record_are_found() {
        let mut disk = image(64, &[(1, 10)]);
        disk[4] = [0; RECORD_BYTES];
        disk[7][100] ^= 1;
        let findings = judge(&disk, &[]).findings;
        assert!(findings.contains(&Finding::Missing { first: 4, last: 4 }));
        assert!(findings.contains(&Finding::Damaged { slot: 7 }));
    }

    #[test]
    fn a_frozen_copy_that_writes_once_more_is_found() {
        let mut disk = image(64, &[(1, 10), (2, 10)]);
        // Boot 1 wakes up behind the back of boot 2 and writes its own record 11.
        disk[11] = image(64, &[(1, 11)])[11];
        let findings = judge(&disk, &[]).findings;
        assert!(
            findings.contains(&Finding::BrokenChain { seq: 12 }),
            "{findings:?}"
        );
        // And with an intact chain up to it, the boots still alternate.
        let mut disk = image(64, &[(1, 10), (2, 10)]);
        disk[15] = image(64, &[(1, 15)])[15];
        let findings = judge(&disk, &[]).findings;
        assert!(
            findings.contains(&Finding::TwoWriters {
                seq: 15,
                boot: GuestBoot([1; 16])
            }),
            "{findings:?}"
        );
    }

    #[test]
    fn two_vms_on_one_disk_are_found() {
        let mut disk = image(64, &[(1, 10)]);
        let mut record = Record::decode(&disk[3]).unwrap();
        record.name = "web".to_owned();
        disk[3] = record.encode();
        let findings = judge(&disk, &[]).findings;
        assert!(findings.contains(&Finding::OtherVm {
            seq: 3,
            name: "web".to_owned()
        }));
    }
}
