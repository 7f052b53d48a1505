//! Disks of a guest: where their bytes are.
//!
//! Always holds: a secret is not part of what is stored or printed: [`Password`] serialises as nothing, so a
//! record that was read back has none (QEMU keeps its own copy for reconnections). A source that a record of an
//! earlier version names by `path` alone is a file.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Layout of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The bytes of the disk, nothing else.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl DiskFormat {
    /// The name QEMU knows it by.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where the bytes of a disk are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DiskSource {
    /// An image file.
    #[serde(rename = "path")]
    File(PathBuf),
    /// A block device of the host.
    #[serde(rename = "device")]
    HostDevice(PathBuf),
    /// A logical unit, opened by QEMU's own initiator.
    #[serde(rename = "iscsi")]
    Iscsi(IscsiDisk),
    /// An image of Ceph, opened by QEMU's own client.
    #[serde(rename = "rbd")]
    Rbd(RbdDisk),
}

impl DiskSource {
    /// The path on this host, where there is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::HostDevice(path) => Some(path),
            Self::Iscsi(_) | Self::Rbd(_) => None,
        }
    }
}

impl fmt::Display for DiskSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) | Self::HostDevice(path) => write!(f, "{}", path.display()),
            Self::Iscsi(disk) => write!(f, "iscsi://{}/{}/{}", disk.portal, disk.target, disk.lun),
            Self::Rbd(disk) => write!(f, "rbd:{}/{}", disk.pool, disk.image),
        }
    }
}

/// A logical unit of an iSCSI target.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IscsiDisk {
    /// `address:port`.
    pub portal: String,
    /// Name of the target.
    pub target: String,
    /// Number of the unit.
    pub lun: u32,
    /// Name by which this host logs in.
    pub initiator: String,
    /// Account, where the target asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Its password; never stored.
    #[serde(skip)]
    pub password: Option<Password>,
}

/// An image of Ceph.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RbdDisk {
    /// Ceph's pool.
    pub pool: String,
    /// The image in it.
    pub image: String,
    /// Ceph's configuration on this host.
    pub conf: String,
    /// User, without `client.`.
    pub user: String,
    /// Its key in base 64; never stored. Absent: the keyring has it.
    #[serde(skip)]
    pub key: Option<Password>,
}

/// A password on its way to QEMU.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Password(pub String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One virtual disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Name of the disk, unique in the guest; events report it.
    pub id: String,
    /// Where its bytes are.
    #[serde(flatten)]
    pub source: DiskSource,
    /// Layout of the image.
    pub format: DiskFormat,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number the guest sees, at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Bypass the host's page cache; `None` lets the driver ask the file system before the start.
    #[serde(default)]
    pub direct: Option<bool>,
}

impl DiskConfig {
    /// A writable disk in a file.
    #[must_use]
    pub fn file(id: &str, path: impl Into<PathBuf>, format: DiskFormat) -> Self {
        Self {
            id: id.to_owned(),
            source: DiskSource::File(path.into()),
            format,
            read_only: false,
            serial: None,
            direct: None,
        }
    }

    /// The password that QEMU needs to open it.
    #[must_use]
    pub fn password(&self) -> Option<&Password> {
        match &self.source {
            DiskSource::Iscsi(disk) => disk.password.as_ref(),
            DiskSource::Rbd(disk) => disk.key.as_ref(),
            _ => None,
        }
    }

    /// Checks what QEMU would refuse late or with an unclear message.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.serial.as_ref().is_some_and(|serial| serial.len() > 20) {
            return Err(format!(
                "the serial of disk '{}' is longer than 20 bytes",
                self.id
            ));
        }
        match &self.source {
            DiskSource::File(path) | DiskSource::HostDevice(path) if path.to_str().is_none() => {
                Err(format!("the path of disk '{}' is not UTF-8", self.id))
            }
            DiskSource::Iscsi(disk) if disk.user.is_some() && disk.password.is_none() => Err(
                format!("disk '{}' has an iSCSI user without a password", self.id),
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_an_earlier_version_is_a_file() {
        let text = r#"{"id":"disk0","path":"/p/a.raw","format":"raw","read_only":false,"serial":null,"direct":true}"#;
        let disk: DiskConfig = serde_json::from_str(text).unwrap();
        assert_eq!(disk.source, DiskSource::File("/p/a.raw".into()));
        assert_eq!(serde_json::to_string(&disk).unwrap(), text);
    }

    #[test]
    fn a_password_is_neither_stored_nor_printed() {
        let source = DiskSource::Iscsi(IscsiDisk {
            portal: "10.0.0.5:3260".into(),
            target: "iqn.2026-01.com.example:db".into(),
            lun: 1,
            initiator: "iqn.2026-01.com.example:h1".into(),
            user: Some("quorate".into()),
            password: Some(Password("hush".into())),
        });
        let disk = DiskConfig {
            source,
            ..DiskConfig::file("disk0", "/", DiskFormat::Raw)
        };
        assert!(disk.validate().is_ok());
        let text = serde_json::to_string(&disk).unwrap();
        assert!(!text.contains("hush") && !format!("{disk:?}").contains("hush"));
        let back: DiskConfig = serde_json::from_str(&text).unwrap();
        assert!(back.password().is_none());
        assert!(back.validate().unwrap_err().contains("without a password"));
    }
}
