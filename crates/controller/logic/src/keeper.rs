//! The keeper: when doors are looked at, how each shall be, and which cuts are taken back.
//!
//! ```text
//!   idle --(the doors wanted have changed, a cut can be taken back, or it is time)--> busy --ended--> idle
//!   busy: for each door: sure of the lease? --> look --> open or shut what differs;  then RestoreStorage
//! ```
//! Always holds: what is opened is worked out from a state that was read after the shell got its turn at the doors; a call
//! begins only while this leader's lease outlasts it, under the term in which the keeper began ([`time_for_a_call`]): a task
//! that is left over from an earlier term of the very same host knows only an old state; a cut is taken back only for pools
//! whose doors are all open again. Must not: call a SAN.

use crate::storage::{Door, doors_wanted};
use quorate_membership::Instant;
use quorate_state::State;
use quorate_types::{HostName, Millis, PoolName, Revision};
use std::collections::{BTreeMap, BTreeSet};

/// Doors are looked at this often even if nothing has changed.
const LOOK_EVERY: Millis = Millis::secs(30);
/// A door that could not be set is tried again after this.
const AGAIN: Millis = Millis::secs(2);

/// Cuts that can be taken back: by host the pools, with the revision of the cut.
pub type Restorable = BTreeMap<HostName, BTreeMap<PoolName, Revision>>;

/// A door as the keeper sees to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptDoor {
    /// Whose.
    pub host: HostName,
    /// The door.
    pub door: Door,
    /// A cut of it is recorded.
    pub cut: bool,
    /// It shall be shut: a cut is recorded, and is not being taken back.
    pub shut: bool,
}

/// How all doors shall be, by a state that was read in turn.
#[must_use]
pub fn doors_to_keep(state: &State, restorable: &Restorable) -> Vec<KeptDoor> {
    let kept = doors_wanted(state).into_iter().map(|wanted| {
        let of = |cuts: &BTreeMap<PoolName, Revision>| cuts.get(&wanted.door.pool).copied();
        let now = state.storage_cuts.get(&wanted.host).and_then(of);
        // The very cut that was found to be over, not a later one.
        let back = now.is_some() && now == restorable.get(&wanted.host).and_then(of);
        KeptDoor {
            shut: wanted.shut && !back,
            cut: wanted.shut,
            host: wanted.host,
            door: wanted.door,
        }
    });
    kept.collect()
}

/// The bound for a call that must have ended before another leader can judge: half a lease, if that much is left.
///
/// `ack_age` is the age of the newest message that a majority has answered, in the term in which the keeper began;
/// `None` in any other term, or when this host does not lead.
#[must_use]
pub fn time_for_a_call(lease: Millis, ack_age: Option<Millis>) -> Option<Millis> {
    ack_age
        .is_some_and(|age| age.0 < lease.0 / 4)
        .then_some(Millis(lease.0 / 2))
}

/// Which cuts are to be taken back after the doors were seen to; `failed` are those that could not be set.
#[must_use]
pub fn taken_back(
    mut restorable: Restorable,
    failed: &BTreeSet<(HostName, PoolName)>,
) -> Restorable {
    for (host, pools) in &mut restorable {
        pools.retain(|pool, _| !failed.contains(&(host.clone(), pool.clone())));
    }
    restorable.retain(|_, pools| !pools.is_empty());
    restorable
}

/// When the keeper looks.
#[derive(Debug, Clone, Default)]
pub struct Keeping {
    busy: bool,
    /// The next look is due then.
    due: Instant,
    /// What was seen to last: a change is seen by it.
    seen: Vec<(HostName, Door, bool)>,
    problems: Vec<String>,
}

impl Keeping {
    /// Whether the keeper is to look now. It counts as busy from here.
    pub fn begin(&mut self, state: &State, restorable: &Restorable, now: Instant) -> bool {
        let wanted = doors_wanted(state).into_iter();
        let wanted: Vec<_> = wanted
            .map(|wanted| (wanted.host, wanted.door, wanted.shut))
            .collect();
        let due = self.seen != wanted || now >= self.due || !restorable.is_empty();
        let waits = !self.problems.is_empty() && now < self.due;
        if self.busy || !due || waits || (wanted.is_empty() && restorable.is_empty()) {
            return false;
        }
        self.busy = true;
        true
    }

    /// It has seen to these doors.
    pub fn ended(&mut self, doors: Vec<KeptDoor>, problems: Vec<String>, now: Instant) {
        let wait = match problems.is_empty() {
            true => LOOK_EVERY,
            false => AGAIN,
        };
        let seen = doors.into_iter();
        *self = Self {
            busy: false,
            due: now.plus(wait),
            seen: seen.map(|kept| (kept.host, kept.door, kept.cut)).collect(),
            problems,
        };
    }

    /// What does not get on.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}
