//! Tests of the engine: what it decides in small sites, and what always holds in random ones.

mod bounds;
mod decisions;
mod properties;
mod soundness;

use super::*;

/// What [`super::solve`] decides, after [`lint`] has looked at it.
pub(super) fn solve(site: &Site) -> Outcome {
    let outcome = super::solve(site);
    assert_eq!(lint(site, &outcome), [], "{:?}", outcome.steps);
    outcome
}

/// A site of hosts `h0`, `h1`, ... that all take orders.
pub(super) fn hosts(count: usize) -> Site {
    let mut site = Site::default();
    for number in 0..count {
        site.hosts.push(Host {
            name: format!("h{number:04}"),
            up: true,
            can_fence: true,
            ..Host::default()
        });
    }
    site
}

/// Adds an item that may run anywhere, and runs on `active`.
pub(super) fn item(site: &mut Site, active: Option<HostId>) -> UnitId {
    let hosts = site.hosts.len();
    site.units.push(Unit {
        name: format!("u{:05}", site.units.len()),
        priority: 0,
        parent: None,
        body: Body::Item(Box::new(Item {
            scores: vec![Some(0); hosts],
            active: active.into_iter().collect(),
            role: Some(if active.is_some() {
                Role::Started
            } else {
                Role::Stopped
            }),
            managed: true,
            critical: true,
            live: true,
            known_on: (0..hosts).collect(),
            ..Item::default()
        })),
    });
    site.units.len() - 1
}

pub(super) fn change(site: &mut Site, unit: UnitId) -> &mut Item {
    match &mut site.units[unit].body {
        Body::Item(item) => item,
        Body::Group(_) => panic!("a group"),
    }
}

pub(super) fn together(site: &mut Site, dependent: UnitId, primary: UnitId, score: Score) {
    site.together.push(Together {
        dependent,
        primary,
        score,
        by: None,
        influence: true,
        explicit: true,
        dependent_role: None,
        primary_role: None,
    });
}

/// First one, then the other; stops in reverse.
pub(super) fn after(site: &mut Site, first: UnitId, then: UnitId) {
    let forward = Order {
        first,
        first_act: Act::Start,
        then,
        then_act: Act::Start,
        strength: Strength::Mandatory,
        side: Side::Forward,
    };
    site.orders.push(forward);
    site.orders.push(Order {
        first: then,
        first_act: Act::Stop,
        then: first,
        then_act: Act::Stop,
        side: Side::Backward,
        ..forward
    });
}

pub(super) fn group(site: &mut Site, members: &[UnitId]) -> UnitId {
    let group = site.units.len();
    site.units.push(Unit {
        name: format!("g{group:05}"),
        priority: 0,
        parent: None,
        body: Body::Group(Group {
            members: members.to_vec(),
            ordered: true,
            colocated: true,
        }),
    });
    for member in members {
        site.units[*member].parent = Some(group);
    }
    group
}
