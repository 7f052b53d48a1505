//! The jobs of a host: taken, queued, run, resumed.
//!
//! ```text
//!   submit --> queued --(a slot)--> running --> done
//!                ^                     |  \---> failed (resumable: the same request goes on)
//!                |                     '------> cancelled
//!                '--- the daemon's start finds it unfinished
//! ```
//! Always holds: a job is on disk before it is acknowledged; one job at a time works on an image.

use crate::error::ImageError;
use crate::record::{Record, Store};
use crate::work;
use async_trait::async_trait;
use quorate_storage::{DiskFormat, Pool};
use quorate_types::{
    HostName, ImageJob, ImageRef, ImageTask, JobState, PoolName, Timestamp, VmName,
};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Jobs that are not over.
const MOST_OPEN: usize = 64;
/// Format of records.
const FORMAT: u32 = 1;
/// Over this time the speed is told.
const METER_MS: u128 = 800;

/// What jobs are told.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host.
    pub host: HostName,
    /// Where records are kept; also sockets, so not too deep.
    pub folder: PathBuf,
    /// Copies at a time.
    pub parallel: usize,
}

/// A VM that names an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageUser {
    /// Which.
    pub vm: VmName,
    /// The host that may run it now; absent: it is stopped.
    pub host: Option<HostName>,
    /// The format that it declares.
    pub format: DiskFormat,
}

/// What jobs need of the host.
#[async_trait]
pub trait Site: Send + Sync + 'static {
    /// The driver of a pool.
    ///
    /// # Errors
    /// A sentence.
    fn pool(&self, name: &PoolName) -> Result<Arc<dyn Pool>, String>;

    /// VMs that name the image.
    fn users(&self, image: &ImageRef) -> Vec<ImageUser>;

    /// The wall clock.
    fn now(&self) -> Timestamp;

    /// Tells a running guest of this host that its disk has grown, growing the image where QEMU does that.
    ///
    /// # Errors
    /// A sentence.
    async fn guest_resize(&self, vm: &VmName, image: &ImageRef, bytes: u64) -> Result<(), String>;

    /// Lets a guest of this host go on whose file systems may have been frozen for a snapshot.
    async fn guest_thaw(&self, vm: &VmName);

    /// Makes or deletes a snapshot of a running guest's disk; what is worth saying comes back.
    ///
    /// # Errors
    /// A sentence.
    async fn guest_snapshot(
        &self,
        vm: &VmName,
        image: &ImageRef,
        name: &str,
        create: bool,
    ) -> Result<String, String>;
}

struct Live {
    record: Record,
    stop: CancellationToken,
    meter: (Instant, u64),
}

pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) site: Arc<dyn Site>,
    pub(crate) store: Store,
    jobs: Mutex<Vec<Live>>,
    slots: Semaphore,
}

/// The jobs of a host; cheap to clone.
#[derive(Clone)]
pub struct Jobs(Arc<Inner>);

impl Jobs {
    /// Reads what is recorded and goes on with what is not over.
    ///
    /// # Errors
    /// When the folder cannot be used.
    pub fn start(config: Config, site: Arc<dyn Site>) -> Result<Self, ImageError> {
        let (store, records) = Store::open(&config.folder)?;
        let live = |record| Live {
            record,
            stop: CancellationToken::new(),
            meter: (Instant::now(), 0),
        };
        let open: Vec<String> = records
            .iter()
            .filter(|record| !record.job.state.is_over())
            .map(|record| record.job.id.clone())
            .collect();
        let me = Self(Arc::new(Inner {
            slots: Semaphore::new(config.parallel.max(1)),
            config,
            site,
            store,
            jobs: Mutex::new(records.into_iter().map(live).collect()),
        }));
        for id in open {
            tracing::info!(job = id, "an unfinished job goes on");
            me.spawn_when_ready(id);
        }
        Ok(me)
    }

