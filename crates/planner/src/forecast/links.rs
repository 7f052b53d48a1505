//! Migrations that run side by side share the links of their hosts.
//!
//! ```text
//! prepare (at its own pace) --> send memory at the share of the busier of its two hosts --> arrived
//! ```
//! Always holds: the shares change only when a migration begins, begins to send, or ends; whole numbers
//! only, rounded so that nothing arrives early.

use super::estimate::{Estimates, MIGRATION_BASE};
use quorate_membership::Instant;
use quorate_types::{HostName, Millis, VmName};
use std::collections::BTreeMap;

/// A migration on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Transfer {
    hosts: [HostName; 2],
    pub(super) began: Instant,
    /// When it has been prepared.
    sends_at: Instant,
    /// What is left to send, in thousandths of a millisecond that it would take alone.
    left: u64,
    /// Since when it goes at this rate.
    since: Instant,
    permille: u64,
}

impl Transfer {
    /// One that would take so long alone.
    pub(super) fn new(hosts: [HostName; 2], now: Instant, alone: Millis) -> Self {
        let base = alone.0.min(MIGRATION_BASE.0);
        let sends_at = now.plus(Millis(base));
        Self {
            hosts,
            began: now,
            sends_at,
            left: (alone.0 - base).saturating_mul(1000),
            since: sends_at,
            permille: 1000,
        }
    }

    /// When it arrives if nothing else begins or ends.
    pub(super) fn due(&self) -> Instant {
        let rest = self.left.div_ceil(self.permille.max(1));
        self.since.max(self.sends_at).plus(Millis(rest))
    }

    fn sends(&self, now: Instant) -> bool {
        now >= self.sends_at
    }

    /// Counts what was sent until now.
    fn advance(&mut self, now: Instant) {
        if self.sends(now) {
            let spent = now.since(self.since.max(self.sends_at)).0;
            self.left = self
                .left
                .saturating_sub(spent.saturating_mul(self.permille));
            self.since = now;
        }
    }
}

/// All migrations on their way.
#[derive(Debug, Clone, Default)]
pub(super) struct Links {
    pub(super) transfers: BTreeMap<VmName, Transfer>,
}

impl Links {
    /// Shares the links out anew, as of now. Call it when a migration began, began to send, or ended.
    pub(super) fn share(&mut self, now: Instant, estimates: &Estimates) {
        let mut counts: BTreeMap<HostName, u64> = BTreeMap::new();
        for transfer in self.transfers.values_mut() {
            transfer.advance(now);
            if transfer.sends(now) {
                for host in &transfer.hosts {
                    *counts.entry(host.clone()).or_default() += 1;
                }
            }
        }
        for transfer in self.transfers.values_mut() {
            let busiest = transfer.hosts.iter().filter_map(|host| counts.get(host));
            let count = busiest.max().copied().unwrap_or(1);
            transfer.permille = estimates.share_permille(count);
        }
    }

    /// When the next one begins to send or arrives.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let next = self
            .transfers
            .values()
            .map(|transfer| match transfer.sends(now) {
                true => transfer.due(),
                false => transfer.sends_at,
            });
        next.min()
    }
}
