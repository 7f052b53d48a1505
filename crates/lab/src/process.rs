//! Running programs, and finding processes by the network namespace they are in.
//!
//! Always holds: a process is named by pid *and* start time before it is signalled later, so a
//! reused pid is never hit.

use crate::{LabError, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Held while a child is run and waited for, so that the supervisor's collection of orphans does
/// not take its exit status away.
pub(crate) static CHILDREN: Mutex<()> = Mutex::new(());

/// Runs a program to its end; its output, or an error with what it said.
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Result<String> {
    run_with_input(program, arguments, "")
}

/// The same with something on its standard input.
pub(crate) fn run_with_input<S: AsRef<OsStr>>(
    program: &str,
    arguments: &[S],
    input: &str,
) -> Result<String> {
    run_with_environment(program, arguments, input, &[])
}

/// The same with more environment.
pub(crate) fn run_with_environment<S: AsRef<OsStr>>(
    program: &str,
    arguments: &[S],
    input: &str,
    environment: &[(&str, &OsStr)],
) -> Result<String> {
    let missing = |source| LabError::MissingTool {
        tool: program.to_owned(),
        source,
    };
    let _guard = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut pipe) = child.stdin.take() {
        // A program that ends early says why on its standard error.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(missing)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let words: Vec<_> = arguments
        .iter()
        .map(|word| word.as_ref().to_string_lossy())
        .collect();
    Err(LabError::Command {
        command: format!("{program} {}", words.join(" ")),
        output: match text(&output.stderr) {
            errors if errors.is_empty() => format!("{} {}", output.status, text(&output.stdout)),
            errors => errors,
        },
    })
}

/// What the lab needs to know of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) pid: i32,
    /// Clock ticks since boot.
    pub(crate) started: u64,
    pub(crate) state: char,
    pub(crate) command: Vec<String>,
}

impl Found {
    /// Reads `/proc`; `None` when there is no such process, or it is a zombie.
    pub(crate) fn read(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold spaces and brackets: fields are counted from the last bracket.
        let mut fields = stat.get(stat.rfind(')')? + 2..)?.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let started = fields.nth(18)?.parse().ok()?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        (!matches!(state, 'Z' | 'X')).then_some(Self {
            pid,
            started,
            state,
            command,
        })
    }

    /// Sends a signal, unless the pid is another process by now.
    pub(crate) fn signal(&self, signal: Signal) {
        let same = Self::read(self.pid).is_some_and(|now| now.started == self.started);
        if let (true, Some(pid)) = (same, Pid::from_raw(self.pid)) {
            let _ = kill_process(pid, signal);
        }
    }

    /// One of QEMU's system emulators.
    pub(crate) fn is_qemu(&self) -> bool {
        self.program()
            .is_some_and(|name| name.starts_with("qemu-system"))
    }

    /// `quorate guard`.
    pub(crate) fn is_guard(&self) -> bool {
        self.command
            .iter()
            .skip(1)
            .take(3)
            .any(|word| word == "guard")
    }

    fn program(&self) -> Option<&str> {
        Path::new(self.command.first()?).file_name()?.to_str()
    }
}

/// All processes whose network namespace is `inode`.
pub(crate) fn in_namespace(inode: u64) -> Vec<Found> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| namespace_of(&format!("/proc/{pid}/ns/net")) == Some(inode))
        .filter_map(Found::read)
        .collect()
}

/// Identity of the network namespace that a file stands for.
pub(crate) fn namespace_of(path: &str) -> Option<u64> {
    std::fs::metadata(path).ok().map(|data| data.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_says_why() {
        let error = run("sh", &["-c", "echo no luck >&2; exit 3"]).unwrap_err();
        assert!(error.to_string().ends_with("no luck"), "{error}");
        let error = run("/nonexistent/tool", &[""; 0]).unwrap_err();
        assert!(error.to_string().contains("make deps"), "{error}");
    }

    #[test]
    fn this_process_is_found_in_its_namespace() {
        let inode = namespace_of("/proc/self/ns/net").unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(in_namespace(inode).iter().any(|found| found.pid == me));
        assert!(Found::read(i32::MAX).is_none());
    }
}
