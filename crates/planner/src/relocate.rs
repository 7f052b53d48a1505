//! Moves that nobody asked for one by one: a host is drained, a rule is broken, a guest cannot
//! stay up where it is, its host has lost what it had of its disks, or the storage ([`crate::lost`]).
//!
//! Always holds: at most `parallel_migrations` moves from and to each host at once (a larger unit
//! of companions goes alone); after a failed move there is a wait that doubles, and other targets
//! come first; a broken rule alone never stops a guest, it is only mended by live migration.

use crate::fit::Query;
use crate::lost;
use crate::work::{Own, Work};
use quorate_state::{HostMode, OrderKind, Reason, StopMode};
use quorate_types::VmPhase;
use quorate_types::spec::MigrationPolicy;

/// Why a VM should be elsewhere.
enum Cause {
    /// Its host is to be empty.
    Drain(String),
    /// It is against a rule where it is.
    Rule(String),
}

pub(crate) fn run(work: &mut Work<'_>) {
    for vm in work.order.clone() {
        let seen = &work.vms[vm];
        let Own::Owned {
            host,
            epoch: Some(epoch),
            order: OrderKind::Run,
        } = seen.own
        else {
            continue;
        };
        if !seen.wanted || seen.touched {
            continue;
        }
        if !work.may_place() {
            continue;
        }
        match cause(work, vm, host) {
            Some(cause) => relocate(work, vm, &cause),
            None if work.lost_storage(vm, host).is_some() => lost::leave(work, vm, host, epoch),
            None if leave_lost_disk(work, vm, host, epoch) => {}
            None if loops(work, vm, host, epoch) => leave_crash_loop(work, vm, host),
            None => {}
        }
    }
}

fn cause(work: &Work<'_>, vm: usize, host: usize) -> Option<Cause> {
    let (seen, name) = (&work.vms[vm], work.hosts[host].name);
    let mode = work.hosts[host].record.map(|record| record.mode);
    match mode {
        Some(HostMode::Draining) => return Some(Cause::Drain(format!("{name} is being drained"))),
        Some(HostMode::Maintenance) => {
            return Some(Cause::Drain(format!("{name} is in maintenance")));
        }
        _ => {}
    }
    let wishes = &seen.record.spec;
    if !wishes.hosts.is_empty() && !wishes.hosts.contains(name) {
        let text = format!("{name} is not among the hosts it is allowed on");
        return Some(Cause::Rule(text));
    }
    if !work.hosts[host].labelled(&wishes.host_labels) {
        let text = format!("{name} has not the labels that it asks for");
        return Some(Cause::Rule(text));
    }
    if let Some(text) = crowded(work, vm, host) {
        return Some(Cause::Rule(text));
    }
    let home = work.homes[work.groups.of[vm]?]?;
    let split = home.0 != host && work.hosts[home.0].good();
    split.then(|| {
        let (other, home) = (work.vms[home.1].name, work.hosts[home.0].name);
        Cause::Rule(format!("it must be kept with {other}, which is on {home}"))
    })
}

/// A rule has too many VMs in the host's domain, and this is one of those that count least.
fn crowded(work: &Work<'_>, vm: usize, host: usize) -> Option<String> {
    let rank = |at: usize| {
        let vm = &work.vms[at];
        (vm.priority, vm.dependents, std::cmp::Reverse(at))
    };
    work.domains.hard(vm).find_map(|(index, rule)| {
        if !rule.broken(host) {
            return None;
        }
        if rule.domain(host).is_none() {
            return Some(work.domains.describe(index, &work.facts(host)));
        }
        let here = |other: &&usize| {
            let mut hosts = work.vms[**other].own.hosts();
            hosts.any(|at| rule.same_domain(at, host))
        };
        let mut before = rule
            .vms
            .iter()
            .filter(here)
            .filter(|other| rank(**other) > rank(vm));
        let first = before.clone().next()?;
        let ahead = u32::try_from(before.by_ref().count()).unwrap_or(u32::MAX);
        if ahead < rule.max {
            return None;
        }
        let name = work.vms[*first].name;
        Some(if rule.plain() {
            format!("it must be kept apart from {name}")
        } else {
            work.domains.describe(index, &work.facts(host))
        })
    })
}

