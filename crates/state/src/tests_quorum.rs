//! Table tests of witnesses and of hosts that left in order.

use crate::tests::{World, host};
use crate::*;
use quorate_types::{HostName, Manifest, PoolName, Timestamp};

fn pool(name: &str) -> PoolName {
    PoolName::new(name).unwrap()
}

fn with_pools() -> World {
    let mut world = World::new(&[]);
    let pools = serde_json::json!({ "pools": {
        "shared": { "kind": "directory", "path": "/srv/a" },
        "other": { "kind": "directory", "path": "/srv/b" },
    }});
    let manifest: Manifest = serde_json::from_value(pools).unwrap();
    let base = None;
    world.ok(Command::ApplyManifest { base, manifest });
    world
}

fn disk(name: &str) -> Command {
    Command::SetWitness {
        witness: WitnessChoice::Disk { pool: pool(name) },
    }
}

fn token(hash: &str) -> Command {
    Command::CreateWitnessToken {
        hash: hash.into(),
        expires: Timestamp(9999),
    }
}

fn admit(hash: &str, name: &str, n: u32) -> Command {
    Command::AdmitWitness {
        token: hash.into(),
        name: HostName::new(name).unwrap(),
        address: format!("10.0.0.{n}:7"),
    }
}

#[test]
fn a_disk_witness_has_a_number_of_its_own_and_a_new_one_for_each_log() {
    let mut world = with_pools();
    let refusal = world.refused(disk("nowhere"));
    assert!(refusal.to_string().contains("no pool `nowhere`"));
    let first = world.ok(disk("shared"));
    assert_eq!(first.node, Some(4));
    let again = world.ok(disk("shared"));
    assert_eq!((again.node, again.events.len()), (Some(4), 0), "idempotent");
    let refusal = world.refused(Command::DeletePool {
        pool: pool("shared"),
    });
    assert!(refusal.to_string().contains("quorum set --witness none"));
    let renew = |old| Command::RenewDiskWitness {
        old,
        why: "its log is damaged".into(),
    };
    assert_eq!(world.ok(renew(4)).node, Some(5));
    assert_eq!(
        world.ok(renew(4)).node,
        None,
        "that one was replaced already"
    );
    assert_eq!(world.0.quorum.witness.as_ref().map(Witness::node), Some(5));
    assert_eq!(world.ok(disk("other")).node, Some(6));
    world.ok(Command::SetWitness {
        witness: WitnessChoice::None,
    });
    assert!(world.0.quorum.is_empty());
    world.ok(Command::DeletePool {
        pool: pool("shared"),
    });
    assert_eq!(
        world.ok(disk("other")).node,
        Some(7),
        "numbers are never reused"
    );
}

#[test]
fn a_token_lets_in_a_host_or_a_witness_not_both() {
    let mut world = with_pools();
    world.ok(token("w"));
    world.ok(Command::CreateToken {
        hash: "h".into(),
        expires: Timestamp(9999),
    });
    let as_host = Command::AdmitHost {
        token: "w".into(),
        host: host(9),
        address: "10.0.0.9:7".into(),
    };
    assert_eq!(world.refused(as_host), Refusal::Token);
    assert_eq!(world.refused(admit("h", "w1", 8)), Refusal::Token);
    let refusal = world.refused(admit("w", "h1", 8));
    assert!(refusal.to_string().contains("machine of its own"));
    let refusal = world.refused(admit("w", "w1", 2));
    assert!(refusal.to_string().contains("host h2"), "its address");
    assert_eq!(world.ok(admit("w", "w1", 8)).node, Some(4));
    assert_eq!(
        world.refused(admit("w", "w1", 8)),
        Refusal::Token,
        "used up"
    );
    let same = Command::AdmitHost {
        token: "h".into(),
        host: host(9),
        address: "10.0.0.8:7".into(),
    };
    assert!(world.refused(same).to_string().contains("witness w1"));
    // Another witness takes its place.
    world.ok(token("w2"));
    let events = world.ok(admit("w2", "w2", 7)).events;
    assert!(events[0].text.contains("replaces remote witness w1"));
    assert_eq!(world.0.hosts.len(), 3, "a witness is no host");
}

#[test]
fn a_host_that_left_in_order_is_remembered_until_it_is_back_or_removed() {
    let mut world = World::new(&[]);
    let left = |n, left| Command::HostLeft {
        host: host(n),
        left,
    };
    assert_eq!(world.ok(left(2, true)).events.len(), 1);
    assert_eq!(world.ok(left(2, true)).events.len(), 0);
    world.ok(left(3, true));
    world.ok(left(3, false));
    assert_eq!(world.0.quorum.left, [host(2)].into());
    world.ok(Command::RemoveHost { host: host(2) });
    assert!(world.0.quorum.left.is_empty());
    assert!(matches!(
        world.refused(left(2, true)),
        Refusal::Unknown { .. }
    ));
}

#[test]
fn commands_of_format_3_about_quorum_are_still_understood() {
    for (text, command) in [
        (
            r#"{"set_witness":{"witness":{"disk":{"pool":"shared"}}}}"#,
            disk("shared"),
        ),
        (
            r#"{"set_witness":{"witness":"none"}}"#,
            Command::SetWitness {
                witness: WitnessChoice::None,
            },
        ),
        (
            r#"{"create_witness_token":{"hash":"w","expires":9999}}"#,
            token("w"),
        ),
        (
            r#"{"admit_witness":{"token":"w","name":"w1","address":"10.0.0.8:7"}}"#,
            admit("w", "w1", 8),
        ),
        (
            r#"{"renew_disk_witness":{"old":4,"why":"x"}}"#,
            Command::RenewDiskWitness {
                old: 4,
                why: "x".into(),
            },
        ),
        (
            r#"{"host_left":{"host":"h2","left":true}}"#,
            Command::HostLeft {
                host: host(2),
                left: true,
            },
        ),
    ] {
        assert_eq!(serde_json::from_str::<Command>(text).unwrap(), command);
        assert_eq!(serde_json::to_string(&command).unwrap(), text);
    }
    let mut world = with_pools();
    world.ok(disk("shared"));
    let bytes = serde_json::to_vec(&world.0).unwrap();
    assert_eq!(serde_json::from_slice::<State>(&bytes).unwrap(), world.0);
}
