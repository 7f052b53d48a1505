//! Storage fencing: which doors of which SANs decide about a host, when it is shut out, and when it is let in again.
//!
//! ```text
//!          lease ran out, all of a VM's disks behind doors
//!   open ------------------------------------------------> CutStorage committed --> doors shut --> StorageCut proofs
//!    ^                                                              |
//!    '--- RestoreStorage <-- doors opened <-- the host is up and has ended all that is not its any more
//! ```
//! Always holds: a cut is committed before a door is touched, so every later leader knows of it; a proof is about one
//! VM, names every disk of it, and exists only if every one was seen shut after it was shut; a host is let in only when
//! it reports, with the cut in its replica, no guest that it may not run. Must not: do any of it.

use crate::keeper::Restorable;
use quorate_membership::{DiskCut, Evidence, FenceProof, HostHealth};
use quorate_state::State;
use quorate_types::{
    AccessControl, Epoch, HostName, HostReport, IscsiPool, PoolName, PoolSpec, RbdPool, Revision,
    Secret, SecretName, VmName, VmPhase, VmSpec,
};
use std::collections::{BTreeMap, BTreeSet};

/// A host's way into a pool: what the SAN is asked to open or to shut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    /// The pool.
    pub pool: PoolName,
    /// How the SAN is told.
    pub gate: Gate,
    /// The password for that, where one is named and known.
    pub secret: Option<Secret>,
    /// The account whose password it is, where the SAN keeps both in the host's entry of its list and forgets them with it.
    pub account: Option<String>,
    /// The name by which the host logs in.
    pub initiator: String,
    /// The targets, by name.
    pub targets: Vec<String>,
}

/// How a SAN is told whom to let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// The access list of an iSCSI target.
    Target(AccessControl),
    /// The block list of Ceph.
    Ceph {
        /// Its configuration on the hosts.
        conf: String,
        /// User, without `client.`.
        user: String,
    },
    /// The units themselves: a host of the cluster that reaches them pushes another one's registrations out.
    Reservation {
        /// Up to which epoch it may have written each of the door's targets.
        epochs: BTreeMap<String, Epoch>,
    },
}

/// A disk behind a door.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Behind {
    pool: PoolName,
    image: String,
    target: String,
}

/// What shutting a host out means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutJob {
    /// The host.
    pub host: HostName,
    /// The doors to shut.
    pub doors: Vec<Door>,
    /// Nothing that the host may run is left out.
    pub complete: bool,
    vms: Vec<(VmName, Epoch, Vec<Behind>)>,
}

/// What became of one door: for each of its targets how it was shut and in how many milliseconds, or why not.
pub type Shut = Vec<Result<(String, u64), String>>;

/// A pool whose SAN can be told.
enum Gated<'s> {
    Iscsi(&'s IscsiPool, &'s AccessControl),
    Ceph(&'s RbdPool),
    Units,
}

impl Gated<'_> {
    fn gate(&self, targets: &Targets) -> Gate {
        match self {
            Self::Iscsi(_, control) => Gate::Target((*control).clone()),
            Self::Ceph(pool) => Gate::Ceph {
                conf: pool.conf.clone(),
                user: pool.user.clone(),
            },
            Self::Units => Gate::Reservation {
                epochs: targets.clone(),
            },
        }
    }

    /// Whether it is shut and opened as such. Units are not: who owns a VM takes its units, and a host that is let in again
    /// takes back its own.
    fn has_list(&self) -> bool {
        !matches!(self, Self::Units)
    }

    fn secret(&self) -> Option<&SecretName> {
        match self {
            Self::Iscsi(_, AccessControl::Exec(exec)) => exec.secret.as_ref(),
            Self::Iscsi(pool, AccessControl::Lio(_)) => Some(&pool.chap.as_ref()?.secret),
            Self::Iscsi(..) | Self::Units => None,
            Self::Ceph(pool) => pool.secret.as_ref(),
        }
    }

    fn account(&self) -> Option<String> {
        match self {
            Self::Iscsi(pool, AccessControl::Lio(_)) => Some(pool.chap.as_ref()?.user.clone()),
            _ => None,
        }
    }

    /// What the SAN calls the place of an image.
    fn target(&self, image: &str) -> Option<String> {
        match self {
            Self::Iscsi(pool, _) => Some(pool.lun_of(image).ok()?.target),
            Self::Ceph(pool) => Some(format!("{}/{image}", pool.ceph_pool)),
            Self::Units => Some(image.to_owned()),
        }
    }

    /// What the SAN knows a host by.
    fn initiator(&self, state: &State, host: &HostName) -> Option<String> {
        match self {
            Self::Iscsi(pool, _) => Some(pool.initiator(&state.cluster.as_ref()?.id, host)),
            Self::Ceph(_) => {
                let address = &state.hosts.get(host)?.address;
                let socket = address.parse::<std::net::SocketAddr>().ok()?;
                Some(socket.ip().to_string())
            }
            Self::Units => Some(host.to_string()),
        }
    }
}

