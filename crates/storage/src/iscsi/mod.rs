//! The pool kind `iscsi`: logical units of a target, opened by QEMU's own initiator or by the host's ([`host`]).
//!
//! Owns: what a host sees of such a pool (which portal answers, which targets and units there are, how large they
//! are) by an initiator of its own that only looks ([`session`]), and what QEMU is told: a unit's address, or the block
//! device that the host's kernel made of it, whose reservations then decide who writes.
//!
//! Always holds: nothing is created, enlarged or deleted here: the SAN's administrator does that. A host logs in
//! under one name for each host and cluster, so the SAN can keep out exactly that host. No password leaves this
//! program in an argument, a variable or a message.
//!
//! Why not libiscsi's tools: each is a process of its own, takes the password as an argument or a variable, and
//! prints for people; a look at a hundred units would be a hundred of them.

mod host;
mod pdu;
pub mod session;

use crate::block::{size_of, unclaimed};
use crate::lanes::Lanes;
use crate::reservation::{ClusterTag, LinuxDevice, Reservation};
use crate::{
    DiskFormat, DiskInfo, DiskSource, DiskSpec, ImageEntry, IscsiSource, Login, Marker, Pool,
    PoolError, PoolFacts, StorageFence,
};
use futures_util::StreamExt as _;
use host::{HostInitiator, Iscsiadm, Places};
use quorate_types::{IscsiPool, Lun, Opener};
use session::{Found, IscsiError, Peer, Session, UnitInfo};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A host that was just let in may have to wait until the SAN knows.
const LET_IN_WITHIN: Duration = Duration::from_secs(6);
const LET_IN_AGAIN: Duration = Duration::from_millis(100);
/// For the host's kernel to notice that a unit has grown.
const GROWN_WITHIN: Duration = Duration::from_secs(3);
/// Targets that are looked at at the same time.
const AT_ONCE: usize = 16;

/// What an iSCSI pool is told.
#[derive(Debug, Clone)]
pub struct IscsiConfig {
    /// The pool's name.
    pub pool: String,
    /// Its definition.
    pub spec: IscsiPool,
    /// The cluster that the pool belongs to.
    pub cluster: String,
    /// Name by which this host logs in.
    pub initiator: String,
    /// Account and password, where the definition names one.
    pub login: Option<Login>,
    /// The definition names a secret that the cluster does not have.
    pub missing_secret: Option<String>,
    /// Longest time for one look.
    pub deadline: Duration,
}

/// A pool of logical units.
#[derive(Debug)]
pub struct IscsiPoolDriver {
    config: IscsiConfig,
    /// Where the host's kernel opens the units.
    host: Option<HostInitiator>,
    lanes: Lanes,
    /// One for each unit, with its device: operations on it take turns, also when one hangs.
    reservations: Mutex<BTreeMap<Lun, (PathBuf, Reservation)>>,
}

impl IscsiPoolDriver {
    /// A pool; nothing is looked at yet.
    pub fn new(config: IscsiConfig) -> Self {
        let host = (config.spec.opened_by == Opener::Kernel).then(|| {
            HostInitiator::new(
                &config.pool,
                &config.initiator,
                config.login.clone(),
                Places::default(),
                Arc::new(Iscsiadm),
            )
        });
        Self {
            host,
            lanes: Lanes::new(&config.pool, config.deadline),
            reservations: Mutex::default(),
            config,
        }
    }

    fn error(&self, source: IscsiError) -> PoolError {
        PoolError::Iscsi {
            pool: self.config.pool.clone(),
            source,
        }
    }

    fn unit_name(&self, image: &str) -> Result<Lun, PoolError> {
        let unit = self.config.spec.lun_of(image);
        unit.map_err(|reason| PoolError::BadUnit { reason })
    }

    fn peer(&self, portal: String) -> Result<Peer, PoolError> {
        if let Some(secret) = &self.config.missing_secret {
            return Err(PoolError::SecretMissing {
                pool: self.config.pool.clone(),
                secret: secret.clone(),
            });
        }
        Ok(Peer {
            portal,
            initiator: self.config.initiator.clone(),
            login: self.config.login.clone(),
            deadline: self.config.deadline,
        })
    }

    /// The first portal that answers, with the names of all targets behind it.
    async fn discover(&self) -> Result<(Peer, Vec<Found>), PoolError> {
        let mut last = None;
        for portal in self.config.spec.portals() {
            let peer = self.peer(portal)?;
            match session::discover(&peer).await {
                Ok(targets) => return Ok((peer, targets)),
                Err(error @ IscsiError::Authentication { .. }) => return Err(self.error(error)),
                Err(error) => last = Some(error),
            }
        }
        Err(match last {
            Some(error) => self.error(error),
            None => PoolError::BadUnit {
                reason: format!(
                    "pool `{}` has no portal: list one under `portals`",
                    self.config.pool
                ),
            },
        })
    }

