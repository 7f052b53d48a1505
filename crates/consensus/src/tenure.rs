//! A bounded right to act, for a node whose files another machine may open after it.
//!
//! Owns one deadline on CLOCK_BOOTTIME. What always holds: a tenure that ran out, or was ended, never begins again
//! (a new one needs a new node); what a node with a tenure says or stores counts only if the tenure still held
//! *afterwards*. It must not decide who has the right; the lease on the shared disk does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::BootTime;

const ENDED: u64 = 0;

/// The right of one node to act, until a point of CLOCK_BOOTTIME. Clones share it.
#[derive(Debug, Clone)]
pub struct Tenure(Arc<AtomicU64>);

impl Tenure {
    /// Holds until `nanos` of this machine's CLOCK_BOOTTIME.
    pub fn until(nanos: u64) -> Self {
        Self(Arc::new(AtomicU64::new(nanos)))
    }

    /// Prolongs it until `nanos`. False: it has run out, or was ended, and stays so.
    pub fn prolong(&self, nanos: u64) -> bool {
        let now = BootTime::now().as_nanos();
        let prolonged = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |until| {
                (until != ENDED).then_some(if until < now { ENDED } else { until.max(nanos) })
            });
        prolonged.is_ok_and(|until| until >= now)
    }

    /// Ends it now.
    pub fn end(&self) {
        self.0.store(ENDED, Ordering::SeqCst);
    }

    /// Does it hold now?
    pub fn holds(&self) -> bool {
        let until = self.0.load(Ordering::SeqCst);
        until != ENDED && BootTime::now().as_nanos() <= until
    }
}

/// The tenure of a node that may have none: such a node may always act.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(pub(crate) Option<Tenure>);

impl Gate {
    pub(crate) fn open(&self) -> bool {
        self.0.as_ref().is_none_or(Tenure::holds)
    }
}

/// What a node says when its tenure is over.
pub(crate) const OVER: &str = "this node's right to its files has run out";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenure_that_ran_out_is_over_for_good() {
        let now = BootTime::now().as_nanos();
        let tenure = Tenure::until(now + 60_000_000_000);
        assert!(tenure.holds());
        assert!(tenure.prolong(now + 90_000_000_000));
        tenure.end();
        assert!(!tenure.holds());
        assert!(!tenure.prolong(u64::MAX));
        assert!(!tenure.holds());

        let late = Tenure::until(now.saturating_sub(1));
        assert!(!late.holds());
        assert!(!late.prolong(u64::MAX), "a renewal that came too late");
        assert!(!late.holds());
        assert!(Gate(None).open() && !Gate(Some(late)).open());
    }
}
