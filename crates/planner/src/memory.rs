//! What one leader remembers between two plans: since when, how often, where it failed.
//!
//! Always holds: volatile and only ever used to wait or to prefer; a new leader starts with an
//! empty one and decides nothing unsafe for it. Safety rests on the state, reports and proofs.

use quorate_membership::Instant;
use quorate_state::{ActionKind, OrderKind, Ownership, State, VmRecord};
use quorate_types::report::MirrorPhase;
use quorate_types::{
    Epoch, HostName, HostReport, MigrationId, Millis, PoolName, Revision, VmName, VmPhase, VmReport,
};
use std::collections::BTreeMap;

/// First wait after a failed move or a crash loop; doubles each time.
const FIRST_WAIT: Millis = Millis::secs(5);
/// Longest wait.
const LONGEST_WAIT: Millis = Millis::secs(300);
/// Unexpected ends that are answered at once; after that there are waits.
const FREE_ENDS: u32 = 2;
/// A guest that ran for this long has recovered: its unexpected ends are forgotten.
const RECOVERED_AFTER: Millis = Millis::secs(60);
/// A host where a guest could not stay up is avoided for this long.
const AVOID_FOR: Millis = Millis::secs(600);
/// Restarts, since it last ran for a while, that count as a crash loop.
const CRASH_LOOP: u32 = 3;
/// A guest that did not come up for this long does not come up there.
const NOT_UP_FOR: Millis = Millis::secs(15);
/// A migration of which nothing at all changes for this long is stuck.
const STUCK_AFTER: Millis = Millis::secs(300);
/// A migration may be this old before it has to come nearer to its end.
const OLD_AFTER: Millis = Millis::secs(1800);
/// How long an old one may go without a new minimum of what remains.
const CONVERGE_WITHIN: Millis = Millis::secs(600);
/// After the switchover both sides know how it ended within moments.
const HANDED_OVER_FOR: Millis = Millis::secs(10);
/// The budget of balancing moves is for so long.
const BALANCED_WITHIN: Millis = Millis::secs(3600);
/// A path to storage that is gone for so long is not just a hiccup: VMs that need it leave the host.
pub(crate) const LOST_FOR: Millis = Millis::secs(5);
/// After this long a guest that could not be moved live is ended, to start where its disks are.
pub(crate) const LOST_FOR_GOOD: Millis = Millis::secs(45);
/// A disk that could not begin to be copied for so long is not copied there.
const NOT_COPIED_FOR: Millis = Millis::secs(15);
/// How long a source may take to act on a cancel.
const CANCEL_WITHIN: Millis = Millis::secs(30);

