//! The promises of storage fencing, checked at the SAN.
//!
//! **one-writer**, for a VM all of whose disks are on the SAN, is about writes. Where a `StorageCut` is the proof, nothing is
//! known of the old host's CPUs: its guard may hang and there may be no watchdog, so the old guest may go on computing, and its
//! packets may leave the host. What holds, and is checked here after every event:
//! * after the release on a `StorageCut` is committed, no write of that epoch ever reaches a disk (checked at each write);
//! * no write of an older epoch reaches a disk once a newer one has begun to run (checked at each write, whatever the proof);
//! * two copies may have running CPUs only while every target of the VM keeps the older one's host out;
//! * a host is let in to a target only if no guest is left on it that the committed state does not give it, under that epoch;
//! * nobody opens a door against a cut that is newer than what it knew, once that cut has proven anything;
//! * a host is cut only when its own lease, by its own clock, is over;
//! * while the SAN has no power, nothing is moved because a path to it is lost.

use crate::event::HostId;
use crate::guest::{Guest, ProcId, StreamPhase, Vcpu};
use crate::time::SEC;
use crate::world::World;
use quorate_controller_logic::CutJob;
use quorate_membership::ProofKind;
use quorate_state::{Action, MigrationEnd, Ownership, Plan, State};
use quorate_types::{Epoch, HostName, Revision, VmName};
use std::collections::{BTreeMap, BTreeSet};

/// After this long without power every host has said so.
const ALL_KNOW: u64 = 15 * SEC;

/// What is remembered for these checks.
#[derive(Debug, Default)]
pub(crate) struct SanChecks {
    /// Epochs that were taken from their owner on a `StorageCut`.
    over: BTreeSet<(VmName, Epoch)>,
    /// Cuts that proofs were made of: by host and target the revision of the cut.
    made: BTreeMap<(HostId, String), Revision>,
    /// How many releases rested on a `StorageCut`.
    pub(crate) used: u64,
}

impl World {
    /// A guest's write reaches a disk.
    pub(crate) fn check_write(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let name = &self.hosts[guest.host].name;
        let who = format!("{} (epoch {}) on {name}", guest.vm, guest.epoch);
        if self
            .check
            .san
            .over
            .contains(&(guest.vm.clone(), guest.epoch))
        {
            let text = format!("{who} writes, though its storage was said to be cut");
            return self.fail("one-writer", text);
        }
        if let Some(newest) = self.outdated(guest) {
            self.fail(
                "one-writer",
                format!("{who} writes, though epoch {newest} has run"),
            );
        }
    }

    /// Both copies run. That is no harm if the older one's host is kept out of every disk.
    pub(crate) fn older_is_shut_out(&self, a: &Guest, b: &Guest) -> bool {
        match a.epoch.cmp(&b.epoch) {
            std::cmp::Ordering::Less => self.shut_out(a),
            std::cmp::Ordering::Greater => self.shut_out(b),
            std::cmp::Ordering::Equal => false,
        }
    }

    /// A target is about to let a host in.
    pub(crate) fn check_let_in(&mut self, host: HostId, target: &str, knew: Option<Revision>) {
        let state = self.newest();
        let name = self.hosts[host].name.clone();
        let left = |guest: &&Guest| {
            let over = |out: &crate::guest::Outgoing| out.phase == StreamPhase::Completed;
            let idle = guest.vcpu == Vcpu::InMigrate || guest.out.as_ref().is_some_and(over);
            guest.host == host
                && !idle
                && guest.targets.iter().any(|of| of == target)
                && !owns(&state, &guest.vm, &name, guest.epoch)
        };
        if let Some(guest) = self.guests.values().find(left) {
            let text = format!(
                "{name} is let in to {target} while {} of epoch {} is left there",
                guest.vm, guest.epoch
            );
            return self.fail("one-writer", text);
        }
        let cuts = state.storage_cuts.get(&name);
        let newest = cuts.and_then(|cuts| cuts.values().max().copied());
        let made = self.check.san.made.get(&(host, target.to_owned())).copied();
        if newest.is_some() && made == newest && knew != newest {
            let text = format!("{name} is let in to {target} by who did not know of the last cut");
            self.fail("one-writer", text);
        }
    }

