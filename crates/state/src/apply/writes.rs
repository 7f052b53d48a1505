//! Changes of what is known about images that are written to. See [`crate::writes`].

use super::{Change, unknown};
use crate::command::Refusal;
use crate::model::State;
use crate::writes::ImageWrite;
use quorate_types::{HostName, PoolName};

pub(super) fn begin(
    change: &mut Change<'_>,
    pool: &PoolName,
    image: &str,
    host: &HostName,
    what: &str,
) -> Result<(), Refusal> {
    if !change.state.pools.contains_key(pool) {
        return Err(unknown("pool", pool));
    }
    if !change.state.hosts.contains_key(host) {
        return Err(unknown("host", host));
    }
    if let Some((vm, owner)) = change.state.runs_from(pool, image) {
        let text = format!(
            "{pool}/{image} is a disk of VM {vm}, which {owner} may run: `quorate vm stop {vm}` first"
        );
        return Err(Refusal::InUse(text));
    }
    let name = change.state.image_name(pool, image);
    let at = change.envelope.at;
    let writes = change.state.image_writes.entry(pool.clone()).or_default();
    match writes.get(&name) {
        Some(other) if other.host != *host => {
            let text = format!(
                "{pool}/{image} is being written by {} ({}): `quorate image jobs`",
                other.host, other.what
            );
            Err(Refusal::InUse(text))
        }
        _ => {
            let (host, what) = (host.clone(), what.to_owned());
            writes.insert(name, ImageWrite { host, what, at });
            Ok(())
        }
    }
}

pub(super) fn end(
    change: &mut Change<'_>,
    pool: &PoolName,
    image: &str,
    host: &HostName,
) -> Result<(), Refusal> {
    let name = change.state.image_name(pool, image);
    forget(change.state, |of, other, by| {
        of == pool && other == name && by == host
    });
    Ok(())
}

/// Forgets what is written, of a pool, by a name, by a host.
pub(super) fn forget(state: &mut State, gone: impl Fn(&PoolName, &str, &HostName) -> bool) {
    state.image_writes.retain(|pool, writes| {
        writes.retain(|image, write| !gone(pool, image, &write.host));
        !writes.is_empty()
    });
}