fn gated<'s>(state: &'s State, name: &PoolName) -> Option<Gated<'s>> {
    match &state.pools.get(name)?.spec {
        PoolSpec::Iscsi(pool) if pool.has_reservations() => Some(Gated::Units),
        PoolSpec::Iscsi(pool) => Some(Gated::Iscsi(pool, pool.access.as_ref()?)),
        PoolSpec::Rbd(pool) => pool.blocklist.then_some(Gated::Ceph(pool)),
        PoolSpec::Block(pool) => pool.reservations.then_some(Gated::Units),
        _ => None,
    }
}

/// Targets of one door, each with the newest epoch under which the host may write there.
type Targets = BTreeMap<String, Epoch>;

fn door(state: &State, host: &HostName, name: &PoolName, targets: Targets) -> Option<Door> {
    let pool = gated(state, name)?;
    let secret = pool.secret().and_then(|name| state.secrets.get(name));
    Some(Door {
        pool: name.clone(),
        gate: pool.gate(&targets),
        secret: secret.cloned(),
        account: pool.account(),
        initiator: pool.initiator(state, host)?,
        targets: targets.into_keys().collect(),
    })
}

/// The disks of a VM, if every one is behind a door.
fn behind(state: &State, spec: &VmSpec) -> Option<Vec<Behind>> {
    let one = |disk: &quorate_types::spec::DiskSpec| {
        Some(Behind {
            pool: disk.pool.clone(),
            image: disk.image.clone(),
            target: gated(state, &disk.pool)?.target(&disk.image)?,
        })
    };
    let disks: Option<Vec<Behind>> = spec.disks.iter().map(one).collect();
    disks.filter(|disks| !disks.is_empty())
}

/// What has to be shut so that VMs of this host can start elsewhere; `None`: it has none that this is possible for.
#[must_use]
pub fn cut_job(state: &State, host: &HostName) -> Option<CutJob> {
    let mut vms = Vec::new();
    let mut targets: BTreeMap<PoolName, Targets> = BTreeMap::new();
    let mut complete = true;
    for (name, record) in &state.vms {
        let hosts = record.ownership.hosts();
        let Some((_, epoch)) = hosts.into_iter().find(|(owner, _)| *owner == host) else {
            continue;
        };
        let Some(disks) = behind(state, record.effective()) else {
            complete = false;
            continue;
        };
        for disk in &disks {
            let of = targets.entry(disk.pool.clone()).or_default();
            let newest = of.entry(disk.target.clone()).or_insert(epoch);
            *newest = epoch.max(*newest);
        }
        vms.push((name.clone(), epoch, disks));
    }
    if vms.is_empty() {
        return None;
    }
    let doors = targets.into_iter();
    let doors = doors.filter_map(|(pool, targets)| door(state, host, &pool, targets));
    Some(CutJob {
        host: host.clone(),
        doors: doors.collect(),
        complete,
        vms,
    })
}

impl CutJob {
    /// The pools that it is about.
    #[must_use]
    pub fn pools(&self) -> BTreeSet<PoolName> {
        self.doors.iter().map(|door| door.pool.clone()).collect()
    }

