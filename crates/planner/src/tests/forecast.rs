//! Questions: what would happen if a host failed, were drained, if a manifest were applied.

use crate::testing::*;
use crate::{End, Forecast, ForecastError, Snapshot, SnapshotError, Step, forecast, plan};
use quorate_state::ActionKind;
use quorate_types::{HostName, Millis, VmName};
use serde_json::json;

fn step(fail: &[&str], drain: &[&str]) -> Step {
    let set = |names: &[&str]| names.iter().map(|name| host(name)).collect();
    Step {
        fail: set(fail),
        drain: set(drain),
        ..Step::default()
    }
}

/// Times and words of a stage, without the bookkeeping.
fn told(answer: &Forecast, stage: usize) -> Vec<String> {
    let actions = answer.stages[stage].actions.iter();
    let shown = actions.filter(|action| action.kind != ActionKind::FinishMigration);
    shown
        .map(|action| format!("{} {}", action.at, action.text))
        .collect()
}

fn at(answer: &Forecast, name: &str) -> Option<String> {
    answer.placement[&vm(name)]
        .as_ref()
        .map(HostName::to_string)
}

/// `db` and `app`, which needs it, on h1; `web` on h2.
fn site(hosts: u32) -> World {
    let mut world = World::new(
        hosts,
        json!({ "vms": {
            "db": { "memory": "512MiB", "ready": { "probe": { "serial": "up" } } },
            "app": { "memory": "256MiB", "depends_on": { "db": {} } },
            "web": { "memory": "256MiB" },
        }}),
    );
    world.arm();
    world.put("db", "h1");
    world.put("app", "h1");
    world.put("web", "h2");
    world.observe();
    world
}

#[test]
fn nothing_asked_and_nothing_to_do() {
    let world = site(3);
    let answer = forecast(&world.snapshot(), &[]).unwrap();
    assert_eq!(answer.stages.len(), 1);
    let stage = &answer.stages[0];
    assert_eq!((stage.end.clone(), stage.takes), (End::Rest, Millis(0)));
    assert!(stage.actions.is_empty() && stage.moved.is_empty() && stage.unplaced.is_empty());
}

#[test]
fn a_drain_moves_live_within_the_limit_and_stops_nothing() {
    let world = site(3);
    let answer = forecast(&world.snapshot(), &[step(&[], &["h1"])]).unwrap();
    assert_eq!(
        told(&answer, 0),
        [
            "0ms migrate db to h3",
            "0ms migrate app to h2",
            // Both leave h1 and share its link until `app` has left.
            "7981ms host h1 is now maintenance"
        ]
    );
    let stage = &answer.stages[0];
    let takes = |n: usize| stage.actions[n].takes;
    assert_eq!(
        (takes(0), takes(1)),
        (Some(Millis(7981)), Some(Millis(5654)))
    );
    assert!(stage.actions.iter().all(|action| !action.stops));
    assert!(stage.outages.is_empty());
    assert_eq!(stage.asked, "h1 is drained");
    assert_eq!(at(&answer, "db").as_deref(), Some("h3"));
}

#[test]
fn a_failure_waits_for_its_proof_then_restarts_in_order() {
    let world = site(3);
    let answer = forecast(&world.snapshot(), &[step(&["h1"], &[])]).unwrap();
    let told = told(&answer, 0);
    assert_eq!(told[0], "2525ms release app (h1 by lease-expired)");
    assert_eq!(told[1], "2525ms release db (h1 by lease-expired)");
    assert_eq!(told[2], "2525ms start db on h3");
    // `app` waits until `db` is ready: 2 s to start, 15 s to be ready.
    assert_eq!(told[3], "19525ms start app on h2");
    let outages = &answer.stages[0].outages;
    assert_eq!(outages.len(), 2);
    assert_eq!(outages[0].vm, vm("app"));
    assert_eq!(outages[0].lasts, Some(Millis(21_525)));
    assert_eq!(outages[1].lasts, Some(Millis(4_525)));
    assert!(answer.stages[0].unplaced.is_empty());
}

#[test]
fn one_step_after_the_other() {
    let world = site(4);
    let steps = [step(&["h1"], &[]), step(&[], &["h2"])];
    let answer = forecast(&world.snapshot(), &steps).unwrap();
    assert_eq!(answer.stages.len(), 2);
    let second = &answer.stages[1];
    assert!(second.begins >= answer.stages[0].takes);
    assert_eq!(second.end, End::Rest);
    for name in ["db", "app", "web"] {
        let host = at(&answer, name).unwrap();
        assert!(host == "h3" || host == "h4", "{name} is on {host}");
    }
}

