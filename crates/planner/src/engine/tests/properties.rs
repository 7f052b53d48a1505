//! What always holds, in random small sites.

use super::{after, change, item, solve, together};
use crate::engine::{INFINITY, Prefer, Score, Side, Site, Step, UnitId};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Draft {
    hosts: Vec<(bool, bool, i64)>,
    items: Vec<(Option<usize>, i64, bool, i64)>,
    together: Vec<(usize, usize, Score)>,
    orders: Vec<(usize, usize)>,
    bans: Vec<(usize, usize)>,
    strategy: usize,
}

fn draft() -> impl Strategy<Value = Draft> {
    let hosts = prop::collection::vec((any::<bool>(), any::<bool>(), 0_i64..20), 1..5);
    let items = prop::collection::vec(
        (
            prop::option::of(0_usize..5),
            0_i64..8,
            any::<bool>(),
            0_i64..3,
        ),
        1..8,
    );
    let score = prop_oneof![Just(INFINITY), Just(-INFINITY), -100_i64..100];
    let together = prop::collection::vec((0_usize..8, 0_usize..8, score), 0..5);
    let orders = prop::collection::vec((0_usize..8, 0_usize..8), 0..5);
    let bans = prop::collection::vec((0_usize..8, 0_usize..5), 0..6);
    (hosts, items, together, orders, bans, 0_usize..4).prop_map(
        |(hosts, items, together, orders, bans, strategy)| Draft {
            hosts,
            items,
            together,
            orders,
            bans,
            strategy,
        },
    )
}

fn build(draft: &Draft) -> Site {
    let mut site = super::hosts(draft.hosts.len());
    for (host, (standby, leaving, capacity)) in site.hosts.iter_mut().zip(&draft.hosts) {
        (host.standby, host.leaving) = (*standby, *leaving);
        host.capacity = vec![*capacity];
    }
    for (active, needs, live, priority) in &draft.items {
        let active = active.filter(|host| *host < draft.hosts.len());
        let unit = item(&mut site, active);
        let one = change(&mut site, unit);
        (one.needs, one.live) = (vec![*needs], *live);
        site.units[unit].priority = *priority;
    }
    let count = draft.items.len();
    for (one, other, score) in &draft.together {
        if *one < count && *other < count && one != other && *score != 0 {
            together(&mut site, *one, *other, *score);
        }
    }
    for (one, other) in &draft.orders {
        if one < other && *other < count {
            after(&mut site, *one, *other);
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
    let strategies = [
        crate::engine::Strategy::Spread,
        crate::engine::Strategy::Limit,
        crate::engine::Strategy::Balanced,
        crate::engine::Strategy::Dense,
    ];
    site.rules.strategy = strategies[draft.strategy];
    site
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_starts_where_it_must_not(draft in draft()) {
        let site = build(&draft);
        for step in solve(&site).steps {
            let (unit, host) = match step {
                Step::Start { unit, host } | Step::Migrate { unit, to: host, .. } => (unit, host),
                _ => continue,
            };
            prop_assert!(site.hosts[host].open());
            let banned = site.prefer.iter().any(|wish| wish.unit == unit && wish.host == host);
            prop_assert!(!banned, "{} is banned from {}", unit, host);
        }
    }

    #[test]
    fn equal_input_gives_an_equal_outcome(draft in draft()) {
        let site = build(&draft);
        prop_assert_eq!(solve(&site), solve(&site));
    }

    #[test]
    fn a_migration_stops_nothing_that_depends_on_it(draft in draft()) {
        let mut draft = draft;
        // Nothing but live moves: no item is cold, failed or tied to another one, and there is always a place.
        draft.together.clear();
        draft.bans.clear();
        draft.strategy = 0;
        // All run already: what starts for the first time is waited for, by a restart too.
        for one in &mut draft.items {
            (one.0, one.2) = (Some(one.0.unwrap_or(0) % draft.hosts.len()), true);
        }
        draft.hosts.push((false, false, 0));
        let site = build(&draft);
        for step in solve(&site).steps {
            prop_assert!(!matches!(step, Step::Stop { .. }), "{:?}", step);
        }
    }

    #[test]
    fn an_item_runs_at_most_once_afterwards(draft in draft()) {
        for hosts in solve(&build(&draft)).placement {
            prop_assert!(hosts.len() <= 1);
        }
    }

    #[test]
    fn a_first_start_comes_before_what_waits_for_it(draft in draft()) {
        let site = build(&draft);
        let steps = solve(&site).steps;
        let at = |unit: UnitId| steps.iter().position(|s| matches!(s, Step::Start { unit: u, .. } if *u == unit));
        for order in site.orders.iter().filter(|order| order.side == Side::Forward) {
            if let (Some(first), Some(then)) = (at(order.first), at(order.then)) {
                prop_assert!(first < then);
            }
        }
    }
}
