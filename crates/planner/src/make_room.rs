//! Moving a running guest, live, so that a VM without a host gets one (`make_room`).
//!
//! Always holds: only where the operator allowed it; one guest at a time for each host, and none
//! while another leaves a host that could then do; the guest goes where it fits by every hard rule,
//! within the limits for moves; nothing is stopped for it, and no guest of higher priority moves.

use crate::fit::Query;
use crate::work::{Own, Work};
use quorate_state::OrderKind;

/// Guests that are looked at for one VM.
const MAX_LOOKS: u32 = 200;

pub(crate) fn run(work: &mut Work<'_>) {
    if !work.settings.make_room {
        return;
    }
    for vm in work.stuck.clone() {
        if work.vms[vm].own == Own::Free && work.groups.of[vm].is_none() {
            make_room(work, vm);
        }
    }
}

fn make_room(work: &mut Work<'_>, vm: usize) {
    let hosts = work.reachable(vm);
    // What is leaving already may be enough: look again when it has left.
    if hosts.iter().any(|host| work.hosts[*host].moves > 0) {
        return;
    }
    let mut looks = MAX_LOOKS;
    for host in hosts {
        for guest in 0..work.vms.len() {
            if !may_go(work, guest, vm, host) {
                continue;
            }
            let Some(left) = looks.checked_sub(1) else {
                return;
            };
            looks = left;
            if try_move(work, guest, vm, host) {
                return;
            }
        }
    }
}

/// A guest that this host runs and that counts no more than the VM without a place.
fn may_go(work: &Work<'_>, guest: usize, vm: usize, host: usize) -> bool {
    let seen = &work.vms[guest];
    let runs = matches!(
        seen.own,
        Own::Owned { host: at, epoch: Some(_), order: OrderKind::Run } if at == host
    );
    runs && !seen.touched
        && seen.wanted
        && seen.priority <= work.vms[vm].priority
        && work.groups.of[guest].is_none()
        && work
            .input
            .memory
            .move_after(seen.name)
            .is_none_or(|at| at <= work.input.now)
}

fn try_move(work: &mut Work<'_>, guest: usize, vm: usize, host: usize) -> bool {
    let Some(unit) = work.unit(guest).filter(|unit| unit.live()) else {
        return false;
    };
    // Would it be enough?
    let own = work.vms[guest].own;
    work.set_own(guest, Own::Free, |_| {});
    let query = Query {
        vm,
        only: Some(host),
        ..Query::default()
    };
    let enough = work.fit(&query, host).is_ok();
    work.set_own(guest, own, |seen| seen.touched = false);
    if !enough {
        return false;
    }
    let choice = work.choose_for(&unit, None);
    let Some(to) = choice.best else {
        return false;
    };
    if work.no_slots(&unit, to).is_some() {
        return false;
    }
    let (name, other) = (work.vms[vm].name, work.vms[guest].name);
    let text = format!(
        "{other} moves away, so that it gets a place on {}",
        work.hosts[host].name
    );
    work.note_anew(vm, text);
    let reason = choice.reason(
        work,
        format!("it makes room for {name}, which has no place"),
    );
    work.depart(&unit, to, &reason);
    true
}
