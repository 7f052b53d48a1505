//! What is written in a CIB, as far as Quorate reads it.

use crate::{Place, Problem};
use quorate_planner::engine::Score;
use std::collections::{BTreeMap, BTreeSet};

/// A cluster information base.
#[derive(Debug, Clone, Default)]
pub struct Cib {
    /// When it was to be judged, if it says so; seconds since 1970.
    pub execution_date: Option<i64>,
    /// What cannot be represented: clones, bundles, remote nodes, tickets.
    pub unsupported: Vec<Problem>,
    /// What is ignored, as Pacemaker would ignore it.
    pub warnings: Vec<Problem>,
    /// Names of resources and nodes that are there but not supported.
    pub(super) set_aside: BTreeSet<String>,
    pub(super) has_quorum: bool,
    /// There is a device that can fence hosts.
    pub(super) has_fence_device: bool,
    pub(super) may_panic: bool,
    /// Id of the node that decides.
    pub(super) coordinator: Option<String>,
    pub(super) properties: Vec<AttributeSet>,
    pub(super) nodes: Vec<Node>,
    pub(super) resources: Vec<Resource>,
    /// Clones of single primitives: no plan is made for them, but copies of a VM can be VMs.
    pub(super) clones: Vec<CloneOf>,
    pub(super) constraints: Vec<Constraint>,
    pub(super) resource_defaults: Vec<AttributeSet>,
    pub(super) operation_defaults: Vec<AttributeSet>,
    pub(super) tags: BTreeMap<String, Vec<String>>,
    pub(super) states: Vec<NodeState>,
}

/// Names with values, which hold when the rule does.
#[derive(Debug, Clone, Default)]
pub(super) struct AttributeSet {
    pub(super) id: String,
    pub(super) score: Score,
    pub(super) rule: Option<Rule>,
    pub(super) pairs: Vec<(String, String)>,
}

/// Conditions, all or one of which must hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Rule {
    pub(super) all: bool,
    pub(super) conditions: Vec<Condition>,
    pub(super) score: Option<Score>,
    pub(super) score_attribute: Option<String>,
    pub(super) role: Option<String>,
}

/// One condition.
#[derive(Debug, Clone)]
pub(super) enum Condition {
    Rule(Rule),
    Attribute {
        attribute: String,
        operation: String,
        value: Option<String>,
        kind: Option<String>,
        source: Option<String>,
    },
    Date {
        operation: String,
        start: Option<i64>,
        end: Option<i64>,
        duration: Option<BTreeMap<String, String>>,
        parts: Option<BTreeMap<String, String>>,
    },
    Resource {
        class: Option<String>,
        provider: Option<String>,
        kind: Option<String>,
    },
    Operation {
        name: String,
        interval_ms: Option<u64>,
    },
    /// Not understood: does not hold.
    Unknown,
}

/// A host.
#[derive(Debug, Clone, Default)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) score: Score,
    pub(super) attributes: Vec<AttributeSet>,
    pub(super) utilization: Vec<AttributeSet>,
}

/// A primitive or a group.
#[derive(Debug, Clone)]
pub(super) enum Resource {
    Primitive(Primitive),
    Group(GroupOf),
}

/// A group of primitives.
#[derive(Debug, Clone, Default)]
pub(super) struct GroupOf {
    pub(super) id: String,
    pub(super) meta: Vec<AttributeSet>,
    pub(super) members: Vec<Primitive>,
}

/// A primitive that runs several times.
#[derive(Debug, Clone, Default)]
pub(super) struct CloneOf {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) meta: Vec<AttributeSet>,
    pub(super) primitive: Primitive,
}

/// A single resource.
#[derive(Debug, Clone, Default)]
pub(super) struct Primitive {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) class: Option<String>,
    pub(super) provider: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) template: Option<String>,
    pub(super) meta: Vec<AttributeSet>,
    pub(super) parameters: Vec<AttributeSet>,
    pub(super) utilization: Vec<AttributeSet>,
    pub(super) operations: Vec<Operation>,
}

