//! Services on this host: keeps the datapath as the state wants it, and says what it holds.
//!
//! ```text
//! state --wanted (pure)--> datapath.apply --> announcer, groups, speaker
//!                                |                                              edges (with the VMs' taps)
//!                                +-- next ring held --> strays --pins--> all directors --> `prepared` is reported
//! health checks of local members, duplicates heard ------------------------------------> report
//! ```
//! Owns: the datapath's contents, the edges on taps ([`edges`]), health checks ([`health`]), how packets are attracted
//! ([`attract`]). Always holds: an epoch is reported only when the datapath steers by it, and a coming one only when
//! the flows that it would strand are pinned at every director; a VM starts, runs and migrates whatever goes wrong here. An
//! agent that was started anew leaves the datapath as it is until its replica has reached the revision of a grant: an
//! older one would take tables and the address back in time while the lease still runs. A datapath that refuses the
//! tables gets no longer lease until it takes them ([`lease`]): it goes silent by itself, and only then is it said to steer
//! nothing.
//!
//! Must not: decide who is a member, healthy or holder; extend a lease: [`Services::lease`] is told by the host's task.

mod attract;
pub(crate) mod edges;
mod health;
mod lease;
mod pins;
mod refusing;
mod report;
mod tls;
mod wanted;

pub use refusing::RefusingDatapath;

use crate::guard::sys::boottime_ns;
use crate::host::Message;
use crate::vm::{Shared, text};
use attract::Attract;
use health::{Checkers, Life};
use lease::Lease;
use pins::Pins;
use quorate_balancer::{Applied, Counters, Datapath, EdgeSpec, Wanted};
use quorate_network::attract::bgp::watch::Desk;
use quorate_state::State;
use quorate_types::service::MemberReport;
use quorate_types::{Revision, ServiceName, VmName};
use report::Recent;
pub(crate) use report::Reports;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Between two looks at what changes without the state.
const TICK: Duration = Duration::from_millis(200);
/// Between two tries of a datapath that refuses: several before its lease ends.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two looks at its counters.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// What the tasks of services and of VMs share.
pub(crate) struct Services {
    pub(crate) datapath: Arc<dyn Datapath>,
    /// Edges by tap.
    edges: Mutex<BTreeMap<String, EdgeSpec>>,
    /// Edges that could not be had, by tap.
    edge_problems: Mutex<BTreeMap<String, String>>,
    /// Guests that run here, or are stopped.
    lives: Mutex<BTreeMap<VmName, Life>>,
    /// What health checks came to.
    checks: Mutex<BTreeMap<(ServiceName, VmName), MemberReport>>,
    /// What of coming rings is pinned everywhere.
    pins: Pins,
    /// Why addresses are not announced.
    attract_problem: Mutex<Option<String>>,
    /// Why the last announcement could not be sent.
    send_problem: Mutex<Option<String>>,
    /// Something of the above is new.
    news: Notify,
    /// The leader's revision with the first grant of this agent's life; 0: none yet.
    granted: AtomicU64,
    desk: Option<Desk>,
    /// A speaker announces addresses: its watcher must know the lease.
    speaking: AtomicBool,
    lease: Mutex<Lease>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Services {
    /// With nothing attached; `dir` is for the files of BGP speakers.
    pub(crate) fn new(datapath: Arc<dyn Datapath>, dir: &std::path::Path) -> Self {
        let desk = Desk::open(dir);
        if let Err(error) = &desk {
            tracing::warn!(dir = %dir.display(), %error, "no speaker can be run");
        }
        Self {
            datapath,
            edges: Mutex::default(),
            edge_problems: Mutex::default(),
            lives: Mutex::default(),
            checks: Mutex::default(),
            pins: Pins::default(),
            attract_problem: Mutex::default(),
            send_problem: Mutex::default(),
            news: Notify::new(),
            granted: AtomicU64::new(0),
            desk: desk.ok(),
            speaking: AtomicBool::new(false),
            lease: Mutex::default(),
        }
    }

    /// Until when this host may serve, and the revision that it has to have reached.
    pub(crate) fn lease(&self, deadline_ns: u64, fresh_from: Revision) {
        let mut lease = lock(&self.lease);
        lease.grant(deadline_ns, fresh_from);
        self.extend(&mut lease);
    }

    /// The datapath holds the tables of this revision.
    fn holds(&self, revision: Revision) {
        let mut lease = lock(&self.lease);
        lease.holds(revision);
        self.extend(&mut lease);
    }

    /// The datapath has refused its tables: its lease is not made longer. Returns when it will have gone silent.
    fn withhold(&self) -> u64 {
        lock(&self.lease).withhold()
    }

    fn extend(&self, lease: &mut Lease) {
        let Some(deadline_ns) = lease.due(boottime_ns()) else {
            return;
        };
        // The negative control of the lab: its checks must find a datapath that looks at no lease.
        let unchecked = cfg!(debug_assertions)
            && std::env::var_os("QUORATE_TEST_WITHOUT_LEASE_CHECK").is_some();
        self.datapath
            .lease(if unchecked { u64::MAX } else { deadline_ns });
        if self.speaking.load(Ordering::Relaxed)
            && let Some(desk) = &self.desk
            && let Err(error) = desk.lease(deadline_ns)
        {
            tracing::warn!(%error, "the speaker's watcher is not told the lease");
        }
    }

    /// A lease was granted by a leader that had applied this.
    pub(crate) fn granted(&self, revision: Revision) {
        let first =
            self.granted
                .compare_exchange(0, revision.0, Ordering::SeqCst, Ordering::SeqCst);
        if first.is_ok() {
            self.news.notify_one();
        }
    }

    /// Whether the replica is not older than what the leader knew when it granted a lease.
    fn is_current(&self, state: &State) -> bool {
        let granted = self.granted.load(Ordering::SeqCst);
        granted > 0 && state.revision.0 >= granted
    }

    /// The guest's CPUs run, or not. Health checks follow.
    pub(crate) fn note_running(&self, vm: &VmName, running: bool) {
        let life = Life::new(running);
        lock(&self.lives).insert(vm.clone(), life);
    }

    /// The guest has no process here any more.
    pub(crate) fn note_gone(&self, vm: &VmName) {
        lock(&self.lives).remove(vm);
        lock(&self.checks).retain(|(_, member), _| member != vm);
    }
}

/// Works for the life of the agent.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut state = shared.state.clone();
    let mut task = Task {
        attract: Attract::start(&shared),
        shared,
        wanted: Wanted::default(),
        applied: Applied::default(),
        at: None,
        problem: None,
        silent_ns: 0,
        tried: None,
        counters: Counters::default(),
        counted: None,
        offences: Recent::default(),
        checkers: Checkers::default(),
        pins: pins::Exchanges::default(),
        last: None,
        current: false,
    };
    loop {
        let now = state.borrow_and_update().clone();
        task.look(&now).await;
        let shared = task.shared.clone();
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return;
            },
            () = shared.services.news.notified() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }
}