/// A leader's volatile memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Memory {
    vms: BTreeMap<VmName, VmMemory>,
    /// Since when a host that reports cannot use a pool.
    lost: BTreeMap<HostName, BTreeMap<PoolName, Instant>>,
    /// When no host at all could use a pool, the last time.
    dark: BTreeMap<PoolName, Instant>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct VmMemory {
    failed_moves: u32,
    failed_at: Option<Instant>,
    target: Option<HostName>,
    failed_targets: BTreeMap<HostName, u32>,
    migration: Option<MigrationMemory>,
    /// Since when a disk of it is to be copied and cannot be.
    copy_failing: Option<Instant>,
    /// First and last epoch of an unbroken run in which it was ready.
    ready: Option<(Epoch, Epoch)>,
    ends: u32,
    ended_at: Option<Instant>,
    ended_epoch: Epoch,
    running: Option<(Epoch, Instant)>,
    /// Since when its owner tries in vain, under which epoch.
    failing: Option<(Epoch, Instant)>,
    /// Restarts that were overcome: it ran for a while after them.
    overcome: (Epoch, u32),
    /// It keeps failing under this epoch.
    looping: Option<Epoch>,
    /// Since when it shall run and has not been started, and the next limit of that wait.
    waiting: Option<(Instant, Option<Instant>)>,
    crashed_on: BTreeMap<HostName, Instant>,
    /// Newest balancing move that was counted, by its revision.
    balanced: Revision,
    /// When balancing moves of it were seen to begin.
    balanced_at: Vec<Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct MigrationMemory {
    id: MigrationId,
    began: Instant,
    fingerprint: (Option<Sign>, Option<Sign>),
    changed: Instant,
    lowest: u64,
    lowest_at: Instant,
    handed_over: Option<Instant>,
    cancelled: Option<Instant>,
}

/// What is watched for change on one side.
type Sign = (VmPhase, u64, u64);

impl Memory {
    /// Takes in what is to be seen now. Call it before each [`crate::plan`].
    pub fn observe(
        &mut self,
        state: &State,
        reports: &BTreeMap<HostName, HostReport>,
        now: Instant,
    ) {
        self.observe_pools(state, reports, now);
        self.vms.retain(|vm, _| state.vms.contains_key(vm));
        for (name, record) in &state.vms {
            let of = |host: &HostName| reports.get(host).and_then(|report| report.vms.get(name));
            let memory = self.vms.entry(name.clone()).or_default();
            memory.observe_moves(record, now);
            memory.observe_balancing(record, now);
            memory.observe_run(record, &of, now);
            memory.observe_wait(record, now);
            memory.observe_migration(record, &of, now);
            memory.observe_copies(record, &of, now);
        }
    }

    fn observe_pools(
        &mut self,
        state: &State,
        reports: &BTreeMap<HostName, HostReport>,
        now: Instant,
    ) {
        self.lost.retain(|host, _| reports.contains_key(host));
        for (host, report) in reports {
            let lost = self.lost.entry(host.clone()).or_default();
            let gone = |pool: &PoolName| {
                let seen = report.pools.get(pool);
                state.pools.contains_key(pool) && seen.is_some_and(|seen| !seen.usable)
            };
            lost.retain(|pool, _| gone(pool));
            for pool in report.pools.keys().filter(|pool| gone(pool)) {
                lost.entry(pool.clone()).or_insert(now);
            }
        }
        self.dark.retain(|pool, _| state.pools.contains_key(pool));
        for pool in state.pools.keys() {
            let seen = reports.values().filter_map(|report| report.pools.get(pool));
            let mut seen = seen.peekable();
            if seen.peek().is_some() && seen.all(|seen| !seen.usable) {
                self.dark.insert(pool.clone(), now);
            }
        }
    }

    /// Whether a host has lost any pool at all.
    pub(crate) fn loses(&self, host: &HostName) -> bool {
        self.lost.get(host).is_some_and(|pools| !pools.is_empty())
    }

    /// Since when a host cannot use a pool that others can, as far as this leader saw it: when a SAN comes back, hosts notice
    /// one after the other.
    pub(crate) fn lost_since(&self, host: &HostName, pool: &PoolName) -> Option<Instant> {
        let since = self.lost.get(host)?.get(pool).copied();
        since.max(self.dark.get(pool).copied().filter(|_| since.is_some()))
    }

    /// The next moment at which something is due because of what is remembered: the caller plans
    /// again then, even if nothing else happens.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = self.vms.values().flat_map(VmMemory::due);
        let lost = self.lost.values().flat_map(BTreeMap::values);
        let lost = lost.flat_map(|since| [since.plus(LOST_FOR), since.plus(LOST_FOR_GOOD)]);
        let dark = self.dark.values().map(|at| at.plus(LOST_FOR));
        due.chain(lost).chain(dark).filter(|at| *at > now).min()
    }

    fn vm(&self, vm: &VmName) -> Option<&VmMemory> {
        self.vms.get(vm)
    }

    /// When the next move of a VM may be tried, after failed ones.
    pub(crate) fn move_after(&self, vm: &VmName) -> Option<Instant> {
        self.vm(vm)?.move_after()
    }

    /// Whether a move of the VM has failed since then.
    pub(crate) fn failed_since(&self, vm: &VmName, since: Instant) -> bool {
        let failed = self.vm(vm).and_then(|memory| memory.failed_at);
        failed.is_some_and(|at| at >= since)
    }

    /// When a VM that keeps ending may be started again.
    pub(crate) fn start_after(&self, vm: &VmName) -> Option<Instant> {
        self.vm(vm)?.start_after()
    }

    /// How often moves of a VM to this host failed lately.
    pub(crate) fn failed_targets(&self, vm: &VmName, host: &HostName) -> u32 {
        let count = |memory: &VmMemory| memory.failed_targets.get(host).copied();
        self.vm(vm).and_then(count).unwrap_or(0)
    }

    /// Since when a VM shall run and has not been started, if it has dependencies with limits.
    pub(crate) fn waiting_since(&self, vm: &VmName) -> Option<Instant> {
        self.vm(vm)?.waiting.map(|(since, _)| since)
    }

    /// Moves to some host failed, or it could not stay up on one.
    pub(crate) fn has_marks(&self, vm: &VmName) -> bool {
        let marks =
            |memory: &VmMemory| !memory.failed_targets.is_empty() || !memory.crashed_on.is_empty();
        self.vm(vm).is_some_and(marks)
    }

    /// The owner tries again and again, under this epoch, and the guest does not stay up.
    pub(crate) fn looping(&self, vm: &VmName, epoch: Epoch) -> bool {
        self.vm(vm).and_then(|memory| memory.looping) == Some(epoch)
    }

    /// The VM could not stay up on this host lately.
    pub(crate) fn crashed_on(&self, vm: &VmName, host: &HostName, now: Instant) -> bool {
        let at = self.vm(vm).and_then(|memory| memory.crashed_on.get(host));
        at.is_some_and(|at| now < at.plus(AVOID_FOR))
    }

    /// The VM was ready under `epoch`, or before a live migration that led to it.
    pub(crate) fn ready(&self, vm: &VmName, epoch: Epoch) -> bool {
        let range = self.vm(vm).and_then(|memory| memory.ready);
        range.is_some_and(|(first, last)| (first..=last).contains(&epoch))
    }

    /// Why a migration should be given up, if it should.
    pub(crate) fn stuck(&self, vm: &VmName, id: MigrationId, now: Instant) -> Option<&'static str> {
        let seen = self.migration(vm, id)?;
        if seen
            .handed_over
            .is_some_and(|at| now > at.plus(HANDED_OVER_FOR))
        {
            return Some("it is past the switchover and the target does not say how it ended");
        }
        if now > seen.changed.plus(STUCK_AFTER) {
            return Some("nothing has changed for 5 minutes");
        }
        let converges = now <= seen.lowest_at.plus(CONVERGE_WITHIN);
        (now > seen.began.plus(OLD_AFTER) && !converges)
            .then_some("it has run for 30 minutes and does not come nearer to its end")
    }

    /// A disk of the VM cannot be copied, for longer than a hiccup.
    pub(crate) fn copy_fails(&self, vm: &VmName, now: Instant) -> bool {
        let since = self.vm(vm).and_then(|memory| memory.copy_failing);
        since.is_some_and(|since| now > since.plus(NOT_COPIED_FOR))
    }

    /// The source had time enough to act on the cancel.
    pub(crate) fn cancel_ignored(&self, vm: &VmName, id: MigrationId, now: Instant) -> bool {
        let at = self.migration(vm, id).and_then(|seen| seen.cancelled);
        at.is_some_and(|at| now > at.plus(CANCEL_WITHIN))
    }

    /// Balancing moves within the last hour.
    pub(crate) fn balanced(&self, now: Instant) -> u32 {
        let moves = self.vms.values().flat_map(|memory| &memory.balanced_at);
        let lately = moves.filter(|at| now < at.plus(BALANCED_WITHIN)).count();
        u32::try_from(lately).unwrap_or(u32::MAX)
    }

    /// The VM was moved within the last hour just to even out load.
    pub(crate) fn balanced_lately(&self, vm: &VmName, now: Instant) -> bool {
        let moves = self
            .vm(vm)
            .into_iter()
            .flat_map(|memory| &memory.balanced_at);
        moves.into_iter().any(|at| now < at.plus(BALANCED_WITHIN))
    }

    fn migration(&self, vm: &VmName, id: MigrationId) -> Option<&MigrationMemory> {
        let seen = self.vm(vm)?.migration.as_ref()?;
        (seen.id == id).then_some(seen)
    }
}

