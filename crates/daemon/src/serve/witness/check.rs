//! A look at the unit that an operator names for the witness, before anything is changed.
//!
//! Always holds: nothing is written; where the SAN has an access list no host is let in for it, only the drill's own initiator,
//! and it is shut out again whatever comes of it. Must not: decide who may use the unit; the state does.

use super::super::core::Core;
use super::super::doors::Doors;
use super::super::drill::{CALL_WITHIN, prepare};
use super::raw::{AREA_BYTES, Content, Peers, look, open_for_look};
use super::{SAN_WITHIN, peers};
use quorate_api::{ApiError, ErrorCode};
use quorate_controller::StorageGate as _;
use quorate_storage::{RawDisk, RawUnit};
use quorate_types::{IscsiPool, Lun, PoolName, PoolSpec};
use std::path::Path;
use std::time::Duration;

/// Sessions of a look are apart from those of a witness.
const LOOK_SESSION: u8 = 3;
/// Bound for all of it.
const LOOK_WITHIN: Duration = Duration::from_secs(15);

/// What was seen of a unit.
struct Seen {
    bytes: u64,
    content: Content,
}

/// Whether a witness can be on this unit; what it returns is of note.
pub(crate) async fn check(
    core: &Core,
    pool: &PoolName,
    disk: &str,
    force: bool,
) -> Result<Vec<String>, ApiError> {
    let conflict = |text: String| ApiError::new(ErrorCode::Conflict, text);
    let state = core.state();
    let Some(object) = state.pools.get(pool) else {
        return Ok(Vec::new());
    };
    if !object.spec.is_for(&core.me) {
        let hosts = object.spec.hosts().iter();
        let names: Vec<&str> = hosts.map(quorate_types::HostName::as_str).collect();
        let text = format!("host {} does not reach pool `{pool}`", core.me);
        let hint = format!(
            "a disk witness needs a pool that all hosts share; this one is for {}",
            names.join(", ")
        );
        return Err(conflict(text).hint(hint));
    }
    let cluster = state.cluster.as_ref();
    let cluster = cluster.map_or(String::new(), |cluster| cluster.id.clone());
    let looking = async {
        match &object.spec {
            PoolSpec::Block(spec) => device(&spec.path, disk, cluster).await,
            PoolSpec::Iscsi(spec) => unit(core, pool, spec, disk, cluster).await,
            _ => Err("such a pool holds no units".to_owned()),
        }
    };
    let seen = tokio::time::timeout(LOOK_WITHIN, looking).await;
    let seen = seen.unwrap_or_else(|_| Err("it does not answer".to_owned()));
    let seen = seen.map_err(|problem| {
        conflict(format!(
            "disk `{disk}` in pool `{pool}` cannot be used: {problem}"
        ))
        .hint(format!("`quorate storage show {pool}` lists what is there"))
    })?;
    judge(pool, disk, &seen, force)
}

fn judge(pool: &PoolName, disk: &str, seen: &Seen, force: bool) -> Result<Vec<String>, ApiError> {
    let conflict = |text: String| ApiError::new(ErrorCode::Conflict, text);
    if seen.bytes < AREA_BYTES {
        let text = format!(
            "disk `{disk}` in pool `{pool}` has {} MiB: a disk witness needs {} MiB",
            seen.bytes >> 20,
            AREA_BYTES >> 20
        );
        return Err(conflict(text).hint("name a larger one with `--disk`"));
    }
    let found = match seen.content {
        Content::Nothing | Content::Witness { ours: true } => return Ok(Vec::new()),
        Content::Witness { ours: false } => "the disk witness of another cluster is",
        Content::Other => "there are data",
    };
    if !force {
        let text = format!("{found} on disk `{disk}` in pool `{pool}`");
        let hint =
            "name another one; if nobody needs what is on it, say `--force`: it is lost then";
        return Err(conflict(text).hint(hint));
    }
    Ok(vec![format!("{found} on `{disk}`: it is written over")])
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| error.to_string())?
}

async fn device(dir: &str, disk: &str, cluster: String) -> Result<Seen, String> {
    if disk.is_empty() || disk.contains('/') || disk.starts_with('.') {
        return Err("it is no name in the pool's directory".to_owned());
    }
    let path = Path::new(dir).join(disk);
    blocking(move || {
        let mut disk = open_for_look(&path).map_err(|error| error.to_string())?;
        let content = look(&mut disk, &cluster).map_err(|error| error.to_string())?;
        let bytes = disk.bytes();
        Ok(Seen { bytes, content })
    })
    .await
}

async fn unit(
    core: &Core,
    pool: &PoolName,
    spec: &IscsiPool,
    disk: &str,
    cluster: String,
) -> Result<Seen, String> {
    let state = core.state();
    if spec.access.is_none() {
        let initiator = spec.initiator(&cluster, &core.me);
        let unit = spec.lun_of(disk)?;
        return at_target(peers(&state, spec, &initiator), unit, cluster).await;
    }
    let whole = PoolSpec::Iscsi(spec.clone());
    let drill = prepare(&state, pool, &whole, disk)?;
    Doors::of_lists().let_in(&drill.door, CALL_WITHIN).await?;
    let ways = peers(&state, spec, &drill.peer.initiator);
    let seen = at_target(ways, drill.unit.clone(), cluster).await;
    let shut = Doors::of_lists().shut(&drill.door, CALL_WITHIN).await;
    if let Some(Err(problem)) = shut.into_iter().find(Result::is_err) {
        tracing::warn!(%pool, problem, "the drill's initiator is still let in");
    }
    seen
}

async fn at_target(ways: Peers, unit: Lun, cluster: String) -> Result<Seen, String> {
    debug_assert!(SAN_WITHIN < LOOK_WITHIN);
    blocking(move || {
        let opened = RawUnit::open(&ways.0, &unit, LOOK_SESSION);
        let opened = opened.map_err(|error| error.to_string())?;
        let mut disk: Box<dyn RawDisk> = Box::new(opened);
        let content = look(&mut disk, &cluster).map_err(|error| error.to_string())?;
        let bytes = disk.bytes();
        Ok(Seen { bytes, content })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_that_is_small_or_holds_something_is_refused_with_a_way_out() {
        let pool: PoolName = "san".parse().unwrap();
        let judge = |bytes, content, force| judge(&pool, "w", &Seen { bytes, content }, force);
        let small = judge(AREA_BYTES - 1, Content::Nothing, true).unwrap_err();
        assert!(small.message.contains("has 511 MiB"), "{small:?}");
        assert_eq!(judge(AREA_BYTES, Content::Nothing, false).unwrap().len(), 0);
        let ours = Content::Witness { ours: true };
        assert_eq!(judge(AREA_BYTES, ours, false).unwrap().len(), 0);
        let theirs = Content::Witness { ours: false };
        let theirs = judge(AREA_BYTES, theirs, false).unwrap_err();
        assert!(theirs.message.contains("another cluster"), "{theirs:?}");
        let data = judge(AREA_BYTES, Content::Other, false).unwrap_err();
        assert!(data.hint.unwrap().contains("--force"));
        let forced = judge(AREA_BYTES, Content::Other, true).unwrap();
        assert!(forced[0].contains("written over"), "{forced:?}");
    }
}
