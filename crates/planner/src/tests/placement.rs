//! Where VMs are started, in tables.

use crate::testing::*;
use crate::{cpu_baseline, explain, guest_abi, waiting};
use quorate_membership::HostHealth;
use quorate_types::report::PoolReport;
use quorate_types::spec::{Machine, Power};
use quorate_types::{ByteSize, VmPhase};
use serde_json::{Value, json};

/// Everything but `memory: 128MiB` of one VM `db`, and why h1 rejects it.
fn rejected(spec: Value, spoil: impl FnOnce(&mut World), why: &str) {
    let mut spec = spec;
    spec["memory"] = json!("128MiB");
    let pool = json!({ "kind": "directory", "path": "/p" });
    let mut world = World::new(
        1,
        json!({
            "pools": { "shared": pool, "other": pool },
            "networks": { "lan": { "bridge": "br0" }, "dmz": { "bridge": "br1" } },
            "vms": { "db": spec },
        }),
    );
    spoil(&mut world);
    assert!(!world.words().iter().any(|word| word.starts_with("start")));
    let said = waiting(&world.input()).remove(&vm("db")).unwrap();
    assert!(said.contains(why), "{said}");
}

#[test]
fn each_hard_rule_has_its_sentence() {
    let plain = || json!({});
    let disk = |pool: &str| json!({ "disks": [{ "pool": pool, "image": "i" }] });
    rejected(plain(), |w| w.drain("h1"), "h1: is being drained");
    rejected(
        plain(),
        |w| w.health.extend([(host("h1"), HostHealth::Suspect)]),
        "h1: has fallen silent",
    );
    rejected(plain(), |w| w.reports.clear(), "h1: has not reported yet");
    rejected(
        plain(),
        |w| w.reports.get_mut(&host("h1")).unwrap().capacity.memory = ByteSize::mib(100),
        "h1 has 100MiB of 100MiB free; 192MiB are needed",
    );
    rejected(
        json!({ "nics": [{ "network": "dmz" }] }),
        |_| {},
        "network dmz is not up there",
    );
    rejected(
        disk("other"),
        |_| {},
        "pool other cannot be used there: it has not reported it",
    );
    rejected(
        disk("shared"),
        |w| {
            let seen = PoolReport {
                problem: Some("stale NFS handle".into()),
                ..PoolReport::default()
            };
            let report = w.reports.get_mut(&host("h1")).unwrap();
            report.pools.insert("shared".parse().unwrap(), seen);
        },
        "pool shared cannot be used there: stale NFS handle",
    );
    rejected(
        json!({ "machine": "microvm" }),
        |w| {
            drop(
                w.reports
                    .get_mut(&host("h1"))
                    .unwrap()
                    .hypervisor
                    .machines
                    .remove("microvm"),
            )
        },
        "it has no working QEMU for microvm",
    );
}

#[test]
fn a_pool_of_another_identity_is_not_the_same_pool() {
    let mut world = World::new(
        3,
        json!({
            "pools": { "shared": { "kind": "directory", "path": "/p" } },
            "vms": { "db": { "memory": "64MiB", "disks": [{ "pool": "shared", "image": "i" }] } },
        }),
    );
    let marker = |world: &mut World, on: &str, text: &str| {
        let report = world.reports.get_mut(&host(on)).unwrap();
        let pool = report.pools.get_mut(&"shared".parse().unwrap()).unwrap();
        pool.marker = Some(text.to_owned());
    };
    marker(&mut world, "h1", "m2");
    assert_eq!(world.words(), ["start db on h2"], "the common one");
    world.step();
    world.act();
    marker(&mut world, "h3", "m2");
    world.kill("h2");
    world.step();
    assert_eq!(world.at("db"), None, "its disk is in the pool that h2 sees");
}

