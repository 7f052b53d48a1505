//! Images that are written to.

use super::{World, abi, host};
use crate::*;
use quorate_types::VmName;
use quorate_types::spec::Manifest;

fn vm() -> VmName {
    super::vm("db")
}

/// A VM with a unit of a SAN.
fn world() -> World {
    let mut world = World::new(&[]);
    let manifest: Manifest = serde_json::from_value(serde_json::json!({
        "pools": { "san": { "kind": "iscsi", "portals": ["10.0.0.9"], "target": "iqn.2026-01.example:" } },
        "vms": { "db": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "t" }] } },
    }))
    .unwrap();
    let base = None;
    world.ok(Command::ApplyManifest { base, manifest });
    world
}

fn begin(image: &str, on: u32) -> Command {
    Command::BeginImageWrite {
        pool: "san".parse().unwrap(),
        image: image.into(),
        host: host(on),
        what: "import /iso/debian.qcow2".into(),
    }
}

fn start() -> Vec<Action> {
    vec![Action::Start {
        vm: vm(),
        host: host(2),
        abi: abi(),
    }]
}

#[test]
fn no_vm_starts_from_an_image_that_is_written_to() {
    let mut world = world();
    // One unit, by both of its names.
    world.ok(begin("t/0", 1));
    world.ok(begin("t", 1));
    let refused = world.refused(begin("t", 2)).to_string();
    assert!(refused.contains("being written by h1"), "{refused}");
    let refused = world.act_refused(start()).to_string();
    assert!(refused.contains("h1 writes to its disk"), "{refused}");
    assert!(refused.contains("import /iso/debian.qcow2"), "{refused}");
    let end = |on| Command::EndImageWrite {
        pool: "san".parse().unwrap(),
        image: "t/0".into(),
        host: host(on),
    };
    world.ok(end(2));
    // Another host's word.
    world.act_refused(start());
    world.ok(end(1));
    world.act(start());
    let refused = world.refused(begin("t", 1)).to_string();
    assert!(refused.contains("vm stop db"), "{refused}");
}

#[test]
fn a_host_that_is_removed_writes_to_nothing() {
    let mut world = world();
    world.ok(begin("t", 2));
    world.ok(Command::RemoveHost { host: host(2) });
    assert!(world.0.image_writes.is_empty());
    assert!(world.0.written(&world.0.vms[&vm()].spec).is_none());
}