    /// Proofs for the VMs whose disks were all shut, and why there is none for others. `shut` belongs to the doors in
    /// their order.
    #[must_use]
    pub fn proofs(&self, shut: &[Shut]) -> (Vec<FenceProof>, Vec<String>) {
        let mut seen = BTreeMap::new();
        for (door, shut) in self.doors.iter().zip(shut) {
            for (target, done) in door.targets.iter().zip(shut) {
                seen.insert((&door.pool, target.as_str()), done);
            }
        }
        let (mut proofs, mut problems) = (Vec::new(), BTreeSet::new());
        for (vm, epoch, disks) in &self.vms {
            let cut = |disk: &Behind| {
                let done = seen.get(&(&disk.pool, disk.target.as_str()));
                let (verified, how, took) = match done {
                    Some(Ok((how, took))) => (true, how.clone(), *took),
                    Some(Err(why)) => (false, why.clone(), 0),
                    None => (false, "nothing was heard of it".to_owned(), 0),
                };
                DiskCut {
                    pool: disk.pool.clone(),
                    image: disk.image.clone(),
                    how,
                    verified,
                    took: quorate_types::Millis(took),
                }
            };
            let evidence = Evidence::StorageCut {
                vm: vm.clone(),
                epoch: *epoch,
                disks: disks.iter().map(cut).collect(),
            };
            match FenceProof::from_evidence(self.host.clone(), evidence) {
                Ok(proof) => proofs.push(proof),
                Err(error) => drop(problems.insert(error.to_string())),
            }
        }
        (proofs, problems.into_iter().collect())
    }
}

/// Every target with an access list that a VM's disk, or the witness, is on, by pool.
fn used_targets(state: &State) -> BTreeMap<PoolName, Targets> {
    let mut used: BTreeMap<PoolName, Targets> = BTreeMap::new();
    for record in state.vms.values() {
        for disk in record.effective().disks.iter().chain(&record.spec.disks) {
            let pool = gated(state, &disk.pool).filter(Gated::has_list);
            let target = pool.and_then(|pool| pool.target(&disk.image));
            if let Some(target) = target {
                let of = used.entry(disk.pool.clone()).or_default();
                of.insert(target, record.last_epoch);
            }
        }
    }
    if let Some((_, name, image)) = state.witness_disk() {
        let pool = gated(state, name).filter(Gated::has_list);
        let target = pool.and_then(|pool| pool.target(image));
        if let Some(target) = target {
            let of = used.entry(name.clone()).or_default();
            of.insert(target, Epoch::default());
        }
    }
    used
}

/// Doors as they should be: of each host to each pool that it is listed for, open or shut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The host.
    pub host: HostName,
    /// Its door.
    pub door: Door,
    /// Shut, by a cut that is in force.
    pub shut: bool,
}

/// What the SANs should let in and keep out.
#[must_use]
pub fn doors_wanted(state: &State) -> Vec<Wanted> {
    let mut wanted = Vec::new();
    for (name, targets) in used_targets(state) {
        let Some(object) = state.pools.get(&name) else {
            continue;
        };
        for host in state.hosts.keys().filter(|host| object.spec.is_for(host)) {
            let shut = state.is_cut(host, &name);
            wanted.extend(
                door(state, host, &name, targets.clone()).map(|door| Wanted {
                    host: host.clone(),
                    door,
                    shut,
                }),
            );
        }
    }
    wanted
}

/// Cuts that can be taken back: by host the pools, with the revision of the cut.
#[must_use]
pub fn restorable(
    state: &State,
    reports: &BTreeMap<HostName, HostReport>,
    health: impl Fn(&HostName) -> HostHealth,
) -> Restorable {
    let clean = |host: &HostName, since: Revision| {
        let report = reports.get(host).filter(|report| report.applied >= since);
        report.is_some_and(|report| {
            report.vms.iter().all(|(vm, seen)| {
                let idle = matches!(seen.phase, VmPhase::Absent | VmPhase::BackOff);
                // The epoch counts: the host may own the VM anew while its old guest is still there.
                idle || state
                    .vms
                    .get(vm)
                    .is_some_and(|record| record.ownership.hosts().contains(&(host, seen.epoch)))
            })
        })
    };
    let mut found = BTreeMap::new();
    for (host, cuts) in &state.storage_cuts {
        let newest = cuts.values().max().copied().unwrap_or_default();
        if health(host) == HostHealth::Up && clean(host, newest) {
            found.insert(host.clone(), cuts.clone());
        }
    }
    found
}

#[cfg(test)]
#[path = "storage_tests.rs"]
mod tests;
