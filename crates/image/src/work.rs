//! What a job does, step by step.

use crate::check::{check_file, fingerprint, measure};
use crate::copy::{self, Plan, Watcher};
use crate::error::ImageError;
use crate::jobs::Inner;
use crate::place::{self, file_format, takes_files};
use crate::record::Record;
use crate::serve::{Access, Served};
use crate::snapshot::{self, Act};
use crate::tables::{self, Content};
use crate::tool::{Target, qemu_img_ok, words};
use quorate_storage::{NewImage, Pool};
use quorate_types::{ByteSize, FileFormat, ImageRef, ImageTask};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const CREATE_WITHIN: Duration = Duration::from_secs(120);
const SECTOR: u64 = 512;

/// What is copied.
struct Origin {
    target: Target,
    bytes: u64,
    /// Changes when the source does.
    print: String,
    path: Option<PathBuf>,
    /// The image that it is, where it is one of a pool.
    image: Option<ImageRef>,
}

/// Where it goes.
enum Goal {
    /// A new image of a pool, or a unit.
    Pool(Arc<dyn Pool>, ImageRef),
    /// A file of this host.
    File(PathBuf),
}

/// How it goes there.
struct Wish {
    format: FileFormat,
    /// Size of the new disk.
    size: u64,
    force: bool,
    limit: Option<u64>,
}

pub(crate) async fn run(
    me: &Inner,
    record: &Record,
    stop: &CancellationToken,
) -> Result<(), ImageError> {
    let id = &record.job.id;
    let bytes = |limit: &Option<ByteSize>| limit.map(|limit| limit.0);
    match &record.job.task {
        ImageTask::Import { .. } => import(me, record, stop).await,
        ImageTask::Clone {
            from,
            to,
            format,
            force,
            limit,
        } => {
            let (origin, kind) = existing(me, from, "a copy").await?;
            let driver = me.site.pool(&to.pool).map_err(ImageError::Refused)?;
            let usual = if takes_files(&driver) {
                kind
            } else {
                FileFormat::Raw
            };
            let wish = Wish {
                format: format.unwrap_or(usual),
                size: origin.bytes,
                force: *force,
                limit: bytes(limit),
            };
            let goal = Goal::Pool(driver, to.clone());
            transfer(me, record, origin, goal, wish, stop).await
        }
        ImageTask::Export {
            from,
            file,
            format,
            limit,
        } => {
            let (origin, _) = existing(me, from, "an export").await?;
            let wish = Wish {
                format: format.unwrap_or(FileFormat::Raw),
                size: origin.bytes,
                force: false,
                limit: bytes(limit),
            };
            let goal = Goal::File(PathBuf::from(file));
            transfer(me, record, origin, goal, wish, stop).await
        }
        ImageTask::Resize { image, size } => resize(me, id, image, size.0).await,
        ImageTask::Delete { image } => delete(me, image).await,
        ImageTask::SnapshotCreate { image, name } => {
            snapshot(me, record, image, name, Act::Create).await
        }
        ImageTask::SnapshotDelete { image, name } => {
            snapshot(me, record, image, name, Act::Delete).await
        }
        ImageTask::SnapshotRevert { image, name } => {
            snapshot(me, record, image, name, Act::Revert).await
        }
    }
}

async fn import(me: &Inner, record: &Record, stop: &CancellationToken) -> Result<(), ImageError> {
    let ImageTask::Import {
        file,
        to,
        format,
        size,
        force,
        limit,
    } = &record.job.task
    else {
        return Ok(());
    };
    let id = &record.job.id;
    me.phase(id, "checking", 0);
    let checked = check_file(Path::new(file)).await?;
    for note in &checked.notes {
        me.note(id, note);
    }
    let origin = Origin {
        target: Target::file(&checked.path, checked.format.as_str()),
        bytes: checked.virtual_bytes,
        print: checked.print,
        path: Some(checked.path),
        image: None,
    };
    let driver = me.site.pool(&to.pool).map_err(ImageError::Refused)?;
    let wish = Wish {
        format: format.unwrap_or(FileFormat::Raw),
        size: wanted_size(*size, origin.bytes)?,
        force: *force,
        limit: limit.map(|limit| limit.0),
    };
    let goal = Goal::Pool(driver, to.clone());
    transfer(me, record, origin, goal, wish, stop).await
}

fn wanted_size(size: Option<ByteSize>, content: u64) -> Result<u64, ImageError> {
    match size {
        Some(size) if size.0 < content => Err(ImageError::Refused(format!(
            "the source has {content} bytes, more than the {size} that are asked for: a disk is never made smaller"
        ))),
        Some(size) => Ok(size.0.next_multiple_of(SECTOR)),
        None => Ok(content.next_multiple_of(SECTOR)),
    }
}

