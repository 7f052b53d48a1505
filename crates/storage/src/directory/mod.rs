//! The pool kind `directory`: a path that all listed hosts share (NFS, a cluster file
//! system, one machine's disk in the lab).
//!
//! Owns the layout below the path:
//! ```text
//! .quorate-pool              the marker, JSON
//! .quorate-probe.HOST        4 KiB that each host rewrites to see whether it can write
//! .quorate-saved/VM.EPOCH.*  saved states
//! .quorate-new.*             images being made; left over only by a crash
//! anything else              images, with whatever folders the operator likes
//! ```
//! Always holds: nothing below the path is changed unless the marker there is the expected
//! one. It gives no fence proof: a directory cannot tell who writes to it.

mod files;
mod image;
mod list;
mod marker;
mod paths;
mod saved;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::lanes::Lanes;
use crate::{
    DiskFormat, DiskInfo, DiskSource, DiskSpec, ImageEntry, Marker, NewImage, Pool, PoolError,
    PoolFacts, SavedState, StorageFence, round_to_sector,
};
use image::{Info, QemuImg};
use marker::Expected;

/// What a directory pool is told.
#[derive(Debug, Clone)]
pub struct DirectoryConfig {
    /// The pool's name.
    pub pool: String,
    /// The shared path.
    pub path: PathBuf,
    /// The cluster that the pool belongs to.
    pub cluster: String,
    /// This host's name; hosts probe with files of their own.
    pub host: String,
    /// The id the cluster knows the pool by; `None` until it was defined.
    pub expected_id: Option<String>,
    /// Longest time for one look at the storage.
    pub deadline: Duration,
    /// Longest time for making or enlarging an image.
    pub image_deadline: Duration,
    /// The program `qemu-img`, by name or path.
    pub qemu_img: PathBuf,
}

impl DirectoryConfig {
    /// A configuration with the usual deadlines.
    pub fn new(pool: &str, path: impl Into<PathBuf>, cluster: &str, host: &str) -> Self {
        Self {
            pool: pool.to_owned(),
            path: path.into(),
            cluster: cluster.to_owned(),
            host: host.to_owned(),
            expected_id: None,
            deadline: Duration::from_secs(5),
            image_deadline: Duration::from_secs(60),
            qemu_img: "qemu-img".into(),
        }
    }
}

/// The pool's path, once its marker was found to be the expected one. Blocks on the storage: for files of the
/// cluster's own that lie in a pool.
///
/// # Errors
/// When the path or its marker is not as it should be.
pub fn checked_root(config: &DirectoryConfig) -> Result<PathBuf, PoolError> {
    let expected = Expected {
        cluster: config.cluster.clone(),
        pool: config.pool.clone(),
        id: config.expected_id.clone(),
    };
    let root = paths::root(&config.pool, &config.path)?;
    marker::read(&root, &expected)?;
    Ok(root)
}

/// A pool that is a directory.
#[derive(Debug)]
pub struct DirectoryPool {
    config: DirectoryConfig,
    expected: Expected,
    lanes: Lanes,
}

/// The calls that block, with what they need to know.
#[derive(Debug, Clone)]
struct Site {
    pool: String,
    path: PathBuf,
    host: String,
    expected: Expected,
}

impl Site {
    /// The pool's path, once its marker has been found to be right.
    fn root(&self) -> Result<PathBuf, PoolError> {
        let root = paths::root(&self.pool, &self.path)?;
        marker::read(&root, &self.expected)?;
        Ok(root)
    }

    fn failed(&self, path: &Path, operation: &'static str) -> impl Fn(std::io::Error) -> PoolError {
        let (pool, path) = (self.pool.clone(), path.to_owned());
        move |error| PoolError::io(&pool, &path, operation, error)
    }

    /// Fills in what can be seen and returns what is wrong.
    fn look(&self, facts: &mut PoolFacts) -> Result<(), PoolError> {
        let root = paths::root(&self.pool, &self.path)?;
        let stat = rustix::fs::statfs(&root)
            .map_err(|errno| PoolError::io(&self.pool, &root, "asking for free space", errno))?;
        facts.reachable = true;
        let block_bytes = stat.f_bsize as u64;
        facts.free_bytes = stat.f_bavail.saturating_mul(block_bytes);
        facts.total_bytes = stat.f_blocks.saturating_mul(block_bytes);
        facts.fs_type = Some(fs_type(stat.f_type as u64));
        facts.marker = Some(marker::read(&root, &self.expected)?);
        let probe = root.join(format!("{}-probe.{}", paths::RESERVED, self.host));
        let begin = Instant::now();
        files::probe_write(&probe).map_err(self.failed(&probe, "a trial write"))?;
        facts.writable = true;
        facts.probe_write_us = Some(begin.elapsed().as_micros() as u64);
        Ok(())
    }

