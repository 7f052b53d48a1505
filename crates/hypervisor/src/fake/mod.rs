//! Hypervisors without virtual machines, for tests of whoever drives the real ones.
//!
//! Owns: a [`FakeSite`] of hosts that share storage and a network: images have locks as QEMU's have, a
//! migration really moves the guest from one host's [`FakeHypervisor`] to another's. Faults are scripted
//! per VM ([`Fault`]).
//!
//! Always holds: what the real driver promises holds here as well (states, events, exits, errors), so a
//! test that passes here fails there only for reasons of time. Time is tokio's, so it can be paused.
//!
//! Must not: hide a broken promise of its user. [`FakeSite::executing`] tells on how many hosts a VM runs.

mod guest;
mod migration;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

pub use guest::FakeGuest;

use crate::config::{GuestConfig, StartMode};
use crate::disk::DiskSource;
use crate::error::HypervisorError;
use crate::guest::GuestState;
use crate::vm::{Adoption, Hypervisor, Vm};

/// Where a scripted failure of a migration strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailAt {
    /// The target cannot be reached.
    Setup,
    /// While memory is copied.
    Active,
    /// While it waits for the order to switch over.
    PreSwitchover,
    /// After the order; the target does not run the guest and ends.
    Device,
    /// After the order; the target runs the guest, but the source does not learn it.
    AfterArrival,
}

/// A scripted fault. Each strikes once, unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The next start fails with this reason.
    StartFails(String),
    /// The next start takes until its deadline, then fails.
    StartHangs,
    /// The next started guest crashes after this time.
    CrashesAfter(Duration),
    /// The guest ignores all requests to shut down.
    IgnoresPowerdown,
    /// The next freeze is not confirmed before its deadline.
    FreezeFails,
    /// The next thaw finds the disks taken.
    ThawLosesLock,
    /// The next save fails.
    SaveFails,
    /// The next kill is not confirmed; the process stays.
    KillHangs,
    /// The next outgoing migration fails there.
    MigrationFails(FailAt),
    /// The next outgoing migration never converges.
    MigrationStalls,
}

/// Shared storage, network and faults of several fake hosts.
#[derive(Debug, Clone, Default)]
pub struct FakeSite {
    world: Arc<Mutex<World>>,
}

#[derive(Debug, Default)]
struct World {
    guests: BTreeMap<PathBuf, FakeGuest>,
    /// Which guest (by pid) holds an image for writing.
    locks: BTreeMap<DiskSource, i32>,
    listening: BTreeMap<SocketAddr, FakeGuest>,
    faults: BTreeMap<String, VecDeque<Fault>>,
    last_pid: i32,
    last_port: u16,
    copy_takes: Duration,
}

impl FakeSite {
    /// A site in which a migration copies for 10 ms.
    #[must_use]
    pub fn new() -> Self {
        let site = Self::default();
        site.copy_takes(Duration::from_millis(10));
        site
    }

    /// Another host of the site.
    #[must_use]
    pub fn host(&self) -> FakeHypervisor {
        FakeHypervisor { site: self.clone() }
    }

    /// Scripts a fault of this VM.
    pub fn fault(&self, vm: &str, fault: Fault) {
        self.world()
            .faults
            .entry(vm.to_owned())
            .or_default()
            .push_back(fault);
    }

    /// How long the copying phase of a migration takes.
    pub fn copy_takes(&self, time: Duration) {
        self.world().copy_takes = time;
    }

    /// The guest in this runtime directory, if its process lives.
    #[must_use]
    pub fn guest(&self, runtime_dir: &Path) -> Option<FakeGuest> {
        self.world()
            .guests
            .get(runtime_dir)
            .filter(|guest| guest.exit().is_none())
            .cloned()
    }

