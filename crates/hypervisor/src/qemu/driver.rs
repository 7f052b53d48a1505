//! The QEMU implementation of [`Hypervisor`]: start with one deadline, adoption.
//!
//! ```text
//! start: validate -> record, spawn -> socket answers -> state known -> (restore: load, cont) -> Guest
//!            any failure, exit or the deadline: kill, reap, quote QEMU's messages
//! adopt: record -> same process? -> pidfd -> QMP -> state, migration
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout_at};

use super::guest::Guest;
use super::process::record::Record;
use super::process::{
    Spawned, Watched, identity, remove_secrets, spawn, stderr_tail, supports_direct_io,
};
use super::qmp::{QmpClient, QmpError};
use super::relay;
use crate::config::{GuestConfig, StartMode};
use crate::error::HypervisorError;
use crate::guest::{ExitInfo, Frozen, GuestEvent, GuestState, ProcessIdentity, SavedState};
use crate::migration::{IncomingMigration, ListenRequest, MigrationRequest, OutgoingMigration};
use crate::mirror::{MirrorStatus, MirrorTarget, WriteMap};
use crate::vm::{Adoption, Hypervisor, Quiesced, Vm};

/// Pause between two looks at a socket that a starting QEMU has not made yet.
const SOCKET_LOOK_AGAIN: Duration = Duration::from_millis(5);
/// After SIGKILL a process that is not stuck in the kernel ends within milliseconds.
const REAP_WITHIN: Duration = Duration::from_secs(5);

/// Starts and adopts QEMU guests.
#[derive(Debug, Clone)]
pub struct QemuDriver {
    binary: PathBuf,
}

impl QemuDriver {
    /// A driver that runs this QEMU program.
    #[must_use]
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
        }
    }

    /// Starts a guest. See [`Hypervisor::start`].
    ///
    /// # Errors
    /// As there; no process is left behind.
    pub async fn start_guest(
        &self,
        config: &GuestConfig,
        mode: StartMode,
        within: Duration,
    ) -> Result<Guest, HypervisorError> {
        config.validate()?;
        let deadline = Instant::now() + within;
        if find(&config.runtime_dir)?.is_none() {
            relay::close_all(&config.runtime_dir).await;
        }
        let (binary, mut config) = (self.binary.clone(), config.clone());
        let (spawned, config, mode) = tokio::task::spawn_blocking(move || {
            resolve_direct_io(&mut config);
            spawn(&binary, &config, &mode).map(|spawned| (spawned, config, mode))
        })
        .await
        .map_err(|error| HypervisorError::StartFailed {
            vm: "?".into(),
            reason: format!("the task that spawned it has ended: {error}"),
            stderr: String::new(),
        })??;
        let Spawned { process, log_start } = spawned;
        let mut stage = "its control socket";
        let ready = timeout_at(
            deadline,
            get_ready(&process, &config, &mode, deadline, &mut stage),
        );
        let ready = ready.await;
        remove_secrets(&config);
        let failure = match ready {
            Ok(Ok(client)) => {
                let guest = Guest::new(config, process, Some(client));
                return finish_start(guest, mode, deadline, log_start, within).await;
            }
            Ok(Err(reason)) => Some(reason),
            Err(_) => None,
        };
        end(&process, &config.name).await;
        Err(start_error(&config, log_start, failure, stage, within))
    }

    /// Finds a guest that was started earlier. See [`Hypervisor::adopt`].
    ///
    /// # Errors
    /// As there.
    pub async fn adopt_guest(
        &self,
        runtime_dir: &Path,
        within: Duration,
    ) -> Result<Option<Guest>, HypervisorError> {
        let Some((record, process)) = find(runtime_dir)? else {
            relay::close_all(runtime_dir).await;
            return Ok(None);
        };
        let qmp = record.config.paths().qmp();
        let client = match QmpClient::connect(&qmp, within).await {
            Ok(client) => Some(client),
            Err(error) => {
                // Adopted all the same: it must be possible to kill it.
                tracing::warn!(vm = record.config.name, %error, "an adopted QEMU does not answer");
                None
            }
        };
        Ok(Some(Guest::new(record.config, process, client)))
    }
}

/// Asks each disk's file system whether it can bypass the page cache, where the configuration leaves it open.
fn resolve_direct_io(config: &mut GuestConfig) {
    for disk in &mut config.disks {
        let path = disk.source.path();
        disk.direct = disk
            .direct
            .or_else(|| Some(path.is_none_or(supports_direct_io)));
    }
}

