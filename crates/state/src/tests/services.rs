//! Services: rings, holders, health, drains, and what a removed VM leaves behind.

use super::{World, host, vm};
use crate::{Command, EventKind, Refusal, ServiceChange, State};
use proptest::prelude::*;
use quorate_types::service::RingMember;
use quorate_types::{Manifest, ServiceName};
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn web() -> ServiceName {
    ServiceName::new("web").unwrap()
}

fn manifest(services: &Value) -> Command {
    let nic = |n: u32| json!([{ "network": "lan", "address": format!("10.0.0.{n}") }]);
    let vms = json!({
        "a": { "memory": "64MiB", "nics": nic(11) },
        "b": { "memory": "64MiB", "nics": nic(12), "labels": { "tier": "web" } },
        "c": { "memory": "64MiB", "nics": nic(13), "labels": { "tier": "web" } },
    });
    let manifest: Manifest = serde_json::from_value(json!({
        "networks": { "lan": { "bridge": "br0", "subnet": "10.0.0.0/24" } },
        "vms": vms,
        "services": services,
    }))
    .unwrap();
    Command::ApplyManifest {
        base: None,
        manifest,
    }
}

/// Members a and b by name.
fn site() -> World {
    let mut world = World::new(&[]);
    world.ok(manifest(&json!({
        "web": { "network": "lan", "address": "10.0.0.100", "ports": ["80"],
            "members": { "a": {}, "b": { "weight": 2 } }, "health": { "kind": "tcp" } },
    })));
    world
}

fn ring(world: &World, names: &[&str]) -> Vec<RingMember> {
    let record = &world.0.services[&web()];
    let member = |name: &&str| {
        let weight = record
            .spec
            .weight(&vm(name), &world.0.vms[&vm(name)].spec.labels);
        world
            .0
            .ring_member(&record.spec, &vm(name), weight.unwrap())
            .unwrap()
    };
    names.iter().map(member).collect()
}

fn change(change: ServiceChange) -> Command {
    let changes = vec![change];
    Command::ChangeServices { changes }
}

fn prepare(epoch: u64, members: Vec<RingMember>) -> Command {
    change(ServiceChange::PrepareRing {
        service: web(),
        epoch,
        members,
    })
}

fn activate(epoch: u64) -> Command {
    let service = web();
    change(ServiceChange::ActivateRing { service, epoch })
}

fn abandon(epoch: u64) -> Command {
    let service = web();
    change(ServiceChange::AbandonRing { service, epoch })
}

fn holder(on: u32, expect: u64, planned: bool) -> Command {
    change(ServiceChange::SetHolder {
        service: web(),
        host: host(on),
        expect,
        planned,
    })
}

fn drain_ended(name: &str, cut: u64) -> Command {
    change(ServiceChange::DrainEnded {
        service: web(),
        vm: vm(name),
        cut,
    })
}

fn health(name: &str, healthy: bool) -> Command {
    change(ServiceChange::RecordHealth {
        service: web(),
        vm: vm(name),
        healthy,
        problem: (!healthy).then(|| "refused".into()),
    })
}

#[test]
fn one_ring_change_at_a_time_each_under_its_own_epoch() {
    let mut world = site();
    let (one, two) = (ring(&world, &["a"]), ring(&world, &["a", "b"]));
    world.refused(prepare(2, one.clone()));
    world.ok(prepare(1, one.clone()));
    world.refused(prepare(2, two.clone()));
    world.refused(activate(2));
    let outcome = world.ok(activate(1));
    assert_eq!(outcome.events[0].kind, EventKind::Service);
    assert_eq!(
        outcome.events[0].text,
        "service web: ring 1 with 1 member (+a)"
    );
    world.refused(activate(1));
    world.refused(prepare(2, one));
    world.ok(prepare(2, two.clone()));
    world.refused(abandon(1));
    world.ok(abandon(2));
    // An epoch that was given up is not used again.
    world.refused(prepare(2, two.clone()));
    world.ok(prepare(3, two));
    world.ok(activate(3));
    let record = &world.0.services[&web()];
    assert_eq!((record.active(), record.history.len()), (3, 2));
    assert_eq!(record.ring().unwrap().members[1].weight, 2);
}

