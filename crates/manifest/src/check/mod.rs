//! The rules between objects, and the values of fields that types alone cannot refuse.
//!
//! Owns: everything that can be known to be wrong from the manifest and the cluster's specs.
//! Always holds: the manifest is looked at together with what exists, as it would be after the
//! apply; a problem is reported only where the manifest touches it. Must not: know what hosts
//! report (capacity, pools that do not work just now): that is the planner's.

mod dependencies;
mod fields;
mod placement;
mod pools;
mod references;
mod services;
mod sharing;
mod wishes;

use quorate_types::{
    ClusterSettings, HostName, HostSpec, LabelName, Manifest, NetworkName, NetworkSpec, PoolName,
    PoolSpec, RuleName, RuleSpec, ServiceName, ServiceSpec, VmName, VmSpec,
};
use std::collections::{BTreeMap, BTreeSet};

/// What the cluster has already.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Existing {
    /// The cluster's settings.
    pub cluster: ClusterSettings,
    /// Hosts; empty: not known, and nothing about hosts is checked.
    pub hosts: BTreeSet<HostName>,
    /// Their labels and resources, where anything is said of them.
    pub host_specs: BTreeMap<HostName, HostSpec>,
    /// Networks.
    pub networks: BTreeMap<NetworkName, NetworkSpec>,
    /// Pools.
    pub pools: BTreeMap<PoolName, PoolSpec>,
    /// Virtual machines.
    pub vms: BTreeMap<VmName, VmSpec>,
    /// Rules.
    pub rules: BTreeMap<RuleName, RuleSpec>,
    /// Services.
    pub services: BTreeMap<ServiceName, ServiceSpec>,
    /// Disks that the cluster has for itself, by [`PoolSpec::identity`], each with what it is for.
    pub reserved: BTreeMap<String, String>,
}

/// Something wrong between objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where in the manifest: `["vms", "app", "depends_on", "dbb"]`.
    pub path: Vec<String>,
    /// What is wrong, in one line.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Existing {
    /// How things stand after the manifest: its objects replace those of the same name.
    #[must_use]
    pub fn with(&self, manifest: &Manifest) -> Self {
        let mut all = self.clone();
        if let Some(cluster) = &manifest.cluster {
            all.cluster = cluster.clone();
        }
        all.host_specs.extend(manifest.hosts.clone());
        all.networks.extend(manifest.networks.clone());
        all.pools.extend(manifest.pools.clone());
        all.vms.extend(manifest.vms.clone());
        all.rules.extend(manifest.rules.clone());
        all.services.extend(manifest.services.clone());
        all
    }

    /// Hosts that a VM may run on by its own wishes and its pools; `None`: any.
    fn allowed(&self, vm: &VmSpec) -> Option<BTreeSet<HostName>> {
        let mut allowed = (!self.hosts.is_empty()).then(|| self.hosts.clone());
        let pools = vm
            .disks
            .iter()
            .filter_map(|disk| self.pools.get(&disk.pool));
        for limit in std::iter::once(&vm.hosts).chain(pools.map(PoolSpec::hosts)) {
            if limit.is_empty() {
                continue;
            }
            allowed = Some(match allowed {
                Some(allowed) => allowed.intersection(limit).cloned().collect(),
                None => limit.clone(),
            });
        }
        if !self.hosts.is_empty()
            && let Some(allowed) = &mut allowed
        {
            let nothing = HostSpec::default();
            let spec = |host: &HostName| self.host_specs.get(host).unwrap_or(&nothing);
            allowed.retain(|host| spec(host).matches(&vm.host_labels));
        }
        allowed
    }

    /// All values of a label.
    fn label_values(&self, label: &LabelName) -> BTreeSet<&LabelName> {
        let specs = self.host_specs.iter();
        let specs = specs.filter(|(host, _)| self.hosts.contains(*host));
        specs
            .filter_map(|(_, spec)| spec.labels.get(label))
            .collect()
    }
}

/// Collects problems.
struct Checker<'a> {
    manifest: &'a Manifest,
    /// As it would be after the apply.
    all: Existing,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn report(&mut self, path: &[&str], message: impl Into<String>, hint: impl Into<String>) {
        let hint = Some(hint.into()).filter(|hint| !hint.is_empty());
        self.problems.push(Problem {
            path: path.iter().map(|&step| step.to_owned()).collect(),
            message: message.into(),
            hint,
        });
    }
}

/// All problems of the manifest, as it would stand in the cluster.
#[must_use]
pub fn check(manifest: &Manifest, existing: &Existing) -> Vec<Problem> {
    let mut checker = Checker {
        manifest,
        all: existing.with(manifest),
        problems: Vec::new(),
    };
    checker.fields();
    checker.references();
    checker.dependencies();
    checker.sharing();
    checker.wishes();
    checker.placement();
    checker.services();
    let mut problems = checker.problems;
    problems.sort();
    problems.dedup();
    problems
}

/// `a, b and c`, each in back quotes.
fn listed<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names
        .into_iter()
        .map(|name| format!("`{}`", name.as_ref()))
        .collect();
    match names.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, before)) => format!("{} and {last}", before.join(", ")),
    }
}