    async fn look_at(&self, unit: &Lun) -> Result<(String, UnitInfo), PoolError> {
        let mut last = None;
        for portal in self.config.spec.portals() {
            let peer = self.peer(portal.clone())?;
            match Self::look_once(&peer, unit).await {
                Ok(info) => return Ok((portal, info)),
                // Another portal is only of use where this one does not answer.
                Err(error @ (IscsiError::Portal { .. } | IscsiError::Timeout { .. })) => {
                    last = Some(error)
                }
                Err(error) => return Err(self.error(error)),
            }
        }
        Err(match last {
            Some(error) => self.error(error),
            None => PoolError::BadUnit {
                reason: format!("pool `{}` has no portal", self.config.pool),
            },
        })
    }

    async fn look_once(peer: &Peer, unit: &Lun) -> Result<UnitInfo, IscsiError> {
        let mut session = Session::open(peer, &unit.target).await?;
        let info = session.unit(unit.lun).await;
        session.logout().await;
        let (target, lun) = (unit.target.clone(), unit.lun);
        info?.ok_or(IscsiError::Protocol {
            detail: format!("LUN {lun} is not a disk"),
            target,
        })
    }

    /// As [`Self::look_at`], with patience for a SAN that lets this host in only now.
    async fn look_patiently(&self, unit: &Lun) -> Result<(String, UnitInfo), PoolError> {
        let begun = Instant::now();
        let patience = match self.config.spec.access {
            Some(_) => LET_IN_WITHIN,
            None => Duration::ZERO,
        };
        loop {
            match self.look_at(unit).await {
                Err(PoolError::Iscsi { source, .. })
                    if source.may_pass() && begun.elapsed() < patience =>
                {
                    tokio::time::sleep(LET_IN_AGAIN).await;
                }
                done => return done,
            }
        }
    }

    async fn info(
        &self,
        unit: Lun,
        portal: String,
        found: &UnitInfo,
    ) -> Result<DiskInfo, PoolError> {
        let (source, bytes) = match &self.host {
            Some(host) => {
                let (path, bytes) = self.attach(host, &unit, &portal, found.bytes).await?;
                (DiskSource::Device(path), bytes)
            }
            None => {
                let source = IscsiSource {
                    portal,
                    target: unit.target,
                    lun: unit.lun,
                    initiator: self.config.initiator.clone(),
                    login: self.config.login.clone(),
                };
                (DiskSource::Iscsi(source), found.bytes)
            }
        };
        Ok(DiskInfo {
            source,
            format: DiskFormat::Raw,
            virtual_bytes: bytes,
            actual_bytes: bytes,
            backing: None,
            created: false,
        })
    }

    /// The block device of a unit that has so many bytes, and how many the kernel knows of.
    async fn attach(
        &self,
        host: &HostInitiator,
        unit: &Lun,
        portal: &str,
        want_bytes: u64,
    ) -> Result<(PathBuf, u64), PoolError> {
        let path = match host.attached(unit) {
            Some(path) => path,
            None => {
                let group = self.group(unit, portal).await?;
                host.attach(unit, (portal, group)).await?
            }
        };
        let begun = Instant::now();
        let mut bytes = self.bytes_of(&path).await?;
        if bytes < want_bytes {
            let until = tokio::time::Instant::now() + GROWN_WITHIN;
            host.rescan(unit, until).await?;
        }
        while bytes < want_bytes && begun.elapsed() < GROWN_WITHIN {
            tokio::time::sleep(LET_IN_AGAIN).await;
            bytes = self.bytes_of(&path).await?;
        }
        Ok((path, bytes))
    }

    async fn bytes_of(&self, path: &Path) -> Result<u64, PoolError> {
        let (pool, path) = (self.config.pool.clone(), path.to_owned());
        let look = move || size_of(&pool, &path.display().to_string(), &path);
        self.lanes.run("looking at a device", look).await
    }

    /// The group of a portal, as the target tells it; a target that tells nothing has one.
    async fn group(&self, unit: &Lun, portal: &str) -> Result<u16, PoolError> {
        let found = session::discover(&self.peer(portal.to_owned())?).await;
        let found = found.unwrap_or_default().into_iter();
        let mut mine = found.filter(|found| found.target == unit.target);
        Ok(mine.next().map_or(1, |found| found.group(portal)))
    }

