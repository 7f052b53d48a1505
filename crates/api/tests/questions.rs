//! Questions over the real routes: plans, room for failures, balance, saved states, the past.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Site, TWO, host, manifest, vm};
use quorate_api::answers::{
    BalanceView, CapacityView, PlanRequest, PlanView, StageEnd, StepRequest,
};
use quorate_api::view::{Applied, Explanation, ManifestRequest};
use quorate_api::{ApiError, ClientError, ErrorCode, Limits, questions};
use quorate_planner::Snapshot;
use quorate_types::Timestamp;
use std::sync::atomic::Ordering;

async fn site() -> Site {
    let site = Site::start(Limits::default()).await;
    site.apply(TWO).await;
    site.fake.settle().await;
    site
}

fn error(result: Result<impl std::fmt::Debug, ClientError>) -> ApiError {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn fail(names: &[&str]) -> StepRequest {
    StepRequest {
        fail: names.iter().map(|name| host(name)).collect(),
        ..StepRequest::default()
    }
}

#[tokio::test]
async fn a_plan_is_told_and_changes_nothing() {
    let site = site().await;
    let before = site.fake.state_now();
    let at = before.vms[&vm("db")].ownership.host().unwrap().clone();
    let request = PlanRequest {
        steps: vec![fail(&[at.as_str()])],
    };
    let plan: PlanView = site.client.post("/api/v1/plan", &request).await.unwrap();
    assert_eq!(plan.stages.len(), 1);
    assert_eq!(plan.stages[0].end, StageEnd::Rest);
    let starts = plan.stages[0].actions.iter();
    let starts: Vec<&str> = starts
        .filter(|action| action.to.is_some())
        .map(|action| action.text.as_str())
        .collect();
    assert!(starts[0].starts_with("start db on "), "{starts:?}");
    assert_eq!(plan.revision, before.revision);
    assert_eq!(site.fake.state_now(), before);
    let wrong = PlanRequest {
        steps: vec![fail(&["h4"])],
    };
    let wrong = error(site.client.post::<PlanView>("/api/v1/plan", &wrong).await);
    assert_eq!(wrong.code, ErrorCode::NotFound);
    assert_eq!(wrong.message, "there is no host `h4`");
    let many = PlanRequest {
        steps: vec![StepRequest::default(); 17],
    };
    let many = error(site.client.post::<PlanView>("/api/v1/plan", &many).await);
    assert_eq!(many.code, ErrorCode::BadRequest);
}

#[tokio::test]
async fn a_manifest_in_a_question_is_checked_with_positions() {
    let site = site().await;
    let bad = ManifestRequest {
        text: "vms:\n  x: {memroy: 1GiB}\n".into(),
        ..manifest("")
    };
    let step = StepRequest {
        apply: Some(bad),
        ..StepRequest::default()
    };
    let request = PlanRequest { steps: vec![step] };
    let bad = error(site.client.post::<PlanView>("/api/v1/plan", &request).await);
    assert_eq!(bad.code, ErrorCode::InvalidManifest);
    assert!(
        bad.diagnostics
            .unwrap()
            .to_string()
            .contains("test.yaml:2:")
    );
}

#[tokio::test]
async fn room_for_failures_and_balance() {
    let site = site().await;
    let capacity: CapacityView = site.client.get("/api/v1/capacity").await.unwrap();
    assert_eq!((capacity.survives, capacity.quorum_survives), (2, Some(1)));
    assert_eq!(capacity.plans.len(), 3);
    let one: CapacityView = site
        .client
        .get("/api/v1/capacity?failures=1")
        .await
        .unwrap();
    assert_eq!((one.survives, one.checked), (1, 1));
    let bad = error(
        site.client
            .get::<CapacityView>("/api/v1/capacity?failures=9")
            .await,
    );
    assert_eq!(bad.code, ErrorCode::BadRequest);
    for (name, rack) in [("h1", "r1"), ("h2", "r1"), ("h3", "r2")] {
        let labels = quorate_state::Command::LabelHost {
            host: host(name),
            set: [("rack".parse().unwrap(), rack.parse().unwrap())].into(),
            remove: [].into(),
        };
        site.fake.apply("test", labels).unwrap();
    }
    let racks: CapacityView = site
        .client
        .get("/api/v1/capacity?failures=1")
        .await
        .unwrap();
    let domains: Vec<_> = racks
        .plans
        .iter()
        .filter_map(|plan| plan.domain.as_deref())
        .collect();
    assert_eq!(domains, ["rack r1"], "one host is no domain of its own");
    let balance: BalanceView = site.client.get("/api/v1/balance").await.unwrap();
    assert_eq!((balance.blocked, balance.moves.len()), (None, 0));
}

#[tokio::test]
async fn a_saved_state_answers_the_same_without_secrets() {
    let site = site().await;
    let text = site.client.text("/api/v1/state").await.unwrap();
    assert!(!text.contains("secret-key"), "the authority's key is in it");
    let saved = Snapshot::read(text.as_bytes()).unwrap();
    let request = PlanRequest {
        steps: vec![fail(&["h1"]), fail(&["h2"])],
    };
    let live: PlanView = site.client.post("/api/v1/plan", &request).await.unwrap();
    assert_eq!(questions::plan(&saved, &request).unwrap(), live);
    let live: CapacityView = site.client.get("/api/v1/capacity").await.unwrap();
    assert_eq!(questions::capacity(&saved, None, None), live);
    // Without a leader there is still the state.
    site.fake.quorate.store(false, Ordering::SeqCst);
    let text = site.client.text("/api/v1/state").await.unwrap();
    let saved = Snapshot::read(text.as_bytes()).unwrap();
    assert!(saved.seen.leader.is_none() && !saved.state.vms.is_empty());
    let refused = error(site.client.post::<PlanView>("/api/v1/plan", &request).await);
    assert_eq!(refused.code, ErrorCode::NoQuorum);
}

/// Three hosts of 2 GiB with a large VM on each of two: one more large one leaves no room.
const LARGE: &str = "
vms:
  a: {memory: 1400MiB, boot: {kernel: {kernel: '${KERNEL}'}}}
  b: {memory: 1400MiB, boot: {kernel: {kernel: '${KERNEL}'}}}
";
const MORE: &str = "
vms:
  small: {memory: 64MiB, boot: {kernel: {kernel: '${KERNEL}'}}}
  c: {memory: 1400MiB, boot: {kernel: {kernel: '${KERNEL}'}}}
";

#[tokio::test]
async fn a_change_that_takes_the_room_is_warned_of() {
    let site = Site::start(Limits::default()).await;
    site.apply(LARGE).await;
    site.fake.settle().await;
    let diff: Applied = site
        .client
        .post("/api/v1/manifest/diff", &manifest(MORE))
        .await
        .unwrap();
    assert_eq!(diff.warnings.len(), 3, "{:?}", diff.warnings);
    let applied = site.apply(MORE).await;
    assert_eq!(applied.warnings, diff.warnings);
    assert!(
        applied.warnings[0].starts_with("if h1 failed, "),
        "{:?}",
        applied.warnings
    );
}

#[tokio::test]
async fn a_change_that_takes_the_room_is_refused_where_that_is_wanted() {
    let site = Site::start(Limits::default()).await;
    let strict = format!("cluster: {{admission: {{mode: refuse}}}}{LARGE}");
    site.apply(&strict).await;
    site.fake.settle().await;
    let before = site.fake.state_now();
    let path = "/api/v1/manifest/apply";
    let refused = error(site.client.post::<Applied>(path, &manifest(MORE)).await);
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(
        refused
            .message
            .contains("every VM shall find a place when any host fails"),
        "{}",
        refused.message
    );
    let places = refused.diagnostics.unwrap().to_string();
    // The VM that takes the room, where it says how much.
    assert!(places.contains("test.yaml:4:15"), "{places}");
    assert_eq!(site.fake.state_now().vms, before.vms);
    // A stopped VM takes no room; starting it is refused as well.
    let stopped = MORE.replace("  c: {", "  c: {power: stopped, ");
    assert!(site.apply(&stopped).await.warnings.is_empty());
    let start = error(
        site.client
            .post::<serde_json::Value>("/api/v1/vms/c/start", &())
            .await,
    );
    assert_eq!(start.code, ErrorCode::Conflict);
    assert!(start.hint.unwrap().contains("quorate capacity"));
    // The same manifest may change the wish.
    let less = format!("cluster: {{admission: {{mode: off}}}}{MORE}");
    assert!(site.apply(&less).await.warnings.is_empty());
}

#[tokio::test]
async fn a_vm_is_explained_at_a_time_in_the_past() {
    let site = site().await;
    let explain = |at: u64| format!("/api/v1/vms/db/explain?at={at}");
    // `apply` of the fake happens at 1_700_000_001_000.
    let then: Explanation = site.client.get(&explain(1_700_000_002_000)).await.unwrap();
    let then = then.then.unwrap();
    let host = then.host.clone().unwrap();
    assert_eq!(then.text, format!("{host} had it"));
    let decision = then.decision.unwrap();
    assert_eq!(decision.action, format!("start db on {host}"));
    assert_eq!(decision.candidates.len(), 3);
    let before: Explanation = site.client.get(&explain(1_000)).await.unwrap();
    let before = before.then.unwrap();
    assert_eq!(before.host, None);
    assert!(
        before.text.contains("before the oldest decision"),
        "{}",
        before.text
    );
    assert!(before.next.is_some());
    let text = site.client.text("/api/v1/state").await.unwrap();
    let saved = Snapshot::read(text.as_bytes()).unwrap();
    let at = Some(Timestamp(1_700_000_002_000));
    let offline = questions::explain(&saved, &vm("db"), at).unwrap();
    assert_eq!(offline.then.unwrap().host, Some(host));
    assert!(questions::explain(&saved, &vm("dbx"), None).is_err());
}
