//! Services in the leader's loop: one look, one commit of everything that was found.
//!
//! Always holds: a host that loses an address because its lease is over gets no new lease before that commit is applied
//! here, so whoever comes back knows that the address is another's before it may serve again (**one-address**). An
//! outcome that is not known keeps such hosts sealed, as for a plan.

use crate::clock::boot_now;
use crate::controller::{Loop, health_of, lock};
use crate::group::ProposeFailure;
use quorate_controller_logic::{
    Leases, ServiceInput, holder_steps, service_problems, service_steps, taken_from,
};
use quorate_membership::Instant;
use quorate_state::{Command, Refusal, ServiceChange, State};
use quorate_types::HostName;
use tracing::{info, warn};

/// Most changes in one commit; what is left is found again in the next round.
const CHANGES_AT_ONCE: usize = 500;

impl Loop {
    /// Returns whether everything was refused.
    pub(crate) async fn serve(&mut self, state: &State, now: Instant) -> bool {
        let (changes, sealed) = self.look_at_services(state, now);
        if changes.is_empty() {
            return false;
        }
        for change in &changes {
            info!(?change, "service");
        }
        let command = Command::ChangeServices { changes };
        let result = self.inner.group.propose("controller", command).await;
        let mut guard = lock(&self.inner.leases);
        let Some(leases) = guard.as_mut() else {
            return false;
        };
        let unknown = matches!(result, Err(ProposeFailure::Unknown(_)));
        if unknown {
            leases.uncertain = true;
        } else {
            for host in &sealed {
                leases.sealed_at.remove(host);
                leases.table.unseal(host);
            }
        }
        match result {
            Ok(_) => false,
            Err(ProposeFailure::Refused(Refusal::Action { .. } | Refusal::Unknown { .. })) => true,
            Err(error) => {
                warn!(%error, "changes of services were not committed");
                true
            }
        }
    }

    /// What is to be changed, and the hosts that were sealed for it.
    fn look_at_services(
        &mut self,
        state: &State,
        now: Instant,
    ) -> (Vec<ServiceChange>, Vec<HostName>) {
        let nothing = (Vec::new(), Vec::new());
        let mut guard = lock(&self.inner.leases);
        let Some(leases) = guard.as_mut() else {
            return nothing;
        };
        if state.services.is_empty() || !leases.table.is_quorate(now) {
            lock(&self.inner.shown).services.clear();
            return nothing;
        }
        let health = health_of(leases, state, now);
        let input = ServiceInput {
            state,
            reports: &leases.reports,
            health: &health,
            now,
        };
        // Addresses first: clients wait for those.
        let mut changes = holder_steps(&input, &mut self.services);
        changes.extend(service_steps(&input, &mut self.services));
        changes.truncate(CHANGES_AT_ONCE);
        let taken: Vec<HostName> = taken_from(&input, &changes).into_iter().cloned().collect();
        lock(&self.inner.shown).services = service_problems(&input, &self.services);
        let sealed = seal(leases, taken);
        (changes, sealed)
    }
}

/// Seals these hosts; returns those that were not sealed before.
fn seal(leases: &mut Leases, hosts: Vec<HostName>) -> Vec<HostName> {
    let now = boot_now();
    let open = hosts
        .into_iter()
        .filter(|host| !leases.table.is_sealed(host));
    let open: Vec<HostName> = open.collect();
    for host in &open {
        leases.table.seal(host);
        leases.sealed_at.insert(host.clone(), now);
    }
    open
}