    /// Takes a task. One that was asked for already is not done twice; one that failed half-way goes on.
    ///
    /// # Errors
    /// When another job works on the image, there are too many, or it cannot be recorded.
    pub fn submit(&self, by: &str, task: ImageTask) -> Result<ImageJob, ImageError> {
        if let ImageTask::Import { file, .. } | ImageTask::Export { file, .. } = &task
            && !file.starts_with('/')
        {
            let text = format!("`{file}` is no absolute path");
            return Err(ImageError::Refused(text));
        }
        let mut jobs = self.0.lock();
        let open = jobs.iter().filter(|live| !live.record.job.state.is_over());
        if open.clone().count() >= MOST_OPEN {
            let text = format!("{MOST_OPEN} jobs are waiting already: `quorate image jobs`");
            return Err(ImageError::Refused(text));
        }
        for live in open {
            let job = &live.record.job;
            if same_work(&job.task, &task) {
                return Ok(job.clone());
            }
            if job.task.image() == task.image() {
                return Err(ImageError::Refused(format!(
                    "job {} works on {} already ({})",
                    job.id,
                    task.image(),
                    job.task
                )));
            }
        }
        let again = jobs
            .iter_mut()
            .find(|live| live.record.job.resumable && same_work(&live.record.job.task, &task));
        if let Some(live) = again {
            live.stop = CancellationToken::new();
            let job = &mut live.record.job;
            job.task = task;
            job.state = JobState::Queued;
            job.resumable = false;
            (job.error, job.ended) = (None, None);
            job.notes.clear();
            job.resumed_at = live.record.marked;
            self.0.store.save(&live.record)?;
            let job = live.record.job.clone();
            drop(jobs);
            self.spawn(job.id.clone());
            return Ok(job);
        }
        let record = self.record(by, task)?;
        self.0.store.save(&record)?;
        let job = record.job.clone();
        jobs.push(Live {
            record,
            stop: CancellationToken::new(),
            meter: (Instant::now(), 0),
        });
        drop(jobs);
        self.spawn(job.id.clone());
        Ok(job)
    }

    /// A job that nobody asked for before.
    fn record(&self, by: &str, task: ImageTask) -> Result<Record, ImageError> {
        let number = random()?;
        let id = format!("{}-{number:08x}", self.0.config.host);
        Ok(Record {
            format: FORMAT,
            part: id.clone(),
            job: ImageJob {
                id,
                host: self.0.config.host.clone(),
                by: by.to_owned(),
                task,
                state: JobState::Queued,
                phase: String::new(),
                done: 0,
                total: 0,
                per_second: 0,
                resumed_at: 0,
                sha256: None,
                notes: Vec::new(),
                error: None,
                resumable: false,
                asked: self.0.site.now(),
                ended: None,
            },
            source: None,
            marked: 0,
            begun: false,
        })
    }

    /// All jobs, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<ImageJob> {
        let jobs = self.0.lock();
        jobs.iter().map(|live| live.record.job.clone()).collect()
    }

    /// One job.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<ImageJob> {
        let jobs = self.0.lock();
        let found = jobs.iter().find(|live| live.record.job.id == id);
        found.map(|live| live.record.job.clone())
    }

    /// Takes a job back, or forgets what a failed one had copied. `None`: there is no such job.
    pub async fn cancel(&self, id: &str) -> Option<ImageJob> {
        let record = {
            let mut jobs = self.0.lock();
            let live = jobs.iter_mut().find(|live| live.record.job.id == id)?;
            live.stop.cancel();
            if !live.record.job.resumable {
                return Some(live.record.job.clone());
            }
            live.record.job.resumable = false;
            live.record.job.state = JobState::Cancelled;
            live.record.clone()
        };
        work::abandon(&self.0, &record).await;
        if let Err(error) = self.0.store.save(&record) {
            tracing::warn!(job = id, %error, "a job");
        }
        Some(record.job)
    }

    /// A daemon that has just started may not know its pools yet.
    fn spawn_when_ready(&self, id: String) {
        const TRIES: u32 = 120;
        const AGAIN: std::time::Duration = std::time::Duration::from_millis(500);
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move {
            let task = inner.record(&id).map(|record| record.job.task);
            let pool = task.map(|task| task.image().pool.clone());
            for _ in 0..TRIES {
                match &pool {
                    Some(pool) if inner.site.pool(pool).is_err() => {
                        tokio::time::sleep(AGAIN).await;
                    }
                    _ => break,
                }
            }
            inner.run(&id).await;
        });
    }

    fn spawn(&self, id: String) {
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move { inner.run(&id).await });
    }
}

/// The same result is wanted from the same source.
fn same_work(a: &ImageTask, b: &ImageTask) -> bool {
    let plain = |task: &ImageTask| {
        let mut task = task.clone();
        match &mut task {
            ImageTask::Import { limit, force, .. } | ImageTask::Clone { limit, force, .. } => {
                (*limit, *force) = (None, false);
            }
            ImageTask::Export { limit, .. } => *limit = None,
            _ => {}
        }
        task
    };
    a.copies() && plain(a) == plain(b)
}

