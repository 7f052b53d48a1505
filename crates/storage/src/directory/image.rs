//! Images: what a file is, and the calls of `qemu-img`.
//!
//! The format of an image is what its manifest says, never what its bytes suggest: a
//! guest can write a header of another format into its own raw disk. Bytes that disagree
//! with the manifest are an error.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use crate::{DiskFormat, PoolError};

/// Most of the output of `qemu-img` that is read, in bytes.
const OUTPUT_MAX: u64 = 256 * 1024;
/// Most of its complaint that is shown, in bytes.
const DETAIL_MAX: usize = 400;

/// What the file itself says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileFacts {
    pub(super) length_bytes: u64,
    pub(super) actual_bytes: u64,
}

/// Looks at an existing file and checks that its bytes fit the declared format.
pub(super) fn inspect(
    pool: &str,
    image: &str,
    path: &Path,
    declared: DiskFormat,
) -> Result<FileFacts, PoolError> {
    let failed = |error| PoolError::io(pool, path, "reading an image", error);
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(PoolError::NotAFile {
            pool: pool.to_owned(),
            image: image.to_owned(),
        });
    }
    let mut head = [0; 8];
    let mut file = File::open(path).map_err(failed)?;
    match file.read_exact(&mut head) {
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(failed(error)),
        _ => {}
    }
    let found = format_of(&head);
    if found.unwrap_or("raw") != declared.as_str() {
        return Err(PoolError::WrongFormat {
            image: image.to_owned(),
            declared,
            found: found.unwrap_or("raw").to_owned(),
        });
    }
    Ok(FileFacts {
        length_bytes: metadata.len(),
        actual_bytes: metadata.blocks() * 512,
    })
}

/// Format and size of an image as its first bytes tell them (qcow2 has its size at byte 24).
pub(super) fn look(
    pool: &str,
    image: &str,
    path: &Path,
) -> Result<(DiskFormat, Option<u64>), PoolError> {
    let failed = |error| PoolError::io(pool, path, "reading an image", error);
    let mut head = [0; 32];
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut first = [0; 8];
    if length >= 32 {
        file.read_exact(&mut head).map_err(failed)?;
        first.copy_from_slice(&head[..8]);
    }
    match format_of(&first) {
        None => Ok((DiskFormat::Raw, Some(length))),
        Some("qcow2") => {
            let size = head[24..32].try_into().map(u64::from_be_bytes).ok();
            Ok((DiskFormat::Qcow2, size))
        }
        Some(found) => Err(PoolError::WrongFormat {
            image: image.to_owned(),
            declared: DiskFormat::Raw,
            found: found.to_owned(),
        }),
    }
}

/// The format whose magic number the file begins with; plain bytes have none.
fn format_of(head: &[u8; 8]) -> Option<&'static str> {
    match head {
        [b'Q', b'F', b'I', 0xfb, ..] => Some("qcow2"),
        [b'Q', b'E', b'D', 0, ..] => Some("qed"),
        [b'K', b'D', b'M', b'V', ..] => Some("vmdk"),
        b"vhdxfile" => Some("vhdx"),
        b"conectix" => Some("vpc"),
        _ => None,
    }
}

/// Locks an image that no QEMU uses; `None` when one does. QEMU locks single bytes of an
/// image, so a lock on the whole file excludes it in both directions.
///
/// The lock belongs to the process and ends when any handle on the file is closed: keep the
/// returned one, and open no other.
pub(super) fn lock_unused(pool: &str, path: &Path) -> Result<Option<File>, PoolError> {
    let failed = |error| PoolError::io(pool, path, "locking an image", error);
    let options = OpenOptions::new().read(true).write(true).open(path);
    let file = options.map_err(failed)?;
    match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(None),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// What `qemu-img info` reports, as far as it is used.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    #[serde(rename = "virtual-size")]
    pub(super) virtual_bytes: u64,
    #[serde(rename = "actual-size", default)]
    pub(super) actual_bytes: u64,
    #[serde(rename = "full-backing-filename")]
    full_backing: Option<String>,
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
    #[serde(rename = "backing-filename-format")]
    backing_format: Option<String>,
    #[serde(rename = "format-specific")]
    specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    data: Option<SpecificData>,
}

#[derive(Debug, Deserialize)]
struct SpecificData {
    #[serde(rename = "data-file")]
    data_file: Option<String>,
}

impl Info {
    /// Other files the image consists of.
    pub(super) fn other_files(&self) -> impl Iterator<Item = &str> {
        let data = self
            .specific
            .as_ref()
            .and_then(|specific| specific.data.as_ref());
        let data_file = data.and_then(|data| data.data_file.as_deref());
        self.backing().into_iter().chain(data_file)
    }

    /// The format that it says the other one has.
    pub(super) fn backing_format(&self) -> Option<&str> {
        self.backing_format.as_deref()
    }

