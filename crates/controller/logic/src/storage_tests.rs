//! Tables for the doors of SANs.

use super::*;
use quorate_membership::Instant;
use quorate_state::{Command, Envelope, FORMAT, OrderKind, Ownership};
use quorate_types::{ClusterSettings, Manifest, Millis, Timestamp};

fn apply(state: &mut State, command: Command) {
    let envelope = Envelope {
        format: FORMAT,
        at: Timestamp(1),
        by: "test".into(),
        command,
    };
    state.apply(&envelope).unwrap();
}

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

/// Two hosts; `db` and `web` are on the SAN, `mixed` on it and in a directory, `plain` has no disk; all on h1.
fn state() -> State {
    let mut state = State::default();
    let create = Command::CreateCluster {
        id: "c1".into(),
        name: "c".into(),
        ca_certificate: String::new(),
        ca_key: String::new(),
        host: host("h1"),
        address: "192.0.2.1:7".into(),
        settings: ClusterSettings::default(),
    };
    apply(&mut state, create);
    let (token, expires) = ("t".to_owned(), Timestamp(u64::MAX));
    apply(
        &mut state,
        Command::CreateToken {
            hash: token.clone(),
            expires,
        },
    );
    let admit = Command::AdmitHost {
        token,
        host: host("h2"),
        address: "192.0.2.2:7".into(),
    };
    apply(&mut state, admit);
    let manifest = serde_json::json!({
        "pools": {
            "san": { "kind": "iscsi", "portals": ["10.0.0.5"], "target": "iqn.2026-01.com.example:s",
                     "access": { "tgt": { "control": 3 } } },
            "nas": { "kind": "directory", "path": "/srv" },
        },
        "vms": {
            "db": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "a" }, { "pool": "san", "image": "b/2" }] },
            "web": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "w" }] },
            "mixed": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "m" }, { "pool": "nas", "image": "m.raw" }] },
            "plain": { "memory": "64MiB", "boot": { "kernel": { "kernel": "/k" } } },
        },
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    apply(
        &mut state,
        Command::ApplyManifest {
            base: None,
            manifest,
        },
    );
    for (at, record) in state.vms.values_mut().enumerate() {
        record.active = Some(record.spec.clone());
        record.ownership = Ownership::Owned {
            host: host("h1"),
            epoch: Epoch(at as u64 + 1),
            order: OrderKind::Run,
        };
    }
    state
}

fn shut(job: &CutJob, open: &str) -> Vec<Shut> {
    let one = |target: &String| match target.ends_with(open) {
        true => Err("its access list lets it in".to_owned()),
        false => Ok(("off the list, no session".to_owned(), 4)),
    };
    let door = |door: &Door| door.targets.iter().map(one).collect();
    job.doors.iter().map(door).collect()
}

#[test]
fn only_vms_with_every_disk_behind_a_door_get_a_proof() {
    let state = state();
    let job = cut_job(&state, &host("h1")).unwrap();
    assert!(!job.complete, "mixed and plain need another proof");
    assert_eq!(job.pools().len(), 1);
    let targets = &job.doors[0].targets;
    assert_eq!(targets.len(), 3, "{targets:?}");
    assert_eq!(job.doors[0].initiator, "iqn.2026-01.local.quorate:c1.h1");
    let (proofs, problems) = job.proofs(&shut(&job, "nothing"));
    let about: Vec<_> = proofs
        .iter()
        .filter_map(|proof| proof.vm())
        .map(VmName::as_str)
        .collect();
    assert_eq!(about, ["db", "web"]);
    assert!(problems.is_empty());
    let (proofs, problems) = job.proofs(&shut(&job, ":b"));
    let about: Vec<_> = proofs
        .iter()
        .filter_map(|proof| proof.vm())
        .map(VmName::as_str)
        .collect();
    assert_eq!(about, ["web"], "one disk of db is open");
    assert!(problems[0].contains("lets it in"), "{problems:?}");
    assert!(
        job.proofs(&[]).0.is_empty(),
        "nothing heard is nothing proven"
    );
    assert_eq!(cut_job(&state, &host("h2")), None);
}

