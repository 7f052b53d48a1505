//! The controller's task.
//!
//! ```text
//!   Idle --elected--> barrier --ok--> Leading (rounds) --not leader any more--> Idle
//! ```
//! One task owns the loop; the heartbeat handler shares only [`Leases`] with it.

use crate::clock::boot_now;
use crate::group::{Group, Leading, ProposeFailure};
use crate::operator::{ControllerError, FenceAnswer, Operator};
use crate::picture::{HostPicture, Picture, VotePicture};
use crate::power::{Finished, Power, PowerSwitch};
use crate::storage::{CutFinished, Storage, StorageGate};
use quorate_controller_logic::{
    Change, HeartbeatReply, HeartbeatRequest, Leases, ServiceMemory, cut_job, next_change,
    next_drain_end, owns_something, restorable, standing,
};
use quorate_membership::{FenceProof, HostHealth, Instant, LeaseProofError, Member};
use quorate_planner::{Input, Seen};
use quorate_state::{Command, Plan, Refusal, State};
use quorate_types::{HostName, Millis, NodeId, ServiceName, VmName};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::{info, warn};

/// Longest time between two rounds.
const IDLE_ROUND: Duration = Duration::from_millis(250);
/// A plan that was refused is not made again sooner than this.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);
/// Time between two looks at the voters.
const VOTERS_EVERY: Millis = Millis(500);
/// Time between two looks at how evenly hosts are loaded.
const ADVISE_EVERY: Millis = Millis::secs(10);
/// Bound for one change of membership.
const VOTERS_DEADLINE: Duration = Duration::from_secs(15);

#[derive(Default)]
pub(crate) struct Shown {
    waiting: BTreeMap<VmName, String>,
    problems: Vec<String>,
    fencing: BTreeMap<HostName, String>,
    proofs: Vec<FenceProof>,
    /// What would even out load, and when that was looked at.
    advice: Option<String>,
    advised: Option<Instant>,
    /// What is wrong with services.
    pub(crate) services: BTreeMap<ServiceName, Vec<String>>,
}

pub(crate) struct Inner {
    me: HostName,
    pub(crate) group: Arc<dyn Group>,
    pub(crate) leases: Mutex<Option<Leases>>,
    pub(crate) shown: Mutex<Shown>,
    wake: Notify,
    operator: mpsc::Sender<Operator>,
}

/// The controller of one host. Cheap to clone.
#[derive(Clone)]
pub struct Controller {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Controller {
    /// Starts the controller's task. It ends when `stop` says so.
    pub fn start(
        me: HostName,
        group: Arc<dyn Group>,
        switch: Arc<dyn PowerSwitch>,
        gate: Arc<dyn StorageGate>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let (operator, orders) = mpsc::channel(16);
        let inner = Arc::new(Inner {
            me,
            group,
            leases: Mutex::new(None),
            shown: Mutex::new(Shown::default()),
            wake: Notify::new(),
            operator,
        });
        let (done, results) = mpsc::channel(64);
        let (cut_done, cuts) = mpsc::channel(64);
        let storage = Storage::new(gate, Arc::clone(&inner.group), cut_done);
        let task = Loop {
            inner: Arc::clone(&inner),
            power: Power::new(switch, done),
            storage,
            services: ServiceMemory::default(),
            operator_proofs: BTreeMap::new(),
            fence_waiters: BTreeMap::new(),
            voters_checked: Instant(0),
            voters_busy: Arc::new(tokio::sync::Semaphore::new(1)),
        };
        tokio::spawn(task.run(orders, results, cuts, stop));
        Self { inner }
    }

    /// Answers a host's heartbeat; `None`: this host does not lead (or not yet).
    pub fn heartbeat(&self, request: HeartbeatRequest) -> Option<HeartbeatReply> {
        let state = self.inner.group.state();
        let now = boot_now();
        let ack = quorum_ack(self.inner.group.as_ref(), now);
        let mut guard = lock(&self.inner.leases);
        let leases = guard.as_mut()?;
        // The table of an earlier term of this very host must not grant: no barrier was passed in this one.
        let leading = *self.inner.group.leadership().borrow();
        if !leading.is_self || leading.term != leases.term {
            return None;
        }
        let (reply, changed) = leases.heartbeat(request, &state, ack, now);
        drop(guard);
        if changed {
            self.inner.wake.notify_one();
        }
        Some(reply)
    }

