//! The pool kind `block`: block devices of the host by stable names.
//!
//! Always holds: only names in the pool's directory are opened, only block devices are accepted, nothing is
//! created or deleted. A name of `/dev/disk/by-id` is made of the device's own serial number, so equal names on two
//! hosts are the same device. A device that the host itself uses (a file system, LVM, RAID, a path of multipath) is
//! refused before a guest starts: both would write it.

use crate::lanes::Lanes;
use crate::reservation::{ClusterTag, LinuxDevice, Reservation, pause};
use crate::{
    DiskFormat, DiskInfo, DiskSource, DiskSpec, ImageEntry, Marker, Pool, PoolError, PoolFacts,
    StorageFence,
};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a pool of block devices is told.
#[derive(Debug, Clone)]
pub struct BlockConfig {
    /// The pool's name.
    pub pool: String,
    /// Directory of the names.
    pub path: PathBuf,
    /// The cluster that the pool belongs to.
    pub cluster: String,
    /// Whether its devices have persistent reservations, which decide who writes.
    pub reservations: bool,
    /// Longest time for one look.
    pub deadline: Duration,
}

/// A pool of block devices.
#[derive(Debug)]
pub struct BlockPoolDriver {
    config: BlockConfig,
    lanes: Lanes,
    /// One for each device: operations on it take turns, also when one hangs.
    reservations: Mutex<BTreeMap<String, Reservation>>,
}

impl BlockPoolDriver {
    /// A pool; nothing is looked at yet.
    pub fn new(config: BlockConfig) -> Self {
        let lanes = Lanes::new(&config.pool, config.deadline);
        Self {
            config,
            lanes,
            reservations: Mutex::default(),
        }
    }

    /// The persistent reservations of a disk: who may write it, decided by the device itself.
    ///
    /// # Errors
    /// When there is no such device on this host.
    pub async fn reservation_of(&self, image: &str) -> Result<Reservation, PoolError> {
        let (path, _) = self.find(image).await?;
        let mut known = self
            .reservations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let device = Arc::new(LinuxDevice::new(path));
            let cluster = ClusterTag::of(&self.config.cluster);
            Reservation::new(device, cluster, self.config.deadline)
        };
        Ok(known.entry(image.to_owned()).or_insert_with(make).clone())
    }

    fn marker(&self) -> Marker {
        Marker {
            version: 1,
            cluster: self.config.cluster.clone(),
            pool: self.config.pool.clone(),
            id: format!("block:{}", self.config.path.display()),
        }
    }

    async fn find(&self, image: &str) -> Result<(PathBuf, u64), PoolError> {
        if image.is_empty() || image.contains('/') || image.starts_with('.') {
            return Err(PoolError::BadImageName {
                image: image.to_owned(),
                reason: "it is a name in the pool's directory, without `/`",
            });
        }
        let (pool, path) = (self.config.pool.clone(), self.config.path.join(image));
        let name = image.to_owned();
        let look = move || size_of(&pool, &name, &path).map(|bytes| (path, bytes));
        self.lanes.run("looking at a device", look).await
    }
}

pub(crate) fn size_of(pool: &str, image: &str, path: &Path) -> Result<u64, PoolError> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => PoolError::DeviceMissing {
            pool: pool.to_owned(),
            image: image.to_owned(),
            path: path.to_owned(),
        },
        _ => PoolError::io(pool, path, "opening a device", error),
    };
    let meta = fs::metadata(path).map_err(failed)?;
    if !meta.file_type().is_block_device() {
        return Err(PoolError::NotADevice {
            pool: pool.to_owned(),
            path: path.to_owned(),
        });
    }
    let mut device = File::open(path).map_err(failed)?;
    device.seek(SeekFrom::End(0)).map_err(failed)
}

/// How often an exclusive opening is tried: another one of this program has the device for a moment.
const TRIES: u32 = 5;
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// Refuses a device that this host has in use. The kernel lets one opener at a time claim a device: a mounted file system,
/// LVM, RAID and device mapper do, QEMU does not.
pub(crate) fn unclaimed(pool: &str, image: &str, path: &Path) -> Result<(), PoolError> {
    let flags = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
    let claim = || File::options().read(true).custom_flags(flags).open(path);
    for attempt in 1..=TRIES {
        let busy = Some(rustix::io::Errno::BUSY.raw_os_error());
        match claim() {
            // What else may be wrong with it shows when it is opened.
            Err(error) if error.raw_os_error() == busy && attempt < TRIES => {
                pause(TRY_AGAIN);
            }
            Err(error) if error.raw_os_error() == busy => break,
            _ => return Ok(()),
        }
    }
    Err(PoolError::DeviceClaimed {
        pool: pool.to_owned(),
        image: image.to_owned(),
        path: path.to_owned(),
    })
}

#[async_trait::async_trait]
impl Pool for BlockPoolDriver {
    fn name(&self) -> &str {
        &self.config.pool
    }

