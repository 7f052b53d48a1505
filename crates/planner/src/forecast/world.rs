//! An ideal cluster on virtual time: every host that is up carries out its orders, in the time that
//! [`super::estimate`] says, and nothing else happens.
//!
//! ```text
//! order in the state --begin()--> task{due} --due--> the host's report says that it is done
//! ```
//! Always holds: the state changes only by the production `apply`; a task is dropped when the order
//! it belongs to is gone; a host that is not up does nothing.

use super::cuts;
use super::estimate::{self, Estimates};
use super::links::{Links, Transfer};
use crate::{Input, Memory, Seen, Snapshot};
use quorate_membership::{FenceProof, HostHealth, Instant};
use quorate_state::{
    Command, Envelope, FORMAT, OrderKind, Outcome, Ownership, Refusal, State, StopMode, VmRecord,
};
use quorate_types::report::{MigrationOutcome, MigrationReport, SavedState};
use quorate_types::{
    ByteSize, Epoch, HostName, HostReport, MigrationId, Millis, NodeId, Timestamp, VmName, VmPhase,
    VmReport,
};
use std::collections::{BTreeMap, BTreeSet};

/// What a host is doing for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Work {
    Start(HostName, Epoch),
    Ready(HostName, Epoch),
    Stop(HostName, Epoch, StopMode),
    Move(MigrationId),
    Cancel(MigrationId),
}

#[derive(Debug, Clone)]
struct Task {
    work: Work,
    due: Instant,
}

/// The ideal cluster.
#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) state: State,
    pub(super) seen: Seen,
    pub(super) estimates: Estimates,
    begun: Instant,
    saved: Timestamp,
    tasks: BTreeMap<VmName, Task>,
    links: Links,
    /// When a silent host is proven dead; absent: never, without a person.
    proofs_due: BTreeMap<HostName, (Instant, FenceProof)>,
    /// When it is shut out at the SANs that can do that.
    cuts_due: BTreeMap<HostName, Instant>,
    /// VMs whose guests do not run though they should.
    pub(super) down: BTreeMap<VmName, Down>,
}

/// A guest that does not run though it should.
#[derive(Debug, Clone)]
pub(super) struct Down {
    since: Instant,
    /// VMs that need it and run without it.
    pub(super) left_without: BTreeSet<VmName>,
}

/// What happened while time passed.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// VMs that run again, after how long, and who ran without them.
    pub(super) back: Vec<(VmName, Millis, BTreeSet<VmName>)>,
    /// Live migrations that ended, and how long they took.
    pub(super) migrated: Vec<(VmName, Millis)>,
}