impl VmMemory {
    fn observe_wait(&mut self, record: &VmRecord, now: Instant) {
        let limits = record.spec.depends_on.values();
        let mut limits = limits
            .filter_map(|dependency| dependency.timeout)
            .peekable();
        let waits = record.wanted() && record.ownership == Ownership::Free;
        if !waits || limits.peek().is_none() {
            self.waiting = None;
            return;
        }
        let since = self.waiting.map_or(now, |(since, _)| since);
        let due = limits
            .map(|limit| since.plus(limit))
            .filter(|at| *at > now)
            .min();
        self.waiting = Some((since, due));
    }

    fn observe_moves(&mut self, record: &VmRecord, now: Instant) {
        if record.failed_moves == 0 {
            self.failed_at = None;
            self.failed_targets.clear();
        } else if record.failed_moves != self.failed_moves {
            self.failed_at = Some(now);
            if let Some(target) = self.target.take() {
                *self.failed_targets.entry(target).or_default() += 1;
            }
        }
        self.failed_moves = record.failed_moves;
        if let Ownership::Migrating { to, .. } = &record.ownership {
            self.target = Some(to.clone());
        }
    }

    /// Counts moves that evened out load. Those of an earlier leader count as begun now: that is late
    /// rather than early.
    fn observe_balancing(&mut self, record: &VmRecord, now: Instant) {
        self.balanced_at.retain(|at| now < at.plus(BALANCED_WITHIN));
        let fresh = record.decisions.iter().rev();
        for decision in fresh.take_while(|decision| decision.revision > self.balanced) {
            let moves = decision.kind == Some(ActionKind::Migrate);
            if moves && decision.reason.summary.starts_with(crate::balance::PREFIX) {
                self.balanced_at.push(now);
            }
        }
        let newest = record.decisions.last().map(|decision| decision.revision);
        self.balanced = newest.unwrap_or(self.balanced).max(self.balanced);
    }

