//! The linter: it finds nothing in what the engine decides, and every flaw in plans made to have it.

use super::{after, change, group, hosts, item, together};
use crate::engine::Strategy;
use crate::engine::*;
use proptest::prelude::{Just, ProptestConfig, Strategy as Generator};
use proptest::prelude::{prop, prop_assert, prop_oneof, proptest};

fn stop(unit: UnitId, host: HostId) -> Step {
    Step::Stop { unit, host }
}

fn start(unit: UnitId, host: HostId) -> Step {
    Step::Start { unit, host }
}

fn migrate(unit: UnitId, from: HostId, to: HostId) -> Step {
    Step::Migrate { unit, from, to }
}

/// What the linter says of these steps; the placement is where they lead.
fn said(site: &Site, steps: &[Step]) -> Vec<String> {
    let active = |unit: UnitId| {
        site.item(unit)
            .map_or(Vec::new(), |item| item.active.clone())
    };
    let mut placement: Vec<Vec<HostId>> = (0..site.units.len()).map(active).collect();
    for step in steps {
        match *step {
            Step::Fence { host } => {
                for hosts in &mut placement {
                    hosts.retain(|at| *at != host);
                }
            }
            Step::Stop { unit, host } => placement[unit].retain(|at| *at != host),
            Step::Start { unit, host } => placement[unit].push(host),
            Step::Migrate { unit, from, to } => {
                placement[unit].retain(|at| *at != from);
                placement[unit].push(to);
            }
            Step::Release { .. } => {}
        }
    }
    let outcome = Outcome {
        steps: steps.to_vec(),
        placement,
    };
    let found = lint(site, &outcome);
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn steps_lead_to_the_placement() {
    let mut site = hosts(2);
    let unit = item(&mut site, Some(0));
    let outcome = Outcome {
        steps: vec![migrate(unit, 0, 1)],
        placement: vec![vec![0]],
    };
    let found = lint(&site, &outcome);
    assert_eq!(
        found[0].to_string(),
        "u00000: the steps lead to h0001, the placement says h0000"
    );
}

#[test]
fn what_must_not_be_touched_is_not() {
    let mut site = hosts(2);
    let unit = item(&mut site, Some(0));
    change(&mut site, unit).managed = false;
    let found = said(&site, &[migrate(unit, 0, 1)]);
    assert_eq!(
        found,
        ["u00000 is touched though it is not to be: it is not managed"]
    );
    change(&mut site, unit).managed = true;
    site.rules.hands_off = true;
    assert_eq!(said(&site, &[stop(unit, 0)]).len(), 1);
    site.rules.hands_off = false;
    site.rules.stop_all = true;
    assert_eq!(said(&site, &[stop(unit, 0), start(unit, 1)]).len(), 1);
}

#[test]
fn hosts_that_take_nothing_get_nothing() {
    type Change = fn(&mut Host);
    let changes: [(Change, &str); 6] = [
        (|host| host.up = false, "is not up"),
        (|host| host.lost = true, "is lost"),
        (|host| host.joining = true, "is joining"),
        (|host| host.standby = true, "is on standby"),
        (|host| host.leaving = true, "wants to leave"),
        (|host| host.maintenance = true, "is in maintenance"),
    ];
    for (change, why) in changes {
        let mut site = hosts(2);
        let unit = item(&mut site, None);
        change(&mut site.hosts[1]);
        let text = format!("u00000 goes to h0001, which cannot take it: it {why}");
        let found = said(&site, &[start(unit, 1)]);
        assert!(found.contains(&text), "{found:?}");
        assert!(said(&site, &[start(unit, 0)]).is_empty());
    }
}

#[test]
fn a_live_migration_needs_a_live_source() {
    let mut site = hosts(3);
    let unit = item(&mut site, Some(0));
    let found = said(&site, &[migrate(unit, 2, 1)]);
    assert!(
        found[0].contains("migrates from h0002, which does not run it"),
        "{found:?}"
    );
    change(&mut site, unit).live = false;
    let found = said(&site, &[migrate(unit, 0, 1)]);
    assert!(
        found[0].contains("it cannot move while it runs"),
        "{found:?}"
    );
    change(&mut site, unit).live = true;
    site.hosts[0].lost = true;
    let found = said(&site, &[migrate(unit, 0, 1)]);
    assert!(
        found
            .iter()
            .any(|flaw| flaw.contains("h0000, which is lost")),
        "{found:?}"
    );
}

#[test]
fn one_copy_of_each() {
    let mut site = hosts(2);
    let unit = item(&mut site, Some(0));
    let found = said(&site, &[start(unit, 1), stop(unit, 0)]);
    assert_eq!(
        found,
        ["u00000 would run on h0001 while it still runs on h0000"]
    );
    assert!(said(&site, &[stop(unit, 0), start(unit, 1)]).is_empty());
}

#[test]
fn a_lost_host_is_fenced_before_its_things_start_elsewhere() {
    let mut site = hosts(2);
    let unit = item(&mut site, Some(0));
    (site.hosts[0].up, site.hosts[0].lost) = (false, true);
    change(&mut site, unit).requires = Requires::Fencing;
    let fence = Step::Fence { host: 0 };
    let found = said(&site, &[stop(unit, 0), start(unit, 1), fence]);
    assert_eq!(
        found,
        [
            "u00000 is started before h0000 is fenced, which may still run it",
            "u00000 is stopped before h0000 is fenced, which may still run it"
        ]
    );
    assert!(said(&site, &[fence, stop(unit, 0), start(unit, 1)]).is_empty());
    // Nobody knows whether it runs there.
    let other = item(&mut site, None);
    let changed = change(&mut site, other);
    (changed.requires, changed.known_on) = (Requires::Fencing, vec![1]);
    assert_eq!(said(&site, &[start(other, 1)]).len(), 1);
}

#[test]
fn nothing_starts_without_a_majority() {
    let mut site = hosts(1);
    let unit = item(&mut site, None);
    change(&mut site, unit).requires = Requires::Quorum;
    site.rules.quorum = Quorum::Stop;
    assert_eq!(
        said(&site, &[start(unit, 0)]),
        ["u00000 is started without a majority"]
    );
    change(&mut site, unit).requires = Requires::Nothing;
    assert!(said(&site, &[start(unit, 0)]).is_empty());
}

#[test]
fn bans_hold_for_what_arrives_and_for_what_could_leave() {
    let mut site = hosts(2);
    let unit = item(&mut site, Some(0));
    let ban = |unit, host| Prefer {
        unit,
        host,
        score: -INFINITY,
    };
    site.prefer.push(ban(unit, 1));
    let found = said(&site, &[migrate(unit, 0, 1)]);
    assert_eq!(
        found,
        ["u00000 is on h0001 afterwards, where it must not run"]
    );
    site.prefer[0].host = 0;
    assert_eq!(said(&site, &[]).len(), 1);
    change(&mut site, unit).managed = false;
    assert!(said(&site, &[]).is_empty());
    // What must be stopped before it cannot be stopped.
    change(&mut site, unit).managed = true;
    let dependent = item(&mut site, Some(0));
    change(&mut site, dependent).managed = false;
    after(&mut site, unit, dependent);
    assert!(said(&site, &[]).is_empty());
    // A ban of a group is one of its members.
    let mut site = hosts(2);
    let members = [item(&mut site, None), item(&mut site, None)];
    let whole = group(&mut site, &members);
    site.prefer.push(ban(whole, 1));
    let steps = [start(members[0], 1), start(members[1], 1)];
    assert_eq!(said(&site, &steps).len(), 2);
}

#[test]
fn together_and_apart_hold_afterwards() {
    let mut site = hosts(2);
    let (one, other) = (item(&mut site, Some(0)), item(&mut site, Some(1)));
    together(&mut site, one, other, INFINITY);
    assert_eq!(
        said(&site, &[]),
        ["u00000 is on h0000 afterwards, not with u00001 (h0001)"]
    );
    assert!(said(&site, &[stop(one, 0)]).is_empty());
    assert_eq!(
        said(&site, &[stop(other, 1)]),
        ["u00000 is on h0000 afterwards, not with u00001 (nowhere)"]
    );
    site.together[0].score = -INFINITY;
    assert!(said(&site, &[]).is_empty());
    assert_eq!(
        said(&site, &[migrate(one, 0, 1)]),
        ["u00000 and u00001 are both on h0001 afterwards"]
    );
}

#[test]
fn a_label_makes_a_place_of_several_hosts() {
    let mut site = hosts(2);
    let (one, other) = (item(&mut site, Some(0)), item(&mut site, Some(1)));
    together(&mut site, one, other, -INFINITY);
    site.together[0].by = Some(0);
    for host in &mut site.hosts {
        host.labels = vec![Some("rack1".to_owned())];
    }
    assert_eq!(said(&site, &[]).len(), 1);
    site.hosts[1].labels = vec![Some("rack2".to_owned())];
    assert!(said(&site, &[]).is_empty());
}

#[test]
fn room_is_not_given_twice() {
    let mut site = hosts(1);
    site.hosts[0].capacity = vec![3];
    let (one, other) = (item(&mut site, None), item(&mut site, None));
    for unit in [one, other] {
        change(&mut site, unit).needs = vec![2];
    }
    let steps = [start(one, 0), start(other, 0)];
    assert!(said(&site, &steps).is_empty());
    site.rules.strategy = Strategy::Balanced;
    assert_eq!(
        said(&site, &steps),
        ["h0000 would need 4 of its capacity number 0 and has 3"]
    );
}

#[test]
fn orders_hold_for_starts_and_stops() {
    let mut site = hosts(2);
    let (first, then) = (item(&mut site, None), item(&mut site, None));
    after(&mut site, first, then);
    let found = said(&site, &[start(then, 0), start(first, 0)]);
    assert_eq!(
        found,
        [
            "u00001 starts before u00000 starts",
            "u00001 is started and u00000 does not run"
        ]
    );
    assert_eq!(said(&site, &[start(then, 0)]).len(), 1);
    let mut site = hosts(2);
    let (first, then) = (item(&mut site, Some(0)), item(&mut site, Some(0)));
    after(&mut site, first, then);
    assert_eq!(
        said(&site, &[stop(first, 0), stop(then, 0)]),
        [
            "u00000 stops before u00001 stops",
            "u00000 is stopped while u00001, which needs it, runs"
        ]
    );
    assert!(said(&site, &[stop(then, 0), stop(first, 0)]).is_empty());
    // A live migration stops nothing.
    assert!(said(&site, &[migrate(first, 0, 1)]).is_empty());
    assert_eq!(
        said(
            &site,
            &[stop(then, 0), migrate(first, 0, 1), start(then, 0)]
        ),
        ["u00001 is restarted though neither it nor what it needs is stopped or started"]
    );
}

#[test]
fn one_of_several_must_run() {
    let mut site = hosts(1);
    let (one, other, then) = (
        item(&mut site, None),
        item(&mut site, None),
        item(&mut site, None),
    );
    site.any_of.push(AnyOf {
        first: vec![one, other],
        first_act: Act::Start,
        then: vec![then],
        then_act: Act::Start,
        strength: Strength::Mandatory,
        side: Side::Forward,
    });
    assert_eq!(
        said(&site, &[start(then, 0)]),
        ["u00002 is started and any of u00000, u00001 does not run"]
    );
    assert!(said(&site, &[start(other, 0), start(then, 0)]).is_empty());
}

#[test]
fn a_host_is_let_go_when_it_is_empty() {
    let mut site = hosts(2);
    let unit = item(&mut site, Some(0));
    site.hosts[0].leaving = true;
    let release = Step::Release { host: 0 };
    assert_eq!(
        said(&site, &[release, migrate(unit, 0, 1)]),
        ["h0000 is let go while u00000 runs there"]
    );
    assert!(said(&site, &[migrate(unit, 0, 1), release]).is_empty());
}

/// What makes a site: hosts (kind, capacity), items (host, needs, kind, priority, group), rules, orders, bans.
#[derive(Debug, Clone)]
struct Draft {
    hosts: Vec<(u8, i64)>,
    items: Vec<(Option<usize>, i64, u8, i64, u8)>,
    together: Vec<(usize, usize, Score)>,
    orders: Vec<(usize, usize, u8)>,
    bans: Vec<(usize, usize)>,
    strategy: usize,
    quorum: u8,
}

fn draft() -> impl Generator<Value = Draft> {
    let hosts = prop::collection::vec((0_u8..12, 0_i64..20), 1..5);
    let one = (
        prop::option::of(0_usize..5),
        0_i64..8,
        0_u8..12,
        0_i64..3,
        0_u8..6,
    );
    let items = prop::collection::vec(one, 1..9);
    let score = prop_oneof![Just(INFINITY), Just(-INFINITY), -100_i64..100];
    let together = prop::collection::vec((0_usize..11, 0_usize..11, score), 0..5);
    let orders = prop::collection::vec((0_usize..11, 0_usize..11, 0_u8..5), 0..6);
    let bans = prop::collection::vec((0_usize..11, 0_usize..5), 0..6);
    let all = (hosts, items, together, orders, bans, 0_usize..4, 0_u8..12);
    all.prop_map(
        |(hosts, items, together, orders, bans, strategy, quorum)| Draft {
            hosts,
            items,
            together,
            orders,
            bans,
            strategy,
            quorum,
        },
    )
}

fn build(draft: &Draft) -> Site {
    let mut site = hosts(draft.hosts.len());
    for (host, (kind, capacity)) in site.hosts.iter_mut().zip(&draft.hosts) {
        match kind {
            0 => host.standby = true,
            1 => host.leaving = true,
            2 => (host.up, host.lost) = (false, true),
            3 => host.maintenance = true,
            _ => {}
        }
        host.capacity = vec![*capacity];
    }
    let mut groups = [Vec::new(), Vec::new()];
    for (active, needs, kind, priority, member) in &draft.items {
        let active = active.filter(|host| *host < draft.hosts.len());
        let unit = item(&mut site, active);
        let one = change(&mut site, unit);
        one.needs = vec![*needs];
        one.requires = Requires::Fencing;
        match kind {
            0 => one.managed = false,
            1 => (one.failed, one.restart_cures) = (active.is_some(), active.is_some()),
            2..=4 => one.live = false,
            5 => one.wanted = Some(Role::Stopped),
            _ => {}
        }
        site.units[unit].priority = *priority;
        if let Some(group) = groups.get_mut(usize::from(*member)) {
            group.push(unit);
        }
    }
    for members in groups.iter().filter(|members| !members.is_empty()) {
        group(&mut site, members);
    }
    let count = site.units.len();
    let related = |site: &Site, one: UnitId, other: UnitId| {
        let parent = |unit: UnitId| site.units[unit].parent;
        one == other
            || parent(one) == Some(other)
            || parent(other) == Some(one)
            || (parent(one).is_some() && parent(one) == parent(other))
    };
    for (one, other, score) in &draft.together {
        if *one < count && *other < count && *score != 0 && !related(&site, *one, *other) {
            together(&mut site, *one, *other, *score);
        }
    }
    for (one, other, kind) in &draft.orders {
        if one < other && *other < count && !related(&site, *one, *other) {
            after(&mut site, *one, *other);
            if *kind == 0 {
                for order in site.orders.iter_mut().rev().take(2) {
                    order.strength = Strength::Optional;
                }
            }
        }
    }
    for (unit, host) in &draft.bans {
        if *unit < count && *host < draft.hosts.len() {
            site.prefer.push(Prefer {
                unit: *unit,
                host: *host,
                score: -INFINITY,
            });
        }
    }
    site.rules.strategy = [
        Strategy::Spread,
        Strategy::Limit,
        Strategy::Balanced,
        Strategy::Dense,
    ][draft.strategy];
    site.rules.quorum = match draft.quorum {
        0 => Quorum::Stop,
        1 => Quorum::Freeze,
        _ => Quorum::Held,
    };
    site
}

/// The same sites each time. `QUORATE_ENGINE_CASES=100000` looks at more, others each time.
fn config() -> ProptestConfig {
    let more = std::env::var("QUORATE_ENGINE_CASES").ok();
    let more = more.and_then(|cases| cases.parse().ok());
    let mut config = ProptestConfig::with_cases(more.unwrap_or(2_000));
    if more.is_none() {
        config.rng_seed = proptest::test_runner::RngSeed::Fixed(3);
    }
    config.failure_persistence = None;
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_plan_has_a_flaw(draft in draft()) {
        let site = build(&draft);
        let outcome = solve(&site);
        let found = lint(&site, &outcome);
        prop_assert!(found.is_empty(), "{:?} in {:?}", found, outcome);
    }
}
