//! The real binary asks what would happen: pages as people see them, in `golden/`.
//! `UPDATE_GOLDEN=1` writes them anew.
#![allow(clippy::unwrap_used)]

mod binary;
#[path = "../../api/tests/common/mod.rs"]
mod common;

use binary::{run, run_with};
use common::Site;
use quorate_api::Limits;
use std::path::Path;
use std::sync::atomic::Ordering;

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, kept, "{name} differs");
}

/// A database with an application on it, two web servers apart, and a batch job that only moves by stopping.
const SHOP: &str = "
vms:
  db: {memory: 700MiB, priority: 10, ready: {probe: {serial: up}}, boot: {kernel: {kernel: '${KERNEL}'}}}
  app: {memory: 400MiB, depends_on: [db], boot: {kernel: {kernel: '${KERNEL}'}}}
  web1: {memory: 300MiB, depends_on: [app], boot: {kernel: {kernel: '${KERNEL}'}}}
  web2: {memory: 300MiB, depends_on: [app], boot: {kernel: {kernel: '${KERNEL}'}}}
  batch: {memory: 500MiB, migration: cold, boot: {kernel: {kernel: '${KERNEL}'}}}
rules:
  webs: {keep_apart: [web1, web2]}
";

async fn shop() -> Site {
    let site = Site::start(Limits::default()).await;
    site.apply(SHOP).await;
    site.fake.settle().await;
    site
}

#[tokio::test]
async fn plans_are_told_as_a_page() {
    let site = shop().await;
    let before = site.fake.state_now();
    let mut pages = String::new();
    for line in [
        "plan",
        "plan --drain h1",
        "plan --fail h2",
        "plan --fail h2 --then-drain h3",
        "plan --fail h1,h2",
        "plan --fail h3 --verbose",
    ] {
        let ran = run(&site, line).await;
        assert_eq!(ran.status, 0, "{line}: {}", ran.err);
        pages.push_str(&format!("$ quorate {line}\n{}\n", ran.out));
    }
    golden("plan.txt", &pages);
    assert_eq!(
        site.fake.state_now(),
        before,
        "nothing is changed by asking"
    );
}

#[tokio::test]
async fn what_does_not_fit_is_told_with_the_reason() {
    let site = shop().await;
    site.fake.memory_mib.store(1250, Ordering::SeqCst);
    let mut pages = String::new();
    for line in ["plan --fail h1", "capacity", "plan --balance"] {
        let ran = run(&site, line).await;
        assert_eq!(ran.status, 0, "{line}: {}", ran.err);
        pages.push_str(&format!("$ quorate {line}\n{}\n", ran.out));
    }
    golden("full.txt", &pages);
}

#[tokio::test]
async fn room_for_failures_is_told_as_a_page() {
    let site = shop().await;
    let mut pages = String::new();
    for line in ["capacity", "capacity --failures 1"] {
        let ran = run(&site, line).await;
        assert_eq!(ran.status, 0, "{line}: {}", ran.err);
        pages.push_str(&format!("$ quorate {line}\n{}\n", ran.out));
    }
    golden("capacity.txt", &pages);
}

#[tokio::test]
async fn a_manifest_is_asked_about_and_refused_with_its_position() {
    let site = shop().await;
    let more = "vms: {log: {memory: 200MiB, boot: {kernel: {kernel: '${KERNEL}'}}}}";
    let ran = run_with(&site, "plan --apply -", more).await;
    assert!(
        ran.out.contains("If standard input is applied"),
        "{}",
        ran.out
    );
    assert!(ran.out.contains("start"), "{}", ran.out);
    let strict = "cluster: {admission: {mode: refuse}}\nvms:\n  big:\n    memory: 1500MiB\n    boot: {kernel: {kernel: '${KERNEL}'}}\n";
    let refused = run_with(&site, "apply -f -", strict).await;
    assert_eq!(refused.status, 1);
    golden("refused.txt", &refused.err);
    let warned = strict.replace("refuse", "warn");
    let warned = run_with(&site, "apply -f -", &warned).await;
    assert_eq!(warned.status, 0);
    golden("warned.txt", &warned.out);
}

#[tokio::test]
async fn a_saved_state_gives_the_same_answers() {
    let site = shop().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state.json");
    let file = file.display();
    let saved = run(&site, &format!("state save {file}")).await;
    assert_eq!(saved.status, 0, "{}", saved.err);
    assert!(saved.out.starts_with("Saved revision "), "{}", saved.out);
    let mode = std::fs::metadata(dir.path().join("state.json")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&mode.permissions());
    assert_eq!(mode & 0o777, 0o600);
    for line in [
        "plan --fail h2 --then-drain h3 -o json",
        "capacity",
        "explain vm db --at 2023-11-14T22:14Z",
    ] {
        let live = run(&site, line).await;
        let offline = run(&site, &format!("--dir /nonexistent {line} --state {file}")).await;
        assert_eq!(offline.status, 0, "{line}: {}", offline.err);
        assert_eq!(offline.out, live.out, "{line}");
    }
    let wrong = run(&site, &format!("plan --state {file}x")).await;
    assert_eq!(wrong.status, 2);
    std::fs::write(dir.path().join("state.json"), "{}").unwrap();
    let wrong = run(&site, &format!("plan --state {file}")).await;
    assert_eq!(wrong.status, 2);
    assert!(
        wrong.err.contains("it is not a saved state"),
        "{}",
        wrong.err
    );
}

#[tokio::test]
async fn the_past_is_explained() {
    let site = shop().await;
    let then = run(&site, "explain vm db --at 2023-11-14T22:14:00Z").await;
    assert_eq!(then.status, 0, "{}", then.err);
    golden("then.txt", &then.out);
    let never = run(&site, "explain vm db --at 2001-01-01T00:00Z").await;
    assert!(
        never.out.contains("before the oldest decision"),
        "{}",
        never.out
    );
    assert_eq!(run(&site, "explain vm db --at soon").await.status, 2);
}