    /// The picture, if this host leads.
    pub fn picture(&self) -> Option<Picture> {
        let group = &self.inner.group;
        let state = group.state();
        let now = boot_now();
        let guard = lock(&self.inner.leases);
        let leases = guard.as_ref()?;
        let shown = lock(&self.inner.shown);
        let members = group.members();
        let (hosts, witness) = standing(&members, group.node(), &state, leases, now);
        let vote = |(node, member): (NodeId, Member)| {
            let (silent, caught_up) = (member.silent, member.caught_up);
            (node, VotePicture { silent, caught_up })
        };
        let host = |name: &HostName| HostPicture {
            health: leases.table.health(name, now),
            lease_left: leases.table.lease_left(name, now),
            report: leases.reports.get(name).cloned(),
            fencing: shown.fencing.get(name).cloned(),
        };
        Some(Picture {
            leader: self.inner.me.clone(),
            revision: state.revision,
            quorate: leases.table.is_quorate(now),
            term: leases.term,
            voters: members.voters,
            votes: hosts.into_iter().chain(witness).map(vote).collect(),
            hosts: state
                .hosts
                .keys()
                .map(|name| (name.clone(), host(name)))
                .collect(),
            waiting: shown.waiting.clone(),
            problems: shown.problems.clone(),
            advice: shown.advice.clone(),
            services: shown.services.clone(),
        })
    }

    /// All that this leader sees, for questions that are answered elsewhere.
    pub fn seen(&self) -> Option<Seen> {
        let mut seen = self.with_input(Seen::of)?;
        seen.proofs.clone_from(&lock(&self.inner.shown).proofs);
        seen.leader = Some(self.inner.me.clone());
        seen.voters = self.inner.group.members().voters;
        Some(seen)
    }

    /// Runs `look` on the planner's input as it is now, if this host leads.
    pub fn with_input<R>(&self, look: impl FnOnce(&Input<'_>) -> R) -> Option<R> {
        let state = self.inner.group.state();
        let now = boot_now();
        let guard = lock(&self.inner.leases);
        let leases = guard.as_ref()?;
        let health = health_of(leases, &state, now);
        Some(look(&Input {
            state: &state,
            reports: &leases.reports,
            health: &health,
            proofs: &[],
            now,
            memory: &leases.memory,
            settled: leases.settled(&state, now),
        }))
    }

    /// Cuts a host's power now, as `who` asks for. Returns what the agent said.
    pub async fn fence(&self, host: HostName, who: String) -> Result<String, ControllerError> {
        let (answer, result) = oneshot::channel();
        let sent = self
            .inner
            .operator
            .send(Operator::Fence(host, who, answer))
            .await;
        sent.map_err(|_| ControllerError::NotLeader)?;
        result.await.unwrap_or(Err(ControllerError::NotLeader))
    }

    /// Takes an operator's word that a host is dead.
    pub async fn confirm_dead(&self, host: HostName, who: String) -> Result<(), ControllerError> {
        let (answer, result) = oneshot::channel();
        let sent = self
            .inner
            .operator
            .send(Operator::ConfirmDead(host, who, answer))
            .await;
        sent.map_err(|_| ControllerError::NotLeader)?;
        result.await.unwrap_or(Err(ControllerError::NotLeader))
    }
}

fn quorum_ack(group: &dyn Group, now: Instant) -> Option<Instant> {
    let age = group.quorum_ack_age()?;
    // Rounded up, so that the confirmation never looks younger than it is.
    let age = Millis(
        u64::try_from(age.as_millis())
            .unwrap_or(u64::MAX)
            .saturating_add(1),
    );
    Some(now.minus(age))
}

pub(crate) fn health_of(
    leases: &Leases,
    state: &State,
    now: Instant,
) -> BTreeMap<HostName, HostHealth> {
    state
        .hosts
        .keys()
        .map(|name| (name.clone(), leases.table.health(name, now)))
        .collect()
}

pub(crate) struct Loop {
    pub(crate) inner: Arc<Inner>,
    pub(crate) power: Power,
    storage: Storage,
    pub(crate) services: ServiceMemory,
    pub(crate) operator_proofs: BTreeMap<HostName, FenceProof>,
    pub(crate) fence_waiters: BTreeMap<HostName, Vec<FenceAnswer>>,
    voters_checked: Instant,
    voters_busy: Arc<tokio::sync::Semaphore>,
}

impl Loop {
    async fn run(
        mut self,
        mut orders: mpsc::Receiver<Operator>,
        mut results: mpsc::Receiver<Finished>,
        mut cuts: mpsc::Receiver<CutFinished>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut applied = self.inner.group.applied();
        let mut leadership = self.inner.group.leadership();
        let mut pause = IDLE_ROUND;
        loop {
            tokio::select! {
                changed = stop.changed() => if changed.is_err() || *stop.borrow() { return },
                _ = leadership.changed() => {}
                _ = applied.changed() => {}
                () = self.inner.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
                Some(finished) = results.recv() => self.fence_finished(finished),
                Some(finished) = cuts.recv() => self.cut_finished(finished),
                Some(order) = orders.recv() => self.operator(order),
            }
            let leading = *leadership.borrow_and_update();
            applied.borrow_and_update();
            if !self.follow_leadership(leading).await {
                pause = IDLE_ROUND;
                continue;
            }
            let refused = self.round().await;
            pause = if refused {
                REFUSED_PAUSE
            } else {
                self.next_pause()
            };
        }
    }

