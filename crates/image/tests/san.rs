//! Units of a real iSCSI target.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Lab, San, TARGET, content, sha256, task};
use quorate_storage::{Pool as _, RawDisk as _, RawUnit};
use quorate_types::{JobState, Lun};
use serde_json::json;
use std::fs;
use std::time::Instant;

const MIB: usize = 1 << 20;
const PASSWORD: &str = "open-sesame-42";

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_filled_and_one_with_data_is_not_overwritten() {
    let Some(mut san) = San::start() else { return };
    san.set_account("quorate", PASSWORD);
    let unit = san.add(1, "db", 16 * MIB as u64);
    san.add(2, "small", 4 * MIB as u64);
    let lab = Lab::new().await;
    lab.add_san(&san);
    let raw = lab.path("disk.raw");
    let disk = content(10 * MIB);
    fs::write(&raw, &disk).unwrap();
    let import = |to: &str, force: bool| {
        task(json!({ "op": "import", "file": raw, "to": to, "force": force }))
    };
    let job = lab.run(import("san/small", false)).await;
    assert!(job.error.unwrap().contains("enlarge it at the SAN"));
    let job = lab.run(import("san/db", false)).await;
    assert_eq!(job.state, JobState::Done, "{job:?}");
    assert_eq!(job.sha256, Some(sha256(&raw)));
    assert_eq!(fs::read(&unit).unwrap()[..disk.len()], disk);
    // It holds something now.
    let job = lab.run(import("san/db", false)).await;
    assert!(
        job.error.as_ref().unwrap().contains("say --force"),
        "{job:?}"
    );
    fs::write(&unit, vec![0xff; 16 * MIB]).unwrap();
    let job = lab.run(import("san/db", true)).await;
    assert_eq!(job.state, JobState::Done, "{job:?}");
    assert_eq!(fs::read(&unit).unwrap()[..disk.len()], disk);
    let format = task(json!({ "op": "import", "file": raw, "to": "san/db", "format": "qcow2" }));
    assert!(lab.run(format).await.error.unwrap().contains("whole unit"));
    // Back out of it, into a file.
    let job = lab.run(task(
        json!({ "op": "clone", "from": "san/db", "to": "shared/copy" }),
    ));
    let job = job.await;
    assert_eq!(job.state, JobState::Done, "{job:?}");
    assert_eq!(fs::read(lab.pool("copy")).unwrap()[..disk.len()], disk);
    let delete = task(json!({ "op": "delete", "image": "san/db" }));
    assert!(
        lab.run(delete)
            .await
            .error
            .unwrap()
            .contains("delete it there")
    );
    // The password is in no file that is left, and in no job.
    for entry in fs::read_dir(lab.path("jobs")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read(&path).unwrap();
        let found = text
            .windows(PASSWORD.len())
            .any(|part| part == PASSWORD.as_bytes());
        assert!(!found, "{}", path.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_units_are_listed_within_a_second() {
    let Some(mut san) = San::start() else { return };
    san.set_account("quorate", PASSWORD);
    for number in 1..=100 {
        san.add(number, &format!("disk{number:03}"), 1 << 20);
    }
    let pool = san.pool("iqn.2026-01.local.quorate:c1.h1");
    let mut best = u128::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        let listed = pool.list_images().await.unwrap();
        best = best.min(begun.elapsed().as_millis());
        assert_eq!(listed.len(), 100);
        let wrong = listed
            .iter()
            .find(|image| image.virtual_bytes != Some(1 << 20));
        assert_eq!(wrong, None);
    }
    println!("MEASURED pool_refresh_100_luns_ms {best} (goal 1000)");
}

#[test]
fn a_unit_is_written_by_an_initiator_of_our_own_and_an_earlier_session_of_it_is_over() {
    let Some(mut san) = San::start() else { return };
    san.set_account("quorate", PASSWORD);
    let file = san.add(1, "raw", 8 * MIB as u64);
    let unit = Lun {
        target: format!("{TARGET}:raw"),
        lun: 1,
    };
    let open = |host: &str, number: u8| {
        let peers = [san.peer(&format!("iqn.2026-01.local.test:{host}"))];
        RawUnit::open(&peers, &unit, number)
    };
    let mut one = open("h1", 1).unwrap();
    assert_eq!(one.bytes(), 8 * MIB as u64);
    // What fits into a command, what the target asks for, and what takes several commands.
    let data = content(MIB);
    let mut at = 0;
    for length in [4096, 8192, 65_536, 200 << 10] {
        let piece = &data[at..at + length];
        one.write(at as u64, piece).unwrap();
        at += length;
    }
    one.sync().unwrap();
    assert_eq!(fs::read(&file).unwrap()[..at], data[..at]);
    let mut read = vec![0; at];
    one.read(0, &mut read).unwrap();
    assert_eq!(read, data[..at]);
    // Of another host, and another number: neither minds.
    let mut other = open("h2", 1).unwrap();
    let mut second = open("h1", 2).unwrap();
    one.write(0, &data[..4096]).unwrap();
    other.write(4096, &data[..4096]).unwrap();
    second.write(8192, &data[..4096]).unwrap();
    // The same host under the same number: the earlier one is over, for good.
    let mut again = open("h1", 1).unwrap();
    again.write(0, &data[4096..8192]).unwrap();
    assert!(one.write(0, &data[..4096]).is_err());
    assert!(one.write(0, &data[..4096]).is_err());
    other.read(0, &mut read[..4096]).unwrap();
    assert_eq!(read[..4096], data[4096..8192]);
    second.sync().unwrap();
    let past = again.write(8 * MIB as u64, &data[..4096]).unwrap_err();
    assert_eq!(past.kind(), std::io::ErrorKind::InvalidInput);
    let wrong = Lun {
        lun: 7,
        ..unit.clone()
    };
    let peers = [san.peer("iqn.2026-01.local.test:h1")];
    assert!(RawUnit::open(&peers, &wrong, 3).is_err());
}
