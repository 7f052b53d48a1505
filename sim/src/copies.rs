//! Disks of hosts, with copies: images, the mirrors of running guests, the exports that they write to.
//!
//! ```text
//!   guest --write--> its host's image, and through its mirror --> export on another host --> the copy's image
//!                    acknowledged when both have it; without an answer the guest waits
//! ```
//! What an owner does about a copy and what a host lets in is decided by `agent/logic`, as in production. Always holds:
//! a copy that is being made is of no use to anybody; what a copy has and nobody flushed ends with its host's power. A
//! guest that begins to run sees every acknowledged write (**nothing-lost**).

use crate::event::{D, Event, HostId, Wire};
use crate::guest::{ProcId, StreamPhase, Vcpu};
use crate::mutate::Mutation;
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_agent_logic::{
    ExportRequest, Mirror, MirrorStep, keeps_export, may_export, mirror_step,
};
use quorate_state::{DiskCopy, Ownership, State};
use quorate_types::report::{MirrorPhase, MirrorReport};
use quorate_types::spec::DiskSpec;
use quorate_types::{Epoch, HostName, MigrationId, PoolName, Revision, VmName};
use std::collections::BTreeMap;

/// How often mirrors are looked at.
const LOOK_EVERY: u64 = 200 * MS;
/// After a mirror could not be begun, or was dropped.
const BEGIN_AGAIN: u64 = 2 * SEC;
/// The target of a migration must have taken over by then.
const HAND_OVER_WITHIN: u64 = 2 * SEC;

/// A disk on a host.
#[derive(Debug, Clone, Copy, Default)]
struct Image {
    counter: u64,
    /// What is left of it when the power fails.
    flushed: u64,
}

/// What a guest's QEMU does for a copy.
#[derive(Debug, Clone)]
struct Mirroring {
    to: HostId,
    request: ExportRequest,
    /// Looks until everything is copied.
    left: u64,
    /// Since when a write waits.
    waits: Option<u64>,
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Own {
    images: BTreeMap<(HostId, VmName), Image>,
    exports: BTreeMap<(HostId, VmName), ExportRequest>,
    mirrors: BTreeMap<ProcId, Mirroring>,
    begin_at: BTreeMap<ProcId, u64>,
    /// What the owner's agent says of a copy.
    said: BTreeMap<(HostId, VmName), MirrorReport>,
    /// The last write that each guest was told is done.
    acknowledged: BTreeMap<VmName, u64>,
    /// Migrations that wait for their target to take over.
    handing: BTreeMap<ProcId, MigrationId>,
}

/// The pool of the hosts' own disks.
pub(crate) fn pool() -> Option<PoolName> {
    PoolName::new("own").ok()
}

/// A copy that a host keeps, by its replica.
struct Kept {
    epoch: Epoch,
    disk: DiskSpec,
    host: HostName,
    copy: DiskCopy,
    moving: bool,
}

fn own_disk<'s>(state: &'s State, vm: &VmName) -> Option<&'s DiskSpec> {
    state.own_disks(state.vms.get(vm)?.effective()).next()
}

fn kept(state: &State, me: &HostName, vm: &VmName) -> Option<Kept> {
    let (host, epoch, moving) = match &state.vms.get(vm)?.ownership {
        Ownership::Owned { host, epoch, .. } => (host, *epoch, false),
        Ownership::Migrating { from, epoch, .. } => (from, *epoch, true),
        Ownership::Free => return None,
    };
    let disk = own_disk(state, vm)?;
    let copies = state.copies(&disk.pool, &disk.image)?;
    let (other, copy) = copies.hosts.iter().find(|(other, _)| *other != me)?;
    (host == me).then(|| Kept {
        epoch,
        disk: disk.clone(),
        host: other.clone(),
        copy: copy.clone(),
        moving,
    })
}

fn owns(state: &State, me: &HostName, vm: &VmName) -> bool {
    let record = state.vms.get(vm).map(|record| &record.ownership);
    matches!(record, Some(Ownership::Owned { host, .. }) if host == me)
}

