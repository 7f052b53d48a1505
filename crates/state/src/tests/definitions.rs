//! What operators define: hosts, VMs, rules, and what is refused.

use super::*;

#[test]
fn a_token_admits_one_host_until_it_expires() {
    let mut world = World::new(&[]);
    world.ok(Command::CreateToken {
        hash: "a".into(),
        expires: Timestamp(1001),
    });
    let admit = |token: &str, n| Command::AdmitHost {
        token: token.into(),
        host: host(n),
        address: format!("10.0.0.{n}:7"),
    };
    world.ok(admit("a", 4));
    assert_eq!(world.refused(admit("a", 5)), Refusal::Token);
    world.ok(Command::CreateToken {
        hash: "b".into(),
        expires: Timestamp(1000),
    });
    assert_eq!(world.refused(admit("b", 5)), Refusal::Token, "expired");
    assert_eq!(world.refused(admit("zzz", 5)), Refusal::Token);
}

#[test]
fn a_host_that_owns_something_cannot_be_removed() {
    let mut world = World::new(&["db"]);
    world.start("db", 2);
    assert!(matches!(
        world.refused(Command::RemoveHost { host: host(2) }),
        Refusal::InUse(_)
    ));
    world.ok(Command::RemoveHost { host: host(3) });
}

#[test]
fn bad_definitions_are_refused_whole_and_all_named() {
    let mut world = World::new(&["db", "app"]);
    let with = |edit: &dyn Fn(&mut Manifest)| {
        let mut manifest = Manifest {
            vms: [(vm("new"), spec())].into(),
            ..Manifest::default()
        };
        edit(&mut manifest);
        Command::ApplyManifest {
            base: None,
            manifest,
        }
    };
    let mut expect = |command, part: &str| {
        let text = world.refused(command).to_string();
        assert!(text.contains(part), "`{part}` is not in `{text}`");
    };
    expect(
        with(&|m| {
            let mut a = spec();
            a.depends_on.insert(vm("new"), Default::default());
            let mut b = spec();
            b.depends_on.insert(vm("db"), Default::default());
            m.vms.insert(vm("db"), a);
            m.vms.insert(vm("new"), b);
        }),
        "circle: ",
    );
    expect(
        with(&|m| {
            m.vms
                .get_mut(&vm("new"))
                .unwrap()
                .depends_on
                .insert(vm("gone"), Default::default());
        }),
        "`gone`",
    );
    expect(
        with(&|m| {
            m.vms.get_mut(&vm("new")).unwrap().hosts.insert(host(9));
        }),
        "no host `h9`",
    );
    expect(
        with(&|m| {
            let both: std::collections::BTreeSet<_> = [vm("db"), vm("app")].into();
            m.rules.insert(
                RuleName::new("a").unwrap(),
                RuleSpec::keep_apart(both.clone()),
            );
            m.rules
                .insert(RuleName::new("b").unwrap(), RuleSpec::keep_with(both));
        }),
        "no placement on the 3 hosts satisfies this together: rule `a` wants app, db kept apart; rule `b` wants app, db kept together",
    );
}

#[test]
fn deleting_waits_for_the_stop() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    world.ok(Command::DeleteVm { vm: vm("db") });
    world.act_refused(vec![Action::Forget { vm: vm("db") }]);
    world.act(vec![Action::Stop {
        vm: vm("db"),
        mode: StopMode::Graceful,
    }]);
    world.act(vec![
        release("db", vec![closed(1, "db", 1)]),
        Action::Forget { vm: vm("db") },
    ]);
    assert!(world.0.vms.is_empty());
}

/// Ledgers of hosts know VMs by name: an epoch of a deleted VM must never come again.
#[test]
fn a_vm_with_the_name_of_a_deleted_one_gets_newer_epochs() {
    let mut world = World::new(&["db"]);
    world.start("db", 1);
    world.act(vec![release("db", vec![closed(1, "db", 1)])]);
    world.start("db", 2);
    world.ok(Command::DeleteVm { vm: vm("db") });
    world.act(vec![release("db", vec![closed(2, "db", 2)])]);
    world.act(vec![Action::Forget { vm: vm("db") }]);
    let manifest = Manifest {
        vms: [(vm("db"), spec())].into(),
        ..Manifest::default()
    };
    world.ok(Command::ApplyManifest {
        base: None,
        manifest,
    });
    world.start("db", 3);
    assert_eq!(world.0.vms[&vm("db")].last_epoch, Epoch(3));
}

