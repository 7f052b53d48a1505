//! Work on images: which host does it, and what the jobs of this host need of the rest of the daemon.
//!
//! Always holds: an image that a guest runs from is worked on by the guest's host, through QEMU; any other by a host
//! that reaches its pool; a file of a host by that host.

use super::core::{Core, wrong_answer};
use super::group::wall_clock;
use super::look::{others, usable_here};
use super::peer::{self, Answer, Ask};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use quorate_agent::AgentHandle;
use quorate_api::storage::listed_name;
use quorate_api::{ApiError, ErrorCode};
use quorate_hypervisor::{Quiesced, Vm};
use quorate_image::{Config, ImageError, ImageUser, Jobs, Site};
use quorate_state::{Command, Ownership, State};
use quorate_storage::{DiskFormat, Pool};
use quorate_transport::{CallError, RpcStatus};
use quorate_types::{
    HostName, ImageJob, ImageRef, ImageSnapshot, ImageTask, NodeId, PoolName, Timestamp, VmName,
    spec,
};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Copies at a time.
const PARALLEL: usize = 2;
const ASK_WITHIN: Duration = Duration::from_secs(10);
const LIST_WITHIN: Duration = Duration::from_secs(2);

/// The jobs of this host.
pub(crate) fn start(
    dir: &Path,
    me: &HostName,
    agent: &AgentHandle,
    states: watch::Receiver<Arc<State>>,
) -> Result<Jobs, ImageError> {
    let config = Config {
        host: me.clone(),
        folder: dir.join("images"),
        parallel: PARALLEL,
    };
    let site = Here {
        me: me.clone(),
        agent: agent.clone(),
        states,
    };
    Jobs::start(config, Arc::new(site))
}

struct Here {
    me: HostName,
    agent: AgentHandle,
    states: watch::Receiver<Arc<State>>,
}

impl Here {
    fn state(&self) -> Arc<State> {
        Arc::clone(&self.states.borrow())
    }

    /// A guest that runs here, and which of its disks the image is.
    fn guest(&self, vm: &VmName, image: &ImageRef) -> Result<(Arc<dyn Vm>, usize), String> {
        let state = self.state();
        let record = state
            .vms
            .get(vm)
            .ok_or_else(|| format!("there is no VM {vm}"))?;
        match &record.ownership {
            Ownership::Owned { host, .. } if *host == self.me => {}
            Ownership::Migrating { .. } => {
                return Err(format!(
                    "VM {vm} is migrating: try again when it has arrived"
                ));
            }
            _ => return Err(format!("VM {vm} does not run on {} any more", self.me)),
        }
        let disks = &record.effective().disks;
        let index = disks.iter().position(|disk| is_disk(&state, image, disk));
        let index = index.ok_or_else(|| {
            format!("VM {vm} was started without {image}: it takes part in this at its next start")
        })?;
        let guest = self.agent.guest(vm);
        Ok((
            guest.ok_or_else(|| format!("VM {vm} is not up here"))?,
            index,
        ))
    }
}

fn is_disk(state: &State, image: &ImageRef, disk: &spec::DiskSpec) -> bool {
    let Some(pool) = state.pools.get(&image.pool) else {
        return false;
    };
    let listed = |name: &str| listed_name(&pool.spec, name);
    disk.pool == image.pool && listed(&disk.image) == listed(&image.image)
}

/// VMs that name the image, as defined or as they run.
fn users(state: &State, image: &ImageRef) -> Vec<ImageUser> {
    let of = state.vms.iter().filter_map(|(name, vm)| {
        let active = vm.active.iter().flat_map(|spec| &spec.disks);
        let mut disks = vm.spec.disks.iter().chain(active);
        let disk = disks.find(|disk| is_disk(state, image, disk))?;
        Some(ImageUser {
            vm: name.clone(),
            host: vm.ownership.host().cloned(),
            format: match disk.format {
                spec::DiskFormat::Raw => DiskFormat::Raw,
                spec::DiskFormat::Qcow2 => DiskFormat::Qcow2,
            },
        })
    });
    of.collect()
}

#[async_trait]
impl Site for Here {
    fn pool(&self, name: &PoolName) -> Result<Arc<dyn Pool>, String> {
        self.agent.pool(name)
    }

    fn users(&self, image: &ImageRef) -> Vec<ImageUser> {
        users(&self.state(), image)
    }

    fn now(&self) -> Timestamp {
        wall_clock()
    }