/// What h1 says of itself, with a guest of `db`.
fn report(applied: Revision, phase: VmPhase, epoch: Epoch) -> BTreeMap<HostName, HostReport> {
    let json = serde_json::json!({
        "host": "h1", "boot": "b", "sequence": 1, "version": "", "applied": applied, "guard_armed": false,
        "watchdog_ms": null, "capacity": { "cpus": 1, "memory": 0 },
        "hypervisor": { "qemu": "", "accel": "tcg", "cpu_models": [], "machines": {} },
        "networks": [], "pools": {}, "links": {}, "vms": {},
    });
    let mut report: HostReport = serde_json::from_value(json).unwrap();
    let seen = serde_json::json!({ "phase": phase, "since": 1, "epoch": epoch, "closed": 0, "ready": false, "restarts": 0 });
    report
        .vms
        .insert(vm("db"), serde_json::from_value(seen).unwrap());
    BTreeMap::from([(host("h1"), report)])
}

#[test]
fn the_witness_has_a_door_for_every_host() {
    let mut state = state();
    let pool = PoolName::new("san").unwrap();
    let set = |image: Option<&str>| Command::SetWitness {
        witness: match image {
            Some(image) => quorate_state::WitnessChoice::Disk {
                pool: pool.clone(),
                image: Some(image.into()),
            },
            None => quorate_state::WitnessChoice::None,
        },
    };
    let with = |state: &State| {
        let wanted = doors_wanted(state);
        let has = |wanted: &Wanted| wanted.door.targets.iter().any(|name| name.ends_with(":q"));
        wanted.iter().filter(|wanted| has(wanted)).count()
    };
    assert_eq!(with(&state), 0);
    apply(&mut state, set(Some("q")));
    assert_eq!(with(&state), 2);
    apply(&mut state, set(None));
    assert_eq!(with(&state), 0);
}

#[test]
fn a_cut_shuts_the_door_until_the_host_is_up_and_clean() {
    let mut state = state();
    let open = doors_wanted(&state);
    assert_eq!(open.len(), 2);
    assert!(
        open.iter()
            .all(|wanted| !wanted.shut && wanted.door.targets.len() == 4)
    );
    let pools = BTreeSet::from([PoolName::new("san").unwrap()]);
    apply(
        &mut state,
        Command::CutStorage {
            host: host("h1"),
            pools,
        },
    );
    let since = state.revision;
    let is_shut: Vec<_> = doors_wanted(&state)
        .iter()
        .map(|wanted| wanted.shut)
        .collect();
    assert_eq!(is_shut, [true, false]);

    let report = |applied, phase| report(applied, phase, Epoch(1));
    let up = |_: &HostName| HostHealth::Up;
    let taken_back = |state: &State, reports: &BTreeMap<HostName, HostReport>| {
        !restorable(state, reports, up).is_empty()
    };
    assert!(
        taken_back(&state, &report(since, VmPhase::Running)),
        "db is still its own"
    );
    let Some(record) = state.vms.get_mut(&vm("db")) else {
        unreachable!()
    };
    record.ownership = Ownership::Free;
    assert!(
        !taken_back(&state, &report(since, VmPhase::Frozen)),
        "a guest is left that it may not run"
    );
    assert!(
        !taken_back(&state, &report(Revision(since.0 - 1), VmPhase::Absent)),
        "it may not know yet"
    );
    assert!(taken_back(&state, &report(since, VmPhase::Absent)));
    let silent = restorable(&state, &report(since, VmPhase::Absent), |_| {
        HostHealth::Suspect
    });
    assert!(silent.is_empty());
    let pools = state.storage_cuts[&host("h1")].clone();
    apply(
        &mut state,
        Command::RestoreStorage {
            host: host("h1"),
            pools,
        },
    );
    assert!(state.storage_cuts.is_empty());
}

