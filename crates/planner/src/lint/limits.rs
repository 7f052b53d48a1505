//! What there is only so much of: room on hosts, migrations at the same time.

use super::{Lint, Violation};
use crate::OVERHEAD_BYTES;
use quorate_state::{Ownership, State};
use quorate_types::{HostName, NetworkName, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// Use by host and thing.
type Used<'s> = BTreeMap<(&'s HostName, &'s str), u64>;

// Not names of resources: those have no spaces.
const MEMORY: &str = "bytes of memory";
const CPUS: &str = "virtual CPUs";

/// What every VM uses on every host that may have it.
fn used(state: &State) -> Used<'_> {
    let mut used = Used::new();
    for vm in state.vms.values() {
        let spec = vm.effective();
        for (host, _) in vm.ownership.hosts() {
            let mut add = |what, much| *used.entry((host, what)).or_default() += much;
            add(MEMORY, spec.memory.0 + OVERHEAD_BYTES);
            add(CPUS, u64::from(spec.cpus));
            for (resource, count) in &spec.resources {
                add(resource.as_str(), *count);
            }
        }
    }
    used
}

/// VMs that migrate, by what limits them.
#[derive(Default)]
struct Moving<'s> {
    hosts: BTreeMap<&'s HostName, BTreeSet<&'s VmName>>,
    networks: BTreeMap<&'s NetworkName, BTreeSet<&'s VmName>>,
    all: BTreeSet<&'s VmName>,
}

fn moving(state: &State) -> Moving<'_> {
    let mut moving = Moving::default();
    for (name, vm) in &state.vms {
        let Ownership::Migrating { from, to, .. } = &vm.ownership else {
            continue;
        };
        moving.all.insert(name);
        for host in [from, to] {
            moving.hosts.entry(host).or_default().insert(name);
        }
        for nic in &vm.effective().nics {
            moving
                .networks
                .entry(&nic.network)
                .or_default()
                .insert(name);
        }
    }
    moving
}

impl Lint<'_> {
    pub(super) fn capacity(&self, found: &mut Vec<Violation>) {
        let before = used(self.input.state);
        let settings = self.input.state.settings();
        for ((host, what), need) in used(self.after) {
            let capacity = self.input.reports.get(host).map(|report| report.capacity);
            let capacity = capacity.unwrap_or_default();
            let spec = self.input.state.hosts.get(host).map(|record| &record.spec);
            let have = match what {
                MEMORY => capacity.memory.0,
                CPUS => {
                    let percent = spec.and_then(|spec| spec.cpu_overcommit_percent);
                    match percent.unwrap_or(settings.cpu_overcommit_percent) {
                        0 => continue,
                        percent => u64::from(capacity.cpus) * u64::from(percent) / 100,
                    }
                }
                resource => {
                    let mut all = spec.into_iter().flat_map(|spec| &spec.resources);
                    let count = all.find(|(name, _)| name.as_str() == resource);
                    count.map_or(0, |(_, count)| *count)
                }
            };
            if need > have && need > before.get(&(host, what)).copied().unwrap_or(0) {
                found.push(Violation::Capacity {
                    host: host.clone(),
                    what: what.to_owned(),
                    need,
                    have,
                });
            }
        }
    }

    pub(super) fn parallel(&self, found: &mut Vec<Violation>) {
        let (before, after) = (moving(self.input.state), moving(self.after));
        let settings = self.input.state.settings();
        let none = BTreeSet::new();
        for (host, vms) in &after.hosts {
            let spec = self.input.state.hosts.get(*host).map(|record| &record.spec);
            let own = spec.and_then(|spec| spec.parallel_migrations);
            let limit = own.unwrap_or(settings.parallel_migrations);
            let before = before.hosts.get(*host).unwrap_or(&none);
            self.many(&format!("host {host}"), before, vms, limit, found);
        }
        for (network, vms) in &after.networks {
            let object = self.input.state.networks.get(*network);
            let limit = object.and_then(|object| object.spec.parallel_migrations);
            let before = before.networks.get(*network).unwrap_or(&none);
            let limit = limit.unwrap_or(u32::MAX);
            self.many(&format!("network {network}"), before, vms, limit, found);
        }
        if settings.total_migrations > 0 {
            let limit = settings.total_migrations;
            self.many("the cluster", &before.all, &after.all, limit, found);
        }
    }

    /// More than the limit, more than before, and not one group that goes alone.
    fn many(
        &self,
        what: &str,
        before: &BTreeSet<&VmName>,
        after: &BTreeSet<&VmName>,
        limit: u32,
        found: &mut Vec<Violation>,
    ) {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        if after.len() <= limit || after.len() <= before.len() {
            return;
        }
        let one_group = after.first().is_some_and(|first| {
            let group = self.book.companions(first);
            after.iter().all(|vm| group.contains(*vm))
        });
        if !one_group {
            found.push(Violation::Parallel {
                what: what.to_owned(),
                count: after.len(),
            });
        }
    }
}