    fn kind(&self) -> &'static str {
        "block"
    }

    fn fence_proof(&self) -> Option<StorageFence> {
        let reservations = self.config.reservations;
        reservations.then_some(StorageFence::Reservation)
    }

    async fn reservation(&self, image: &str) -> Result<Option<Reservation>, PoolError> {
        match self.config.reservations {
            true => self.reservation_of(image).await.map(Some),
            false => Ok(None),
        }
    }

    async fn define(&self) -> Result<Marker, PoolError> {
        match self.check().await.problem {
            Some(problem) => Err(PoolError::NotUsable { problem }),
            None => Ok(self.marker()),
        }
    }

    async fn check(&self) -> PoolFacts {
        let begun = Instant::now();
        let (pool, path) = (self.config.pool.clone(), self.config.path.clone());
        let look = move || {
            let read = fs::read_dir(&path);
            read.map(drop).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => PoolError::NoDevices { pool, path },
                _ => PoolError::io(&pool, &path, "listing devices", error),
            })
        };
        match self.lanes.run("listing devices", look).await {
            Ok(()) => PoolFacts::answered(self.marker(), begun),
            Err(error) => PoolFacts::failed(&error),
        }
    }

    async fn ensure_disk(&self, spec: &DiskSpec) -> Result<DiskInfo, PoolError> {
        let info = self.disk_info(&spec.image, spec.format).await?;
        match spec.size_bytes {
            Some(want_bytes) if info.virtual_bytes < want_bytes => Err(PoolError::ImageTooSmall {
                image: spec.image.clone(),
                have_bytes: info.virtual_bytes,
                want_bytes,
            }),
            _ => {
                let (pool, image) = (self.config.pool.clone(), spec.image.clone());
                let path = self.config.path.join(&image);
                let look = move || unclaimed(&pool, &image, &path);
                self.lanes.run("looking at a device", look).await?;
                Ok(info)
            }
        }
    }

    async fn disk_info(&self, image: &str, format: DiskFormat) -> Result<DiskInfo, PoolError> {
        if format != DiskFormat::Raw {
            return Err(PoolError::RawOnly {
                pool: self.config.pool.clone(),
                image: image.to_owned(),
            });
        }
        let (path, bytes) = self.find(image).await?;
        Ok(DiskInfo {
            source: DiskSource::Device(path),
            format: DiskFormat::Raw,
            virtual_bytes: bytes,
            actual_bytes: bytes,
            backing: None,
            created: false,
        })
    }

    async fn resize_disk(
        &self,
        image: &str,
        format: DiskFormat,
        size_bytes: u64,
    ) -> Result<DiskInfo, PoolError> {
        let info = self.disk_info(image, format).await?;
        if info.virtual_bytes < size_bytes {
            return Err(PoolError::GrowAtSan {
                pool: self.config.pool.clone(),
                image: image.to_owned(),
                have_bytes: info.virtual_bytes,
            });
        }
        Ok(info)
    }

    async fn delete_disk(&self, image: &str) -> Result<bool, PoolError> {
        Err(PoolError::NotOurs {
            pool: self.config.pool.clone(),
            image: image.to_owned(),
        })
    }

    async fn list_images(&self) -> Result<Vec<ImageEntry>, PoolError> {
        let (pool, path) = (self.config.pool.clone(), self.config.path.clone());
        let look = move || {
            let failed = |error| PoolError::io(&pool, &path, "listing devices", error);
            let mut found = Vec::new();
            for entry in fs::read_dir(&path).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let name = entry.file_name();
                let Some(image) = name.to_str() else { continue };
                let size = size_of(&pool, image, &entry.path());
                if matches!(size, Err(PoolError::NotADevice { .. })) {
                    continue;
                }
                found.push(ImageEntry {
                    image: image.to_owned(),
                    virtual_bytes: size.as_ref().ok().copied(),
                    actual_bytes: size.as_ref().ok().copied(),
                    format: DiskFormat::Raw,
                    problem: size.err().map(|error| error.to_string()),
                });
            }
            found.sort_by(|a, b| a.image.cmp(&b.image));
            Ok(found)
        };
        self.lanes.run("listing devices", look).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(path: &Path) -> BlockPoolDriver {
        BlockPoolDriver::new(BlockConfig {
            pool: "fc".into(),
            path: path.to_owned(),
            cluster: "c1".into(),
            reservations: true,
            deadline: Duration::from_secs(5),
        })
    }

    #[tokio::test]
    async fn only_block_devices_below_the_directory_are_disks() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), [0; 512]).unwrap();
        let pool = pool(dir.path());
        assert!(pool.check().await.usable());
        for (image, want) in [
            ("file", "is not a block device"),
            ("../file", "without `/`"),
            (".hidden", "without `/`"),
            ("gone", "is not in pool"),
        ] {
            let error = pool.disk_info(image, DiskFormat::Raw).await.unwrap_err();
            assert!(error.to_string().contains(want), "{image}: {error}");
            assert!(pool.reservation(image).await.is_err());
            assert!(pool.reservation_of(image).await.is_err());
        }
        assert_eq!(pool.list_images().await.unwrap(), []);
        let qcow2 = pool.disk_info("file", DiskFormat::Qcow2).await.unwrap_err();
        assert!(qcow2.to_string().contains("format: raw"), "{qcow2}");
    }

    #[tokio::test]
    async fn a_directory_that_is_not_there_is_said() {
        let facts = pool(Path::new("/nonexistent/by-id")).check().await;
        assert!(!facts.usable());
        assert!(
            facts.problem.unwrap().contains("has no"),
            "it says what to look at"
        );
    }
}
