//! Services over the API: how they stand, drains, which member a client gets.
#![allow(clippy::unwrap_used)]

mod common;

use common::Site;
use quorate_api::services::{MemberState, ServiceView, TraceView};
use quorate_api::view::Changed;
use quorate_api::{ApiError, ClientError, ErrorCode, Limits};
use quorate_state::{Command, ServiceChange};

const WEB: &str = "
networks:
  lan: {bridge: br0, subnet: 10.0.0.0/24}
vms:
  a: {memory: 64MiB, boot: {kernel: {kernel: '${KERNEL}'}}, nics: [{network: lan, address: 10.0.0.11}]}
  b: {memory: 64MiB, boot: {kernel: {kernel: '${KERNEL}'}}, nics: [{network: lan, address: 10.0.0.12}]}
services:
  web: {network: lan, address: 10.0.0.100, ports: [80, 53/udp], members: [a, b]}
  sticky: {network: lan, address: 10.0.0.101, ports: [80], members: [a], affinity: {kind: source}}
";

async fn site() -> Site {
    let site = Site::start(Limits::default()).await;
    site.apply(WEB).await;
    site
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ApiError {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

/// The ring of `web` with both members.
fn make_ring(site: &Site) {
    let state = quorate_api::Backend::state(site.fake.as_ref());
    let web = "web".parse().unwrap();
    let record = &state.services[&web];
    let members = state.members(&record.spec);
    let members = members
        .map(|(vm, _, weight)| state.ring_member(&record.spec, vm, weight).unwrap())
        .collect();
    let changes = vec![
        ServiceChange::PrepareRing {
            service: web.clone(),
            epoch: 1,
            members,
        },
        ServiceChange::ActivateRing {
            service: web,
            epoch: 1,
        },
    ];
    let command = Command::ChangeServices { changes };
    site.fake.apply("controller", command).unwrap();
}

#[tokio::test]
async fn services_are_listed_and_shown() {
    let site = site().await;
    let all: Vec<ServiceView> = site.client.get("/api/v1/services").await.unwrap();
    let names: Vec<&str> = all.iter().map(|of| of.name.as_str()).collect();
    assert_eq!(names, ["sticky", "web"]);
    let web: ServiceView = site.client.get("/api/v1/services/web").await.unwrap();
    assert_eq!((web.epoch, web.members.len(), web.slots), (0, 2, 65_537));
    // Nobody who could know was asked.
    assert_eq!(web.members[0].state, MemberState::Unknown);
    let error = refused(site.client.get::<ServiceView>("/api/v1/services/wep").await);
    assert_eq!(error.code, ErrorCode::NotFound);
    assert_eq!(error.hint.as_deref(), Some("did you mean `web`?"));
}

#[tokio::test]
async fn members_are_drained_and_resumed() {
    let site = site().await;
    let nothing = serde_json::json!({});
    let path = |vm: &str, what: &str| format!("/api/v1/services/web/members/{vm}/{what}");
    let changed: Changed = site
        .client
        .post(&path("a", "drain"), &nothing)
        .await
        .unwrap();
    assert_eq!(
        changed.events[0].text,
        "service web: a gets no new connections"
    );
    let error = refused(
        site.client
            .post::<Changed>(&path("c", "drain"), &nothing)
            .await,
    );
    assert_eq!(error.code, ErrorCode::NotFound);
    let error = refused(
        site.client
            .post::<Changed>(&path("b", "resume"), &nothing)
            .await,
    );
    assert!(error.message.contains("not being drained"), "{error}");
    let _: Changed = site
        .client
        .post(&path("a", "resume"), &nothing)
        .await
        .unwrap();
    let _: Changed = site.client.delete("/api/v1/services/web").await.unwrap();
    let all: Vec<ServiceView> = site.client.get("/api/v1/services").await.unwrap();
    assert_eq!(all.len(), 1);
}

#[tokio::test]
async fn a_client_is_traced_to_its_member() {
    let site = site().await;
    make_ring(&site);
    let trace = |query: &'static str| {
        let client = site.client.clone();
        async move {
            let path = format!("/api/v1/services/{query}");
            client.get::<TraceView>(&path).await
        }
    };
    let answer = trace("web/trace?client=10.0.0.7:40000").await.unwrap();
    assert_eq!((answer.port, answer.protocol.as_str()), (80, "tcp"));
    assert!(answer.member.is_some() && answer.slot < answer.slots);
    let again = trace("web/trace?client=10.0.0.7:40000").await.unwrap();
    assert_eq!(answer, again);
    let udp = trace("web/trace?client=10.0.0.7:40000&protocol=udp").await;
    assert_eq!(udp.unwrap().port, 53);
    // Without affinity the client's port matters, with it it does not.
    let error = refused(trace("web/trace?client=10.0.0.7").await);
    assert!(error.hint.unwrap().contains("10.0.0.7:40000"));
    let sticky = trace("sticky/trace?client=10.0.0.7").await.unwrap();
    assert_eq!((sticky.member, sticky.epoch), (None, 0));
    for bad in [
        "web/trace?client=web",
        "web/trace",
        "web/trace?client=10.0.0.7:40000&port=81",
        "web/trace?client=10.0.0.7:40000&protocol=sctp",
        "web/trace?client=%5Bfd00::7%5D:40000",
    ] {
        assert_eq!(
            refused(trace(bad).await).code,
            ErrorCode::BadRequest,
            "{bad}"
        );
    }
}

#[tokio::test]
async fn a_trace_knows_what_only_a_host_knows() {
    use quorate_api::services::{add_pins, trace_client};
    let site = site().await;
    make_ring(&site);
    let state = site.fake.state_now();
    let host = "h1".parse().unwrap();
    let web: quorate_types::ServiceName = "web".parse().unwrap();
    let client = ("10.0.0.7".parse().unwrap(), Some(40_000));
    let from_state = trace_client(&state, &web, client, None, None).unwrap();
    // What the host would say of itself is the same, but for a pin.
    let query = quorate_balancer::TraceQuery {
        service: web.clone(),
        client: client.0,
        client_port: 40_000,
        port: None,
        protocol: None,
    };
    let table = quorate_agent_logic::service_table(&state.services[&web], false);
    let mut here = quorate_balancer::trace::trace(&table, &query).unwrap();
    let mut view = from_state.clone();
    add_pins(&state, &mut view, &host, Some(&here));
    assert_eq!(view, from_state, "no pin");
    let members = &table.active().unwrap().members;
    let other = members
        .iter()
        .find(|member| Some(&member.vm) != from_state.member.as_ref());
    here.member = other.map(|member| member.vm.clone());
    here.pinned = true;
    add_pins(&state, &mut view, &host, Some(&here));
    assert_eq!(view.member, here.member);
    assert!(
        view.why.last().unwrap().contains("is pinned to"),
        "{view:?}"
    );
    // One that steers by another ring knows nothing about this one.
    here.epoch += 1;
    let mut view = from_state.clone();
    add_pins(&state, &mut view, &host, Some(&here));
    assert_eq!(view.member, from_state.member);
}

#[tokio::test]
async fn services_are_in_the_view_and_the_metrics() {
    let site = site().await;
    let view: quorate_api::view::ClusterView = site.client.get("/api/v1/cluster").await.unwrap();
    assert_eq!(view.services.len(), 2);
    let text = site.client.text("/metrics").await.unwrap();
    for line in [
        "quorate_service_members{name=\"web\"} 2",
        "quorate_service_ring_epoch{name=\"sticky\"} 0",
        "quorate_service_problems{name=\"web\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn a_plan_tells_what_it_means_for_services() {
    use quorate_api::answers::{PlanRequest, PlanView, StepRequest};
    let site = site().await;
    let ask = |step: StepRequest| {
        let client = site.client.clone();
        async move {
            let request = PlanRequest { steps: vec![step] };
            let plan: PlanView = client.post("/api/v1/plan", &request).await.unwrap();
            plan.stages[0].services.join("\n")
        }
    };
    site.fake.settle().await;
    let state = site.fake.state_now();
    let at = |name: &str| {
        state.vms[&common::vm(name)]
            .ownership
            .host()
            .unwrap()
            .clone()
    };
    let drained = StepRequest {
        drain: vec![at("a")],
        ..StepRequest::default()
    };
    let text = ask(drained).await;
    let wanted = "service sticky: its connections go on while members move live (a)";
    assert!(text.contains(wanted), "{text}");
    let failed = StepRequest {
        fail: vec![at("a")],
        ..StepRequest::default()
    };
    let text = ask(failed).await;
    let wanted = "service sticky: nobody serves while its members stand still (a)";
    assert!(text.contains(wanted), "{text}");
}