struct Task {
    shared: Arc<Shared>,
    wanted: Wanted,
    applied: Applied,
    /// The state that `wanted` was made of.
    at: Option<Revision>,
    /// Why the datapath does not hold what it should.
    problem: Option<String>,
    /// When it is silent for certain because of that.
    silent_ns: u64,
    tried: Option<Instant>,
    counters: Counters,
    counted: Option<Instant>,
    offences: Recent,
    checkers: Checkers,
    pins: pins::Exchanges,
    attract: Attract,
    last: Option<Reports>,
    /// The replica has caught up, once.
    current: bool,
}

impl Task {
    async fn look(&mut self, state: &State) {
        if !self.current {
            if !self.shared.services.is_current(state) {
                return;
            }
            self.current = true;
            edges::adopt(&self.shared).await;
        }
        let me = &self.shared.config.host;
        let mut due = self.problem.is_some() && self.tried.is_none_or(|at| at.elapsed() >= AGAIN);
        if self.at != Some(state.revision) {
            let wanted = quorate_agent_logic::services_wanted(state, me);
            // An earlier agent may have left something where nothing is wanted now.
            due |= self.at.is_none() || wanted != self.wanted;
            self.at = Some(state.revision);
            self.wanted = wanted;
            edges::keep(&self.shared, state).await;
        }
        if due {
            self.apply().await;
            // What the datapath does not hold must not be announced.
            if self.problem.is_none() {
                self.attract.set(&self.shared, state, &self.wanted);
            }
        }
        if self.problem.is_none() {
            self.shared.services.holds(state.revision);
        }
        self.pins
            .keep(&self.shared, state, &self.wanted, &self.applied);
        self.checkers.keep(&self.shared, state);
        let counts =
            !self.wanted.services.is_empty() || !lock(&self.shared.services.edges).is_empty();
        if counts && self.counted.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.counted = Some(Instant::now());
            match self.shared.services.datapath.counters().await {
                Ok(counters) => {
                    self.offences.note(&counters);
                    self.counters = counters;
                }
                Err(error) => tracing::debug!(error = text(&error), "no counters"),
            }
        }
        self.attract.keep_speaker(&self.shared);
        self.report(state).await;
    }

    async fn apply(&mut self) {
        self.tried = Some(Instant::now());
        let datapath = &self.shared.services.datapath;
        match datapath.apply(&self.wanted).await {
            Ok(applied) => {
                self.applied = applied;
                self.problem = None;
            }
            Err(error) => {
                let problem = text(&error);
                if self.problem.is_none() {
                    self.silent_ns = self.shared.services.withhold();
                }
                if self.problem.as_ref() != Some(&problem) {
                    tracing::error!(problem, "the service datapath");
                }
                self.problem = Some(problem);
            }
        }
    }

    async fn report(&mut self, state: &State) {
        let now = boottime_ns();
        let lease_good = self.shared.deadline_ns.load(Ordering::Relaxed) > now;
        let silent = self.problem.is_some() && now >= self.silent_ns;
        let seen = report::Seen {
            state,
            wanted: &self.wanted,
            applied: &self.applied,
            problem: self.problem.as_deref(),
            silent,
            offences: &self.offences,
            counters: &self.counters,
            services: &self.shared.services,
            lease_good,
        };
        let mut report = seen.report();
        report::count_drains(&self.shared, state, &mut report).await;
        if self.last.as_ref() != Some(&report) {
            self.last = Some(report.clone());
            let _ = self.shared.inbox.send(Message::Services(report)).await;
        }
    }
}
