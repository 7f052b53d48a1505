//! A pool in memory, for tests of the agent and for the simulator. Hosts that share a
//! [`FakeStore`] share the pool.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::reservation::{ClusterTag, FakeLun, Reservation};
use crate::{
    DiskFormat, DiskInfo, DiskSource, DiskSpec, ImageEntry, Marker, Pool, PoolError, PoolFacts,
    SavedState, StorageFence, round_to_sector,
};

const TOTAL_BYTES: u64 = 1 << 40;

/// Storage that several fake hosts share.
#[derive(Debug, Default)]
pub struct FakeStore {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    marker: Option<Marker>,
    disks: BTreeMap<String, (DiskFormat, u64)>,
    in_use: BTreeSet<String>,
    /// Images that are units with reservations.
    luns: BTreeMap<String, FakeLun>,
    /// Whether the saved state of a VM and epoch is committed.
    saved: BTreeMap<(String, u64), bool>,
}

impl FakeStore {
    /// Empty storage.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Puts an image there, as an operator would.
    pub fn put(&self, image: &str, format: DiskFormat, size_bytes: u64) {
        self.lock()
            .disks
            .insert(image.to_owned(), (format, size_bytes));
    }

    /// Makes an image a unit with reservations.
    pub fn set_lun(&self, image: &str, lun: FakeLun) {
        self.lock().luns.insert(image.to_owned(), lun);
    }

