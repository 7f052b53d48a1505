//! End-to-end tests of the whole system: the real daemon, real QEMU guests (software emulation), a
//! real kernel bridge and real namespaces on one machine. Needs root and the guest image
//! (`make guest`).
//!
//! ```text
//! cargo test -p quorate-daemon --test lab -- --test-threads=1 --nocapture
//! ```
//!
//! Owns: the proof that Quorate keeps its promises where nothing is simulated. Every figure is printed
//! as a line `MEASURED name: value unit (target)`. Always holds: a test waits for events with a deadline;
//! the only spans that are slept through are the lengths of faults (an outage of 1.5 s) and spans in
//! which nothing may happen. A limit of the issue is held against the median of at least three rounds; one round may
//! be half as long again, because two cores that also emulate the guests are noisy.
//!
//! The names sort the tests: the basic ones run first.
#![allow(clippy::unwrap_used)]

mod harness;
mod t01_failover;
mod t02_outage;
mod t03_daemons;
mod t04_partitions;
mod t05_migration;
mod t06_parallel;
mod t07_restart;
mod t08_drain;
mod t09_fencing;
mod t10_faults;
mod t11_memory;
mod t12_bad_input;
mod t13_chain;
mod t14_two_hosts;
mod t15_debian;
mod t16_live;
mod t16_mirrored;
mod t17_storage_cut;
mod t18_storage_loss;
mod t19_bare;
mod t19_members;
mod t19_services;
mod t20_holder;
mod t21_routers;
mod t22_block;
mod t23_many_luns;