    async fn guest_resize(&self, vm: &VmName, image: &ImageRef, bytes: u64) -> Result<(), String> {
        let (guest, index) = self.guest(vm, image)?;
        let mirrored = self
            .state()
            .pools
            .get(&image.pool)
            .is_some_and(|pool| pool.spec.is_mirrored());
        if mirrored {
            return self.agent.grow_mirrored(vm, index, bytes).await;
        }
        let done = guest.resize_disk(index, bytes).await;
        done.map_err(|error| chain(&error))
    }

    async fn guest_snapshot(
        &self,
        vm: &VmName,
        image: &ImageRef,
        name: &str,
        create: bool,
    ) -> Result<String, String> {
        let (guest, index) = self.guest(vm, image)?;
        if !create {
            let done = guest.delete_disk_snapshot(index, name).await;
            return match done {
                Ok(()) => Ok(format!("deleted while VM {vm} runs")),
                Err(error) => Err(chain(&error)),
            };
        }
        match guest.snapshot_disk(index, name).await {
            Ok(Quiesced::Yes) => Ok(format!(
                "VM {vm} held its file systems still for it: the snapshot is as after an orderly unmount"
            )),
            Ok(Quiesced::No(why)) => Ok(format!(
                "VM {vm} was not quiesced ({why}): the snapshot is as after a power cut"
            )),
            Ok(Quiesced::Stuck(why)) => Ok(format!(
                "VM {vm} was quiesced and does not answer any more ({why}): look at its console"
            )),
            Err(error) => Err(chain(&error)),
        }
    }

