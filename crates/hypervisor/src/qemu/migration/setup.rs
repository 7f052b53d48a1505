//! Capabilities, parameters and certificates, set before a migration begins.
//!
//! Always holds: a capability that is not wanted is switched *off*, since a migration that failed may
//! have left it on; one that is wanted but unknown to this QEMU is left out when the migration is safe
//! without it, and an error otherwise.

use std::collections::BTreeSet;
use std::error::Error;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::error::HypervisorError;
use crate::migration::{ListenRequest, MigrationRequest, TlsMaterial};
use crate::qemu::guest::Guest;

/// Name of the object with the certificates.
const TLS_ID: &str = "migration-tls";
/// "As fast as the network": QEMU's own default is 128 MiB/s. In bytes per second, 100 Gbit/s.
const UNCAPPED: u64 = 12_500_000_000;
/// Throttling is switched on from the beginning, since it cannot be later, but in a way that never acts.
const THROTTLE_NEVER: (u64, u64, u64) = (100, 1, 1);
/// Trigger, first and further steps in percent, once it is to act.
const THROTTLE_NOW: (u64, u64, u64) = (50, 20, 10);

/// The capabilities this driver ever sets, all others stay as they are.
const MANAGED: [&str; 6] = [
    "events",
    "return-path",
    "pause-before-switchover",
    "auto-converge",
    "multifd",
    "mapped-ram",
];

