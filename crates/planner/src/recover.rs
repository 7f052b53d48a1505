//! Recovery: a VM is taken from its owner as soon as *its* proof exists.
//!
//! ```text
//! owner's ledger closed the epoch ------------> Release (StoppedByOwner)
//! a proof covers the whole host --------------> Release (that proof)
//! owner cannot save it, tries used up ---------> AbandonSave: the guest goes on there
//! owner is up but says nothing of the VM -----> nothing: its agent starts it again, same epoch
//! owner is silent, nothing proven ------------> nothing: unknown is not dead
//! ```
//! Always holds: each VM by itself; no timeout at the leader takes part.

use crate::work::{Own, Work};
use quorate_membership::{Evidence, FenceProof, HostHealth};
use quorate_state::{OrderKind, Reason, StopMode};
use quorate_types::report::SAVE_TRIES;
use quorate_types::{Epoch, VmPhase};

pub(crate) fn run(work: &mut Work<'_>) {
    for vm in 0..work.vms.len() {
        if let Own::Owned {
            host,
            epoch: Some(epoch),
            order,
        } = work.vms[vm].own
        {
            recover(work, vm, host, epoch, order);
        }
    }
}

fn recover(work: &mut Work<'_>, vm: usize, host: usize, epoch: Epoch, order: OrderKind) {
    let Some(proof) = work.proof(vm, host, epoch) else {
        match work.failed_save(vm, host, epoch, order) {
            Some(reason) => work.abandon_save(vm, reason),
            None => work.note_owner(vm, host, epoch, order),
        }
        return;
    };
    let report = work.report(vm, host);
    let closed = report.filter(|report| report.closed >= epoch);
    let saving = order == OrderKind::Stop(StopMode::Save) && !work.vms[vm].record.deleting;
    let saved = closed
        .and_then(|report| report.saved.clone())
        .filter(|_| saving);
    let owner = work.hosts[host].name;
    let summary = match (closed, order) {
        (Some(_), OrderKind::Stop(_)) => format!("{owner} stopped it as ordered"),
        (Some(report), OrderKind::Run) if report.guest_shutdown => {
            format!("the guest shut itself down on {owner}")
        }
        (Some(_), OrderKind::Run) => format!("it ended on {owner}"),
        (None, _) => format!("{owner} is lost ({})", proof.kind()),
    };
    let mut evidence = vec![proof.describe()];
    if let Some(error) = closed.and_then(|report| report.error.as_ref()) {
        evidence.push(format!("{owner} reports: {error}"));
    }
    let reason = Reason {
        summary,
        evidence,
        candidates: Vec::new(),
    };
    work.release(vm, vec![proof], saved, reason);
}

impl<'a> Work<'a> {
    /// A proof that `host` does not run the VM under `epoch`, the owner's own word first.
    pub(crate) fn proof(&self, vm: usize, host: usize, epoch: Epoch) -> Option<FenceProof> {
        let closed = self.word(vm, host).map(|word| word.closed);
        if let Some(closed) = closed.filter(|closed| *closed >= epoch) {
            let evidence = Evidence::Closed {
                vm: self.vms[vm].name.clone(),
                closed,
            };
            return FenceProof::from_evidence(self.hosts[host].name.clone(), evidence).ok();
        }
        let (owner, name) = (self.hosts[host].name, self.vms[vm].name);
        let wide = self.hosts[host].proof;
        wide.or_else(|| self.storage_cut(vm, host))
            .filter(|proof| proof.covers(owner, name, epoch))
            .cloned()
    }

