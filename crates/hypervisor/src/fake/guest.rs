//! One fake guest: a state, locks, events, an exit.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{broadcast, oneshot, watch};

use super::{FakeSite, Fault, migration};
use crate::config::GuestConfig;
use crate::error::HypervisorError;
use crate::guest::{ExitInfo, Frozen, GuestEvent, GuestState, ProcessIdentity, SavedState};
use crate::migration::{
    IncomingMigration, IncomingOutcome, ListenRequest, MigrationRequest, MigrationStatus,
    OutgoingMigration,
};
use crate::mirror::{MirrorStatus, MirrorTarget, Resync, WriteMap};
use crate::vm::Vm;

const EVENTS_MAX: usize = 512;

/// A fake guest; cheap to clone. The inherent methods are the test's hand in it.
#[derive(Debug, Clone)]
pub struct FakeGuest {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    site: FakeSite,
    config: GuestConfig,
    identity: ProcessIdentity,
    events: broadcast::Sender<GuestEvent>,
    exit: watch::Sender<Option<ExitInfo>>,
    status: Mutex<Status>,
    /// Orders the task of an outgoing migration to cancel it.
    cancel: watch::Sender<bool>,
    /// How many tasks have driven outgoing migrations; only the latest one may.
    driver: watch::Sender<u64>,
}

#[derive(Debug)]
struct Status {
    state: GuestState,
    migration: MigrationStatus,
    arrival: Option<oneshot::Sender<IncomingOutcome>>,
    peer: Option<FakeGuest>,
    agent: bool,
    mirrors: Vec<MirrorStatus>,
    write_maps: Vec<(usize, WriteMap)>,
}

