//! Storage fencing beside the loop: cuts of silent hosts, and the keeper that holds doors as the state wants them.
//!
//! ```text
//!   idle --start--> CutStorage committed --> doors shut, looked at --> proofs kept until the host owns nothing
//!    ^                       |                      |
//!    '------ back-off <------+----------failed------'
//! ```
//! What is tried when, and what is opened, is decided by `quorate-controller-logic` ([`Cuts`], [`Keeping`]).
//!
//! Always holds: one task at a time touches the doors of this leadership ([`Storage::turn`]), and reads the state after
//! it got its turn, so the keeper cannot open what a cut has shut; a door is opened only while this leader's own lease
//! outlasts the call, so a leader that was deposed opens nothing that its successor shuts. A task of an earlier term of
//! this very host opens nothing either: what it knows is older than what others did in between.

use crate::group::{Group, ProposeFailure};
use async_trait::async_trait;
use quorate_controller_logic::{
    CutJob, Cuts, Door, Keeping, KeptDoor, Restorable, Shut, doors_to_keep, taken_back,
    time_for_a_call,
};
use quorate_membership::{FenceProof, Instant};
use quorate_state::Command;
use quorate_types::{HostName, Millis};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{info, warn};

/// Bound for shutting the doors of one host.
const CUT_WITHIN: Duration = Duration::from_secs(15);
/// Targets that are opened in one call, whose time is bounded by what is left of the leader's lease: many can be new at a
/// time, and a SAN may be told from afar.
const DOORS_AT_ONCE: usize = 32;

/// Tells SANs whom to let in. The daemon puts its drivers behind it.
#[async_trait]
pub trait StorageGate: Send + Sync + 'static {
    /// Shuts a host out of the door's targets and looks whether it is: for each target how, and the milliseconds.
    async fn shut(&self, door: &Door, within: Duration) -> Shut;

    /// Lets a host in to the door's targets; returns what is to be said of targets that the SAN does not have, which keep
    /// the host from nothing else.
    ///
    /// # Errors
    /// A sentence for people.
    async fn open(&self, door: &Door, within: Duration) -> Result<Vec<String>, String>;

    /// Which of the door's targets let the host in.
    ///
    /// # Errors
    /// A sentence for people.
    async fn look(&self, door: &Door, within: Duration) -> Result<Vec<bool>, String>;
}

/// A cut that ended.
#[derive(Debug)]
pub(crate) struct CutFinished {
    generation: u64,
    pub(crate) host: HostName,
    proofs: Vec<FenceProof>,
    problems: Vec<String>,
    /// Whether it is recorded, or ever will be, is not known.
    unknown: bool,
}

/// All hosts' storage fencing, and the doors.
pub(crate) struct Storage {
    gate: Arc<dyn StorageGate>,
    group: Arc<dyn Group>,
    generation: u64,
    cuts: Cuts,
    done: mpsc::Sender<CutFinished>,
    turn: Arc<tokio::sync::Mutex<()>>,
    kept: Arc<Mutex<Keeping>>,
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
            cuts: Cuts::default(),
            done,
            turn: Arc::default(),
            kept: Arc::default(),
        }
    }

    /// Another leadership.
    pub(crate) fn forget_all(&mut self) {
        self.generation += 1;
        self.cuts = Cuts::default();
        // A task of the past may wait for its turn or for a SAN: it must not hold up this leadership's.
        self.turn = Arc::default();
        self.kept = Arc::default();
    }

    /// Begins a cut unless one runs, has been made, or has just failed. Returns whether it did.
    pub(crate) fn start(&mut self, job: CutJob, now: Instant) -> bool {
        if !self.cuts.begin(&job.host, now) {
            return false;
        }
        let (gate, group) = (Arc::clone(&self.gate), Arc::clone(&self.group));
        let (turn, done) = (Arc::clone(&self.turn), self.done.clone());
        let generation = self.generation;
        tokio::spawn(async move {
            let finished = cut(&*gate, &*group, &turn, job, generation).await;
            // The receiver is gone only when the controller has ended.
            let _ = done.send(finished).await;
        });
        true
    }

    /// A cut ended; one of an earlier leadership counts for nothing. Returns whether it is known if it was recorded: one that
    /// may be yet must not meet a host that has a lease again.
    pub(crate) fn finished(&mut self, finished: CutFinished, now: Instant) -> bool {
        let CutFinished {
            generation,
            host,
            proofs,
            problems,
            unknown,
        } = finished;
        if generation != self.generation {
            return true;
        }
        for proof in &proofs {
            info!(%host, "{}", proof.describe());
        }
        for problem in &problems {
            warn!(%host, problem, "a disk could not be cut off");
        }
        self.cuts.ended(&host, proofs, problems, now);
        !unknown
    }

    pub(crate) fn running(&self, host: &HostName) -> bool {
        self.cuts.running(host)
    }

    /// A cut is under way or made: nothing harsher is needed meanwhile.
    pub(crate) fn is_at_it(&self, host: &HostName) -> bool {
        self.cuts.is_at_it(host)
    }

    /// Proofs at hand.
    pub(crate) fn proofs(&self) -> impl Iterator<Item = &FenceProof> {
        self.cuts.proofs()
    }

    /// What does not get on.
    pub(crate) fn problems(&self) -> Vec<String> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let cuts = self.cuts.problems();
        cuts.chain(kept.problems()).cloned().collect()
    }

    /// The host is settled or was heard again.
    pub(crate) fn forget(&mut self, host: &HostName) {
        self.cuts.forget(host);
    }

    /// Lets the keeper look at the doors if something has changed or it is time, and take back what can be.
    /// `term` is the one in which that was found out.
    pub(crate) fn keep(&self, restorable: Restorable, term: u64, now: Instant) {
        let state = self.group.state();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.begin(&state, &restorable, now) {
            return;
        }
        drop(kept);
        let keeper = Keeper {
            gate: Arc::clone(&self.gate),
            group: Arc::clone(&self.group),
            turn: Arc::clone(&self.turn),
            kept: Arc::clone(&self.kept),
            term,
        };
        tokio::spawn(keeper.run(restorable));
    }
}

