//! The directory pool against real file systems and the real `qemu-img`.
//!
//! Tests that need a file system of their own mount a tmpfs in a mount namespace that
//! ends with their thread; they need root and say so when it is missing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quorate_storage::{
    DirectoryConfig, DirectoryPool, DiskFormat, DiskSpec, Pool, PoolError, round_to_sector,
};

const MIB: u64 = 1 << 20;

#[allow(unsafe_code)]
mod mounts {
    use rustix::mount::{MountFlags, MountPropagationFlags};
    use rustix::thread::UnshareFlags;
    use std::path::Path;

    /// Gives the calling thread, and those it starts, a mount namespace of their own.
    pub(super) fn enter_new() {
        // SAFETY: mounts and the working directory are unshared, not file descriptors.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", private).unwrap();
    }

    pub(super) fn tmpfs(path: &Path, options: &std::ffi::CStr) {
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), options).unwrap();
    }

    pub(super) fn set_read_only(path: &Path) {
        rustix::mount::mount_remount(path, MountFlags::RDONLY, c"").unwrap();
    }
}

/// Runs a test on a thread that sees a tmpfs of its own at the given path.
fn on_tmpfs<F: Future<Output = ()>>(
    options: &'static std::ffi::CStr,
    test: impl FnOnce(PathBuf) -> F + Send + 'static,
) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let thread = std::thread::spawn(move || {
        mounts::enter_new();
        mounts::tmpfs(&path, options);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(path));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn config(path: &Path, host: &str) -> DirectoryConfig {
    DirectoryConfig::new("vms", path, "c1", host)
}

async fn defined(path: &Path) -> DirectoryPool {
    let pool = DirectoryPool::new(config(path, "h1"));
    pool.define().await.unwrap();
    pool
}

fn disk(image: &str, format: DiskFormat, size_bytes: u64) -> DiskSpec {
    DiskSpec {
        image: image.into(),
        format,
        size_bytes: Some(size_bytes),
        create: true,
    }
}

/// The names in a folder that are not the pool's marker or probes.
fn leftovers(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path).unwrap().map(|entry| {
        let name = entry.unwrap().file_name();
        name.to_str().unwrap().to_owned()
    });
    let mut names: Vec<_> = names
        .filter(|name| name != ".quorate-pool" && !name.starts_with(".quorate-probe"))
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn hosts_that_see_the_same_storage_read_the_same_marker() {
    let shared = tempfile::tempdir().unwrap();
    let local = tempfile::tempdir().unwrap();
    let h1 = DirectoryPool::new(config(shared.path(), "h1"));
    let h2 = DirectoryPool::new(config(shared.path(), "h2"));
    let facts = h1.check().await;
    assert!(facts.reachable && !facts.usable());
    assert!(facts.problem.unwrap().contains("not mounted"));

    let (a, b) = tokio::join!(h1.define(), h2.define());
    let marker = a.unwrap();
    assert_eq!(marker, b.unwrap(), "two hosts defined one pool twice");
    for pool in [&h1, &h2] {
        let facts = pool.check().await;
        assert!(facts.usable(), "{facts:?}");
        assert_eq!(facts.marker.as_ref(), Some(&marker));
        assert!(facts.free_bytes > 0 && facts.total_bytes >= facts.free_bytes);
        assert!(facts.fs_type.is_some() && facts.probe_write_us.is_some());
    }

    // The third host has a directory of that name and not the storage.
    let mut other = config(local.path(), "h3");
    other.expected_id = Some(marker.id.clone());
    let h3 = DirectoryPool::new(other);
    assert!(!h3.check().await.usable());
    let spec = disk("db.img", DiskFormat::Raw, MIB);
    let error = h3.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(error, PoolError::MarkerMissing { .. }), "{error}");
    let error = h3.define().await.unwrap_err();
    assert!(matches!(error, PoolError::MarkerMissing { .. }), "{error}");
    assert!(leftovers(local.path()).is_empty());
    // Somebody "repaired" it by defining the pool there.
    defined(local.path()).await;
    let error = h3.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(error, PoolError::OtherStorage { .. }), "{error}");
    assert_eq!(h3.check().await.marker, None);
}