    fn cut_finished(&mut self, finished: CutFinished) {
        let known = self.storage.finished(finished, boot_now());
        if !known && let Some(leases) = lock(&self.inner.leases).as_mut() {
            leases.uncertain = true;
        }
    }

    /// Returns whether this host leads and has its table.
    async fn follow_leadership(&mut self, leading: Leading) -> bool {
        let have = lock(&self.inner.leases).as_ref().map(|leases| leases.term);
        if have == Some(leading.term) {
            // The table stays for the whole term, also while no majority answers: seals must not be lost.
            return leading.is_self;
        }
        if have.is_some() {
            info!(term = leading.term, "another term: leases start anew");
            self.forget_everything();
        }
        if !leading.is_self {
            return false;
        }
        // Commands of earlier terms must be applied before anything is granted on their outcome.
        if let Err(error) = self.inner.group.barrier().await {
            warn!(%error, "elected, but no majority confirms it yet");
            return false;
        }
        if *self.inner.group.leadership().borrow() != leading {
            return false;
        }
        let state = self.inner.group.state();
        let now = boot_now();
        // Asked after the clock was read: what passes in between makes the bound later, not earlier.
        let silent = self.inner.group.predecessors_silent_for();
        let silent = Millis(u64::try_from(silent.as_millis()).unwrap_or(u64::MAX));
        *lock(&self.inner.leases) = Some(Leases::new(leading.term, &state, silent, now));
        info!(
            term = leading.term,
            silent_ms = silent.0,
            "leading; no earlier leader had a majority for so long"
        );
        true
    }

    fn forget_everything(&mut self) {
        *lock(&self.inner.leases) = None;
        *lock(&self.inner.shown) = Shown::default();
        self.power.forget_all();
        self.storage.forget_all();
        self.services = ServiceMemory::default();
        self.operator_proofs.clear();
        self.fence_waiters.clear();
    }

    fn next_pause(&self) -> Duration {
        let now = boot_now();
        let guard = lock(&self.inner.leases);
        let expiry = guard
            .as_ref()
            .and_then(|leases| leases.table.next_expiry(now));
        let due = guard
            .as_ref()
            .and_then(|leases| leases.memory.next_due(now));
        let drained = next_drain_end(&self.inner.group.state(), &self.services, now);
        let until = expiry.into_iter().chain(due).chain(drained).min();
        let until = until.map_or(IDLE_ROUND, |at| {
            at.since(now).as_duration() + Duration::from_millis(1)
        });
        until.min(IDLE_ROUND)
    }

    /// One look, one plan, one commit. Returns whether the plan was refused.
    async fn round(&mut self) -> bool {
        let state = self.inner.group.state();
        let now = boot_now();
        let Some(look) = self.look(&state, now) else {
            return false;
        };
        self.look_at_voters(&state, now);
        let refused = self.serve(&state, now).await;
        for (host, armed) in look.armed {
            let command = Command::RecordArmed { host, armed };
            if let Err(error) = self.inner.group.propose("controller", command).await {
                warn!(%error, "cannot record a host's guard and watchdog");
            }
        }
        if look.plan.actions.is_empty() && !look.uncertain {
            return refused;
        }
        // An empty plan settles an unknown outcome: once it is applied, or refused, so is all that came before it.
        self.commit(look.plan).await
    }

