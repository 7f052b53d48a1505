//! Until when the datapath may serve: the host's lease, as far as its tables deserve it. Pure.
//!
//! ```text
//! granted --> written, unless:  the datapath has refused its tables            until it takes them
//!                               the last one has lapsed and tables are older   until they are as fresh as the grant
//!                               than what the leader knew
//! ```
//! Always holds: while nothing is written the kernel goes silent by itself at the end of what was written last; so a host
//! that cannot load a ring steers by the old one for as long as a lease, in which the leader waits for it, and no longer.

use quorate_types::Revision;

/// The lease, and what keeps it from the datapath.
#[derive(Debug, Default)]
pub(super) struct Lease {
    granted_ns: u64,
    written_ns: u64,
    /// What the tables have to hold after a lapse.
    fresh_from: Revision,
    /// What they hold.
    held: Revision,
    withheld: bool,
}

impl Lease {
    /// The leader has granted a lease; `fresh_from`: what it had applied at most when it granted any.
    pub(super) fn grant(&mut self, deadline_ns: u64, fresh_from: Revision) {
        self.granted_ns = self.granted_ns.max(deadline_ns);
        self.fresh_from = self.fresh_from.max(fresh_from);
    }

    /// The datapath holds the tables of this revision.
    pub(super) fn holds(&mut self, revision: Revision) {
        self.held = self.held.max(revision);
        self.withheld = false;
    }

    /// The datapath has refused its tables. Returns when it will have gone silent.
    pub(super) fn withhold(&mut self) -> u64 {
        self.withheld = true;
        self.written_ns
    }

    /// The deadline to be written now, if there is one.
    pub(super) fn due(&mut self, now_ns: u64) -> Option<u64> {
        let lapsed = self.written_ns <= now_ns;
        let stale = lapsed && self.held < self.fresh_from;
        if self.withheld || stale || self.granted_ns == self.written_ns {
            return None;
        }
        self.written_ns = self.granted_ns;
        Some(self.written_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served() -> Lease {
        let mut lease = Lease::default();
        lease.grant(100, Revision(5));
        assert_eq!(lease.due(10), None, "nothing is loaded");
        lease.holds(Revision(5));
        assert_eq!(lease.due(10), Some(100));
        lease
    }

    #[test]
    fn it_follows_the_grants_while_it_does_not_lapse() {
        let mut lease = served();
        assert_eq!(lease.due(20), None, "it is written");
        // The leader is ahead: as always.
        lease.grant(150, Revision(9));
        assert_eq!(lease.due(50), Some(150));
        lease.grant(120, Revision(9));
        assert_eq!(lease.due(60), None, "never back");
    }

    #[test]
    fn after_a_lapse_the_tables_have_to_be_as_fresh_as_the_grant() {
        let mut lease = served();
        lease.grant(300, Revision(9));
        assert_eq!(lease.due(200), None);
        lease.holds(Revision(8));
        assert_eq!(lease.due(201), None);
        lease.holds(Revision(9));
        assert_eq!(lease.due(202), Some(300));
    }

    #[test]
    fn a_datapath_that_refuses_its_tables_goes_silent() {
        let mut lease = served();
        assert_eq!(lease.withhold(), 100);
        lease.grant(150, Revision(6));
        assert_eq!(lease.due(50), None);
        // It takes them before it is silent: nobody has noticed.
        lease.holds(Revision(6));
        assert_eq!(lease.due(60), Some(150));
        assert_eq!(lease.withhold(), 150);
        lease.grant(400, Revision(7));
        assert_eq!(lease.due(200), None);
        lease.holds(Revision(7));
        assert_eq!(lease.due(210), Some(400));
    }
}
