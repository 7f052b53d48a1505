//! How good placement is: as many VMs as an exact solver finds, on small random sites that are
//! full, with every kind of hard rule. The seeds are fixed, so the figures are the same anywhere.
//!
//! `QUORATE_QUALITY_CASES=2000 cargo test --release -p quorate-planner quality -- --nocapture`

use crate::testing::*;
use microlp::{ComparisonOp, OptimizationDirection, Problem, Variable};
use quorate_state::{Command, Envelope, FORMAT, Ownership};
use quorate_types::{ByteSize, Timestamp};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Rounds until a site is at rest.
const ROUNDS: u32 = 40;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A site in numbers: what the exact solver sees.
#[derive(Debug)]
struct Site {
    /// Memory in MiB, virtual CPUs, GPUs.
    hosts: Vec<[u64; 3]>,
    racks: Vec<u64>,
    vms: Vec<[u64; 3]>,
    allowed: Vec<Vec<bool>>,
    /// Kind, VMs.
    rules: Vec<(&'static str, Vec<usize>)>,
    needs: Vec<Option<usize>>,
}

fn site(seed: u64) -> Site {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
    let hosts = 3 + random.below(3);
    let vms = 8 + random.below(7);
    let host = |random: &mut Random| {
        let gpus = if random.chance(40) {
            random.below(3)
        } else {
            0
        };
        [1024 + random.below(5) * 512, 4 + random.below(9), gpus]
    };
    let hosts: Vec<[u64; 3]> = (0..hosts).map(|_| host(&mut random)).collect();
    let all: u64 = hosts.iter().map(|host| host[0]).sum();
    // From loose to far too much.
    let mean = all * (60 + random.below(70)) / 100 / vms;
    let vm = |random: &mut Random| {
        let memory = 64 + mean / 3 + random.below((mean * 4 / 3).max(1));
        [memory, 1 + random.below(3), u64::from(random.chance(12))]
    };
    let vms: Vec<[u64; 3]> = (0..vms).map(|_| vm(&mut random)).collect();
    let allowed = vms.iter().map(|_| {
        let any = !random.chance(25);
        hosts.iter().map(|_| any || random.chance(50)).collect()
    });
    let allowed = allowed.collect();
    let mut rules = Vec::new();
    for kind in ["keep_apart", "keep_apart", "racks", "keep_with", "two"] {
        if random.chance(35) {
            let count = if kind == "keep_with" {
                2
            } else {
                2 + random.below(2)
            };
            let mut members: Vec<usize> = Vec::new();
            for _ in 0..count {
                let vm = usize::try_from(random.below(vms.len() as u64)).unwrap();
                if !members.contains(&vm) {
                    members.push(vm);
                }
            }
            if members.len() > 1 {
                rules.push((kind, members));
            }
        }
    }
    let racks = hosts.iter().map(|_| random.below(3)).collect();
    let needs = (0..vms.len()).map(|vm| {
        let other = usize::try_from(random.below(vm as u64)).unwrap();
        (vm > 0 && random.chance(20)).then_some(other)
    });
    Site {
        racks,
        needs: needs.collect(),
        hosts,
        vms,
        allowed,
        rules,
    }
}

impl Site {
    fn manifest(&self) -> Value {
        let mut hosts = serde_json::Map::new();
        for (n, host) in self.hosts.iter().enumerate() {
            let rack = format!("r{}", self.racks[n]);
            // Four threads: the limit in percent makes the number of virtual CPUs.
            let spec = json!({
                "labels": { "rack": rack }, "resources": { "gpu": host[2] },
                "cpu_overcommit_percent": host[1] * 25,
            });
            hosts.insert(format!("h{}", n + 1), spec);
        }
        let mut vms = serde_json::Map::new();
        for (n, vm) in self.vms.iter().enumerate() {
            let allowed = self.allowed[n].iter().enumerate().filter(|(_, may)| **may);
            let allowed: Vec<String> = allowed.map(|(host, _)| format!("h{}", host + 1)).collect();
            let mut spec = json!({
                "memory": format!("{}MiB", vm[0]), "cpus": vm[1], "resources": { "gpu": vm[2] },
                "hosts": allowed,
            });
            if let Some(other) = self.needs[n] {
                spec["depends_on"][format!("v{other}")] = json!({});
            }
            vms.insert(format!("v{n}"), spec);
        }
        let mut rules = serde_json::Map::new();
        for (n, (kind, members)) in self.rules.iter().enumerate() {
            let members: Vec<String> = members.iter().map(|vm| format!("v{vm}")).collect();
            let rule = match *kind {
                "racks" => json!({ "keep_apart": members, "across": "rack" }),
                "two" => json!({ "keep_apart": members, "max": 2 }),
                kind => json!({ kind: members }),
            };
            rules.insert(format!("r{n}"), rule);
        }
        json!({ "hosts": hosts, "vms": vms, "rules": rules })
    }

