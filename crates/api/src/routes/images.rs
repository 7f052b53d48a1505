//! Work on images: jobs.

use super::{Api, bytes, caller, json};
use crate::error::{ApiError, ErrorCode};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::stream::{self, Stream};
use quorate_types::{ImageJob, ImageRef, ImageSnapshot, ImageTask};
use serde::Deserialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// Between two looks at a job that is watched.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Takes a task: `{"op": "import", "file": "/a.qcow2", "to": "pool/image"}`, and `export`, `clone`, `resize`, `delete`,
/// `snapshot_create`, `snapshot_delete`, `snapshot_revert`. The answer is the job; it goes on when the caller is gone.
#[utoipa::path(post, path = "/api/v1/images/jobs", tag = "storage", request_body = Object,
    responses((status = 200, body = Object), (status = "default", body = ApiError)))]
pub(crate) async fn make_image_job(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ImageJob>, ApiError> {
    let task: ImageTask = json(&bytes(body)?)?;
    let by = caller(&headers);
    Ok(Json(api.backend.image_job(&by, task).await?))
}

/// The jobs of all hosts that answer, oldest first.
#[utoipa::path(get, path = "/api/v1/images/jobs", tag = "storage",
    responses((status = 200, body = Vec<Object>), (status = "default", body = ApiError)))]
pub(crate) async fn list_image_jobs(
    State(api): State<Api>,
) -> Result<Json<Vec<ImageJob>>, ApiError> {
    Ok(Json(api.backend.image_jobs().await?))
}

/// One job with its progress.
#[utoipa::path(get, path = "/api/v1/images/jobs/{id}", tag = "storage", params(("id" = String, Path)),
    responses((status = 200, body = Object), (status = "default", body = ApiError)))]
pub(crate) async fn show_image_job(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<Json<ImageJob>, ApiError> {
    Ok(Json(api.backend.find_image_job(&id).await?))
}

/// Progress of a job as server-sent events: the job each time that it has changed, until it is over.
#[utoipa::path(get, path = "/api/v1/images/jobs/{id}/events", tag = "storage", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream"), (status = "default", body = ApiError)))]
pub(crate) async fn image_job_events(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    let first = api.backend.find_image_job(&id).await?;
    let permit = api.stream_permit()?;
    let follower = Progress {
        api,
        next: Some(first),
        told: None,
        _permit: permit,
    };
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(10));
    Ok(Sse::new(follower.stream()).keep_alive(keep_alive))
}

/// One client that watches a job.
struct Progress {
    api: Api,
    next: Option<ImageJob>,
    told: Option<ImageJob>,
    _permit: OwnedSemaphorePermit,
}

impl Progress {
    fn stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut me| async move {
            loop {
                if let Some(job) = me.next.take().filter(|job| me.told.as_ref() != Some(job)) {
                    let event = Event::default().json_data(&job).ok()?;
                    me.told = Some(job);
                    return Some((Ok(event), me));
                }
                let told = me.told.as_ref()?;
                if told.state.is_over() || *me.api.stopping.borrow() {
                    return None;
                }
                tokio::time::sleep(LOOK_EVERY).await;
                me.next = me.api.backend.find_image_job(&told.id).await.ok();
            }
        })
    }
}

/// Takes a job back: nothing of its copy stays. Of a failed one, what could be gone on with is removed.
#[utoipa::path(delete, path = "/api/v1/images/jobs/{id}", tag = "storage", params(("id" = String, Path)),
    responses((status = 200, body = Object), (status = "default", body = ApiError)))]
pub(crate) async fn cancel_image_job(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<Json<ImageJob>, ApiError> {
    Ok(Json(api.backend.cancel_image_job(&id).await?))
}

#[derive(Debug, Deserialize)]
pub(crate) struct SnapshotsQuery {
    image: String,
}

/// The snapshots of an image.
#[utoipa::path(get, path = "/api/v1/images/snapshots", tag = "storage",
    params(("image" = String, Query, description = "`POOL/IMAGE`")),
    responses((status = 200, body = Vec<Object>), (status = "default", body = ApiError)))]
pub(crate) async fn list_image_snapshots(
    State(api): State<Api>,
    Query(query): Query<SnapshotsQuery>,
) -> Result<Json<Vec<ImageSnapshot>>, ApiError> {
    let image: ImageRef = query
        .image
        .parse()
        .map_err(|error: String| ApiError::new(ErrorCode::BadRequest, error))?;
    Ok(Json(api.backend.image_snapshots(&image).await?))
}