    fn observe_run<'r>(
        &mut self,
        record: &VmRecord,
        of: &impl Fn(&HostName) -> Option<&'r VmReport>,
        now: Instant,
    ) {
        self.crashed_on.retain(|_, at| now < at.plus(AVOID_FOR));
        match &record.ownership {
            Ownership::Free => self.running = None,
            Ownership::Owned { host, epoch, order } => {
                let Some(report) = of(host) else { return };
                let here = report.epoch == *epoch;
                let up = here && matches!(report.phase, VmPhase::Running | VmPhase::Frozen);
                self.running = match self.running {
                    Some((seen, since)) if up && seen == *epoch => Some((seen, since)),
                    _ => up.then_some((*epoch, now)),
                };
                if self
                    .running
                    .is_some_and(|(_, at)| now > at.plus(RECOVERED_AFTER))
                {
                    self.ends = 0;
                    self.overcome = (*epoch, report.restarts);
                }
                if here && report.ready && !self.is_ready(*epoch) {
                    self.ready = Some((*epoch, *epoch));
                } else if here && matches!(report.phase, VmPhase::Starting | VmPhase::BackOff) {
                    self.ready = None;
                }
                if *order == OrderKind::Run && report.closed >= *epoch && self.ended_epoch < *epoch
                {
                    self.ends = self.ends.saturating_add(1);
                    self.ended_at = Some(now);
                    self.ended_epoch = *epoch;
                }
                self.looping = None;
                if here && self.loops(*epoch, report, now) {
                    self.looping = Some(*epoch);
                    self.crashed_on.insert(host.clone(), now);
                }
            }
            Ownership::Migrating {
                from,
                epoch,
                target_epoch,
                ..
            } => {
                let ready = of(from).is_some_and(|r| r.epoch == *epoch && r.ready);
                if ready && !self.is_ready(*epoch) {
                    self.ready = Some((*epoch, *epoch));
                }
                if let Some((first, _)) = self.ready.filter(|_| self.is_ready(*epoch)) {
                    self.ready = Some((first, *target_epoch));
                }
            }
        }
    }

    /// Whether an owner's attempts are in vain.
    fn loops(&mut self, epoch: Epoch, report: &VmReport, now: Instant) -> bool {
        match report.phase {
            VmPhase::BackOff => {}
            VmPhase::Starting => return false,
            _ => {
                self.failing = None;
                return false;
            }
        }
        let since = match self.failing {
            Some((seen, since)) if seen == epoch => since,
            _ => now,
        };
        self.failing = Some((epoch, since));
        let before = if self.overcome.0 == epoch {
            self.overcome.1
        } else {
            0
        };
        let restarts = report.restarts.saturating_sub(before);
        restarts >= CRASH_LOOP || now > since.plus(NOT_UP_FOR)
    }

    fn is_ready(&self, epoch: Epoch) -> bool {
        self.ready
            .is_some_and(|(first, last)| (first..=last).contains(&epoch))
    }

    fn observe_copies<'r>(
        &mut self,
        record: &VmRecord,
        of: &impl Fn(&HostName) -> Option<&'r VmReport>,
        now: Instant,
    ) {
        let owner = record.ownership.host().and_then(of);
        let mut mirrors = owner.into_iter().flat_map(|report| &report.mirrors);
        let fails =
            mirrors.any(|said| said.phase == MirrorPhase::Waiting && said.problem.is_some());
        self.copy_failing = fails.then(|| self.copy_failing.unwrap_or(now));
    }

    fn observe_migration<'r>(
        &mut self,
        record: &VmRecord,
        of: &impl Fn(&HostName) -> Option<&'r VmReport>,
        now: Instant,
    ) {
        let Ownership::Migrating {
            id,
            from,
            to,
            cancel,
            ..
        } = &record.ownership
        else {
            self.migration = None;
            return;
        };
        let (source, target) = (of(from), of(to));
        let fingerprint = (source.map(|r| sign(r, *id)), target.map(|r| sign(r, *id)));
        let remaining = fingerprint
            .0
            .map_or(u64::MAX, |(_, _, remaining)| remaining);
        let mut seen = match self.migration.take() {
            Some(seen) if seen.id == *id => seen,
            _ => MigrationMemory {
                id: *id,
                began: now,
                fingerprint,
                changed: now,
                lowest: remaining,
                lowest_at: now,
                handed_over: None,
                cancelled: None,
            },
        };
        if seen.fingerprint != fingerprint {
            seen.fingerprint = fingerprint;
            seen.changed = now;
        }
        if remaining < seen.lowest {
            seen.lowest = remaining;
            seen.lowest_at = now;
        }
        let over = source.is_some_and(|r| r.phase == VmPhase::HandedOver);
        seen.handed_over = over.then(|| seen.handed_over.unwrap_or(now));
        seen.cancelled = cancel.then(|| seen.cancelled.unwrap_or(now));
        self.migration = Some(seen);
    }

    fn move_after(&self) -> Option<Instant> {
        let at = self.failed_at?;
        Some(at.plus(wait(self.failed_moves)))
    }

    fn start_after(&self) -> Option<Instant> {
        let at = self.ended_at?;
        let late = self.ends.checked_sub(FREE_ENDS).filter(|late| *late > 0)?;
        Some(at.plus(wait(late)))
    }

    fn due(&self) -> impl Iterator<Item = Instant> + '_ {
        let migration = self.migration.iter().flat_map(|seen| {
            let handed_over = seen.handed_over.map(|at| at.plus(HANDED_OVER_FOR));
            let cancelled = seen.cancelled.map(|at| at.plus(CANCEL_WITHIN));
            let old = seen
                .began
                .plus(OLD_AFTER)
                .max(seen.lowest_at.plus(CONVERGE_WITHIN));
            let stuck = [seen.changed.plus(STUCK_AFTER), old].into_iter();
            stuck.chain(handed_over).chain(cancelled).map(just_after)
        });
        let waits = self.move_after().into_iter().chain(self.start_after());
        let avoided = self.crashed_on.values().map(|at| at.plus(AVOID_FOR));
        let failing = self.failing.map(|(_, at)| just_after(at.plus(NOT_UP_FOR)));
        let limit = self.waiting.and_then(|(_, due)| due);
        let copied = self
            .copy_failing
            .map(|at| just_after(at.plus(NOT_COPIED_FOR)));
        waits
            .chain(copied)
            .chain(avoided)
            .chain(failing)
            .chain(limit)
            .chain(migration)
    }
}

/// The first moment that is later than a bound which itself still counts as in time.
fn just_after(at: Instant) -> Instant {
    at.plus(Millis(1))
}

fn sign(report: &VmReport, id: MigrationId) -> Sign {
    let migration = report.migration.as_ref().filter(|seen| seen.id == id);
    let (done, left) =
        migration.map_or((0, u64::MAX), |seen| (seen.transferred.0, seen.remaining.0));
    (report.phase, done, left)
}

/// The wait after the `n`th failure (from 1): 5 s, 10 s, 20 s, ... at most 5 min.
fn wait(n: u32) -> Millis {
    let factor = 1u64 << n.saturating_sub(1).min(16);
    Millis(FIRST_WAIT.0.saturating_mul(factor).min(LONGEST_WAIT.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_minutes() {
        let waits: Vec<u64> = (1..=8).map(|n| wait(n).0 / 1000).collect();
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(wait(u32::MAX), LONGEST_WAIT);
    }
}