#[test]
fn a_host_that_cannot_be_proven_dead_keeps_its_vms_and_the_answer_says_what_helps() {
    let mut world = site(3);
    let command = quorate_state::Command::RecordArmed {
        host: host("h1"),
        armed: None,
    };
    world.command(command);
    let answer = forecast(&world.snapshot(), &[step(&["h1"], &[])]).unwrap();
    let stage = &answer.stages[0];
    assert!(stage.actions.is_empty(), "{:?}", told(&answer, 0));
    let names: Vec<&VmName> = stage.unplaced.iter().map(|missing| &missing.vm).collect();
    assert_eq!(names, [&vm("app"), &vm("db")]);
    assert!(
        stage.unplaced[1].why.contains("confirm-dead h1"),
        "{}",
        stage.unplaced[1].why
    );
    assert!(stage.outages.iter().all(|outage| outage.lasts.is_none()));
    assert_eq!(at(&answer, "db"), None);
}

#[test]
fn a_fence_device_proves_what_a_lease_does_not() {
    let mut world = site(3);
    let manifest = json!({ "cluster": { "fencing": { "h1": [{ "agent": "fence_x" }] } } });
    world.command(quorate_state::Command::ApplyManifest {
        base: None,
        manifest: serde_json::from_value(manifest).unwrap(),
    });
    world.command(quorate_state::Command::RecordArmed {
        host: host("h1"),
        armed: None,
    });
    let answer = forecast(&world.snapshot(), &[step(&["h1"], &[])]).unwrap();
    assert_eq!(told(&answer, 0)[0], "10525ms release app (h1 by power-off)");
    assert!(answer.stages[0].unplaced.is_empty());
}

/// `db` has its disk on a SAN, `app` (which does not need it) one in a directory; both on h1, where no lease proves anything.
fn on_a_san(pool: serde_json::Value) -> World {
    let disk = |pool: &str, image: &str| json!([{ "pool": pool, "image": image }]);
    let mut world = World::new(
        3,
        json!({
            "pools": { "san": pool, "nfs": { "kind": "directory", "path": "/p" } },
            "vms": {
                "db": { "memory": "512MiB", "disks": disk("san", "db") },
                "app": { "memory": "256MiB", "disks": disk("nfs", "app.raw") },
            },
        }),
    );
    world.put("db", "h1");
    world.put("app", "h1");
    for report in world.reports.values_mut() {
        let usable = report.pools.values().next().cloned().unwrap();
        for pool in ["san", "nfs"] {
            report.pools.insert(pool.parse().unwrap(), usable.clone());
        }
    }
    world.observe();
    world
}

#[test]
fn a_san_that_shuts_a_silent_host_out_frees_its_vms() {
    let san = json!({
        "kind": "iscsi", "portals": ["192.0.2.9"], "target": "iqn.2026-01.com.example:s",
        "access": { "tgt": {} },
    });
    let world = on_a_san(san);
    let answer = forecast(&world.snapshot(), &[step(&["h1"], &[])]).unwrap();
    let told = told(&answer, 0);
    assert_eq!(told[0], "2320ms release db (h1 by storage-cut)", "{told:?}");
    assert!(told[1].starts_with("2320ms start db on h"), "{told:?}");
    let stage = &answer.stages[0];
    let names: Vec<&VmName> = stage.unplaced.iter().map(|missing| &missing.vm).collect();
    assert_eq!(names, [&vm("app")], "nobody shuts h1 out of a directory");
    assert!(at(&answer, "db").is_some_and(|host| host != "h1"));

    // With an armed watchdog everything comes back, each by the first proof.
    let mut world = world;
    world.arm();
    let answer = forecast(&world.snapshot(), &[step(&["h1"], &[])]).unwrap();
    assert!(answer.stages[0].unplaced.is_empty());
}

#[test]
fn devices_without_reservations_free_nothing() {
    for (reservations, freed) in [(true, true), (false, false)] {
        let world = on_a_san(json!({ "kind": "block", "reservations": reservations }));
        let answer = forecast(&world.snapshot(), &[step(&["h1"], &[])]).unwrap();
        assert_eq!(at(&answer, "db").is_some(), freed, "{reservations}");
    }
}