/// A configured operation of a resource.
#[derive(Debug, Clone, Default)]
pub(super) struct Operation {
    pub(super) name: String,
    pub(super) interval_ms: u64,
    pub(super) attributes: BTreeMap<String, String>,
    pub(super) meta: Vec<AttributeSet>,
}

/// A rule between resources, or between a resource and hosts.
#[derive(Debug, Clone)]
pub(super) enum Constraint {
    Location(Location),
    Colocation(Colocation),
    Order(Ordering),
}

/// Several resources in a constraint.
#[derive(Debug, Clone, Default)]
pub(super) struct ResourceSet {
    pub(super) place: Place,
    pub(super) members: Vec<String>,
    pub(super) sequential: Option<bool>,
    pub(super) require_all: Option<bool>,
    pub(super) action: Option<String>,
    pub(super) role: Option<String>,
    pub(super) score: Option<Score>,
    pub(super) kind: Option<String>,
    pub(super) ordering: Option<String>,
}

/// Where resources may run.
#[derive(Debug, Clone, Default)]
pub(super) struct Location {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) resource: Option<String>,
    pub(super) pattern: Option<String>,
    pub(super) sets: Vec<ResourceSet>,
    pub(super) node: Option<String>,
    pub(super) score: Option<Score>,
    pub(super) role: Option<String>,
    pub(super) rules: Vec<Rule>,
    pub(super) discovery: Option<String>,
}

/// What runs together or apart.
#[derive(Debug, Clone, Default)]
pub(super) struct Colocation {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) score: Score,
    pub(super) resource: Option<String>,
    pub(super) with: Option<String>,
    pub(super) resource_role: Option<String>,
    pub(super) with_role: Option<String>,
    pub(super) attribute: Option<String>,
    pub(super) influence: Option<bool>,
    pub(super) sets: Vec<ResourceSet>,
}

/// What starts (and stops) after what.
#[derive(Debug, Clone, Default)]
pub(super) struct Ordering {
    pub(super) place: Place,
    pub(super) id: String,
    pub(super) first: Option<String>,
    pub(super) then: Option<String>,
    pub(super) first_action: Option<String>,
    pub(super) then_action: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) score: Option<Score>,
    pub(super) symmetrical: Option<bool>,
    pub(super) sets: Vec<ResourceSet>,
}

/// What the cluster says about a host.
#[derive(Debug, Clone, Default)]
pub(super) struct NodeState {
    pub(super) id: String,
    pub(super) name: Option<String>,
    pub(super) in_ccm: Option<String>,
    pub(super) crmd: Option<String>,
    pub(super) join: Option<String>,
    pub(super) expected: Option<String>,
    pub(super) attributes: Vec<AttributeSet>,
    pub(super) utilization: Vec<AttributeSet>,
    pub(super) histories: Vec<History>,
}

/// What happened to a resource on a host.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    pub(super) place: Place,
    pub(super) resource: String,
    pub(super) class: Option<String>,
    pub(super) provider: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) events: Vec<Event>,
}

/// One operation and its result.
#[derive(Debug, Clone, Default)]
pub(super) struct Event {
    pub(super) id: String,
    /// Which operation it is, however often it was repeated.
    pub(super) key: String,
    pub(super) task: String,
    pub(super) interval_ms: u64,
    pub(super) status: Option<i32>,
    pub(super) code: Option<i32>,
    /// The result that was expected; `None` in formats too old to say.
    pub(super) expected: Option<i32>,
    pub(super) call: i64,
    pub(super) on_node: Option<String>,
    pub(super) changed: Option<i64>,
    /// Which transition it belongs to: the scheduler's id and a number.
    pub(super) transition: Option<(String, i64)>,
    pub(super) source: Option<String>,
    pub(super) target: Option<String>,
}
