//! Copies of disks: who may start from which.

mod accept;

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
    let proofs = (1..=3).map(lost).collect();
    let (vm, saved) = (vm(), None);
    act(state, Action::Release { vm, proofs, saved })
}

fn migrate(state: &mut State, n: usize) -> Result<Outcome, Refusal> {
    let (vm, to) = (vm(), host(n));
    act(state, Action::Migrate { vm, to })
}

fn finish(state: &mut State, end: MigrationEnd) -> Result<Outcome, Refusal> {
    let Ownership::Migrating { id, .. } = state.vms[&vm()].ownership else {
        return Err(Refusal::InUse("it does not move".into()));
    };
    let vm = vm();
    act(state, Action::FinishMigration { vm, id, end })
}

/// It is certain that a host runs nothing any more.
fn lost(n: usize) -> FenceProof {
    let evidence = Evidence::Closed {
        vm: vm(),
        closed: Epoch(u64::MAX),
    };
    FenceProof::from_evidence(host(n), evidence).unwrap()
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
    release(&mut state).unwrap();
    let refused = start(&mut state, 1).unwrap_err().to_string();
    assert!(refused.contains("disk db is on h2 only"), "{refused}");
    start(&mut state, 2).unwrap();
    let refused = migrate(&mut state, 1).unwrap_err().to_string();
    assert!(refused.contains("disk db is on h2 only"), "{refused}");
}

#[test]
fn a_local_disk_has_a_copy_for_the_time_of_a_move() {
    let mut state = world("local");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    let action = |state: &State| Action::RemoveCopy {
        of: of(2),
        epoch: epoch(state),
        since: since(state, 2),
    };
    let removal = action(&state);
    act(&mut state, removal).unwrap();
    assert_eq!(startable(&state), [1]);
    for (end, at) in [
        (MigrationEnd::RefusedByTarget, 1),
        (MigrationEnd::Arrived { downtime_ms: None }, 2),
    ] {
        add(&mut state, 2).unwrap();
        in_step(&mut state, 2).unwrap();
        migrate(&mut state, 2).unwrap();
        let removal = action(&state);
        assert!(act(&mut state, removal).is_err(), "it is on its way there");
        finish(&mut state, end).unwrap();
        let record = state.copies(&pool(), "db").unwrap();
        assert_eq!(record.hosts.keys().collect::<Vec<_>>(), [&host(at)]);
        assert_eq!(startable(&state), [at]);
    }
    let mut mirrored = on_its_way();
    finish(&mut mirrored, MigrationEnd::StayedAtSource).unwrap();
    let removal = action(&mirrored);
    let refused = act(&mut mirrored, removal).unwrap_err().to_string();
    assert!(refused.contains("keeps a copy of each disk"), "{refused}");
}

#[test]
fn the_only_copy_that_counts_is_never_dropped() {
    let mut state = on_its_way();
    finish(&mut state, MigrationEnd::TargetLost(lost(2))).unwrap();
    let refused = out_of_step(&mut state, 2).unwrap_err().to_string();
    assert!(refused.contains("own copy is not whole"), "{refused}");
    assert_eq!(startable(&state), [2]);
}

#[test]
fn an_image_that_was_imported_is_on_one_host() {
    for kind in ["local", "mirrored"] {
        let mut state = world(kind);
        let record = |state: &mut State, n| {
            let (pool, image, host) = (pool(), "db".to_owned(), host(n));
            apply(state, Command::RecordDisk { pool, image, host })
        };
        record(&mut state, 2).unwrap();
        record(&mut state, 2).unwrap();
        let refused = record(&mut state, 3).unwrap_err().to_string();
        assert!(refused.contains("is on h2"), "{refused}");
        assert_eq!(startable(&state), [2]);
        start(&mut state, 2).unwrap();
        let created = state.copies(&pool(), "db").unwrap().created;
        assert_ne!(created, epoch(&state), "it is not made anew");
    }
    let mut state = world("directory");
    let (pool, image, host) = (pool(), "db".to_owned(), host(2));
    assert!(apply(&mut state, Command::RecordDisk { pool, image, host }).is_err());
}