async fn existing(
    me: &Inner,
    from: &ImageRef,
    what: &str,
) -> Result<(Origin, FileFormat), ImageError> {
    place::quiet(&*me.site, from, what)?;
    let found = place::find(&*me.site, from).await?;
    let path = found.info.source.path().map(Path::to_owned);
    let print = match &path {
        Some(path) => fingerprint(path).map_err(ImageError::io("the source cannot be read"))?,
        None => format!("{from}:{}", found.info.virtual_bytes),
    };
    let origin = Origin {
        target: found.target(),
        bytes: found.info.virtual_bytes,
        print,
        path,
        image: Some(from.clone()),
    };
    Ok((origin, file_format(found.format)))
}

/// A place that is ready to be written to.
struct Ready {
    target: Target,
    /// A unit of a SAN or a device: it is there, whatever happens.
    unit: bool,
    /// Bytes that are there from an earlier run.
    from: u64,
}

async fn transfer(
    me: &Inner,
    record: &Record,
    origin: Origin,
    goal: Goal,
    wish: Wish,
    stop: &CancellationToken,
) -> Result<(), ImageError> {
    let id = &record.job.id;
    let folder = me.store.folder();
    let mut source = Served::open(&origin.target, Access::Read, folder, &format!("{id}-r")).await?;
    sound(&mut source, &origin, wish.force).await?;
    let ready = prepare(me, record, &origin, &goal, &wish).await?;
    me.update(id, true, |record| {
        record.source = Some(origin.print.clone());
        record.begun = true;
        record.marked = ready.from;
        record.job.resumed_at = ready.from;
    })?;
    let mut target = Served::open(&ready.target, Access::Write, folder, &format!("{id}-w")).await?;
    me.phase(id, "copying", origin.bytes);
    let plan = Plan {
        size: origin.bytes,
        from: ready.from,
        limit: wish.limit,
        blank: !ready.unit,
        first_last: ready.unit,
    };
    let mut watch = Watch { me, id };
    let copied = copy::copy(&mut source.nbd, &mut target.nbd, &plan, &mut watch, stop).await;
    source.close().await;
    target.close().await;
    let written = copied.map_err(|error| match &error {
        ImageError::Nbd { source, .. } if source.is_full() => ImageError::Full(describe(&goal)),
        _ => error,
    })?;
    if let Some(path) = &origin.path {
        let now = fingerprint(path).map_err(ImageError::io("the source cannot be read"))?;
        if now != origin.print {
            return Err(ImageError::File {
                file: path.display().to_string(),
                why: "it changed while it was copied: the copy is dropped; try again when nobody writes to it"
                    .to_owned(),
            });
        }
    }
    if let Some(image) = &origin.image {
        // Of a unit nobody else tells that a guest began to write to it.
        place::quiet(&*me.site, image, "a copy")?;
    }
    me.phase(id, "verifying", origin.bytes);
    let mut copy =
        Served::open(&ready.target, Access::ReadDisk, folder, &format!("{id}-v")).await?;
    let read = copy::checksum(&mut copy.nbd, origin.bytes, wish.limit, &mut watch, stop).await;
    copy.close().await;
    let read = read?;
    if read != written {
        return Err(ImageError::Differs { written, read });
    }
    publish(&goal, &record.part).await?;
    me.update(id, false, |record| record.job.sha256 = Some(written))
}

struct Watch<'a> {
    me: &'a Inner,
    id: &'a str,
}

impl Watcher for Watch<'_> {
    fn progress(&mut self, done: u64) {
        self.me.progress(self.id, done);
    }

    fn mark(&mut self, done: u64) -> Result<(), ImageError> {
        self.me.update(self.id, true, |record| {
            record.marked = record.marked.max(done);
        })
    }
}

fn describe(goal: &Goal) -> String {
    match goal {
        Goal::Pool(_, image) => format!("pool {}", image.pool),
        Goal::File(path) => format!("the file system of {}", path.display()),
    }
}

/// The partition table of the source must fit into it.
async fn sound(source: &mut Served, origin: &Origin, force: bool) -> Result<(), ImageError> {
    let head = head(source, origin.bytes).await?;
    match tables::ends_beyond(&head, origin.bytes) {
        Some(need) if !force => Err(ImageError::Refused(format!(
            "the partition table of the source needs {need} bytes and there are {}: it was cut off, or its size is \
             wrong; get it again (or take it as it is with --force)",
            origin.bytes
        ))),
        _ => Ok(()),
    }
}

