//! A unit that strangers use is taken on an operator's word: theirs who were seen, and no others.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Site, vm};
use quorate_api::storage::{StorageView, TakeAnswer};
use quorate_api::{ApiError, ClientError, ErrorCode, Limits};
use serde_json::{Value, json};

const UNITS: &str = "
pools:
  san: {kind: iscsi, portals: ['192.0.2.5'], target: 'iqn.2026-01.com.example:san', opened_by: kernel}
  plain: {kind: directory, path: /images}
vms:
  web: {memory: 128MiB, disks: [{pool: san, image: db}]}
";
const TAKE: &str = "/api/v1/pools/san/take";

async fn site() -> Site {
    let site = Site::start(Limits::default()).await;
    site.apply(UNITS).await;
    site
}

async fn take(site: &Site, path: &str, body: Value) -> Result<TakeAnswer, ClientError> {
    site.client.post(path, &body).await
}

fn refused(result: Result<TakeAnswer, ClientError>) -> ApiError {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn strangers_are_shown_first_and_pushed_out_on_a_word() {
    let site = site().await;
    let answer = take(&site, TAKE, json!({ "image": "db", "force": true }))
        .await
        .unwrap();
    assert!(!answer.recorded && answer.seen.unwrap().is_nobody());

    let of = ("db/0".to_owned(), vec![0xbad]);
    site.fake
        .strangers
        .lock()
        .unwrap()
        .extend([of.clone(), ("db".to_owned(), of.1)]);
    let before = site.fake.state_now();
    let error = refused(take(&site, TAKE, json!({ "image": "db" })).await);
    assert_eq!(error.code, ErrorCode::Conflict);
    for part in [
        "0x0000000000000bad",
        "iqn.2026-01.com.example:old",
        "san/db",
    ] {
        assert!(error.message.contains(part), "{error:?}");
    }
    assert!(error.hint.unwrap().contains("--force"));
    assert_eq!(site.fake.state_now(), before, "a refusal changes nothing");

    let answer = take(&site, TAKE, json!({ "image": "db/0", "force": true }))
        .await
        .unwrap();
    assert!(answer.recorded);
    assert_eq!(answer.vms, [vm("web")]);
    let shown: StorageView = site.client.get("/api/v1/pools/san").await.unwrap();
    assert_eq!(shown.takes[0].keys, ["0x0000000000000bad"]);
    assert_eq!(shown.takes[0].vms, [vm("web")]);

    let body = json!({ "image": "db", "withdraw": true });
    assert!(!take(&site, TAKE, body.clone()).await.unwrap().recorded);
    assert!(site.fake.state_now().unit_takes.is_empty());
    let error = refused(take(&site, TAKE, body).await);
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn only_units_with_reservations_that_a_vm_has_are_taken() {
    let site = site().await;
    let plain = "/api/v1/pools/plain/take";
    let error = refused(take(&site, plain, json!({ "image": "db" })).await);
    assert!(error.message.contains("no reservations"), "{error:?}");
    let error = refused(take(&site, TAKE, json!({ "image": "dc" })).await);
    assert_eq!(error.code, ErrorCode::NotFound);
    assert!(error.message.contains("disk of a VM"), "{error:?}");
    let error = refused(take(&site, "/api/v1/pools/sam/take", json!({ "image": "db" })).await);
    assert_eq!(error.code, ErrorCode::NotFound);
    let error = refused(take(&site, TAKE, json!({ "force": true })).await);
    assert_eq!(error.code, ErrorCode::BadRequest);
}
