//! Limits of services, and what guests were kept from sending.
//!
//! Always holds: a pace that is there goes on, whoever attaches the edge again; one whose service is gone is taken away
//! before its index is given to another.

use super::host::Host;
use super::object::{errno, kernel};
use crate::BalancerError;
use crate::abi;
use crate::model::ServiceTable;
use quorate_types::VmName;
use quorate_types::service::Offences;
use std::collections::BTreeMap;

const SECOND: u64 = 1_000_000_000;

/// Nanoseconds between two flows; 0: no limit.
fn every(limit: Option<u32>) -> u64 {
    limit.map_or(0, |rate| SECOND / u64::from(rate.max(1)))
}

/// "It is there" and "there is no room": neither stops an edge.
fn is_harmless(error: &aya::maps::MapError) -> bool {
    matches!(
        errno(error),
        Some(libc::EEXIST | libc::E2BIG | libc::ENOSPC)
    )
}

impl Host {
    /// Before the service's entry says that there are limits.
    pub(super) fn write_limit(
        &mut self,
        index: u16,
        table: &ServiceTable,
    ) -> Result<(), BalancerError> {
        let limit = abi::Limit {
            member_ns: every(table.limits.new_per_member),
            client_ns: every(table.limits.new_per_client),
        };
        let index = u32::from(index);
        let known = self.tables.limits.get(&index, 0);
        if known.map_err(kernel("reading", "limits"))? != limit {
            let written = self.tables.limits.set(index, limit, 0);
            written.map_err(kernel("writing", "limits"))?;
        }
        Ok(())
    }

    /// Paces of an edge in its services. Without room the members have no limit of their own.
    pub(super) fn count_paces(&mut self, ifindex: u32, service: u16) -> Result<(), BalancerError> {
        let key = abi::PairKey {
            ifindex,
            service: u32::from(service),
        };
        match self.tables.paces.insert(key, abi::Pace::default(), 1) {
            Err(error) if !is_harmless(&error) => Err(kernel("writing", "paces")(error)),
            _ => Ok(()),
        }
    }

    /// The service is gone from here.
    pub(super) fn forget_paces(&mut self, index: u16) {
        let taps: Vec<u32> = self.edges.values().map(|edge| edge.ifindex).collect();
        for ifindex in taps {
            self.forget_pace(ifindex, index);
        }
    }

    pub(super) fn forget_pace(&mut self, ifindex: u32, service: u16) {
        let key = abi::PairKey {
            ifindex,
            service: u32::from(service),
        };
        // Most taps never had one.
        let _ = self.tables.paces.remove(&key);
    }

    /// Flows of a service that a tap's guest did not get.
    pub(super) fn refused(&self, key: &abi::PairKey) -> u64 {
        self.tables.paces.get(key, 0).map_or(0, |pace| pace.refused)
    }

    /// From now on offences of a tap's guest are counted.
    pub(super) fn count_offences(&mut self, ifindex: u32) -> Result<(), BalancerError> {
        let inserted = self
            .tables
            .offences
            .insert(ifindex, abi::Offence::default(), 1);
        match inserted {
            Err(error) if !is_harmless(&error) => Err(kernel("writing", "offences")(error)),
            _ => Ok(()),
        }
    }

    pub(super) fn forget_offences(&mut self, ifindex: u32) {
        let _ = self.tables.offences.remove(&ifindex);
    }

    /// What guests were kept from sending, where there was anything.
    pub(super) fn offences(&self) -> BTreeMap<VmName, Offences> {
        let mut found: BTreeMap<VmName, Offences> = BTreeMap::new();
        for edge in self.edges.values() {
            let Ok(one) = self.tables.offences.get(&edge.ifindex, 0) else {
                continue;
            };
            if one != abi::Offence::default() {
                let sum = found.entry(edge.spec.vm.clone()).or_default();
                sum.spoofed += one.spoofed;
                sum.dhcp_server += one.dhcp;
                sum.router_advertisement += one.router;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_distance() {
        assert_eq!(every(None), 0);
        assert_eq!(every(Some(1)), SECOND);
        assert_eq!(every(Some(1_000_000)), 1000);
    }
}
