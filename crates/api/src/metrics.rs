//! Metrics in the Prometheus text format.
//!
//! Two registries: counters that live as long as the daemon (its own and the API's), and gauges that
//! are written anew from the view at each scrape, so that nothing stale stays behind.

use crate::backend::Backend;
use crate::error::{ApiError, ErrorCode};
use crate::services::{MemberState, MemberView};
use crate::view::{ClusterView, HostState, VmState};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use quorate_state::State;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: String,
}

pub(crate) struct Metrics {
    lasting: Registry,
    requests: Family<RequestLabels, Counter>,
}

impl Metrics {
    pub(crate) fn new(backend: &dyn Backend) -> Self {
        let mut lasting = Registry::with_prefix("quorate");
        backend.register_metrics(&mut lasting);
        let requests = Family::default();
        lasting.register(
            "api_requests",
            "Requests by route and status",
            Family::clone(&requests),
        );
        Self { lasting, requests }
    }

    pub(crate) fn request(&self, method: &str, route: &str, status: u16) {
        // Routes and methods are few: the router knows them all. A made-up method is one label.
        let method = match method {
            "GET" | "POST" | "DELETE" => method,
            _ => "other",
        };
        let labels = RequestLabels {
            method: method.to_owned(),
            route: route.to_owned(),
            status,
        };
        self.requests.get_or_create(&labels).inc();
    }

    pub(crate) fn encode(
        &self,
        view: Option<&ClusterView>,
        state: &State,
    ) -> Result<String, ApiError> {
        let failed = |_| ApiError::new(ErrorCode::Internal, "the metrics cannot be written");
        let mut text = String::new();
        encode(&mut text, &self.lasting).map_err(failed)?;
        // The end mark belongs after the second half.
        let length = text.trim_end().trim_end_matches("# EOF").len();
        text.truncate(length);
        encode(&mut text, &gauges(view, state)).map_err(failed)?;
        Ok(text)
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn gauges(view: Option<&ClusterView>, state: &State) -> Registry {
    let mut registry = Registry::with_prefix("quorate");
    gauge(
        &mut registry,
        "revision",
        "Commands applied here",
        state.revision.0,
    );
    gauge(
        &mut registry,
        "events",
        "Events logged so far",
        state.log.last(),
    );
    let Some(view) = view else {
        gauge(&mut registry, "quorum", "A majority hears the leader", 0);
        return registry;
    };
    gauge(
        &mut registry,
        "quorum",
        "A majority hears the leader",
        u64::from(view.cluster.quorate),
    );
    gauge(
        &mut registry,
        "problems",
        "Problems shown by status",
        view.cluster.problems.len() as u64,
    );
    hosts(&mut registry, view);
    vms(&mut registry, view);
    services(&mut registry, view);
    registry
}

fn family<L: Clone + std::hash::Hash + Eq>() -> Family<L, Gauge> {
    Family::default()
}

fn label(name: impl ToString) -> Label {
    Label {
        name: name.to_string(),
    }
}

fn hosts(registry: &mut Registry, view: &ClusterView) {
    let (up, lease, owned) = (family::<Label>(), family::<Label>(), family::<Label>());
    for host in &view.hosts {
        let name = label(&host.name);
        let alive = matches!(host.state, HostState::Up | HostState::Suspect);
        up.get_or_create(&name).set(i64::from(alive));
        let left = host.lease_ms_left.unwrap_or(0);
        lease
            .get_or_create(&name)
            .set(i64::try_from(left).unwrap_or(i64::MAX));
        owned
            .get_or_create(&name)
            .set(i64::try_from(host.vms.len()).unwrap_or(i64::MAX));
    }
    registry.register("host_up", "The host answers", up);
    registry.register(
        "host_lease_left_milliseconds",
        "Lease left as the leader counts it",
        lease,
    );
    registry.register("host_vms", "VMs that the host owns", owned);
}

fn services(registry: &mut Registry, view: &ClusterView) {
    let (serving, members) = (family::<Label>(), family::<Label>());
    let (epoch, problems) = (family::<Label>(), family::<Label>());
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    for service in &view.services {
        let name = label(&service.name);
        let serves = |member: &&MemberView| {
            matches!(member.state, MemberState::Serving | MemberState::Moving)
        };
        let now = service.members.iter().filter(serves).count();
        serving.get_or_create(&name).set(count(now));
        members
            .get_or_create(&name)
            .set(count(service.members.len()));
        epoch
            .get_or_create(&name)
            .set(i64::try_from(service.epoch).unwrap_or(i64::MAX));
        problems
            .get_or_create(&name)
            .set(count(service.problems.len()));
    }
    registry.register(
        "service_members_serving",
        "Members that get connections because they are well",
        serving,
    );
    registry.register("service_members", "Members of the service", members);
    registry.register(
        "service_ring_epoch",
        "Epoch of the service's ring in force",
        epoch,
    );
    registry.register(
        "service_problems",
        "Problems of the service shown by status",
        problems,
    );
}

fn vms(registry: &mut Registry, view: &ClusterView) {
    let (up, ready, restarts) = (family::<Label>(), family::<Label>(), family::<Label>());
    let states = family::<StateLabel>();
    for vm in &view.vms {
        let name = label(&vm.name);
        let runs = matches!(vm.state, VmState::Running | VmState::Migrating);
        up.get_or_create(&name).set(i64::from(runs));
        ready.get_or_create(&name).set(i64::from(vm.ready));
        restarts.get_or_create(&name).set(i64::from(vm.restarts));
        let state = format!("{:?}", vm.state).to_lowercase();
        states.get_or_create(&StateLabel { state }).inc();
    }
    registry.register("vm_running", "The VM's CPUs run", up);
    registry.register("vm_ready", "The VM's ready check has succeeded", ready);
    registry.register(
        "vm_restarts",
        "Restarts after crashes under this epoch",
        restarts,
    );
    registry.register("vms", "VMs by state", states);
}
