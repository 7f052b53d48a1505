//! QEMU's process: started detached, known by pid and start time, watched through a pidfd.
//!
//! Owns: spawning ([`spawn`]), identity ([`identity`]), the record in the runtime directory ([`record`])
//! and the detection of the end ([`Watched`]).
//!
//! Always holds:
//! - the process has its own session, none of our file descriptors, no parent-death signal: it outlives us;
//! - the record is on disk *before* the process exists (intent) and is completed after, so a process can
//!   be found again even when we die in between;
//! - a signal goes through the pidfd, never to a bare pid, which may have been reused;
//! - our own children are reaped, adopted ones need not be.
//!
//! Must not: conclude from a missing reply that the process is dead.

pub mod identity;
pub mod record;
mod spawn;
mod sys;
mod watched;

pub(in crate::qemu) use sys::detach;

pub use spawn::{Spawned, remove_secrets, spawn, stderr_tail, supports_direct_io};
pub use watched::Watched;