    /// Makes a sparse raw image. Returns false when there is one already.
    fn create_raw(&self, path: &Path, size_bytes: u64) -> Result<bool, PoolError> {
        files::place_new(path, |file| file.set_len(size_bytes))
            .map_err(self.failed(path, "making an image"))
    }

    fn delete(&self, image: &str) -> Result<bool, PoolError> {
        let root = self.root()?;
        let place = paths::resolve(&self.pool, &root, image, false)?;
        if !place.exists {
            return Ok(false);
        }
        let failed = self.failed(&place.path, "deleting an image");
        if !fs::metadata(&place.path).map_err(&failed)?.is_file() {
            return Err(PoolError::NotAFile {
                pool: self.pool.clone(),
                image: image.to_owned(),
            });
        }
        // Held until the name is gone, so that no guest starts on it meanwhile.
        let Some(_lock) = image::lock_unused(&self.pool, &place.path)? else {
            return Err(PoolError::ImageInUse {
                image: image.to_owned(),
            });
        };
        fs::remove_file(&place.path).map_err(&failed)?;
        if let Some(folder) = place.path.parent() {
            files::sync_folder(folder).map_err(&failed)?;
        }
        Ok(true)
    }
}

impl DirectoryPool {
    /// A pool at the path; nothing is looked at yet.
    pub fn new(config: DirectoryConfig) -> Self {
        let expected = Expected {
            cluster: config.cluster.clone(),
            pool: config.pool.clone(),
            id: config.expected_id.clone(),
        };
        let lanes = Lanes::new(&config.pool, config.deadline);
        Self {
            config,
            expected,
            lanes,
        }
    }

    fn site(&self) -> Site {
        Site {
            pool: self.config.pool.clone(),
            path: self.config.path.clone(),
            host: self.config.host.clone(),
            expected: self.expected.clone(),
        }
    }