    async fn units_of(&self, peer: &Peer, target: String) -> Vec<ImageEntry> {
        let failed = |error: IscsiError| ImageEntry {
            image: self
                .config
                .spec
                .image_of(&target, self.config.spec.lun)
                .unwrap_or_else(|| target.clone()),
            virtual_bytes: None,
            actual_bytes: None,
            format: DiskFormat::Raw,
            problem: Some(error.to_string()),
        };
        let mut session = match Session::open(peer, &target).await {
            Ok(session) => session,
            Err(error) => return vec![failed(error)],
        };
        let mut found = Vec::new();
        let numbers = match session.luns().await {
            Ok(numbers) => numbers,
            Err(error) => return vec![failed(error)],
        };
        for lun in numbers {
            let Some(image) = self.config.spec.image_of(&target, lun) else {
                continue;
            };
            if let Ok(Some(unit)) = session.unit(lun).await {
                found.push(ImageEntry {
                    image,
                    virtual_bytes: Some(unit.bytes),
                    actual_bytes: Some(unit.bytes),
                    format: DiskFormat::Raw,
                    problem: None,
                });
            }
        }
        session.logout().await;
        found
    }
}

#[async_trait::async_trait]
impl Pool for IscsiPoolDriver {
    fn name(&self) -> &str {
        &self.config.pool
    }

    fn kind(&self) -> &'static str {
        "iscsi"
    }

    fn fence_proof(&self) -> Option<StorageFence> {
        let spec = &self.config.spec;
        match spec.has_reservations() {
            true => Some(StorageFence::Reservation),
            false => spec.access.as_ref().map(|_| StorageFence::TargetAccess),
        }
    }

    async fn reservation(&self, image: &str) -> Result<Option<Reservation>, PoolError> {
        let host = self.host.as_ref();
        let Some(host) = host.filter(|_| self.config.spec.has_reservations()) else {
            return Ok(None);
        };
        let unit = self.unit_name(image)?;
        let path = match host.attached(&unit) {
            Some(path) => path,
            None => {
                let (portal, found) = self.look_at(&unit).await?;
                self.attach(host, &unit, &portal, found.bytes).await?.0
            }
        };
        let mut known = self
            .reservations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((of, unit)) = known.get(&unit)
            && *of == path
        {
            return Ok(Some(unit.clone()));
        }
        let reservation = Reservation::new(
            Arc::new(LinuxDevice::new(&path)),
            ClusterTag::of(&self.config.cluster),
            self.config.deadline,
        );
        known.insert(unit, (path, reservation.clone()));
        Ok(Some(reservation))
    }

    /// The names of iSCSI are unique in the world: the pool is what they name, and nothing is written.
    async fn define(&self) -> Result<Marker, PoolError> {
        self.discover().await?;
        Ok(self.marker())
    }

    async fn check(&self) -> PoolFacts {
        let begun = Instant::now();
        let installed = self.host.as_ref().map_or(Ok(()), HostInitiator::check);
        let seen = match installed {
            Ok(()) => self.discover().await.map(drop),
            Err(error) => Err(error),
        };
        match seen {
            Ok(()) => PoolFacts::answered(self.marker(), begun),
            Err(error) => PoolFacts::failed(&error),
        }
    }

    async fn ensure_disk(&self, spec: &DiskSpec) -> Result<DiskInfo, PoolError> {
        if spec.format != DiskFormat::Raw {
            return Err(PoolError::RawOnly {
                pool: self.config.pool.clone(),
                image: spec.image.clone(),
            });
        }
        let unit = self.unit_name(&spec.image)?;
        let (portal, found) = self.look_patiently(&unit).await?;
        match spec.size_bytes {
            Some(want_bytes) if found.bytes < want_bytes => Err(PoolError::ImageTooSmall {
                image: spec.image.clone(),
                have_bytes: found.bytes,
                want_bytes,
            }),
            _ => {
                let info = self.info(unit, portal, &found).await?;
                if let DiskSource::Device(path) = &info.source {
                    let (pool, image) = (self.config.pool.clone(), spec.image.clone());
                    let path = path.clone();
                    let look = move || unclaimed(&pool, &image, &path);
                    self.lanes.run("looking at a device", look).await?;
                }
                Ok(info)
            }
        }
    }

    async fn disk_info(&self, image: &str, _format: DiskFormat) -> Result<DiskInfo, PoolError> {
        let unit = self.unit_name(image)?;
        let (portal, found) = self.look_at(&unit).await?;
        self.info(unit, portal, &found).await
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
        let (peer, targets) = self.discover().await?;
        let mine = targets.into_iter().map(|found| found.target);
        let mine = mine.filter(|target| {
            self.config
                .spec
                .image_of(target, self.config.spec.lun)
                .is_some()
        });
        let looks = mine.map(|target| self.units_of(&peer, target));
        let found: Vec<Vec<ImageEntry>> = futures_util::stream::iter(looks)
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut found: Vec<ImageEntry> = found.into_iter().flatten().collect();
        found.sort_by(|a, b| a.image.cmp(&b.image));
        Ok(found)
    }
}

impl IscsiPoolDriver {
    fn marker(&self) -> Marker {
        Marker {
            version: 1,
            cluster: self.config.cluster.clone(),
            pool: self.config.pool.clone(),
            id: format!("iscsi:{}", self.config.spec.target),
        }
    }
}
