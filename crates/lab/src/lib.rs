//! The lab: a whole site on one machine, for playing, for the demo and for the end-to-end tests.
//!
//! Owns: namespaces, bridges and faults of a site; one supervisor process per host; tools that run
//! beside the guests. Always holds: what a lab makes carries the site's name, and [`Lab::down`]
//! finds and removes all of it, also after a crash; packets never leave the lab's namespaces. Must
//! not: know how the daemon works inside. It drives `quorate` as a user would, by its command line.
//! Why: promises about dead hosts and cut cables can only be believed when hosts die and cables
//! are cut, with the real daemon, real QEMU and a real kernel bridge.
//!
//! ```text
//!   namespace qr-h1            qr-h2 ...                 qr-client
//!   br-lan 10.77.0.1           10.77.0.2                 lan0 10.77.0.250
//!     |- taps of guests (10.77.0.11 and up)                |
//!     `- lan0 ----- bridge sw-lan ------------------------'
//!   mgmt0 10.78.0.1 -- bridge sw-mgmt (both in qr-switch)  mgmt0 10.78.0.250
//! ```
//! Cluster traffic runs on `mgmt`, guests on `lan`; a lab with a SAN has a third network, see [`san`]. Faults are
//! nftables rules between the switch's ports. Frames leave every end of a `lan` cable with whole checksums and
//! unbatched, as from a network card, and ports take what an eBPF program sends back: see [`net`]. A second site at the same time is called `qr-SITE-h1` and so on.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cgroup;
pub mod cli;
pub mod cluster;
pub mod demo;
mod error;
pub mod faults;
pub mod fence_agent;
pub mod guest;
mod interrupt;
mod lab;
mod net;
mod process;
pub mod san;
mod severed;
pub mod site;
pub mod supervisor;
mod switch;
pub mod tools;
pub mod wait;

pub use error::LabError;
pub use faults::{Cut, Link};
pub use interrupt::on_interrupt;
pub use lab::{Lab, LabGuard, LabStatus};
pub use san::{Lun, San};
pub use severed::Severed;
pub use site::{Networks, Site, SiteSpec};
pub use switch::SwitchSettings;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, LabError>;