    async fn on_site<T, F>(&self, operation: &'static str, call: F) -> Result<T, PoolError>
    where
        T: Send + 'static,
        F: FnOnce(&Site) -> Result<T, PoolError> + Send + 'static,
    {
        let site = self.site();
        self.lanes.run(operation, move || call(&site)).await
    }

    fn qemu_img<'a>(&'a self, image: &'a str, format: DiskFormat) -> QemuImg<'a> {
        QemuImg {
            program: &self.config.qemu_img,
            pool: &self.config.pool,
            image,
            format,
            deadline: self.config.image_deadline,
        }
    }

    /// Where the image is or would be; refuses a pool that is not in order.
    async fn place(&self, image: &str, make_folders: bool) -> Result<paths::Place, PoolError> {
        paths::check_image_name(image)?;
        let image = image.to_owned();
        self.on_site("looking an image up", move |site| {
            let root = site.root()?;
            paths::resolve(&site.pool, &root, &image, make_folders)
        })
        .await
    }

    async fn describe(
        &self,
        image: &str,
        path: PathBuf,
        format: DiskFormat,
    ) -> Result<DiskInfo, PoolError> {
        let facts = {
            let (image, path) = (image.to_owned(), path.clone());
            self.on_site("reading an image", move |site| {
                image::inspect(&site.pool, &image, &path, format)
            })
            .await?
        };
        if format == DiskFormat::Raw {
            return Ok(DiskInfo {
                source: DiskSource::File(path),
                format,
                virtual_bytes: facts.length_bytes,
                actual_bytes: facts.actual_bytes,
                backing: None,
                created: false,
            });
        }
        let info = self.qemu_img(image, format).info(&path).await?;
        self.check_chain(image, &path, &info).await?;
        Ok(DiskInfo {
            backing: info.backing().map(|other| image::beside(&path, other)),
            source: DiskSource::File(path),
            format,
            virtual_bytes: info.virtual_bytes,
            actual_bytes: info.actual_bytes,
            created: false,
        })
    }

    /// All files that an image rests on, and these in turn, must be in the pool.
    async fn check_chain(&self, image: &str, path: &Path, info: &Info) -> Result<(), PoolError> {
        const DEPTH: usize = 16;
        let mut at = path.to_owned();
        let mut next = None;
        for _ in 0..DEPTH {
            let here: &Info = next.as_ref().unwrap_or(info);
            for other in here.other_files() {
                self.check_other_file(image, &at, other).await?;
            }
            let Some(backing) = here.backing() else {
                return Ok(());
            };
            at = image::beside(&at, backing);
            // Plain bytes rest on nothing; of anything else QEMU itself says what it is.
            if here.backing_format() == Some("raw") {
                return Ok(());
            }
            next = Some(self.qemu_img(image, DiskFormat::Qcow2).info(&at).await?);
        }
        Err(PoolError::QemuImg {
            image: image.to_owned(),
            operation: "info",
            detail: format!("it rests on more than {DEPTH} images: convert it into one"),
        })
    }

    /// A file that an image names must be in the pool like the image itself.
    async fn check_other_file(
        &self,
        image: &str,
        path: &Path,
        other: &str,
    ) -> Result<(), PoolError> {
        let image = image.to_owned();
        let target = image::beside(path, other);
        self.on_site("reading an image", move |site| {
            let root = paths::root(&site.pool, &site.path)?;
            let target = fs::canonicalize(&target)
                .map_err(site.failed(&target, "looking up what an image is based on"))?;
            paths::inside(&site.pool, &root, &image, target)?;
            Ok(())
        })
        .await
    }

    fn exists(&self, image: &str) -> PoolError {
        PoolError::ImageExists {
            pool: self.config.pool.clone(),
            image: image.to_owned(),
        }
    }

    /// Makes an image. Returns false when another host was faster.
    async fn create(&self, spec: &DiskSpec, path: &Path, size: u64) -> Result<bool, PoolError> {
        let size = round_to_sector(size);
        if spec.format == DiskFormat::Raw {
            let path = path.to_owned();
            return self
                .on_site("making an image", move |site| site.create_raw(&path, size))
                .await;
        }
        let part = {
            let path = path.to_owned();
            self.on_site("making an image", move |site| {
                let id = files::random_id().map_err(site.failed(&path, "making an image"))?;
                Ok(path.with_file_name(format!("{}-new.{id}", paths::RESERVED)))
            })
            .await?
        };
        let made = self
            .qemu_img(&spec.image, spec.format)
            .create(&part, size)
            .await;
        let path = path.to_owned();
        self.on_site("making an image", move |site| {
            let failed = site.failed(&path, "making an image");
            let published = made.and_then(|()| {
                let durable = fs::File::open(&part).and_then(|file| file.sync_all());
                durable
                    .and_then(|()| files::publish(&part, &path))
                    .map_err(failed)
            });
            if !matches!(published, Ok(true)) {
                // It may never have come into being.
                let _ = fs::remove_file(&part);
            }
            published
        })
        .await
    }
}

#[async_trait::async_trait]
impl Pool for DirectoryPool {
    fn name(&self) -> &str {
        &self.config.pool
    }

    fn kind(&self) -> &'static str {
        "directory"
    }

    fn fence_proof(&self) -> Option<StorageFence> {
        None
    }

    async fn define(&self) -> Result<Marker, PoolError> {
        self.on_site("defining the pool", |site| {
            let root = paths::root(&site.pool, &site.path)?;
            marker::define(&root, &site.expected)
        })
        .await
    }

    async fn check(&self) -> PoolFacts {
        let looked = self
            .on_site("checking the pool", |site| {
                let mut facts = PoolFacts::default();
                if let Err(error) = site.look(&mut facts) {
                    facts.problem = Some(error.to_string());
                }
                Ok(facts)
            })
            .await;
        looked.unwrap_or_else(|error| PoolFacts::failed(&error))
    }

    async fn ensure_disk(&self, spec: &DiskSpec) -> Result<DiskInfo, PoolError> {
        let mut place = self.place(&spec.image, false).await?;
        let mut created = false;
        if !place.exists {
            let (pool, image) = (self.config.pool.clone(), spec.image.clone());
            if !spec.create {
                return Err(PoolError::ImageMissing { pool, image });
            }
            let Some(size) = spec.size_bytes else {
                return Err(PoolError::SizeMissing { pool, image });
            };
            place = self.place(&spec.image, true).await?;
            created = self.create(spec, &place.path, size).await?;
        }
        let mut info = self.describe(&spec.image, place.path, spec.format).await?;
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
        let place = self.place(image, false).await?;
        if !place.exists {
            return Err(PoolError::ImageMissing {
                pool: self.config.pool.clone(),
                image: image.to_owned(),
            });
        }
        self.describe(image, place.path, format).await
    }

