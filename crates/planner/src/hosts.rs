//! Modes of hosts: one that is drained and empty goes into maintenance.

use crate::work::Work;
use quorate_state::{HostMode, Reason};
use quorate_types::VmPhase;

pub(crate) fn run(work: &mut Work<'_>) {
    for at in 0..work.hosts.len() {
        let draining = work.hosts[at]
            .record
            .is_some_and(|record| record.mode == HostMode::Draining);
        if !draining {
            continue;
        }
        let own = work.vms.iter().find(|vm| vm.own.on(at));
        if let Some(vm) = own {
            let text = format!("waits for {} to leave", vm.name);
            work.host_notes.insert(at, text);
        } else if let Some(left) = leftover(work, at) {
            work.host_notes.insert(at, left);
        } else {
            let reason = Reason::new("it is drained: nothing is left on it");
            work.set_mode(at, HostMode::Maintenance, reason);
        }
    }
}

/// A process that a host which is up still reports, though no VM is its any more.
fn leftover(work: &Work<'_>, at: usize) -> Option<String> {
    let host = &work.hosts[at];
    let vms = &host.report.filter(|_| host.up)?.vms;
    let here = vms
        .iter()
        .find(|(_, vm)| !matches!(vm.phase, VmPhase::Absent | VmPhase::BackOff));
    here.map(|(name, _)| format!("waits for {} to clean up after {name}", host.name))
}