#[test]
fn an_old_guest_keeps_its_host_out_though_the_host_owns_the_vm_anew() {
    let mut state = state();
    let san = PoolName::new("san").unwrap();
    let command = Command::CutStorage {
        host: host("h1"),
        pools: BTreeSet::from([san.clone()]),
    };
    apply(&mut state, command);
    let since = state.storage_cuts[&host("h1")][&san];
    let old = state.vms[&vm("db")].ownership.hosts()[0].1;
    let reports = report(since, VmPhase::Frozen, old);
    let up = |_: &HostName| HostHealth::Up;
    assert!(!restorable(&state, &reports, up).is_empty());
    let Some(record) = state.vms.get_mut(&vm("db")) else {
        unreachable!()
    };
    record.ownership = Ownership::Owned {
        host: host("h1"),
        epoch: Epoch(old.0 + 10),
        order: OrderKind::Run,
    };
    assert!(restorable(&state, &reports, up).is_empty());
}

#[test]
fn an_older_restore_does_not_undo_a_newer_cut() {
    let mut state = state();
    let san = PoolName::new("san").unwrap();
    let cut = |state: &mut State| {
        let pools = BTreeSet::from([PoolName::new("san").unwrap()]);
        apply(
            state,
            Command::CutStorage {
                host: host("h1"),
                pools,
            },
        );
    };
    cut(&mut state);
    let old = state.storage_cuts[&host("h1")].clone();
    cut(&mut state);
    apply(
        &mut state,
        Command::RestoreStorage {
            host: host("h1"),
            pools: old,
        },
    );
    assert!(
        state.is_cut(&host("h1"), &san),
        "it was cut again meanwhile"
    );
}

#[test]
fn a_cut_that_failed_waits_and_one_that_was_made_whole_stays() {
    use crate::Cuts;
    let state = state();
    let job = cut_job(&state, &host("h1")).unwrap();
    let now = Instant(1_000_000_000);
    let mut cuts = Cuts::default();
    assert!(cuts.begin(&job.host, now));
    assert!(!cuts.begin(&job.host, now), "one at a time");
    cuts.forget(&job.host);
    assert!(cuts.running(&job.host), "a cut that runs is not forgotten");
    cuts.ended(&job.host, Vec::new(), vec!["no answer".into()], now);
    assert!(!cuts.is_at_it(&job.host));
    assert_eq!(cuts.problems().count(), 1);
    assert!(!cuts.begin(&job.host, now), "not at once again");
    let later = now.plus(Millis::secs(5));
    assert!(cuts.begin(&job.host, later));
    let (proofs, problems) = job.proofs(&shut(&job, "nothing"));
    assert!(problems.is_empty());
    cuts.ended(&job.host, proofs, problems, later);
    let long = later.plus(Millis::secs(3600));
    assert!(!cuts.begin(&job.host, long), "it is cut");
    assert_eq!(cuts.proofs().count(), 2);
    cuts.forget(&job.host);
    assert!(cuts.begin(&job.host, long), "another silence, another cut");
}

