//! Disks that are block devices of the hosts: loop devices, which all hosts of a lab see, as those of a SAN.
//!
//! Loop devices have no persistent reservations, so this is what a pool with `reservations: false` is good for; the guests of
//! `make san` have devices with them.

use crate::harness::guest::{Guest, manifest};
use crate::harness::measure::seconds;
use crate::harness::{Cluster, LONG, find_vm, process};
use quorate_api::storage::{ImageState, StorageView};
use quorate_lab::wait;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A block device that is gone when its last user is, however the test ends.
struct Loop {
    device: PathBuf,
    _open: File,
}

impl Loop {
    /// Over a file of zeroes.
    fn over(file: &Path, mebibytes: u64) -> Result<Self, String> {
        let failed = |error: std::io::Error| error.to_string();
        quorate_lab::guest::make_disk(file, mebibytes).map_err(|error| error.to_string())?;
        let losetup = |words: &[&std::ffi::OsStr]| {
            let done = Command::new("losetup").args(words).output();
            let done = done.map_err(|error| format!("losetup: {error}"))?;
            match done.status.success() {
                true => Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned()),
                false => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
            }
        };
        let words = ["--find".as_ref(), "--show".as_ref(), file.as_os_str()];
        let device = PathBuf::from(losetup(&words)?);
        let open = File::open(&device).map_err(failed);
        // While somebody has it open this only says that the last one to close it detaches it.
        losetup(&["--detach".as_ref(), device.as_os_str()])?;
        Ok(Self {
            device,
            _open: open?,
        })
    }
}

/// Devices by name, as udev would have them.
struct Devices {
    dir: PathBuf,
    devices: Vec<Loop>,
}

impl Devices {
    fn add(&mut self, name: &str, mebibytes: u64) -> Result<(), String> {
        let file = self.dir.with_file_name(format!("{name}.backing"));
        let device = Loop::over(&file, mebibytes)?;
        std::os::unix::fs::symlink(&device.device, self.dir.join(name)).unwrap();
        self.devices.push(device);
        Ok(())
    }

    /// Keeps a device as a mounted file system does.
    fn claim(&self, name: &str) -> File {
        let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap();
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(exclusive);
        options.open(self.dir.join(name)).unwrap()
    }
}

fn pools(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "pools:\n  fc: {{kind: block, path: {dir}, reservations: false}}\n  strict: {{kind: block, path: {dir}}}\n"
    )
}

/// A cluster of three hosts runs a guest on a device: boot, live migration, loss of its host, and what is refused.
pub(crate) fn a_guest_on_a_device(cluster: &Cluster) {
    let dir = cluster.lab.site().dir.join("by-id");
    std::fs::create_dir(&dir).unwrap();
    let mut devices = Devices {
        dir: dir.clone(),
        devices: Vec::new(),
    };
    let units = [("unit.raw", 16), ("small.raw", 8), ("claimed.raw", 16)];
    for (name, mebibytes) in units.into_iter().chain([("reserved.raw", 16)]) {
        if let Err(why) = devices.add(name, mebibytes) {
            println!("NOT RUN pools of block devices: this machine gives no loop device: {why}");
            return;
        }
    }
    let unit = [Guest::new("unit", 5).pool("fc")];
    let text = manifest(&unit, &cluster.image(), &pools(&dir));
    cluster.apply_text(&text).unwrap();
    cluster.wait_ready(&["unit"], LONG * 2);
    let witness = cluster.witness(&unit);
    let first = cluster.owner("unit");
    cluster.must(&["vm", "migrate", "unit", "--wait"]);
    let second = cluster.owner("unit");
    assert_ne!(first, second);
    refusals(cluster, &devices);
    shown(cluster);
    drills(cluster);

    let old = cluster.copy("unit");
    let begun = cluster.cut_power(&old.host);
    let new = cluster.new_copy("unit", std::slice::from_ref(&old), LONG);
    cluster.wait_ready(&["unit"], LONG);
    assert_ne!(new.host, old.host);
    let took = seconds(new.started.saturating_sub(begun));
    cluster.say(&format!(
        "a device's guest: started again {took:.1} s after its host was lost"
    ));
    // Nothing is cut at such devices: its host's lease, guard and watchdog are the proof.
    let why = cluster.why("unit");
    assert!(why.contains("lease-expired"), "{why}");
    wait::pause(Duration::from_secs(1));
    let reports = cluster.judge_at(witness, |_| dir.join("unit.raw"));
    assert!(reports[0].ranges.len() > 1, "{:?}", reports[0]);
    assert!(process::running(&cluster.copies("claimed")).is_empty());
}

