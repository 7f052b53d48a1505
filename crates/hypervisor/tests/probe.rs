//! The probe with a real QEMU.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{QEMU, bench};
use quorate_hypervisor::qemu::probe::{AccelChoice, ProbeOptions, probe, trial_boot};
use quorate_hypervisor::{Accel, HypervisorError};

#[tokio::test]
async fn the_facts_of_this_host() {
    let Some(bench) = bench() else { return };
    let mut options = ProbeOptions::new(QEMU, bench.dir.path());
    options.accel = AccelChoice::Fixed(Accel::Tcg);
    let begun = Instant::now();
    let facts = probe(&options).await.unwrap();
    println!(
        "probed in {:?}: {} {}",
        begun.elapsed(),
        facts.version,
        facts.accel_reason
    );
    let q35 = facts.resolve_machine("q35").unwrap();
    assert!(q35.starts_with("pc-q35-"), "{q35}");
    assert_eq!(facts.resolve_machine("microvm"), Some("microvm"));
    let usable: Vec<&str> = facts.usable_cpu_models().collect();
    println!(
        "{} CPU models, {} usable: {usable:?}",
        facts.cpu_models.len(),
        usable.len()
    );
    assert!(
        usable.iter().any(|model| model.starts_with("qemu64")),
        "{usable:?}"
    );
    assert!(!usable.contains(&"host"));
    assert_eq!(
        std::fs::read_dir(bench.dir.path()).unwrap().count(),
        0,
        "nothing is left behind"
    );

    options.binary = "/no/such/qemu".into();
    let error = probe(&options).await.unwrap_err();
    assert!(
        matches!(&error, HypervisorError::Probe { detail } if detail.contains("/no/such/qemu"))
    );
}

#[tokio::test]
async fn a_qemu_that_cannot_be_confined_as_guests_are_is_used_unconfined() {
    let Some(bench) = bench() else { return };
    let site = tempfile::tempdir().unwrap();
    for (refuses, sandbox) in [("*spawn=deny*", false), ("nothing", true)] {
        let binary = site.path().join("qemu");
        let script =
            format!("#!/bin/sh\ncase \"$*\" in {refuses}) exit 1 ;; esac\nexec {QEMU} \"$@\"\n");
        std::fs::write(&binary, script).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&binary, mode).unwrap();
        let mut options = ProbeOptions::new(&binary, bench.dir.path());
        options.accel = AccelChoice::Fixed(Accel::Tcg);
        assert_eq!(probe(&options).await.unwrap().sandbox, sandbox, "{refuses}");
    }
}

#[tokio::test]
async fn a_trial_boot_tells_a_working_accelerator_from_a_broken_one() {
    let Some(bench) = bench() else { return };
    let mut options = ProbeOptions::new(QEMU, bench.dir.path());
    options.trial_within = Duration::from_secs(20);
    println!(
        "boot sector: {}",
        trial_boot(&options, Accel::Tcg).await.unwrap()
    );
    options.kernel = Some(std::env::var_os("QUORATE_TEST_KERNEL").unwrap().into());
    println!(
        "kernel: {}",
        trial_boot(&options, Accel::Tcg).await.unwrap()
    );
    let junk = bench.dir.path().join("junk");
    std::fs::write(&junk, vec![0; 4096]).unwrap();
    options.kernel = Some(junk);
    options.trial_within = Duration::from_secs(1);
    let reason = trial_boot(&options, Accel::Tcg).await.unwrap_err();
    println!("junk: {reason}");

    // Whatever this host can do, the automatic choice ends in time with a reason.
    let mut options = ProbeOptions::new(QEMU, bench.dir.path());
    options.kernel = Some(std::env::var_os("QUORATE_TEST_KERNEL").unwrap().into());
    options.trial_within = Duration::from_secs(3);
    let begun = Instant::now();
    let facts = probe(&options).await.unwrap();
    println!(
        "auto: {:?} ({}) in {:?}",
        facts.accel,
        facts.accel_reason,
        begun.elapsed()
    );
    assert!(!facts.accel_reason.is_empty() && begun.elapsed() < Duration::from_secs(20));
}
