//! Silent hosts that are shut out at the SAN: which VMs that frees.
//!
//! Always holds: as the controller does it (`cut_job`): a VM is freed only when every disk of it is in a pool that can shut
//! hosts out.

use quorate_membership::{DiskCut, Evidence, FenceProof};
use quorate_state::State;
use quorate_types::{Epoch, HostName, Millis, PoolName, PoolSpec, VmName, VmSpec};
use std::collections::BTreeSet;

/// Whether a pool can take a host's access away.
fn shuts_out(pool: &PoolSpec) -> bool {
    match pool {
        PoolSpec::Iscsi(pool) => pool.has_reservations() || pool.access.is_some(),
        PoolSpec::Rbd(pool) => pool.blocklist,
        PoolSpec::Block(pool) => pool.reservations,
        PoolSpec::Directory { .. } | PoolSpec::Local(_) | PoolSpec::Mirrored(_) => false,
    }
}

/// VMs of a host that a cut frees, with the epoch that it has them under.
fn freed<'s>(
    state: &'s State,
    host: &'s HostName,
) -> impl Iterator<Item = (&'s VmName, Epoch, &'s VmSpec)> {
    state.vms.iter().filter_map(move |(name, record)| {
        let hosts = record.ownership.hosts();
        let (_, epoch) = hosts.into_iter().find(|(owner, _)| *owner == host)?;
        let spec = record.effective();
        let mut pools = spec.disks.iter().map(|disk| state.pools.get(&disk.pool));
        let all = pools.all(|pool| pool.is_some_and(|pool| shuts_out(&pool.spec)));
        (all && !spec.disks.is_empty()).then_some((name, epoch, spec))
    })
}

/// Whether a host has a VM that a cut frees.
pub(super) fn has_any(state: &State, host: &HostName) -> bool {
    freed(state, host).next().is_some()
}

/// The proofs that a cut of a host gives, and the pools that it is shut out of.
pub(super) fn of(state: &State, host: &HostName) -> (Vec<FenceProof>, BTreeSet<PoolName>) {
    let (mut proofs, mut pools) = (Vec::new(), BTreeSet::new());
    for (vm, epoch, spec) in freed(state, host) {
        let disks = spec.disks.iter().map(|disk| DiskCut {
            pool: disk.pool.clone(),
            image: disk.image.clone(),
            how: "foreseen".to_owned(),
            verified: true,
            took: Millis(0),
        });
        let evidence = Evidence::StorageCut {
            vm: vm.clone(),
            epoch,
            disks: disks.collect(),
        };
        proofs.extend(FenceProof::from_evidence(host.clone(), evidence));
        pools.extend(spec.disks.iter().map(|disk| disk.pool.clone()));
    }
    (proofs, pools)
}
