//! Events: a list, or a stream that a client can resume with `Last-Event-ID`.

use super::Api;
use crate::error::{ApiError, ErrorCode};
use crate::view::EventView;
use axum::Json;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::http::header::ACCEPT;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use serde::Deserialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, watch};
use utoipa::IntoParams;

/// Query of the events.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct EventQuery {
    /// Only events after this one. A `Last-Event-ID` header wins.
    after: Option<u64>,
    /// Only events about this subject, such as `vm/db`.
    subject: Option<String>,
    /// At most this many of the newest (list only).
    limit: Option<usize>,
}

impl Api {
    /// Room for one more answer that may never end.
    pub(crate) fn stream_permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.streams).try_acquire_owned().map_err(|_| {
            ApiError::new(ErrorCode::Busy, "too many streams are open")
                .hint("close one of them and try again")
        })
    }
}

/// What happened. As JSON a list; as `text/event-stream` a stream that goes on with what happens.
///
/// In the stream each event has its sequence number as id. An event named `gap` says that events
/// between the given id and the first one were dropped from the bounded log.
#[utoipa::path(get, path = "/api/v1/events", tag = "events", params(EventQuery),
    responses((status = 200, body = Vec<EventView>), (status = "default", body = ApiError)))]
pub(crate) async fn events(
    State(api): State<Api>,
    Query(query): Query<EventQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let resumed = headers
        .get("last-event-id")
        .and_then(|id| id.to_str().ok()?.parse().ok());
    let after = resumed.or(query.after).unwrap_or(0);
    let streamed = headers
        .get(ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/event-stream"));
    if !streamed {
        let state = api.backend.state();
        let wanted = |event: &EventView| query.subject.as_ref().is_none_or(|s| *s == event.subject);
        let mut list: Vec<EventView> = state.log.after(after).map(EventView::from).collect();
        list.retain(wanted);
        let skip = list.len().saturating_sub(query.limit.unwrap_or(usize::MAX));
        return Ok(Json(list.split_off(skip)).into_response());
    }
    let follower = Follower {
        states: api.backend.states(),
        stopping: api.stopping.clone(),
        after,
        subject: query.subject,
        pending: VecDeque::new(),
        checked_gap: after == 0,
        _permit: api.stream_permit()?,
    };
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(10));
    Ok(Sse::new(follower.stream())
        .keep_alive(keep_alive)
        .into_response())
}

/// One client of the stream: never more buffered than the bounded log holds.
struct Follower {
    states: watch::Receiver<Arc<quorate_state::State>>,
    stopping: watch::Receiver<bool>,
    after: u64,
    subject: Option<String>,
    pending: VecDeque<Event>,
    checked_gap: bool,
    _permit: OwnedSemaphorePermit,
}

impl Follower {
    fn stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut me| async move {
            loop {
                if let Some(event) = me.pending.pop_front() {
                    return Some((Ok(event), me));
                }
                me.collect();
                if !me.pending.is_empty() {
                    continue;
                }
                tokio::select! {
                    changed = me.states.changed() => changed.ok()?,
                    _ = me.stopping.wait_for(|stopping| *stopping) => return None,
                }
            }
        })
    }

    fn collect(&mut self) {
        let state = Arc::clone(&self.states.borrow_and_update());
        let oldest = state.log.all().next().map_or(0, |event| event.sequence);
        if !self.checked_gap && oldest > self.after.saturating_add(1) {
            let gap = Event::default().event("gap").data(self.after.to_string());
            self.pending.push_back(gap);
        }
        self.checked_gap = true;
        for event in state.log.after(self.after) {
            let view = EventView::from(event);
            self.after = view.sequence;
            if self.subject.as_ref().is_some_and(|s| *s != view.subject) {
                continue;
            }
            let event = Event::default().id(view.sequence.to_string());
            if let Ok(event) = event.json_data(&view) {
                self.pending.push_back(event);
            }
        }
    }
}