impl World {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let mut world = Self {
            state: snapshot.state.clone(),
            seen: snapshot.seen.clone(),
            estimates: Estimates::new(&snapshot.state, &snapshot.seen.reports),
            begun: snapshot.seen.now,
            saved: snapshot.saved,
            tasks: BTreeMap::new(),
            links: Links::default(),
            proofs_due: BTreeMap::new(),
            cuts_due: BTreeMap::new(),
            down: BTreeMap::new(),
        };
        // What is silent already is taken for dead from now on: a host that comes back is not foreseen.
        let silent = snapshot.seen.health.iter();
        let silent = silent.filter(|(host, health)| {
            **health > HostHealth::Up && snapshot.state.hosts.contains_key(*host)
        });
        let silent: BTreeSet<HostName> = silent.map(|(host, _)| host.clone()).collect();
        world.fail(&silent);
        world
    }

    pub(super) fn input(&self) -> Input<'_> {
        Input {
            state: &self.state,
            reports: &self.seen.reports,
            health: &self.seen.health,
            proofs: &self.seen.proofs,
            now: self.seen.now,
            memory: &self.seen.memory,
            settled: true,
        }
    }

    pub(super) fn elapsed(&self) -> Millis {
        self.seen.now.since(self.begun)
    }

    pub(super) fn observe(&mut self) {
        let memory: &mut Memory = &mut self.seen.memory;
        memory.observe(&self.state, &self.seen.reports, self.seen.now);
    }

    pub(super) fn command(&mut self, command: Command) -> Result<Outcome, Refusal> {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(self.saved.0.saturating_add(self.elapsed().0)),
            by: "what-if".into(),
            command,
        };
        self.state.apply(&envelope)
    }

    fn up(&self, host: &HostName) -> bool {
        self.seen.health.get(host) == Some(&HostHealth::Up)
    }

    /// Hosts fall silent now.
    pub(super) fn fail(&mut self, hosts: &BTreeSet<HostName>) {
        let settings = self.state.settings();
        let lost_leader = self
            .seen
            .leader
            .as_ref()
            .is_some_and(|leader| hosts.contains(leader));
        let election = if lost_leader {
            estimate::ELECTION
        } else {
            Millis(0)
        };
        let share = self.state.hosts.len() * settings.max_fence_percent as usize / 100;
        for (n, host) in hosts.iter().enumerate() {
            self.seen.health.insert(host.clone(), HostHealth::Dead);
            let wide = |proof: &FenceProof| proof.host() == host && proof.vm().is_none();
            if self.seen.proofs.iter().any(wide) {
                continue;
            }
            // No more than a share of the hosts is declared dead within one lease.
            let turn = settings.lease.duration.0 * (n / share.max(1)) as u64;
            if cuts::has_any(&self.state, host) {
                let span = estimate::cut_bound(&settings).0 + turn + election.0;
                let due = self.seen.now.plus(Millis(span));
                self.cuts_due.insert(host.clone(), due);
            }
            let armed = self.state.hosts.get(host).and_then(|record| record.armed);
            let device = settings
                .fencing
                .get(host)
                .and_then(|devices| devices.first());
            let leased = armed.and_then(|armed| {
                let bound = estimate::lease_bound(&settings, armed);
                Some((Millis(bound.0 + turn), estimate::lease_proof(host, bound)?))
            });
            let fenced = device.and_then(|device| {
                let bound = estimate::lease_bound(&settings, Millis(0));
                let span = Millis(bound.0 + estimate::POWER_FENCING.0);
                Some((span, estimate::power_proof(host, &device.agent)?))
            });
            if let Some((span, proof)) = leased.or(fenced) {
                let due = self.seen.now.plus(Millis(span.0 + election.0));
                self.proofs_due.insert(host.clone(), (due, proof));
            }
        }
        if lost_leader {
            self.seen.leader = None;
        }
        let lost = self.state.vms.iter().filter(|(_, record)| {
            let owner = record.ownership.host();
            record.wanted() && owner.is_some_and(|owner| hosts.contains(owner))
        });
        for vm in lost.map(|(vm, _)| vm.clone()).collect::<Vec<_>>() {
            self.goes_down(&vm);
        }
        self.tasks.retain(|_, task| match &task.work {
            Work::Start(host, _) | Work::Ready(host, _) | Work::Stop(host, ..) => {
                !hosts.contains(host)
            }
            Work::Move(_) | Work::Cancel(_) => true,
        });
    }

    fn goes_down(&mut self, vm: &VmName) {
        if self.down.contains_key(vm) {
            return;
        }
        let needs = |record: &VmRecord| {
            let needs = record.spec.depends_on.get(vm);
            record.wanted() && needs.is_some_and(|needs| !needs.advisory)
        };
        let vms = self.state.vms.iter();
        let left = vms.filter(|(name, record)| needs(record) && self.runs(name));
        let down = Down {
            since: self.seen.now,
            left_without: left.map(|(name, _)| name.clone()).collect(),
        };
        self.down.insert(vm.clone(), down);
    }

    /// More than half of the voters hear each other.
    pub(super) fn quorate(&self) -> bool {
        let up = |node: &&NodeId| {
            let host = self.state.host_of_node(**node);
            host.is_some_and(|host| self.up(host))
        };
        self.seen.voters.is_empty()
            || self.seen.voters.iter().filter(up).count() * 2 > self.seen.voters.len()
    }

    /// Learners take the places of voters that are gone for good.
    pub(super) fn replace_voters(&mut self) {
        if !self.quorate() {
            return;
        }
        let node_up = |node: NodeId| {
            let host = self.state.host_of_node(node);
            host.is_some_and(|host| self.up(host))
        };
        let voters = &self.seen.voters;
        let lost: Vec<NodeId> = voters
            .iter()
            .copied()
            .filter(|node| !node_up(*node))
            .collect();
        let records = self.state.hosts.values().map(|record| record.node);
        let spare: Vec<NodeId> = records
            .filter(|node| !voters.contains(node) && node_up(*node))
            .collect();
        for (lost, spare) in lost.into_iter().zip(spare) {
            self.seen.voters.remove(&lost);
            self.seen.voters.insert(spare);
        }
    }

    /// Hosts take up what their orders say.
    pub(super) fn begin(&mut self) {
        self.clean_up();
        let vms: Vec<VmName> = self.state.vms.keys().cloned().collect();
        for vm in vms {
            let Some(record) = self.state.vms.get(&vm) else {
                continue;
            };
            let Some((work, takes)) = self.wanted(&vm, record) else {
                self.tasks.remove(&vm);
                self.links.transfers.remove(&vm);
                continue;
            };
            let same = |task: &Task| task.work == work;
            if self.tasks.get(&vm).is_some_and(same) {
                continue;
            }
            let due = self.seen.now.plus(takes);
            let hosts = record.ownership.clone();
            self.links.transfers.remove(&vm);
            if let (Work::Move(_), Ownership::Migrating { from, to, .. }) = (&work, hosts) {
                let transfer = Transfer::new([from, to], self.seen.now, takes);
                self.links.transfers.insert(vm.clone(), transfer);
            }
            self.take_up(&vm, &work);
            self.tasks.insert(vm, Task { work, due });
        }
        self.share_links();
    }

    /// Migrations that run side by side take longer.
    fn share_links(&mut self) {
        self.links.share(self.seen.now, &self.estimates);
        for (vm, transfer) in &self.links.transfers {
            if let Some(task) = self.tasks.get_mut(vm) {
                task.due = transfer.due();
            }
        }
    }

    /// What is to be done for a VM, and how long it takes.
    fn wanted(&self, vm: &VmName, record: &VmRecord) -> Option<(Work, Millis)> {
        match &record.ownership {
            Ownership::Free => None,
            Ownership::Owned { host, epoch, order } if self.up(host) => {
                let report = self.seen.reports.get(host)?.vms.get(vm);
                let here = report.filter(|report| report.epoch == *epoch);
                if let OrderKind::Stop(mode) = order {
                    let closed = report.is_some_and(|report| report.closed >= *epoch);
                    let work = Work::Stop(host.clone(), *epoch, *mode);
                    return (!closed).then(|| (work, Estimates::stop(record, *mode)));
                }
                if report.is_some_and(|report| report.closed >= *epoch) {
                    return None;
                }
                match here.map(|report| report.phase) {
                    None | Some(VmPhase::Absent | VmPhase::Starting | VmPhase::HandedOver) => {
                        let work = Work::Start(host.clone(), *epoch);
                        Some((work, self.estimates.start(vm, record)))
                    }
                    Some(VmPhase::Running | VmPhase::MigratingOut) if here?.ready => None,
                    Some(VmPhase::Running | VmPhase::MigratingOut) => {
                        let takes = Estimates::ready(record)?;
                        Some((Work::Ready(host.clone(), *epoch), takes))
                    }
                    // What fails already is not foreseen to recover.
                    _ => None,
                }
            }
            Ownership::Owned { .. } => None,
            Ownership::Migrating {
                id,
                from,
                to,
                cancel,
                ..
            } => {
                if *cancel && (self.up(from) || self.up(to)) {
                    return Some((Work::Cancel(*id), Millis(500)));
                }
                let both = self.up(from) && self.up(to);
                both.then(|| (Work::Move(*id), self.estimates.migration(vm, record)))
            }
        }
    }

    fn report_mut(&mut self, host: &HostName, vm: &VmName) -> Option<&mut VmReport> {
        let report: &mut HostReport = self.seen.reports.get_mut(host)?;
        report.sequence += 1;
        Some(report.vms.entry(vm.clone()).or_insert_with(blank))
    }

    /// What the host says as soon as it begins.
    fn take_up(&mut self, vm: &VmName, work: &Work) {
        match work {
            Work::Start(host, epoch) => {
                let (host, epoch) = (host.clone(), *epoch);
                if let Some(report) = self.report_mut(&host, vm) {
                    report.epoch = epoch;
                    report.phase = VmPhase::Starting;
                    report.ready = false;
                }
            }
            Work::Stop(host, epoch, _) => {
                let (host, epoch) = (host.clone(), *epoch);
                let wanted = self.state.vms.get(vm).is_some_and(VmRecord::wanted);
                if wanted {
                    self.goes_down(vm);
                }
                if let Some(report) = self.report_mut(&host, vm) {
                    report.epoch = epoch;
                    report.phase = VmPhase::Stopping;
                }
            }
            Work::Move(id) => self.migration_says(vm, *id, MigrationOutcome::InProgress),
            Work::Ready(..) | Work::Cancel(_) => {}
        }
    }

    /// The next moment at which something is done or proven.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let tasks = self.tasks.values().map(|task| task.due);
        let proofs = self.proofs_due.values().map(|(due, _)| *due);
        let proofs = proofs.chain(self.cuts_due.values().copied());
        let sends = self.links.next(self.seen.now);
        tasks.chain(proofs).chain(sends).min()
    }

    /// Shuts silent hosts out at their VMs' SANs.
    fn cut_what_is_due(&mut self) {
        let now = self.seen.now;
        let due = self.cuts_due.iter().filter(|(_, due)| **due <= now);
        let due: Vec<HostName> = due.map(|(host, _)| host.clone()).collect();
        for host in due {
            self.cuts_due.remove(&host);
            let (proofs, pools) = cuts::of(&self.state, &host);
            if !pools.is_empty() && self.command(Command::CutStorage { host, pools }).is_ok() {
                self.seen.proofs.extend(proofs);
            }
        }
    }

    /// Lets the time pass until `at`; what is due then is done.
    pub(super) fn pass_until(&mut self, at: Instant) -> Passed {
        self.seen.now = self.seen.now.max(at);
        let now = self.seen.now;
        let proven: Vec<HostName> = self
            .proofs_due
            .iter()
            .filter(|(_, (due, _))| *due <= now)
            .map(|(host, _)| host.clone())
            .collect();
        for host in proven {
            if let Some((_, proof)) = self.proofs_due.remove(&host) {
                self.seen.proofs.push(proof);
            }
        }
        self.cut_what_is_due();
        let due: Vec<VmName> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.due <= now)
            .map(|(vm, _)| vm.clone())
            .collect();
        let mut passed = Passed::default();
        for vm in due {
            if let Some(task) = self.tasks.remove(&vm) {
                self.done(&vm, &task.work);
                let transfer = self.links.transfers.remove(&vm);
                if let (Work::Move(_), Some(transfer)) = (task.work, transfer) {
                    passed
                        .migrated
                        .push((vm.clone(), now.since(transfer.began)));
                }
            }
            if self.runs(&vm)
                && let Some(down) = self.down.remove(&vm)
            {
                passed
                    .back
                    .push((vm, now.since(down.since), down.left_without));
            }
        }
        self.share_links();
        passed
    }

    fn done(&mut self, vm: &VmName, work: &Work) {
        let checked = |world: &Self| {
            let record = world.state.vms.get(vm);
            record.is_some_and(|record| record.effective().ready.is_some())
        };
        match work {
            Work::Start(host, epoch) => {
                let (epoch, ready) = (*epoch, !checked(self));
                if let Some(report) = self.report_mut(host, vm) {
                    report.epoch = epoch;
                    report.phase = VmPhase::Running;
                    report.ready = ready;
                }
            }
            Work::Ready(host, _) => {
                if let Some(report) = self.report_mut(host, vm) {
                    report.ready = true;
                }
            }
            Work::Stop(host, epoch, mode) => {
                let saved = self.saved_state(vm).filter(|_| *mode == StopMode::Save);
                let epoch = *epoch;
                if let Some(report) = self.report_mut(host, vm) {
                    report.closed = epoch;
                    report.phase = VmPhase::Absent;
                    report.ready = false;
                    report.saved = saved;
                }
            }
            Work::Move(id) => self.migration_says(vm, *id, MigrationOutcome::Arrived),
            Work::Cancel(id) => self.migration_says(vm, *id, MigrationOutcome::Failed),
        }
    }

    fn saved_state(&self, vm: &VmName) -> Option<SavedState> {
        let record = self.state.vms.get(vm)?;
        let pool = record
            .effective()
            .disks
            .first()
            .map(|disk| disk.pool.clone());
        let pool = pool.or_else(|| self.state.pools.keys().next().cloned())?;
        let file = format!(".quorate/{vm}.saved");
        Some(SavedState { pool, file })
    }

    /// Both sides' word on a migration.
    fn migration_says(&mut self, vm: &VmName, id: MigrationId, outcome: MigrationOutcome) {
        let Some(record) = self.state.vms.get(vm) else {
            return;
        };
        let Ownership::Migrating {
            from,
            epoch,
            to,
            target_epoch,
            ..
        } = record.ownership.clone()
        else {
            return;
        };
        let said = |outcome| {
            Some(MigrationReport {
                id,
                outcome,
                transferred: ByteSize(0),
                remaining: ByteSize(0),
                downtime_ms: None,
                switchover: false,
                reason: None,
            })
        };
        let (source, target) = match outcome {
            MigrationOutcome::Arrived => (
                (VmPhase::HandedOver, MigrationOutcome::Sent),
                (VmPhase::Running, MigrationOutcome::Arrived),
            ),
            MigrationOutcome::Failed => (
                (VmPhase::Running, MigrationOutcome::Failed),
                (VmPhase::Absent, MigrationOutcome::Failed),
            ),
            _ => (
                (VmPhase::MigratingOut, MigrationOutcome::InProgress),
                (VmPhase::Incoming, MigrationOutcome::InProgress),
            ),
        };
        let mut ready = false;
        if self.up(&from)
            && let Some(report) = self.report_mut(&from, vm)
        {
            ready = report.ready;
            report.epoch = epoch;
            report.phase = source.0;
            report.migration = said(source.1);
        }
        if self.up(&to)
            && let Some(report) = self.report_mut(&to, vm)
        {
            report.epoch = target_epoch;
            report.phase = target.0;
            report.ready = ready && outcome == MigrationOutcome::Arrived;
            report.migration = said(target.1);
            if outcome == MigrationOutcome::Failed {
                report.closed = target_epoch;
            }
        }
    }

    /// Hosts end what is not theirs any more.
    fn clean_up(&mut self) {
        for (host, report) in &mut self.seen.reports {
            if self.seen.health.get(host) != Some(&HostHealth::Up) {
                continue;
            }
            for (vm, seen) in &mut report.vms {
                let record = self.state.vms.get(vm);
                let owns = record.is_some_and(|record| {
                    record
                        .ownership
                        .hosts()
                        .iter()
                        .any(|(owner, _)| *owner == host)
                });
                if !owns && seen.phase != VmPhase::Absent {
                    seen.phase = VmPhase::Absent;
                    seen.ready = false;
                }
            }
        }
    }

    /// A guest of the VM runs, by the word of a host that may run it.
    pub(super) fn runs(&self, vm: &VmName) -> bool {
        let Some(record) = self.state.vms.get(vm) else {
            return false;
        };
        record.ownership.hosts().into_iter().any(|(host, epoch)| {
            let report = self
                .seen
                .reports
                .get(host)
                .and_then(|report| report.vms.get(vm));
            self.up(host)
                && report.is_some_and(|report| {
                    let running = matches!(report.phase, VmPhase::Running | VmPhase::MigratingOut);
                    report.epoch == epoch && running
                })
        })
    }
}

fn blank() -> VmReport {
    VmReport {
        epoch: Epoch(0),
        phase: VmPhase::Absent,
        ready: false,
        closed: Epoch(0),
        saved: None,
        guest_shutdown: false,
        restarts: 0,
        since: Timestamp(0),
        error: None,
        save_failures: 0,
        handed_over: None,
        migration: None,
        resident: ByteSize(0),
        mirrors: Vec::new(),
    }
}
