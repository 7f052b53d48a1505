//! Moves that an operator asked for, and what every move has in common.
//!
//! ```text
//! policy live  -> Migrate                     phase back-off   -> Stop(Hard), then Start elsewhere
//! policy quick -> Stop(Save), then Start      starting, frozen -> wait
//! policy cold  -> Stop(Graceful), then Start  policy never     -> not moved
//!                 (Stop(Save) where running dependents bear a pause and no stop)
//! ```
//! Always holds: companions that are kept together move together, to one host; nothing is stopped
//! for a move before a host is found that can take it; a wish that cannot be met is answered with
//! the reason, not kept for ever.

use crate::choose::Choice;
use crate::fit::Query;
use crate::work::{Own, Work};
use quorate_state::{OrderKind, Reason, StopMode};
use quorate_types::spec::MigrationPolicy;
use quorate_types::{Epoch, NetworkName, VmPhase};
use std::collections::{BTreeMap, BTreeSet};

/// How a VM can leave its host now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mobility {
    Live,
    By(StopMode),
    /// Not now.
    Wait(String),
    /// Not at all.
    Never(String),
}

/// VMs that leave one host together.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) from: usize,
    pub(crate) vm: usize,
    pub(crate) with: Vec<usize>,
    /// How each goes, the first one's own way first.
    ways: Vec<Mobility>,
}

impl Work<'_> {
    /// How a VM that its host runs can leave it.
    pub(crate) fn mobility(&self, vm: usize, host: usize, epoch: Epoch) -> Mobility {
        let (seen, name) = (&self.vms[vm], self.hosts[host].name);
        let policy = seen.record.spec.migration;
        if policy == MigrationPolicy::Never {
            let text = format!(
                "{} may not be moved (`migration: never`): stop it with `quorate vm stop {}`",
                seen.name, seen.name
            );
            return Mobility::Never(text);
        }
        let wait = |text: &str| Mobility::Wait(format!("{} {text} on {name}", seen.name));
        if !self.hosts[host].up {
            return Mobility::Wait(self.silent_owner(host));
        }
        let report = self.report(vm, host).filter(|report| report.epoch == epoch);
        // Memory is saved in a pool that both hosts reach.
        let own = self.input.state.own_disks(seen.spec).next().is_some();
        match report.map(|report| report.phase) {
            Some(VmPhase::Running) if own => match policy {
                MigrationPolicy::Cold => Mobility::By(StopMode::Graceful),
                _ => Mobility::Live,
            },
            Some(VmPhase::Running) => match policy {
                MigrationPolicy::Quick => Mobility::By(StopMode::Save),
                MigrationPolicy::Cold if self.pause_is_borne(vm) => Mobility::By(StopMode::Save),
                MigrationPolicy::Cold => Mobility::By(StopMode::Graceful),
                MigrationPolicy::Live | MigrationPolicy::Never => Mobility::Live,
            },
            Some(VmPhase::BackOff) => Mobility::By(StopMode::Hard),
            None => wait("is not reported yet"),
            Some(VmPhase::Frozen) => wait("is frozen"),
            Some(VmPhase::IoError) => wait("is paused by an I/O error"),
            Some(VmPhase::Absent | VmPhase::Starting) => wait("is being started"),
            Some(_) => wait("is busy with what it did before"),
        }
    }

    /// The VM with the companions that must leave the host with it.
    pub(crate) fn unit(&self, vm: usize) -> Option<Unit> {
        let Own::Owned {
            host,
            epoch: Some(epoch),
            order: OrderKind::Run,
        } = self.vms[vm].own
        else {
            return None;
        };
        let mut unit = Unit {
            from: host,
            vm,
            with: Vec::new(),
            ways: vec![self.mobility(vm, host, epoch)],
        };
        for other in self.groups.companions(vm).filter(|at| self.vms[*at].wanted) {
            if let Own::Owned {
                host: at,
                epoch: Some(epoch),
                order: OrderKind::Run,
            } = self.vms[other].own
                && at == host
            {
                unit.with.push(other);
                unit.ways.push(self.mobility(other, host, epoch));
            }
        }
        Some(unit)
    }

    /// A host for a unit: `to`, or the best other one.
    pub(crate) fn choose_for(&self, unit: &Unit, to: Option<usize>) -> Choice {
        let resumes = |way: &Mobility| matches!(way, Mobility::Live | Mobility::By(StopMode::Save));
        self.choose(&Query {
            vm: unit.vm,
            with: &unit.with,
            from: unit.ways.iter().any(resumes).then_some(unit.from),
            live: unit.ways.contains(&Mobility::Live),
            only: to,
            not: Some(unit.from),
            alone: false,
            copies: unit.live(),
            moves: true,
        })
    }

    /// Why a unit has to wait for others, if it has. A unit that is larger than a limit goes when
    /// nothing else does.
    pub(crate) fn no_slots(&self, unit: &Unit, to: usize) -> Option<String> {
        let full = |moves: u32, count: usize, limit: u32| {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            moves > 0 && moves.saturating_add(count) > limit
        };
        let count = unit.ways.len();
        for host in [unit.from, to].map(|at| &self.hosts[at]) {
            let own = host
                .record
                .and_then(|record| record.spec.parallel_migrations);
            if full(
                host.moves,
                count,
                own.unwrap_or(self.settings.parallel_migrations),
            ) {
                return Some(format!(
                    "waits for its turn: {} moves from or to {} now",
                    host.moves, host.name
                ));
            }
        }
        let total = self.settings.total_migrations;
        if total > 0 && full(self.moves, count, total) {
            return Some(format!(
                "waits for its turn: {} moves in the cluster now",
                self.moves
            ));
        }
        self.full_network(unit, full)
    }

    /// A network that has as many moving VMs as it may have.
    fn full_network(&self, unit: &Unit, full: impl Fn(u32, usize, u32) -> bool) -> Option<String> {
        let mut counts: BTreeMap<&NetworkName, usize> = BTreeMap::new();
        for vm in unit.vms() {
            let nics = self.vms[vm].spec.nics.iter();
            let networks: BTreeSet<&NetworkName> = nics.map(|nic| &nic.network).collect();
            for network in networks {
                *counts.entry(network).or_default() += 1;
            }
        }
        counts.into_iter().find_map(|(network, count)| {
            let limit = self
                .input
                .state
                .networks
                .get(network)?
                .spec
                .parallel_migrations?;
            let moves = self.network_moves.get(network).copied().unwrap_or(0);
            let text = format!("waits for its turn: {moves} VMs of network {network} move now");
            full(moves, count, limit).then_some(text)
        })
    }

    /// Moves all of a unit.
    pub(crate) fn depart(&mut self, unit: &Unit, to: usize, reason: &Reason) {
        let members: Vec<usize> = unit.vms().collect();
        for (vm, way) in members.into_iter().zip(&unit.ways) {
            match way {
                Mobility::Live => self.migrate(vm, to, reason.clone()),
                Mobility::By(mode) => self.stop(vm, *mode, reason.clone()),
                Mobility::Wait(_) | Mobility::Never(_) => {}
            }
        }
    }
}

