//! Questions about what would happen. None of them changes anything.

use super::{Api, body_or_default, vm_name};
use crate::answers::{BalanceView, CapacityView, PlanRequest, PlanView};
use crate::error::{ApiError, ErrorCode};
use crate::questions;
use crate::view::Explanation;
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, State};
use quorate_planner::{Seen, Snapshot};
use quorate_types::{LabelName, Timestamp};
use serde::Deserialize;
use utoipa::IntoParams;

/// Most failures at once that are looked at.
const MAX_FAILURES: u32 = 8;

/// Runs something that takes long away from the threads that serve requests.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))
}

/// What would happen: the planner run forward on a copy of the cluster's state.
#[utoipa::path(post, path = "/api/v1/plan", tag = "questions", request_body = PlanRequest,
    responses((status = 200, body = PlanView), (status = "default", body = ApiError)))]
pub(crate) async fn plan(
    State(api): State<Api>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<PlanView>, ApiError> {
    let request: PlanRequest = body_or_default(body)?;
    let snapshot = api.backend.snapshot().await?;
    let answer = aside(move || questions::plan(&snapshot, &request)).await??;
    Ok(Json(answer))
}

/// Query of the room for failures.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct CapacityQuery {
    /// Look at up to so many failures at once (at most 8); absent: as far as it is cheap.
    failures: Option<u32>,
    /// Hosts with the same value of this label fail together. Labels that rules go by, and those called rack, row,
    /// room and the like, are looked at anyway.
    domain: Option<String>,
}

/// How many failures the cluster survives, with a restart plan for each host.
#[utoipa::path(get, path = "/api/v1/capacity", tag = "questions", params(CapacityQuery),
    responses((status = 200, body = CapacityView), (status = "default", body = ApiError)))]
pub(crate) async fn capacity(
    State(api): State<Api>,
    Query(query): Query<CapacityQuery>,
) -> Result<Json<CapacityView>, ApiError> {
    if query
        .failures
        .is_some_and(|failures| !(1..=MAX_FAILURES).contains(&failures))
    {
        let message = format!("`failures` must be from 1 to {MAX_FAILURES}");
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    let domain = query.domain.as_deref().map(str::parse::<LabelName>);
    let domain = domain
        .transpose()
        .map_err(|error| ApiError::new(ErrorCode::BadRequest, error.to_string()))?;
    let snapshot = api.backend.snapshot().await?;
    let work = move || questions::capacity(&snapshot, query.failures, domain.as_ref());
    Ok(Json(aside(work).await?))
}

/// Which live migrations would even out load.
#[utoipa::path(get, path = "/api/v1/balance", tag = "questions",
    responses((status = 200, body = BalanceView), (status = "default", body = ApiError)))]
pub(crate) async fn balance(State(api): State<Api>) -> Result<Json<BalanceView>, ApiError> {
    let snapshot = api.backend.snapshot().await?;
    Ok(Json(aside(move || questions::balance(&snapshot)).await?))
}

/// Everything that decisions rest on, without secrets: to be kept, and asked questions later. Without a
/// leader it is what this host has applied, and nothing is known of the hosts.
#[utoipa::path(get, path = "/api/v1/state", tag = "questions",
    responses((status = 200, body = Object), (status = "default", body = ApiError)))]
pub(crate) async fn save_state(State(api): State<Api>) -> Result<Json<Snapshot>, ApiError> {
    let snapshot = match api.backend.snapshot().await {
        Ok(snapshot) => snapshot,
        Err(error) if matches!(error.code, ErrorCode::NoQuorum | ErrorCode::Unreachable) => {
            Snapshot {
                format: quorate_planner::SNAPSHOT_FORMAT,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                saved: Timestamp(0),
                state: api.backend.state().as_ref().clone(),
                seen: Seen::default(),
            }
        }
        Err(error) => return Err(error),
    };
    Ok(Json(snapshot.redact()))
}

/// Query of an explanation.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct ExplainQuery {
    /// Where it was at this time, in milliseconds since 1970; absent: only where it is.
    at: Option<u64>,
}

/// Why a VM is where it is, and where it was at a time in the past.
#[utoipa::path(get, path = "/api/v1/vms/{name}/explain", tag = "vms",
    params(("name" = String, Path), ExplainQuery),
    responses((status = 200, body = Explanation), (status = "default", body = ApiError)))]
pub(crate) async fn explain_vm(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(query): Query<ExplainQuery>,
) -> Result<Json<Explanation>, ApiError> {
    let vm = vm_name(&api, &name)?;
    let view = api.backend.view().await?;
    let state = api.backend.state();
    let placement = api.backend.placement(&vm).await;
    let mut explained = super::explanation_of(&state, view, &vm)?;
    explained.placement = placement;
    explained.then = query
        .at
        .map(|at| questions::then(&state, &vm, Timestamp(at)));
    Ok(Json(explained))
}
