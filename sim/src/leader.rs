//! The leader's loop in a thin, deterministic form, around the leader's decisions
//! (`quorate-controller-logic`, the planner), which are production's.
//!
//! ```text
//!   heartbeat --> Leases --> grant          Round: unseal -> proofs -> plan -> commit -> (applied) -> Round
//! ```
//! Always holds, as in the controller: nothing is granted before an entry of the leader's own term is
//! applied here; one commit at a time; a commit whose outcome is not known keeps all seals.

use crate::doors::cut_due;
use crate::event::{D, Event, HostId, W};
use crate::mutate::Mutation;
use crate::power::Attempt;
use crate::raft::{Data, Role};
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_controller_logic::{
    Change, Cuts, GroupMembers, HeartbeatReply, HeartbeatRequest, Keeping, Leases, ServiceMemory,
    fence_again_after, next_change, next_drain_end, owns_something,
};
use quorate_membership::{
    Evidence, FenceProof, HostHealth, Instant, LeaseProofError, PowerOffEvidence,
};
use quorate_planner::Input;
use quorate_state::{Command, Envelope, FORMAT, State, Witness};
use quorate_types::{HostName, Millis, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const IDLE_ROUND: u64 = 250 * MS;
const REFUSED_PAUSE: u64 = 100 * MS;
const VOTERS_EVERY: u64 = 500 * MS;
const PROPOSAL_TIMEOUT: u64 = 5 * SEC;

/// Why something was proposed.
#[derive(Debug, Clone)]
pub(crate) enum Purpose {
    /// The controller waits for it.
    Plan,
    Armed,
    /// An operator waits for it.
    Operator(String),
    /// A task at the doors of the SAN waits for it.
    Task(u64),
    /// Changes of services; these hosts were sealed for it.
    Services(Vec<HostName>),
}

/// What one daemon knows as a leader.
#[derive(Default)]
pub(crate) struct Leader {
    pub(crate) leases: Option<Leases>,
    pub(crate) attempts: BTreeMap<HostId, (u32, Attempt)>,
    pub(crate) operator_proofs: BTreeMap<HostName, FenceProof>,
    pub(crate) cuts: Cuts,
    pub(crate) keeping: Keeping,
    pub(crate) services: ServiceMemory,
    /// The changes of services that are under way.
    pub(crate) serving: Option<usize>,
    /// After a refusal nothing is tried again before.
    pub(crate) serve_at: u64,
    busy: Option<usize>,
    pub(crate) pending: BTreeMap<usize, (u64, Purpose)>,
    round_at: u64,
    voters_at: u64,
    /// Counts leaderships: results of fence agents that an earlier one began are not looked at.
    pub(crate) generation: u64,
    pub(crate) waiting: BTreeMap<quorate_types::VmName, String>,
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leader")
            .field("busy", &self.busy)
            .finish_non_exhaustive()
    }
}

impl World {
    /// The host whose daemon leads and knows it.
    pub(crate) fn leading(&self) -> Option<HostId> {
        (0..self.hosts.len()).find(|host| {
            let at = &self.hosts[*host];
            at.on && !at.witness && at.daemon.is_some() && at.raft.leads(at.local(self.now).0)
        })
    }

    pub(crate) fn quorum_ack(&self, host: HostId) -> Option<Instant> {
        let at = &self.hosts[host];
        let now = at.local(self.now);
        if self.mutated(Mutation::GrantWithoutQuorum) && at.raft.role == Role::Leader {
            return Some(now);
        }
        // Rounded as the controller does it.
        at.raft
            .quorum_ack(now.0)
            .map(|at| Instant(at).minus(Millis(1)))
    }

    pub(crate) fn leader_heartbeat(
        &mut self,
        host: HostId,
        request: HeartbeatRequest,
    ) -> Option<HeartbeatReply> {
        let ack = self.quorum_ack(host);
        let stale = self.mutated(Mutation::StaleMigrationId);
        let free = self.mutated(Mutation::GrantWithoutQuorum);
        let at = &mut self.hosts[host];
        let now = at.local(self.now);
        let leads = at.raft.leads(now.0) || (free && at.raft.role == Role::Leader);
        let daemon = at.daemon.as_mut()?;
        let term = at.raft.term;
        let leases = daemon.leader.leases.as_mut();
        let leases = leases.filter(|leases| leads && leases.term == term)?;
        let mut request = request;
        if stale && let Some(report) = request.report.as_mut() {
            forge_ids(&daemon.state, report);
        }
        let state = Arc::clone(&daemon.state);
        let (reply, changed) = leases.heartbeat(request, &state, ack, now);
        if changed {
            self.request_round(host, MS / 5);
        }
        Some(reply)
    }