#[test]
fn a_ring_names_members_in_order_with_the_addresses_that_they_have() {
    let mut world = site();
    let good = ring(&world, &["a", "b"]);
    world.refused(prepare(1, vec![]));
    world.refused(prepare(1, good.iter().rev().cloned().collect()));
    world.refused(prepare(1, vec![good[0].clone(), good[0].clone()]));
    let mut other = good.clone();
    other[0].mac[5] ^= 1;
    world.refused(prepare(1, other));
    let mut other = good.clone();
    other[0].weight = 3;
    world.refused(prepare(1, other));
    let mut other = good;
    other[1].vm = vm("c");
    world.refused(prepare(1, other));
}

#[test]
fn an_overtaken_change_does_not_hold_up_the_others() {
    let mut world = site();
    let members = ring(&world, &["a"]);
    let changes = vec![
        ServiceChange::ActivateRing {
            service: web(),
            epoch: 7,
        },
        ServiceChange::PrepareRing {
            service: web(),
            epoch: 1,
            members,
        },
    ];
    world.ok(Command::ChangeServices { changes });
    assert!(world.0.services[&web()].next.is_some());
}

#[test]
fn an_address_changes_hands_only_where_the_proposer_saw_the_holder() {
    let mut world = site();
    world.refused(holder(9, 0, false));
    world.refused(holder(1, 1, false));
    world.ok(holder(1, 0, false));
    world.refused(holder(1, 1, false));
    world.refused(holder(2, 0, false));
    world.ok(holder(2, 1, true));
    let record = &world.0.services[&web()];
    assert!(record.is_held_by(&host(1)) && record.is_held_by(&host(2)));
    let settled = |generation| {
        let service = web();
        change(ServiceChange::HolderSettled {
            service,
            generation,
        })
    };
    world.refused(settled(1));
    world.ok(settled(2));
    assert!(!world.0.services[&web()].is_held_by(&host(1)));
    let outcome = world.ok(holder(3, 2, false));
    assert!(outcome.events[0].text.ends_with("the lease of h2 ran out"));
    assert!(!world.0.services[&web()].is_held_by(&host(2)));
    // Who answers because a move has not ended goes on when its end is lost.
    world.ok(holder(1, 3, true));
    world.ok(holder(2, 4, false));
    let record = &world.0.services[&web()];
    assert!(record.is_held_by(&host(3)) && !record.is_held_by(&host(1)));
}

#[test]
fn a_drained_member_is_forgotten_in_older_rings_but_never_in_the_one_in_force() {
    let mut world = site();
    world.ok(prepare(1, ring(&world, &["a", "b"])));
    world.ok(activate(1));
    let drain = |name: &str| Command::DrainMember {
        service: web(),
        vm: vm(name),
    };
    assert!(matches!(world.refused(drain("c")), Refusal::InUse(_)));
    world.ok(drain("b"));
    world.ok(drain("b"));
    world.refused(drain_ended("b", 0));
    world.ok(prepare(2, ring(&world, &["a"])));
    world.ok(activate(2));
    world.ok(drain_ended("b", 3));
    world.refused(drain_ended("b", 3));
    let record = &world.0.services[&web()];
    // Where the shares of the others lay then is not changed by that.
    let older = &record.history[0];
    assert!(older.has(&vm("b")) && older.gone.contains(&vm("b")));
    assert_eq!((record.active(), record.history.len()), (2, 2));
    let ended = record.draining[&vm("b")].ended;
    assert_eq!(ended.map(|(_, cut)| cut), Some(3));
    let resume = Command::ResumeMember {
        service: web(),
        vm: vm("b"),
    };
    world.ok(resume.clone());
    world.refused(resume);
}

#[test]
fn nobody_looks_for_connections_at_a_guest_that_has_ended() {
    let mut world = site();
    world.start("a", 1);
    world.ok(prepare(1, ring(&world, &["a", "b"])));
    world.ok(activate(1));
    world.ok(prepare(2, ring(&world, &["b"])));
    world.ok(activate(2));
    let knows = |world: &World| {
        let mut rings = world.0.services[&web()].history.iter();
        rings.any(|ring| ring.has(&vm("a")) && !ring.gone.contains(&vm("a")))
    };
    // It moves: its connections go on.
    world.act(vec![crate::Action::Migrate {
        vm: vm("a"),
        to: host(2),
    }]);
    assert!(knows(&world));
    let gone = |name: &str| {
        let vms = BTreeSet::from([vm(name)]);
        let service = web();
        change(ServiceChange::MembersGone { service, vms })
    };
    // Who gets connections is never given up.
    world.refused(gone("b"));
    world.ok(gone("a"));
    assert!(!knows(&world));
}

