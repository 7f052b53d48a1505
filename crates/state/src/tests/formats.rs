//! The log is readable for ever: every format that was released.

use super::*;

#[test]
fn a_newer_format_and_a_missing_cluster_are_refused() {
    let mut state = State::default();
    let mut newer = envelope(Command::RemoveHost { host: host(1) });
    assert!(matches!(state.apply(&newer), Err(Refusal::Cluster(_))));
    newer.format = FORMAT + 1;
    assert!(matches!(state.apply(&newer), Err(Refusal::TooNew { .. })));
    assert_eq!(
        state.revision,
        Revision(2),
        "revisions count refused commands too"
    );
}

/// The log of format 1 must be readable for ever. The file is what this program wrote when format 1
/// was made; regenerate it only for a format that was never released.
#[test]
fn commands_of_format_1_are_still_understood() {
    let text = include_str!("../../fixtures/format-1.jsonl");
    let mut state = State::default();
    for (number, line) in text.lines().enumerate() {
        let envelope: Envelope = serde_json::from_str(line).unwrap();
        assert_eq!(envelope.format, 1);
        state
            .apply(&envelope)
            .unwrap_or_else(|refusal| panic!("line {}: {refusal}", number + 1));
    }
    let bytes = serde_json::to_vec(&state).unwrap();
    assert_eq!(
        serde_json::from_slice::<State>(&bytes).unwrap(),
        state,
        "the snapshot round-trips"
    );
    assert_eq!(state.vms[&vm("db")].last_epoch, Epoch(3));
}

#[test]
fn sizes_in_the_state_keep_their_unit() {
    let text = serde_json::to_string(&spec()).unwrap();
    assert!(text.contains("64MiB"), "{text}");
    assert_eq!(spec().memory, ByteSize::mib(64));
}

/// Format 2 adds labels and resources of hosts, and what rules and VMs say about them.
#[test]
fn commands_of_format_2_are_still_understood() {
    let text = include_str!("../../fixtures/format-2.jsonl");
    let mut state = State::default();
    for (number, line) in text.lines().enumerate() {
        let envelope: Envelope = serde_json::from_str(line).unwrap();
        assert_eq!(envelope.format, 2);
        state
            .apply(&envelope)
            .unwrap_or_else(|refusal| panic!("line {}: {refusal}", number + 1));
    }
    let bytes = serde_json::to_vec(&state).unwrap();
    assert_eq!(serde_json::from_slice::<State>(&bytes).unwrap(), state);
    let labels = serde_json::to_string(&state.hosts[&host(1)].spec.labels).unwrap();
    assert_eq!(labels, r#"{"disk":"ssd","rack":"r2"}"#);
    assert_eq!(state.hosts[&host(2)].spec.resources.len(), 1);
}

/// Writes the fixture: `cargo test -p quorate-state -- --ignored write_fixture`.
#[test]
#[ignore = "writes the fixture of an unreleased format"]
fn write_fixture() {
    let mut world = World(State::default());
    let mut lines = String::new();
    let mut put = |world: &mut World, command: Command| {
        let mut line = envelope(command.clone());
        line.format = 1;
        lines.push_str(&serde_json::to_string(&line).unwrap());
        lines.push('\n');
        world.ok(command);
    };
    put(
        &mut world,
        Command::CreateCluster {
            id: "c1".into(),
            name: "lab".into(),
            ca_certificate: "cert".into(),
            ca_key: "key".into(),
            host: host(1),
            address: "10.0.0.1:7".into(),
            settings: ClusterSettings::default(),
        },
    );
    for n in 2..=4 {
        put(
            &mut world,
            Command::CreateToken {
                hash: format!("t{n}"),
                expires: Timestamp(9999),
            },
        );
        let address = format!("10.0.0.{n}:7");
        put(
            &mut world,
            Command::AdmitHost {
                token: format!("t{n}"),
                host: host(n),
                address,
            },
        );
    }
    put(&mut world, Command::RemoveHost { host: host(4) });
    put(
        &mut world,
        Command::RecordArmed {
            host: host(1),
            armed: Some(Millis(500)),
        },
    );
    let text = r#"{"pools":{"shared":{"kind":"directory","path":"/srv/vm"}},"networks":{"lan":{"bridge":"br0"}},
        "vms":{"db":{"memory":"64MiB","disks":[{"pool":"shared","image":"db.raw","size":"1MiB"}],
        "nics":[{"network":"lan"}],"ready":{"probe":{"serial":"up"}}},
        "app":{"memory":"64MiB","depends_on":{"db":{"condition":"ready"}}}},"rules":{"r":{"keep_apart":["db","app"]}}}"#;
    let manifest: Manifest = serde_json::from_str(text).unwrap();
    put(
        &mut world,
        Command::ApplyManifest {
            base: None,
            manifest,
        },
    );
    let command = world.plan(vec![Action::Start {
        vm: vm("db"),
        host: host(1),
        abi: abi(),
    }]);
    put(&mut world, command);
    put(
        &mut world,
        Command::RequestMove {
            vm: vm("db"),
            to: Some(host(2)),
        },
    );
    let command = world.plan(vec![Action::Migrate {
        vm: vm("db"),
        to: host(2),
    }]);
    put(&mut world, command);
    put(&mut world, Command::CancelMove { vm: vm("db") });
    let id = world.migration("db");
    let end = MigrationEnd::Arrived {
        downtime_ms: Some(7),
    };
    let command = world.plan(vec![Action::FinishMigration {
        vm: vm("db"),
        id,
        end,
    }]);
    put(&mut world, command);
    let start = Action::Start {
        vm: vm("db"),
        host: host(1),
        abi: abi(),
    };
    let command = world.plan(vec![release("db", vec![dead(2)]), start]);
    put(&mut world, command);
    let command = world.plan(vec![Action::Stop {
        vm: vm("db"),
        mode: StopMode::Save,
    }]);
    put(&mut world, command);
    put(
        &mut world,
        Command::SetHostMode {
            host: host(1),
            mode: HostMode::Draining,
        },
    );
    put(
        &mut world,
        Command::SetPower {
            vm: vm("app"),
            power: Power::Stopped,
            mode: StopMode::Hard,
        },
    );
    put(
        &mut world,
        Command::DeleteRule {
            rule: RuleName::new("r").unwrap(),
        },
    );
    put(&mut world, Command::DeleteVm { vm: vm("app") });
    let command = world.plan(vec![Action::Forget { vm: vm("app") }]);
    put(&mut world, command);
    std::fs::write(
        concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/format-1.jsonl"),
        lines,
    )
    .unwrap();
}
