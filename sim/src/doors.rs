//! The shell around a leader's storage fencing, as `crates/controller/src/storage.rs` is one: tasks that record a cut, take
//! their turn, call the SAN, and hand in what came of it.
//!
//! ```text
//!   cut:     record --applied--> turn --> shut each door --> proofs
//!   keeper:  turn --> read the state --> for each door look, then open or shut --> take back
//! ```
//! Always holds, as there: one task of a leadership has the turn; tasks of an earlier leadership of the same daemon go on,
//! with the turn of theirs; a daemon that ends takes its tasks with it, but not what the SAN was asked to do.

use crate::event::HostId;
use crate::leader::Purpose;
use crate::mutate::Mutation;
use crate::san::{Answer, Call, CallKind};
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_controller_logic::{
    CutJob, Cuts, Door, KeptDoor, Leases, Restorable, Shut, cut_job, doors_to_keep, taken_back,
    time_for_a_call,
};
use quorate_membership::{HostHealth, Instant};
use quorate_state::{Command, State};
use quorate_types::{HostName, PoolName, Revision};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Bound for shutting the doors of one host.
const CUT_WITHIN: u64 = 15 * SEC;

/// Tasks of one life of a daemon.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    next: u64,
    all: BTreeMap<u64, Task>,
    /// By leadership: who has the turn, and who waits for it.
    turns: BTreeMap<u64, VecDeque<u64>>,
    /// What the keeper saw to last, for a broken one.
    seen: Vec<KeptDoor>,
}

#[derive(Debug)]
struct Task {
    generation: u64,
    term: u64,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Cut {
        job: CutJob,
        shut: Vec<Shut>,
    },
    Keep {
        restorable: Restorable,
        doors: Vec<KeptDoor>,
        at: usize,
        failed: BTreeSet<(HostName, PoolName)>,
        problems: BTreeSet<String>,
        /// Of the state that was read.
        cuts: BTreeMap<HostName, BTreeMap<PoolName, Revision>>,
        back: Vec<(HostName, BTreeMap<PoolName, Revision>)>,
    },
}

/// The lease of a host has run out: the cut that is to be made now, and whether all it may run is dealt with that way.
pub(crate) fn cut_due(
    leases: &mut Leases,
    cuts: &mut Cuts,
    state: &State,
    host: &HostName,
    now: Instant,
) -> (Option<CutJob>, bool) {
    let Some(job) = cut_job(state, host) else {
        return (None, false);
    };
    let complete = job.complete;
    if leases.table.check_share(host, now).is_err() {
        return (None, complete);
    }
    let begins = cuts.begin(host, now);
    if begins {
        leases.table.seal(host);
        leases.sealed_at.entry(host.clone()).or_insert(now);
    }
    (begins.then_some(job), complete && cuts.is_at_it(host))
}

impl World {
    fn new_task(&mut self, me: HostId, work: Work) -> Option<u64> {
        let daemon = self.hosts[me].daemon.as_mut()?;
        let term = daemon.leader.leases.as_ref()?.term;
        let generation = daemon.leader.generation;
        let tasks = &mut daemon.tasks;
        tasks.next += 1;
        let task = Task {
            generation,
            term,
            work,
        };
        tasks.all.insert(tasks.next, task);
        Some(tasks.next)
    }

    fn task(&mut self, me: HostId, id: u64) -> Option<&mut Task> {
        self.hosts[me].daemon.as_mut()?.tasks.all.get_mut(&id)
    }

    /// A silent host is shut out: first of all that is recorded.
    pub(crate) fn begin_cut(&mut self, me: HostId, job: CutJob) {
        let name = job.host.clone();
        self.note(|| format!("{name}: its access to storage is taken away"));
        let command = Command::CutStorage {
            host: job.host.clone(),
            pools: job.pools(),
        };
        let shut = Vec::new();
        if let Some(id) = self.new_task(me, Work::Cut { job, shut }) {
            self.propose(me, "controller", command, Purpose::Task(id));
        }
    }

    /// What can be taken back, and whether the keeper is to look.
    pub(crate) fn keep_doors(&mut self, me: HostId, state: &State, now: Instant) {
        let dirty = self.mutated(Mutation::RestoreDirty);
        let Some(leader) = self.hosts[me].daemon.as_mut().map(|d| &mut d.leader) else {
            return;
        };
        let Some(leases) = leader.leases.as_ref() else {
            return;
        };
        let health = |host: &HostName| leases.table.health(host, now);
        let restorable = match dirty {
            false => quorate_controller_logic::restorable(state, &leases.reports, health),
            true => {
                let cuts = state.storage_cuts.clone().into_iter();
                cuts.filter(|(host, _)| health(host) == HostHealth::Up)
                    .collect()
            }
        };
        if !leader.keeping.begin(state, &restorable, now) {
            return;
        }
        let keep = Work::Keep {
            restorable,
            doors: Vec::new(),
            at: 0,
            failed: BTreeSet::new(),
            problems: BTreeSet::new(),
            cuts: BTreeMap::new(),
            back: Vec::new(),
        };
        if let Some(id) = self.new_task(me, keep) {
            self.take_turn(me, id);
        }
    }

