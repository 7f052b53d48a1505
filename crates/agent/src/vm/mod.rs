//! The task of one VM: owns the guest's handle, carries acts out, sends back what happened.
//!
//! ```text
//! host --Act{token, run}--> VmTask --spawns--> make, thaw, save, send, probe ... --event(token)--> host
//!                              ^                        |
//!                              +------ Done ------------+ (a handle, a control, the end of a process)
//! ```
//! Always holds: every act is answered as [`quorate_agent_logic::Act`] says; a guest is under guard before its
//! start is answered; the guard's leave comes before a process is made or resumed; the end of a process is
//! told last, and says whether a guest that was awaited had run.
//!
//! Must not: decide anything; retry anything but a kill that is under way.

mod grow;
pub(crate) mod handoff;
pub(crate) mod held;
mod make;
mod mirror;
mod outgoing;
mod probe;
pub(crate) mod reserve;
mod watch;
mod write_maps;

use crate::exports::Exports;
use crate::facts::OpenPools;
use crate::guest_config::Layout;
use crate::host::Message;
use crate::ports::{AgentConfig, Drivers, GuestGuard, PoolDefinition};
use crate::services::{Services, edges};
use make::{Making, Plan, Prepared};
use quorate_agent_logic::{Act, Exit, GuestEvent, Observed, Token};
use quorate_hypervisor::{Adoption, GuestState, HypervisorError, MigrationControl, Vm};
use quorate_network::Announcement;
use quorate_state::State;
use quorate_storage::Pool;
use quorate_storage::reservation::Units;
use quorate_types::{PoolName, VmName};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch as channel};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use watch::Watching;

/// Bound of a freeze or a thaw.
const FREEZE_WITHIN: Duration = Duration::from_secs(2);
/// Bound of a kill.
const KILL_WITHIN: Duration = Duration::from_secs(5);
/// Bound of a save: memory over the network.
const SAVE_WITHIN: Duration = Duration::from_secs(300);
/// Between two looks for a process that is being made and must go.
const REAP_EVERY: Duration = Duration::from_millis(50);
/// Room for acts and for news.
const QUEUE: usize = 64;

