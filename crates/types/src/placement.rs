//! Where VMs may and should run: labels and resources of hosts, wishes of VMs, rules over several.
//!
//! Always holds: a [`RuleSpec`] is about one kind of rule and names its VMs once; what is hard is
//! never broken by a plan, what has a weight is only ever weighed. Weights are on the scale of the
//! planner's scores: 1000 is the difference between an empty and a full host.

use crate::{HostName, LabelName, Millis, ResourceName, VmName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Largest weight of a preference or a soft rule.
pub const MAX_WEIGHT: i32 = 100_000;

/// What an operator says of a host. It adds to what the host reports itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostSpec {
    /// Where and what it is: `rack: r1`, `room: a`, `disk: ssd`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<LabelName, LabelName>,
    /// Countable things that guests use up, beside CPU and memory: `gpu: 2`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub resources: BTreeMap<ResourceName, u64>,
    /// Most virtual CPUs, in percent of its CPU threads; absent: what the cluster says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_overcommit_percent: Option<u32>,
    /// Migrations at the same time from or to it; absent: what the cluster says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel_migrations: Option<u32>,
}

/// Label -> accepted values. A host matches when it has one of the values for every label.
pub type LabelSelector = BTreeMap<LabelName, BTreeSet<LabelName>>;

impl HostSpec {
    /// Whether the host's labels match.
    #[must_use]
    pub fn matches(&self, selector: &LabelSelector) -> bool {
        selector.iter().all(|(label, values)| {
            self.labels
                .get(label)
                .is_some_and(|value| values.contains(value))
        })
    }

    /// Nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Hosts that a VM would rather run on, or rather not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preference {
    /// By name; empty: any name.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
    /// By label; empty: any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: LabelSelector,
    /// How much; negative: rather not there.
    #[serde(default = "default_preference")]
    pub weight: i32,
}

fn default_preference() -> i32 {
    100
}

impl Preference {
    /// Whether it is about this host.
    #[must_use]
    pub fn is_about(&self, name: &HostName, host: &HostSpec) -> bool {
        (self.hosts.is_empty() || self.hosts.contains(name)) && host.matches(&self.labels)
    }
}

/// What a dependent waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// The other VM's CPUs run.
    Started,
    /// The other VM is ready.
    #[default]
    Ready,
}

/// What happens when a dependency is waited for longer than its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// It goes on waiting, and says so as a problem.
    #[default]
    Wait,
    /// It starts without what it waited for.
    Start,
}

/// What a dependent can bear of what it depends on, least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tolerates {
    /// Only the blackout of a live migration.
    #[default]
    Nothing,
    /// A pause of seconds: quick migration is used where the other VM would have to be stopped.
    Pause,
    /// That it is stopped and started again.
    Stop,
}

/// One `depends_on` entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dependency {
    /// What is waited for.
    pub condition: Condition,
    /// Only an order: it is not waited for what shall not run, cannot run or keeps failing.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub advisory: bool,
    /// Longest wait, counted from when a start was first wanted; absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Millis>,
    /// What happens then.
    #[serde(skip_serializing_if = "is_default")]
    pub on_timeout: OnTimeout,
    /// What this VM can bear when the other one has to move and cannot move live.
    #[serde(skip_serializing_if = "is_default")]
    pub tolerates: Tolerates,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Kinds of placement rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleKind {
    /// At most `max` of these in one domain.
    KeepApart,
    /// All of these on one host.
    KeepWith,
    /// As evenly over the domains as their number allows.
    Spread,
}

impl RuleKind {
    /// The field of the manifest that makes a rule one of this kind.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::KeepApart => "keep_apart",
            Self::KeepWith => "keep_with",
            Self::Spread => "spread",
        }
    }
}

/// A placement rule over several VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RuleFields", into = "RuleFields")]
pub struct RuleSpec {
    /// What it asks for.
    pub kind: RuleKind,
    /// The VMs that it is about.
    pub vms: BTreeSet<VmName>,
    /// The label whose values are the domains; absent: each host is one.
    pub across: Option<LabelName>,
    /// Most of the VMs in one domain; absent: 1 for `keep_apart`, an even share for `spread`.
    pub max: Option<u32>,
    /// Soft, with this weight; absent: hard, a plan never breaks it.
    pub weight: Option<i32>,
}

/// How a rule is written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RuleFields {
    #[serde(skip_serializing_if = "Option::is_none")]
    keep_apart: Option<BTreeSet<VmName>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    keep_with: Option<BTreeSet<VmName>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spread: Option<BTreeSet<VmName>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    across: Option<LabelName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<i32>,
}

impl TryFrom<RuleFields> for RuleSpec {
    type Error = String;

