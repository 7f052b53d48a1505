//! The router, and what all routes share.

mod cluster;
mod events;
mod hosts;
mod images;
mod manifest;
mod questions;
mod quorum;
mod secrets;
mod services;
mod storage;
mod vms;

pub(crate) use cluster::*;
pub(crate) use events::*;
pub(crate) use hosts::*;
pub(crate) use images::*;
pub(crate) use manifest::*;
pub(crate) use questions::*;
pub(crate) use quorum::*;
pub(crate) use secrets::*;
pub(crate) use services::*;
pub(crate) use storage::*;
pub(crate) use vms::*;

use crate::backend::Backend;
use crate::error::{ApiError, ErrorCode};
use crate::metrics::Metrics;
use crate::view::{Changed, EventView};
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use quorate_state::{Command, Outcome};
use quorate_types::{HostName, VmName};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// Bounds of the API.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest body, in bytes.
    pub body: usize,
    /// Requests at a time; streams count until their answer begins.
    pub requests: usize,
    /// Event streams, consoles and followed logs at a time.
    pub streams: usize,
    /// How long this host may need to catch up with the leader.
    pub catch_up: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // The text of a manifest, escaped as JSON.
            body: 4 * quorate_manifest::MAX_INPUT,
            requests: 128,
            streams: 64,
            catch_up: Duration::from_secs(5),
        }
    }
}

/// What every handler has.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) limits: Limits,
    pub(crate) streams: Arc<Semaphore>,
    requests: Arc<Semaphore>,
    /// Becomes true when the server stops: endless answers end.
    pub(crate) stopping: watch::Receiver<bool>,
}

/// All routes over a backend. `stopping` becomes true when the server ends.
pub fn router(
    backend: Arc<dyn Backend>,
    limits: Limits,
    stopping: watch::Receiver<bool>,
) -> Router {
    let metrics = Arc::new(Metrics::new(backend.as_ref()));
    let api = Api {
        backend,
        metrics,
        limits,
        streams: Arc::new(Semaphore::new(limits.streams)),
        requests: Arc::new(Semaphore::new(limits.requests)),
        stopping,
    };
    let v1 = Router::new()
        .route("/cluster", get(cluster))
        .route("/hosts", get(list_hosts))
        .route("/hosts/{name}", get(show_host))
        .route("/hosts/{name}/drain", post(drain_host))
        .route("/hosts/{name}/labels", post(label_host))
        .route("/hosts/{name}/resume", post(resume_host))
        .route("/hosts/{name}/fence", post(fence_host))
        .route("/hosts/{name}/confirm-dead", post(confirm_dead))
        .route("/hosts/{name}/remove", post(remove_host))
        .route("/vms", get(list_vms))
        .route("/vms/{name}", get(show_vm).delete(delete_vm))
        .route("/vms/{name}/start", post(start_vm))
        .route("/vms/{name}/stop", post(stop_vm))
        .route("/vms/{name}/migrate", post(migrate_vm))
        .route("/vms/{name}/cancel", post(cancel_move))
        .route("/vms/{name}/copies/accept", post(accept_copy))
        .route("/vms/{name}/explain", get(explain_vm))
        .route("/vms/{name}/logs", get(vm_logs))
        .route("/vms/{name}/console", get(vm_console))
        .route("/pools", get(list_pools))
        .route("/pools/{name}", get(show_pool).delete(delete_pool))
        .route("/pools/{name}/drill", post(drill_pool))
        .route("/pools/{name}/take", post(take_unit))
        .route("/services", get(list_services))
        .route("/services/{name}", get(show_service).delete(delete_service))
        .route("/services/{name}/trace", get(trace_service))
        .route("/services/{name}/members/{vm}/drain", post(drain_member))
        .route("/services/{name}/members/{vm}/resume", post(resume_member))
        .route("/networks/{name}", delete(delete_network))
        .route("/rules/{name}", delete(delete_rule))
        .route("/images/jobs", get(list_image_jobs).post(make_image_job))
        .route(
            "/images/jobs/{id}",
            get(show_image_job).delete(cancel_image_job),
        )
        .route("/images/jobs/{id}/events", get(image_job_events))
        .route("/images/snapshots", get(list_image_snapshots))
        .route("/secrets", get(list_secrets))
        .route("/secrets/{name}", post(set_secret).delete(delete_secret))
        .route("/manifest/apply", post(apply_manifest))
        .route("/manifest/diff", post(diff_manifest))
        .route("/manifest/schema", get(manifest_schema))
        .route("/plan", post(plan))
        .route("/capacity", get(capacity))
        .route("/balance", get(balance))
        .route("/state", get(save_state))
        .route("/tokens", post(create_token))
        .route("/quorum", get(show_quorum).put(set_quorum))
        .route("/events", get(events))
        .route("/openapi.json", get(openapi));
    Router::new()
        .nest("/api/v1", v1)
        .route("/metrics", get(metrics_text))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::middleware::from_fn_with_state(api.clone(), bounded))
        .layer(DefaultBodyLimit::max(limits.body))
        .with_state(api)
}

