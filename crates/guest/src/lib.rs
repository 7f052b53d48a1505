//! What the lab guest and the lab share: the format of the guest's disk log, the guest's kernel
//! command line, and the ports it serves.
//!
//! Owns: formats only. Always holds: what [`log`] writes, [`log`] reads back, on any machine. Must
//! not: open devices, start threads (the init program in `src/init` does). Why a crate of its own:
//! the init program is linked statically and runs as PID 1 of a guest of a few megabytes, so it
//! may not pull in the rest of Quorate; the lab links the same code, so the two cannot drift apart.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod config;
pub mod crc;
pub mod flow;
pub mod log;
pub mod verify;

/// UDP port: every datagram is sent back (the pinger measures blackouts with it).
pub const ECHO_PORT: u16 = 7000;
/// TCP port: the line protocol (`status`, `stream`, `poweroff`, `crash`).
pub const CONTROL_PORT: u16 = 7001;
/// TCP port: records of [`flow`], answered with the guest's identity; the first line names it.
pub const FLOW_PORT: u16 = 7002;
/// TCP port: `GET /` answers 200 and the VM's name; opened only when the guest is ready.
pub const HTTP_PORT: u16 = 80;
/// Start of the line that the guest prints on its serial console when it is ready.
pub const READY_LINE: &str = "QUORATE-GUEST-READY";
/// Start of the line that the guest prints just before it powers off.
pub const DOWN_LINE: &str = "QUORATE-GUEST-DOWN";
