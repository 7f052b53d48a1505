//! Making a guest: disks, bridges, taps, the guard's leave, QEMU, the guard.
//!
//! Always holds: what may take long (storage) comes before the guard's leave, which is good only while the
//! lease is; when making fails, no process is left and the guard knows.

use super::watch::{Arrival, Watching};
use super::{Live, Shared, saved_epoch, text};
use crate::guard::client::GuardError;
use crate::guest_config::{Nic, guest_config, nics};
use quorate_agent_logic::Token;
use quorate_hypervisor::{
    DiskSource, GuestConfig, IscsiDisk, ListenRequest, Password, RbdDisk, SavedState, StartMode,
    TlsMaterial, Vm,
};
use quorate_network::Announcement;
use quorate_state::GuestAbi;
use quorate_types::spec::{DiskFormat, DiskSpec};
use quorate_types::{Epoch, VmName, VmSpec, report};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// Bound of a start.
const START_WITHIN: Duration = Duration::from_secs(30);
/// Bound of a start that loads a saved memory.
const RESTORE_WITHIN: Duration = Duration::from_secs(300);

/// A guest that is being made.
pub(super) struct Making {
    pub(super) run: Token,
    /// Ends whatever is made.
    pub(super) reaper: Option<AbortHandle>,
}

impl Making {
    /// Whether it was to be ended.
    pub(super) fn stop_reaping(self) -> bool {
        self.reaper.map(|reaper| reaper.abort()).is_some()
    }
}

/// What is to be made.
pub(super) struct Plan {
    pub(super) run: Token,
    pub(super) epoch: Epoch,
    pub(super) spec: Box<VmSpec>,
    pub(super) abi: GuestAbi,
    pub(super) restore: Option<report::SavedState>,
    pub(super) incoming: bool,
    /// The guard's leave is asked for until then.
    pub(super) until_ns: u64,
}

/// Disks that were looked at a moment ago: when that took so long that the lease ended meanwhile, the next
/// attempt is quick.
pub(super) type Prepared = Arc<Mutex<Option<(Vec<DiskSpec>, Vec<DiskSource>, Instant)>>>;

/// How long such a look is good for.
const PREPARED_FOR: Duration = Duration::from_secs(10);

/// Why nothing was made.
pub(crate) struct Failure {
    pub(super) detail: String,
    /// Nothing was tried: the guard did not allow it.
    pub(super) refused: bool,
}

impl From<String> for Failure {
    fn from(detail: String) -> Self {
        let refused = false;
        Self { detail, refused }
    }
}

pub(super) async fn make(
    shared: &Shared,
    vm: &VmName,
    plan: Plan,
    prepared: &Prepared,
) -> Result<(Live, Watching), Failure> {
    match plan.incoming {
        true => super::handoff::await_disks(shared, vm).await?,
        false => own_disks(shared, vm, &plan).await?,
    }
    // The memory that was saved, or arrives, knows the disks as they are.
    let grows = !plan.incoming && plan.restore.is_none();
    let disks = disks(shared, &plan.spec, plan.epoch, grows, prepared).await?;
    let state = shared.state();
    let cluster = &shared.config.cluster_id;
    let nics = nics(&state, cluster, vm, &plan.spec, plan.incoming)?;
    let mode = start_mode(shared, vm, &plan).await?;
    prepare_network(shared, &nics).await?;
    super::reserve::before_start(shared, vm, &plan.spec.disks, plan.epoch, plan.incoming).await?;
    crate::services::edges::attach(shared, vm, !plan.incoming).await;
    let layout = &shared.layout;
    note_serial_log(shared, vm).await?;
    let config = guest_config(
        layout,
        cluster,
        vm,
        &plan.spec,
        &plan.abi,
        shared.config.accel,
        shared.config.sandbox,
        &disks,
        &nics,
    );
    let needle = layout.paths(vm).pidfile();
    let run = plan.run;
    let leave = shared
        .guard
        .starting(vm, run.0, &needle.to_string_lossy(), plan.until_ns)
        .await;
    leave.map_err(|error: GuardError| Failure {
        detail: error.to_string(),
        refused: true,
    })?;
    let made = start(shared, vm, &plan, &config, mode, &nics).await;
    // Whatever comes next looks anew.
    prepared
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if made.is_err()
        && let Err(error) = shared.guard.unregister(vm, run.0).await
    {
        tracing::debug!(%vm, %error, "the guard waits for a guest that was not made");
    }
    Ok(made?)
}

