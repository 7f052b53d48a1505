//! Starting the agent, and the handle that the daemon holds.
//!
//! ```text
//! ledger -> guard (there already, or started) -> adopt every guest in run/ -> HostLogic -> tasks
//! ```
//! Always holds: when [`Agent::start`] returns, every guest that lives on this host is in the agent's hands, or it
//! has failed. Dropping the handle, or [`AgentHandle::shutdown`], disturbs no guest.

use crate::facts::{OpenPools, Surroundings};
use crate::guard::GuardOptions;
use crate::guard::client::{GuardClient, GuardConfig, GuardError};
use crate::guard::sys::boottime_ns;
use crate::guest_config::Layout;
use crate::host::{self, Host, Message};
use crate::ledger::{LedgerError, LedgerStore};
use crate::ports::{AgentConfig, Drivers, GuestGuard, PoolDefinition};
use crate::services::edges::{self, ShippedFlows};
use crate::services::{self, Services};
use crate::vm::{self, Command, Shared, text};
use quorate_agent_logic::{
    Adopted, ExportOffer, ExportRequest, FlushRequest, HostLogic, Observed, ObservedMigration,
    TargetSays, Token,
};
use quorate_hypervisor::{Adoption, GuestState, HypervisorError, MigrationStatus, Vm};
use quorate_membership::Instant;
use quorate_state::State;
use quorate_storage::Pool;
use quorate_types::report::LinkReport;
use quorate_types::{
    Epoch, HostName, HostReport, MigrationId, Millis, PoolName, Revision, Timestamp, VmName,
};
use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bound for finding out whether one guest lives.
const ADOPT_WITHIN: Duration = Duration::from_secs(5);
/// Bound for preparing a pool.
const DEFINE_WITHIN: Duration = Duration::from_secs(20);
/// Bound for the end of all tasks.
const STOP_WITHIN: Duration = Duration::from_secs(3);
const INBOX: usize = 1024;
const GUARD_EVENTS: usize = 256;

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A directory cannot be used.
    #[error("the agent cannot use {}: {source}", .path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// It is not known whether a guest lives.
    #[error(
        "it cannot be told whether guest {vm} lives here: {detail}. Nothing is decided without knowing; mend this and start the daemon again"
    )]
    Adopt {
        /// Which VM.
        vm: VmName,
        /// What was seen.
        detail: String,
    },
}

/// The agent of a host.
#[derive(Debug)]
pub struct Agent;

impl Agent {
    /// Starts the agent of this host.
    ///
    /// # Errors
    /// [`AgentError`]; no guest was touched.
    pub async fn start(
        config: AgentConfig,
        drivers: Drivers,
        state: watch::Receiver<Arc<State>>,
    ) -> Result<AgentHandle, AgentError> {
        let layout = Layout {
            dir: config.dir.clone(),
        };
        create_dirs(&layout)?;
        let (store, ledger) = LedgerStore::open(&layout.ledger())?;
        let (guard_events, guard_rx) = mpsc::channel(GUARD_EVENTS);
        let guard = match &drivers.guard {
            Some(guard) => guard.clone(),
            None => Arc::new(GuardClient::start(
                guard_config(&config, &layout),
                guard_events,
            )) as Arc<dyn GuestGuard>,
        };
        let (inbox, inbox_rx) = mpsc::channel(INBOX);
        let timings = state.borrow().settings().lease;
        let services = Services::new(drivers.datapath.clone(), &layout.speaker());
        let (exports, export_calls) = crate::exports::queue();
        let shared = Arc::new(Shared {
            config,
            layout,
            drivers,
            guard,
            state,
            pools: Mutex::new(OpenPools::default()),
            pids: Mutex::new(BTreeMap::new()),
            guests: Mutex::new(BTreeMap::new()),
            units: Mutex::new(BTreeMap::new()),
            inbox: inbox.clone(),
            exports,
            growing: Default::default(),
            services,
            deadline_ns: AtomicU64::new(0),
            fresh_from: AtomicU64::new(0),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let found = adopt_all(&shared).await?;
        let adopted: Vec<Adopted> = found.iter().map(|(adopted, _)| adopted.clone()).collect();
        let now = Instant(boottime_ns());
        let (logic, effects) = HostLogic::new(timings, ledger, &adopted, now);
        let (report, report_rx) = watch::channel(empty_report(&shared.config));
        let (failed, failed_rx) = watch::channel(None);
        let mut host = Host {
            shared: shared.clone(),
            logic,
            store: Arc::new(store),
            vms: BTreeMap::new(),
            report,
            failed,
            surroundings: Surroundings::default(),
            resident: BTreeMap::new(),
            links: BTreeMap::new(),
            mirrors: BTreeMap::new(),
            services: services::Reports::default(),
            booted: booted(),
            timings,
            asks: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            last_ask: 0,
        };
        for (adopted, guest) in found {
            let run = adopted.run;
            shared.set_pid(&adopted.vm, Some(guest.identity().pid));
            if adopted.observed != Observed::InMigrate {
                let running = adopted.observed == Observed::Running;
                shared.services.note_running(&adopted.vm, running);
            }
            host.order(adopted.vm, Command::Adopted { run, guest });
        }
        shared.spawn(crate::exports::run(shared.clone(), export_calls));
        shared.spawn(host.run(effects, inbox_rx, guard_rx));
        shared.spawn(host::look_around(shared.clone()));
        shared.spawn(services::run(shared.clone()));
        Ok(AgentHandle {
            inner: Arc::new(Inner {
                shared,
                inbox,
                report: report_rx,
                seen: AtomicU64::new(0),
                failed: failed_rx,
            }),
        })
    }
}

fn create_dirs(layout: &Layout) -> Result<(), AgentError> {
    let log = layout.guard_log();
    let dirs = [Some(layout.guests()), log.parent().map(Path::to_owned)];
    for path in dirs.into_iter().flatten() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| AgentError::Directory { path, source })?;
    }
    Ok(())
}