impl World {
    /// Whether a VM's disk is on its host.
    pub(crate) fn has_own_disk(&self, vm: &VmName) -> bool {
        own_disk(&self.newest(), vm).is_some()
    }

    fn flush(&mut self, host: HostId, vm: &VmName) {
        if let Some(image) = self.own.images.get_mut(&(host, vm.clone())) {
            image.flushed = image.counter;
        }
    }

    fn close_export(&mut self, host: HostId, vm: &VmName) {
        if self.own.exports.remove(&(host, vm.clone())).is_some() {
            self.flush(host, vm);
        }
    }

    /// The host's power fails.
    pub(crate) fn own_power_cut(&mut self, host: HostId) {
        self.own.exports.retain(|(at, _), _| *at != host);
        self.own.said.retain(|(at, _), _| *at != host);
        for ((at, _), image) in &mut self.own.images {
            if *at == host {
                image.counter = image.flushed;
            }
        }
    }

    /// A process is gone, and its mirror with it.
    pub(crate) fn own_forget(&mut self, proc: ProcId) {
        self.own.mirrors.remove(&proc);
        self.own.begin_at.remove(&proc);
        self.own.handing.remove(&proc);
        if let Some(guest) = self.guests.get(&proc) {
            let key = (guest.host, guest.vm.clone());
            self.own.said.remove(&key);
        }
    }

    /// What is said of a host's copies.
    pub(crate) fn own_reports(&self, host: HostId) -> Vec<(VmName, MirrorReport)> {
        let said = self.own.said.iter().filter(|((at, _), _)| *at == host);
        said.map(|((_, vm), said)| (vm.clone(), said.clone()))
            .collect()
    }

    /// Before a guest is made on this host's image. An error is a reason to wait.
    pub(crate) fn own_before_start(
        &mut self,
        host: HostId,
        vm: &VmName,
        incoming: bool,
    ) -> Result<(), String> {
        let (state, me) = self.replica(host);
        let Some(disk) = own_disk(&state, vm) else {
            return Ok(());
        };
        let Some(record) = state.copies(&disk.pool, &disk.image) else {
            return Ok(());
        };
        if incoming {
            record.check(&disk.image, &me, Some(&self.hosts[host].boot_id()))?;
            self.flush(host, vm);
            return Ok(());
        }
        self.close_export(host, vm);
        if record
            .hosts
            .get(&me)
            .is_some_and(|copy| copy.boot.is_some())
        {
            record.check(&disk.image, &me, Some(&self.hosts[host].boot_id()))?;
            self.flush(host, vm);
        }
        if let Some(other) = record.followers(&me).next() {
            let said = said_of(disk, other, &record.hosts[other], MirrorPhase::Failed);
            self.own.said.insert((host, vm.clone()), said);
            self.refresh_report(host);
            return Err(format!("waits until the copy on {other} is out of step"));
        }
        Ok(())
    }

    fn replica(&self, host: HostId) -> (std::sync::Arc<State>, HostName) {
        let state = self.hosts[host].daemon.as_ref();
        let state = state.map_or_else(|| self.newest(), |daemon| daemon.state.clone());
        (state, self.hosts[host].name.clone())
    }

    /// What a guest finds on its host's image when it boots.
    pub(crate) fn own_boots(&mut self, proc: ProcId) -> Result<u64, String> {
        let Some(guest) = self.guests.get(&proc) else {
            return Err("it is gone".into());
        };
        let (host, vm, epoch) = (guest.host, guest.vm.clone(), guest.epoch);
        let (state, _) = self.replica(host);
        let record = own_disk(&state, &vm).and_then(|disk| state.copies(&disk.pool, &disk.image));
        let created = record.is_some_and(|record| record.created == epoch);
        let key = (host, vm.clone());
        if !self.own.images.contains_key(&key) && !created {
            return Err("its image is not there".into());
        }
        let image = self.own.images.entry(key).or_default();
        image.flushed = image.counter;
        let has = image.counter;
        let acknowledged = self.own.acknowledged.get(&vm).copied().unwrap_or(0);
        if has < acknowledged {
            let name = self.hosts[host].name.clone();
            let text = format!(
                "{vm} starts on {name} (epoch {epoch}) from a copy with {has} of {acknowledged} acknowledged writes"
            );
            self.fail("nothing-lost", text);
        }
        Ok(has)
    }