async fn start(
    shared: &Shared,
    vm: &VmName,
    plan: &Plan,
    config: &GuestConfig,
    mode: StartMode,
    nics: &[Nic],
) -> Result<(Live, Watching), String> {
    let within = match &mode {
        StartMode::Restore(_) => RESTORE_WITHIN,
        _ => START_WITHIN,
    };
    let guest = shared
        .drivers
        .hypervisor
        .start(config, mode, within)
        .await
        .map_err(|error| text(&error))?;
    let (run, process) = (plan.run, guest.identity());
    let registered = shared
        .guard
        .register(vm, run.0, process, config.paths().guard(), !plan.incoming)
        .await;
    if let Err(error) = registered {
        // It is in the registry: the next guard gets it, and until then the host counts as unarmed.
        tracing::warn!(%vm, %error, "a guest is not under guard yet");
    }
    let announcements = nics.iter().map(|nic| nic.announcement.clone()).collect();
    let watching = if plan.incoming {
        match listen(shared, vm, run, &guest, nics).await {
            Ok(watching) => watching,
            Err(error) => {
                end(vm, &*guest).await;
                return Err(error);
            }
        }
    } else {
        Watching::new(&*guest)
    };
    if plan.restore.is_some() {
        forget_saved(shared, vm, plan);
    }
    let live = Live {
        run,
        guest,
        announcements,
    };
    Ok((live, watching))
}

/// Opens the port for the guest and says where it is.
async fn listen(
    shared: &Shared,
    vm: &VmName,
    run: Token,
    guest: &Arc<dyn Vm>,
    nics: &[Nic],
) -> Result<Watching, String> {
    let mut watching = Watching::new(&**guest);
    let tls = shared.config.migration_tls.clone();
    let request = ListenRequest {
        address: shared.config.migration_address,
        port: 0,
        multifd_channels: None,
        tls: tls.map(|dir| TlsMaterial {
            dir,
            hostname: None,
        }),
    };
    let incoming = guest.listen(request).await.map_err(|error| text(&error))?;
    let address = incoming.address.to_string();
    watching.arrival = Some(Arrival {
        incoming: Some(incoming),
        taps: nics.iter().map(|nic| nic.tap.ifname.clone()).collect(),
    });
    shared
        .tell(
            vm,
            run,
            quorate_agent_logic::GuestEvent::Listening { address },
        )
        .await;
    Ok(watching)
}

async fn end(vm: &VmName, guest: &dyn Vm) {
    if let Err(error) = guest.kill(super::KILL_WITHIN).await {
        tracing::error!(%vm, error = text(&error), "a guest that cannot be used still runs");
    }
}