#[test]
fn dependents_wait_for_ready_not_for_the_process() {
    let check = json!({ "probe": { "serial": "up" } });
    let mut world = World::new(
        3,
        json!({ "vms": {
            "db": { "memory": "64MiB", "ready": check },
            "app": { "memory": "64MiB", "depends_on": { "db": { "condition": "ready" } } },
            "log": { "memory": "64MiB", "depends_on": { "db": { "condition": "started" } } },
        }}),
    );
    assert_eq!(world.step(), ["start db on h1"]);
    assert!(world.words().is_empty());
    let at = world.at("db").unwrap();
    world.says(&at, "db", |report| {
        report.epoch.0 = 1;
        report.phase = VmPhase::Starting;
    });
    assert!(world.words().is_empty());
    world.says(&at, "db", |report| report.phase = VmPhase::Running);
    assert_eq!(world.step(), ["start log on h2"]);
    assert!(waiting(&world.input())[&vm("app")].contains("waits for db: it runs but is not ready"));
    world.says(&at, "db", |report| report.ready = true);
    assert_eq!(world.step(), ["start app on h3"]);
}

#[test]
fn a_dependency_that_moves_or_is_frozen_stays_satisfied() {
    let mut world = World::new(
        3,
        json!({ "vms": {
            "db": { "memory": "64MiB", "ready": { "probe": { "serial": "up" } } },
            "app": { "memory": "64MiB", "depends_on": { "db": {} } },
        }}),
    );
    world.power("app", Power::Stopped);
    world.put("db", "h1");
    world.observe();
    world.begin("db", "h2");
    world.power("app", Power::Running);
    assert_eq!(world.words(), ["start app on h3"], "while it migrates");
    // Arrived: the new host has not run the check yet.
    world.says_outcome("h2", "db", quorate_types::report::MigrationOutcome::Arrived);
    world.says("h2", "db", |report| report.phase = VmPhase::Running);
    let words = world.step();
    assert!(words[0].ends_with("arrived"), "{words:?}");
    assert!(words[1].starts_with("start app on"), "{words:?}");
    world.act();
    world.says("h2", "db", |report| report.phase = VmPhase::Frozen);
    assert!(world.words().is_empty(), "nothing stops");
}

#[test]
fn a_dependency_that_shall_not_run_is_named() {
    let mut world = World::new(
        1,
        json!({ "vms": {
            "db": { "memory": "64MiB", "power": "stopped" },
            "app": { "memory": "64MiB", "depends_on": { "db": {} } },
        }}),
    );
    assert!(world.words().is_empty());
    assert!(waiting(&world.input())[&vm("app")].contains("`quorate vm start db` starts it"));
}

#[test]
fn scarce_room_goes_by_priority_and_is_kept_for_what_waits() {
    let mut world = World::new(
        1,
        json!({ "vms": {
            "aaa": { "memory": "800MiB" },
            "app": { "memory": "900MiB", "priority": 10, "depends_on": { "db": {} } },
            "db": { "memory": "900MiB", "ready": { "probe": { "serial": "up" } } },
        }}),
    );
    assert_eq!(
        world.step(),
        ["start db on h1"],
        "db counts as much as app, which needs it"
    );
    let said = waiting(&world.input()).remove(&vm("aaa")).unwrap();
    assert!(said.contains("964MiB more are kept for others"), "{said}");
    world.run(10);
    assert_eq!(world.at("app").as_deref(), Some("h1"));
    assert_eq!(world.at("aaa"), None);
}

#[test]
fn kept_apart_and_kept_together() {
    let mut world = World::new(
        3,
        json!({
            "vms": {
                "a": { "memory": "64MiB" }, "b": { "memory": "64MiB" }, "c": { "memory": "64MiB" },
                "x": { "memory": "64MiB" }, "y": { "memory": "64MiB" },
            },
            "rules": {
                "apart": { "keep_apart": ["a", "b", "c"] },
                "with": { "keep_with": ["x", "y"] },
            },
        }),
    );
    world.kill("h3");
    world.run(10);
    assert_ne!(world.at("a"), world.at("b"));
    assert_eq!(world.at("x"), world.at("y"));
    assert_eq!(world.at("c"), None);
    let said = waiting(&world.input()).remove(&vm("c")).unwrap();
    assert!(
        said.contains("c must be kept apart from a, which is on it"),
        "{said}"
    );
}

