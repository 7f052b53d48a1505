//! Decisions in small sites.

use super::*;

#[test]
fn things_are_spread_by_number_then_by_name() {
    let mut site = hosts(2);
    for _ in 0..4 {
        item(&mut site, None);
    }
    let outcome = solve(&site);
    assert_eq!(outcome.placement, vec![vec![0], vec![1], vec![0], vec![1]]);
    assert_eq!(outcome.steps.len(), 4);
}

#[test]
fn what_runs_stays_while_it_is_as_good_as_elsewhere() {
    let mut site = hosts(2);
    let one = item(&mut site, Some(1));
    change(&mut site, one).stickiness = 1;
    let two = item(&mut site, Some(1));
    change(&mut site, two).stickiness = 1;
    let outcome = solve(&site);
    assert!(outcome.steps.is_empty(), "{:?}", outcome.steps);
    site.prefer.push(Prefer {
        unit: one,
        host: 0,
        score: 2,
    });
    let outcome = solve(&site);
    assert_eq!(
        outcome.steps,
        vec![Step::Migrate {
            unit: one,
            from: 1,
            to: 0
        }]
    );
}

#[test]
fn a_ban_outweighs_a_wish_and_every_host_banned_stops_it() {
    let mut site = hosts(2);
    let one = item(&mut site, Some(0));
    site.prefer.push(Prefer {
        unit: one,
        host: 0,
        score: INFINITY,
    });
    site.prefer.push(Prefer {
        unit: one,
        host: 0,
        score: -INFINITY,
    });
    assert_eq!(solve(&site).placement[one], vec![1]);
    site.prefer.push(Prefer {
        unit: one,
        host: 1,
        score: -INFINITY,
    });
    let outcome = solve(&site);
    assert_eq!(outcome.steps, vec![Step::Stop { unit: one, host: 0 }]);
    assert!(outcome.placement[one].is_empty());
}

#[test]
fn capacity_is_a_limit_unless_it_is_ignored() {
    let mut site = hosts(2);
    for host in &mut site.hosts {
        host.capacity = vec![10];
    }
    for _ in 0..3 {
        let one = item(&mut site, None);
        change(&mut site, one).needs = vec![6];
    }
    assert_eq!(
        solve(&site)
            .placement
            .iter()
            .filter(|hosts| hosts.is_empty())
            .count(),
        0
    );
    for strategy in [Strategy::Limit, Strategy::Balanced, Strategy::Dense] {
        site.rules.strategy = strategy;
        let outcome = solve(&site);
        assert_eq!(
            outcome
                .placement
                .iter()
                .filter(|hosts| hosts.is_empty())
                .count(),
            1
        );
    }
}

#[test]
fn dense_fills_a_host_and_balanced_seeks_room() {
    let mut site = hosts(2);
    site.hosts[0].capacity = vec![10];
    site.hosts[1].capacity = vec![20];
    for _ in 0..2 {
        let one = item(&mut site, None);
        change(&mut site, one).needs = vec![5];
    }
    site.rules.strategy = Strategy::Dense;
    assert_eq!(solve(&site).placement, vec![vec![0], vec![0]]);
    site.rules.strategy = Strategy::Balanced;
    assert_eq!(solve(&site).placement, vec![vec![1], vec![1]]);
}

#[test]
fn a_host_without_capacity_takes_nothing_that_needs_some() {
    let mut site = hosts(1);
    site.hosts[0].capacity = vec![0];
    site.rules.strategy = Strategy::Limit;
    let hungry = item(&mut site, None);
    change(&mut site, hungry).needs = vec![1];
    let frugal = item(&mut site, None);
    change(&mut site, frugal).needs = vec![0];
    let outcome = solve(&site);
    assert!(outcome.placement[hungry].is_empty());
    assert_eq!(outcome.placement[frugal], vec![0]);
}

#[test]
fn together_and_apart() {
    let mut site = hosts(3);
    let one = item(&mut site, None);
    let with = item(&mut site, None);
    let apart = item(&mut site, None);
    together(&mut site, with, one, INFINITY);
    together(&mut site, apart, one, -INFINITY);
    let placement = solve(&site).placement;
    assert_eq!(placement[with], placement[one]);
    assert_ne!(placement[apart], placement[one]);
}

