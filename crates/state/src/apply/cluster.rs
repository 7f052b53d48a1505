//! Commands about the cluster and its hosts.

use super::{Change, unknown};
use crate::command::{Command, Refusal};
use crate::event::{EventKind, Subject};
use crate::model::{ClusterInfo, HostMode, HostRecord, TokenRecord};
use crate::quorum::Witness;
use quorate_types::{HostName, HostSpec, LabelName, Millis, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// Most join tokens that are open at a time.
const TOKENS_KEPT: usize = 256;

pub(super) fn create(change: &mut Change<'_>) -> Result<(), Refusal> {
    let Command::CreateCluster {
        id,
        name,
        ca_certificate,
        ca_key,
        host,
        address,
        settings,
    } = &change.envelope.command
    else {
        return Ok(());
    };
    if change.state.cluster.is_some() {
        return Err(Refusal::Cluster("the cluster exists already".into()));
    }
    settings
        .check()
        .map_err(|problem| Refusal::Invalid(vec![problem]))?;
    change.state.cluster = Some(ClusterInfo {
        id: id.clone(),
        name: name.clone(),
        ca_certificate: ca_certificate.clone(),
        ca_key: ca_key.clone(),
        created: change.envelope.at,
        settings: settings.clone(),
    });
    add_host(change, host, address);
    change.event(
        EventKind::Changed,
        Subject::Cluster,
        format!("cluster {name} created with host {host}"),
    );
    Ok(())
}

fn add_host(change: &mut Change<'_>, host: &HostName, address: &str) {
    change.state.last_node += 1;
    let node = change.state.last_node;
    let record = HostRecord {
        node,
        address: address.to_owned(),
        mode: HostMode::Active,
        spec: HostSpec::default(),
        joined: change.envelope.at,
        armed: None,
        changed: change.revision,
    };
    change.state.hosts.insert(host.clone(), record);
    change.node = Some(node);
    super::quorum::host_joined(change, node);
    change.topology_changed();
}

pub(super) fn create_token(
    change: &mut Change<'_>,
    hash: &str,
    expires: Timestamp,
) -> Result<(), Refusal> {
    let now = change.envelope.at;
    change.state.tokens.retain(|_, token| token.expires > now);
    if change.state.tokens.len() >= TOKENS_KEPT {
        return Err(Refusal::InUse(format!(
            "there are {TOKENS_KEPT} open join tokens: use them or wait until they expire"
        )));
    }
    change.state.tokens.insert(
        hash.to_owned(),
        TokenRecord {
            expires,
            witness: false,
        },
    );
    change.event(EventKind::Host, Subject::Cluster, "join token created");
    Ok(())
}

pub(super) fn check_token(change: &Change<'_>, token: &str, witness: bool) -> Result<(), Refusal> {
    let now = change.envelope.at;
    let record = change.state.tokens.get(token);
    if record.is_some_and(|record| record.expires > now && record.witness == witness) {
        return Ok(());
    }
    Err(Refusal::Token)
}

pub(super) fn admit(
    change: &mut Change<'_>,
    token: &str,
    host: &HostName,
    address: &str,
) -> Result<(), Refusal> {
    check_token(change, token, false)?;
    if let Some(Witness::Remote {
        name, address: at, ..
    }) = &change.state.quorum.witness
        && (name == host || at == address)
    {
        return Err(Refusal::InUse(format!(
            "the witness {name} has this name or address"
        )));
    }
    if change.state.hosts.contains_key(host) {
        return Err(Refusal::Exists {
            kind: "host".into(),
            name: host.to_string(),
        });
    }
    if let Some((other, _)) = change
        .state
        .hosts
        .iter()
        .find(|(_, record)| record.address == address)
    {
        return Err(Refusal::InUse(format!(
            "host {other} has the address {address} already"
        )));
    }
    change.state.tokens.remove(token);
    add_host(change, host, address);
    change.event(
        EventKind::Host,
        Subject::Host(host.clone()),
        format!("host {host} joined from {address}"),
    );
    Ok(())
}

pub(super) fn remove(change: &mut Change<'_>, host: &HostName) -> Result<(), Refusal> {
    if !change.state.hosts.contains_key(host) {
        return Err(unknown("host", host));
    }
    if change.state.hosts.len() == 1 {
        return Err(Refusal::InUse(format!(
            "{host} is the last host of the cluster"
        )));
    }
    let owned: Vec<_> = change
        .state
        .vms
        .iter()
        .filter(|(_, vm)| vm.ownership.hosts().iter().any(|(owner, _)| *owner == host))
        .map(|(name, _)| name.to_string())
        .collect();
    if !owned.is_empty() {
        return Err(Refusal::InUse(format!(
            "host {host} still has {}: run `quorate host drain {host} --wait` first, or `quorate host confirm-dead {host}` if it is gone for good",
            owned.join(", ")
        )));
    }
    let only = super::copies::only_here(change.state, host);
    if !only.is_empty() {
        return Err(Refusal::InUse(format!(
            "host {host} has the only copy of {}: start the VM there until another copy is in step, or delete the VM",
            only.join(", ")
        )));
    }
    super::copies::forget_host(change.state, host);
    super::writes::forget(change.state, |_, _, by| by == host);
    super::services::forget_host(change.state, host);
    change.state.hosts.remove(host);
    super::storage::forget_cuts(change, |gone, _| gone == host);
    change.state.quorum.left.remove(host);
    change.topology_changed();
    change.event(
        EventKind::Host,
        Subject::Host(host.clone()),
        format!("host {host} removed"),
    );
    Ok(())
}

pub(super) fn set_mode(
    change: &mut Change<'_>,
    host: &HostName,
    mode: HostMode,
) -> Result<(), Refusal> {
    let revision = change.revision;
    let Some(record) = change.state.hosts.get_mut(host) else {
        return Err(unknown("host", host));
    };
    if record.mode == mode || (record.mode == HostMode::Maintenance && mode == HostMode::Draining) {
        return Ok(());
    }
    record.mode = mode;
    record.changed = revision;
    change.topology_changed();
    let text = match mode {
        HostMode::Active => format!("host {host} takes VMs again"),
        HostMode::Draining => format!("host {host} is being drained"),
        HostMode::Maintenance => format!("host {host} is empty and in maintenance"),
    };
    change.event(EventKind::Host, Subject::Host(host.clone()), text);
    Ok(())
}

pub(super) fn record_armed(
    change: &mut Change<'_>,
    host: &HostName,
    armed: Option<Millis>,
) -> Result<(), Refusal> {
    let revision = change.revision;
    let Some(record) = change.state.hosts.get_mut(host) else {
        return Err(unknown("host", host));
    };
    if record.armed == armed {
        return Ok(());
    }
    record.armed = armed;
    record.changed = revision;
    let text = match armed {
        Some(bound) => format!("guard and watchdog of {host} are armed ({bound})"),
        None => format!(
            "guard or watchdog of {host} is not armed: an expired lease proves nothing about it"
        ),
    };
    change.event(EventKind::Host, Subject::Host(host.clone()), text);
    Ok(())
}

/// Most labels of a host.
const LABELS_KEPT: usize = 64;

/// Replaces what is said of a host.
pub(super) fn set_spec(
    change: &mut Change<'_>,
    host: &HostName,
    spec: &HostSpec,
) -> Result<(), Refusal> {
    let revision = change.revision;
    let Some(record) = change.state.hosts.get_mut(host) else {
        return Err(unknown("host", host));
    };
    if record.spec == *spec {
        return Ok(());
    }
    record.spec = spec.clone();
    record.changed = revision;
    change.topology_changed();
    change.event(
        EventKind::Changed,
        Subject::Host(host.clone()),
        format!("labels or resources of host {host} changed"),
    );
    Ok(())
}

/// Adds, changes and removes single labels.
pub(super) fn label(
    change: &mut Change<'_>,
    host: &HostName,
    set: &BTreeMap<LabelName, LabelName>,
    remove: &BTreeSet<LabelName>,
) -> Result<(), Refusal> {
    let Some(record) = change.state.hosts.get(host) else {
        return Err(unknown("host", host));
    };
    let mut spec = record.spec.clone();
    spec.labels.retain(|label, _| !remove.contains(label));
    spec.labels.extend(set.clone());
    if spec.labels.len() > LABELS_KEPT {
        return Err(Refusal::InUse(format!(
            "host {host} would have more than {LABELS_KEPT} labels"
        )));
    }
    let before = super::manifest::conflicts(change.state);
    set_spec(change, host, &spec)?;
    super::manifest::still_holds(change, &before)
}
