//! The leader's look at services, as the controller takes it: one commit of everything that was found.

use crate::event::HostId;
use crate::leader::Purpose;
use crate::mutate::Mutation;
use crate::time::MS;
use crate::world::World;
use quorate_controller_logic::{ServiceInput, holder_steps, service_steps, taken_from};
use quorate_membership::Instant;
use quorate_state::{Command, ServiceChange, State};
use quorate_types::HostName;
use std::collections::BTreeSet;

/// After a refusal.
const AGAIN: u64 = 100 * MS;

impl World {
    pub(crate) fn serve(&mut self, host: HostId, state: &State, now: Instant) {
        let hasty = self.mutated(Mutation::ActivateUnprepared);
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let leader = &mut daemon.leader;
        let Some(leases) = leader.leases.as_mut() else {
            return;
        };
        if state.services.is_empty() || leader.serving.is_some() || self.now < leader.serve_at {
            return;
        }
        let health = state
            .hosts
            .keys()
            .map(|name| (name.clone(), leases.table.health(name, now)));
        let health = health.collect();
        let input = ServiceInput {
            state,
            reports: &leases.reports,
            health: &health,
            now,
        };
        let mut changes = holder_steps(&input, &mut leader.services);
        changes.extend(service_steps(&input, &mut leader.services));
        if hasty {
            changes = changes.into_iter().flat_map(at_once).collect();
        }
        if changes.is_empty() {
            return;
        }
        let taken = taken_from(&input, &changes).into_iter().cloned();
        let open = taken.filter(|name| !leases.table.is_sealed(name));
        let sealed: Vec<HostName> = open.collect();
        for name in &sealed {
            leases.table.seal(name);
            leases.sealed_at.insert(name.clone(), now);
        }
        self.trace(|| format!("services: {changes:?}"));
        let command = Command::ChangeServices { changes };
        self.propose(host, "controller", command, Purpose::Services(sealed));
    }

    /// It is applied here, or something else is in its place.
    pub(crate) fn served(&mut self, host: HostId, index: usize, sealed: &[HostName], good: bool) {
        let Some(daemon) = self.hosts[host].daemon.as_mut() else {
            return;
        };
        let leader = &mut daemon.leader;
        if leader.serving == Some(index) {
            leader.serving = None;
        }
        if !good {
            leader.serve_at = self.now + AGAIN;
        }
        if let Some(leases) = leader.leases.as_mut() {
            for name in sealed {
                leases.sealed_at.remove(name);
                leases.table.unseal(name);
            }
        }
        self.request_round(host, 0);
    }

    /// Hosts whose address is being given away right now.
    pub(crate) fn losing_addresses(&self, me: HostId) -> BTreeSet<HostName> {
        let pending = self.hosts[me].daemon.as_ref().map(|d| &d.leader.pending);
        let pending = pending.into_iter().flatten();
        let sealed = pending.filter_map(|(_, (_, why))| match why {
            Purpose::Services(sealed) => Some(sealed.iter().cloned()),
            _ => None,
        });
        sealed.flatten().collect()
    }
}

/// The broken variant: prepared and in force in one step.
fn at_once(change: ServiceChange) -> Vec<ServiceChange> {
    match &change {
        ServiceChange::PrepareRing { service, epoch, .. } => {
            let activate = ServiceChange::ActivateRing {
                service: service.clone(),
                epoch: *epoch,
            };
            vec![change, activate]
        }
        _ => vec![change],
    }
}
