//! What is done when a VM finds no host though others of this plan could be placed otherwise.
//!
//! ```text
//! eject: put it where one or two tentative VMs make room, and find these other hosts (3 deep)
//! retry: take some of them up, place them anew in another order, and keep what is no worse
//! ```
//! Always holds: deterministic (the seed is fixed) and bounded in steps; an outcome is only kept
//! if it places more, compared priority by priority; only what this plan starts is moved.

use crate::fit::Query;
use crate::place::Task;
use crate::work::{Own, Work};
use std::collections::BTreeMap;

/// Hosts looked at, over all ejections of one priority.
const EJECT_STEPS: u32 = 20_000;
/// VMs held against hosts, over all retries of one priority.
const RETRY_STEPS: usize = 200_000;
/// Most retries.
const MAX_RETRIES: u64 = 1500;
/// Most retries in a row that bring nothing.
const MAX_IDLE: u32 = 500;
/// How many VMs may be moved one for the other.
const DEPTH: u32 = 3;

/// Finds places for tasks without one; `first` is the first of the current priority.
pub(crate) fn run(work: &mut Work<'_>, tasks: &mut [Task], first: usize) {
    let open = |work: &Work<'_>, task: &Task| work.vms[task.vm].own == Own::Free;
    let hopeful = hopeful(work, tasks);
    let lost = |work: &Work<'_>, task: &Task| open(work, task) && hopeful(work, task.vm);
    // Where nothing has a place that could be changed, other orders change nothing.
    let some = tasks.iter().any(|task| !open(work, task));
    if !some || !tasks[first..].iter().any(|task| lost(work, task)) {
        return;
    }
    let before: Vec<Own> = tasks.iter().map(|task| work.vms[task.vm].own).collect();
    let mut search = Eject {
        steps: EJECT_STEPS,
        changes: Vec::new(),
    };
    for at in first..tasks.len() {
        if lost(work, &tasks[at]) && !tasks[at].fixed(work) {
            let movable = movable(work, tasks);
            search.place(work, tasks[at].vm, &movable, DEPTH);
        }
    }
    if tasks[first..].iter().any(|task| lost(work, task)) {
        retry(work, tasks, first);
    }
    for (task, before) in tasks.iter_mut().zip(before) {
        let now = work.vms[task.vm].own;
        task.moved |= now != before;
    }
}