    fn take_turn(&mut self, me: HostId, id: u64) {
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return;
        };
        let Some(task) = daemon.tasks.all.get(&id) else {
            return;
        };
        let queue = daemon.tasks.turns.entry(task.generation).or_default();
        queue.push_back(id);
        if queue.len() == 1 {
            self.has_turn(me, id);
        }
    }

    fn leave_turn(&mut self, me: HostId, id: u64) {
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return;
        };
        let Some(generation) = daemon.tasks.all.get(&id).map(|task| task.generation) else {
            return;
        };
        let Some(queue) = daemon.tasks.turns.get_mut(&generation) else {
            return;
        };
        queue.retain(|waits| *waits != id);
        let next = queue.front().copied();
        if next.is_none() {
            daemon.tasks.turns.remove(&generation);
        }
        if let Some(next) = next {
            self.has_turn(me, next);
        }
    }

    fn has_turn(&mut self, me: HostId, id: u64) {
        let old = self.mutated(Mutation::KeeperOldState);
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return;
        };
        let state = std::sync::Arc::clone(&daemon.state);
        let seen = daemon.tasks.seen.clone();
        let Some(task) = daemon.tasks.all.get_mut(&id) else {
            return;
        };
        match &mut task.work {
            Work::Cut { .. } => self.cut_next(me, id),
            Work::Keep {
                restorable,
                doors,
                cuts,
                ..
            } => {
                *doors = match old && !seen.is_empty() {
                    true => seen,
                    false => doors_to_keep(&state, restorable),
                };
                cuts.clone_from(&state.storage_cuts);
                daemon.tasks.seen.clone_from(doors);
                self.keep_next(me, id);
            }
        }
    }

    fn cut_next(&mut self, me: HostId, id: u64) {
        let Some(Task {
            work: Work::Cut { job, shut },
            ..
        }) = self.task(me, id)
        else {
            return;
        };
        if let Some(door) = job.doors.get(shut.len()).cloned() {
            let host = job.host.clone();
            return self.call(me, id, CallKind::Shut, &host, &door, CUT_WITHIN, None);
        }
        let (job, shut) = (job.clone(), std::mem::take(shut));
        self.leave_turn(me, id);
        let (proofs, problems) = job.proofs(&shut);
        if !proofs.is_empty() {
            self.check_cut_made(&job);
        }
        for proof in &proofs {
            self.note(|| proof.describe());
        }
        self.cut_ended(me, id, &job.host, proofs, problems);
    }

    fn cut_ended(
        &mut self,
        me: HostId,
        id: u64,
        host: &HostName,
        proofs: Vec<quorate_membership::FenceProof>,
        problems: Vec<String>,
    ) {
        let now = self.hosts[me].local(self.now);
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return;
        };
        let task = daemon.tasks.all.remove(&id);
        if task.is_some_and(|task| task.generation == daemon.leader.generation) {
            daemon.leader.cuts.ended(host, proofs, problems, now);
            self.request_round(me, 0);
        }
    }

    /// It is not known whether a task's proposal will be applied: a cut that may be must not meet a host with a lease.
    pub(crate) fn task_unknown(&mut self, me: HostId, id: u64) {
        let cuts = self
            .task(me, id)
            .is_some_and(|task| matches!(task.work, Work::Cut { .. }));
        let leases = self.hosts[me].daemon.as_mut();
        let leases = leases.and_then(|daemon| daemon.leader.leases.as_mut());
        if let Some(leases) = leases.filter(|_| cuts) {
            leases.uncertain = true;
        }
        self.task_recorded(me, id, false);
    }

    /// A proposal of a task is applied, or its outcome is not known.
    pub(crate) fn task_recorded(&mut self, me: HostId, id: u64, good: bool) {
        let Some(task) = self.task(me, id) else {
            return;
        };
        match &task.work {
            Work::Cut { job, .. } if !good => {
                let host = job.host.clone();
                let problems = vec![format!("the cut of {host} cannot be recorded")];
                self.cut_ended(me, id, &host, Vec::new(), problems);
            }
            Work::Cut { .. } => self.take_turn(me, id),
            Work::Keep { .. } => self.take_back_next(me, id),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn call(
        &mut self,
        me: HostId,
        task: u64,
        kind: CallKind,
        host: &HostName,
        door: &Door,
        within: u64,
        knew: Option<Revision>,
    ) {
        if let Some(host) = self.host_id(host) {
            self.san_call(Call {
                me,
                task,
                kind,
                host,
                targets: door.targets.clone(),
                within,
                knew,
            });
        }
    }

    /// The bound for a call of the keeper, if it may make one.
    fn time_left(&self, me: HostId, term: u64) -> Option<u64> {
        let at = &self.hosts[me];
        let now = at.local(self.now);
        let lease = at.daemon.as_ref()?.state.settings().lease.duration;
        if self.mutated(Mutation::OpenWithoutLease) {
            return Some(lease.0 * MS / 2);
        }
        let mine = at.raft.leads(now.0) && at.raft.term == term;
        let ack = self.quorum_ack(me).filter(|_| mine);
        let time = time_for_a_call(lease, ack.map(|ack| now.since(ack)));
        time.map(|time| time.0 * MS)
    }

    /// The next door of the keeper, or its end.
    fn keep_next(&mut self, me: HostId, id: u64) {
        loop {
            let Some(task) = self.task(me, id) else {
                return;
            };
            let term = task.term;
            let Work::Keep { doors, at, .. } = &task.work else {
                return;
            };
            let Some(kept) = doors.get(*at).cloned() else {
                break;
            };
            if let Some(within) = self.time_left(me, term) {
                return self.call(me, id, CallKind::Look, &kept.host, &kept.door, within, None);
            }
            self.door_done(me, id, Err("not sure of its majority".to_owned()));
        }
        self.leave_turn(me, id);
        if let Some(Task {
            work:
                Work::Keep {
                    restorable,
                    failed,
                    back,
                    ..
                },
            ..
        }) = self.task(me, id)
        {
            *back = taken_back(std::mem::take(restorable), failed)
                .into_iter()
                .collect();
        }
        self.take_back_next(me, id);
    }

    fn door_done(&mut self, me: HostId, id: u64, done: Result<(), String>) {
        if let Some(Task {
            work:
                Work::Keep {
                    doors,
                    at,
                    failed,
                    problems,
                    ..
                },
            ..
        }) = self.task(me, id)
        {
            if let (Err(why), Some(kept)) = (done, doors.get(*at)) {
                problems.insert(why);
                failed.insert((kept.host.clone(), kept.door.pool.clone()));
            }
            *at += 1;
        }
    }

    fn take_back_next(&mut self, me: HostId, id: u64) {
        let now = self.hosts[me].local(self.now);
        let Some(daemon) = self.hosts[me].daemon.as_mut() else {
            return;
        };
        let Some(Task {
            work: Work::Keep { back, .. },
            ..
        }) = daemon.tasks.all.get_mut(&id)
        else {
            return;
        };
        if let Some((host, pools)) = back.pop() {
            let command = Command::RestoreStorage { host, pools };
            return self.propose(me, "controller", command, Purpose::Task(id));
        }
        let Some(task) = daemon.tasks.all.remove(&id) else {
            return;
        };
        if let Work::Keep {
            doors, problems, ..
        } = task.work
            && task.generation == daemon.leader.generation
        {
            let problems = problems.into_iter().collect();
            daemon.leader.keeping.ended(doors, problems, now);
        }
    }

    /// The SAN has answered, or the call's time is over.
    pub(crate) fn san_answered(&mut self, me: HostId, call: &Call, why: Option<&'static str>) {
        let answer = self.san_answer(call, why);
        let id = call.task;
        let Some(task) = self.task(me, id) else {
            return;
        };
        let term = task.term;
        let (kept, cuts) = match &mut task.work {
            Work::Cut { shut, .. } => {
                if let Answer::Shut(answer) = answer {
                    shut.push(answer);
                }
                return self.cut_next(me, id);
            }
            Work::Keep {
                doors, at, cuts, ..
            } => (doors.get(*at).cloned(), cuts.clone()),
        };
        let Some(kept) = kept else { return };
        let knew = cuts
            .get(&kept.host)
            .and_then(|cuts| cuts.get(&kept.door.pool).copied());
        let done = match answer {
            Answer::Shut(shut) => shut.into_iter().find_map(Result::err).map_or(Ok(()), Err),
            Answer::Open(done) => done,
            Answer::Look(Err(why)) => Err(why),
            Answer::Look(Ok(open)) => {
                let differs = open.iter().zip(&kept.door.targets);
                let differs = differs.filter(|(open, _)| **open == kept.shut);
                let targets: Vec<String> = differs.map(|(_, target)| target.clone()).collect();
                if !targets.is_empty() {
                    let door = match kept.shut {
                        true => kept.door.clone(),
                        false => Door {
                            targets,
                            ..kept.door.clone()
                        },
                    };
                    let (kind, within) = match kept.shut {
                        true => (CallKind::Shut, Some(CUT_WITHIN)),
                        false => (CallKind::Open, self.time_left(me, term)),
                    };
                    if let Some(within) = within {
                        return self.call(me, id, kind, &kept.host, &door, within, knew);
                    }
                    Err("not sure of its majority".to_owned())
                } else {
                    Ok(())
                }
            }
        };
        self.door_done(me, id, done);
        self.keep_next(me, id);
    }
}
