//! What hosts say of VMs, by VM.
//!
//! Owns: one list of all words about VMs, sorted by VM once for a plan, because each step asks again
//! and again. Always holds: only words of hosts in the picture about VMs in the state.

use crate::names::Names;
use quorate_types::{HostReport, VmName, VmReport};

#[derive(Debug)]
pub(crate) struct Heard<'a> {
    /// Where the words about each VM begin; one more at the end.
    begins: Vec<usize>,
    /// Host and what it says.
    words: Vec<(usize, &'a VmReport)>,
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
            words.push((host, said));
        }
        begins.resize(vms.len() + 1, words.len());
        Self { begins, words }
    }

    /// What a host says of a VM.
    pub(crate) fn get(&self, vm: usize, host: usize) -> Option<&'a VmReport> {
        let words = &self.words[self.begins[vm]..self.begins[vm + 1]];
        let mut words = words.iter();
        words.find(|(at, _)| *at == host).map(|(_, said)| *said)
    }
}