    /// The planner's answer: host of each VM. `None`: the site contradicts itself.
    fn planned(&self) -> Option<Vec<Option<usize>>> {
        let count = u32::try_from(self.hosts.len()).unwrap();
        let mut world = World::new(count, json!({}));
        for (n, host) in self.hosts.iter().enumerate() {
            let name = crate::testing::host(&format!("h{}", n + 1));
            let report = world.reports.get_mut(&name).unwrap();
            report.capacity.memory = ByteSize::mib(host[0]);
            report.capacity.cpus = 4;
        }
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "ann".into(),
            command: Command::ApplyManifest {
                base: None,
                manifest: serde_json::from_value(self.manifest()).unwrap(),
            },
        };
        world.state.apply(&envelope).ok()?;
        // Every plan on the way is linted.
        world.run(ROUNDS);
        let place = |n: usize| match &world.record(&format!("v{n}")).ownership {
            Ownership::Owned { host, .. } => Some(host.as_str()[1..].parse::<usize>().unwrap() - 1),
            _ => None,
        };
        Some((0..self.vms.len()).map(place).collect())
    }

    /// Most VMs that can run at all.
    fn exact(&self) -> usize {
        let mut problem = Problem::new(OptimizationDirection::Maximize);
        let mut at: Vec<Vec<Variable>> = Vec::new();
        for allowed in &self.allowed {
            let variable = |may: &bool| problem.add_integer_var(1.0, (0, i32::from(*may)));
            let all_none = allowed.iter().all(|may| !may);
            // An empty list of hosts allows all.
            let free = vec![true; allowed.len()];
            let allowed = if all_none { &free } else { allowed };
            at.push(allowed.iter().map(variable).collect());
        }
        let ones = |vars: &mut dyn Iterator<Item = Variable>| -> Vec<(Variable, f64)> {
            vars.map(|var| (var, 1.0)).collect()
        };
        for vars in &at {
            problem.add_constraint(ones(&mut vars.iter().copied()), ComparisonOp::Le, 1.0);
        }
        for (host, have) in self.hosts.iter().enumerate() {
            for (what, have) in have.iter().enumerate() {
                let overhead = if what == 0 { 64 } else { 0 };
                let row = at.iter().zip(&self.vms);
                let row = row.map(|(vars, vm)| (vars[host], (vm[what] + overhead) as f64));
                let row: Vec<_> = row.filter(|(_, need)| *need > 0.0).collect();
                if !row.is_empty() {
                    problem.add_constraint(row, ComparisonOp::Le, *have as f64);
                }
            }
        }
        self.add_rules(&mut problem, &at);
        for (vm, other) in self.needs.iter().enumerate() {
            if let Some(other) = other {
                let mut row = ones(&mut at[vm].iter().copied());
                row.extend(at[*other].iter().map(|var| (*var, -1.0)));
                problem.add_constraint(row, ComparisonOp::Le, 0.0);
            }
        }
        let solution = problem.solve().unwrap().into_solution().unwrap();
        solution.objective().round() as usize
    }