    fn try_from(fields: RuleFields) -> Result<Self, String> {
        let mut kinds = [
            (RuleKind::KeepApart, fields.keep_apart),
            (RuleKind::KeepWith, fields.keep_with),
            (RuleKind::Spread, fields.spread),
        ]
        .into_iter()
        .filter_map(|(kind, vms)| vms.map(|vms| (kind, vms)));
        let (Some((kind, vms)), None) = (kinds.next(), kinds.next()) else {
            return Err("a rule takes exactly one of keep_apart, keep_with, spread".into());
        };
        Ok(Self {
            kind,
            vms,
            across: fields.across,
            max: fields.max,
            weight: fields.weight,
        })
    }
}

impl From<RuleSpec> for RuleFields {
    fn from(rule: RuleSpec) -> Self {
        let mut fields = Self {
            across: rule.across,
            max: rule.max,
            weight: rule.weight,
            ..Self::default()
        };
        let place = match rule.kind {
            RuleKind::KeepApart => &mut fields.keep_apart,
            RuleKind::KeepWith => &mut fields.keep_with,
            RuleKind::Spread => &mut fields.spread,
        };
        *place = Some(rule.vms);
        fields
    }
}

impl RuleSpec {
    /// A hard rule over hosts.
    #[must_use]
    pub fn new(kind: RuleKind, vms: BTreeSet<VmName>) -> Self {
        Self {
            kind,
            vms,
            across: None,
            max: None,
            weight: None,
        }
    }

    /// No two of these on one host.
    #[must_use]
    pub fn keep_apart(vms: BTreeSet<VmName>) -> Self {
        Self::new(RuleKind::KeepApart, vms)
    }

    /// All of these on one host.
    #[must_use]
    pub fn keep_with(vms: BTreeSet<VmName>) -> Self {
        Self::new(RuleKind::KeepWith, vms)
    }

    /// The VMs that the rule is about.
    #[must_use]
    pub fn vms(&self) -> &BTreeSet<VmName> {
        &self.vms
    }

    /// A plan never breaks it.
    #[must_use]
    pub fn hard(&self) -> bool {
        self.weight.is_none()
    }

    /// Keeps these on one host, as a hard rule.
    #[must_use]
    pub fn ties(&self) -> bool {
        self.kind == RuleKind::KeepWith && self.hard()
    }

    /// What it asks for, in words: `kept apart (rack, at most 2)`.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = match self.kind {
            RuleKind::KeepApart => "kept apart",
            RuleKind::KeepWith => "kept together",
            RuleKind::Spread => "spread evenly",
        }
        .to_owned();
        if let Some(label) = &self.across {
            text.push_str(&format!(" across every {label}"));
        }
        if let Some(max) = self.max {
            text.push_str(&format!(", at most {max} in one"));
        }
        if let Some(weight) = self.weight {
            text.push_str(&format!(", if possible (weight {weight})"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_as_before() {
        let vms: BTreeSet<VmName> = ["a", "b"].map(|name| VmName::new(name).unwrap()).into();
        let rule = RuleSpec::keep_apart(vms);
        let text = serde_json::to_string(&rule).unwrap();
        assert_eq!(text, r#"{"keep_apart":["a","b"]}"#);
        assert_eq!(serde_json::from_str::<RuleSpec>(&text).unwrap(), rule);
        let text = r#"{"spread":["a","b"],"across":"rack","max":2,"weight":5}"#;
        let rule: RuleSpec = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&rule).unwrap(), text);
        assert_eq!(
            rule.describe(),
            "spread evenly across every rack, at most 2 in one, if possible (weight 5)"
        );
    }

    #[test]
    fn a_rule_is_of_one_kind() {
        for text in ["{}", r#"{"keep_apart":[],"keep_with":[]}"#, r#"{"max":1}"#] {
            assert!(serde_json::from_str::<RuleSpec>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_selector_asks_for_every_label() {
        let name = |text: &str| LabelName::new(text).unwrap();
        let host = HostSpec {
            labels: [(name("rack"), name("r1")), (name("disk"), name("ssd"))].into(),
            ..HostSpec::default()
        };
        let select = |pairs: &[(&str, &[&str])]| -> LabelSelector {
            pairs
                .iter()
                .map(|(label, values)| (name(label), values.iter().map(|v| name(v)).collect()))
                .collect()
        };
        assert!(host.matches(&select(&[])));
        assert!(host.matches(&select(&[("rack", &["r1", "r2"]), ("disk", &["ssd"])])));
        assert!(!host.matches(&select(&[("rack", &["r2"])])));
        assert!(!host.matches(&select(&[("room", &["a"])])));
    }
}
