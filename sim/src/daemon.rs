//! One host's `quorate serve`: its life, its node of the consensus group, its heartbeats.

use crate::event::{D, Event, HostId, W, Wire};
use crate::host::Daemon;
use crate::leader::Leader;
use crate::mutate::Mutation;
use crate::raft::Role;
use crate::time::MS;
use crate::world::World;
use quorate_agent_logic::{Adopted, HostLogic, Input, ObservedMigration, Token};
use quorate_controller_logic::{HeartbeatReply, HeartbeatRequest};
use quorate_membership::Instant;
use quorate_state::State;
use quorate_types::report::{Capacity, HypervisorFacts, PoolReport};
use quorate_types::{ByteSize, HostReport, LinkReport, Millis, Revision, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

impl World {
    pub(crate) fn power_on(&mut self, host: HostId) {
        let at = &mut self.hosts[host];
        if at.on || at.held_off {
            return;
        }
        at.on = true;
        at.boots += 1;
        at.clock.booted = self.now;
        at.stopped_until = 0;
        at.daemon_stopped_until = 0;
        at.guard_stopped_until = 0;
        at.fed = None;
        at.datapath = Default::default();
        let (name, boots) = (at.name.clone(), at.boots);
        self.note(|| format!("{name}: boots"));
        let delay = self.rng.range(50, 300) * MS;
        self.after(delay, Event::World(W::StartDaemon(host, boots)));
    }

    /// Everything on the host ends at once and nobody is told.
    pub(crate) fn power_cut(&mut self, host: HostId) {
        if !self.hosts[host].on {
            return;
        }
        let mine = self.guests.iter().filter(|(_, guest)| guest.host == host);
        let mine: Vec<_> = mine.map(|(proc, _)| *proc).collect();
        self.lose_writes(host);
        self.own_power_cut(host);
        let at = &mut self.hosts[host];
        at.on = false;
        at.daemon = None;
        at.guard = None;
        at.fed = None;
        for proc in mine {
            self.note_guest(proc, "is gone with its host");
            self.remove_guest(proc);
        }
        self.forget_left(host);
    }

    /// The daemon ends; guests and guard go on.
    pub(crate) fn kill_daemon(&mut self, host: HostId) {
        if self.hosts[host].daemon.is_some() {
            let name = self.hosts[host].name.clone();
            self.note(|| format!("{name}: its daemon ends"));
            self.lose_writes(host);
            self.hosts[host].daemon = None;
            self.forget_left(host);
        }
    }

    /// A write that was not acknowledged may be there or not.
    fn lose_writes(&mut self, host: HostId) {
        let keep = self.rng.chance(500);
        let at = &mut self.hosts[host];
        let writing = at.daemon.as_mut().and_then(|daemon| daemon.writing.take());
        if let Some(record) = writing.filter(|_| keep) {
            at.ledger.apply(&record);
        }
        if self.mutation == Some(Mutation::LedgerNotDurable) {
            at.ledger = at.ledger_synced.1.clone();
        }
    }

    pub(crate) fn start_daemon(&mut self, host: HostId) {
        if !self.hosts[host].on || self.hosts[host].daemon.is_some() {
            return;
        }
        let snapshot = self.hosts[host].snapshot;
        let state = self.state_at(host, snapshot);
        let at = &mut self.hosts[host];
        at.daemon_inc += 1;
        at.daemon_stopped_until = 0;
        let local = at.local(self.now);
        at.raft.restart(local.0, snapshot, &mut self.rng);
        let report = empty_report(at, local, &state);
        let at = &mut self.hosts[host];
        at.daemon = Some(Box::new(Daemon {
            logic: None,
            inbox: Default::default(),
            effects: Default::default(),
            writing: None,
            runs: BTreeMap::new(),
            spawning: BTreeSet::new(),
            asks: BTreeMap::new(),
            next_ask: 0,
            applied: snapshot,
            state,
            report,
            reported: None,
            wake_at: 0,
            raft_at: 0,
            apply_at: 0,
            caught_up: false,
            leader: Leader::default(),
            tasks: Default::default(),
        }));
        let name = self.hosts[host].name.clone();
        self.note(|| format!("{name}: its daemon starts"));
        self.raft_wake(host);
        self.daemon_after(host, 5 * MS, D::RespawnGuard);
        let delay = self.rng.range(30, 200) * MS;
        self.daemon_after(host, delay, D::Begin);
    }

    /// Ledger loaded, guests found: the logic takes charge.
    fn begin_agent(&mut self, host: HostId) {
        let now = self.hosts[host].local(self.now);
        let mine = self.guests.iter().filter(|(_, guest)| guest.host == host);
        let mine: Vec<_> = mine.map(|(proc, _)| *proc).collect();
        let mut adopted = Vec::new();
        let mut runs = BTreeMap::new();
        for (at, proc) in mine.into_iter().enumerate() {
            let run = Token(at as u64 + 1);
            runs.insert(run, proc);
            if let Some(guest) = self.guests.get(&proc) {
                adopted.push(Adopted {
                    vm: guest.vm.clone(),
                    run,
                    observed: self.adopted_state(proc),
                    migration: migration_of(guest),
                });
            }
        }
        let ledger = self.hosts[host].ledger.clone();
        let timings = self.setup.timings;
        let (logic, effects) = HostLogic::new(timings, ledger, &adopted, now);
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.logic = Some(logic);
            daemon.effects.extend(effects);
            daemon.runs = runs;
        }
        self.give_orders(host);
        self.services_applied(host);
        self.refresh_report(host);
        self.daemon_after(host, MS, D::Heartbeat);
        if self.setup.own {
            self.daemon_after(host, MS, D::Mirrors);
        }
        self.pump(host);
    }

    pub(crate) fn daemon_event(&mut self, host: HostId, what: D) {
        match what {
            D::Begin => self.begin_agent(host),
            D::RaftTick => self.raft_tick(host),
            D::Apply => self.apply_committed(host),
            D::Heartbeat => {
                let beat = self.setup.timings.heartbeat.0 * MS;
                self.daemon_after(host, beat, D::Heartbeat);
                self.beat(host);
            }
            D::AgentTick => self.give(host, Input::Tick),
            D::LedgerDone => self.ledger_done(host),
            D::Guest { vm, token, event } => self.give(host, Input::Guest { vm, token, event }),
            D::Froze(proc) => self.froze(host, proc),
            D::Spawn {
                token,
                vm,
                epoch,
                how,
            } => self.spawn(host, token, vm, epoch, how),
            D::Probe(proc) => self.probe(host, proc),
            D::PeerTimeout { vm, token, outcome } => self.peer_timeout(host, vm, token, outcome),
            D::SwitchoverFailed(proc) => self.switchover_failed(proc),
            D::Mirrors => self.own_look(host),
            D::HandOverTimeout(proc, id) => self.own_hand_over_timeout(proc, id),
            D::SwitchoverWait(proc, token) => self.switchover_wait(proc, token),
            D::Round => self.round_due(host),
            D::ProposalTimeout(index) => self.proposal_timeout(host, index),
            D::FenceDone {
                host: off,
                generation,
                result,
            } => self.fence_done(host, off, generation, result),
            D::San { call, why } => self.san_answered(host, &call, why),
            D::Datapath => self.load_services(host),
            D::ShipFlows(proc) => self.ship_flows(proc),
            D::FlowsCome { source, target } => self.flows_come(host, source, target),
            D::RespawnGuard => {
                if self.hosts[host].guard.is_none() {
                    self.start_guard(host);
                    self.refresh_report(host);
                }
                self.daemon_after(host, 60 * MS, D::RespawnGuard);
            }
        }
    }

    pub(crate) fn deliver(&mut self, from: HostId, to: HostId, wire: Wire) {
        match wire {
            Wire::Raft(msg) => {
                let node = self.hosts[from].node;
                let now = self.hosts[to].local(self.now).0;
                let raft = &mut self.hosts[to].raft;
                let was = raft.role;
                let out = raft.receive(node, msg, now, &mut self.rng);
                self.raft_done(to, was, out);
            }
            Wire::Heartbeat { request, sent, inc } => {
                let sequence = request.sequence;
                let reply = self.leader_heartbeat(to, *request);
                if let Some(reply) = reply {
                    let reply = Wire::HeartbeatReply {
                        reply,
                        sequence,
                        sent,
                        inc,
                    };
                    self.send(to, from, reply);
                }
            }
            Wire::HeartbeatReply {
                reply,
                sequence,
                sent,
                inc,
            } => {
                if self.hosts[to].daemon_inc == inc {
                    self.heartbeat_answered(from, to, &reply, sequence, sent);
                }
            }
            other => self.deliver_peer(from, to, other),
        }
    }

    fn raft_tick(&mut self, host: HostId) {
        let now = self.hosts[host].local(self.now).0;
        let raft = &mut self.hosts[host].raft;
        let was = raft.role;
        let out = raft.tick(now, &mut self.rng);
        self.raft_done(host, was, out);
    }

    /// Sends what the node has to say and looks at what changed.
    pub(crate) fn raft_done(&mut self, host: HostId, was: Role, out: crate::raft::Out) {
        for (node, msg) in out {
            let Some(to) = self.hosts.iter().position(|other| other.node == node) else {
                continue;
            };
            self.send(host, to, Wire::Raft(msg));
        }
        let raft = &self.hosts[host].raft;
        let (role, term, commit) = (raft.role, raft.term, raft.commit);
        if role == Role::Leader && was != Role::Leader {
            let name = self.hosts[host].name.clone();
            self.note(|| format!("{name}: leads (term {term})"));
            self.request_round(host, 0);
        }
        if let Some(daemon) = self.hosts[host].daemon.as_ref()
            && commit > daemon.applied
            && daemon.apply_at <= self.now
        {
            let slow = self.hosts[host].apply_slow;
            let delay = if slow {
                self.rng.range(100, 900) * MS
            } else {
                self.rng.range(MS / 10, MS)
            };
            if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                daemon.apply_at = self.now + delay;
            }
            self.daemon_after(host, delay, D::Apply);
        }
        self.raft_wake(host);
    }

    fn raft_wake(&mut self, host: HostId) {
        let at = &mut self.hosts[host];
        let due = at.clock.true_time(Instant(at.raft.due)).max(self.now);
        let Some(daemon) = at.daemon.as_mut() else {
            return;
        };
        if daemon.raft_at <= self.now || due < daemon.raft_at {
            daemon.raft_at = due;
            let inc = at.daemon_inc;
            self.queue.push(due, Event::Daemon(host, inc, D::RaftTick));
        }
    }

    fn apply_committed(&mut self, host: HostId) {
        let commit = self.hosts[host].raft.commit;
        let Some(applied) = self.hosts[host].daemon.as_ref().map(|d| d.applied) else {
            return;
        };
        if commit <= applied {
            return;
        }
        let state = self.state_at(host, commit);
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.applied = commit;
            daemon.state = state;
        }
        if self.rng.chance(150) {
            self.hosts[host].snapshot = commit;
        }
        for index in applied + 1..=commit {
            self.proposal_applied(host, index);
        }
        if self.setup.own {
            self.own_sweep(host);
        }
        self.give_orders(host);
        self.services_applied(host);
        self.refresh_report(host);
        self.request_round(host, 0);
    }

    /// The local replica has advanced.
    fn give_orders(&mut self, host: HostId) {
        let at = &self.hosts[host];
        let Some(daemon) = &at.daemon else { return };
        if daemon.state.cluster.is_none() || daemon.logic.is_none() {
            return;
        }
        let input = Input::Orders {
            revision: daemon.state.revision,
            orders: daemon.state.orders_for(&at.name),
            known: daemon.state.vms.keys().cloned().collect(),
        };
        self.give(host, input);
    }

    /// Sends a heartbeat to whoever is thought to lead.
    pub(crate) fn beat(&mut self, host: HostId) {
        let at = &self.hosts[host];
        let now = at.local(self.now);
        let free = self.mutated(Mutation::GrantWithoutQuorum) && at.raft.role == Role::Leader;
        let leader = if free {
            Some(at.node)
        } else {
            at.raft.known_leader(now.0)
        };
        let Some(leader) = leader else {
            return;
        };
        let Some(daemon) = &at.daemon else { return };
        if daemon.logic.is_none() {
            return;
        }
        let report = &daemon.report;
        let fresh = daemon.reported != Some((leader, report.sequence));
        let armed = at.guard.is_some();
        let request = HeartbeatRequest {
            host: at.name.clone(),
            boot: at.boot_id(),
            guard_armed: armed,
            watchdog_ms: at.watchdog.filter(|_| armed).map(|bound| bound.0),
            applied: daemon.state.revision,
            sequence: report.sequence,
            report: fresh.then(|| Box::new(report.clone())),
        };
        let inc = at.daemon_inc;
        let Some(to) = self.hosts.iter().position(|other| other.node == leader) else {
            return;
        };
        let request = Box::new(request);
        let sent = now;
        self.send(host, to, Wire::Heartbeat { request, sent, inc });
    }

    fn heartbeat_answered(
        &mut self,
        from: HostId,
        host: HostId,
        reply: &HeartbeatReply,
        sequence: u64,
        sent: Instant,
    ) {
        let leader = self.hosts[from].node;
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        daemon.reported = (!reply.want_report).then_some((leader, sequence));
        let granted = Millis(reply.granted_ms);
        let mut sent = sent;
        if self.mutation == Some(Mutation::LeaseFromAnswer) {
            sent = self.hosts[host].local(self.now);
        }
        if granted.0 > 0 {
            self.guard_lease(host, sent.plus(granted));
            self.datapath_lease(host, sent.plus(granted), reply.revision);
        }
        let revision = if self.mutated(Mutation::NoFreshnessCheck) {
            Revision(0)
        } else {
            reply.revision
        };
        let ack = Input::LeaseAck {
            sent,
            granted,
            revision,
        };
        self.give(host, ack);
        if reply.want_report {
            self.beat(host);
        }
    }

    /// Looks whether what the host says of itself has changed.
    pub(crate) fn refresh_report(&mut self, host: HostId) {
        let links = self.links_of(host);
        let mirrors = self.own_reports(host);
        let state = self.hosts[host].daemon.as_ref().map(|d| d.state.clone());
        let services = state.map(|state| self.service_reports(host, &state));
        let at = &mut self.hosts[host];
        let armed = at.guard.is_some();
        let watchdog = at.watchdog.filter(|_| armed).map(|bound| bound.0);
        let (usable, path) = (!at.storage_lost, self.san.path(host));
        let (san, own) = (crate::san::pool(), crate::copies::pool());
        let Some(daemon) = at.daemon.as_mut() else {
            return;
        };
        let Some(logic) = &daemon.logic else { return };
        let mut report = daemon.report.clone();
        report.applied = daemon.state.revision;
        report.guard_armed = armed;
        report.watchdog_ms = watchdog;
        report.vms = logic.report(Timestamp(0));
        for (vm, said) in mirrors {
            if let Some(vm) = report.vms.get_mut(&vm) {
                vm.mirrors.push(said);
            }
        }
        report.links = links;
        report.services = services.unwrap_or_default();
        for (name, pool) in &mut report.pools {
            pool.usable = if Some(name) == san.as_ref() {
                path
            } else if Some(name) == own.as_ref() {
                true
            } else {
                usable
            };
        }
        if report != daemon.report {
            report.sequence += 1;
            daemon.report = report;
        }
    }

    fn links_of(&self, host: HostId) -> BTreeMap<quorate_types::HostName, LinkReport> {
        let others = (0..self.hosts.len()).filter(|other| *other != host);
        others
            .map(|other| {
                let up = self.net.connected(host, other);
                let link = LinkReport {
                    up,
                    ..LinkReport::default()
                };
                (self.hosts[other].name.clone(), link)
            })
            .collect()
    }
}

