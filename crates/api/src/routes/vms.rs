//! VMs.

use super::{Api, body_or_default, host_name, vm_name};
use crate::backend::LogOptions;
use crate::error::{ApiError, ErrorCode};
use crate::questions::{self, Admitted};
use crate::view::{
    Changed, ClusterView, DecisionView, DependencyView, EventView, Explanation, MigrateRequest,
    RuleView, StopHow, StopRequest, VmView,
};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use quorate_state::{Command, State as ClusterState, StopMode, Subject};
use quorate_types::VmName;
use quorate_types::spec::Power;
use serde::Deserialize;
use utoipa::IntoParams;

/// The protocol that a console connection is upgraded to: plain bytes.
pub(crate) const CONSOLE_PROTOCOL: &str = "quorate-console";

/// All VMs.
#[utoipa::path(get, path = "/api/v1/vms", tag = "vms",
    responses((status = 200, body = Vec<VmView>), (status = "default", body = ApiError)))]
pub(crate) async fn list_vms(State(api): State<Api>) -> Result<Json<Vec<VmView>>, ApiError> {
    Ok(Json(api.backend.view().await?.vms))
}

fn find(view: ClusterView, name: &str) -> Result<VmView, ApiError> {
    let names: Vec<String> = view.vms.iter().map(|vm| vm.name.to_string()).collect();
    let found = view.vms.into_iter().find(|vm| vm.name.as_str() == name);
    found.ok_or_else(|| ApiError::unknown("VM", name, names.iter().map(String::as_str)))
}

/// One VM.
#[utoipa::path(get, path = "/api/v1/vms/{name}", tag = "vms", params(("name" = String, Path)),
    responses((status = 200, body = VmView), (status = "default", body = ApiError)))]
pub(crate) async fn show_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<VmView>, ApiError> {
    Ok(Json(find(api.backend.view().await?, &name)?))
}

/// Stops a VM, then forgets it. Its disks stay.
#[utoipa::path(delete, path = "/api/v1/vms/{name}", tag = "vms", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn delete_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let vm = vm_name(&api, &name)?;
    api.change(&headers, Command::DeleteVm { vm }).await
}

/// Keeps a VM running from now on.
#[utoipa::path(post, path = "/api/v1/vms/{name}/start", tag = "vms", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn start_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let vm = vm_name(&api, &name)?;
    let command = Command::SetPower {
        vm,
        power: Power::Running,
        mode: StopMode::Graceful,
    };
    if let Admitted::No(short) = super::judged(&api, &command).await? {
        return Err(questions::too_little(&short));
    }
    api.change(&headers, command).await
}

/// Keeps a VM stopped from now on.
#[utoipa::path(post, path = "/api/v1/vms/{name}/stop", tag = "vms", params(("name" = String, Path)),
    request_body = StopRequest,
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn stop_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, ApiError> {
    let request: StopRequest = body_or_default(body)?;
    let vm = vm_name(&api, &name)?;
    let mode = match request.mode {
        StopHow::Graceful => StopMode::Graceful,
        StopHow::Hard => StopMode::Hard,
    };
    let power = Power::Stopped;
    api.change(&headers, Command::SetPower { vm, power, mode })
        .await
}

/// Moves a VM to another host.
#[utoipa::path(post, path = "/api/v1/vms/{name}/migrate", tag = "vms", params(("name" = String, Path)),
    request_body = MigrateRequest,
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn migrate_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, ApiError> {
    let request: MigrateRequest = body_or_default(body)?;
    let vm = vm_name(&api, &name)?;
    let to = match &request.to {
        Some(to) => Some(host_name(&api, to.as_str())?),
        None => None,
    };
    let stops = api.backend.state().stopped_by_move(&vm);
    super::hosts::confirmed(stops.as_slice(), request.accept_stops)?;
    api.change(&headers, Command::RequestMove { vm, to }).await
}

/// Takes a move back; a migration under way is given up, and the VM goes on where it is.
#[utoipa::path(post, path = "/api/v1/vms/{name}/cancel", tag = "vms", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn cancel_move(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Changed>, ApiError> {
    let vm = vm_name(&api, &name)?;
    api.change(&headers, Command::CancelMove { vm }).await
}