/// Refuses what is too much, and counts.
async fn bounded(State(api): State<Api>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = match api.requests.try_acquire() {
        Ok(_permit) => next.run(request).await,
        Err(_) => ApiError::new(ErrorCode::Busy, "too many requests at a time")
            .hint("try again in a moment")
            .into_response(),
    };
    let route = route.as_ref().map_or("unknown", MatchedPath::as_str);
    api.metrics
        .request(method.as_str(), route, response.status().as_u16());
    response
}

async fn no_route(request: Request) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("there is no route {}", request.uri().path()),
    )
    .hint("GET /api/v1/openapi.json lists all routes")
}

async fn no_method(request: Request) -> Response {
    let message = format!(
        "{} {} is not possible",
        request.method(),
        request.uri().path()
    );
    let error = ApiError::new(ErrorCode::BadRequest, message)
        .hint("GET /api/v1/openapi.json lists all routes");
    (StatusCode::METHOD_NOT_ALLOWED, axum::Json(error)).into_response()
}

/// Who asks, for the audit trail: the header `x-quorate-by`. Whoever can open the socket is root and
/// could say anything; the header is there so that people who share root can be told apart.
pub(crate) fn caller(headers: &HeaderMap) -> String {
    let said = headers
        .get("x-quorate-by")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let clean: String = said
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "@.-_".contains(*c))
        .take(64)
        .collect();
    if clean.is_empty() {
        "root".to_owned()
    } else {
        clean
    }
}

/// The body as JSON; an empty one is the default.
pub(crate) fn body_or_default<T: serde::de::DeserializeOwned + Default>(
    body: Result<Bytes, BytesRejection>,
) -> Result<T, ApiError> {
    let body = bytes(body)?;
    if body.is_empty() {
        return Ok(T::default());
    }
    json(&body)
}

pub(crate) fn bytes(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| {
        let code = if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            ErrorCode::TooLarge
        } else {
            ErrorCode::BadRequest
        };
        ApiError::new(code, rejection.body_text())
    })
}

pub(crate) fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!("the body is not as expected: {error}"),
        )
        .hint("GET /api/v1/openapi.json describes it")
    })
}

pub(crate) fn vm_name(api: &Api, text: &str) -> Result<VmName, ApiError> {
    let state = api.backend.state();
    match text.parse::<VmName>() {
        Ok(name) if state.vms.contains_key(&name) => Ok(name),
        _ => Err(ApiError::unknown(
            "VM",
            text,
            state.vms.keys().map(VmName::as_str),
        )),
    }
}

pub(crate) fn host_name(api: &Api, text: &str) -> Result<HostName, ApiError> {
    let state = api.backend.state();
    match text.parse::<HostName>() {
        Ok(name) if state.hosts.contains_key(&name) => Ok(name),
        _ => Err(ApiError::unknown(
            "host",
            text,
            state.hosts.keys().map(HostName::as_str),
        )),
    }
}

impl Api {
    /// Proposes a command and tells what it did.
    pub(crate) async fn change(
        &self,
        headers: &HeaderMap,
        command: Command,
    ) -> Result<axum::Json<Changed>, ApiError> {
        let outcome = self.backend.propose(&caller(headers), command).await?;
        Ok(axum::Json(changed(&outcome)))
    }
}

pub(crate) fn changed(outcome: &Outcome) -> Changed {
    Changed {
        revision: outcome.revision,
        events: outcome.events.iter().map(EventView::from).collect(),
    }
}
