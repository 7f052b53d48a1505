//! The `cluster:` section names settings that change; all others stay as they are in the cluster.
//!
//! Always holds: what the section names wins, field by field (`lease`, `admission`, `balancing`) and host by host
//! (`fencing`); a host with an empty list of devices, or an empty `fencing`, has none afterwards. A manifest
//! that sets one number must not take the fence devices away that another one gave.

use crate::check::Existing;
use serde_json::{Map, Value};

/// Settings that have fields, or entries, of their own.
const PARTS: &[&str] = &["lease", "admission", "balancing", "fencing"];

/// Adds to a manifest's settings those that it does not name.
pub(crate) fn keep(manifest: &mut Value, existing: &Existing) {
    let Some(Value::Object(named)) = manifest.get_mut("cluster") else {
        return;
    };
    let mut present = existing.cluster.clone();
    // A host that was removed has no devices any more.
    if !existing.hosts.is_empty() {
        present
            .fencing
            .retain(|host, _| existing.hosts.contains(host));
    }
    // Settings are plain data: they always serialise.
    let Ok(Value::Object(mut all)) = serde_json::to_value(&present) else {
        return;
    };
    for (name, value) in std::mem::take(named) {
        match (all.get_mut(&name), value) {
            (Some(Value::Object(old)), Value::Object(new)) if PARTS.contains(&name.as_str()) => {
                match name == "fencing" && new.is_empty() {
                    true => old.clear(),
                    false => old.extend(new),
                }
            }
            (_, value) => {
                all.insert(name, value);
            }
        }
    }
    if let Some(Value::Object(fencing)) = all.get_mut("fencing") {
        without_empty(fencing);
    }
    *named = all;
}

fn without_empty(fencing: &mut Map<String, Value>) {
    fencing.retain(|_, devices| devices.as_array().is_none_or(|list| !list.is_empty()));
}

#[cfg(test)]
mod tests {
    use crate::{Existing, diff, load};
    use quorate_types::{ClusterSettings, HostName, Millis};
    use std::collections::{BTreeMap, BTreeSet};

    const FIRST: &str = "
cluster:
  lease: {duration: 3s}
  migration_mib_per_s: 100
  total_migrations: 3
  fencing:
    h1: [{agent: fence_ipmilan, options: {ip: 192.0.2.1}}]
    h2: [{agent: fence_ipmilan, options: {ip: 192.0.2.2}}]
  admission: {failures: 2, mode: refuse}
";

    fn existing() -> Existing {
        let names = ["h1", "h2", "h3"].map(|name| HostName::new(name).unwrap());
        Existing {
            hosts: BTreeSet::from(names),
            ..Existing::default()
        }
    }

    fn apply(existing: &Existing, text: &str) -> ClusterSettings {
        let loaded = load(text, "m.yaml", &BTreeMap::new(), existing);
        let loaded = loaded.unwrap_or_else(|bad| panic!("{bad}"));
        loaded.manifest.cluster.unwrap()
    }

    fn set_up() -> Existing {
        let mut existing = existing();
        existing.cluster = apply(&existing, FIRST);
        existing
    }

    #[test]
    fn settings_that_a_manifest_does_not_name_stay() {
        let existing = set_up();
        let text = "cluster: {migration_mib_per_s: 50, lease: {heartbeat: 100ms}, admission: {failures: 1}}";
        let settings = apply(&existing, text);
        let mut wanted = existing.cluster.clone();
        wanted.migration_mib_per_s = 50;
        wanted.lease.heartbeat = Millis(100);
        wanted.admission.failures = 1;
        assert_eq!(settings, wanted);

        // What is shown before it is made is only that.
        let loaded = load(text, "m.yaml", &BTreeMap::new(), &existing).unwrap();
        let changes = diff(&existing, &loaded.manifest);
        let fields: Vec<&str> = changes[0]
            .fields
            .iter()
            .map(|of| of.field.as_str())
            .collect();
        assert_eq!(
            fields,
            [
                "admission.failures",
                "lease.heartbeat",
                "migration_mib_per_s"
            ]
        );
        for text in ["cluster: {}", "cluster:", FIRST] {
            assert_eq!(apply(&existing, text), existing.cluster, "{text}");
        }
    }

    #[test]
    fn a_setting_is_taken_back_by_its_value() {
        let existing = set_up();
        let text = "cluster: {migration_mib_per_s: 0, total_migrations: 0}";
        let settings = apply(&existing, text);
        assert_eq!(
            (settings.migration_mib_per_s, settings.total_migrations),
            (0, 0)
        );
    }

    #[test]
    fn devices_are_given_and_taken_host_by_host() {
        let mut existing = set_up();
        let devices = |existing: &Existing, text: &str| -> Vec<String> {
            let settings = apply(existing, text);
            let hosts = settings.fencing.iter();
            hosts
                .map(|(host, of)| format!("{host} {}", of.len()))
                .collect()
        };
        let third = "cluster: {fencing: {h3: [{agent: fence_ipmilan}]}}";
        assert_eq!(devices(&existing, third), ["h1 1", "h2 1", "h3 1"]);
        let none = "cluster: {fencing: {h1: []}}";
        assert_eq!(devices(&existing, none), ["h2 1"]);
        assert!(devices(&existing, "cluster: {fencing: {}}").is_empty());
        let other = "cluster: {fencing: {h1: [{agent: a}, {agent: b}]}}";
        assert_eq!(devices(&existing, other), ["h1 2", "h2 1"]);
        // Its devices went with the host.
        existing.hosts.remove(&HostName::new("h2").unwrap());
        assert_eq!(devices(&existing, "cluster: {max_voters: 3}"), ["h1 1"]);
    }

    #[test]
    fn numbers_are_judged_together_with_those_that_stay() {
        let mut existing = existing();
        existing.cluster = apply(
            &existing,
            "cluster: {lease: {heartbeat: 600ms, duration: 4s}}",
        );
        let text = "cluster: {lease: {duration: 1s}}";
        let refused = load(text, "m.yaml", &BTreeMap::new(), &existing).unwrap_err();
        let said = refused.to_string();
        assert!(said.contains("3 heartbeats"), "{said}");
    }
}
