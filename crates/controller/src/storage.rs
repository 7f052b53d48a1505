//! Storage fencing beside the loop: cuts of silent hosts, and the keeper that holds doors as the state wants them.
//!
//! ```text
//!   idle --start--> CutStorage committed --> doors shut, looked at --> proofs kept until the host owns nothing
//!    ^                       |                      |
//!    '------ back-off <------+----------failed------'
//! ```
//! Always holds: one task at a time touches the doors of this leadership ([`Storage::turn`]), and reads the state after
//! it got its turn, so the keeper cannot open what a cut has shut; a door is opened only while this leader's own lease
//! outlasts the call, so a leader that was deposed opens nothing that its successor shuts.

use crate::group::{Group, ProposeFailure};
use async_trait::async_trait;
use quorate_controller_logic::{CutJob, Door, Shut, doors_wanted, fence_again_after};
use quorate_membership::{FenceProof, Instant};
use quorate_state::Command;
use quorate_types::{HostName, Millis, PoolName, Revision};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{info, warn};

/// Bound for shutting the doors of one host.
const CUT_WITHIN: Duration = Duration::from_secs(15);
/// Doors are looked at this often even if nothing has changed.
const LOOK_EVERY: Millis = Millis::secs(30);
/// A door that could not be set is tried again after this.
const AGAIN: Millis = Millis::secs(2);

/// Tells SANs whom to let in. The daemon puts its drivers behind it.
#[async_trait]
pub trait StorageGate: Send + Sync + 'static {
    /// Shuts a host out of the door's targets and looks whether it is: for each target how, and the milliseconds.
    async fn shut(&self, door: &Door, within: Duration) -> Shut;

    /// Lets a host in to the door's targets.
    ///
    /// # Errors
    /// A sentence for people.
    async fn open(&self, door: &Door, within: Duration) -> Result<(), String>;

    /// Which of the door's targets let the host in.
    ///
    /// # Errors
    /// A sentence for people.
    async fn look(&self, door: &Door, within: Duration) -> Result<Vec<bool>, String>;
}

enum Attempt {
    Running,
    Failed {
        at: Instant,
        attempts: u32,
    },
    Cut {
        at: Instant,
        proofs: Vec<FenceProof>,
        failed: bool,
    },
}

/// A cut that ended.
#[derive(Debug)]
pub(crate) struct CutFinished {
    generation: u64,
    pub(crate) host: HostName,
    proofs: Vec<FenceProof>,
    problems: Vec<String>,
}

/// All hosts' storage fencing, and the doors.
pub(crate) struct Storage {
    gate: Arc<dyn StorageGate>,
    group: Arc<dyn Group>,
    generation: u64,
    attempts: BTreeMap<HostName, (u32, Attempt)>,
    problems: BTreeMap<HostName, Vec<String>>,
    done: mpsc::Sender<CutFinished>,
    turn: Arc<tokio::sync::Mutex<()>>,
    kept: Arc<Mutex<Kept>>,
}

/// What the keeper found out.
#[derive(Default)]
struct Kept {
    busy: bool,
    /// The next look is due then.
    due: Instant,
    /// What was set last: the next change is seen by it.
    seen: Vec<(HostName, Door, bool)>,
    problems: Vec<String>,
}

impl Storage {
    pub(crate) fn new(
        gate: Arc<dyn StorageGate>,
        group: Arc<dyn Group>,
        done: mpsc::Sender<CutFinished>,
    ) -> Self {
        Self {
            gate,
            group,
            generation: 0,
            attempts: BTreeMap::new(),
            problems: BTreeMap::new(),
            done,
            turn: Arc::default(),
            kept: Arc::default(),
        }
    }

    /// Another leadership.
    pub(crate) fn forget_all(&mut self) {
        self.generation += 1;
        self.attempts.clear();
        self.problems.clear();
        // A task of the past may wait for its turn or for a SAN: it must not hold up this leadership's.
        self.turn = Arc::default();
        self.kept = Arc::default();
    }

