//! The marker of a pool: what proves that hosts see the same storage.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;

use crate::{Marker, PoolError};

use super::files;

pub(super) const FILE: &str = ".quorate-pool";
const VERSION: u32 = 1;

/// Whose pool a host expects to find.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    pub(super) cluster: String,
    pub(super) pool: String,
    /// The id the cluster knows, once it knows one.
    pub(super) id: Option<String>,
}

/// Reads the marker and checks that it is the expected one.
pub(super) fn read(root: &Path, expected: &Expected) -> Result<Marker, PoolError> {
    let pool = &expected.pool;
    let path = root.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(PoolError::MarkerMissing {
                pool: pool.clone(),
                path: root.to_owned(),
            });
        }
        Err(error) => return Err(PoolError::io(pool, &path, "reading the marker", error)),
    };
    let marker: Marker = serde_json::from_str(&text).map_err(|error| PoolError::MarkerDamaged {
        pool: pool.clone(),
        path,
        detail: error.to_string(),
    })?;
    if marker.cluster != expected.cluster || marker.pool != *pool {
        return Err(PoolError::ForeignMarker {
            pool: pool.clone(),
            path: root.to_owned(),
            found_cluster: marker.cluster,
            found_pool: marker.pool,
        });
    }
    match &expected.id {
        Some(id) if *id != marker.id => Err(PoolError::OtherStorage {
            pool: pool.clone(),
            expected: id.clone(),
            found: marker.id,
        }),
        _ => Ok(marker),
    }
}

/// Writes the marker unless there is one, and returns the one that is there then: of two
/// hosts that define a pool at once, both return the winner's.
pub(super) fn define(root: &Path, expected: &Expected) -> Result<Marker, PoolError> {
    // A pool whose id is known exists somewhere: this place is not it.
    match read(root, expected) {
        Err(PoolError::MarkerMissing { .. }) if expected.id.is_none() => {}
        other => return other,
    }
    let path = root.join(FILE);
    let failed = |error| PoolError::io(&expected.pool, &path, "writing the marker", error);
    let marker = Marker {
        version: VERSION,
        cluster: expected.cluster.clone(),
        pool: expected.pool.clone(),
        id: files::random_id().map_err(failed)?,
    };
    let mut text = serde_json::to_string(&marker).map_err(|error| failed(error.into()))?;
    text.push('\n');
    files::place_new(&path, |file| file.write_all(text.as_bytes())).map_err(failed)?;
    read(root, expected)
}
