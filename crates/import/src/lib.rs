//! Reads the configuration of other cluster managers: text in, data out.
//!
//! Owns: what a foreign configuration means in Quorate's terms. Always holds: reading takes time and
//! memory in proportion to the text and never panics; whatever is not understood is reported with its
//! place, never dropped in silence. Must not: read files, clocks or anything but what it is given.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod pacemaker;
mod problem;

pub use problem::{Place, Problem, Problems};
