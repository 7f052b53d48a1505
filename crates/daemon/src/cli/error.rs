//! How a command ends when it does not end well.

use quorate_api::{ApiError, ClientError, ErrorCode};
use std::process::ExitCode;

/// What the user sees, and the exit status.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// Wrong usage or bad input.
    #[error("{0}")]
    Usage(String),
    /// Failed.
    #[error("{0}")]
    Failed(String),
    /// Timed out while waiting.
    #[error("{0}")]
    TimedOut(String),
    /// The daemon said no, or nothing.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Anything of the daemon's own start.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl CliError {
    /// Exit status: 1 failed, 2 bad input, 3 unreachable, 4 timed out.
    pub(crate) fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) | Self::Other(_) => 1,
            Self::TimedOut(_) => 4,
            Self::Client(ClientError::Unreachable { .. } | ClientError::Broken(_)) => 3,
            Self::Client(ClientError::Refused(error)) => match error.code {
                ErrorCode::BadRequest | ErrorCode::InvalidManifest | ErrorCode::Invalid => 2,
                ErrorCode::Timeout => 4,
                _ => 1,
            },
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status())
    }

    /// The message as it is printed.
    pub(crate) fn render(&self) -> String {
        match self {
            Self::Client(ClientError::Refused(error)) => refused(error),
            Self::Client(error @ ClientError::Unreachable { source, .. }) => {
                let hint = match source.kind() {
                    std::io::ErrorKind::PermissionDenied => {
                        "the socket is root's: run this as root"
                    }
                    _ => {
                        "is `quorate serve` running on this host? Its directory is given by --dir or QUORATE_DIR"
                    }
                };
                format!("error: {error}\n  help: {hint}")
            }
            other => format!("error: {other}"),
        }
    }
}

fn refused(error: &ApiError) -> String {
    let mut text = String::new();
    if let Some(diagnostics) = &error.diagnostics {
        text.push_str(&format!("{diagnostics}\n\n"));
    }
    text.push_str(&format!("error: {}", error.message));
    if let Some(hint) = &error.hint {
        text.push_str(&format!("\n  help: {hint}"));
    }
    text
}
