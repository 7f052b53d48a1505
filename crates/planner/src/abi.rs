//! CPU model and machine version that guests get: equal on every host they may migrate to.
//!
//! Always holds: the model is usable on all the hosts that were asked, and the machine version
//! exists on all of them (QEMU keeps older versions, so the oldest of the newest is common).

use quorate_state::GuestAbi;
use quorate_types::HostReport;
use quorate_types::spec::Machine;

/// QEMU's named x86 models, best first. Two vendors never meet: only the last lines are common.
const MODELS: &[&str] = &[
    "SapphireRapids",
    "EPYC-Genoa",
    "Icelake-Server-noTSX",
    "Icelake-Server",
    "EPYC-Milan",
    "Cooperlake",
    "Cascadelake-Server-noTSX",
    "Cascadelake-Server",
    "EPYC-Rome",
    "Skylake-Server-noTSX-IBRS",
    "Skylake-Server-IBRS",
    "Skylake-Server",
    "EPYC-IBPB",
    "EPYC",
    "Skylake-Client-noTSX-IBRS",
    "Skylake-Client-IBRS",
    "Skylake-Client",
    "Broadwell-noTSX-IBRS",
    "Broadwell-IBRS",
    "Broadwell-noTSX",
    "Broadwell",
    "Haswell-noTSX-IBRS",
    "Haswell-IBRS",
    "Haswell-noTSX",
    "Haswell",
    "IvyBridge-IBRS",
    "IvyBridge",
    "SandyBridge-IBRS",
    "SandyBridge",
    "Westmere-IBRS",
    "Westmere",
    "Opteron_G5",
    "Opteron_G4",
    "Nehalem-IBRS",
    "Nehalem",
    "Opteron_G3",
    "Penryn",
    "Opteron_G2",
    "Conroe",
    "Opteron_G1",
    "kvm64",
    SAFE,
];

/// Runs everywhere, also under software emulation.
const SAFE: &str = "qemu64";

/// The best CPU model that all these hosts can run without missing features. One host without KVM
/// makes it the safe one: a guest must look the same there.
pub fn cpu_baseline<'a>(reports: impl Iterator<Item = &'a HostReport> + Clone) -> &'static str {
    let emulated = reports
        .clone()
        .any(|report| report.hypervisor.accel != "kvm");
    if emulated {
        return SAFE;
    }
    let usable = |model: &&&str| {
        reports
            .clone()
            .all(|report| report.hypervisor.cpu_models.contains(**model))
    };
    MODELS.iter().find(usable).unwrap_or(&SAFE)
}

/// What a guest of this machine family gets if it is started while these hosts are there; `None`
/// when not one of them has the family.
pub fn guest_abi<'a>(
    reports: impl Iterator<Item = &'a HostReport> + Clone,
    machine: Machine,
) -> Option<GuestAbi> {
    let newest = reports
        .clone()
        .filter_map(|report| report.hypervisor.machines.get(machine.alias()));
    let machine = newest.min_by(|a, b| version(a).cmp(&version(b)))?;
    Some(GuestAbi {
        machine: machine.clone(),
        cpu_model: cpu_baseline(reports).to_owned(),
    })
}

/// Whether a host can run a guest that was started with `abi`; `Err` says what is missing.
pub(crate) fn supports(report: &HostReport, abi: &GuestAbi) -> Result<(), String> {
    let facts = &report.hypervisor;
    let wanted = version(&abi.machine);
    let has_machine = facts.machines.values().any(|newest| {
        let have = version(newest);
        have.0 == wanted.0 && have.1 >= wanted.1
    });
    if !has_machine {
        return Err(format!("its QEMU has no machine {}", abi.machine));
    }
    // Software emulation runs every model that it lists, and the safe one always.
    if abi.cpu_model != SAFE && !facts.cpu_models.contains(&abi.cpu_model) {
        return Err(format!("its CPUs cannot run the model {}", abi.cpu_model));
    }
    Ok(())
}

/// Family and version of a machine type: `pc-q35-10.0` is (`pc-q35`, [10, 0]).
fn version(machine: &str) -> (&str, Vec<u32>) {
    let parse = |text: &str| -> Option<Vec<u32>> {
        text.split('.').map(|part| part.parse().ok()).collect()
    };
    match machine.rsplit_once('-') {
        Some((family, number)) => match parse(number) {
            Some(number) => (family, number),
            None => (machine, Vec::new()),
        },
        None => (machine, Vec::new()),
    }
}