    /// The runtime directories in which this VM's CPUs run now: more than one is a broken promise.
    #[must_use]
    pub fn executing(&self, vm: &str) -> Vec<PathBuf> {
        let guests: Vec<FakeGuest> = self.world().guests.values().cloned().collect();
        guests
            .into_iter()
            .filter(|guest| guest.config().name == vm && guest.state().may_execute())
            .map(|guest| guest.config().runtime_dir.clone())
            .collect()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first scripted fault that `matches`.
    fn take<T>(&self, vm: &str, matches: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        let mut world = self.world();
        let faults = world.faults.get_mut(vm)?;
        let (at, found) = faults
            .iter()
            .enumerate()
            .find_map(|(at, f)| Some((at, matches(f)?)))?;
        faults.remove(at);
        Some(found)
    }

    fn has(&self, vm: &str, fault: &Fault) -> bool {
        self.world()
            .faults
            .get(vm)
            .is_some_and(|faults| faults.contains(fault))
    }

    /// Takes the write locks of all images, or none; the error is the image that is taken.
    fn lock_disks(&self, config: &GuestConfig, pid: i32) -> Result<(), String> {
        let mut world = self.world();
        let writable = || config.disks.iter().filter(|disk| !disk.read_only);
        let taken = writable().find(|d| world.locks.get(&d.source).is_some_and(|by| *by != pid));
        if let Some(disk) = taken {
            return Err(disk.source.to_string());
        }
        for disk in writable() {
            world.locks.insert(disk.source.clone(), pid);
        }
        Ok(())
    }

    fn unlock_disks(&self, pid: i32) {
        self.world().locks.retain(|_, by| *by != pid);
    }
}

/// One fake host.
#[derive(Debug, Clone)]
pub struct FakeHypervisor {
    site: FakeSite,
}

impl FakeHypervisor {
    fn create(
        &self,
        config: &GuestConfig,
        state: GuestState,
    ) -> Result<FakeGuest, HypervisorError> {
        let vm = config.name.clone();
        if let Some(guest) = self.site.guest(&config.runtime_dir) {
            return Err(HypervisorError::AlreadyRunning {
                vm,
                pid: guest.identity().pid,
            });
        }
        let pid = {
            let mut world = self.site.world();
            world.last_pid += 1;
            world.last_pid
        };
        if state == GuestState::Running
            && let Err(path) = self.site.lock_disks(config, pid)
        {
            return Err(HypervisorError::StartFailed {
                vm,
                reason: "exit status 1".into(),
                stderr: format!("{}: Failed to get \"write\" lock", path),
            });
        }
        let guest = FakeGuest::new(self.site.clone(), config.clone(), pid, state);
        self.site
            .world()
            .guests
            .insert(config.runtime_dir.clone(), guest.clone());
        Ok(guest)
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    async fn start(
        &self,
        config: &GuestConfig,
        mode: StartMode,
        within: Duration,
    ) -> Result<Arc<dyn Vm>, HypervisorError> {
        config.validate()?;
        let vm = config.name.clone();
        let reason = self.site.take(&vm, |fault| match fault {
            Fault::StartFails(reason) => Some(reason.clone()),
            _ => None,
        });
        if let Some(reason) = reason {
            return Err(HypervisorError::StartFailed {
                vm,
                reason,
                stderr: String::new(),
            });
        }
        let hangs = self
            .site
            .take(&vm, |fault| (*fault == Fault::StartHangs).then_some(()));
        if hangs.is_some() {
            tokio::time::sleep(within).await;
            let after_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
            let stage = "its control socket";
            return Err(HypervisorError::StartTimeout {
                vm,
                after_ms,
                stage,
                stderr: String::new(),
            });
        }
        let state = match mode {
            StartMode::Incoming => GuestState::InMigrate,
            StartMode::Boot | StartMode::Restore(_) => GuestState::Running,
        };
        let guest = self.create(config, state)?;
        let crash = self.site.take(&vm, |fault| match fault {
            Fault::CrashesAfter(time) => Some(*time),
            _ => None,
        });
        if let Some(time) = crash {
            let guest = guest.clone();
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                guest.crash();
            });
        }
        Ok(Arc::new(guest))
    }

    async fn adopt(
        &self,
        runtime_dir: &Path,
        _within: Duration,
    ) -> Result<Adoption, HypervisorError> {
        let known = self.site.world().guests.get(runtime_dir).cloned();
        let Some(guest) = known else {
            return Ok(Adoption::Gone { config: None });
        };
        if guest.exit().is_some() {
            return Ok(Adoption::Gone {
                config: Some(Box::new(guest.config().clone())),
            });
        }
        let (state, migration) = (Some(guest.state()), Some(guest.migration_status()));
        Ok(Adoption::Alive {
            vm: Arc::new(guest),
            state,
            migration,
        })
    }
}

#[cfg(test)]
mod tests;
