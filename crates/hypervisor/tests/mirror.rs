//! A copy of a disk that follows the guest write for write, with a real QEMU and a real `qemu-storage-daemon`.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{Bench, LONG, bench, counts_on, disk_seq, eventually, ticks};
use quorate_hypervisor::qemu::Guest;
use quorate_hypervisor::qemu::export::{self, Export, ExportConfig};
use quorate_hypervisor::{
    Boot, DiskConfig, DiskFormat, GuestConfig, GuestState, MirrorStatus, MirrorTarget, Resync,
    WriteMap,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

const PROGRAM: &str = "qemu-storage-daemon";

struct Copy {
    image: PathBuf,
    dir: PathBuf,
    export: Export,
}

/// A second image, and an export of it.
async fn copy(bench: &Bench, name: &str) -> Copy {
    copy_at(bench, name, "copy.img").await
}

async fn copy_at(bench: &Bench, name: &str, image: &str) -> Copy {
    let image = bench.dir.path().join(image);
    if !image.exists() {
        let disk = bench.dir.path().join("disk.img");
        let size = std::fs::metadata(disk).map_or(1 << 20, |disk| disk.len());
        std::fs::write(&image, vec![0xee; usize::try_from(size).unwrap()]).unwrap();
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
            program: PROGRAM.into(),
        }
    }
}

async fn mirror(guest: &Guest) -> Option<MirrorStatus> {
    guest.mirrors().await.unwrap().into_iter().next()
}

async fn in_step(guest: &Guest) {
    all(guest, 1, |seen| seen.in_step).await;
}

