//! Words about copies of disks on other hosts.

use crate::migration::TlsMaterial;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where a copy is written to: the export of another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorTarget {
    /// Its server.
    pub address: SocketAddr,
    /// Name of the export.
    pub export: String,
    /// Certificates, and the name of the other host; absent: not encrypted.
    pub tls: Option<TlsMaterial>,
    /// The `qemu-storage-daemon` that relays to it.
    pub program: PathBuf,
}

/// A mirror of a disk, as the hypervisor sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorStatus {
    /// Number of the disk.
    pub disk: usize,
    /// What the caller named it by.
    pub tag: String,
    /// The copy has everything, and every write of the guest reaches it before the guest is told that it is done.
    pub in_step: bool,
    /// Bytes that were copied or mirrored.
    pub done: u64,
    /// Bytes that are to be, so far: above `done` while a write is under way.
    pub total: u64,
    /// It will not go on by itself.
    pub problem: Option<String>,
    /// What the copy lacked is brought up to it from a write map; absent: the whole disk is copied.
    pub resync: Option<Resync>,
}

/// How far a copy is that gets only what it lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resync {
    /// Bytes that were copied.
    pub done: u64,
    /// Bytes that it lacked.
    pub total: u64,
    /// All is copied and no write is under way: [`crate::Vm::finish_resync`] is due.
    pub due: bool,
}

/// Where a disk was written to since the map was begun, in chunks of 64 KiB. QEMU keeps it as long as it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteMap {
    /// What the caller named it by.
    pub tag: String,
    /// Later ones have higher numbers.
    pub number: u32,
    /// So much was written to.
    pub bytes: u64,
}