#[test]
fn health_is_of_one_life_of_a_guest() {
    let mut world = site();
    world.refused(health("c", true));
    let outcome = world.ok(health("a", false));
    assert_eq!(
        outcome.events[0].text,
        "service web: a does not serve: refused"
    );
    assert!(world.ok(health("a", false)).events.is_empty());
    world.start("a", 1);
    assert!(!world.0.services[&web()].health.contains_key(&vm("a")));
    world.ok(health("a", true));
    world.act(vec![crate::Action::Migrate {
        vm: vm("a"),
        to: host(2),
    }]);
    assert!(world.0.services[&web()].health[&vm("a")].healthy);
}

#[test]
fn a_removed_vm_leaves_its_services_in_order() {
    let mut world = site();
    let delete = |name: &str| Command::DeleteVm { vm: vm(name) };
    world.ok(Command::DrainMember {
        service: web(),
        vm: vm("b"),
    });
    world.ok(delete("b"));
    // From then on it is no member, and the last one cannot go.
    let members: Vec<_> = world.0.members(&world.0.services[&web()].spec).collect();
    assert_eq!(members.len(), 1);
    world.act(vec![crate::Action::Forget { vm: vm("b") }]);
    let record = &world.0.services[&web()];
    assert!(!record.spec.members.contains_key(&vm("b")) && record.draining.is_empty());
    let Refusal::InUse(why) = world.refused(delete("a")) else {
        panic!("another refusal");
    };
    assert!(why.contains("only member of service web"), "{why}");
    world.ok(Command::DeleteService { service: web() });
    world.ok(delete("a"));
}

#[test]
fn what_was_wrong_before_does_not_stop_other_changes() {
    let mut world = World::new(&[]);
    world.ok(manifest(&json!({
        "web": { "network": "lan", "address": "10.0.0.100", "ports": ["80"], "select": { "tier": ["web"] } },
    })));
    for name in ["b", "c"] {
        world.ok(Command::DeleteVm { vm: vm(name) });
        world.act(vec![crate::Action::Forget { vm: vm(name) }]);
    }
    // No VM has the label now; a network can be added all the same, another wrong service cannot.
    let more: Manifest =
        serde_json::from_value(json!({ "networks": { "dmz": { "bridge": "br1" } } })).unwrap();
    world.ok(Command::ApplyManifest {
        base: None,
        manifest: more,
    });
    let wrong: Manifest = serde_json::from_value(json!({ "services": {
        "db": { "network": "lan", "address": "10.0.0.11", "ports": ["1"], "members": { "a": {} } },
    } }))
    .unwrap();
    let refusal = world.refused(Command::ApplyManifest {
        base: None,
        manifest: wrong,
    });
    assert!(
        refusal.to_string().contains("address of VM `a`"),
        "{refusal}"
    );
    let gone = Command::DeleteNetwork {
        network: "lan".parse().unwrap(),
    };
    assert!(world.refused(gone).to_string().contains("network lan"));
}

#[test]
fn numbers_of_services_are_never_used_again_and_old_states_still_load() {
    let mut world = site();
    assert_eq!(world.0.services[&web()].id.0, 1);
    world.ok(Command::DeleteService { service: web() });
    world.ok(manifest(&json!({
        "web": { "network": "lan", "address": "10.0.0.100", "ports": ["80"], "members": { "a": {} } },
    })));
    assert_eq!(world.0.services[&web()].id.0, 2);
    assert_eq!(world.0.services[&web()].slots, 65_537);
    let mut old = serde_json::to_value(&world.0).unwrap();
    let fields = old.as_object_mut().unwrap();
    fields.remove("services");
    fields.remove("last_service");
    for vm in old["vms"].as_object_mut().unwrap().values_mut() {
        vm["spec"].as_object_mut().unwrap().remove("labels");
    }
    let state: State = serde_json::from_value(old).unwrap();
    assert!(state.services.is_empty());
    let whole = serde_json::to_value(&world.0).unwrap();
    assert_eq!(serde_json::from_value::<State>(whole).unwrap(), world.0);
}

