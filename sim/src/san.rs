//! A SAN: which hosts each target lets in, the hosts' paths to it, and the management that changes who is let in.
//!
//! ```text
//!   leader --call--> management --(at some time before the call's deadline)--> access list
//!      ^                 |                                                        |
//!      '--- answer ------'  or none, or late: then the deadline is the answer     v
//!   guest --write--> path of its host --> door of (host, target) --> disk
//! ```
//! Always holds: what a call does, it does before its deadline, also if its caller has ended by then; who is not on a
//! target's list has no session and writes nothing; the list survives a loss of power. A guest's write that does not get
//! through hangs for a while, then fails, and QEMU pauses the guest. There are no locks of images here:
//! see `stream.rs` on what a source that QEMU resumed may do.

use crate::event::{D, Event, HostId, W};
use crate::guest::Guest;
use crate::mutate::Mutation;
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_controller_logic::Shut;
use quorate_types::{PoolName, PoolSpec, Revision, VmName};
use std::collections::BTreeSet;

/// A write that does not get through fails after this at the latest.
pub(crate) const GIVES_UP: u64 = 3 * SEC;

/// The SAN.
#[derive(Debug, Default)]
pub(crate) struct San {
    /// Since when it has no power.
    pub(crate) off_since: Option<u64>,
    /// Count of the faults that hold a host's path down.
    cut: Vec<u32>,
    /// Count of the faults that make its management slow.
    pub(crate) slow: u32,
    /// How often its management says that it failed, and how often it says nothing.
    pub(crate) fail_permille: u64,
    pub(crate) hang_permille: u64,
    /// Who is let in.
    open: BTreeSet<(HostId, String)>,
}

/// What a leader asks of the management.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallKind {
    Shut,
    Open,
    Look,
}

/// A call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// Who calls, and which of its tasks.
    pub(crate) me: HostId,
    pub(crate) task: u64,
    pub(crate) kind: CallKind,
    /// Whose door.
    pub(crate) host: HostId,
    pub(crate) targets: Vec<String>,
    pub(crate) within: u64,
    /// The cut that the caller knew to be in force.
    pub(crate) knew: Option<Revision>,
}

/// What the caller hears.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Shut(Shut),
    Open(Result<(), String>),
    Look(Result<Vec<bool>, String>),
}

impl San {
    pub(crate) fn new(hosts: usize) -> Self {
        Self {
            cut: vec![0; hosts],
            ..Self::default()
        }
    }

    /// Takes a host's path down, or lets it up again.
    pub(crate) fn hold(&mut self, host: HostId, down: bool) {
        let count = &mut self.cut[host];
        *count = match down {
            true => *count + 1,
            false => count.saturating_sub(1),
        };
    }

    /// Whether a host gets to the SAN at all.
    pub(crate) fn path(&self, host: HostId) -> bool {
        self.off_since.is_none() && self.cut[host] == 0
    }

    /// Whether a target lets a host in.
    pub(crate) fn lets_in(&self, host: HostId, target: &str) -> bool {
        self.open.contains(&(host, target.to_owned()))
    }

    /// A host is let in from the start.
    pub(crate) fn let_in(&mut self, host: HostId, target: String) {
        self.open.insert((host, target));
    }

    pub(crate) fn heal(&mut self) {
        self.off_since = None;
        self.cut.fill(0);
        self.slow = 0;
        self.fail_permille = 0;
        self.hang_permille = 0;
    }
}

/// The pool of the SAN's units.
pub(crate) fn pool() -> Option<PoolName> {
    PoolName::new("san").ok()
}

impl World {
    /// The targets of a VM's disks on the SAN, and whether it has a disk elsewhere.
    pub(crate) fn disks_of(&self, vm: &VmName) -> (Vec<String>, bool) {
        let state = self.newest();
        let Some(record) = state.vms.get(vm) else {
            return (Vec::new(), true);
        };
        let mut targets = Vec::new();
        let mut shared = false;
        for disk in &record.effective().disks {
            match state.pools.get(&disk.pool).map(|pool| &pool.spec) {
                Some(PoolSpec::Iscsi(pool)) => {
                    targets.extend(pool.lun_of(&disk.image).map(|unit| unit.target));
                }
                Some(PoolSpec::Local(_) | PoolSpec::Mirrored(_)) => {}
                _ => shared = true,
            }
        }
        (targets, shared)
    }

