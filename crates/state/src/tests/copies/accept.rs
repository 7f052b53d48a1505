//! An operator's word about which copy counts.

use super::*;

fn accept(state: &mut State, n: usize) -> Result<Outcome, Refusal> {
    let since = state.copies(&pool(), "db").unwrap().hosts.get(&host(n));
    let since = since.map_or(Revision(0), |copy| copy.since);
    let (vm, pool, image, host) = (vm(), pool(), "db".to_owned(), host(n));
    let command = Command::AcceptCopy {
        vm,
        pool,
        image,
        host,
        since,
    };
    apply(state, command)
}

/// Both hosts lost at once, h2 while its copy was out of step.
fn lost_owner() -> State {
    let mut state = world("mirrored");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    in_step(&mut state, 2).unwrap();
    out_of_step(&mut state, 2).unwrap();
    state
}

#[test]
fn a_copy_is_accepted_only_while_nobody_may_run_the_vm() {
    let mut state = lost_owner();
    let refused = accept(&mut state, 2).unwrap_err().to_string();
    assert!(refused.contains("owned by h1"), "{refused}");
    assert!(refused.contains("confirm-dead h1"), "{refused}");
    release(&mut state).unwrap();
    assert_eq!(startable(&state), [1]);
    let events = state.log.all().count();
    accept(&mut state, 2).unwrap();
    assert_eq!(startable(&state), [2], "the other one is overwritten later");
    let event = state.log.all().next_back().unwrap();
    assert!(
        event.text.contains("by an operator's word"),
        "{}",
        event.text
    );
    assert!(
        event.text.contains("what was written since"),
        "{}",
        event.text
    );
    accept(&mut state, 2).unwrap();
    assert_eq!(state.log.all().count(), events + 1, "once is enough");
    start(&mut state, 2).unwrap();
}

#[test]
fn a_copy_whose_host_was_booted_again_is_freed_from_its_boot() {
    let mut state = world("mirrored");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    in_step(&mut state, 2).unwrap();
    release(&mut state).unwrap();
    let spec = state.vms[&vm()].spec.clone();
    let other = BootId("other".into());
    assert!(state.check_copies(&spec, &host(2), Some(&other)).is_err());
    accept(&mut state, 2).unwrap();
    state.check_copies(&spec, &host(2), Some(&other)).unwrap();
    assert_eq!(startable(&state), [2]);
}

#[test]
fn what_does_not_exist_or_has_changed_is_not_accepted() {
    let mut state = lost_owner();
    release(&mut state).unwrap();
    assert!(
        accept(&mut state, 3)
            .unwrap_err()
            .to_string()
            .contains("on h3")
    );
    let (vm, pool, image, host) = (vm(), pool(), "db".to_owned(), host(2));
    let stale = Command::AcceptCopy {
        vm: vm.clone(),
        pool: pool.clone(),
        image,
        host: host.clone(),
        since: Revision(1),
    };
    assert!(matches!(
        apply(&mut state, stale),
        Err(Refusal::Stale { .. })
    ));
    let image = "other".to_owned();
    let since = Revision(1);
    let other = Command::AcceptCopy {
        vm,
        pool,
        image,
        host,
        since,
    };
    assert!(matches!(
        apply(&mut state, other),
        Err(Refusal::Unknown { .. })
    ));
    assert_eq!(startable(&state), [1]);
}