async fn head(served: &mut Served, size: u64) -> Result<Vec<u8>, ImageError> {
    let length = size.min(tables::LOOK_AT as u64);
    let mut head = vec![0; usize::try_from(length).unwrap_or(0)];
    let read = served.nbd.read(0, &mut head).await;
    let what = "the beginning";
    read.map_err(|source| ImageError::Nbd { what, source })?;
    Ok(head)
}

async fn prepare(
    me: &Inner,
    record: &Record,
    origin: &Origin,
    goal: &Goal,
    wish: &Wish,
) -> Result<Ready, ImageError> {
    let id = &record.job.id;
    let same = record.source.as_ref() == Some(&origin.print);
    if record.begun && !same {
        abandon(me, record).await;
        me.note(
            id,
            "the source changed since the last attempt: it is copied from the beginning",
        );
    }
    let from = if record.begun && same {
        record.marked
    } else {
        0
    };
    match goal {
        Goal::Pool(driver, to) => {
            place::quiet(&*me.site, to, "writing to it")?;
            match driver.begin_image(&to.image, &record.part).await? {
                NewImage::Part(path) => {
                    only_pool_formats(wish.format)?;
                    room(driver, to, origin, wish.format, from).await?;
                    part(&path, wish, from).await
                }
                NewImage::Unit { source, bytes } => {
                    let target = Target::source(&source, "raw");
                    unit(me, id, to, &target, bytes, wish, record.begun && same).await?;
                    Ok(Ready {
                        target,
                        unit: true,
                        from,
                    })
                }
            }
        }
        Goal::File(path) => {
            if path.exists() {
                let file = path.display().to_string();
                let why = "it is there already: give another name".to_owned();
                return Err(ImageError::File { file, why });
            }
            part(&beside(path), wish, from).await
        }
    }
}

fn only_pool_formats(format: FileFormat) -> Result<(), ImageError> {
    match format {
        FileFormat::Raw | FileFormat::Qcow2 => Ok(()),
        other => Err(ImageError::Refused(format!(
            "images in pools are raw or qcow2, not {other}"
        ))),
    }
}

/// Refuses what does not fit, as far as that is known before.
async fn room(
    driver: &Arc<dyn Pool>,
    to: &ImageRef,
    origin: &Origin,
    format: FileFormat,
    from: u64,
) -> Result<(), ImageError> {
    let Some(need) = measure(&origin.target, format).await else {
        return Ok(());
    };
    let facts = driver.check().await;
    let need = need.saturating_sub(from);
    if facts.total_bytes > 0 && need > facts.free_bytes {
        return Err(ImageError::Refused(format!(
            "pool {} has {} bytes free and {need} are needed: make room, or choose another pool",
            to.pool, facts.free_bytes
        )));
    }
    Ok(())
}

/// Makes the file, or finds it as the last run left it.
async fn part(path: &Path, wish: &Wish, from: u64) -> Result<Ready, ImageError> {
    let there = path.exists();
    let from = if there { from } else { 0 };
    if from == 0 {
        if there {
            let what = format!("{} cannot be removed", path.display());
            std::fs::remove_file(path).map_err(ImageError::io(what))?;
        }
        let name = path.to_string_lossy();
        let size = wish.size.to_string();
        let mut arguments = words(&["create", "-q", "-f", wish.format.as_str()]);
        if wish.format == FileFormat::Vpc {
            arguments.extend(words(&["-o", "force_size=on"]));
        }
        arguments.extend(words(&[&name, &size]));
        qemu_img_ok(arguments, CREATE_WITHIN).await?;
    }
    Ok(Ready {
        target: Target::file(path, wish.format.as_str()),
        unit: false,
        from,
    })
}

/// May this unit be written to?
async fn unit(
    me: &Inner,
    id: &str,
    to: &ImageRef,
    target: &Target,
    bytes: u64,
    wish: &Wish,
    ours: bool,
) -> Result<(), ImageError> {
    if wish.format != FileFormat::Raw {
        return Err(ImageError::Refused(format!(
            "{to} is a whole unit: only `--format raw` fits there"
        )));
    }
    if wish.size > bytes {
        return Err(ImageError::Refused(format!(
            "{to} has {bytes} bytes and {} are needed: enlarge it at the SAN first",
            wish.size
        )));
    }
    let folder = me.store.folder();
    let mut served = Served::open(target, Access::Read, folder, &format!("{id}-c")).await?;
    let head = head(&mut served, bytes).await;
    served.close().await;
    let what = match tables::content(&head?) {
        Content::Blank => None,
        Content::Known(what) => Some(what),
        Content::Unknown => Some("data of a kind that is not known"),
    };
    match what {
        Some(what) if !wish.force && !ours => Err(ImageError::Refused(format!(
            "{to} holds {what}: if it may be overwritten, say --force"
        ))),
        _ => Ok(()),
    }
}

fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.quorate-part"))
}

async fn publish(goal: &Goal, part: &str) -> Result<(), ImageError> {
    match goal {
        Goal::Pool(driver, to) => Ok(driver.publish_image(&to.image, part).await?),
        Goal::File(path) => {
            let from = beside(path);
            let name = || -> std::io::Result<()> {
                std::fs::File::open(&from)?.sync_all()?;
                let here = rustix::fs::CWD;
                let keep = rustix::fs::RenameFlags::NOREPLACE;
                rustix::fs::renameat_with(here, &from, here, path, keep)?;
                let folder = path.parent().unwrap_or(Path::new("/"));
                std::fs::File::open(folder)?.sync_all()
            };
            name().map_err(ImageError::io(format!("{} cannot be made", path.display())))
        }
    }
}

/// Removes what a job had written and nobody sees.
pub(crate) async fn abandon(me: &Inner, record: &Record) {
    let done = match &record.job.task {
        ImageTask::Import { to, .. } | ImageTask::Clone { to, .. } => {
            match me.site.pool(&to.pool) {
                Ok(driver) => driver
                    .abandon_image(&to.image, &record.part)
                    .await
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error),
            }
        }
        ImageTask::Export { file, .. } => match std::fs::remove_file(beside(Path::new(file))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.to_string()),
            _ => Ok(()),
        },
        _ => Ok(()),
    };
    if let Err(error) = done {
        tracing::warn!(
            job = record.job.id,
            error,
            "what was copied so far stays behind"
        );
    }
}

async fn resize(me: &Inner, id: &str, image: &ImageRef, bytes: u64) -> Result<(), ImageError> {
    let bytes = bytes.next_multiple_of(SECTOR);
    let found = place::find(&*me.site, image).await?;
    let have = found.info.virtual_bytes;
    let unit = !takes_files(&found.driver);
    if bytes < have && !unit {
        return Err(ImageError::Refused(format!(
            "{image} has {have} bytes, more than the {bytes} that are asked for: a disk is never made smaller"
        )));
    }
    let users = me.site.users(image);
    let running = users.iter().find(|user| user.host.is_some());
    if running.is_none() || unit {
        found
            .driver
            .resize_disk(&image.image, found.format, bytes)
            .await?;
    }
    match running {
        Some(user) => {
            let told = me.site.guest_resize(&user.vm, image, bytes).await;
            told.map_err(ImageError::Refused)?;
            me.note(id, format!("VM {} sees the new size now", user.vm));
        }
        None => me.note(id, format!("{image} has {bytes} bytes")),
    }
    Ok(())
}

async fn delete(me: &Inner, image: &ImageRef) -> Result<(), ImageError> {
    if let Some(user) = me.site.users(image).first() {
        return Err(ImageError::Refused(format!(
            "{image} is a disk of VM {}: take it out of its definition first, or delete the VM",
            user.vm
        )));
    }
    let driver = me.site.pool(&image.pool).map_err(ImageError::Refused)?;
    match driver.delete_disk(&image.image).await? {
        true => Ok(()),
        false => Err(ImageError::Refused(format!("there is no image {image}"))),
    }
}

async fn snapshot(
    me: &Inner,
    record: &Record,
    image: &ImageRef,
    name: &str,
    act: Act,
) -> Result<(), ImageError> {
    let (site, id) = (&*me.site, &record.job.id);
    let users = site.users(image);
    let running = users.into_iter().find(|user| user.host.is_some());
    if let Some(user) = running.as_ref().filter(|_| record.begun) {
        // The daemon was killed in the middle: the guest must not stay frozen.
        site.guest_thaw(&user.vm).await;
    }
    snapshot::check(site, image, name, act).await?;
    match running {
        None => snapshot::act(site, image, name, act).await,
        Some(user) if act == Act::Revert => Err(ImageError::Refused(format!(
            "VM {} runs: stop it before its disk goes back (`quorate vm stop {}`)",
            user.vm, user.vm
        ))),
        Some(user) => {
            let create = act == Act::Create;
            me.update(id, true, |record| record.begun = true)?;
            let said = site.guest_snapshot(&user.vm, image, name, create).await;
            me.note(id, said.map_err(ImageError::Refused)?);
            Ok(())
        }
    }
}
