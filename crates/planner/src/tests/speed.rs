//! How long questions take (plans themselves: `bench/planner`). Run it with
//! `cargo test --release -p quorate-planner speed -- --ignored --nocapture`.

use crate::plan;
use crate::testing::*;
use quorate_state::Command;
use serde_json::json;
use std::time::Instant;

/// Chains of five VMs, every tenth pair kept apart, another kept together.
fn cluster(hosts: u32, vms: usize) -> World {
    let mut specs = serde_json::Map::new();
    for n in 0..vms {
        let mut spec = json!({ "memory": "64MiB" });
        if n % 5 != 0 {
            spec["depends_on"][format!("v{}", n - 1)] = json!({});
        }
        specs.insert(format!("v{n}"), spec);
    }
    let mut rules = serde_json::Map::new();
    for n in (0..vms - 3).step_by(10) {
        let vm = |offset: usize| format!("v{}", n + offset);
        rules.insert(format!("a{n}"), json!({ "keep_apart": [vm(0), vm(1)] }));
        rules.insert(format!("w{n}"), json!({ "keep_with": [vm(2), vm(3)] }));
    }
    let mut world = World::new(hosts, json!({ "vms": specs, "rules": rules }));
    for report in world.reports.values_mut() {
        report.capacity.memory.0 = 8 << 30;
        report.capacity.cpus = 16;
    }
    world
}

/// How long questions take.
#[test]
#[ignore = "measures time: run it alone, in release"]
fn speed_of_questions() {
    use crate::{CapacityQuestion, Step, balance, capacity, forecast};
    for (hosts, vms) in [(10, 100), (50, 500), (200, 5000)] {
        let mut world = cluster(hosts, vms);
        world.arm();
        for _ in 0..20 {
            let made = plan(&world.input());
            if made.actions.is_empty() {
                break;
            }
            world.command(Command::CommitPlan(made));
            world.act();
            world.observe();
        }
        let mut snapshot = world.snapshot();
        snapshot.seen.voters = [1, 2, 3].into();
        let fail = Step {
            fail: [host("h4")].into(),
            ..Step::default()
        };
        let drain = Step {
            drain: [host("h5")].into(),
            ..Step::default()
        };
        let begun = Instant::now();
        let answer = forecast(&snapshot, &[fail, drain]).unwrap();
        let actions: usize = answer.stages.iter().map(|stage| stage.actions.len()).sum();
        println!(
            "{hosts}x{vms} fail, then drain: {:?} ({actions} actions)",
            begun.elapsed()
        );
        let begun = Instant::now();
        let question = CapacityQuestion {
            failures: Some(1),
            ..CapacityQuestion::default()
        };
        let one = capacity(&world.input(), &question);
        println!(
            "{hosts}x{vms} any one fails: {:?} (survives {})",
            begun.elapsed(),
            one.survives
        );
        let begun = Instant::now();
        let all = capacity(&world.input(), &CapacityQuestion::default());
        println!(
            "{hosts}x{vms} as far as it is cheap: {:?} (survives {}, looked at {})",
            begun.elapsed(),
            all.survives,
            all.checked
        );
        let begun = Instant::now();
        let moves = balance(&world.input()).moves.len();
        println!(
            "{hosts}x{vms} balance: {:?} ({moves} moves)",
            begun.elapsed()
        );
    }
}