#[test]
fn manifest_with_a_base_is_refused_after_somebody_elses_change() {
    let mut world = World::new(&["db"]);
    let base = world.0.revision;
    world.ok(Command::SetPower {
        vm: vm("db"),
        power: Power::Stopped,
        mode: StopMode::Graceful,
    });
    let command = Command::ApplyManifest {
        base: Some(base),
        manifest: Manifest::default(),
    };
    assert!(matches!(world.refused(command), Refusal::Stale { .. }));
}

#[test]
fn labels_are_kept_and_contradictions_through_them_are_refused() {
    let mut world = World::new(&["db", "app"]);
    let label = |n: u32, rack: &str| Command::LabelHost {
        host: host(n),
        set: [("rack".parse().unwrap(), rack.parse().unwrap())].into(),
        remove: Default::default(),
    };
    for (n, rack) in [(1, "r1"), (2, "r2"), (3, "r2")] {
        world.ok(label(n, rack));
    }
    let rules = serde_json::json!({
        "rules": { "racks": { "keep_apart": ["db", "app"], "across": "rack" } },
    });
    world.ok(Command::ApplyManifest {
        base: None,
        manifest: serde_json::from_value(rules).unwrap(),
    });
    let refusal = world.0.apply(&envelope(label(1, "r2"))).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "no placement on the 3 hosts satisfies this: rule `racks` wants app, db kept apart across every rack"
    );
    world.ok(label(1, "r3"));
    // A host that leaves may make it impossible; that must not stop other changes.
    world.ok(Command::RemoveHost { host: host(1) });
    world.ok(label(2, "r2"));
    world.ok(Command::LabelHost {
        host: host(2),
        set: [("disk".parse().unwrap(), "ssd".parse().unwrap())].into(),
        remove: ["room".parse().unwrap()].into(),
    });
    assert_eq!(world.0.hosts[&host(2)].spec.labels.len(), 2);
}

/// Forty layers of two VMs, each needing both of the layer below: 2^40 paths, 160 dependencies.
#[test]
fn many_paths_through_depends_on_cost_little() {
    let mut world = World::new(&[]);
    let mut vms = std::collections::BTreeMap::new();
    for layer in 0..40 {
        for side in 0..2 {
            let mut spec = spec();
            if layer > 0 {
                let below = |side| (vm(&format!("l{}-{side}", layer - 1)), Default::default());
                spec.depends_on = [below(0), below(1)].into();
            }
            vms.insert(vm(&format!("l{layer}-{side}")), spec);
        }
    }
    world.ok(Command::ApplyManifest {
        base: None,
        manifest: Manifest {
            vms,
            ..Manifest::default()
        },
    });
}

#[test]
fn decisions_are_kept_with_host_and_kind_and_older_ones_in_short() {
    let mut world = World::new(&["db"]);
    let name = vm("db");
    let start = |world: &World, n: u32| {
        let Command::CommitPlan(mut plan) = world.plan(vec![Action::Start {
            vm: vm("db"),
            host: host(n),
            abi: abi(),
        }]) else {
            panic!("no plan")
        };
        plan.actions[0].reason.evidence = vec!["a fact".into()];
        plan.actions[0].reason.candidates = vec![Candidate {
            host: host(n),
            score: Some(1),
            why: "best".into(),
        }];
        Command::CommitPlan(plan)
    };
    for round in 0..20 {
        let n = round % 3 + 1;
        let command = start(&world, n);
        world.ok(command);
        let epoch = world.0.vms[&name].last_epoch;
        let evidence = Evidence::Closed {
            vm: name.clone(),
            closed: epoch,
        };
        world.act(vec![Action::Release {
            vm: name.clone(),
            proofs: vec![FenceProof::from_evidence(host(n), evidence).unwrap()],
            saved: None,
        }]);
    }
    let kept = &world.0.vms[&name].decisions;
    assert_eq!(kept.len(), 24);
    let full = kept
        .iter()
        .filter(|kept| !kept.reason.candidates.is_empty());
    assert_eq!(
        full.count(),
        4,
        "of the newest eight every other one is a start"
    );
    let start = &kept[0];
    assert_eq!(start.kind, Some(ActionKind::Start));
    assert_eq!(start.reason.evidence, ["a fact"], "what it rests on stays");
    let last = kept.last().unwrap();
    assert_eq!((last.kind, &last.host), (Some(ActionKind::Release), &None));
    let before = &kept[kept.len() - 2];
    assert_eq!(before.host, Some(host(19 % 3 + 1)));
}