/// What all tasks of the agent share.
pub(crate) struct Shared {
    pub(crate) config: AgentConfig,
    pub(crate) layout: Layout,
    pub(crate) drivers: Drivers,
    pub(crate) guard: Arc<dyn GuestGuard>,
    pub(crate) state: channel::Receiver<Arc<State>>,
    pub(crate) pools: Mutex<OpenPools>,
    pub(crate) pids: Mutex<BTreeMap<VmName, i32>>,
    /// The guests that the tasks are in charge of, for work on their disks.
    pub(crate) guests: Mutex<BTreeMap<VmName, Arc<dyn Vm>>>,
    /// Disks with copies that shall become larger.
    pub(crate) growing: grow::Growing,
    /// The units of guests that have reservations.
    pub(crate) units: Mutex<BTreeMap<VmName, Units>>,
    pub(crate) inbox: mpsc::Sender<Message>,
    pub(crate) exports: Exports,
    pub(crate) services: Services,
    /// The end of the lease, in nanoseconds of CLOCK_BOOTTIME; 0: none yet.
    pub(crate) deadline_ns: AtomicU64,
    /// The revision that the replica must have for what is done under that lease.
    pub(crate) fresh_from: AtomicU64,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

impl Shared {
    /// Spawns a task that ends with the agent: an agent that was stopped must not hold on to guests that
    /// the next one adopts.
    pub(crate) fn spawn<T>(&self, task: impl Future<Output = T> + Send + 'static) -> AbortHandle
    where
        T: Send + 'static,
    {
        let stop = self.stop.clone();
        let task = async move { stop.run_until_cancelled(task).await };
        self.tasks.spawn(task).abort_handle()
    }

    pub(crate) async fn tell(&self, vm: &VmName, token: Token, event: GuestEvent) {
        let vm = vm.clone();
        // The host task ends only with the agent.
        let _ = self.inbox.send(Message::Guest { vm, token, event }).await;
    }

    pub(crate) fn state(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    /// The pool's driver, if the cluster has the pool.
    pub(crate) fn pool(&self, name: &PoolName) -> Result<Arc<dyn Pool>, String> {
        let state = self.state();
        let pool = PoolDefinition::of(&state, name);
        let pool = pool.ok_or_else(|| format!("there is no pool {name}"))?;
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pools.get(&*self.drivers.pools, name, pool))
    }

    /// VMs that have a process here.
    pub(crate) fn living(&self) -> Vec<VmName> {
        let pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        pids.keys().cloned().collect()
    }

    pub(crate) fn set_pid(&self, vm: &VmName, pid: Option<i32>) {
        let mut pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        match pid {
            Some(pid) => pids.insert(vm.clone(), pid),
            None => pids.remove(vm),
        };
    }
}

impl Shared {
    fn set_guest(&self, vm: &VmName, guest: Option<Arc<dyn Vm>>) {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        match guest {
            Some(guest) => guests.insert(vm.clone(), guest),
            None => guests.remove(vm),
        };
    }
}

/// An order to the task.
pub(crate) enum Command {
    /// Carry this out; what makes or resumes a guest only until then (CLOCK_BOOTTIME).
    Act {
        token: Token,
        run: Token,
        act: Act,
        until_ns: u64,
    },
    /// Take charge of a guest that was found.
    Adopted { run: Token, guest: Arc<dyn Vm> },
}

/// A guest that exists.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) run: Token,
    pub(crate) guest: Arc<dyn Vm>,
    pub(crate) announcements: Vec<Announcement>,
}

/// News of what the task has spawned.
pub(crate) enum Done {
    Made {
        run: Token,
        result: Result<(Live, Watching), make::Failure>,
    },
    Sending {
        token: Token,
        control: MigrationControl,
    },
    Exited {
        run: Token,
        exit: Exit,
    },
}

struct VmTask {
    shared: Arc<Shared>,
    vm: VmName,
    done: mpsc::Sender<Done>,
    live: Option<Live>,
    making: Option<Making>,
    sending: Option<(Token, MigrationControl)>,
    probe: Option<AbortHandle>,
    prepared: Prepared,
}

/// Starts the task of a VM; it ends when the sender is dropped. Guests stay.
pub(crate) fn spawn(shared: Arc<Shared>, vm: VmName) -> mpsc::Sender<Command> {
    let (sender, mut commands) = mpsc::channel(QUEUE);
    let (done, mut news) = mpsc::channel(QUEUE);
    let spawner = shared.clone();
    let mut task = VmTask {
        shared,
        vm,
        done,
        live: None,
        making: None,
        sending: None,
        probe: None,
        prepared: Prepared::default(),
    };
    spawner.spawn(async move {
        loop {
            tokio::select! {
                biased;
                Some(done) = news.recv() => task.on_done(done).await,
                command = commands.recv() => match command {
                    Some(Command::Act { token, run, act, until_ns }) => {
                        task.on_act(token, run, act, until_ns).await;
                    }
                    Some(Command::Adopted { run, guest }) => task.on_adopted(run, guest).await,
                    None => return,
                },
            }
        }
    });
    sender
}

impl VmTask {
    async fn tell(&self, token: Token, event: GuestEvent) {
        self.shared.tell(&self.vm, token, event).await;
    }

    async fn on_act(&mut self, token: Token, run: Token, act: Act, until_ns: u64) {
        match act {
            Act::Start {
                epoch,
                spec,
                abi,
                restore,
            } => {
                let incoming = false;
                self.make(Plan {
                    run: token,
                    epoch,
                    spec,
                    abi,
                    restore,
                    incoming,
                    until_ns,
                });
            }
            Act::Prepare {
                epoch, spec, abi, ..
            } => self.make(Plan {
                run: token,
                epoch,
                spec,
                abi,
                restore: None,
                incoming: true,
                until_ns,
            }),
            Act::Kill => self.kill(token, run).await,
            Act::Clean => self.clean(run).await,
            Act::Continue { send } => self.continue_switchover(send),
            Act::Cancel => self.cancel(),
            act => {
                let live = self.live.clone().filter(|live| live.run == run);
                match live {
                    Some(live) => self.act_on(token, live, act, until_ns),
                    // Its exit is on the way.
                    None => tracing::debug!(vm = %self.vm, ?act, "no guest for it any more"),
                }
            }
        }
    }