    /// Asks for a look of the controller.
    pub(crate) fn request_round(&mut self, host: HostId, delay: u64) {
        let at = self.now + delay;
        let inc = self.hosts[host].daemon_inc;
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let round = &mut daemon.leader.round_at;
        if *round <= self.now || at < *round {
            *round = at.max(self.now + 1);
            let at = *round;
            self.queue.push(at, Event::Daemon(host, inc, D::Round));
        }
    }

    pub(crate) fn round_due(&mut self, host: HostId) {
        // A witness runs no controller: it grants nothing and proposes nothing.
        if self.hosts[host].witness {
            return;
        }
        let now = self.now;
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        if daemon.leader.round_at > now {
            return;
        }
        if !self.follow_leadership(host) {
            if self.hosts[host].raft.role == Role::Leader {
                self.request_round(host, IDLE_ROUND);
            }
            return;
        }
        let busy = self.hosts[host]
            .daemon
            .as_ref()
            .is_some_and(|d| d.leader.busy.is_some());
        if !busy {
            self.round(host);
        }
        let pause = self.next_pause(host);
        self.request_round(host, pause);
    }

    /// Returns whether the host leads and has its table.
    fn follow_leadership(&mut self, host: HostId) -> bool {
        let at = &self.hosts[host];
        let local = at.local(self.now);
        let free = self.mutated(Mutation::GrantWithoutQuorum);
        let leads = at.raft.leads(local.0) || (free && at.raft.role == Role::Leader);
        let (term, first) = (at.raft.term, at.raft.first);
        let quiet_since = at.raft.quiet_since();
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return false;
        };
        let have = daemon.leader.leases.as_ref().map(|leases| leases.term);
        if have == Some(term) {
            return leads;
        }
        if have.is_some() {
            daemon.leader = Leader {
                round_at: daemon.leader.round_at,
                generation: daemon.leader.generation + 1,
                ..Leader::default()
            };
        }
        // The barrier: an entry of its own term is applied here.
        let passed = daemon.applied >= first || self.mutation == Some(Mutation::NoBarrier);
        if !leads || !passed {
            return false;
        }
        let mut since = local;
        let mut silent = Millis(local.0.saturating_sub(quiet_since) / MS);
        if self.mutation == Some(Mutation::VotersHeardNobody) {
            silent = Millis::secs(10);
        }
        if self.mutation == Some(Mutation::NoWaitAfterElection) {
            since = local.minus(Millis::secs(10));
        }
        daemon.leader.leases = Some(Leases::new(term, &daemon.state, silent, since));
        self.check_leader(host);
        true
    }

    fn next_pause(&self, host: HostId) -> u64 {
        let at = &self.hosts[host];
        let now = at.local(self.now);
        let leases = at.daemon.as_ref().and_then(|d| d.leader.leases.as_ref());
        let expiry = leases.and_then(|leases| leases.table.next_expiry(now));
        let due = leases.and_then(|leases| leases.memory.next_due(now));
        let leader = at.daemon.as_ref().map(|d| (&d.state, &d.leader.services));
        let drained = leader.and_then(|(state, memory)| next_drain_end(state, memory, now));
        let until = expiry.into_iter().chain(due).chain(drained).min();
        until
            .map_or(IDLE_ROUND, |at| at.since(now).0 * MS + MS)
            .min(IDLE_ROUND)
    }

    /// One look, one plan, one commit.
    fn round(&mut self, host: HostId) {
        let ack = self.quorum_ack(host);
        let now = self.hosts[host].local(self.now);
        let mut running = self.being_fenced(host);
        running.extend(self.losing_addresses(host));
        let names: BTreeMap<HostName, HostId> = (0..self.hosts.len())
            .map(|at| (self.hosts[at].name.clone(), at))
            .collect();
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let state = Arc::clone(&daemon.state);
        let leader = &mut daemon.leader;
        let Some(leases) = leader.leases.as_mut() else {
            return;
        };
        leases
            .table
            .configure(&state.settings(), state.hosts.keys(), now);
        leases
            .reports
            .retain(|name, _| state.hosts.contains_key(name));
        if let Some(ack) = ack {
            leases.table.quorum_confirmed(ack);
        }
        let cuts = &leader.cuts;
        let busy = |name: &HostName| running.contains(name) || cuts.running(name);
        for name in leases.unseal_settled(&state, now, busy) {
            leader.cuts.forget(&name);
            leader.operator_proofs.remove(&name);
            if let Some(host) = names.get(&name) {
                forget_attempt(&mut leader.attempts, *host);
            }
        }
        if !leases.table.is_quorate(now) {
            return;
        }
        let proofs = self.collect_proofs(host, &state, now);
        self.keep_doors(host, &state, now);
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let Some(leases) = daemon.leader.leases.as_mut() else {
            return;
        };
        leases.memory.observe(&state, &leases.reports, now);
        let health = state
            .hosts
            .keys()
            .map(|name| (name.clone(), leases.table.health(name, now)));
        let health = health.collect();
        let input = Input {
            state: &state,
            reports: &leases.reports,
            health: &health,
            proofs: &proofs,
            now,
            memory: &leases.memory,
            settled: leases.settled(&state, now),
        };
        let (plan, broken) = quorate_planner::checked(&input, quorate_planner::plan(&input));
        if self.setup.want_waiting {
            daemon.leader.waiting = quorate_planner::waiting(&input);
        }
        let armed = leases.armed_changes(&state);
        let uncertain = leases.uncertain;
        if let Some(first) = broken.first() {
            self.fail("linted", format!("the planner broke a promise: {first}"));
        }
        self.look_at_voters(host, &state, now);
        self.serve(host, &state, now);
        for (name, armed) in armed {
            let command = Command::RecordArmed { host: name, armed };
            self.propose(host, "controller", command, Purpose::Armed);
        }
        // An empty one settles an unknown outcome.
        if uncertain || !plan.actions.is_empty() {
            self.propose(host, "planner", Command::CommitPlan(plan), Purpose::Plan);
        }
    }

    /// Hosts whose power is being cut right now.
    fn being_fenced(&self, me: HostId) -> BTreeSet<HostName> {
        let attempts = self.hosts[me].daemon.as_ref().map(|d| &d.leader.attempts);
        let attempts = attempts.into_iter().flatten();
        let running = attempts.filter(|(_, (_, attempt))| matches!(attempt, Attempt::Running));
        running
            .map(|(host, _)| self.hosts[*host].name.clone())
            .collect()
    }

    fn collect_proofs(&mut self, me: HostId, state: &State, now: Instant) -> Vec<FenceProof> {
        let mut proofs = Vec::new();
        let settings = state.settings();
        let (mut cut, mut jobs) = (Vec::new(), Vec::new());
        for (name, record) in &state.hosts {
            let Some(host) = self.host_id(name) else {
                continue;
            };
            let hasty = self.mutated(Mutation::StartWithoutProof);
            let no_seal = self.mutated(Mutation::NoSeal);
            let Some(daemon) = self.hosts[me].daemon.as_mut() else {
                return proofs;
            };
            let leader = &mut daemon.leader;
            let Some(leases) = leader.leases.as_mut() else {
                return proofs;
            };
            if !owns_something(state, name) {
                forget_attempt(&mut leader.attempts, host);
                leader.cuts.forget(name);
                leader.operator_proofs.remove(name);
                continue;
            }
            proofs.extend(leader.operator_proofs.get(name).cloned());
            let health = leases.table.health(name, now);
            if hasty && health >= HostHealth::Suspect {
                let evidence = Evidence::Operator {
                    who: "nobody".into(),
                };
                proofs.extend(FenceProof::from_evidence(name.clone(), evidence).ok());
            }
            if health < HostHealth::Expired {
                continue;
            }
            let (job, by_storage) = cut_due(leases, &mut leader.cuts, state, name, now);
            jobs.extend(job);
            match leases.table.lease_expired(name, record.armed, now) {
                Ok(proof) => {
                    leases.sealed_at.entry(name.clone()).or_insert(now);
                    if no_seal {
                        leases.table.unseal(name);
                    }
                    proofs.push(proof);
                }
                Err(LeaseProofError::NotArmed { .. }) if by_storage => {}
                Err(LeaseProofError::NotArmed { .. }) => {
                    let device = settings
                        .fencing
                        .get(name)
                        .is_some_and(|all| !all.is_empty());
                    let share = leases.table.check_share(name, now);
                    if device && share.is_ok() && may_try(&leader.attempts, host, now) {
                        leases.table.seal(name);
                        leases.sealed_at.entry(name.clone()).or_insert(now);
                        cut.push(host);
                    }
                }
                Err(_) => {}
            }
        }
        for host in cut {
            self.begin_fencing(me, host);
        }
        for job in jobs {
            self.begin_cut(me, job);
        }
        let leader = self.hosts[me].daemon.as_ref().map(|d| &d.leader);
        proofs.extend(leader.into_iter().flat_map(|l| l.cuts.proofs().cloned()));
        let attempts = leader.map(|leader| &leader.attempts);
        let off = attempts
            .into_iter()
            .flatten()
            .filter_map(|(_, (_, attempt))| match attempt {
                Attempt::Off(proof) => Some(proof.clone()),
                _ => None,
            });
        proofs.extend(off);
        proofs
    }

    /// An operator may have a host fenced again, but not twice at a time.
    pub(crate) fn may_fence(&mut self, me: HostId, host: HostId) -> bool {
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return false;
        };
        forget_attempt(&mut daemon.leader.attempts, host);
        !daemon.leader.attempts.contains_key(&host)
    }

    /// Runs a fence agent beside the loop.
    pub(crate) fn begin_fencing(&mut self, me: HostId, host: HostId) {
        let name = self.hosts[host].name.clone();
        self.note(|| format!("{name}: its power is being cut"));
        if let Some(daemon) = self.hosts[me].daemon.as_mut() {
            let tries = daemon.leader.attempts.get(&host).map_or(0, |(n, _)| *n);
            daemon
                .leader
                .attempts
                .insert(host, (tries + 1, Attempt::Running));
        }
        let generation = self.hosts[me]
            .daemon
            .as_ref()
            .map_or(0, |d| d.leader.generation);
        let bmc = self.bmcs[host];
        if bmc.dead || self.rng.chance(bmc.fail_permille) {
            let result = Err("the fence device does not answer".to_owned());
            let done = D::FenceDone {
                host,
                generation,
                result,
            };
            return self.daemon_after(me, bmc.delay, done);
        }
        self.after(bmc.delay / 2, Event::World(W::BmcOff(host)));
        let result = Ok(PowerOffEvidence {
            agent: "fence_sim".into(),
            off_accepted: true,
            status_after: "off".into(),
            took: Millis(bmc.delay / MS),
        });
        let done = D::FenceDone {
            host,
            generation,
            result,
        };
        self.daemon_after(me, bmc.delay, done);
    }

    pub(crate) fn fence_done(
        &mut self,
        me: HostId,
        host: HostId,
        generation: u64,
        result: Result<PowerOffEvidence, String>,
    ) {
        let (name, on) = (self.hosts[host].name.clone(), self.hosts[host].on);
        let now = self.hosts[me].local(self.now);
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return;
        };
        if daemon.leader.generation != generation {
            return;
        }
        let tries = daemon.leader.attempts.get(&host).map_or(1, |(n, _)| *n);
        let proof = result.and_then(|mut evidence| {
            // The status is asked for last.
            if on {
                evidence.status_after = "on".into();
            }
            let evidence = Evidence::Power(evidence);
            FenceProof::from_evidence(name.clone(), evidence).map_err(|error| error.to_string())
        });
        let attempt = match proof {
            Ok(proof) => Attempt::Off(proof),
            Err(_) => Attempt::Failed { at: now },
        };
        daemon.leader.attempts.insert(host, (tries, attempt));
        self.request_round(me, 0);
    }

    /// Appends a command on a leader.
    pub(crate) fn propose(&mut self, host: HostId, by: &str, command: Command, why: Purpose) {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(self.now / MS),
            by: by.to_owned(),
            command,
        };
        let at = &mut self.hosts[host];
        let now = at.local(self.now).0;
        let (was, term) = (at.raft.role, at.raft.term);
        let index = at.raft.append(Data::Command(Box::new(envelope)));
        let Some(daemon) = at.daemon.as_mut() else {
            return;
        };
        if matches!(why, Purpose::Plan | Purpose::Armed) {
            daemon.leader.busy = Some(index);
        }
        if matches!(why, Purpose::Services(_)) {
            daemon.leader.serving = Some(index);
        }
        daemon.leader.pending.insert(index, (term, why));
        at.raft.advance();
        let out = at.raft.broadcast(now);
        self.raft_done(host, was, out);
        self.daemon_after(host, PROPOSAL_TIMEOUT, D::ProposalTimeout(index));
    }

    /// An entry is applied on this host: whoever waits for it hears.
    pub(crate) fn proposal_applied(&mut self, host: HostId, index: usize) {
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let Some((term, why)) = daemon.leader.pending.remove(&index) else {
            return;
        };
        let Some(applied) = index.checked_sub(1).and_then(|at| self.history.get(at)) else {
            return;
        };
        let mine = applied.entry.term == term;
        let good = mine && matches!(applied.result, Some(Ok(_)));
        if daemon.leader.busy == Some(index) {
            daemon.leader.busy = None;
        }
        match why {
            Purpose::Plan => {
                if let Some(leases) = daemon.leader.leases.as_mut().filter(|_| mine) {
                    leases.uncertain = false;
                }
                if !good {
                    daemon.leader.round_at = 0;
                    self.request_round(host, REFUSED_PAUSE);
                }
            }
            Purpose::Armed => {}
            Purpose::Services(sealed) => self.served(host, index, &sealed, good),
            Purpose::Task(id) => self.task_recorded(host, id, good),
            Purpose::Operator(what) => {
                if mine {
                    let entry = Arc::clone(&applied.entry);
                    self.check.acked.push((index, entry));
                    let said = if good { "done" } else { "refused" };
                    self.trace(|| format!("operator: {what}: {said}"));
                }
            }
        }
    }

    /// The outcome of a proposal is not known in time.
    pub(crate) fn proposal_timeout(&mut self, host: HostId, index: usize) {
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        if let Some((_, Purpose::Task(id))) = daemon.leader.pending.get(&index) {
            let id = *id;
            daemon.leader.pending.remove(&index);
            return self.task_unknown(host, id);
        }
        if daemon.leader.busy == Some(index) {
            daemon.leader.busy = None;
            if let Some(leases) = daemon.leader.leases.as_mut() {
                leases.uncertain = true;
            }
            self.request_round(host, REFUSED_PAUSE);
        }
    }

    fn look_at_voters(&mut self, host: HostId, state: &State, now: Instant) {
        let raft = &self.hosts[host].raft;
        if raft.changing() {
            return;
        }
        let me = raft.id;
        let current = raft.config().voters;
        let index = |at: usize| u64::try_from(at).unwrap_or(u64::MAX);
        let matched = raft.matched.iter();
        let witness = state.quorum.witness.as_ref().map(Witness::node);
        let nodes = state
            .hosts
            .values()
            .map(|record| record.node)
            .chain(witness);
        let members = GroupMembers {
            voters: current.clone(),
            // The group of the simulator knows every host from its start.
            learners: nodes.filter(|node| !current.contains(node)).collect(),
            changing: false,
            matched: matched
                .map(|(node, at)| (*node, Some(index(*at))))
                .collect(),
            last: index(raft.log.len()),
            heard: raft.heard(self.hosts[host].local(self.now).0),
        };
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let Some(leases) = daemon.leader.leases.as_ref() else {
            return;
        };
        if self.now < daemon.leader.voters_at {
            return;
        }
        daemon.leader.voters_at = self.now + VOTERS_EVERY;
        let change = next_change(&members, me, state, leases, now);
        if let Some(Change::Voters(next)) = change {
            self.trace(|| format!("voters {current:?} -> {next:?}"));
            let local = self.hosts[host].local(self.now).0;
            let raft = &mut self.hosts[host].raft;
            raft.change(next);
            let was = raft.role;
            raft.advance();
            let out = raft.broadcast(local);
            self.raft_done(host, was, out);
        }
    }
}

fn may_try(attempts: &BTreeMap<HostId, (u32, Attempt)>, host: HostId, now: Instant) -> bool {
    match attempts.get(&host) {
        None => true,
        Some((_, Attempt::Running | Attempt::Off(_))) => false,
        Some((tries, Attempt::Failed { at })) => now.since(*at) >= fence_again_after(*tries),
    }
}

fn forget_attempt(attempts: &mut BTreeMap<HostId, (u32, Attempt)>, host: HostId) {
    if !matches!(attempts.get(&host), Some((_, Attempt::Running))) {
        attempts.remove(&host);
    }
}

/// Takes any migration for the present one.
fn forge_ids(state: &State, report: &mut quorate_types::HostReport) {
    for (vm, seen) in &mut report.vms {
        let record = state.vms.get(vm).map(|record| &record.ownership);
        if let (Some(quorate_state::Ownership::Migrating { id, .. }), Some(migration)) =
            (record, seen.migration.as_mut())
        {
            migration.id = *id;
        }
    }
}
