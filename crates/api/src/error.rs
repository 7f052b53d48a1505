//! What a client gets when something did not happen: a JSON problem that says what to do next.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use quorate_manifest::Diagnostics;
use quorate_state::Refusal;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Kinds of problem; a client decides by these, never by the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed.
    BadRequest,
    /// Who asks may not.
    Forbidden,
    /// There is no such object or route.
    NotFound,
    /// It does not fit the state of things.
    Conflict,
    /// Made from an older revision than the one that holds: look again and retry.
    Stale,
    /// The body is larger than accepted.
    TooLarge,
    /// A manifest is wrong; see the diagnostics.
    InvalidManifest,
    /// Definitions contradict each other or what exists.
    Invalid,
    /// There is no leader with a majority.
    NoQuorum,
    /// Another host is needed and cannot be reached.
    Unreachable,
    /// It was sent, and whether it happens is not known.
    Unknown,
    /// Too many requests at a time.
    Busy,
    /// It did not happen in time.
    Timeout,
    /// This host's program failed.
    Internal,
}

impl ErrorCode {
    fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Conflict | Self::Stale => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::InvalidManifest | Self::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            Self::NoQuorum | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unreachable => StatusCode::BAD_GATEWAY,
            Self::Unknown | Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// A problem, as JSON on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error, ToSchema)]
#[error("{message}")]
pub struct ApiError {
    /// Kind.
    pub code: ErrorCode,
    /// What is wrong, one sentence.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Places in a manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub diagnostics: Option<Diagnostics>,
}

impl ApiError {
    /// A problem without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            diagnostics: None,
        }
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// There is no leader with a majority.
    #[must_use]
    pub fn no_quorum() -> Self {
        Self::new(
            ErrorCode::NoQuorum,
            "no quorum: there is no leader that a majority of the voters can hear",
        )
        .hint("`quorate status` shows which hosts are missing; nothing can be changed until a majority is back")
    }

    /// An object that does not exist; `known` are candidates for "did you mean".
    pub fn unknown<'a>(kind: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let error = Self::new(ErrorCode::NotFound, format!("there is no {kind} `{name}`"));
        match quorate_manifest::nearest(name, known) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error,
        }
    }

    /// A manifest that was refused.
    #[must_use]
    pub fn manifest(diagnostics: Diagnostics) -> Self {
        let count = diagnostics.items.len() + diagnostics.omitted;
        let things = if count == 1 { "error" } else { "errors" };
        let message = format!("the manifest has {count} {things}; nothing was changed");
        Self {
            diagnostics: Some(diagnostics),
            ..Self::new(ErrorCode::InvalidManifest, message)
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::Unknown { .. } => ErrorCode::NotFound,
            Refusal::Stale { .. } => ErrorCode::Stale,
            Refusal::Token => ErrorCode::Forbidden,
            Refusal::Invalid(_) => ErrorCode::Invalid,
            Refusal::TooNew { .. }
            | Refusal::Cluster(_)
            | Refusal::Exists { .. }
            | Refusal::InUse(_)
            | Refusal::Action { .. } => ErrorCode::Conflict,
        };
        Self::new(code, refusal.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.code.status(), axum::Json(self)).into_response()
    }
}
