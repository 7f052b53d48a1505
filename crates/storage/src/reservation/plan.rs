//! What to do next, from what a device says. Pure.
//!
//! An operation is a wish ([`Wish`]) that is compared with [`Facts`] again and again: read, one
//! command, read, one command, until nothing is left to do. So what is reported as done was
//! read back, and repeating an operation is harmless.
//!
//! ```text
//!                   beside: no hold            owner
//!  read -> refuse? -> register -> done
//!                     register -> strangers (named) -> preempt holder -> reserve -> preempt the others -> done
//! ```
//! Two rules hold everywhere. The **newest epoch wins**: whoever finds a newer key of the
//! cluster than its own, or one as new of another host, changes nothing and is told to stop.
//! And **nobody is pushed out by accident**: an older key is preempted only by an operation
//! whose caller says that its owner is to be cut off, a stranger's only by one that names it ([`Strangers`]).

use std::collections::BTreeSet;

use super::device::{Command, ReservationType};
use super::facts::Facts;
use super::key::ReservationKey;

/// What an operation wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// This host's key.
    pub mine: ReservationKey,
    /// Which place it takes.
    pub role: Role,
    /// What happens to older keys of other hosts.
    pub older: Older,
    /// A newer key that may stay registered, as long as it does not hold the reservation: the
    /// target of a live migration that has not switched over.
    pub beside: Option<ReservationKey>,
    /// Epochs up to this one that are newer than this host's own were given up by commit: they were targets of
    /// migrations that came to nothing, and count as older ones. 0: there are none.
    pub spent: u32,
    /// A cut of this epoch is over: its key counts as an older one.
    pub past_cut: bool,
    /// This host may have reads and writes of its own under way. Then nothing is aborted, because there are targets that wait
    /// for the end of such a command in the very thread that would have to end it (LIO): what would have to be is refused.
    pub busy: bool,
    /// Which strangers are pushed out.
    pub strangers: Strangers,
}

/// Which strangers an operation pushes out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Strangers {
    /// None: whoever is there is a reason to refuse.
    #[default]
    Refuse,
    /// Those that somebody saw and said of that they are gone; another one is a reason to refuse.
    These {
        /// Their keys.
        keys: BTreeSet<u64>,
        /// The reservation may be theirs, or of another type than this cluster's.
        hold: bool,
    },
    /// Whoever is there.
    All,
}

impl Strangers {
    fn may_go(&self, keys: &[u64], hold: bool) -> bool {
        match self {
            Self::Refuse => false,
            Self::These {
                keys: those,
                hold: theirs,
            } => keys.iter().all(|key| those.contains(key)) && (*theirs || !hold),
            Self::All => true,
        }
    }
}

/// The place of a host on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Registered and holding the reservation; nobody else of the cluster is registered.
    Owner,
    /// Registered beside the owner: the target of a live migration before the switchover.
    Beside,
    /// Not registered.
    Nobody,
    /// Keeps that host out, and pushes nobody else out: registered with the key of a cut, which holds the reservation where
    /// nobody else does.
    Cut(u16),
}

/// What an owner does with older keys of other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Older {
    /// They are a reason to refuse.
    Refuse,
    /// They are preempted. Their owner has paused and flushed.
    Preempt,
    /// They are preempted, and what they have under way is aborted.
    PreemptAndAbort,
}

/// Whether this nexus is registered with our key: keys do not tell, commands do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Here {
    /// Nothing was tried yet.
    Unknown,
    /// A command that only a registered nexus may give succeeded.
    Registered,
    /// A command was answered with a conflict, or ours ended the registration.
    NotRegistered,
}

/// The next thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The wish has come true.
    Done,
    /// Give this command, then read again.
    Do(Command),
}

/// Why nothing may be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Somebody else uses the device.
    #[error(
        "a stranger uses it (keys {}{}): give the LUN to this cluster only, or if that user is gone: `quorate storage take POOL/UNIT --force`",
        hex(.keys), held(.holds)
    )]
    Foreign {
        /// The strangers' keys.
        keys: Vec<u64>,
        /// The type of reservation, when a stranger holds it.
        holds: Option<ReservationType>,
    },
    /// The cluster has moved on.
    #[error("{by} has taken over: {mine} must not write any more; stop the guest here")]
    Superseded {
        /// This host's key.
        mine: ReservationKey,
        /// The newer one.
        by: ReservationKey,
    },
    /// The cluster has cut this host off.
    #[error(
        "{mine} was cut off from it: it is let in again when the cluster has heard of this host and what it runs"
    )]
    CutOff {
        /// This host's key.
        mine: ReservationKey,
    },
    /// The previous owner has not let go.
    #[error("{owner} is still registered: take over with a proof that it is cut off or stopped")]
    OlderOwner {
        /// Its key.
        owner: ReservationKey,
    },
    /// Somebody else's commands would have to be aborted while this host's own are under way.
    #[error(
        "somebody else has to be cut off from it: the guest here has to stand still for a moment"
    )]
    Busy,
}

