//! An image on a socket, served by `qemu-nbd` for one client.
//!
//! Always holds: the process ends when its client does (`qemu-nbd` without `--persistent`), so a killed daemon leaves
//! none behind that has been connected to.

use crate::error::ImageError;
use crate::nbd::Nbd;
use crate::tool::{Target, shorten};
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;

const TOOL: &str = "qemu-nbd";
const OPEN_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What is to be done with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read it.
    Read,
    /// Read what is on the disk, not in the host's memory, where the file system allows that.
    ReadDisk,
    /// Write it.
    Write,
}

/// A served image: the connection, and the process behind it.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) nbd: Nbd,
    child: tokio::process::Child,
    socket: PathBuf,
    /// Which file the socket was: another job may have put its own under that name since.
    made: Option<(u64, i64, i64)>,
}

/// What tells one file of a name from a later one.
fn identity(path: &Path) -> Option<(u64, i64, i64)> {
    let seen = std::fs::symlink_metadata(path).ok()?;
    Some((seen.ino(), seen.ctime(), seen.ctime_nsec()))
}

impl Served {
    /// Serves an image; `name` is unique in the folder.
    pub(crate) async fn open(
        target: &Target,
        access: Access,
        folder: &Path,
        name: &str,
    ) -> Result<Self, ImageError> {
        match access {
            Access::ReadDisk => {
                match Self::once(target, &["-r", "--cache=none"], folder, name).await {
                    Err(ImageError::Tool { .. }) => Self::once(target, &["-r"], folder, name).await,
                    done => done,
                }
            }
            Access::Read => Self::once(target, &["-r"], folder, name).await,
            Access::Write => {
                let words = ["--cache=writeback", "--discard=unmap"];
                Self::once(target, &words, folder, name).await
            }
        }
    }

    async fn once(
        target: &Target,
        words: &[&str],
        folder: &Path,
        name: &str,
    ) -> Result<Self, ImageError> {
        let socket = folder.join(format!("{name}.sock"));
        // Left over by a crash.
        let _ = std::fs::remove_file(&socket);
        // Kept until the tool has opened the image.
        let (image, _secret) = target.arguments(folder, name)?;
        let mut arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
        arguments.push("--socket".into());
        arguments.push(socket.clone().into());
        arguments.extend(image);
        let mut command = tokio::process::Command::new(TOOL);
        command.args(arguments).env("LC_ALL", "C");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::piped()).kill_on_drop(true);
        let no_tool = |source| ImageError::NoTool { tool: TOOL, source };
        let mut child = command.spawn().map_err(no_tool)?;
        let deadline = Instant::now() + OPEN_WITHIN;
        loop {
            if let Some(_status) = child.try_wait().map_err(no_tool)? {
                let mut text = Vec::new();
                if let Some(pipe) = child.stderr.take() {
                    // What it said is a courtesy.
                    let _ = pipe.take(64 << 10).read_to_end(&mut text).await;
                }
                let detail = shorten(&String::from_utf8_lossy(&text));
                return Err(ImageError::Tool { tool: TOOL, detail });
            }
            let made = identity(&socket);
            if made.is_some()
                && let Ok(nbd) = Nbd::connect(&socket).await
            {
                return Ok(Self {
                    nbd,
                    child,
                    socket,
                    made,
                });
            }
            if Instant::now() >= deadline {
                let detail = format!("the image did not open within {} s", OPEN_WITHIN.as_secs());
                return Err(ImageError::Tool { tool: TOOL, detail });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Closes it, and waits until the process has let the image go.
    pub(crate) async fn close(mut self) {
        let Self { nbd, .. } = &mut self;
        // Written data is durable: the callers flush.
        let _ = nbd.disconnect().await;
        let ended = tokio::time::timeout(OPEN_WITHIN, self.child.wait()).await;
        if ended.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // `qemu-nbd` removes it when it ends in order.
        if self.made.is_some() && identity(&self.socket) == self.made {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_file_of_the_same_name_is_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.sock");
        assert_eq!(identity(&path), None);
        std::fs::write(&path, b"").unwrap();
        let first = identity(&path);
        assert!(first.is_some() && identity(&path) == first);
        // The number may be used again at once; the time of the change tells, as fine as the file system keeps it.
        let deadline = Instant::now() + Duration::from_secs(5);
        while identity(&path) == first {
            assert!(Instant::now() < deadline, "{first:?}");
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, b"").unwrap();
        }
    }
}