/// Disks that are this host's own: nobody writes to them from outside, and no copy is counted on that is
/// not written to.
async fn own_disks(shared: &Shared, vm: &VmName, plan: &Plan) -> Result<(), Failure> {
    let state = shared.state();
    let me = &shared.config.host;
    let mut stale = None;
    for (index, disk) in plan.spec.disks.iter().enumerate() {
        let own = state.pools.get(&disk.pool);
        if !own.is_some_and(|pool| pool.spec.is_hosts_own()) {
            continue;
        }
        crate::exports::close(&shared.exports, &disk.pool, &disk.image).await?;
        let Some(record) = state.copies(&disk.pool, &disk.image) else {
            continue;
        };
        let bound = record.hosts.get(me).is_some_and(|copy| copy.boot.is_some());
        if bound {
            record.check(&disk.image, me, Some(&shared.config.boot))?;
            super::handoff::flush(shared, disk).await?;
        }
        // The guest ended and is started again: until that is agreed its copy counts.
        for host in record.followers(me) {
            let report = report::MirrorReport {
                pool: disk.pool.clone(),
                image: disk.image.clone(),
                to: host.clone(),
                since: record.hosts[host].since,
                phase: report::MirrorPhase::Failed,
                done: Default::default(),
                total: Default::default(),
                problem: Some("the guest is started again".into()),
            };
            super::mirror::tell(shared, vm, index, Some(report)).await;
            stale = Some(format!(
                "waits until it is agreed that the copy of {} on {host} is out of step",
                disk.image
            ));
        }
    }
    match stale {
        Some(detail) => Err(Failure {
            detail,
            refused: true,
        }),
        None => Ok(()),
    }
}

async fn disks(
    shared: &Shared,
    spec: &VmSpec,
    epoch: Epoch,
    grows: bool,
    prepared: &Prepared,
) -> Result<Vec<DiskSource>, String> {
    let lock = || prepared.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((disks, sources, at)) = lock().take()
        && disks == spec.disks
        && at.elapsed() < PREPARED_FOR
    {
        return Ok(sources);
    }
    let mut sources = Vec::new();
    let state = shared.state();
    for disk in &spec.disks {
        let pool = shared.pool(&disk.pool)?;
        let mut wanted = disk_spec(disk);
        if let Some(record) = state.copies(&disk.pool, &disk.image) {
            // An image that is missing later is one that was lost, not one that is to be made.
            wanted.create &= record.created == epoch;
        }
        let mut info = pool.ensure_disk(&wanted).await;
        if let (true, Err(quorate_storage::PoolError::ImageTooSmall { want_bytes, .. })) =
            (grows, &info)
        {
            let (image, bytes) = (&wanted.image, *want_bytes);
            tracing::info!(pool = %disk.pool, image, bytes, "a disk is made as large as it is defined");
            info = pool.resize_disk(image, wanted.format, bytes).await;
        }
        sources.push(disk_source(info.map_err(|error| text(&error))?.source));
    }
    *lock() = Some((spec.disks.clone(), sources.clone(), Instant::now()));
    Ok(sources)
}

/// What the pool found, as the hypervisor is told.
fn disk_source(found: quorate_storage::DiskSource) -> DiskSource {
    match found {
        quorate_storage::DiskSource::Rbd(image) => DiskSource::Rbd(RbdDisk {
            pool: image.pool,
            image: image.image,
            conf: image.conf,
            user: image.user,
            key: image.login.map(|login| Password(login.password)),
        }),
        quorate_storage::DiskSource::File(path) => DiskSource::File(path),
        quorate_storage::DiskSource::Device(path) => DiskSource::HostDevice(path),
        quorate_storage::DiskSource::Iscsi(unit) => {
            let (user, password) = match unit.login {
                Some(login) => (Some(login.user), Some(Password(login.password))),
                None => (None, None),
            };
            DiskSource::Iscsi(IscsiDisk {
                portal: unit.portal,
                target: unit.target,
                lun: unit.lun,
                initiator: unit.initiator,
                user,
                password,
            })
        }
    }
}

fn disk_spec(disk: &DiskSpec) -> quorate_storage::DiskSpec {
    quorate_storage::DiskSpec {
        image: disk.image.clone(),
        format: match disk.format {
            DiskFormat::Raw => quorate_storage::DiskFormat::Raw,
            DiskFormat::Qcow2 => quorate_storage::DiskFormat::Qcow2,
        },
        size_bytes: disk.size.map(|size| size.0),
        create: disk.size.is_some(),
    }
}

