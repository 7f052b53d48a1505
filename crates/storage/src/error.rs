//! What can go wrong with a pool, in words the operator can act on.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::DiskFormat;
use crate::iscsi::session::IscsiError;

/// A failed pool operation.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The pool's directory does not exist.
    #[error(
        "pool `{pool}`: {} does not exist on this host: mount the storage there, or correct `path`", .path.display()
    )]
    DirectoryMissing {
        /// The pool.
        pool: String,
        /// Its path.
        path: PathBuf,
    },
    /// The storage did not answer in time.
    #[error(
        "pool `{pool}`: {operation} did not finish within {deadline_ms} ms: the storage hangs; check its server and the network to it"
    )]
    Unresponsive {
        /// The pool.
        pool: String,
        /// What was tried.
        operation: &'static str,
        /// The limit in milliseconds.
        deadline_ms: u64,
    },
    /// The file system is mounted read-only.
    #[error(
        "pool `{pool}`: {} is read-only on this host: remount it read-write and look for disk errors in the kernel log", .path.display()
    )]
    ReadOnly {
        /// The pool.
        pool: String,
        /// The file or directory.
        path: PathBuf,
    },
    /// No space, or no quota, is left.
    #[error(
        "pool `{pool}` is full: {operation} needs more space than there is: delete images or enlarge the pool"
    )]
    Full {
        /// The pool.
        pool: String,
        /// What was tried.
        operation: &'static str,
    },
    /// The daemon may not write there.
    #[error(
        "pool `{pool}`: no permission on {}: let the daemon's user write there (NFS: export with no_root_squash)", .path.display()
    )]
    Permission {
        /// The pool.
        pool: String,
        /// The file or directory.
        path: PathBuf,
    },
    /// The directory is no pool.
    #[error(
        "pool `{pool}`: {} has no pool marker: it is being prepared, or is not mounted on this host: check `findmnt`", .path.display()
    )]
    MarkerMissing {
        /// The pool.
        pool: String,
        /// The pool's path.
        path: PathBuf,
    },
    /// The marker cannot be read.
    #[error("pool `{pool}`: the marker {} is damaged ({detail}): restore it from another copy of the storage", .path.display())]
    MarkerDamaged {
        /// The pool.
        pool: String,
        /// The marker's path.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The directory is another cluster's, or another pool of this one.
    #[error(
        "pool `{pool}`: {} belongs to pool `{found_pool}` of cluster {found_cluster}: give another path; if that cluster is gone, delete {}/.quorate-pool",
        .path.display(), .path.display()
    )]
    ForeignMarker {
        /// The pool.
        pool: String,
        /// The pool's path.
        path: PathBuf,
        /// The cluster in the marker.
        found_cluster: String,
        /// The pool in the marker.
        found_pool: String,
    },
    /// The directory is a pool of that name, but not the one the other hosts see.
    #[error(
        "pool `{pool}`: this host sees other storage ({found}) than the rest of the cluster ({expected}): mount the same storage on all hosts"
    )]
    OtherStorage {
        /// The pool.
        pool: String,
        /// The id that the cluster knows.
        expected: String,
        /// The id that is there.
        found: String,
    },
    /// The image's name is not acceptable.
    #[error("`{image}` is not a valid image name: {reason}")]
    BadImageName {
        /// The name.
        image: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The image, or what it is based on, lies outside the pool.
    #[error("image `{image}` leads out of pool `{pool}` to {}: move that file into the pool", .path.display())]
    Escape {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
        /// Where it leads.
        path: PathBuf,
    },
    /// There is no such image.
    #[error(
        "image `{image}` is not in pool `{pool}`: copy it there, correct its name, or let it be created by giving a `size`"
    )]
    ImageMissing {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
    },
    /// An image cannot be made without a size.
    #[error("image `{image}` is not in pool `{pool}` and cannot be created without a `size`")]
    SizeMissing {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
    },
    /// The image is something other than a file.
    #[error("`{image}` in pool `{pool}` is not a file: give the name of an image")]
    NotAFile {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
    },
    /// The image is smaller than the manifest says.
    #[error(
        "image `{image}` has {have_bytes} bytes, the manifest wants {want_bytes}: resize the disk, or lower `size`"
    )]
    ImageTooSmall {
        /// The image.
        image: String,
        /// Its size in bytes, as the guest sees it.
        have_bytes: u64,
        /// The wanted size in bytes.
        want_bytes: u64,
    },
    /// The image has another format than the manifest says.
    #[error(
        "image `{image}` is {found} and not {declared}: set `format: {found}`, or convert it with `qemu-img convert`"
    )]
    WrongFormat {
        /// The image.
        image: String,
        /// The format in the manifest.
        declared: DiskFormat,
        /// The format it seems to have.
        found: String,
    },
    /// Somebody holds QEMU's lock on the image.
    #[error("image `{image}` is in use: stop its VM first")]
    ImageInUse {
        /// The image.
        image: String,
    },
    /// A smaller size would cut data off.
    #[error(
        "image `{image}` has {have_bytes} bytes and cannot shrink to {want_bytes}: data would be lost"
    )]
    WouldShrink {
        /// The image.
        image: String,
        /// Its size in bytes.
        have_bytes: u64,
        /// The wanted size in bytes.
        want_bytes: u64,
    },
    /// The VM's name cannot be part of a file name.
    #[error("`{vm}` cannot name a saved state: use letters, digits, `-`, `_` and `.`")]
    BadVmName {
        /// The name.
        vm: String,
    },
    /// Nothing was saved for that epoch.
    #[error("pool `{pool}` has no saved state of `{vm}` for epoch {epoch}: save it again")]
    StateMissing {
        /// The pool.
        pool: String,
        /// The VM.
        vm: String,
        /// The epoch.
        epoch: u64,
    },
    /// `qemu-img` cannot be run.
    #[error("qemu-img cannot be run ({source}): install the package qemu-utils on this host")]
    NoQemuImg {
        /// What the kernel said.
        source: io::Error,
    },
    /// `qemu-img` failed in a way that has no name here.
    #[error("image `{image}`: qemu-img {operation} failed: {detail}")]
    QemuImg {
        /// The image.
        image: String,
        /// What was tried.
        operation: &'static str,
        /// What it said, shortened.
        detail: String,
    },
    /// Another failure of the storage.
    #[error("pool `{pool}`: {operation} failed on {}: {source}", .path.display())]
    Io {
        /// The pool.
        pool: String,
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The SAN.
    #[error("pool `{pool}`: {source}")]
    Iscsi {
        /// The pool.
        pool: String,
        /// What went wrong.
        source: IscsiError,
    },
    /// Ceph.
    #[error(
        "pool `{pool}`: {operation} failed: {detail}: is `rbd` (package ceph-common) installed, and does Ceph answer?"
    )]
    Ceph {
        /// The pool.
        pool: String,
        /// What was tried.
        operation: &'static str,
        /// What `rbd` said.
        detail: String,
    },
    /// The host's iSCSI initiator.
    #[error("pool `{pool}`: {operation} with this host's iSCSI initiator failed: {detail}")]
    HostInitiator {
        /// The pool.
        pool: String,
        /// What was tried.
        operation: &'static str,
        /// What was seen and what to do.
        detail: String,
    },
    /// An image names no unit.
    #[error("{reason}")]
    BadUnit {
        /// What is wrong with it.
        reason: String,
    },
    /// A password is not known.
    #[error(
        "pool `{pool}` names the secret `{secret}`, which the cluster does not have: run `quorate secret set {secret}`"
    )]
    SecretMissing {
        /// The pool.
        pool: String,
        /// The secret's name.
        secret: String,
    },
    /// A format that needs a file.
    #[error("`{image}` in pool `{pool}` is a whole device: set `format: raw`")]
    RawOnly {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
    },
    /// A unit cannot be enlarged from here.
    #[error(
        "`{image}` in pool `{pool}` has {have_bytes} bytes: enlarge it at the SAN first, then repeat this"
    )]
    GrowAtSan {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
        /// Its size in bytes.
        have_bytes: u64,
    },
    /// The name is taken.
    #[error("pool `{pool}` has an image `{image}` already: give another name, or delete it first")]
    ImageExists {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
    },
    /// Units are made and deleted elsewhere.
    #[error("`{image}` in pool `{pool}` is a unit of the SAN: delete it there")]
    NotOurs {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
    },
    /// The pool has no room for files.
    #[error(
        "pool `{pool}` holds whole disks and no files: {what} needs a pool of the kind `directory`"
    )]
    NoFiles {
        /// The pool.
        pool: String,
        /// What was wanted.
        what: &'static str,
    },
    /// Not a block device.
    #[error("pool `{pool}`: {} is not a block device", .path.display())]
    NotADevice {
        /// The pool.
        pool: String,
        /// What was found there.
        path: PathBuf,
    },
    /// There is no such device on this host.
    #[error(
        "`{image}` is not in pool `{pool}`: this host has no {}: correct the name, or make the SAN show it (`iscsiadm`, zoning, multipath)", .path.display()
    )]
    DeviceMissing {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
        /// Its path.
        path: PathBuf,
    },
    /// The host itself uses the device.
    #[error(
        "`{image}` in pool `{pool}`: this host uses {} itself (a mounted file system, LVM, RAID, or a path of a multipath map): name a unit that nothing else uses, or the map in /dev/mapper", .path.display()
    )]
    DeviceClaimed {
        /// The pool.
        pool: String,
        /// The image.
        image: String,
        /// Its path on this host.
        path: PathBuf,
    },
    /// The directory of device names does not exist.
    #[error("pool `{pool}`: this host has no {}: is the SAN logged in (`iscsiadm`, multipath), is udev running?", .path.display())]
    NoDevices {
        /// The pool.
        pool: String,
        /// The directory.
        path: PathBuf,
    },
    /// The pool does not work here.
    #[error("{problem}")]
    NotUsable {
        /// What is wrong.
        problem: String,
    },
    /// A fake pool was told to fail.
    #[error("fake pool: {operation} was told to fail")]
    Injected {
        /// What was tried.
        operation: &'static str,
    },
}

impl PoolError {
    /// Whether the storage hung until the deadline.
    pub(crate) fn is_unresponsive(&self) -> bool {
        matches!(
            self,
            Self::Unresponsive { .. }
                | Self::Iscsi {
                    source: IscsiError::Timeout { .. },
                    ..
                }
        )
    }

    /// The error for a failed system call, by what the kernel said.
    pub(crate) fn io(
        pool: &str,
        path: &Path,
        operation: &'static str,
        source: impl Into<io::Error>,
    ) -> Self {
        let source = source.into();
        let pool = pool.to_owned();
        let path = path.to_owned();
        match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT) => Self::Full { pool, operation },
            Some(Errno::ROFS) => Self::ReadOnly { pool, path },
            Some(Errno::ACCESS | Errno::PERM) => Self::Permission { pool, path },
            _ => Self::Io {
                pool,
                path,
                operation,
                source,
            },
        }
    }
}
