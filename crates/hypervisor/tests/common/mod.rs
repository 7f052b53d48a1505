//! What the tests with a real QEMU share: the guest, temporary directories, waiting for events.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use quorate_hypervisor::qemu::{Guest, QemuDriver};
use quorate_hypervisor::{Accel, Boot, DiskConfig, DiskFormat, GuestConfig, GuestEvent, StartMode};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// Longer than anything takes on a busy machine; reached only when something is broken.
pub const LONG: Duration = Duration::from_secs(120);
pub const QEMU: &str = "qemu-system-x86_64";

/// A host's worth of directories, and the guests started in them, which end with the test.
pub struct Bench {
    pub dir: TempDir,
    pub driver: QemuDriver,
    kernel: PathBuf,
    initrd: PathBuf,
}

/// Finds kernel and initramfs; `None` (loudly) when they are missing and not required.
pub fn bench() -> Option<Bench> {
    let path = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_file())
    };
    let found = path("QUORATE_TEST_KERNEL").zip(path("QUORATE_TEST_INITRD"));
    let Some((kernel, initrd)) = found else {
        let help = "QUORATE_TEST_KERNEL and QUORATE_TEST_INITRD name no files; run \
                    crates/hypervisor/tests/guest/build.sh OUT KERNEL_DEB and export \
                    QUORATE_TEST_KERNEL=OUT/vmlinuz QUORATE_TEST_INITRD=OUT/initrd.gz";
        let required = std::env::var("QUORATE_REQUIRE_QEMU").is_ok_and(|value| value == "1");
        assert!(!required, "{help}");
        eprintln!("\n*** SKIPPED: no test with a real QEMU was run: {help} ***\n");
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    Some(Bench {
        dir,
        driver: QemuDriver::new(QEMU),
        kernel,
        initrd,
    })
}

impl Bench {
    pub fn config(&self, name: &str) -> GuestConfig {
        GuestConfig {
            name: name.into(),
            uuid: "6c0f7a52-5d0f-4a43-9d6a-0b8f3d1f5a01".into(),
            cpus: 1,
            memory_mib: 128,
            machine: "pc-q35-10.0".into(),
            accel: Accel::Tcg,
            cpu_model: "max".into(),
            boot: Boot::Kernel {
                kernel: self.kernel.clone(),
                initrd: Some(self.initrd.clone()),
                append: "console=ttyS0 quiet".into(),
            },
            disks: Vec::new(),
            nics: Vec::new(),
            serial_log: self.dir.path().join(format!("{name}.serial")),
            guest_agent: true,
            runtime_dir: self.dir.path().join(name),
            sandbox: true,
        }
    }

    /// A raw image that several guests may name.
    pub fn raw_disk(&self) -> DiskConfig {
        let path = self.dir.path().join("disk.img");
        if !path.exists() {
            std::fs::File::create(&path)
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
        }
        disk(path, DiskFormat::Raw)
    }

    pub fn qcow2_disk(&self) -> DiskConfig {
        let path = self.dir.path().join("disk.qcow2");
        if !path.exists() {
            let made = std::process::Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&path)
                .arg("1M")
                .status();
            assert!(made.unwrap().success());
        }
        disk(path, DiskFormat::Qcow2)
    }

    pub async fn start(&self, config: &GuestConfig, mode: StartMode) -> Guest {
        self.driver.start_guest(config, mode, LONG).await.unwrap()
    }

    /// Starts a guest and waits until it counts.
    pub async fn boot(&self, config: &GuestConfig) -> Guest {
        let guest = self.start(config, StartMode::Boot).await;
        serial(config, "tick 2").await;
        guest
    }
}

impl Drop for Bench {
    /// Ends what a failed test left behind: exactly the processes recorded in this directory.
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let Ok(text) = std::fs::read_to_string(entry.path().join("guest.json")) else {
                continue;
            };
            let record: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let Some(pid) = record["identity"]["pid"].as_i64() else {
                continue;
            };
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let ours = entry.path().join("qemu.pid");
            if String::from_utf8_lossy(&line).contains(&*ours.to_string_lossy()) {
                let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn disk(path: PathBuf, format: DiskFormat) -> DiskConfig {
    DiskConfig::file("root", path, format)
}

pub fn serial_text(config: &GuestConfig) -> String {
    let bytes = std::fs::read(&config.serial_log).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last tick the guest wrote.
pub fn ticks(config: &GuestConfig) -> u64 {
    let text = serial_text(config);
    let last = text
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("tick ")?.parse().ok());
    last.unwrap_or_default()
}

/// The number in the first sector of the disk.
pub fn disk_seq(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let text = String::from_utf8_lossy(&bytes[..512]).into_owned();
    text.lines()
        .next()
        .and_then(|line| line.strip_prefix("seq ")?.parse().ok())
        .unwrap_or_default()
}

pub async fn serial(config: &GuestConfig, text: &str) {
    eventually(
        &format!("'{text}' on the serial port of {}", config.name),
        || serial_text(config).contains(text),
    )
    .await;
}

/// Waits until the guest has counted further than it has now.
pub async fn counts_on(config: &GuestConfig) {
    let now = ticks(config);
    eventually(&format!("{} counts beyond {now}", config.name), || {
        ticks(config) > now + 1
    })
    .await;
}

pub async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !check() {
        assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

pub async fn event(
    events: &mut tokio::sync::broadcast::Receiver<GuestEvent>,
    wanted: impl Fn(&GuestEvent) -> bool,
) -> GuestEvent {
    timeout(LONG, async {
        loop {
            let event = events.recv().await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    })
    .await
    .expect("the event did not come")
}