#[test]
fn the_keeper_looks_when_something_changed_or_it_is_time() {
    use crate::{Keeping, Restorable, doors_to_keep};
    let mut state = state();
    let none = Restorable::new();
    let now = Instant(1_000_000_000);
    let mut keeping = Keeping::default();
    assert!(keeping.begin(&state, &none, now));
    assert!(!keeping.begin(&state, &none, now), "busy");
    keeping.ended(doors_to_keep(&state, &none), Vec::new(), now);
    assert!(!keeping.begin(&state, &none, now.plus(Millis::secs(29))));
    assert!(
        keeping
            .clone()
            .begin(&state, &none, now.plus(Millis::secs(31)))
    );
    let command = Command::CutStorage {
        host: host("h1"),
        pools: BTreeSet::from([PoolName::new("san").unwrap()]),
    };
    apply(&mut state, command);
    assert!(keeping.begin(&state, &none, now), "a cut is a change");
    let failed = vec!["the SAN does not answer".to_owned()];
    keeping.ended(doors_to_keep(&state, &none), failed, now);
    let back = state.storage_cuts.clone();
    assert!(
        !keeping.begin(&state, &back, now.plus(Millis(1500))),
        "it waits"
    );
    assert!(keeping.begin(&state, &back, now.plus(Millis(2500))));
    let shut = |restorable: &Restorable| {
        let doors = doors_to_keep(&state, restorable).into_iter();
        doors.map(|kept| kept.shut).collect::<Vec<_>>()
    };
    assert_eq!(shut(&none), [true, false]);
    assert_eq!(shut(&back), [false, false]);
    let mut older = back.clone();
    for since in older.values_mut().flat_map(BTreeMap::values_mut) {
        since.0 -= 1;
    }
    assert_eq!(shut(&older), [true, false], "a later cut stays");
}

#[test]
fn only_pools_whose_doors_are_open_are_given_back() {
    use crate::{Restorable, taken_back};
    let pool = |name: &str| PoolName::new(name).unwrap();
    let both = BTreeMap::from([(pool("a"), Revision(4)), (pool("b"), Revision(4))]);
    let all: Restorable = BTreeMap::from([(host("h1"), both)]);
    let failed = BTreeSet::from([(host("h1"), pool("b")), (host("h2"), pool("a"))]);
    let back = taken_back(all.clone(), &failed);
    assert_eq!(back[&host("h1")].keys().collect::<Vec<_>>(), [&pool("a")]);
    let failed = BTreeSet::from([(host("h1"), pool("a")), (host("h1"), pool("b"))]);
    assert!(taken_back(all, &failed).is_empty());
}

#[test]
fn a_call_ends_before_another_leader_can_judge() {
    use crate::time_for_a_call;
    let lease = Millis(2000);
    assert_eq!(
        time_for_a_call(lease, Some(Millis(499))),
        Some(Millis(1000))
    );
    assert_eq!(time_for_a_call(lease, Some(Millis(500))), None);
    assert_eq!(time_for_a_call(lease, None), None);
}

