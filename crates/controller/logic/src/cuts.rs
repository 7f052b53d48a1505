//! Cuts of silent hosts from their storage, as one leadership makes them.
//!
//! ```text
//!   none --begin--> Running --ended, some proof--> Cut --(a disk failed: begin after a wait)--> Running
//!                      '------ended, no proof----> Failed --begin after a wait--> Running
//! ```
//! Always holds: one cut of a host at a time; proofs are kept until the host is settled or heard again ([`Cuts::forget`]),
//! and never outlive the leadership. Must not: make the cut; the shell does, and tells how it ended.

use crate::retry::fence_again_after;
use quorate_membership::{FenceProof, Instant};
use quorate_types::HostName;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
enum Attempt {
    Running,
    Failed {
        at: Instant,
    },
    Cut {
        at: Instant,
        proofs: Vec<FenceProof>,
        failed: bool,
    },
}

/// All hosts' cuts.
#[derive(Debug, Clone, Default)]
pub struct Cuts {
    attempts: BTreeMap<HostName, (u32, Attempt)>,
    problems: BTreeMap<HostName, Vec<String>>,
}

impl Cuts {
    /// Whether a cut is to be made now: none runs, has been made whole, or has just failed. It counts as running from here.
    pub fn begin(&mut self, host: &HostName, now: Instant) -> bool {
        let tries = match self.attempts.get(host) {
            None => 0,
            Some((_, Attempt::Running | Attempt::Cut { failed: false, .. })) => return false,
            Some((tries, Attempt::Failed { at } | Attempt::Cut { at, .. })) => {
                if now.since(*at) < fence_again_after(*tries) {
                    return false;
                }
                *tries
            }
        };
        self.attempts
            .insert(host.clone(), (tries + 1, Attempt::Running));
        true
    }

    /// A cut of this leadership ended.
    pub fn ended(
        &mut self,
        host: &HostName,
        proofs: Vec<FenceProof>,
        problems: Vec<String>,
        now: Instant,
    ) {
        let tries = self.attempts.get(host).map_or(1, |(tries, _)| *tries);
        let attempt = match proofs.is_empty() {
            true => Attempt::Failed { at: now },
            false => Attempt::Cut {
                at: now,
                proofs,
                failed: !problems.is_empty(),
            },
        };
        self.problems.insert(host.clone(), problems);
        self.attempts.insert(host.clone(), (tries, attempt));
    }

    /// A cut is under way.
    #[must_use]
    pub fn running(&self, host: &HostName) -> bool {
        matches!(self.attempts.get(host), Some((_, Attempt::Running)))
    }

    /// A cut is under way or made: nothing harsher is needed meanwhile.
    #[must_use]
    pub fn is_at_it(&self, host: &HostName) -> bool {
        matches!(
            self.attempts.get(host),
            Some((_, Attempt::Running | Attempt::Cut { failed: false, .. }))
        )
    }

    /// Proofs at hand.
    pub fn proofs(&self) -> impl Iterator<Item = &FenceProof> {
        let attempts = self.attempts.values();
        attempts.flat_map(|(_, attempt)| match attempt {
            Attempt::Cut { proofs, .. } => proofs.as_slice(),
            _ => &[],
        })
    }

    /// What does not get on.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        self.problems.values().flatten()
    }

    /// The host is settled or was heard again.
    pub fn forget(&mut self, host: &HostName) {
        if !self.running(host) {
            self.attempts.remove(host);
            self.problems.remove(host);
        }
    }
}