#[test]
fn two_of_three_voters_gone_is_no_quorum() {
    let world = site(3);
    let answer = forecast(&world.snapshot(), &[step(&["h1", "h2"], &[])]).unwrap();
    assert_eq!(answer.stages[0].end, End::NoQuorum);
    assert!(answer.stages[0].actions.is_empty());
    // One after the other: with a fourth host there is somebody to vote instead.
    let mut world = site(4).snapshot();
    world.seen.voters = [1, 2, 3].into();
    let steps = [step(&["h2"], &[]), step(&["h3"], &[])];
    let answer = forecast(&world, &steps).unwrap();
    assert_eq!(answer.stages[1].end, End::Rest);
}

#[test]
fn what_finds_no_room_is_named_with_every_host() {
    let mut world = site(2);
    world
        .reports
        .get_mut(&host("h2"))
        .unwrap()
        .capacity
        .memory
        .0 = 800 << 20;
    let mut snapshot = world.snapshot();
    snapshot.seen.voters = [1].into();
    // h1 votes and leads; it goes into maintenance instead of failing.
    let answer = forecast(&snapshot, &[step(&["h2"], &[])]).unwrap();
    assert!(answer.stages[0].unplaced.is_empty());
    snapshot.seen.voters = [2].into();
    let answer = forecast(&snapshot, &[step(&["h1"], &[])]).unwrap();
    let missing = &answer.stages[0].unplaced;
    assert_eq!(missing.len(), 2, "{missing:?}");
    let db = missing
        .iter()
        .find(|missing| missing.vm == vm("db"))
        .unwrap();
    assert!(db.why.contains("no host can take it"), "{}", db.why);
    assert_eq!(db.candidates.len(), 2);
}

#[test]
fn a_manifest_is_applied_to_a_copy_only() {
    let world = site(3);
    let snapshot = world.snapshot();
    let manifest = json!({ "vms": { "log": { "memory": "128MiB" } } });
    let apply = Step {
        apply: Some(("new.yaml".into(), serde_json::from_value(manifest).unwrap())),
        ..Step::default()
    };
    let answer = forecast(&snapshot, std::slice::from_ref(&apply)).unwrap();
    assert_eq!(told(&answer, 0), ["0ms start log on h3"]);
    assert_eq!(snapshot, world.snapshot());
    assert_eq!(apply.describe(), "new.yaml is applied");
}

#[test]
fn guests_that_only_move_by_stopping_are_marked() {
    let mut world = World::new(
        2,
        json!({ "vms": { "a": { "memory": "100MiB", "migration": "cold" } } }),
    );
    world.put("a", "h1");
    world.observe();
    let answer = forecast(&world.snapshot(), &[step(&[], &["h1"])]).unwrap();
    let stage = &answer.stages[0];
    assert!(stage.actions[0].stops, "{:?}", stage.actions[0]);
    assert_eq!(stage.outages.len(), 1);
    // Shut down in 10 s, started in 2 s.
    assert_eq!(stage.outages[0].lasts, Some(Millis(12_000)));
    assert_eq!(at(&answer, "a").as_deref(), Some("h2"));
}

#[test]
fn unknown_hosts_and_refused_questions_are_errors() {
    let world = site(2);
    let error = forecast(&world.snapshot(), &[step(&["h9"], &[])]).unwrap_err();
    assert_eq!(error, ForecastError::UnknownHost(host("h9")));
    let manifest = json!({ "vms": { "x": { "memory": "1GiB", "depends_on": { "x": {} } } } });
    let apply = Step {
        apply: Some(("x".into(), serde_json::from_value(manifest).unwrap())),
        ..Step::default()
    };
    assert!(matches!(
        forecast(&world.snapshot(), &[apply]),
        Err(ForecastError::Refused(_))
    ));
}