    fn add_rules(&self, problem: &mut Problem, at: &[Vec<Variable>]) {
        for (kind, members) in &self.rules {
            let mut domains: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
            for host in 0..self.hosts.len() {
                let domain = if *kind == "racks" {
                    self.racks[host]
                } else {
                    host as u64
                };
                domains.entry(domain).or_default().push(host);
            }
            if *kind != "keep_with" {
                let max = if *kind == "two" { 2.0 } else { 1.0 };
                for hosts in domains.values() {
                    let vars = members
                        .iter()
                        .flat_map(|vm| hosts.iter().map(|host| at[*vm][*host]));
                    let row: Vec<_> = vars.map(|var| (var, 1.0)).collect();
                    problem.add_constraint(row, ComparisonOp::Le, max);
                }
                continue;
            }
            for a in members {
                for b in members.iter().filter(|b| *b != a) {
                    for host in 0..self.hosts.len() {
                        let elsewhere = (0..self.hosts.len()).filter(|other| *other != host);
                        let mut row: Vec<_> = elsewhere.map(|other| (at[*b][other], 1.0)).collect();
                        row.push((at[*a][host], 1.0));
                        problem.add_constraint(row, ComparisonOp::Le, 1.0);
                    }
                }
            }
        }
    }

    /// Whether a placement keeps every hard rule. By itself: neither planner nor linter take part.
    fn broken(&self, seats: &[Option<usize>]) -> Option<String> {
        for (host, have) in self.hosts.iter().enumerate() {
            for (what, have) in have.iter().enumerate() {
                let overhead = if what == 0 { 64 } else { 0 };
                let here = seats
                    .iter()
                    .zip(&self.vms)
                    .filter(|(seat, _)| **seat == Some(host));
                let used: u64 = here.map(|(_, vm)| vm[what] + overhead).sum();
                if used > *have {
                    return Some(format!("host {host} lacks {what}: {used} of {have}"));
                }
            }
        }
        for (kind, members) in &self.rules {
            let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
            for host in members.iter().filter_map(|vm| seats[*vm]) {
                let domain = if *kind == "racks" {
                    self.racks[host]
                } else {
                    host as u64
                };
                *counts.entry(domain).or_default() += 1;
            }
            let max = if *kind == "two" { 2 } else { 1 };
            let broken = match *kind {
                "keep_with" => counts.len() > 1,
                _ => counts.values().any(|count| *count > max),
            };
            if broken {
                return Some(format!("{kind} {members:?}: {counts:?}"));
            }
        }
        let wrong = seats.iter().enumerate().find(|(vm, seat)| {
            let any = self.allowed[*vm].iter().all(|may| !may);
            seat.is_some_and(|host| !any && !self.allowed[*vm][host])
        });
        wrong.map(|(vm, _)| format!("v{vm} is where it may not be"))
    }
}

#[test]
fn as_many_vms_are_placed_as_an_exact_solver_finds() {
    let cases = std::env::var("QUORATE_QUALITY_CASES").ok();
    let cases: u64 = cases.and_then(|n| n.parse().ok()).unwrap_or(60);
    let (mut tried, mut short, mut missing, mut all) = (0, Vec::new(), 0, 0);
    let mut spans = [std::time::Duration::ZERO; 2];
    let from = std::env::var("QUORATE_QUALITY_FROM").ok();
    let from: u64 = from.and_then(|n| n.parse().ok()).unwrap_or(0);
    for seed in from..from + cases {
        let site = site(seed);
        let begun = std::time::Instant::now();
        let seats = site.planned();
        spans[0] += begun.elapsed();
        let Some(seats) = seats else {
            continue;
        };
        assert_eq!(site.broken(&seats), None, "seed {seed}: {seats:?}");
        tried += 1;
        let placed = seats.iter().flatten().count();
        let begun = std::time::Instant::now();
        // All is as many as there can be.
        let exact = match placed == site.vms.len() {
            true => placed,
            false => site.exact(),
        };
        spans[1] += begun.elapsed();
        all += exact;
        if placed < exact {
            missing += exact - placed;
            short.push((seed, placed, exact));
        }
    }
    println!(
        "{tried} sites: {} with fewer than the exact solver, {missing} of {all} VMs missing: {short:?}; planner {:?}, exact {:?}",
        short.len(),
        spans[0],
        spans[1],
    );
    assert!(
        tried * 2 > cases,
        "most sites must make sense: {tried} of {cases}"
    );
    assert!(short.len() as u64 * 100 <= tried, "{short:?}");
}
