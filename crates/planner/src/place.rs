//! Starting what shall run and is free.
//!
//! Always holds: VMs are taken by priority (of themselves or of what needs them), then by how many
//! need them, then by name; one that waits for a dependency keeps room from those of lower
//! priority; none is given to a host that does not fit ([`crate::fit`]).

use crate::choose::Choice;
use crate::fit::mib;
use crate::work::{Own, Work};
use quorate_state::Reason;

pub(crate) fn run(work: &mut Work<'_>) {
    let mut waiting: Vec<(usize, u64)> = Vec::new();
    let mut priority = i32::MAX;
    let free = work
        .vms
        .iter()
        .filter(|vm| vm.wanted && vm.own == Own::Free);
    let lowest = free.map(|vm| vm.priority).min();
    for vm in work.order.clone() {
        if !work.vms[vm].wanted || work.vms[vm].own != Own::Free {
            continue;
        }
        if !work.may_place() {
            work.note(vm, |_| {
                "this leader is new and waits to hear from all hosts".into()
            });
            continue;
        }
        // Room is kept only from VMs of strictly lower priority.
        if work.vms[vm].priority < priority {
            priority = work.vms[vm].priority;
            for (host, bytes) in waiting.drain(..) {
                work.hosts[host].held += bytes;
            }
        }
        let keeps = lowest.is_some_and(|lowest| lowest < work.vms[vm].priority);
        if let Some(kept) = place(work, vm, keeps) {
            waiting.push(kept);
        }
    }
    for host in &mut work.hosts {
        host.held = 0;
    }
}

/// Starts a VM if it can be; otherwise returns the room that it `keeps`, if it is about to come.
fn place(work: &mut Work<'_>, vm: usize, keeps: bool) -> Option<(usize, u64)> {
    let unmet = work.unmet(vm);
    let now = work.input.now;
    let later = work.input.memory.start_after(work.vms[vm].name);
    let later = later.filter(|at| *at > now);
    if let Some(first) = unmet.first() {
        work.note(vm, |_| first.why.clone());
    } else if let Some(at) = later {
        let span = at.since(now).0.div_ceil(1000);
        work.note(vm, |_| {
            format!("it keeps ending; the next try is in {span} s")
        });
    }
    if !unmet.is_empty() || later.is_some() {
        if !keeps || unmet.iter().any(|unmet| !unmet.coming) {
            return None;
        }
        let host = work.choose_start(vm, None).best?;
        return Some((host, work.vms[vm].need()));
    }
    let (choice, asked) = choose(work, vm);
    // A host that fits is up and has a QEMU, so there is a machine to start with.
    let Some(host) = choice.best.filter(|_| work.start_abi(vm).is_some()) else {
        if crate::preempt::make_room(work, vm, &choice) {
            return None;
        }
        work.note(vm, |work| no_host(work, vm, &choice));
        return None;
    };
    let summary = match &work.vms[vm].record.last_host {
        Some(last) if last == work.hosts[host].name => format!("it shall run; {last} has room"),
        Some(last) => format!(
            "it shall run; it was on {last}, {} fits best",
            work.hosts[host].name
        ),
        None => format!("it shall run; {} fits best", work.hosts[host].name),
    };
    let reason = choice.reason(work, summary);
    work.start(vm, host, reason);
    if work.vms[vm].record.move_request.is_some() {
        let text = if asked {
            "it starts where it was asked to go"
        } else {
            "it starts elsewhere"
        };
        work.clear_move(vm, asked, Reason::new(text));
    }
    None
}

/// The host for a start, and whether it is what a move request asked for.
fn choose(work: &Work<'_>, vm: usize) -> (Choice, bool) {
    let record = work.vms[vm].record;
    let Some(request) = &record.move_request else {
        return (work.choose_start(vm, None), false);
    };
    if let Some(to) = request.to.as_ref().and_then(|to| work.host_index.get(to)) {
        let choice = work.choose_start(vm, Some(*to));
        if choice.best.is_some() {
            return (choice, true);
        }
        return (work.choose_start(vm, None), false);
    }
    // "Elsewhere" is any host but the one it was on.
    let last = record.last_host.as_ref();
    let last = last.and_then(|last| work.host_index.get(last)).copied();
    let elsewhere = work.choose(&crate::fit::Query {
        vm,
        not: last,
        ..Default::default()
    });
    if elsewhere.best.is_some() {
        return (elsewhere, true);
    }
    (work.choose_start(vm, None), false)
}

/// Why a VM cannot be placed.
pub(crate) fn no_host(work: &Work<'_>, vm: usize, choice: &Choice) -> String {
    format!(
        "no host can take it ({} needed): {}",
        mib(work.vms[vm].need()),
        choice.rejections(work)
    )
}
