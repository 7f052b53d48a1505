//! Input that would take for ever, or more stack than there is, if nothing were bounded.

use super::*;

#[test]
fn a_long_chain_of_rules_neither_overflows_nor_takes_for_ever() {
    let mut site = hosts(3);
    let units: Vec<UnitId> = (0..5_000).map(|_| item(&mut site, None)).collect();
    for pair in units.windows(2) {
        together(&mut site, pair[1], pair[0], INFINITY);
        after(&mut site, pair[0], pair[1]);
    }
    assert_eq!(solve(&site).placement.len(), units.len());
}

#[test]
fn a_long_chain_of_rules_holds_whichever_end_comes_first() {
    for reversed in [false, true] {
        let mut site = hosts(3);
        let units: Vec<UnitId> = (0..1_500).map(|_| item(&mut site, None)).collect();
        for pair in units.windows(2) {
            let (dependent, primary) = if reversed {
                (pair[0], pair[1])
            } else {
                (pair[1], pair[0])
            };
            together(&mut site, dependent, primary, INFINITY);
        }
        let placement = solve(&site).placement;
        assert!(
            placement
                .iter()
                .all(|hosts| *hosts == placement[0] && hosts.len() == 1)
        );
    }
}

#[test]
fn rules_that_meet_again_and_again_do_not_multiply() {
    let mut site = hosts(3);
    let mut last = item(&mut site, None);
    for _ in 0..60 {
        let (left, right, next) = (
            item(&mut site, None),
            item(&mut site, None),
            item(&mut site, None),
        );
        for (dependent, primary) in [(left, last), (right, last), (next, left), (next, right)] {
            together(&mut site, dependent, primary, 1000);
        }
        last = next;
    }
    assert!(solve(&site).placement.iter().all(|hosts| hosts.len() == 1));
}

#[test]
fn rules_in_circles_come_to_an_end() {
    let mut site = hosts(2);
    let units: Vec<UnitId> = (0..4).map(|_| item(&mut site, None)).collect();
    for at in 0..4 {
        after(&mut site, units[at], units[(at + 1) % 4]);
        together(&mut site, units[at], units[(at + 1) % 4], INFINITY);
    }
    assert_eq!(solve(&site), solve(&site));
}

#[test]
fn references_that_lead_nowhere_get_an_empty_outcome() {
    let mut site = hosts(1);
    item(&mut site, None);
    site.prefer.push(Prefer {
        unit: 7,
        host: 0,
        score: 1,
    });
    assert!(!site.is_sound());
    assert!(solve(&site).steps.is_empty());
}

#[test]
fn amounts_at_the_edge_of_numbers_do_not_overflow() {
    let mut site = hosts(2);
    site.rules.strategy = Strategy::Limit;
    for host in &mut site.hosts {
        host.capacity = vec![i64::MAX];
    }
    for _ in 0..3 {
        let one = item(&mut site, None);
        change(&mut site, one).needs = vec![i64::MAX];
        site.prefer.push(Prefer {
            unit: one,
            host: 0,
            score: i64::MAX,
        });
    }
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
