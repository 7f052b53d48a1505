//! The host's task: owns the logic, the ledger and the report.
//!
//! Always holds: one input at a time; the ledger records of a step are on stable storage, in one transaction,
//! before anything else of that step is done; the guard knows a new lease before anything is done under it.
//! A ledger that cannot be written ends the task: nothing more is decided.

use crate::facts::{self, Surroundings};
use crate::guard::client::GuardEvent;
use crate::guard::sys::boottime_ns;
use crate::ledger::LedgerStore;
use crate::vm::{self, Command, Shared};
use quorate_agent_logic::{
    AskToken, Effect, GuestEvent, HostLogic, Input, LedgerRecord, TargetSays, Token,
};
use quorate_membership::Instant;
use quorate_state::State;
use quorate_types::report::{LinkReport, MirrorReport};
use quorate_types::{
    ByteSize, HostName, HostReport, LeaseTimings, MigrationId, Millis, Revision, Timestamp, VmName,
};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Bound of a question to the target of a migration.
const ASK_WITHIN: Duration = Duration::from_secs(5);
/// Sleep when nothing is due.
const IDLE: Duration = Duration::from_secs(1);

/// What the host's task is told.
pub(crate) enum Message {
    Guest {
        vm: VmName,
        token: Token,
        event: GuestEvent,
    },
    LeaseAck {
        sent: Instant,
        granted: Millis,
        revision: Revision,
    },
    PeerIncoming {
        vm: VmName,
        id: MigrationId,
        ready: bool,
        reply: oneshot::Sender<Result<String, String>>,
    },
    PeerOutcome {
        vm: VmName,
        id: MigrationId,
        reply: oneshot::Sender<TargetSays>,
    },
    Surroundings(Surroundings),
    Resident(BTreeMap<VmName, ByteSize>),
    Links(BTreeMap<HostName, LinkReport>),
    /// What is to be said of services.
    Services(crate::services::Reports),
    /// How a disk's copy stands; absent: it has none that is kept here.
    Mirror {
        vm: VmName,
        disk: usize,
        report: Option<MirrorReport>,
    },
}

pub(crate) struct Host {
    pub(crate) shared: Arc<Shared>,
    pub(crate) logic: HostLogic,
    pub(crate) store: Arc<LedgerStore>,
    pub(crate) vms: BTreeMap<VmName, mpsc::Sender<Command>>,
    pub(crate) report: watch::Sender<HostReport>,
    pub(crate) failed: watch::Sender<Option<String>>,
    pub(crate) surroundings: Surroundings,
    pub(crate) resident: BTreeMap<VmName, ByteSize>,
    pub(crate) links: BTreeMap<HostName, LinkReport>,
    pub(crate) mirrors: BTreeMap<(VmName, usize), MirrorReport>,
    pub(crate) services: crate::services::Reports,
    /// The wall clock at 0 of CLOCK_BOOTTIME.
    pub(crate) booted: Timestamp,
    pub(crate) timings: LeaseTimings,
    pub(crate) asks: BTreeMap<AskToken, oneshot::Sender<Result<String, String>>>,
    pub(crate) outcomes: BTreeMap<AskToken, oneshot::Sender<TargetSays>>,
    pub(crate) last_ask: u64,
}

