//! Images that are written to.

use crate::*;
use quorate_types::spec::Manifest;
use quorate_types::{ClusterSettings, HostName, Timestamp, VmName};

fn apply(state: &mut State, command: Command) -> Result<Outcome, Refusal> {
    let envelope = Envelope {
        format: FORMAT,
        at: Timestamp(1_000),
        by: "test".into(),
        command,
    };
    state.apply(&envelope)
}

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn vm() -> VmName {
    VmName::new("db").unwrap()
}

/// Two hosts, and a VM with a unit of a SAN.
fn world() -> State {
    let mut state = State::default();
    let first = Command::CreateCluster {
        id: "c1".into(),
        name: "lab".into(),
        ca_certificate: String::new(),
        ca_key: String::new(),
        host: host("h1"),
        address: "10.0.0.1:7".into(),
        settings: ClusterSettings::default(),
    };
    apply(&mut state, first).unwrap();
    let (hash, expires) = ("t".to_owned(), Timestamp(9_999));
    apply(&mut state, Command::CreateToken { hash, expires }).unwrap();
    let join = Command::AdmitHost {
        token: "t".into(),
        host: host("h2"),
        address: "10.0.0.2:7".into(),
    };
    apply(&mut state, join).unwrap();
    let manifest: Manifest = serde_json::from_value(serde_json::json!({
        "pools": { "san": { "kind": "iscsi", "portals": ["10.0.0.9"], "target": "iqn.2026-01.example:" } },
        "vms": { "db": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "t" }] } },
    }))
    .unwrap();
    let base = None;
    apply(&mut state, Command::ApplyManifest { base, manifest }).unwrap();
    state
}

fn begin(state: &mut State, image: &str, on: &str) -> Result<Outcome, Refusal> {
    let command = Command::BeginImageWrite {
        pool: "san".parse().unwrap(),
        image: image.into(),
        host: host(on),
        what: "import /iso/debian.qcow2".into(),
    };
    apply(state, command)
}

fn start(state: &mut State) -> Result<Outcome, Refusal> {
    let action = Action::Start {
        vm: vm(),
        host: host("h2"),
        abi: GuestAbi {
            machine: "pc-q35-10.0".into(),
            cpu_model: "qemu64".into(),
        },
    };
    let reason = Reason::new("test");
    let plan = Plan {
        base: state.revision,
        actions: vec![PlannedAction { action, reason }],
    };
    apply(state, Command::CommitPlan(plan))
}

#[test]
fn no_vm_starts_from_an_image_that_is_written_to() {
    let mut state = world();
    // One unit, by both of its names.
    begin(&mut state, "t/0", "h1").unwrap();
    begin(&mut state, "t", "h1").unwrap();
    let refused = begin(&mut state, "t", "h2").unwrap_err().to_string();
    assert!(refused.contains("being written by h1"), "{refused}");
    let refused = start(&mut state).unwrap_err().to_string();
    assert!(refused.contains("h1 writes to its disk"), "{refused}");
    assert!(refused.contains("import /iso/debian.qcow2"), "{refused}");
    let end = |on: &str| Command::EndImageWrite {
        pool: "san".parse().unwrap(),
        image: "t/0".into(),
        host: host(on),
    };
    apply(&mut state, end("h2")).unwrap();
    assert!(start(&mut state).is_err(), "another host's word");
    apply(&mut state, end("h1")).unwrap();
    start(&mut state).unwrap();
    let refused = begin(&mut state, "t", "h1").unwrap_err().to_string();
    assert!(refused.contains("vm stop db"), "{refused}");
}

#[test]
fn a_host_that_is_removed_writes_to_nothing() {
    let mut state = world();
    begin(&mut state, "t", "h2").unwrap();
    let host = host("h2");
    apply(&mut state, Command::RemoveHost { host }).unwrap();
    assert!(state.image_writes.is_empty());
    assert!(state.written(&state.vms[&vm()].spec).is_none());
}
