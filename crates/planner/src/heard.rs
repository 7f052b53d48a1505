//! What hosts say of VMs, by VM.
//!
//! Owns: one list of all words about VMs, sorted by VM once for a plan, because each step asks again
//! and again. Always holds: only words of hosts in the picture about VMs in the state.

use crate::names::Names;
use quorate_types::{Epoch, HostReport, VmName, VmPhase, VmReport};

#[derive(Debug)]
pub(crate) struct Heard<'a> {
    /// Where the words about each VM begin; one more at the end.
    begins: Vec<usize>,
    words: Vec<Word<'a>>,
}

/// What one host says of a VM. What every step asks for stands here itself: with many VMs a report is
/// far away in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Word<'a> {
    host: usize,
    pub(crate) epoch: Epoch,
    pub(crate) closed: Epoch,
    pub(crate) phase: VmPhase,
    pub(crate) report: &'a VmReport,
}

impl<'a> Heard<'a> {
    pub(crate) fn new(
        reports: impl Iterator<Item = Option<&'a HostReport>>,
        vms: &Names<'_, VmName>,
    ) -> Self {
        let mut all = Vec::with_capacity(vms.len());
        for (host, report) in reports.enumerate() {
            let said = report.into_iter().flat_map(|report| &report.vms);
            all.extend(said.filter_map(|(vm, said)| Some((vms.get(vm)?, host, said))));
        }
        // Hosts stay in their order.
        all.sort_by_key(|(vm, _, _)| *vm);
        let mut begins = Vec::with_capacity(vms.len() + 1);
        let mut words = Vec::with_capacity(all.len());
        for (vm, host, said) in all {
            begins.resize(vm + 1, words.len());
            words.push(Word {
                host,
                epoch: said.epoch,
                closed: said.closed,
                phase: said.phase,
                report: said,
            });
        }
        begins.resize(vms.len() + 1, words.len());
        Self { begins, words }
    }

    /// What a host says of a VM.
    pub(crate) fn get(&self, vm: usize, host: usize) -> Option<Word<'a>> {
        let words = &self.words[self.begins[vm]..self.begins[vm + 1]];
        words.iter().copied().find(|word| word.host == host)
    }
}