impl Host {
    pub(crate) async fn run(
        mut self,
        first: Vec<Effect>,
        mut inbox: mpsc::Receiver<Message>,
        mut guard: mpsc::Receiver<GuardEvent>,
    ) {
        let mut state = self.shared.state.clone();
        let mut status = self.shared.guard.status();
        let mut going = self.carry_out(first).await;
        state.mark_changed();
        while going {
            let sleep = self.sleep();
            going = tokio::select! {
                biased;
                // Before the answers that follow it; see the guard's protocol.
                Some(event) = guard.recv() => self.on_guard(event).await,
                message = inbox.recv() => match message {
                    Some(message) => self.on_message(message).await,
                    None => return,
                },
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = state.borrow_and_update().clone();
                    self.on_state(&now).await
                }
                Ok(()) = status.changed() => {
                    self.publish();
                    true
                }
                () = tokio::time::sleep(sleep) => self.step(Input::Tick).await,
            };
        }
    }

    /// By the clock at boot: steady, and good enough for people.
    fn wall_clock(&self) -> Timestamp {
        Timestamp(self.booted.0.saturating_add(boottime_ns() / 1_000_000))
    }

    fn sleep(&self) -> Duration {
        let now = Instant(boottime_ns());
        let next = self.logic.next_wakeup(now);
        let left = next.map(|at| Duration::from_nanos(at.0.saturating_sub(now.0)));
        left.unwrap_or(IDLE).min(IDLE)
    }

    async fn on_guard(&mut self, event: GuardEvent) -> bool {
        let (vm, run) = match event {
            GuardEvent::Froze { vm, run } => (vm, run),
            // Its process ends, which is told by its watch.
            GuardEvent::Killed { .. } => return true,
        };
        let Ok(vm) = VmName::new(vm) else {
            return true;
        };
        tracing::warn!(%vm, "frozen: the lease was about to end");
        let run = Token(run);
        self.step(Input::GuardFroze { vm, run }).await
    }

    async fn on_message(&mut self, message: Message) -> bool {
        match message {
            Message::Guest { vm, token, event } => {
                tracing::debug!(%vm, ?token, ?event, "guest");
                self.step(Input::Guest { vm, token, event }).await
            }
            Message::LeaseAck {
                sent,
                granted,
                revision,
            } => self.on_ack(sent, granted, revision).await,
            Message::PeerIncoming {
                vm,
                id,
                ready,
                reply,
            } => {
                self.last_ask += 1;
                let ask = AskToken(self.last_ask);
                // Who asked may have gone; what nobody waits for is dropped.
                self.asks.retain(|_, reply| !reply.is_closed());
                self.asks.insert(ask, reply);
                self.step(Input::PeerIncoming { ask, vm, id, ready }).await
            }
            Message::PeerOutcome { vm, id, reply } => {
                self.last_ask += 1;
                let ask = AskToken(self.last_ask);
                self.outcomes.insert(ask, reply);
                self.step(Input::PeerOutcome { ask, vm, id }).await
            }
            Message::Surroundings(mut found) => {
                facts::date(
                    &mut found.pools,
                    &self.surroundings.pools,
                    self.wall_clock(),
                );
                if self.surroundings != found {
                    self.surroundings = found;
                    self.publish();
                }
                true
            }
            Message::Resident(found) => {
                if self.resident != found {
                    self.resident = found;
                    self.publish();
                }
                true
            }
            Message::Mirror { vm, disk, report } => {
                match report {
                    Some(report) => self.mirrors.insert((vm, disk), report),
                    None => self.mirrors.remove(&(vm, disk)),
                };
                self.publish();
                true
            }
            Message::Services(services) => {
                self.services = services;
                self.publish();
                true
            }
            Message::Links(links) => {
                if self.links != links {
                    self.links = links;
                    self.publish();
                }
                true
            }
        }
    }

    async fn on_ack(&mut self, sent: Instant, granted: Millis, revision: Revision) -> bool {
        let input = Input::LeaseAck {
            sent,
            granted,
            revision,
        };
        let effects = self.logic.step(Instant(boottime_ns()), input);
        if let Some(deadline) = self.logic.lease().deadline() {
            self.shared.deadline_ns.store(deadline.0, Ordering::Relaxed);
            // First: what is done under the lease asks the guard.
            let before = self.timings.freeze_before.0;
            self.shared.guard.lease(deadline.0, before);
            let fresh_from = self.logic.lease().fresh_from();
            self.shared
                .fresh_from
                .store(fresh_from.0, Ordering::Relaxed);
            self.shared.services.lease(deadline.0, fresh_from);
            if granted.0 > 0 {
                self.shared.services.granted(revision);
            }
        }
        self.carry_out(effects).await
    }

    async fn on_state(&mut self, state: &State) -> bool {
        let timings = state.settings().lease;
        if timings != self.timings {
            self.timings = timings;
            if !self.step(Input::Timings(timings)).await {
                return false;
            }
        }
        let input = Input::Orders {
            revision: state.revision,
            orders: state.orders_for(&self.shared.config.host),
            known: state.vms.keys().cloned().collect(),
        };
        let going = self.step(input).await;
        self.publish();
        going
    }

    async fn step(&mut self, input: Input) -> bool {
        let effects = self.logic.step(Instant(boottime_ns()), input);
        self.carry_out(effects).await
    }

    /// Carries effects out, in order. `false`: the agent has failed.
    async fn carry_out(&mut self, effects: Vec<Effect>) -> bool {
        if !self.make_durable(&effects).await {
            return false;
        }
        for effect in effects {
            match effect {
                Effect::Ledger(record) => self.on_record(&record),
                Effect::Report => self.publish(),
                Effect::Guest {
                    vm,
                    token,
                    run,
                    act,
                } => {
                    tracing::debug!(%vm, ?token, ?act, "act");
                    // Asked now that its turn has come: the ledger may have taken long.
                    let until = self.logic.leave_until(&vm, token);
                    let until_ns = until.map_or(0, |until| until.0);
                    let command = Command::Act {
                        token,
                        run,
                        act,
                        until_ns,
                    };
                    self.order(vm, command);
                }
                Effect::AskTarget {
                    vm,
                    token,
                    to,
                    id,
                    ready,
                } => self.ask_target(vm, token, to, id, ready),
                Effect::AskOutcome { vm, token, to, id } => self.ask_outcome(vm, token, to, id),
                Effect::Answer { ask, result } => {
                    if let Some(reply) = self.asks.remove(&ask) {
                        let _ = reply.send(result);
                    }
                }
                Effect::AnswerOutcome { ask, says } => {
                    if let Some(reply) = self.outcomes.remove(&ask) {
                        let _ = reply.send(says);
                    }
                }
            }
        }
        self.failed.borrow().is_none()
    }

    /// All records of one step at once: a later one of the same step that is durable early looks like
    /// a crash in between, and those are safe anywhere.
    async fn make_durable(&self, effects: &[Effect]) -> bool {
        let mut rows = BTreeMap::new();
        for effect in effects {
            if let Effect::Ledger(record) = effect {
                let vm = record.vm();
                rows.insert(vm.clone(), self.logic.ledger().get(vm).cloned());
            }
        }
        if rows.is_empty() {
            return true;
        }
        let store = self.store.clone();
        let rows: Vec<_> = rows.into_iter().collect();
        let written = tokio::task::spawn_blocking(move || store.write(&rows)).await;
        let problem = match written {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(error) => format!("the ledger's task has ended: {error}"),
        };
        tracing::error!(problem, "the agent stops");
        self.failed.send_replace(Some(problem));
        false
    }

    fn on_record(&mut self, record: &LedgerRecord) {
        tracing::info!(?record, "ledger");
        if let LedgerRecord::Forgotten { vm } = record {
            self.vms.remove(vm);
            let runtime = self.shared.layout.runtime(vm);
            let log = self.shared.layout.serial_log(vm);
            self.shared.spawn(async move {
                // What is not there need not be removed.
                let _ = tokio::fs::remove_dir_all(runtime).await;
                let _ = tokio::fs::remove_file(log).await;
            });
        }
    }

    /// Passes an order on. The task only spawns work, so its queue is full only when it is stuck: then
    /// the agent is of no use and says so.
    pub(crate) fn order(&mut self, vm: VmName, command: Command) {
        let shared = self.shared.clone();
        let sender = self
            .vms
            .entry(vm.clone())
            .or_insert_with(|| vm::spawn(shared, vm.clone()));
        if sender.try_send(command).is_err() {
            let problem =
                format!("the task of VM {vm} takes no more orders: start the daemon again");
            tracing::error!(problem, "the agent stops");
            self.failed.send_replace(Some(problem));
        }
    }

    fn ask_target(&self, vm: VmName, token: Token, to: HostName, id: MigrationId, ready: bool) {
        let shared = self.shared.clone();
        self.shared.spawn(async move {
            let ask = shared
                .drivers
                .peers
                .ask_incoming(to.clone(), vm.clone(), id, ready);
            let answer = timeout(ASK_WITHIN, ask)
                .await
                .unwrap_or_else(|_| Err(format!("{to} does not answer")));
            let event = match answer {
                Ok(address) => GuestEvent::TargetReady { address },
                Err(detail) => GuestEvent::TargetNotReady { detail },
            };
            shared.tell(&vm, token, event).await;
        });
    }

    fn ask_outcome(&self, vm: VmName, token: Token, to: HostName, id: MigrationId) {
        let shared = self.shared.clone();
        self.shared.spawn(async move {
            let ask = shared.drivers.peers.ask_outcome(to, vm.clone(), id);
            let says = timeout(ASK_WITHIN / 5, ask).await;
            let says = says.unwrap_or(TargetSays::Unknown);
            shared.tell(&vm, token, GuestEvent::TargetSaid(says)).await;
        });
    }

    fn publish(&mut self) {
        let status = self.shared.guard.status().borrow().clone();
        let config = &self.shared.config;
        let mut vms = self.logic.report(self.booted);
        for (name, vm) in &mut vms {
            if let Some(resident) = self.resident.get(name) {
                vm.resident = *resident;
            }
        }
        for ((name, _), mirror) in &self.mirrors {
            if let Some(vm) = vms.get_mut(name) {
                vm.mirrors.push(mirror.clone());
            }
        }
        let mut next = HostReport {
            host: config.host.clone(),
            boot: config.boot.clone(),
            sequence: 0,
            version: config.version.clone(),
            applied: self.logic.applied(),
            guard_armed: status.armed,
            watchdog_ms: status.watchdog_ms,
            capacity: self.surroundings.capacity,
            hypervisor: config.facts.clone(),
            networks: self.surroundings.networks.clone(),
            pools: self.surroundings.pools.clone(),
            links: self.links.clone(),
            vms,
            services: self.services.services.clone(),
            uplinks: self.services.uplinks.clone(),
            offences: self.services.offences.clone(),
        };
        self.report.send_if_modified(|report| {
            next.sequence = report.sequence;
            if next == *report {
                return false;
            }
            next.sequence += 1;
            *report = next;
            true
        });
    }
}

