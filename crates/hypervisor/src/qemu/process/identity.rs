//! Which process is it: pid, start time and boot, read from `/proc`.

use std::fs;
use std::io;
use std::path::Path;

use crate::guest::ProcessIdentity;

/// The most processes looked at when searching for one; a host has fewer.
const PROCESSES_MAX: usize = 1 << 20;

/// Identity of the process that has this pid now.
///
/// # Errors
/// `NotFound` when there is none.
pub fn of_pid(pid: i32) -> io::Result<ProcessIdentity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start_ticks = start_ticks(&stat)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be understood")))?;
    Ok(ProcessIdentity {
        pid,
        start_ticks,
        boot_id: boot_id()?,
    })
}

/// Whether exactly this process exists now: alive, a zombie, or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existence {
    /// It lives.
    Alive,
    /// It has ended; its parent has not asked for its status.
    Zombie,
    /// It has ended, or the pid means another process now.
    Gone,
}

/// Looks whether exactly this process exists.
///
/// # Errors
/// When `/proc` cannot be read, so that it is unknown.
pub fn existence(identity: &ProcessIdentity) -> io::Result<Existence> {
    let stat = match fs::read_to_string(format!("/proc/{}/stat", identity.pid)) {
        Ok(stat) => stat,
        Err(error) if is_gone(&error) => return Ok(Existence::Gone),
        Err(error) => return Err(error),
    };
    if start_ticks(&stat) != Some(identity.start_ticks) || boot_id()? != identity.boot_id {
        return Ok(Existence::Gone);
    }
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, fields)| fields.split_whitespace().next());
    Ok(if matches!(state, Some("Z" | "X")) {
        Existence::Zombie
    } else {
        Existence::Alive
    })
}

/// Finds a process by a part of its command line; for one that was started but not yet recorded.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn find_by_argument(part: &str) -> io::Result<Option<ProcessIdentity>> {
    for entry in fs::read_dir("/proc")?.take(PROCESSES_MAX) {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(line) = fs::read(Path::new("/proc").join(format!("{pid}/cmdline"))) else {
            continue; // it has ended meanwhile
        };
        let found = line
            .split(|byte| *byte == 0)
            .any(|argument| argument == part.as_bytes());
        if found {
            match of_pid(pid) {
                Ok(identity) => return Ok(Some(identity)),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(None)
}

fn is_gone(error: &io::Error) -> bool {
    // ESRCH: it ended between open and read.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Field 22. The second field is the name in parentheses and may itself hold spaces and parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reads_the_start_time_behind_any_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 2 3";
        assert_eq!(start_ticks(stat), Some(987_654));
        assert_eq!(start_ticks("42 (x) S 1"), None);
    }

    #[test]
    fn we_exist_and_a_former_holder_of_our_pid_does_not() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut identity = of_pid(pid).unwrap();
        assert_eq!(existence(&identity).unwrap(), Existence::Alive);
        identity.start_ticks += 1;
        assert_eq!(existence(&identity).unwrap(), Existence::Gone);
    }
}