#[test]
fn what_was_measured_counts_more_than_defaults() {
    let mut world = site(3);
    for (at, command) in [(10_000, true), (13_000, false)] {
        let action = if command {
            quorate_state::Action::Migrate {
                vm: vm("web"),
                to: host("h3"),
            }
        } else {
            quorate_state::Action::FinishMigration {
                vm: vm("web"),
                id: world.migration("web"),
                end: quorate_state::MigrationEnd::Arrived { downtime_ms: None },
            }
        };
        world.commit_at(at, action);
    }
    world.act();
    // `web` took 3 s for 256 MiB: so does the next time, and others by their size.
    let answer = forecast(&world.snapshot(), &[step(&[], &["h3"])]).unwrap();
    assert_eq!(answer.stages[0].actions[0].takes, Some(Millis(3000)));
    let answer = forecast(&world.snapshot(), &[step(&[], &["h1"])]).unwrap();
    let db = answer.stages[0]
        .actions
        .iter()
        .find(|action| action.vm == Some(vm("db")));
    // 6 s alone: `app` takes half of the link while it moves (2 s alone, after a second of preparing).
    assert_eq!(db.unwrap().takes, Some(Millis(8000)));
}

#[test]
fn a_configured_limit_leaves_room_for_several_side_by_side() {
    for (limit, app, db) in [(0, 5654, 7981), (55, 5654, 10_309), (40, 7400, 13_800)] {
        let mut world = site(3);
        let manifest = json!({ "cluster": { "migration_mib_per_s": limit } });
        world.command(quorate_state::Command::ApplyManifest {
            base: None,
            manifest: serde_json::from_value(manifest).unwrap(),
        });
        let answer = forecast(&world.snapshot(), &[step(&[], &["h1"])]).unwrap();
        let actions = &answer.stages[0].actions;
        let of = |name: &str| actions.iter().find(|action| action.vm == Some(vm(name)));
        let takes = |name: &str| of(name).unwrap().takes.unwrap().0;
        assert_eq!((takes("app"), takes("db")), (app, db), "limit {limit}");
    }
}

#[test]
fn what_runs_without_something_that_it_needs_is_named() {
    let mut world = World::new(
        3,
        json!({ "vms": {
            "db": { "memory": "100MiB", "migration": "cold" },
            "app": { "memory": "100MiB", "depends_on": { "db": {} } },
            "log": { "memory": "100MiB", "depends_on": { "db": { "advisory": true } } },
        }}),
    );
    world.arm();
    for (name, host) in [("db", "h1"), ("app", "h2"), ("log", "h2")] {
        world.put(name, host);
    }
    world.observe();
    for question in [step(&[], &["h1"]), step(&["h1"], &[])] {
        let mut snapshot = world.snapshot();
        snapshot.seen.voters = [2].into();
        let answer = forecast(&snapshot, &[question]).unwrap();
        let outages = &answer.stages[0].outages;
        assert_eq!(outages.len(), 1, "{outages:?}");
        assert_eq!(outages[0].vm, vm("db"));
        assert_eq!(outages[0].left_without, [vm("app")].into());
    }
}

#[test]
fn a_saved_state_replays_the_same_plan_and_holds_no_secret() {
    let mut world = site(3);
    world.kill("h1");
    world.observe();
    let mut snapshot = world.snapshot();
    let cluster = snapshot.state.cluster.as_mut().unwrap();
    cluster.ca_key = "very secret".into();
    let device =
        json!({ "agent": "fence_x", "options": { "password": "hunter2", "ip": "10.0.0.1" } });
    let device = serde_json::from_value(device).unwrap();
    cluster.settings.fencing.insert(host("h1"), vec![device]);
    let token = quorate_state::TokenRecord {
        expires: quorate_types::Timestamp(9),
        witness: false,
    };
    snapshot.state.tokens.insert("abcdef".into(), token);
    let secret = quorate_types::Secret::new("open sesame").unwrap();
    let name = quorate_types::SecretName::new("san").unwrap();
    snapshot.state.secrets.insert(name, secret);
    let text = serde_json::to_string(&snapshot.clone().redact()).unwrap();
    for secret in [
        "very secret",
        "open sesame",
        "hunter2",
        "10.0.0.1\"}",
        "abcdef",
    ] {
        assert!(!text.contains(secret), "{secret} is in {text}");
    }
    let read = Snapshot::read(text.as_bytes()).unwrap();
    assert_eq!(plan(&read.input()), plan(&world.input()));
    assert!(!plan(&read.input()).actions.is_empty());
    let newer = text.replacen("\"format\":1", "\"format\":7", 1);
    assert!(matches!(
        Snapshot::read(newer.as_bytes()),
        Err(SnapshotError::TooNew(7))
    ));
    assert!(matches!(Snapshot::read(b"{"), Err(SnapshotError::Form(_))));
}
