//! From a CIB to a manifest, with a report of what is not carried over.
//!
//! VMs are the primitives of agents that run virtual machines. What the CIB does not know of them (disks,
//! networks, often memory) is filled in with a guess, and every guess is in the report. Always holds: the
//! manifest passes Quorate's own reader and checks; whatever would not is left out and reported.

mod draft;
mod relations;
mod vms;
mod write;

use super::judge::Judged;
use super::model::Cib;
use crate::Problem;
use draft::Draft;
use quorate_manifest::Existing;
use std::collections::BTreeMap;

/// A manifest, and what is not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The manifest, YAML, the report as comments at its head.
    pub manifest: String,
    /// What is not carried over, or was guessed, with its place in the CIB.
    pub report: Vec<Problem>,
    /// Constraints that name hosts or resources that do not exist; left out, and also in the report.
    pub unknown: Vec<Problem>,
    /// How many VMs the manifest has.
    pub vms: usize,
}

/// Converts a CIB. With `every` each primitive becomes a VM, whatever its agent does.
#[must_use]
pub fn convert(cib: &Cib, file: &str, every: bool, now: i64) -> Converted {
    let mut judged = Judged::new(cib, cib.execution_date.unwrap_or(now));
    let mut draft = Draft::new(cib);
    vms::collect(&mut draft, cib, &judged, every);
    relations::collect(&mut draft, cib, &mut judged);
    settle(&mut draft);
    let left = cib
        .unsupported
        .iter()
        .filter(|one| !draft.carried.contains(&one.place));
    draft.notes.extend(left.cloned().collect::<Vec<_>>());
    draft.notes.extend(cib.warnings.iter().cloned());
    let left_out = draft.unknown.iter().map(|unknown| Problem {
        message: format!("{}: left out", unknown.message),
        ..unknown.clone()
    });
    draft.notes.extend(left_out.collect::<Vec<_>>());
    draft.notes.sort_by_key(|note| note.place);
    let manifest = write::manifest(&draft);
    let head = write::head(&draft.notes, file);
    Converted {
        manifest: format!("{head}{manifest}"),
        vms: draft.vms.len(),
        report: draft.notes,
        unknown: draft.unknown,
    }
}

/// Most conflicts that are taken out one by one; more than that is not worth the time.
const MAX_CONFLICTS: usize = 100;

/// Takes out what the checks refuse, one conflict after the other.
fn settle(draft: &mut Draft) {
    for _ in 0..MAX_CONFLICTS {
        let text = write::manifest(draft);
        let Ok(parsed) = quorate_manifest::parse(&text, "manifest", &BTreeMap::new()) else {
            return;
        };
        let existing = Existing {
            hosts: parsed
                .manifest
                .vms
                .values()
                .flat_map(|vm| vm.hosts.clone())
                .collect(),
            ..Existing::default()
        };
        let problems = quorate_manifest::check(&parsed.manifest, &existing);
        let Some(problem) = problems
            .into_iter()
            .find(|problem| draft.leave_out(problem))
        else {
            return;
        };
        draft.note_left_out(&problem);
    }
    draft.leave_out_all_rules();
}