    /// Begins a cut unless one runs, has been made, or has just failed. Returns whether it did.
    pub(crate) fn start(&mut self, job: CutJob, now: Instant) -> bool {
        let attempts = match self.attempts.get(&job.host) {
            Some((_, Attempt::Running | Attempt::Cut { failed: false, .. })) => return false,
            Some((tries, Attempt::Cut { at, .. })) => {
                if now.since(*at) < fence_again_after(*tries) {
                    return false;
                }
                *tries
            }
            Some((_, Attempt::Failed { at, attempts })) => {
                if now.since(*at) < fence_again_after(*attempts) {
                    return false;
                }
                *attempts
            }
            None => 0,
        };
        let host = job.host.clone();
        self.attempts.insert(host, (attempts + 1, Attempt::Running));
        let (gate, group) = (Arc::clone(&self.gate), Arc::clone(&self.group));
        let (turn, done) = (Arc::clone(&self.turn), self.done.clone());
        let generation = self.generation;
        tokio::spawn(async move {
            let (proofs, problems) = cut(&*gate, &*group, &turn, &job).await;
            let finished = CutFinished {
                generation,
                host: job.host,
                proofs,
                problems,
            };
            // The receiver is gone only when the controller has ended.
            let _ = done.send(finished).await;
        });
        true
    }

    /// A cut ended; one of an earlier leadership counts for nothing.
    pub(crate) fn finished(&mut self, finished: CutFinished, now: Instant) {
        let CutFinished {
            generation,
            host,
            proofs,
            problems,
        } = finished;
        if generation != self.generation {
            return;
        }
        for proof in &proofs {
            info!(%host, "{}", proof.describe());
        }
        for problem in &problems {
            warn!(%host, problem, "a disk could not be cut off");
        }
        let attempts = self
            .attempts
            .get(&host)
            .map_or(1, |(attempts, _)| *attempts);
        let attempt = match (proofs.is_empty(), problems.is_empty()) {
            (true, _) => Attempt::Failed { at: now, attempts },
            (false, clean) => Attempt::Cut {
                at: now,
                proofs,
                failed: !clean,
            },
        };
        self.problems.insert(host.clone(), problems);
        self.attempts.insert(host, (attempts, attempt));
    }

    pub(crate) fn running(&self, host: &HostName) -> bool {
        matches!(self.attempts.get(host), Some((_, Attempt::Running)))
    }

    /// A cut is under way or made: nothing harsher is needed meanwhile.
    pub(crate) fn is_at_it(&self, host: &HostName) -> bool {
        matches!(
            self.attempts.get(host),
            Some((_, Attempt::Running | Attempt::Cut { failed: false, .. }))
        )
    }

    /// Proofs at hand.
    pub(crate) fn proofs(&self) -> impl Iterator<Item = &FenceProof> {
        self.attempts
            .values()
            .flat_map(|(_, attempt)| match attempt {
                Attempt::Cut { proofs, .. } => proofs.as_slice(),
                _ => &[],
            })
    }

    /// What does not get on.
    pub(crate) fn problems(&self) -> Vec<String> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let cuts = self.problems.values().flatten();
        cuts.chain(&kept.problems).cloned().collect()
    }

    /// The host is settled or was heard again.
    pub(crate) fn forget(&mut self, host: &HostName) {
        if !self.running(host) {
            self.attempts.remove(host);
            self.problems.remove(host);
        }
    }

    /// Lets the keeper look at the doors if something has changed or it is time, and take back what can be.
    pub(crate) fn keep(
        &self,
        restorable: BTreeMap<HostName, BTreeMap<PoolName, Revision>>,
        now: Instant,
    ) {
        let state = self.group.state();
        let wanted: Vec<_> = doors_wanted(&state)
            .into_iter()
            .map(|wanted| (wanted.host, wanted.door, wanted.shut))
            .collect();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let due = kept.seen != wanted || now >= kept.due || !restorable.is_empty();
        let waits = !kept.problems.is_empty() && now < kept.due;
        if kept.busy || !due || waits || (wanted.is_empty() && restorable.is_empty()) {
            return;
        }
        kept.busy = true;
        drop(kept);
        let keeper = Keeper {
            gate: Arc::clone(&self.gate),
            group: Arc::clone(&self.group),
            turn: Arc::clone(&self.turn),
            kept: Arc::clone(&self.kept),
        };
        tokio::spawn(keeper.run(restorable));
    }
}

