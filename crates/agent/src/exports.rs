//! Exports of this host's copies, to which the owners of disks write.
//!
//! Owns: the directories below `exports/`, one for each copy; the task that opens and closes them.
//!
//! Always holds: one export of an image at most; it is closed when the replica says that its owner, or its life as a
//! copy, has passed, and before a guest of this host starts on the image; exports outlive the agent. An image of a
//! `local` pool is removed when the replica, which had this host's copy on record, has it on another host only.

use crate::mark;
use crate::vm::reserve::up_to_date;
use crate::vm::{Shared, text};
use quorate_agent_logic::{ExportOffer, ExportRequest, FlushRequest, keeps_export, may_export};
use quorate_hypervisor::qemu::export::{self, Export, ExportConfig};
use quorate_state::State;
use quorate_storage::{DiskFormat, DiskSpec};
use quorate_types::{HostName, PoolName, PoolSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Names the program.
const PROGRAM_VARIABLE: &str = "QUORATE_STORAGE_DAEMON";
const OPEN_WITHIN: Duration = Duration::from_secs(5);
const QUEUE: usize = 64;

/// The program that serves a copy, and relays to one.
pub(crate) fn program() -> OsString {
    std::env::var_os(PROGRAM_VARIABLE).unwrap_or_else(|| "qemu-storage-daemon".into())
}

/// What the task is asked.
pub(crate) enum Call {
    Open(ExportRequest, oneshot::Sender<Result<ExportOffer, String>>),
    Flush(FlushRequest, oneshot::Sender<Result<(), String>>),
    Close(PoolName, String, oneshot::Sender<Result<(), String>>),
}

/// The way to the task.
pub(crate) type Exports = mpsc::Sender<Call>;

/// A queue for the task.
pub(crate) fn queue() -> (Exports, mpsc::Receiver<Call>) {
    mpsc::channel(QUEUE)
}

const GONE: &str = "the agent has stopped";

/// Asks for an export.
pub(crate) async fn open(exports: &Exports, request: ExportRequest) -> Result<ExportOffer, String> {
    let (reply, answer) = oneshot::channel();
    let sent = exports.send(Call::Open(request, reply)).await;
    sent.map_err(|_| GONE.to_owned())?;
    answer.await.map_err(|_| GONE.to_owned())?
}

/// Brings a copy that is written to stable storage, and marks it.
pub(crate) async fn flush(exports: &Exports, request: FlushRequest) -> Result<(), String> {
    let (reply, answer) = oneshot::channel();
    let sent = exports.send(Call::Flush(request, reply)).await;
    sent.map_err(|_| GONE.to_owned())?;
    answer.await.map_err(|_| GONE.to_owned())?
}

/// Makes sure that nobody writes to an image from outside any more; somebody here is about to.
pub(crate) async fn close(exports: &Exports, pool: &PoolName, image: &str) -> Result<(), String> {
    let (reply, answer) = oneshot::channel();
    let call = Call::Close(pool.clone(), image.to_owned(), reply);
    exports.send(call).await.map_err(|_| GONE.to_owned())?;
    answer.await.map_err(|_| GONE.to_owned())?
}

type Key = (PoolName, String);

struct Task {
    shared: Arc<Shared>,
    open: BTreeMap<Key, ExportRequest>,
    /// Copies of this host in `local` pools, as they were on record the last time.
    local: BTreeSet<Key>,
}

/// Runs for the life of the agent.
pub(crate) async fn run(shared: Arc<Shared>, mut calls: mpsc::Receiver<Call>) {
    let mut states = shared.state.clone();
    let mut task = Task {
        open: found(&shared.layout.exports()),
        local: BTreeSet::new(),
        shared,
    };
    loop {
        task.sweep().await;
        tokio::select! {
            call = calls.recv() => match call {
                Some(Call::Open(request, reply)) => drop(reply.send(task.serve(request).await)),
                Some(Call::Flush(request, reply)) => task.flush(request, reply),
                Some(Call::Close(pool, image, reply)) => {
                    drop(reply.send(task.take(&(pool, image)).await));
                }
                None => return,
            },
            changed = states.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

/// Exports that an earlier agent has opened.
fn found(dir: &Path) -> BTreeMap<Key, ExportRequest> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut open = BTreeMap::new();
    for entry in entries {
        let Ok(Some(export)) = export::find(&entry.path()) else {
            continue;
        };
        if let Ok(request) = serde_json::from_str::<ExportRequest>(&export.config.note) {
            open.insert((request.pool.clone(), request.image.clone()), request);
        }
    }
    open
}

impl Task {
    /// A short directory name for an image: FNV-1a spreads well enough for names.
    fn dir(&self, (pool, image): &Key) -> PathBuf {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in image.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let exports = self.shared.layout.exports();
        exports.join(format!("{pool}-{hash:016x}"))
    }

    async fn close(&mut self, key: &Key) -> Result<(), String> {
        let closed = export::close(&self.dir(key)).await;
        closed.map_err(|error| error.to_string())?;
        if self.open.remove(key).is_some() {
            tracing::info!(pool = %key.0, image = key.1, "a copy takes no more writes");
        }
        Ok(())
    }

    /// The image is for this host's own guest: what its mark says will not hold.
    async fn take(&mut self, key: &Key) -> Result<(), String> {
        self.close(key).await?;
        let Ok(pool) = self.shared.pool(&key.0) else {
            return Ok(());
        };
        let info = pool.disk_info(&key.1, DiskFormat::Raw).await;
        let path = info
            .ok()
            .and_then(|info| info.source.path().map(Path::to_owned));
        let Some(path) = path else {
            return Ok(());
        };
        mark::remove(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// In a task of its own: storage may take its time.
    fn flush(&self, request: FlushRequest, reply: oneshot::Sender<Result<(), String>>) {
        let key = (request.pool.clone(), request.image.clone());
        let open = self.open.get(&key);
        let live = open.filter(|open| open.name() == request.export);
        let live = live.and_then(|_| export::find(&self.dir(&key)).ok().flatten());
        let Some(live) = live else {
            let text = format!("the copy of {} is not written by {}", key.1, request.export);
            return drop(reply.send(Err(text)));
        };
        self.shared.spawn(async move {
            let image = live.config.image;
            let marked = tokio::task::spawn_blocking(move || {
                mark::set(&image, &request.export)
                    .map_err(|error| format!("{}: {error}", image.display()))
            });
            let marked = marked.await.map_err(|error| error.to_string());
            let _ = reply.send(marked.and_then(|marked| marked));
        });
    }

    async fn sweep(&mut self) {
        let state = self.shared.state();
        let me = &self.shared.config.host.clone();
        let over = |(_, request): &(&Key, &ExportRequest)| !keeps_export(&state, me, request);
        let over: Vec<Key> = self
            .open
            .iter()
            .filter(over)
            .map(|(key, _)| key.clone())
            .collect();
        for key in over {
            if let Err(error) = self.close(&key).await {
                tracing::error!(pool = %key.0, image = key.1, error, "an export stays open");
            }
        }
        let now = local_copies(&state, me);
        let before = std::mem::replace(&mut self.local, now);
        for key in before.difference(&self.local) {
            if moved_away(&state, me, key)
                && let Err(error) = self.remove(key).await
            {
                tracing::warn!(pool = %key.0, image = key.1, error, "an image that has moved stays");
            }
        }
    }

    /// Nobody needs the image here any more.
    async fn remove(&self, key: &Key) -> Result<(), String> {
        let pool = self.shared.pool(&key.0)?;
        let removed = pool.delete_disk(&key.1).await;
        removed.map_err(|error| text(&error))?;
        tracing::info!(pool = %key.0, image = key.1, "an image is removed: it is on another host now");
        Ok(())
    }

    async fn serve(&mut self, request: ExportRequest) -> Result<ExportOffer, String> {
        let me = self.shared.config.host.clone();
        up_to_date(&self.shared)?;
        may_export(&self.shared.state(), &me, &request)?;
        let key = (request.pool.clone(), request.image.clone());
        let dir = self.dir(&key);
        let live = export::find(&dir).map_err(|error| error.to_string())?;
        if let Some(live) = live.filter(|_| self.open.get(&key) == Some(&request)) {
            return Ok(offer(&live));
        }
        self.close(&key).await?;
        let image = self.prepare(&request).await?;
        let config = ExportConfig {
            image,
            name: request.name(),
            address: self.shared.config.migration_address,
            tls: self.shared.config.migration_tls.clone(),
            note: serde_json::to_string(&request).map_err(|error| error.to_string())?,
        };
        let opened = export::open(program().as_ref(), &dir, &config, OPEN_WITHIN).await;
        let opened = opened.map_err(|error| error.to_string())?;
        tracing::info!(vm = %request.vm, image = request.image, from = %request.from, "a copy is written");
        self.open.insert(key, request);
        Ok(offer(&opened))
    }

    /// The image, as large as the disk, with all its space taken: a copy must not run out of it.
    async fn prepare(&self, request: &ExportRequest) -> Result<PathBuf, String> {
        let pool = self.shared.pool(&request.pool)?;
        let spec = DiskSpec {
            image: request.image.clone(),
            format: DiskFormat::Raw,
            size_bytes: Some(request.size),
            create: true,
        };
        let info = pool.disk_info(&spec.image, spec.format).await;
        match info.map_or(request.size, |info| info.virtual_bytes) {
            size if size > request.size => {
                let deleted = pool.delete_disk(&spec.image).await;
                deleted.map_err(|error| text(&error))?;
            }
            // The disk was made larger; what it has is the same.
            size if size < request.size => {
                let grown = pool.resize_disk(&spec.image, spec.format, request.size);
                grown.await.map_err(|error| text(&error))?;
            }
            _ => {}
        }
        let made = pool
            .ensure_disk(&spec)
            .await
            .map_err(|error| text(&error))?;
        let path = made.source.path().map(Path::to_owned);
        let path = path.ok_or("a copy must be a file")?;
        let (file, size) = (path.clone(), request.size);
        let taken = tokio::task::spawn_blocking(move || take(&file, size)).await;
        match taken.map_err(|error| error.to_string())? {
            Ok(()) => Ok(path),
            Err(error) => Err(format!(
                "{} bytes for the copy {} cannot be taken up: {error}",
                request.size,
                path.display()
            )),
        }
    }
}

/// This host's copies in `local` pools, by the replica.
fn local_copies(state: &State, me: &HostName) -> BTreeSet<Key> {
    let pools = state.disk_copies.iter().filter(|(pool, _)| {
        let pool = state.pools.get(*pool);
        pool.is_some_and(|pool| matches!(pool.spec, PoolSpec::Local(_)))
    });
    let disks = pools.flat_map(|(pool, disks)| disks.iter().map(move |disk| (pool, disk)));
    disks
        .filter(|(_, (_, record))| record.hosts.contains_key(me))
        .map(|(pool, (image, _))| (pool.clone(), image.clone()))
        .collect()
}

/// Whether a disk is on record, in step on another host and not on this one.
fn moved_away(state: &State, me: &HostName, (pool, image): &Key) -> bool {
    let local = state.pools.get(pool);
    let local = local.is_some_and(|pool| matches!(pool.spec, PoolSpec::Local(_)));
    let record = state.copies(pool, image);
    local
        && record.is_some_and(|record| {
            let whole = record.hosts.values().any(|copy| copy.in_step);
            whole && !record.hosts.contains_key(me)
        })
}

fn take(path: &Path, size: u64) -> std::io::Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    let mode = rustix::fs::FallocateFlags::empty();
    match rustix::fs::fallocate(&file, mode, 0, size) {
        // Some file systems cannot: then a full one stops the copy while it is in step, which is noticed.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

fn offer(export: &Export) -> ExportOffer {
    ExportOffer {
        address: export.address.to_string(),
        name: export.config.name.clone(),
        mark: mark::read(&export.config.image),
    }
}
