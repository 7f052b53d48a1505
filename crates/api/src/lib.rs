//! REST v1 over a unix socket: the one way in for the command line and everything else.
//!
//! ```text
//! client --HTTP/1.1 over DIR/api.sock (0600)--> router --> Backend (the daemon)
//! ```
//!
//! Owns: routes, what clients see ([`view`]), errors ([`ApiError`]), server, [`client`]. Always
//! holds: every body and every wait is bounded; every refusal is JSON that says what to do; a
//! change is answered only after it is committed and applied. Must not: decide or keep anything;
//! state lives in the state machine, the picture with the leader.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod answers;
mod backend;
mod build;
pub mod client;
mod error;
mod metrics;
mod openapi;
pub mod questions;
pub mod quorum;
mod routes;
mod server;
pub mod services;
pub mod storage;
pub mod view;

pub use backend::{Backend, Console, ConsoleIo, LogOptions, LogStream};
pub use build::{Answering, Observed, ObservedHost, ObservedVote, build, quorum as build_quorum};
pub use client::{Client, ClientError};
pub use error::{ApiError, ErrorCode};
pub use openapi::document;
pub use routes::{Limits, router};
pub use server::{ServeError, serve};

/// Name of the socket in the daemon's directory.
pub const SOCKET: &str = "api.sock";