/// Units that cannot be used, in words; the rest is not disturbed.
fn refusals(cluster: &Cluster, devices: &Devices) {
    let claim = devices.claim("claimed.raw");
    let (pools, image) = (pools(&devices.dir), cluster.image());
    let guest = |name, number, pool| Guest::new(name, number).pool(pool);
    let twice = guest("twice", 6, "strict");
    let text = manifest(&[twice], &image, &pools).replace("twice.raw", "unit.raw");
    let refused = cluster.apply_text(&text).unwrap_err();
    assert!(refused.contains("is used by `unit` already"), "{refused}");

    let bad = [
        guest("missing", 7, "fc"),
        guest("small", 8, "fc"),
        guest("claimed", 9, "fc"),
        guest("reserved", 10, "strict"),
    ];
    cluster.apply_text(&manifest(&bad, &image, &pools)).unwrap();
    for (vm, words) in [
        ("missing", ["missing.raw", "is not in pool `fc`"]),
        ("small", ["8388608 bytes", "enlarge it at the SAN"]),
        ("claimed", ["claimed.raw", "this host uses"]),
        ("reserved", ["reserved.raw", "reservations"]),
    ] {
        let said = cluster.wait(&format!("the reason why {vm} does not run"), LONG, |view| {
            let found = find_vm(view, vm)?;
            let text = format!(
                "{} {}",
                found.why,
                found.problem.clone().unwrap_or_default()
            );
            let tells = words.iter().all(|word| text.contains(word));
            tells.then_some(text).ok_or_else(|| format!("{found:?}"))
        });
        cluster.say(&format!("{vm}: {said}"));
    }
    for vm in ["missing", "small", "reserved"] {
        cluster.must(&["delete", "vm", vm]);
    }
    // Nothing else has to be done once the host lets go of it.
    drop(claim);
    cluster.new_copy("claimed", &[], LONG);
    cluster.must(&["delete", "vm", "claimed"]);
}

fn shown(cluster: &Cluster) {
    let shown = cluster.eventually("the pool as every host sees it", LONG, || {
        let view: StorageView = cluster.get(&cluster.desk(), "/api/v1/pools/fc")?;
        let usable = view.hosts.iter().filter(|host| host.usable == Some(true));
        (usable.count() == 3 && view.images.is_some())
            .then_some(view.clone())
            .ok_or_else(|| format!("{view:?}"))
    });
    assert_eq!(shown.fence.proof, None, "{shown:?}");
    let images = shown.images.unwrap();
    let unit = images
        .iter()
        .find(|image| image.image == "unit.raw")
        .unwrap();
    assert_eq!(unit.state, ImageState::Used, "{unit:?}");
    assert_eq!(unit.size, Some(16 << 20));
    assert!(images.iter().any(|image| image.state == ImageState::Unused));
    let page = cluster.must(&["storage", "show", "fc"]);
    for word in [
        "reservations",
        "16 MiB",
        "unit.raw",
        "it proves nothing of a host that is lost",
    ] {
        assert!(page.contains(word), "`{word}` is missing in:\n{page}");
    }
}

/// What such devices cannot do is said.
fn drills(cluster: &Cluster) {
    let refused = cluster.quorate(&["storage", "drill", "fc"]).unwrap_err();
    assert!(refused.contains("`reservations: false`"), "{refused}");
    let failed = cluster.quorate(&["storage", "drill", "strict", "--image", "reserved.raw"]);
    let failed = failed.unwrap_err();
    assert!(failed.contains("reservation"), "{failed}");
    let page = cluster.must(&["storage", "show", "strict"]);
    assert!(page.contains("failed on reserved.raw"), "{page}");
    cluster.say(&format!("a drill: {}", failed.trim().replace('\n', " | ")));
}