#[test]
fn a_wish_to_be_apart_gives_way_when_there_is_one_host_only() {
    let mut site = hosts(1);
    let one = item(&mut site, None);
    let apart = item(&mut site, None);
    together(&mut site, apart, one, -5);
    assert_eq!(solve(&site).placement[apart], vec![0]);
    site.together[0].score = -INFINITY;
    assert!(solve(&site).placement[apart].is_empty());
}

#[test]
fn a_live_migration_does_not_stop_what_depends_on_it() {
    let mut site = hosts(3);
    let db = item(&mut site, Some(0));
    let app = item(&mut site, Some(1));
    let web = item(&mut site, Some(2));
    after(&mut site, db, app);
    after(&mut site, app, web);
    for unit in [app, web] {
        change(&mut site, unit).stickiness = 1;
    }
    site.hosts[0].standby = true;
    let outcome = solve(&site);
    assert!(matches!(outcome.steps[..], [Step::Migrate { unit, from: 0, .. }] if unit == db));
}

#[test]
fn a_cold_move_takes_its_dependents_down_and_up_in_order() {
    let mut site = hosts(2);
    let db = item(&mut site, Some(0));
    change(&mut site, db).live = false;
    let app = item(&mut site, Some(1));
    after(&mut site, db, app);
    site.hosts[0].standby = true;
    let steps = solve(&site).steps;
    assert_eq!(
        steps,
        vec![
            Step::Stop { unit: app, host: 1 },
            Step::Stop { unit: db, host: 0 },
            Step::Start { unit: db, host: 1 },
            Step::Start { unit: app, host: 1 },
        ]
    );
}

#[test]
fn a_failed_thing_is_not_migrated_and_its_dependents_restart() {
    let mut site = hosts(2);
    let db = item(&mut site, Some(0));
    let failed = change(&mut site, db);
    (failed.failed, failed.restart_cures, failed.stickiness) = (true, true, 1);
    let app = item(&mut site, Some(1));
    after(&mut site, db, app);
    let steps = solve(&site).steps;
    assert!(
        !steps
            .iter()
            .any(|step| matches!(step, Step::Migrate { .. }))
    );
    assert!(steps.contains(&Step::Stop { unit: app, host: 1 }));
    assert!(steps.contains(&Step::Start { unit: db, host: 0 }));
}

#[test]
fn a_group_starts_in_order_on_one_host_and_stops_in_reverse() {
    let mut site = hosts(2);
    let members: Vec<UnitId> = (0..3).map(|_| item(&mut site, None)).collect();
    group(&mut site, &members);
    let outcome = solve(&site);
    let started: Vec<UnitId> = outcome
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Start { unit, .. } => Some(*unit),
            _ => None,
        })
        .collect();
    assert_eq!(started, members);
    let host = outcome.placement[members[0]].clone();
    assert!(
        members
            .iter()
            .all(|member| outcome.placement[*member] == host)
    );
}

#[test]
fn what_needs_something_that_cannot_start_does_not_start() {
    let mut site = hosts(1);
    let db = item(&mut site, None);
    change(&mut site, db).scores = vec![Some(-INFINITY)];
    let app = item(&mut site, None);
    after(&mut site, db, app);
    let outcome = solve(&site);
    assert!(outcome.steps.is_empty(), "{:?}", outcome.steps);
}

#[test]
fn one_of_several_is_enough() {
    let mut site = hosts(1);
    let (one, other, app) = (
        item(&mut site, None),
        item(&mut site, None),
        item(&mut site, None),
    );
    change(&mut site, one).wanted = Some(Role::Stopped);
    site.any_of.push(AnyOf {
        first: vec![one, other],
        first_act: Act::Start,
        then: vec![app],
        then_act: Act::Start,
        strength: Strength::Mandatory,
        side: Side::Forward,
    });
    assert_eq!(solve(&site).placement[app], vec![0]);
    change(&mut site, other).wanted = Some(Role::Stopped);
    assert!(solve(&site).placement[app].is_empty());
}