    /// A cut was made, and proofs of it.
    pub(crate) fn check_cut_made(&mut self, job: &CutJob) {
        let state = self.newest();
        let Some(host) = self.host_id(&job.host) else {
            return;
        };
        for door in &job.doors {
            let cuts = state.storage_cuts.get(&job.host);
            let Some(since) = cuts.and_then(|cuts| cuts.get(&door.pool).copied()) else {
                continue;
            };
            for target in &door.targets {
                self.check.san.made.insert((host, target.clone()), since);
            }
        }
    }

    /// A cut is committed.
    pub(crate) fn check_cut(&mut self, host: &HostName) {
        let Some(at) = self.host_id(host).map(|host| &self.hosts[host]) else {
            return;
        };
        let daemon = at.daemon.as_ref().filter(|_| at.on);
        let logic = daemon.and_then(|daemon| daemon.logic.as_ref());
        let deadline = logic.and_then(|logic| logic.lease().deadline());
        if deadline.is_some_and(|end| at.local(self.now) < end) {
            self.fail(
                "freeze-before-kill",
                format!("{host} is cut off from its storage while it holds a lease"),
            );
        }
    }

    /// A plan is committed.
    pub(crate) fn check_san_plan(&mut self, before: &State, plan: &Plan) {
        for planned in &plan.actions {
            match &planned.action {
                Action::Release { vm, proofs, .. } => {
                    let cuts = proofs.iter().filter(|p| p.kind() == ProofKind::StorageCut);
                    let hosts: BTreeSet<&HostName> = cuts.map(|proof| proof.host()).collect();
                    let owners = before.vms.get(vm).map(|record| record.ownership.hosts());
                    for (owner, epoch) in owners.into_iter().flatten() {
                        if hosts.contains(owner) {
                            self.check.san.used += 1;
                            self.check.san.over.insert((vm.clone(), epoch));
                        }
                    }
                }
                Action::FinishMigration {
                    vm,
                    end: MigrationEnd::TargetDead(proof) | MigrationEnd::TargetLost(proof),
                    ..
                } if proof.kind() == ProofKind::StorageCut => {
                    let record = before.vms.get(vm).map(|record| &record.ownership);
                    if let Some(Ownership::Migrating { target_epoch, .. }) = record {
                        self.check.san.used += 1;
                        self.check.san.over.insert((vm.clone(), *target_epoch));
                    }
                }
                _ => {}
            }
            let off = self.san.off_since;
            let all_know = off.is_some_and(|since| self.now > since + ALL_KNOW);
            if all_know && planned.reason.summary.contains("has lost pool san") {
                let text = format!(
                    "{} though no host reaches the SAN: {}",
                    planned.action.describe(),
                    planned.reason.summary
                );
                self.fail("dependents-stay-up", text);
            }
        }
    }

    /// What is not as it should be yet at the SAN.
    pub(crate) fn san_unrest(&self, state: &State) -> Option<String> {
        if let Some((host, _)) = state.storage_cuts.first_key_value() {
            return Some(format!("{host} is still cut off from its storage"));
        }
        let wanted = quorate_controller_logic::doors_wanted(state);
        wanted.into_iter().find_map(|wanted| {
            let host = self.host_id(&wanted.host)?;
            let mut targets = wanted.door.targets.iter();
            let shut = targets.find(|target| !self.san.lets_in(host, target))?;
            Some(format!("{} is not let in to {shut}", wanted.host))
        })
    }
}

fn owns(state: &State, vm: &VmName, host: &HostName, epoch: Epoch) -> bool {
    let record = state.vms.get(vm);
    record.is_some_and(|record| record.ownership.hosts().contains(&(host, epoch)))
}