    fn act_on(&mut self, token: Token, live: Live, act: Act, until_ns: u64) {
        let (shared, vm) = (self.shared.clone(), self.vm.clone());
        match act {
            Act::Powerdown => drop(shared.clone().spawn(async move {
                if let Err(error) = live.guest.powerdown().await {
                    let detail = text(&error);
                    shared
                        .tell(&vm, token, GuestEvent::PowerdownFailed { detail })
                        .await;
                }
            })),
            Act::Freeze => drop(shared.clone().spawn(async move {
                let event = match live.guest.freeze(FREEZE_WITHIN).await {
                    Ok(_) => GuestEvent::Paused,
                    Err(error) => GuestEvent::PauseFailed {
                        detail: text(&error),
                    },
                };
                shared.tell(&vm, token, event).await;
            })),
            Act::Dismiss => drop(shared.clone().spawn(async move {
                let state = match live.guest.freeze(FREEZE_WITHIN).await {
                    Ok(_) => live.guest.status().await,
                    Err(error) => Err(error),
                };
                let observed = state.map_or(Observed::Unknown, |state| observed(&state));
                shared.tell(&vm, token, GuestEvent::State(observed)).await;
            })),
            Act::Thaw => drop(shared.clone().spawn(async move {
                let event = thaw(&shared, &vm, &live, until_ns).await;
                shared.tell(&vm, token, event).await;
            })),
            Act::Save { pool, file } => drop(shared.clone().spawn(async move {
                let event = match save(&shared, &vm, &live, &pool, &file).await {
                    Ok(()) => GuestEvent::Saved,
                    Err(detail) => GuestEvent::SaveFailed { detail },
                };
                shared.tell(&vm, token, event).await;
            })),
            Act::Query => drop(shared.clone().spawn(async move {
                let state = live.guest.status().await;
                let observed = state.map_or(Observed::Unknown, |state| observed(&state));
                shared.tell(&vm, token, GuestEvent::State(observed)).await;
            })),
            Act::Probe(check) => {
                let probing = probe::run(shared, vm, live, check.probe);
                self.probe = Some(self.shared.spawn(probing));
            }
            Act::Send { id, address } => {
                let done = self.done.clone();
                self.shared
                    .spawn(outgoing::send(shared, vm, live, token, id, address, done));
            }
            Act::Open => drop(shared.clone().spawn(async move {
                watch::open_adopted(&shared, &vm, &live).await;
            })),
            Act::Attach => {
                self.shared
                    .spawn(outgoing::attach(shared, vm, live, token, self.done.clone()));
            }
            // Handled by the caller.
            Act::Start { .. }
            | Act::Prepare { .. }
            | Act::Kill
            | Act::Clean
            | Act::Continue { .. }
            | Act::Cancel => {}
        }
    }

    fn make(&mut self, plan: Plan) {
        let (shared, vm, done) = (self.shared.clone(), self.vm.clone(), self.done.clone());
        let (run, prepared) = (plan.run, self.prepared.clone());
        self.shared.spawn(async move {
            let result = make::make(&shared, &vm, plan, &prepared).await;
            // The task ends only with the agent; then the guest is adopted by the next one.
            let _ = done.send(Done::Made { run, result }).await;
        });
        self.making = Some(Making { run, reaper: None });
    }

    async fn on_done(&mut self, done: Done) {
        match done {
            Done::Made { run, result } => {
                let making = self.making.take();
                let reaping = making.is_some_and(|making| making.stop_reaping());
                match result {
                    Ok((live, watching)) => {
                        let incoming = watching.awaits();
                        self.take_charge(live, watching);
                        if !incoming {
                            self.shared.services.note_running(&self.vm, true);
                        }
                        if reaping {
                            self.kill(Token(0), run).await;
                        } else if !incoming {
                            self.tell(run, GuestEvent::Started).await;
                            // What happened before the events were listened to is asked for.
                            self.tell(run, GuestEvent::Noticed).await;
                        }
                    }
                    Err(failure) => {
                        let make::Failure { detail, refused } = failure;
                        self.tell(run, GuestEvent::StartFailed { detail, refused })
                            .await;
                    }
                }
            }
            Done::Sending { token, control } => self.sending = Some((token, control)),
            Done::Exited { run, exit } => {
                if self.live.as_ref().is_some_and(|live| live.run == run) {
                    self.live = None;
                    self.sending = None;
                    if let Some(probe) = self.probe.take() {
                        probe.abort();
                    }
                    self.shared.set_pid(&self.vm, None);
                    self.shared.set_guest(&self.vm, None);
                    self.shared.services.note_gone(&self.vm);
                }
                let (shared, vm) = (self.shared.clone(), self.vm.clone());
                self.shared.spawn(async move {
                    if let Err(error) = shared.guard.unregister(&vm, run.0).await {
                        tracing::debug!(%vm, %error, "the guard keeps a guest that has ended");
                    }
                });
                self.tell(run, GuestEvent::Exited(exit)).await;
            }
        }
    }