#[test]
fn a_lost_host_is_fenced_before_its_things_start_elsewhere() {
    let mut site = hosts(2);
    let one = item(&mut site, Some(0));
    change(&mut site, one).requires = Requires::Fencing;
    site.hosts[0].up = false;
    site.hosts[0].lost = true;
    assert_eq!(
        solve(&site).steps,
        vec![
            Step::Fence { host: 0 },
            Step::Stop { unit: one, host: 0 },
            Step::Start { unit: one, host: 1 },
        ]
    );
    // Without a way to fence it nothing is started twice.
    site.hosts[0].can_fence = false;
    assert!(solve(&site).steps.is_empty());
}

#[test]
fn without_a_majority_nothing_is_started() {
    let mut site = hosts(2);
    let stopped = item(&mut site, None);
    let runs = item(&mut site, Some(0));
    for unit in [stopped, runs] {
        change(&mut site, unit).requires = Requires::Quorum;
        change(&mut site, unit).stickiness = 1;
    }
    site.rules.quorum = Quorum::Freeze;
    let outcome = solve(&site);
    assert!(outcome.steps.is_empty(), "{:?}", outcome.steps);
    site.rules.quorum = Quorum::Stop;
    assert_eq!(
        solve(&site).steps,
        vec![Step::Stop {
            unit: runs,
            host: 0
        }]
    );
}

#[test]
fn what_may_run_somewhere_that_cannot_be_asked_is_not_started() {
    let mut site = hosts(1);
    let one = item(&mut site, None);
    change(&mut site, one).may_run_elsewhere = true;
    assert!(solve(&site).steps.is_empty());
}

#[test]
fn a_host_that_leaves_is_emptied_first() {
    let mut site = hosts(2);
    let one = item(&mut site, Some(0));
    site.hosts[0].leaving = true;
    assert_eq!(
        solve(&site).steps,
        vec![
            Step::Migrate {
                unit: one,
                from: 0,
                to: 1
            },
            Step::Release { host: 0 },
        ]
    );
}

#[test]
fn two_that_swap_places_with_no_room_beside_leave_before_they_arrive() {
    let mut site = hosts(2);
    site.rules.strategy = Strategy::Limit;
    for host in &mut site.hosts {
        host.capacity = vec![10];
    }
    let (one, other) = (item(&mut site, Some(0)), item(&mut site, Some(1)));
    for (unit, to) in [(one, 1), (other, 0)] {
        let moved = change(&mut site, unit);
        (moved.needs, moved.live) = (vec![10], false);
        site.prefer.push(Prefer {
            unit,
            host: to,
            score: 100,
        });
    }
    let steps = solve(&site).steps;
    assert!(matches!(steps[0], Step::Stop { .. }) && matches!(steps[1], Step::Stop { .. }));
    assert_eq!(steps.len(), 4);
}

#[test]
fn of_two_copies_all_are_stopped_or_only_the_one_that_is_not_wanted() {
    let mut site = hosts(2);
    let one = item(&mut site, Some(0));
    change(&mut site, one).active = vec![0, 1];
    let steps = solve(&site).steps;
    assert_eq!(
        steps
            .iter()
            .filter(|step| matches!(step, Step::Stop { .. }))
            .count(),
        2
    );
    change(&mut site, one).multiple = Multiple::StopOthers;
    let outcome = solve(&site);
    assert!(
        matches!(outcome.steps[..], [Step::Stop { .. }]),
        "{:?}",
        outcome.steps
    );
    assert_eq!(outcome.placement[one].len(), 1);
}

#[test]
fn unmanaged_and_maintained_things_are_left_alone() {
    let mut site = hosts(2);
    let one = item(&mut site, Some(0));
    let left_alone = change(&mut site, one);
    left_alone.managed = false;
    left_alone.failed = true;
    left_alone.restart_cures = true;
    site.prefer.push(Prefer {
        unit: one,
        host: 0,
        score: -INFINITY,
    });
    assert!(solve(&site).steps.is_empty());
}
