//! Who knows the flows of clients' connections while guests change hosts, and what of them is pinned.
//!
//! ```text
//!   edge at the source --pause: shipped, if both daemons are up--> edge at the target
//!        '--its guest is gone--> the source's daemon remembers them --tables are loaded again--> forgotten
//!   a member that answers --> the edge on its host
//! ```
//! A host pins what a coming ring would strand when it loads that ring, and again when flows come with a guest. Modelled as
//! perfect: pins are everywhere at once.

use crate::event::{D, HostId};
use crate::guest::{ProcId, StreamPhase};
use crate::mutate::Mutation;
use crate::services::vm_of;
use crate::time::MS;
use crate::world::World;
use quorate_types::VmName;
use std::collections::BTreeSet;

impl World {
    /// A guest is paused before its switchover, or an agent finds it so: its flows go ahead.
    pub(crate) fn flows_leave(&mut self, proc: ProcId) {
        if self.clients.connections.is_empty() {
            return;
        }
        let Some(host) = self.guests.get(&proc).map(|guest| guest.host) else {
            return;
        };
        let ways = &mut self.clients.ways;
        let delay = match ways.chance(125) {
            true => ways.range(20, 600) * MS,
            false => ways.range(1, 10) * MS,
        };
        self.daemon_after(host, delay, D::ShipFlows(proc));
    }

    pub(crate) fn ship_flows(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let Some(out) = &guest.out else { return };
        let (from, source, target) = (guest.host, proc, out.target);
        let Some(to) = self.guests.get(&target).map(|guest| guest.host) else {
            return;
        };
        if self.net.connected(from, to) {
            let delay = self.clients.ways.range(1, 10) * MS;
            self.daemon_after(to, delay, D::FlowsCome { source, target });
        }
    }

    /// They are for a guest that waits here, or is here by now.
    pub(crate) fn flows_come(&mut self, host: HostId, source: ProcId, target: ProcId) {
        if !self.guests.contains_key(&target) {
            return;
        }
        for of in &mut self.clients.connections {
            if of.proc == source || of.proc == target {
                of.known.insert(host);
            }
        }
        if !self.mutated(Mutation::StraysLookedAtOnce) {
            self.pin_strays(host);
        }
    }

    /// Flows that this host knows and that a ring it prepares would not reach any more.
    pub(crate) fn pin_strays(&mut self, host: HostId) {
        let closed = match self.mutated(Mutation::StraysLookedAtOnce) {
            true => self.closed_edges(host),
            false => BTreeSet::new(),
        };
        let loaded = &self.hosts[host].datapath.loaded;
        for of in &mut self.clients.connections {
            let ring = loaded
                .get(&of.service)
                .and_then(|loaded| loaded.coming.as_ref());
            let Some(ring) = ring else { continue };
            if !of.known.contains(&host) || closed.contains(&of.member) {
                continue;
            }
            let slot = ring.slots[of.slot as usize];
            let reached = [slot.primary, slot.previous].map(|member| vm_of(ring, member));
            of.pinned |= !reached.contains(&Some(&of.member));
        }
    }

    /// Members of which this host's edges deliver nothing: they stand still at their switchover, or have left.
    fn closed_edges(&self, host: HostId) -> BTreeSet<VmName> {
        let here = |vm: &VmName| {
            let mut guests = self.guests.values();
            guests.any(|guest| {
                let phase = guest.out.as_ref().map(|out| out.phase);
                let leaves = matches!(
                    phase,
                    Some(StreamPhase::PreSwitchover | StreamPhase::Device | StreamPhase::Completed)
                );
                guest.host == host && guest.vm == *vm && !leaves
            })
        };
        let members = self.clients.connections.iter().map(|of| &of.member);
        members.filter(|vm| !here(vm)).cloned().collect()
    }

    /// The host has prepared what it was to: it needs to remember no flows of guests that have left.
    pub(crate) fn forget_left(&mut self, host: HostId) {
        let guests = &self.guests;
        let here = |vm: &VmName| {
            let mut guests = guests.values();
            guests.any(|guest| guest.host == host && guest.vm == *vm)
        };
        for of in &mut self.clients.connections {
            if of.known.contains(&host) && !here(&of.member) {
                of.known.remove(&host);
            }
        }
    }
}
