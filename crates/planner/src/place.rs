//! Starting what shall run and is free.
//!
//! ```text
//! for each priority, highest first:
//!   what can start now, the most limited first -> best host   (tentative)
//!   what still waits for something             -> best host   (tentative: keeps its room)
//!   something without a host? -> repair: move tentative ones aside, try other orders
//!   still none? -> preempt, where that is allowed: VMs of lower priority are stopped for it
//! then: what can start is started where it is; what waits gives its place back
//! ```
//! Always holds: VMs are taken by priority (of themselves or of what needs them); one that waits
//! for a dependency keeps room from those of lower priority, and never takes the place of one that
//! can start at once with the same priority; none is given to a host that does not fit
//! ([`crate::fit`]); only what this very plan starts is moved aside, nothing that runs (but see [`crate::preempt`]).

use crate::choose::Choice;
use crate::copies;
use crate::fit::{Query, mib};
use crate::repair;
use crate::room::MEMORY;
use crate::work::{Own, Work};
use quorate_state::{OrderKind, Reason};
use std::collections::BTreeMap;

/// A free VM that has a tentative place, or finds none.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) vm: usize,
    /// It starts now; else it only keeps its room.
    pub(crate) starts: bool,
    choice: Choice,
    /// A move request is met by this place.
    asked: bool,
    /// Its place was changed for others: the first choice does not explain it.
    pub(crate) moved: bool,
    /// Its place is only being made free ([`crate::preempt`]).
    claims: bool,
}

impl Task {
    /// Only one host will do, or has been found already: it is not moved aside.
    pub(crate) fn fixed(&self, work: &Work<'_>) -> bool {
        self.claims || work.vms[self.vm].record.move_request.is_some()
    }
}

/// Passes: what ran into nothing frees what only followed it in order.
const PASSES: u32 = 3;

pub(crate) fn run(work: &mut Work<'_>) {
    let free = |work: &Work<'_>, vm: usize| work.vms[vm].wanted && work.vms[vm].own == Own::Free;
    let order: Vec<usize> = work
        .order
        .iter()
        .copied()
        .filter(|vm| free(work, *vm))
        .collect();
    if !work.may_place() {
        for vm in order {
            work.note(vm, |_| {
                "this leader is new and waits to hear from all hosts".into()
            });
        }
        return;
    }
    let mut order = order;
    for _ in 0..PASSES {
        pass(work, &order);
        order.retain(|vm| {
            let waits = work.vms[*vm].own == Own::Free && !work.stuck.contains(vm);
            waits
                && work.vms[*vm]
                    .record
                    .spec
                    .depends_on
                    .values()
                    .any(|one| one.advisory)
        });
        order.retain(|vm| work.unmet(*vm).is_empty());
        if order.is_empty() || work.stuck.is_empty() {
            return;
        }
    }
}

fn pass(work: &mut Work<'_>, order: &[usize]) {
    let (levels, lowest) = sort(work, order);
    let tight = tight(work, order);
    let mut tasks: Vec<Task> = Vec::new();
    for (priority, (now, later)) in levels.into_iter().rev() {
        let keeps = priority > lowest || tight;
        let first = tasks.len();
        for vm in now {
            let (choice, asked) = choose(work, vm);
            tasks.push(task(work, vm, true, choice, asked));
        }
        for vm in later {
            if keeps || limited(work, vm) {
                let best = work.best_start(vm, true);
                let choice = Choice::of(best);
                tasks.push(task(work, vm, false, choice, false));
            }
        }
        repair::run(work, &mut tasks, first);
        for task in tasks[first..].iter_mut().filter(|task| task.starts) {
            claim(work, task);
        }
        work.room.let_go();
        for task in tasks.iter().filter(|task| !task.starts) {
            if let Some(host) = work.seat(task.vm) {
                work.room.hold(host, task.vm);
            }
        }
    }
    work.room.let_go();
    settle(work, tasks, order);
}

type Levels = BTreeMap<i32, (Vec<usize>, Vec<usize>)>;

/// What starts and what waits, by priority; the most limited first. With it the lowest priority.
fn sort(work: &mut Work<'_>, order: &[usize]) -> (Levels, i32) {
    let mut levels = Levels::new();
    let mut lowest = i32::MAX;
    for vm in order.iter().copied() {
        lowest = lowest.min(work.vms[vm].priority);
        match delay(work, vm) {
            None => levels.entry(work.vms[vm].priority).or_default().0.push(vm),
            Some(true) => levels.entry(work.vms[vm].priority).or_default().1.push(vm),
            Some(false) => {}
        }
    }
    let largest = work
        .room
        .largest((0..work.hosts.len()).filter(|at| work.hosts[*at].good()));
    let rank = |vm: &usize| {
        let seen = &work.vms[*vm];
        let choices = work.choices(*vm);
        let size = std::cmp::Reverse(work.room.size(*vm, &largest));
        (choices, std::cmp::Reverse(seen.dependents), size)
    };
    for (now, later) in levels.values_mut() {
        now.sort_by_cached_key(rank);
        later.sort_by_cached_key(rank);
    }
    (levels, lowest)
}

/// Whether a VM has to wait. `Some(true)`: what it waits for is about to come.
fn delay(work: &mut Work<'_>, vm: usize) -> Option<bool> {
    if let Some((disk, write)) = work.input.state.written(work.vms[vm].spec) {
        let image = format!("{}/{}", disk.pool, disk.image);
        work.note(vm, |_| {
            format!(
                "{} writes to its disk {image} ({}): it starts when that is done; `quorate image jobs`",
                write.host, write.what
            )
        });
        return Some(false);
    }
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
    if unmet.is_empty() && later.is_none() {
        return None;
    }
    Some(unmet.iter().all(|unmet| unmet.coming))
}