fn relocate(work: &mut Work<'_>, vm: usize, cause: &Cause) {
    let Some(unit) = work.unit(vm) else { return };
    let (why, drain) = match cause {
        Cause::Drain(why) => (why, true),
        Cause::Rule(why) => (why, false),
    };
    if let Some(never) = unit.never().or_else(|| unit.waits()) {
        return work.note(vm, |_| format!("{why}; {never}"));
    }
    if !drain && !unit.live() {
        return work.note(vm, |_| format!("{why}; it is not stopped for that"));
    }
    let now = work.input.now;
    let retries = unit
        .vms()
        .filter_map(|vm| work.input.memory.move_after(work.vms[vm].name));
    if let Some(at) = retries.max().filter(|at| *at > now) {
        let span = at.since(now).0.div_ceil(1000);
        return work.note(vm, |_| {
            format!("{why}; its move failed, the next try is in {span} s")
        });
    }
    let choice = work.choose_for(&unit, None);
    let Some(best) = choice.best else {
        return work.note(vm, |work| {
            format!("{why}; no host can take it: {}", choice.rejections(work))
        });
    };
    if let Some(slots) = work.no_slots(&unit, best) {
        return work.note(vm, |_| format!("{why}; {slots}"));
    }
    let reason = choice.reason(work, format!("{why}; {} fits best", work.hosts[best].name));
    if work.copied(&unit, best, &reason) {
        work.depart(&unit, best, &reason);
    }
}

/// Whether a VM shall leave its host, whenever it can.
pub(crate) fn leaves(work: &Work<'_>, vm: usize, host: usize) -> bool {
    let one = |vm: usize| {
        let asked = work.vms[vm].record.move_request.is_some();
        asked || cause(work, vm, host).is_some()
    };
    let mut companions = work.groups.companions(vm);
    let mut with = companions.by_ref().filter(|at| work.vms[*at].own.on(host));
    work.vms[vm].wanted && (one(vm) || with.any(one))
}

/// Its host cannot start it any more: a disk of it was lost there with what was only in the host's memory. It is ended there,
/// so that another host can have it, or an operator can say which copy shall count. Returns whether it is.
fn leave_lost_disk(
    work: &mut Work<'_>,
    vm: usize,
    host: usize,
    epoch: quorate_types::Epoch,
) -> bool {
    let waits = work.word(vm, host).filter(|word| word.epoch == epoch);
    let waits = waits.is_some_and(|word| word.phase == VmPhase::BackOff);
    let (name, report) = (work.hosts[host].name, work.hosts[host].report);
    let Some(report) = report.filter(|_| waits && work.hosts[host].up) else {
        return false;
    };
    let (state, spec) = (work.input.state, work.vms[vm].spec);
    let Err(why) = state.check_copies(spec, name, Some(&report.boot)) else {
        return false;
    };
    let reason = Reason {
        evidence: vec![format!("{name}: {why}")],
        ..Reason::new(format!("{name} has not all of its disks any more"))
    };
    work.stop(vm, StopMode::Hard, reason);
    true
}

/// The guest ends again and again under this epoch.
fn loops(work: &Work<'_>, vm: usize, host: usize, epoch: quorate_types::Epoch) -> bool {
    let word = work.word(vm, host).filter(|word| word.epoch == epoch);
    word.is_some_and(|word| word.phase == VmPhase::BackOff)
        && work.input.memory.looping(work.vms[vm].name, epoch)
        && work.vms[vm].record.spec.migration != MigrationPolicy::Never
        && work.hosts[host].up
}

/// Tries another host for it. Each host is tried once, then avoided for a while: this ends.
fn leave_crash_loop(work: &mut Work<'_>, vm: usize, host: usize) {
    let choice = work.choose(&Query {
        vm,
        not: Some(host),
        ..Query::default()
    });
    let (memory, now) = (work.input.memory, work.input.now);
    let tried = |at: usize| memory.crashed_on(work.vms[vm].name, work.hosts[at].name, now);
    let Some(best) = choice.best.filter(|best| !tried(*best)) else {
        return;
    };
    let summary = format!(
        "it cannot stay up on {}; {} can try",
        work.hosts[host].name, work.hosts[best].name
    );
    let reason = Reason {
        evidence: work
            .report(vm, host)
            .and_then(|report| report.error.clone())
            .into_iter()
            .collect(),
        ..choice.reason(work, summary)
    };
    work.stop(vm, StopMode::Hard, reason);
}