#[tokio::test]
async fn a_foreign_or_damaged_marker_is_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    defined(dir.path()).await;
    let before = fs::read(dir.path().join(".quorate-pool")).unwrap();
    let foreign = DirectoryPool::new(DirectoryConfig::new("vms", dir.path(), "c2", "h1"));
    let error = foreign.define().await.unwrap_err();
    assert!(matches!(error, PoolError::ForeignMarker { .. }));
    assert!(error.to_string().contains("pool `vms` of cluster c1"));
    let renamed = DirectoryPool::new(DirectoryConfig::new("other", dir.path(), "c1", "h1"));
    let error = renamed.define().await.unwrap_err();
    assert!(matches!(error, PoolError::ForeignMarker { .. }));
    assert_eq!(before, fs::read(dir.path().join(".quorate-pool")).unwrap());

    fs::write(dir.path().join(".quorate-pool"), "garbage").unwrap();
    let pool = DirectoryPool::new(config(dir.path(), "h1"));
    let error = pool.define().await.unwrap_err();
    assert!(matches!(error, PoolError::MarkerDamaged { .. }));
}

#[tokio::test]
async fn images_are_made_once_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let h1 = defined(dir.path()).await;
    let h2 = DirectoryPool::new(config(dir.path(), "h2"));
    for (name, format) in [
        ("a/raw.img", DiskFormat::Raw),
        ("b.qcow2", DiskFormat::Qcow2),
    ] {
        let spec = disk(name, format, 10 * MIB + 1);
        let (one, two) = tokio::join!(h1.ensure_disk(&spec), h2.ensure_disk(&spec));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert!(one.created != two.created, "exactly one host makes {name}");
        assert_eq!(one.virtual_bytes, round_to_sector(10 * MIB + 1));
        assert!(one.actual_bytes < MIB, "{name} is not sparse");
        assert_eq!(one.source, two.source);
        fs::File::options()
            .append(true)
            .open(one.source.path().unwrap())
            .unwrap()
            .write_all(&[7; 512])
            .unwrap();
        let before = fs::read(one.source.path().unwrap()).unwrap();
        let again = h1.ensure_disk(&spec).await.unwrap();
        assert!(!again.created);
        assert_eq!(before, fs::read(one.source.path().unwrap()).unwrap());
    }
    assert_eq!(leftovers(dir.path()), ["a", "b.qcow2"]);
    assert_eq!(leftovers(&dir.path().join("a")), ["raw.img"]);
}

#[tokio::test]
async fn what_is_wrong_with_an_image_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let pool = defined(dir.path()).await;
    let mut spec = disk("db.img", DiskFormat::Raw, 10 * MIB);
    spec.create = false;
    let error = pool.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(error, PoolError::ImageMissing { .. }));
    let mut sizeless = disk("db.img", DiskFormat::Raw, 0);
    sizeless.size_bytes = None;
    let error = pool.ensure_disk(&sizeless).await.unwrap_err();
    assert!(matches!(error, PoolError::SizeMissing { .. }));

    spec.create = true;
    pool.ensure_disk(&spec).await.unwrap();
    spec.size_bytes = Some(11 * MIB);
    let error = pool.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(
        error,
        PoolError::ImageTooSmall { have_bytes, want_bytes, .. }
            if have_bytes == 10 * MIB && want_bytes == 11 * MIB
    ));
    spec.format = DiskFormat::Qcow2;
    let error = pool.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(error, PoolError::WrongFormat { ref found, .. } if found == "raw"));
    pool.ensure_disk(&disk("q.img", DiskFormat::Qcow2, MIB))
        .await
        .unwrap();
    let error = pool.disk_info("q.img", DiskFormat::Raw).await.unwrap_err();
    assert!(matches!(error, PoolError::WrongFormat { ref found, .. } if found == "qcow2"));
    fs::create_dir(dir.path().join("folder")).unwrap();
    let error = pool.disk_info("folder", DiskFormat::Raw).await.unwrap_err();
    assert!(matches!(error, PoolError::NotAFile { .. }), "{error}");
    let error = pool.disk_info("../x", DiskFormat::Raw).await.unwrap_err();
    assert!(matches!(error, PoolError::BadImageName { .. }));

    let gone = DirectoryPool::new(config(&dir.path().join("gone"), "h1"));
    let error = gone.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(error, PoolError::DirectoryMissing { .. }));
    assert!(!gone.check().await.reachable);
    let mut without = config(dir.path(), "h1");
    without.qemu_img = "no-such-qemu-img".into();
    let pool = DirectoryPool::new(without);
    let spec = disk("new.qcow2", DiskFormat::Qcow2, MIB);
    let error = pool.ensure_disk(&spec).await.unwrap_err();
    assert!(matches!(error, PoolError::NoQemuImg { .. }), "{error}");
}