/// Tells whether a VM would find room if every tentative one were gone.
fn hopeful(work: &Work<'_>, tasks: &[Task]) -> impl Fn(&Work<'_>, usize) -> bool + use<> {
    let mut free: Vec<Vec<u64>> = (0..work.hosts.len())
        .map(|host| {
            let rows = work.room.have(host).iter().zip(work.room.used(host));
            rows.map(|(have, used)| have.saturating_sub(*used))
                .collect()
        })
        .collect();
    for (vm, host) in tasks
        .iter()
        .filter_map(|task| Some((task.vm, work.seat(task.vm)?)))
    {
        for (free, need) in free[host].iter_mut().zip(work.room.need(vm)) {
            *free = free.saturating_add(*need);
        }
    }
    move |work, vm| {
        let fits = |host: &usize| {
            let mut columns = work.room.need(vm).iter().zip(&free[*host]);
            columns.all(|(need, free)| need <= free)
        };
        work.reachable(vm).iter().any(fits)
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

/// A search by ejection, with what it changed so far.
struct Eject {
    steps: u32,
    /// VM and the tentative host that it had, oldest first.
    changes: Vec<(usize, Option<usize>)>,
}

impl Eject {
    fn put(&mut self, work: &mut Work<'_>, vm: usize, host: usize) {
        self.changes.push((vm, work.seat(vm)));
        work.put(vm, host);
    }

    fn lift(&mut self, work: &mut Work<'_>, vm: usize) {
        self.changes.push((vm, work.seat(vm)));
        work.take_back(vm);
    }

    /// Undoes what was done after the first `mark` changes.
    fn undo(&mut self, work: &mut Work<'_>, mark: usize) {
        while self.changes.len() > mark {
            match self.changes.pop() {
                Some((vm, Some(host))) => {
                    if work.vms[vm].own != Own::Free {
                        work.take_back(vm);
                    }
                    work.put(vm, host);
                }
                Some((vm, None)) => work.take_back(vm),
                None => {}
            }
        }
    }

    /// Places a VM, directly or by moving others. Leaves everything as it was when that fails.
    fn place(&mut self, work: &mut Work<'_>, vm: usize, movable: &[bool], depth: u32) -> bool {
        if let Some(host) = work.best_start(vm, false) {
            self.put(work, vm, host);
            return true;
        }
        if depth == 0 {
            return false;
        }
        for host in work.reachable(vm) {
            let here = work.tentative(host, movable).filter(|at| *at != vm);
            let here: Vec<usize> = here.collect();
            let alone = here.iter().map(|at| vec![*at]);
            let pairs = here.iter().enumerate();
            let pairs = pairs.flat_map(|(n, a)| here[n + 1..].iter().map(|b| vec![*a, *b]));
            let sets: Vec<Vec<usize>> = alone.chain(pairs.filter(|_| depth > 1)).collect();
            for set in sets {
                let Some(left) = self.steps.checked_sub(1) else {
                    return false;
                };
                self.steps = left;
                let mark = self.changes.len();
                if self.swap(work, vm, host, &set, movable, depth) {
                    return true;
                }
                self.undo(work, mark);
            }
        }
        false
    }

    /// Puts a VM in the place of others, and those elsewhere.
    fn swap(
        &mut self,
        work: &mut Work<'_>,
        vm: usize,
        host: usize,
        set: &[usize],
        movable: &[bool],
        depth: u32,
    ) -> bool {
        for other in set {
            self.lift(work, *other);
        }
        let query = Query {
            vm,
            only: Some(host),
            ..Query::default()
        };
        if work.fit(&query, host).is_err() {
            return false;
        }
        self.put(work, vm, host);
        let mut kept = movable.to_vec();
        kept[vm] = false;
        set.iter().all(|other| {
            let placed = self.place(work, *other, &kept, depth - 1);
            kept[*other] = false;
            placed
        })
    }
}

/// Searches for an outcome that places more; without one everything stays as it was.
fn retry(work: &mut Work<'_>, tasks: &[Task], first: usize) {
    let (before, was) = (seats(work, tasks), outcome(work, tasks));
    wander(work, tasks, first);
    if outcome(work, tasks) == was {
        restore(work, tasks, &before);
    }
}

/// Takes some tentative ones up, at random, and places them anew with those that have no place.
fn wander(work: &mut Work<'_>, tasks: &[Task], first: usize) {
    let good = (0..work.hosts.len()).filter(|at| work.hosts[*at].good());
    let largest = work.room.largest(good);
    let mut best = outcome(work, tasks);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut steps = RETRY_STEPS;
    let mut idle = 0;
    for round in 0..MAX_RETRIES {
        if idle > MAX_IDLE {
            return;
        }
        idle += 1;
        // A member without its companions: only where that places more.
        let alone = round % 5 == 4;
        let mut order = lift(work, tasks, round, &mut random);
        let cost = order.len().saturating_mul(work.hosts.len());
        let before = seats(work, tasks);
        let Some(left) = steps.checked_sub(cost.max(1)) else {
            return;
        };
        steps = left;
        for at in &order {
            if work.vms[tasks[*at].vm].own != Own::Free {
                work.take_back(tasks[*at].vm);
            }
        }
        order.sort_by_cached_key(|at| {
            let vm = tasks[*at].vm;
            let size = work.room.size(vm, &largest).max(1);
            // Mostly the small ones go first: more of them may fit.
            let size = if round % 3 > 0 {
                1_000_000 / size
            } else {
                size
            };
            let few = u64::from(work.choices(vm)) + 1;
            let key = u64::MAX - size * (40 + random.below(60)) * 1000 / few;
            (std::cmp::Reverse(work.vms[vm].priority), key, *at)
        });
        for at in &order {
            let vm = tasks[*at].vm;
            if let Some(host) = work.tightest_start(vm, round % 2 == 0, alone) {
                work.put(vm, host);
            }
        }
        let found = outcome(work, tasks);
        if found < best || (alone && found == best) {
            restore(work, tasks, &before);
        } else {
            idle = if found > best { 0 } else { idle };
            best = found;
        }
        if tasks[first..]
            .iter()
            .all(|task| work.vms[task.vm].own != Own::Free)
        {
            return;
        }
    }
}

/// Tasks to be placed anew: all without a place, and some or all of the others.
fn lift(work: &Work<'_>, tasks: &[Task], round: u64, random: &mut Random) -> Vec<usize> {
    let movable = (0..tasks.len()).filter(|at| !tasks[*at].fixed(work));
    let share = [30, 50, 70, 100][usize::try_from(round % 4).unwrap_or(0)];
    // Two hosts are cleared at a time, or a share of everything.
    let hosts = u64::try_from(work.hosts.len()).unwrap_or(1);
    let pair = [random.below(hosts), random.below(hosts)];
    let chosen = |at: &usize, random: &mut Random| match work.seat(tasks[*at].vm) {
        None => true,
        Some(seat) if round % 2 == 1 => pair.contains(&u64::try_from(seat).unwrap_or(0)),
        Some(_) => random.below(100) < share,
    };
    movable.filter(|at| chosen(at, random)).collect()
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

/// How many have a place, by priority, the highest first. One that waits for another without a
/// place counts for nothing.
fn outcome(work: &Work<'_>, tasks: &[Task]) -> Vec<u32> {
    let mut levels = BTreeMap::new();
    for task in tasks {
        let vm = &work.vms[task.vm];
        let level = levels.entry(std::cmp::Reverse(vm.priority)).or_insert(0);
        let mut needs = vm.record.spec.depends_on.keys();
        let lost = needs.any(|other| {
            let other = work.vm_index.get(other).map(|at| &work.vms[at]);
            other.is_some_and(|other| other.wanted && other.own == Own::Free)
        });
        *level += u32::from(vm.own != Own::Free && !lost);
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
    pub(crate) fn reachable(&self, vm: usize) -> Vec<usize> {
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