impl Unit {
    pub(crate) fn vms(&self) -> impl Iterator<Item = usize> + '_ {
        std::iter::once(self.vm).chain(self.with.iter().copied())
    }

    /// Why some member cannot leave at all.
    pub(crate) fn never(&self) -> Option<&str> {
        self.ways.iter().find_map(|way| match way {
            Mobility::Never(why) => Some(why.as_str()),
            _ => None,
        })
    }

    /// Why some member cannot leave now.
    pub(crate) fn waits(&self) -> Option<&str> {
        self.ways.iter().find_map(|way| match way {
            Mobility::Wait(why) => Some(why.as_str()),
            _ => None,
        })
    }

    /// All members go live.
    pub(crate) fn live(&self) -> bool {
        self.ways.iter().all(|way| *way == Mobility::Live)
    }
}

pub(crate) fn run(work: &mut Work<'_>) {
    for vm in work.order.clone() {
        let asked = work.vms[vm].record.move_request.is_some();
        let answered = work.vms[vm].touched && work.vms[vm].wanted;
        if asked && !answered && !work.vms[vm].record.deleting {
            answer(work, vm);
        }
    }
}

fn answer(work: &mut Work<'_>, vm: usize) {
    let give_up = |work: &mut Work<'_>, text: &str| work.clear_move(vm, false, Reason::new(text));
    if !work.vms[vm].wanted {
        return give_up(work, "it shall not run");
    }
    let Some(request) = &work.vms[vm].record.move_request else {
        return;
    };
    let to = request.to.as_ref();
    let target = to.and_then(|to| work.host_index.get(to));
    if to.is_some() && target.is_none() {
        return give_up(work, "the host it was to go to is no member any more");
    }
    let Some(unit) = work.unit(vm) else { return };
    if target == Some(unit.from) {
        return work.clear_move(vm, true, Reason::new("it is there already"));
    }
    if let Some(why) = unit.never() {
        return give_up(work, why);
    }
    if let Some(why) = unit.waits() {
        return work.note(vm, |_| format!("its move waits: {why}"));
    }
    if !work.may_place() {
        return work.note(vm, |_| {
            "this leader is new and waits to hear from all hosts".into()
        });
    }
    let choice = work.choose_for(&unit, target);
    let by = &request.by;
    let Some(best) = choice.best else {
        let summary = format!("no host can take it: {}", choice.rejections(work));
        let reason = choice.reason(work, summary);
        return work.clear_move(vm, false, reason);
    };
    if let Some(why) = work.no_slots(&unit, best) {
        return work.note(vm, |_| format!("its move {why}"));
    }
    if let Some(why) = work.copy_fails(&unit, best) {
        work.remove_copies(&unit, best, &why);
        return give_up(work, &why);
    }
    let reason = choice.reason(work, format!("{by} asked for it to be moved"));
    if !work.copied(&unit, best, &reason) {
        return;
    }
    work.depart(&unit, best, &reason);
}
