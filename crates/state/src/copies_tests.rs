//! Copies of disks: who may start from which.

use crate::*;
use proptest::prelude::*;
use quorate_membership::{Evidence, FenceProof};
use quorate_types::spec::Manifest;
use quorate_types::{
    BootId, ClusterSettings, Epoch, HostName, PoolName, Revision, Timestamp, VmName,
};
use std::collections::BTreeMap;

fn host(n: usize) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn vm() -> VmName {
    VmName::new("db").unwrap()
}

fn pool() -> PoolName {
    PoolName::new("safe").unwrap()
}

fn apply(state: &mut State, command: Command) -> Result<Outcome, Refusal> {
    let envelope = Envelope {
        format: FORMAT,
        at: Timestamp(1_000),
        by: "test".into(),
        command,
    };
    state.apply(&envelope)
}

fn act(state: &mut State, action: Action) -> Result<Outcome, Refusal> {
    let reason = Reason::new("test");
    let plan = Plan {
        base: state.revision,
        actions: vec![PlannedAction { action, reason }],
    };
    apply(state, Command::CommitPlan(plan))
}

/// Three hosts and a VM with a disk in a pool of this kind.
fn world(kind: &str) -> State {
    let mut state = State::default();
    let first = Command::CreateCluster {
        id: "c1".into(),
        name: "lab".into(),
        ca_certificate: String::new(),
        ca_key: String::new(),
        host: host(1),
        address: "10.0.0.1:7".into(),
        settings: ClusterSettings::default(),
    };
    apply(&mut state, first).unwrap();
    for n in 2..=3 {
        let (hash, expires) = (format!("t{n}"), Timestamp(9_999));
        apply(&mut state, Command::CreateToken { hash, expires }).unwrap();
        let join = Command::AdmitHost {
            token: format!("t{n}"),
            host: host(n),
            address: format!("10.0.0.{n}:7"),
        };
        apply(&mut state, join).unwrap();
    }
    let manifest = serde_json::json!({
        "pools": { "safe": { "kind": kind, "path": "/p" } },
        "vms": { "db": { "memory": "64MiB", "disks": [{ "pool": "safe", "image": "db", "size": "1GiB" }] } },
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    let base = None;
    apply(&mut state, Command::ApplyManifest { base, manifest }).unwrap();
    state
}

fn start(state: &mut State, n: usize) -> Result<Outcome, Refusal> {
    let abi = GuestAbi {
        machine: "pc-q35-10.0".into(),
        cpu_model: "qemu64".into(),
    };
    let (vm, host) = (vm(), host(n));
    act(state, Action::Start { vm, host, abi })
}

fn owner(state: &State) -> Option<(HostName, Epoch)> {
    let owners = state.vms[&vm()].ownership.hosts();
    owners
        .first()
        .map(|(host, epoch)| ((*host).clone(), *epoch))
}

fn release(state: &mut State) -> Result<Outcome, Refusal> {
    let Some((host, epoch)) = owner(state) else {
        return Err(Refusal::InUse("free".into()));
    };
    let evidence = Evidence::Closed {
        vm: vm(),
        closed: epoch,
    };
    let proofs = vec![FenceProof::from_evidence(host, evidence).unwrap()];
    let (vm, saved) = (vm(), None);
    act(state, Action::Release { vm, proofs, saved })
}

fn of(n: usize) -> CopyOf {
    CopyOf {
        vm: vm(),
        pool: pool(),
        image: "db".into(),
        host: host(n),
    }
}

fn epoch(state: &State) -> Epoch {
    owner(state).map_or(Epoch(0), |(_, epoch)| epoch)
}

fn since(state: &State, n: usize) -> Revision {
    let copies = state.copies(&pool(), "db");
    let copy = copies.and_then(|copies| copies.hosts.get(&host(n)));
    copy.map_or(Revision(0), |copy| copy.since)
}

fn add(state: &mut State, n: usize) -> Result<Outcome, Refusal> {
    let (of, epoch) = (of(n), epoch(state));
    act(state, Action::AddCopy { of, epoch })
}

fn in_step(state: &mut State, n: usize) -> Result<Outcome, Refusal> {
    let action = Action::CopyInStep {
        of: of(n),
        epoch: epoch(state),
        since: since(state, n),
        boot: BootId("b1".into()),
    };
    act(state, action)
}

fn out_of_step(state: &mut State, n: usize) -> Result<Outcome, Refusal> {
    let action = Action::CopyOutOfStep {
        of: of(n),
        epoch: epoch(state),
        since: since(state, n),
    };
    act(state, action)
}

#[test]
fn a_disk_is_where_its_vm_started_first() {
    let mut state = world("local");
    start(&mut state, 2).unwrap();
    let refused = add(&mut state, 3).unwrap_err().to_string();
    assert!(refused.contains("no copies there"), "{refused}");
    release(&mut state).unwrap();
    let refused = start(&mut state, 1).unwrap_err().to_string();
    assert!(refused.contains("disk db is on h2 only"), "{refused}");
    start(&mut state, 2).unwrap();
    let to = host(1);
    let refused = act(&mut state, Action::Migrate { vm: vm(), to }).unwrap_err();
    assert!(refused.to_string().contains("is on its host"), "{refused}");
}

#[test]
fn a_copy_counts_from_the_commit_that_says_so_until_the_one_that_denies_it() {
    let mut state = world("mirrored");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    assert!(add(&mut state, 3).is_err(), "two copies are all");
    assert!(out_of_step(&mut state, 2).is_err(), "it never was in step");
    release(&mut state).unwrap();
    let refused = start(&mut state, 2).unwrap_err().to_string();
    assert!(
        refused.contains("out of step since 1970-01-01"),
        "{refused}"
    );
    start(&mut state, 1).unwrap();
    in_step(&mut state, 2).unwrap();
    assert!(in_step(&mut state, 2).is_err(), "once");
    assert!(in_step(&mut state, 1).is_err(), "its owner's own");
    release(&mut state).unwrap();
    start(&mut state, 2).unwrap();
    let record = state.copies(&pool(), "db").unwrap();
    assert!(
        !record.hosts[&host(1)].in_step,
        "it may have writes of its own"
    );
    assert_eq!(record.hosts[&host(2)].boot, None);
    release(&mut state).unwrap();
    assert!(start(&mut state, 1).is_err());
}

#[test]
fn what_is_said_of_an_earlier_life_of_a_copy_is_stale() {
    let mut state = world("mirrored");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    let old = since(&state, 2);
    in_step(&mut state, 2).unwrap();
    out_of_step(&mut state, 2).unwrap();
    let action = Action::CopyInStep {
        of: of(2),
        epoch: epoch(&state),
        since: old,
        boot: BootId("b1".into()),
    };
    let refused = act(&mut state, action).unwrap_err().to_string();
    assert!(refused.contains("changed meanwhile"), "{refused}");
    let action = Action::CopyInStep {
        of: of(2),
        epoch: Epoch(0),
        since: since(&state, 2),
        boot: BootId("b1".into()),
    };
    let refused = act(&mut state, action).unwrap_err().to_string();
    assert!(refused.contains("under epoch"), "{refused}");
}

#[test]
fn a_copy_in_memory_ends_with_its_hosts_kernel() {
    let mut state = world("mirrored");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    in_step(&mut state, 2).unwrap();
    let spec = state.vms[&vm()].spec.clone();
    let boot = |text: &str| Some(BootId(text.into()));
    let check = |n, boot: Option<BootId>| state.check_copies(&spec, &host(n), boot.as_ref());
    assert!(check(2, boot("b1")).is_ok());
    assert!(
        check(1, boot("b7")).is_ok(),
        "what the owner flushed is on its disk"
    );
    let why = check(2, boot("b2")).unwrap_err();
    assert!(why.contains("booted again"), "{why}");
}

#[test]
fn a_host_with_the_last_good_copy_stays_a_member() {
    let mut state = world("mirrored");
    start(&mut state, 2).unwrap();
    add(&mut state, 3).unwrap();
    release(&mut state).unwrap();
    let remove = |state: &mut State, n| apply(state, Command::RemoveHost { host: host(n) });
    let refused = remove(&mut state, 2).unwrap_err().to_string();
    assert!(
        refused.contains("the only copy of db of pool safe"),
        "{refused}"
    );
    remove(&mut state, 3).unwrap();
    assert_eq!(state.copies(&pool(), "db").unwrap().hosts.len(), 1);
    apply(&mut state, Command::DeleteVm { vm: vm() }).unwrap();
    act(&mut state, Action::Forget { vm: vm() }).unwrap();
    assert!(state.copies(&pool(), "db").is_some(), "disks stay");
    remove(&mut state, 2).unwrap();
    assert!(state.copies(&pool(), "db").is_none());
}

#[test]
fn a_pool_with_disks_keeps_its_kind() {
    let mut state = world("directory");
    let manifest = serde_json::json!({ "pools": { "safe": { "kind": "local", "path": "/p" } } });
    let manifest = serde_json::from_value(manifest).unwrap();
    let base = None;
    let refused = apply(&mut state, Command::ApplyManifest { base, manifest }).unwrap_err();
    assert!(
        refused.to_string().contains("of kind `directory`"),
        "{refused}"
    );
}

/// Something that happens.
#[derive(Debug, Clone)]
enum Event {
    Start(usize),
    Release,
    Add(usize),
    /// The copy is brought up to date, and the leader says so.
    InStep(usize),
    OutOfStep(usize),
    /// The guest writes, and is told that it is done.
    Write,
}

fn event() -> impl Strategy<Value = Event> {
    let n = 1..=3_usize;
    prop_oneof![
        3 => n.clone().prop_map(Event::Start),
        2 => Just(Event::Release),
        2 => n.clone().prop_map(Event::Add),
        3 => n.clone().prop_map(Event::InStep),
        1 => n.prop_map(Event::OutOfStep),
        4 => Just(Event::Write),
    ]
}

proptest! {
    /// Whatever happens in whatever order, a guest that is started sees every write that was acknowledged.
    #[test]
    fn a_stale_copy_is_never_started(events in prop::collection::vec(event(), 1..80)) {
        let mut state = world("mirrored");
        let mut acknowledged = 0_u64;
        // How many acknowledged writes each host's image has.
        let mut images: BTreeMap<HostName, u64> = BTreeMap::new();
        for event in events {
            match event {
                Event::Start(n) => {
                    if start(&mut state, n).is_ok() {
                        let has = images.entry(host(n)).or_default();
                        prop_assert_eq!(*has, acknowledged, "{} is stale", host(n));
                    }
                }
                Event::Release => drop(release(&mut state)),
                Event::Add(n) => drop(add(&mut state, n)),
                Event::InStep(n) => {
                    let whole = owner(&state).and_then(|(owner, _)| images.get(&owner).copied());
                    if in_step(&mut state, n).is_ok() {
                        images.insert(host(n), whole.unwrap_or_default());
                    }
                }
                Event::OutOfStep(n) => drop(out_of_step(&mut state, n)),
                Event::Write => {
                    let Some((owner, _)) = owner(&state) else { continue };
                    acknowledged += 1;
                    let record = state.copies(&pool(), "db").unwrap();
                    prop_assert!(record.hosts.len() <= COPIES);
                    let mut followers: Vec<HostName> = record.followers(&owner).cloned().collect();
                    followers.push(owner);
                    for host in followers {
                        images.insert(host, acknowledged);
                    }
                }
            }
        }
    }
}
