//! Services: how they stand, drains of members, which member a client gets.

use super::{Api, vm_name};
use crate::error::{ApiError, ErrorCode};
use crate::services::{self, ServiceView, TraceView};
use crate::view::Changed;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use quorate_balancer::TraceQuery;
use quorate_state::Command;
use quorate_types::ServiceName;
use quorate_types::service::Protocol;
use serde::Deserialize;

/// All services.
#[utoipa::path(get, path = "/api/v1/services", tag = "services",
    responses((status = 200, body = Vec<ServiceView>), (status = "default", body = ApiError)))]
pub(crate) async fn list_services(
    State(api): State<Api>,
) -> Result<Json<Vec<ServiceView>>, ApiError> {
    let seen = api.backend.observed().await;
    Ok(Json(services::services(
        &api.backend.state(),
        seen.as_ref(),
    )))
}

/// One service.
#[utoipa::path(get, path = "/api/v1/services/{name}", tag = "services", params(("name" = String, Path)),
    responses((status = 200, body = ServiceView), (status = "default", body = ApiError)))]
pub(crate) async fn show_service(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<ServiceView>, ApiError> {
    let name = service_name(&api, &name)?;
    let seen = api.backend.observed().await;
    let view = services::service(&api.backend.state(), seen.as_ref(), &name);
    view.map(Json)
        .ok_or_else(|| ApiError::unknown("service", name.as_str(), []))
}

/// Forgets a service. Its connections end.
#[utoipa::path(delete, path = "/api/v1/services/{name}", tag = "services", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn delete_service(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let service = service_name(&api, &name)?;
    api.change(&headers, Command::DeleteService { service })
        .await
}

/// Gives a member no new connections, and lets the old ones end within the service's `drain_timeout`.
#[utoipa::path(post, path = "/api/v1/services/{name}/members/{vm}/drain", tag = "services",
    params(("name" = String, Path), ("vm" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn drain_member(
    State(api): State<Api>,
    Path((name, vm)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let (service, vm) = (service_name(&api, &name)?, vm_name(&api, &vm)?);
    api.change(&headers, Command::DrainMember { service, vm })
        .await
}

/// Gives a drained member connections again.
#[utoipa::path(post, path = "/api/v1/services/{name}/members/{vm}/resume", tag = "services",
    params(("name" = String, Path), ("vm" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn resume_member(
    State(api): State<Api>,
    Path((name, vm)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let (service, vm) = (service_name(&api, &name)?, vm_name(&api, &vm)?);
    api.change(&headers, Command::ResumeMember { service, vm })
        .await
}

/// A client of a service.
#[derive(Debug, Deserialize)]
pub(crate) struct Client {
    client: String,
    port: Option<u16>,
    protocol: Option<String>,
}

/// Which member serves a client, and why.
#[utoipa::path(get, path = "/api/v1/services/{name}/trace", tag = "services",
    params(("name" = String, Path),
        ("client" = String, Query, description = "`10.0.0.1:4711`, `[fd00::1]:4711`, or an address alone"),
        ("port" = Option<u16>, Query, description = "The service's port; absent: its first one"),
        ("protocol" = Option<String>, Query, description = "`tcp` or `udp`; absent: that of the port")),
    responses((status = 200, body = TraceView), (status = "default", body = ApiError)))]
pub(crate) async fn trace_service(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Result<Query<Client>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<TraceView>, ApiError> {
    let bad = |text: String| ApiError::new(ErrorCode::BadRequest, text);
    let Query(query) = query.map_err(|error| bad(error.body_text()))?;
    let name = service_name(&api, &name)?;
    let client = services::client(&query.client)?;
    let protocol = match query.protocol.as_deref() {
        None => None,
        Some("tcp") => Some(Protocol::Tcp),
        Some("udp") => Some(Protocol::Udp),
        Some(other) => {
            return Err(bad(format!("unknown protocol `{other}`")).hint("write `tcp` or `udp`"));
        }
    };
    let state = api.backend.state();
    let mut view = services::trace_client(&state, &name, client, query.port, protocol)?;
    // Without the client's port no connection is meant.
    if let (address, Some(client_port)) = client {
        let query = TraceQuery {
            service: name,
            client: address,
            client_port,
            port: Some(view.port),
            protocol,
        };
        let found = api.backend.trace_here(&query).await;
        services::add_pins(&state, &mut view, &api.backend.host(), found.as_ref());
    }
    Ok(Json(view))
}

fn service_name(api: &Api, text: &str) -> Result<ServiceName, ApiError> {
    let state = api.backend.state();
    match text.parse::<ServiceName>() {
        Ok(name) if state.services.contains_key(&name) => Ok(name),
        _ => Err(ApiError::unknown(
            "service",
            text,
            state.services.keys().map(ServiceName::as_str),
        )),
    }
}