    fn take_charge(&mut self, live: Live, watching: Watching) {
        self.shared
            .set_pid(&self.vm, Some(live.guest.identity().pid));
        mirror::spawn(&self.shared, &self.vm, &live);
        reserve::spawn(&self.shared, &self.vm, &live);
        self.shared.set_guest(&self.vm, Some(live.guest.clone()));
        let (shared, vm, done) = (self.shared.clone(), self.vm.clone(), self.done.clone());
        self.shared
            .spawn(watch::watch(shared, vm, live.clone(), watching, done));
        self.live = Some(live);
    }

    async fn on_adopted(&mut self, run: Token, guest: Arc<dyn Vm>) {
        let watching = Watching::adopted(&*guest).await;
        let state = self.shared.state();
        let announcements = state
            .vms
            .get(&self.vm)
            .map(|record| make::announcements(&self.shared, &self.vm, record.effective()))
            .unwrap_or_default();
        let process = guest.identity().clone();
        let qmp = self.shared.layout.paths(&self.vm).guard();
        let (shared, vm, freezable) = (self.shared.clone(), self.vm.clone(), !watching.awaits());
        self.take_charge(
            Live {
                run,
                guest,
                announcements,
            },
            watching,
        );
        // In the guard's registry at once; a guard that is being started learns of it later.
        self.shared.spawn(async move {
            let told = shared
                .guard
                .register(&vm, run.0, &process, qmp, freezable)
                .await;
            if let Err(error) = told {
                tracing::warn!(%vm, %error, "an adopted guest is not under guard yet");
            }
        });
    }

    async fn kill(&mut self, token: Token, run: Token) {
        let (shared, vm) = (self.shared.clone(), self.vm.clone());
        if let Some(live) = self.live.clone().filter(|live| live.run == run) {
            self.shared.spawn(async move {
                // The watch tells the end.
                if let Err(error) = live.guest.kill(KILL_WITHIN).await {
                    let detail = text(&error);
                    shared
                        .tell(&vm, token, GuestEvent::KillFailed { detail })
                        .await;
                }
            });
        } else if let Some(making) = self.making.as_mut().filter(|making| making.run == run) {
            if making.reaper.is_none() {
                making.reaper = Some(self.shared.spawn(reap(shared, vm)));
            }
        } else {
            let exit = Exit {
                by_guest: false,
                by_guard: false,
                ran: false,
                detail: "it had no process any more".into(),
            };
            self.tell(run, GuestEvent::Exited(exit)).await;
        }
    }

    fn continue_switchover(&self, send: Token) {
        let Some((token, control)) = &self.sending else {
            return tracing::error!(vm = %self.vm, "no migration to switch over");
        };
        if *token != send {
            return;
        }
        let (shared, vm, control) = (self.shared.clone(), self.vm.clone(), control.clone());
        let guest = self.live.as_ref().map(|live| live.guest.clone());
        self.shared.spawn(async move {
            handoff::hand_over(&shared, &vm, guest, &control).await;
        });
    }

    fn cancel(&self) {
        let (vm, live) = (self.vm.clone(), self.live.clone());
        let control = self.sending.as_ref().map(|(_, control)| control.clone());
        self.shared.spawn(async move {
            let cancelled = match (control, live) {
                (Some(control), _) => control.cancel().await,
                (None, Some(live)) => outgoing::cancel_found(&*live.guest).await,
                (None, None) => Ok(()),
            };
            if let Err(error) = cancelled {
                tracing::warn!(%vm, error = text(&error), "a migration was not cancelled");
            }
        });
    }

