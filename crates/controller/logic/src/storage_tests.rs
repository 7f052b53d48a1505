//! Tables for the doors of SANs.

use super::*;
use quorate_state::{Command, Envelope, FORMAT, OrderKind, Ownership};
use quorate_types::{ClusterSettings, Manifest, Timestamp};

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

    let report = |applied: Revision, phase: VmPhase| {
        let json = serde_json::json!({
            "host": "h1", "boot": "b", "sequence": 1, "version": "", "applied": applied, "guard_armed": false,
            "watchdog_ms": null, "capacity": { "cpus": 1, "memory": 0 },
            "hypervisor": { "qemu": "", "accel": "tcg", "cpu_models": [], "machines": {} },
            "networks": [], "pools": {}, "links": {}, "vms": {},
        });
        let mut report: HostReport = serde_json::from_value(json).unwrap();
        let vm_report = serde_json::json!({ "phase": phase, "since": 1, "epoch": 1, "closed": 0, "ready": false, "restarts": 0 });
        report
            .vms
            .insert(vm("db"), serde_json::from_value(vm_report).unwrap());
        BTreeMap::from([(host("h1"), report)])
    };
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