/// Released text of the commands: a log that was written must be read by every later program.
#[test]
fn commands_are_written_in_one_form() {
    let written = json!({ "change_services": { "changes": [
        { "prepare_ring": { "service": "web", "epoch": 1, "members": [{ "vm": "a", "mac": [2, 0, 0, 0, 0, 1], "weight": 1 }] } },
        { "activate_ring": { "service": "web", "epoch": 1 } },
        { "members_gone": { "service": "web", "vms": ["b"] } },
        { "abandon_ring": { "service": "web", "epoch": 1 } },
        { "set_holder": { "service": "web", "host": "h1", "expect": 0, "planned": false } },
        { "holder_settled": { "service": "web", "generation": 1 } },
        { "record_health": { "service": "web", "vm": "a", "healthy": false, "problem": "refused" } },
        { "drain_ended": { "service": "web", "vm": "a", "cut": 2 } },
    ] } });
    let command: Command = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(serde_json::to_value(&command).unwrap(), written);
    for written in [
        json!({ "drain_member": { "service": "web", "vm": "a" } }),
        json!({ "resume_member": { "service": "web", "vm": "a" } }),
        json!({ "delete_service": { "service": "web" } }),
    ] {
        let command: Command = serde_json::from_value(written.clone()).unwrap();
        assert_eq!(serde_json::to_value(&command).unwrap(), written);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Prepare(u64, Vec<usize>),
    Activate(u64),
    Abandon(u64),
    Holder(u32, u64, bool),
    Drain(usize),
    Ended(usize),
    Resume(usize),
    Health(usize, bool),
    Delete(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..6u64, prop::collection::vec(0..3usize, 0..3)).prop_map(|(e, m)| Step::Prepare(e, m)),
        (0..6u64).prop_map(Step::Activate),
        (0..6u64).prop_map(Step::Abandon),
        (1..4u32, 0..4u64, any::<bool>()).prop_map(|(h, e, p)| Step::Holder(h, e, p)),
        (0..3usize).prop_map(Step::Drain),
        (0..3usize).prop_map(Step::Ended),
        (0..3usize).prop_map(Step::Resume),
        (0..3usize, any::<bool>()).prop_map(|(n, good)| Step::Health(n, good)),
        (0..3usize).prop_map(Step::Delete),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is proposed: epochs of rings and generations of holders only grow, a ring is never empty, one change
    /// runs at a time, and the ring in force changes by activation only.
    #[test]
    fn rings_and_holders_only_move_forward(steps in steps()) {
        const NAMES: [&str; 3] = ["a", "b", "c"];
        let mut world = site();
        let mut epochs = BTreeSet::new();
        for step in steps {
            let before = world.0.services[&web()].clone();
            let command = match &step {
                Step::Prepare(ahead, members) => {
                    let names: BTreeSet<&str> = members.iter().map(|n| NAMES[*n]).collect();
                    let record = &world.0.services[&web()];
                    let members = names.iter().filter_map(|name| {
                        let weight = record.spec.weight(&vm(name), &world.0.vms.get(&vm(name))?.spec.labels)?;
                        world.0.ring_member(&record.spec, &vm(name), weight)
                    });
                    prepare(before.last_epoch + ahead, members.collect())
                }
                Step::Activate(back) => activate(before.last_epoch.saturating_sub(*back)),
                Step::Abandon(back) => abandon(before.last_epoch.saturating_sub(*back)),
                Step::Holder(on, expect, planned) => holder(*on, *expect, *planned),
                Step::Drain(n) => Command::DrainMember { service: web(), vm: vm(NAMES[*n]) },
                Step::Ended(n) => drain_ended(NAMES[*n], 0),
                Step::Resume(n) => Command::ResumeMember { service: web(), vm: vm(NAMES[*n]) },
                Step::Health(n, good) => health(NAMES[*n], *good),
                Step::Delete(n) => Command::DeleteVm { vm: vm(NAMES[*n]) },
            };
            let done = world.0.apply(&super::envelope(command)).is_ok();
            let after = world.0.services[&web()].clone();
            prop_assert!(after.last_epoch >= before.last_epoch);
            prop_assert!(after.history.iter().chain(&after.next).all(|ring| !ring.members.is_empty()));
            prop_assert!(after.history.is_sorted_by(|a, b| a.epoch < b.epoch));
            prop_assert!(after.history.len() <= crate::RINGS_KEPT);
            let generation = |record: &crate::ServiceRecord| record.holder.as_ref().map_or(0, |h| h.generation);
            prop_assert!(generation(&after) >= generation(&before));
            if after.active() != before.active() {
                prop_assert!(done && matches!(step, Step::Activate(_)));
                prop_assert_eq!(before.next.as_ref().map(|next| next.epoch), Some(after.active()));
                prop_assert!(epochs.insert(after.active()));
            } else {
                prop_assert_eq!(before.ring(), after.ring());
            }
            if let Some(ring) = after.ring() {
                prop_assert!(ring.gone.is_empty());
            }
        }
    }
}
