//! Work on disk images: what comes in, goes out and is copied, in any format that QEMU reads.
//!
//! ```text
//!  POST task --> Jobs: queued -> running -> done | failed | cancelled      (one file for each job, durable)
//!                         |  check: header, qemu-img info / check / map / measure, partition table, room
//!                         |  copy:  source --qemu-nbd--> Copier --qemu-nbd--> part file, or unit of a SAN
//!                         |  verify: read back, SHA-256 equal
//!                         '  publish: the part gets its name in one step
//! ```
//! Owns: jobs with their records, checks of foreign files, the copier, snapshots of images that no guest uses.
//! Always holds:
//! - nothing half made is ever visible: a new image gets its name when it is whole and verified; of a unit the first
//!   bytes, with its partition table, are written last;
//! - what was copied and flushed is recorded, so a copy that was interrupted goes on there;
//! - no file but the one that was named is opened: an image with a backing file, an external data file or extents
//!   elsewhere is refused;
//! - passwords are given to QEMU's tools in files of mode 0600 that are gone when they have been read.
//!
//! Must not: touch an image that a running guest uses; that is the agent's work, by QMP ([`Site::guest_resize`]).
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod copy;
mod error;
mod header;
mod jobs;
mod nbd;
mod place;
mod record;
mod serve;
mod snapshot;
mod tables;
mod tool;
mod work;

pub use check::{Checked, check_file};
pub use error::ImageError;
pub use jobs::{Config, ImageUser, Jobs, Site};
pub use snapshot::list as list_snapshots;
pub use tables::{Content, content, ends_beyond};
