//! A copy of a disk that follows the guest write for write, with a real QEMU and a real `qemu-storage-daemon`.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::{Bench, LONG, bench, counts_on, disk_seq, eventually, ticks};
use quorate_hypervisor::qemu::Guest;
use quorate_hypervisor::qemu::export::{self, Export, ExportConfig};
use quorate_hypervisor::{GuestConfig, GuestState, MirrorStatus, MirrorTarget};
use tokio::time::sleep;

const PROGRAM: &str = "qemu-storage-daemon";

struct Copy {
    image: PathBuf,
    dir: PathBuf,
    export: Export,
}

/// A second image, and an export of it.
async fn copy(bench: &Bench, name: &str) -> Copy {
    let image = bench.dir.path().join("copy.img");
    if !image.exists() {
        std::fs::write(&image, vec![0xee; 1 << 20]).unwrap();
    }
    let dir = bench.dir.path().join(name);
    let config = ExportConfig {
        image: image.clone(),
        name: name.into(),
        address: "127.0.0.1".parse().unwrap(),
        tls: None,
        note: "note".into(),
    };
    let export = export::open(PROGRAM.as_ref(), &dir, &config, LONG)
        .await
        .unwrap();
    Copy { image, dir, export }
}

impl Drop for Copy {
    /// A failed test leaves no process.
    fn drop(&mut self) {
        if let Ok(Some(found)) = export::find(&self.dir) {
            kill(found.identity.pid);
        }
    }
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

fn stop(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
}

impl Copy {
    fn target(&self) -> MirrorTarget {
        MirrorTarget {
            address: self.export.address,
            export: self.export.config.name.clone(),
            tls: None,
        }
    }
}

async fn mirror(guest: &Guest) -> Option<MirrorStatus> {
    guest.mirrors().await.unwrap().into_iter().next()
}

async fn in_step(guest: &Guest) {
    let deadline = tokio::time::Instant::now() + LONG;
    loop {
        let seen = mirror(guest).await;
        if seen.as_ref().is_some_and(|seen| seen.in_step) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{seen:?}");
        sleep(Duration::from_millis(10)).await;
    }
}

fn config(bench: &Bench) -> GuestConfig {
    let mut config = bench.config("vm");
    config.disks = vec![bench.raw_disk()];
    config
}

fn seq(config: &GuestConfig) -> u64 {
    disk_seq(config.disks[0].source.path().unwrap())
}

/// The guest's writes wait: nothing is acknowledged that the copy has not.
async fn stalls(config: &GuestConfig) {
    // A tick is written before its number: two more may come.
    let (tick, disk) = (ticks(config), seq(config));
    sleep(Duration::from_millis(600)).await; // twelve ticks, if it went on
    assert!(ticks(config) <= tick + 2, "the guest went on alone");
    assert!(seq(config) <= disk + 2);
}

#[tokio::test]
async fn a_killed_owner_leaves_every_acknowledged_write_on_the_copy() {
    let Some(bench) = bench() else { return };
    let config = config(&bench);
    let guest = bench.boot(&config).await;
    let copy = copy(&bench, "one").await;
    assert_eq!(export::find(&copy.dir).unwrap().unwrap(), copy.export);
    guest
        .start_mirror(0, "7", &copy.target(), Some(64 << 20))
        .await
        .unwrap();
    in_step(&guest).await;
    assert_eq!(mirror(&guest).await.unwrap().tag, "7");
    counts_on(&config).await;
    // A tick is printed after the write before it was acknowledged.
    let acknowledged = ticks(&config) - 1;
    guest.kill(LONG).await.unwrap();
    assert!(disk_seq(&copy.image) >= acknowledged);
    export::close(&copy.dir).await.unwrap();
    let (mine, theirs) = (
        std::fs::read(config.disks[0].source.path().unwrap()).unwrap(),
        std::fs::read(&copy.image).unwrap(),
    );
    assert_eq!(mine[512..], theirs[512..], "all of it was copied");
    assert!(export::find(&copy.dir).unwrap().is_none());
    export::close(&copy.dir).await.unwrap();
}

#[tokio::test]
async fn writes_wait_for_a_copy_that_is_gone_until_it_is_dropped() {
    let Some(bench) = bench() else { return };
    let config = config(&bench);
    let guest = bench.boot(&config).await;
    // Its process is gone: the connection is refused from now on. Or it hangs: nothing is answered.
    for (name, end) in [("gone", kill as fn(i32)), ("hung", stop as fn(i32))] {
        let copy = copy(&bench, name).await;
        guest
            .start_mirror(0, name, &copy.target(), None)
            .await
            .unwrap();
        in_step(&guest).await;
        end(copy.export.identity.pid);
        sleep(Duration::from_millis(200)).await;
        stalls(&config).await;
        let seen = mirror(&guest).await.expect("it waits, it does not give up");
        assert!(seen.total > seen.done, "a write is under way: {seen:?}");
        assert!(seen.in_step && seen.problem.is_none(), "{seen:?}");
        let begun = std::time::Instant::now();
        guest.drop_mirror(0).await.unwrap();
        println!("{name}: dropped after {:?}", begun.elapsed());
        counts_on(&config).await;
        assert!(mirror(&guest).await.is_none());
        let on_disk = seq(&config);
        eventually("it writes without the copy", || seq(&config) > on_disk).await;
        assert!(disk_seq(&copy.image) < seq(&config));
        export::close(&copy.dir).await.unwrap();
    }
    guest.drop_mirror(0).await.unwrap();
    // One that returns is brought up to date.
    let copy = copy(&bench, "back").await;
    guest
        .start_mirror(0, "9", &copy.target(), None)
        .await
        .unwrap();
    in_step(&guest).await;
    guest.kill(LONG).await.unwrap();
    assert!(disk_seq(&copy.image) >= ticks(&config) - 1);
}

#[tokio::test]
async fn a_mirrored_guest_freezes_and_thaws() {
    let Some(bench) = bench() else { return };
    let config = config(&bench);
    let guest = bench.boot(&config).await;
    let copy = copy(&bench, "one").await;
    guest
        .start_mirror(0, "1", &copy.target(), None)
        .await
        .unwrap();
    in_step(&guest).await;
    let frozen = guest.freeze(LONG).await.unwrap();
    assert!(frozen.released_disks);
    assert_eq!(guest.status().await.unwrap(), GuestState::Paused);
    let tick = ticks(&config);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(ticks(&config), tick);
    assert_eq!(disk_seq(&copy.image), seq(&config));
    guest.thaw(LONG).await.unwrap();
    counts_on(&config).await;
    in_step(&guest).await;
    guest.kill(LONG).await.unwrap();
    assert!(disk_seq(&copy.image) >= ticks(&config) - 1);
}

#[tokio::test]
async fn an_export_that_cannot_be_served_says_why() {
    let Some(bench) = bench() else { return };
    let dir = bench.dir.path().join("none");
    let config = ExportConfig {
        image: bench.dir.path().join("missing.img"),
        name: "none".into(),
        address: "127.0.0.1".parse().unwrap(),
        tls: None,
        note: String::new(),
    };
    let error = export::open(PROGRAM.as_ref(), &dir, &config, LONG)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("No such file"), "{error}");
    let guest_config = self::config(&bench);
    let guest = bench.boot(&guest_config).await;
    let target = MirrorTarget {
        address: "127.0.0.1:1".parse().unwrap(),
        export: "none".into(),
        tls: None,
    };
    guest.start_mirror(0, "1", &target, None).await.unwrap_err();
    assert!(mirror(&guest).await.is_none());
    counts_on(&guest_config).await;
    guest.kill(LONG).await.unwrap();
}