/// Commits the cut, shuts the doors, weighs what was seen.
async fn cut(
    gate: &dyn StorageGate,
    group: &dyn Group,
    turn: &tokio::sync::Mutex<()>,
    job: &CutJob,
) -> (Vec<FenceProof>, Vec<String>) {
    let command = Command::CutStorage {
        host: job.host.clone(),
        pools: job.pools(),
    };
    let recorded = group.propose("controller", command).await;
    if let Err(error) = recorded {
        return (
            Vec::new(),
            vec![format!(
                "the cut of {} cannot be recorded: {error}",
                job.host
            )],
        );
    }
    let _turn = turn.lock().await;
    let mut shut = Vec::new();
    for door in &job.doors {
        shut.push(gate.shut(door, CUT_WITHIN).await);
    }
    job.proofs(&shut)
}

struct Keeper {
    gate: Arc<dyn StorageGate>,
    group: Arc<dyn Group>,
    turn: Arc<tokio::sync::Mutex<()>>,
    kept: Arc<Mutex<Kept>>,
}

impl Keeper {
    async fn run(self, restorable: BTreeMap<HostName, BTreeMap<PoolName, Revision>>) {
        let mut problems = BTreeSet::new();
        let mut seen = Vec::new();
        {
            let _turn = self.turn.lock().await;
            let state = self.group.state();
            for wanted in doors_wanted(&state) {
                let restores = restorable.get(&wanted.host);
                let back = restores.is_some_and(|pools| {
                    let now = state.storage_cuts.get(&wanted.host);
                    let now = now.and_then(|cuts| cuts.get(&wanted.door.pool));
                    now.is_some() && now == pools.get(&wanted.door.pool)
                });
                let shut = wanted.shut && !back;
                match self.set(&wanted.door, shut).await {
                    Ok(()) => seen.push((wanted.host, wanted.door, wanted.shut)),
                    Err(error) => {
                        problems.insert(format!("pool {}: {error}", wanted.door.pool));
                        seen.push((wanted.host, wanted.door, wanted.shut));
                    }
                }
            }
        }
        if problems.is_empty() {
            for (host, pools) in restorable {
                info!(%host, "let in again at the SAN");
                let command = Command::RestoreStorage { host, pools };
                if let Err(error @ ProposeFailure::Refused(_)) =
                    self.group.propose("controller", command).await
                {
                    problems.insert(error.to_string());
                }
            }
        }
        for problem in &problems {
            warn!(problem, "the SAN's access lists");
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = if problems.is_empty() {
            LOOK_EVERY
        } else {
            AGAIN
        };
        *kept = Kept {
            busy: false,
            due: crate::clock::boot_now().plus(wait),
            seen,
            problems: problems.into_iter().collect(),
        };
    }

    /// Brings one door into the wanted state, if it is not in it.
    async fn set(&self, door: &Door, shut: bool) -> Result<(), String> {
        let within = self.time_left()?;
        let open = self.gate.look(door, within).await?;
        if shut {
            if open.iter().all(|open| !open) {
                return Ok(());
            }
            let shut = self.gate.shut(door, CUT_WITHIN).await;
            return shut.into_iter().find_map(Result::err).map_or(Ok(()), Err);
        }
        let closed = door.targets.iter().zip(open).filter(|(_, open)| !open);
        let door = Door {
            targets: closed.map(|(target, _)| target.clone()).collect(),
            ..door.clone()
        };
        match door.targets.is_empty() {
            true => Ok(()),
            false => self.gate.open(&door, self.time_left()?).await,
        }
    }

    /// For a call that must have ended before another leader can judge: half a lease, if that much is left.
    fn time_left(&self) -> Result<Duration, String> {
        let lease = self.group.state().settings().lease.duration.as_duration();
        let leads = self.group.leadership().borrow().is_self;
        let age = self.group.quorum_ack_age().filter(|_| leads);
        match age.is_some_and(|age| age < lease / 4) {
            true => Ok(lease / 2),
            false => Err("this leader is not sure of its majority: nothing is let in".to_owned()),
        }
    }
}