/// Looks at pools, networks and guests' memory, again and again.
pub(crate) async fn look_around(shared: Arc<Shared>) {
    const EVERY: Duration = Duration::from_secs(5);
    let mut state = shared.state.clone();
    loop {
        let now = state.borrow_and_update().clone();
        let topology = now.topology_changed;
        let found = look(&shared, &now).await;
        let _ = shared.inbox.send(Message::Surroundings(found)).await;
        let _ = shared
            .inbox
            .send(Message::Resident(residents(&shared)))
            .await;
        crop_logs(&shared, &now);
        let changed = async {
            // Other changes do not matter here.
            let _ = state
                .wait_for(|state| state.topology_changed != topology)
                .await;
        };
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = changed => {}
        }
    }
}

async fn look(shared: &Shared, state: &State) -> Surroundings {
    let me = &shared.config.host;
    let mut checks = Vec::new();
    for (name, pool) in &state.pools {
        let hosts = pool.spec.hosts();
        if (hosts.is_empty() || hosts.contains(me))
            && let Ok(driver) = shared.pool(name)
        {
            let own = pool.spec.is_hosts_own();
            checks.push(async move {
                let mut facts = driver.check().await;
                // Nobody else can mark what is this host's own.
                if own && facts.reachable && facts.marker.is_none() {
                    match driver.define().await {
                        Ok(_) => facts = driver.check().await,
                        Err(error) => facts.problem = Some(vm::text(&error)),
                    }
                }
                (name.clone(), facts)
            });
        }
    }
    shared
        .pools
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .retain(state);
    let pools = futures_util::future::join_all(checks).await;
    for network in state.networks.values() {
        let spec = quorate_network::BridgeSpec {
            name: network.spec.bridge.clone(),
            uplink: network.spec.uplink.clone(),
            mtu: network.spec.mtu,
        };
        if let Err(error) = shared.drivers.network.ensure_bridge(&spec).await {
            tracing::debug!(bridge = spec.name, error = vm::text(&error), "no bridge");
        }
    }
    Surroundings {
        capacity: facts::capacity(shared.config.reserved_memory),
        networks: facts::networks(state, &*shared.drivers.network).await,
        pools: pools
            .into_iter()
            .map(|(name, facts)| (name, facts::pool_report(&facts)))
            .collect(),
    }
}

fn residents(shared: &Shared) -> BTreeMap<VmName, ByteSize> {
    let pids = shared.pids.lock().unwrap_or_else(PoisonError::into_inner);
    let resident = |(vm, pid): (&VmName, &i32)| Some((vm.clone(), facts::resident(*pid)?));
    pids.iter().filter_map(resident).collect()
}

/// A guest that writes a lot to its serial port must not fill the host's disk. QEMU appends, so the
/// file can be cut under it.
fn crop_logs(shared: &Shared, state: &State) {
    const MOST: u64 = 16 << 20;
    for vm in state.vms.keys() {
        let log = shared.layout.serial_log(vm);
        let long = std::fs::metadata(&log).is_ok_and(|meta| meta.len() > MOST);
        if long
            && let Err(error) = std::fs::OpenOptions::new()
                .write(true)
                .open(&log)
                .and_then(|file| file.set_len(0))
        {
            tracing::warn!(%vm, %error, "its serial log cannot be cut");
        }
    }
}