/// Room is short: all that shall run needs more than half of what is free of something.
fn tight(work: &Work<'_>, order: &[usize]) -> bool {
    let need = work.room.sum(order.iter().copied());
    let good = (0..work.hosts.len()).filter(|at| work.hosts[*at].good());
    let mut free = vec![0u64; need.len()];
    for at in good {
        let rows = work.room.have(at).iter().zip(work.room.used(at));
        for (free, (have, used)) in free.iter_mut().zip(rows) {
            *free = free.saturating_add(have.saturating_sub(*used));
        }
    }
    need.iter().zip(&free).any(|(need, free)| *need > free / 2)
}

/// A VM that may not find a place though there is room: few hosts will do for it.
fn limited(work: &Work<'_>, vm: usize) -> bool {
    let good = work.good_hosts;
    let few = work.choices(vm) as usize * 2 <= good;
    let mut rules = work.domains.hard(vm);
    few || rules.any(|(_, rule)| rule.vms.len() * 2 > good * rule.max as usize)
}

/// Gives a VM its first choice, tentatively.
fn task(work: &mut Work<'_>, vm: usize, starts: bool, choice: Choice, asked: bool) -> Task {
    if let Some(host) = choice.best {
        work.put(vm, host);
    }
    Task {
        vm,
        starts,
        choice,
        asked,
        moved: false,
        claims: false,
    }
}

/// What found no host may have others make room: it waits there meanwhile, and so keeps its room.
fn claim(work: &mut Work<'_>, task: &mut Task) {
    if work.vms[task.vm].own != Own::Free {
        return;
    }
    if let Some(host) = crate::preempt::make_room(work, task.vm, &task.choice) {
        work.put(task.vm, host);
        task.starts = false;
        task.claims = true;
    }
}

/// Turns tentative places into starts, in the order of importance.
fn settle(work: &mut Work<'_>, tasks: Vec<Task>, order: &[usize]) {
    let mut seats: BTreeMap<usize, (Task, Option<usize>)> = BTreeMap::new();
    for task in tasks {
        let seat = work.seat(task.vm);
        seats.insert(task.vm, (task, seat));
    }
    // What waits is counted out first: it must not be seen as started.
    for (task, _) in seats.values() {
        if !task.starts {
            work.take_back(task.vm);
        }
    }
    for vm in order {
        let Some((task, seat)) = seats.remove(vm).filter(|(task, _)| task.starts) else {
            continue;
        };
        // A host that fits is up and has a QEMU, so there is a machine to start with.
        match seat.filter(|_| work.start_abi(*vm).is_some()) {
            Some(host) => start(work, &task, host),
            None => {
                work.take_back(*vm);
                work.note(*vm, |work| no_host(work, *vm, &task.choice));
                work.stuck.push(*vm);
            }
        }
    }
}

fn start(work: &mut Work<'_>, task: &Task, host: usize) {
    let (vm, name) = (task.vm, work.hosts[host].name);
    let summary = match &work.vms[vm].record.last_host {
        _ if task.moved => format!("it shall run; on {name} it leaves room for others"),
        Some(last) if last == name => format!("it shall run; {last} has room"),
        Some(last) => format!("it shall run; it was on {last}, {name} fits best"),
        None => format!("it shall run; {name} fits best"),
    };
    let reason = task.choice.reason(work, summary);
    work.start(vm, host, reason);
    if work.vms[vm].record.move_request.is_some() {
        let text = if task.asked {
            "it starts where it was asked to go"
        } else {
            "it starts elsewhere"
        };
        work.clear_move(vm, task.asked, Reason::new(text));
    }
}

impl Work<'_> {
    /// Gives a free VM to a host for the time being.
    pub(crate) fn put(&mut self, vm: usize, host: usize) {
        let own = Own::Owned {
            host,
            epoch: None,
            order: OrderKind::Run,
        };
        self.set_own(vm, own, |_| {});
    }

    pub(crate) fn take_back(&mut self, vm: usize) {
        self.set_own(vm, Own::Free, |vm| vm.touched = false);
    }
}

/// The host for a start, and whether it is what a move request asked for.
fn choose(work: &Work<'_>, vm: usize) -> (Choice, bool) {
    let record = work.vms[vm].record;
    let Some(request) = &record.move_request else {
        return (work.choose_start(vm, None), false);
    };
    if let Some(to) = request.to.as_ref().and_then(|to| work.host_index.get(to)) {
        let choice = work.choose_start(vm, Some(to));
        if choice.best.is_some() {
            return (choice, true);
        }
        return (work.choose_start(vm, None), false);
    }
    // "Elsewhere" is any host but the one it was on.
    let last = record.last_host.as_ref();
    let last = last.and_then(|last| work.host_index.get(last));
    let elsewhere = work.choose(&Query {
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
    let advice = match work.vms[vm].own {
        Own::Free => copies::advice(work, vm),
        _ => None,
    };
    format!(
        "no host can take it ({} needed): {}{}",
        mib(work.room.need(vm)[MEMORY]),
        choice.rejections(work),
        advice.map_or(String::new(), |advice| format!("; {advice}"))
    )
}