/// Waits until QEMU answers; an error is what was seen when it ended or refused.
async fn get_ready(
    process: &Watched,
    config: &GuestConfig,
    mode: &StartMode,
    deadline: Instant,
    stage: &mut &'static str,
) -> Result<QmpClient, String> {
    let connect = async {
        let qmp = config.paths().qmp();
        let client = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match QmpClient::connect(&qmp, left).await {
                Ok(client) => break client,
                Err(QmpError::Connect { .. }) => tokio::time::sleep(SOCKET_LOOK_AGAIN).await,
                Err(error) => return Err(error.to_string()),
            }
        };
        *stage = "its first state";
        let left = deadline.saturating_duration_since(Instant::now());
        let reply = client.execute("query-status", Value::Null, left).await;
        let reply = reply.map_err(|error| error.to_string())?;
        let state = GuestState::parse(reply["status"].as_str().unwrap_or("missing"));
        let expected = match mode {
            StartMode::Boot => state == GuestState::Running,
            StartMode::Incoming | StartMode::Restore(_) => state == GuestState::InMigrate,
        };
        if expected {
            Ok(client)
        } else {
            Err(format!("its first state is {state}"))
        }
    };
    tokio::select! {
        biased;
        (code, signal) = process.ended() => {
            Err(ExitInfo { code, signal, shutdown: None }.to_string())
        }
        ready = connect => ready,
    }
}

/// What remains once QEMU answers: loading a saved guest.
async fn finish_start(
    guest: Guest,
    mode: StartMode,
    deadline: Instant,
    log_start: u64,
    within: Duration,
) -> Result<Guest, HypervisorError> {
    let StartMode::Restore(saved) = mode else {
        return Ok(guest);
    };
    let failure = match timeout_at(deadline, guest.load(&saved, deadline)).await {
        Ok(Ok(())) => return Ok(guest),
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => None,
    };
    let config = guest.config().clone();
    if let Err(error) = guest.kill(REAP_WITHIN).await {
        tracing::error!(vm = config.name, %error, "a QEMU that failed to start may still run");
    }
    Err(start_error(
        &config,
        log_start,
        failure,
        "the saved memory",
        within,
    ))
}

async fn end(process: &Watched, vm: &str) {
    if let Err(error) = process.kill() {
        tracing::error!(vm, %error, "cannot kill a QEMU that failed to start");
    }
    if tokio::time::timeout(REAP_WITHIN, process.ended())
        .await
        .is_err()
    {
        tracing::error!(
            vm,
            pid = process.identity().pid,
            "a killed QEMU has not ended"
        );
    }
}

fn start_error(
    config: &GuestConfig,
    log_start: u64,
    failure: Option<String>,
    stage: &'static str,
    within: Duration,
) -> HypervisorError {
    let vm = config.name.clone();
    let stderr = stderr_tail(&config.paths().log(), log_start);
    match failure {
        Some(reason) => HypervisorError::StartFailed { vm, reason, stderr },
        None => {
            let after_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
            HypervisorError::StartTimeout {
                vm,
                after_ms,
                stage,
                stderr,
            }
        }
    }
}

/// The live process of the guest in `runtime_dir`, and its record.
fn find(runtime_dir: &Path) -> Result<Option<(Record, Watched)>, HypervisorError> {
    let unknown = |source| HypervisorError::Io {
        vm: runtime_dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        action: "tell whether a guest lives in",
        path: runtime_dir.to_path_buf(),
        source,
    };
    let Some(mut record) = Record::read(runtime_dir).map_err(unknown)? else {
        return Ok(None);
    };
    let unfinished = record.identity.is_none();
    if unfinished {
        // The daemon died between the spawn and the record of it.
        let pidfile = record.config.paths().pidfile();
        record.identity =
            identity::find_by_argument(&pidfile.to_string_lossy()).map_err(unknown)?;
    }
    let Some(identity) = &record.identity else {
        return Ok(None);
    };
    let Some(process) = Watched::open(identity).map_err(unknown)? else {
        return Ok(None);
    };
    if unfinished {
        record.write().map_err(unknown)?;
    }
    Ok(Some((record, process)))
}