    async fn commit(&mut self, plan: Plan) -> bool {
        for planned in &plan.actions {
            info!(action = %planned.action.describe(), reason = %planned.reason.summary, "plan");
        }
        let result = self
            .inner
            .group
            .propose("planner", Command::CommitPlan(plan))
            .await;
        let mut guard = lock(&self.inner.leases);
        let Some(leases) = guard.as_mut() else {
            return false;
        };
        match result {
            Ok(_) => {
                leases.uncertain = false;
                false
            }
            Err(ProposeFailure::Refused(refusal)) => {
                leases.uncertain = false;
                if !matches!(refusal, Refusal::Stale { .. }) {
                    warn!(%refusal, "the state machine refused a plan");
                }
                true
            }
            Err(ProposeFailure::NotDone(error) | ProposeFailure::TooLarge(error)) => {
                warn!(error, "a plan was not committed");
                true
            }
            Err(ProposeFailure::Unknown(error)) => {
                warn!(
                    error,
                    "a plan's outcome is unknown: hosts that it declared dead get no lease until it is known"
                );
                leases.uncertain = true;
                true
            }
        }
    }

    fn look(&mut self, state: &State, now: Instant) -> Option<Look> {
        let inner = Arc::clone(&self.inner);
        let mut guard = lock(&inner.leases);
        let leases = guard.as_mut()?;
        leases
            .table
            .configure(&state.settings(), state.hosts.keys(), now);
        leases
            .reports
            .retain(|host, _| state.hosts.contains_key(host));
        if let Some(ack) = quorum_ack(self.inner.group.as_ref(), now) {
            leases.table.quorum_confirmed(ack);
        }
        let busy = |host: &HostName| self.power.running(host) || self.storage.running(host);
        for host in leases.unseal_settled(state, now, busy) {
            // It gets leases again: what was proven before says nothing about it from now on.
            self.power.forget(&host);
            self.storage.forget(&host);
            self.operator_proofs.remove(&host);
        }
        if !leases.table.is_quorate(now) {
            return None;
        }
        let mut problems = Vec::new();
        let proofs = self.collect_proofs(leases, state, now, &mut problems);
        let health = health_of(leases, state, now);
        let taken_back = restorable(state, &leases.reports, |host| {
            leases.table.health(host, now)
        });
        self.storage.keep(taken_back, leases.term, now);
        let settled = leases.settled(state, now);
        leases.memory.observe(state, &leases.reports, now);
        let input = Input {
            state,
            reports: &leases.reports,
            health: &health,
            proofs: &proofs,
            now,
            memory: &leases.memory,
            settled,
        };
        // Code of its own looks at every plan before it is committed; what would break a promise is
        // left out, and people are told.
        let (plan, broken) = quorate_planner::checked(&input, quorate_planner::plan(&input));
        for violation in broken {
            tracing::error!(%violation, "a planned action was held back");
            problems.push(format!("a planned action was held back: {violation}"));
        }
        let waiting = quorate_planner::waiting(&input);
        let armed = leases.armed_changes(state);
        let uncertain = leases.uncertain;
        let fencing = state
            .hosts
            .keys()
            .filter_map(|host| Some((host.clone(), self.power.problem(host)?.to_owned())));
        let mut shown = lock(&self.inner.shown);
        let due = shown.advised.is_none_or(|at| now.since(at) >= ADVISE_EVERY);
        let (advised, advice) = match due {
            true => (Some(now), quorate_planner::balance(&input).headline()),
            false => (shown.advised, shown.advice.take()),
        };
        *shown = Shown {
            services: std::mem::take(&mut shown.services),
            waiting,
            problems,
            fencing: fencing.collect(),
            proofs: proofs.clone(),
            advice,
            advised,
        };
        drop(shown);
        Some(Look {
            plan,
            armed,
            uncertain,
        })
    }