/// Commits the cut, shuts the doors, weighs what was seen.
async fn cut(
    gate: &dyn StorageGate,
    group: &dyn Group,
    turn: &tokio::sync::Mutex<()>,
    job: CutJob,
    generation: u64,
) -> CutFinished {
    let command = Command::CutStorage {
        host: job.host.clone(),
        pools: job.pools(),
    };
    let recorded = group.propose("controller", command).await;
    if let Err(error) = recorded {
        return CutFinished {
            generation,
            problems: vec![format!(
                "the cut of {} cannot be recorded: {error}",
                job.host
            )],
            host: job.host,
            proofs: Vec::new(),
            unknown: matches!(error, ProposeFailure::Unknown(_)),
        };
    }
    let _turn = turn.lock().await;
    let mut shut = Vec::new();
    for door in &job.doors {
        shut.push(gate.shut(door, CUT_WITHIN).await);
    }
    let (proofs, problems) = job.proofs(&shut);
    CutFinished {
        generation,
        host: job.host,
        proofs,
        problems,
        unknown: false,
    }
}

struct Keeper {
    gate: Arc<dyn StorageGate>,
    group: Arc<dyn Group>,
    turn: Arc<tokio::sync::Mutex<()>>,
    kept: Arc<Mutex<Keeping>>,
    /// The term that it works for.
    term: u64,
}

impl Keeper {
    async fn run(self, restorable: Restorable) {
        let mut problems = BTreeSet::new();
        let mut failed = BTreeSet::new();
        let doors = {
            let _turn = self.turn.lock().await;
            let doors = doors_to_keep(&self.group.state(), &restorable);
            for kept in &doors {
                let pool = &kept.door.pool;
                match self.set(kept).await {
                    Ok(told) => {
                        problems.extend(told.iter().map(|told| format!("pool {pool}: {told}")));
                    }
                    Err(error) => {
                        problems.insert(format!("pool {pool}: {error}"));
                        failed.insert((kept.host.clone(), pool.clone()));
                    }
                }
            }
            doors
        };
        for (host, pools) in taken_back(restorable, &failed) {
            info!(%host, "let in again at the SAN");
            let command = Command::RestoreStorage { host, pools };
            if let Err(error @ ProposeFailure::Refused(_)) =
                self.group.propose("controller", command).await
            {
                problems.insert(error.to_string());
            }
        }
        for problem in &problems {
            warn!(problem, "the SAN's access lists");
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.ended(
            doors,
            problems.into_iter().collect(),
            crate::clock::boot_now(),
        );
    }

    /// Brings one door into the wanted state, if it is not in it. Returns what is not as it should be and in nobody's way.
    async fn set(&self, kept: &KeptDoor) -> Result<Vec<String>, String> {
        let door = &kept.door;
        let within = self.time_left()?;
        let open = self.gate.look(door, within).await?;
        if kept.shut {
            if open.iter().all(|open| !open) {
                return Ok(Vec::new());
            }
            let shut = self.gate.shut(door, CUT_WITHIN).await;
            let failed = shut.into_iter().find_map(Result::err);
            return failed.map_or(Ok(Vec::new()), Err);
        }
        let closed = door.targets.iter().zip(open).filter(|(_, open)| !open);
        let closed: Vec<String> = closed.map(|(target, _)| target.clone()).collect();
        let mut told = Vec::new();
        for some in closed.chunks(DOORS_AT_ONCE) {
            let door = Door {
                targets: some.to_vec(),
                ..door.clone()
            };
            told.extend(self.gate.open(&door, self.time_left()?).await?);
        }
        Ok(told)
    }

    /// For a call that must have ended before another leader can judge: half a lease, if that much is left.
    fn time_left(&self) -> Result<Duration, String> {
        let lease = self.group.state().settings().lease.duration;
        let leading = *self.group.leadership().borrow();
        let mine = leading.is_self && leading.term == self.term;
        // Rounded up: it must not look younger than it is.
        let age = self.group.quorum_ack_age().filter(|_| mine).map(|age| {
            let millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
            Millis(millis.saturating_add(1))
        });
        let time = time_for_a_call(lease, age).map(Millis::as_duration);
        time.ok_or_else(|| "this leader is not sure of its majority: nothing is let in".to_owned())
    }
}

#[cfg(test)]
#[path = "storage_tests.rs"]
mod tests;
