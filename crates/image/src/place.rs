//! Where an image is, for reading, and whether it may be changed.

use crate::error::ImageError;
use crate::jobs::Site;
use crate::tool::Target;
use quorate_storage::{DiskFormat, DiskInfo, Pool};
use quorate_types::{FileFormat, ImageRef};
use std::sync::Arc;

/// An image that is there.
pub(crate) struct Existing {
    pub(crate) driver: Arc<dyn Pool>,
    pub(crate) info: DiskInfo,
    pub(crate) format: DiskFormat,
}

impl Existing {
    /// For QEMU's tools.
    pub(crate) fn target(&self) -> Target {
        Target::source(&self.info.source, self.format.as_str())
    }
}

/// Whether the pool has files, not whole units.
pub(crate) fn takes_files(driver: &Arc<dyn Pool>) -> bool {
    !matches!(driver.kind(), "iscsi" | "block" | "rbd")
}

pub(crate) fn file_format(format: DiskFormat) -> FileFormat {
    match format {
        DiskFormat::Raw => FileFormat::Raw,
        DiskFormat::Qcow2 => FileFormat::Qcow2,
    }
}

/// Finds an image. Its format is what a VM says; of one that no VM names, what its first bytes say.
pub(crate) async fn find(site: &dyn Site, image: &ImageRef) -> Result<Existing, ImageError> {
    let driver = site.pool(&image.pool).map_err(ImageError::Refused)?;
    let declared = site.users(image).into_iter().map(|user| user.format).next();
    let format = match declared {
        Some(format) => format,
        None if !takes_files(&driver) => DiskFormat::Raw,
        None => {
            let listed = driver.list_images().await?;
            let entry = listed.into_iter().find(|entry| entry.image == image.image);
            entry.map_or(DiskFormat::Raw, |entry| entry.format)
        }
    };
    let info = driver.disk_info(&image.image, format).await?;
    Ok(Existing {
        driver,
        info,
        format,
    })
}

/// Refuses what a guest that runs uses.
pub(crate) fn quiet(site: &dyn Site, image: &ImageRef, what: &str) -> Result<(), ImageError> {
    let users = site.users(image);
    match users.iter().find(|user| user.host.is_some()) {
        None => Ok(()),
        Some(user) => Err(ImageError::Refused(format!(
            "{image} is used by VM {}, which runs: {what} needs it stopped (`quorate vm stop {}`)",
            user.vm, user.vm
        ))),
    }
}