#[test]
fn a_group_goes_where_all_of_it_fits() {
    let mut world = World::new(
        2,
        json!({
            "vms": {
                "big": { "memory": "1GiB", "hosts": ["h1"] },
                "x": { "memory": "900MiB" },
                "y": { "memory": "900MiB", "depends_on": { "x": {} } },
                "z": { "memory": "900MiB" },
            },
            "rules": { "with": { "keep_with": ["x", "y"] } },
        }),
    );
    world.put("big", "h1");
    let done = world.run(10);
    assert_eq!(done[0], "start x on h2", "{done:?}");
    assert_eq!(world.at("y").as_deref(), Some("h2"), "room was kept from z");
    assert_eq!(world.at("z"), None, "no room for it");
}

#[test]
fn a_group_too_large_for_any_host_runs_in_part() {
    let mut world = World::new(
        2,
        json!({
            "vms": { "x": { "memory": "1500MiB" }, "y": { "memory": "1500MiB" } },
            "rules": { "with": { "keep_with": ["x", "y"] } },
        }),
    );
    world.run(10);
    assert_eq!(world.at("x").as_deref(), Some("h1"));
    assert_eq!(world.at("y"), None);
}

#[test]
fn allowed_hosts_and_last_host() {
    let mut world = World::new(
        3,
        json!({ "vms": { "db": { "memory": "64MiB", "hosts": ["h3"] } } }),
    );
    assert_eq!(world.words(), ["start db on h3"]);
    let mut world = World::new(3, json!({ "vms": { "db": { "memory": "64MiB" } } }));
    world.put("db", "h2");
    world.power("db", Power::Stopped);
    world.run(10);
    world.power("db", Power::Running);
    assert_eq!(world.words(), ["start db on h2"], "it was there last");
}

#[test]
fn starts_are_spread() {
    let vms: serde_json::Map<String, Value> = (0..9)
        .map(|n| (format!("v{n}"), json!({ "memory": "128MiB" })))
        .collect();
    let mut world = World::new(3, json!({ "vms": vms }));
    world.run(10);
    for name in ["h1", "h2", "h3"] {
        let on = (0..9).filter(|n| world.at(&format!("v{n}")).as_deref() == Some(name));
        assert_eq!(on.count(), 3);
    }
}

#[test]
fn explains_with_every_host() {
    let mut world = World::new(
        3,
        json!({ "vms": { "db": { "memory": "64MiB", "hosts": ["h2"] } } }),
    );
    let said = explain(&world.input(), &vm("db")).unwrap();
    assert_eq!(said.best, Some(host("h2")));
    assert_eq!(said.candidates.len(), 3);
    assert!(said.candidates[0].score.is_some());
    assert!(
        said.candidates[1]
            .why
            .contains("not among the hosts allowed for db")
    );
    let plan = world.plan();
    assert_eq!(plan.actions[0].reason.candidates, said.candidates);
    assert!(explain(&world.input(), &vm("no")).is_none());
}

#[test]
fn the_baseline_is_what_all_hosts_have() {
    let mut reports = [report("h1"), report("h2")];
    assert_eq!(cpu_baseline(reports.iter()), "qemu64");
    for (report, models) in reports.iter_mut().zip([
        vec!["qemu64", "Skylake-Server", "Haswell", "Nehalem"],
        vec!["qemu64", "Haswell", "Nehalem", "FutureLake"],
    ]) {
        report.hypervisor.accel = "kvm".into();
        report.hypervisor.cpu_models = models.into_iter().map(str::to_owned).collect();
    }
    assert_eq!(cpu_baseline(reports.iter()), "Haswell");
    let machines = &mut reports[1].hypervisor.machines;
    machines.insert("q35".into(), "pc-q35-9.2".into());
    let abi = guest_abi(reports.iter(), Machine::Q35).unwrap();
    assert_eq!(
        (abi.machine.as_str(), abi.cpu_model.as_str()),
        ("pc-q35-9.2", "Haswell")
    );
    reports[1].hypervisor.accel = "tcg".into();
    assert_eq!(
        cpu_baseline(reports.iter()),
        "qemu64",
        "one host without KVM"
    );
    assert_eq!(guest_abi([].iter(), Machine::Q35), None);
}