/// What is known about a VM of the view.
pub(crate) fn explanation_of(
    state: &ClusterState,
    view: ClusterView,
    name: &VmName,
) -> Result<Explanation, ApiError> {
    let vms = view.vms.clone();
    let vm = find(view, name.as_str())?;
    Ok(explanation(state, &vms, vm))
}

pub(crate) fn explanation(state: &ClusterState, vms: &[VmView], vm: VmView) -> Explanation {
    let record = state.vms.get(&vm.name);
    let depends_on = record
        .iter()
        .flat_map(|record| &record.spec.depends_on)
        .map(|(other, dependency)| DependencyView {
            vm: other.clone(),
            condition: dependency.condition,
            met: crate::build::met(vms, other, dependency.condition),
        })
        .collect();
    let needs = |other: &&VmName| {
        let record = state.vms.get(*other);
        record.is_some_and(|record| record.spec.depends_on.contains_key(&vm.name))
    };
    let rules = state
        .rules
        .iter()
        .filter(|(_, rule)| rule.spec.vms().contains(&vm.name))
        .map(|(name, rule)| RuleView {
            name: name.clone(),
            spec: rule.spec.clone(),
        })
        .collect();
    let decisions = record
        .iter()
        .flat_map(|record| record.decisions.iter().rev());
    let about = Subject::Vm(vm.name.clone());
    let events = state.log.all().rev().filter(|event| event.subject == about);
    Explanation {
        depends_on,
        needed_by: state.vms.keys().filter(needs).cloned().collect(),
        rules,
        placement: None,
        then: None,
        decisions: decisions.map(DecisionView::from).collect(),
        events: events.take(10).map(EventView::from).collect(),
        vm,
    }
}

/// Query of the logs.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct LogQuery {
    /// Last lines to begin with (at most 10000).
    #[serde(default = "default_lines")]
    lines: u32,
    /// Go on with what comes.
    #[serde(default)]
    follow: bool,
}

fn default_lines() -> u32 {
    100
}

/// The output of a VM's serial console.
#[utoipa::path(get, path = "/api/v1/vms/{name}/logs", tag = "vms", params(("name" = String, Path), LogQuery),
    responses((status = 200, content_type = "text/plain"), (status = "default", body = ApiError)))]
pub(crate) async fn vm_logs(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, ApiError> {
    let vm = vm_name(&api, &name)?;
    let permit = api.stream_permit()?;
    let options = LogOptions {
        lines: query.lines.min(10_000),
        follow: query.follow,
    };
    let stream = api.backend.logs(&vm, options).await?;
    let mut stopping = api.stopping.clone();
    let stop = async move {
        // An error means that the server is gone.
        let _ = stopping.wait_for(|stopping| *stopping).await;
        drop(permit);
    };
    let body = Body::from_stream(stream.take_until(Box::pin(stop)));
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

/// Connects to a VM's serial console by an HTTP upgrade to `quorate-console`: plain bytes.
#[utoipa::path(get, path = "/api/v1/vms/{name}/console", tag = "vms", params(("name" = String, Path)),
    responses((status = 101), (status = "default", body = ApiError)))]
pub(crate) async fn vm_console(
    State(api): State<Api>,
    Path(name): Path<String>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let vm = vm_name(&api, &name)?;
    let wanted = request.headers().get(UPGRADE);
    if wanted.is_none_or(|protocol| protocol.as_bytes() != CONSOLE_PROTOCOL.as_bytes()) {
        return Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("a console needs the headers `Connection: upgrade` and `Upgrade: {CONSOLE_PROTOCOL}`"),
        )
        .hint("use `quorate vm console NAME`"));
    }
    let permit = api.stream_permit()?;
    let mut console = api.backend.console(&vm).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    let mut stopping = api.stopping.clone();
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else {
            return;
        };
        let mut client = hyper_util::rt::TokioIo::new(upgraded);
        tokio::select! {
            // Either side hung up: there is nobody to tell.
            _ = tokio::io::copy_bidirectional(&mut client, &mut console) => {}
            _ = stopping.wait_for(|stopping| *stopping) => {}
        }
        drop(permit);
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}