impl FakeGuest {
    pub(super) fn new(site: FakeSite, config: GuestConfig, pid: i32, state: GuestState) -> Self {
        let identity = ProcessIdentity {
            pid,
            start_ticks: 1,
            boot_id: "fake".into(),
        };
        let status = Status {
            state,
            migration: MigrationStatus::None,
            arrival: None,
            peer: None,
            agent: true,
            mirrors: Vec::new(),
            write_maps: Vec::new(),
        };
        let inner = Inner {
            site,
            config,
            identity,
            events: broadcast::channel(EVENTS_MAX).0,
            exit: watch::channel(None).0,
            status: Mutex::new(status),
            cancel: watch::channel(false).0,
            driver: watch::channel(0).0,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    fn status_mut(&self) -> MutexGuard<'_, Status> {
        self.inner
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn site(&self) -> &FakeSite {
        &self.inner.site
    }

    /// Another task drives the outgoing migration from now on; its turn.
    pub(super) fn next_driver(&self) -> u64 {
        self.inner.driver.send_modify(|turn| *turn += 1);
        *self.inner.driver.borrow()
    }

    /// Resolves when another task has taken over.
    pub(super) async fn replaced(&self, turn: u64) {
        let mut driver = self.inner.driver.subscribe();
        // The sender lives as long as the guest.
        let _ = driver.wait_for(|now| *now != turn).await;
    }

    pub(super) fn peer(&self) -> Option<FakeGuest> {
        self.status_mut().peer.clone()
    }

    pub(super) fn set_peer(&self, peer: Option<FakeGuest>) {
        self.status_mut().peer = peer;
    }

    pub(super) fn cancel_order(&self) -> &watch::Sender<bool> {
        &self.inner.cancel
    }

    /// What it was started with.
    #[must_use]
    pub fn config(&self) -> &GuestConfig {
        &self.inner.config
    }

    /// Its process, which does not exist.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.inner.identity
    }

    /// Its state; `Shutdown` once it has ended.
    #[must_use]
    pub fn state(&self) -> GuestState {
        self.status_mut().state.clone()
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<ExitInfo> {
        self.inner.exit.borrow().clone()
    }

    /// The last migration.
    #[must_use]
    pub fn migration_status(&self) -> MigrationStatus {
        self.status_mut().migration.clone()
    }

    /// Lets an event happen, for example an I/O error.
    pub fn emit(&self, event: GuestEvent) {
        // No subscriber is no error.
        let _ = self.inner.events.send(event);
    }

    /// The process ends without a word.
    pub fn crash(&self) {
        self.end(ExitInfo {
            code: None,
            signal: Some(11),
            shutdown: None,
        });
    }

    /// The guest shuts itself down.
    pub fn shut_down(&self) {
        self.shutdown(true, "guest-shutdown");
    }

    /// A disk fails and the guest is paused.
    pub fn io_error(&self, disk: &str) {
        self.set_state(GuestState::IoError);
        self.emit(GuestEvent::BlockIoError {
            disk: disk.to_owned(),
            operation: "write".into(),
            stopped: true,
            no_space: false,
            reason: "Input/output error".into(),
        });
        self.emit(GuestEvent::Stop { at_us: 0 });
    }

    /// Whether the guest agent answers.
    pub fn set_agent(&self, answers: bool) {
        self.status_mut().agent = answers;
    }

    fn shutdown(&self, by_guest: bool, reason: &str) {
        self.emit(GuestEvent::Shutdown {
            by_guest,
            reason: reason.to_owned(),
        });
        let shutdown = Some((by_guest, reason.to_owned()));
        self.end(ExitInfo {
            code: Some(0),
            signal: None,
            shutdown,
        });
    }

    pub(super) fn end(&self, exit: ExitInfo) {
        if self.exit().is_some() {
            return;
        }
        self.set_state(GuestState::Shutdown);
        self.site().unlock_disks(self.identity().pid);
        self.arrived(IncomingOutcome::Failed {
            reason: format!("QEMU has ended ({exit})"),
        });
        self.inner.exit.send_replace(Some(exit));
    }

    pub(super) fn set_state(&self, state: GuestState) {
        self.status_mut().state = state;
    }

    pub(super) fn set_migration(&self, status: MigrationStatus) {
        self.status_mut().migration = status.clone();
        self.emit(GuestEvent::Migration(status));
    }

    pub(super) fn arrived(&self, outcome: IncomingOutcome) {
        let waiting = self.status_mut().arrival.take();
        if let Some(waiting) = waiting {
            // Nobody may wait any more.
            let _ = waiting.send(outcome);
        }
    }

    pub(super) fn alive(&self) -> Result<(), HypervisorError> {
        let vm = self.config().name.clone();
        self.exit().map_or(Ok(()), |exit| {
            Err(HypervisorError::Gone {
                vm,
                exit: exit.to_string(),
            })
        })
    }

    pub(super) fn strikes(&self, fault: &Fault) -> bool {
        self.site()
            .take(&self.config().name, |f| (f == fault).then_some(()))
            .is_some()
    }

    pub(super) fn migration_error(&self, detail: &str) -> HypervisorError {
        HypervisorError::Migration {
            vm: self.config().name.clone(),
            detail: detail.to_owned(),
        }
    }
}

#[async_trait]
impl Vm for FakeGuest {
    fn config(&self) -> &GuestConfig {
        self.config()
    }
    fn identity(&self) -> &ProcessIdentity {
        self.identity()
    }
    fn events(&self) -> broadcast::Receiver<GuestEvent> {
        self.inner.events.subscribe()
    }
    async fn exited(&self) -> ExitInfo {
        let mut exit = self.inner.exit.subscribe();
        loop {
            if let Some(exit) = exit.borrow_and_update().clone() {
                return exit;
            }
            if exit.changed().await.is_err() {
                return ExitInfo {
                    code: None,
                    signal: None,
                    shutdown: None,
                };
            }
        }
    }
    async fn status(&self) -> Result<GuestState, HypervisorError> {
        self.alive()?;
        Ok(self.state())
    }

    async fn powerdown(&self) -> Result<(), HypervisorError> {
        self.alive()?;
        self.emit(GuestEvent::Powerdown);
        let ignores = self
            .site()
            .has(&self.config().name, &Fault::IgnoresPowerdown);
        if !ignores && self.state().may_execute() {
            self.shut_down();
        }
        Ok(())
    }

    async fn quit(&self) -> Result<(), HypervisorError> {
        if self.exit().is_none() {
            self.shutdown(false, "host-qmp-quit");
        }
        Ok(())
    }

    async fn kill(&self, within: Duration) -> Result<ExitInfo, HypervisorError> {
        if self.strikes(&Fault::KillHangs) {
            tokio::time::sleep(within).await;
            return Err(HypervisorError::KillUnconfirmed {
                vm: self.config().name.clone(),
                pid: self.identity().pid,
                after_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
            });
        }
        self.end(ExitInfo {
            code: None,
            signal: Some(9),
            shutdown: None,
        });
        Ok(self.exited().await)
    }

    async fn freeze(&self, within: Duration) -> Result<Frozen, HypervisorError> {
        self.alive()?;
        if self.strikes(&Fault::FreezeFails) {
            tokio::time::sleep(within).await;
            let vm = self.config().name.clone();
            return Err(HypervisorError::FreezeFailed {
                vm,
                detail: "QEMU does not answer".into(),
            });
        }
        let state = self.state();
        if state != GuestState::InMigrate && !self.migration_status().is_over() {
            self.cancel_order().send_replace(true);
        }
        if state.may_execute() {
            self.set_state(GuestState::Paused);
            self.emit(GuestEvent::Stop { at_us: 0 });
        } else if state == GuestState::FinishMigrate {
            self.set_state(GuestState::Paused);
        }
        self.site().unlock_disks(self.identity().pid);
        Ok(Frozen {
            released_disks: true,
        })
    }

    async fn thaw(&self, _within: Duration) -> Result<(), HypervisorError> {
        self.alive()?;
        if matches!(self.state(), GuestState::Running | GuestState::InMigrate) {
            return Ok(());
        }
        let lost = |detail: String| HypervisorError::DiskLockLost {
            vm: self.config().name.clone(),
            detail,
        };
        if self.strikes(&Fault::ThawLosesLock) {
            return Err(lost("Failed to get \"write\" lock".into()));
        }
        self.site()
            .lock_disks(self.config(), self.identity().pid)
            .map_err(|path| lost(format!("{}: Failed to get \"write\" lock", path)))?;
        self.set_state(GuestState::Running);
        self.emit(GuestEvent::Resume);
        Ok(())
    }

    async fn announce(&self) -> Result<(), HypervisorError> {
        self.alive()
    }

    async fn save(&self, path: &Path, _within: Duration) -> Result<SavedState, HypervisorError> {
        self.alive()?;
        let vm = self.config().name.clone();
        if self.strikes(&Fault::SaveFails) {
            let detail = "No space left on device".into();
            return Err(HypervisorError::SaveFailed {
                vm,
                path: path.to_path_buf(),
                detail,
            });
        }
        self.set_state(GuestState::PostMigrate);
        self.emit(GuestEvent::Stop { at_us: 0 });
        self.site().unlock_disks(self.identity().pid);
        Ok(SavedState {
            path: path.to_path_buf(),
            mapped_ram: true,
        })
    }

    async fn ping_agent(&self, _within: Duration) -> Result<(), HypervisorError> {
        self.alive()?;
        if self.config().guest_agent && self.status_mut().agent {
            return Ok(());
        }
        let vm = self.config().name.clone();
        Err(HypervisorError::Agent {
            vm,
            detail: "nothing came in time".into(),
        })
    }

    async fn migrate(
        &self,
        request: MigrationRequest,
    ) -> Result<OutgoingMigration, HypervisorError> {
        migration::send(self, request)
    }

    async fn attach_migration(&self) -> Result<Option<OutgoingMigration>, HypervisorError> {
        self.alive()?;
        if self.state() == GuestState::InMigrate || self.migration_status().is_over() {
            return Ok(None);
        }
        Ok(Some(migration::attach(self)))
    }

    async fn listen(&self, request: ListenRequest) -> Result<IncomingMigration, HypervisorError> {
        self.alive()?;
        if self.state() != GuestState::InMigrate {
            return Err(self.migration_error("it cannot receive a guest"));
        }
        let (sender, outcome) = oneshot::channel();
        self.status_mut().arrival = Some(sender);
        let address = migration::open_port(self, &request);
        Ok(IncomingMigration { address, outcome })
    }

    async fn start_mirror(
        &self,
        disk: usize,
        tag: &str,
        _target: &MirrorTarget,
        _speed: Option<u64>,
        lacks: Option<&WriteMap>,
    ) -> Result<(), HypervisorError> {
        self.alive()?;
        let mirror = MirrorStatus {
            disk,
            tag: tag.to_owned(),
            in_step: true,
            done: 0,
            total: 0,
            problem: None,
            resync: lacks.map(|map| Resync {
                done: map.bytes,
                total: map.bytes,
                due: false,
            }),
        };
        self.status_mut().mirrors.push(mirror);
        Ok(())
    }

    async fn finish_resync(&self, _disk: usize) -> Result<(), HypervisorError> {
        self.alive()
    }

    async fn write_maps(&self, disk: usize) -> Result<Vec<WriteMap>, HypervisorError> {
        self.alive()?;
        let status = self.status_mut();
        let maps = status.write_maps.iter().filter(|(of, _)| *of == disk);
        Ok(maps.map(|(_, map)| map.clone()).collect())
    }

    async fn begin_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError> {
        self.alive()?;
        let (tag, bytes) = (tag.to_owned(), 0);
        let map = WriteMap { tag, number, bytes };
        self.status_mut().write_maps.push((disk, map));
        Ok(())
    }

    async fn forget_write_map(
        &self,
        disk: usize,
        tag: &str,
        number: u32,
    ) -> Result<(), HypervisorError> {
        self.alive()?;
        let this = |map: &WriteMap| map.tag == tag && map.number == number;
        self.status_mut()
            .write_maps
            .retain(|(of, map)| *of != disk || !this(map));
        Ok(())
    }

    async fn mirrors(&self) -> Result<Vec<MirrorStatus>, HypervisorError> {
        self.alive()?;
        Ok(self.status_mut().mirrors.clone())
    }

    async fn drop_mirror(&self, disk: usize) -> Result<(), HypervisorError> {
        self.alive()?;
        self.status_mut()
            .mirrors
            .retain(|mirror| mirror.disk != disk);
        Ok(())
    }
}
