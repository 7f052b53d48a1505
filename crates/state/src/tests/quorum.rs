//! Table tests of witnesses and of hosts that left in order.

use super::{World, host};
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
        witness: WitnessChoice::Disk {
            pool: pool(name),
            image: None,
        },
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

fn on_unit(name: &str, image: Option<&str>) -> Command {
    Command::SetWitness {
        witness: WitnessChoice::Disk {
            pool: pool(name),
            image: image.map(str::to_owned),
        },
    }
}

fn with_units() -> World {
    let mut world = World::new(&[]);
    let manifest = serde_json::json!({ "pools": {
        "shared": { "kind": "directory", "path": "/srv/a" },
        "san": { "kind": "iscsi", "portals": ["192.0.2.9"], "target": "iqn.2026-01.net.example:a" },
        "same": { "kind": "iscsi", "portals": ["192.0.2.9"], "target": "iqn.2026-01.net.example:a" },
        "fc": { "kind": "block" },
        "ceph": { "kind": "rbd", "ceph_pool": "vms" },
    }});
    world.ok(Command::ApplyManifest {
        base: None,
        manifest: serde_json::from_value(manifest).unwrap(),
    });
    world
}

#[test]
fn a_witness_on_a_unit_has_it_for_itself() {
    let mut world = with_units();
    for (command, text) in [
        (on_unit("san", None), "`--disk NAME`"),
        (on_unit("fc", None), "`--disk NAME`"),
        (on_unit("shared", Some("w")), "leave `--disk w` out"),
        (on_unit("ceph", Some("w")), "kind `rbd`"),
        (on_unit("san", Some("w/x")), "number of a LUN"),
        (on_unit("fc", Some("../sda")), "no name of a device"),
    ] {
        let refusal = world.refused(command).to_string();
        assert!(refusal.contains(text), "{refusal}");
    }
    let first = world.ok(on_unit("san", Some("w")));
    let events = format!("{:?}", first.events);
    assert!(events.contains("disk witness on w of pool san"), "{events}");
    // The same unit by another name.
    let again = world.ok(on_unit("san", Some("w/0")));
    assert_eq!((again.node, again.events.len()), (first.node, 0));
    let (_, unit) = world.0.quorum.witness.as_ref().unwrap().unit().unwrap();
    let slots: Vec<_> = unit
        .slots
        .iter()
        .map(|(host, slot)| (*host, *slot))
        .collect();
    assert_eq!(slots, [(1, 0), (2, 1), (3, 2)]);
    // No VM gets it, whatever it is called.
    let vm = |pool: &str, image: &str| {
        let manifest = serde_json::json!({ "vms": { "db": {
            "cpus": 1, "memory": "64 MiB",
            "disks": [{ "pool": pool, "image": image }] } } });
        Command::ApplyManifest {
            base: None,
            manifest: serde_json::from_value(manifest).unwrap(),
        }
    };
    for pool in ["san", "same"] {
        let refusal = world.refused(vm(pool, "w")).to_string();
        assert!(refusal.contains("has the disk witness on it"), "{refusal}");
    }
    world.ok(vm("san", "db"));
    let refusal = world.refused(on_unit("same", Some("db"))).to_string();
    assert!(refusal.contains("VM db has the disk"), "{refusal}");
    // A lost log begins anew on the same unit, with the same slots.
    let node = first.node.unwrap();
    let before = world
        .0
        .quorum
        .witness
        .as_ref()
        .unwrap()
        .unit()
        .unwrap()
        .1
        .clone();
    world.ok(Command::RenewDiskWitness {
        old: node,
        why: "it is gone".into(),
    });
    let witness = world.0.quorum.witness.as_ref().unwrap();
    assert!(witness.node() > node);
    assert_eq!(witness.unit().unwrap().1, &before);
}

#[test]
fn every_host_has_a_slot_and_an_unused_one_is_given_before_that_of_a_host_that_left() {
    let mut unit = WitnessUnit {
        image: "w".into(),
        slots: std::collections::BTreeMap::new(),
    };
    for host in 1..=8 {
        unit.admit(host, |host| host == 2);
    }
    assert_eq!(unit.slots.len(), 8);
    unit.admit(9, |_| false);
    assert!(!unit.slots.contains_key(&9), "all are taken");
    unit.admit(9, |host| host == 2);
    assert_eq!(unit.slots.get(&9), Some(&1));
    assert!(!unit.slots.contains_key(&2));
    let before = unit.clone();
    unit.admit(9, |_| true);
    assert_eq!(unit, before, "it has one");
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

#[test]
fn a_witness_on_a_unit_is_read_back() {
    let text = r#"{"set_witness":{"witness":{"disk":{"pool":"san","image":"w"}}}}"#;
    let command = on_unit("san", Some("w"));
    assert_eq!(serde_json::from_str::<Command>(text).unwrap(), command);
    assert_eq!(serde_json::to_string(&command).unwrap(), text);
    let mut world = with_units();
    world.ok(command);
    let bytes = serde_json::to_vec(&world.0).unwrap();
    assert_eq!(serde_json::from_slice::<State>(&bytes).unwrap(), world.0);
}
