//! The cluster as a whole.

use super::{Api, body_or_default, bytes, caller};
use crate::error::{ApiError, ErrorCode};
use crate::view::{Changed, ClusterView, JoinToken, TokenRequest};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use quorate_state::Command;
use quorate_types::Millis;

/// Longest life of a join token.
const MAX_TTL: Millis = Millis(30 * 86_400_000);

/// Everything: the leader's picture, or what this host remembers when there is no leader.
#[utoipa::path(get, path = "/api/v1/cluster", tag = "cluster",
    responses((status = 200, body = ClusterView), (status = "default", body = ApiError)))]
pub(crate) async fn cluster(State(api): State<Api>) -> Result<Json<ClusterView>, ApiError> {
    Ok(Json(api.backend.view().await?))
}

/// Makes a token that lets one host, or one remote witness, join.
#[utoipa::path(post, path = "/api/v1/tokens", tag = "cluster", request_body = TokenRequest,
    responses((status = 200, body = JoinToken), (status = "default", body = ApiError)))]
pub(crate) async fn create_token(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<JoinToken>, ApiError> {
    let request: TokenRequest = body_or_default(body)?;
    if request.ttl.0 == 0 || request.ttl > MAX_TTL {
        let message = format!("a token cannot be valid for {}", request.ttl);
        return Err(ApiError::new(ErrorCode::BadRequest, message).hint("use 1s to 30d"));
    }
    let by = caller(&headers);
    Ok(Json(
        api.backend
            .create_token(&by, request.ttl, request.witness)
            .await?,
    ))
}

macro_rules! delete_route {
    ($(#[$doc:meta])* $name:ident, $path:literal, $kind:literal, $make:expr) => {
        $(#[$doc])*
        #[utoipa::path(delete, path = $path, tag = "objects", params(("name" = String, Path)),
            responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
        pub(crate) async fn $name(
            State(api): State<Api>,
            Path(name): Path<String>,
            headers: HeaderMap,
        ) -> Result<Json<Changed>, ApiError> {
            let Ok(parsed) = name.parse() else {
                return Err(ApiError::unknown($kind, &name, []));
            };
            let make: fn(_) -> Command = $make;
            api.change(&headers, make(parsed)).await
        }
    };
}

delete_route!(
    /// Forgets a pool that no VM uses. Its files stay.
    delete_pool, "/api/v1/pools/{name}", "pool", |pool| Command::DeletePool { pool });
delete_route!(
    /// Forgets a network that no VM uses.
    delete_network, "/api/v1/networks/{name}", "network", |network| Command::DeleteNetwork { network });
delete_route!(
    /// Forgets a placement rule.
    delete_rule, "/api/v1/rules/{name}", "rule", |rule| Command::DeleteRule { rule });

/// This API, as OpenAPI 3.1.
#[utoipa::path(get, path = "/api/v1/openapi.json", tag = "meta", responses((status = 200)))]
pub(crate) async fn openapi(
    body: Result<Bytes, BytesRejection>,
) -> Result<impl IntoResponse, ApiError> {
    bytes(body)?;
    Ok((
        [(CONTENT_TYPE, "application/json")],
        crate::openapi::document(),
    ))
}

/// Metrics in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", tag = "meta", responses((status = 200)))]
pub(crate) async fn metrics_text(State(api): State<Api>) -> Result<impl IntoResponse, ApiError> {
    let view = api.backend.view().await.ok();
    let text = api.metrics.encode(view.as_ref(), &api.backend.state())?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], text))
}