/// The innermost cause of an error, which is QEMU's own word if it answered.
pub(in crate::qemu) fn cause(error: &HypervisorError) -> String {
    let mut cause: &dyn Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Prepares the source.
pub(super) async fn prepare_source(
    guest: &Guest,
    request: &MigrationRequest,
    limit_ms: u64,
    deadline: Instant,
) -> Result<(), HypervisorError> {
    let mut wanted = vec!["events", "return-path", "pause-before-switchover"];
    if request.auto_converge {
        wanted.push("auto-converge");
    }
    if request.multifd_channels.is_some() {
        wanted.push("multifd");
    }
    let needed = &wanted[..if request.multifd_channels.is_some() {
        wanted.len()
    } else {
        3
    }];
    set_capabilities(guest, &wanted, needed, deadline).await?;
    let mut parameters = Map::new();
    parameters.insert("downtime-limit".into(), json!(limit_ms));
    parameters.insert(
        "max-bandwidth".into(),
        json!(request.max_bandwidth.unwrap_or(UNCAPPED)),
    );
    if request.auto_converge {
        throttle_parameters(&mut parameters, THROTTLE_NEVER);
    }
    if let Some(channels) = request.multifd_channels {
        parameters.insert("multifd-channels".into(), json!(channels));
    }
    prepare_tls(
        guest,
        request.tls.as_ref(),
        "client",
        &mut parameters,
        deadline,
    )
    .await?;
    set_parameters(guest, parameters, deadline).await
}

/// Prepares the target.
pub(super) async fn prepare_target(
    guest: &Guest,
    request: &ListenRequest,
    deadline: Instant,
) -> Result<(), HypervisorError> {
    let mut wanted = vec!["events", "return-path"];
    if request.multifd_channels.is_some() {
        wanted.push("multifd");
    }
    set_capabilities(guest, &wanted, &wanted, deadline).await?;
    let mut parameters = Map::new();
    if let Some(channels) = request.multifd_channels {
        parameters.insert("multifd-channels".into(), json!(channels));
    }
    prepare_tls(
        guest,
        request.tls.as_ref(),
        "server",
        &mut parameters,
        deadline,
    )
    .await?;
    set_parameters(guest, parameters, deadline).await
}

/// Prepares a save to a file; whether the file will have the `mapped-ram` layout.
pub(in crate::qemu) async fn prepare_file(
    guest: &Guest,
    deadline: Instant,
) -> Result<bool, HypervisorError> {
    let set = set_capabilities(guest, &["events", "mapped-ram"], &["events"], deadline).await?;
    let mut parameters = Map::new();
    parameters.insert("max-bandwidth".into(), json!(UNCAPPED));
    prepare_tls(guest, None, "client", &mut parameters, deadline).await?;
    set_parameters(guest, parameters, deadline).await?;
    Ok(set.contains("mapped-ram"))
}

/// Prepares the loading of a file.
pub(super) async fn prepare_load(
    guest: &Guest,
    mapped_ram: bool,
    deadline: Instant,
) -> Result<(), HypervisorError> {
    let wanted: &[&str] = if mapped_ram {
        &["events", "mapped-ram"]
    } else {
        &["events"]
    };
    set_capabilities(guest, wanted, wanted, deadline)
        .await
        .map(|_| ())
}

/// Lets the throttling act.
pub(super) async fn throttle(guest: &Guest, deadline: Instant) -> Result<(), HypervisorError> {
    let mut parameters = Map::new();
    throttle_parameters(&mut parameters, THROTTLE_NOW);
    set_parameters(guest, parameters, deadline).await
}

/// Sets the limit of the pause.
pub(super) async fn set_limit(
    guest: &Guest,
    limit_ms: u64,
    deadline: Instant,
) -> Result<(), HypervisorError> {
    let mut parameters = Map::new();
    parameters.insert("downtime-limit".into(), json!(limit_ms));
    set_parameters(guest, parameters, deadline).await
}

fn throttle_parameters(parameters: &mut Map<String, Value>, steps: (u64, u64, u64)) {
    parameters.insert("throttle-trigger-threshold".into(), json!(steps.0));
    parameters.insert("cpu-throttle-initial".into(), json!(steps.1));
    parameters.insert("cpu-throttle-increment".into(), json!(steps.2));
}

async fn set_parameters(
    guest: &Guest,
    parameters: Map<String, Value>,
    deadline: Instant,
) -> Result<(), HypervisorError> {
    let action = "set the migration parameters";
    let arguments = Value::Object(parameters);
    guest
        .command(action, "migrate-set-parameters", arguments, deadline)
        .await
        .map(|_| ())
}

/// Switches the managed capabilities; returns those that are on.
async fn set_capabilities<'a>(
    guest: &Guest,
    wanted: &[&'a str],
    needed: &[&str],
    deadline: Instant,
) -> Result<BTreeSet<&'a str>, HypervisorError> {
    let action = "ask for the migration capabilities";
    let reply = guest
        .command(action, "query-migrate-capabilities", Value::Null, deadline)
        .await?;
    let list = reply.as_array().map(Vec::as_slice).unwrap_or_default();
    let known: BTreeSet<&str> = list
        .iter()
        .filter_map(|entry| entry["capability"].as_str())
        .collect();
    if let Some(missing) = needed.iter().find(|name| !known.contains(*name)) {
        return Err(HypervisorError::Migration {
            vm: guest.config().name.clone(),
            detail: format!(
                "this QEMU does not know the capability '{missing}'; use QEMU 7.2 or newer"
            ),
        });
    }
    let on: BTreeSet<&str> = wanted
        .iter()
        .copied()
        .filter(|name| known.contains(name))
        .collect();
    let states: Vec<Value> = MANAGED
        .iter()
        .filter(|name| known.contains(*name))
        .map(|name| json!({ "capability": name, "state": on.contains(name) }))
        .collect();
    let action = "set the migration capabilities";
    let arguments = json!({ "capabilities": states });
    guest
        .command(action, "migrate-set-capabilities", arguments, deadline)
        .await?;
    Ok(on)
}

/// Loads the certificates afresh, or makes sure that none are used.
async fn prepare_tls(
    guest: &Guest,
    tls: Option<&TlsMaterial>,
    endpoint: &str,
    parameters: &mut Map<String, Value>,
    deadline: Instant,
) -> Result<(), HypervisorError> {
    parameters.insert("tls-creds".into(), json!(""));
    parameters.insert("tls-hostname".into(), json!(""));
    let Some(tls) = tls else { return Ok(()) };
    // Refused when there is none, which is the usual case.
    let _ = guest
        .command(
            "drop old certificates",
            "object-del",
            json!({ "id": TLS_ID }),
            deadline,
        )
        .await;
    let object = json!({
        "qom-type": "tls-creds-x509",
        "id": TLS_ID,
        "dir": tls.dir,
        "endpoint": endpoint,
        "verify-peer": true,
    });
    guest
        .command(
            "load the migration certificates",
            "object-add",
            object,
            deadline,
        )
        .await?;
    parameters.insert("tls-creds".into(), json!(TLS_ID));
    if let Some(hostname) = &tls.hostname {
        parameters.insert("tls-hostname".into(), json!(hostname));
    }
    Ok(())
}
