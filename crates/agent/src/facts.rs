//! What the host is and has: the parts of the report that are not about one VM.

use crate::ports::{PoolDefinition, PoolFactory};
use quorate_hypervisor::qemu::probe::HostFacts;
use quorate_network::NetworkDriver;
use quorate_state::State;
use quorate_storage::{Pool, PoolFacts};
use quorate_types::report::{Capacity, HypervisorFacts, PoolReport};
use quorate_types::{ByteSize, NetworkName, PoolName, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Overrides the memory that the host offers, in MiB.
const MEMORY_VARIABLE: &str = "QUORATE_MEMORY_MIB";

/// The hypervisor's facts as they are reported.
#[must_use]
pub fn hypervisor_facts(facts: &HostFacts) -> HypervisorFacts {
    let family = |alias: &str| {
        let name = facts.resolve_machine(alias)?;
        Some((alias.to_owned(), name.to_owned()))
    };
    HypervisorFacts {
        qemu: facts.version.clone(),
        accel: facts.accel.as_str().to_owned(),
        cpu_models: facts.usable_cpu_models().map(str::to_owned).collect(),
        machines: ["q35", "microvm"].into_iter().filter_map(family).collect(),
    }
}

/// CPUs and memory for guests.
#[must_use]
pub fn capacity(reserved: ByteSize) -> Capacity {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let fixed = std::env::var(MEMORY_VARIABLE).ok();
    let fixed = fixed.and_then(|text| text.parse().ok()).map(ByteSize::mib);
    let memory = fixed.unwrap_or_else(|| {
        let total = memory_total().unwrap_or_default();
        ByteSize(total.saturating_sub(reserved.0))
    });
    Capacity {
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory,
    }
}

fn memory_total() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// Resident memory of a process.
pub(crate) fn resident(pid: i32) -> Option<ByteSize> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(ByteSize(kib << 10))
}

/// What was found on one look around.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Surroundings {
    pub(crate) capacity: Capacity,
    pub(crate) networks: BTreeSet<NetworkName>,
    pub(crate) pools: BTreeMap<PoolName, PoolReport>,
}

/// Pools that are open; a changed definition opens anew.
#[derive(Default)]
pub(crate) struct OpenPools {
    pools: BTreeMap<PoolName, (PoolDefinition, Arc<dyn Pool>)>,
}

impl OpenPools {
    pub(crate) fn get(
        &mut self,
        factory: &dyn PoolFactory,
        name: &PoolName,
        spec: PoolDefinition,
    ) -> Arc<dyn Pool> {
        match self.pools.get(name) {
            Some((known, pool)) if *known == spec => pool.clone(),
            _ => {
                let pool = factory.open(name, &spec);
                self.pools.insert(name.clone(), (spec, pool.clone()));
                pool
            }
        }
    }

    pub(crate) fn retain(&mut self, state: &State) {
        self.pools.retain(|name, _| state.pools.contains_key(name));
    }
}

pub(crate) fn pool_report(facts: &PoolFacts) -> PoolReport {
    PoolReport {
        usable: facts.usable(),
        marker: facts.marker.as_ref().map(|marker| marker.id.clone()),
        free: ByteSize(facts.free_bytes),
        total: ByteSize(facts.total_bytes),
        latency_us: facts.probe_write_us.unwrap_or(0),
        problem: facts.problem.clone(),
        since: None,
    }
}

/// Dates what has changed since the last look.
pub(crate) fn date(
    found: &mut BTreeMap<PoolName, PoolReport>,
    before: &BTreeMap<PoolName, PoolReport>,
    now: Timestamp,
) {
    for (name, pool) in found {
        let same = before.get(name).filter(|old| old.usable == pool.usable);
        pool.since = same.and_then(|old| old.since).or(Some(now));
    }
}

/// Networks of the cluster whose bridge is up here.
pub(crate) async fn networks(state: &State, driver: &dyn NetworkDriver) -> BTreeSet<NetworkName> {
    let mut found = BTreeSet::new();
    for (name, network) in &state.networks {
        match driver.interface(&network.spec.bridge).await {
            Ok(facts) if facts.exists && facts.up => {
                found.insert(name.clone());
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(network = %name, %error, "a bridge cannot be looked at"),
        }
    }
    found
}
