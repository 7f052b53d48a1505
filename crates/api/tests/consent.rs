//! Consent to stops: what would stop a VM that others need is refused with 409 until it is accepted.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Site, host, vm};
use quorate_api::view::{Changed, DrainRequest, MigrateRequest};
use quorate_api::{ApiError, ClientError, ErrorCode, Limits};
use quorate_state::{HostMode, Ownership};
use quorate_types::HostName;
use serde_json::json;

/// `db` can only move by being stopped, and `app` needs it.
const COLD: &str = "
vms:
  db: {memory: 128MiB, migration: cold, boot: {kernel: {kernel: '${KERNEL}'}}}
  app: {memory: 128MiB, boot: {kernel: {kernel: '${KERNEL}'}}, depends_on: [db]}
";

async fn site() -> (Site, HostName) {
    let site = Site::start(Limits::default()).await;
    site.apply(COLD).await;
    site.fake.settle().await;
    let state = site.fake.state_now();
    let at = state.vms[&vm("db")].ownership.host().unwrap().clone();
    assert_ne!(state.vms[&vm("app")].ownership, Ownership::Free);
    (site, at)
}

fn refused(result: Result<Changed, ClientError>) -> ApiError {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// A conflict that names what stops, who is left without it, and how to go on.
fn asks_for_consent(error: &ApiError) {
    assert_eq!(error.code, ErrorCode::Conflict);
    assert_eq!(
        error.message,
        "db can only move by being stopped; app would be without it meanwhile"
    );
    let hint = error.hint.as_deref().unwrap();
    assert!(
        hint.contains("--yes") && hint.contains("accept_stops: true"),
        "{hint}"
    );
}

#[tokio::test]
async fn a_drain_that_stops_what_is_needed_is_refused_until_it_is_accepted() {
    let (site, at) = site().await;
    let path = format!("/api/v1/hosts/{at}/drain");
    let before = site.fake.state_now();
    for body in [json!({}), json!({ "accept_stops": false })] {
        asks_for_consent(&refused(site.client.post(&path, &body).await));
    }
    assert_eq!(site.fake.state_now(), before, "a refusal changes nothing");
    let accept = DrainRequest { accept_stops: true };
    let _: Changed = site.client.post(&path, &accept).await.unwrap();
    assert_eq!(site.fake.state_now().hosts[&at].mode, HostMode::Draining);
}

#[tokio::test]
async fn a_move_that_stops_what_is_needed_is_refused_until_it_is_accepted() {
    let (site, at) = site().await;
    let path = "/api/v1/vms/db/migrate";
    let to = ["h1", "h2", "h3"]
        .map(host)
        .into_iter()
        .find(|to| *to != at);
    let ask = MigrateRequest {
        to: to.clone(),
        accept_stops: false,
    };
    asks_for_consent(&refused(site.client.post(path, &ask).await));
    assert_eq!(site.fake.state_now().vms[&vm("db")].move_request, None);
    let accept = MigrateRequest {
        accept_stops: true,
        ..ask
    };
    let _: Changed = site.client.post(path, &accept).await.unwrap();
    let state = site.fake.state_now();
    let request = state.vms[&vm("db")].move_request.as_ref().unwrap();
    assert_eq!(request.to, to);
}

#[tokio::test]
async fn nobody_is_asked_where_nothing_that_is_needed_stops() {
    let (site, at) = site().await;
    let state = site.fake.state_now();
    // `app` moves live, and nothing needs it.
    let _: Changed = site
        .client
        .post("/api/v1/vms/app/migrate", &json!({}))
        .await
        .unwrap();
    let mut others = state.hosts.keys().filter(|host| **host != at);
    let path = format!("/api/v1/hosts/{}/drain", others.next().unwrap());
    let _: Changed = site.client.post(&path, &json!({})).await.unwrap();
    let accept = DrainRequest { accept_stops: true };
    let unknown = site.client.post("/api/v1/hosts/h9/drain", &accept).await;
    assert_eq!(refused(unknown).code, ErrorCode::NotFound);
}
