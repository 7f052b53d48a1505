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

/// Most of each output stream of a fence agent that is kept, in bytes. More is read and thrown away, so that
/// an agent that writes a lot does not wait for a reader.
pub(crate) const KEPT_MAX: usize = 64 * 1024;

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
    /// What it wrote to its standard output, secrets masked.
    pub(crate) stdout: String,
    /// That is all it wrote: its output was read to the end, and there was room for it. What is missing in an output that is
    /// not complete may be in what was not read.
    pub(crate) complete: bool,
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
    kept_max: usize,
    deadline: Instant,
) -> io::Result<Run> {
    let mut child = spawn(program, arguments)?;
    let mut group = Group {
        leader: child.id().and_then(|id| Pid::from_raw(id.cast_signed())),
    };
    let (mut out, mut err) = (Kept::new(kept_max), Kept::new(KEPT_MAX.min(kept_max)));
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
    let masked_out = out.masked(secrets);
    let shown = tail(&format!("{}\n{masked_out}", err.masked(secrets)));
    Ok(Run {
        code,
        timed_out,
        stdout: masked_out,
        complete: out.ended && !out.cut,
        shown,
    })
}

/// Writes the input, reads the output and waits for the end, all at once.
async fn converse(
    child: &mut Child,
    input: &str,
    out: &mut Kept,
    err: &mut Kept,
) -> io::Result<ExitStatus> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let streams = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // An agent that does not read its parameters says so by its exit code.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        tokio::join!(write, out.read(stdout), err.read(stderr));
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

/// The beginning of a stream.
struct Kept {
    bytes: Vec<u8>,
    max: usize,
    /// There was more than is kept.
    cut: bool,
    /// It was read to its end.
    ended: bool,
}

impl Kept {
    const fn new(max: usize) -> Self {
        Self {
            bytes: Vec::new(),
            max,
            cut: false,
            ended: false,
        }
    }

    /// Reads to the end and keeps the beginning.
    async fn read(&mut self, source: Option<impl AsyncRead + Unpin>) {
        let Some(mut source) = source else { return };
        let mut buffer = vec![0; 8192];
        loop {
            match source.read(&mut buffer).await {
                Ok(0) => break self.ended = true,
                Ok(len) => self.add(&buffer[..len]),
                Err(_) => break,
            }
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        let room = self.max.saturating_sub(self.bytes.len());
        self.cut |= bytes.len() > room;
        self.bytes
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// The text without the secrets, also where the kept part ends within one.
    fn masked(&self, secrets: &[&str]) -> String {
        let mut text = String::from_utf8_lossy(&self.bytes).into_owned();
        for secret in secrets {
            text = text.replace(secret, "***");
        }
        if self.bytes.len() >= self.max {
            let longest = secrets.iter().map(|secret| secret.len()).max().unwrap_or(0);
            let mut end = text.len().saturating_sub(longest);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
        }
        text
    }
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
        let mask = |text: &[u8]| {
            let mut kept = Kept::new(KEPT_MAX);
            kept.add(text);
            kept.masked(&["hunter2"])
        };
        assert_eq!(
            mask(b"login admin:hunter2 failed"),
            "login admin:*** failed"
        );
        let mut long = vec![b'x'; KEPT_MAX - 4];
        long.extend_from_slice(b"hunt");
        assert!(!mask(&long).contains("hunt"));
        assert_eq!(mask(b"\xff\xfe"), "\u{fffd}\u{fffd}");
    }

    #[tokio::test]
    async fn an_output_that_was_not_read_to_its_end_is_not_complete() {
        let deadline = Instant::now() + Duration::from_secs(60);
        let run = async |script: &str, kept_max: usize| {
            let words = ["-c".to_owned(), script.to_owned()];
            let done = run(
                Path::new("/bin/sh"),
                &words,
                String::new(),
                &[],
                kept_max,
                deadline,
            );
            done.await.unwrap()
        };
        let whole = run("echo 1234567", 8).await;
        assert!(whole.complete);
        let cut = run("echo 12345678", 8).await;
        assert_eq!((cut.code, cut.complete), (Some(0), false));
        // Somebody who was left behind holds it open.
        let held = run("echo one; sleep 600 &", 1024).await;
        assert_eq!((held.code, held.complete), (Some(0), false));
        assert_eq!(held.stdout, "one\n");
    }

    #[test]
    fn the_shown_part_is_one_short_line() {
        assert_eq!(tail("  a\n\nb \x1b[0m\n"), "a b [0m");
        let long = tail(&"é".repeat(5000));
        assert!(long.len() < SHOWN_MAX + 8 && long.starts_with("..."));
    }
}