fn hex(keys: &[u64]) -> String {
    let words: Vec<String> = keys.iter().map(|key| format!("{key:#018x}")).collect();
    if words.is_empty() {
        "none".to_owned()
    } else {
        words.join(", ")
    }
}

fn held(kind: &Option<ReservationType>) -> String {
    kind.map_or_else(String::new, |kind| format!("; it holds {kind}"))
}

/// Compares a wish with the facts.
///
/// # Errors
/// When the wish must not come true.
pub fn decide(facts: &Facts, here: Here, wish: &Wish) -> Result<Next, Refusal> {
    if wish.role == Role::Nobody {
        return Ok(leave(facts, here, wish.mine));
    }
    if let Role::Cut(victim) = wish.role {
        strangers(facts, wish)?;
        return Ok(cut(facts, here, wish, victim));
    }
    newest_wins(facts, wish)?;
    let strangers = strangers(facts, wish)?;
    let mine = wish.mine.raw();
    let register = Next::Do(Command::Register { key: mine });
    if wish.role == Role::Beside {
        return Ok(if facts.has(wish.mine) && here == Here::Registered {
            Next::Done
        } else {
            register
        });
    }
    if wish.busy && aborts(facts, wish) {
        return Err(Refusal::Busy);
    }
    if wish.older == Older::Refuse
        && let Some(owner) = older_of_others(facts, wish.mine).next()
    {
        return Err(Refusal::OlderOwner { owner });
    }
    // Where our key is there already, the next command shows whether it is this nexus's.
    if !facts.has(wish.mine) || here == Here::NotRegistered {
        return Ok(register);
    }
    Ok(match strangers.or_else(|| push_out(facts, wish)) {
        Some(command) => Next::Do(command),
        None if here == Here::Registered => Next::Done,
        None => register,
    })
}

/// Ends our own registration; what other paths of ours left behind stays for the next owner.
fn leave(facts: &Facts, here: Here, mine: ReservationKey) -> Next {
    if facts.has(mine) && here != Here::NotRegistered {
        Next::Do(Command::Unregister { key: mine.raw() })
    } else {
        Next::Done
    }
}

/// One host's registrations of this epoch and before it are pushed out, whoever holds the reservation. Somebody must
/// hold it, or everybody may write.
fn cut(facts: &Facts, here: Here, wish: &Wish, victim: u16) -> Next {
    let (mine, key) = (wish.mine, wish.mine.raw());
    let theirs = |other: &ReservationKey| other.host() == victim && other.age() < mine.age();
    let registered = facts.ours(mine.cluster()).find(theirs);
    let held = facts.holder(mine.cluster());
    if registered.is_none() && held.is_some() {
        return Next::Done;
    }
    if !facts.has(mine) || here == Here::NotRegistered {
        return Next::Do(Command::Register { key });
    }
    Next::Do(match registered {
        Some(victim) => Command::Preempt {
            key,
            victim: victim.raw(),
            abort: true,
        },
        None => Command::Reserve { key },
    })
}

/// Whether a key counts as newer than ours.
fn is_newer(other: ReservationKey, wish: &Wish) -> bool {
    let mine = wish.mine;
    let spent = other.epoch() > mine.epoch() && other.epoch() <= wish.spent;
    let past = wish.past_cut && other.is_fence() && other.epoch() == mine.epoch();
    other != mine && other.age() >= mine.age() && !spent && !past
}

fn newest_wins(facts: &Facts, wish: &Wish) -> Result<(), Refusal> {
    let mine = wish.mine;
    let newer = |other: &ReservationKey| is_newer(*other, wish);
    let holder = facts.holder(mine.cluster()).filter(newer);
    let registered = facts
        .ours(mine.cluster())
        .find(|other| newer(other) && wish.beside != Some(*other));
    match holder.or(registered) {
        Some(by) if by.is_fence() && by.epoch() == mine.epoch() => Err(Refusal::CutOff { mine }),
        Some(by) => Err(Refusal::Superseded { mine, by }),
        None => Ok(()),
    }
}

/// Refuses strangers, or says how to push the next one out.
fn strangers(facts: &Facts, wish: &Wish) -> Result<Option<Command>, Refusal> {
    let cluster = wish.mine.cluster();
    let keys = facts.foreign(cluster);
    let stranger_holds = facts.held_by_stranger(cluster);
    if keys.is_empty() && !stranger_holds {
        return Ok(None);
    }
    let may_go = wish.strangers.may_go(&keys, stranger_holds);
    if !may_go || wish.role == Role::Beside {
        return Err(Refusal::Foreign {
            keys,
            holds: facts.held.filter(|_| stranger_holds).map(|held| held.kind),
        });
    }
    let key = wish.mine.raw();
    Ok(Some(match keys.first() {
        Some(victim) => Command::Preempt {
            key,
            victim: *victim,
            abort: true,
        },
        // A reservation of another type that none of the keys left accounts for.
        None => Command::Clear { key },
    }))
}