/// A VM on h1 whose copy on h2 is in step, on its way there.
fn on_its_way() -> State {
    let mut state = world("mirrored");
    start(&mut state, 1).unwrap();
    add(&mut state, 2).unwrap();
    assert!(migrate(&mut state, 2).is_err(), "not in step yet");
    in_step(&mut state, 2).unwrap();
    assert!(migrate(&mut state, 3).is_err(), "it has no copy");
    migrate(&mut state, 2).unwrap();
    state
}

/// Hosts that it may be started on.
fn startable(state: &State) -> Vec<usize> {
    let spec = &state.vms[&vm()].spec;
    let may = |n: &usize| state.check_copies(spec, &host(*n), None).is_ok();
    (1..=3).filter(may).collect()
}

#[test]
fn a_migration_leaves_the_copy_that_counts() {
    let proof = || lost(2);
    for (end, counts) in [
        (MigrationEnd::Arrived { downtime_ms: None }, vec![2]),
        (MigrationEnd::StayedAtSource, vec![1, 2]),
        (MigrationEnd::RefusedByTarget, vec![1]),
        (MigrationEnd::TargetDead(proof()), vec![1]),
        (MigrationEnd::TargetLost(proof()), vec![2]),
    ] {
        let mut state = on_its_way();
        finish(&mut state, end.clone()).unwrap();
        assert_eq!(startable(&state), counts, "{end:?}");
        if counts == [2] {
            let record = state.copies(&pool(), "db").unwrap();
            let arrived = matches!(end, MigrationEnd::Arrived { .. });
            let bound = record.hosts[&host(2)].boot.is_some();
            assert_eq!(bound, !arrived, "who was lost may not have flushed it");
        }
    }
}

#[test]
fn a_copy_is_not_dropped_on_the_way_and_counts_alone_when_both_sides_are_lost() {
    let mut state = on_its_way();
    assert!(
        out_of_step(&mut state, 2).is_err(),
        "it may be the one that counts"
    );
    release(&mut state).unwrap();
    assert_eq!(startable(&state), [2]);
    let record = state.copies(&pool(), "db").unwrap();
    assert!(
        record.hosts[&host(2)].boot.is_some(),
        "it may not have been flushed"
    );
    // The source is back and says how far it was.
    let id = record.unsettled.as_ref().unwrap().id;
    let settle = |state: &mut State, n| act(state, Action::SettleCopies { of: of(n), id });
    assert!(
        settle(&mut state.clone(), 3).is_err(),
        "it has no part in it"
    );
    assert!(
        settle(&mut state.clone(), 2).is_err(),
        "a hand-over that was begun may not have come there"
    );
    settle(&mut state, 1).unwrap();
    assert_eq!(startable(&state), [1]);
    assert!(settle(&mut state, 1).is_err(), "once");
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
    assert!(
        record.hosts[&host(2)].boot.is_some(),
        "h2 may die before it hears of it"
    );
    in_step(&mut state, 2).unwrap();
    let record = state.copies(&pool(), "db").unwrap();
    assert_eq!(record.hosts[&host(2)].boot, None, "its guest runs");
    assert!(in_step(&mut state, 2).is_err(), "once");
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
    /// All hosts that may have it are lost.
    Release,
    Add(usize),
    /// The copy is brought up to date, and the leader says so.
    InStep(usize),
    OutOfStep(usize),
    /// The guest writes, and is told that it is done.
    Write,
    Migrate(usize),
    /// The guest is paused at its source, the mirror ends, and the target may have the guest.
    HandOver,
    /// The target runs it.
    Run,
    /// The migration's end is agreed, as it was.
    Agree,
    /// The target is lost, and it is agreed that the source has it.
    TargetLost,
}

fn event() -> impl Strategy<Value = Event> {
    let n = 1..=3_usize;
    prop_oneof![
        3 => n.clone().prop_map(Event::Start),
        2 => Just(Event::Release),
        2 => n.clone().prop_map(Event::Add),
        3 => n.clone().prop_map(Event::InStep),
        1 => n.clone().prop_map(Event::OutOfStep),
        5 => Just(Event::Write),
        3 => n.prop_map(Event::Migrate),
        2 => Just(Event::HandOver),
        2 => Just(Event::Run),
        1 => Just(Event::Agree),
        1 => Just(Event::TargetLost),
    ]
}