    /// The image it is based on.
    pub(super) fn backing(&self) -> Option<&str> {
        self.full_backing.as_deref().or(self.backing.as_deref())
    }
}

/// One use of `qemu-img` on one image.
#[derive(Debug)]
pub(super) struct QemuImg<'a> {
    pub(super) program: &'a Path,
    pub(super) pool: &'a str,
    pub(super) image: &'a str,
    pub(super) format: DiskFormat,
    pub(super) deadline: Duration,
}

impl QemuImg<'_> {
    /// Reads the facts about an image, also while a guest writes to it.
    pub(super) async fn info(&self, path: &Path) -> Result<Info, PoolError> {
        let args = ["info", "--output=json", "-U", "-f", self.format.as_str()];
        let output = self.run("info", &args, path, None).await?;
        serde_json::from_slice(&output).map_err(|error| PoolError::QemuImg {
            image: self.image.to_owned(),
            operation: "info",
            detail: format!("its answer cannot be read: {error}"),
        })
    }

    /// Makes an image at a temporary path that nothing else uses.
    pub(super) async fn create(&self, part: &Path, size_bytes: u64) -> Result<(), PoolError> {
        let args = ["create", "-q", "-f", self.format.as_str()];
        self.run("create", &args, part, Some(size_bytes)).await?;
        Ok(())
    }

    /// Enlarges an image; QEMU's locks keep it from doing so under a running guest.
    pub(super) async fn resize(&self, path: &Path, size_bytes: u64) -> Result<(), PoolError> {
        let args = ["resize", "-q", "-f", self.format.as_str()];
        self.run("resize", &args, path, Some(size_bytes)).await?;
        Ok(())
    }

    async fn run(
        &self,
        operation: &'static str,
        args: &[&str],
        path: &Path,
        size_bytes: Option<u64>,
    ) -> Result<Vec<u8>, PoolError> {
        let mut command = Command::new(self.program);
        command.args(args).arg(path);
        command.args(size_bytes.map(|size| size.to_string()));
        command.env("LC_ALL", "C");
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true);
        let child = command
            .spawn()
            .map_err(|source| PoolError::NoQemuImg { source })?;
        // Dropped at the deadline, the child is killed; one that hangs in the kernel is
        // reaped whenever it comes back.
        let (success, stdout, stderr) = tokio::time::timeout(self.deadline, finish(child))
            .await
            .map_err(|_| PoolError::Unresponsive {
                pool: self.pool.to_owned(),
                operation: "qemu-img",
                deadline_ms: self.deadline.as_millis() as u64,
            })?
            .map_err(|source| PoolError::NoQemuImg { source })?;
        if success {
            return Ok(stdout);
        }
        Err(self.complaint(operation, path, &String::from_utf8_lossy(&stderr)))
    }

    /// Turns what `qemu-img` wrote into the error it means.
    fn complaint(&self, operation: &'static str, path: &Path, text: &str) -> PoolError {
        let pool = self.pool.to_owned();
        let image = self.image.to_owned();
        if text.contains("No space left on device") || text.contains("Disk quota exceeded") {
            PoolError::Full {
                pool,
                operation: "qemu-img",
            }
        } else if text.contains("Read-only file system") {
            PoolError::ReadOnly {
                pool,
                path: path.to_owned(),
            }
        } else if text.contains("Permission denied") {
            PoolError::Permission {
                pool,
                path: path.to_owned(),
            }
        } else if text.contains("lock") && text.contains("another process") {
            PoolError::ImageInUse { image }
        } else if text.contains("No such file or directory") {
            PoolError::ImageMissing { pool, image }
        } else {
            PoolError::QemuImg {
                image,
                operation,
                detail: shorten(text),
            }
        }
    }
}

/// Reads what the child writes, up to a limit, and waits for its end.
async fn finish(mut child: Child) -> std::io::Result<(bool, Vec<u8>, Vec<u8>)> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read = async |source: Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>>| {
        let mut text = Vec::new();
        if let Some(source) = source {
            source.take(OUTPUT_MAX).read_to_end(&mut text).await?;
        }
        std::io::Result::Ok(text)
    };
    let (stdout, stderr) = tokio::try_join!(
        read(stdout.map(|s| Box::new(s) as _)),
        read(stderr.map(|s| Box::new(s) as _)),
    )?;
    Ok((child.wait().await?.success(), stdout, stderr))
}

fn shorten(text: &str) -> String {
    let line = text.trim().replace('\n', "; ");
    match line.char_indices().find(|(at, _)| *at >= DETAIL_MAX) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}

/// The path of another file an image names, relative to the image's folder.
pub(super) fn beside(image: &Path, other: &str) -> PathBuf {
    image.parent().unwrap_or(Path::new("/")).join(other)
}
