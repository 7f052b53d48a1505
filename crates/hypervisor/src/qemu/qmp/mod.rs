//! A small client for QMP, QEMU's control protocol: JSON lines over a unix socket.
//!
//! Owns: one connection ([`QmpClient`]), the pairing of replies with commands, and the reading of
//! events ([`parse_event`]) and of QEMU's own description of itself ([`Schema`]).
//!
//! Always holds:
//! - nothing that QEMU says ends the connection: unknown events, values and even broken lines are kept
//!   or skipped, never fatal (only a line without end is);
//! - each command has a deadline; the loss of the connection fails all that wait, at once;
//! - queues are bounded: commands in flight, outgoing lines, events (a slow reader lags and is told).
//!
//! Must not: reconnect. The greeting comes once per connection and what was lost must be asked for
//! again, which is for the owner of the guest to do.

mod client;
mod event;
mod schema;

pub use client::{Greeting, QmpClient, QmpError, QmpEvent};
pub use event::parse_event;
pub use schema::Schema;
