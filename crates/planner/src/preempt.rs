//! Making room: a VM that shall start and finds none has VMs of lower priority stopped, where the
//! cluster's settings allow it (`cluster.preemption`).
//!
//! ```text
//! no host fits --what is being stopped suffices--> wait for it, room kept
//!              --VMs of lower priority would----> Stop the fewest, the least important; room kept
//!              --neither------------------------> wait as before
//! ```
//! Always holds: only for a start, never for a move; only VMs of strictly lower priority (of
//! themselves and of all that needs them) are stopped, dependents before what they need; a host is
//! chosen only if stopping makes enough room and no rule but room was in the way. The one that was
//! stopped starts again where there is room, after the one it made room for.

use crate::choose::Choice;
use crate::fit::{Query, Reject, mib};
use crate::room::MEMORY;
use crate::work::{Own, Work};
use quorate_state::{OrderKind, Reason, StopMode};
use quorate_types::Preemption;

/// VMs to stop on a host. Fewest of high priority first, then fewest, then least memory, then host.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    highest: i32,
    count: usize,
    bytes: u64,
    host: usize,
    victims: Vec<usize>,
}

/// Sees to it that there will be room, if the settings allow it. Returns where.
pub(crate) fn make_room(work: &mut Work<'_>, vm: usize, choice: &Choice) -> Option<usize> {
    if work.settings.preemption != Preemption::LowerPriority {
        return None;
    }
    let query = Query {
        vm,
        alone: true,
        ..Query::default()
    };
    let short = |at: &usize| matches!(work.fit(&query, *at), Err(Reject::Room { .. }));
    let hosts: Vec<usize> = (0..work.hosts.len()).filter(short).collect();
    // Room that comes anyway is waited for before anybody else is stopped.
    if let Some(at) = hosts.iter().copied().find(|at| enough(work, vm, *at, &[])) {
        work.note(vm, |work| {
            format!("waits for what is being stopped on {}", work.hosts[at].name)
        });
        return Some(at);
    }
    let best = hosts.iter().filter_map(|at| offer(work, vm, *at)).min()?;
    let (name, host) = (work.vms[vm].name, work.hosts[best.host].name);
    let priority = work.vms[vm].priority;
    for victim in best.victims {
        let summary = format!(
            "{name} (priority {priority}) shall run and finds no room; on {host} this one (priority {}) counts less",
            work.vms[victim].priority
        );
        let need = mib(work.room.need(vm)[MEMORY]);
        let reason = Reason {
            evidence: vec![format!("{name} needs {need}: {}", choice.rejections(work))],
            ..Reason::new(summary)
        };
        work.stop(victim, StopMode::Graceful, reason);
    }
    work.note(vm, |_| format!("room is made for it on {host}"));
    Some(best.host)
}

/// A host has room when all that is being stopped there has ended, and these have been stopped too.
fn enough(work: &Work<'_>, vm: usize, at: usize, victims: &[usize]) -> bool {
    let stops = |other: &usize| matches!(work.vms[*other].own, Own::Owned { host, order: OrderKind::Stop(_), .. } if host == at);
    let ends = (0..work.vms.len()).filter(stops);
    let relief = work.room.sum(ends.chain(victims.iter().copied()));
    work.room.suffices_without(at, work.room.need(vm), &relief)
}

fn offer(work: &Work<'_>, vm: usize, at: usize) -> Option<Offer> {
    let priority = work.vms[vm].priority;
    let lower = |other: &usize| {
        let seen = &work.vms[*other];
        let runs = matches!(seen.own, Own::Owned { host, epoch: Some(_), order: OrderKind::Run } if host == at);
        runs && seen.wanted && !seen.touched && seen.priority < priority
    };
    // The planner's own order backwards: the least important first, dependents before what they need.
    let candidates: Vec<usize> = work.order.iter().rev().copied().filter(lower).collect();
    let mut victims: Vec<usize> = Vec::new();
    for other in candidates {
        if enough(work, vm, at, &victims) {
            break;
        }
        let needed = work.needed_by.of(other).iter().any(|by| {
            let seen = &work.vms[*by];
            seen.wanted && seen.own != Own::Free && !victims.contains(by)
        });
        if !needed {
            victims.push(other);
        }
    }
    if victims.is_empty() || !enough(work, vm, at, &victims) {
        return None;
    }
    // The more important ones are spared if the rest is enough without them.
    for n in (0..victims.len()).rev() {
        let other = victims.remove(n);
        if !enough(work, vm, at, &victims) {
            victims.insert(n, other);
        }
    }
    let memory = |vm: &usize| work.room.need(*vm)[MEMORY];
    Some(Offer {
        highest: victims.iter().map(|vm| work.vms[*vm].priority).max()?,
        count: victims.len(),
        bytes: victims.iter().map(memory).sum(),
        host: at,
        victims,
    })
}
