//! Work on disk images: what is asked for, and how it stands.
//!
//! Always holds: an image is named `POOL/IMAGE`; a task says everything that its work needs, so it can be done again
//! after a restart. No secret is part of it.

use crate::{ByteSize, HostName, PoolName, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// An image of a pool, written `POOL/IMAGE`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageRef {
    /// The pool.
    pub pool: PoolName,
    /// Its name in the pool.
    pub image: String,
}

impl FromStr for ImageRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pool, image) = text.split_once('/').unwrap_or((text, ""));
        if image.is_empty() {
            return Err(format!("`{text}` is no image: write `POOL/IMAGE`"));
        }
        Ok(Self {
            pool: PoolName::new(pool).map_err(|error| error.to_string())?,
            image: image.to_owned(),
        })
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.image)
    }
}

impl Serialize for ImageRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ImageRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Layout of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileFormat {
    /// Plain bytes.
    Raw,
    /// QEMU copy-on-write.
    Qcow2,
    /// VMware.
    Vmdk,
    /// Hyper-V, new.
    Vhdx,
    /// VirtualBox.
    Vdi,
    /// Hyper-V, old; Virtual PC.
    Vpc,
}

impl FileFormat {
    /// The name that QEMU knows it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::Vpc => "vpc",
        }
    }
}

impl fmt::Display for FileFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum ImageTask {
    /// A file of the host becomes an image, or fills a unit.
    Import {
        /// Absolute path on the host that is asked.
        file: String,
        /// The new image, or the unit.
        to: ImageRef,
        /// Layout of the new image; absent: raw.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<FileFormat>,
        /// Size of the new disk, if it is to be larger than what is copied.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<ByteSize>,
        /// Overwrite a unit that holds data; take a file whose partitions end beyond it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
        /// Most bytes in a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<ByteSize>,
    },
    /// An image becomes a file of the host.
    Export {
        /// The image.
        from: ImageRef,
        /// Absolute path on the host that is asked.
        file: String,
        /// Layout of the file; absent: raw.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<FileFormat>,
        /// Most bytes in a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<ByteSize>,
    },
    /// A copy.
    Clone {
        /// The image.
        from: ImageRef,
        /// The new image, or the unit.
        to: ImageRef,
        /// Layout of the new image; absent: as the source.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<FileFormat>,
        /// Overwrite a unit that holds data.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
        /// Most bytes in a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<ByteSize>,
    },
    /// More room in it.
    Resize {
        /// The image.
        image: ImageRef,
        /// New size.
        size: ByteSize,
    },
    /// Away with it.
    Delete {
        /// The image.
        image: ImageRef,
    },
    /// Keep its content of this moment under a name.
    SnapshotCreate {
        /// The image.
        image: ImageRef,
        /// Name of the snapshot.
        name: String,
    },
    /// Forget a snapshot.
    SnapshotDelete {
        /// The image.
        image: ImageRef,
        /// Name of the snapshot.
        name: String,
    },
    /// Back to a snapshot.
    SnapshotRevert {
        /// The image.
        image: ImageRef,
        /// Name of the snapshot.
        name: String,
    },
}

impl ImageTask {
    /// The image that is changed or read in the pool.
    pub fn image(&self) -> &ImageRef {
        match self {
            Self::Import { to, .. } | Self::Clone { to, .. } => to,
            Self::Export { from, .. } => from,
            Self::Resize { image, .. }
            | Self::Delete { image }
            | Self::SnapshotCreate { image, .. }
            | Self::SnapshotDelete { image, .. }
            | Self::SnapshotRevert { image, .. } => image,
        }
    }

    /// All images that it names, to be written as the cluster lists them.
    pub fn images_mut(&mut self) -> Vec<&mut ImageRef> {
        match self {
            Self::Clone { from, to, .. } => vec![from, to],
            Self::Import { to, .. } => vec![to],
            Self::Export { from, .. } => vec![from],
            Self::Resize { image, .. }
            | Self::Delete { image }
            | Self::SnapshotCreate { image, .. }
            | Self::SnapshotDelete { image, .. }
            | Self::SnapshotRevert { image, .. } => vec![image],
        }
    }

    /// Whether it copies bytes and so takes long.
    pub fn copies(&self) -> bool {
        matches!(
            self,
            Self::Import { .. } | Self::Export { .. } | Self::Clone { .. }
        )
    }
}

impl fmt::Display for ImageTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Import { file, to, .. } => write!(f, "import {file} to {to}"),
            Self::Export { from, file, .. } => write!(f, "export {from} to {file}"),
            Self::Clone { from, to, .. } => write!(f, "clone {from} to {to}"),
            Self::Resize { image, size } => write!(f, "resize {image} to {size}"),
            Self::Delete { image } => write!(f, "delete {image}"),
            Self::SnapshotCreate { image, name } => write!(f, "snapshot {name} of {image}"),
            Self::SnapshotDelete { image, name } => {
                write!(f, "delete snapshot {name} of {image}")
            }
            Self::SnapshotRevert { image, name } => write!(f, "revert {image} to {name}"),
        }
    }
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for others.
    Queued,
    /// Under way.
    Running,
    /// Done.
    Done,
    /// Not done.
    Failed,
    /// Taken back.
    Cancelled,
}

impl JobState {
    /// Whether nothing more happens.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// A job as anybody may see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageJob {
    /// `HOST-NUMBER`.
    pub id: String,
    /// The host that does it.
    pub host: HostName,
    /// Who asked.
    pub by: String,
    /// What.
    pub task: ImageTask,
    /// How it stands.
    pub state: JobState,
    /// What is being done: `checking`, `copying`, `verifying`.
    #[serde(default)]
    pub phase: String,
    /// Bytes done in this phase.
    #[serde(default)]
    pub done: u64,
    /// Bytes of this phase.
    #[serde(default)]
    pub total: u64,
    /// Bytes in a second, lately.
    #[serde(default)]
    pub per_second: u64,
    /// Bytes that an earlier run had copied already.
    #[serde(default)]
    pub resumed_at: u64,
    /// SHA-256 of what the guest sees, verified, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What else is worth saying.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It failed, and the same request goes on where it stopped.
    #[serde(default)]
    pub resumable: bool,
    /// When it was asked for.
    pub asked: Timestamp,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Timestamp>,
}

/// A snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSnapshot {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_by_pool() {
        let image: ImageRef = "san/db/3".parse().unwrap();
        assert_eq!((image.pool.as_str(), image.image.as_str()), ("san", "db/3"));
        assert_eq!(image.to_string(), "san/db/3");
        for bad in ["san", "san/", "/db", "SAN/db", ""] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tasks_are_strict_and_survive() {
        let text = r#"{"op":"import","file":"/a.vmdk","to":"san/db","limit":"100MiB"}"#;
        let task: ImageTask = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&task).unwrap(), text);
        assert_eq!(task.to_string(), "import /a.vmdk to san/db");
        let bad = r#"{"op":"delete","image":"san/db","sure":true}"#;
        assert!(serde_json::from_str::<ImageTask>(bad).is_err());
    }
}