    /// Proofs about hosts that are silent and own something; starts power fencing where a lease proves nothing.
    fn collect_proofs(
        &mut self,
        leases: &mut Leases,
        state: &State,
        now: Instant,
        problems: &mut Vec<String>,
    ) -> Vec<FenceProof> {
        let mut proofs = Vec::new();
        let settings = state.settings();
        for host in state.hosts.keys() {
            if !owns_something(state, host) {
                self.power.forget(host);
                self.storage.forget(host);
                self.operator_proofs.remove(host);
                continue;
            }
            proofs.extend(self.operator_proofs.get(host).cloned());
            let health = leases.table.health(host, now);
            if health < HostHealth::Expired {
                continue;
            }
            let by_storage = self.cut_storage(leases, state, host, now, problems);
            let record = state.hosts.get(host).and_then(|record| record.armed);
            match leases.table.lease_expired(host, record, now) {
                Ok(proof) => {
                    leases.sealed_at.entry(host.clone()).or_insert(now);
                    proofs.push(proof);
                }
                Err(LeaseProofError::Proof(_)) => {}
                Err(LeaseProofError::NotArmed { .. }) if by_storage => {}
                Err(error @ LeaseProofError::NotArmed { .. }) => {
                    let devices = settings.fencing.get(host).map_or(&[][..], Vec::as_slice);
                    if devices.is_empty() {
                        problems.push(error.to_string());
                    } else if let Err(share) = leases.table.check_share(host, now) {
                        problems.push(share.to_string());
                    } else if self.power.start(host, devices, now) {
                        info!(%host, "silent: cutting its power");
                        leases.table.count_fenced(host, now);
                        leases.table.seal(host);
                        leases.sealed_at.entry(host.clone()).or_insert(now);
                    }
                }
                Err(error) => problems.push(error.to_string()),
            }
            if let Some(why) = self.power.problem(host) {
                // It says what to do, `quorate host confirm-dead` among it.
                problems.push(format!("cannot prove that {host} is off: {why}"));
            }
        }
        proofs.extend(self.power.proofs().cloned());
        proofs.extend(self.storage.proofs().cloned());
        problems.extend(self.storage.problems());
        proofs
    }

    /// The lease of `host` has run out: takes the disks of its VMs away where that is possible. Returns whether
    /// everything it may run is dealt with that way.
    fn cut_storage(
        &mut self,
        leases: &mut Leases,
        state: &State,
        host: &HostName,
        now: Instant,
        problems: &mut Vec<String>,
    ) -> bool {
        let Some(job) = cut_job(state, host) else {
            return false;
        };
        let complete = job.complete;
        if let Err(share) = leases.table.check_share(host, now) {
            problems.push(share.to_string());
            return complete;
        }
        if self.storage.start(job, now) {
            info!(%host, "silent: its access to storage is taken away");
            leases.table.count_fenced(host, now);
            leases.table.seal(host);
            leases.sealed_at.entry(host.clone()).or_insert(now);
        }
        complete && self.storage.is_at_it(host)
    }

    /// Changes of membership run beside the loop, one at a time: they wait for other hosts.
    fn look_at_voters(&mut self, state: &State, now: Instant) {
        if now.since(self.voters_checked) < VOTERS_EVERY {
            return;
        }
        self.voters_checked = now;
        let Ok(permit) = Arc::clone(&self.voters_busy).try_acquire_owned() else {
            return;
        };
        let change = {
            let guard = lock(&self.inner.leases);
            let Some(leases) = guard.as_ref() else { return };
            let group = &self.inner.group;
            next_change(&group.members(), group.node(), state, leases, now)
        };
        let Some(change) = change else { return };
        let group = Arc::clone(&self.inner.group);
        tokio::spawn(async move {
            info!(?change, "membership");
            let work = async {
                match change {
                    Change::AddLearner(node) => group.add_learner(node).await,
                    Change::Voters(voters) => group.change_voters(voters).await,
                    Change::Remove(node) => group.remove_node(node).await,
                }
            };
            match tokio::time::timeout(VOTERS_DEADLINE, work).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(error, "membership change failed"),
                Err(_) => warn!("membership change took too long"),
            }
            drop(permit);
        });
    }
}

struct Look {
    plan: Plan,
    armed: Vec<(HostName, Option<Millis>)>,
    /// The outcome of an earlier commit is not known.
    uncertain: bool,
}