#[async_trait]
impl Hypervisor for QemuDriver {
    async fn start(
        &self,
        config: &GuestConfig,
        mode: StartMode,
        within: Duration,
    ) -> Result<Arc<dyn Vm>, HypervisorError> {
        let guest = self.start_guest(config, mode, within).await?;
        Ok(Arc::new(guest))
    }

    async fn adopt(
        &self,
        runtime_dir: &Path,
        within: Duration,
    ) -> Result<Adoption, HypervisorError> {
        let Some(guest) = self.adopt_guest(runtime_dir, within).await? else {
            let record = Record::read(runtime_dir).ok().flatten();
            return Ok(Adoption::Gone {
                config: record.map(|record| Box::new(record.config)),
            });
        };
        let catch_up = async {
            let state = guest.status().await.ok();
            let migration = guest.migration_status().await.ok();
            (state, migration)
        };
        let (state, migration) = tokio::time::timeout(within, catch_up)
            .await
            .unwrap_or_default();
        Ok(Adoption::Alive {
            vm: Arc::new(guest),
            state,
            migration,
        })
    }
}

#[async_trait]
impl Vm for Guest {
    fn config(&self) -> &GuestConfig {
        self.config()
    }
    fn identity(&self) -> &ProcessIdentity {
        self.identity()
    }
    fn events(&self) -> broadcast::Receiver<GuestEvent> {
        self.events()
    }
    async fn exited(&self) -> ExitInfo {
        self.exited().await
    }
    async fn status(&self) -> Result<GuestState, HypervisorError> {
        self.status().await
    }
    async fn powerdown(&self) -> Result<(), HypervisorError> {
        self.powerdown().await
    }
    async fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), HypervisorError> {
        self.resize_disk(index, bytes).await
    }
    async fn snapshot_disk(&self, index: usize, name: &str) -> Result<Quiesced, HypervisorError> {
        self.snapshot_disk(index, name).await
    }
    async fn delete_disk_snapshot(&self, index: usize, name: &str) -> Result<(), HypervisorError> {
        self.delete_disk_snapshot(index, name).await
    }
    async fn unquiesce(&self) -> Result<(), String> {
        self.unquiesce().await
    }
    async fn quit(&self) -> Result<(), HypervisorError> {
        self.quit().await
    }
    async fn kill(&self, within: Duration) -> Result<ExitInfo, HypervisorError> {
        self.kill(within).await
    }
    async fn freeze(&self, within: Duration) -> Result<Frozen, HypervisorError> {
        self.freeze(within).await
    }
    async fn thaw(&self, within: Duration) -> Result<(), HypervisorError> {
        self.thaw(within).await
    }
    async fn announce(&self) -> Result<(), HypervisorError> {
        self.announce().await
    }
    async fn save(&self, path: &Path, within: Duration) -> Result<SavedState, HypervisorError> {
        self.save(path, within).await
    }
    async fn ping_agent(&self, within: Duration) -> Result<(), HypervisorError> {
        self.ping_agent(within).await
    }
    async fn migrate(
        &self,
        request: MigrationRequest,
    ) -> Result<OutgoingMigration, HypervisorError> {
        self.migrate(request).await
    }
    async fn attach_migration(&self) -> Result<Option<OutgoingMigration>, HypervisorError> {
        self.attach_migration().await
    }
    async fn listen(&self, request: ListenRequest) -> Result<IncomingMigration, HypervisorError> {
        self.listen(request).await
    }
    async fn start_mirror(
        &self,
        disk: usize,
        tag: &str,
        target: &MirrorTarget,
        speed: Option<u64>,
        lacks: Option<&WriteMap>,
    ) -> Result<(), HypervisorError> {
        self.start_mirror(disk, tag, target, speed, lacks).await
    }
    async fn finish_resync(&self, disk: usize) -> Result<(), HypervisorError> {
        self.finish_resync(disk).await
    }
    async fn write_maps(&self, disk: usize) -> Result<Vec<WriteMap>, HypervisorError> {
        self.write_maps(disk).await
    }
    async fn begin_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError> {
        self.begin_write_map(disk, tag, number).await
    }
    async fn forget_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError> {
        self.forget_write_map(disk, tag, number).await
    }
    async fn mirrors(&self) -> Result<Vec<MirrorStatus>, HypervisorError> {
        self.mirrors().await
    }
    async fn drop_mirror(&self, disk: usize) -> Result<(), HypervisorError> {
        self.drop_mirror(disk).await
    }
}
