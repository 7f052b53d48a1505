//! What a service's table costs to make, how even it is, and how much of it one member's leaving moves.
//!
//! ```text
//! cargo bench -p quorate-bench --bench ring        BENCH=services make bench
//! ```
//! Criterion measures (and compares with its last run, below `target/criterion`); the figures go to `services-ring.json` too.
//! Nothing is judged here: `quorate-balancer`'s tests hold evenness and disruption against their limits.
#![allow(clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion};
use quorate_balancer::ring::{FEW_SLOTS, SLOTS, table};
use quorate_bench::Report;
use quorate_types::VmName;
use quorate_types::service::RingMember;
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// Members of equal weight, sorted as in a ring.
fn members(count: u16) -> Vec<RingMember> {
    let member = |number: u16| RingMember {
        vm: VmName::new(format!("web{number:03}")).unwrap(),
        mac: [2, 0, 0, 0, number.to_be_bytes()[0], number.to_be_bytes()[1]],
        weight: 1,
    };
    (0..count).map(member).collect()
}

/// By how many percent of its share the member that is furthest off is above or below it.
fn imbalance(list: &[RingMember], slots: u32) -> f64 {
    let mut held = vec![0_u32; list.len()];
    for member in table(list, slots) {
        held[usize::from(member)] += 1;
    }
    let fair = f64::from(slots) / held.len() as f64;
    let off = held.into_iter().map(|held| (f64::from(held) - fair).abs());
    off.fold(0.0, f64::max) / fair * 100.0
}

/// For each member: how many percent of the slots go from one of the others to another when it leaves.
fn disruption(list: &[RingMember], slots: u32) -> Vec<f64> {
    let before = table(list, slots);
    let without = |gone: usize| {
        let mut rest = list.to_vec();
        rest.remove(gone);
        let after = table(&rest, slots);
        let moved = before.iter().zip(after).filter(|(old, new)| {
            let old = usize::from(**old);
            old != gone && list[old].vm != rest[usize::from(*new)].vm
        });
        moved.count() as f64 / f64::from(slots) * 100.0
    };
    (0..list.len()).map(without).collect()
}

/// Milliseconds for one table, of each of criterion's samples.
fn build(criterion: &mut Criterion, list: &[RingMember], slots: u32) -> Vec<f64> {
    let samples = RefCell::new(Vec::new());
    let id = BenchmarkId::new(format!("{slots} slots"), format!("{} members", list.len()));
    let mut group = criterion.benchmark_group("ring");
    group.sample_size(30);
    group.warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(2));
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|times| {
            let begun = Instant::now();
            for _ in 0..times {
                std::hint::black_box(table(std::hint::black_box(list), slots));
            }
            let took = begun.elapsed();
            samples
                .borrow_mut()
                .push(took.as_secs_f64() * 1e3 / times as f64);
            took
        });
    });
    group.finish();
    samples.into_inner()
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut report = Report::new();
    let mut base = None;
    for (count, slots) in [(3, SLOTS), (100, SLOTS), (100, FEW_SLOTS)] {
        let list = members(count);
        let samples = build(&mut criterion, &list, slots);
        let ring = format!("ring of {count} members, {slots} slots");
        report.add(&ring, "ms", &samples, base);
        base = base.or_else(|| quorate_bench::median(&samples));
        let name = format!("{ring}: imbalance");
        report.add(&name, "%", &[imbalance(&list, slots)], None);
        let name = format!("{ring}: moved among others when one leaves");
        report.add(&name, "%", &disruption(&list, slots), None);
    }
    criterion.final_summary();
    report.publish("services-ring").unwrap();
}
