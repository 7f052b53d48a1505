//! Times reading and planning of a CIB: `cargo run --release -p quorate-import --example plan_time FILE`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use quorate_import::pacemaker::{plan, read};
use std::time::Instant;

fn main() {
    for file in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&file).unwrap();
        let begun = Instant::now();
        let cib = read(&text, &file).unwrap();
        let read_ms = begun.elapsed().as_millis();
        let planned = plan(&cib, 0);
        let total_ms = begun.elapsed().as_millis();
        println!(
            "{file}: read {read_ms} ms, planned {} ms, {} actions",
            total_ms - read_ms,
            planned.actions.len()
        );
    }
}
