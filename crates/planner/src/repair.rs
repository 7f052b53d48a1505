//! What is done when a VM finds no host though others of this plan could be placed otherwise.
//!
//! ```text
//! eject: put it where one or two tentative VMs make room, and find these other hosts (3 deep)
//! retry: place all tentative ones anew in other orders, tightly, and keep the best outcome
//! ```
//! Always holds: deterministic (the seed is fixed) and bounded in steps; an outcome is only kept
//! if it places more, compared priority by priority; only what this plan starts is moved.

use crate::fit::Query;
use crate::place::Task;
use crate::work::{Own, Work};

/// Hosts looked at, over all ejections of one priority.
const EJECT_STEPS: u32 = 20_000;
/// VMs held against hosts, over all retries of one priority.
const RETRY_STEPS: usize = 400_000;
/// Most retries.
const MAX_RETRIES: u64 = 120;
/// How many VMs may be moved one for the other.
const DEPTH: u32 = 3;

/// Finds places for tasks without one; `first` is the first of the current priority.
pub(crate) fn run(work: &mut Work<'_>, tasks: &mut [Task], first: usize) {
    let open = |work: &Work<'_>, task: &Task| work.vms[task.vm].own == Own::Free;
    if !tasks[first..].iter().any(|task| open(work, task)) {
        return;
    }
    let before: Vec<Own> = tasks.iter().map(|task| work.vms[task.vm].own).collect();
    let mut steps = EJECT_STEPS;
    for at in first..tasks.len() {
        if open(work, &tasks[at]) && !tasks[at].fixed(work) {
            let movable = movable(work, tasks);
            eject(work, tasks[at].vm, &movable, DEPTH, &mut steps);
        }
    }
    if tasks[first..].iter().any(|task| open(work, task)) {
        retry(work, tasks, first);
    }
    for (task, before) in tasks.iter_mut().zip(before) {
        let now = work.vms[task.vm].own;
        task.moved |= now != before;
    }
}

/// VMs that may be moved aside.
fn movable(work: &Work<'_>, tasks: &[Task]) -> Vec<bool> {
    let mut movable = vec![false; work.vms.len()];
    for task in tasks {
        movable[task.vm] = !task.fixed(work) && work.groups.of[task.vm].is_none();
    }
    movable
}

/// Places a VM, directly or by moving others. Leaves everything as it was when that fails.
fn eject(work: &mut Work<'_>, vm: usize, movable: &[bool], depth: u32, steps: &mut u32) -> bool {
    if let Some(host) = work.best_start(vm, false) {
        work.put(vm, host);
        return true;
    }
    if depth == 0 {
        return false;
    }
    for host in work.reachable(vm) {
        let here: Vec<usize> = work
            .tentative(host, movable)
            .filter(|at| *at != vm)
            .collect();
        let alone = here.iter().map(|at| vec![*at]);
        let pairs = here.iter().enumerate();
        let pairs = pairs.flat_map(|(n, a)| here[n + 1..].iter().map(|b| vec![*a, *b]));
        let sets: Vec<Vec<usize>> = alone.chain(pairs.filter(|_| depth > 1)).collect();
        for set in sets {
            let Some(left) = steps.checked_sub(1) else {
                return false;
            };
            *steps = left;
            if swap(work, vm, host, &set, movable, depth, steps) {
                return true;
            }
        }
    }
    false
}

/// Puts a VM in the place of others, and those elsewhere.
fn swap(
    work: &mut Work<'_>,
    vm: usize,
    host: usize,
    set: &[usize],
    movable: &[bool],
    depth: u32,
    steps: &mut u32,
) -> bool {
    for other in set {
        work.take_back(*other);
    }
    let query = Query {
        vm,
        only: Some(host),
        ..Query::default()
    };
    if work.fit(&query, host).is_ok() {
        work.put(vm, host);
        let mut kept = movable.to_vec();
        kept[vm] = false;
        let mut done = 0;
        while done < set.len() && eject(work, set[done], &kept, depth - 1, steps) {
            kept[set[done]] = false;
            done += 1;
        }
        if done == set.len() {
            return true;
        }
        for other in &set[..done] {
            work.take_back(*other);
        }
        work.take_back(vm);
    }
    for other in set {
        work.put(*other, host);
    }
    false
}