    /// Says whether a guest uses the image.
    pub fn set_in_use(&self, image: &str, in_use: bool) {
        let mut inner = self.lock();
        if in_use {
            inner.in_use.insert(image.to_owned());
        } else {
            inner.in_use.remove(image);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One host's view of a [`FakeStore`].
#[derive(Debug)]
pub struct FakePool {
    name: String,
    store: Arc<FakeStore>,
    failing: Mutex<BTreeSet<&'static str>>,
    /// The cluster, and this host's nexus to units with reservations.
    nexus: Option<(String, u32)>,
}

impl FakePool {
    /// A pool on the storage.
    pub fn new(name: &str, store: Arc<FakeStore>) -> Self {
        Self {
            name: name.to_owned(),
            store,
            failing: Mutex::default(),
            nexus: None,
        }
    }

    /// As this cluster's host with that nexus sees it.
    #[must_use]
    pub fn with_nexus(mut self, cluster: &str, nexus: u32) -> Self {
        self.nexus = Some((cluster.to_owned(), nexus));
        self
    }

    /// Makes every following call of the operation fail on this host, or succeed again.
    /// Operations are named like the trait's functions.
    pub fn set_failing(&self, operation: &'static str, failing: bool) {
        let mut set = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if failing {
            set.insert(operation);
        } else {
            set.remove(operation);
        }
    }

    fn begin(&self, operation: &'static str) -> Result<MutexGuard<'_, Inner>, PoolError> {
        let failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if failing.contains(operation) {
            return Err(PoolError::Injected { operation });
        }
        Ok(self.store.lock())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/fake").join(&self.name).join(name)
    }

    fn info(&self, inner: &Inner, image: &str, format: DiskFormat) -> Result<DiskInfo, PoolError> {
        match inner.disks.get(image) {
            None => Err(PoolError::ImageMissing {
                pool: self.name.clone(),
                image: image.to_owned(),
            }),
            Some((found, _)) if *found != format => Err(PoolError::WrongFormat {
                image: image.to_owned(),
                declared: format,
                found: found.to_string(),
            }),
            Some((_, bytes)) => Ok(DiskInfo {
                source: DiskSource::File(self.path(image)),
                format,
                virtual_bytes: *bytes,
                actual_bytes: 0,
                backing: None,
                created: false,
            }),
        }
    }

    fn refuse_in_use(inner: &Inner, image: &str) -> Result<(), PoolError> {
        if inner.in_use.contains(image) {
            return Err(PoolError::ImageInUse {
                image: image.to_owned(),
            });
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Pool for FakePool {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "fake"
    }

    fn fence_proof(&self) -> Option<StorageFence> {
        None
    }

    async fn reservation(&self, image: &str) -> Result<Option<Reservation>, PoolError> {
        let inner = self.begin("reservation")?;
        let found = self.nexus.as_ref().zip(inner.luns.get(image));
        Ok(found.map(|((cluster, nexus), lun)| {
            let (device, tag) = (Arc::new(lun.nexus(*nexus)), ClusterTag::of(cluster));
            Reservation::new(device, tag, std::time::Duration::from_secs(3))
        }))
    }

    async fn define(&self) -> Result<Marker, PoolError> {
        let mut inner = self.begin("define")?;
        let marker = inner.marker.get_or_insert_with(|| Marker {
            version: 1,
            cluster: "fake".into(),
            pool: self.name.clone(),
            id: "fake".into(),
        });
        Ok(marker.clone())
    }

    async fn check(&self) -> PoolFacts {
        match self.begin("check") {
            Ok(inner) => PoolFacts {
                reachable: true,
                unresponsive: false,
                writable: true,
                free_bytes: TOTAL_BYTES,
                total_bytes: TOTAL_BYTES,
                fs_type: Some("fake".into()),
                probe_write_us: Some(100),
                marker: inner.marker.clone(),
                problem: None,
            },
            Err(error) => PoolFacts {
                unresponsive: true,
                problem: Some(error.to_string()),
                ..PoolFacts::default()
            },
        }
    }

    async fn ensure_disk(&self, spec: &DiskSpec) -> Result<DiskInfo, PoolError> {
        let mut inner = self.begin("ensure_disk")?;
        let created = !inner.disks.contains_key(&spec.image) && spec.create;
        if created {
            let size = spec.size_bytes.ok_or_else(|| PoolError::SizeMissing {
                pool: self.name.clone(),
                image: spec.image.clone(),
            })?;
            let disk = (spec.format, round_to_sector(size));
            inner.disks.insert(spec.image.clone(), disk);
        }
        let mut info = self.info(&inner, &spec.image, spec.format)?;
        info.created = created;
        match spec.size_bytes {
            Some(want_bytes) if info.virtual_bytes < want_bytes => Err(PoolError::ImageTooSmall {
                image: spec.image.clone(),
                have_bytes: info.virtual_bytes,
                want_bytes,
            }),
            _ => Ok(info),
        }
    }

    async fn disk_info(&self, image: &str, format: DiskFormat) -> Result<DiskInfo, PoolError> {
        let inner = self.begin("disk_info")?;
        self.info(&inner, image, format)
    }

    async fn resize_disk(
        &self,
        image: &str,
        format: DiskFormat,
        size_bytes: u64,
    ) -> Result<DiskInfo, PoolError> {
        let mut inner = self.begin("resize_disk")?;
        let have_bytes = self.info(&inner, image, format)?.virtual_bytes;
        let want_bytes = round_to_sector(size_bytes);
        if want_bytes < have_bytes {
            return Err(PoolError::WouldShrink {
                image: image.to_owned(),
                have_bytes,
                want_bytes,
            });
        }
        Self::refuse_in_use(&inner, image)?;
        inner.disks.insert(image.to_owned(), (format, want_bytes));
        self.info(&inner, image, format)
    }

    async fn delete_disk(&self, image: &str) -> Result<bool, PoolError> {
        let mut inner = self.begin("delete_disk")?;
        Self::refuse_in_use(&inner, image)?;
        Ok(inner.disks.remove(image).is_some())
    }

    async fn list_images(&self) -> Result<Vec<ImageEntry>, PoolError> {
        let inner = self.begin("list_images")?;
        let entry = |(image, (format, bytes)): (&String, &(DiskFormat, u64))| ImageEntry {
            image: image.clone(),
            virtual_bytes: Some(*bytes),
            actual_bytes: Some(0),
            format: *format,
            problem: None,
        };
        Ok(inner.disks.iter().map(entry).collect())
    }

    async fn prepare_saved_state(&self, vm: &str, epoch: u64) -> Result<SavedState, PoolError> {
        let mut inner = self.begin("prepare_saved_state")?;
        inner.saved.insert((vm.to_owned(), epoch), false);
        Ok(SavedState {
            part: self.path(&format!("{vm}.{epoch}.part")),
            done: self.path(&format!("{vm}.{epoch}.state")),
        })
    }

    async fn commit_saved_state(&self, vm: &str, epoch: u64) -> Result<PathBuf, PoolError> {
        let mut inner = self.begin("commit_saved_state")?;
        match inner.saved.get_mut(&(vm.to_owned(), epoch)) {
            Some(committed) => {
                *committed = true;
                Ok(self.path(&format!("{vm}.{epoch}.state")))
            }
            None => Err(PoolError::StateMissing {
                pool: self.name.clone(),
                vm: vm.to_owned(),
                epoch,
            }),
        }
    }

    async fn find_saved_state(&self, vm: &str, epoch: u64) -> Result<Option<PathBuf>, PoolError> {
        let inner = self.begin("find_saved_state")?;
        let committed = inner.saved.get(&(vm.to_owned(), epoch)).copied();
        Ok((committed == Some(true)).then(|| self.path(&format!("{vm}.{epoch}.state"))))
    }

    async fn delete_saved_states(&self, vm: &str, up_to_epoch: u64) -> Result<u32, PoolError> {
        let mut inner = self.begin("delete_saved_states")?;
        let before = inner.saved.len();
        inner
            .saved
            .retain(|(name, epoch), _| name != vm || *epoch > up_to_epoch);
        Ok((before - inner.saved.len()) as u32)
    }
}
