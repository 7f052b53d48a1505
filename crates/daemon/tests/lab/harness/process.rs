//! QEMU processes as the kernel shows them: who runs where, since when, and whether its CPUs run.
//!
//! Always holds: nothing here asks Quorate, so what it says about itself can be held against it.
//! Times are CLOCK_BOOTTIME, as `/proc/PID/stat` and the lab's history count them.

use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

/// `/proc` counts in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);
/// A guest that writes 50 records a second wakes its CPUs far more often than this in [`LOOK`].
const WAKES: u64 = 3;
const LOOK: Duration = Duration::from_millis(250);

/// Time since the machine booted.
pub(crate) fn boottime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(
        now.tv_sec.unsigned_abs(),
        u32::try_from(now.tv_nsec).unwrap(),
    )
}

/// A QEMU process of a guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Copy {
    /// The lab host whose network namespace it is in.
    pub(crate) host: String,
    pub(crate) pid: i32,
    /// When the process began, since the machine's boot; exact to 10 ms, never later than it was.
    pub(crate) started: Duration,
}

/// Inode of a namespace.
pub(crate) fn namespace(path: &str) -> Option<u64> {
    Some(std::fs::metadata(path).ok()?.ino())
}

fn arguments(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

/// Fields of `/proc/PID/stat` from the state on; `None` for zombies.
fn stat(path: &str) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(path).ok()?;
    let rest = text.get(text.rfind(')')? + 2..)?;
    let fields: Vec<String> = rest.split_ascii_whitespace().map(str::to_owned).collect();
    (!matches!(fields.first()?.as_str(), "Z" | "X")).then_some(fields)
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Every process of a lab host: `(pid, arguments)`.
pub(crate) fn in_namespace(inode: u64) -> Vec<(i32, Vec<String>)> {
    pids()
        .filter(|pid| namespace(&format!("/proc/{pid}/ns/net")) == Some(inode))
        .filter(|pid| stat(&format!("/proc/{pid}/stat")).is_some())
        .map(|pid| (pid, arguments(pid)))
        .collect()
}

/// All copies of a guest on these hosts (`host`, inode of its network namespace), whatever they do.
pub(crate) fn copies(hosts: &BTreeMap<String, u64>, vm: &str) -> Vec<Copy> {
    let mut found = Vec::new();
    let wanted = format!("guest={vm},");
    for pid in pids() {
        let Ok(name) = std::fs::read_to_string(format!("/proc/{pid}/comm")) else {
            continue;
        };
        if !name.starts_with("qemu-system") {
            continue;
        }
        let words = arguments(pid);
        let named = words
            .windows(2)
            .any(|pair| pair[0] == "-name" && pair[1].starts_with(&wanted));
        let Some(fields) = stat(&format!("/proc/{pid}/stat")).filter(|_| named) else {
            continue;
        };
        let Some(inode) = namespace(&format!("/proc/{pid}/ns/net")) else {
            continue;
        };
        let Some((host, _)) = hosts.iter().find(|(_, other)| **other == inode) else {
            continue;
        };
        found.push(Copy {
            host: host.clone(),
            pid,
            started: TICK * fields[19].parse::<u32>().unwrap(),
        });
    }
    found.sort();
    found
}

/// Context switches of the threads that execute guest code.
fn switches(pid: i32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut sum = 0;
    for thread in threads.into_iter().flatten().flatten() {
        let path = thread.path();
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        if !name.starts_with("CPU ") {
            continue;
        }
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        sum += status
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.split_ascii_whitespace().last()?.parse::<u64>().ok())
            .sum::<u64>();
    }
    sum
}

/// Those of the copies whose virtual CPUs run: a paused guest's threads sleep without waking.
pub(crate) fn running(copies: &[Copy]) -> Vec<Copy> {
    let before: Vec<u64> = copies.iter().map(|copy| switches(copy.pid)).collect();
    quorate_lab::wait::pause(LOOK);
    copies
        .iter()
        .zip(before)
        .filter(|(copy, before)| switches(copy.pid).saturating_sub(*before) >= WAKES)
        .map(|(copy, _)| copy.clone())
        .collect()
}

/// Whether this very process still exists.
pub(crate) fn alive(copy: &Copy) -> bool {
    stat(&format!("/proc/{}/stat", copy.pid))
        .is_some_and(|fields| TICK * fields[19].parse::<u32>().unwrap_or(0) == copy.started)
}

/// A line of `/proc/PID/status` that counts memory, in KiB.
pub(crate) fn status_kib(pid: i32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// SIGKILL to one guest's process.
pub(crate) fn kill(copy: &Copy) {
    kill_pid(copy.pid);
}

pub(crate) fn kill_pid(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