/// Waits until there are so many mirrors, all of them like this.
async fn all(guest: &Guest, mirrors: usize, like: impl Fn(&MirrorStatus) -> bool) {
    let deadline = tokio::time::Instant::now() + LONG;
    loop {
        let seen = guest.mirrors().await.unwrap();
        if seen.len() == mirrors && seen.iter().all(&like) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{seen:?}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until a copy has what it lacked and is in step; says how much that was.
async fn resynced(guest: &Guest) -> Resync {
    let deadline = tokio::time::Instant::now() + LONG;
    let mut resync = None;
    loop {
        let seen = mirror(guest).await;
        if seen.as_ref().is_some_and(|seen| seen.in_step) {
            return resync.expect("it is a resync");
        }
        resync = seen.as_ref().and_then(|seen| seen.resync).or(resync);
        if resync.is_some_and(|resync| resync.due) {
            guest.finish_resync(0).await.unwrap();
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
        .start_mirror(0, "7", &copy.target(), Some(64 << 20), None)
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
            .start_mirror(0, name, &copy.target(), None, None)
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
        .start_mirror(0, "9", &copy.target(), None, None)
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
        .start_mirror(0, "1", &copy.target(), None, None)
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
        program: PROGRAM.into(),
    };
    guest
        .start_mirror(0, "1", &target, None, None)
        .await
        .unwrap_err();
    assert!(mirror(&guest).await.is_none());
    counts_on(&guest_config).await;
    guest.kill(LONG).await.unwrap();
}

/// A guest that writes all over the first part of a larger disk.
async fn scatterer(bench: &Bench) -> (GuestConfig, Guest) {
    let mut config = config(bench);
    let disk = config.disks[0].source.path().unwrap().to_owned();
    std::fs::write(&disk, vec![0x11; SCATTER_DISK]).unwrap();
    if let Boot::Kernel { append, .. } = &mut config.boot {
        append.push_str(" scatter=2048"); // of 16,384 blocks
    }
    let guest = bench.boot(&config).await;
    (config, guest)
}

const SCATTER_DISK: usize = 64 << 20;

/// Nothing is under way in a guest that stands still: then both sides have the same bytes, or something went wrong.
async fn same_bytes(guest: &Guest, config: &GuestConfig, copy: &Copy, when: &str) {
    guest.freeze(LONG).await.unwrap();
    let mine = std::fs::read(config.disks[0].source.path().unwrap()).unwrap();
    let theirs = std::fs::read(&copy.image).unwrap();
    let chunks = mine.chunks(512).zip(theirs.chunks(512));
    let differ = chunks.filter(|(mine, theirs)| mine != theirs).count();
    assert_eq!(differ, 0, "sectors that differ {when}");
    assert_eq!(mine.len(), theirs.len());
    guest.thaw(LONG).await.unwrap();
    counts_on(config).await;
}

/// A write that waited for a copy that is dropped during a resync fails, and is kept: the guest goes on with it.
async fn goes_on(guest: &Guest, config: &GuestConfig) {
    let (now, deadline) = (ticks(config), tokio::time::Instant::now() + LONG);
    while ticks(config) <= now + 2 {
        if guest.status().await.unwrap() == GuestState::IoError {
            guest.thaw(LONG).await.unwrap();
        }
        assert!(tokio::time::Instant::now() < deadline, "it stands still");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn map(guest: &Guest) -> WriteMap {
    let maps = guest.write_maps(0).await.unwrap();
    assert_eq!(maps.len(), 1, "{maps:?}");
    maps.into_iter().next().unwrap()
}

async fn writes_to(guest: &Guest, more: u64) {
    let until = map(guest).await.bytes + more;
    let deadline = tokio::time::Instant::now() + LONG;
    while map(guest).await.bytes < until {
        assert!(tokio::time::Instant::now() < deadline, "it does not write");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_copy_that_returns_gets_what_it_lacks_while_the_guest_writes() {
    let Some(bench) = bench() else { return };
    let (config, guest) = scatterer(&bench).await;
    let whole = copy(&bench, "one").await;
    let target = whole.target();
    guest
        .start_mirror(0, "1", &target, None, None)
        .await
        .unwrap();
    in_step(&guest).await;
    guest.begin_write_map(0, "1", 1).await.unwrap();
    same_bytes(&guest, &config, &whole, "after the first copy").await;
    kill(whole.export.identity.pid);
    guest.drop_mirror(0).await.unwrap();
    writes_to(&guest, 512 << 10).await;
    export::close(&whole.dir).await.unwrap();

    // The copy's host is lost again while the copy gets what it lacks, in both ways; the map goes on.
    for (name, end) in [("gone", kill as fn(i32)), ("hung", stop as fn(i32))] {
        let copy = copy(&bench, name).await;
        let lacks = map(&guest).await;
        let slowly = Some(1 << 20);
        let target = copy.target();
        let begun = guest.start_mirror(0, name, &target, slowly, Some(&lacks));
        begun.await.unwrap();
        counts_on(&config).await;
        let seen = mirror(&guest).await.unwrap();
        assert!(!seen.in_step && seen.problem.is_none(), "{seen:?}");
        end(copy.export.identity.pid);
        sleep(Duration::from_millis(200)).await;
        guest.drop_mirror(0).await.unwrap();
        assert!(mirror(&guest).await.is_none());
        goes_on(&guest, &config).await;
        export::close(&copy.dir).await.unwrap();
    }

    for round in 2..5 {
        let copy = copy(&bench, &format!("back{round}")).await;
        let (tag, lacks) = (round.to_string(), map(&guest).await);
        let target = copy.target();
        let begun = guest.start_mirror(0, &tag, &target, Some(4 << 20), Some(&lacks));
        begun.await.unwrap();
        let copied = resynced(&guest).await;
        println!(
            "resync {round}: {} KiB of {} KiB copied ({} %)",
            copied.done >> 10,
            SCATTER_DISK >> 10,
            copied.done * 100 / SCATTER_DISK as u64
        );
        assert_eq!(copied.done, copied.total);
        assert!(
            copied.done > 0 && copied.done < SCATTER_DISK as u64 / 3,
            "{copied:?}"
        );
        same_bytes(&guest, &config, &copy, "after a resync").await;
        // What is written from here on is in a new map; the old one is not needed once the copy has it for good.
        guest
            .begin_write_map(0, &tag, lacks.number + 1)
            .await
            .unwrap();
        let old = guest.forget_write_map(0, &lacks.tag, lacks.number);
        old.await.unwrap();
        stop(copy.export.identity.pid);
        sleep(Duration::from_millis(100)).await;
        guest.drop_mirror(0).await.unwrap();
        counts_on(&config).await;
        writes_to(&guest, 128 << 10).await;
        export::close(&copy.dir).await.unwrap();
    }
    // A freeze gives the disk up, and the map stays.
    let before = map(&guest).await;
    assert!(guest.freeze(LONG).await.unwrap().released_disks);
    guest.thaw(LONG).await.unwrap();
    counts_on(&config).await;
    assert!(map(&guest).await.bytes >= before.bytes);

    // The disk becomes larger while its copy is away, and the copy when it returns.
    let larger = (SCATTER_DISK + (8 << 20)) as u64;
    guest.resize_disk(0, larger).await.unwrap();
    let image = std::fs::File::options().write(true).open(&whole.image);
    image.unwrap().set_len(larger).unwrap();
    writes_to(&guest, 128 << 10).await;
    let copy = copy(&bench, "larger").await;
    let (target, lacks) = (copy.target(), map(&guest).await);
    let begun = guest.start_mirror(0, "9", &target, None, Some(&lacks));
    begun.await.unwrap();
    let copied = resynced(&guest).await;
    assert!(copied.done < SCATTER_DISK as u64 / 3, "{copied:?}");
    same_bytes(&guest, &config, &copy, "after the disk was made larger").await;
    guest.kill(LONG).await.unwrap();
}

#[tokio::test]
async fn a_map_that_misses_writes_is_seen_by_the_comparison() {
    let Some(bench) = bench() else { return };
    let (config, guest) = scatterer(&bench).await;
    let first = copy(&bench, "one").await;
    let target = first.target();
    guest
        .start_mirror(0, "1", &target, None, None)
        .await
        .unwrap();
    in_step(&guest).await;
    guest.drop_mirror(0).await.unwrap();
    export::close(&first.dir).await.unwrap();
    counts_on(&config).await;
    // Begun too late.
    guest.begin_write_map(0, "1", 1).await.unwrap();
    let copy = copy(&bench, "two").await;
    let lacks = map(&guest).await;
    let target = copy.target();
    let begun = guest.start_mirror(0, "2", &target, None, Some(&lacks));
    begun.await.unwrap();
    resynced(&guest).await;
    guest.freeze(LONG).await.unwrap();
    let mine = std::fs::read(config.disks[0].source.path().unwrap()).unwrap();
    assert!(mine != std::fs::read(&copy.image).unwrap());
    guest.kill(LONG).await.unwrap();
}

/// Lets go of a copy, as often as it takes.
async fn let_go(guest: &Guest, disk: usize) {
    let deadline = tokio::time::Instant::now() + LONG;
    while let Err(error) = guest.drop_mirror(disk).await {
        assert!(tokio::time::Instant::now() < deadline, "{error}");
    }
}

#[tokio::test]
async fn a_host_that_has_the_copies_of_two_disks_is_let_go_of() {
    let Some(bench) = bench() else { return };
    let mut config = config(&bench);
    let second = bench.dir.path().join("second.img");
    std::fs::write(&second, vec![0x22; 1 << 20]).unwrap();
    let second = DiskConfig::file("second", second, DiskFormat::Raw);
    config.disks.push(second);
    if let Boot::Kernel { append, .. } = &mut config.boot {
        append.push_str(" second=1");
    }
    let guest = bench.boot(&config).await;
    for (name, end) in [("gone", kill as fn(i32)), ("hung", stop as fn(i32))] {
        let mut copies = Vec::new();
        for disk in 0..2 {
            let image = format!("copy{disk}.img");
            let copy = copy_at(&bench, &format!("{name}{disk}"), &image).await;
            let target = copy.target();
            let begun = guest.start_mirror(disk, name, &target, None, None);
            begun.await.unwrap();
            copies.push(copy);
        }
        all(&guest, 2, |seen| seen.in_step).await;
        for copy in &copies {
            end(copy.export.identity.pid);
        }
        // Both disks have a write that waits: the end of one mirror would wait for the other's.
        all(&guest, 2, |seen| seen.total > seen.done).await;
        tokio::join!(let_go(&guest, 0), let_go(&guest, 1));
        counts_on(&config).await;
        assert!(mirror(&guest).await.is_none());
        for copy in &copies {
            export::close(&copy.dir).await.unwrap();
        }
    }
    guest.kill(LONG).await.unwrap();
}

/// A wire to an export that is cut after so many pieces of data, as when a host loses its power: nothing is answered, and
/// nothing is refused.
struct Wire {
    address: SocketAddr,
    pieces: Arc<AtomicU32>,
}

impl Wire {
    async fn to(export: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pieces = Arc::new(AtomicU32::new(u32::MAX));
        let counter = pieces.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(export).await.unwrap();
                let ((near_in, near_out), (far_in, far_out)) =
                    (near.into_split(), far.into_split());
                tokio::spawn(pass(near_in, far_out, counter.clone()));
                tokio::spawn(pass(far_in, near_out, counter.clone()));
            }
        });
        Self { address, pieces }
    }

    fn is_cut_after(&self, pieces: u32) {
        self.pieces.store(pieces, Ordering::SeqCst);
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, pieces: Arc<AtomicU32>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        let (one, less) = (Ordering::SeqCst, |left: u32| left.checked_sub(1));
        if pieces.fetch_update(one, one, less).is_err() {
            std::future::pending::<()>().await; // both ends stay open
        }
        if to.write_all(&buffer[..len]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_host_that_is_lost_as_a_resync_begins_or_ends_does_not_hold_the_guest_up() {
    let Some(bench) = bench() else { return };
    let (config, guest) = scatterer(&bench).await;
    let whole = copy(&bench, "whole").await;
    let target = whole.target();
    let begun = guest.start_mirror(0, "1", &target, None, None);
    begun.await.unwrap();
    in_step(&guest).await;
    guest.begin_write_map(0, "1", 1).await.unwrap();
    let_go(&guest, 0).await;
    export::close(&whole.dir).await.unwrap();
    writes_to(&guest, 512 << 10).await;
    let begins = [0, 3, 9, 16, 24, 40].map(|pieces| (false, pieces));
    let ends = [0, 1, 2, 4].map(|pieces| (true, pieces));
    for (at_end, pieces) in begins.into_iter().chain(ends) {
        let copy = copy(&bench, &format!("{at_end}{pieces}")).await;
        let wire = Wire::to(copy.export.address).await;
        let target = MirrorTarget {
            address: wire.address,
            ..copy.target()
        };
        let lacks = map(&guest).await;
        if !at_end {
            wire.is_cut_after(pieces);
        }
        let begun = guest.start_mirror(0, "2", &target, None, Some(&lacks));
        let begun = begun.await;
        if at_end {
            begun.unwrap();
            all(&guest, 1, |seen| {
                seen.resync.is_some_and(|resync| resync.due)
            })
            .await;
            wire.is_cut_after(pieces);
            let finished = guest
                .finish_resync(0)
                .await
                .map_err(|error| error.to_string());
            println!("{pieces} pieces before the end: {finished:?}");
        } else {
            println!("{pieces} pieces after the begin: {:?}", begun.err());
        }
        sleep(Duration::from_millis(300)).await;
        let began = std::time::Instant::now();
        let_go(&guest, 0).await;
        println!("let go of in {:?}", began.elapsed());
        goes_on(&guest, &config).await;
        assert!(mirror(&guest).await.is_none());
        export::close(&copy.dir).await.unwrap();
    }
    let copy = copy(&bench, "back").await;
    let (target, lacks) = (copy.target(), map(&guest).await);
    let begun = guest.start_mirror(0, "3", &target, None, Some(&lacks));
    begun.await.unwrap();
    resynced(&guest).await;
    same_bytes(&guest, &config, &copy, "after it was lost again and again").await;
    spared(&config);
    guest.kill(LONG).await.unwrap();
    eventually("its relay ends with it", || !relay_files(&config)).await;
}

/// The relay is not what the kernel ends for want of memory: the guest would go on without its copy.
fn spared(config: &GuestConfig) {
    let pid = std::fs::read_to_string(config.runtime_dir.join("copy0.pid")).unwrap();
    let of = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", pid.trim())).unwrap();
    assert!(of("cmdline").contains("storage-daemon"));
    let words = ["-c", "echo -999 2> /dev/null > /proc/self/oom_score_adj"];
    let may = std::process::Command::new("sh").args(words).status();
    match may.unwrap().success() {
        true => assert_eq!(of("oom_score_adj").trim(), "-999"),
        false => println!("SKIPPED: CAP_SYS_RESOURCE is wanted to spare a process"),
    }
}

/// Whether there is anything of a relay.
fn relay_files(config: &GuestConfig) -> bool {
    let entries = std::fs::read_dir(&config.runtime_dir).unwrap().flatten();
    let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.any(|name| name.starts_with("copy0"))
}
