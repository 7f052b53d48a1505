//! Room on hosts: memory, virtual CPUs and counted resources, as rows of numbers.
//!
//! Always holds: a row has one column for each thing that is counted, memory and CPUs first; what
//! is used is the sum over the guests that a host may have; sums saturate. Why rows and not maps:
//! each VM is held against each host.

use crate::OVERHEAD_BYTES;
use quorate_types::{ClusterSettings, HostReport, HostSpec, ResourceName, VmSpec};
use std::collections::BTreeSet;

/// Column of memory, in bytes.
pub(crate) const MEMORY: usize = 0;
/// Column of virtual CPUs.
pub(crate) const CPUS: usize = 1;
const FIRST_RESOURCE: usize = 2;

/// Rows for all hosts and VMs.
#[derive(Debug, Default)]
pub(crate) struct Room<'a> {
    columns: usize,
    resources: Vec<&'a ResourceName>,
    have: Vec<u64>,
    used: Vec<u64>,
    /// Kept for companions that belong there and still have to come.
    reserved: Vec<u64>,
    /// Of what is used, kept for VMs of higher priority that wait for something.
    held: Vec<u64>,
    need: Vec<u64>,
}

/// The first thing that does not suffice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Short {
    pub(crate) column: usize,
    pub(crate) free: u64,
    pub(crate) have: u64,
    pub(crate) need: u64,
    /// Of what is free, promised to others.
    pub(crate) kept: u64,
}

impl<'a> Room<'a> {
    /// A spec without counted resources may be left out.
    pub(crate) fn new(specs: impl Iterator<Item = &'a VmSpec>, hosts: usize, vms: usize) -> Self {
        let names: BTreeSet<&ResourceName> = specs.flat_map(|spec| spec.resources.keys()).collect();
        let columns = FIRST_RESOURCE + names.len();
        Self {
            columns,
            resources: names.into_iter().collect(),
            have: vec![0; columns * hosts],
            used: vec![0; columns * hosts],
            reserved: vec![0; columns * hosts],
            held: vec![0; columns * hosts],
            need: vec![0; columns * vms],
        }
    }

    fn row(&self, at: usize) -> std::ops::Range<usize> {
        at * self.columns..(at + 1) * self.columns
    }

    /// Fills in what a host has.
    pub(crate) fn set_host(
        &mut self,
        at: usize,
        report: Option<&HostReport>,
        spec: Option<&HostSpec>,
        settings: &ClusterSettings,
    ) {
        let row = self.row(at);
        let have = &mut self.have[row];
        let capacity = report.map(|report| report.capacity).unwrap_or_default();
        have[MEMORY] = capacity.memory.0;
        let percent = spec.and_then(|spec| spec.cpu_overcommit_percent);
        have[CPUS] = match percent.unwrap_or(settings.cpu_overcommit_percent) {
            0 => u64::MAX,
            percent => u64::from(capacity.cpus) * u64::from(percent) / 100,
        };
        for (n, name) in self.resources.iter().enumerate() {
            let count = spec.and_then(|spec| spec.resources.get(*name));
            have[FIRST_RESOURCE + n] = count.copied().unwrap_or(0);
        }
    }

    /// Fills in what a VM needs.
    pub(crate) fn set_vm(&mut self, vm: usize, spec: &VmSpec) {
        let row = self.row(vm);
        let need = &mut self.need[row];
        need[MEMORY] = spec.memory.0.saturating_add(OVERHEAD_BYTES);
        need[CPUS] = u64::from(spec.cpus);
        for (n, name) in self.resources.iter().enumerate() {
            need[FIRST_RESOURCE + n] = spec.resources.get(*name).copied().unwrap_or(0);
        }
    }

    pub(crate) fn have(&self, host: usize) -> &[u64] {
        &self.have[self.row(host)]
    }

    pub(crate) fn used(&self, host: usize) -> &[u64] {
        &self.used[self.row(host)]
    }

    pub(crate) fn need(&self, vm: usize) -> &[u64] {
        &self.need[self.row(vm)]
    }

    /// The sum over several VMs.
    pub(crate) fn sum(&self, vms: impl Iterator<Item = usize>) -> Vec<u64> {
        let mut sum = vec![0u64; self.columns];
        for vm in vms {
            add(&mut sum, self.need(vm));
        }
        sum
    }

