//! Hosts.

use super::{Api, body_or_default, caller, host_name};
use crate::error::{ApiError, ErrorCode};
use crate::view::{Changed, Done, DrainRequest, HostView, LabelRequest};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use quorate_state::{Command, HostMode, Stopped};

/// All hosts.
#[utoipa::path(get, path = "/api/v1/hosts", tag = "hosts",
    responses((status = 200, body = Vec<HostView>), (status = "default", body = ApiError)))]
pub(crate) async fn list_hosts(State(api): State<Api>) -> Result<Json<Vec<HostView>>, ApiError> {
    Ok(Json(api.backend.view().await?.hosts))
}

/// One host.
#[utoipa::path(get, path = "/api/v1/hosts/{name}", tag = "hosts", params(("name" = String, Path)),
    responses((status = 200, body = HostView), (status = "default", body = ApiError)))]
pub(crate) async fn show_host(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<HostView>, ApiError> {
    let view = api.backend.view().await?;
    let names: Vec<String> = view
        .hosts
        .iter()
        .map(|host| host.name.to_string())
        .collect();
    let found = view
        .hosts
        .into_iter()
        .find(|host| host.name.as_str() == name);
    found
        .map(Json)
        .ok_or_else(|| ApiError::unknown("host", &name, names.iter().map(String::as_str)))
}

async fn set_mode(
    api: &Api,
    headers: &HeaderMap,
    name: &str,
    mode: HostMode,
) -> Result<Json<Changed>, ApiError> {
    let host = host_name(api, name)?;
    api.change(headers, Command::SetHostMode { host, mode })
        .await
}

/// Moves all VMs away and takes no new ones. Asks first where that stops something others need.
#[utoipa::path(post, path = "/api/v1/hosts/{name}/drain", tag = "hosts", params(("name" = String, Path)),
    request_body = DrainRequest,
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn drain_host(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, ApiError> {
    let request: DrainRequest = body_or_default(body)?;
    let host = host_name(&api, &name)?;
    let stops = api.backend.state().stopped_by_drain(&host);
    confirmed(&stops, request.accept_stops)?;
    set_mode(&api, &headers, &name, HostMode::Draining).await
}

/// Refuses what would stop VMs that others need, unless that was accepted.
pub(super) fn confirmed(stops: &[Stopped], accepted: bool) -> Result<(), ApiError> {
    if stops.is_empty() || accepted {
        return Ok(());
    }
    let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
    Err(
        ApiError::new(ErrorCode::Conflict, stops.join("; ")).hint(
            "repeat it with `--yes` (`accept_stops: true`); or let what needs it say `tolerates: pause`, and it is saved and resumed instead",
        ),
    )
}

/// Sets and removes labels of a host.
#[utoipa::path(post, path = "/api/v1/hosts/{name}/labels", tag = "hosts", params(("name" = String, Path)),
    request_body = LabelRequest,
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn label_host(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, ApiError> {
    let LabelRequest { set, remove } = body_or_default(body)?;
    let host = host_name(&api, &name)?;
    let command = Command::LabelHost { host, set, remove };
    api.change(&headers, command).await
}

/// Takes VMs again.
#[utoipa::path(post, path = "/api/v1/hosts/{name}/resume", tag = "hosts", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn resume_host(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    set_mode(&api, &headers, &name, HostMode::Active).await
}

/// Cuts the host's power with its fence devices.
#[utoipa::path(post, path = "/api/v1/hosts/{name}/fence", tag = "hosts", params(("name" = String, Path)),
    responses((status = 200, body = Done), (status = "default", body = ApiError)))]
pub(crate) async fn fence_host(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Done>, ApiError> {
    let host = host_name(&api, &name)?;
    let text = api.backend.fence(&caller(&headers), &host).await?;
    Ok(Json(Done { text }))
}

/// Takes the caller's word that the host is dead: its VMs start elsewhere.
#[utoipa::path(post, path = "/api/v1/hosts/{name}/confirm-dead", tag = "hosts", params(("name" = String, Path)),
    responses((status = 200, body = Done), (status = "default", body = ApiError)))]
pub(crate) async fn confirm_dead(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Done>, ApiError> {
    let host = host_name(&api, &name)?;
    let text = api.backend.confirm_dead(&caller(&headers), &host).await?;
    Ok(Json(Done { text }))
}

/// Forgets a host that owns nothing.
#[utoipa::path(post, path = "/api/v1/hosts/{name}/remove", tag = "hosts", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn remove_host(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let host = host_name(&api, &name)?;
    api.change(&headers, Command::RemoveHost { host }).await
}
