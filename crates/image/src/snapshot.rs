//! Snapshots inside qcow2 images (see docs/decisions/0017), of images that no guest uses.

use crate::error::ImageError;
use crate::jobs::Site;
use crate::place;
use crate::tool::{qemu_img_ok, words};
use quorate_storage::DiskFormat;
use quorate_types::{ImageRef, ImageSnapshot, Timestamp};
use serde::Deserialize;
use std::time::Duration;

const WITHIN: Duration = Duration::from_secs(300);
/// Longest name that a qcow2 image keeps well.
const NAME_MAX: usize = 60;

#[derive(Debug, Deserialize)]
struct Info {
    #[serde(default)]
    snapshots: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    #[serde(rename = "date-sec", default)]
    seconds: u64,
    #[serde(rename = "date-nsec", default)]
    nanos: u64,
}

/// The snapshots of an image, also while a guest uses it.
///
/// # Errors
/// When the image cannot be read.
pub async fn list(site: &dyn Site, image: &ImageRef) -> Result<Vec<ImageSnapshot>, ImageError> {
    let found = place::find(site, image).await?;
    if found.format != DiskFormat::Qcow2 {
        return Ok(Vec::new());
    }
    let options = found.target().options;
    let arguments = words(&["info", "--output=json", "-U", "--image-opts", &options]);
    let out = qemu_img_ok(arguments, WITHIN).await?;
    let info: Info = serde_json::from_slice(&out).map_err(|error| ImageError::Tool {
        tool: "qemu-img",
        detail: format!("its answer cannot be read: {error}"),
    })?;
    let one = |listed: Listed| ImageSnapshot {
        name: listed.name,
        at: Timestamp(listed.seconds * 1000 + listed.nanos / 1_000_000),
    };
    Ok(info.snapshots.into_iter().map(one).collect())
}

/// What is done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Create,
    Delete,
    Revert,
}

/// Checks a name, and that the image can have snapshots at all.
pub(crate) async fn check(
    site: &dyn Site,
    image: &ImageRef,
    name: &str,
    act: Act,
) -> Result<(), ImageError> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    let digits = name.chars().all(|c| c.is_ascii_digit());
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(good) || digits {
        return Err(ImageError::Refused(format!(
            "`{name}` cannot name a snapshot: use letters, digits, `-`, `_`, `.` and `:`, {NAME_MAX} at most, and not \
             digits alone"
        )));
    }
    let found = place::find(site, image).await?;
    if found.format != DiskFormat::Qcow2 {
        return Err(ImageError::Refused(format!(
            "{image} is raw, which has no room for snapshots: clone it with `--format qcow2` and use that, or take \
             snapshots at the storage"
        )));
    }
    let known = list(site, image).await?;
    let exists = known.iter().any(|snapshot| snapshot.name == name);
    match (act, exists) {
        (Act::Create, true) => Err(ImageError::Refused(format!(
            "{image} has a snapshot {name} already"
        ))),
        (Act::Delete | Act::Revert, false) => Err(ImageError::Refused(format!(
            "{image} has no snapshot {name}: `quorate image snapshot list {image}` shows what there is"
        ))),
        _ => Ok(()),
    }
}

/// Works on an image that no guest uses; QEMU's locks see to that, too.
pub(crate) async fn act(
    site: &dyn Site,
    image: &ImageRef,
    name: &str,
    act: Act,
) -> Result<(), ImageError> {
    let found = place::find(site, image).await?;
    let flag = match act {
        Act::Create => "-c",
        Act::Delete => "-d",
        Act::Revert => "-a",
    };
    let options = found.target().options;
    let arguments = words(&["snapshot", flag, name, "--image-opts", &options]);
    qemu_img_ok(arguments, WITHIN).await?;
    Ok(())
}
