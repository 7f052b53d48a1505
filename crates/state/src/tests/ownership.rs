//! Who may run a VM: proofs, plans, migrations, and memory that was saved.

use super::*;

#[test]
fn a_vm_starts_elsewhere_only_with_a_proof_that_covers_its_owner() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    let start = Action::Start {
        vm: vm("db"),
        host: host(2),
        abi: abi(),
    };
    world.act_refused(vec![start.clone()]);
    world.act_refused(vec![release("db", vec![]), start.clone()]);
    world.act_refused(vec![release("db", vec![dead(3)]), start.clone()]);
    world.act_refused(vec![release("db", vec![closed(1, "db", 0)]), start.clone()]);
    world.act(vec![release("db", vec![dead(1)]), start]);
    assert_eq!(
        *world.ownership("db"),
        Ownership::Owned {
            host: host(2),
            epoch: Epoch(2),
            order: OrderKind::Run
        }
    );
    assert!(world.0.orders_for(&host(1)).is_empty());
    assert_eq!(world.0.orders_for(&host(2)).len(), 1);
}

#[test]
fn while_migrating_a_restart_needs_proof_for_both_hosts() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    world.act(vec![Action::Migrate {
        vm: vm("db"),
        to: host(2),
    }]);
    world.act_refused(vec![release("db", vec![dead(1)])]);
    world.act_refused(vec![release("db", vec![dead(2)])]);
    world.act_refused(vec![release("db", vec![dead(1), closed(2, "db", 1)])]);
    world.act(vec![release("db", vec![dead(1), closed(2, "db", 2)])]);
    assert_eq!(*world.ownership("db"), Ownership::Free);
    world.start("db", 3);
    let Ownership::Owned { epoch, .. } = world.ownership("db") else {
        panic!()
    };
    assert_eq!(*epoch, Epoch(3), "an epoch is handed out once");
}

#[test]
fn a_report_about_another_migration_is_stale() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    world.act(vec![Action::Migrate {
        vm: vm("db"),
        to: host(2),
    }]);
    let first = world.migration("db");
    let stayed = |id| Action::FinishMigration {
        vm: vm("db"),
        id,
        end: MigrationEnd::StayedAtSource,
    };
    world.act(vec![stayed(first)]);
    assert_eq!(
        *world.ownership("db"),
        Ownership::Owned {
            host: host(1),
            epoch: Epoch(1),
            order: OrderKind::Run
        }
    );
    world.act(vec![Action::Migrate {
        vm: vm("db"),
        to: host(2),
    }]);
    let second = world.migration("db");
    assert_ne!(first, second);
    let arrived = |id| Action::FinishMigration {
        vm: vm("db"),
        id,
        end: MigrationEnd::Arrived {
            downtime_ms: Some(7),
        },
    };
    world.act_refused(vec![arrived(first)]);
    world.act(vec![arrived(second)]);
    assert_eq!(
        *world.ownership("db"),
        Ownership::Owned {
            host: host(2),
            epoch: Epoch(3),
            order: OrderKind::Run
        }
    );
}

#[test]
fn a_lost_target_gives_the_guest_back_only_with_proof() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    world.act(vec![Action::Migrate {
        vm: vm("db"),
        to: host(2),
    }]);
    let id = world.migration("db");
    let lost = |proof| Action::FinishMigration {
        vm: vm("db"),
        id,
        end: MigrationEnd::TargetDead(proof),
    };
    world.act_refused(vec![lost(dead(1))]);
    world.act_refused(vec![lost(closed(2, "db", 1))]);
    world.act(vec![lost(dead(2))]);
    assert_eq!(
        *world.ownership("db"),
        Ownership::Owned {
            host: host(1),
            epoch: Epoch(1),
            order: OrderKind::Run
        }
    );
    assert_eq!(world.0.vms[&vm("db")].failed_moves, 1);
}

#[test]
fn a_plan_from_an_older_look_is_refused_whole() {
    let mut world = World::new(&["db", "app"]);
    let old = world.plan(vec![
        Action::Start {
            vm: vm("app"),
            host: host(1),
            abi: abi(),
        },
        Action::Start {
            vm: vm("db"),
            host: host(1),
            abi: abi(),
        },
    ]);
    world.start("db", 2);
    assert!(matches!(world.refused(old), Refusal::Stale { .. }));
    assert_eq!(
        *world.ownership("app"),
        Ownership::Free,
        "nothing of it was done"
    );
    let before_drain = world.plan(vec![Action::Start {
        vm: vm("app"),
        host: host(1),
        abi: abi(),
    }]);
    world.ok(Command::SetHostMode {
        host: host(1),
        mode: HostMode::Draining,
    });
    assert!(matches!(world.refused(before_drain), Refusal::Stale { .. }));
    world.act_refused(vec![Action::Start {
        vm: vm("app"),
        host: host(1),
        abi: abi(),
    }]);
}

#[test]
fn a_stale_plan_for_one_vm_does_not_hold_up_another() {
    let mut world = World::new(&["db", "app"]);
    let old = world.plan(vec![Action::Start {
        vm: vm("app"),
        host: host(1),
        abi: abi(),
    }]);
    world.start("db", 2);
    world.ok(old);
}

#[test]
fn saved_memory_travels_with_its_definition_and_is_used_once() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    let saved = quorate_types::report::SavedState {
        pool: "p".parse().unwrap(),
        file: "db.1".into(),
    };
    world.act(vec![Action::Stop {
        vm: vm("db"),
        mode: StopMode::Save,
    }]);
    let release = Action::Release {
        vm: vm("db"),
        proofs: vec![closed(1, "db", 1)],
        saved: Some(saved.clone()),
    };
    world.act(vec![
        release,
        Action::Start {
            vm: vm("db"),
            host: host(2),
            abi: abi(),
        },
    ]);
    let orders = world.0.orders_for(&host(2));
    let Order::Run { restore, .. } = &orders[&vm("db")] else {
        panic!()
    };
    assert_eq!(restore.as_ref(), Some(&saved));
    world.act(vec![Action::Release {
        vm: vm("db"),
        proofs: vec![dead(2)],
        saved: None,
    }]);
    assert_eq!(
        world.0.vms[&vm("db")].saved,
        None,
        "never resumed from memory older than the disk"
    );
}

#[test]
fn a_save_that_was_not_ordered_is_not_believed() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    let saved = quorate_types::report::SavedState {
        pool: "p".parse().unwrap(),
        file: "db.1".into(),
    };
    world.act(vec![Action::Release {
        vm: vm("db"),
        proofs: vec![closed(1, "db", 1)],
        saved: Some(saved),
    }]);
    assert_eq!(world.0.vms[&vm("db")].saved, None);
}

#[test]
fn a_save_that_failed_gives_the_guest_back_to_its_owner() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    let abandon = || vec![Action::AbandonSave { vm: vm("db") }];
    world.act_refused(abandon());
    let stop = |mode| vec![Action::Stop { vm: vm("db"), mode }];
    world.act(stop(StopMode::Save));
    world.act(abandon());
    assert!(matches!(
        world.0.orders_for(&host(1))[&vm("db")],
        Order::Run {
            epoch: Epoch(1),
            ..
        }
    ));
    assert_eq!(world.0.vms[&vm("db")].failed_moves, 1);
    world.act(stop(StopMode::Graceful));
    world.act_refused(abandon());
}