    /// Removes the taps of a VM without a process, and its registrations. Done before the next act, so that it cannot remove
    /// the next guest's.
    async fn clean(&self, run: Token) {
        if self.live.is_some() || self.making.is_some() {
            return;
        }
        reserve::release(&self.shared, &self.vm).await;
        let network = &self.shared.drivers.network;
        let prefix = format!("{}/", self.vm);
        let taps = network.list_taps().await.unwrap_or_else(|error| {
            tracing::warn!(vm = %self.vm, error = text(&error), "its taps stay");
            Vec::new()
        });
        for tap in taps {
            let ours = tap.nic.as_ref().is_some_and(|nic| nic.starts_with(&prefix));
            if ours {
                edges::detach(&self.shared, &tap.ifname).await;
            }
            if ours && let Err(error) = network.delete_tap(&tap.ifname).await {
                tracing::warn!(vm = %self.vm, error = text(&error), "a tap stays");
            }
        }
        let (shared, vm) = (self.shared.clone(), self.vm.clone());
        self.shared
            .spawn(async move { shared.guard.unregister(&vm, run.0).await });
    }
}

/// Tells the switches that a VM's frames come here from now on; several rounds, in the background.
pub(crate) fn announce_place(shared: &Shared, vm: &VmName) {
    for announcement in announcements(shared, vm) {
        watch::announce_one(shared, vm, &announcement);
    }
}

/// What tells the switches that a VM is here.
pub(crate) fn announcements(shared: &Shared, vm: &VmName) -> Vec<quorate_network::Announcement> {
    let state = shared.state();
    let record = state.vms.get(vm);
    record.map_or_else(Vec::new, |record| {
        make::announcements(shared, vm, record.effective())
    })
}

/// Ends a process that is being made, wherever the making stands. Ended with the making.
async fn reap(shared: Arc<Shared>, vm: VmName) {
    let runtime = shared.layout.runtime(&vm);
    loop {
        let found = shared.drivers.hypervisor.adopt(&runtime, KILL_WITHIN).await;
        if let Ok(Adoption::Alive { vm: guest, .. }) = found
            && let Err(error) = guest.kill(KILL_WITHIN).await
        {
            tracing::warn!(%vm, error = text(&error), "a guest that is being made stays");
        }
        tokio::time::sleep(REAP_EVERY).await;
    }
}

async fn thaw(shared: &Shared, vm: &VmName, live: &Live, until_ns: u64) -> GuestEvent {
    if let Err(event) = reserve::before_thaw(shared, vm).await {
        return event;
    }
    if let Err(error) = shared.guard.thawing(vm, live.run.0, until_ns).await {
        let detail = error.to_string();
        return GuestEvent::ThawRefused { detail };
    }
    let thawed = live.guest.thaw(FREEZE_WITHIN).await;
    if let Err(error) = shared.guard.thawed(vm, live.run.0).await {
        tracing::debug!(%vm, %error, "the guard does not know that a guest was thawed");
    }
    match thawed {
        Ok(()) => {
            watch::announce(shared, vm, live);
            GuestEvent::Thawed
        }
        Err(error @ HypervisorError::DiskLockLost { .. }) => GuestEvent::DiskLost {
            detail: text(&error),
        },
        Err(error) => GuestEvent::ThawFailed {
            detail: text(&error),
        },
    }
}

/// The epoch in the name of a saved state.
fn saved_epoch(file: &str) -> Result<u64, String> {
    let number = file.rsplit_once('-').map(|(_, number)| number);
    let epoch = number.and_then(|number| number.parse().ok());
    epoch.ok_or_else(|| format!("`{file}` is not the name of a saved state"))
}

async fn save(
    shared: &Shared,
    vm: &VmName,
    live: &Live,
    pool: &PoolName,
    file: &str,
) -> Result<(), String> {
    let epoch = saved_epoch(file)?;
    let pool = shared.pool(pool)?;
    let name = vm.as_str();
    let place = pool
        .prepare_saved_state(name, epoch)
        .await
        .map_err(|error| text(&error))?;
    // A save that fails resumes the guest: it must not count as frozen meanwhile.
    let guarded = shared.guard.set_freezable(vm, live.run.0, false).await;
    guarded.map_err(|error| error.to_string())?;
    let saved = live.guest.save(&place.part, SAVE_WITHIN).await;
    let committed = match saved {
        Ok(state) => {
            let described = make::describe_saved(&place.done, state.mapped_ram).await;
            match described {
                Ok(()) => pool
                    .commit_saved_state(name, epoch)
                    .await
                    .map(drop)
                    .map_err(|error| text(&error)),
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(text(&error)),
    };
    if committed.is_err()
        && let Err(error) = shared.guard.set_freezable(vm, live.run.0, true).await
    {
        tracing::warn!(%vm, %error, "the guard takes a guest for one that cannot be frozen");
    }
    committed
}

/// The state in the logic's words.
pub(crate) fn observed(state: &GuestState) -> Observed {
    match state {
        GuestState::Running | GuestState::Suspended => Observed::Running,
        GuestState::Paused
        | GuestState::Prelaunch
        | GuestState::PostMigrate
        | GuestState::FinishMigrate => Observed::Paused,
        GuestState::IoError => Observed::IoError,
        GuestState::InMigrate => Observed::InMigrate,
        GuestState::Shutdown | GuestState::Panicked | GuestState::InternalError => Observed::Ended,
        _ => Observed::Unknown,
    }
}

/// An error with all its causes, as one sentence.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let words = source.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = source.source();
    }
    text
}
