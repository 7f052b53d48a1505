//! Units of a real iSCSI target.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Lab, San, content, sha256, task};
use quorate_storage::Pool as _;
use quorate_types::JobState;
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