#[tokio::test]
async fn an_image_based_on_a_file_outside_of_the_pool_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("pool");
    fs::create_dir(&root).unwrap();
    let pool = defined(&root).await;
    fs::write(dir.path().join("secret"), [0; 512]).unwrap();
    fs::write(root.join("base.img"), [0; 512]).unwrap();
    for (name, base) in [("bad.qcow2", "../secret"), ("good.qcow2", "base.img")] {
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base])
            .arg(root.join(name))
            .status()
            .unwrap();
        assert!(status.success());
    }
    let error = pool
        .disk_info("bad.qcow2", DiskFormat::Qcow2)
        .await
        .unwrap_err();
    assert!(matches!(error, PoolError::Escape { .. }), "{error}");
    let info = pool
        .disk_info("good.qcow2", DiskFormat::Qcow2)
        .await
        .unwrap();
    assert_eq!(
        info.backing,
        Some(fs::canonicalize(&root).unwrap().join("base.img"))
    );
}

#[tokio::test]
async fn resizing_grows_and_never_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let pool = defined(dir.path()).await;
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let spec = disk(format.as_str(), format, 2 * MIB);
        pool.ensure_disk(&spec).await.unwrap();
        for _ in 0..2 {
            let info = pool
                .resize_disk(&spec.image, format, 3 * MIB)
                .await
                .unwrap();
            assert_eq!(info.virtual_bytes, 3 * MIB);
        }
        let error = pool
            .resize_disk(&spec.image, format, 2 * MIB)
            .await
            .unwrap_err();
        assert!(matches!(error, PoolError::WouldShrink { .. }));
    }
}

#[tokio::test]
async fn an_image_in_use_is_neither_deleted_nor_resized() {
    let dir = tempfile::tempdir().unwrap();
    let pool = defined(dir.path()).await;
    let spec = disk("db.img", DiskFormat::Raw, MIB);
    let path = pool.ensure_disk(&spec).await.unwrap().source;
    let path = path.path().unwrap().to_owned();
    let guest = Command::new("qemu-system-x86_64")
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-S",
            "-M",
            "q35,accel=tcg",
        ])
        .args(["-qmp", "stdio", "-drive"])
        .arg(format!("file={},format=raw,if=virtio", path.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut guest) = guest else {
        eprintln!("skipped: needs qemu-system-x86_64");
        return;
    };
    // QEMU answers commands once its devices hold their disks.
    let mut stdin = guest.stdin.take().unwrap();
    stdin
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
        .unwrap();
    let mut stdout = std::io::BufReader::new(guest.stdout.take().unwrap());
    for expected in ["QMP", "return"] {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        assert!(line.contains(expected), "{line}");
    }

    let deleted = pool.delete_disk("db.img").await;
    let resized = pool.resize_disk("db.img", DiskFormat::Raw, 2 * MIB).await;
    let info = pool.disk_info("db.img", DiskFormat::Raw).await;
    guest.kill().unwrap();
    guest.wait().unwrap();
    assert!(
        matches!(deleted, Err(PoolError::ImageInUse { .. })),
        "{deleted:?}"
    );
    assert!(
        matches!(resized, Err(PoolError::ImageInUse { .. })),
        "{resized:?}"
    );
    info.unwrap();
    assert!(pool.delete_disk("db.img").await.unwrap());
    assert!(!pool.delete_disk("db.img").await.unwrap());
}