fn guard_config(config: &AgentConfig, layout: &Layout) -> GuardConfig {
    GuardConfig {
        command: config.guard_command.clone(),
        options: GuardOptions {
            socket: layout.guard_socket(),
            watchdog: config.watchdog.clone(),
            watchdog_timeout: config.watchdog_timeout,
        },
        log: layout.guard_log(),
    }
}

/// The wall clock's time at 0 of CLOCK_BOOTTIME.
fn booted() -> Timestamp {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    let wall_ms = wall.map_or(0, |wall| u64::try_from(wall.as_millis()).unwrap_or(0));
    Timestamp(wall_ms.saturating_sub(boottime_ns() / 1_000_000))
}

fn empty_report(config: &AgentConfig) -> HostReport {
    HostReport {
        host: config.host.clone(),
        boot: config.boot.clone(),
        // An agent that is started again goes on above its predecessor's: the leader keeps the higher one.
        sequence: boottime_ns() / 1_000,
        version: config.version.clone(),
        applied: Revision(0),
        guard_armed: false,
        watchdog_ms: None,
        capacity: Default::default(),
        hypervisor: config.facts.clone(),
        networks: Default::default(),
        pools: BTreeMap::new(),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::new(),
        uplinks: BTreeMap::new(),
        offences: BTreeMap::new(),
    }
}

