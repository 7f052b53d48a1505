//! Cluster properties, in older and newer spellings.

use super::super::model::Cib;
use super::super::rules::{Facts, resolve};
use super::super::values;
use quorate_planner::engine::{Score, Strategy};
use std::collections::BTreeMap;

/// What to do without a majority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum NoQuorum {
    Ignore,
    Freeze,
    #[default]
    Stop,
    Fence,
}

/// What the properties say.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub(crate) fencing: bool,
    pub(crate) watchdog: bool,
    pub(crate) startup_fencing: bool,
    pub(crate) symmetric: bool,
    pub(crate) stop_all: bool,
    pub(crate) maintenance: bool,
    pub(crate) stop_removed: bool,
    pub(crate) probes: bool,
    pub(crate) no_quorum: NoQuorum,
    pub(crate) strategy: Strategy,
    pub(crate) node_pending_ms: u64,
    pub(crate) cluster_name: Option<String>,
    pub(crate) health: Option<Health>,
}

/// How the health of hosts counts.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Health {
    pub(crate) base: Score,
    pub(crate) green: Score,
    pub(crate) yellow: Score,
    pub(crate) red: Score,
}

impl Options {
    pub(super) fn new(cib: &Cib, now: i64) -> Self {
        let facts = Facts {
            now,
            ..Facts::default()
        };
        let values = resolve(&cib.properties, &facts, Some("cib-bootstrap-options"));
        // The newer spelling wins.
        let find = |names: &[&str]| names.iter().find_map(|name| values.get(*name));
        let truth = |names: &[&str], default: bool| {
            find(names)
                .and_then(|text| values::truth(text))
                .unwrap_or(default)
        };
        let fencing = truth(&["fencing-enabled", "stonith-enabled"], true);
        let duration = |name: &str| values.get(name).and_then(|text| values::duration_ms(text));
        Self {
            fencing,
            watchdog: truth(&["have-watchdog"], false),
            startup_fencing: fencing && truth(&["startup-fencing"], true),
            symmetric: truth(&["symmetric-cluster"], true),
            stop_all: truth(&["stop-all-resources"], false),
            maintenance: truth(&["maintenance-mode"], false),
            stop_removed: truth(&["stop-removed-resources", "stop-orphan-resources"], true),
            probes: truth(&["enable-startup-probes"], true),
            no_quorum: no_quorum(find(&["no-quorum-policy"]), cib, fencing),
            strategy: match find(&["placement-strategy"]).map(String::as_str) {
                Some("utilization") => Strategy::Limit,
                Some("balanced") => Strategy::Balanced,
                Some("minimal") => Strategy::Dense,
                _ => Strategy::Spread,
            },
            node_pending_ms: duration("node-pending-timeout").unwrap_or(0),
            cluster_name: values.get("cluster-name").cloned(),
            health: health(&values),
        }
    }
}

fn no_quorum(value: Option<&String>, cib: &Cib, fencing: bool) -> NoQuorum {
    match value.map(|text| text.to_ascii_lowercase()).as_deref() {
        Some("ignore") => NoQuorum::Ignore,
        Some("freeze") => NoQuorum::Freeze,
        Some("fence" | "suicide") if fencing && (cib.may_panic || cib.has_quorum) => {
            NoQuorum::Fence
        }
        _ => NoQuorum::Stop,
    }
}

fn health(values: &BTreeMap<String, String>) -> Option<Health> {
    const BAN: Score = -quorate_planner::engine::INFINITY;
    let score = |name: &str, default: Score| {
        values
            .get(name)
            .and_then(|text| values::score(text))
            .unwrap_or(default)
    };
    match values.get("node-health-strategy").map(String::as_str) {
        Some("migrate-on-red") => Some(Health {
            red: BAN,
            ..Health::default()
        }),
        Some("only-green") => Some(Health {
            red: BAN,
            yellow: BAN,
            ..Health::default()
        }),
        Some("progressive" | "custom") => {
            let progressive = values.get("node-health-strategy").map(String::as_str);
            Some(Health {
                base: match progressive {
                    Some("progressive") => score("node-health-base", 0),
                    _ => 0,
                },
                green: score("node-health-green", 0),
                yellow: score("node-health-yellow", 0),
                red: score("node-health-red", BAN),
            })
        }
        _ => None,
    }
}