async fn prepare_network(shared: &Shared, nics: &[Nic]) -> Result<(), String> {
    let network = &shared.drivers.network;
    for nic in nics {
        let named = |error: quorate_network::NetworkError| {
            format!("network {}: {}", nic.network, text(&error))
        };
        network.ensure_bridge(&nic.bridge).await.map_err(named)?;
        network.create_tap(&nic.tap).await.map_err(named)?;
    }
    Ok(())
}

/// Makes the directories, and notes where the new process's part of the serial log begins.
async fn note_serial_log(shared: &Shared, vm: &VmName) -> Result<(), String> {
    let log = shared.layout.serial_log(vm);
    let begins = shared.layout.serial_begins(vm);
    let length = tokio::fs::metadata(&log).await.map_or(0, |meta| meta.len());
    for dir in [log.parent(), begins.parent()].into_iter().flatten() {
        tokio::fs::create_dir_all(dir)
            .await
            .map_err(|error| format!("cannot create {}: {error}", dir.display()))?;
    }
    tokio::fs::write(&begins, length.to_string())
        .await
        .map_err(|error| format!("cannot write {}: {error}", begins.display()))
}

/// Where the layout of a saved state is described.
fn description(saved: &Path) -> PathBuf {
    let mut name = saved.as_os_str().to_owned();
    name.push(".layout");
    PathBuf::from(name)
}

/// Says beside a saved state how it is laid out: its reader must be told.
pub(super) async fn describe_saved(saved: &Path, mapped_ram: bool) -> Result<(), String> {
    let path = description(saved);
    let text = if mapped_ram { "mapped-ram" } else { "stream" };
    let write = async {
        let mut file = tokio::fs::File::create(&path).await?;
        tokio::io::AsyncWriteExt::write_all(&mut file, text.as_bytes()).await?;
        file.sync_all().await
    };
    write
        .await
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

async fn start_mode(shared: &Shared, vm: &VmName, plan: &Plan) -> Result<StartMode, String> {
    if plan.incoming {
        return Ok(StartMode::Incoming);
    }
    let Some(saved) = &plan.restore else {
        return Ok(StartMode::Boot);
    };
    let epoch = saved_epoch(&saved.file)?;
    let pool = shared.pool(&saved.pool)?;
    let found = pool.find_saved_state(vm.as_str(), epoch).await;
    let path = found
        .map_err(|error| text(&error))?
        .ok_or_else(|| format!("the saved memory {} is gone from its pool", saved.file))?;
    let layout = tokio::fs::read_to_string(description(&path)).await;
    let layout = layout
        .map_err(|error| format!("{}: cannot be read: {error}", description(&path).display()))?;
    Ok(StartMode::Restore(SavedState {
        path,
        mapped_ram: layout.trim() == "mapped-ram",
    }))
}

/// A memory that was used is of no use, and large.
fn forget_saved(shared: &Shared, vm: &VmName, plan: &Plan) {
    let Some(saved) = plan.restore.clone() else {
        return;
    };
    let (Ok(epoch), Ok(pool)) = (saved_epoch(&saved.file), shared.pool(&saved.pool)) else {
        return;
    };
    let vm = vm.clone();
    shared.spawn(async move {
        if let Ok(Some(path)) = pool.find_saved_state(vm.as_str(), epoch).await {
            // It may not be there.
            let _ = tokio::fs::remove_file(description(&path)).await;
        }
        if let Err(error) = pool.delete_saved_states(vm.as_str(), epoch).await {
            tracing::warn!(%vm, error = text(&error), "a used saved memory stays");
        }
    });
}

/// How a VM is announced; nothing when its networks are not known.
pub(super) fn announcements(shared: &Shared, vm: &VmName, spec: &VmSpec) -> Vec<Announcement> {
    let state = shared.state();
    let nics = nics(&state, &shared.config.cluster_id, vm, spec, false);
    let nics = nics.unwrap_or_default();
    nics.into_iter().map(|nic| nic.announcement).collect()
}
