//! The host agent.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod guard;