    /// Whether each of a guest's disks can be written to now.
    pub(crate) fn disks_reached(&self, guest: &Guest) -> bool {
        let path = guest.targets.is_empty() || self.san.path(guest.host);
        let mut targets = guest.targets.iter();
        path && (!guest.shared || !self.hosts[guest.host].storage_lost)
            && targets.all(|target| self.san.lets_in(guest.host, target))
    }

    /// Whether any of them can.
    pub(crate) fn a_disk_reached(&self, guest: &Guest) -> bool {
        let mut targets = guest.targets.iter();
        (guest.shared && !self.hosts[guest.host].storage_lost)
            || (self.san.path(guest.host)
                && targets.any(|target| self.san.lets_in(guest.host, target)))
    }

    /// All of a guest's disks are on the SAN, and every one keeps its host out: it runs, if it does, without writing.
    pub(crate) fn shut_out(&self, guest: &Guest) -> bool {
        let mut targets = guest.targets.iter();
        !guest.shared
            && !guest.targets.is_empty()
            && targets.all(|target| !self.san.lets_in(guest.host, target))
    }

    /// Somebody calls the management.
    pub(crate) fn san_call(&mut self, call: Call) {
        let (least, most) = match self.san.slow > 0 {
            true => (100 * MS, 4 * SEC),
            false => (2 * MS, 40 * MS),
        };
        let takes = self.rng.range(least, most);
        let fails = self.rng.chance(self.san.fail_permille);
        let silent = self.san.off_since.is_some()
            || takes >= call.within
            || self.rng.chance(self.san.hang_permille);
        let acts = self.san.off_since.is_none() && (!fails || self.rng.chance(500));
        let ends = if silent { call.within } else { takes };
        if acts && call.kind != CallKind::Look {
            for target in &call.targets {
                let at = self.rng.range(0, ends);
                let change = W::San {
                    host: call.host,
                    target: target.clone(),
                    open: call.kind == CallKind::Open,
                    knew: call.knew,
                };
                self.after(at, Event::World(change));
            }
        }
        let me = call.me;
        let blind = self.mutated(Mutation::ProofWithoutLook) && call.kind == CallKind::Shut;
        let ends = if blind { MS } else { ends };
        let why = match (silent, fails) {
            (true, _) => Some("the SAN did not answer"),
            (false, true) => Some("the SAN's management failed"),
            (false, false) => None,
        };
        self.daemon_after(me, ends, D::San { call, why });
    }

    /// What a call comes to: what it changed is looked at last.
    pub(crate) fn san_answer(&self, call: &Call, why: Option<&'static str>) -> Answer {
        let error = why.map_or(Ok(()), |why| Err(why.to_owned()));
        match call.kind {
            CallKind::Open => Answer::Open(error),
            CallKind::Look => {
                let seen = call.targets.iter();
                let seen = seen.map(|target| self.san.lets_in(call.host, target));
                Answer::Look(error.map(|()| seen.collect()))
            }
            CallKind::Shut => {
                let blind = self.mutated(Mutation::ProofWithoutLook);
                let one = |target: &String| match &error {
                    _ if blind => Ok(("nobody looked".to_owned(), 1)),
                    Err(why) => Err(why.clone()),
                    Ok(()) if self.san.lets_in(call.host, target) => {
                        Err("it is still let in".to_owned())
                    }
                    Ok(()) => Ok(("off the list, no session".to_owned(), 1)),
                };
                Answer::Shut(call.targets.iter().map(one).collect())
            }
        }
    }

    /// The access list of a target changes.
    pub(crate) fn san_changes(
        &mut self,
        host: HostId,
        target: String,
        open: bool,
        knew: Option<Revision>,
    ) {
        if self.san.off_since.is_some() || self.san.lets_in(host, &target) == open {
            return;
        }
        let name = self.hosts[host].name.clone();
        let short = target.rsplit(':').next().unwrap_or_default().to_owned();
        let verb = if open { "lets in" } else { "shuts out" };
        self.note(|| format!("san: {short} {verb} {name}"));
        if open {
            self.check_let_in(host, &target, knew);
            self.san.open.insert((host, target));
        } else {
            self.san.open.remove(&(host, target));
        }
    }
}