    async fn resize_disk(
        &self,
        image: &str,
        format: DiskFormat,
        size_bytes: u64,
    ) -> Result<DiskInfo, PoolError> {
        let want_bytes = round_to_sector(size_bytes);
        let info = self.disk_info(image, format).await?;
        let path = self.place(image, false).await?.path;
        if want_bytes < info.virtual_bytes {
            return Err(PoolError::WouldShrink {
                image: image.to_owned(),
                have_bytes: info.virtual_bytes,
                want_bytes,
            });
        }
        if want_bytes == info.virtual_bytes {
            return Ok(info);
        }
        let qemu_img = self.qemu_img(image, format);
        qemu_img.resize(&path, want_bytes).await?;
        self.disk_info(image, format).await
    }

    async fn delete_disk(&self, image: &str) -> Result<bool, PoolError> {
        paths::check_image_name(image)?;
        let image = image.to_owned();
        self.on_site("deleting an image", move |site| site.delete(&image))
            .await
    }

    async fn list_images(&self) -> Result<Vec<ImageEntry>, PoolError> {
        self.on_site("listing images", |site| {
            list::images(&site.pool, &site.root()?)
        })
        .await
    }

    async fn begin_image(&self, image: &str, id: &str) -> Result<NewImage, PoolError> {
        let place = self.place(image, true).await?;
        match place.exists {
            true => Err(self.exists(image)),
            false => Ok(NewImage::Part(part_of(&place.path, id))),
        }
    }

    async fn publish_image(&self, image: &str, id: &str) -> Result<(), PoolError> {
        let place = self.place(image, true).await?;
        let part = part_of(&place.path, id);
        let published = self
            .on_site("naming an image", move |site| {
                let failed = site.failed(&place.path, "naming an image");
                let durable = fs::File::open(&part).and_then(|file| file.sync_all());
                durable
                    .and_then(|()| files::publish(&part, &place.path))
                    .map_err(failed)
            })
            .await?;
        match published {
            true => Ok(()),
            false => Err(self.exists(image)),
        }
    }

    async fn abandon_image(&self, image: &str, id: &str) -> Result<(), PoolError> {
        let place = self.place(image, false).await?;
        let part = part_of(&place.path, id);
        self.on_site("removing an image", move |site| {
            match fs::remove_file(&part) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(site.failed(&part, "removing an image")(error))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    async fn prepare_saved_state(&self, vm: &str, epoch: u64) -> Result<SavedState, PoolError> {
        let vm = vm.to_owned();
        self.on_site("preparing a saved state", move |site| {
            saved::prepare(&site.pool, &site.root()?, &vm, epoch)
        })
        .await
    }

    async fn commit_saved_state(&self, vm: &str, epoch: u64) -> Result<PathBuf, PoolError> {
        let vm = vm.to_owned();
        self.on_site("committing a saved state", move |site| {
            saved::commit(&site.pool, &site.root()?, &vm, epoch)
        })
        .await
    }

    async fn find_saved_state(&self, vm: &str, epoch: u64) -> Result<Option<PathBuf>, PoolError> {
        let vm = vm.to_owned();
        self.on_site("looking for a saved state", move |site| {
            saved::find(&site.root()?, &vm, epoch)
        })
        .await
    }

    async fn delete_saved_states(&self, vm: &str, up_to_epoch: u64) -> Result<u32, PoolError> {
        let vm = vm.to_owned();
        self.on_site("deleting saved states", move |site| {
            saved::delete(&site.pool, &site.root()?, &vm, up_to_epoch)
        })
        .await
    }
}

/// Where an image is written until it is whole.
fn part_of(path: &Path, id: &str) -> PathBuf {
    path.with_file_name(format!("{}-new.{id}", paths::RESERVED))
}

/// The file system's name by its magic number.
fn fs_type(magic: u64) -> String {
    let name = match magic {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x2fc1_2fc1 => "zfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlay",
        0x6969 => "nfs",
        0xff53_4d42 => "cifs",
        0xfe53_4d42 => "smb2",
        0x00c3_6400 => "ceph",
        0x0116_1970 => "gfs2",
        0x7461_636f => "ocfs2",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        other => return format!("{other:#x}"),
    };
    name.to_owned()
}