    /// Whether what a guest writes reaches its copy now.
    fn copy_answers(&self, proc: ProcId, mirror: &Mirroring) -> bool {
        let Some(guest) = self.guests.get(&proc) else {
            return false;
        };
        let at = &self.hosts[mirror.to];
        let export = self.own.exports.get(&(mirror.to, guest.vm.clone()));
        at.on
            && self.now >= at.stopped_until
            && export == Some(&mirror.request)
            && self.net.connected(guest.host, mirror.to)
            && self.net.connected(mirror.to, guest.host)
    }

    /// A write of the guest waits for its copy.
    pub(crate) fn own_waits(&self, proc: ProcId) -> bool {
        let mirror = self.own.mirrors.get(&proc);
        mirror.is_some_and(|mirror| mirror.waits.is_some())
    }

    /// A guest writes to its host's image, and to its copy.
    pub(crate) fn own_write(&mut self, proc: ProcId) {
        let Some(mut mirror) = self.own.mirrors.get(&proc).cloned() else {
            return self.own_written(proc, None);
        };
        if !self.copy_answers(proc, &mirror) {
            mirror.waits.get_or_insert(self.now);
            self.own.mirrors.insert(proc, mirror);
            return;
        }
        mirror.waits = None;
        let to = (mirror.left == 0).then_some(mirror.to);
        self.own.mirrors.insert(proc, mirror);
        self.own_written(proc, to);
    }