    pub(crate) fn account(&mut self, vm: usize, host: usize, more: bool) {
        let (need, used) = (self.row(vm), self.row(host));
        if more {
            add(&mut self.used[used], &self.need[need]);
        } else {
            subtract(&mut self.used[used], &self.need[need]);
        }
    }

    pub(crate) fn reserve(&mut self, host: usize, need: &[u64], more: bool) {
        let row = self.row(host);
        if more {
            add(&mut self.reserved[row], need);
        } else {
            subtract(&mut self.reserved[row], need);
        }
    }

    pub(crate) fn hold(&mut self, host: usize, vm: usize) {
        let (row, need) = (self.row(host), self.row(vm));
        add(&mut self.held[row], &self.need[need]);
    }

    pub(crate) fn let_go(&mut self) {
        self.held.fill(0);
    }

    /// Whether a host has room for `need`. `own`: what is reserved there for these very VMs.
    pub(crate) fn suffices(&self, host: usize, need: &[u64], own: Option<&[u64]>) -> bool {
        let from = host * self.columns;
        (0..self.columns).all(|n| {
            let own = own.map_or(0, |own| own[n]);
            let kept = self.reserved[from + n] - own;
            let taken = self.used[from + n].saturating_add(kept);
            need[n] == 0 || taken.saturating_add(need[n]) <= self.have[from + n]
        })
    }

    /// Whether a host would have room for `need` if `relief` were not used there any more.
    pub(crate) fn suffices_without(&self, host: usize, need: &[u64], relief: &[u64]) -> bool {
        let from = host * self.columns;
        (0..self.columns).all(|n| {
            let used = self.used[from + n].saturating_sub(relief[n]);
            let taken = used.saturating_add(self.reserved[from + n]);
            need[n] == 0 || taken.saturating_add(need[n]) <= self.have[from + n]
        })
    }

    /// What does not suffice, for people.
    pub(crate) fn short(&self, host: usize, need: &[u64], own: Option<&[u64]>) -> Option<Short> {
        let from = host * self.columns;
        (0..self.columns).find_map(|n| {
            let own = own.map_or(0, |own| own[n]);
            let reserved = self.reserved[from + n] - own;
            let have = self.have[from + n];
            let free = have.saturating_sub(self.used[from + n]);
            let short = need[n] > 0 && need[n] > free.saturating_sub(reserved);
            short.then(|| Short {
                column: n,
                free: free.saturating_sub(reserved),
                have,
                need: need[n],
                kept: reserved.min(free).saturating_add(self.held[from + n]),
            })
        })
    }

    /// A column's name: absent for memory.
    pub(crate) fn name(&self, column: usize) -> Option<&str> {
        match column {
            MEMORY => None,
            CPUS => Some("virtual CPUs"),
            _ => self
                .resources
                .get(column - FIRST_RESOURCE)
                .map(|name| name.as_str()),
        }
    }

    /// How large a VM is against the largest host, in thousandths of the scarcest column.
    pub(crate) fn size(&self, vm: usize, largest: &[u64]) -> u64 {
        let parts = self.need(vm).iter().zip(largest);
        let parts = parts.filter(|(need, _)| **need > 0);
        let share = |(need, most): (&u64, &u64)| {
            let share = u128::from(*need) * 1000 / u128::from((*most).max(1));
            u64::try_from(share).unwrap_or(u64::MAX)
        };
        parts.map(share).max().unwrap_or(0)
    }

    /// The most that any of these hosts has, by column.
    pub(crate) fn largest(&self, hosts: impl Iterator<Item = usize>) -> Vec<u64> {
        let mut largest = vec![0; self.columns];
        for host in hosts {
            for (most, have) in largest.iter_mut().zip(self.have(host)) {
                *most = (*most).max(*have);
            }
        }
        largest
    }
}

fn add(sum: &mut [u64], more: &[u64]) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum = sum.saturating_add(*more);
    }
}

fn subtract(sum: &mut [u64], less: &[u64]) {
    for (sum, less) in sum.iter_mut().zip(less) {
        *sum = sum.saturating_sub(*less);
    }
}
