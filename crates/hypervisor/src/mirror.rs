//! Words about copies of disks on other hosts.

use crate::migration::TlsMaterial;
use std::net::SocketAddr;

/// Where a copy is written to: the export of another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorTarget {
    /// Its server.
    pub address: SocketAddr,
    /// Name of the export.
    pub export: String,
    /// Certificates, and the name of the other host; absent: not encrypted.
    pub tls: Option<TlsMaterial>,
}

/// A mirror of a disk, as the hypervisor sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorStatus {
    /// Number of the disk.
    pub disk: usize,
    /// What the caller named it by.
    pub tag: String,
    /// Every write of the guest reaches the copy before the guest is told that it is done.
    pub in_step: bool,
    /// Bytes that were copied or mirrored.
    pub done: u64,
    /// Bytes that are to be, so far: above `done` while a write is under way.
    pub total: u64,
    /// It will not go on by itself.
    pub problem: Option<String>,
}