#[test]
fn a_ceph_pool_with_a_block_list_has_doors_by_address() {
    let mut state = state();
    let manifest = serde_json::json!({
        "pools": { "ceph": { "kind": "rbd", "ceph_pool": "vms", "blocklist": true } },
        "vms": { "mail": { "memory": "64MiB", "disks": [{ "pool": "ceph", "image": "mail" }] } },
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    apply(
        &mut state,
        Command::ApplyManifest {
            base: None,
            manifest,
        },
    );
    let record = state.vms.get_mut(&vm("mail")).unwrap();
    record.active = Some(record.spec.clone());
    record.ownership = Ownership::Owned {
        host: host("h2"),
        epoch: Epoch(9),
        order: OrderKind::Run,
    };
    let job = cut_job(&state, &host("h2")).unwrap();
    assert!(job.complete);
    assert_eq!(job.doors[0].initiator, "192.0.2.2");
    assert_eq!(job.doors[0].targets, ["vms/mail"]);
    assert!(matches!(&job.doors[0].gate, Gate::Ceph { user, .. } if user == "admin"));
}

/// Two more pools: one whose units decide who writes, one whose do not.
fn with_units() -> State {
    let mut state = state();
    let manifest = serde_json::json!({
        "pools": { "fc": { "kind": "block" }, "lvm": { "kind": "block", "reservations": false } },
        "vms": {
            "ora": { "memory": "64MiB", "disks": [{ "pool": "fc", "image": "wwn-1" }, { "pool": "fc", "image": "wwn-2" }] },
            "old": { "memory": "64MiB", "disks": [{ "pool": "lvm", "image": "lv" }] },
        },
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    let base = None;
    apply(&mut state, Command::ApplyManifest { base, manifest });
    for (name, epoch) in [("ora", 7), ("old", 8)] {
        let record = state.vms.get_mut(&vm(name)).unwrap();
        record.active = Some(record.spec.clone());
        record.ownership = Ownership::Owned {
            host: host("h1"),
            epoch: Epoch(epoch),
            order: OrderKind::Run,
        };
    }
    state
}

#[test]
fn units_with_reservations_are_cut_by_host_and_epoch() {
    let state = with_units();
    let job = cut_job(&state, &host("h1")).unwrap();
    let door = job.doors.iter().find(|door| door.pool.as_str() == "fc");
    let door = door.unwrap();
    let epochs = [
        ("wwn-1".to_owned(), Epoch(7)),
        ("wwn-2".to_owned(), Epoch(7)),
    ];
    let gate = Gate::Reservation {
        epochs: epochs.into(),
    };
    assert_eq!((&door.gate, door.targets.len()), (&gate, 2));
    let about = |shut: &[Shut]| {
        let (proofs, _) = job.proofs(shut);
        let vms = proofs.iter().filter_map(|proof| proof.vm());
        vms.map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(about(&shut(&job, "nothing")), ["db", "ora", "web"]);
    assert_eq!(
        about(&shut(&job, "wwn-2")),
        ["db", "web"],
        "a unit is not cut"
    );
    assert!(cut_job(&state, &host("h2")).is_none());
}

#[test]
fn units_have_no_door_that_is_kept() {
    let mut state = with_units();
    let pools = ["fc", "san"].map(|name| PoolName::new(name).unwrap());
    let (host, cut) = (host("h1"), pools.clone().into());
    apply(
        &mut state,
        Command::CutStorage {
            host: host.clone(),
            pools: cut,
        },
    );
    let doors = doors_wanted(&state);
    assert!(
        doors
            .iter()
            .all(|wanted| wanted.door.pool.as_str() == "san"),
        "{doors:?}"
    );
    let back: Restorable = state.storage_cuts.clone().into_iter().collect();
    let back = crate::keeper::taken_back(back, &BTreeSet::new());
    assert_eq!(back[&host].len(), 2, "it is given back with the others");
}

/// Who opens a unit decides what proves that a host writes no more.
#[test]
fn a_unit_that_the_kernel_opens_is_cut_as_one_with_reservations_unless_there_is_a_list() {
    let mut state = state();
    let with = |more: &str| -> PoolSpec {
        let text = format!(
            r#"{{"kind":"iscsi","portals":["10.0.0.5"],"target":"iqn.2026-01.com.example:s",
                "chap":{{"user":"quorate","secret":"word"}}{more}}}"#
        );
        serde_json::from_str(&text).unwrap()
    };
    let word = SecretName::new("word").unwrap();
    state.secrets.insert(word, Secret::new("hush").unwrap());
    let mut door_of = |spec: PoolSpec| {
        let name = PoolName::new("san").unwrap();
        state.pools.get_mut(&name).unwrap().spec = spec;
        let job = cut_job(&state, &host("h1"))?;
        job.doors.into_iter().find(|door| door.pool == name)
    };
    assert_eq!(door_of(with("")), None, "QEMU's session cannot be cut");
    let units = door_of(with(r#","opened_by":"kernel""#)).unwrap();
    assert!(matches!(units.gate, Gate::Reservation { .. }), "{units:?}");
    assert_eq!(units.targets, ["a", "b/2", "w"]);
    assert_eq!((units.secret, units.account), (None, None));
    let list = door_of(with(r#","opened_by":"kernel","access":{"lio":{}}"#)).unwrap();
    assert!(matches!(list.gate, Gate::Target(_)), "{list:?}");
    // LIO forgets the account with the host's entry, so it is told again.
    assert_eq!(list.account.as_deref(), Some("quorate"));
    assert_eq!(list.secret.unwrap().expose(), "hush");
    let tgt = door_of(with(r#","access":{"tgt":{}}"#)).unwrap();
    assert_eq!((tgt.secret, tgt.account), (None, None));
}
