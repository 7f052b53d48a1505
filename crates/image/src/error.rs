//! What can go wrong with an image, in words the operator can act on.

use crate::nbd::NbdError;
use quorate_storage::PoolError;

/// A failed piece of work.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file is not acceptable.
    #[error("{file}: {why}")]
    File {
        /// Its path.
        file: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The request does not fit what is there.
    #[error("{0}")]
    Refused(String),
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A tool of QEMU.
    #[error("{tool} failed: {detail}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// What it said.
        detail: String,
    },
    /// A tool is not there.
    #[error("{tool} cannot be run ({source}): install the package qemu-utils on this host")]
    NoTool {
        /// Which.
        tool: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Reading or writing an image.
    #[error("{what}: {source}")]
    Nbd {
        /// `the source`, `the copy`.
        what: &'static str,
        /// Why.
        source: NbdError,
    },
    /// There was no room.
    #[error("{0} is full: what was written is removed; make room, then repeat this")]
    Full(String),
    /// It reads back differently.
    #[error(
        "the copy reads back differently (SHA-256 {read} instead of {written}): the storage is not sound; look at it \
         before you try again"
    )]
    Differs {
        /// What was written.
        written: String,
        /// What was read.
        read: String,
    },
    /// Somebody took it back.
    #[error("cancelled")]
    Cancelled,
    /// The system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why.
        source: std::io::Error,
    },
}

impl ImageError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Whether what was copied so far is worth keeping.
    pub(crate) fn keeps_copy(&self) -> bool {
        match self {
            Self::Nbd { source, .. } => !source.is_full(),
            Self::Io { .. } | Self::Tool { .. } | Self::NoTool { .. } | Self::Pool(_) => true,
            _ => false,
        }
    }
}