    fn own_written(&mut self, proc: ProcId, to: Option<HostId>) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        let (host, vm, epoch, known) = (guest.host, guest.vm.clone(), guest.epoch, guest.memory);
        let image = self.own.images.entry((host, vm.clone())).or_default();
        let found = image.counter;
        image.counter += 1;
        image.flushed = image.counter;
        let counter = image.counter;
        guest.memory = counter;
        if let Some(copy) = to.and_then(|to| self.own.images.get_mut(&(to, vm.clone()))) {
            copy.counter = counter;
        }
        self.own.acknowledged.insert(vm.clone(), counter);
        if known != found {
            let host = self.hosts[host].name.clone();
            let text = format!(
                "{vm} on {host} (epoch {epoch}) writes after {known}, but its disk there is at {found}"
            );
            self.fail("nothing-lost", text);
        }
    }

    /// The agent looks at the mirrors of its guests.
    pub(crate) fn own_look(&mut self, host: HostId) {
        self.daemon_after(host, LOOK_EVERY, D::Mirrors);
        let daemon = self.hosts[host].daemon.as_ref();
        let known: Vec<ProcId> = daemon
            .map(|daemon| daemon.runs.values().copied().collect())
            .unwrap_or_default();
        for proc in known {
            let live = self.guests.get(&proc);
            if live.is_some_and(|guest| guest.own && guest.vcpu != Vcpu::Starting) {
                self.own_keep(host, proc);
            }
        }
        self.refresh_report(host);
    }

    fn own_keep(&mut self, host: HostId, proc: ProcId) {
        let Some(vm) = self.guests.get(&proc).map(|guest| guest.vm.clone()) else {
            return;
        };
        let (state, me) = self.replica(host);
        let Some(kept) = kept(&state, &me, &vm) else {
            self.own.said.remove(&(host, vm.clone()));
            if owns(&state, &me, &vm) {
                self.own.mirrors.remove(&proc);
            }
            return;
        };
        self.own_progress(proc, &vm);
        let mirror = self.own.mirrors.get(&proc);
        if kept.moving && mirror.is_none() {
            return;
        }
        let lease = self.setup.timings.duration.0 * MS;
        let seen = mirror.map(|mirror| Mirror {
            since: mirror.request.since,
            in_step: mirror.left == 0,
            stalled: mirror.waits.is_some_and(|since| self.now >= since + lease),
            problem: None,
        });
        let (mut step, phase, _) = mirror_step(&kept.copy, seen.as_ref());
        if self.mutated(Mutation::CopyDroppedEarly) && self.own_waits(proc) {
            step = MirrorStep::Drop;
        }
        let said = said_of(&kept.disk, &kept.host, &kept.copy, phase);
        self.own.said.insert((host, vm.clone()), said);
        match step {
            // No disk here becomes larger.
            MirrorStep::Nothing | MirrorStep::Grow => {}
            MirrorStep::Drop => {
                self.note_guest(proc, "lets go of its copy");
                self.own.mirrors.remove(&proc);
                self.own.begin_at.insert(proc, self.now + BEGIN_AGAIN);
            }
            MirrorStep::Begin => self.own_begin(host, proc, vm, &kept),
        }
    }

    /// A copy comes nearer to its owner's image.
    fn own_progress(&mut self, proc: ProcId, vm: &VmName) {
        let Some(mut mirror) = self.own.mirrors.get(&proc).cloned() else {
            return;
        };
        if mirror.left == 0 || !self.copy_answers(proc, &mirror) {
            return;
        }
        mirror.left -= 1;
        if mirror.left == 0 {
            let host = self.guests.get(&proc).map_or(0, |guest| guest.host);
            let whole = self.own.images.get(&(host, vm.clone())).copied();
            let counter = whole.unwrap_or_default().counter;
            let flushed = 0;
            let image = Image { counter, flushed };
            self.own.images.insert((mirror.to, vm.clone()), image);
        }
        self.own.mirrors.insert(proc, mirror);
    }

    fn own_begin(&mut self, host: HostId, proc: ProcId, vm: VmName, kept: &Kept) {
        if self
            .own
            .begin_at
            .get(&proc)
            .is_some_and(|at| self.now < *at)
        {
            return;
        }
        self.own.begin_at.insert(proc, self.now + BEGIN_AGAIN);
        let request = ExportRequest {
            vm,
            pool: kept.disk.pool.clone(),
            image: kept.disk.image.clone(),
            from: self.hosts[host].name.clone(),
            epoch: kept.epoch,
            since: kept.copy.since,
            size: 0,
        };
        let inc = self.hosts[host].daemon_inc;
        if let Some(to) = self.host_id(&kept.host) {
            self.send(host, to, Wire::AskExport { proc, inc, request });
        }
    }

    /// Its host holds a lease, and its replica is as new as that.
    fn up_to_date(&self, host: HostId) -> bool {
        let at = &self.hosts[host];
        let logic = at.daemon.as_ref().and_then(|daemon| daemon.logic.as_ref());
        logic.is_some_and(|logic| {
            let lease = logic.lease();
            let held = lease.deadline().is_some_and(|end| at.local(self.now) < end);
            held && self.replica(host).0.revision >= lease.fresh_from()
        })
    }

    /// The replica of a host has advanced: exports whose time has passed are closed.
    pub(crate) fn own_sweep(&mut self, host: HostId) {
        let (state, me) = self.replica(host);
        let over = |((at, _), request): &(&(HostId, VmName), &ExportRequest)| {
            *at == host && !keeps_export(&state, &me, request)
        };
        let over: Vec<VmName> = self
            .own
            .exports
            .iter()
            .filter(over)
            .map(|((_, vm), _)| vm.clone())
            .collect();
        for vm in over {
            self.close_export(host, &vm);
        }
    }

    pub(crate) fn own_wire(&mut self, from: HostId, to: HostId, wire: Wire) {
        match wire {
            Wire::AskExport { proc, inc, request } => {
                let (state, me) = self.replica(to);
                if !self.up_to_date(to) || may_export(&state, &me, &request).is_err() {
                    return;
                }
                let key = (to, request.vm.clone());
                if self.own.exports.get(&key) != Some(&request) {
                    self.close_export(to, &request.vm);
                    self.own.exports.insert(key, request.clone());
                }
                self.send(to, from, Wire::ExportOpen { proc, inc, request });
            }
            Wire::ExportOpen { proc, inc, request } => {
                let lives = self.hosts[to].daemon_inc == inc && self.guests.contains_key(&proc);
                if !lives || self.own.mirrors.contains_key(&proc) {
                    return;
                }
                // Half a copy is none.
                let half = Image::default();
                self.own.images.insert((from, request.vm.clone()), half);
                let left = self.rng.range(3, 20);
                let mirror = Mirroring {
                    to: from,
                    request,
                    left,
                    waits: None,
                };
                self.note_guest(proc, "brings its copy up to date");
                self.own.mirrors.insert(proc, mirror);
            }
            Wire::HandOver { proc, vm, id } if self.own_takes(to, &vm, id) => {
                self.send(to, from, Wire::HandedOver { proc, id });
            }
            Wire::HandedOver { proc, id } => {
                let waits = self.phase_of(proc) == Some(StreamPhase::PreSwitchover);
                if self.own.handing.get(&proc) == Some(&id) && waits {
                    self.own.handing.remove(&proc);
                    self.own.mirrors.remove(&proc);
                    self.stream_ordered(proc);
                }
            }
            _ => {}
        }
    }

    /// At the target: the copy is its own from here on.
    fn own_takes(&mut self, host: HostId, vm: &VmName, id: MigrationId) -> bool {
        let (state, me) = self.replica(host);
        let moving = state.vms.get(vm).is_some_and(|record| {
            matches!(&record.ownership, Ownership::Migrating { id: now, to, .. } if *now == id && *to == me)
        });
        let boot = self.hosts[host].boot_id();
        let whole = own_disk(&state, vm)
            .and_then(|disk| Some((disk, state.copies(&disk.pool, &disk.image)?)))
            .is_some_and(|(disk, record)| record.check(&disk.image, &me, Some(&boot)).is_ok());
        if moving && whole {
            self.close_export(host, vm);
        }
        moving && whole
    }

    /// At the pause: the target takes the copy over, or the source goes on.
    pub(crate) fn own_hand_over(&mut self, proc: ProcId, id: MigrationId, target: ProcId) {
        let mirror = self.own.mirrors.get(&proc);
        let good = mirror.is_some_and(|mirror| mirror.left == 0 && mirror.waits.is_none());
        let there = self.guests.get(&target).map(|guest| guest.host);
        let (Some(guest), Some(there), true) = (self.guests.get(&proc), there, good) else {
            return self.stream_cancel(proc);
        };
        let (host, vm) = (guest.host, guest.vm.clone());
        self.own.handing.insert(proc, id);
        self.send(host, there, Wire::HandOver { proc, vm, id });
        let inc = self.hosts[host].daemon_inc;
        let what = D::HandOverTimeout(proc, id);
        self.after(HAND_OVER_WITHIN, Event::Daemon(host, inc, what));
    }

    pub(crate) fn own_hand_over_timeout(&mut self, proc: ProcId, id: MigrationId) {
        if self.own.handing.get(&proc) == Some(&id) {
            self.own.handing.remove(&proc);
            self.stream_cancel(proc);
        }
    }
}

fn said_of(disk: &DiskSpec, to: &HostName, copy: &DiskCopy, phase: MirrorPhase) -> MirrorReport {
    let since: Revision = copy.since;
    MirrorReport {
        pool: disk.pool.clone(),
        image: disk.image.clone(),
        to: to.clone(),
        since,
        phase,
        done: Default::default(),
        total: Default::default(),
        problem: None,
    }
}