fn migration_of(guest: &crate::guest::Guest) -> ObservedMigration {
    use crate::guest::StreamPhase;
    match guest.out.as_ref().map(|out| out.phase) {
        Some(StreamPhase::Active | StreamPhase::PreSwitchover) => ObservedMigration::UnderWay,
        Some(StreamPhase::Device) => ObservedMigration::SwitchingOver,
        Some(StreamPhase::Completed) => ObservedMigration::Completed,
        Some(StreamPhase::Failed { .. }) => ObservedMigration::None,
        None if guest.incoming.is_some() && guest.ever_ran => ObservedMigration::Completed,
        None => ObservedMigration::None,
    }
}

fn empty_report(at: &crate::host::Host, local: Instant, state: &State) -> HostReport {
    let pool = PoolReport {
        usable: true,
        marker: Some("shared".into()),
        free: ByteSize::mib(1 << 20),
        total: ByteSize::mib(1 << 20),
        latency_us: 500,
        problem: None,
        since: None,
    };
    HostReport {
        host: at.name.clone(),
        boot: at.boot_id(),
        // A new life of the agent must not look older than the last one.
        sequence: local.0 / 1_000,
        version: "sim".into(),
        applied: state.revision,
        guard_armed: false,
        watchdog_ms: None,
        capacity: Capacity {
            cpus: 16,
            memory: ByteSize::mib(at.memory_mib),
        },
        hypervisor: HypervisorFacts {
            qemu: "10.0.2".into(),
            accel: "kvm".into(),
            cpu_models: ["EPYC".to_owned()].into(),
            machines: [("q35".to_owned(), "pc-q35-10.0".to_owned())].into(),
        },
        networks: crate::setup::network().into_iter().collect(),
        pools: state
            .pools
            .keys()
            .map(|name| {
                let mut pool = pool.clone();
                if Some(name) == crate::copies::pool().as_ref() {
                    pool.marker = Some(at.name.to_string());
                }
                (name.clone(), pool)
            })
            .collect(),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::new(),
        uplinks: crate::services::uplinks(),
        offences: BTreeMap::new(),
    }
}
