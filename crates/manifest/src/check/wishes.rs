//! What rules and VMs say about labels, resources and limits that nothing has, or that say nothing.

use super::Checker;
use crate::suggest;
use quorate_types::spec::OnTimeout;
use quorate_types::{LabelName, RuleKind, RuleSpec, VmName, VmSpec};
use std::collections::BTreeSet;

impl Checker<'_> {
    pub(super) fn wishes(&mut self) {
        let manifest = self.manifest;
        for (name, rule) in &manifest.rules {
            self.rule_fields(name.as_str(), rule);
        }
        for (name, vm) in &manifest.vms {
            self.vm_wishes(name, vm);
        }
    }

    fn rule_fields(&mut self, name: &str, rule: &RuleSpec) {
        if rule.kind == RuleKind::KeepWith {
            for (field, given) in [
                ("across", rule.across.is_some()),
                ("max", rule.max.is_some()),
            ] {
                if given {
                    self.report(
                        &["rules", name, field],
                        format!("`{field}` means nothing for `keep_with`: it is always one host"),
                        "it goes with `keep_apart` and `spread`",
                    );
                }
            }
        }
        if let Some(label) = &rule.across {
            self.label(&["rules", name, "across"], label, rule.hard());
        }
    }

    /// A label that no host has. Soft rules may be written before the labels are.
    fn label(&mut self, path: &[&str], label: &LabelName, needed: bool) {
        if !needed || self.all.hosts.is_empty() || !self.all.label_values(label).is_empty() {
            return;
        }
        let specs = self.all.host_specs.values();
        let known: BTreeSet<&str> = specs
            .flat_map(|s| s.labels.keys())
            .map(|l| l.as_str())
            .collect();
        let hint = match suggest::nearest(label.as_str(), known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!(
                "label them: `quorate host label HOST {label}=VALUE`, or `labels:` under `hosts:`"
            ),
        };
        self.report(path, format!("no host has the label `{label}`"), hint);
    }

    fn vm_wishes(&mut self, name: &VmName, vm: &VmSpec) {
        let here = name.as_str();
        for (label, values) in &vm.host_labels {
            let path = ["vms", here, "host_labels", label.as_str()];
            self.label(&path, label, true);
            if values.is_empty() {
                let message = format!("`{label}` accepts no value: `{name}` could run nowhere");
                self.report(
                    &path,
                    message,
                    format!("list values, as in `{label}: [r1, r2]`"),
                );
            }
        }
        for (index, preference) in vm.prefer.iter().enumerate() {
            let index = index.to_string();
            if preference.hosts.is_empty() && preference.labels.is_empty() {
                self.report(
                    &["vms", here, "prefer", &index],
                    "this preference names neither hosts nor labels: it would hold for all alike",
                    "add `hosts: [h1]` or `labels: {rack: [r1]}`",
                );
            }
        }
        self.known_resources(here, vm);
        for (other, dependency) in &vm.depends_on {
            let path = ["vms", here, "depends_on", other.as_str(), "on_timeout"];
            if dependency.on_timeout == OnTimeout::Start && dependency.timeout.is_none() {
                self.report(
                    &path,
                    "`on_timeout` without `timeout` never happens",
                    "add a limit, as in `timeout: 5m`",
                );
            }
        }
    }

    fn known_resources(&mut self, here: &str, vm: &VmSpec) {
        if self.all.hosts.is_empty() {
            return;
        }
        for (resource, need) in vm.resources.iter().filter(|(_, need)| **need > 0) {
            let specs = self.all.host_specs.values();
            let known: BTreeSet<&str> = specs
                .flat_map(|spec| spec.resources.keys())
                .map(|name| name.as_str())
                .collect();
            let specs = self.all.host_specs.values();
            let most = specs
                .filter_map(|spec| spec.resources.get(resource).copied())
                .max();
            let path = ["vms", here, "resources", resource.as_str()];
            match most {
                None => {
                    let hint = match suggest::nearest(resource.as_str(), known) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => "say what each host has: `resources:` under `hosts:`".to_owned(),
                    };
                    self.report(
                        &path,
                        format!("no host has the resource `{resource}`"),
                        hint,
                    );
                }
                Some(most) if most < *need => self.report(
                    &path,
                    format!("{need} of `{resource}` are more than any host has ({most})"),
                    "lower it, or raise what a host has under `hosts:`",
                ),
                Some(_) => {}
            }
        }
    }
}
