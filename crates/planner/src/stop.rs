//! Stopping what shall not run, and forgetting what is deleted.
//!
//! Always holds: an order to stop is only given for a VM that shall not run; of several that shall
//! not run, the ones that need others are stopped first. A dependent that shall run is left alone.

use crate::work::{Own, Work};
use quorate_state::{OrderKind, Reason, StopMode};

pub(crate) fn run(work: &mut Work<'_>) {
    for vm in 0..work.vms.len() {
        if !work.vms[vm].wanted {
            stop(work, vm);
        }
    }
}

fn stop(work: &mut Work<'_>, vm: usize) {
    let deleting = work.vms[vm].record.deleting;
    let why = if deleting {
        "it was deleted"
    } else {
        "it shall be stopped"
    };
    match work.vms[vm].own {
        Own::Free if deleting => work.forget(vm, Reason::new("it was deleted and is stopped")),
        Own::Free => {}
        Own::Owned {
            order: OrderKind::Run,
            ..
        } => match waits_for(work, vm) {
            Some(other) => work.note(vm, |work| {
                format!("is stopped after {}, which needs it", work.vms[other].name)
            }),
            None => work.stop(vm, StopMode::Graceful, Reason::new(why)),
        },
        // The move that it was saved for is not wanted any more, and a save that fails would never end it.
        Own::Owned {
            order: OrderKind::Stop(StopMode::Save),
            ..
        } => work.stop(vm, StopMode::Graceful, Reason::new(why)),
        Own::Owned { host, .. } => {
            let name = work.hosts[host].name;
            work.note(vm, |_| format!("{name} is shutting it down"));
        }
        // The shortest way to a stop: the guest stays where it was, and is stopped there.
        Own::Migrating(moving) if !moving.cancel => work.cancel(vm, Reason::new(why)),
        Own::Migrating(_) => {}
    }
}

/// A dependent that is to be stopped too and still runs on a host that can do it.
fn waits_for(work: &Work<'_>, vm: usize) -> Option<usize> {
    let runs = |other: &usize| {
        let seen = &work.vms[*other];
        let mut hosts = seen.own.hosts();
        !seen.wanted && hosts.any(|host| work.hosts[host].up)
    };
    work.needed_by.of(vm).iter().copied().find(runs)
}
