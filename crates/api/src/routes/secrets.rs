//! Passwords that pools name. They go in and are never given out.

use super::{Api, bytes};
use crate::error::{ApiError, ErrorCode};
use crate::view::{Changed, SecretRequest, SecretView};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use quorate_state::Command;
use quorate_types::{Secret, SecretName};

/// The names of all secrets, and who uses them.
#[utoipa::path(get, path = "/api/v1/secrets", tag = "objects",
    responses((status = 200, body = Vec<SecretView>), (status = "default", body = ApiError)))]
pub(crate) async fn list_secrets(State(api): State<Api>) -> Json<Vec<SecretView>> {
    let state = api.backend.state();
    let view = |name: &SecretName| {
        let pools = state.pools.iter();
        let users = pools.filter(|(_, pool)| pool.spec.secrets().contains(name));
        SecretView {
            name: name.clone(),
            used_by: users.map(|(pool, _)| format!("pool/{pool}")).collect(),
        }
    };
    Json(state.secrets.keys().map(view).collect())
}

/// Keeps a secret, or replaces it.
#[utoipa::path(post, path = "/api/v1/secrets/{name}", tag = "objects", params(("name" = String, Path)),
    request_body = SecretRequest,
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn set_secret(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, ApiError> {
    let bad = |text: String| ApiError::new(ErrorCode::BadRequest, text);
    let name: SecretName = name.parse().map_err(|error| bad(format!("{error}")))?;
    // What the parser says of a wrong body may quote it.
    let request: SecretRequest = serde_json::from_slice(&bytes(body)?)
        .map_err(|_| bad("the body is not `{\"value\": TEXT}`".to_owned()))?;
    let secret = Secret::new(request.value).map_err(bad)?;
    api.change(&headers, Command::SetSecret { name, secret })
        .await
}

/// Forgets a secret that no pool names.
#[utoipa::path(delete, path = "/api/v1/secrets/{name}", tag = "objects", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn delete_secret(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let state = api.backend.state();
    let known = state.secrets.keys().map(SecretName::as_str);
    let unknown = || ApiError::unknown("secret", &name, known);
    let name = match name.parse::<SecretName>() {
        Ok(parsed) if state.secrets.contains_key(&parsed) => parsed,
        _ => return Err(unknown()),
    };
    api.change(&headers, Command::DeleteSecret { name }).await
}
