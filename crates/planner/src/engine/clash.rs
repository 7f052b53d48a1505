//! Arrivals that cannot be, because something that was to leave does not.
//!
//! Where things go is decided before it is known what can be stopped. Where a stop turns out to be
//! impossible (something that comes after it may not be touched), the host is not as it was thought to be:
//! an arrival that would break a ban of company there, or finds no room, waits for another plan.

use super::placing::Placing;
use super::score::INFINITY;
use super::sequence::Step;
use super::site::{Body, HostId, Strategy, UnitId};
use std::collections::{BTreeMap, BTreeSet};

/// Items that must not arrive, with their hosts.
pub(super) fn clashes(
    placing: &Placing<'_>,
    steps: &[Step],
    placement: &[Vec<HostId>],
) -> BTreeSet<(UnitId, HostId)> {
    let arrivals: BTreeMap<UnitId, HostId> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Start { unit, host } | Step::Migrate { unit, to: host, .. } => {
                Some((*unit, *host))
            }
            _ => None,
        })
        .collect();
    let mut found = BTreeSet::new();
    company(placing, &arrivals, placement, &mut found);
    if placing.site.rules.strategy != Strategy::Spread {
        room(placing, &arrivals, placement, &mut found);
    }
    found
}

/// Those that must not meet what stays.
fn company(
    placing: &Placing<'_>,
    arrivals: &BTreeMap<UnitId, HostId>,
    placement: &[Vec<HostId>],
    found: &mut BTreeSet<(UnitId, HostId)>,
) {
    let items = |unit: UnitId| match &placing.site.units[unit].body {
        Body::Item(_) => vec![unit],
        Body::Group(group) => group.members.clone(),
    };
    let plain = |rule: &&super::Together| {
        rule.score <= -INFINITY && rule.dependent_role.is_none() && rule.primary_role.is_none()
    };
    for rule in placing.together.iter().filter(plain) {
        let primaries = items(rule.primary);
        for one in &items(rule.dependent) {
            for other in &primaries {
                for (arrives, stays) in [(one, other), (other, one)] {
                    let (Some(host), None) = (arrivals.get(arrives), arrivals.get(stays)) else {
                        continue;
                    };
                    let mut there = placement[*stays].iter();
                    if there.any(|at| placing.same_place(rule, *host, *at)) {
                        found.insert((*arrives, *host));
                    }
                }
            }
        }
    }
}

/// The least important of those for which a host has no room.
fn room(
    placing: &Placing<'_>,
    arrivals: &BTreeMap<UnitId, HostId>,
    placement: &[Vec<HostId>],
    found: &mut BTreeSet<(UnitId, HostId)>,
) {
    let hosts = &placing.site.hosts;
    let mut free: Vec<Vec<i64>> = hosts.iter().map(|host| host.capacity.clone()).collect();
    let mut take = |unit: UnitId, host: HostId, sign: i64| -> bool {
        let needs = placing.item(unit).map_or(&[][..], |item| &item.needs);
        let mut short = false;
        for (free, need) in free[host].iter_mut().zip(needs) {
            *free = free.saturating_sub(sign.saturating_mul(*need));
            short |= *free < 0 && *need > 0;
        }
        short
    };
    for (unit, at) in placement.iter().enumerate() {
        let stays = at.iter().filter(|at| arrivals.get(&unit) != Some(at));
        for host in stays {
            take(unit, *host, 1);
        }
    }
    let mut order: Vec<(UnitId, HostId)> =
        arrivals.iter().map(|(unit, host)| (*unit, *host)).collect();
    order.sort_by_key(|(unit, _)| std::cmp::Reverse(placing.site.units[*unit].priority));
    for (unit, host) in order {
        if take(unit, host, 1) {
            take(unit, host, -1);
            found.insert((unit, host));
        }
    }
}
