//! A raw disk is a file here; what a SAN does is tried in `crates/image/tests/san.rs` and in the lab.

use super::super::media::tests_support::scribble;
use super::*;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

const NODE: NodeId = 5;

/// The area of the host with this slot on the disk in this directory.
pub(crate) fn disk(dir: &Path, slot: u8) -> RawArea {
    let path = dir.join("unit");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap();
    file.set_len(AREA_BYTES).unwrap();
    RawArea::new(Source::File(path), "c1", NODE, slot, Arc::default())
}

fn held() -> Tenure {
    Tenure::until(u64::MAX)
}

/// Writes a log of one block and a snapshot.
fn keep(media: &Media, text: &[u8]) {
    let mut block = text.to_vec();
    block.resize(5000, b'.');
    media.log.set_len(5000).unwrap();
    media.log.write(0, &block).unwrap();
    media.log.sync().unwrap();
    media.snapshot.replace(text).unwrap();
}

fn kept(media: &Media) -> (Vec<u8>, Option<Vec<u8>>) {
    let mut log = vec![0; 3];
    media.log.read(0, &mut log).unwrap();
    (log, media.snapshot.load().unwrap())
}

#[test]
fn a_log_goes_from_slot_to_slot_and_late_writes_do_not_reach_it() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (disk(dir.path(), 0), disk(dir.path(), 7));
    assert!(one.is_fresh().unwrap());
    let first = one.prepare(1, &held()).unwrap();
    assert!(first.log.is_empty().unwrap());
    assert_eq!(first.snapshot.load().unwrap(), None);
    let busy = one.prepare(1, &held()).unwrap_err();
    assert!(matches!(busy, AreaError::Busy(_)), "{busy}");
    assert!(
        matches!(two.prepare(2, &held()), Err(AreaError::Lost(_))),
        "nothing was ever stored"
    );
    keep(&first, b"one");
    assert!(!two.is_fresh().unwrap());
    let third = two.prepare(3, &held()).unwrap();
    keep(&first, b"two");
    assert_eq!(kept(&third), (b"one".to_vec(), Some(b"one".to_vec())));
    keep(&third, b"new");
    // Back to the first host, whose earlier writer is gone by then.
    drop(first);
    let fourth = one.prepare(4, &held()).unwrap();
    assert_eq!(kept(&fourth), (b"new".to_vec(), Some(b"new".to_vec())));
    keep(&fourth, b"4th");
    drop(fourth);
    // Its own is the newest: it goes on there.
    let fifth = one.prepare(5, &held()).unwrap();
    assert_eq!(kept(&fifth), (b"4th".to_vec(), Some(b"4th".to_vec())));
    drop(fifth);
    drop(third);
    let late = two.prepare(3, &held()).unwrap_err();
    assert!(
        matches!(late, AreaError::Lost(_)),
        "the lease counts anew: {late}"
    );
    let ended = held();
    ended.end();
    assert!(matches!(two.prepare(3, &ended), Err(AreaError::Over)));
    assert!(matches!(two.prepare(6, &ended), Err(AreaError::Over)));
    // Another witness on the same disk sees nothing of it.
    let next = RawArea {
        node: 6,
        ..disk(dir.path(), 1)
    };
    assert!(next.is_fresh().unwrap());
}

#[test]
fn nothing_is_written_once_the_tenure_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let tenure = held();
    let media = disk(dir.path(), 2).prepare(1, &tenure).unwrap();
    keep(&media, b"one");
    tenure.end();
    assert!(media.log.write(0, b"two").is_err());
    assert!(media.log.set_len(9000).is_err());
    assert!(media.snapshot.replace(b"two").is_err());
    assert_eq!(kept(&media), (b"one".to_vec(), Some(b"one".to_vec())));
}

#[test]
fn a_half_made_slot_does_not_count_and_a_damaged_one_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (disk(dir.path(), 0), disk(dir.path(), 1));
    let first = one.prepare(1, &held()).unwrap();
    keep(&first, b"one");
    drop(first);
    // The second dies while it makes its own.
    let mut raw = two.source.open(LOG_SESSION).unwrap();
    let making = Header {
        generation: 2,
        complete: false,
    };
    two.twin(1, HEADER_AT)
        .write_twice(&mut raw, &making)
        .unwrap();
    let third = two.prepare(3, &held()).unwrap();
    assert_eq!(kept(&third), (b"one".to_vec(), Some(b"one".to_vec())));
    drop(third);
    // One of its header's two places is damaged: no harm. Both: what it held may be the only thing that knows of a vote.
    let path = dir.path().join("unit");
    scribble(&path, slot_at(1) + 40);
    assert_eq!(one.newest(&mut raw).unwrap(), Some((3, 1)));
    scribble(&path, slot_at(1) + (64 << 10) + 40);
    let lost = one.prepare(4, &held()).unwrap_err();
    assert!(matches!(lost, AreaError::Damaged { .. }), "{lost}");
}

#[test]
fn a_disk_that_is_too_small_or_in_use_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let area = disk(dir.path(), 0);
    let path = dir.path().join("unit");
    let mut raw = area.source.open(LEASE_SESSION).unwrap();
    assert_eq!(look(&mut raw, "c1").unwrap(), Content::Nothing);
    drop(area.prepare(1, &held()).unwrap());
    assert_eq!(
        look(&mut raw, "c1").unwrap(),
        Content::Witness { ours: true }
    );
    assert_eq!(
        look(&mut raw, "c2").unwrap(),
        Content::Witness { ours: false }
    );
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    file.write_all_at(b"\x53\xef", 1080).unwrap();
    assert_eq!(look(&mut raw, "c1").unwrap(), Content::Other);
    file.set_len(AREA_BYTES - 4096).unwrap();
    let small = area.open_lease().unwrap_err();
    assert!(small.to_string().contains("has 511 MiB"), "{small}");
}

#[test]
fn a_log_grows_by_zeroes_within_its_slot() {
    let dir = tempfile::tempdir().unwrap();
    let media = disk(dir.path(), 3).prepare(1, &held()).unwrap();
    media.log.set_len(10_000).unwrap();
    media.log.write(4000, &[7; 6000]).unwrap();
    assert!(media.log.write(9999, &[7; 2]).is_err(), "past its end");
    media.log.set_len(4100).unwrap();
    media.log.set_len(600_000).unwrap();
    let mut read = vec![1; 600_000];
    media.log.read(0, &mut read).unwrap();
    let sevens = read.iter().filter(|byte| **byte == 7).count();
    assert_eq!(sevens, 100, "what was cut off is gone");
    assert!(read[4000..4100].iter().all(|byte| *byte == 7));
    let full = media.log.set_len(LOG_BYTES + 1).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let large = vec![0; HALF_BYTES as usize + 1];
    assert!(media.snapshot.replace(&large).is_err());
}