async fn adopt_all(shared: &Shared) -> Result<Vec<(Adopted, Arc<dyn Vm>)>, AgentError> {
    let dir = shared.layout.guests();
    let entries = std::fs::read_dir(&dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.map_err(|source| AgentError::Directory { path: dir, source })?;
    let names = entries.into_iter().filter_map(|entry| {
        let name = entry.file_name();
        VmName::new(name.to_str()?).ok()
    });
    let adopt = |(index, vm): (usize, VmName)| async move {
        let run = Token(index as u64 + 1);
        let runtime = shared.layout.runtime(&vm);
        let found = shared
            .drivers
            .hypervisor
            .adopt(&runtime, ADOPT_WITHIN)
            .await;
        match found {
            Ok(Adoption::Gone { .. }) => Ok(None),
            Ok(Adoption::Alive {
                vm: guest,
                state,
                migration,
            }) => {
                tracing::info!(%vm, ?state, ?migration, "adopted");
                let migration = observed_migration(state.as_ref(), migration.as_ref());
                let observed = state.map_or(Observed::Unknown, |state| vm::observed(&state));
                let adopted = Adopted {
                    vm,
                    run,
                    observed,
                    migration,
                };
                Ok(Some((adopted, guest)))
            }
            Err(error) => Err(adopt_error(vm, &error)),
        }
    };
    let found = futures_util::future::join_all(names.enumerate().map(adopt)).await;
    found.into_iter().filter_map(Result::transpose).collect()
}

fn adopt_error(vm: VmName, error: &HypervisorError) -> AgentError {
    let detail = text(error);
    AgentError::Adopt { vm, detail }
}

/// What a process says of its last migration, where that can still matter.
fn observed_migration(
    state: Option<&GuestState>,
    migration: Option<&MigrationStatus>,
) -> ObservedMigration {
    match migration {
        Some(MigrationStatus::None | MigrationStatus::Failed | MigrationStatus::Cancelled) => {
            ObservedMigration::None
        }
        // It arrived by that migration and has run since.
        Some(MigrationStatus::Completed) if state == Some(&GuestState::Running) => {
            ObservedMigration::None
        }
        Some(MigrationStatus::Completed) => ObservedMigration::Completed,
        Some(MigrationStatus::Device | MigrationStatus::Other(_)) => {
            ObservedMigration::SwitchingOver
        }
        _ => ObservedMigration::UnderWay,
    }
}

struct Inner {
    shared: Arc<Shared>,
    inbox: mpsc::Sender<Message>,
    report: watch::Receiver<HostReport>,
    seen: AtomicU64,
    failed: watch::Receiver<Option<String>>,
}

/// The agent, as the daemon sees it; cheap to clone.
#[derive(Clone)]
pub struct AgentHandle {
    inner: Arc<Inner>,
}

impl AgentHandle {
    /// A heartbeat that was sent at `sent` (CLOCK_BOOTTIME) was acknowledged.
    pub fn lease_ack(&self, sent: Instant, granted: Millis, revision: Revision) {
        let message = Message::LeaseAck {
            sent,
            granted,
            revision,
        };
        // An agent that cannot keep up gets the next one.
        if self.inner.inbox.try_send(message).is_err() {
            tracing::warn!("the agent is too busy to take note of its lease");
        }
    }

    /// What this host says of itself now.
    #[must_use]
    pub fn report(&self) -> HostReport {
        self.inner.report.borrow().clone()
    }

    /// The report, to be watched.
    #[must_use]
    pub fn reports(&self) -> watch::Receiver<HostReport> {
        self.inner.report.clone()
    }

    /// Resolves when the report has changed since the last time this did. For one caller.
    pub async fn report_changed(&self) {
        let mut report = self.inner.report.clone();
        let seen = self.inner.seen.load(Ordering::Relaxed);
        let reached = report.wait_for(|report| report.sequence > seen).await;
        let next = reached.map(|report| report.sequence).ok();
        let Some(next) = next else {
            // The agent has stopped.
            return std::future::pending().await;
        };
        self.inner.seen.store(next, Ordering::Relaxed);
    }

    /// The direct links to other hosts, for the report.
    pub fn set_links(&self, links: BTreeMap<HostName, LinkReport>) {
        // The next one comes soon.
        let _ = self.inner.inbox.try_send(Message::Links(links));
    }

    /// For the source of a migration: where its guest shall go. Waits until the target is ready.
    ///
    /// # Errors
    /// A sentence; the source asks again.
    pub async fn incoming_address(
        &self,
        vm: VmName,
        id: MigrationId,
        ready: bool,
    ) -> Result<String, String> {
        let (reply, answer) = oneshot::channel();
        let message = Message::PeerIncoming {
            vm,
            id,
            ready,
            reply,
        };
        let gone = || "the target's agent has stopped".to_owned();
        self.inner.inbox.send(message).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// For the source of a migration: what is certain here about its guest.
    pub async fn outcome(&self, vm: VmName, id: MigrationId) -> TargetSays {
        let (reply, answer) = oneshot::channel();
        let message = Message::PeerOutcome { vm, id, reply };
        if self.inner.inbox.send(message).await.is_err() {
            return TargetSays::Unknown;
        }
        answer.await.unwrap_or(TargetSays::Unknown)
    }

    /// For the source of a migration, whose guest stands still: takes over what only one host may have.
    ///
    /// # Errors
    /// A sentence; the source goes on with its guest.
    pub async fn hand_over(&self, vm: VmName, id: MigrationId) -> Result<(), String> {
        vm::handoff::take_over(&self.inner.shared, &vm, id).await
    }

    /// For the leader: cuts a host off from units of a pool, by image with the epoch up to which it may have written.
    pub async fn cut_units(
        &self,
        pool: &PoolName,
        host: &HostName,
        epochs: BTreeMap<String, Epoch>,
    ) -> crate::UnitsCut {
        crate::cut::cut(&self.inner.shared, pool, host, epochs).await
    }

    /// For the owner of a disk: where to write its copy on this host to.
    ///
    /// # Errors
    /// A sentence; the owner asks again.
    pub async fn export(&self, request: ExportRequest) -> Result<ExportOffer, String> {
        crate::exports::open(&self.inner.shared.exports, request).await
    }

    /// For the owner of a disk: everything that its copy on this host was sent is on stable storage, and marked.
    ///
    /// # Errors
    /// A sentence.
    pub async fn flush_copy(&self, request: FlushRequest) -> Result<(), String> {
        crate::exports::flush(&self.inner.shared.exports, request).await
    }

    /// For the source of a migration: flows of its guest's edges.
    ///
    /// # Errors
    /// A sentence; the edges here learn by themselves what they need.
    pub async fn put_flows(&self, flows: &ShippedFlows) -> Result<(), String> {
        edges::put(&self.inner.shared, flows).await
    }

    /// For other directors: pins before a ring change.
    ///
    /// # Errors
    /// A sentence; the other host tries again.
    pub async fn pin(&self, pins: &[quorate_balancer::Pin]) -> Result<(), String> {
        let datapath = &self.inner.shared.services.datapath;
        datapath.pin(pins).await.map_err(|error| text(&error))
    }

    /// This host's service datapath.
    #[must_use]
    pub fn datapath(&self) -> Arc<dyn quorate_balancer::Datapath> {
        self.inner.shared.services.datapath.clone()
    }

    /// Marks a pool as this cluster's, once, when an operator defines it: a path without the mark, such as an
    /// empty mount point, is never used. Returns the mark.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub async fn define_pool(
        &self,
        name: &PoolName,
        pool: &PoolDefinition,
    ) -> Result<String, String> {
        let pool = self.inner.shared.drivers.pools.open(name, pool);
        match timeout(DEFINE_WITHIN, pool.define()).await {
            Ok(Ok(marker)) => Ok(marker.id),
            Ok(Err(error)) => Err(text(&error)),
            Err(_) => Err(format!(
                "the storage of pool {name} does not answer: look at its mount"
            )),
        }
    }

    /// The driver of a pool, as this host opens it.
    ///
    /// # Errors
    /// A sentence, when there is no such pool.
    pub fn pool(&self, name: &PoolName) -> Result<Arc<dyn Pool>, String> {
        self.inner.shared.pool(name)
    }

    /// A guest of this host, for work on its disks and nothing else.
    #[must_use]
    pub fn guest(&self, vm: &VmName) -> Option<Arc<dyn Vm>> {
        let guests = self.inner.shared.guests.lock();
        guests
            .unwrap_or_else(PoisonError::into_inner)
            .get(vm)
            .cloned()
    }

    /// Gives a disk of a guest of this host more room; one that has a copy is without it for the moment.
    ///
    /// # Errors
    /// A sentence.
    pub async fn grow_mirrored(&self, vm: &VmName, disk: usize, bytes: u64) -> Result<(), String> {
        self.inner.shared.growing.ask(vm, disk, bytes).await
    }

    /// What the VM wrote to its serial port.
    #[must_use]
    pub fn serial_log(&self, vm: &VmName) -> PathBuf {
        self.inner.shared.layout.serial_log(vm)
    }

    /// The socket of its serial port: one client at a time, which must keep reading.
    #[must_use]
    pub fn console(&self, vm: &VmName) -> PathBuf {
        self.inner.shared.layout.paths(vm).console()
    }

    /// Why the agent has stopped by itself, once it has: its ledger failed. The daemon must end then.
    #[must_use]
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.inner.failed.clone()
    }

    /// Stops the agent. Guests and their guard go on.
    pub async fn shutdown(&self) {
        let shared = &self.inner.shared;
        shared.stop.cancel();
        shared.guard.detach();
        shared.tasks.close();
        // Bounded: a task that waits for the kernel is left behind.
        if timeout(STOP_WITHIN, shared.tasks.wait()).await.is_err() {
            tracing::warn!("tasks of the agent are left behind");
        }
    }

    /// For a daemon that ends on a host without guests, such as one that is being switched off: ends the guard,
    /// which disarms the watchdog. Nothing can be started afterwards.
    ///
    /// # Errors
    /// While there are guests, whether the guard knows of them or not.
    pub async fn retire_guard(&self) -> Result<(), GuardError> {
        let shared = &self.inner.shared;
        let guests: Vec<String> = shared.living().iter().map(ToString::to_string).collect();
        if !guests.is_empty() {
            let text = format!("there are guests still: {}", guests.join(", "));
            return Err(GuardError::Refused(text));
        }
        shared.guard.exit().await
    }
}