/// How far a migration is in truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The guest is at home, and every write reaches its copy.
    Home,
    /// Paused, its mirror ended.
    Between,
    /// It runs at its target.
    There,
}

/// What is true, whatever the state says.
struct Truth {
    state: State,
    acknowledged: u64,
    /// How many acknowledged writes each host's image has.
    images: BTreeMap<HostName, u64>,
    way: Way,
}

impl Truth {
    fn target(&self) -> Option<HostName> {
        match &self.state.vms[&vm()].ownership {
            Ownership::Migrating { to, .. } => Some(to.clone()),
            _ => None,
        }
    }

    /// Whether a guest was started without all of its writes.
    fn stale(&mut self, event: &Event) -> Option<String> {
        let before = self.target();
        match event {
            Event::Start(n) => {
                if start(&mut self.state, *n).is_ok() {
                    self.way = Way::Home;
                    let has = *self.images.entry(host(*n)).or_default();
                    return (has != self.acknowledged).then(|| format!("{} is stale", host(*n)));
                }
            }
            Event::Release => drop(release(&mut self.state)),
            Event::Add(n) => drop(add(&mut self.state, *n)),
            Event::InStep(n) => {
                let whole = owner(&self.state).and_then(|(at, _)| self.images.get(&at).copied());
                if in_step(&mut self.state, *n).is_ok() {
                    self.images.insert(host(*n), whole.unwrap_or_default());
                }
            }
            Event::OutOfStep(n) => drop(out_of_step(&mut self.state, *n)),
            Event::Write => self.write(),
            Event::Migrate(n) => drop(migrate(&mut self.state, *n)),
            Event::HandOver if before.is_some() && self.way == Way::Home => self.way = Way::Between,
            Event::Run if before.is_some() && self.way == Way::Between => self.way = Way::There,
            Event::HandOver | Event::Run => {}
            Event::Agree => {
                let end = match self.way {
                    Way::Home => MigrationEnd::StayedAtSource,
                    Way::Between => MigrationEnd::RefusedByTarget,
                    Way::There => MigrationEnd::Arrived { downtime_ms: None },
                };
                drop(finish(&mut self.state, end));
            }
            Event::TargetLost => {
                let proof = || {
                    lost(
                        before
                            .as_ref()
                            .map_or(1, |to| (1..=3).find(|n| host(*n) == *to).unwrap()),
                    )
                };
                let end = match self.way {
                    Way::Home => MigrationEnd::TargetDead(proof()),
                    // Whether it has run there nobody can tell; the guest is ended at its source.
                    _ => MigrationEnd::TargetLost(proof()),
                };
                let ended = finish(&mut self.state, end).is_ok();
                if ended && self.way != Way::Home {
                    drop(release(&mut self.state));
                }
            }
        }
        if before.is_some() && self.target().is_none() {
            self.way = Way::Home;
        }
        None
    }

    fn write(&mut self) {
        let Some((owner, _)) = owner(&self.state) else {
            return;
        };
        let record = self.state.copies(&pool(), "db").unwrap();
        assert!(record.hosts.len() <= COPIES);
        let mut reached: Vec<HostName> = record.followers(&owner).cloned().collect();
        match (self.way, self.target()) {
            (Way::There, Some(to)) => reached = vec![to],
            (Way::Between, _) => return,
            _ => reached.push(owner),
        }
        self.acknowledged += 1;
        for host in reached {
            self.images.insert(host, self.acknowledged);
        }
    }
}

proptest! {
    /// Whatever happens in whatever order, a guest that is started sees every write that was acknowledged.
    #[test]
    fn a_stale_copy_is_never_started(events in prop::collection::vec(event(), 1..120)) {
        let mut truth = Truth {
            state: world("mirrored"),
            acknowledged: 0,
            images: BTreeMap::new(),
            way: Way::Home,
        };
        for event in events {
            let stale = truth.stale(&event);
            prop_assert_eq!(stale, None, "after {:?}", event);
        }
    }
}