#[tokio::test]
async fn saved_states_are_whole_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let pool = defined(dir.path()).await;
    let error = pool.commit_saved_state("db", 4).await.unwrap_err();
    assert!(matches!(error, PoolError::StateMissing { .. }));
    let place = pool.prepare_saved_state("db", 4).await.unwrap();
    fs::write(&place.part, b"half").unwrap();
    assert_eq!(pool.find_saved_state("db", 4).await.unwrap(), None);
    let place = pool.prepare_saved_state("db", 4).await.unwrap();
    assert!(!place.part.exists(), "a part that was given up is gone");
    fs::write(&place.part, b"whole").unwrap();
    for _ in 0..2 {
        assert_eq!(pool.commit_saved_state("db", 4).await.unwrap(), place.done);
    }
    assert_eq!(
        pool.find_saved_state("db", 4).await.unwrap(),
        Some(place.done)
    );
    assert_eq!(pool.find_saved_state("db", 5).await.unwrap(), None);
    for (vm, epoch) in [("db", 5), ("db", 6), ("db.1", 1), ("db2", 1)] {
        let place = pool.prepare_saved_state(vm, epoch).await.unwrap();
        fs::write(&place.part, b"x").unwrap();
    }
    assert_eq!(pool.delete_saved_states("db", 5).await.unwrap(), 2);
    assert_eq!(
        leftovers(&dir.path().join(".quorate-saved")),
        ["db.1.1.part", "db.6.part", "db2.1.part"]
    );
    for bad in ["", "../x", "a/b", ".x"] {
        let error = pool.prepare_saved_state(bad, 1).await.unwrap_err();
        assert!(matches!(error, PoolError::BadVmName { .. }));
    }
}

#[test]
fn a_full_pool_is_said_to_be_full() {
    on_tmpfs(c"size=64k", async |path| {
        let pool = defined(&path).await;
        let facts = pool.check().await;
        assert!(facts.usable(), "{facts:?}");
        assert_eq!(facts.fs_type.as_deref(), Some("tmpfs"));
        let spec = disk("big.qcow2", DiskFormat::Qcow2, 10 << 30);
        let error = pool.ensure_disk(&spec).await.unwrap_err();
        assert!(matches!(error, PoolError::Full { .. }), "{error}");
        assert!(leftovers(&path).is_empty(), "{:?}", leftovers(&path));

        fs::remove_file(path.join(".quorate-probe.h1")).unwrap();
        let fill = fs::File::create(path.join("fill")).unwrap();
        while (&fill).write_all(&[0; 4096]).is_ok() {}
        let facts = pool.check().await;
        assert!(facts.reachable && !facts.writable && !facts.usable());
        assert!(facts.problem.unwrap().contains("is full"));
    });
}

#[test]
fn a_read_only_pool_is_said_to_be_read_only() {
    on_tmpfs(c"size=1m", async |path| {
        let pool = defined(&path).await;
        mounts::set_read_only(&path);
        let facts = pool.check().await;
        assert!(facts.reachable && facts.marker.is_some() && !facts.writable);
        assert!(facts.problem.unwrap().contains("read-only"));
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            let spec = disk("db.img", format, MIB);
            let error = pool.ensure_disk(&spec).await.unwrap_err();
            assert!(matches!(error, PoolError::ReadOnly { .. }), "{error}");
        }
    });
}

#[tokio::test]
async fn storage_that_hangs_does_not_hang_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    // Opening a pipe that nobody writes to hangs in the kernel, like a dead NFS server.
    let marker = dir.path().join(".quorate-pool");
    rustix::fs::mkfifoat(rustix::fs::CWD, &marker, rustix::fs::Mode::RWXU).unwrap();
    let mut config = config(dir.path(), "h1");
    config.deadline = Duration::from_millis(100);
    let pool = DirectoryPool::new(config);
    // Far more calls than threads: the later ones do not even start one.
    let threads_before = threads();
    for _ in 0..8 {
        let begin = Instant::now();
        let facts = pool.check().await;
        assert!(facts.unresponsive && !facts.usable());
        assert!(facts.problem.unwrap().contains("hangs"));
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
    assert!(threads() <= threads_before + 4 + 4, "hung threads pile up");
    let error = pool.delete_disk("db.img").await.unwrap_err();
    assert!(matches!(error, PoolError::Unresponsive { .. }));

    // The server comes back: the hung threads end, and the pool answers again.
    let aside = dir.path().join("aside");
    fs::rename(&marker, &aside).unwrap();
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
    let released = rustix::fs::open(&aside, flags, rustix::fs::Mode::empty()).unwrap();
    drop(released);
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(error) = pool.define().await {
        assert!(matches!(error, PoolError::Unresponsive { .. }), "{error}");
        assert!(Instant::now() < deadline, "the pool never recovers");
    }
    assert!(pool.check().await.usable());
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}