    async fn guest_thaw(&self, vm: &VmName) {
        if let Some(guest) = self.agent.guest(vm)
            && let Err(error) = guest.unquiesce().await
        {
            tracing::warn!(%vm, error, "its file systems may be frozen");
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

/// What this host is asked by another, or by its own API.
pub(crate) async fn answer(core: &Core, ask: Ask) -> Result<Answer, RpcStatus> {
    let refused = |error: ImageError| RpcStatus::new(409, error.to_string());
    match ask {
        Ask::ImageJob { by, task } => {
            announce(core, &task).await?;
            let job = core.images.submit(&by, *task).map_err(refused)?;
            Ok(Answer::ImageJobs(vec![job]))
        }
        Ask::ImageJobs { id } => Ok(Answer::ImageJobs(match id {
            Some(id) => core.images.get(&id).into_iter().collect(),
            None => core.images.list(),
        })),
        Ask::CancelImageJob { id } => {
            let job = core.images.cancel(&id).await;
            Ok(Answer::ImageJobs(job.into_iter().collect()))
        }
        Ask::Snapshots { image } => {
            let site = Here {
                me: core.me.clone(),
                agent: core.agent.clone(),
                states: core.states.clone(),
            };
            let listed = quorate_image::list_snapshots(&site, &image).await;
            listed.map(Answer::Snapshots).map_err(refused)
        }
        _ => Err(RpcStatus::new(500, "not a question about images")),
    }
}

/// The image that a task writes to, if no VM may be started from it meanwhile.
pub(crate) fn written(task: &ImageTask) -> Option<&ImageRef> {
    match task {
        ImageTask::Import { to, .. } | ImageTask::Clone { to, .. } => Some(to),
        ImageTask::SnapshotRevert { image, .. } => Some(image),
        _ => None,
    }
}

/// Makes it known that an image is written to, before it is. [`super::records`] takes it back. Boxed: the leader's host
/// answers itself.
fn announce<'a>(core: &'a Core, task: &ImageTask) -> BoxFuture<'a, Result<(), RpcStatus>> {
    let command = written(task).map(|image| Command::BeginImageWrite {
        pool: image.pool.clone(),
        image: image.image.clone(),
        host: core.me.clone(),
        what: task.to_string(),
    });
    Box::pin(async move {
        let Some(command) = command else {
            return Ok(());
        };
        let announced = core.propose("images", command).await;
        announced
            .map(drop)
            .map_err(|error| RpcStatus::new(409, error.message))
    })
}

async fn ask_host(core: &Core, host: Option<NodeId>, ask: Ask) -> Result<Answer, ApiError> {
    let conflict = |text: String| ApiError::new(ErrorCode::Conflict, text);
    match host {
        None => answer(core, ask)
            .await
            .map_err(|status| conflict(status.message)),
        Some(node) => match peer::ask(&core.peers, node, &ask, ASK_WITHIN).await {
            Err(CallError::Refused { message, .. }) => Err(conflict(message)),
            other => {
                other.map_err(|error| ApiError::new(ErrorCode::Unreachable, error.to_string()))
            }
        },
    }
}

/// Who does it: `None` is this host.
async fn place(
    core: &Core,
    image: &ImageRef,
    pools: &[&PoolName],
    file: bool,
) -> Result<Option<NodeId>, ApiError> {
    let state = core.state();
    for pool in pools {
        if !state.pools.contains_key(*pool) {
            let known = state.pools.keys().map(PoolName::as_str);
            return Err(ApiError::unknown("pool", pool.as_str(), known));
        }
    }
    let running = users(&state, image).into_iter().find_map(|user| user.host);
    if let (Some(host), false) = (running, file) {
        let node = state.hosts.get(&host).map(|record| record.node);
        return Ok(node.filter(|_| host != core.me));
    }
    if pools.iter().all(|pool| usable_here(core, pool)) {
        return Ok(None);
    }
    let mut able: Option<Vec<(HostName, NodeId)>> = None;
    for pool in pools {
        let here = others(core, pool).await;
        able = Some(match able {
            None => here,
            Some(before) => before
                .into_iter()
                .filter(|host| here.contains(host))
                .collect(),
        });
    }
    let able = able.unwrap_or_default();
    let names: Vec<String> = able.iter().map(|(host, _)| host.to_string()).collect();
    let names = names.join(", ");
    match able.first() {
        Some((_, node)) if !file => Ok(Some(*node)),
        Some(_) => Err(ApiError::new(
            ErrorCode::Conflict,
            format!(
                "{} does not reach pool {} now; {names} does",
                core.me, image.pool
            ),
        )
        .hint(format!(
            "run the command on {names}, where the file must be"
        ))),
        None => Err(ApiError::new(
            ErrorCode::Conflict,
            format!("no host reaches pool {} now", image.pool),
        )
        .hint(format!("`quorate storage show {}` says why", image.pool))),
    }
}

/// Takes a task to the host that can do it.
pub(crate) async fn submit(
    core: &Core,
    by: &str,
    mut task: ImageTask,
) -> Result<ImageJob, ApiError> {
    let state = core.state();
    for image in task.images_mut() {
        // One unit of a SAN can be written in two ways; jobs are told apart by one.
        if let Some(pool) = state.pools.get(&image.pool) {
            image.image = listed_name(&pool.spec, &image.image);
        }
    }
    let file = matches!(task, ImageTask::Import { .. } | ImageTask::Export { .. });
    let mut pools = vec![&task.image().pool];
    if let ImageTask::Clone { from, .. } = &task {
        pools.push(&from.pool);
    }
    check_own(&state, &task)?;
    let host = match (own_host(core, &state, &task), file) {
        (Some(host), _) if host == core.me => None,
        (Some(host), true) => return Err(file_elsewhere(&core.me, task.image(), &host)),
        (Some(host), false) => state.hosts.get(&host).map(|record| record.node),
        (None, _) => place(core, task.image(), &pools, file).await?,
    };
    let ask = Ask::ImageJob {
        by: by.to_owned(),
        task: Box::new(task),
    };
    one(ask_host(core, host, ask).await?)?.ok_or_else(wrong_answer)
}

/// The image that a task reads or changes.
fn source(task: &ImageTask) -> Option<&ImageRef> {
    match task {
        ImageTask::Import { .. } => None,
        ImageTask::Clone { from, .. } => Some(from),
        _ => Some(task.image()),
    }
}

/// What cannot be done with disks that are on particular hosts.
fn check_own(state: &State, task: &ImageTask) -> Result<(), ApiError> {
    let conflict = |text: String| ApiError::new(ErrorCode::Conflict, text);
    let ImageRef { pool, image } = task.image();
    if state.is_witness_disk(pool, image) {
        let text = format!("{} has the cluster's disk witness on it", task.image());
        return Err(conflict(text).hint("`quorate quorum set` moves the witness elsewhere"));
    }
    let pool = |image: &ImageRef| state.pools.get(&image.pool).map(|pool| &pool.spec);
    if pool(task.image()).is_some_and(|pool| pool.is_mirrored()) {
        check_mirrored(state, task)?;
    }
    let made = matches!(task, ImageTask::Import { .. } | ImageTask::Clone { .. });
    let known = state.copies(&task.image().pool, &task.image().image);
    if let Some(copies) = known.filter(|_| made) {
        let hosts: Vec<&str> = copies.hosts.keys().map(HostName::as_str).collect();
        let text = format!("{} is on {} already", task.image(), hosts.join(" and "));
        return Err(conflict(text).hint("take another name"));
    }
    Ok(())
}

/// What cannot be done with disks that have copies on other hosts.
fn check_mirrored(state: &State, task: &ImageTask) -> Result<(), ApiError> {
    let image = task.image();
    let refused = |text: String, hint: &str| {
        let error = ApiError::new(ErrorCode::Conflict, text);
        Err(error.hint(hint))
    };
    match task {
        ImageTask::Import { .. } | ImageTask::Clone { .. } | ImageTask::Export { .. } => Ok(()),
        ImageTask::Resize { .. } => {
            match users(state, image).iter().any(|user| user.host.is_some()) {
                true => Ok(()),
                false => refused(
                    format!(
                        "{image} has copies, which become larger while a guest runs from it, and none does"
                    ),
                    "start its VM; or set `size` in the manifest: the disk has it from the next start on",
                ),
            }
        }
        ImageTask::SnapshotCreate { .. }
        | ImageTask::SnapshotDelete { .. }
        | ImageTask::SnapshotRevert { .. } => refused(
            format!("{image} is in a mirrored pool: its images are raw, and take no snapshots"),
            "stop its VM for `quorate image clone` or `quorate image export`: that is a copy of one moment",
        ),
        ImageTask::Delete { .. } => refused(
            format!(
                "pool {} is mirrored: a disk there is deleted with its copies, and nothing does that yet",
                image.pool
            ),
            "remove the files on both hosts when no VM names them any more",
        ),
    }
}

/// The host that has all of the disk that a task is about, if it is one of particular hosts.
fn own_host(core: &Core, state: &State, task: &ImageTask) -> Option<HostName> {
    let image = source(task)?;
    let running = users(state, image).into_iter().find_map(|user| user.host);
    if running.is_some() {
        return running;
    }
    let copies = state.copies(&image.pool, &image.image)?;
    let whole = |(_, copy): &(&HostName, &quorate_state::DiskCopy)| copy.in_step;
    let mut hosts = copies.hosts.iter().filter(whole).map(|(host, _)| host);
    let first = hosts.clone().next()?;
    let here = hosts.any(|host| *host == core.me);
    Some(if here { core.me.clone() } else { first.clone() })
}

fn file_elsewhere(me: &HostName, image: &ImageRef, host: &HostName) -> ApiError {
    let text = format!("{image} is on {host}, not on {me}");
    let hint = format!("run the command on {host}, where the file must be");
    ApiError::new(ErrorCode::Conflict, text).hint(hint)
}

fn one(answer: Answer) -> Result<Option<ImageJob>, ApiError> {
    match answer {
        Answer::ImageJobs(jobs) => Ok(jobs.into_iter().next()),
        _ => Err(wrong_answer()),
    }
}

/// Jobs of all hosts that answer.
pub(crate) async fn list(core: &Core) -> Vec<ImageJob> {
    let mut jobs = core.images.list();
    let state = core.state();
    let ask = Ask::ImageJobs { id: None };
    let others = state.hosts.iter().filter(|(name, _)| **name != core.me);
    let asks = others.map(|(_, record)| peer::ask(&core.peers, record.node, &ask, LIST_WITHIN));
    for answer in futures_util::future::join_all(asks).await {
        if let Ok(Answer::ImageJobs(more)) = answer {
            jobs.extend(more);
        }
    }
    jobs.sort_by(|a, b| (a.asked, &a.id).cmp(&(b.asked, &b.id)));
    jobs
}

/// The host in a job's name.
fn host_of(core: &Core, id: &str) -> Result<Option<NodeId>, ApiError> {
    let unknown = || {
        ApiError::new(ErrorCode::NotFound, format!("there is no job `{id}`"))
            .hint("`quorate image jobs` lists them")
    };
    let (host, _) = id.rsplit_once('-').ok_or_else(unknown)?;
    if host == core.me.as_str() {
        return Ok(None);
    }
    let state = core.state();
    let record = state.hosts.iter().find(|(name, _)| name.as_str() == host);
    record
        .map(|(_, record)| Some(record.node))
        .ok_or_else(unknown)
}

/// One job, wherever it is.
pub(crate) async fn get(core: &Core, id: &str, cancel: bool) -> Result<ImageJob, ApiError> {
    let host = host_of(core, id)?;
    let id = id.to_owned();
    let ask = match cancel {
        true => Ask::CancelImageJob { id: id.clone() },
        false => Ask::ImageJobs {
            id: Some(id.clone()),
        },
    };
    one(ask_host(core, host, ask).await?)?.ok_or_else(|| {
        ApiError::new(ErrorCode::NotFound, format!("there is no job `{id}`"))
            .hint("`quorate image jobs` lists them")
    })
}

/// The snapshots of an image.
pub(crate) async fn snapshots(
    core: &Core,
    image: &ImageRef,
) -> Result<Vec<ImageSnapshot>, ApiError> {
    let host = place(core, image, &[&image.pool], false).await?;
    let ask = Ask::Snapshots {
        image: image.clone(),
    };
    match ask_host(core, host, ask).await? {
        Answer::Snapshots(listed) => Ok(listed),
        _ => Err(wrong_answer()),
    }
}