/// Other orders. What an ejection moved deeper down is undone by the next one that is kept.
fn retry(work: &mut Work<'_>, tasks: &mut [Task], first: usize) {
    let movable: Vec<usize> = (0..tasks.len())
        .filter(|at| !tasks[*at].fixed(work))
        .collect();
    let cost = movable.len().saturating_mul(work.hosts.len()).max(1);
    let retries = u64::try_from(RETRY_STEPS / cost)
        .unwrap_or(0)
        .min(MAX_RETRIES);
    let good = (0..work.hosts.len()).filter(|at| work.hosts[*at].good());
    let largest = work.room.largest(good);
    let mut best = outcome(work, tasks);
    let mut seats = seats(work, tasks);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..retries {
        let mut order: Vec<(bool, std::cmp::Reverse<i32>, u64, usize)> = movable
            .iter()
            .map(|at| {
                let vm = tasks[*at].vm;
                let size = work.room.size(vm, &largest).max(1);
                let spread = 50 + random.below(1 + 25 * (round % 8));
                // Every other round the small ones go first: more of them may fit.
                let size = if round % 4 == 3 {
                    1_000_000 / size
                } else {
                    size
                };
                let few = u64::from(work.choices(vm)) + 1;
                let key = u64::MAX - size * spread * 1000 / few;
                let priority = std::cmp::Reverse(work.vms[vm].priority);
                (*at >= first && !tasks[*at].starts, priority, key, *at)
            })
            .collect();
        order.sort_unstable();
        for at in &movable {
            if work.vms[tasks[*at].vm].own != Own::Free {
                work.take_back(tasks[*at].vm);
            }
        }
        for (_, _, _, at) in &order {
            let vm = tasks[*at].vm;
            if let Some(host) = work.tightest_start(vm, round % 2 == 0) {
                work.put(vm, host);
            }
        }
        let found = outcome(work, tasks);
        if found > best {
            best = found;
            seats = self::seats(work, tasks);
        }
        if best.iter().all(|level| level.missing == 0) {
            break;
        }
    }
    restore(work, tasks, &seats);
}

fn seats(work: &Work<'_>, tasks: &[Task]) -> Vec<Option<usize>> {
    tasks.iter().map(|task| work.seat(task.vm)).collect()
}

fn restore(work: &mut Work<'_>, tasks: &[Task], seats: &[Option<usize>]) {
    for (task, seat) in tasks.iter().zip(seats) {
        if work.seat(task.vm) != *seat && work.vms[task.vm].own != Own::Free {
            work.take_back(task.vm);
        }
    }
    for (task, seat) in tasks.iter().zip(seats) {
        if let Some(host) = seat.filter(|_| work.vms[task.vm].own == Own::Free) {
            work.put(task.vm, host);
        }
    }
}

/// How many of a priority have a place: those that start count before those that wait.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Level {
    start: u32,
    wait: u32,
    missing: u32,
}

/// Outcome by priority, the highest first.
fn outcome(work: &Work<'_>, tasks: &[Task]) -> Vec<Level> {
    let mut levels = std::collections::BTreeMap::new();
    for task in tasks {
        let vm = &work.vms[task.vm];
        let level = levels
            .entry(std::cmp::Reverse(vm.priority))
            .or_insert(Level {
                start: 0,
                wait: 0,
                missing: 0,
            });
        match (vm.own == Own::Free, task.starts) {
            (true, _) => level.missing += 1,
            (false, true) => level.start += 1,
            (false, false) => level.wait += 1,
        }
    }
    levels.into_values().collect()
}

/// A small generator (xorshift): the same numbers on every host.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }
}

impl Work<'_> {
    /// Hosts that could take a VM that starts, if they were empty.
    fn reachable(&self, vm: usize) -> Vec<usize> {
        let query = Query {
            vm,
            ..Query::default()
        };
        self.ask(&query).set.iter().collect()
    }

    /// VMs on a host that only this plan put there and that may be moved aside.
    fn tentative<'w>(
        &'w self,
        host: usize,
        movable: &'w [bool],
    ) -> impl Iterator<Item = usize> + 'w {
        let here =
            move |own: Own| matches!(own, Own::Owned { host: at, epoch: None, .. } if at == host);
        (0..self.vms.len()).filter(move |vm| movable[*vm] && here(self.vms[*vm].own))
    }
}