fn random() -> Result<u32, ImageError> {
    use std::io::Read as _;
    let mut bytes = [0; 4];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(ImageError::io("/dev/urandom cannot be read"))?;
    Ok(u32::from_be_bytes(bytes))
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Vec<Live>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a record; with `durable` the file, too.
    pub(crate) fn update(
        &self,
        id: &str,
        durable: bool,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), ImageError> {
        let record = {
            let mut jobs = self.lock();
            let Some(live) = jobs.iter_mut().find(|live| live.record.job.id == id) else {
                return Ok(());
            };
            change(&mut live.record);
            live.record.clone()
        };
        match durable {
            true => self.store.save(&record),
            false => Ok(()),
        }
    }

    pub(crate) fn record(&self, id: &str) -> Option<Record> {
        let jobs = self.lock();
        let found = jobs.iter().find(|live| live.record.job.id == id);
        found.map(|live| live.record.clone())
    }

    pub(crate) fn note(&self, id: &str, text: impl Into<String>) {
        let text = text.into();
        // Kept with the next durable change.
        let _ = self.update(id, false, |record| record.job.notes.push(text));
    }

    /// A new phase begins.
    pub(crate) fn phase(&self, id: &str, name: &str, total: u64) {
        let mut jobs = self.lock();
        if let Some(live) = jobs.iter_mut().find(|live| live.record.job.id == id) {
            let job = &mut live.record.job;
            name.clone_into(&mut job.phase);
            (job.done, job.total, job.per_second) = (0, total, 0);
            live.meter = (Instant::now(), 0);
        }
    }

    pub(crate) fn progress(&self, id: &str, done: u64) {
        let mut jobs = self.lock();
        if let Some(live) = jobs.iter_mut().find(|live| live.record.job.id == id) {
            let job = &mut live.record.job;
            job.done = done.min(job.total);
            let (at, before) = live.meter;
            let passed = at.elapsed().as_millis();
            if passed >= METER_MS {
                let rate = u128::from(done.saturating_sub(before)) * 1000 / passed;
                job.per_second = u64::try_from(rate).unwrap_or(u64::MAX);
                live.meter = (Instant::now(), done);
            }
        }
    }

    async fn run(self: Arc<Self>, id: &str) {
        let Some(record) = self.record(id) else {
            return;
        };
        let stop = {
            let jobs = self.lock();
            let live = jobs.iter().find(|live| live.record.job.id == id);
            live.map(|live| live.stop.clone()).unwrap_or_default()
        };
        // Work that is quick does not wait behind copies.
        let slot = match record.job.task.copies() {
            true => tokio::select! {
                slot = self.slots.acquire() => slot.ok(),
                () = stop.cancelled() => None,
            },
            false => None,
        };
        let result = match stop.is_cancelled() {
            true => Err(ImageError::Cancelled),
            false => {
                // It is on disk as queued; that it runs matters to nobody after a crash.
                let _ = self.update(id, false, |record| record.job.state = JobState::Running);
                work::run(&self, &record, &stop).await
            }
        };
        drop(slot);
        self.finish(id, result).await;
    }

    async fn finish(&self, id: &str, result: Result<(), ImageError>) {
        let keeps = match &result {
            Ok(()) => false,
            Err(error) => error.keeps_copy(),
        };
        let Some(record) = self.record(id) else {
            return;
        };
        let resumable = keeps && record.begun && record.job.task.copies();
        if result.is_err() && !resumable {
            work::abandon(self, &record).await;
        }
        let now = self.site.now();
        let ended = self.update(id, true, |record| {
            if !resumable {
                (record.marked, record.begun) = (0, false);
            }
            let job = &mut record.job;
            job.ended = Some(now);
            job.resumable = resumable;
            job.state = match &result {
                Ok(()) => JobState::Done,
                Err(ImageError::Cancelled) => JobState::Cancelled,
                Err(error) => {
                    job.error = Some(error.to_string());
                    JobState::Failed
                }
            };
        });
        match (&result, ended) {
            (Ok(()), Ok(())) => tracing::info!(job = id, task = %record.job.task, "done"),
            (Err(error), _) => {
                tracing::warn!(job = id, task = %record.job.task, %error, "not done")
            }
            (_, Err(error)) => tracing::warn!(job = id, %error, "not recorded"),
        }
        let mut jobs = self.lock();
        let mut records: Vec<Record> = jobs.iter().map(|live| live.record.clone()).collect();
        self.store.prune(&mut records);
        jobs.retain(|live| {
            let kept = |record: &Record| record.job.id == live.record.job.id;
            records.iter().any(kept)
        });
    }
}
