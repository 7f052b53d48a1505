//! One run of an agent: parameters in, exit code and bounded output out.
//!
//! Always holds: when a run is over, by its end, by the deadline or because the caller lost
//! interest, nothing that the agent started in its process group is left; what is returned has
//! no secret in it.

use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout, timeout_at};

/// Most of each output stream that is kept, in bytes. More is read and thrown away, so that
/// an agent that writes a lot does not wait for a reader.
const KEPT_MAX: usize = 64 * 1024;

/// Most of the output that an error shows, in bytes: the end, where complaints are.
const SHOWN_MAX: usize = 1024;

/// How long to wait for the streams of an agent that has ended, or for one that was killed.
const GRACE: Duration = Duration::from_millis(500);

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Run {
    /// The exit code; `None` when a signal ended the agent or it ran out of time.
    pub(crate) code: Option<i32>,
    /// Whether it was killed at the deadline.
    pub(crate) timed_out: bool,
    /// What it wrote to its standard output, at most 64 KiB, secrets masked.
    pub(crate) stdout: String,
    /// The end of everything it wrote, for an error: secrets masked.
    pub(crate) shown: String,
}

/// Kills the group when the run is given up half-way.
struct Group {
    leader: Option<Pid>,
}

impl Group {
    fn kill(&mut self) {
        if let Some(leader) = self.leader.take() {
            // The group may be gone already, which is what is wanted.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs the agent with the text on its standard input.
pub(crate) async fn run(
    program: &Path,
    arguments: &[String],
    input: String,
    secrets: &[&str],
    deadline: Instant,
) -> io::Result<Run> {
    let mut child = spawn(program, arguments)?;
    let mut group = Group {
        leader: child.id().and_then(|id| Pid::from_raw(id.cast_signed())),
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let talk = converse(&mut child, &input, &mut out, &mut err);
    let mut ended = timeout_at(deadline, talk).await.ok();
    let timed_out = ended.is_none();
    // Anything still in the group was left behind. Its number cannot have been given to
    // another group while it has members, and without members nothing is hit.
    group.kill();
    if ended.is_none() {
        ended = timeout(GRACE, child.wait()).await.ok();
    }
    let code = match ended {
        Some(Ok(status)) if !timed_out => status.code(),
        _ => None,
    };
    let masked_out = mask(&out, secrets);
    let shown = tail(&format!("{}\n{masked_out}", mask(&err, secrets)));
    Ok(Run {
        code,
        timed_out,
        stdout: masked_out,
        shown,
    })
}

/// Writes the input, reads the output and waits for the end, all at once.
async fn converse(
    child: &mut Child,
    input: &str,
    out: &mut Vec<u8>,
    err: &mut Vec<u8>,
) -> io::Result<ExitStatus> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let streams = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // An agent that does not read its parameters says so by its exit code.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        tokio::join!(write, keep(stdout, out), keep(stderr, err));
    };
    let mut streams = std::pin::pin!(streams);
    // The streams end with the last process that holds them, which may be one that the
    // agent left behind: its own end decides.
    tokio::select! {
        () = &mut streams => child.wait().await,
        status = child.wait() => {
            let _ = timeout(GRACE, &mut streams).await;
            status
        }
    }
}

fn spawn(program: &Path, arguments: &[String]) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments);
    command.env_clear().env("LC_ALL", "C");
    for name in ["PATH", "HOME"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.current_dir("/").process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn()
}

/// Reads to the end and keeps the beginning.
async fn keep(source: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut source) = source else { return };
    let mut buffer = vec![0; 8192];
    while let Ok(len @ 1..) = source.read(&mut buffer).await {
        let room = KEPT_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..len.min(room)]);
    }
}

/// The text without the secrets, also where the kept part ends within one.
fn mask(kept: &[u8], secrets: &[&str]) -> String {
    let mut text = String::from_utf8_lossy(kept).into_owned();
    for secret in secrets {
        text = text.replace(secret, "***");
    }
    if kept.len() >= KEPT_MAX {
        let longest = secrets.iter().map(|secret| secret.len()).max().unwrap_or(0);
        let mut end = text.len().saturating_sub(longest);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

/// The last part of a text, on one line.
fn tail(text: &str) -> String {
    let line: Vec<&str> = text.split_whitespace().collect();
    let line = line.join(" ");
    let mut start = line.len().saturating_sub(SHOWN_MAX);
    while !line.is_char_boundary(start) {
        start += 1;
    }
    let line: String = line[start..].chars().filter(|c| !c.is_control()).collect();
    if start > 0 {
        format!("...{line}")
    } else {
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_also_where_the_output_is_cut() {
        assert_eq!(
            mask(b"login admin:hunter2 failed", &["hunter2"]),
            "login admin:*** failed"
        );
        let mut long = vec![b'x'; KEPT_MAX - 4];
        long.extend_from_slice(b"hunt");
        assert!(!mask(&long, &["hunter2"]).contains("hunt"));
        assert_eq!(mask(b"\xff\xfe", &[]), "\u{fffd}\u{fffd}");
    }

    #[test]
    fn the_shown_part_is_one_short_line() {
        assert_eq!(tail("  a\n\nb \x1b[0m\n"), "a b [0m");
        let long = tail(&"é".repeat(5000));
        assert!(long.len() < SHOWN_MAX + 8 && long.starts_with("..."));
    }
}
