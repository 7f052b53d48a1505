//! A lease on a shared disk: which one of several hosts may open the files that lie beside it.
//!
//! After the delta leases of Chockler and Malkhi ("Light-Weight Leases for Storage-Centric Coordination"): hosts that
//! cannot talk to each other read and write one small block, and count time by their own clocks.
//!
//! ```text
//!              block unchanged for lease + drift + margin, or given back
//!   Watching ----------------------------------------------------------> Claiming (own block written)
//!     ^  ^                                                                   |
//!     |  '--- another block is there, or the write took too long ------------| `settle` later the own block is
//!     |                                                                      v still there
//!     '--- deadline passed, another block is there, given back ---------- Holding (renews every `renew`)
//! ```
//!
//! Always holds: **never two holders at once**, whatever is delayed and however long, as long as blocks are read and
//! written whole and clocks drift by less than `drift_permille`. Why:
//!
//! 1. A holder holds until `lease` after the *start* of its last complete renewal. A renewal that is complete only after
//!    that point counts for nothing: the holder is out, and must claim anew.
//! 2. Who has seen a block unchanged from the end of one read to the start of another, for longer than `lease` by its own
//!    clock, knows that its holder is out for good: renewal n was begun before the first read, and renewal n+1 was
//!    not on the disk at the second, so it is complete too late (1).
//! 3. Of several that know this, each writes a claim, and each whose write ended within `write_bound` of the start of
//!    the read before it waits for `settle`, which is longer. The write of another such claimant, who read before the own
//!    claim was there, has landed by then; so the last one to write wins and the others see it. A claimant whose
//!    write took longer gives up (its block is watched like any other).
//! 4. A late write can put an old block over a newer one in its place. Each holder reads before it renews: it sees a block
//!    that is not its own and newest, and is out (a pause for all, never two).
//!
//! Must not: read a clock, touch a disk. Its shell reports each read and write with the times of their start and end.

mod block;
#[cfg(test)]
mod tests;

pub use block::{BLOCK_BYTES, Block, checksum};

use crate::Instant;
use quorate_types::Millis;

/// Times of a lease on a disk; the same on all hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskTimings {
    /// How long a renewal is good.
    pub lease: Millis,
    /// Time between two renewals.
    pub renew: Millis,
    /// Time between two looks at somebody else's block.
    pub look: Millis,
    /// A claim is not written later than this after the look that allows it.
    pub write_bound: Millis,
    /// A claim must stay for this long.
    pub settle: Millis,
    /// How much faster one clock may run than another, in thousandths.
    pub drift_permille: u64,
    /// Added to what is waited for the lease of another.
    pub margin: Millis,
}

impl Default for DiskTimings {
    fn default() -> Self {
        Self {
            lease: Millis(1600),
            renew: Millis(300),
            look: Millis(100),
            write_bound: Millis(250),
            settle: Millis(350),
            drift_permille: 10,
            margin: Millis(50),
        }
    }
}

impl DiskTimings {
    /// How long a block must stand still until its holder is out.
    #[must_use]
    pub fn patience(&self) -> Millis {
        Millis(self.lease.0 + self.lease.0 * self.drift_permille / 1000 + self.margin.0)
    }
}

/// What to do next on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskStep {
    /// Read both places.
    Read,
    /// Write this block to its place.
    Write(Block),
    /// Nothing before this time (or a change of what is wanted).
    Wait(Instant),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// `seen`: the newest block and since when it stands still.
    Watching {
        seen: Option<(Seen, Instant)>,
        next: Instant,
    },
    /// The look that allowed it began at `looked`.
    Writing { claim: Block, looked: Instant },
    Claiming {
        claim: Block,
        began: Instant,
        settled: Instant,
    },
    Holding {
        block: Block,
        until: Instant,
        next: Instant,
        writing: Option<Instant>,
    },
}

/// What was read: the key of the newest block, and whose it is; `None`: no block.
type Seen = Option<(u64, u64, u64)>;

/// One host's part in a lease on a disk.
#[derive(Debug, Clone)]
pub struct DiskLease {
    timings: DiskTimings,
    holder: String,
    nonce: u64,
    wanted: bool,
    phase: Phase,
    /// Since when nobody is known to hold it.
    vacant: Option<Instant>,
    other: Option<String>,
}

impl DiskLease {
    /// A host that watches. `nonce` differs for each run of each host.
    #[must_use]
    pub fn new(holder: &str, nonce: u64, timings: DiskTimings) -> Self {
        Self {
            timings,
            holder: holder.to_owned(),
            nonce,
            wanted: false,
            phase: Phase::Watching {
                seen: None,
                next: Instant(0),
            },
            vacant: None,
            other: None,
        }
    }

