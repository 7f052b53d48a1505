//! Pools in full.

use super::{Api, body_or_default, bytes, caller, json, vm_name};
use crate::error::{ApiError, ErrorCode};
use crate::storage::{
    self, DrillRequest, DrillView, StorageView, TakeAnswer, TakeRequest, listed_name, uses,
};
use crate::view::{AcceptCopyRequest, Changed};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use quorate_state::Command;
use quorate_types::{HostName, PoolName, VmName};

/// All pools, without their images.
#[utoipa::path(get, path = "/api/v1/pools", tag = "storage",
    responses((status = 200, body = Vec<StorageView>), (status = "default", body = ApiError)))]
pub(crate) async fn list_pools(State(api): State<Api>) -> Result<Json<Vec<StorageView>>, ApiError> {
    let seen = api.backend.observed().await.unwrap_or_default();
    let state = api.backend.state();
    let pools = state.pools.keys();
    Ok(Json(
        pools
            .filter_map(|name| storage::pool(&state, &seen, name))
            .collect(),
    ))
}

/// One pool with its images, as a host that reaches it sees them now. Takes some seconds at most.
#[utoipa::path(get, path = "/api/v1/pools/{name}", tag = "storage", params(("name" = String, Path)),
    responses((status = 200, body = StorageView), (status = "default", body = ApiError)))]
pub(crate) async fn show_pool(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<StorageView>, ApiError> {
    let name = pool_name(&api, &name)?;
    let seen = api.backend.observed().await.unwrap_or_default();
    let state = api.backend.state();
    let Some(view) = storage::pool(&state, &seen, &name) else {
        return Err(ApiError::unknown("pool", name.as_str(), []));
    };
    Ok(Json(match api.backend.look_into(&name).await {
        Ok(look) => storage::with_images(view, &state, look),
        Err(error) => StorageView {
            images_problem: Some(error.message),
            ..view
        },
    }))
}

/// Tries whether the pool's SAN shuts an initiator out when told. Takes some seconds; writes nothing to the unit.
#[utoipa::path(post, path = "/api/v1/pools/{name}/drill", tag = "storage", params(("name" = String, Path)),
    request_body = DrillRequest,
    responses((status = 200, body = DrillView), (status = "default", body = ApiError)))]
pub(crate) async fn drill_pool(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<DrillView>, ApiError> {
    let name = pool_name(&api, &name)?;
    let request: DrillRequest = body_or_default(body)?;
    let by = caller(&headers);
    Ok(Json(api.backend.drill(&by, &name, request.image).await?))
}

/// Lets the next start of a VM take a unit from whoever else is registered on it now: from those and no others. Shows them,
/// as an error, unless forced.
#[utoipa::path(post, path = "/api/v1/pools/{name}/take", tag = "storage", params(("name" = String, Path)),
    request_body = TakeRequest,
    responses((status = 200, body = TakeAnswer), (status = "default", body = ApiError)))]
pub(crate) async fn take_unit(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<TakeAnswer>, ApiError> {
    let (pool, by) = (pool_name(&api, &name)?, caller(&headers));
    let request: TakeRequest = json(&bytes(body)?)?;
    let state = api.backend.state();
    let (image, vms) = unit_of(&state, &pool, &request.image)?;
    if request.withdraw {
        let known = state.unit_takes.get(&pool);
        if !known.is_some_and(|takes| takes.contains_key(&image)) {
            let text = format!("nobody has said that {pool}/{image} may be taken");
            return Err(ApiError::new(ErrorCode::NotFound, text));
        }
        let command = Command::EndTake {
            pool: pool.clone(),
            image: image.clone(),
            given: None,
        };
        api.backend.propose(&by, command).await?;
    }
    let seen = match request.withdraw {
        true => None,
        false => Some(api.backend.strangers(&pool, &image).await?),
    };
    let recorded = seen.as_ref().is_some_and(|seen| !seen.is_nobody());
    if let Some(seen) = seen.as_ref().filter(|_| recorded) {
        if !request.force {
            let text = format!("{pool}/{image} is used by strangers: {}", seen.describe());
            return Err(ApiError::new(ErrorCode::Conflict, text).hint(
                "if they are gone for good repeat it with --force: the next start pushes them out, and what they have under \
                 way is aborted; if they are not, both would write",
            ));
        }
        let broken =
            |error: std::num::ParseIntError| ApiError::new(ErrorCode::Internal, error.to_string());
        let command = Command::TakeUnit {
            pool,
            image: image.clone(),
            keys: seen.keys().map_err(broken)?,
            hold: seen.hold,
        };
        api.backend.propose(&by, command).await?;
    }
    Ok(Json(TakeAnswer {
        image,
        vms,
        seen,
        recorded,
    }))
}

/// A unit by its one name, with its VMs.
fn unit_of(
    state: &quorate_state::State,
    pool: &PoolName,
    image: &str,
) -> Result<(String, Vec<VmName>), ApiError> {
    let spec = state.pools.get(pool).map(|pool| &pool.spec);
    let spec = spec.ok_or_else(|| ApiError::unknown("pool", pool.as_str(), []))?;
    if storage::fence(spec).by.as_deref() != Some("reservation") {
        let text = format!("pool {pool} has no reservations: there is nobody to take a disk from");
        return Err(ApiError::new(ErrorCode::Conflict, text));
    }
    let image = listed_name(spec, image);
    let used = uses(state, pool);
    match used.get(&image) {
        Some(of) => Ok((image, of.vms.iter().cloned().collect())),
        None => {
            let known = used.keys().map(String::as_str);
            Err(ApiError::unknown("disk of a VM", &image, known))
        }
    }
}

pub(crate) fn pool_name(api: &Api, text: &str) -> Result<PoolName, ApiError> {
    let state = api.backend.state();
    match text.parse::<PoolName>() {
        Ok(name) if state.pools.contains_key(&name) => Ok(name),
        _ => Err(ApiError::unknown(
            "pool",
            text,
            state.pools.keys().map(PoolName::as_str),
        )),
    }
}

/// Makes the copy of a disk on one host the one that counts, whatever it lacks: for when the host of the last whole copy is
/// lost for good. What the copy lacks is lost with it.
#[utoipa::path(post, path = "/api/v1/vms/{name}/copies/accept", tag = "storage", params(("name" = String, Path)),
    request_body = AcceptCopyRequest,
    responses((status = 200, body = Changed), (status = "default", body = ApiError)))]
pub(crate) async fn accept_copy(
    State(api): State<Api>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Changed>, ApiError> {
    let AcceptCopyRequest { image, host } = json(&bytes(body)?)?;
    let vm = vm_name(&api, &name)?;
    let state = api.backend.state();
    let record = state.vms.get(&vm);
    let disks = record
        .into_iter()
        .flat_map(|vm| state.own_disks(vm.effective()));
    let known = disks.filter_map(|disk| Some((disk, state.copies(&disk.pool, &disk.image)?)));
    let known: Vec<_> = known.collect();
    let Some((disk, record)) = known.iter().find(|(disk, _)| disk.image == image) else {
        let known = known.iter().map(|(disk, _)| disk.image.as_str());
        return Err(ApiError::unknown("disk with copies", &image, known));
    };
    let copy = record.hosts.get(&host).ok_or_else(|| {
        let known = record.hosts.keys().map(HostName::as_str);
        ApiError::unknown("host with a copy", host.as_str(), known)
    })?;
    let command = Command::AcceptCopy {
        vm,
        pool: disk.pool.clone(),
        since: copy.since,
        image,
        host,
    };
    api.change(&headers, command).await
}
