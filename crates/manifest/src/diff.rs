//! What a manifest would change, field by field, for people.

use crate::check::Existing;
use quorate_types::Manifest;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What happens to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// It is new.
    Create,
    /// It exists and changes.
    Update,
}

/// One object that changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// New or changed.
    pub kind: ChangeKind,
    /// What it is: `vm`, `pool`, `network`, `rule`, `service`, `host`, `cluster`.
    pub object: String,
    /// Its name; empty for the cluster.
    pub name: String,
    /// The fields that differ; for a new object its fields.
    pub fields: Vec<FieldChange>,
}

/// One field that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// Where in the object: `disks[0].size`.
    pub field: String,
    /// Value before; absent: was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// Value after; absent: goes away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<String>,
}

impl fmt::Display for Change {
    /// A headline, and one line for each field of a change.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.kind {
            ChangeKind::Create => '+',
            ChangeKind::Update => '~',
        };
        write!(f, "{sign} {}", self.object)?;
        if !self.name.is_empty() {
            write!(f, " {}", self.name)?;
        }
        for field in &self.fields {
            write!(f, "\n    {field}")?;
        }
        Ok(())
    }
}

impl fmt::Display for FieldChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => write!(f, "{}: {old} -> {new}", self.field),
            (Some(old), None) => write!(f, "{}: {old} -> (removed)", self.field),
            (None, Some(new)) => write!(f, "{}: {new}", self.field),
            (None, None) => f.write_str(&self.field),
        }
    }
}

/// The changes that applying the manifest would make; empty: nothing.
#[must_use]
pub fn diff(existing: &Existing, manifest: &Manifest) -> Vec<Change> {
    let mut changes = Vec::new();
    if let Some(cluster) = &manifest.cluster {
        changes.extend(object("cluster", "", Some(&existing.cluster), cluster));
    }
    for (name, new) in &manifest.hosts {
        changes.extend(object(
            "host",
            name.as_str(),
            existing.host_specs.get(name),
            new,
        ));
    }
    for (name, new) in &manifest.networks {
        changes.extend(object(
            "network",
            name.as_str(),
            existing.networks.get(name),
            new,
        ));
    }
    for (name, new) in &manifest.pools {
        changes.extend(object("pool", name.as_str(), existing.pools.get(name), new));
    }
    for (name, new) in &manifest.vms {
        changes.extend(object("vm", name.as_str(), existing.vms.get(name), new));
    }
    for (name, new) in &manifest.rules {
        changes.extend(object("rule", name.as_str(), existing.rules.get(name), new));
    }
    for (name, new) in &manifest.services {
        let old = existing.services.get(name);
        changes.extend(object("service", name.as_str(), old, new));
    }
    changes
}

fn object<T: Serialize + PartialEq>(
    object: &str,
    name: &str,
    old: Option<&T>,
    new: &T,
) -> Option<Change> {
    if old == Some(new) {
        return None;
    }
    let before = old.map(flat).unwrap_or_default();
    let after = flat(new);
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let fields = names
        .into_iter()
        .filter(|field| before.get(*field) != after.get(*field))
        .map(|field| FieldChange {
            field: field.clone(),
            old: before.get(field).map(|text| hide(field, text)),
            new: after.get(field).map(|text| hide(field, text)),
        })
        .collect();
    Some(Change {
        kind: if old.is_some() {
            ChangeKind::Update
        } else {
            ChangeKind::Create
        },
        object: object.to_owned(),
        name: name.to_owned(),
        fields,
    })
}

/// Options of fence devices hold passwords.
fn hide(field: &str, text: &str) -> String {
    if field.starts_with("fencing.") && field.contains(".options.") {
        "(hidden)".to_owned()
    } else {
        text.to_owned()
    }
}

fn flat<T: Serialize>(value: &T) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    // Specs are plain data: they always serialise.
    if let Ok(value) = serde_json::to_value(value) {
        flatten("", &value, &mut out);
    }
    out
}

fn flatten(at: &str, value: &Value, out: &mut BTreeMap<String, String>) {
    let join = |key: &str| {
        if at.is_empty() {
            key.to_owned()
        } else {
            format!("{at}.{key}")
        }
    };
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map {
                flatten(&join(key), value, out);
            }
        }
        Value::Array(items) if items.iter().all(Value::is_string) => {
            let words: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
            if !words.is_empty() {
                out.insert(at.to_owned(), format!("[{}]", words.join(", ")));
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                flatten(&format!("{at}[{index}]"), value, out);
            }
        }
        Value::String(text) => {
            out.insert(at.to_owned(), text.clone());
        }
        other => {
            out.insert(at.to_owned(), other.to_string());
        }
    }
}