    /// Whether this host wants to hold it.
    pub fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
    }

    /// Until when this host holds it, by its own clock, and under which generation.
    #[must_use]
    pub fn holds(&self, now: Instant) -> Option<(u64, Instant)> {
        match &self.phase {
            Phase::Holding { block, until, .. } if now <= *until => {
                Some((block.generation, *until))
            }
            _ => None,
        }
    }

    /// For how long nobody is known to hold it.
    #[must_use]
    pub fn vacant_for(&self, now: Instant) -> Option<Millis> {
        self.vacant.map(|since| now.since(since))
    }

    /// The other host that holds it, as far as is known.
    #[must_use]
    pub fn other(&self) -> Option<&str> {
        self.other.as_deref().filter(|_| self.vacant.is_none())
    }

    /// Gives it back. The caller has stopped using what it protects *before*. Returns the block to write, once.
    #[must_use]
    pub fn give_back(&mut self, now: Instant) -> Option<Block> {
        let Phase::Holding { block, .. } = &self.phase else {
            return None;
        };
        let free = Block {
            counter: block.counter + 2,
            held: false,
            ..block.clone()
        };
        self.watch(now);
        Some(free)
    }

    fn watch(&mut self, next: Instant) {
        self.phase = Phase::Watching { seen: None, next };
    }

    /// What to do now.
    pub fn step(&mut self, now: Instant) -> DiskStep {
        match &mut self.phase {
            Phase::Holding { until, .. } if now > *until => {
                self.watch(now);
                DiskStep::Read
            }
            Phase::Holding {
                block,
                next,
                writing,
                ..
            } => match writing {
                Some(_) => {
                    let block = Block {
                        counter: block.counter + 1,
                        ..block.clone()
                    };
                    DiskStep::Write(block)
                }
                None if now >= *next => DiskStep::Read,
                None => DiskStep::Wait(*next),
            },
            Phase::Watching { next, .. } if now < *next => DiskStep::Wait(*next),
            Phase::Watching { .. } => DiskStep::Read,
            Phase::Writing { claim, .. } => DiskStep::Write(claim.clone()),
            Phase::Claiming { settled, .. } if now < *settled => DiskStep::Wait(*settled),
            Phase::Claiming { .. } => DiskStep::Read,
        }
    }

    /// Both places were read, from `began` to `ended`; a place without a whole block is `None`.
    pub fn was_read(&mut self, places: [Option<Block>; 2], began: Instant, ended: Instant) {
        let newest = Block::newest(places);
        let look = self.timings.look;
        match &mut self.phase {
            Phase::Watching { seen, next } => {
                let now = newest
                    .as_ref()
                    .map(|block| (block.generation, block.counter, block.nonce));
                *next = ended.plus(look);
                let since = match seen {
                    Some((before, since)) if *before == now => *since,
                    _ => {
                        *seen = Some((now, ended));
                        ended
                    }
                };
                let given_back = newest.as_ref().is_some_and(|block| !block.held);
                let out = given_back || began > since.plus(self.timings.patience());
                self.other = newest.as_ref().map(|block| block.holder.clone());
                self.vacant = out.then(|| self.vacant.unwrap_or(began));
                if out && self.wanted {
                    let claim = Block {
                        generation: newest.map_or(0, |block| block.generation) + 1,
                        counter: 0,
                        nonce: self.nonce,
                        held: true,
                        holder: self.holder.clone(),
                    };
                    self.phase = Phase::Writing {
                        claim,
                        looked: began,
                    };
                }
            }
            Phase::Claiming {
                claim,
                began: wrote,
                ..
            } => {
                if newest.as_ref() == Some(claim) {
                    self.vacant = None;
                    self.phase = Phase::Holding {
                        block: claim.clone(),
                        until: wrote.plus(self.timings.lease),
                        next: ended,
                        writing: None,
                    };
                } else {
                    self.watch(ended.plus(look));
                }
            }
            Phase::Holding { block, writing, .. } => {
                let mine = newest.is_some_and(|newest| {
                    newest.held
                        && newest.nonce == block.nonce
                        && newest.generation == block.generation
                });
                if mine {
                    *writing = Some(began);
                } else {
                    self.watch(ended);
                }
            }
            Phase::Writing { .. } => {}
        }
    }

    /// The block of the last step was written, from `began` to `ended`.
    pub fn was_written(&mut self, began: Instant, ended: Instant) {
        let timings = self.timings;
        match &mut self.phase {
            Phase::Writing { claim, looked } => {
                self.phase = if ended > looked.plus(timings.write_bound) {
                    Phase::Watching {
                        seen: None,
                        next: ended,
                    }
                } else {
                    Phase::Claiming {
                        claim: claim.clone(),
                        began,
                        settled: ended.plus(timings.settle),
                    }
                };
            }
            Phase::Holding {
                block,
                until,
                next,
                writing,
            } => {
                let Some(read) = writing.take() else { return };
                block.counter += 1;
                if ended > *until {
                    self.watch(ended);
                    return;
                }
                *until = read.plus(timings.lease);
                *next = read.plus(timings.renew).max(ended);
            }
            Phase::Watching { .. } | Phase::Claiming { .. } => {}
        }
    }

    /// A read or write failed: it may, or may not, have happened.
    pub fn failed(&mut self, ended: Instant) {
        let again = ended.plus(self.timings.look);
        match &mut self.phase {
            Phase::Holding {
                next,
                writing,
                block,
                ..
            } => {
                // The counter moves on in any case, so that no block is written twice with a different meaning.
                if writing.take().is_some() {
                    block.counter += 1;
                }
                *next = again;
            }
            _ => self.watch(again),
        }
    }
}