    /// The proof that this VM's disks were taken from a silent host.
    fn storage_cut(&self, vm: usize, host: usize) -> Option<&'a FenceProof> {
        if self.hosts[host].up {
            return None;
        }
        let (owner, seen) = (self.hosts[host].name, &self.vms[vm]);
        let disks = || {
            let disks = seen.record.effective().disks.iter();
            disks.map(|disk| (&disk.pool, disk.image.as_str()))
        };
        let mut about = self.input.proofs.iter();
        about.find(|proof| {
            proof.vm() == Some(seen.name) && proof.host() == owner && proof.covers_disks(disks())
        })
    }

    /// Its owner has given up saving its memory. The policy `quick` allows no stop that loses it, so it goes on there.
    fn failed_save(
        &self,
        vm: usize,
        host: usize,
        epoch: Epoch,
        order: OrderKind,
    ) -> Option<Reason> {
        if order != OrderKind::Stop(StopMode::Save) || !self.vms[vm].wanted || !self.hosts[host].up
        {
            return None;
        }
        let report = self
            .report(vm, host)
            .filter(|report| report.epoch == epoch)?;
        if report.save_failures < SAVE_TRIES || report.phase != VmPhase::Running {
            return None;
        }
        let (vm, name) = (self.vms[vm].name, self.hosts[host].name);
        let error = report.error.as_deref().unwrap_or("no cause was reported");
        Some(Reason {
            summary: format!(
                "{name} cannot save its memory; mend that, or allow a stop with `migration: cold` in the manifest of {vm}"
            ),
            evidence: vec![format!("{name} reports: {error}")],
            candidates: Vec::new(),
        })
    }

    /// Notes what an owned VM waits for, if it is not as wanted.
    fn note_owner(&mut self, vm: usize, host: usize, epoch: Epoch, order: OrderKind) {
        if !self.takes_notes() {
            return;
        }
        if !self.hosts[host].up {
            self.note(vm, |work| work.silent_owner(host));
            return;
        }
        let saving = order == OrderKind::Stop(StopMode::Save);
        if !(saving || order == OrderKind::Run) || !self.vms[vm].wanted {
            return;
        }
        let name = self.hosts[host].name;
        let report = self.report(vm, host).filter(|report| report.epoch == epoch);
        if saving {
            let failed = report.filter(|report| report.save_failures > 0);
            let error = failed.and_then(|report| report.error.as_deref());
            let error = error.map_or(String::new(), |error| format!(": {error}"));
            return self.note(vm, |_| {
                format!("{name} saves its memory for a quick migration{error}")
            });
        }
        let Some(report) = report else {
            self.note(vm, |_| {
                format!("{name} has the order to run it and has not reported it yet")
            });
            return;
        };
        let error = report.error.as_deref().unwrap_or("no cause was reported");
        let text = match report.phase {
            VmPhase::Running | VmPhase::MigratingOut if report.ready => return,
            VmPhase::Running | VmPhase::MigratingOut => {
                if self.vms[vm].spec.ready.is_none() {
                    return;
                }
                format!("it runs on {name} and is not ready yet")
            }
            VmPhase::Frozen => format!("{name} froze it when its lease ran out; it goes on soon"),
            VmPhase::IoError => {
                let disks = self.vms[vm].record.effective().disks.iter();
                let mut lost = disks.filter_map(|disk| self.pool_problem(host, &disk.pool));
                let layer = lost
                    .next()
                    .map_or(String::new(), |problem| format!(" ({problem})"));
                format!("{name} paused it after an I/O error: {error}{layer}")
            }
            VmPhase::BackOff => format!(
                "{name} waits before it tries again ({} restarts): {error}",
                report.restarts
            ),
            VmPhase::Absent | VmPhase::Starting => format!("{name} is starting it"),
            VmPhase::Stopping | VmPhase::Incoming | VmPhase::HandedOver => {
                format!("{name} is ending what it did before")
            }
        };
        self.note(vm, |_| text);
    }

    /// Why a VM of a silent host is not started elsewhere.
    pub(crate) fn silent_owner(&self, host: usize) -> String {
        let seen = &self.hosts[host];
        let name = seen.name;
        let armed = seen.record.and_then(|record| record.armed).is_some();
        match seen.health {
            Some(HostHealth::Expired) => format!(
                "{name} is silent and its lease has run out; waits until its watchdog must have acted"
            ),
            Some(HostHealth::Dead) if armed => {
                format!("{name} is silent; waits for the proof that it is dead")
            }
            Some(HostHealth::Dead) => format!(
                "no proof that {name} is dead: its guard or watchdog was not armed; switch it off and run `quorate host confirm-dead {name}`, or configure power fencing for it"
            ),
            _ => format!("{name} is silent, its lease may still run"),
        }
    }
}