/// The next older key to preempt, the holder first: its place becomes ours in the same step,
/// so there is no moment without a reservation.
fn push_out(facts: &Facts, wish: &Wish) -> Option<Command> {
    let mine = wish.mine;
    let key = mine.raw();
    let preempt = |victim: ReservationKey| Command::Preempt {
        key,
        victim: victim.raw(),
        abort: aborts(facts, wish),
    };
    match facts.holder(mine.cluster()) {
        Some(holder) if holder != mine => return Some(preempt(holder)),
        Some(_) => {}
        None => return Some(Command::Reserve { key }),
    }
    stale(facts, wish).next().map(preempt)
}

/// The keys of this cluster that an owner pushes out.
fn stale<'f>(facts: &'f Facts, wish: &'f Wish) -> impl Iterator<Item = ReservationKey> + 'f {
    let mine = wish.mine;
    let ours = facts.ours(mine.cluster());
    ours.filter(move |other| {
        *other != mine && !is_newer(*other, wish) && wish.beside != Some(*other)
    })
}

/// Whether somebody may have commands under way that have to be aborted. Not under the key of the cut that kept this host
/// out: it is there to keep it out. Not under this host's own older keys while its guest runs, because then their guests
/// have ended and a session that outlived its kernel was dealt with at this one's start. As soon as one key is somebody
/// else's all are preempted with abort: a target may take a command for one of the reservation's holder, whoever sent it.
fn aborts(facts: &Facts, wish: &Wish) -> bool {
    let mine = wish.mine;
    let harmless = |other: ReservationKey| {
        let own = wish.busy && other.host() == mine.host();
        let past = wish.past_cut && other.is_fence() && other.epoch() == mine.epoch();
        own || past
    };
    let strangers = !facts.foreign(mine.cluster()).is_empty();
    wish.older != Older::Preempt && (strangers || stale(facts, wish).any(|other| !harmless(other)))
}

/// Older keys of other hosts. This host's own older keys are former lives of its own.
fn older_of_others(
    facts: &Facts,
    mine: ReservationKey,
) -> impl Iterator<Item = ReservationKey> + '_ {
    facts
        .ours(mine.cluster())
        .filter(move |other| other.epoch() < mine.epoch() && other.host() != mine.host())
}

#[cfg(test)]
mod tests {
    use super::super::device::ReservationHeld;
    use super::super::key::ClusterTag;
    use super::*;

    const TAG: ClusterTag = ClusterTag::new(0xabc);

    fn key(host: u64, epoch: u64) -> ReservationKey {
        ReservationKey::new(TAG, host, epoch).unwrap()
    }

    /// What has to be aborted, and what an owner does not do while its guest reads and writes.
    #[test]
    fn nothing_is_aborted_that_may_be_the_hosts_own() {
        let fence = |epoch| ReservationKey::fence(TAG, epoch).unwrap();
        let (mine, former, other, newer) = (key(1, 4), key(1, 3), key(2, 3), key(2, 5));
        let (plain, abort, busy) = (Some(false), Some(true), None);
        for (name, keys, quiet, under_writes) in [
            ("the cut that is over", vec![fence(4)], plain, plain),
            ("an older cut", vec![fence(3)], abort, busy),
            ("a former life", vec![former], abort, plain),
            ("both", vec![fence(4), former], abort, plain),
            ("another host's", vec![other], abort, busy),
            (
                "the cut, and another host's",
                vec![fence(4), other],
                abort,
                busy,
            ),
            ("a migration that came to nothing", vec![newer], abort, busy),
        ] {
            let holder = ReservationHeld {
                key: keys[0].raw(),
                kind: ReservationType::WriteExclusiveRegistrantsOnly,
                scope: 0,
            };
            let raw: Vec<u64> = [mine].iter().chain(&keys).map(|key| key.raw()).collect();
            let facts = Facts::new(1, &raw, Some(holder));
            for (is_busy, expected) in [(false, quiet), (true, under_writes)] {
                let wish = Wish {
                    mine,
                    role: Role::Owner,
                    older: Older::PreemptAndAbort,
                    beside: None,
                    spent: 5,
                    past_cut: true,
                    busy: is_busy,
                    strangers: Strangers::Refuse,
                };
                let expected = match expected {
                    Some(abort) => Ok(Next::Do(Command::Preempt {
                        key: mine.raw(),
                        victim: keys[0].raw(),
                        abort,
                    })),
                    None => Err(Refusal::Busy),
                };
                let told = decide(&facts, Here::Registered, &wish);
                assert_eq!(told, expected, "{name}, busy: {is_busy}");
            }
        }
    }
}
